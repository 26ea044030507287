//! What reads, writes and the host see of a replica's state: one store, what was replicated beside it, and
//! the order in which batches become visible.
//!
//! Owns that a view and the descriptor that holds for it belong together. When entries are applied, and
//! what must be there before a batch is written, is the state machine's.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use coracle_storage::state::{Batch, Engine, FilterState, MetaName, ReplicaState};
use openraft::EntryPayload;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use super::{BATCH_BYTES_MAX, flush};
use crate::apply::{Applied, Child, GroupState, Membership, MergeState, Neighbour, apply};
use crate::command::{self, AbsorbShard};
use crate::dedup::Remembered;
use crate::descriptor::Descriptor;
use crate::entry::{decode_stored_membership, encode_stored_membership, get_log_id, put_log_id};
use crate::history::History;
use crate::rules::Rules;
use crate::types::{Entry, LogId, Position, Replies, StoredMembership, position};

/// Entries that are looked at for the median: a percent of error, and some milliseconds.
const SAMPLES_MAX: usize = 20_000;

mod merge;
mod view;

use merge::{Durable, foreign_free_from};
pub use view::ReadState;

/// What reads, writes and the host see of a replica's state.
#[derive(Clone)]
pub(crate) struct SharedState(pub(super) Arc<Shared>);

pub(super) struct Shared {
    /// What reads and apply work on, paired: held over the store's writes, so only by blocking work.
    pub(super) current: RwLock<Current>,
    /// The same as of the last batch, for async tasks: never held over a write.
    seen: RwLock<Seen>,
    applied: watch::Sender<Position>,
    /// Whether the store was closed for good. Held over the whole swap of a store: whoever closes
    /// it waits for that, and no swap comes later.
    closed: Mutex<bool>,
    /// Whether the state machine is busy with another group of the node, for as long as that takes.
    busy: AtomicBool,
}

/// For as long as it lives, the state machine is busy with another group.
pub(super) struct Busy(SharedState);

impl Busy {
    pub(super) fn new(shared: &SharedState) -> Busy {
        shared.0.busy.store(true, Ordering::Release);
        Busy(shared.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.0.busy.store(false, Ordering::Release);
    }
}

struct Seen {
    clock: u64,
    ceiling: u64,
    descriptor: Option<Descriptor>,
    history: History,
    /// Weak: a look at figures must not keep a store open that is to be swapped.
    engine: Weak<dyn Engine>,
    /// Cannot be upgraded any more once that store is closed.
    open: Weak<()>,
    foreign_free: Option<u64>,
    can_tell: bool,
    merge: MergeState,
    durable: Durable,
    remembered: Remembered,
    /// The index at which the group last took something over; 0: never.
    taken_over_at: u64,
}

pub(super) struct Current {
    /// `None` while a snapshot is swapped in, and once it was closed for good.
    pub(super) store: Option<ReplicaState>,
    group: GroupState,
    pub(super) last_applied: Option<LogId>,
    pub(super) membership: Arc<StoredMembership>,
    durable: Durable,
    /// Of this store, not of the group: the epoch at which no key outside the arc was left.
    foreign_free: Option<u64>,
}

/// A group's clock and the highest ceiling, as replicated.
pub(crate) struct ClockAndCeiling {
    pub(crate) clock: u64,
    pub(crate) ceiling: u64,
}

impl SharedState {
    /// Opens a store and reads what was durable of it.
    pub(crate) fn open(store: ReplicaState) -> io::Result<Self> {
        let current = Current::load(store)?;
        let at = current.last_applied.as_ref().map(position).unwrap_or_default();
        let seen = RwLock::new(current.seen());
        let applied = watch::Sender::new(at);
        let (current, closed) = (RwLock::new(current), Mutex::default());
        let busy = AtomicBool::new(false);
        Ok(Self(Arc::new(Shared { current, seen, applied, closed, busy })))
    }

    /// Whether a flush would wait for another group of the node: a birth, or what is taken in.
    pub(crate) fn is_busy(&self) -> bool {
        self.0.busy.load(Ordering::Acquire)
    }

    pub(crate) fn applied(&self) -> Position {
        *self.0.applied.borrow()
    }

    pub(crate) async fn wait_for_index(&self, index: u64) {
        let mut applied = self.0.applied.subscribe();
        // The sender lives in `self`, so the wait can only end by reaching the index.
        let _ = applied.wait_for(|applied| applied.index >= index).await;
    }

    pub(crate) async fn wait_for_term(&self, term: u64, at_most: Duration) {
        let mut applied = self.0.applied.subscribe();
        let reached = applied.wait_for(|applied| applied.term >= term);
        // Not reached in time: the caller looks again and decides.
        let _ = tokio::time::timeout(at_most, reached).await;
    }

    pub(crate) fn clock_and_ceiling(&self) -> ClockAndCeiling {
        let seen = self.0.seen.read();
        ClockAndCeiling { clock: seen.clock, ceiling: seen.ceiling }
    }

    pub(crate) fn descriptor(&self) -> Option<Descriptor> {
        self.0.seen.read().descriptor.clone()
    }

    /// What the group keeps of the past, as of the last batch.
    pub(crate) fn history(&self) -> History {
        self.0.seen.read().history.clone()
    }

    /// Makes the state durable, and rewrites all of the store without what it needs no more. Blocks
    /// for as long as that takes. Returns the bytes before and after.
    pub(crate) fn reclaim(&self) -> io::Result<(u64, u64)> {
        let (store, filter) = {
            let current = self.0.current.read();
            (current.store.clone().ok_or_else(no_store)?, current.filter())
        };
        flush(&store, filter).map_err(io::Error::other)?;
        let before = store.engine().approximate_bytes();
        store.compact(None).map_err(io::Error::other)?;
        Ok((before, store.engine().approximate_bytes()))
    }

    /// The position with half of the bytes on each side, and the bytes, by a look at some keys. Blocks.
    pub(crate) fn median(&self, rules: &Rules) -> io::Result<(Option<u64>, u64)> {
        let (store, group) = {
            let current = self.0.current.read();
            (current.store.clone().ok_or_else(no_store)?, current.group.clone())
        };
        // What was written since the last flush counts too.
        store.flush().map_err(io::Error::other)?;
        let samples = store.sample(SAMPLES_MAX).map_err(io::Error::other)?;
        Ok(group.median(&samples, rules))
    }

    /// What a crash would have to replay; 0 when everything is durable.
    pub(crate) fn unflushed_bytes(&self) -> u64 {
        self.engine().map_or(0, |engine| engine.unflushed_bytes())
    }

    /// Cannot be upgraded any more once the store is closed.
    pub(crate) fn store_marker(&self) -> Weak<()> {
        self.0.seen.read().open.clone()
    }

    /// Ends what rewrites the store: whoever waits for its end has no use for that. Blocks for a
    /// moment.
    pub(crate) fn end_compactions(&self) {
        if let Some(engine) = self.engine() {
            engine.end_compactions();
        }
    }

    /// Lets go of the store for good, and waits for a swap that is under way: no later one opens it
    /// again. Others may hold it for a moment still, see [`SharedState::store_marker`]. Blocks.
    pub(crate) fn close(&self) {
        self.end_compactions();
        *self.0.closed.lock() = true;
        let store = self.0.current.write().store.take();
        if let Some(store) = store {
            // Of a store that was swapped in meanwhile.
            store.engine().end_compactions();
        }
    }

    /// Puts another store, which `open` opens, in the place of the one that was closed for it.
    /// Blocks.
    pub(super) fn swap(&self, open: impl FnOnce() -> io::Result<Current>) -> io::Result<()> {
        let closed = self.0.closed.lock();
        if *closed {
            return Err(no_store());
        }
        let current = open()?;
        let at = current.last_applied.as_ref().map(position).unwrap_or_default();
        let seen = current.seen();
        *self.0.current.write() = current;
        *self.0.seen.write() = seen;
        self.0.applied.send_replace(at);
        Ok(())
    }

    /// Notices what has failed in the background; the store's own factory then ends the node.
    pub(crate) fn check_store(&self) -> Result<(), coracle_storage::Error> {
        self.engine().map_or(Ok(()), |engine| engine.health())
    }

    pub(crate) fn state_bytes(&self) -> u64 {
        self.engine().map_or(0, |engine| engine.approximate_bytes())
    }

    fn engine(&self) -> Option<Arc<dyn Engine>> {
        self.0.seen.read().engine.upgrade()
    }

    /// Up to which index the state survives a crash. Blocks while a batch is written.
    pub(crate) fn durable_index(&self) -> Option<u64> {
        let applied = self.store().ok()?.applied_bytes()?;
        applied_from(applied).ok().flatten().map(|id| id.index())
    }

    pub(super) fn store(&self) -> io::Result<ReplicaState> {
        self.0.current.read().store.clone().ok_or_else(no_store)
    }

    /// Entries are applied in order, each once. (That none is left out is checked where they are read
    /// from the log.)
    fn check_order(&self, entries: &[Entry]) {
        let mut before = self.0.current.read().last_applied;
        for entry in entries {
            let this = Some(entry.log_id);
            assert!(
                before < this,
                "entries are applied in order, each once: {before:?}, then {this:?}"
            );
            before = this;
        }
    }

    /// Applies entries as one batch, or as several where what they write is more than one should
    /// hold: a small entry may delete many keys. Stops before the batch of an entry for which something
    /// else must be done first, and hands it back.
    pub(super) fn apply_batch(
        &self,
        mut entries: &[Entry],
    ) -> io::Result<(Vec<Replies>, Option<Prepared>)> {
        let mut replies = Vec::with_capacity(entries.len());
        while !entries.is_empty() {
            let prepared = self.prepare(entries, None)?;
            if prepared.wait.is_some() {
                return Ok((replies, Some(prepared)));
            }
            entries = &entries[prepared.replies.len()..];
            replies.extend(self.commit(prepared)?);
        }
        Ok((replies, None))
    }

    /// Judges the first of these entries, at least one, as one batch. An entry that changes what the
    /// group holds is a batch of its own.
    fn prepare(
        &self,
        entries: &[Entry],
        neighbour: Option<&Neighbour<'_>>,
    ) -> io::Result<Prepared> {
        // Only the state machine writes, one batch at a time, so what is read here stays true.
        let (store, mut group, mut membership) = {
            let current = self.0.current.read();
            // The state machine swaps and applies in turn.
            let store = current.store.clone().ok_or_else(no_store)?;
            let (group, membership) = (current.group.clone(), current.membership.clone());
            (store, group, membership)
        };
        let was_frozen = group.is_frozen();
        let mut overlay = store.overlay();
        let (mut replies, mut wait) = (Vec::with_capacity(entries.len()), None);
        for entry in entries {
            let full = overlay.bytes() >= BATCH_BYTES_MAX as u64 || stands_alone(entry);
            if !replies.is_empty() && full {
                break;
            }
            let at = position(&entry.log_id);
            replies.push(match &entry.payload {
                EntryPayload::Blank => Replies::default(),
                EntryPayload::Normal(proposal) => {
                    let applied = apply(&mut overlay, &mut group, at, &proposal.0, neighbour);
                    let applied: Applied = applied.map_err(io::Error::other)?;
                    let child = applied.child.map(Wait::Child);
                    wait = child.or(applied.wants.map(Wait::Neighbour));
                    Replies(applied.replies)
                }
                EntryPayload::Membership(new) => {
                    group.apply_membership();
                    membership = Arc::new(StoredMembership::new(Some(entry.log_id), new.clone()));
                    group.membership = members(&membership);
                    Replies::default()
                }
            });
            if stands_alone(entry) {
                break;
            }
        }
        let entries = &entries[..replies.len()];
        let last = entries.last().expect("a batch holds at least one entry").log_id;
        self.check_order(entries);
        if group.is_frozen() && !was_frozen {
            wait = Some(Wait::Seal);
        }
        // A split leaves foreign keys behind; who takes a neighbour in takes only what is its own.
        let splits = matches!(wait, Some(Wait::Child(_)));
        group.store(&mut overlay);
        overlay.put_meta(MetaName::APPLIED, applied_bytes(&last));
        overlay.put_meta(MetaName::MEMBERSHIP, encode_stored_membership(&membership));
        let batch = overlay.into_batch();
        Ok(Prepared { store, group, membership, last, batch, replies, splits, wait })
    }

    /// Writes a batch; then it is visible.
    pub(super) fn commit(&self, prepared: Prepared) -> io::Result<Vec<Replies>> {
        let Prepared { store, group, membership, last, batch, replies, splits, wait } = prepared;
        assert!(wait.is_none(), "what a batch waits for is there before it is written");
        {
            // Written under the lock: a read sees the batch and the descriptor that it left, or
            // neither.
            let mut current = self.0.current.write();
            if current.store.is_none() {
                return Err(no_store());
            }
            store.write(batch).map_err(io::Error::other)?;
            if current.group.merge.merging.is_some() && group.merge.merging.is_none() {
                // It came to nothing, or all of it is durable.
                store.filter().hold(false);
            }
            // Only this: they may have been dropped since the batch was judged.
            if splits {
                current.foreign_free = None;
            }
            current.group = group;
            current.membership = membership;
            current.last_applied = Some(last);
            *self.0.seen.write() = current.seen();
        }
        self.0.applied.send_replace(position(&last));
        Ok(replies)
    }
}

/// A batch that was judged and is not written yet.
pub(super) struct Prepared {
    pub(super) store: ReplicaState,
    group: GroupState,
    pub(super) membership: Arc<StoredMembership>,
    last: LogId,
    batch: Batch,
    replies: Vec<Replies>,
    /// Whether it leaves foreign keys behind.
    splits: bool,
    /// What must be there before it is written, or done right after.
    pub(super) wait: Option<Wait>,
}

/// What a batch waits for.
pub(super) enum Wait {
    /// The child of a split.
    Child(Box<Child>),
    /// Its own flush: only then may the group be said to be frozen.
    Seal,
    /// The keys of a neighbour; then the entry is judged again.
    Neighbour(Box<AbsorbShard>),
}

fn stands_alone(entry: &Entry) -> bool {
    match &entry.payload {
        EntryPayload::Normal(proposal) => command::stands_alone(&proposal.0),
        _ => false,
    }
}

/// What commands look at of a membership.
fn members(stored: &StoredMembership) -> Membership {
    let membership = stored.membership();
    Membership {
        at: stored.log_id().as_ref().map(position).unwrap_or_default(),
        joint: membership.get_joint_config().len() > 1,
        replicas: membership.nodes().map(|(id, _)| *id).collect(),
    }
}

impl Current {
    fn seen(&self) -> Seen {
        let store = self.store.as_ref().expect("looked at only while a store is there");
        Seen {
            clock: self.group.clock,
            ceiling: self.group.ceiling,
            descriptor: self.group.descriptor.clone(),
            history: self.group.history.clone(),
            engine: Arc::downgrade(store.engine()),
            open: store.engine().open_marker(),
            foreign_free: self.foreign_free,
            can_tell: self.group.can_tell_keys(),
            merge: self.group.merge,
            durable: self.durable,
            remembered: self.group.dedup.remembered(),
            taken_over_at: self.group.kin.lineage().place().index,
        }
    }

    /// What compaction may go by once all this is durable.
    pub(super) fn filter(&self) -> FilterState {
        FilterState {
            clock: self.group.clock,
            index: self.last_applied.map_or(0, |id| id.index()),
            threshold: self.group.history.default_threshold(),
            thresholds: self.group.history.thresholds(),
            arc: self.group.arc_filter(),
            extent: self.group.descriptor.as_ref().and_then(|descriptor| descriptor.arc),
            ..FilterState::default()
        }
    }

    pub(super) fn load(store: ReplicaState) -> io::Result<Self> {
        let mut group = GroupState::load(&store.overlay()).map_err(io::Error::other)?;
        let last_applied = match store.meta(MetaName::APPLIED).map_err(io::Error::other)? {
            Some(bytes) => applied_from(bytes)?,
            None => None,
        };
        let membership = match store.meta(MetaName::MEMBERSHIP).map_err(io::Error::other)? {
            Some(bytes) => decode_stored_membership(bytes)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?,
            None => StoredMembership::default(),
        };
        group.membership = members(&membership);
        let foreign_free = match store.meta(MetaName::FOREIGN_FREE).map_err(io::Error::other)? {
            Some(bytes) => Some(foreign_free_from(bytes)?),
            None => None,
        };
        let (membership, durable) = (Arc::new(membership), Durable::default());
        let store = Some(store);
        let mut loaded = Self { store, group, last_applied, membership, foreign_free, durable };
        // What is there before the first batch has survived.
        loaded.durable = loaded.once_durable();
        if loaded.may_be_taking_in()
            && let Some(store) = &loaded.store
        {
            store.filter().hold(true);
        }
        Ok(loaded)
    }
}

fn no_store() -> io::Error {
    io::Error::other("the store is being replaced by a snapshot, or was closed for good")
}

pub(crate) fn applied_bytes(id: &LogId) -> Bytes {
    let mut bytes = BytesMut::new();
    put_log_id(&mut bytes, &Some(*id));
    bytes.freeze()
}

fn applied_from(bytes: Bytes) -> io::Result<Option<LogId>> {
    let mut reader = crate::wire::Reader::new(bytes);
    let id = get_log_id(&mut reader);
    id.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

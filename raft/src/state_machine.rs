//! openraft's state machine over `apply` and one state store.
//!
//! Owns the order: entries are applied one batch at a time, each batch is written whole with the
//! position that it reaches, and only then visible to reads and answered. What an entry does is
//! `apply`'s business, what is durable is the store's.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use coracle_storage::exec::Exec;
use coracle_storage::fs::Fs;
use coracle_storage::state::{
    Engine, Engines, Filter, FilterState, MetaName, OpenState, Reader, ReplicaState, checkpoint,
};
use futures_util::{FutureExt, Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::apply::{GroupState, apply};
use crate::descriptor::Descriptor;
use crate::entry::{decode_stored_membership, encode_stored_membership, get_log_id, put_log_id};
use crate::error::GroupError;
use crate::history::History;
use crate::observer::{Observer, Stage};
use crate::snapshot::{CHECKPOINT_FRESH, CheckpointDir, SnapshotData, blocking};
use crate::types::{
    Entry, LogId, Position, Replies, SnapshotMeta, StoredMembership, TypeConfig, position,
};

/// Bytes of entries that one batch applies: bounds the memory of a batch and the time for which
/// reads wait for it.
const BATCH_BYTES_MAX: usize = 4 << 20;
/// Dead keys that one flush removes: a few milliseconds of work; the rest waits for the next one.
const SWEEP_KEYS_MAX: usize = 4_096;
/// What reads, writes and the host see of a replica's state.
#[derive(Clone)]
pub(crate) struct SharedState(Arc<Shared>);

struct Shared {
    /// What reads and apply work on, paired: held over the store's writes, so only by blocking work.
    current: RwLock<Current>,
    /// The same as of the last batch, for async tasks: never held over a write.
    seen: RwLock<Seen>,
    applied: watch::Sender<Position>,
    /// Whether the store was closed for good. Held over the whole swap of a store: whoever closes
    /// it waits for that, and no swap comes later.
    closed: Mutex<bool>,
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
}

struct Current {
    /// `None` while a snapshot is swapped in, and once it was closed for good.
    store: Option<ReplicaState>,
    group: GroupState,
    last_applied: Option<LogId>,
    membership: Arc<StoredMembership>,
}

/// A consistent look at a replica's state.
pub struct ReadState {
    /// Keys and versions.
    pub reader: Reader<'static>,
    /// Which arc this very view holds; `None` before the group was described.
    pub descriptor: Option<Descriptor>,
    /// Up to which entry.
    pub position: Position,
    /// The group clock: the highest version that is in it.
    pub clock: u64,
    history: History,
    filter: Arc<Filter>,
    /// Who belongs to the group, by this very view.
    pub(crate) membership: Arc<StoredMembership>,
}

impl ReadState {
    /// The lowest version that may be read in a keyspace: what was superseded below may be gone.
    pub fn threshold(&self, keyspace: u32) -> u64 {
        self.history.threshold(keyspace)
    }

    /// Whether the view still shows all that it did when it was taken. A compaction goes by what is
    /// flushed meanwhile, not by views: of a keyspace with a short history it may drop what was the
    /// newest version here. To be asked after the newest state was looked at; a look at a fixed
    /// version compares that with the threshold instead.
    pub fn is_whole(&self, keyspace: u32) -> bool {
        self.filter.state().threshold(keyspace) <= self.clock
    }
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
        Ok(Self(Arc::new(Shared { current, seen, applied, closed })))
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
    fn swap(&self, open: impl FnOnce() -> io::Result<Current>) -> io::Result<()> {
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

    /// A view of the state together with the descriptor that holds for it.
    pub(crate) fn read(&self) -> Result<ReadState, GroupError> {
        let current = self.0.current.read();
        let store = current.store.as_ref().ok_or(GroupError::TooStale)?;
        let reader = store.reader().map_err(|error| GroupError::Storage(error.to_string()))?;
        Ok(ReadState {
            reader,
            descriptor: current.group.descriptor.clone(),
            position: current.last_applied.as_ref().map(position).unwrap_or_default(),
            clock: current.group.clock,
            history: current.group.history.clone(),
            filter: store.filter().clone(),
            membership: current.membership.clone(),
        })
    }

    fn store(&self) -> io::Result<ReplicaState> {
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
    /// hold: a small entry may delete many keys.
    fn apply_batch(&self, mut entries: &[Entry]) -> io::Result<Vec<Replies>> {
        let mut replies = Vec::with_capacity(entries.len());
        while !entries.is_empty() {
            let applied = self.apply_first(entries)?;
            entries = &entries[applied.len()..];
            replies.extend(applied);
        }
        Ok(replies)
    }

    /// Applies the first of these entries as one batch, at least one: written, then visible.
    fn apply_first(&self, entries: &[Entry]) -> io::Result<Vec<Replies>> {
        // Only the state machine writes, one batch at a time, so what is read here stays true.
        let (store, mut group, mut membership) = {
            let current = self.0.current.read();
            // The state machine swaps and applies in turn.
            let store = current.store.clone().ok_or_else(no_store)?;
            (store, current.group.clone(), current.membership.clone())
        };
        let mut overlay = store.overlay();
        let mut replies = Vec::with_capacity(entries.len());
        for entry in entries {
            if !replies.is_empty() && overlay.bytes() >= BATCH_BYTES_MAX as u64 {
                break;
            }
            let at = position(&entry.log_id);
            replies.push(match &entry.payload {
                EntryPayload::Blank => Replies::default(),
                EntryPayload::Normal(proposal) => Replies(
                    apply(&mut overlay, &mut group, at.term, at.index, &proposal.0)
                        .map_err(io::Error::other)?,
                ),
                EntryPayload::Membership(new) => {
                    group.apply_membership();
                    membership = Arc::new(StoredMembership::new(Some(entry.log_id), new.clone()));
                    Replies::default()
                }
            });
        }
        let entries = &entries[..replies.len()];
        let last = entries.last().expect("a batch holds at least one entry").log_id;
        self.check_order(entries);
        group.store(&mut overlay);
        overlay.put_meta(MetaName::APPLIED, applied_bytes(&last));
        overlay.put_meta(MetaName::MEMBERSHIP, encode_stored_membership(&membership));
        let batch = overlay.into_batch();
        {
            // Written under the lock: a read sees the batch and the descriptor that it left, or
            // neither.
            let mut current = self.0.current.write();
            if current.store.is_none() {
                return Err(no_store());
            }
            store.write(batch).map_err(io::Error::other)?;
            current.group = group;
            current.membership = membership;
            current.last_applied = Some(last);
            *self.0.seen.write() = current.seen();
        }
        self.0.applied.send_replace(position(&last));
        Ok(replies)
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
        }
    }

    /// What compaction may go by once all this is durable.
    fn filter(&self) -> FilterState {
        FilterState {
            clock: self.group.clock,
            index: self.last_applied.map_or(0, |id| id.index()),
            threshold: self.group.history.default_threshold(),
            thresholds: self.group.history.thresholds(),
            ..FilterState::default()
        }
    }

    fn load(store: ReplicaState) -> io::Result<Self> {
        let group = GroupState::load(&store.overlay()).map_err(io::Error::other)?;
        let last_applied = match store.meta(MetaName::APPLIED).map_err(io::Error::other)? {
            Some(bytes) => applied_from(bytes)?,
            None => None,
        };
        let membership = match store.meta(MetaName::MEMBERSHIP).map_err(io::Error::other)? {
            Some(bytes) => decode_stored_membership(bytes)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?,
            None => StoredMembership::default(),
        };
        Ok(Self { store: Some(store), group, last_applied, membership: Arc::new(membership) })
    }
}

fn no_store() -> io::Error {
    io::Error::other("the store is being replaced by a snapshot, or was closed for good")
}

fn applied_bytes(id: &LogId) -> Bytes {
    let mut bytes = BytesMut::new();
    put_log_id(&mut bytes, &Some(*id));
    bytes.freeze()
}

fn applied_from(bytes: Bytes) -> io::Result<Option<LogId>> {
    let mut reader = crate::wire::Reader::new(bytes);
    let id = get_log_id(&mut reader);
    id.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// One replica's state machine.
pub struct StateMachine {
    shared: SharedState,
    exec: Arc<dyn Exec>,
    engines: Arc<dyn Engines>,
    fs: Arc<dyn Fs>,
    live: PathBuf,
    /// Numbers this replica's checkpoints.
    checkpoints: u64,
    /// Whoever sends it keeps it for a while (`Snapshots::kept`): else it would hold files that the
    /// store has long replaced.
    pub(crate) recent: Option<(Instant, SnapshotMeta, Weak<CheckpointDir>)>,
    /// Opened by the host once openraft has looked at what is there; before, nobody sends.
    serving: Arc<std::sync::atomic::AtomicBool>,
    observer: Arc<dyn Observer>,
}

impl StateMachine {
    pub(crate) fn new(
        shared: SharedState,
        exec: Arc<dyn Exec>,
        engines: Arc<dyn Engines>,
        live: PathBuf,
        serving: Arc<std::sync::atomic::AtomicBool>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let fs = engines.fs();
        Self { shared, exec, engines, fs, live, checkpoints: 0, recent: None, serving, observer }
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &SharedState {
        &self.shared
    }

    fn meta(&self) -> SnapshotMeta {
        let current = self.shared.0.current.read();
        SnapshotMeta {
            last_log_id: current.last_applied,
            last_membership: (*current.membership).clone(),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        blocking(&*self.exec, job).await.map_err(io::Error::other)?
    }

    /// A checkpoint of the state as it is. Called between batches, so files and position agree.
    async fn checkpoint(&mut self) -> io::Result<(SnapshotMeta, Arc<CheckpointDir>)> {
        if let Some((made, meta, dir)) = &self.recent
            && made.elapsed() < CHECKPOINT_FRESH
            && let Some(dir) = dir.upgrade()
        {
            return Ok((meta.clone(), dir));
        }
        self.recent = None;
        self.checkpoints += 1;
        let mut path = self.live.as_os_str().to_os_string();
        path.push(format!(".checkpoint-{}", self.checkpoints));
        let path = PathBuf::from(path);
        let (store, fs, target) = (self.shared.store()?, self.fs.clone(), path.clone());
        // What a failure leaves of it goes with the handle.
        let dir = Arc::new(CheckpointDir::new(self.fs.clone(), self.exec.clone(), path));
        let meta = self.meta();
        self.run(move || {
            if fs.exists(&target) {
                fs.remove_dir_all(&target)?;
            }
            store.engine().checkpoint(&target).map_err(io::Error::other)
        })
        .await?;
        self.recent = Some((Instant::now(), meta.clone(), Arc::downgrade(&dir)));
        Ok((meta, dir))
    }

    /// Closes the live store, which takes until the last read has let go of it.
    async fn close_store(&self) {
        let store = self.shared.0.current.write().store.take();
        let Some(store) = store else { return };
        let open = store.engine().open_marker();
        // The node stops where this is not done: then nobody waits for it either.
        let _ = blocking(&*self.exec, move || store.engine().end_compactions()).await;
        // Those who still hold it are looks and flushes, which end.
        while open.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = DurableBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let current = self.shared.0.current.read();
        Ok((current.last_applied, (*current.membership).clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut entries = entries.fuse();
        while let Some(first) = entries.next().await {
            let (entry, responder) = first?;
            let mut bytes = entry_bytes(&entry);
            let (mut batch, mut responders) = (vec![entry], vec![responder]);
            while bytes < BATCH_BYTES_MAX
                && let Some(Some(next)) = entries.next().now_or_never()
            {
                let (entry, responder) = next?;
                bytes += entry_bytes(&entry);
                batch.push(entry);
                responders.push(responder);
            }
            let shared = self.shared.clone();
            let began = Instant::now();
            let replies = self.run(move || shared.apply_batch(&batch)).await?;
            self.observer.stage(Stage::Apply, began.elapsed());
            for (responder, replies) in responders.into_iter().zip(replies) {
                if let Some(responder) = responder {
                    responder.send(replies);
                }
            }
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<DurableBuilder> {
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> DurableBuilder {
        // All is taken here, between batches; what is flushed later holds at least it.
        let filter = self.shared.0.current.read().filter();
        let (shared, exec) = (self.shared.clone(), self.exec.clone());
        // Senders keep their own handle; this one would pin what compaction wants to drop, and be
        // sent again although the log is about to be purged beyond it.
        self.recent = None;
        DurableBuilder { meta: self.meta(), filter, store: shared.store(), exec }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let SnapshotData::Received(received) = &snapshot else {
            return Err(io::Error::other("only a received snapshot is installed"));
        };
        self.recent = None;
        self.close_store().await;
        let (engines, fs, live) = (self.engines.clone(), self.fs.clone(), self.live.clone());
        let (received, named) = (received.clone(), meta.last_log_id);
        let open = move || {
            checkpoint::swap_in(&*fs, &received.path, &live).map_err(io::Error::other)?;
            let store = ReplicaState::open(&*engines, &live, OpenState { create: false });
            let current = Current::load(store.map_err(io::Error::other)?)?;
            assert_eq!(
                current.last_applied, named,
                "a snapshot's files hold exactly the state of the position that it names"
            );
            Ok(current)
        };
        let shared = self.shared.clone();
        self.run(move || shared.swap(open)).await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<openraft::alias::SnapshotOf<TypeConfig, SnapshotData>>, io::Error> {
        if self.meta().last_log_id.is_none() {
            return Ok(None);
        }
        if !self.serving.load(std::sync::atomic::Ordering::Acquire) {
            // openraft asks at start, only for the position, and may purge up to it. It has just
            // applied committed entries again: only a flush makes them durable.
            let store = self.shared.store()?;
            self.run(move || store.flush().map(drop).map_err(io::Error::other)).await?;
            let (meta, snapshot) = (self.meta(), SnapshotData::Durable);
            return Ok(Some(openraft::Snapshot { meta, snapshot }));
        }
        let (meta, snapshot) = match self.checkpoint().await {
            Ok((meta, dir)) => (meta, SnapshotData::Checkpoint(dir)),
            Err(error) => {
                // An error would end the group, for the sake of a follower. Without files nothing is
                // sent, and the follower's leader asks again.
                tracing::warn!(%error, live = %self.live.display(), "a checkpoint was not made");
                (self.meta(), SnapshotData::Durable)
            }
        };
        Ok(Some(openraft::Snapshot { meta, snapshot }))
    }
}

fn entry_bytes(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(proposal) => proposal.0.len(),
        _ => 64,
    }
}

/// Makes the state durable up to a position, so that the log may be purged to there, and lets
/// compaction drop what that state no longer needs.
pub struct DurableBuilder {
    meta: SnapshotMeta,
    filter: FilterState,
    /// Taken in the state machine's turn: a swap that comes later waits for it.
    store: io::Result<ReplicaState>,
    exec: Arc<dyn Exec>,
}

impl RaftSnapshotBuilder<TypeConfig> for DurableBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(
        &mut self,
    ) -> Result<openraft::alias::SnapshotOf<TypeConfig, SnapshotData>, io::Error> {
        let closed = || Err(io::Error::other("the snapshot was built before"));
        let store = std::mem::replace(&mut self.store, closed())?;
        let filter = self.filter.clone();
        let flushed = blocking(&*self.exec, move || flush(&store, filter));
        flushed.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        let (meta, snapshot) = (self.meta.clone(), SnapshotData::Durable);
        Ok(openraft::Snapshot { meta, snapshot })
    }
}

/// Makes the state durable, lets compaction go by `filter`, which was taken before, and removes what
/// it could not.
fn flush(store: &ReplicaState, filter: FilterState) -> Result<u64, coracle_storage::Error> {
    store.flush()?;
    // Only what is durable may decide what is dropped: a crash that replays must judge every
    // condition as before.
    store.filter().set(filter);
    store.sweep(SWEEP_KEYS_MAX)
}

/// Where a replica's store stands in the data directory.
pub(crate) fn store_dir(shards: &Path, replica: u64) -> PathBuf {
    shards.join(format!("{replica:016x}"))
}

//! Owns the node's shared Raft log: the calls, their rules and their bounds. Does not know what
//! Raft is, has no timer, and never waits for its writer.
//!
//! Every call that changes something shows its effect at once to every reader, queues it for the
//! one writer, and returns; its `done` is called when it is durable. What is durable is always a
//! prefix of what was queued, over all replicas.
//!
//! Bounds: whoever appends waits until [`Log::has_room`], that is until no more than
//! `LogOptions::queue_bytes` wait. Raft takes a refused append for a broken log, so refusing
//! (`Overloaded`, or `Full` when the disk is) is the last resort: at sixteen times that for `append`,
//! because many may find the same room at once, at twenty-four times for everything else, which is small and needed to get out of trouble. A refusal
//! changes nothing.
//!
//! There is no idle timer: the mark that proves the last batch durable is written by the next
//! batch, or by [`Log::probe`], which the node calls every half second to see that its disk is
//! well.

mod cache;
mod freeing;
mod index;
mod queue;
mod record;
mod recovery;
mod replay;
mod scan;
mod segment;
#[doc(hidden)]
pub mod testing;
mod writer;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use self::index::{Place, Replica, SLOT_BYTES, Ticket};
use self::queue::{Change, Op, Shared, State};
use self::segment::Segment;
use crate::error::Error;
use crate::exec::{Exec, Wake};
use crate::fs::Fs;
use crate::options::LogOptions;

pub use self::index::Damage;
pub use self::queue::Done;
pub use self::record::LogEntry;
pub use self::recovery::Recovery;
pub use crate::replica::ReplicaId;

/// What an operation counts against the queue beside its bytes.
const OP_BYTES: u64 = 64;
/// Bounds of settings: offsets inside a batch are 32 bits wide.
const BATCH_BYTES_MAX: u64 = 1 << 30;

/// A node's log. Cheap to clone; the writer ends when the last clone is dropped.
#[derive(Clone)]
pub struct Log {
    shared: Arc<Shared>,
    wake: Wake,
}

/// What the log holds of one replica.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct ReplicaLogState {
    /// The newest vote.
    pub vote: Option<Bytes>,
    /// The newest committed position. After a crash it may be an older one, or none: it is a hint.
    pub committed: Option<Bytes>,
    /// Everything up to here was purged.
    pub purged: Option<(u64, [u8; 16])>,
    /// The last entry; the purge position when there is none.
    pub last: Option<(u64, [u8; 16])>,
    /// The first entry; when there is none, the index that comes next, as far as that is known.
    pub first_index: u64,
    /// Bytes of the entries' payloads.
    pub bytes: u64,
}

/// What a replica keeps alive.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Pin {
    /// The replica.
    pub replica: ReplicaId,
    /// The oldest segment with entries of it.
    pub oldest_segment: u64,
    /// Bytes of its entries' records.
    pub live_bytes: u64,
}

/// Figures for metrics and for those who decide what to flush.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct LogStats {
    /// Bytes of all segment files.
    pub bytes_on_disk: u64,
    /// Bytes of records that are still needed.
    pub live_bytes: u64,
    /// Number of segment files.
    pub segments: usize,
    /// The oldest segment.
    pub oldest_segment: u64,
    /// Payloads in memory.
    pub cache_bytes: u64,
    /// What is in memory of entries beside their payloads: [`Log::ENTRY_INDEX_BYTES`] each.
    pub index_bytes: u64,
    /// What waits for the writer.
    pub queue_bytes: u64,
    /// How long the last sync took.
    pub last_sync: Duration,
    /// There is no room for a new segment: what waits goes on waiting.
    pub full: bool,
    /// Replicas with entries on disk, in the order of their ids.
    pub pins: Vec<Pin>,
}

/// Which bound of the queue holds.
enum Urgency {
    Append,
    /// Small, rare, and needed to get out of trouble.
    Control,
}

/// An entry on its way to a reader: here, or still on disk.
enum Piece {
    Held(LogEntry),
    OnDisk(u64, Segment, Place),
}

impl Log {
    /// Memory that each entry of the log takes beside its payload, for as long as it is not purged.
    pub const ENTRY_INDEX_BYTES: u64 = SLOT_BYTES;

    /// Opens the log in `dir`, creating what is missing, and starts its writer.
    ///
    /// Everything that `Recovery` and `state` show is durable when it returns. `Format` when a
    /// newer program wrote the log; `Io` and `Full` when the disk refuses: nothing was given up
    /// then, try again later.
    pub fn open(
        fs: Arc<dyn Fs>,
        exec: Arc<dyn Exec>,
        dir: &Path,
        options: LogOptions,
    ) -> Result<(Log, Recovery), Error> {
        check(&options)?;
        let (mut writer, recovery) = recovery::open(fs, dir, options)?;
        let shared = writer.shared.clone();
        let wake = exec.worker("raft-log", Box::new(move || writer.step()));
        // Freeing may have queued something.
        wake.wake();
        Ok((Log { shared, wake }, recovery))
    }

    /// Makes a replica known. `Invalid` when it is or was: ids are never used again.
    pub fn create(&self, replica: ReplicaId, done: Done) {
        self.submit(replica, OP_BYTES, done, Urgency::Control, |state, ticket| {
            if state.index.destroyed.contains_key(&replica) {
                return Err(Error::invalid(format!("replica {replica} was destroyed")));
            }
            if state.index.replicas.contains_key(&replica) {
                return Err(Error::invalid(format!("replica {replica} exists")));
            }
            state.index.create(replica, ticket);
            Ok(Change::Create)
        });
    }

    /// Removes a replica with all it has, for ever. It is remembered, so that no late message
    /// revives it, until [`Log::forget`]. Works on recovering replicas too.
    pub fn destroy(&self, replica: ReplicaId, done: Done) {
        self.submit(replica, OP_BYTES, done, Urgency::Control, |state, ticket| {
            if !state.index.replicas.contains_key(&replica) {
                return Err(Error::UnknownReplica(replica));
            }
            state.index.destroy(replica, ticket);
            Ok(Change::Destroy)
        });
    }

    /// Whether a replica was destroyed, and is remembered.
    pub fn was_destroyed(&self, replica: ReplicaId) -> Result<bool, Error> {
        let state = self.shared.state.lock();
        state.check_open()?;
        Ok(state.index.destroyed.contains_key(&replica))
    }

    /// Ends the memory of a destroyed replica. Only when nothing in the cluster can name it any
    /// more.
    pub fn forget(&self, replica: ReplicaId, done: Done) {
        self.submit(replica, OP_BYTES, done, Urgency::Control, |state, _| {
            if !state.index.destroyed.contains_key(&replica) {
                return Err(Error::invalid(format!("replica {replica} was not destroyed")));
            }
            state.index.forget(replica);
            Ok(Change::Forget)
        });
    }

    /// Appends entries. They can be read when it returns, and are durable when `done` is called
    /// with Ok.
    ///
    /// `Invalid` when they do not follow the last entry (or the purge position), or one is too
    /// large. `Overloaded`, or `Full` when the disk has no room, when too much waits.
    pub fn append(&self, replica: ReplicaId, entries: Vec<LogEntry>, done: Done) {
        let entry_bytes = |entry: &LogEntry| entry.payload.len() as u64 + OP_BYTES;
        let bytes = OP_BYTES + entries.iter().map(entry_bytes).sum::<u64>();
        let options = &self.shared.options;
        self.submit(replica, bytes, done, Urgency::Append, |state, ticket| {
            if let Some(large) =
                entries.iter().find(|entry| entry.payload.len() as u64 > options.entry_bytes)
            {
                let (index, len, max) = (large.index, large.payload.len(), options.entry_bytes);
                return Err(Error::invalid(format!(
                    "entry {index} of replica {replica} has {len} bytes, more than {max}"
                )));
            }
            if bytes > options.queue_bytes {
                let max = options.queue_bytes;
                return Err(Error::invalid(format!(
                    "an append of {bytes} bytes is more than the queue of {max} bytes can hold"
                )));
            }
            follows(state.known(replica)?, replica, &entries)?;
            state.index.append(replica, &entries, ticket);
            Ok(if entries.is_empty() { Change::Barrier } else { Change::Append(entries) })
        });
    }

    /// Whether the next append may come: no more than `LogOptions::queue_bytes` wait. Also true once
    /// the log has stopped, so that whoever waits for room hears of it.
    pub fn has_room(&self) -> bool {
        let state = self.shared.state.lock();
        state.queue_bytes <= self.shared.options.queue_bytes || state.check_open().is_err()
    }

    /// Replaces the replica's vote.
    pub fn save_vote(&self, replica: ReplicaId, vote: Bytes, done: Done) {
        let bytes = OP_BYTES + vote.len() as u64;
        let max = self.shared.options.entry_bytes;
        self.submit(replica, bytes, done, Urgency::Control, |state, ticket| {
            state.known(replica)?;
            if vote.len() as u64 > max {
                return Err(Error::invalid(format!("a vote of more than {max} bytes")));
            }
            state.index.set_vote(replica, vote.clone(), ticket);
            Ok(Change::Vote(vote))
        });
    }

    /// Removes all entries after `last_kept`; None removes all entries. The purge position stays.
    pub fn truncate_after(&self, replica: ReplicaId, last_kept: Option<u64>, done: Done) {
        self.submit(replica, OP_BYTES, done, Urgency::Control, |state, _| {
            let known = state.known(replica)?;
            let from = last_kept.map_or(0, |last| last.saturating_add(1));
            if known.entries.is_empty() || known.end() <= from {
                return Ok(Change::Barrier);
            }
            state.index.truncate(replica, from);
            Ok(Change::Truncate(from))
        });
    }

    /// Removes all entries up to `upto_index`, and remembers its id. The index may lie beyond the
    /// last entry (after a snapshot came); then the next append begins right behind it. At or
    /// before an earlier purge, it changes nothing. The room on disk is given back later.
    pub fn purge(&self, replica: ReplicaId, upto_index: u64, upto_id: [u8; 16], done: Done) {
        self.submit(replica, OP_BYTES, done, Urgency::Control, |state, ticket| {
            let known = state.known(replica)?;
            if known.purged().is_some_and(|(purged, _)| upto_index <= purged) {
                return Ok(Change::Barrier);
            }
            if upto_index == u64::MAX || !known.entries.is_empty() && upto_index + 1 < known.first {
                let first = known.first;
                return Err(Error::invalid(format!(
                    "a purge of replica {replica} up to {upto_index} leaves a gap before {first}"
                )));
            }
            state.index.purge(replica, (upto_index, upto_id), ticket);
            Ok(Change::Purge(upto_index, upto_id))
        });
    }

    /// Remembers how far the log is committed: a hint for the next start. It rides with a later
    /// batch; nobody waits for it. Ignored for replicas that are not known, and beyond the limit of
    /// an entry.
    pub fn save_committed(&self, replica: ReplicaId, committed: Bytes) {
        let mut state = self.shared.state.lock();
        let fits = committed.len() as u64 <= self.shared.options.entry_bytes;
        if state.check_open().is_ok() && state.known(replica).is_ok() && fits {
            let ticket = state.next_ticket();
            state.index.set_committed(replica, committed, ticket);
            state.committed_dirty.insert(replica);
        }
    }

    /// Vote, positions and size of a replica's log.
    pub fn state(&self, replica: ReplicaId) -> Result<ReplicaLogState, Error> {
        let state = self.shared.state.lock();
        state.check_open()?;
        let known = state.known(replica)?;
        let first_index = match (known.entries.is_empty(), known.purged()) {
            (false, _) => known.first,
            (true, Some((purged, _))) => purged + 1,
            (true, None) => 0,
        };
        Ok(ReplicaLogState {
            vote: known.vote.as_ref().map(|stored| stored.value.clone()),
            committed: known.committed.as_ref().map(|stored| stored.value.clone()),
            purged: known.purged(),
            last: known.last(),
            first_index,
            bytes: known.payload_bytes,
        })
    }

    /// The entries of `range` that exist, from its first on, without holes: as many as fit in
    /// `bytes_max`, but at least one when there is one. Reads files where the cache does not reach.
    ///
    /// `Corruption` when a record does not read back as it was written; the replica is recovering
    /// then.
    pub fn read(
        &self,
        replica: ReplicaId,
        range: Range<u64>,
        bytes_max: usize,
    ) -> Result<Vec<LogEntry>, Error> {
        let pieces = self.pieces(replica, range, bytes_max)?;
        pieces.into_iter().map(|piece| self.fetch(replica, piece)).collect()
    }

    /// The same where it takes no file: `None` when a part of it stands only on disk. For callers
    /// that must not block.
    pub fn read_held(
        &self,
        replica: ReplicaId,
        range: Range<u64>,
        bytes_max: usize,
    ) -> Result<Option<Vec<LogEntry>>, Error> {
        let held = |piece| match piece {
            Piece::Held(entry) => Some(entry),
            Piece::OnDisk(..) => None,
        };
        Ok(self.pieces(replica, range, bytes_max)?.into_iter().map(held).collect())
    }

    fn pieces(
        &self,
        replica: ReplicaId,
        range: Range<u64>,
        bytes_max: usize,
    ) -> Result<Vec<Piece>, Error> {
        let mut pieces = Vec::new();
        {
            let state = self.shared.state.lock();
            state.check_open()?;
            let known = state.known(replica)?;
            let mut bytes = 0;
            for index in range.start.max(known.first)..range.end.min(known.end()) {
                let slot = known.slot(index).expect("clipped to what exists");
                bytes += slot.payload_len as usize;
                if bytes > bytes_max && !pieces.is_empty() {
                    break;
                }
                pieces.push(match (&slot.payload, slot.place) {
                    (Some(payload), _) => {
                        Piece::Held(LogEntry { index, id: slot.id, payload: payload.clone() })
                    }
                    (None, place) => {
                        let place = place.expect("what is not written is held in memory");
                        let filled = state.segments.get(&place.segment);
                        let filled = filled.expect("a segment with live records is kept");
                        Piece::OnDisk(index, filled.segment.clone(), place)
                    }
                });
            }
        }
        Ok(pieces)
    }

    fn fetch(&self, replica: ReplicaId, piece: Piece) -> Result<LogEntry, Error> {
        let (index, segment, place) = match piece {
            Piece::Held(entry) => return Ok(entry),
            Piece::OnDisk(index, segment, place) => (index, segment, place),
        };
        let body = segment.read_body(place.body_offset(), place.body_len, place.body_crc);
        if let Err(error @ Error::Corruption { .. }) = &body {
            writer::mark_damaged(&mut self.shared.state.lock(), replica, error);
            self.wake.wake();
        }
        let body = Bytes::from(body?);
        let (id, _) = record::split_id(&body).expect("an entry's record holds an id");
        Ok(LogEntry { index, id, payload: body.slice(16..) })
    }

    /// The id of an entry, or of the purge position; None where there is neither.
    pub fn id_at(&self, replica: ReplicaId, index: u64) -> Result<Option<[u8; 16]>, Error> {
        let state = self.shared.state.lock();
        state.check_open()?;
        let known = state.known(replica)?;
        let purged = known.purged().filter(|(purged, _)| *purged == index);
        Ok(known.slot(index).map(|slot| slot.id).or(purged.map(|(_, id)| id)))
    }

    /// Figures of the whole log.
    pub fn stats(&self) -> LogStats {
        let state = self.shared.state.lock();
        LogStats {
            bytes_on_disk: state.bytes_on_disk(),
            live_bytes: state.index.live.total(),
            segments: state.segments.len(),
            oldest_segment: state.segments.keys().next().copied().unwrap_or(0),
            cache_bytes: state.index.cache.bytes(),
            index_bytes: state.index.bytes(),
            queue_bytes: state.queue_bytes,
            last_sync: state.last_sync,
            full: state.full,
            pins: state.pins().collect(),
        }
    }

    /// The replicas whose entries keep segments, in the order in which to flush and purge them: who
    /// keeps the oldest first; of several, the one with most to give.
    pub fn pinners(&self) -> Vec<Pin> {
        let mut pins: Vec<Pin> = self.shared.state.lock().pins().collect();
        pins.sort_by_key(|pin| {
            (pin.oldest_segment, std::cmp::Reverse(pin.live_bytes), pin.replica)
        });
        pins
    }

    /// A write and a sync that carry nothing: shows that the disk is well, and marks the last batch
    /// as durable. On an idle log it does not grow the log.
    pub fn probe(&self, done: Done) {
        self.submit(ReplicaId(0), OP_BYTES, done, Urgency::Control, |_, _| Ok(Change::Probe));
    }

    /// What waits because the disk had no room is tried again.
    pub fn try_again(&self) {
        self.wake.wake();
    }

    /// Stops the writer after what is queued. Later calls get `Stopped`.
    pub fn close(&self) {
        self.shared.state.lock().closing = true;
        self.wake.wake();
    }

    /// Checks and queues one operation under one lock. A refusal is answered here, on the caller's
    /// thread.
    fn submit(
        &self,
        replica: ReplicaId,
        bytes: u64,
        done: Done,
        urgency: Urgency,
        apply: impl FnOnce(&mut State, Ticket) -> Result<Change, Error>,
    ) {
        let queue_bytes = self.shared.options.queue_bytes;
        let bytes_max = match urgency {
            Urgency::Append => (16 * queue_bytes).saturating_sub(bytes),
            Urgency::Control => 24 * queue_bytes,
        };
        let refused = {
            let mut state = self.shared.state.lock();
            match state.admit(bytes_max, &self.shared.dir) {
                Err(error) => Some((done, error)),
                Ok(()) => {
                    // A refusal leaves an unused ticket behind, which is harmless: they only have
                    // to rise.
                    let ticket = state.next_ticket();
                    match apply(&mut state, ticket) {
                        Ok(change) => {
                            state.push(Op { ticket, replica, change, bytes, done: Some(done) });
                            None
                        }
                        Err(error) => Some((done, error)),
                    }
                }
            }
        };
        match refused {
            Some((done, error)) => done(Err(Arc::new(error))),
            None => self.wake.wake(),
        }
    }
}

impl State {
    /// Refuses when the log is stopped, or more than `bytes_max` wait.
    fn admit(&self, bytes_max: u64, dir: &Path) -> Result<(), Error> {
        self.check_open()?;
        if self.queue_bytes <= bytes_max {
            return Ok(());
        }
        if self.full {
            return Err(Error::Full { path: dir.to_path_buf() });
        }
        let why = format!("{} bytes wait for the log's writer", self.queue_bytes);
        Err(Error::Overloaded { why })
    }

    fn check_open(&self) -> Result<(), Error> {
        match &self.stopped {
            Some(why) => Err(Error::Stopped { why: why.clone() }),
            None if self.closing => Err(Error::Stopped { why: "it was closed".to_owned() }),
            None => Ok(()),
        }
    }

    /// A replica that may be used.
    fn known(&self, replica: ReplicaId) -> Result<&Replica, Error> {
        let known = self.index.replicas.get(&replica).ok_or(Error::UnknownReplica(replica))?;
        match &known.damage {
            Some(damage) => Err(damage.value.error()),
            None => Ok(known),
        }
    }

    fn pins(&self) -> impl Iterator<Item = Pin> + '_ {
        self.index.replicas.iter().filter_map(|(&replica, known)| {
            let oldest_segment = known.entries_live.oldest()?;
            Some(Pin { replica, oldest_segment, live_bytes: known.entries_live.total() })
        })
    }
}

/// Whether entries may come next.
fn follows(known: &Replica, replica: ReplicaId, entries: &[LogEntry]) -> Result<(), Error> {
    let mut expected = match (known.entries.is_empty(), known.purged()) {
        (false, _) => Some(known.end()),
        (true, Some((purged, _))) => Some(purged + 1),
        (true, None) => None,
    };
    for entry in entries {
        let index = entry.index;
        if expected.is_some_and(|expected| expected != index) || index == u64::MAX {
            let wanted = expected.map_or("an index".to_owned(), |expected| expected.to_string());
            return Err(Error::invalid(format!(
                "entry {index} of replica {replica} does not follow: {wanted} comes next"
            )));
        }
        expected = Some(index + 1);
    }
    Ok(())
}

fn check(options: &LogOptions) -> Result<(), Error> {
    let rules = [
        (options.segment_bytes >= 2 * record::BLOCK, "segment_bytes must be at least 8 KiB"),
        (options.segment_bytes <= BATCH_BYTES_MAX, "segment_bytes must be at most 1 GiB"),
        (options.batch_bytes <= BATCH_BYTES_MAX, "batch_bytes must be at most 1 GiB"),
        (options.queue_bytes <= BATCH_BYTES_MAX, "queue_bytes must be at most 1 GiB"),
        (options.entry_bytes < options.queue_bytes, "queue_bytes must be more than entry_bytes"),
        (
            options.rewrite_step_bytes <= options.batch_bytes,
            "rewrite_step_bytes must be at most batch_bytes",
        ),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, why)) => Err(Error::invalid(*why)),
        None => Ok(()),
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("dir", &self.shared.dir).finish_non_exhaustive()
    }
}

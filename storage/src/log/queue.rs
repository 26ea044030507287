//! Owns what callers and the writer share: the index, the operations that wait, the segments. Does
//! not write (see `writer`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use super::index::{Index, Place, Ticket};
use super::record::{Kind, LogEntry, ReplicaId};
use super::segment::Segment;
use crate::error::Error;
use crate::fs::Fs;
use crate::options::LogOptions;

/// Called once with the outcome: from the writer's thread, in the order of the queue, with no lock
/// held; or at once by the call itself, when that refuses.
pub type Done = Box<dyn FnOnce(Result<(), Arc<Error>>) + Send>;

/// What an operation asks for. The index already shows it when it is queued.
pub(crate) enum Change {
    Create,
    Destroy,
    Forget,
    Append(Vec<LogEntry>),
    Vote(Bytes),
    /// Removes everything from this index on.
    Truncate(u64),
    Purge(u64, [u8; 16]),
    Damaged(Vec<u8>),
    /// Copies live records out of the oldest segment.
    Rewrite(Vec<Rewrite>),
    /// Nothing to write: answered once everything queued before is durable.
    Barrier,
    /// Nothing to write, but a batch with its sync is wanted.
    Probe,
}

/// One record to copy forward, as it was live when the copy was queued.
pub(crate) struct Rewrite {
    pub(crate) replica: ReplicaId,
    pub(crate) kind: Kind,
    pub(crate) index: u64,
    pub(crate) ticket: Ticket,
    pub(crate) from: Place,
    /// The body. None: still to be read from `from`.
    pub(crate) body: Option<Bytes>,
}

/// An operation that waits for the writer.
pub(crate) struct Op {
    pub(crate) ticket: Ticket,
    pub(crate) replica: ReplicaId,
    pub(crate) change: Change,
    /// What it counts against the queue's bound.
    pub(crate) bytes: u64,
    pub(crate) done: Option<Done>,
}

/// A segment with how far it is filled.
pub(crate) struct Filled {
    pub(crate) segment: Segment,
    /// Where the next batch would start.
    pub(crate) used: u64,
}

/// The part under the lock. The lock is never held while files are touched or a `Done` is called.
pub(crate) struct State {
    pub(crate) index: Index,
    pub(crate) queue: VecDeque<Op>,
    pub(crate) queue_bytes: u64,
    /// Of the newest operation.
    pub(crate) ticket: Ticket,
    /// Everything up to here is durable.
    pub(crate) durable: Ticket,
    /// Replicas whose committed position is not written yet.
    pub(crate) committed_dirty: BTreeSet<ReplicaId>,
    pub(crate) segments: BTreeMap<u64, Filled>,
    /// The oldest segment that is needed, by what is durable; goes into the next batch.
    pub(crate) log_start: u64,
    /// The oldest segment that is needed, as the disk knows it: what is older may be removed.
    pub(crate) log_start_durable: u64,
    /// The oldest segment that is needed once everything up to the ticket is durable.
    pub(crate) log_start_planned: Option<(u64, Ticket)>,
    /// The copy forward that is on its way.
    pub(crate) rewriting: Option<Ticket>,
    /// Bytes that may still be copied forward; callers' batches earn them, see `freeing`.
    pub(crate) copy_credit: i64,
    /// No room for a new segment: what waits goes on waiting, see `Log`.
    pub(crate) full: bool,
    pub(crate) closing: bool,
    /// Why nothing works any more.
    pub(crate) stopped: Option<String>,
    pub(crate) last_sync: Duration,
}

/// What all handles of a log and its writer share.
pub(crate) struct Shared {
    pub(crate) fs: Arc<dyn Fs>,
    pub(crate) dir: PathBuf,
    pub(crate) options: LogOptions,
    pub(crate) state: Mutex<State>,
}

/// What the writer takes from the queue for one batch.
pub(crate) struct Taken {
    pub(crate) ops: Vec<Op>,
    /// Committed positions that ride along. Only when the queue is empty after the taking: a
    /// position must never be on disk before the entries that it speaks of.
    pub(crate) committed: Vec<(ReplicaId, Bytes, Ticket)>,
    pub(crate) log_start: u64,
    pub(crate) announces: bool,
}

impl State {
    pub(crate) fn new(index: Index, segments: Vec<Filled>, log_start: u64) -> State {
        State {
            index,
            queue: VecDeque::new(),
            queue_bytes: 0,
            ticket: 0,
            durable: 0,
            committed_dirty: BTreeSet::new(),
            segments: segments.into_iter().map(|filled| (filled.segment.number, filled)).collect(),
            log_start,
            // The first batch says it anew.
            log_start_durable: 0,
            log_start_planned: None,
            rewriting: None,
            copy_credit: 0,
            full: false,
            closing: false,
            stopped: None,
            last_sync: Duration::ZERO,
        }
    }

    pub(crate) fn next_ticket(&mut self) -> Ticket {
        self.ticket += 1;
        self.ticket
    }

    pub(crate) fn push(&mut self, op: Op) {
        self.queue_bytes += op.bytes;
        self.queue.push_back(op);
    }

    /// Queues something of the log's own, which counts against no caller's bound.
    pub(crate) fn push_own(&mut self, replica: ReplicaId, change: Change, ticket: Ticket) {
        self.push(Op { ticket, replica, change, bytes: 0, done: None });
    }

    /// The operations for one batch: all that wait, or as many as fit, but at least one.
    pub(crate) fn take(&mut self, batch_bytes: u64) -> Option<Taken> {
        let mut ops = Vec::new();
        let mut bytes = 0;
        while let Some(op) = self.queue.front() {
            if !ops.is_empty() && bytes + op.bytes > batch_bytes {
                break;
            }
            bytes += op.bytes;
            self.queue_bytes -= op.bytes;
            ops.extend(self.queue.pop_front());
        }
        if ops.is_empty() {
            return None;
        }
        let mut committed = Vec::new();
        if self.queue.is_empty() {
            for id in std::mem::take(&mut self.committed_dirty) {
                let replica = self.index.replicas.get(&id);
                if let Some(stored) = replica.and_then(|replica| replica.committed.as_ref()) {
                    committed.push((id, stored.value.clone(), stored.ticket));
                }
            }
        }
        let announces = self.log_start > self.log_start_durable;
        Some(Taken { ops, committed, log_start: self.log_start, announces })
    }

    /// Undoes a `take`: the batch could not be placed.
    pub(crate) fn put_back(&mut self, taken: Taken) {
        for op in taken.ops.into_iter().rev() {
            self.queue_bytes += op.bytes;
            self.queue.push_front(op);
        }
        self.committed_dirty.extend(taken.committed.into_iter().map(|(id, ..)| id));
    }

    /// Bytes of all segment files.
    pub(crate) fn bytes_on_disk(&self) -> u64 {
        self.segments.values().map(|filled| filled.segment.capacity).sum()
    }
}

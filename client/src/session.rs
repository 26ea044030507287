//! Owns what makes the client's writes exactly-once: its client id, sequence numbers, the births
//! of request ids, and the lowest sequence that is still unanswered. Does not decide when a write
//! takes a fresh id (see `retry`), and keeps no results.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// Names one logical write, the same on every attempt. The cluster applies it at most once.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub struct RequestId {
    /// Random, chosen once per client.
    pub client: u64,
    /// Rises by one per logical write of the client.
    pub sequence: u64,
    /// A server time in milliseconds since 1970 that the client had been given.
    pub birth: u64,
}

impl fmt::Display for RequestId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:016x}-{}-{}", self.client, self.sequence, self.birth)
    }
}

/// Hands out request ids.
///
/// Invariants:
/// - a sequence is handed out once;
/// - the lowest unanswered sequence never rises above one whose write is still tried: a server may
///   forget every result below it, and refuses requests below it.
#[derive(Debug)]
pub(crate) struct Session {
    client: u64,
    open: Mutex<Open>,
    server_time_ms: AtomicU64,
}

#[derive(Debug)]
struct Open {
    next: u64,
    unanswered: BTreeSet<u64>,
}

impl Session {
    pub(crate) fn new(client: u64) -> Session {
        Session {
            client,
            open: Mutex::new(Open { next: 1, unanswered: BTreeSet::new() }),
            server_time_ms: AtomicU64::new(0),
        }
    }

    /// Takes note of a server's clock, the birth of the next writes. The newest answer counts, not
    /// the highest time: one node whose clock runs ahead must not spoil the births for the others.
    pub(crate) fn saw_server_time(&self, server_time_ms: u64) {
        if server_time_ms != 0 {
            self.server_time_ms.store(server_time_ms, Ordering::Relaxed);
        }
    }

    /// Opens a logical write under a new sequence.
    pub(crate) fn open(self: &Arc<Self>) -> OpenWrite {
        let mut open = self.open.lock();
        let sequence = open.next;
        open.next += 1;
        open.unanswered.insert(sequence);
        drop(open);
        let birth = self.server_time_ms.load(Ordering::Relaxed);
        let id = RequestId { client: self.client, sequence, birth };
        OpenWrite { session: self.clone(), id }
    }

    fn close(&self, sequence: u64) {
        let was_open = self.open.lock().unanswered.remove(&sequence);
        assert!(was_open, "a logical write is closed once");
    }
}

/// A logical write that is being tried. Dropping it ends it: from then on the servers may forget
/// its result, so nothing is sent under its id any more.
#[derive(Debug)]
pub(crate) struct OpenWrite {
    session: Arc<Session>,
    id: RequestId,
}

impl OpenWrite {
    pub(crate) fn id(&self) -> RequestId {
        self.id
    }

    /// The client's lowest sequence that is still unanswered, this one's or an older.
    pub(crate) fn lowest_unanswered(&self) -> u64 {
        let lowest = self.session.open.lock().unanswered.first().copied();
        let lowest = lowest.expect("this write itself is unanswered");
        assert!(lowest <= self.id.sequence, "an open write keeps the mark down");
        lowest
    }
}

impl Drop for OpenWrite {
    fn drop(&mut self) {
        self.session.close(self.id.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_follows_the_oldest_open_write() {
        let session = Arc::new(Session::new(7));
        session.saw_server_time(1_000);
        let first = session.open();
        let second = session.open();
        assert_eq!(first.id(), RequestId { client: 7, sequence: 1, birth: 1_000 });
        assert_eq!(second.id().sequence, 2);
        assert_eq!(second.lowest_unanswered(), 1);
        drop(first);
        assert_eq!(second.lowest_unanswered(), 2);
        let third = session.open();
        drop(second);
        assert_eq!(third.lowest_unanswered(), 3);
    }

    #[test]
    fn births_are_times_that_a_server_gave() {
        let session = Arc::new(Session::new(7));
        session.saw_server_time(2_000);
        session.saw_server_time(1_500);
        session.saw_server_time(0);
        assert_eq!(session.open().id().birth, 1_500);
    }
}

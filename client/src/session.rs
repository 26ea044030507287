//! Owns what a client carries from one call to the next: what makes its writes exactly-once (client
//! id, sequence numbers, the births of request ids, the lowest sequence that is still unanswered), and
//! what it has seen, so that its session reads never go back. Does not decide when a write takes a
//! fresh id (see `retry`), and keeps no results.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::token::{Need, Seen, SessionToken, TokenError};
use coracle_proto::v1;
use parking_lot::Mutex;

use crate::topology::ShardId;

/// How fresh a read is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Hash)]
pub enum Consistency {
    /// Holds everything that was acknowledged to anybody before the call. The leader is asked, unless
    /// the call says that any replica may serve.
    #[default]
    Linearizable,
    /// Holds everything that this client was told of before the call: its own writes, and what it has
    /// read. Never goes back. Served by any replica that has come so far; one that has not waits a
    /// moment, then the leader serves.
    Session,
    /// Lacks nothing that was acknowledged to anybody longer ago than this before the call. May go
    /// back, by that much. Served by any replica that knows its state to be fresh enough, or learns it
    /// from the leader in time; where that fails, by the leader. Below a millisecond it is as good as
    /// linearizable.
    Bounded(Duration),
    /// Whatever some replica has. May go back.
    Any,
}

/// What a client has seen, to be handed to another one: its session reads then are not behind it.
/// Opaque; may be kept as bytes, also beyond a restart of either.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub struct SessionMark(Bytes);

impl SessionMark {
    /// As it may travel.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }

    /// From what [`SessionMark::as_bytes`] gave. Checked when a client takes it in.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> SessionMark {
        SessionMark(bytes.into())
    }
}

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
    seen: Mutex<SessionToken>,
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
            seen: Mutex::default(),
        }
    }

    /// Takes note of where an answer stands; `version` is what it wrote or read.
    pub(crate) fn observe(&self, served: &v1::Served, version: u64) {
        let seen = Seen { term: served.term, index: served.index };
        let version = version.max(served.judged_at);
        self.seen.lock().observe(ShardId(served.shard), seen, version);
    }

    /// What a session read of a shard has to carry.
    pub(crate) fn token_for(&self, shard: ShardId) -> Bytes {
        let all = self.seen.lock();
        if all.need(shard) == Need::Linearizable {
            return all.encode();
        }
        let mut token = SessionToken::default();
        let seen = match all.need(shard) {
            Need::Applied(seen) => seen,
            _ => Seen::default(),
        };
        token.observe(shard, seen, all.version());
        token.encode()
    }

    /// All that was seen.
    pub(crate) fn mark(&self) -> SessionMark {
        SessionMark(self.seen.lock().encode())
    }

    /// Takes in what another client has seen.
    pub(crate) fn take_in(&self, mark: &SessionMark) -> Result<(), TokenError> {
        let other = SessionToken::decode(&mark.0)?;
        self.seen.lock().merge(&other);
        Ok(())
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
    fn what_was_seen_goes_with_a_mark_and_a_read_carries_only_its_shard() {
        let session = Session::new(7);
        let served = |shard, index, judged_at| v1::Served {
            shard,
            term: 2,
            index,
            judged_at,
            ..Default::default()
        };
        session.observe(&served(1, 10, 0), 500);
        session.observe(&served(2, 20, 900), 600);
        session.observe(&served(1, 9, 0), 0);
        let other = Session::new(8);
        other.observe(&served(2, 30, 0), 0);
        other.take_in(&session.mark()).expect("a mark");
        let need = |session: &Session, shard| {
            let token = SessionToken::decode(&session.token_for(ShardId(shard))).expect("a token");
            assert_eq!(token.version(), 900, "the highest that was judged at");
            assert!(token.seen().count() <= 1, "only the shard's own");
            token.need(ShardId(shard))
        };
        assert_eq!(need(&session, 1), Need::Applied(Seen { term: 2, index: 10 }));
        assert_eq!(need(&other, 1), Need::Applied(Seen { term: 2, index: 10 }));
        assert_eq!(need(&other, 2), Need::Applied(Seen { term: 2, index: 30 }));
        other.take_in(&SessionMark::from_bytes("not a mark")).expect_err("damaged");
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

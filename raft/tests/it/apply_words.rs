//! Owns short words for requests in the apply tests. Does not judge anything.

use bytes::Bytes;
use coracle_raft::apply::{Outcome, Reply};
use coracle_raft::command::{Change, Command, Condition, Operation, Request, RequestId, Stamped};
use coracle_raft::dedup::Bounds;
use coracle_raft::descriptor::Descriptor;

use crate::apply_store::{Logged, Store};

pub(crate) const KEYSPACE: u32 = 1;
pub(crate) const START_MS: u64 = 1_700_000_000_000;

/// A replica with a leader before it: entries are stamped by `now_ms` and applied one at a time.
pub(crate) struct Group {
    pub(crate) store: Store,
    pub(crate) now_ms: u64,
    pub(crate) term: u64,
    pub(crate) index: u64,
}

impl Group {
    /// A group that holds the whole ring, at epoch 1.
    pub(crate) fn new(bounds: Bounds) -> Group {
        let mut group = Group { store: Store::new(bounds), now_ms: START_MS, term: 1, index: 0 };
        let descriptor = Descriptor { shard: 1, arc: Some((0, 0)), epoch: 1 };
        group.entry(Command::Describe(descriptor));
        group
    }

    /// A group that knows nothing of itself yet.
    pub(crate) fn fresh(bounds: Bounds) -> Group {
        Group { store: Store::new(bounds), now_ms: START_MS, term: 1, index: 0 }
    }

    pub(crate) fn entry(&mut self, command: Command) -> Vec<Reply> {
        let stamp = self.now_ms << 16;
        self.index += 1;
        let entry = Stamped { stamp, ceiling: stamp + (250 << 16), command }.encode();
        let log = [(self.term, self.index, Logged::Command(entry))];
        self.store.apply(&log).expect("a sound entry")
    }

    pub(crate) fn write(&mut self, request: Request) -> Reply {
        let mut replies = self.entry(Command::Requests(vec![request]));
        assert_eq!(replies.len(), 1, "one reply per request");
        replies.remove(0)
    }

    /// The value that a read at the group clock finds.
    pub(crate) fn read(&self, key: &str) -> Option<Bytes> {
        self.read_at(key, self.store.state().clock)
    }

    pub(crate) fn read_at(&self, key: &str, version: u64) -> Option<Bytes> {
        self.store.read(KEYSPACE, key.as_bytes(), version).map(|(_, value)| value)
    }

    /// An id that is born now and keeps every answer of its client.
    pub(crate) fn id(&self, client: u64, sequence: u64) -> RequestId {
        RequestId { client, sequence, birth_ms: self.now_ms, lowest_unanswered: 0 }
    }
}

pub(crate) fn request(id: RequestId, operations: Vec<Operation>) -> Request {
    Request { id, keyspace: KEYSPACE, position: 5, epoch: 0, operations }
}

pub(crate) fn operation(key: &str, change: Change) -> Operation {
    Operation { key: Bytes::copy_from_slice(key.as_bytes()), condition: None, change }
}

pub(crate) fn put(key: &str, value: &str) -> Operation {
    put_for(key, value, 0)
}

pub(crate) fn put_for(key: &str, value: &str, ttl_ms: u64) -> Operation {
    operation(key, Change::Put { value: Bytes::copy_from_slice(value.as_bytes()), ttl_ms })
}

pub(crate) fn increment(key: &str, by: i64) -> Operation {
    operation(key, Change::Increment { by })
}

pub(crate) fn when(condition: Condition, operation: Operation) -> Operation {
    Operation { condition: Some(condition), ..operation }
}

pub(crate) fn applied_version(reply: &Reply) -> u64 {
    match &reply.outcome {
        Outcome::Applied { version, .. } => *version,
        other => panic!("not applied: {other:?}"),
    }
}

pub(crate) fn counter(reply: &Reply) -> Option<i64> {
    match &reply.outcome {
        Outcome::Applied { results, .. } => results.last().and_then(|result| result.counter),
        other => panic!("not applied: {other:?}"),
    }
}

//! Owns what calls return: entries, versions, and what a write did. Plain values, made from the
//! answers on the wire. Errors are not here (see `error`).

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::v1;

use crate::topology::{NodeId, ShardId};

/// The version of a write: rises with the shard's log. Equal for all keys of one batch.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// A value as it is stored.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The value. Shares the buffer of the answer it came in: copy small values that are kept long.
    pub value: Bytes,
    /// The write that made it.
    pub version: Version,
    /// When it expires, in milliseconds since 1970; `None` for never.
    pub expires_at_ms: Option<u64>,
}

/// A key with its value, from a scan.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// Its value; empty in a scan of keys only.
    pub value: Bytes,
    /// The write that made it.
    pub version: Version,
    /// When it expires, in milliseconds since 1970; `None` for never.
    pub expires_at_ms: Option<u64>,
}

/// Where an answer stands in the replicated order, and who gave it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Served {
    /// The shard that served.
    pub shard: ShardId,
    /// With `index`: the log entry that wrote it, or up to which it was read.
    pub term: u64,
    /// See `term`.
    pub index: u64,
    /// The node that served.
    pub node: NodeId,
    /// Whether it served as the shard's leader.
    pub leader: bool,
    /// Upper bound on the age of what was read; zero for linearizable reads.
    pub staleness: Duration,
}

/// What [`Get::read`](crate::request::Get::read) returns: the entry and where it was read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Read {
    /// `None` when the key is absent.
    pub entry: Option<Entry>,
    /// Where it was read.
    pub served: Served,
}

/// A write that was applied.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Written {
    /// Its version.
    pub version: Version,
    /// Where it stands in the shard's log.
    pub served: Served,
}

/// What a conditional write did. A condition that fails is an answer, not an error.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Cas {
    /// The condition held, and the write was applied.
    Applied(Written),
    /// The condition failed; nothing was changed.
    Mismatch {
        /// The key's state that the condition met; `None` when the key was absent.
        current: Option<Entry>,
        /// Where it was judged.
        served: Served,
    },
}

impl Cas {
    /// Whether the write was applied.
    pub fn is_applied(&self) -> bool {
        matches!(self, Cas::Applied(_))
    }
}

/// What an atomic batch did.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BatchOutcome {
    /// The version of all its writes; `None` when a condition failed and nothing was changed.
    pub applied: Option<Version>,
    /// In the order of the operations.
    pub results: Vec<OperationOutcome>,
    /// Where it stands in the shard's log.
    pub served: Served,
}

/// What one operation of a batch did or met.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct OperationOutcome {
    /// Whether it was this operation's condition that failed.
    pub condition_failed: bool,
    /// The key's state where the condition failed; `None` when the key was absent.
    pub current: Option<Entry>,
    /// The value is missing from `current`, because those of all operations together would have been
    /// too much for one answer; its version is there.
    pub value_left_out: bool,
    /// The counter's new value, of an increment that was applied.
    pub counter: i64,
}

/// What an increment did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Counter {
    /// The new value.
    pub value: i64,
    /// The write.
    pub written: Written,
}

impl Entry {
    pub(crate) fn from_wire(entry: v1::Entry) -> Entry {
        Entry {
            value: entry.value,
            version: Version(entry.version),
            expires_at_ms: (entry.expires_at_ms != 0).then_some(entry.expires_at_ms),
        }
    }
}

impl KeyValue {
    pub(crate) fn from_wire(pair: v1::KeyValue) -> KeyValue {
        let entry = Entry::from_wire(pair.entry.unwrap_or_default());
        KeyValue {
            key: pair.key,
            value: entry.value,
            version: entry.version,
            expires_at_ms: entry.expires_at_ms,
        }
    }
}

impl Served {
    pub(crate) fn from_wire(served: Option<&v1::Served>) -> Served {
        // An answer without it says that it was served by nobody, in term 0.
        let served = served.copied().unwrap_or_default();
        Served {
            shard: ShardId(served.shard),
            term: served.term,
            index: served.index,
            node: NodeId(served.node),
            leader: served.leader,
            staleness: Duration::from_millis(served.staleness_ms),
        }
    }
}

impl Cas {
    pub(crate) fn from_wire(
        applied: bool,
        version: u64,
        current: Option<v1::Entry>,
        served: Option<v1::Served>,
    ) -> Cas {
        let served = Served::from_wire(served.as_ref());
        if applied {
            Cas::Applied(Written { version: Version(version), served })
        } else {
            Cas::Mismatch { current: current.map(Entry::from_wire), served }
        }
    }
}

impl BatchOutcome {
    pub(crate) fn from_wire(response: v1::WriteResponse) -> BatchOutcome {
        BatchOutcome {
            applied: response.applied.then_some(Version(response.version)),
            results: response.results.into_iter().map(OperationOutcome::from_wire).collect(),
            served: Served::from_wire(response.served.as_ref()),
        }
    }
}

impl OperationOutcome {
    fn from_wire(result: v1::OperationResult) -> OperationOutcome {
        OperationOutcome {
            condition_failed: result.condition_failed,
            current: result.current.map(Entry::from_wire),
            value_left_out: result.value_left_out,
            counter: result.counter,
        }
    }
}

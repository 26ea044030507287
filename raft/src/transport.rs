//! The seam to the network: handed in by whoever hosts the groups.
//!
//! Owns nothing. Addresses, connections, framing and coalescing stand on the other side.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use coracle_storage::ReplicaId;

use crate::types::{NodeId, ShardId};

/// Which of the connections to a node a message takes, so that a snapshot never holds up a
/// heartbeat.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Votes and transfers of leadership.
    Control,
    /// Heartbeats: as control, but they may wait a few milliseconds for those of other groups.
    Heartbeat,
    /// Entries.
    Appends,
    /// Snapshots.
    Bulk,
}

/// Whom a message is for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The node that holds the replica.
    pub node: NodeId,
    /// The group.
    pub shard: ShardId,
    /// The replica. A node that holds another one of this group answers "unreachable".
    pub replica: ReplicaId,
}

/// The question was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The question did not leave this node: nobody has heard it.
    #[error("not sent: {0}")]
    NotSent(String),
    /// The node is down, its queue is full, or it does not hold the replica.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No answer within the time given; the question may have been heard.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// The answer to a question, whenever it comes.
pub type Answering = Pin<Box<dyn Future<Output = Result<Bytes, TransportError>> + Send>>;

/// Carries encoded questions to other nodes.
///
/// Questions of one lane to one node arrive in the order in which `ask` was called, or not at all.
/// `ask` itself takes the question's place in that order; only the answer is awaited. Every answer
/// is awaited no longer than `timeout`. What is in flight is bounded in bytes per lane; beyond the
/// bound the answer is `Unreachable` at once.
pub trait Transport: Send + Sync + 'static {
    /// Sends a question and returns its answer as a future.
    fn ask(&self, to: Address, lane: Lane, question: Bytes, timeout: Duration) -> Answering;
}

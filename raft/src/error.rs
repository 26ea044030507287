//! What a group refuses, named by what the caller must do.
//!
//! Owns the errors of reads, writes and changes of one group. What they become on the wire is the server's.

use std::time::Duration;

use crate::types::NodeId;

/// What is known of a write that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Certainly not, and never will be.
    NotApplied,
    /// It may be applied already, or later.
    Unknown,
}

/// A group could not serve a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// Ask the leader, where one is known. The write was not proposed.
    #[error("not the leader")]
    NotLeader {
        /// The node of the leader.
        leader: Option<NodeId>,
    },
    /// Too much waits already.
    #[error("overloaded: try again after {retry_after:?}")]
    Overloaded {
        /// When the queue may have room.
        retry_after: Duration,
    },
    /// The deadline passed before the write was proposed.
    #[error("the deadline passed before the write was proposed")]
    Expired,
    /// The write was proposed, and its end is not known: ask again with the same request id.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
    /// This node's clock strays from its peers' clocks.
    #[error("the clock of this node is out of bound")]
    ClockOutOfBound,
    /// The replica did not come up to what was asked in time.
    #[error("the replica is too far behind")]
    TooStale,
    /// A voter's disk is below its reserve.
    #[error("the disk of a replica is full")]
    DiskFull,
    /// The state could not be read.
    #[error("storage: {0}")]
    Storage(String),
    /// The group is not, or no longer, hosted here.
    #[error("the group is stopped on this node")]
    Stopped,
}

/// The members of a group were not changed, or nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Ask the leader, where one is known.
    #[error("not the leader")]
    NotLeader {
        /// The node of the leader.
        leader: Option<NodeId>,
    },
    /// The group is not what it was when this was planned: look again.
    #[error("the group is at epoch {epoch}")]
    EpochPassed {
        /// The epoch of now.
        epoch: u64,
    },
    /// Another change is under way, or half done: look again later.
    #[error("another change of the members is under way")]
    UnderWay,
    /// It contradicts what is.
    #[error("{0}")]
    Refused(String),
    /// Nothing was proposed: the group does not answer.
    #[error("the group does not answer: {0}")]
    Unavailable(String),
    /// It was proposed, and its end is not known: look, or ask for the same again.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
}

impl GroupError {
    /// What is known of a write that failed with this.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Unknown(_) => Outcome::Unknown,
            _ => Outcome::NotApplied,
        }
    }
}

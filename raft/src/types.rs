//! The names of things, and openraft's type configuration over them.
//!
//! Owns ids and log positions. Does not know addresses: a replica names its node by id, and the
//! transport finds the address.

use std::fmt;

use bytes::Bytes;
pub use coracle_proto::shard_map::{NodeId, ShardId};

pub use crate::position::Position;

use crate::apply::Reply;
use crate::runtime::Runtime;

/// What a replica counts for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Votes, and counts for the quorum.
    Voter,
    /// A read replica.
    Learner,
}

/// A group member's place, as openraft's `Node`: only the node's id, never an address, so that a
/// cluster may come back at new addresses without a membership change.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node that holds the replica.
    pub node: NodeId,
}

/// No node: openraft asks for a default, and nothing of ours uses it.
impl Default for Place {
    fn default() -> Self {
        Self { node: NodeId(0) }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.node.fmt(f)
    }
}

/// An encoded `Stamped` command: encoded once, by the proposer; the log, the network and apply
/// share its bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Proposal(pub Bytes);

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "proposal of {} bytes", self.0.len())
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The answers to an entry's requests, in order; empty for entries without requests.
#[derive(Debug, Default)]
pub struct Replies(pub Vec<Reply>);

impl fmt::Display for Replies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} replies", self.0.len())
    }
}

openraft::declare_raft_types!(
    /// One leader per term (`leader_id_std`); node ids of openraft are our replica ids.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Replies,
        NodeId = u64,
        Node = Place,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = Runtime,
);

pub(crate) type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = openraft::alias::VoteOf<TypeConfig>;
pub(crate) type Entry = openraft::alias::EntryOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, Place>;
pub(crate) type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;

pub(crate) fn log_id(position: Position) -> LogId {
    LogId::new(openraft::vote::leader_id_std::CommittedLeaderId::new(position.term), position.index)
}

pub(crate) fn position(id: &LogId) -> Position {
    Position { term: id.committed_leader_id().term, index: id.index() }
}

/// A log id as the shared log keeps it: term and index, big-endian.
pub(crate) fn id_bytes(id: &LogId) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&id.committed_leader_id().term.to_be_bytes());
    bytes[8..].copy_from_slice(&id.index().to_be_bytes());
    bytes
}

pub(crate) fn id_from_bytes(bytes: &[u8; 16]) -> LogId {
    let half = |at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight of sixteen bytes"))
    };
    log_id(Position { term: half(0), index: half(8) })
}

//! Owns the way from what a group refuses to what a caller is told: reason, outcome, facts. Does not
//! decide whether to try again (see [`crate::router`]).

use std::time::Duration;

use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::shard_map::{NodeId, ShardId, ShardMap};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::GroupError;
use coracle_storage::Error as StorageError;

/// When to come back to a shard without a leader: about half an election.
const NO_QUORUM_RETRY: Duration = Duration::from_millis(200);
/// When to come back to a leader whose clock strays: it is judged again with every heartbeat.
const CLOCK_RETRY: Duration = Duration::from_millis(250);

/// A leader as somebody knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Its node.
    pub node: NodeId,
    /// The term in which it leads.
    pub term: u64,
}

/// This replica does not lead; the leader where it is known, with its address.
pub fn not_leader(map: Option<&ShardMap>, shard: ShardId, leader: Option<Leader>) -> Fault {
    let fault =
        about(Fault::new(Reason::NotLeader, "this node does not lead the shard"), map, shard);
    let Some(leader) = leader else { return fault };
    let fault =
        fault.with(metadata::LEADER_NODE, leader.node).with(metadata::LEADER_TERM, leader.term);
    let address = map.and_then(|map| map.node(leader.node)).map(|node| &node.address);
    match address.filter(|address| !address.is_empty()) {
        Some(address) => fault.with(metadata::LEADER_ADDR, address),
        None => fault,
    }
}

/// The leader that a `NOT_LEADER` names.
pub fn leader_of(fault: &Fault) -> Option<Leader> {
    let node = NodeId(fault.number(metadata::LEADER_NODE)?);
    Some(Leader { node, term: fault.number(metadata::LEADER_TERM)? })
}

/// The shard has no leader that could be found.
pub fn no_quorum(map: Option<&ShardMap>, shard: ShardId) -> Fault {
    let message = "the shard has no leader, or its leader no majority";
    about(Fault::new(Reason::NoQuorum, message), map, shard).with_retry_after(NO_QUORUM_RETRY)
}

/// The route is of another epoch, or the shard does not hold the key. `descriptor` is the group's own
/// word, where this node has it; otherwise the map's stands for it.
pub fn stale_route(
    map: Option<&ShardMap>,
    shard: ShardId,
    descriptor: Option<&Descriptor>,
) -> Fault {
    let message = "the route is of another epoch, or the shard does not hold the key";
    let fault = about(Fault::new(Reason::StaleRoute, message), map, shard);
    match descriptor {
        Some(descriptor) => fault.with(metadata::EPOCH, descriptor.epoch),
        None => fault,
    }
}

/// The deadline passed before anything was proposed or read.
pub fn expired() -> Fault {
    let message = "the deadline passed before anything was proposed or read";
    Fault::new(Reason::DeadlineNotApplied, message)
}

/// The write may have been applied.
pub fn unknown(why: impl std::fmt::Display) -> Fault {
    let message = format!("the write may have been applied, ask with the same request id: {why}");
    Fault::new(Reason::OutcomeUnknown, message)
}

/// What a group of this node refused. `leader` is by the replica's own status, where node and term
/// were read together: a pair of two moments would be believed by everybody for a whole term.
pub fn of_group(
    map: Option<&ShardMap>,
    shard: ShardId,
    leader: Option<Leader>,
    error: GroupError,
) -> Fault {
    let new = |reason| about(Fault::new(reason, error.to_string()), map, shard);
    match &error {
        GroupError::NotLeader { .. } => not_leader(map, shard, leader),
        GroupError::Stopped => not_leader(map, shard, None),
        GroupError::Overloaded { retry_after } => {
            new(Reason::Overloaded).with_retry_after(*retry_after)
        }
        GroupError::Expired => expired(),
        GroupError::Unknown(why) => about(unknown(why), map, shard),
        GroupError::ClockOutOfBound => new(Reason::ClockOutOfBound).with_retry_after(CLOCK_RETRY),
        GroupError::TooStale => new(Reason::TooStale),
        GroupError::DiskFull => new(Reason::DiskFull),
        GroupError::Storage(_) => new(Reason::Internal).with_outcome(Outcome::NotApplied),
    }
}

/// Why a look at a group's state came to nothing.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The group refused.
    Group(GroupError),
    /// The view does not hold what was asked for, or not under the epoch that was named.
    Stale(Option<Descriptor>),
    /// What lies below this version may be gone.
    Gone { oldest: u64 },
    /// Compaction went on while it was looked, and may have dropped what was the newest then.
    Overtaken,
    /// Anything that does not depend on the group.
    Told(Box<Fault>),
}

impl Refusal {
    /// As the caller is told.
    pub(crate) fn fault(
        self,
        map: Option<&ShardMap>,
        shard: ShardId,
        leader: Option<Leader>,
    ) -> Fault {
        match self {
            Refusal::Group(error) => of_group(map, shard, leader, error),
            Refusal::Stale(descriptor) => stale_route(map, shard, descriptor.as_ref()),
            Refusal::Overtaken => of_group(map, shard, leader, GroupError::TooStale),
            Refusal::Gone { oldest } => {
                let message = format!(
                    "the version is older than the keyspace's history; the oldest is {oldest}"
                );
                about(Fault::new(Reason::VersionGone, message), map, shard)
                    .with(metadata::OLDEST_VERSION, oldest)
            }
            Refusal::Told(fault) => about(*fault, map, shard),
        }
    }
}

impl From<GroupError> for Refusal {
    fn from(error: GroupError) -> Refusal {
        Refusal::Group(error)
    }
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Refusal {
        Refusal::Told(Box::new(fault))
    }
}

impl From<StorageError> for Refusal {
    fn from(error: StorageError) -> Refusal {
        let fault = match &error {
            StorageError::Corruption { file, offset, .. } => {
                Fault::new(Reason::Corruption, error.to_string())
                    .with(metadata::FILE, file.display())
                    .with(metadata::OFFSET, offset)
            }
            _ => Fault::new(Reason::Internal, format!("the state could not be read: {error}")),
        };
        Refusal::from(fault)
    }
}

/// Adds where it happened.
fn about(fault: Fault, map: Option<&ShardMap>, shard: ShardId) -> Fault {
    let fault = fault.with(metadata::SHARD, shard);
    let Some(map) = map else { return fault };
    let fault = fault.with(metadata::MAP_EPOCH, map.epoch());
    match map.shard(shard) {
        Some(shard) => fault.with(metadata::EPOCH, shard.epoch),
        None => fault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_but_the_unknown_says_not_applied() {
        let refusals = [
            GroupError::NotLeader { leader: None },
            GroupError::Overloaded { retry_after: Duration::from_millis(7) },
            GroupError::Expired,
            GroupError::ClockOutOfBound,
            GroupError::TooStale,
            GroupError::DiskFull,
            GroupError::Storage("broken".into()),
            GroupError::Stopped,
        ];
        for refusal in refusals {
            let fault = of_group(None, ShardId(3), None, refusal);
            assert_eq!(fault.outcome, Outcome::NotApplied, "{fault}");
        }
        let fault = of_group(None, ShardId(3), None, GroupError::Unknown("gone".into()));
        assert_eq!((fault.reason, fault.outcome), (Reason::OutcomeUnknown, Outcome::Unknown));
        assert_eq!(fault.number(metadata::SHARD), Some(3));
    }

    #[test]
    fn named_leader_comes_back() {
        let leader = Leader { node: NodeId(4), term: 9 };
        assert_eq!(leader_of(&not_leader(None, ShardId(1), Some(leader))), Some(leader));
        assert_eq!(leader_of(&not_leader(None, ShardId(1), None)), None);
    }
}

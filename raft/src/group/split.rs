//! Splitting a group: the leader's call. What it does to a state is `apply`'s, how the child comes to be on
//! each node is the host's.

use std::collections::BTreeMap;

use coracle_storage::ReplicaId;
use tokio::time::Instant;

use crate::descriptor::Descriptor;
use crate::error::{ChangeError, GroupError};
use crate::group::Group;
use crate::rules::Rules;
use crate::types::ShardId;

/// A split as it was planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitPlan {
    /// The parent's epoch.
    pub epoch: u64,
    /// The first position of the child: inside the parent's arc, and not its first.
    pub at: u64,
    /// The child's shard, which was never used before.
    pub child: ShardId,
    /// For each replica of the parent, voters and read replicas, that of the child on the same node,
    /// which was never used before.
    pub replicas: BTreeMap<ReplicaId, ReplicaId>,
    /// The rules of all keyspaces: see [`Rules::of`].
    pub rules: Rules,
}

/// A split that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// What the parent holds from now on.
    pub parent: Descriptor,
    /// What the child holds.
    pub child: Descriptor,
    /// The version of the split: every earlier one is the parent's.
    pub version: u64,
}

/// How often each part of the arc was met, for choosing where to split by load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadBucket {
    /// Its first position; it ends where the next one begins, the last with the arc.
    pub start: u64,
    /// Reads, as counted on this replica.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Where an arc might be split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SplitPoints {
    /// The position with half of the bytes on each side; `None` where there are too few keys, or all of
    /// them are of one entity.
    pub by_size: Option<u64>,
    /// What the arc's own keys take, about.
    pub bytes: u64,
    /// Counts of operations since the replica was started, decaying.
    pub load: Vec<LoadBucket>,
}

impl Group {
    /// Splits the group: everything from a position on becomes a group of its own, with replicas on the
    /// same nodes. On the leader, on the epoch and the very membership that it was planned on, else
    /// nothing changes. An unknown outcome shows in the group's epoch.
    pub async fn split(&self, plan: SplitPlan, deadline: Instant) -> Result<Split, ChangeError> {
        let _ = (plan, deadline);
        Err(ChangeError::Unavailable("splits are not built yet".to_owned()))
    }

    /// Where this group's arc might be split, as far as this replica knows.
    pub async fn split_points(&self) -> Result<SplitPoints, GroupError> {
        Ok(SplitPoints::default())
    }
}

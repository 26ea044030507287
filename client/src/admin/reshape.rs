//! Owns splits and merges of shards, as operators ask for them.

use std::fmt;
use std::sync::Arc;

use coracle_proto::shard_map::ShardMap;
use coracle_proto::v1;

use super::operations::ClusterOperation;
use super::plan::PlannedMove;
use super::{Admin, unreadable};
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::topology::{ReplicaId, ShardId};

/// Where a shard is split.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SplitAt {
    /// At this position: inside its arc, and not its first.
    Position(u64),
    /// With as many bytes on each side.
    Size,
    /// With as much to do on each side, by what was done of late.
    Load,
}

/// A split that was begun, or would be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Split {
    /// What was begun.
    pub operation: Option<ClusterOperation>,
    /// The first position of the new shard.
    pub at: u64,
    /// First position of the shard.
    pub start: u64,
    /// One past its last; 0 means 2^64.
    pub end: u64,
    /// About how many bytes it holds now.
    pub bytes: u64,
}

/// A merge that was begun, or would be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Merge {
    /// What was begun.
    pub operation: Option<ClusterOperation>,
    /// Replicas of the right one that move first.
    pub moves: Vec<PlannedMove>,
    /// First position of the merged shard.
    pub start: u64,
    /// One past its last; 0 means 2^64.
    pub end: u64,
}

/// How far a split is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum SplitStep {
    /// Not said, or by a newer version.
    #[default]
    Unknown,
    /// It waits until nothing of the shard moves.
    Plan,
    /// The group is asked to split.
    Split,
    /// The map has both.
    Done,
}

/// How far a merge is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum MergeStep {
    /// Not said, or by a newer version.
    #[default]
    Unknown,
    /// Replicas of the right one come to the nodes of the left one.
    Gather,
    /// Both are told.
    Prepare,
    /// The right one stops to serve, for half a second at most.
    Freeze,
    /// It is decided: the left one takes the right one in.
    Absorb,
    /// The map has one; it waits until every replica holds all durably.
    Flush,
    /// The right one's replicas go.
    End,
    /// It is decided: both go on as they were.
    Cancel,
    /// It is over.
    Done,
}

/// A shard that becomes two.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ShardSplit {
    /// The shard.
    pub shard: ShardId,
    /// The first position of the new one.
    pub at: u64,
    /// How far it is.
    pub step: SplitStep,
    /// The new one; `None` as long as it has no id.
    pub child: Option<ShardId>,
    /// The new one's replicas.
    pub replicas: Vec<ReplicaId>,
    /// The cluster began it by itself.
    pub automatic: bool,
}

/// Two neighbours that become one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ShardMerge {
    /// The one that stays.
    pub left: ShardId,
    /// The one that is taken in.
    pub right: ShardId,
    /// How far it is.
    pub step: MergeStep,
    /// How often it was cancelled by itself, to be tried again.
    pub attempts: u32,
}

impl Admin {
    /// Begins to split a shard. Returns when the operation is recorded: it goes on by itself. `dry_run`:
    /// only says what would be done.
    pub async fn split_shard(
        &self,
        shard: ShardId,
        at: SplitAt,
        dry_run: bool,
    ) -> Result<Split, Error> {
        let (at, by) = match at {
            SplitAt::Position(at) => (Some(at), v1::SplitBy::Unspecified),
            SplitAt::Size => (None, v1::SplitBy::Size),
            SplitAt::Load => (None, v1::SplitBy::Load),
        };
        let (shard, by, validate_only) = (shard.0, by.into(), dry_run);
        let request = v1::SplitShardRequest { shard, at, by, validate_only };
        let begun = self.any(self.timeout(), !dry_run, |node: Arc<Pipeline>| async move {
            node.connection().admin().split_shard(request).await
        });
        let begun = begun.await?;
        Ok(Split {
            operation: begun.operation.map(ClusterOperation::from_wire),
            at: begun.at,
            start: begun.start,
            end: begun.end,
            bytes: begun.bytes,
        })
    }

    /// Begins to merge a shard with its right neighbour. Returns when the operation is recorded: it goes
    /// on by itself. `dry_run`: only says what would be done.
    pub async fn merge_shards(
        &self,
        left: ShardId,
        right: ShardId,
        dry_run: bool,
    ) -> Result<Merge, Error> {
        let (left, right, validate_only) = (left.0, right.0, dry_run);
        let request = v1::MergeShardsRequest { left, right, validate_only };
        let begun = self.any(self.timeout(), !dry_run, |node: Arc<Pipeline>| async move {
            node.connection().admin().merge_shards(request).await
        });
        let begun = begun.await?;
        Ok(Merge {
            operation: begun.operation.map(ClusterOperation::from_wire),
            moves: begun.moves.iter().map(PlannedMove::from_wire).collect(),
            start: begun.start,
            end: begun.end,
        })
    }

    /// Where a key's entity stands on the ring; `None` where there is no such keyspace.
    pub async fn position(&self, keyspace: &str, key: &[u8]) -> Result<Option<u64>, Error> {
        let map = self.any(self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().cluster().get_map(v1::GetMapRequest {}).await
        });
        let map = ShardMap::from_proto(&map.await?.map.unwrap_or_default());
        let map = map.map_err(unreadable)?;
        let keyspace = map.keyspace(keyspace);
        Ok(keyspace.map(|keyspace| map.position_of(keyspace, key).0))
    }
}

impl ShardSplit {
    pub(super) fn from_wire(split: v1::ShardSplit) -> ShardSplit {
        ShardSplit {
            step: match split.step() {
                v1::SplitStep::Unspecified => SplitStep::Unknown,
                v1::SplitStep::Plan => SplitStep::Plan,
                v1::SplitStep::Split => SplitStep::Split,
                v1::SplitStep::Done => SplitStep::Done,
            },
            shard: ShardId(split.shard),
            at: split.at,
            child: (split.child != 0).then_some(ShardId(split.child)),
            replicas: split.replicas.iter().map(|replica| ReplicaId(replica.id)).collect(),
            automatic: split.automatic,
        }
    }
}

impl ShardMerge {
    pub(super) fn from_wire(merge: &v1::ShardMerge) -> ShardMerge {
        ShardMerge {
            left: ShardId(merge.left),
            right: ShardId(merge.right),
            step: match merge.step() {
                v1::MergeStep::Unspecified => MergeStep::Unknown,
                v1::MergeStep::Gather => MergeStep::Gather,
                v1::MergeStep::Prepare => MergeStep::Prepare,
                v1::MergeStep::Freeze => MergeStep::Freeze,
                v1::MergeStep::Absorb => MergeStep::Absorb,
                v1::MergeStep::Flush => MergeStep::Flush,
                v1::MergeStep::End => MergeStep::End,
                v1::MergeStep::Cancel => MergeStep::Cancel,
                v1::MergeStep::Done => MergeStep::Done,
            },
            attempts: merge.attempts,
        }
    }
}

impl fmt::Display for SplitStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            SplitStep::Unknown => "unknown",
            SplitStep::Plan => "plan",
            SplitStep::Split => "split",
            SplitStep::Done => "done",
        })
    }
}

impl fmt::Display for MergeStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            MergeStep::Unknown => "unknown",
            MergeStep::Gather => "gather",
            MergeStep::Prepare => "prepare",
            MergeStep::Freeze => "freeze",
            MergeStep::Absorb => "absorb",
            MergeStep::Flush => "flush",
            MergeStep::End => "end",
            MergeStep::Cancel => "cancel",
            MergeStep::Done => "done",
        })
    }
}

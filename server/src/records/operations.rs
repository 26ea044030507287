//! The record of operations: what is under way, what has ended, how balancing is set.
//!
//! Owns its shape, its encoding and what is asked of it. What becomes of operations is decided in
//! `cluster::operations`.

use coracle_proto::{peer, v1};
use prost::Message;
use v1::OperationState;

/// Ended operations that are remembered; the newest of them with its moves, so that it can be undone.
const ENDED_MAX: usize = 16;
/// Moves at a time, over the whole cluster, unless it is set.
const MOVES_AT_A_TIME: u32 = 4;
/// How long a node may be silent, in milliseconds, before its replicas are made elsewhere, unless it
/// is set: a restart, even a slow one, takes less.
const DOWN_AFTER_MS: u64 = 5 * 60 * 1_000;

/// How full a disk may get by moves, in thousandths, unless it is set.
const DISK_FILL_MAX: u32 = 850;

/// The size at which a shard is split by itself, unless it is set: a copy of it takes half an hour at the
/// speed of one move.
const SPLIT_BYTES: u64 = 64 << 30;
/// The keys a second from which one is, unless it is set: with less, one leader is not short of anything.
const SPLIT_LOAD: u64 = 2_000;

/// The record of operations.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Operations {
    /// Those under way, and the last that ended, oldest first.
    pub list: Vec<v1::ClusterOperation>,
    /// The highest id that was given.
    pub last_id: u64,
    /// Nothing moves only for balance.
    pub manual: bool,
    /// 0 means the default.
    pub moves_at_a_time: u32,
    /// 0 means the default.
    pub down_after_ms: u64,
    /// 0 means the default.
    pub disk_fill_max: u32,
    /// As long as no node is above its share by so many thousandths of it, nothing moves for balance.
    pub threshold: u32,
    /// 0 means the default.
    pub split_bytes: u64,
    /// 0 means the default.
    pub split_load: u64,
    /// Shards that the cluster was made with, and those that operators have split off since, less what
    /// they have merged; 0 where nobody knows. What is merged by itself leaves so many.
    pub shards_asked: u64,
}

impl Operations {
    /// As it is recorded.
    pub(crate) fn to_proto(&self) -> peer::Operations {
        peer::Operations {
            operations: self.list.iter().map(|known| known.encode_to_vec().into()).collect(),
            last_id: self.last_id,
            manual: self.manual,
            moves_at_a_time: self.moves_at_a_time,
            down_after_ms: self.down_after_ms,
            disk_fill_max: self.disk_fill_max,
            threshold: self.threshold,
            split_bytes: self.split_bytes,
            split_load: self.split_load,
            shards_asked: self.shards_asked,
        }
    }

    pub(crate) fn from_proto(record: peer::Operations) -> Result<Self, prost::DecodeError> {
        let list = record.operations.into_iter().map(v1::ClusterOperation::decode);
        Ok(Self {
            list: list.collect::<Result<_, _>>()?,
            last_id: record.last_id,
            manual: record.manual,
            moves_at_a_time: record.moves_at_a_time,
            down_after_ms: record.down_after_ms,
            disk_fill_max: record.disk_fill_max,
            threshold: record.threshold,
            split_bytes: record.split_bytes,
            split_load: record.split_load,
            shards_asked: record.shards_asked,
        })
    }

    /// Moves at a time, over the whole cluster.
    pub fn moves_at_a_time(&self) -> u32 {
        if self.moves_at_a_time == 0 { MOVES_AT_A_TIME } else { self.moves_at_a_time }
    }

    /// How long a node may be silent before its replicas are made elsewhere.
    pub fn down_after_ms(&self) -> u64 {
        if self.down_after_ms == 0 { DOWN_AFTER_MS } else { self.down_after_ms }
    }

    /// How full a disk may get by moves, in thousandths: compaction and checkpoints need the rest.
    pub fn disk_fill_max(&self) -> u32 {
        if self.disk_fill_max == 0 { DISK_FILL_MAX } else { self.disk_fill_max }
    }

    /// The size at which a shard is split by itself.
    pub fn split_bytes(&self) -> u64 {
        if self.split_bytes == 0 { SPLIT_BYTES } else { self.split_bytes }
    }

    /// So many keys a second a shard has to do at least before it is split by itself.
    pub fn split_load(&self) -> u64 {
        if self.split_load == 0 { SPLIT_LOAD } else { self.split_load }
    }

    /// Operators want so many shards more, or fewer.
    pub(crate) fn asked_for(&mut self, more: i64) {
        if self.shards_asked > 0 {
            self.shards_asked = self.shards_asked.saturating_add_signed(more).max(1);
        }
    }

    /// Those that have not ended.
    pub fn active(&self) -> impl Iterator<Item = &v1::ClusterOperation> {
        self.list.iter().filter(|operation| is_active(operation))
    }

    pub(crate) fn find(&self, id: u64) -> Option<&v1::ClusterOperation> {
        self.list.iter().find(|operation| operation.id == id)
    }

    /// Whether something of this shard is under way or to come: a move, a split, a merge.
    pub(crate) fn is_busy(&self, shard: u64) -> bool {
        let moves = self.active().flat_map(|operation| &operation.moves);
        moves.into_iter().any(|step| step.shard == shard && !has_ended(step.state()))
            || self.active().any(|operation| reshapes(operation, shard))
    }

    /// Whether this shard is being split or merged, so that its members stay as they are and its arc and
    /// epoch are the business of that operation alone.
    pub(crate) fn is_reshaped(&self, shard: u64) -> bool {
        self.active().any(|operation| reshapes(operation, shard) && holds_still(operation))
    }

    /// Whether a split or a merge of this shard has begun, however little of it.
    pub(crate) fn will_be_reshaped(&self, shard: u64) -> bool {
        self.active().any(|operation| reshapes(operation, shard))
    }

    /// Whether a move of this shard is under way.
    pub(crate) fn is_moving(&self, shard: u64) -> bool {
        self.running().any(|step| step.shard == shard)
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = &v1::OperationMove> {
        let moves = self.active().flat_map(|operation| &operation.moves);
        moves.filter(|step| step.state() == OperationState::Running)
    }

    pub(crate) fn forget_old(&mut self) {
        let ended = self.list.iter().filter(|operation| !is_active(operation)).count();
        let mut surplus = ended.saturating_sub(ENDED_MAX);
        self.list.retain(|operation| {
            let goes = surplus > 0 && !is_active(operation);
            surplus -= usize::from(goes);
            !goes
        });
        let mut ended = self.list.iter_mut().filter(|operation| !is_active(operation));
        ended.next_back();
        ended.for_each(|operation| {
            operation.moves.clear();
            operation.transfers.clear();
        });
    }
}

/// Whether an operation splits a shard, or merges it.
fn reshapes(operation: &v1::ClusterOperation, shard: u64) -> bool {
    let split = operation.split.as_ref().is_some_and(|split| split.shard == shard);
    let merge = operation.merge.as_ref();
    split || merge.is_some_and(|merge| merge.left == shard || merge.right == shard)
}

/// Whether it has come so far that its groups' members must not change.
fn holds_still(operation: &v1::ClusterOperation) -> bool {
    let split = operation.split.as_ref();
    split.is_some_and(|split| split.step() == v1::SplitStep::Split)
        || operation.merge.as_ref().is_some_and(|merge| merge.step() > v1::MergeStep::Gather)
}

/// Whether it has not ended.
pub(crate) fn is_active(operation: &v1::ClusterOperation) -> bool {
    matches!(operation.state(), OperationState::Running | OperationState::Paused)
}

/// Whether an operation, or a move of it, has come to its end.
pub(crate) fn has_ended(state: OperationState) -> bool {
    use OperationState::{Cancelled, Done, Failed};
    matches!(state, Done | Cancelled | Failed)
}

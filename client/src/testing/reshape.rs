//! Owns splits and merges in a fake cluster. They take no time here: the operation is over when it is
//! recorded. Both sides of a split remember what the one remembered; a merge unites it.

use coracle_proto::reason::{Fault, Reason, metadata};
use coracle_proto::v1;

use super::model::{Group, Model};
use crate::topology::ShardId;

impl Model {
    pub(super) fn split_shard(
        &mut self,
        request: &v1::SplitShardRequest,
    ) -> Result<v1::SplitShardResponse, Fault> {
        self.check_made()?;
        let (shard, place) = self.shard_on_ring(request.shard)?;
        if request.at.is_none() && request.by() == v1::SplitBy::Load {
            let message = "a fake cluster does not measure loads";
            return Err(Fault::new(Reason::Unsupported, message));
        }
        let half = shard.end.wrapping_sub(shard.start) / 2;
        let half = if shard.start == shard.end { 1 << 63 } else { half };
        let at = request.at.unwrap_or(shard.start.wrapping_add(half));
        if at <= shard.start || (shard.end != 0 && at >= shard.end) {
            return Err(Fault::invalid(
                "at",
                "it is not inside the arc, behind its first position",
            ));
        }
        let mut response = v1::SplitShardResponse {
            operation: None,
            at,
            start: shard.start,
            end: shard.end,
            bytes: 0,
        };
        if request.validate_only {
            return Ok(response);
        }
        let map = self.wire_map();
        let ids = map.shards.iter().flat_map(|shard| &shard.replicas).map(|replica| replica.id);
        let replica = 1 + ids.max().unwrap_or(0);
        let child = 1 + map.shards.iter().map(|shard| shard.id).max().unwrap_or(0);
        let mut born = v1::Shard { id: child, start: at, epoch: shard.epoch + 1, ..shard.clone() };
        (replica..).zip(&mut born.replicas).for_each(|(id, replica)| replica.id = id);
        let replicas = born.replicas.clone();
        self.change_map(|map| {
            map.epoch += 1;
            (map.shards[place].end, map.shards[place].epoch) = (at, shard.epoch + 1);
            map.shards.insert(place + 1, born);
        });
        let group = self.groups.get(&ShardId(shard.id)).map(Group::child).unwrap_or_default();
        self.groups.insert(ShardId(child), group);
        let split = v1::ShardSplit {
            shard: shard.id,
            at,
            step: v1::SplitStep::Done.into(),
            child,
            replicas,
            by: request.by,
            ..Default::default()
        };
        let operation = self.remember(v1::ClusterOperation {
            kind: v1::OperationKind::Split.into(),
            split: Some(split),
            ..Default::default()
        });
        response.operation = Some(operation);
        Ok(response)
    }

    pub(super) fn merge_shards(
        &mut self,
        request: &v1::MergeShardsRequest,
    ) -> Result<v1::MergeShardsResponse, Fault> {
        self.check_made()?;
        let (left, place) = self.shard_on_ring(request.left)?;
        let (right, _) = self.shard_on_ring(request.right)?;
        if left.end == 0 || left.end != right.start {
            let message = "only a shard and its right neighbour merge";
            return Err(Fault::invalid("right", message));
        }
        let mut response = v1::MergeShardsResponse {
            operation: None,
            moves: Vec::new(),
            start: left.start,
            end: right.end,
        };
        if request.validate_only {
            return Ok(response);
        }
        self.change_map(|map| {
            map.epoch += 1;
            let epoch = left.epoch.max(right.epoch) + 1;
            (map.shards[place].end, map.shards[place].epoch) = (right.end, epoch);
            map.shards.remove(place + 1);
        });
        if let Some(taken) = self.groups.remove(&ShardId(right.id)) {
            self.groups.entry(ShardId(left.id)).or_default().absorb(taken);
        }
        let merge = v1::ShardMerge {
            left: left.id,
            right: right.id,
            step: v1::MergeStep::Done.into(),
            boundary: right.start,
            ..Default::default()
        };
        let operation = self.remember(v1::ClusterOperation {
            kind: v1::OperationKind::Merge.into(),
            merge: Some(merge),
            ..Default::default()
        });
        response.operation = Some(operation);
        Ok(response)
    }

    /// A shard with an arc, and its place in the map.
    fn shard_on_ring(&self, id: u64) -> Result<(v1::Shard, usize), Fault> {
        let map = self.wire_map();
        let place = map.shards.iter().position(|shard| shard.id == id && id != 0);
        let unknown = || {
            let message = format!("there is no shard {id} on the ring");
            Fault::new(Reason::UnknownShard, message).with(metadata::SHARD, id)
        };
        let place = place.ok_or_else(unknown)?;
        Ok((map.shards[place].clone(), place))
    }
}

//! Splits and merges that operators ask for, as the meta group's leader answers.
//!
//! Owns which of them make sense. What then happens is an operation (`reshape`).

use bytes::Bytes;
use coracle_proto::reason::Reason;
use coracle_proto::{peer, v1};

use crate::cluster::elastic::{conflict, encode, refused_for};
use crate::cluster::grow;
use crate::cluster::reshape::{self, SplitWork};
use crate::cluster::{Cluster, done};
use crate::records::Snapshot;

impl Cluster {
    /// What an operator asks: a split.
    pub(in crate::cluster) async fn split_here(
        &self,
        request: Result<v1::SplitShardRequest, peer::CommandDone>,
    ) -> Result<Bytes, peer::CommandDone> {
        let request = request?;
        let snapshot = self.records.load().await.map_err(|error| done(Err(error), self))?;
        let shard = find(&snapshot, request.shard)?;
        let points = self.split_points(&snapshot, shard.id).await;
        let bytes = points.as_ref().map_or(0, |points| points.bytes);
        let by = match (request.at, request.by()) {
            (Some(_), _) => v1::SplitBy::Unspecified,
            (None, v1::SplitBy::Load) => v1::SplitBy::Load,
            (None, _) => v1::SplitBy::Size,
        };
        let at = match request.at {
            Some(at) => at,
            None => points
                .and_then(|points| grow::position(shard, &points, by))
                .map_err(|why| refused_for(Reason::Conflict, &why))?,
        };
        if !reshape::is_inside(shard, at) {
            let why = format!(
                "{at:016x} is not inside the arc of s{}, {:016x} up to {:016x}, behind its first position",
                shard.id, shard.start, shard.end
            );
            return Err(refused_for(Reason::InvalidArgument, &why));
        }
        let mut response = v1::SplitShardResponse {
            operation: None,
            at,
            start: shard.start,
            end: shard.end,
            bytes,
        };
        if request.validate_only {
            let free = reshape::check_free(&snapshot, &[shard.id]);
            free.map_err(|why| refused_for(Reason::Conflict, &why))?;
            return encode(&response);
        }
        let now_ms = self.records.now_ms();
        let work = SplitWork { shard: shard.id, at, by, ..SplitWork::default() };
        let begun = self.change_elastic(|snapshot| {
            reshape::begin_split(snapshot, work, now_ms).map_err(conflict)
        });
        response.operation = Some(begun.await?);
        encode(&response)
    }

    /// What an operator asks: a merge.
    pub(in crate::cluster) async fn merge_here(
        &self,
        request: Result<v1::MergeShardsRequest, peer::CommandDone>,
    ) -> Result<Bytes, peer::CommandDone> {
        let request = request?;
        let snapshot = self.records.load().await.map_err(|error| done(Err(error), self))?;
        let (left, right) = (find(&snapshot, request.left)?, find(&snapshot, request.right)?);
        let pair = (left.id, right.id);
        let checked = reshape::check_merge(&snapshot, pair);
        let checked = checked.map_err(|why| refused_for(Reason::InvalidArgument, &why));
        checked?;
        let (copies, is_tidy) = {
            let known = self.knowledge.lock();
            let bytes = known.bytes.get(&right.id).copied().unwrap_or(0);
            (bytes, known.tidy.contains(&right.id))
        };
        // What a split has left behind in it does not count.
        let sized = reshape::check_size(right.id, if is_tidy { copies } else { 0 });
        sized.map_err(|why| refused_for(Reason::Conflict, &why))?;
        let moves = reshape::apart(left, right).into_iter().map(|(from_node, to_node)| {
            let bytes = if to_node == 0 { 0 } else { copies };
            v1::PlannedMove { shard: right.id, from_node, to_node, bytes }
        });
        let mut response = v1::MergeShardsResponse {
            operation: None,
            moves: moves.collect(),
            start: left.start,
            end: right.end,
        };
        if request.validate_only {
            let free = reshape::check_free(&snapshot, &[left.id, right.id]);
            free.map_err(|why| refused_for(Reason::Conflict, &why))?;
            return encode(&response);
        }
        let now_ms = self.records.now_ms();
        let begun = self.change_elastic(|snapshot| {
            reshape::begin_merge(snapshot, pair, 0, now_ms).map_err(conflict)
        });
        response.operation = Some(begun.await?);
        encode(&response)
    }
}

fn find(snapshot: &Snapshot, id: u64) -> Result<&v1::Shard, peer::CommandDone> {
    let shard = snapshot.map.shards.iter().find(|shard| shard.id == id);
    shard.ok_or_else(|| refused_for(Reason::UnknownShard, &format!("there is no shard s{id}")))
}

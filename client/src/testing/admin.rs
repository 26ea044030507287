//! Owns what operators do to a fake cluster: make it, and hand leaderships over.

use coracle_proto::limits;
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::v1;

use super::model::Model;
use crate::topology::{NodeId, ShardId};

/// What `coracle init` makes when it is not told.
const SHARDS_DEFAULT: u32 = 16;
const REPLICAS_DEFAULT: u32 = 3;

impl Model {
    /// Makes the cluster that was shaped `before_init`.
    pub(super) fn init(&mut self, request: v1::InitRequest) -> Result<v1::InitResponse, Fault> {
        limits::check_shards(request.shards)?;
        if self.is_made {
            let message = "the cluster has been made before";
            return Err(Fault::new(Reason::AlreadyInitialized, message));
        }
        let mut shape = self.shape.clone();
        let or = |asked: u32, default: u32| if asked == 0 { default } else { asked };
        shape.shards = or(request.shards, SHARDS_DEFAULT);
        shape.voters = Some(or(request.replicas, REPLICAS_DEFAULT).min(shape.nodes));
        shape.is_made = true;
        let (shards, replicas) = (shape.shards, shape.voters.unwrap_or_default());
        *self = Model::new(&shape);
        let (cluster_id, warnings) = (self.map.cluster_id().to_owned(), Vec::new());
        Ok(v1::InitResponse { cluster_id, shards, replicas, warnings })
    }

    pub(super) fn check_made(&self) -> Result<(), Fault> {
        if self.is_made {
            return Ok(());
        }
        let message = "the cluster has not been made yet: run `coracle init`";
        Err(Fault::new(Reason::NotInitialized, message))
    }

    /// Hands a shard over, as the node that leads it is asked to.
    pub(super) fn transfer_leader(
        &mut self,
        asked: NodeId,
        request: v1::TransferLeaderRequest,
    ) -> Result<NodeId, Fault> {
        let shard = ShardId(request.shard);
        let Some(known) = self.map.shard(shard) else {
            return Err(Fault::new(Reason::UnknownShard, "there is no shard of this id"));
        };
        if known.leader != Some(asked) {
            let fault = Fault::new(Reason::NotLeader, "this node does not lead the shard");
            return Err(self.towards_leader(fault, shard));
        }
        let fits = |node: NodeId| match request.to_node {
            0 => node != asked && !self.down.contains(&node),
            wanted => node.0 == wanted,
        };
        let to = known.voters().map(|voter| voter.node).find(|node| fits(*node));
        let Some(to) = to else {
            return Err(Fault::new(Reason::UnknownNode, "no voter to hand the shard over to"));
        };
        self.elect(shard, Some(to));
        Ok(to)
    }

    /// Has other voters lead what the node led.
    pub(super) fn elect_others(&mut self, node: NodeId) {
        let led: Vec<ShardId> = self
            .map
            .all_shards()
            .filter(|shard| shard.leader == Some(node))
            .map(|shard| shard.id)
            .collect();
        for (turn, shard) in led.into_iter().enumerate() {
            let known = self.map.shard(shard).expect("it was found just now");
            let others = known.voters().map(|voter| voter.node);
            let others: Vec<NodeId> =
                others.filter(|other| *other != node && !self.down.contains(other)).collect();
            assert!(!others.is_empty(), "no voter of shard {shard} is left to lead it");
            let next = others[turn % others.len()];
            self.elect(shard, Some(next));
        }
    }
}

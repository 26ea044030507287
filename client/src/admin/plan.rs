//! Owns plans of the balancer: what would be moved, as plain values that can be kept in a file.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::v1;

use super::Admin;
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::topology::{NodeId, ShardId};

/// What would be moved. Bound to the map that it was made for: under another one it is refused, as
/// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Plan {
    /// Of this cluster.
    pub cluster_id: String,
    /// For the map of this epoch.
    pub epoch: u64,
    /// In the order in which they are made.
    pub moves: Vec<PlannedMove>,
    /// Behind the moves.
    pub transfers: Vec<PlannedTransfer>,
    /// Before and after, by node.
    pub nodes: Vec<PlannedNode>,
    /// No plan to the same end needs fewer moves.
    pub moves_min: u32,
    /// About how many bytes are copied.
    pub bytes: u64,
    /// About how long it takes, at the speed that is set.
    pub estimate: Duration,
    /// What cannot be mended, and why.
    pub stalled: Vec<String>,
}

/// One replica that a plan moves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PlannedMove {
    /// The shard.
    pub shard: ShardId,
    /// Where it is; `None` where a voter is lacking.
    pub from: Option<NodeId>,
    /// Where it goes; `None` where there is a voter too many.
    pub to: Option<NodeId>,
    /// About how many bytes are copied.
    pub bytes: u64,
}

/// One leadership that a plan moves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PlannedTransfer {
    /// The shard.
    pub shard: ShardId,
    /// Who leads; `None` where nobody does.
    pub from: Option<NodeId>,
    /// Who shall lead; `None` where the leader chooses.
    pub to: Option<NodeId>,
}

/// What one node holds, before a plan and after it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PlannedNode {
    /// The node.
    pub node: NodeId,
    /// Voters.
    pub replicas_before: u32,
    /// Voters, then.
    pub replicas_after: u32,
    /// Leaderships.
    pub leaders_before: u32,
    /// Leaderships, then.
    pub leaders_after: u32,
    /// Bytes of its voters.
    pub bytes_before: u64,
    /// Bytes of its voters, then.
    pub bytes_after: u64,
    /// Keys read and written a second, of the shards that it leads.
    pub load_before: u64,
    /// The same, then.
    pub load_after: u64,
}

/// How a plan is made.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PlanOptions {
    /// At most so many moves; `None` for all.
    pub moves_max: Option<u32>,
    /// In place of the setting, [`Balancing::threshold`](super::Balancing::threshold).
    pub threshold: Option<u32>,
    /// As if nodes had these weights, in thousandths of an ordinary node's.
    pub weights: Vec<(NodeId, u32)>,
}

impl Admin {
    /// What would be moved, and why. Changes nothing.
    pub async fn plan_rebalance(&self, options: &PlanOptions) -> Result<Plan, Error> {
        let weight =
            |(node, weight): &(NodeId, u32)| v1::NodeWeight { node: node.0, weight: *weight };
        let request = v1::PlanRebalanceRequest {
            moves_max: options.moves_max.unwrap_or(0),
            threshold: options.threshold,
            weights: options.weights.iter().map(weight).collect(),
        };
        // Whoever plans asks all nodes how they are, and waits for those that do not answer.
        let each = self.timeout() / 2;
        let made = self.any_for(self.timeout(), each, false, |node: Arc<Pipeline>| {
            let request = request.clone();
            async move { node.connection().admin().plan_rebalance(request).await }
        });
        Ok(Plan::from_wire(made.await?.plan.unwrap_or_default()))
    }
}

impl Plan {
    /// Nothing is to be moved.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty() && self.transfers.is_empty()
    }

    fn from_wire(plan: v1::RebalancePlan) -> Plan {
        Plan {
            cluster_id: plan.cluster_id,
            epoch: plan.epoch,
            moves: plan.moves.iter().map(PlannedMove::from_wire).collect(),
            transfers: plan.transfers.iter().map(PlannedTransfer::from_wire).collect(),
            nodes: plan.nodes.iter().map(PlannedNode::from_wire).collect(),
            moves_min: plan.moves_min,
            bytes: plan.bytes,
            estimate: Duration::from_millis(plan.estimate_ms),
            stalled: plan.stalled,
        }
    }

    pub(super) fn to_wire(&self) -> v1::RebalancePlan {
        v1::RebalancePlan {
            cluster_id: self.cluster_id.clone(),
            epoch: self.epoch,
            moves: self.moves.iter().copied().map(PlannedMove::to_wire).collect(),
            transfers: self.transfers.iter().copied().map(PlannedTransfer::to_wire).collect(),
            nodes: self.nodes.iter().copied().map(PlannedNode::to_wire).collect(),
            moves_min: self.moves_min,
            bytes: self.bytes,
            estimate_ms: u64::try_from(self.estimate.as_millis()).unwrap_or(u64::MAX),
            stalled: self.stalled.clone(),
        }
    }
}

impl PlannedMove {
    pub(super) fn from_wire(planned: &v1::PlannedMove) -> PlannedMove {
        PlannedMove {
            shard: ShardId(planned.shard),
            from: node(planned.from_node),
            to: node(planned.to_node),
            bytes: planned.bytes,
        }
    }

    fn to_wire(self) -> v1::PlannedMove {
        v1::PlannedMove {
            shard: self.shard.0,
            from_node: number(self.from),
            to_node: number(self.to),
            bytes: self.bytes,
        }
    }
}

impl PlannedTransfer {
    pub(super) fn from_wire(planned: &v1::PlannedTransfer) -> PlannedTransfer {
        PlannedTransfer {
            shard: ShardId(planned.shard),
            from: node(planned.from_node),
            to: node(planned.to_node),
        }
    }

    fn to_wire(self) -> v1::PlannedTransfer {
        v1::PlannedTransfer {
            shard: self.shard.0,
            from_node: number(self.from),
            to_node: number(self.to),
        }
    }
}

impl PlannedNode {
    fn from_wire(planned: &v1::PlannedNode) -> PlannedNode {
        PlannedNode {
            node: NodeId(planned.node),
            replicas_before: planned.replicas_before,
            replicas_after: planned.replicas_after,
            leaders_before: planned.leaders_before,
            leaders_after: planned.leaders_after,
            bytes_before: planned.bytes_before,
            bytes_after: planned.bytes_after,
            load_before: planned.load_before,
            load_after: planned.load_after,
        }
    }

    fn to_wire(self) -> v1::PlannedNode {
        v1::PlannedNode {
            node: self.node.0,
            replicas_before: self.replicas_before,
            replicas_after: self.replicas_after,
            leaders_before: self.leaders_before,
            leaders_after: self.leaders_after,
            bytes_before: self.bytes_before,
            bytes_after: self.bytes_after,
            load_before: self.load_before,
            load_after: self.load_after,
        }
    }
}

/// A node as it travels: 0 is none.
pub(super) fn node(id: u64) -> Option<NodeId> {
    (id != 0).then_some(NodeId(id))
}

fn number(node: Option<NodeId>) -> u64 {
    node.map_or(0, |node| node.0)
}

//! Where replicas and leaders stand: pure functions from nodes, shards and settings to a plan.
//!
//! Owns every choice of a place. Knows no clock, no network and no records: the same input gives the same
//! plan, a plan that was carried out gives an empty one, and what cannot be done is said
//! ([`model::Stall`]), never a panic.
//!
//! What is better than what, the first that differs decides:
//!
//! 1. every shard has its replicas, on distinct nodes that may hold them;
//! 2. each shard stands in as many zones as it can, and as evenly in them;
//! 3. every node has its share of replicas by weight, rounded down or up; beyond that they are as the
//!    weights as can be;
//! 4. the fewest replicas are copied;
//! 5. bytes are even, at no more copies, or, where one node has far too many, with some; then load, where
//!    that leaves bytes even (`even`);
//! 6. leaders: preferred zones, then counts with the fewest transfers, or loads (`leaders`).
//!
//! 1 to 4 are solved exactly (`flow`), unless a disk's limit stands in the way. With
//! [`model::Goal::Repair`] 4 comes before 2. [`check`] verifies any plan by other means.

pub mod model;
pub mod learners;
mod assignment;
mod flow;
mod even;
mod replicas;
mod order;
mod leaders;
mod plan;
pub mod check;

use coracle_proto::shard_map::{Epoch, NodeId, ShardId};

use self::model::{Duty, NodeView, Settings, ShardView, View, WEIGHT_ONE};
pub use self::plan::{cut, plan, plan_leaders, plan_towards};

/// A node that can take replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub node: NodeId,
    /// Its failure domain.
    pub zone: String,
}

/// For each shard of a new cluster the nodes that hold it; the first of each forms the group, and so leads
/// it first. A plan from nothing: see the module for what holds.
pub fn place(candidates: &[Candidate], shards: usize, replicas: usize) -> Vec<Vec<NodeId>> {
    assert!(!candidates.is_empty(), "a cluster has at least one node");
    let node = |candidate: &Candidate| NodeView {
        id: candidate.node,
        zone: candidate.zone.clone(),
        weight: WEIGHT_ONE,
        duty: Duty::Serves,
        disk: None,
    };
    let shard = |id: usize| ShardView {
        id: ShardId(id as u64),
        voters: Vec::new(),
        learners: Vec::new(),
        leader: None,
        bytes: 0,
        load: 0,
    };
    let view = View {
        epoch: Epoch(0),
        nodes: candidates.iter().map(node).collect(),
        shards: (0..shards).map(shard).collect(),
    };
    let plan = plan(&view, &Settings { replicas, ..Settings::default() });
    let placed = plan.wanted.into_values().map(|placed| {
        let mut voters = placed.voters;
        voters.sort_by_key(|node| (Some(*node) != placed.leader, *node));
        voters
    });
    placed.collect()
}

#[cfg(test)]
mod tests;

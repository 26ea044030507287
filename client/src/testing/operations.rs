//! Owns what operators move in a fake cluster: plans, moves, states of nodes, and what was done. A
//! move takes no time here: its operation is over when it is recorded. Plans go by numbers of voters
//! alone. What would take time, or run by itself, is refused as unsupported.

use std::collections::BTreeMap;

use coracle_proto::reason::{Fault, Reason, metadata};
use coracle_proto::v1;

use super::model::Model;
use crate::topology::NodeId;

/// What is remembered of operations. Beyond: the oldest are forgotten, as servers do.
const REMEMBERED_MAX: usize = 100;

/// What operators began.
pub(super) struct Ledger {
    /// Oldest first; each has ended.
    operations: Vec<v1::ClusterOperation>,
    last_id: u64,
    moves_at_a_time: u32,
    down_after_ms: u64,
    disk_fill_max: u32,
    threshold: u32,
    split_bytes: u64,
    split_load: u64,
}

impl Default for Ledger {
    fn default() -> Ledger {
        Ledger {
            operations: Vec::new(),
            last_id: 0,
            moves_at_a_time: 2,
            down_after_ms: 300_000,
            disk_fill_max: 850,
            threshold: 0,
            split_bytes: 64 << 30,
            split_load: 2_000,
        }
    }
}

/// A voter that changes its node.
#[derive(Clone, Copy)]
struct Step {
    shard: u64,
    from: u64,
    to: u64,
}

impl Step {
    fn planned(self) -> v1::PlannedMove {
        let Step { shard, from, to } = self;
        v1::PlannedMove { shard, from_node: from, to_node: to, bytes: 0 }
    }
}

impl Model {
    /// Evens the numbers of voters out, and empties nodes that are to hold nothing.
    pub(super) fn plan_rebalance(&self, moves_max: u32) -> Result<v1::RebalancePlan, Fault> {
        self.check_made()?;
        let map = self.wire_map();
        let mut after = map.clone();
        let (mut steps, mut stalled) = (Vec::new(), Vec::new());
        let leaving = map.nodes.iter().filter(is_leaving);
        for node in leaving.map(|node| node.id) {
            for shard in voters_of(&map, node) {
                match target(&after, shard, node) {
                    Some(to) => steps.push(carry_out(&mut after, Step { shard, from: node, to })),
                    None => {
                        stalled.push(format!("no node can take n{node}'s voter of shard {shard}"))
                    }
                }
            }
        }
        while let Some(step) = evening(&after) {
            steps.push(carry_out(&mut after, step));
        }
        let moves_min = moves_min(&map, steps.len());
        if moves_max > 0 && steps.len() > moves_max as usize {
            steps.truncate(moves_max as usize);
            after = map.clone();
            for step in &steps {
                carry_out(&mut after, *step);
            }
        }
        Ok(v1::RebalancePlan {
            cluster_id: map.cluster_id.clone(),
            epoch: map.epoch,
            moves: steps.into_iter().map(Step::planned).collect(),
            nodes: map.nodes.iter().map(|node| planned_node(node.id, &map, &after)).collect(),
            moves_min,
            stalled,
            ..Default::default()
        })
    }

    pub(super) fn start_rebalance(
        &mut self,
        plan: &v1::RebalancePlan,
    ) -> Result<v1::ClusterOperation, Fault> {
        self.check_made()?;
        let map = self.wire_map();
        if plan.cluster_id != map.cluster_id {
            return Err(Fault::new(Reason::Conflict, "the plan is of another cluster"));
        }
        if plan.epoch != map.epoch {
            let message = format!(
                "the plan is of map epoch {}, and the map is of epoch {} now",
                plan.epoch, map.epoch
            );
            return Err(Fault::new(Reason::Conflict, message).with(metadata::MAP_EPOCH, map.epoch));
        }
        if !plan.transfers.is_empty() {
            let message = "a fake cluster plans no transfers of leaderships";
            return Err(Fault::new(Reason::Unsupported, message));
        }
        let step = |planned: &v1::PlannedMove| Step {
            shard: planned.shard,
            from: planned.from_node,
            to: planned.to_node,
        };
        let steps: Vec<Step> = plan.moves.iter().map(step).collect();
        self.carry_out_all(v1::OperationKind::Rebalance, &steps)
    }

    pub(super) fn move_replica(
        &mut self,
        request: &v1::MoveReplicaRequest,
    ) -> Result<v1::ClusterOperation, Fault> {
        self.check_made()?;
        let v1::MoveReplicaRequest { shard, from_node: from, to_node: to } = *request;
        self.carry_out_all(v1::OperationKind::Move, &[Step { shard, from, to }])
    }

    pub(super) fn set_node_state(
        &mut self,
        request: &v1::SetNodeStateRequest,
    ) -> Result<v1::SetNodeStateResponse, Fault> {
        self.check_made()?;
        let (node, state) = (NodeId(request.node), request.state());
        let known = self.map.node(node).ok_or_else(|| unknown_node(node.0))?.to_proto();
        if known.state() == v1::NodeState::Gone {
            return Err(Fault::new(Reason::Conflict, "the node is gone, and never comes back"));
        }
        let operation = match state {
            v1::NodeState::Active => {
                self.set_state(node, state);
                None
            }
            v1::NodeState::Draining => {
                self.set_state(node, state);
                self.give_leaderships_away(node);
                None
            }
            v1::NodeState::Decommissioning => {
                let operation = self.empty(node, v1::OperationKind::Decommission)?;
                self.set_state(node, v1::NodeState::Decommissioned);
                operation
            }
            v1::NodeState::Gone if !self.down.contains(&node) => {
                return Err(Fault::new(Reason::Conflict, "the node answers: it is not lost"));
            }
            v1::NodeState::Gone => {
                self.check_quorums(node)?;
                let operation = self.empty(node, v1::OperationKind::Repair)?;
                self.set_state(node, state);
                operation
            }
            _ => {
                let message = "a node can be made active, draining, decommissioning or gone";
                return Err(Fault::invalid("state", message));
            }
        };
        let node = self.map.node(node).map(|node| node.to_proto());
        Ok(v1::SetNodeStateResponse { node, operation })
    }

    /// Has other voters lead what a node leads, where there are any within reach.
    fn give_leaderships_away(&mut self, node: NodeId) {
        let led = self.map.all_shards().filter(|shard| shard.leader == Some(node));
        let next = led.filter_map(|shard| {
            let mut others = shard.voters().map(|voter| voter.node);
            let next = others.find(|other| *other != node && !self.down.contains(other));
            next.map(|next| (shard.id, next))
        });
        for (shard, next) in next.collect::<Vec<_>>() {
            self.elect(shard, Some(next));
        }
    }

    /// Without a majority nobody can replace a voter.
    fn check_quorums(&self, lost: NodeId) -> Result<(), Fault> {
        for shard in self.map.all_shards().filter(|shard| shard.replica_on(lost).is_some()) {
            let live = shard.voters().filter(|voter| !self.down.contains(&voter.node)).count();
            if live <= shard.voters().count() / 2 {
                let message =
                    format!("shard {} has no majority: its voters can't change", shard.id);
                return Err(Fault::new(Reason::NoQuorum, message).with(metadata::SHARD, shard.id));
            }
        }
        Ok(())
    }

    pub(super) fn set_node_weight(
        &mut self,
        request: &v1::SetNodeWeightRequest,
    ) -> Result<v1::Node, Fault> {
        self.check_made()?;
        let asked = request.weight.unwrap_or_default();
        if !(1..=0xffff).contains(&asked.weight) {
            return Err(Fault::invalid("weight", "a weight is between 0.001 and 65.535"));
        }
        let node = NodeId(asked.node);
        self.map.node(node).ok_or_else(|| unknown_node(node.0))?;
        self.change_map(|map| {
            let mut nodes = map.nodes.iter_mut();
            nodes.find(|known| known.id == asked.node).into_iter().for_each(|known| {
                known.weight = asked.weight;
            });
        });
        let node = self.map.node(node).ok_or_else(|| unknown_node(node.0))?;
        Ok(node.to_proto())
    }

    /// Has others hold what a node holds: all of it, or nothing happens.
    fn empty(
        &mut self,
        node: NodeId,
        kind: v1::OperationKind,
    ) -> Result<Option<v1::ClusterOperation>, Fault> {
        let mut after = self.wire_map();
        let mut steps = Vec::new();
        for shard in voters_of(&after, node.0) {
            let Some(to) = target(&after, shard, node.0) else {
                let message = format!(
                    "no node can take n{node}'s voter of shard {shard}, and a fake cluster does not wait for one"
                );
                return Err(Fault::new(Reason::Unsupported, message));
            };
            steps.push(carry_out(&mut after, Step { shard, from: node.0, to }));
        }
        let operation = match steps.is_empty() {
            true => None,
            false => Some(self.carry_out_all(kind, &steps)?),
        };
        self.change_map(|map| {
            for shard in &mut map.shards {
                shard.replicas.retain(|replica| replica.node != node.0);
            }
        });
        Ok(operation.map(|operation| self.note(operation.id, |it| it.node = node.0)))
    }

    pub(super) fn list_operations(&self, id: u64) -> Result<v1::ListOperationsResponse, Fault> {
        self.check_made()?;
        let newest_first = self.ledger.operations.iter().rev();
        let asked = newest_first.filter(|operation| id == 0 || operation.id == id);
        Ok(v1::ListOperationsResponse {
            operations: asked.cloned().collect(),
            balancing: Some(self.balancing()),
        })
    }

    pub(super) fn control_operation(
        &mut self,
        request: &v1::ControlOperationRequest,
    ) -> Result<v1::ClusterOperation, Fault> {
        self.check_made()?;
        let operations = &self.ledger.operations;
        let undone = |id: u64| operations.iter().any(|operation| operation.undoes == id);
        let can_be_undone = |operation: &v1::ClusterOperation| {
            use v1::OperationKind::{Merge, Move, Rebalance, Split};
            matches!(operation.kind(), Move | Rebalance | Split | Merge) && !undone(operation.id)
        };
        if request.id != 0 && !operations.iter().any(|known| known.id == request.id) {
            let message = format!("there is no operation {}", request.id);
            return Err(Fault::invalid("id", message));
        }
        match request.control() {
            v1::OperationControl::Unspecified => {
                Err(Fault::invalid("control", "it is not said what shall become of the operation"))
            }
            v1::OperationControl::Undo => {
                let fits = |known: &&v1::ClusterOperation| match request.id {
                    0 => can_be_undone(known),
                    id => known.id == id && can_be_undone(known),
                };
                let found = operations.iter().rev().find(fits).cloned();
                let none = || Fault::new(Reason::Conflict, "there is nothing to be undone");
                self.undo(&found.ok_or_else(none)?)
            }
            _ => Err(Fault::new(Reason::Conflict, "no operation is under way: all have ended")),
        }
    }

    fn undo(&mut self, operation: &v1::ClusterOperation) -> Result<v1::ClusterOperation, Fault> {
        if let Some(split) = &operation.split {
            let (left, right) = (split.shard, split.child);
            let request = v1::MergeShardsRequest { left, right, validate_only: false };
            let made = self.merge_shards(&request)?.operation.unwrap_or_default();
            return Ok(self.note(made.id, |it| it.undoes = operation.id));
        }
        if let Some(merge) = &operation.merge {
            let (shard, at) = (merge.left, Some(merge.boundary));
            let request = v1::SplitShardRequest { shard, at, ..Default::default() };
            let made = self.split_shard(&request)?.operation.unwrap_or_default();
            return Ok(self.note(made.id, |it| it.undoes = operation.id));
        }
        let back = |step: &v1::OperationMove| Step {
            shard: step.shard,
            from: step.to_node,
            to: step.from_node,
        };
        let steps: Vec<Step> = operation.moves.iter().rev().map(back).collect();
        let made = self.carry_out_all(v1::OperationKind::Undo, &steps)?;
        Ok(self.note(made.id, |it| it.undoes = operation.id))
    }

    pub(super) fn set_balancing(
        &mut self,
        request: &v1::SetBalancingRequest,
    ) -> Result<v1::Balancing, Fault> {
        self.check_made()?;
        if request.automatic == Some(true) {
            let message = "a fake cluster moves nothing by itself";
            return Err(Fault::new(Reason::Unsupported, message));
        }
        if request.moves_at_a_time == Some(0) {
            let message = "with no move at a time nothing ever moves: pause operations instead";
            return Err(Fault::invalid("moves_at_a_time", message));
        }
        let ledger = &mut self.ledger;
        ledger.moves_at_a_time = request.moves_at_a_time.unwrap_or(ledger.moves_at_a_time);
        ledger.down_after_ms = request.down_after_ms.unwrap_or(ledger.down_after_ms);
        ledger.disk_fill_max = request.disk_fill_max.unwrap_or(ledger.disk_fill_max);
        ledger.threshold = request.threshold.unwrap_or(ledger.threshold);
        ledger.split_bytes = request.split_bytes.unwrap_or(ledger.split_bytes);
        ledger.split_load = request.split_load.unwrap_or(ledger.split_load);
        Ok(self.balancing())
    }

    fn balancing(&self) -> v1::Balancing {
        v1::Balancing {
            state: v1::BalancerState::Off.into(),
            reasons: Vec::new(),
            automatic: false,
            moves_at_a_time: self.ledger.moves_at_a_time,
            down_after_ms: self.ledger.down_after_ms,
            disk_fill_max: self.ledger.disk_fill_max,
            threshold: self.ledger.threshold,
            split_bytes: self.ledger.split_bytes,
            split_load: self.ledger.split_load,
        }
    }

    /// Makes all moves, or none when one can't be made, and remembers them.
    fn carry_out_all(
        &mut self,
        kind: v1::OperationKind,
        steps: &[Step],
    ) -> Result<v1::ClusterOperation, Fault> {
        let mut after = self.wire_map();
        let mut moves = Vec::new();
        for step in steps {
            check(&after, *step)?;
            let from_replica = replica_on(&after, step.shard, step.from);
            carry_out(&mut after, *step);
            moves.push(v1::OperationMove {
                shard: step.shard,
                from_replica,
                from_node: step.from,
                to_replica: replica_on(&after, step.shard, step.to),
                to_node: step.to,
                state: v1::OperationState::Done.into(),
                attempts: 1,
                ..Default::default()
            });
        }
        self.change_map(|map| *map = v1::ShardMap { server_time_ms: 0, ..after });
        let count = moves.len() as u32;
        Ok(self.remember(v1::ClusterOperation {
            kind: kind.into(),
            moves,
            moves_done: count,
            moves_all: count,
            ..Default::default()
        }))
    }

    /// Remembers what was done, under a new id.
    pub(super) fn remember(&mut self, operation: v1::ClusterOperation) -> v1::ClusterOperation {
        self.ledger.last_id += 1;
        let now = self.now_ms();
        let operation = v1::ClusterOperation {
            id: self.ledger.last_id,
            state: v1::OperationState::Done.into(),
            began_ms: now,
            ended_ms: now,
            ..operation
        };
        self.ledger.operations.push(operation.clone());
        let oldest = self.ledger.operations.len().saturating_sub(REMEMBERED_MAX);
        self.ledger.operations.drain(..oldest);
        operation
    }

    fn note(
        &mut self,
        id: u64,
        what: impl FnOnce(&mut v1::ClusterOperation),
    ) -> v1::ClusterOperation {
        let mut all = self.ledger.operations.iter_mut();
        let operation = all.find(|known| known.id == id).expect("it was made just now");
        what(operation);
        operation.clone()
    }
}

fn unknown_node(node: u64) -> Fault {
    let message = format!("there is no node n{node}");
    Fault::new(Reason::UnknownNode, message).with(metadata::NODE, node)
}

/// Whether a voter can go that way.
fn check(map: &v1::ShardMap, step: Step) -> Result<(), Fault> {
    let Step { shard, from, to } = step;
    let Some(known) = map.shards.iter().find(|known| known.id == shard) else {
        let message = format!("there is no shard {shard}");
        return Err(Fault::new(Reason::UnknownShard, message).with(metadata::SHARD, shard));
    };
    for node in [from, to] {
        if !map.nodes.iter().any(|known| known.id == node) {
            return Err(unknown_node(node));
        }
    }
    let is_voter = |replica: &v1::Replica| replica.role() == v1::ReplicaRole::Voter;
    if !known.replicas.iter().any(|replica| replica.node == from && is_voter(replica)) {
        let message = format!("n{from} holds no voter of shard {shard}");
        return Err(Fault::new(Reason::Conflict, message));
    }
    if known.replicas.iter().any(|replica| replica.node == to) {
        let message = format!("n{to} holds a replica of shard {shard} already");
        return Err(Fault::new(Reason::Conflict, message));
    }
    if !map.nodes.iter().any(|known| known.id == to && takes(known)) {
        let message = format!("n{to} takes no replicas: it is leaving");
        return Err(Fault::new(Reason::Conflict, message));
    }
    Ok(())
}

/// Moves a voter at once: a new replica id, a new epoch, another leader where the old one went.
fn carry_out(map: &mut v1::ShardMap, step: Step) -> Step {
    let Step { shard, from, to } = step;
    let ids = map.shards.iter().flat_map(|shard| &shard.replicas).map(|replica| replica.id);
    let id = 1 + ids.max().unwrap_or(0);
    map.epoch += 1;
    for known in map.shards.iter_mut().filter(|known| known.id == shard) {
        known.epoch += 1;
        for replica in known.replicas.iter_mut().filter(|replica| replica.node == from) {
            (replica.id, replica.node) = (id, to);
        }
        if known.leader_node == from {
            (known.leader_node, known.leader_term) = (to, known.leader_term + 1);
        }
    }
    step
}

fn replica_on(map: &v1::ShardMap, shard: u64, node: u64) -> u64 {
    let shard = map.shards.iter().find(|known| known.id == shard);
    let mut replicas = shard.into_iter().flat_map(|shard| &shard.replicas);
    replicas.find(|replica| replica.node == node).map_or(0, |replica| replica.id)
}

fn takes(node: &v1::Node) -> bool {
    matches!(node.state(), v1::NodeState::Active | v1::NodeState::Joining)
}

fn is_leaving(node: &&v1::Node) -> bool {
    use v1::NodeState::{Decommissioned, Decommissioning, Gone};
    matches!(node.state(), Decommissioning | Decommissioned | Gone)
}

/// The shards that a node votes on.
fn voters_of(map: &v1::ShardMap, node: u64) -> Vec<u64> {
    let votes = |shard: &&v1::Shard| {
        let mut replicas = shard.replicas.iter();
        replicas.any(|held| held.node == node && held.role() == v1::ReplicaRole::Voter)
    };
    map.shards.iter().filter(votes).map(|shard| shard.id).collect()
}

/// How many voters each node holds that takes any.
fn counts(map: &v1::ShardMap) -> BTreeMap<u64, usize> {
    let taking = map.nodes.iter().filter(|node| takes(node));
    taking.map(|node| (node.id, voters_of(map, node.id).len())).collect()
}

fn holds(map: &v1::ShardMap, shard: u64, node: u64) -> bool {
    replica_on(map, shard, node) != 0
}

/// The node with the fewest voters that can take another one.
fn target(map: &v1::ShardMap, shard: u64, from: u64) -> Option<u64> {
    let counts = counts(map);
    let free = counts.iter().filter(|(node, _)| **node != from && !holds(map, shard, **node));
    free.min_by_key(|(node, count)| (**count, **node)).map(|(node, _)| *node)
}

/// A move from a node to one that has at least two fewer voters.
fn evening(map: &v1::ShardMap) -> Option<Step> {
    let counts = counts(map);
    let mut pairs: Vec<(u64, u64, usize)> = Vec::new();
    for (from, many) in &counts {
        let fewer = counts.iter().filter(|(_, few)| **few + 2 <= *many);
        pairs.extend(fewer.map(|(to, few)| (*from, *to, many - few)));
    }
    pairs.sort_by_key(|(from, to, apart)| (usize::MAX - apart, *from, *to));
    pairs.into_iter().find_map(|(from, to, _)| {
        let shard = voters_of(map, from).into_iter().find(|shard| !holds(map, *shard, to))?;
        Some(Step { shard, from, to })
    })
}

/// A bound: what stands on nodes that leave or above the largest even share has to go. Never more than
/// what is planned, which may be less where no node can take it.
fn moves_min(map: &v1::ShardMap, planned: usize) -> u32 {
    let all: usize = map.nodes.iter().map(|node| voters_of(map, node.id).len()).sum();
    let counts = counts(map);
    let leaving = all - counts.values().sum::<usize>();
    let share = all.div_ceil(counts.len().max(1));
    let above: usize = counts.values().map(|count| count.saturating_sub(share)).sum();
    let floor = all / counts.len().max(1);
    let below: usize = counts.values().map(|count| floor.saturating_sub(*count)).sum();
    (leaving + above).max(below).min(planned) as u32
}

fn planned_node(node: u64, before: &v1::ShardMap, after: &v1::ShardMap) -> v1::PlannedNode {
    let leaders = |map: &v1::ShardMap| {
        map.shards.iter().filter(|shard| shard.leader_node == node).count() as u32
    };
    v1::PlannedNode {
        node,
        replicas_before: voters_of(before, node).len() as u32,
        replicas_after: voters_of(after, node).len() as u32,
        leaders_before: leaders(before),
        leaders_after: leaders(after),
        ..Default::default()
    }
}

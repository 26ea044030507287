//! What the cluster does of its own accord: it empties nodes that leave or are lost, makes voters that
//! lack, and with automatic balancing spreads replicas.
//!
//! Owns what a controller knows beside the records, the planner's view of both, and the rules by which
//! operations begin by themselves. The choice of moves is `placement`'s, what becomes of them
//! `operations`'.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_proto::shard_map::{Epoch, NodeId, ReplicaId, ShardId};
use coracle_proto::v1;
use tokio::time::Instant;
use v1::{NodeState, OperationKind, OperationState};

use super::operations::{self, Work};
use crate::placement::model::{
    Duty, Goal, NodeView, Plan, Seat, Settings, ShardView, View, WEIGHT_ONE,
};
use crate::placement::plan;
use crate::records::operations::has_ended;
use crate::records::{Operations, Snapshot};

/// How long the nodes of a cluster must have been the same, and all heard, before replicas move for
/// balance: nodes join one after the other, and restart.
const SETTLED_AFTER: Duration = Duration::from_secs(10);

/// A node that was not heard for so long is asked for nothing: it takes no replicas, and leads nothing.
pub(super) const SILENT: Duration = Duration::from_secs(5);

/// What a leader of the meta group knows beside the records, and forgets when it leads no more.
#[derive(Debug, Clone, Default)]
pub struct Knowledge {
    /// By node: since when it is silent.
    pub(super) silent: BTreeMap<u64, Instant>,
    /// By shard: what its leader says a copy takes, in bytes.
    pub(super) bytes: BTreeMap<u64, u64>,
    /// By shard: who leads it.
    pub(super) leaders: BTreeMap<u64, u64>,
    /// Where no replica comes for now: nodes, and shards with nodes.
    pub(super) avoided_nodes: BTreeSet<u64>,
    pub(super) avoided_places: BTreeSet<(u64, u64)>,
    /// The nodes, and since when they are the same.
    pub(super) nodes: Option<(Vec<u64>, Instant)>,
}

impl Knowledge {
    fn lost(&self, node: &v1::Node, operations: &Operations, now: Instant) -> bool {
        let down_after = Duration::from_millis(operations.down_after_ms());
        let silent = self.silent.get(&node.id);
        node.state() == NodeState::Gone
            || silent.is_some_and(|since| now.duration_since(*since) >= down_after)
    }

    fn duty(&self, node: &v1::Node, operations: &Operations, now: Instant) -> Duty {
        match node.state() {
            _ if self.lost(node, operations, now) => Duty::Lost,
            NodeState::Decommissioning | NodeState::Decommissioned => Duty::Leaves,
            _ if self.silent.contains_key(&node.id) => Duty::Absent,
            NodeState::Active if self.avoided_nodes.contains(&node.id) => Duty::Keeps,
            state => Duty::of(state),
        }
    }

    /// Nodes that are not heard, though they should be.
    fn missed<'a>(&'a self, map: &'a v1::ShardMap) -> impl Iterator<Item = u64> + 'a {
        let expected = map
            .nodes
            .iter()
            .filter(|node| !matches!(node.state(), NodeState::Gone | NodeState::Decommissioned));
        expected.map(|node| node.id).filter(|node| self.silent.contains_key(node))
    }

    /// The nodes are what they were for a while, all of them are heard, and the size of every shard is
    /// known: else what is known last would look large.
    fn has_settled(&self, map: &v1::ShardMap, now: Instant) -> bool {
        let since = self.nodes.as_ref().map(|(_, since)| *since);
        let sized = |shard: &v1::Shard| shard.forming || self.bytes.contains_key(&shard.id);
        since.is_some_and(|at| now.duration_since(at) >= SETTLED_AFTER)
            && self.missed(map).next().is_none()
            && map.shards.iter().all(sized)
    }
}

/// The records as the planner sees them.
pub(super) fn view(snapshot: &Snapshot, known: &Knowledge, now: Instant) -> View {
    let nodes = snapshot.map.nodes.iter().map(|node| NodeView {
        id: NodeId(node.id),
        zone: node.zone.clone(),
        weight: WEIGHT_ONE,
        duty: known.duty(node, &snapshot.operations, now),
        disk: None,
    });
    let shards = snapshot.map.shards.iter().filter(|shard| !shard.forming).map(|shard| {
        let (voters, others): (Vec<&v1::Replica>, Vec<&v1::Replica>) =
            shard.replicas.iter().partition(|replica| replica.role() == v1::ReplicaRole::Voter);
        let seat =
            |voter: &v1::Replica| Seat { replica: ReplicaId(voter.id), node: NodeId(voter.node) };
        let leader = known.leaders.get(&shard.id).copied();
        ShardView {
            id: ShardId(shard.id),
            voters: voters.iter().copied().filter(|voter| !voter.goes).map(seat).collect(),
            learners: {
                let avoided = known.avoided_places.iter().filter(|(id, _)| *id == shard.id);
                let avoided = avoided.map(|(_, node)| *node);
                others.iter().map(|replica| replica.node).chain(avoided).map(NodeId).collect()
            },
            leader: leader.map(NodeId),
            bytes: known.bytes.get(&shard.id).copied().unwrap_or(0),
            load: 0,
        }
    });
    let (nodes, shards) = (nodes.collect(), shards.collect());
    View { epoch: Epoch(snapshot.map.epoch), nodes, shards }
}

pub(super) fn settings(snapshot: &Snapshot, goal: Goal) -> Settings {
    Settings {
        replicas: match snapshot.map.replicas {
            0 => Settings::default().replicas,
            count => count as usize,
        },
        goal,
        moves_at_a_time: snapshot.operations.moves_at_a_time() as usize,
        ..Settings::default()
    }
}

pub(super) fn planned(snapshot: &Snapshot, known: &Knowledge, goal: Goal, now: Instant) -> Plan {
    plan(&view(snapshot, known, now), &settings(snapshot, goal))
}

pub(super) fn moves_of(plan: &Plan) -> Vec<v1::PlannedMove> {
    let moves = plan.moves().map(|change| v1::PlannedMove {
        shard: change.shard.0,
        from_node: change.from.map_or(0, |seat| seat.node.0),
        to_node: change.to.map_or(0, |node| node.0),
        bytes: change.bytes,
    });
    moves.collect()
}

pub(super) fn transfers_of(plan: &Plan) -> Vec<v1::PlannedTransfer> {
    let transfers = plan.transfers().map(|transfer| v1::PlannedTransfer {
        shard: transfer.shard.0,
        from_node: transfer.from.0,
        to_node: transfer.to.0,
    });
    transfers.collect()
}

/// A plan as people see it.
pub(super) fn told(
    snapshot: &Snapshot,
    view: &View,
    plan: &Plan,
    moves_max: u32,
) -> v1::RebalancePlan {
    let mut nodes: BTreeMap<u64, v1::PlannedNode> = BTreeMap::new();
    for node in &view.nodes {
        nodes.insert(node.id.0, v1::PlannedNode { node: node.id.0, ..Default::default() });
    }
    for shard in &view.shards {
        for voter in &shard.voters {
            let node = nodes.entry(voter.node.0).or_default();
            node.replicas_before += 1;
            node.bytes_before += shard.bytes;
        }
        if let Some(leader) = shard.leader {
            nodes.entry(leader.0).or_default().leaders_before += 1;
        }
        let Some(placed) = plan.wanted.get(&shard.id) else { continue };
        for voter in &placed.voters {
            let node = nodes.entry(voter.0).or_default();
            node.replicas_after += 1;
            node.bytes_after += shard.bytes;
        }
        if let Some(leader) = placed.leader {
            nodes.entry(leader.0).or_default().leaders_after += 1;
        }
    }
    let mut moves = moves_of(plan);
    if moves_max > 0 {
        moves.truncate(moves_max as usize);
    }
    v1::RebalancePlan {
        cluster_id: snapshot.map.cluster_id.clone(),
        epoch: snapshot.map.epoch,
        bytes: moves.iter().map(|step| step.bytes).sum(),
        moves,
        transfers: transfers_of(plan),
        nodes: nodes.into_values().collect(),
        moves_min: plan.lower_bound as u32,
        estimate_ms: u64::try_from(plan.estimate.as_millis()).unwrap_or(u64::MAX),
        stalled: plan.stalls.iter().map(ToString::to_string).collect(),
    }
}

/// What the records shall have by themselves: work of nodes that go, of voters that lack, of balance.
/// True when anything changed.
pub(super) fn act(snapshot: &mut Snapshot, known: &Knowledge, now: Instant, now_ms: u64) -> bool {
    let before = snapshot.operations.clone();
    let leaving: Vec<(u64, OperationKind)> = snapshot
        .map
        .nodes
        .iter()
        .filter_map(|node| match node.state() {
            NodeState::Decommissioning => Some((node.id, OperationKind::Decommission)),
            _ if known.lost(node, &snapshot.operations, now) => {
                Some((node.id, OperationKind::Repair))
            }
            _ => None,
        })
        .collect();
    let holds = |snapshot: &Snapshot, node: u64| {
        let voters = snapshot.map.shards.iter().flat_map(|shard| &shard.replicas);
        let mut voters = voters.filter(|replica| replica.role() == v1::ReplicaRole::Voter);
        voters.any(|voter| voter.node == node)
    };
    for (node, kind) in leaving {
        if kind == OperationKind::Decommission || holds(snapshot, node) {
            work_on_node(snapshot, known, (node, kind), now, now_ms);
        }
    }
    let lacks = |snapshot: &Snapshot| {
        let wanted = settings(snapshot, Goal::Repair).voters();
        let voters = |shard: &v1::Shard| {
            let voters = shard.replicas.iter();
            voters.filter(|voter| voter.role() == v1::ReplicaRole::Voter && !voter.goes).count()
        };
        snapshot.map.shards.iter().any(|shard| !shard.forming && voters(shard) < wanted)
    };
    let filling = |operation: &v1::ClusterOperation| {
        operation.kind() == OperationKind::Repair && operation.node == 0
    };
    if lacks(snapshot) && !snapshot.operations.active().any(filling) {
        let plan = planned(snapshot, known, Goal::Repair, now);
        let moves = moves_of(&plan);
        let moves: Vec<_> = moves
            .into_iter()
            .filter(|step| step.from_node == 0 && !snapshot.operations.is_moving(step.shard))
            .collect();
        begin(snapshot, Work { kind: OperationKind::Repair, moves, ..Work::default() }, now_ms);
    }
    let is_idle = snapshot.operations.active().next().is_none();
    if is_idle && !snapshot.operations.manual && known.has_settled(&snapshot.map, now) {
        let plan = planned(snapshot, known, Goal::Balance, now);
        let (kind, moves) = (OperationKind::Balance, moves_of(&plan));
        let transfers = transfers_of(&plan);
        begin(snapshot, Work { kind, moves, transfers, ..Work::default() }, now_ms);
    }
    before != snapshot.operations
}

/// Begins what moves replicas; leaders alone are moved only with them, or when somebody asks.
fn begin(snapshot: &mut Snapshot, work: Work, now_ms: u64) {
    let kind = work.kind;
    if work.moves.is_empty() {
        return;
    }
    if let Err(why) = operations::begin(snapshot, work, now_ms) {
        tracing::debug!(?kind, why, "nothing begins by itself");
    }
}

/// Sees to it that an operation empties a node, and has something to do.
fn work_on_node(
    snapshot: &mut Snapshot,
    known: &Knowledge,
    (node, kind): (u64, OperationKind),
    now: Instant,
    now_ms: u64,
) {
    let its = |operation: &&v1::ClusterOperation| {
        operation.node == node && operation.kind() == kind && !operation.cancelling
    };
    let active = snapshot.operations.active().find(its).map(|operation| {
        let steps = operation.moves.iter();
        let open = steps.filter(|step| !has_ended(step.state()));
        (operation.id, open.count())
    });
    if active.is_some_and(|(_, open)| open > 0) {
        return;
    }
    let plan = planned(snapshot, known, Goal::Repair, now);
    let moves = moves_of(&plan);
    let its: Vec<_> = moves
        .into_iter()
        .filter(|step| step.from_node == node && !snapshot.operations.is_moving(step.shard))
        .collect();
    let stalled: Vec<String> = plan.stalls.iter().map(ToString::to_string).collect();
    match active {
        Some((id, _)) => {
            let extended = operations::extend(snapshot, id, &its);
            let mut list = snapshot.operations.list.iter_mut();
            if let Some(operation) = list.find(|known| known.id == id).filter(|_| !extended) {
                operation.message = stalled.join("; ");
            }
        }
        None if its.is_empty() && kind == OperationKind::Repair => {}
        None => {
            let work = Work { kind, node, moves: its, ..Work::default() };
            if let Err(why) = operations::begin(snapshot, work, now_ms) {
                tracing::debug!(node, why, "a node is not emptied yet");
            }
        }
    }
}

/// What the balancer does, as people see it.
pub(super) fn balancing(snapshot: &Snapshot, known: &Knowledge, now: Instant) -> v1::Balancing {
    let operations = &snapshot.operations;
    let mut reasons = Vec::new();
    let active: Vec<_> = operations.active().collect();
    let state = if !active.is_empty() {
        let messages = active.iter().map(|operation| &operation.message);
        reasons.extend(messages.filter(|message| !message.is_empty()).cloned());
        let paused = active.iter().any(|known| known.state() == OperationState::Paused);
        if paused {
            reasons.push("an operation is paused".to_owned());
        }
        let moving = active.iter().flat_map(|operation| &operation.moves);
        let moving = moving.into_iter().any(|step| step.state() == OperationState::Running);
        match moving || reasons.is_empty() {
            true => v1::BalancerState::InProgress,
            false => v1::BalancerState::Stalled,
        }
    } else if operations.manual {
        v1::BalancerState::Off
    } else if !known.has_settled(&snapshot.map, now) {
        reasons.extend(known.missed(&snapshot.map).map(|node| format!("n{node} is not heard")));
        v1::BalancerState::Starting
    } else {
        let plan = planned(snapshot, known, Goal::Balance, now);
        reasons.extend(plan.stalls.iter().map(ToString::to_string));
        match reasons.is_empty() {
            true => v1::BalancerState::Ready,
            false => v1::BalancerState::Stalled,
        }
    };
    v1::Balancing {
        state: state.into(),
        reasons,
        automatic: !operations.manual,
        moves_at_a_time: operations.moves_at_a_time(),
        down_after_ms: operations.down_after_ms(),
    }
}

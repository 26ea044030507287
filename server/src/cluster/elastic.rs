//! What operators ask of replicas and nodes, and what the cluster does of its own accord.
//!
//! Owns the answers of the meta group's leader, and the rules by which operations begin by themselves:
//! nodes that are decommissioned or lost are emptied, lacking voters made, and with automatic balancing
//! replicas spread. The choice of moves is `placement`'s, what becomes of them `operations`'.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::Reason;
use coracle_proto::shard_map::{Epoch, NodeId, ReplicaId, ShardId};
use coracle_proto::{peer, v1};
use peer::cluster_command::Kind;
use peer::elastic::Kind as Asked;
use prost::Message;
use tokio::time::Instant;
use v1::{NodeState, OperationControl, OperationKind, OperationState};

use super::operations::{self, Work};
use super::{Cluster, done, refused};
use crate::placement::model::{
    Duty, Goal, NodeView, Plan, Seat, Settings, ShardView, Stall, View, WEIGHT_ONE,
};
use crate::placement::plan;
use crate::records::operations::is_active;
use crate::records::{Operations, RecordsError, Snapshot};

/// How long the nodes of a cluster must have been the same, and all heard, before replicas move for
/// balance: nodes join one after the other, and restart.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// A node that was not heard for so long takes no replicas, and leads nothing.
const SILENT: Duration = Duration::from_secs(5);

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
fn view(snapshot: &Snapshot, known: &Knowledge, now: Instant) -> View {
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

fn settings(snapshot: &Snapshot, goal: Goal) -> Settings {
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

fn planned(snapshot: &Snapshot, known: &Knowledge, goal: Goal, now: Instant) -> Plan {
    plan(&view(snapshot, known, now), &settings(snapshot, goal))
}

fn moves_of(plan: &Plan) -> Vec<v1::PlannedMove> {
    let moves = plan.moves().map(|change| v1::PlannedMove {
        shard: change.shard.0,
        from_node: change.from.map_or(0, |seat| seat.node.0),
        to_node: change.to.map_or(0, |node| node.0),
        bytes: change.bytes,
    });
    moves.collect()
}

fn transfers_of(plan: &Plan) -> Vec<v1::PlannedTransfer> {
    let transfers = plan.transfers().map(|transfer| v1::PlannedTransfer {
        shard: transfer.shard.0,
        from_node: transfer.from.0,
        to_node: transfer.to.0,
    });
    transfers.collect()
}

/// A plan as people see it.
fn told(snapshot: &Snapshot, view: &View, plan: &Plan, moves_max: u32) -> v1::RebalancePlan {
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
        let open = steps.filter(|step| !crate::records::operations::has_ended(step.state()));
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
fn balancing(snapshot: &Snapshot, known: &Knowledge, now: Instant) -> v1::Balancing {
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

/// Why a request is refused; the reason is of the closed list.
type Refusal = (Reason, String);

fn conflict(why: impl Into<String>) -> Refusal {
    (Reason::Conflict, why.into())
}

impl Cluster {
    /// Has the meta group's leader answer an operator, from any node.
    pub async fn elastic(
        &self,
        asked: Asked,
        deadline: Instant,
    ) -> Result<Bytes, peer::CommandDone> {
        self.by_meta_leader(Kind::Elastic(peer::Elastic { kind: Some(asked) }), deadline).await
    }

    pub(super) async fn answer_elastic(&self, asked: peer::Elastic) -> peer::CommandDone {
        let Some(kind) = asked.kind else {
            return refused("a question of no kind".to_owned());
        };
        let answered = match kind {
            Asked::Plan(bytes) => self.plan_here(bytes).await,
            Asked::Operations(bytes) => self.operations_here(bytes).await,
            Asked::Start(bytes) => self.start_here(bytes).await,
            Asked::Move(bytes) => self.move_here(bytes).await,
            Asked::NodeState(bytes) => self.node_state_here(bytes).await,
            Asked::Control(bytes) => self.control_here(bytes).await,
            Asked::Balancing(bytes) => self.balancing_here(bytes).await,
        };
        match answered {
            Ok(body) => peer::CommandDone { body, ..Default::default() },
            Err(failed) => failed,
        }
    }

    async fn plan_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::PlanRebalanceRequest = decode(bytes)?;
        let snapshot = self.records.load().await.map_err(|error| done(Err(error), self))?;
        let (known, now) = (self.knowledge.lock().clone(), Instant::now());
        let view = view(&snapshot, &known, now);
        let plan = plan(&view, &settings(&snapshot, Goal::Balance));
        let plan = Some(told(&snapshot, &view, &plan, request.moves_max));
        encode(&v1::PlanRebalanceResponse { plan })
    }

    async fn operations_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::ListOperationsRequest = decode(bytes)?;
        let snapshot = self.records.load().await.map_err(|error| done(Err(error), self))?;
        let wanted =
            |operation: &&v1::ClusterOperation| request.id == 0 || operation.id == request.id;
        let operations = snapshot.operations.list.iter().rev().filter(wanted).cloned().collect();
        let known = self.knowledge.lock().clone();
        let balancing = balancing(&snapshot, &known, Instant::now());
        encode(&v1::ListOperationsResponse { operations, balancing: Some(balancing) })
    }

    async fn start_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::StartRebalanceRequest = decode(bytes)?;
        let plan = request.plan.ok_or_else(|| refused_for(Reason::InvalidArgument, "no plan"))?;
        let now_ms = self.records.now_ms();
        let begun = self.change_elastic(|snapshot| {
            let map = &snapshot.map;
            if plan.cluster_id != map.cluster_id {
                return Err(conflict("the plan is of another cluster"));
            }
            if plan.epoch != map.epoch {
                return Err(conflict(format!(
                    "the plan is for the map of epoch {}, and it is at {} by now: plan again",
                    plan.epoch, map.epoch
                )));
            }
            let work = Work {
                kind: OperationKind::Rebalance,
                moves: plan.moves.clone(),
                transfers: plan.transfers.clone(),
                ..Work::default()
            };
            operations::begin(snapshot, work, now_ms).map_err(conflict)
        });
        let operation = Some(begun.await?);
        encode(&v1::StartRebalanceResponse { operation })
    }

    async fn move_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::MoveReplicaRequest = decode(bytes)?;
        let now_ms = self.records.now_ms();
        let copies = self.knowledge.lock().bytes.get(&request.shard).copied().unwrap_or(0);
        let begun = self.change_elastic(|snapshot| {
            let shard = snapshot.map.shards.iter().find(|shard| shard.id == request.shard);
            let Some(shard) = shard else {
                return Err((
                    Reason::UnknownShard,
                    format!("there is no shard s{}", request.shard),
                ));
            };
            let node = snapshot.map.nodes.iter().find(|node| node.id == request.to_node);
            match node.map(v1::Node::state) {
                None => {
                    return Err((Reason::UnknownNode, format!("there is no n{}", request.to_node)));
                }
                Some(NodeState::Active) => {}
                Some(_) => return Err(conflict(format!("n{} takes no replicas", request.to_node))),
            }
            if shard.replicas.iter().any(|replica| replica.node == request.to_node) {
                return Err(conflict(format!(
                    "n{} holds a replica of s{} already",
                    request.to_node, request.shard
                )));
            }
            let moves = vec![v1::PlannedMove {
                shard: request.shard,
                from_node: request.from_node,
                to_node: request.to_node,
                bytes: copies,
            }];
            let work = Work { kind: OperationKind::Move, moves, ..Work::default() };
            operations::begin(snapshot, work, now_ms).map_err(conflict)
        });
        let operation = Some(begun.await?);
        encode(&v1::MoveReplicaResponse { operation })
    }

    async fn node_state_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::SetNodeStateRequest = decode(bytes)?;
        let (now, now_ms) = (Instant::now(), self.records.now_ms());
        let known = self.knowledge.lock().clone();
        let silence = self.commands.silence(NodeId(request.node));
        let is_heard = silence.is_some_and(|silence| silence < SILENT);
        let mut node = v1::Node::default();
        let mut begun = None;
        let changed = self.records.change_all(|snapshot| {
            let refusal = set_node_state(snapshot, &request, is_heard).err();
            if let Some(refusal) = refusal {
                return Err(packed(refusal));
            }
            if request.state() == NodeState::Decommissioning {
                let plan = planned(snapshot, &known, Goal::Repair, now);
                let stays = |stall: &&Stall| {
                    matches!(stall, Stall::NotEmptied { node, .. } if node.0 == request.node)
                };
                if plan.stalls.iter().any(|stall| stays(&stall)) {
                    let why: Vec<String> = plan.stalls.iter().map(ToString::to_string).collect();
                    return Err(packed(conflict(format!(
                        "n{} can't be emptied: {}",
                        request.node,
                        why.join("; ")
                    ))));
                }
            }
            act(snapshot, &known, now, now_ms);
            node = find_node(snapshot, request.node).cloned().unwrap_or_default();
            begun = snapshot.operations.active().find(|known| known.node == request.node).cloned();
            Ok(true)
        });
        let snapshot = changed.await.map_err(|error| self.unpacked(error))?;
        self.publish(&snapshot.map).await;
        encode(&v1::SetNodeStateResponse { node: Some(node), operation: begun })
    }

    async fn control_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::ControlOperationRequest = decode(bytes)?;
        let now_ms = self.records.now_ms();
        let changed = self.change_elastic(|snapshot| control(snapshot, &request, now_ms));
        let operation = Some(changed.await?);
        encode(&v1::ControlOperationResponse { operation })
    }

    async fn balancing_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::SetBalancingRequest = decode(bytes)?;
        if request.moves_at_a_time == Some(0) || request.down_after_ms.is_some_and(|ms| ms < 10_000)
        {
            let why = "at least one move at a time, and 10 s before a node counts as lost";
            return Err(refused_for(Reason::InvalidArgument, why));
        }
        let changed = self.records.change_all(|snapshot| {
            let operations = &mut snapshot.operations;
            operations.manual = request.automatic.map_or(operations.manual, |on| !on);
            operations.moves_at_a_time =
                request.moves_at_a_time.unwrap_or(operations.moves_at_a_time);
            operations.down_after_ms = request.down_after_ms.unwrap_or(operations.down_after_ms);
            Ok(true)
        });
        let snapshot = changed.await.map_err(|error| self.unpacked(error))?;
        let known = self.knowledge.lock().clone();
        let balancing = Some(balancing(&snapshot, &known, Instant::now()));
        encode(&v1::SetBalancingResponse { balancing })
    }

    /// Changes the records; returns the operation that the change names.
    async fn change_elastic(
        &self,
        mut change: impl FnMut(&mut Snapshot) -> Result<u64, Refusal> + Send,
    ) -> Result<v1::ClusterOperation, peer::CommandDone> {
        let mut id = 0;
        let changed = self.records.change_all(|snapshot| {
            id = change(snapshot).map_err(packed)?;
            Ok(true)
        });
        let snapshot = changed.await.map_err(|error| self.unpacked(error))?;
        self.publish(&snapshot.map).await;
        let operation = snapshot.operations.find(id).cloned();
        operation.ok_or_else(|| refused_for(Reason::Internal, "the operation is not recorded"))
    }

    fn unpacked(&self, error: RecordsError) -> peer::CommandDone {
        if let RecordsError::Refused(packed) = &error
            && let Some((reason, why)) = packed.split_once('\n')
        {
            let (reason, error) = (reason.to_owned(), why.to_owned());
            return peer::CommandDone { error, reason, ..Default::default() };
        }
        done(Err(error), self)
    }
}

/// A refusal as it goes through the records, which know texts only.
fn packed((reason, why): Refusal) -> String {
    format!("{}\n{why}", reason.as_str())
}

fn refused_for(reason: Reason, why: &str) -> peer::CommandDone {
    let (reason, error) = (reason.as_str().to_owned(), why.to_owned());
    peer::CommandDone { error, reason, ..Default::default() }
}

fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, peer::CommandDone> {
    M::decode(bytes)
        .map_err(|error| refused_for(Reason::InvalidArgument, &format!("not a request: {error}")))
}

fn encode(message: &impl Message) -> Result<Bytes, peer::CommandDone> {
    Ok(message.encode_to_vec().into())
}

fn find_node(snapshot: &Snapshot, id: u64) -> Option<&v1::Node> {
    snapshot.map.nodes.iter().find(|node| node.id == id)
}

/// Enters a node's new state, where it may follow on the old one.
fn set_node_state(
    snapshot: &mut Snapshot,
    request: &v1::SetNodeStateRequest,
    is_heard: bool,
) -> Result<(), Refusal> {
    use NodeState::{Active, Decommissioned, Decommissioning, Draining, Gone};
    let id = request.node;
    let Some(node) = snapshot.map.nodes.iter_mut().find(|node| node.id == id) else {
        return Err((Reason::UnknownNode, format!("there is no n{id}")));
    };
    match (node.state(), request.state()) {
        (Gone, wanted) if wanted != Gone => {
            return Err(conflict(format!("n{id} is gone for good: start it anew, empty")));
        }
        (_, Active | Draining | Decommissioning) => {}
        (Decommissioned, Gone) => {}
        (_, Gone) if is_heard => {
            return Err(conflict(format!("n{id} answers: decommission it instead")));
        }
        (_, Gone) => {}
        (_, other) => {
            let why = format!("a node can't be made {}", other.as_str_name());
            return Err((Reason::InvalidArgument, why));
        }
    }
    let is_emptied = node.state() == Decommissioned && request.state() == Decommissioning;
    if !is_emptied {
        node.state = request.state;
    }
    if matches!(request.state(), Active | Draining) {
        let its = snapshot.operations.list.iter_mut().filter(|operation| {
            is_active(operation)
                && operation.node == id
                && operation.kind() == OperationKind::Decommission
        });
        its.for_each(|operation| operation.cancelling = true);
    }
    Ok(())
}

fn control(
    snapshot: &mut Snapshot,
    request: &v1::ControlOperationRequest,
    now_ms: u64,
) -> Result<u64, Refusal> {
    let undo = request.control() == OperationControl::Undo;
    let list = &snapshot.operations.list;
    let fits = |operation: &&v1::ClusterOperation| match request.id {
        0 => is_active(operation) != undo,
        id => operation.id == id,
    };
    let found = match undo {
        true => list.iter().rev().find(fits),
        false => list.iter().find(fits),
    };
    let Some(found) = found.cloned() else {
        return Err(conflict(match request.id {
            0 => "no operation that this could be done to".to_owned(),
            id => format!("there is no operation {id}, or it is forgotten"),
        }));
    };
    let ended = || conflict(format!("operation {} has ended", found.id));
    let state = match request.control() {
        OperationControl::Undo => {
            if is_active(&found) {
                let why = format!("operation {} is under way: cancel it first", found.id);
                return Err(conflict(why));
            }
            let work = operations::reversed(&found);
            if work.moves.is_empty() {
                let why = format!("operation {} moved nothing, or is too old", found.id);
                return Err(conflict(why));
            }
            // Else the balancer would do it all again.
            snapshot.operations.manual = true;
            return operations::begin(snapshot, work, now_ms).map_err(conflict);
        }
        _ if !is_active(&found) => return Err(ended()),
        OperationControl::Pause => OperationState::Paused,
        OperationControl::Resume | OperationControl::Cancel => OperationState::Running,
        OperationControl::Unspecified => {
            return Err((Reason::InvalidArgument, "what shall become of it?".to_owned()));
        }
    };
    if found.kind() == OperationKind::Decommission && request.control() == OperationControl::Cancel
    {
        // Else it would begin again; and below.
        let nodes = snapshot
            .map
            .nodes
            .iter_mut()
            .filter(|node| node.id == found.node && node.state() == NodeState::Decommissioning);
        nodes.for_each(|node| node.state = NodeState::Active.into());
    }
    if found.kind() == OperationKind::Balance && request.control() == OperationControl::Cancel {
        snapshot.operations.manual = true;
    }
    let list = &mut snapshot.operations.list;
    let operation = list.iter_mut().find(|operation| operation.id == found.id);
    let operation = operation.ok_or_else(ended)?;
    operation.state = state.into();
    operation.cancelling |= request.control() == OperationControl::Cancel;
    Ok(found.id)
}

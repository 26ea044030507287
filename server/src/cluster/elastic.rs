//! What operators ask of replicas and nodes, as the meta group's leader answers it.
//!
//! Owns the way of a question to that leader, which requests make sense, and their answers. What then
//! happens is recorded as an operation (`operations`); what happens without anybody asking is
//! `balance`'s.

use bytes::Bytes;
use coracle_proto::reason::Reason;
use coracle_proto::shard_map::NodeId;
use coracle_proto::{peer, v1};
use peer::cluster_command::Kind;
use peer::elastic::Kind as Asked;
use prost::Message;
use tokio::time::Instant;
use v1::{NodeState, OperationControl, OperationKind, OperationState};

use super::balance::{self, act, balancing, plan_within, planned, settings, told, view};
use super::knowledge::SILENT;
use super::operations::{self, Work};
use super::points::Point;
use super::{Cluster, done, refused, reshape};
use crate::placement::cut;
use crate::placement::model::{Goal, Stall};
use crate::records::operations::is_active;
use crate::records::{RecordsError, Snapshot};

/// Why a request is refused; the reason is of the closed list.
pub(super) type Refusal = (Reason, String);

pub(super) fn conflict(why: impl Into<String>) -> Refusal {
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
            Asked::NodeWeight(bytes) => self.node_weight_here(bytes).await,
            Asked::Split(bytes) => self.split_here(decode(bytes)).await,
            Asked::Merge(bytes) => self.merge_here(decode(bytes)).await,
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
        let mut view = view(&snapshot, &known, now, false);
        for asked in &request.weights {
            check_weight(asked)?;
            let node = view.nodes.iter_mut().find(|node| node.id.0 == asked.node);
            let node = node.ok_or_else(|| unknown_node(asked.node))?;
            node.weight = balance::weight(asked.weight);
        }
        let threshold = request.threshold.unwrap_or(snapshot.operations.threshold);
        let settings = settings(&snapshot, &known, Goal::Balance);
        let mut plan = plan_within(&view, &settings, u64::from(threshold));
        if request.moves_max > 0 {
            plan = cut(&view, &plan, &settings, request.moves_max as usize);
        }
        let plan = Some(told(&snapshot, &view, &plan));
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
        if request.split_bytes == Some(0) || request.split_load == Some(0) {
            let why = "what is split by itself has some size, and something to do";
            return Err(refused_for(Reason::InvalidArgument, why));
        }
        if request.disk_fill_max.is_some_and(|fill| !(1..=1_000).contains(&fill)) {
            let why = "a disk may get full up to something between 0 and 100 %";
            return Err(refused_for(Reason::InvalidArgument, why));
        }
        let changed = self.records.change_all(|snapshot| {
            let operations = &mut snapshot.operations;
            operations.manual = request.automatic.map_or(operations.manual, |on| !on);
            operations.moves_at_a_time =
                request.moves_at_a_time.unwrap_or(operations.moves_at_a_time);
            operations.down_after_ms = request.down_after_ms.unwrap_or(operations.down_after_ms);
            operations.disk_fill_max = request.disk_fill_max.unwrap_or(operations.disk_fill_max);
            operations.threshold = request.threshold.unwrap_or(operations.threshold);
            operations.split_bytes = request.split_bytes.unwrap_or(operations.split_bytes);
            operations.split_load = request.split_load.unwrap_or(operations.split_load);
            Ok(true)
        });
        let snapshot = changed.await.map_err(|error| self.unpacked(error))?;
        let known = self.knowledge.lock().clone();
        let balancing = Some(balancing(&snapshot, &known, Instant::now()));
        encode(&v1::SetBalancingResponse { balancing })
    }

    async fn node_weight_here(&self, bytes: Bytes) -> Result<Bytes, peer::CommandDone> {
        let request: v1::SetNodeWeightRequest = decode(bytes)?;
        let asked = request.weight.unwrap_or_default();
        check_weight(&asked)?;
        let changed = self.records.change_all(|snapshot| {
            let node = snapshot.map.nodes.iter_mut().find(|node| node.id == asked.node);
            let node = node.ok_or_else(|| {
                packed((Reason::UnknownNode, format!("there is no n{}", asked.node)))
            })?;
            Ok(std::mem::replace(&mut node.weight, asked.weight) != asked.weight)
        });
        let snapshot = changed.await.map_err(|error| self.unpacked(error))?;
        self.publish(&snapshot.map).await;
        let node = find_node(&snapshot, asked.node).cloned();
        encode(&v1::SetNodeWeightResponse { node })
    }

    /// Changes the records; returns the operation that the change names.
    pub(super) async fn change_elastic(
        &self,
        mut change: impl FnMut(&mut Snapshot) -> Result<u64, Refusal> + Send,
    ) -> Result<v1::ClusterOperation, peer::CommandDone> {
        let mut id = 0;
        let changed = self.records.change_all(|snapshot| {
            id = change(snapshot).map_err(packed)?;
            Ok(true)
        });
        let snapshot = changed.await.map_err(|error| self.unpacked(error))?;
        self.holding.at(Point::OperationRecorded, 0, 0).await;
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

pub(super) fn refused_for(reason: Reason, why: &str) -> peer::CommandDone {
    let (reason, error) = (reason.as_str().to_owned(), why.to_owned());
    peer::CommandDone { error, reason, ..Default::default() }
}

fn unknown_node(id: u64) -> peer::CommandDone {
    refused_for(Reason::UnknownNode, &format!("there is no n{id}"))
}

/// Shares of two nodes are compared without rounding: weights have 16 bits.
fn check_weight(asked: &v1::NodeWeight) -> Result<(), peer::CommandDone> {
    match asked.weight {
        1..=0xffff => Ok(()),
        _ => Err(refused_for(Reason::InvalidArgument, "a weight is between 0.001 and 65.535")),
    }
}

fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, peer::CommandDone> {
    M::decode(bytes)
        .map_err(|error| refused_for(Reason::InvalidArgument, &format!("not a request: {error}")))
}

pub(super) fn encode(message: &impl Message) -> Result<Bytes, peer::CommandDone> {
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

pub(super) fn control(
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
            if found.split.is_some() || found.merge.is_some() {
                snapshot.operations.manual = true;
                return reshape::begin_undo(snapshot, &found, now_ms).map_err(conflict);
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
    if request.control() == OperationControl::Cancel && reshape::is_decided(&found) {
        let why = format!("operation {} is past the point where it could be taken back", found.id);
        return Err(conflict(why));
    }
    let list = &mut snapshot.operations.list;
    let operation = list.iter_mut().find(|operation| operation.id == found.id);
    let operation = operation.ok_or_else(ended)?;
    operation.state = state.into();
    operation.cancelling |= request.control() == OperationControl::Cancel;
    Ok(found.id)
}

#[cfg(test)]
mod tests;

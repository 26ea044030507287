//! Owns what operators ask of the cluster's own work: states of nodes, operations and what shall become
//! of them, and how balancing is set. The work goes on by itself, whoever leads the meta group: these
//! calls begin it and look at it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use coracle_proto::v1;

use super::Admin;
use super::plan::{self, Plan, PlannedTransfer};
use super::reshape::{ShardMerge, ShardSplit};
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::topology::{Node, NodeId, NodeState, ReplicaId, ShardId};

/// An operation. Never reused.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct OperationId(pub u64);

impl fmt::Display for OperationId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, out)
    }
}

/// Why an operation was begun.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum OperationKind {
    /// Not said, or by a newer version.
    #[default]
    Unknown,
    /// A plan that somebody applied.
    Rebalance,
    /// One replica that somebody moves.
    Move,
    /// A node that shall hold nothing any more.
    Decommission,
    /// Replicas of a node that is lost, and such as were lacking.
    Repair,
    /// A plan that the balancer made by itself.
    Balance,
    /// Back to where another operation began.
    Undo,
    /// One shard becomes two.
    Split,
    /// Two neighbours become one.
    Merge,
}

/// How far an operation, or a move of it, is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum OperationState {
    /// Not said, or by a newer version.
    #[default]
    Unknown,
    /// Not begun yet.
    Pending,
    /// Under way.
    Running,
    /// What was begun is finished, nothing else is begun.
    Paused,
    /// All of it was done.
    Done,
    /// It was given up: what was done stands, what was half done was taken back.
    Cancelled,
    /// It can't be done.
    Failed,
}

/// Work on the cluster that goes on by itself.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ClusterOperation {
    /// Never reused.
    pub id: OperationId,
    /// Why it was begun.
    pub kind: OperationKind,
    /// How far it is.
    pub state: OperationState,
    /// It was cancelled: what is half done is being taken back.
    pub cancelling: bool,
    /// In the order in which they are begun. Those of old operations are forgotten.
    pub moves: Vec<OperationMove>,
    /// Leaderships that move when the replicas have.
    pub transfers: Vec<PlannedTransfer>,
    /// Of all its moves, so many are done.
    pub moves_done: usize,
    /// All its moves.
    pub moves_all: usize,
    /// Wall clock of the node that recorded it, in milliseconds.
    pub began_ms: u64,
    /// The same; `None` as long as it has not ended.
    pub ended_ms: Option<u64>,
    /// The node that is decommissioned, or lost.
    pub node: Option<NodeId>,
    /// Why it does not go on, or how it ended.
    pub message: String,
    /// The operation that this one takes back.
    pub undoes: Option<OperationId>,
    /// Of a split.
    pub split: Option<ShardSplit>,
    /// Of a merge.
    pub merge: Option<ShardMerge>,
}

/// One move of an operation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OperationMove {
    /// The shard.
    pub shard: ShardId,
    /// The voter that goes.
    pub from: Option<NodeId>,
    /// Its replica.
    pub from_replica: Option<ReplicaId>,
    /// The node of the voter that comes.
    pub to: Option<NodeId>,
    /// Its replica; `None` as long as it has no id.
    pub to_replica: Option<ReplicaId>,
    /// About how many bytes are copied.
    pub bytes: u64,
    /// How far it is.
    pub state: OperationState,
    /// Why it does not go on, or failed.
    pub message: String,
    /// How often it was begun.
    pub attempts: u32,
}

/// What shall become of an operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Control {
    /// Nothing more is begun.
    Pause,
    /// It goes on.
    Resume,
    /// It ends: what is half done is taken back.
    Cancel,
    /// Another operation begins that moves everything back.
    Undo,
}

/// What the balancer does.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Balancer {
    /// Not said, or by a newer version.
    #[default]
    Unknown,
    /// Turned off.
    Off,
    /// Nothing is to be done.
    Ready,
    /// It waits for the cluster to settle before it begins.
    Starting,
    /// Replicas move.
    InProgress,
    /// Something is to be done, and can't be.
    Stalled,
}

/// How balancing is set, and what it does.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Balancing {
    /// What it does.
    pub state: Balancer,
    /// Why it is stalled.
    pub reasons: Vec<String>,
    /// It moves replicas by itself. Replicas of lost nodes are replaced in any case.
    pub automatic: bool,
    /// Moves under way at a time, over the whole cluster.
    pub moves_at_a_time: u32,
    /// How long a node may be silent before its replicas are made elsewhere.
    pub down_after: Duration,
    /// How full a disk may get by moves, in thousandths of it.
    pub disk_fill_max: u32,
    /// As long as no node has more than its share by so many thousandths of it, nothing moves for
    /// balance.
    pub threshold: u32,
    /// A shard of so many bytes is split by itself, where balancing is automatic.
    pub split_bytes: u64,
    /// So is one of which so many keys a second are read and written for long, far more than of others.
    pub split_load: u64,
}

/// A change of how balancing is set: what is `None` stays.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BalancingChange {
    /// See [`Balancing::automatic`].
    pub automatic: Option<bool>,
    /// See [`Balancing::moves_at_a_time`].
    pub moves_at_a_time: Option<u32>,
    /// See [`Balancing::down_after`].
    pub down_after: Option<Duration>,
    /// See [`Balancing::disk_fill_max`].
    pub disk_fill_max: Option<u32>,
    /// See [`Balancing::threshold`].
    pub threshold: Option<u32>,
    /// See [`Balancing::split_bytes`].
    pub split_bytes: Option<u64>,
    /// See [`Balancing::split_load`].
    pub split_load: Option<u64>,
}

/// What the cluster works on.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Operations {
    /// Those under way, and the last ones that ended, newest first.
    pub operations: Vec<ClusterOperation>,
    /// How balancing is set, and what it does.
    pub balancing: Balancing,
}

impl Admin {
    /// Begins to carry out a plan. Returns when the operation is recorded: it goes on by itself.
    pub async fn start_rebalance(&self, plan: &Plan) -> Result<ClusterOperation, Error> {
        let begun = self.any(self.timeout(), true, |node: Arc<Pipeline>| {
            let request = v1::StartRebalanceRequest { plan: Some(plan.to_wire()) };
            async move { node.connection().admin().start_rebalance(request).await }
        });
        Ok(ClusterOperation::from_wire(begun.await?.operation.unwrap_or_default()))
    }

    /// Begins to move one voter of a shard to another node.
    pub async fn move_replica(
        &self,
        shard: ShardId,
        from: NodeId,
        to: NodeId,
    ) -> Result<ClusterOperation, Error> {
        let request = v1::MoveReplicaRequest { shard: shard.0, from_node: from.0, to_node: to.0 };
        let begun = self.any(self.timeout(), true, |node: Arc<Pipeline>| async move {
            node.connection().admin().move_replica(request).await
        });
        Ok(ClusterOperation::from_wire(begun.await?.operation.unwrap_or_default()))
    }

    /// Operations under way, then the last ones that ended; and the balancer.
    pub async fn operations(&self) -> Result<Operations, Error> {
        self.list_operations(0).await
    }

    /// One operation; `None` when there was none of this id, or it is forgotten.
    pub async fn operation(&self, id: OperationId) -> Result<Option<ClusterOperation>, Error> {
        let list = self.list_operations(id.0).await?;
        Ok(list.operations.into_iter().find(|operation| operation.id == id))
    }

    async fn list_operations(&self, id: u64) -> Result<Operations, Error> {
        let request = v1::ListOperationsRequest { id };
        let list = self.any(self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().admin().list_operations(request).await
        });
        let list = list.await?;
        Ok(Operations {
            operations: list.operations.into_iter().map(ClusterOperation::from_wire).collect(),
            balancing: Balancing::from_wire(list.balancing.unwrap_or_default()),
        })
    }

    /// Pauses, resumes, cancels or undoes an operation; `None`: the only one that this makes sense
    /// for. Returns it as it is now; of [`Control::Undo`] the new one.
    pub async fn control(
        &self,
        id: Option<OperationId>,
        control: Control,
    ) -> Result<ClusterOperation, Error> {
        let control = match control {
            Control::Pause => v1::OperationControl::Pause,
            Control::Resume => v1::OperationControl::Resume,
            Control::Cancel => v1::OperationControl::Cancel,
            Control::Undo => v1::OperationControl::Undo,
        };
        let id = id.map_or(0, |id| id.0);
        let request = v1::ControlOperationRequest { id, control: control.into() };
        let done = self.any(self.timeout(), true, |node: Arc<Pipeline>| async move {
            node.connection().admin().control_operation(request).await
        });
        Ok(ClusterOperation::from_wire(done.await?.operation.unwrap_or_default()))
    }

    /// Turns automatic balancing on or off, and sets its limits. Returns how it is set now.
    pub async fn set_balancing(&self, change: BalancingChange) -> Result<Balancing, Error> {
        let down_after = change.down_after.map(|after| after.as_millis());
        let request = v1::SetBalancingRequest {
            automatic: change.automatic,
            moves_at_a_time: change.moves_at_a_time,
            down_after_ms: down_after.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX)),
            disk_fill_max: change.disk_fill_max,
            threshold: change.threshold,
            split_bytes: change.split_bytes,
            split_load: change.split_load,
        };
        let set = self.any(self.timeout(), true, |node: Arc<Pipeline>| async move {
            node.connection().admin().set_balancing(request).await
        });
        Ok(Balancing::from_wire(set.await?.balancing.unwrap_or_default()))
    }

    /// Gives a node another state: active, draining, decommissioning, or gone. Returns it as it is
    /// recorded now, and what was begun, where something is to move.
    pub async fn set_node_state(
        &self,
        node: NodeId,
        state: NodeState,
    ) -> Result<(Node, Option<ClusterOperation>), Error> {
        let request = v1::SetNodeStateRequest { node: node.0, state: state.to_wire().into() };
        // Asked again it is the same state; but only the first time it is told what was begun, which
        // matters to whoever waits for it.
        let once = state == NodeState::Decommissioning;
        let set = self.any(self.timeout(), once, |node: Arc<Pipeline>| async move {
            node.connection().admin().set_node_state(request).await
        });
        let v1::SetNodeStateResponse { node, operation } = set.await?;
        let operation = operation.map(ClusterOperation::from_wire);
        Ok((Node::from_wire(node.unwrap_or_default()), operation))
    }

    /// Gives a node more or fewer replicas than others, in thousandths of an ordinary node's share; at
    /// most 65,535. Returns it as it is recorded now.
    pub async fn set_node_weight(&self, node: NodeId, weight: u32) -> Result<Node, Error> {
        let weight = Some(v1::NodeWeight { node: node.0, weight });
        let set = self.any(self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().admin().set_node_weight(v1::SetNodeWeightRequest { weight }).await
        });
        Ok(Node::from_wire(set.await?.node.unwrap_or_default()))
    }

    /// Has a node give its leaderships away, and get no new ones.
    pub async fn drain(&self, node: NodeId) -> Result<Node, Error> {
        self.set_node_state(node, NodeState::Draining).await.map(|(node, _)| node)
    }

    /// Ends [`Admin::drain`] and [`Admin::decommission`]: the node serves as before.
    pub async fn undrain(&self, node: NodeId) -> Result<Node, Error> {
        self.set_node_state(node, NodeState::Active).await.map(|(node, _)| node)
    }

    /// Has a node give away everything that it holds. It is safe to stop when its state is
    /// [`NodeState::Decommissioned`].
    pub async fn decommission(
        &self,
        node: NodeId,
    ) -> Result<(Node, Option<ClusterOperation>), Error> {
        self.set_node_state(node, NodeState::Decommissioning).await
    }

    /// Says that a node that is down will never come back: its replicas are made elsewhere now. What
    /// only it held is lost, and it is never let in again.
    pub async fn mark_gone(&self, node: NodeId) -> Result<(Node, Option<ClusterOperation>), Error> {
        self.set_node_state(node, NodeState::Gone).await
    }
}

impl ClusterOperation {
    /// Nothing of it goes on any more.
    pub fn has_ended(&self) -> bool {
        use OperationState::{Cancelled, Done, Failed};
        matches!(self.state, Done | Cancelled | Failed)
    }

    /// Bytes of the moves that are done, and of all; as far as they are remembered.
    pub fn bytes(&self) -> (u64, u64) {
        let done = self.moves.iter().filter(|step| step.state == OperationState::Done);
        let sum = |bytes: u64, step: &OperationMove| bytes.saturating_add(step.bytes);
        (done.fold(0, sum), self.moves.iter().fold(0, sum))
    }

    pub(super) fn from_wire(operation: v1::ClusterOperation) -> ClusterOperation {
        ClusterOperation {
            kind: match operation.kind() {
                v1::OperationKind::Unspecified => OperationKind::Unknown,
                v1::OperationKind::Rebalance => OperationKind::Rebalance,
                v1::OperationKind::Move => OperationKind::Move,
                v1::OperationKind::Decommission => OperationKind::Decommission,
                v1::OperationKind::Repair => OperationKind::Repair,
                v1::OperationKind::Balance => OperationKind::Balance,
                v1::OperationKind::Undo => OperationKind::Undo,
                v1::OperationKind::Split => OperationKind::Split,
                v1::OperationKind::Merge => OperationKind::Merge,
            },
            state: OperationState::from_wire(operation.state()),
            id: OperationId(operation.id),
            cancelling: operation.cancelling,
            moves_done: operation.moves_done as usize,
            moves_all: operation.moves_all as usize,
            moves: operation.moves.into_iter().map(OperationMove::from_wire).collect(),
            transfers: operation.transfers.iter().map(PlannedTransfer::from_wire).collect(),
            began_ms: operation.began_ms,
            ended_ms: (operation.ended_ms != 0).then_some(operation.ended_ms),
            node: plan::node(operation.node),
            message: operation.message,
            undoes: (operation.undoes != 0).then_some(OperationId(operation.undoes)),
            split: operation.split.map(ShardSplit::from_wire),
            merge: operation.merge.as_ref().map(ShardMerge::from_wire),
        }
    }
}

impl OperationState {
    fn from_wire(state: v1::OperationState) -> OperationState {
        match state {
            v1::OperationState::Unspecified => OperationState::Unknown,
            v1::OperationState::Pending => OperationState::Pending,
            v1::OperationState::Running => OperationState::Running,
            v1::OperationState::Paused => OperationState::Paused,
            v1::OperationState::Done => OperationState::Done,
            v1::OperationState::Cancelled => OperationState::Cancelled,
            v1::OperationState::Failed => OperationState::Failed,
        }
    }
}

impl OperationMove {
    fn from_wire(step: v1::OperationMove) -> OperationMove {
        let replica = |id: u64| (id != 0).then_some(ReplicaId(id));
        OperationMove {
            state: OperationState::from_wire(step.state()),
            shard: ShardId(step.shard),
            from: plan::node(step.from_node),
            from_replica: replica(step.from_replica),
            to: plan::node(step.to_node),
            to_replica: replica(step.to_replica),
            bytes: step.bytes,
            message: step.message,
            attempts: step.attempts,
        }
    }
}

impl Balancing {
    fn from_wire(balancing: v1::Balancing) -> Balancing {
        Balancing {
            state: match balancing.state() {
                v1::BalancerState::Unspecified => Balancer::Unknown,
                v1::BalancerState::Off => Balancer::Off,
                v1::BalancerState::Ready => Balancer::Ready,
                v1::BalancerState::Starting => Balancer::Starting,
                v1::BalancerState::InProgress => Balancer::InProgress,
                v1::BalancerState::Stalled => Balancer::Stalled,
            },
            reasons: balancing.reasons,
            automatic: balancing.automatic,
            moves_at_a_time: balancing.moves_at_a_time,
            down_after: Duration::from_millis(balancing.down_after_ms),
            disk_fill_max: balancing.disk_fill_max,
            threshold: balancing.threshold,
            split_bytes: balancing.split_bytes,
            split_load: balancing.split_load,
        }
    }
}

impl fmt::Display for OperationKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            OperationKind::Unknown => "unknown",
            OperationKind::Rebalance => "rebalance",
            OperationKind::Move => "move",
            OperationKind::Decommission => "decommission",
            OperationKind::Repair => "repair",
            OperationKind::Balance => "balance",
            OperationKind::Undo => "undo",
            OperationKind::Split => "split",
            OperationKind::Merge => "merge",
        })
    }
}

impl fmt::Display for OperationState {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            OperationState::Unknown => "unknown",
            OperationState::Pending => "pending",
            OperationState::Running => "running",
            OperationState::Paused => "paused",
            OperationState::Done => "done",
            OperationState::Cancelled => "cancelled",
            OperationState::Failed => "failed",
        })
    }
}

impl fmt::Display for Balancer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Balancer::Unknown => "unknown",
            Balancer::Off => "off",
            Balancer::Ready => "ready",
            Balancer::Starting => "starting",
            Balancer::InProgress => "in_progress",
            Balancer::Stalled => "stalled",
        })
    }
}

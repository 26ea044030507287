//! Owns the gRPC face of operating: init, a node's own view, leadership, reclaiming, faults for tests. Decides
//! nothing: `cluster`, the host and the transport do.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::peer::elastic;
use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::shard_map::{NodeId, ShardId};
use coracle_proto::v1;
use coracle_proto::v1::admin_service_server::AdminService;
use coracle_raft::error::GroupError;
use coracle_raft::host::Host;
use coracle_raft::leadership::Standing;
use prost::Message;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::cluster::{InitError, InitOptions};

/// Init waits for nodes that are still starting.
const INIT_TIMEOUT: Duration = Duration::from_secs(60);
/// A transfer takes an election at most.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(10);

/// A setting takes a round of the meta group, which may just be electing; less than callers wait, so
/// that they hear why it failed.
const SET_TIMEOUT: Duration = Duration::from_secs(8);

/// What a node does for its operators.
#[tonic::async_trait]
pub trait Operator: Send + Sync + 'static {
    /// Makes a cluster of the nodes that this node knows, from where an earlier try stopped. Returns
    /// the map, and warnings.
    async fn init(
        &self,
        options: InitOptions,
        deadline: Instant,
    ) -> Result<(v1::ShardMap, Vec<String>), InitError>;

    /// Sets how many read replicas every shard has in a zone.
    async fn set_read_replicas(
        &self,
        request: v1::SetReadReplicasRequest,
        deadline: Instant,
    ) -> Result<v1::SetReadReplicasResponse, Fault>;

    /// Has the meta group's leader answer what is asked of replicas and nodes: the bytes of the
    /// response.
    async fn elastic(&self, asked: elastic::Kind, deadline: Instant) -> Result<Bytes, Fault>;

    /// The node's groups, once it is in a cluster.
    fn host(&self) -> Option<Arc<Host>>;

    /// Cuts the node off from exactly these; false where faults may not be injected.
    fn cut(&self, nodes: BTreeSet<NodeId>) -> bool;

    /// The node's own view, without asking anybody.
    fn status(&self) -> v1::NodeStatusResponse;
}

/// The admin service of a node, with or without a cluster.
#[derive(Clone)]
pub struct Admin(pub Arc<dyn Operator>);

#[tonic::async_trait]
impl AdminService for Admin {
    async fn init(
        &self,
        request: Request<v1::InitRequest>,
    ) -> Result<Response<v1::InitResponse>, Status> {
        let asked = request.into_inner();
        let options =
            InitOptions { shards: asked.shards, replicas: asked.replicas, nodes: asked.nodes };
        coracle_proto::limits::check_shards(options.shards.max(1)).map_err(Fault::from)?;
        let made = self.0.init(options, Instant::now() + INIT_TIMEOUT).await;
        let (map, warnings) = made.map_err(init_fault)?;
        let replicas = map.shards.iter().map(|shard| shard.replicas.len()).max().unwrap_or(0);
        Ok(Response::new(v1::InitResponse {
            cluster_id: map.cluster_id,
            shards: map.shards.len().saturating_sub(1) as u32,
            replicas: replicas as u32,
            warnings,
        }))
    }

    async fn node_status(
        &self,
        _: Request<v1::NodeStatusRequest>,
    ) -> Result<Response<v1::NodeStatusResponse>, Status> {
        Ok(Response::new(self.0.status()))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let asked = request.into_inner();
        let shard = ShardId(asked.shard);
        let host = self.0.host().ok_or_else(not_initialized)?;
        let group = host.group(shard).ok_or_else(|| not_here(shard))?;
        if group.status().state != Standing::Leader {
            let message = format!("shard {shard} is not led here: ask its leader's node");
            return Err(Fault::new(Reason::NotLeader, message).into());
        }
        let to = (asked.to_node != 0).then_some(NodeId(asked.to_node));
        let handed = group.hand_over(to, Instant::now() + TRANSFER_TIMEOUT).await;
        let leader = handed.map_err(|error| {
            let message = format!("shard {shard} was not handed over: {error}");
            Fault::new(Reason::Conflict, message)
        })?;
        Ok(Response::new(v1::TransferLeaderResponse { leader_node: leader.0 }))
    }

    async fn compact_shard(
        &self,
        request: Request<v1::CompactShardRequest>,
    ) -> Result<Response<v1::CompactShardResponse>, Status> {
        let shard = ShardId(request.into_inner().shard);
        let host = self.0.host().ok_or_else(not_initialized)?;
        let group = host.group(shard).ok_or_else(|| not_here(shard))?;
        let reclaimed = host.reclaim(group).await.map_err(|error| match error {
            GroupError::Overloaded { retry_after } => {
                let message = "this node is compacting a shard already";
                Fault::new(Reason::Overloaded, message).with_retry_after(retry_after)
            }
            error => {
                let message = format!("shard {shard} was not compacted: {error}");
                Fault::new(Reason::Conflict, message)
            }
        })?;
        Ok(Response::new(v1::CompactShardResponse {
            bytes_before: reclaimed.before,
            bytes_after: reclaimed.after,
        }))
    }

    async fn set_read_replicas(
        &self,
        request: Request<v1::SetReadReplicasRequest>,
    ) -> Result<Response<v1::SetReadReplicasResponse>, Status> {
        let asked = request.into_inner();
        coracle_proto::limits::check_learners(asked.learners.into()).map_err(Fault::from)?;
        let set = self.0.set_read_replicas(asked, Instant::now() + SET_TIMEOUT).await;
        Ok(Response::new(set?))
    }

    async fn plan_rebalance(
        &self,
        request: Request<v1::PlanRebalanceRequest>,
    ) -> Result<Response<v1::PlanRebalanceResponse>, Status> {
        self.ask(elastic::Kind::Plan, request).await
    }

    async fn start_rebalance(
        &self,
        request: Request<v1::StartRebalanceRequest>,
    ) -> Result<Response<v1::StartRebalanceResponse>, Status> {
        self.ask(elastic::Kind::Start, request).await
    }

    async fn move_replica(
        &self,
        request: Request<v1::MoveReplicaRequest>,
    ) -> Result<Response<v1::MoveReplicaResponse>, Status> {
        self.ask(elastic::Kind::Move, request).await
    }

    async fn set_node_state(
        &self,
        request: Request<v1::SetNodeStateRequest>,
    ) -> Result<Response<v1::SetNodeStateResponse>, Status> {
        self.ask(elastic::Kind::NodeState, request).await
    }

    async fn split_shard(
        &self,
        request: Request<v1::SplitShardRequest>,
    ) -> Result<Response<v1::SplitShardResponse>, Status> {
        self.ask(elastic::Kind::Split, request).await
    }

    async fn merge_shards(
        &self,
        request: Request<v1::MergeShardsRequest>,
    ) -> Result<Response<v1::MergeShardsResponse>, Status> {
        self.ask(elastic::Kind::Merge, request).await
    }

    async fn set_node_weight(
        &self,
        request: Request<v1::SetNodeWeightRequest>,
    ) -> Result<Response<v1::SetNodeWeightResponse>, Status> {
        self.ask(elastic::Kind::NodeWeight, request).await
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        self.ask(elastic::Kind::Operations, request).await
    }

    async fn control_operation(
        &self,
        request: Request<v1::ControlOperationRequest>,
    ) -> Result<Response<v1::ControlOperationResponse>, Status> {
        self.ask(elastic::Kind::Control, request).await
    }

    async fn set_balancing(
        &self,
        request: Request<v1::SetBalancingRequest>,
    ) -> Result<Response<v1::SetBalancingResponse>, Status> {
        self.ask(elastic::Kind::Balancing, request).await
    }

    async fn inject_fault(
        &self,
        request: Request<v1::InjectFaultRequest>,
    ) -> Result<Response<v1::InjectFaultResponse>, Status> {
        let cut: BTreeSet<NodeId> = request.into_inner().cut_from.into_iter().map(NodeId).collect();
        if !self.0.cut(cut) {
            let message = "this server was not started with test.fault_injection";
            return Err(Fault::new(Reason::NotAllowed, message).into());
        }
        Ok(Response::new(v1::InjectFaultResponse {}))
    }
}

impl Admin {
    async fn ask<Q: Message, A: Message + Default>(
        &self,
        kind: fn(Bytes) -> elastic::Kind,
        request: Request<Q>,
    ) -> Result<Response<A>, Status> {
        let asked = kind(request.into_inner().encode_to_vec().into());
        let body = self.0.elastic(asked, Instant::now() + SET_TIMEOUT).await?;
        let answer = A::decode(body).map_err(|error| {
            Fault::new(Reason::Internal, format!("an answer between nodes: {error}"))
        })?;
        Ok(Response::new(answer))
    }
}

/// The answer of a node that has no cluster.
pub(crate) fn not_initialized() -> Fault {
    let message = "this node has no cluster yet: run `coracle init` on one of the nodes, or start it with the seeds of a cluster";
    Fault::new(Reason::NotInitialized, message).with_outcome(Outcome::NotApplied)
}

fn not_here(shard: ShardId) -> Fault {
    Fault::new(Reason::UnknownShard, format!("shard {shard} has no replica on this node"))
}

fn init_fault(error: InitError) -> Fault {
    let reason = match error {
        InitError::Already => Reason::AlreadyInitialized,
        InitError::TimedOut(_) => Reason::DeadlineNotApplied,
        InitError::Failed(_) => Reason::Conflict,
    };
    Fault::new(reason, error.to_string())
}

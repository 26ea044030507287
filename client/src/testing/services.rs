//! Owns the gRPC services of a fake node: decode, ask the cluster, encode. Does not decide anything.

use std::pin::Pin;
use std::time::Duration;

use coracle_proto::limits::PIPELINE_IN_FLIGHT_MAX;
use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::v1;
use coracle_proto::v1::admin_service_server::AdminService;
use coracle_proto::v1::cluster_service_server::ClusterService;
use coracle_proto::v1::kv_service_server::KvService;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use futures_util::{Stream, StreamExt, stream};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::FakeCluster;
use super::faults::{Act, Refusal};
use super::model::Model;
use super::range::Deleting;
use super::scan::Scanning;
use crate::topology::NodeId;

/// One node of a fake cluster.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) cluster: FakeCluster,
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What answers in pieces.
trait Walk: Send + 'static {
    type Answer: Send + 'static;

    fn is_done(&self) -> bool;

    fn next(&mut self, model: &mut Model) -> Result<Self::Answer, Fault>;

    /// A fault that ends it here, with what is known of what it has done.
    fn failed(&self, fault: Fault) -> Fault;
}

impl Walk for Scanning {
    type Answer = v1::ScanResponse;

    fn is_done(&self) -> bool {
        self.done
    }

    fn next(&mut self, model: &mut Model) -> Result<v1::ScanResponse, Fault> {
        Ok(model.next_page(self))
    }

    fn failed(&self, fault: Fault) -> Fault {
        fault
    }
}

impl Walk for Deleting {
    type Answer = v1::DeleteRangeResponse;

    fn is_done(&self) -> bool {
        self.done
    }

    fn next(&mut self, model: &mut Model) -> Result<v1::DeleteRangeResponse, Fault> {
        model.next_progress(self)
    }

    fn failed(&self, fault: Fault) -> Fault {
        Deleting::failed(self, fault)
    }
}

/// When the test ends a stream.
enum End {
    AtItsOwn,
    /// After so many answers.
    After(usize, Ended),
}

/// How the test ends a stream.
enum Ended {
    Cut,
    Refused(Refusal),
}

impl End {
    /// After another answer; how it ends when there may be none.
    fn one_less(self) -> Result<End, Ended> {
        match self {
            End::AtItsOwn => Ok(End::AtItsOwn),
            End::After(0, ended) => Err(ended),
            End::After(left, ended) => Ok(End::After(left - 1, ended)),
        }
    }
}

impl Node {
    /// Serves one operation that did not come on a pipeline.
    async fn unary<T>(
        &self,
        operation: Operation,
        take: impl FnOnce(Answer) -> Option<T>,
    ) -> Result<Response<T>, Status> {
        let answer = match self.cluster.serve(self.id, operation).await {
            Some(Answer::Error(error)) => return Err(Fault::from_pipeline(&error).to_status()),
            Some(answer) => answer,
            None => std::future::pending().await,
        };
        let mismatched = || {
            let fault = Fault::new(Reason::Internal, "an answer does not fit its question");
            fault.with_outcome(Outcome::Unknown).to_status()
        };
        take(answer).map(Response::new).ok_or_else(mismatched)
    }

    /// One operation of a pipeline; `None` when there is never an answer.
    async fn pipelined(self, request: v1::PipelineRequest) -> Option<v1::PipelineResponse> {
        let v1::PipelineRequest { id, operation, .. } = request;
        let result = match operation {
            Some(operation) => self.cluster.serve(self.id, operation).await,
            None => {
                let message = "an operation of no kind, or of one that this version does not know";
                Some(Answer::Error(Fault::new(Reason::Unsupported, message).to_pipeline()))
            }
        };
        Some(v1::PipelineResponse { id, result: Some(result?) })
    }

    /// The answers of a scan or a delete-range, each made when the one before has been taken.
    fn walk<W: Walk>(&self, walk: W, end: End) -> Boxed<W::Answer> {
        let start = (self.clone(), Some(walk), end);
        let answers = stream::unfold(start, |(node, walk, end)| async move {
            let mut walk = walk.filter(|walk| !walk.is_done())?;
            let end = match end.one_less() {
                Ok(end) => end,
                Err(Ended::Cut) => {
                    // What has been sent before shall arrive.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    node.cluster.cut(node.id);
                    std::future::pending().await
                }
                Err(Ended::Refused(refusal)) => {
                    node.cluster.state.lock().log.counts.refused += 1;
                    let status = walk.failed(refusal.0).to_status();
                    return Some((Err(status), (node, None, End::AtItsOwn)));
                }
            };
            let answer = walk.next(&mut node.cluster.state.lock().model);
            let walk = answer.is_ok().then_some(walk);
            Some((answer.map_err(Status::from), (node, walk, end)))
        });
        Box::pin(answers)
    }

    /// Begins a scan or a delete-range as the test wants it to go.
    async fn begin<W: Walk>(
        &self,
        operation: Operation,
        begin: impl FnOnce(&mut Model) -> Result<W, Fault>,
    ) -> Result<Response<Boxed<W::Answer>>, Status> {
        let act = self.cluster.next_walk(self.id, &operation).await;
        let end = match act {
            Act::Refuse(refusal) => return Err(refusal.0.to_status()),
            Act::LoseRequest => return std::future::pending().await,
            Act::Cut => End::After(0, Ended::Cut),
            Act::CutAfterPages(pages) => End::After(pages, Ended::Cut),
            Act::RefuseAfterPages(pages, ref refusal) => {
                End::After(pages, Ended::Refused(refusal.clone()))
            }
            Act::Serve | Act::Delay(_) | Act::Hold(_) | Act::LoseAnswer | Act::ApplyAndCut => {
                End::AtItsOwn
            }
        };
        let mut walk = begin(&mut self.cluster.state.lock().model).map_err(Status::from)?;
        if matches!(act, Act::LoseAnswer | Act::ApplyAndCut) {
            // As far as the first answer, which nobody gets.
            drop(walk.next(&mut self.cluster.state.lock().model));
            if matches!(act, Act::ApplyAndCut) {
                self.cluster.cut(self.id);
            }
            return std::future::pending().await;
        }
        Ok(Response::new(self.walk(walk, end)))
    }
}

#[async_trait]
impl KvService for Node {
    type ScanStream = Boxed<v1::ScanResponse>;
    type DeleteRangeStream = Boxed<v1::DeleteRangeResponse>;
    type PipelineStream = Boxed<v1::PipelineResponses>;

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        self.unary(Operation::Get(request.into_inner()), |answer| match answer {
            Answer::Get(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn batch_get(
        &self,
        request: Request<v1::BatchGetRequest>,
    ) -> Result<Response<v1::BatchGetResponse>, Status> {
        self.unary(Operation::BatchGet(request.into_inner()), |answer| match answer {
            Answer::BatchGet(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn put(
        &self,
        request: Request<v1::PutRequest>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        self.unary(Operation::Put(request.into_inner()), |answer| match answer {
            Answer::Put(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        self.unary(Operation::Delete(request.into_inner()), |answer| match answer {
            Answer::Delete(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn write(
        &self,
        request: Request<v1::WriteRequest>,
    ) -> Result<Response<v1::WriteResponse>, Status> {
        self.unary(Operation::Write(request.into_inner()), |answer| match answer {
            Answer::Write(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn scan(
        &self,
        request: Request<v1::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let scan = request.into_inner();
        let operation = Operation::Scan(scan.clone());
        self.begin(operation, |model| model.begin_scan(self.id, scan)).await
    }

    async fn delete_range(
        &self,
        request: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<Self::DeleteRangeStream>, Status> {
        let range = request.into_inner();
        let operation = Operation::DeleteRange(range.clone());
        self.begin(operation, |model| model.begin_delete_range(self.id, range)).await
    }

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequests>>,
    ) -> Result<Response<Self::PipelineStream>, Status> {
        let node = self.clone();
        let answers = request
            .into_inner()
            .take_while(|request| std::future::ready(request.is_ok()))
            .filter_map(|request| std::future::ready(request.ok()))
            .flat_map(|together| stream::iter(together.requests))
            .map(move |request| node.clone().pipelined(request))
            .buffer_unordered(PIPELINE_IN_FLIGHT_MAX)
            .filter_map(std::future::ready)
            .map(|response| Ok(v1::PipelineResponses { responses: vec![response] }));
        Ok(Response::new(Box::pin(answers)))
    }
}

#[async_trait]
impl ClusterService for Node {
    type WatchMapStream = Boxed<v1::WatchMapResponse>;

    async fn watch_map(
        &self,
        _: Request<v1::WatchMapRequest>,
    ) -> Result<Response<Self::WatchMapStream>, Status> {
        let maps = WatchStream::new(self.cluster.published.subscribe());
        let maps = maps.map(|map| Ok(v1::WatchMapResponse { map: Some(map) }));
        Ok(Response::new(Box::pin(maps)))
    }

    async fn get_map(
        &self,
        _: Request<v1::GetMapRequest>,
    ) -> Result<Response<v1::GetMapResponse>, Status> {
        let map = Some(self.cluster.state.lock().model.wire_map());
        Ok(Response::new(v1::GetMapResponse { map }))
    }

    async fn list_keyspaces(
        &self,
        _: Request<v1::ListKeyspacesRequest>,
    ) -> Result<Response<v1::ListKeyspacesResponse>, Status> {
        let mut keyspaces = self.cluster.state.lock().model.wire_map().keyspaces;
        keyspaces.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(v1::ListKeyspacesResponse { keyspaces }))
    }

    async fn create_keyspace(
        &self,
        request: Request<v1::CreateKeyspaceRequest>,
    ) -> Result<Response<v1::CreateKeyspaceResponse>, Status> {
        let made = self.cluster.change(|model| model.create_keyspace(&request.into_inner()));
        Ok(Response::new(v1::CreateKeyspaceResponse { keyspace: Some(made?) }))
    }

    async fn update_keyspace(
        &self,
        request: Request<v1::UpdateKeyspaceRequest>,
    ) -> Result<Response<v1::UpdateKeyspaceResponse>, Status> {
        let changed = self.cluster.change(|model| model.update_keyspace(&request.into_inner()));
        Ok(Response::new(v1::UpdateKeyspaceResponse { keyspace: Some(changed?) }))
    }
}

#[async_trait]
impl AdminService for Node {
    async fn init(
        &self,
        request: Request<v1::InitRequest>,
    ) -> Result<Response<v1::InitResponse>, Status> {
        match self.cluster.next_init(self.id) {
            Some(Act::Refuse(refusal)) => return Err(refusal.0.to_status()),
            Some(Act::Cut) => {
                self.cluster.cut(self.id);
                std::future::pending::<()>().await;
            }
            _ => {}
        }
        let made = self.cluster.change(|model| model.init(request.into_inner()));
        Ok(Response::new(made?))
    }

    async fn node_status(
        &self,
        _: Request<v1::NodeStatusRequest>,
    ) -> Result<Response<v1::NodeStatusResponse>, Status> {
        let state = self.cluster.state.lock();
        let map = state.model.wire_map();
        let node = map.nodes.into_iter().find(|node| node.id == self.id.0);
        let (cluster_id, uptime_ms) = (map.cluster_id, state.model.uptime_ms());
        let status = v1::NodeStatusResponse { node, cluster_id, uptime_ms, ..Default::default() };
        Ok(Response::new(status))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let request = request.into_inner();
        let leads = self.cluster.change(|model| model.transfer_leader(self.id, request))?;
        Ok(Response::new(v1::TransferLeaderResponse { leader_node: leads.0 }))
    }

    async fn compact_shard(
        &self,
        _: Request<v1::CompactShardRequest>,
    ) -> Result<Response<v1::CompactShardResponse>, Status> {
        Err(Fault::new(Reason::Unsupported, "nothing of a fake cluster is on a disk").to_status())
    }

    async fn set_read_replicas(
        &self,
        _: Request<v1::SetReadReplicasRequest>,
    ) -> Result<Response<v1::SetReadReplicasResponse>, Status> {
        let message = "a fake cluster's replicas are those of its shape";
        Err(Fault::new(Reason::Unsupported, message).to_status())
    }

    async fn plan_rebalance(
        &self,
        request: Request<v1::PlanRebalanceRequest>,
    ) -> Result<Response<v1::PlanRebalanceResponse>, Status> {
        let v1::PlanRebalanceRequest { moves_max, weights, .. } = request.into_inner();
        if !weights.is_empty() {
            let message = "a fake cluster's nodes count alike";
            return Err(Fault::new(Reason::Unsupported, message).to_status());
        }
        let plan = self.cluster.state.lock().model.plan_rebalance(moves_max)?;
        Ok(Response::new(v1::PlanRebalanceResponse { plan: Some(plan) }))
    }

    async fn start_rebalance(
        &self,
        request: Request<v1::StartRebalanceRequest>,
    ) -> Result<Response<v1::StartRebalanceResponse>, Status> {
        let plan = request.into_inner().plan.unwrap_or_default();
        let operation = self.cluster.change(|model| model.start_rebalance(&plan))?;
        Ok(Response::new(v1::StartRebalanceResponse { operation: Some(operation) }))
    }

    async fn move_replica(
        &self,
        request: Request<v1::MoveReplicaRequest>,
    ) -> Result<Response<v1::MoveReplicaResponse>, Status> {
        let request = request.into_inner();
        let operation = self.cluster.change(|model| model.move_replica(&request))?;
        Ok(Response::new(v1::MoveReplicaResponse { operation: Some(operation) }))
    }

    async fn set_node_state(
        &self,
        request: Request<v1::SetNodeStateRequest>,
    ) -> Result<Response<v1::SetNodeStateResponse>, Status> {
        let request = request.into_inner();
        let set = self.cluster.change(|model| model.set_node_state(&request));
        Ok(Response::new(set?))
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let id = request.into_inner().id;
        let list = self.cluster.state.lock().model.list_operations(id)?;
        Ok(Response::new(list))
    }

    async fn control_operation(
        &self,
        request: Request<v1::ControlOperationRequest>,
    ) -> Result<Response<v1::ControlOperationResponse>, Status> {
        let request = request.into_inner();
        let operation = self.cluster.change(|model| model.control_operation(&request))?;
        Ok(Response::new(v1::ControlOperationResponse { operation: Some(operation) }))
    }

    async fn split_shard(
        &self,
        request: Request<v1::SplitShardRequest>,
    ) -> Result<Response<v1::SplitShardResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(self.cluster.change(|model| model.split_shard(&request))?))
    }

    async fn merge_shards(
        &self,
        request: Request<v1::MergeShardsRequest>,
    ) -> Result<Response<v1::MergeShardsResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(self.cluster.change(|model| model.merge_shards(&request))?))
    }

    async fn set_node_weight(
        &self,
        request: Request<v1::SetNodeWeightRequest>,
    ) -> Result<Response<v1::SetNodeWeightResponse>, Status> {
        let request = request.into_inner();
        let node = self.cluster.change(|model| model.set_node_weight(&request))?;
        Ok(Response::new(v1::SetNodeWeightResponse { node: Some(node) }))
    }

    async fn set_balancing(
        &self,
        request: Request<v1::SetBalancingRequest>,
    ) -> Result<Response<v1::SetBalancingResponse>, Status> {
        let request = request.into_inner();
        let balancing = self.cluster.change(|model| model.set_balancing(&request))?;
        Ok(Response::new(v1::SetBalancingResponse { balancing: Some(balancing) }))
    }

    async fn inject_fault(
        &self,
        _: Request<v1::InjectFaultRequest>,
    ) -> Result<Response<v1::InjectFaultResponse>, Status> {
        Err(Fault::new(Reason::NotAllowed, "started without fault injection").to_status())
    }
}

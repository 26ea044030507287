//! Owns the gRPC services of a scripted node: decode, ask the cluster, encode.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::v1;
use coracle_proto::v1::admin_service_server::AdminService;
use coracle_proto::v1::cluster_service_server::ClusterService;
use coracle_proto::v1::kv_service_server::KvService;
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming, async_trait};

use crate::fake::{Act, Cluster};

/// Entries of a page.
const PAGE: usize = 2;

#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) id: u64,
    pub(crate) cluster: Cluster,
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn only_pipelined() -> Status {
    Fault::new(Reason::Unsupported, "the client sends this on its pipeline").to_status()
}

#[async_trait]
impl KvService for Node {
    type DeleteRangeStream = Boxed<v1::DeleteRangeResponse>;
    type ScanStream = Boxed<v1::ScanResponse>;
    type PipelineStream = Boxed<v1::PipelineResponses>;

    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        Err(only_pipelined())
    }

    async fn batch_get(
        &self,
        _: Request<v1::BatchGetRequest>,
    ) -> Result<Response<v1::BatchGetResponse>, Status> {
        Err(only_pipelined())
    }

    async fn put(&self, _: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        Err(only_pipelined())
    }

    async fn delete(
        &self,
        _: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        Err(only_pipelined())
    }

    async fn write(
        &self,
        _: Request<v1::WriteRequest>,
    ) -> Result<Response<v1::WriteResponse>, Status> {
        Err(only_pipelined())
    }

    async fn delete_range(
        &self,
        request: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<Self::DeleteRangeStream>, Status> {
        let delete = request.into_inner();
        let rounds_max = match self.cluster.next_act(self.id) {
            Some(Act::Fault(fault)) => return Err(fault.to_status()),
            Some(Act::Ignore) => std::future::pending().await,
            Some(Act::CutAfterPages(rounds)) => rounds,
            _ => usize::MAX,
        };
        let node = self.clone();
        // The token is the key behind which it goes on. Each round deletes when it is asked for, and
        // so when the one before has been sent.
        let begun = (0, 0, delete.resume_token.clone());
        let rounds = futures_util::stream::try_unfold(begun, move |(round, deleted, token)| {
            let (node, delete) = (node.clone(), delete.clone());
            async move {
                if round == usize::MAX {
                    return Ok(None);
                }
                if round == rounds_max {
                    // What has been sent before shall arrive.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    node.cluster.cut(node.id);
                    std::future::pending::<()>().await;
                }
                let (keys, last, done) = node.cluster.with(|state| {
                    let keys = state.keys_in(&delete, &token);
                    let step = &keys[..keys.len().min(PAGE)];
                    (step.len() as u64, state.delete_step(step), step.len() == keys.len())
                });
                let token = last.unwrap_or(token);
                let served = v1::Served { shard: 1, term: 9, index: 9, ..Default::default() };
                let answer = v1::DeleteRangeResponse {
                    deleted: deleted + keys,
                    resume_token: if token.is_empty() {
                        Bytes::from_static(b"-")
                    } else {
                        token.clone()
                    },
                    done,
                    version: 700 + round as u64,
                    served: Some(served),
                    steps: vec![served],
                };
                let round = if done { usize::MAX } else { round + 1 };
                Ok(Some((answer, (round, deleted + keys, token))))
            }
        });
        Ok(Response::new(Box::pin(rounds)))
    }

    async fn scan(
        &self,
        request: Request<v1::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let scan = request.into_inner();
        let mut refused = None;
        let pages_max = match self.cluster.next_act(self.id) {
            Some(Act::Fault(fault)) => return Err(fault.to_status()),
            Some(Act::Ignore) => std::future::pending().await,
            Some(Act::CutAfterPages(pages)) => pages,
            Some(Act::FaultAfterPages(pages, fault)) => {
                refused = Some(fault);
                pages
            }
            _ => usize::MAX,
        };
        // The token is how many have come, and the last key.
        let after = scan.resume_token.split_first();
        let come = after.map_or(0, |(come, _)| u64::from(*come));
        let rest = self.cluster.with(|state| state.range(&scan, after.map(|(_, key)| key)));
        let left = if scan.limit == 0 { usize::MAX } else { (scan.limit - come) as usize };
        let rest = &rest[..rest.len().min(left)];
        let count = rest.len().div_ceil(PAGE).max(1);
        let mut come = come as u8;
        let mut pages = Vec::new();
        for place in 0..count {
            let entries = rest.chunks(PAGE).nth(place).unwrap_or_default().to_vec();
            come += entries.len() as u8;
            let mut token = vec![come];
            token.extend(entries.last().map_or(&b""[..], |pair| &pair.key[..]));
            pages.push(Ok(v1::ScanResponse {
                entries,
                version: 500,
                resume_token: Bytes::from(token),
                done: place + 1 == count,
                served: None,
            }));
        }
        if pages_max >= pages.len() {
            return Ok(Response::new(Box::pin(tokio_stream::iter(pages))));
        }
        pages.truncate(pages_max);
        if let Some(fault) = refused {
            pages.push(Err(fault.to_status()));
            return Ok(Response::new(Box::pin(tokio_stream::iter(pages))));
        }
        let node = self.clone();
        let cut = futures_util::stream::once(async move {
            // What has been sent before shall arrive.
            tokio::time::sleep(Duration::from_millis(1)).await;
            node.cluster.cut(node.id);
            std::future::pending().await
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(pages).chain(cut))))
    }

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequests>>,
    ) -> Result<Response<Self::PipelineStream>, Status> {
        let mut requests = request.into_inner();
        let (answers, stream) = mpsc::channel(64);
        let node = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(together)) = requests.message().await {
                for request in together.requests {
                    let (node, answers) = (node.clone(), answers.clone());
                    tokio::spawn(async move {
                        let id = request.id;
                        let result = node.cluster.serve(node.id, request).await;
                        if result.is_some() {
                            let responses = vec![v1::PipelineResponse { id, result }];
                            // The client may have gone.
                            let _ = answers.send(Ok(v1::PipelineResponses { responses })).await;
                        } else {
                            // Keeps the stream open, as a node that is still at it does.
                            std::future::pending::<()>().await;
                        }
                    });
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

#[async_trait]
impl ClusterService for Node {
    type WatchMapStream = Boxed<v1::WatchMapResponse>;

    async fn watch_map(
        &self,
        _: Request<v1::WatchMapRequest>,
    ) -> Result<Response<Self::WatchMapStream>, Status> {
        let maps = WatchStream::new(self.cluster.published());
        let maps = maps.map(|map| Ok(v1::WatchMapResponse { map: Some(map) }));
        Ok(Response::new(Box::pin(maps)))
    }

    async fn get_map(
        &self,
        _: Request<v1::GetMapRequest>,
    ) -> Result<Response<v1::GetMapResponse>, Status> {
        Ok(Response::new(v1::GetMapResponse { map: Some(self.cluster.map()) }))
    }

    async fn list_keyspaces(
        &self,
        _: Request<v1::ListKeyspacesRequest>,
    ) -> Result<Response<v1::ListKeyspacesResponse>, Status> {
        let keyspaces = self.cluster.map().keyspaces;
        Ok(Response::new(v1::ListKeyspacesResponse { keyspaces }))
    }

    async fn create_keyspace(
        &self,
        request: Request<v1::CreateKeyspaceRequest>,
    ) -> Result<Response<v1::CreateKeyspaceResponse>, Status> {
        let keyspace = self.cluster.add_keyspace(&request.into_inner().name);
        self.cluster.announce();
        Ok(Response::new(v1::CreateKeyspaceResponse { keyspace: Some(keyspace) }))
    }

    async fn update_keyspace(
        &self,
        _: Request<v1::UpdateKeyspaceRequest>,
    ) -> Result<Response<v1::UpdateKeyspaceResponse>, Status> {
        Err(Fault::new(Reason::UnknownKeyspace, "settings never change here").to_status())
    }
}

#[async_trait]
impl AdminService for Node {
    async fn init(
        &self,
        request: Request<v1::InitRequest>,
    ) -> Result<Response<v1::InitResponse>, Status> {
        match self.cluster.next_act(self.id) {
            Some(Act::Fault(fault)) => return Err(fault.to_status()),
            Some(Act::Cut) => {
                self.cluster.cut(self.id);
                std::future::pending::<()>().await;
            }
            _ => {}
        }
        let shards = request.into_inner().shards;
        let cluster_id = format!("made by {}", self.id);
        let (replicas, warnings) = (3, Vec::new());
        Ok(Response::new(v1::InitResponse { cluster_id, shards, replicas, warnings }))
    }

    async fn node_status(
        &self,
        _: Request<v1::NodeStatusRequest>,
    ) -> Result<Response<v1::NodeStatusResponse>, Status> {
        let node = self.cluster.map().nodes.into_iter().find(|node| node.id == self.id);
        Ok(Response::new(v1::NodeStatusResponse { node, uptime_ms: 1_500, ..Default::default() }))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let v1::TransferLeaderRequest { shard, to_node } = request.into_inner();
        let map = self.cluster.map();
        let shard = map.shards.iter().find(|known| known.id == shard).expect("a shard");
        if shard.leader_node != self.id {
            let fault = Fault::new(Reason::NotLeader, "not the leader")
                .with(coracle_proto::reason::metadata::LEADER_NODE, shard.leader_node)
                .with(coracle_proto::reason::metadata::LEADER_TERM, shard.leader_term);
            return Err(fault.to_status());
        }
        self.cluster.elect(to_node);
        Ok(Response::new(v1::TransferLeaderResponse { leader_node: to_node }))
    }

    async fn compact_shard(
        &self,
        _: Request<v1::CompactShardRequest>,
    ) -> Result<Response<v1::CompactShardResponse>, Status> {
        Err(Fault::new(Reason::Unsupported, "nothing is on a disk here").to_status())
    }

    async fn set_read_replicas(
        &self,
        _: Request<v1::SetReadReplicasRequest>,
    ) -> Result<Response<v1::SetReadReplicasResponse>, Status> {
        Ok(Response::new(v1::SetReadReplicasResponse::default()))
    }

    async fn inject_fault(
        &self,
        _: Request<v1::InjectFaultRequest>,
    ) -> Result<Response<v1::InjectFaultResponse>, Status> {
        Err(Fault::new(Reason::NotAllowed, "started without fault injection").to_status())
    }
}

//! Proxies between clients and the nodes of a cluster, one before each node: they pass gRPC on, drop
//! answers on their way back, and send requests a second time. Owns the proxies, the choice what meets
//! which fault, and the counts. Knows of the protocol only what a pipeline's messages are.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use coracle_proto::limits::MESSAGE_BYTES_MAX;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::v1::{cluster_service_server, kv_service_server};
use futures_util::stream::{BoxStream, StreamExt, once};
use parking_lot::Mutex;
use prost::Message;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder, Streaming};
use tonic::codegen::Service;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::http::{Request as HttpRequest, Response as HttpResponse};
use tonic::server::{NamedService, StreamingService};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status};

const PIPELINE: &str = "/coracle.v1.KvService/Pipeline";

/// A node that was killed is dialled again and again until it is back.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// As large as the client's own: a proxy shall not be narrower than what it stands for.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// A second copy comes at once, or up to so much later: also when the first has long been answered.
const COPY_DELAY_MAX: Duration = Duration::from_millis(500);

/// A copy that is not answered by then is not counted.
const COPY_TIMEOUT: Duration = Duration::from_secs(10);

/// How often which fault meets a message.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mix {
    /// The share of answers to writes that never come back.
    pub drop: f64,
    /// The share of writes that are sent a second time.
    pub duplicate: f64,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Answers that said that a write was applied, and were dropped.
    pub dropped: u64,
    /// Writes that a node was sent a second time, and answered.
    pub duplicated: u64,
    /// Of those: answered as applied, with the first result or by applying it first.
    pub duplicates_applied: u64,
    /// Of those: refused, by a node that does not lead, or because the write is done with.
    pub duplicates_refused: u64,
}

/// The proxies of a cluster. Dropping them ends them.
pub struct Proxies {
    table: BTreeMap<String, String>,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    mix: Mix,
    random: Mutex<StdRng>,
    nodes: Vec<Channel>,
    dropped: AtomicU64,
    duplicates_applied: AtomicU64,
    duplicates_refused: AtomicU64,
}

impl Proxies {
    /// One before each of these addresses.
    pub async fn start(addresses: &[String], mix: Mix, seed: u64) -> Result<Proxies, String> {
        let nodes = addresses.iter().map(|address| dial(address)).collect::<Result<_, _>>()?;
        let shared = Arc::new(Shared::new(nodes, mix, seed));
        let (mut table, mut tasks) = (BTreeMap::new(), JoinSet::new());
        for (at, address) in addresses.iter().enumerate() {
            let failed = |error: std::io::Error| format!("a proxy for {address}: {error}");
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(failed)?;
            let own = listener.local_addr().map_err(failed)?;
            table.insert(address.clone(), own.to_string());
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let proxy = Proxy { shared: shared.clone(), at };
            let served = Server::builder()
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .add_service(Face::<true>(proxy.clone()))
                .add_service(Face::<false>(proxy))
                .serve_with_incoming(incoming);
            tasks.spawn(async move {
                if let Err(error) = served.await {
                    eprintln!("the proxy at {own} ended: {error}");
                }
            });
        }
        Ok(Proxies { table, shared, _tasks: tasks })
    }

    /// Where a client finds the proxy of each node.
    pub fn table(&self) -> BTreeMap<String, String> {
        self.table.clone()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let applied = load(&self.shared.duplicates_applied);
        let refused = load(&self.shared.duplicates_refused);
        Counts {
            dropped: load(&self.shared.dropped),
            duplicated: applied + refused,
            duplicates_applied: applied,
            duplicates_refused: refused,
        }
    }
}

fn dial(address: &str) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|error| format!("{address}: {error}"))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    Ok(endpoint.connect_lazy())
}

impl Shared {
    fn new(nodes: Vec<Channel>, mix: Mix, seed: u64) -> Shared {
        Shared {
            mix,
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            nodes,
            dropped: AtomicU64::new(0),
            duplicates_applied: AtomicU64::new(0),
            duplicates_refused: AtomicU64::new(0),
        }
    }

    fn chance(&self, share: f64) -> bool {
        share > 0.0 && self.random.lock().random::<f64>() < share
    }

    /// What is left of a message of answers; `None` when nothing is.
    fn thinned(&self, message: Bytes) -> Option<Bytes> {
        if self.mix.drop <= 0.0 {
            return Some(message);
        }
        let Ok(mut answers) = v1::PipelineResponses::decode(message.clone()) else {
            return Some(message);
        };
        let before = answers.responses.len();
        answers
            .responses
            .retain(|answer| !(is_applied(answer) == Some(true) && self.chance(self.mix.drop)));
        let dropped = before - answers.responses.len();
        self.dropped.fetch_add(dropped as u64, Ordering::Relaxed);
        match (dropped, answers.responses.is_empty()) {
            (0, _) => Some(message),
            (_, true) => None,
            (_, false) => Some(answers.encode_to_vec().into()),
        }
    }

    /// Sends some of a message's requests once more, to the node that they are for or to another.
    fn perhaps_again(self: &Arc<Self>, at: usize, message: &Bytes) {
        if self.mix.duplicate <= 0.0 {
            return;
        }
        let requests = v1::PipelineRequests::decode(message.clone()).unwrap_or_default().requests;
        for request in requests {
            if is_write(&request) && self.chance(self.mix.duplicate) {
                self.later_again(at, v1::PipelineRequests { requests: vec![request] });
            }
        }
    }

    fn later_again(self: &Arc<Self>, at: usize, request: v1::PipelineRequests) {
        let (delay, elsewhere) = {
            let mut random = self.random.lock();
            let delay = match random.random::<bool>() {
                true => COPY_DELAY_MAX.mul_f64(random.random::<f64>()),
                false => Duration::ZERO,
            };
            (delay, random.random_range(0..4 * self.nodes.len()))
        };
        // A quarter of them goes to any node, the rest where the first went.
        let at = if elsewhere < self.nodes.len() { elsewhere } else { at };
        let (shared, request) = (self.clone(), Bytes::from(request.encode_to_vec()));
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let copy = shared.again(at, request);
            let counter = match tokio::time::timeout(COPY_TIMEOUT, copy).await {
                Ok(Some(true)) => &shared.duplicates_applied,
                Ok(Some(false)) => &shared.duplicates_refused,
                // It may not have arrived.
                Ok(None) | Err(_) => return,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        });
    }

    /// Whether the node says that the write is applied; `None` where it says nothing.
    async fn again(&self, at: usize, request: Bytes) -> Option<bool> {
        let mut node = Grpc::new(self.nodes[at].clone());
        node.ready().await.ok()?;
        let one = Request::new(once(std::future::ready(request)));
        let answers = node.streaming(one, PathAndQuery::from_static(PIPELINE), Raw).await.ok()?;
        let answer = answers.into_inner().message().await.ok()??;
        let answers = v1::PipelineResponses::decode(answer).ok()?;
        answers.responses.first().and_then(is_applied)
    }
}

/// Has a node rewrite a shard's replica without what nobody can read any more. False: it cannot.
pub async fn compact(address: &str, shard: u64) -> Result<bool, String> {
    let mut node = Grpc::new(dial(address)?);
    node.ready().await.map_err(|error| format!("{address}: {error}"))?;
    let path = PathAndQuery::from_static("/coracle.v1.AdminService/CompactShard");
    // A message whose first field is the shard.
    let request = Request::new(Bytes::from(shard.encode_to_vec()));
    match node.unary(request, path, Raw).await {
        Ok(_) => Ok(true),
        Err(status) if status.code() == Code::Unimplemented => Ok(false),
        Err(status) => Err(format!("compact shard {shard} on {address}: {status}")),
    }
}

fn is_write(request: &v1::PipelineRequest) -> bool {
    matches!(
        request.operation,
        Some(Operation::Put(_) | Operation::Delete(_) | Operation::Write(_))
    )
}

/// Whether a write's answer says that it was applied; `None` for what is no answer to a write.
fn is_applied(answer: &v1::PipelineResponse) -> Option<bool> {
    match answer.result.as_ref()? {
        Answer::Put(put) => Some(put.applied),
        Answer::Delete(delete) => Some(delete.applied),
        Answer::Write(write) => Some(write.applied),
        Answer::Error(_) => Some(false),
        _ => None,
    }
}

/// The proxy before one node.
#[derive(Clone)]
struct Proxy {
    shared: Arc<Shared>,
    at: usize,
}

impl Proxy {
    async fn forward(
        self,
        path: PathAndQuery,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<BoxStream<'static, Result<Bytes, Status>>>, Status> {
        let is_pipeline = path.path() == PIPELINE;
        let (metadata, _, asked) = request.into_parts();
        let (shared, at) = (self.shared.clone(), self.at);
        // A client that breaks off has no more to say.
        let asked = asked.take_while(|message| std::future::ready(message.is_ok()));
        let asked = asked.filter_map(|message| std::future::ready(message.ok()));
        let asked = asked.inspect(move |message| {
            if is_pipeline {
                shared.perhaps_again(at, message);
            }
        });
        let mut node = Grpc::new(self.shared.nodes[self.at].clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let ready = node.ready().await;
        ready.map_err(|error| Status::unavailable(format!("beyond the proxy: {error}")))?;
        let mut asking = Request::new(asked);
        *asking.metadata_mut() = metadata;
        let (metadata, answers, extensions) = node.streaming(asking, path, Raw).await?.into_parts();
        let shared = self.shared;
        let answers = answers.filter_map(move |answer| {
            let left = match answer {
                Ok(message) if is_pipeline => shared.thinned(message).map(Ok),
                answer => Some(answer),
            };
            std::future::ready(left)
        });
        Ok(Response::from_parts(metadata, answers.boxed(), extensions))
    }
}

/// A proxy under the name of one service: `true` for the keys', `false` for the cluster's.
#[derive(Clone)]
struct Face<const KV: bool>(Proxy);

impl NamedService for Face<true> {
    const NAME: &'static str = kv_service_server::SERVICE_NAME;
}

impl NamedService for Face<false> {
    const NAME: &'static str = cluster_service_server::SERVICE_NAME;
}

impl<const KV: bool> Service<HttpRequest<Body>> for Face<KV> {
    type Response = HttpResponse<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest<Body>) -> Self::Future {
        let path = request.uri().path_and_query().cloned();
        let path = path.unwrap_or(PathAndQuery::from_static("/"));
        let forward = Forward { proxy: self.0.clone(), path };
        Box::pin(async move {
            // One stream each way fits every kind of method.
            let mut server = tonic::server::Grpc::new(Raw)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            Ok(server.streaming(forward, request).await)
        })
    }
}

struct Forward {
    proxy: Proxy,
    path: PathAndQuery,
}

type Answers = BoxStream<'static, Result<Bytes, Status>>;

impl StreamingService<Bytes> for Forward {
    type Response = Bytes;
    type ResponseStream = Answers;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answers>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        Box::pin(self.proxy.clone().forward(self.path.clone(), request))
    }
}

/// Messages as they are.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(mix: Mix) -> Shared {
        Shared::new(Vec::new(), mix, 1)
    }

    #[test]
    fn what_is_dropped_is_the_answer_to_a_write_that_was_applied() {
        let write = |applied| v1::WriteResponse { applied, ..Default::default() };
        let results = [
            Answer::Write(write(true)),
            Answer::Write(write(false)),
            Answer::Error(Default::default()),
            Answer::Get(Default::default()),
            Answer::Write(write(true)),
        ];
        let answers = results.into_iter().zip(1..);
        let answers = answers.map(|(result, id)| v1::PipelineResponse { id, result: Some(result) });
        let message = v1::PipelineResponses { responses: answers.collect() };
        let message = Bytes::from(message.encode_to_vec());
        let none = shared(Mix::default());
        assert_eq!(none.thinned(message.clone()), Some(message.clone()));
        let all = shared(Mix { drop: 1.0, ..Mix::default() });
        let left = all.thinned(message.clone()).expect("not all of it is dropped");
        let left = v1::PipelineResponses::decode(left).expect("a message").responses;
        assert_eq!(left.iter().map(|answer| answer.id).collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(all.dropped.load(Ordering::Relaxed), 2);
        let applied = v1::PipelineResponses {
            responses: vec![v1::PipelineResponse {
                id: 1,
                result: Some(Answer::Write(write(true))),
            }],
        };
        assert_eq!(all.thinned(applied.encode_to_vec().into()), None, "nothing is left");
    }

    #[test]
    fn what_is_doubled_is_a_write() {
        let request =
            |operation| v1::PipelineRequest { id: 1, timeout_ms: 1, operation: Some(operation) };
        assert!(is_write(&request(Operation::Write(Default::default()))));
        assert!(!is_write(&request(Operation::Get(Default::default()))));
    }
}

//! Owns the limit of gRPC on this machine: a server that answers every operation with nothing, and
//! callers that send it the frames that a pipeline would.

use std::net::SocketAddr;
use std::time::Duration;

use coracle_proto::limits::MESSAGE_BYTES_MAX;
use coracle_proto::v1;
use coracle_proto::v1::kv_service_client::KvServiceClient;
use coracle_proto::v1::kv_service_server::{KvService, KvServiceServer};
use coracle_proto::v1::pipeline_request::Operation;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::failure::Failure;
use crate::peer::etcd::dial;
use crate::witness;
use crate::workload::{Choices, Kind, Workload, key};

/// A server that does nothing.
struct Nothing;

type Answer<T> = Result<Response<T>, Status>;

fn no<T>() -> Answer<T> {
    Err(Status::unimplemented("it only echoes"))
}

#[tonic::async_trait]
impl KvService for Nothing {
    type DeleteRangeStream = BoxStream<'static, Result<v1::DeleteRangeResponse, Status>>;
    type ScanStream = BoxStream<'static, Result<v1::ScanResponse, Status>>;
    type PipelineStream = BoxStream<'static, Result<v1::PipelineResponses, Status>>;

    async fn get(&self, _: Request<v1::GetRequest>) -> Answer<v1::GetResponse> {
        Ok(Response::new(v1::GetResponse::default()))
    }

    async fn put(&self, _: Request<v1::PutRequest>) -> Answer<v1::PutResponse> {
        Ok(Response::new(v1::PutResponse::default()))
    }

    async fn batch_get(&self, _: Request<v1::BatchGetRequest>) -> Answer<v1::BatchGetResponse> {
        no()
    }

    async fn delete(&self, _: Request<v1::DeleteRequest>) -> Answer<v1::DeleteResponse> {
        no()
    }

    async fn write(&self, _: Request<v1::WriteRequest>) -> Answer<v1::WriteResponse> {
        no()
    }

    async fn delete_range(
        &self,
        _: Request<v1::DeleteRangeRequest>,
    ) -> Answer<Self::DeleteRangeStream> {
        no()
    }

    async fn scan(&self, _: Request<v1::ScanRequest>) -> Answer<Self::ScanStream> {
        no()
    }

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequests>>,
    ) -> Answer<Self::PipelineStream> {
        let echo = |together: v1::PipelineRequests| {
            let nothing = |request: v1::PipelineRequest| v1::PipelineResponse {
                id: request.id,
                ..Default::default()
            };
            let responses = together.requests.into_iter().map(nothing).collect();
            v1::PipelineResponses { responses }
        };
        let answers = request.into_inner().map(move |together| together.map(echo));
        Ok(Response::new(answers.boxed()))
    }
}

/// Serves until the process ends.
pub async fn serve(address: SocketAddr) -> Result<(), Failure> {
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(Failure::of(format!("listen on {address}")))?;
    let service = KvServiceServer::new(Nothing).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let served = Server::builder().tcp_nodelay(true).add_service(service);
    let served = served.serve_with_incoming(TcpListenerStream::new(listener)).await;
    served.map_err(Failure::of("serve"))
}

/// How frames are sent.
#[derive(Clone, Copy, Debug)]
pub struct Frames {
    /// Streams, each on a connection of its own: one for each node.
    pub streams: usize,
    /// Frames of a stream that are unanswered.
    pub in_flight: usize,
    /// Operations of a frame.
    pub operations: usize,
    /// What they are: gets or puts.
    pub kind: Kind,
    /// How long.
    pub window: Duration,
}

/// Sends frames of a workload's operations to a server that echoes; operations a second.
pub async fn frames(
    address: SocketAddr,
    workload: &Workload,
    frames: Frames,
) -> Result<f64, Failure> {
    let mut streams = JoinSet::new();
    let began = Instant::now();
    for at in 0..frames.streams {
        let client = KvServiceClient::new(dial(address)?);
        let client = client.max_decoding_message_size(MESSAGE_BYTES_MAX);
        streams.spawn(stream_of(client, workload.choices(at), frames));
    }
    let mut done = 0;
    while let Some(stream) = streams.join_next().await {
        let stream = stream.map_err(Failure::of("echo"))?;
        done += stream.map_err(Failure::of("echo"))?;
    }
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

async fn stream_of(
    mut client: KvServiceClient<tonic::transport::Channel>,
    mut choices: Choices,
    frames: Frames,
) -> Result<u64, Status> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let next = |mut receiver: mpsc::UnboundedReceiver<v1::PipelineRequests>| async {
        receiver.recv().await.map(|frame| (frame, receiver))
    };
    for _ in 0..frames.in_flight {
        let _ = sender.send(frame(&mut choices, frames));
    }
    let mut answers = client.pipeline(stream::unfold(receiver, next)).await?.into_inner();
    let (end, mut done) = (Instant::now() + frames.window, 0);
    while Instant::now() < end {
        let Some(together) = answers.message().await? else { break };
        done += together.responses.len() as u64;
        let _ = sender.send(frame(&mut choices, frames));
    }
    Ok(done)
}

/// What a pipeline sends: keys and values as the client would, one buffer each.
fn frame(choices: &mut Choices, frames: Frames) -> v1::PipelineRequests {
    let request = |id| {
        let (number, keyspace) = (choices.number(), "default".to_owned());
        let route = Some(v1::Route { shard: 1 + number % 16, shard_epoch: 1 });
        let operation = match frames.kind {
            Kind::Get => Operation::Get(v1::GetRequest {
                keyspace,
                key: key(number),
                route,
                ..Default::default()
            }),
            _ => Operation::Put(v1::PutRequest {
                keyspace,
                key: key(number),
                value: choices.value(&witness::loaded(number)),
                request_id: Some(v1::RequestId {
                    client: u64::MAX,
                    sequence: number,
                    birth: 1_700_000_000_000,
                    lowest_unanswered: number,
                }),
                route,
                ..Default::default()
            }),
        };
        v1::PipelineRequest { id, timeout_ms: 1_000, operation: Some(operation) }
    };
    v1::PipelineRequests { requests: (0..frames.operations as u64).map(request).collect() }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::process::free_ports;
    use crate::workload::{Distribution, Mix};

    #[tokio::test]
    async fn every_operation_is_echoed() {
        let address = free_ports(Ipv4Addr::LOCALHOST.into(), 1).unwrap()[0];
        let serving = tokio::spawn(serve(address));
        let workload = Workload::new(Mix::reads(0), Distribution::Uniform, 100, 64, 1).unwrap();
        let window = Duration::from_millis(50);
        for kind in [Kind::Get, Kind::Put] {
            let plan = Frames { streams: 2, in_flight: 2, operations: 10, kind, window };
            let mut echoed = frames(address, &workload, plan).await;
            // It may not listen yet.
            while echoed.is_err() && !serving.is_finished() {
                tokio::task::yield_now().await;
                echoed = frames(address, &workload, plan).await;
            }
            assert!(echoed.unwrap() > 10.0);
        }
        serving.abort();
    }
}

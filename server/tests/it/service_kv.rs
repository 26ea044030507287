//! The services as a client meets them: over a socket, with statuses, streams, deadlines and health.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::limits::{MESSAGE_BYTES_MAX, SCAN_PAGE_BYTES};
use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::shard_map::{NodeId, ShardId};
use coracle_proto::v1;
use coracle_proto::v1::cluster_service_client::ClusterServiceClient;
use coracle_proto::v1::cluster_service_server::ClusterServiceServer;
use coracle_proto::v1::kv_service_client::KvServiceClient;
use coracle_proto::v1::kv_service_server::KvServiceServer;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_server::admission::{Call, NO_FORWARD};
use coracle_server::scan::REST_AFTER;
use coracle_server::service::cluster::{ClusterFacts, Keyspaces};
use coracle_server::service::health::{Health, reflection};
use coracle_server::service::kv::Kv;
use coracle_server::service::unsent;
use coracle_storage::exec::RealExec;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::service_nodes::{Nodes, get, key_on, pass, put, until};

/// The smallest that HTTP/2 begins with, so that a client that does not read is met soon.
const WINDOW: u32 = 65_535;

struct Taken;

impl Keyspaces for Taken {
    fn create(
        &self,
        request: v1::CreateKeyspaceRequest,
        _: Call,
    ) -> BoxFuture<'static, Result<v1::Keyspace, Fault>> {
        let exists = Fault::new(Reason::KeyspaceExists, request.name);
        Box::pin(std::future::ready(Err(exists)))
    }

    fn update(
        &self,
        request: v1::UpdateKeyspaceRequest,
        _: Call,
    ) -> BoxFuture<'static, Result<v1::Keyspace, Fault>> {
        let unknown = Fault::new(Reason::UnknownKeyspace, request.name);
        Box::pin(std::future::ready(Err(unknown)))
    }
}

/// Serves node one; the channel to it, and what it says of its health.
pub(crate) async fn serve(nodes: &Nodes) -> (Channel, Health) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = nodes.one.router.clone();
    let exec = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 1));
    let kv = KvServiceServer::new(Kv::new(router.clone(), exec))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let facts = ClusterFacts::new(router, Arc::new(Taken));
    let (health, health_service) = Health::new().await;
    let (reflection, older) = reflection();
    let routes = Routes::new(kv)
        .add_service(ClusterServiceServer::new(facts))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(older);
    let routes = unsent::counted(routes, nodes.one.router.admission());
    let server = Server::builder().add_routes(routes);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let endpoint =
        endpoint.initial_stream_window_size(WINDOW).initial_connection_window_size(16 * WINDOW);
    (endpoint.connect().await.unwrap(), health)
}

fn with_header<T>(message: T, name: &'static str, value: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(name, value.parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn unary_calls_answer_and_faults_arrive_whole() {
    let nodes = Nodes::start().await;
    let (channel, _) = serve(&nodes).await;
    let mut kv = KvServiceClient::new(channel);
    for shard in [1, 4] {
        let key = key_on(shard);
        let written = kv.put(put(&key, "v")).await.unwrap().into_inner();
        let found = kv.get(get(&key)).await.unwrap().into_inner();
        assert_eq!(found.entry.unwrap().version, written.version);
    }
    let refused = kv.get(get("")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(Fault::from_status(&refused).reason, Reason::InvalidArgument);
    let here = with_header(get(&key_on(4)), NO_FORWARD, "1");
    let fault = Fault::from_status(&kv.get(here).await.unwrap_err());
    assert_eq!((fault.reason, fault.outcome), (Reason::NotLeader, Outcome::NotApplied));
    let nonsense = with_header(get("k"), "grpc-timeout", "soon");
    assert_eq!(kv.get(nonsense).await.unwrap_err().code(), Code::InvalidArgument);
    let counted = nodes.one.metrics.render();
    assert!(counted.contains(r#"coracle_requests_total{method="Put",code="OK",reason=""} 2"#));
    assert!(counted.contains(r#"code="UNAVAILABLE",reason="NOT_LEADER""#), "{counted}");
    assert!(counted.contains("coracle_requests_in_flight 0"));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passed_deadline_is_told_with_its_reason_and_not_as_cancelled() {
    let nodes = Nodes::start().await;
    let (channel, _) = serve(&nodes).await;
    let mut kv = KvServiceClient::new(channel);
    nodes.wires.cut.store(true, std::sync::atomic::Ordering::SeqCst);
    let late = with_header(put(&key_on(4), "v"), "grpc-timeout", "300m");
    let status = kv.put(late).await.unwrap_err();
    let fault = Fault::from_status(&status);
    assert_ne!(status.code(), Code::Cancelled, "{status}");
    assert_eq!(fault.outcome, Outcome::Unknown, "{fault}");
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipeline_answers_every_operation_and_ends_when_the_node_drains() {
    let nodes = Nodes::start().await;
    let (channel, _) = serve(&nodes).await;
    let mut kv = KvServiceClient::new(channel);
    let operation = |id: u64| {
        let key = format!("key-{}", id / 2);
        let operation = match id % 2 {
            _ if id == 77 => Some(Operation::Get(get(""))),
            _ if id == 78 => None,
            0 => Some(Operation::Put(put(&key, "v"))),
            _ => Some(Operation::Get(get(&key))),
        };
        v1::PipelineRequest { id, timeout_ms: 5_000, operation }
    };
    // Stays open: only the drain ends it.
    let together =
        |ids: std::ops::Range<u64>| v1::PipelineRequests { requests: ids.map(operation).collect() };
    let asked = [together(0..1), together(1..1_025), together(1_025..2_000)];
    let asked = stream::iter(asked).chain(stream::pending());
    let answers = kv.pipeline(asked).await.unwrap().into_inner();
    let mut answers = answers.flat_map(|together| stream::iter(together.unwrap().responses));
    let mut seen = vec![false; 2_000];
    for _ in 0..2_000 {
        let answer = answers.next().await.unwrap();
        assert!(!std::mem::replace(&mut seen[answer.id as usize], true), "answered once");
        match (answer.id, answer.result.unwrap()) {
            (77, Answer::Error(error)) => assert_eq!(error.reason, "INVALID_ARGUMENT"),
            (78, Answer::Error(error)) => assert_eq!(error.reason, "UNSUPPORTED"),
            (id, Answer::Put(put)) => assert!(id % 2 == 0 && put.applied),
            (id, Answer::Get(_)) => assert_eq!(id % 2, 1),
            (id, other) => panic!("{id}: {other:?}"),
        }
    }
    nodes.one.draining.cancel();
    assert!(answers.next().await.is_none());
    assert_eq!(nodes.one.router.admission().in_flight(), (0, 0));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scan_streams_pages_and_one_that_is_dropped_holds_nothing() {
    let nodes = Nodes::start().await;
    let (channel, _) = serve(&nodes).await;
    let mut kv = KvServiceClient::new(channel);
    for number in 0..100 {
        nodes.one.put(put(&format!("k{number:03}"), &"v".repeat(1_000))).await.unwrap();
    }
    let request = v1::ScanRequest { page_bytes: 16 << 10, ..Default::default() };
    let pages = kv.scan(request.clone()).await.unwrap().into_inner();
    let pages: Vec<_> = pages.map(Result::unwrap).collect().await;
    assert!(pages.len() > 1);
    assert_eq!(pages.iter().map(|page| page.entries.len()).sum::<usize>(), 100);
    let mut dropped = kv.scan(request).await.unwrap().into_inner();
    dropped.next().await.unwrap().unwrap();
    drop(dropped);
    let admission = nodes.one.router.admission().clone();
    crate::service_nodes::until(|| admission.in_flight() == (0, 0)).await;
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn map_is_watched_with_its_leaders() {
    let nodes = Nodes::start().await;
    let (channel, _) = serve(&nodes).await;
    let mut cluster = ClusterServiceClient::new(channel);
    let map = cluster.get_map(v1::GetMapRequest {}).await.unwrap().into_inner().map.unwrap();
    assert!(map.epoch == 1 && map.server_time_ms > 0);
    let names = cluster.list_keyspaces(v1::ListKeyspacesRequest {}).await.unwrap().into_inner();
    let names: Vec<_> = names.keyspaces.into_iter().map(|keyspace| keyspace.name).collect();
    assert_eq!(names, ["default", "rows", "system"]);

    let watch = v1::WatchMapRequest { from_epoch: 0 };
    let mut watched = cluster.watch_map(watch).await.unwrap().into_inner();
    assert_eq!(watched.next().await.unwrap().unwrap().map.unwrap().epoch, 1);
    let watch = v1::WatchMapRequest { from_epoch: 1 };
    let mut newer = cluster.watch_map(watch).await.unwrap().into_inner();
    let nothing = tokio::time::timeout(Duration::from_millis(50), newer.next()).await;
    assert!(nothing.is_err(), "the caller has this map");
    assert!(nodes.one.map.observe_leader(ShardId(3), 4, NodeId(2)));
    for follower in [&mut watched, &mut newer] {
        let map = follower.next().await.unwrap().unwrap().map.unwrap();
        let shard = map.shards.iter().find(|shard| shard.id == 3).unwrap();
        assert_eq!((map.epoch, shard.leader_node, shard.leader_term), (1, 2, 4));
    }
    nodes.one.draining.cancel();
    assert!(watched.next().await.is_none());

    let create = v1::CreateKeyspaceRequest { name: "UPPER".into(), ..Default::default() };
    assert_eq!(cluster.create_keyspace(create).await.unwrap_err().code(), Code::InvalidArgument);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_what_the_node_says() {
    let nodes = Nodes::start().await;
    let (channel, health) = serve(&nodes).await;
    let mut client = HealthClient::new(channel);
    let mut ask = async |service: &str| {
        let request = HealthCheckRequest { service: service.to_owned() };
        client.check(request).await.unwrap().into_inner().status
    };
    let (serving, not_serving) = (1, 2);
    assert_eq!((ask("").await, ask("liveness").await), (serving, serving));
    assert_eq!(ask("readiness").await, not_serving);
    health.set_ready(true).await;
    assert_eq!(ask("readiness").await, serving);
    assert_eq!(ask("coracle.v1.KvService").await, serving);
    nodes.stop().await;
}

#[tokio::test]
async fn scan_whose_reader_stops_holds_two_pages_that_are_counted_until_they_are_sent() {
    let nodes = Nodes::start().await;
    let (channel, _) = serve(&nodes).await;
    let mut kv = KvServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let value = "v".repeat(64 << 10);
    let keys: Vec<String> = (0..100).map(|number| format!("k{number:03}")).collect();
    for key in &keys {
        nodes.one.put(put(key, &value)).await.unwrap();
    }
    let admission = nodes.one.router.admission().clone();
    let mut pages = kv.scan(v1::ScanRequest::default()).await.unwrap().into_inner();
    let mut found = vec![pages.message().await.unwrap().unwrap()];
    // Beside the pages in the connection's buffer nothing is left, and no request is in flight.
    let most = 2 * (SCAN_PAGE_BYTES as u64 + (64 << 10));
    until(|| admission.in_flight().0 == 0).await;
    pass(2 * REST_AFTER).await;
    // It stays so: what was read ahead is gone, and would be of about the same size.
    let (mut looks, mut held) = (0, 0);
    until(|| {
        let now = admission.in_flight().1;
        looks = if now <= most && now == held { looks + 1 } else { 0 };
        held = now;
        looks >= 100
    })
    .await;
    assert!(held > SCAN_PAGE_BYTES as u64, "{held} bytes in the connection's buffer");
    while let Some(page) = pages.message().await.unwrap() {
        found.push(page);
    }
    let found: Vec<_> = found.iter().flat_map(|page| &page.entries).collect();
    assert!(found.iter().map(|found| &found.key).eq(keys.iter().map(|key| key.as_bytes())));
    until(|| admission.in_flight() == (0, 0) && admission.scans_open() == 0).await;
    // Who goes away without a word frees all that was held.
    let mut pages = kv.scan(v1::ScanRequest::default()).await.unwrap().into_inner();
    pages.message().await.unwrap().unwrap();
    assert_eq!(admission.scans_open(), 1);
    drop((pages, kv));
    until(|| admission.in_flight() == (0, 0) && admission.scans_open() == 0).await;
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipeline_whose_answers_nobody_takes_ends_its_requests_and_counts_the_answers() {
    const COUNT: u64 = 120;
    let nodes = Nodes::start().await;
    let (channel, _) = serve(&nodes).await;
    let mut kv = KvServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let key = key_on(1);
    nodes.one.put(put(&key, &"v".repeat(100 << 10))).await.unwrap();
    let operation = move |id: u64| {
        let operation = Some(Operation::Get(get(&key)));
        v1::PipelineRequest { id, timeout_ms: 5_000, operation }
    };
    let requests = v1::PipelineRequests { requests: (1..=COUNT).map(operation).collect() };
    let mut answers = kv.pipeline(stream::iter([requests])).await.unwrap().into_inner();
    let mut found = answers.message().await.unwrap().unwrap().responses;
    let admission = nodes.one.router.admission().clone();
    let served =
        format!("coracle_requests_total{{method=\"Get\",code=\"OK\",reason=\"\"}} {COUNT}");
    until(|| nodes.one.metrics.render().contains(&served)).await;
    until(|| admission.in_flight().0 == 0).await;
    let held = admission.in_flight().1;
    assert!(held > (COUNT - 20) * (100 << 10), "{held} bytes wait for their caller");
    while let Some(together) = answers.message().await.unwrap() {
        found.extend(together.responses);
    }
    assert!(found.iter().all(|answer| matches!(answer.result, Some(Answer::Get(_)))));
    let mut ids: Vec<u64> = found.iter().map(|answer| answer.id).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(1..=COUNT));
    until(|| admission.in_flight() == (0, 0)).await;
    nodes.stop().await;
}

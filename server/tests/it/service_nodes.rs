//! Two nodes in one process, for the tests of the request path: real groups of one replica each, four
//! shards of which each node holds two, and a way between the nodes that can lose answers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::ring::equal_arcs;
use coracle_proto::shard_map::{NodeId, ShardId, ShardMap};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_raft::clock::Clock;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::GroupError;
use coracle_raft::host::{Host, LogBudget, Options};
use coracle_raft::leadership::Standing;
use coracle_raft::lease::Timing;
use coracle_raft::observer::{Observer, Stage};
use coracle_raft::transport::{Address, Answering, Lane, Transport, TransportError};
use coracle_server::admission::{Admission, Call};
use coracle_server::load::Loads;
use coracle_server::map::{MapCache, MapSource};
use coracle_server::metrics::{Build, Metrics};
use coracle_server::router::{ForwardError, Forwarder, Parts, RequestIds, Router, WriteGate};
use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::{Fs, RealFs};
use coracle_storage::log::Log;
use coracle_storage::state::MapEngines;
use coracle_storage::{LogOptions, ReplicaId};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) const SEED: u64 = 7;

/// The wall clock of all nodes; a test may move it on.
#[derive(Default)]
pub(crate) struct TestClock(AtomicU64);

impl TestClock {
    pub(crate) fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now_ms(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.expect("after 1970").as_millis() as u64 + self.0.load(Ordering::SeqCst)
    }

    fn check(&self) -> Result<(), GroupError> {
        Ok(())
    }
}

/// Groups of one replica have nobody to ask.
struct Nobody;

impl Transport for Nobody {
    fn ask(&self, _: Address, _: Lane, _: Bytes, _: Duration) -> Answering {
        let error = TransportError::Unreachable("groups of one replica ask nobody".to_owned());
        Box::pin(std::future::ready(Err(error)))
    }
}

/// Nobody looks at where these groups spend their time.
struct Deaf;

impl Observer for Deaf {
    fn stage(&self, _: Stage, _: Duration) {}

    fn elected(&self) {}
}

/// The way between the nodes.
#[derive(Default)]
pub(crate) struct Wires {
    routers: Mutex<BTreeMap<NodeId, Arc<Router>>>,
    /// Answers that are lost from now on: the requests are served.
    pub(crate) lose: AtomicUsize,
    /// Nothing comes through.
    pub(crate) cut: AtomicBool,
    pub(crate) forwards: AtomicUsize,
    /// How long pages of scans are on their way.
    pub(crate) page_delay_ms: AtomicU64,
    /// The lowest unanswered sequence that the last put on its way has named.
    pub(crate) last_mark: AtomicU64,
}

struct Wire {
    from: NodeId,
    wires: Arc<Wires>,
}

impl Forwarder for Wire {
    fn forward(
        &self,
        to: NodeId,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, ForwardError>> {
        let (from, wires) = (self.from, self.wires.clone());
        let lost = |why: String| ForwardError::Lost(why);
        Box::pin(async move {
            wires.forwards.fetch_add(1, Ordering::SeqCst);
            let request = v1::PipelineRequest::decode(body.clone()).expect("what nodes send");
            if let Some(Operation::Put(v1::PutRequest { request_id: Some(id), .. })) =
                request.operation
            {
                wires.last_mark.store(id.lowest_unanswered, Ordering::SeqCst);
            }
            let router = wires.routers.lock().get(&to).cloned();
            let cut = wires.cut.load(Ordering::SeqCst);
            let router =
                router.filter(|_| !cut).ok_or(ForwardError::Lost("no such wire".to_owned()))?;
            let delay = match v1::PipelineRequest::decode(body.clone()).map(|it| it.operation) {
                Ok(Some(Operation::Scan(_))) => wires.page_delay_ms.load(Ordering::SeqCst),
                _ => 0,
            };
            let served = async {
                tokio::time::sleep(Duration::from_millis(delay)).await;
                router.serve_forwarded(from, body).await
            };
            let answer = tokio::time::timeout(timeout, served)
                .await
                .map_err(|_| lost("too late".to_owned()))?
                .map_err(lost)?;
            let lose = |left: usize| left.checked_sub(1);
            match wires.lose.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lose) {
                Ok(_) => Err(lost("the answer was lost".to_owned())),
                Err(_) => Ok(answer),
            }
        })
    }
}

/// A newer map that a refresh finds, once.
#[derive(Default)]
pub(crate) struct Source {
    pub(crate) newer: Mutex<Option<v1::ShardMap>>,
    pub(crate) asked: AtomicUsize,
    cache: Arc<MapCache>,
}

impl MapSource for Source {
    fn refresh(&self) -> BoxFuture<'static, ()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if let Some(map) = self.newer.lock().take() {
            self.cache.update_from_proto(&map).expect("a valid map");
        }
        Box::pin(std::future::ready(()))
    }
}

/// A disk that is full when the test says so.
#[derive(Default)]
pub(crate) struct Gate(pub(crate) AtomicBool);

impl WriteGate for Gate {
    fn check(&self, _: ShardId, only_deletes: bool) -> Result<(), Fault> {
        if self.0.load(Ordering::SeqCst) && !only_deletes {
            return Err(Fault::new(Reason::DiskFull, "a voter's disk is under its reserve"));
        }
        Ok(())
    }
}

pub(crate) struct Node {
    pub(crate) router: Arc<Router>,
    pub(crate) map: Arc<MapCache>,
    pub(crate) source: Arc<Source>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) draining: CancellationToken,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) host: Arc<Host>,
    log: Log,
    stop: CancellationToken,
}

/// Node 1 holds shards 1 and 2, node 2 holds 3 and 4.
pub(crate) struct Nodes {
    pub(crate) one: Node,
    pub(crate) two: Node,
    pub(crate) wires: Arc<Wires>,
    pub(crate) clock: Arc<TestClock>,
    _dir: tempfile::TempDir,
}

/// The map: four shards, the keyspaces `system`, `default` (whole keys) and `rows` (entity up to `/`).
pub(crate) fn shard_map(epoch: u64) -> v1::ShardMap {
    let replica =
        |shard: u64, node| v1::Replica { id: 100 + shard, node, role: 1, ..Default::default() };
    let mut shards =
        vec![v1::Shard { id: 0, epoch: 1, replicas: vec![replica(0, 1)], ..Default::default() }];
    for (id, arc) in (1..).zip(equal_arcs(4)) {
        let replicas = vec![replica(id, if id <= 2 { 1 } else { 2 })];
        let (start, end) = (arc.start().0, arc.end());
        shards.push(v1::Shard { id, start, end, epoch: 1, replicas, ..Default::default() });
    }
    let whole = v1::entity_rule::Kind::Whole(v1::WholeKey {});
    let row = v1::entity_rule::Kind::Delimiter(u32::from(b'/'));
    let keyspaces = [(0, "system", whole), (1, "default", whole), (2, "rows", row)];
    let keyspace = |(id, name, kind): (u32, &str, _)| v1::Keyspace {
        id,
        name: name.to_owned(),
        entity_rule: Some(v1::EntityRule { kind: Some(kind) }),
        history_ms: 60_000,
        revision: 0,
    };
    let node = |id: u64| v1::Node {
        id,
        address: format!("node-{id}:7400"),
        peer_address: format!("node-{id}:7401"),
        state: v1::NodeState::Active.into(),
        ..Default::default()
    };
    v1::ShardMap {
        cluster_id: "test".to_owned(),
        hash_seed: SEED,
        epoch,
        shards,
        nodes: vec![node(1), node(2)],
        keyspaces: keyspaces.map(keyspace).to_vec(),
        server_time_ms: 0,
        read_replicas: Vec::new(),
        replicas: 0,
    }
}

impl Nodes {
    /// Both nodes, with every shard led.
    pub(crate) async fn start() -> Nodes {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let (wires, clock) = (Arc::new(Wires::default()), Arc::new(TestClock::default()));
        let one = start(1, dir.path(), &wires, &clock).await;
        let two = start(2, dir.path(), &wires, &clock).await;
        Nodes { one, two, wires, clock, _dir: dir }
    }

    pub(crate) async fn stop(self) {
        for node in [self.one, self.two] {
            node.stop.cancel();
            node.host.shutdown().await;
            node.log.close();
        }
    }
}

async fn start(id: u64, dir: &Path, wires: &Arc<Wires>, clock: &Arc<TestClock>) -> Node {
    let dir = dir.join(id.to_string());
    let exec: Arc<dyn Exec> = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 8));
    let fs: Arc<dyn Fs> = Arc::new(RealFs);
    let options = LogOptions { segment_bytes: 1 << 20, ..LogOptions::default() };
    let (log, recovery) =
        Log::open(fs.clone(), exec.clone(), &dir.join("log"), options).expect("the log opens");
    let stop = CancellationToken::new();
    let clock: Arc<dyn Clock> = clock.clone();
    let host = Host::new(Options {
        shards: dir.join("shards"),
        timing: Timing::default(),
        log: log.clone(),
        log_budget: LogBudget { disk_bytes: 64 << 20, index_bytes: 8 << 20 },
        engines: Arc::new(MapEngines::new(fs)),
        exec,
        clock: clock.clone(),
        transport: Arc::new(Nobody),
        observer: Arc::new(Deaf),
        incarnation: 1,
        stop: stop.clone(),
        on_hang: Arc::new(|| panic!("the disk hangs")),
    });
    host.open_all(&recovery).await.expect("there is nothing yet");
    let node = NodeId(id);
    let map = ShardMap::from_proto(&shard_map(1)).expect("a valid map");
    for shard in map.shards().iter().filter(|shard| shard.replica_on(node).is_some()) {
        let arc = shard.arc.map(|arc| (arc.start().0, arc.end()));
        let initial = Descriptor { shard: shard.id.0, arc, epoch: shard.epoch.0 };
        let replica = ReplicaId(shard.replicas[0].id.0);
        let group = host.create(replica, initial).await.expect("a fresh replica");
        group.initialize([(replica.0, node)].into()).await.expect("the only replica");
        until(|| group.status().state == Standing::Leader && group.descriptor().is_some()).await;
    }
    let cache = MapCache::new();
    cache.update(map).expect("the first map");
    let source = Arc::new(Source { cache: cache.clone(), ..Source::default() });
    let (gate, draining) = (Arc::new(Gate::default()), CancellationToken::new());
    let metrics = Metrics::new(&Build::default());
    let router = Router::new(Parts {
        node,
        map: cache.clone(),
        source: source.clone(),
        host: host.clone(),
        forwarder: Arc::new(Wire { from: node, wires: wires.clone() }),
        clock: clock.clone(),
        gate: gate.clone(),
        ids: RequestIds::new(1000 + id, clock),
        admission: Admission::new(4_000, 64 << 20, draining.clone()),
        metrics: metrics.clone(),
        loads: Loads::new(),
        slow: Duration::from_secs(60),
    });
    wires.routers.lock().insert(node, router.clone());
    Node { router, map: cache, source, gate, draining, metrics, host, log, stop }
}

/// Polls until it holds.
pub(crate) async fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "it does not come true");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Lets time pass for all timers at once, of a runtime of one thread.
pub(crate) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

impl Node {
    pub(crate) async fn ask(&self, operation: Operation) -> Result<Answer, Fault> {
        self.router.execute(operation, &Call::client(None)).await
    }

    pub(crate) async fn put(&self, request: v1::PutRequest) -> Result<v1::PutResponse, Fault> {
        match self.ask(Operation::Put(request)).await? {
            Answer::Put(answer) => Ok(answer),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn get(&self, request: v1::GetRequest) -> Result<v1::GetResponse, Fault> {
        match self.ask(Operation::Get(request)).await? {
            Answer::Get(answer) => Ok(answer),
            other => panic!("{other:?}"),
        }
    }

    /// Has a shard's group take in a read replica that nobody has. Returns the group's epoch.
    pub(crate) async fn add_learner(&self, shard: u64) -> u64 {
        let group = self.host.group(ShardId(shard)).expect("it is here");
        let deadline = Instant::now() + Duration::from_secs(20);
        let added = group.add_learner(ReplicaId(900 + shard), NodeId(9), 1, deadline).await;
        added.expect("a healthy group")
    }

    /// The value of a key of `default`.
    pub(crate) async fn value(&self, key: &str) -> Option<String> {
        let answer = self.get(get(key)).await.expect("a read");
        answer.entry.map(|entry| String::from_utf8_lossy(&entry.value).into_owned())
    }
}

pub(crate) fn get(key: &str) -> v1::GetRequest {
    v1::GetRequest { key: key.to_owned().into(), ..Default::default() }
}

pub(crate) fn put(key: &str, value: &str) -> v1::PutRequest {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    v1::PutRequest { key, value, ..Default::default() }
}

/// The shard that holds a key of a keyspace.
pub(crate) fn shard_of(keyspace: &str, key: &str) -> u64 {
    let map = ShardMap::from_proto(&shard_map(1)).expect("a valid map");
    let keyspace = map.keyspace(keyspace).expect("one of the three");
    map.locate_key(keyspace, key.as_bytes()).id.0
}

/// A key of `default` that lives on this shard.
pub(crate) fn key_on(shard: u64) -> String {
    let keys = (0..).map(|number| format!("key-{number}"));
    keys.into_iter().find(|key| shard_of("", key) == shard).expect("every shard has keys")
}

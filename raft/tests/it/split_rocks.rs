//! A split on RocksDB and real files, one replica each. Finds a child whose store does not open, one that lacks
//! what was in the write buffer, keys that stay behind for ever, and a median that halves nothing.

#![allow(clippy::disallowed_methods, reason = "this host runs on the real seams")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::apply::Outcome;
use coracle_raft::clock::Clock;
use coracle_raft::command::{Change, Operation, Request, RequestId};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::group::{Group, SplitPlan};
use coracle_raft::host::{Host, LogBudget, Options};
use coracle_raft::lease::Timing;
use coracle_raft::state_machine::ReadState;
use coracle_raft::transport::{Address, Answering, Lane, Transport, TransportError};
use coracle_raft::types::{NodeId, ShardId};
use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::{Fs, RealFs};
use coracle_storage::log::Log;
use coracle_storage::state::{Engines, Kind, OpenState, RocksEngines, StateOptions};
use coracle_storage::{LogOptions, ReplicaId};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Deaf, WallClock};
use crate::members::{soon, until};
use crate::ring_rig::{AT, CHILD, KEYSPACE, position, rules};

struct Nobody;

impl Transport for Nobody {
    fn ask(&self, _: Address, _: Lane, _: Bytes, _: Duration) -> Answering {
        let error = TransportError::Unreachable("there is nobody else".to_owned());
        Box::pin(std::future::ready(Err(error)))
    }
}

struct Node {
    host: Arc<Host>,
    log: Log,
    stop: CancellationToken,
}

async fn start(dir: &Path, engines: Arc<dyn Engines>, count: u64) -> Node {
    let exec: Arc<dyn Exec> = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 8));
    let fs: Arc<dyn Fs> = Arc::new(RealFs);
    let options = LogOptions { segment_bytes: 1 << 20, ..LogOptions::default() };
    let (log, recovery) =
        Log::open(fs, exec.clone(), &dir.join("log"), options).expect("the log opens");
    let stop = CancellationToken::new();
    let host = Host::new(Options {
        shards: dir.join("shards"),
        timing: Timing::default(),
        log: log.clone(),
        log_budget: LogBudget { disk_bytes: 64 << 20, index_bytes: 8 << 20 },
        engines,
        exec,
        clock: Arc::new(WallClock),
        transport: Arc::new(Nobody),
        observer: Arc::new(Deaf),
        incarnation: count,
        stop: stop.clone(),
        on_hang: Arc::new(|| panic!("the disk hangs")),
    });
    host.open_all(&recovery).await.expect("all replicas open");
    Node { host, log, stop }
}

impl Node {
    async fn end(self) {
        self.stop.cancel();
        self.host.shutdown().await;
        for group in self.host.groups() {
            drop(group);
        }
        self.log.close();
    }

    async fn leading(&self, shard: ShardId) -> Arc<Group> {
        until("it leads", || self.host.group(shard).is_some_and(|group| group.leads())).await;
        self.host.group(shard).expect("just seen")
    }
}

fn key(n: u32) -> String {
    format!("k{n:04}")
}

async fn put(group: &Group, n: u32) {
    let value = Bytes::from(format!("{n:0>200}"));
    let operation =
        Operation { key: key(n).into(), condition: None, change: Change::Put { value, ttl_ms: 0 } };
    let sequence = u64::from(n) + 1;
    let request = Request {
        id: RequestId { client: 7, sequence, birth_ms: WallClock.now_ms(), lowest_unanswered: 1 },
        keyspace: KEYSPACE,
        position: position(&key(n)),
        epoch: 0,
        operations: vec![operation],
    };
    let written = group.write(request, soon()).await.expect("it leads");
    assert!(matches!(written.reply.outcome, Outcome::Applied { .. }), "{written:?}");
}

/// The keys that a store holds, whoever owns them.
async fn stored(group: &Group) -> Vec<String> {
    let look = |state: &ReadState| {
        let view = state.reader.view();
        let mut cursor = view.seek(Kind::Data.range(), false).expect("readable");
        let mut keys = Vec::new();
        while let Some((physical, _)) = cursor.next().expect("readable") {
            let found = coracle_storage::state::Key::decode(&physical);
            let Some(coracle_storage::state::Key::Data { key, .. }) = found else { panic!("data") };
            keys.push(String::from_utf8(key).expect("our own"));
        }
        keys
    };
    group.read_local(0, soon(), look).await.expect("it runs")
}

async fn splits_and_comes_back(engines: impl Fn() -> Arc<dyn Engines>, survives: bool) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut node = start(dir.path(), engines(), 1).await;
    let initial = Descriptor { shard: 1, arc: Some((0, 0)), epoch: 1 };
    let group = node.host.create(ReplicaId(11), initial).await.expect("a new replica");
    group.initialize(BTreeMap::from([(11, NodeId(1))])).await.expect("a new group");
    drop(group);
    let group = node.leading(ShardId(1)).await;
    until("it is described", || group.descriptor().is_some()).await;
    for n in 0..300 {
        put(&group, n).await;
    }
    let points = group.split_points(rules()).await.expect("it can be looked at");
    let by_size = points.by_size.expect("many entities");
    let below = (0..300).filter(|n| position(&key(*n)) < by_size).count();
    assert!((100..200).contains(&below), "{below} of 300 below the median");
    assert_eq!(points.load.iter().map(|bucket| bucket.writes).sum::<u64>(), 300);
    let plan = SplitPlan {
        epoch: group.descriptor().expect("described").epoch,
        at: AT,
        child: CHILD,
        replicas: BTreeMap::from([(ReplicaId(11), ReplicaId(21))]),
        rules: rules(),
    };
    group.split(plan, soon()).await.expect("as it was planned");
    drop(group);
    let all: Vec<String> = (0..300).map(key).collect();
    let (lower, upper): (Vec<_>, Vec<_>) = all.into_iter().partition(|key| position(key) < AT);
    if survives {
        node.leading(CHILD).await;
        node.end().await;
        // A process that ends lets go of its files at once; here the last tasks do in their own time.
        let again = engines();
        for replica in [11, 21] {
            let store = dir.path().join(format!("shards/{replica:016x}"));
            let free = || again.open(&store, OpenState { create: false }).is_ok();
            until("nobody holds the store", free).await;
        }
        node = start(dir.path(), again, 2).await;
    }
    for (shard, own) in [(ShardId(1), &lower), (CHILD, &upper)] {
        let group = node.leading(shard).await;
        let all = stored(&group).await;
        assert!(own.iter().all(|key| all.contains(key)), "{shard} lacks keys");
        // In its own time: nobody reads them.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            let found = stored(&group).await;
            if found == *own {
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "{shard} keeps {}", found.len());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(node.host.failed(), Vec::<String>::new());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_disk() {
    let engines = || -> Arc<dyn Engines> {
        let engines = RocksEngines::on_disk(&StateOptions::test_min(), Arc::new(|_| {}));
        Arc::new(engines.expect("options that fit"))
    };
    splits_and_comes_back(engines, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_memory() {
    let engines = || -> Arc<dyn Engines> {
        let options = StateOptions::test_min();
        let engines = RocksEngines::in_memory(&options, Arc::new(RealFs), Arc::new(|_| {}));
        Arc::new(engines.expect("options that fit"))
    };
    splits_and_comes_back(engines, false).await;
}

//! What nobody can read any more leaves the disk: a whole group on RocksDB, with a clock that the test
//! moves. Finds what is between the rules of `history`, the flush, and the compaction.

#![allow(clippy::disallowed_methods, reason = "this host runs on the real seams")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::apply::Outcome;
use coracle_raft::clock::Clock;
use coracle_raft::command::{Change, Operation, Request, RequestId};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::GroupError;
use coracle_raft::group::Group;
use coracle_raft::history::Settings;
use coracle_raft::host::{Host, LogBudget, Options};
use coracle_raft::leadership::Standing;
use coracle_raft::lease::Timing;
use coracle_raft::transport::{Address, Answering, Lane, Transport, TransportError};
use coracle_raft::types::NodeId;
use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::RealFs;
use coracle_storage::log::Log;
use coracle_storage::state::{RocksEngines, StateOptions, key};
use coracle_storage::{LogOptions, ReplicaId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Deaf, SHARD, WallClock};

const KEYS: u64 = 300;
const ROUNDS: u64 = 6;
const VALUE_BYTES: usize = 4 << 10;

#[derive(Default)]
struct MovedClock(AtomicU64);

impl Clock for MovedClock {
    fn now_ms(&self) -> u64 {
        WallClock.now_ms() + self.0.load(Ordering::SeqCst)
    }

    fn check(&self) -> Result<(), GroupError> {
        Ok(())
    }
}

struct Nobody;

impl Transport for Nobody {
    fn ask(&self, _: Address, _: Lane, _: Bytes, _: Duration) -> Answering {
        let error = TransportError::Unreachable("a group of one replica".to_owned());
        Box::pin(std::future::ready(Err(error)))
    }
}

struct Rig {
    host: Arc<Host>,
    group: Arc<Group>,
    clock: Arc<MovedClock>,
    log: Log,
    stop: CancellationToken,
    sequence: u64,
}

async fn start(dir: &Path) -> Rig {
    let exec: Arc<dyn Exec> = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 4));
    let options = LogOptions { segment_bytes: 1 << 20, ..LogOptions::default() };
    let (log, recovery) =
        Log::open(Arc::new(RealFs), exec.clone(), &dir.join("log"), options).expect("a new log");
    let on_fatal = Arc::new(|error: &coracle_storage::Error| panic!("in the background: {error}"));
    let engines = RocksEngines::on_disk(&StateOptions::test_min(), on_fatal).expect("they fit");
    let (clock, stop) = (Arc::new(MovedClock::default()), CancellationToken::new());
    let host = Host::new(Options {
        shards: dir.join("shards"),
        timing: Timing::default(),
        log: log.clone(),
        log_budget: LogBudget { disk_bytes: 64 << 20, index_bytes: 8 << 20 },
        engines: Arc::new(engines),
        exec,
        clock: clock.clone(),
        transport: Arc::new(Nobody),
        observer: Arc::new(Deaf),
        incarnation: 1,
        stop: stop.clone(),
        on_hang: Arc::new(|| panic!("the disk hangs")),
    });
    host.open_all(&recovery).await.expect("there is nothing yet");
    let initial = Descriptor { shard: SHARD.0, arc: Some((0, 0)), epoch: 1 };
    let group = host.create(ReplicaId(1), initial).await.expect("a new replica");
    group.initialize(BTreeMap::from([(1, NodeId(1))])).await.expect("the only replica");
    let until = Instant::now() + Duration::from_secs(20);
    while group.status().state != Standing::Leader || group.descriptor().is_none() {
        assert!(Instant::now() < until, "it does not lead itself");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Rig { host, group, clock, log, stop, sequence: 0 }
}

impl Rig {
    fn advance(&self, by: Duration) {
        self.clock.0.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }

    async fn write(&mut self, keyspace: u32, number: u64, change: Change) {
        self.sequence += 1;
        let id = RequestId {
            client: 7,
            sequence: self.sequence,
            birth_ms: self.clock.now_ms(),
            lowest_unanswered: self.sequence,
        };
        let key = Bytes::from(format!("k{number:04}"));
        let operations = vec![Operation { key, condition: None, change }];
        let request = Request { id, keyspace, position: 5, epoch: 0, operations };
        let deadline = Instant::now() + Duration::from_secs(20);
        let written = self.group.write(request, deadline).await.expect("a healthy group");
        assert!(matches!(written.reply.outcome, Outcome::Applied { .. }), "{written:?}");
    }

    /// Writes every key of a keyspace over and over; then a third is deleted, and a third expires.
    async fn fill(&mut self, keyspace: u32) {
        for round in 0..ROUNDS {
            for number in 0..KEYS {
                // Nothing that a compression finds anything in.
                let mut seed = keyspace as u64 * 1_000_003 + round * 997 + number + 1;
                let byte = |_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (seed >> 33) as u8
                };
                let value: Bytes = (0..VALUE_BYTES).map(byte).collect::<Vec<u8>>().into();
                let expires = round + 1 == ROUNDS && number % 3 == 1;
                let ttl_ms = if expires { 1_000 } else { 0 };
                self.write(keyspace, number, Change::Put { value, ttl_ms }).await;
            }
        }
        for number in (0..KEYS).filter(|number| number % 3 == 2) {
            self.write(keyspace, number, Change::Delete).await;
        }
    }

    /// Stored versions of a keyspace, delete markers and all.
    async fn versions(&self, keyspace: u32) -> usize {
        let deadline = Instant::now() + Duration::from_secs(20);
        let count = self.group.read(deadline, move |state| {
            let range = key::data_range(keyspace, b"", None);
            let view = state.reader.view();
            let mut cursor = view.seek(range, false).expect("readable");
            std::iter::from_fn(|| cursor.next().expect("readable")).count()
        });
        count.await.expect("a healthy group")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_can_read_any_more_leaves_the_disk() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut rig = start(dir.path()).await;
    let settings = Settings { keyspace: 2, history_ms: 3_600_000, revision: 1 };
    rig.group.adopt(vec![settings]).await.expect("a healthy group");
    rig.fill(1).await;
    rig.fill(2).await;
    let all = (ROUNDS * KEYS + KEYS / 3) as usize;

    // Within the history everything is there, whatever is compacted.
    let first = rig.host.reclaim(rig.group.clone()).await.expect("a healthy group");
    assert_eq!((rig.versions(1).await, rig.versions(2).await), (all, all), "{first:?}");

    // Beyond that of the first keyspace: of it a third of the keys is left, with one version each.
    // Nothing has been written meanwhile, so the group's clock moves by the question alone.
    rig.advance(Duration::from_secs(120));
    let second = rig.host.reclaim(rig.group.clone()).await.expect("a healthy group");
    assert_eq!((rig.versions(1).await, rig.versions(2).await), ((KEYS / 3) as usize, all));
    println!("one keyspace's history has passed: {second:?}");
    let value = VALUE_BYTES as u64;
    assert!(second.before >= 2 * ROUNDS * KEYS * value, "{second:?}");
    let gone = (ROUNDS * KEYS - KEYS / 3) * value;
    assert!(second.after + gone <= second.before, "{second:?}");

    rig.advance(Duration::from_secs(3_600));
    let third = rig.host.reclaim(rig.group.clone()).await.expect("a healthy group");
    let left = (KEYS / 3) as usize;
    assert_eq!((rig.versions(1).await, rig.versions(2).await), (left, left));
    println!("the other's as well: {third:?}");
    assert!(third.after < second.after / 3, "{third:?}");
    assert!(third.after < 3 * left as u64 * value, "{third:?}");
    rig.stop.cancel();
    rig.host.shutdown().await;
    rig.log.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_replica_of_a_node_is_rewritten_at_a_time() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut rig = start(dir.path()).await;
    rig.fill(1).await;
    let reclaim = || rig.host.reclaim(rig.group.clone());
    let (first, second) = tokio::join!(reclaim(), reclaim());
    first.expect("the first one's turn");
    assert!(matches!(second, Err(GroupError::Overloaded { .. })), "{second:?}");
    reclaim().await.expect("the turn was given back");
    rig.stop.cancel();
    rig.host.shutdown().await;
    rig.log.close();
}

//! Replicas that go while something holds them. Finds a removal that waits for a whole store to be
//! rewritten, one that holds up others, and a snapshot that brings back what was removed.

#![allow(clippy::disallowed_methods, reason = "this host runs on the real seams")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::group::Group;
use coracle_raft::host::{Condition, Host, LogBudget, Options};
use coracle_raft::lease::Timing;
use coracle_raft::transport::{Address, Answering, Lane, Transport, TransportError};
use coracle_raft::types::{NodeId, ShardId};
use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::Fs;
use coracle_storage::fs::faulty::{FaultyFs, Op};
use coracle_storage::log::{Log, Recovery};
use coracle_storage::state::{Batch, Engine, Engines, Filter, MapEngines, OpenState, View};
use coracle_storage::{Error, LogOptions, ReplicaId};
use parking_lot::{Condvar, Mutex};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, Deaf, SHARD, WallClock};

/// Long for what takes a moment, short for whoever waits for a test that hangs.
const SOON: Duration = Duration::from_secs(20);

struct Nobody;

impl Transport for Nobody {
    fn ask(&self, _: Address, _: Lane, _: Bytes, _: Duration) -> Answering {
        let error = TransportError::Unreachable("replicas without a group".to_owned());
        Box::pin(std::future::ready(Err(error)))
    }
}

/// Stores whose compaction lasts until it is ended, and that somebody holds.
struct Endless {
    below: MapEngines,
    compacting: Arc<AtomicBool>,
    held: Held,
}

type Held = Arc<Mutex<Vec<Arc<dyn Engine>>>>;

struct EndlessStore {
    below: Arc<dyn Engine>,
    compacting: Arc<AtomicBool>,
    ended: (Mutex<bool>, Condvar),
}

impl Engines for Endless {
    fn open(&self, dir: &Path, options: OpenState) -> Result<Arc<dyn Engine>, Error> {
        let (below, compacting) = (self.below.open(dir, options)?, self.compacting.clone());
        // Of the replicas that the test makes, not of what the host looks at.
        if options.create {
            self.held.lock().push(below.clone());
        }
        let ended = (Mutex::new(false), Condvar::new());
        Ok(Arc::new(EndlessStore { below, compacting, ended }))
    }

    fn destroy(&self, dir: &Path) -> Result<(), Error> {
        self.below.destroy(dir)
    }

    fn fs(&self) -> Arc<dyn Fs> {
        self.below.fs()
    }
}

impl Engine for EndlessStore {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.below.get(key)
    }

    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error> {
        self.below.first(from, prefix)
    }

    fn view(&self) -> Result<Box<dyn View>, Error> {
        self.below.view()
    }

    fn write(&self, batch: Batch) -> Result<(), Error> {
        self.below.write(batch)
    }

    fn flush(&self) -> Result<(), Error> {
        self.below.flush()
    }

    fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.below.checkpoint(dir)
    }

    fn compact(&self, _: Option<Range<Vec<u8>>>) -> Result<(), Error> {
        self.compacting.store(true, Ordering::SeqCst);
        let mut ended = self.ended.0.lock();
        // A test that fails is not to hang for ever.
        let until = std::time::Instant::now() + 2 * SOON;
        while !*ended {
            if self.ended.1.wait_until(&mut ended, until).timed_out() {
                break;
            }
        }
        Err(Error::Stopped { why: "the store is about to be closed".to_owned() })
    }

    fn end_compactions(&self) {
        *self.ended.0.lock() = true;
        self.ended.1.notify_all();
    }

    fn approximate_bytes(&self) -> u64 {
        self.below.approximate_bytes()
    }

    fn unflushed_bytes(&self) -> u64 {
        self.below.unflushed_bytes()
    }

    fn health(&self) -> Result<(), Error> {
        self.below.health()
    }

    fn filter(&self) -> &Arc<Filter> {
        self.below.filter()
    }

    fn open_marker(&self) -> Weak<()> {
        self.below.open_marker()
    }
}

/// One node with replicas of groups that have no members.
struct Rig {
    host: Arc<Host>,
    disk: FaultyFs,
    compacting: Arc<AtomicBool>,
    held: Held,
    log: Log,
    stop: CancellationToken,
}

impl Rig {
    async fn start() -> Rig {
        Rig::on(FaultyFs::new(1), "/log", false).await
    }

    /// On a disk with stores, and with a log that is told to have lost something.
    async fn on(disk: FaultyFs, log: &str, lossy: bool) -> Rig {
        let exec: Arc<dyn Exec> = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 8));
        let fs: Arc<dyn Fs> = Arc::new(disk.clone());
        let options = LogOptions { segment_bytes: 1 << 20, ..LogOptions::default() };
        let (log, recovery) =
            Log::open(fs.clone(), exec.clone(), Path::new(log), options).expect("a new log");
        let recovery = Recovery { lossy, ..recovery };
        let (stop, compacting) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
        let held = Held::default();
        let below = MapEngines::new(fs);
        let engines = Endless { below, compacting: compacting.clone(), held: held.clone() };
        let host = Host::new(Options {
            shards: PathBuf::from("/shards"),
            timing: Timing::default(),
            log: log.clone(),
            log_budget: LogBudget { disk_bytes: 8 << 20, index_bytes: 8 << 20 },
            engines: Arc::new(engines),
            exec,
            clock: Arc::new(WallClock),
            transport: Arc::new(Nobody),
            observer: Arc::new(Deaf),
            incarnation: 1,
            stop: stop.clone(),
            on_hang: Arc::new(|| panic!("the disk hangs")),
        });
        host.open_all(&recovery).await.expect("there is nothing yet");
        Rig { host, disk, compacting, held, log, stop }
    }

    async fn create(&self, shard: u64, replica: u64) -> Arc<Group> {
        let initial = Descriptor { shard, arc: Some((0, 0)), epoch: 1 };
        let created = timeout(SOON, self.host.create(ReplicaId(replica), initial)).await;
        created.expect("it waits for nobody").expect("a new replica")
    }

    /// As [`Rig::create`], and nobody else holds the store.
    async fn create_free(&self, shard: u64, replica: u64) -> Arc<Group> {
        let before = self.held.lock().len();
        let group = self.create(shard, replica).await;
        self.held.lock().truncate(before);
        group
    }

    async fn destroy(&self, shard: u64, replica: u64) {
        let destroyed = timeout(SOON, self.host.destroy(ShardId(shard), ReplicaId(replica))).await;
        destroyed.expect("it waits for nobody").expect("destroyed");
        assert!(self.host.group(ShardId(shard)).is_none());
        assert!(!self.disk.exists(&dir(replica)), "its directory is gone");
    }

    async fn end(self) {
        self.stop.cancel();
        self.host.shutdown().await;
        self.log.close();
    }
}

fn dir(replica: u64) -> PathBuf {
    PathBuf::from(format!("/shards/{replica:016x}"))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_being_rewritten_is_removed_at_once() {
    let rig = Rig::start().await;
    let group = rig.create_free(1, 11).await;
    let (host, compacting) = (rig.host.clone(), rig.compacting.clone());
    let reclaim = tokio::spawn(async move { host.reclaim(group).await });
    until("it is being rewritten", || compacting.load(Ordering::SeqCst)).await;
    rig.destroy(1, 11).await;
    let reclaimed = timeout(SOON, reclaim).await.expect("it was ended").expect("no panic");
    assert!(reclaimed.is_err(), "{reclaimed:?}");

    // The node itself ends as soon.
    let group = rig.create_free(2, 12).await;
    rig.compacting.store(false, Ordering::SeqCst);
    let (host, compacting) = (rig.host.clone(), rig.compacting.clone());
    let reclaim = tokio::spawn(async move { host.reclaim(group).await });
    until("it is being rewritten", || compacting.load(Ordering::SeqCst)).await;
    timeout(SOON, rig.end()).await.expect("it waits for nobody");
    let _ = timeout(SOON, reclaim).await.expect("it was ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_waits_holds_up_no_other_and_is_joined() {
    let rig = Rig::start().await;
    let group = rig.create(1, 11).await;
    let removal = |host: Arc<Host>| {
        tokio::spawn(async move { host.destroy(ShardId(1), ReplicaId(11)).await })
    };
    let first = removal(rig.host.clone());
    until("it stops", || rig.host.group(SHARD).is_none()).await;
    let rest: Vec<_> = (0..50).map(|_| removal(rig.host.clone())).collect();

    // Others come and go meanwhile.
    for replica in 21..24 {
        rig.create_free(2, replica).await;
        rig.destroy(2, replica).await;
    }
    assert!(!first.is_finished() && rest.iter().all(|removal| !removal.is_finished()));
    assert!(rig.disk.exists(&dir(11)), "somebody holds it");
    let wrong = timeout(SOON, rig.host.destroy(ShardId(2), ReplicaId(31))).await;
    wrong.expect("it waits for nobody").expect("never made, and remembered");

    rig.held.lock().clear();
    for removal in std::iter::once(first).chain(rest) {
        let removed = timeout(SOON, removal).await.expect("nobody holds it").expect("no panic");
        removed.expect("destroyed");
    }
    assert!(!rig.disk.exists(&dir(11)));
    drop(group);
    rig.destroy(1, 11).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_not_removed_under_the_name_of_another_shard() {
    let rig = Rig::start().await;
    let group = rig.create_free(1, 11).await;
    let refused = rig.host.destroy(ShardId(2), ReplicaId(11)).await;
    assert!(refused.is_err(), "it runs, for another shard");
    assert!(rig.disk.exists(&dir(11)));
    group.read_local(0, Instant::now() + SOON, |_| ()).await.expect("it still serves");
    drop(group);
    rig.destroy(1, 11).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_being_installed_is_waited_for_and_brings_nothing_back() {
    let mut cluster = Cluster::new().await;
    let body = "x".repeat(200 << 10);
    for n in 0..120 {
        cluster.put(&format!("k{n}"), "v").await;
        cluster.put("body", &body).await;
    }
    let purged = |cluster: &Cluster| {
        let leader = cluster.leader().map(|(_, group)| group.status());
        leader.is_some_and(|status| status.purged.is_some_and(|at| at.index >= 20))
    };
    until("the log is purged", || purged(&cluster)).await;
    let (node, learner) = (NodeId(4), ReplicaId(14));
    cluster.add(node).await;
    let host = cluster.nodes[&node].host.clone();
    let initial = Descriptor { shard: SHARD.0, arc: Some((0, 0)), epoch: 1 };
    drop(host.create(learner, initial).await.expect("a new replica"));
    let disk = cluster.disks[&node].clone();
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let (reached, swaps) = std::sync::mpsc::channel();
    let hook_gate = gate.clone();
    disk.set_hook(Some(Arc::new(move |op, path| {
        // The old store has gone, the new one is about to get its name.
        if op == Op::Name && path.extension().is_some_and(|extension| extension == "ready") {
            let _ = reached.send(());
            let mut open = hook_gate.0.lock();
            let until = std::time::Instant::now() + 2 * SOON;
            while !*open && !hook_gate.1.wait_until(&mut open, until).timed_out() {}
        }
    })));
    let deadline = Instant::now() + SOON;
    loop {
        assert!(Instant::now() < deadline, "the learner is not taken in");
        let soon = Instant::now() + Duration::from_secs(5);
        if let Some((_, group)) = cluster.leader() {
            let epoch = group.descriptor().map_or(0, |descriptor| descriptor.epoch);
            if group.add_learner(learner, node, epoch, soon).await.is_ok() {
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    until("a snapshot is being installed", || swaps.try_recv().is_ok()).await;
    let removing = host.clone();
    let removal = tokio::spawn(async move { removing.destroy(SHARD, learner).await });
    until("it stops", || host.group(SHARD).is_none()).await;
    // Long enough for a removal that waits for nobody.
    let early = Instant::now() + Duration::from_millis(500);
    while Instant::now() < early && !removal.is_finished() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!removal.is_finished(), "it was removed under a snapshot");
    *gate.0.lock() = true;
    gate.1.notify_all();
    timeout(SOON, removal).await.expect("it ends").expect("no panic").expect("destroyed");
    let gone = Instant::now() + Duration::from_millis(300);
    while Instant::now() < gone {
        assert!(!disk.exists(&dir(learner.0)), "it came back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_the_log_does_not_know_is_kept_where_the_log_has_lost_something() {
    let rig = Rig::start().await;
    rig.create_free(1, 11).await;
    let disk = rig.disk.clone();
    rig.end().await;
    // Nothing was applied to it, and it may have voted.
    let rig = Rig::on(disk.clone(), "/log2", true).await;
    assert!(rig.disk.exists(&dir(11)), "it was taken for one that never took part");
    assert_eq!(rig.host.condition(ReplicaId(11)), Condition::Damaged);
    let initial = Descriptor { shard: 1, arc: Some((0, 0)), epoch: 1 };
    let again = timeout(SOON, rig.host.create(ReplicaId(11), initial)).await;
    assert!(again.expect("it waits for nobody").is_err(), "it would begin without its vote");
    rig.create_free(1, 12).await;
    rig.destroy(1, 12).await;
    rig.end().await;
    // A log that is whole says that its creation was cut short.
    let rig = Rig::on(disk, "/log3", false).await;
    assert!(!rig.disk.exists(&dir(11)));
    rig.create_free(1, 11).await;
    rig.end().await;
}

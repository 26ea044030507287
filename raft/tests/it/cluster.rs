//! Three hosts, one group, a transport in memory: writes, reads, failover, restart, snapshots. Finds
//! what goes wrong between openraft, the log and apply; the network proper is the server's.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::apply::{Outcome, Reply};
use coracle_raft::birth::Failpoint;
use coracle_raft::clock::Clock;
use coracle_raft::command::{Change, Operation, Request, RequestId};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::GroupError;
use coracle_raft::group::Group;
use coracle_raft::host::{Host, LogBudget, Options};
use coracle_raft::leadership::Standing;
use coracle_raft::lease::Timing;
use coracle_raft::observer::{Observer, Stage};
use coracle_raft::transport::{Address, Answering, Lane, Transport, TransportError};
use coracle_raft::types::{NodeId, ShardId};
use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::Fs;
use coracle_storage::fs::faulty::{FaultyFs, Loss, Op};
use coracle_storage::log::Log;
use coracle_storage::state::MapEngines;
use coracle_storage::{LogOptions, ReplicaId};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) const SHARD: ShardId = ShardId(1);

/// Who is reachable from whom.
#[derive(Default)]
pub(crate) struct Wires {
    hosts: Mutex<BTreeMap<NodeId, Arc<Host>>>,
    /// They reach nobody, and nobody reaches them.
    pub(crate) cut: Mutex<BTreeSet<NodeId>>,
    /// They reach each other only.
    pub(crate) apart: Mutex<BTreeSet<NodeId>>,
    /// No entries and no heartbeats come to them.
    pub(crate) held: Mutex<BTreeSet<NodeId>>,
    /// Questions for read points.
    pub(crate) points: AtomicUsize,
    /// Leaderships that were sent to a node that had just restarted.
    pub(crate) to_embargoed: AtomicUsize,
}

/// As a question for a read point stands on the wire.
pub(crate) const READ_POINT: &[u8] = &[1, 8];
/// As a transfer of leadership begins.
const TRANSFER: &[u8] = &[1, 4];

struct Wire {
    from: NodeId,
    wires: Arc<Wires>,
}

impl Transport for Wire {
    fn ask(&self, to: Address, lane: Lane, question: Bytes, timeout: Duration) -> Answering {
        if question == READ_POINT {
            self.wires.points.fetch_add(1, Ordering::SeqCst);
        }
        let (cut, apart) = (self.wires.cut.lock(), self.wires.apart.lock());
        let host = self.wires.hosts.lock().get(&to.node).cloned();
        let held = matches!(lane, Lane::Appends | Lane::Heartbeat)
            && self.wires.held.lock().contains(&to.node);
        let reachable = !cut.contains(&to.node)
            && !cut.contains(&self.from)
            && !held
            && apart.contains(&to.node) == apart.contains(&self.from);
        let Some(host) = host.filter(|_| reachable) else {
            let error = TransportError::Unreachable("down".to_owned());
            return Box::pin(std::future::ready(Err(error)));
        };
        let embargoed = host.group(to.shard).is_some_and(|group| group.is_under_embargo());
        if question.starts_with(TRANSFER) && embargoed {
            self.wires.to_embargoed.fetch_add(1, Ordering::SeqCst);
        }
        let answer = host.answer(self.from, to.shard, to.replica, question);
        Box::pin(async move {
            tokio::time::timeout(timeout, answer)
                .await
                .unwrap_or(Err(TransportError::Timeout(timeout)))
        })
    }
}

pub(crate) struct WallClock;

impl Clock for WallClock {
    fn now_ms(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.expect("after 1970").as_millis() as u64
    }

    fn check(&self) -> Result<(), GroupError> {
        Ok(())
    }
}

pub(crate) struct Deaf;

impl Observer for Deaf {
    fn stage(&self, _: Stage, _: Duration) {}

    fn elected(&self) {}
}

pub(crate) struct Node {
    pub(crate) host: Arc<Host>,
    log: Log,
    stop: CancellationToken,
}

async fn start(id: NodeId, disk: &FaultyFs, wires: &Arc<Wires>, start: u64) -> Node {
    start_with(id, disk, wires, start, None).await
}

async fn start_with(
    id: NodeId,
    disk: &FaultyFs,
    wires: &Arc<Wires>,
    start: u64,
    failpoint: Option<Failpoint>,
) -> Node {
    let exec: Arc<dyn Exec> = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 8));
    let fs: Arc<dyn Fs> = Arc::new(disk.clone());
    let dir = PathBuf::from("/log");
    let options = LogOptions { segment_bytes: 1 << 20, ..LogOptions::default() };
    let (log, recovery) =
        Log::open(fs.clone(), exec.clone(), &dir, options).expect("the log opens");
    let stop = CancellationToken::new();
    let host = Host::new(Options {
        shards: PathBuf::from("/shards"),
        timing: Timing::default(),
        log: log.clone(),
        log_budget: LogBudget { disk_bytes: 8 << 20, index_bytes: 8 << 20 },
        engines: Arc::new(MapEngines::new(fs)),
        exec,
        clock: Arc::new(WallClock),
        transport: Arc::new(Wire { from: id, wires: wires.clone() }),
        observer: Arc::new(Deaf),
        incarnation: start,
        stop: stop.clone(),
        on_hang: Arc::new(|| panic!("the disk hangs")),
    });
    host.set_failpoint(failpoint);
    host.open_all(&recovery).await.expect("all replicas open");
    wires.hosts.lock().insert(id, host.clone());
    Node { host, log, stop }
}

impl Node {
    async fn stop(self, id: NodeId, wires: &Wires) {
        wires.hosts.lock().remove(&id);
        self.stop.cancel();
        self.host.shutdown().await;
        self.log.close();
    }
}

pub(crate) struct Cluster {
    pub(crate) disks: BTreeMap<NodeId, FaultyFs>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) wires: Arc<Wires>,
    sequence: u64,
}

impl Cluster {
    pub(crate) async fn new() -> Self {
        Self::of(3).await
    }

    pub(crate) async fn of(count: u64) -> Self {
        let wires = Arc::new(Wires::default());
        let (mut disks, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        for id in (1..=count).map(NodeId) {
            let disk = FaultyFs::new(id.0);
            nodes.insert(id, start(id, &disk, &wires, 1).await);
            disks.insert(id, disk);
        }
        let members: BTreeMap<u64, NodeId> = (1..=count).map(|n| (10 + n, NodeId(n))).collect();
        for (replica, node) in members.iter().rev() {
            let initial = Descriptor { shard: SHARD.0, arc: Some((0, 0)), epoch: 1 };
            let made = nodes[node].host.create(ReplicaId(*replica), initial).await;
            let group = made.expect("a new replica");
            if node.0 == 1 {
                group.initialize(members.clone()).await.expect("a new group");
            }
        }
        Self { disks, nodes, wires, sequence: 0 }
    }

    /// Ends a node; what it had not synced is gone.
    pub(crate) async fn stop(&mut self, id: NodeId) {
        let node = self.nodes.remove(&id).expect("it runs");
        node.stop(id, &self.wires).await;
        let after = self.disks[&id].crash(Loss::All);
        self.disks.insert(id, after);
    }

    pub(crate) async fn restart(&mut self, id: NodeId, count: u64) {
        let node = start(id, &self.disks[&id], &self.wires, count).await;
        self.nodes.insert(id, node);
    }

    /// As [`Cluster::restart`], and told of every step already while its replicas open.
    pub(crate) async fn restart_with(&mut self, id: NodeId, count: u64, failpoint: Failpoint) {
        let node = start_with(id, &self.disks[&id], &self.wires, count, Some(failpoint)).await;
        self.nodes.insert(id, node);
    }

    /// One more node, without replicas.
    pub(crate) async fn add(&mut self, id: NodeId) {
        let disk = FaultyFs::new(id.0);
        self.nodes.insert(id, start(id, &disk, &self.wires, 1).await);
        self.disks.insert(id, disk);
    }

    pub(crate) fn leader(&self) -> Option<(NodeId, Arc<Group>)> {
        let mut led = self.nodes.iter().filter_map(|(id, node)| {
            let group = node.host.group(SHARD)?;
            (group.status().state == Standing::Leader).then_some((*id, group))
        });
        led.next()
    }

    /// Writes until it is acknowledged, always with the same request id.
    pub(crate) async fn put(&mut self, key: &str, value: &str) -> Reply {
        self.sequence += 1;
        let operation = Operation {
            key: Bytes::copy_from_slice(key.as_bytes()),
            condition: None,
            change: Change::Put { value: Bytes::copy_from_slice(value.as_bytes()), ttl_ms: 0 },
        };
        let request = Request {
            id: RequestId {
                client: 7,
                sequence: self.sequence,
                birth_ms: WallClock.now_ms(),
                lowest_unanswered: self.sequence,
            },
            keyspace: 1,
            position: 5,
            epoch: 0,
            operations: vec![operation],
        };
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "{key} was not acknowledged");
            if let Some((_, group)) = self.leader() {
                let deadline = Instant::now() + Duration::from_secs(2);
                if let Ok(written) = group.write(request.clone(), deadline).await
                    && matches!(written.reply.outcome, Outcome::Applied { .. })
                {
                    return written.reply;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn get(&self, key: &str) -> Option<Bytes> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "{key} could not be read");
            if let Some((_, group)) = self.leader() {
                let name = key.to_owned();
                let deadline = Instant::now() + Duration::from_secs(2);
                let read = group.read(deadline, move |state| {
                    state.reader.get_at(1, name.as_bytes(), u64::MAX).expect("readable")
                });
                if let Ok(found) = read.await {
                    return found.map(|versioned| versioned.value);
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A replica that does not lead, once it knows who does.
    pub(crate) async fn follower(&self) -> (NodeId, Arc<Group>) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "nobody follows");
            let (led, _) = self.leader().expect("a leader");
            let groups = self.nodes.iter().filter_map(|(id, n)| Some((*id, n.host.group(SHARD)?)));
            let follows = |(id, group): &(NodeId, Arc<Group>)| {
                *id != led && group.status().leader == Some(led)
            };
            if let Some(found) = groups.into_iter().find(follows) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn another_leads(&self, than: NodeId) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "nobody else was elected");
            let others = self.nodes.iter().filter(|(node, _)| **node != than);
            let mut groups = others.filter_map(|(_, node)| node.host.group(SHARD));
            if groups.any(|group| group.status().state == Standing::Leader) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn check(&self, count: u64) {
        for n in 0..count {
            let value = self.get(&format!("k{n}")).await;
            assert_eq!(value.as_deref(), Some(format!("v{n}").as_bytes()), "k{n}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_the_loss_of_leaders_and_a_restart_of_all() {
    let mut cluster = Cluster::new().await;
    let mut version = 0;
    for n in 0..40 {
        if n == 10 || n == 25 {
            let (id, _) = cluster.leader().expect("a leader");
            cluster.stop(id).await;
            for other in cluster.nodes.values() {
                other.host.peer_lost(id);
            }
            cluster.put(&format!("k{n}"), &format!("v{n}")).await;
            cluster.restart(id, n).await;
        }
        let reply = cluster.put(&format!("k{n}"), &format!("v{n}")).await;
        let Outcome::Applied { version: this, .. } = reply.outcome else { unreachable!() };
        assert!(this > version, "versions rise with the log");
        version = this;
    }
    cluster.check(40).await;
    for id in (1..=3).map(NodeId) {
        cluster.stop(id).await;
    }
    for id in (1..=3).map(NodeId) {
        cluster.restart(id, 100).await;
    }
    cluster.check(40).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_serves_no_read_after_another_was_elected() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "old").await;
    let (id, old) = cluster.leader().expect("a leader");
    cluster.wires.cut.lock().insert(id);
    cluster.another_leads(id).await;
    let deadline = Instant::now() + Duration::from_millis(700);
    let stale = old.read(deadline, |state| state.position).await;
    assert!(stale.is_err(), "a deposed leader read at {stale:?}");
    cluster.wires.cut.lock().clear();
    cluster.put("k0", "new").await;
    assert_eq!(cluster.get("k0").await.as_deref(), Some(&b"new"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_stalls_serves_nothing_and_gives_its_leadership_up() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "old").await;
    let (id, old) = cluster.leader().expect("a leader");
    let stalled = Arc::new(AtomicBool::new(true));
    let stall = stalled.clone();
    cluster.disks[&id].set_hook(Some(Arc::new(move |op, _| {
        while op != Op::Read && stall.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
    })));
    let until = Instant::now() + Duration::from_secs(20);
    while cluster.nodes[&id].host.healthy() {
        assert!(Instant::now() < until, "a stalled disk went unnoticed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let deadline = Instant::now() + Duration::from_millis(500);
    old.read(deadline, |state| state.position).await.expect_err("a read on a stalled leader");
    cluster.another_leads(id).await;
    let far = Instant::now() + Duration::from_secs(2);
    old.read(far, |state| state.position).await.expect_err("a read on a deposed leader");
    stalled.store(false, Ordering::SeqCst);
    cluster.put("k0", "new").await;
    assert_eq!(cluster.get("k0").await.as_deref(), Some(&b"new"[..]));
    let until = Instant::now() + Duration::from_secs(20);
    while !cluster.nodes[&id].host.healthy() || old.status().applied != old.status().committed {
        assert!(Instant::now() < until, "it does not recover: {:?}", old.status());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_behind_the_purged_log_takes_a_snapshot() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    let (leader, _) = cluster.leader().expect("a leader");
    let id = *cluster.nodes.keys().find(|id| **id != leader).expect("a follower");
    cluster.stop(id).await;
    let body = "x".repeat(200 << 10);
    for n in 1..120 {
        cluster.put(&format!("k{n}"), &format!("v{n}")).await;
        cluster.put("body", &body).await;
    }
    let (_, group) = cluster.leader().expect("a leader");
    let until = Instant::now() + Duration::from_secs(30);
    while group.status().purged.is_none_or(|purged| purged.index < 20) {
        assert!(Instant::now() < until, "the log was not purged: {:?}", group.status());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.restart(id, 2).await;
    let follower = cluster.nodes[&id].host.group(SHARD).expect("it is there");
    let target = group.status().applied.expect("applied").index;
    let until = Instant::now() + Duration::from_secs(30);
    while follower.status().applied.is_none_or(|applied| applied.index < target) {
        assert!(Instant::now() < until, "no snapshot arrived: {:?}", follower.status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let far = Instant::now() + Duration::from_secs(5);
    let found = follower.read_local(target, far, |state| {
        state.reader.get_at(1, b"k119", u64::MAX).expect("readable").map(|found| found.value)
    });
    assert_eq!(found.await.expect("served").as_deref(), Some(&b"v119"[..]));
}

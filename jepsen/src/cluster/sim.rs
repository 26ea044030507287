//! A cluster in simulation: whole nodes, the real code from gRPC to the log, on seams that one seed
//! decides. Owns the nodes' lives: booting, crashing with what the disk has not synced lost, coming
//! back. Does not decide when (see `nemesis`).

pub mod clock;
pub mod exec;
pub mod net;

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use coracle_client::admin::Init;
use coracle_client::{Builder, Client};
use coracle_server::config::{Config, Sources};
use coracle_server::identity::Locking;
use coracle_server::node::{Node, Parts};
use coracle_storage::Mutant;
use coracle_storage::fs::faulty::{Dice, FaultyFs, Loss};
use coracle_storage::state::MapEngines;
use parking_lot::Mutex;

use self::clock::SimClock;
use self::exec::{DiskSpeed, SimDisk, SimExec};
use self::net::{Down, LinkSpeed, SimNet};
use crate::trace::Trace;

/// How long the dead may take to be cleared away. What is not gone then stays in memory, cut off from
/// disk and network.
const BURIAL: Duration = Duration::from_secs(30);

/// What a cluster is.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How many nodes.
    pub nodes: usize,
    /// Shards, beside the meta group.
    pub shards: u32,
    /// Raft's times, in milliseconds: heartbeat, and the election timeout's bounds.
    pub raft_ms: [u64; 3],
    /// How long messages take.
    pub link: LinkSpeed,
    /// How long disks take.
    pub disk: DiskSpeed,
    /// Clocks begin wrong by up to this.
    pub clock_offset_ms_max: u64,
    /// And run wrong by up to this.
    pub clock_drift_ppm_max: u64,
    /// Every sync answers well and makes nothing durable: a fault that the checkers must find.
    pub lying_disks: bool,
}

/// The nodes, the network between them, and what becomes of both. On one thread.
pub struct Cluster {
    settings: Settings,
    /// The network.
    pub net: SimNet,
    trace: Trace,
    dice: RefCell<Dice>,
    slots: Vec<RefCell<Slot>>,
}

/// A machine: what outlives the process on it.
struct Slot {
    name: String,
    files: FaultyFs,
    disk: SimDisk,
    clock: SimClock,
    boots: u64,
    running: Option<Running>,
}

struct Running {
    node: Arc<Node>,
    exec: Arc<SimExec>,
    why_stopped: Arc<Mutex<Option<String>>>,
}

impl Cluster {
    /// Machines without nodes.
    pub fn new(settings: Settings, seed: u64, trace: Trace) -> Cluster {
        let mut dice = Dice::new(seed);
        let net = SimNet::new(dice.roll(), settings.link, trace.clone());
        let slots = (0..settings.nodes).map(|at| RefCell::new(Slot::new(at, &settings, &mut dice)));
        Cluster { settings, net, trace, slots: slots.collect(), dice: RefCell::new(dice) }
    }

    /// Boots all nodes and makes a cluster of them.
    pub async fn form(&self) -> Result<(), String> {
        for at in 0..self.len() {
            self.boot(at).await?;
        }
        let client = self.client("init").connect_lazy().map_err(|error| error.to_string())?;
        let nodes = self.len() as u32;
        let init = Init { shards: self.settings.shards, replicas: nodes.min(3), nodes };
        let made = client.admin().init(init).await;
        client.close().await;
        made.map(drop).map_err(|error| format!("init: {error}"))
    }

    /// How many machines there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// A machine's name on the network.
    pub fn name(&self, at: usize) -> String {
        self.slots[at].borrow().name.clone()
    }

    /// The node on a machine, while it runs.
    pub fn node(&self, at: usize) -> Option<Arc<Node>> {
        self.slots[at].borrow().running.as_ref().map(|running| running.node.clone())
    }

    /// How often a node was started on a machine.
    pub fn boots(&self, at: usize) -> u64 {
        self.slots[at].borrow().boots
    }

    /// Why the node on a machine has stopped by itself, when it has.
    pub fn why_stopped(&self, at: usize) -> Option<String> {
        self.slots[at].borrow().running.as_ref()?.why_stopped.lock().clone()
    }

    /// A machine's files.
    pub fn files(&self, at: usize) -> FaultyFs {
        self.slots[at].borrow().files.clone()
    }

    /// A machine's disk, as far as time goes.
    pub fn disk(&self, at: usize) -> SimDisk {
        self.slots[at].borrow().disk.clone()
    }

    /// A machine's wall clock.
    pub fn clock(&self, at: usize) -> SimClock {
        self.slots[at].borrow().clock.clone()
    }

    /// A client on a host of its own, with a luck of its own.
    pub fn client(&self, name: &str) -> Builder {
        let seeds = (0..self.len()).map(|at| listen(at, 7400));
        let builder = Client::builder()
            .seeds(seeds)
            .name(name)
            .net(self.net.host(name))
            .seed(self.dice.borrow_mut().roll());
        match Mutant::RetriesUnderNewIds.is_in() {
            true => builder.unsafe_fresh_request_ids_for_tests(),
            false => builder,
        }
    }

    /// Starts a node on what its machine has kept.
    pub async fn boot(&self, at: usize) -> Result<(), String> {
        let (parts, exec, why_stopped) = self.prepare(at);
        let name = self.name(at);
        self.net.bring_up(&name);
        self.trace.event(format_args!("{name} boots"));
        // Whoever gives up waiting for the boot has crashed it.
        let mut unborn = Unborn(Some(exec.clone()));
        match Node::start(parts).await {
            Ok(node) => {
                unborn.0 = None;
                let node = Arc::new(node);
                let running = Running { node, exec, why_stopped };
                let before = self.slots[at].borrow_mut().running.replace(running);
                assert!(before.is_none(), "a machine runs one node at a time");
                Ok(())
            }
            Err(why) => {
                self.net.take_down(&name, Down::Process);
                Err(format!("{name} does not start: {why}"))
            }
        }
    }

    fn prepare(&self, at: usize) -> (Parts, Arc<SimExec>, Arc<Mutex<Option<String>>>) {
        let mut slot = self.slots[at].borrow_mut();
        slot.boots += 1;
        slot.files.lie_about_sync(self.settings.lying_disks);
        let fs = Arc::new(slot.files.clone());
        let exec = Arc::new(SimExec::new(&slot.name, slot.disk.clone()));
        let why_stopped: Arc<Mutex<Option<String>>> = Arc::default();
        let told = why_stopped.clone();
        let parts = Parts {
            config: config(at, &self.settings),
            net: self.net.host(&slot.name),
            fs: fs.clone(),
            engines: Arc::new(MapEngines::new(fs)),
            exec: exec.clone(),
            clock: Arc::new(slot.clock.clone()),
            locking: Locking::None,
            seed: self.dice.borrow_mut().roll(),
            on_fatal: Arc::new(move |why: String| {
                told.lock().get_or_insert(why);
            }),
        };
        (parts, exec, why_stopped)
    }

    /// Ends the node on a machine, in whatever it is doing. `loss` is what becomes of what it has
    /// written and not synced. Also for a machine whose node is just starting, or is down.
    pub fn crash(&self, at: usize, how: Down, loss: Loss) {
        let mut slot = self.slots[at].borrow_mut();
        self.trace.event(format_args!("{} crashes: {how:?}, lost {loss:?}", slot.name));
        self.net.take_down(&slot.name, how);
        slot.files = slot.files.crash(loss);
        let Some(running) = slot.running.take() else {
            return;
        };
        running.exec.kill();
        drop(slot);
        // It can neither write nor talk any more. What openraft has spawned by itself is ended
        // politely, or its timers would tick for the rest of the run.
        let node = running.node;
        tokio::spawn(async move {
            let _ = tokio::time::timeout(BURIAL, node.stop()).await;
        });
    }

    /// Stops a node as an operator would: leaderships handed over, requests finished.
    pub async fn stop(&self, at: usize, within: Duration) {
        let Some(node) = self.node(at) else { return };
        self.trace.event(format_args!("{} is stopped", self.name(at)));
        let deadline = tokio::time::Instant::now() + within;
        let _ = tokio::time::timeout(within * 2, node.drain_and_stop(deadline)).await;
        self.crash(at, Down::Process, Loss::Nothing);
    }
}

/// Ends the life of a node that did not come to be.
struct Unborn(Option<Arc<SimExec>>);

impl Drop for Unborn {
    fn drop(&mut self) {
        if let Some(exec) = &self.0 {
            exec.kill();
        }
    }
}

impl Slot {
    fn new(at: usize, settings: &Settings, dice: &mut Dice) -> Slot {
        let mut either = |most: u64| dice.below(2 * most + 1) as i64 - most as i64;
        let offset_ms = either(settings.clock_offset_ms_max);
        let drift_ppm = either(settings.clock_drift_ppm_max);
        Slot {
            name: format!("n{}", at + 1),
            files: FaultyFs::new(dice.roll()),
            disk: SimDisk::new(settings.disk, dice.roll()),
            clock: SimClock::new(offset_ms, drift_ppm),
            boots: 0,
            running: None,
        }
    }
}

/// Where a machine listens: loopback, or the settings would ask for encryption.
fn listen(at: usize, port: u16) -> String {
    format!("{}:{port}", Ipv4Addr::new(127, 0, 0, at as u8 + 1))
}

fn config(at: usize, settings: &Settings) -> Config {
    let [heartbeat, election_min, election_max] = settings.raft_ms;
    let join: Vec<String> = (0..settings.nodes).map(|at| listen(at, 7500)).collect();
    let set = [
        ("node.data_dir", "/data".to_owned()),
        ("node.zone", format!("z{}", at % 3)),
        ("listen.client", listen(at, 7400)),
        ("listen.peer", listen(at, 7500)),
        ("listen.http", listen(at, 7600)),
        ("cluster.join", join.join(",")),
        ("raft.heartbeat_interval", format!("{heartbeat}ms")),
        ("raft.election_timeout_min", format!("{election_min}ms")),
        ("raft.election_timeout_max", format!("{election_max}ms")),
        // The smallest: a segment is made of real bytes here.
        ("storage.log_segment_bytes", "1MiB".to_owned()),
        ("storage.log_bytes_target", "4MiB".to_owned()),
        ("storage.disk_reserve_bytes", "64MiB".to_owned()),
    ];
    let set = set.map(|(key, value)| (key.to_owned(), value)).to_vec();
    let loaded = Config::load(&Sources { set, ..Sources::default() });
    loaded.unwrap_or_else(|problems| panic!("the settings of a simulated node: {problems:?}"))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::trace::Detail;

    const SETTINGS: Settings = Settings {
        nodes: 3,
        shards: 4,
        raft_ms: [100, 250, 500],
        link: LinkSpeed { latency_ms_min: 1, latency_ms_max: 2, slow_one_in: 500 },
        disk: DiskSpeed { sync_ms_max: 1, slow_one_in: 500 },
        clock_offset_ms_max: 0,
        clock_drift_ppm_max: 0,
        lying_disks: false,
    };

    #[test]
    fn a_node_that_comes_back_is_ready_when_it_may_lead_and_knows_who_does() {
        coracle_raft::runtime::seed_thread(Some(7));
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_time().start_paused(true).build().expect("a runtime");
        runtime.block_on(async {
            let cluster = Cluster::new(SETTINGS, 7, Trace::begin(Detail::Silent));
            cluster.form().await.expect("a cluster");
            let client = cluster.client("load").connect().await.expect("a client");
            client.put("k", "v").await.expect("a put");
            cluster.crash(1, Down::Process, Loss::All);
            tokio::time::sleep(Duration::from_secs(5)).await;
            cluster.boot(1).await.expect("it comes back");
            let node = cluster.node(1).expect("it runs");
            let groups = node.host().expect("it is a member").groups();
            assert_eq!(groups.len(), 5, "the meta group, and four shards");
            assert!(node.ready().now_or_never().is_none(), "it has heard nobody yet");
            node.ready().await;
            for group in groups {
                assert!(!group.is_under_embargo(), "shard {}", group.shard());
                assert!(group.status().leader.is_some(), "shard {}", group.shard());
            }
        });
    }
}

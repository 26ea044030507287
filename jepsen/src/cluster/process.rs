//! A cluster of real processes on this machine: the server's own program, real sockets, real syncs, in
//! a scratch directory. Owns the processes and what is done to them. Does not know what for.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use coracle_client::admin::{BalancingChange, Init, NodeStatus};
use coracle_client::topology::NodeState;
use coracle_client::{Client, NodeId, ShardId};
use rand::RngExt;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::Instant;

use super::relay::Relay;

/// A start on a slow machine with slow disks.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Longer than a server takes to drain and to end.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(25);

/// Below what the kernel gives to outgoing connections: one of those could take a node's port while
/// the node is down.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// A node is held back by steps, each shorter than an election timeout.
const HOLD_BACK_STEPS: u32 = 20;
const HOLD_BACK_PAUSE: Duration = Duration::from_millis(300);

/// Small budgets: all nodes share this machine.
const SETTINGS: &[&str] = &[
    "test.fault_injection=true",
    "storage.memory_budget=128MiB",
    "storage.log_segment_bytes=16MiB",
    "storage.log_bytes_target=128MiB",
    "storage.disk_reserve_bytes=64MiB",
    "limits.request_bytes_in_flight=64MiB",
    "observability.log_filter=warn",
];

/// How a cluster is made.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// How many shards; 0 for the default.
    pub shards: u32,
    /// Voters of each shard; 0 for the default.
    pub replicas: u32,
    /// What the nodes are told besides, `key=value` each.
    pub settings: Vec<String>,
    /// The node that is to hear the others late, see [`Cluster::hold_back`].
    pub late: Option<usize>,
}

/// The processes. Dropping it kills them and removes what they wrote.
pub struct Cluster {
    nodes: Vec<Process>,
    client: Client,
    relay: Option<Relay>,
    program: PathBuf,
    /// What all nodes are told.
    common: Vec<String>,
    // Last: the processes are killed before their directory goes.
    scratch: TempDir,
}

/// Who leads a shard. Ordered by term.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Leads {
    /// In which term.
    pub term: u64,
    /// Which process.
    pub at: usize,
}

struct Process {
    program: PathBuf,
    args: Vec<String>,
    dir: PathBuf,
    log: PathBuf,
    address: String,
    peer: String,
    http: String,
    child: Option<Child>,
}

impl Cluster {
    /// Starts nodes and makes a cluster of them; returns when every shard is led.
    pub async fn start(program: Option<&Path>, nodes: usize) -> Result<Cluster, String> {
        let program = program.map(Path::to_owned);
        Cluster::start_as(Setup { program, nodes, ..Setup::default() }).await
    }

    /// The same, with more to say about it.
    pub async fn start_as(setup: Setup) -> Result<Cluster, String> {
        let Setup { program, nodes, shards, replicas, settings, late } = setup;
        let program = match program {
            Some(program) => program,
            None => beside()?,
        };
        let scratch = tempfile::Builder::new().prefix("coracle-jepsen-").tempdir();
        let scratch = scratch.map_err(|error| format!("a scratch directory: {error}"))?;
        let ports = free_ports(nodes * 3).map_err(|error| format!("free ports: {error}"))?;
        let (clients, rest) = ports.split_at(nodes);
        let (peers, https) = rest.split_at(nodes);
        let join: Vec<String> = peers.iter().map(ToString::to_string).collect();
        let relay = match late {
            Some(at) => Some(Relay::start(peers[at]).await.map_err(|error| error.to_string())?),
            None => None,
        };
        let mut common = vec![
            "--log-format=text".to_owned(),
            format!("--exit-with-parent={}", std::process::id()),
        ];
        common.extend(SETTINGS.iter().map(|setting| format!("--set={setting}")));
        common.extend(settings.iter().map(|setting| format!("--set={setting}")));
        let client = Client::builder()
            .seeds(clients.iter().map(ToString::to_string))
            .name("coracle-jepsen")
            .connect_lazy()
            .map_err(|error| error.to_string())?;
        let nodes = Vec::new();
        let mut cluster = Cluster { nodes, client, relay, program, common, scratch };
        for (at, client) in clients.iter().enumerate() {
            cluster.push(*client, peers[at], https[at], &join);
            if let Some(relay) = cluster.relay.as_ref().filter(|_| late == Some(at)) {
                let advertise = format!("--set=listen.advertise_peer={}", relay.address());
                cluster.nodes[at].args.push(advertise);
            }
        }
        cluster.form(shards, replicas).await?;
        Ok(cluster)
    }

    /// Another process, not started yet.
    fn push(&mut self, client: SocketAddr, peer: SocketAddr, http: SocketAddr, join: &[String]) {
        let at = self.nodes.len();
        let dir = self.scratch.path().join(format!("n{}", at + 1));
        let mut args = vec![
            "server".to_owned(),
            format!("--data-dir={}", dir.display()),
            format!("--listen={client}"),
            format!("--peer-listen={peer}"),
            format!("--http-listen={http}"),
            format!("--zone=z{}", at % 3),
            format!("--join={}", join.join(",")),
        ];
        args.extend(self.common.iter().cloned());
        self.nodes.push(Process {
            program: self.program.clone(),
            args,
            log: dir.with_extension("log"),
            dir,
            address: client.to_string(),
            peer: peer.to_string(),
            http: http.to_string(),
            child: None,
        });
    }

    /// Starts another node, which joins; returns when it is in the map. It holds nothing yet.
    pub async fn add(&mut self) -> Result<usize, String> {
        let ports = free_ports(3).map_err(|error| format!("free ports: {error}"))?;
        let running = self.nodes.iter().filter(|node| node.child.is_some());
        let join: Vec<String> = running.map(|node| node.peer.clone()).collect();
        self.push(ports[0], ports[1], ports[2], &join);
        let (at, deadline) = (self.nodes.len() - 1, Instant::now() + START_DEADLINE);
        self.nodes[at].start()?;
        self.wait_for(at, deadline, |status| status.node.id.0 != 0).await?;
        let id = self.status(at).await?.node.id;
        loop {
            let map = self.client.admin().map().await.map_err(|error| error.to_string())?;
            if map.node(id).is_some_and(|node| node.state == NodeState::Active) {
                return Ok(at);
            }
            if Instant::now() >= deadline {
                return Err(format!("n{} is not in the map in time", at + 1));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn form(&mut self, shards: u32, replicas: u32) -> Result<(), String> {
        let deadline = Instant::now() + START_DEADLINE;
        for at in 0..self.nodes.len() {
            self.nodes[at].start()?;
        }
        for at in 0..self.nodes.len() {
            self.wait_for(at, deadline, |_| true).await?;
        }
        let nodes = self.nodes.len() as u32;
        let replicas = if replicas == 0 { nodes.min(3) } else { replicas };
        let init = Init { nodes, shards, replicas };
        let made = self.client.admin().init(init).await;
        made.map_err(|error| format!("init: {error}"))?;
        for at in 0..self.nodes.len() {
            self.wait_for(at, deadline, is_well).await?;
        }
        Ok(())
    }

    /// A client of all nodes.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// How many nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// A node's address for clients.
    pub fn address(&self, at: usize) -> &str {
        &self.nodes[at].address
    }

    /// Where clients reach the nodes.
    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.address.clone()).collect()
    }

    /// A node's address for metrics.
    pub fn http(&self, at: usize) -> &str {
        &self.nodes[at].http
    }

    /// A node's data directory.
    pub fn dir(&self, at: usize) -> &Path {
        &self.nodes[at].dir
    }

    /// A node's process, while it runs.
    pub fn pid(&self, at: usize) -> Option<u32> {
        self.nodes[at].child.as_ref().map(Child::id)
    }

    /// Who leads each shard, in which term, as the nodes that run say of themselves.
    pub async fn leaders(&self) -> BTreeMap<ShardId, Leads> {
        let mut leaders = BTreeMap::new();
        for at in (0..self.nodes.len()).filter(|at| self.nodes[*at].child.is_some()) {
            // Who does not answer leads nothing that matters.
            let groups = self.status(at).await.map(|status| status.groups).unwrap_or_default();
            for group in groups.iter().filter(|group| group.role == "leader") {
                let leads = Leads { term: group.term, at };
                let known = leaders.entry(group.shard).or_insert(leads);
                *known = leads.max(*known);
            }
        }
        leaders
    }

    /// Hands the leadership of every shard to one node, for good: nothing is balanced any more, else
    /// leaders would soon be spread by what they have to do.
    pub async fn lead_all(&self, at: usize) -> Result<(), String> {
        let manual = BalancingChange { automatic: Some(false), ..BalancingChange::default() };
        let set = self.client.admin().set_balancing(manual).await;
        set.map_err(|error| format!("balance nothing: {error}"))?;
        let (deadline, to) = (Instant::now() + START_DEADLINE, self.status(at).await?.node.id);
        loop {
            let leaders = self.leaders().await;
            let others =
                leaders.iter().filter(|(_, leads)| leads.at != at).map(|(shard, _)| *shard);
            let others: Vec<ShardId> = others.collect();
            if !leaders.is_empty() && others.is_empty() {
                return Ok(());
            }
            let mut last = None;
            for shard in others {
                last = self.client.admin().transfer_leader(shard, Some(to)).await.err().or(last);
            }
            if Instant::now() >= deadline {
                return Err(format!("n{} does not lead everything: {last:?}", at + 1));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until each of these shards is led in a later term than then.
    pub async fn wait_succeeded(&self, before: &BTreeMap<ShardId, Leads>) -> Result<(), String> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let now = self.leaders().await;
            let succeeded = |shard: &ShardId, then: &Leads| {
                now.get(shard).is_some_and(|leads| leads.term > then.term)
            };
            if before.iter().all(|(shard, then)| succeeded(shard, then)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("some shard has no new leader: {before:?}, now {now:?}"));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// A node's own view of itself.
    pub async fn status(&self, at: usize) -> Result<NodeStatus, String> {
        let admin = self.client.admin();
        let status = admin.node_status(&self.nodes[at].address);
        status.await.map_err(|error| format!("n{}: {error}", at + 1))
    }

    /// Which process has this node id.
    pub async fn find(&self, node: NodeId) -> Result<usize, String> {
        for at in 0..self.nodes.len() {
            if self.status(at).await.is_ok_and(|status| status.node.id == node) {
                return Ok(at);
            }
        }
        Err(format!("nobody answers as n{node}"))
    }

    /// SIGKILL.
    pub fn kill(&mut self, at: usize) -> Result<(), String> {
        self.nodes[at].end();
        Ok(())
    }

    /// SIGSTOP, or SIGCONT.
    pub fn pause(&self, at: usize, paused: bool) -> Result<(), String> {
        self.nodes[at].signal(if paused { Signal::STOP } else { Signal::CONT })
    }

    /// SIGTERM; waits until the process has ended, and says how long that took. An error when it
    /// takes too long, or does not end well.
    pub async fn terminate(&mut self, at: usize) -> Result<Duration, String> {
        let (began, node) = (Instant::now(), &mut self.nodes[at]);
        node.signal(Signal::TERM)?;
        loop {
            let child = node.child.as_mut().ok_or("it does not run")?;
            match child.try_wait().map_err(|error| error.to_string())? {
                Some(status) if status.success() => {
                    node.child = None;
                    return Ok(began.elapsed());
                }
                Some(status) => return Err(format!("n{} ended: {status}", at + 1)),
                None if began.elapsed() >= STOP_DEADLINE => {
                    return Err(format!("n{} does not end within {STOP_DEADLINE:?}", at + 1));
                }
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// SIGKILL, and the disk is gone as well: it never comes back.
    pub fn lose(&mut self, at: usize) -> Result<(), String> {
        self.nodes[at].end();
        let dir = &self.nodes[at].dir;
        fs::remove_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))
    }

    /// Whether a node's process was started and not stopped since.
    pub fn is_running(&self, at: usize) -> bool {
        self.nodes[at].child.is_some()
    }

    /// What a node writes to its standard error, over all its starts.
    pub fn log(&self, at: usize) -> &Path {
        &self.nodes[at].log
    }

    /// Why a process that should run has ended; `None` when all are well.
    pub fn casualty(&mut self) -> Option<String> {
        self.nodes.iter_mut().find_map(Process::ended)
    }

    /// Cuts a node off from all others, or heals that.
    pub async fn cut(&self, at: usize, is_cut: bool) -> Result<(), String> {
        let own = self.status(at).await?.node.id;
        let others = (1..=self.nodes.len() as u64).map(NodeId).filter(|node| *node != own);
        let cut_from: Vec<NodeId> = if is_cut { others.collect() } else { Vec::new() };
        let admin = self.client.admin();
        let cut = admin.inject_fault(&self.nodes[at].address, &cut_from).await;
        cut.map_err(|error| format!("cut off n{own}: {error}"))
    }

    /// From now on the node that was said to be late hears what the others send it so much later: it
    /// lags behind, answers its clients as ever, and loses nothing. Step by step, so that it never
    /// misses a heartbeat.
    pub async fn hold_back(&self, delay: Duration) -> Result<(), String> {
        let relay = self.relay.as_ref().ok_or("no node was said to be late")?;
        for step in 1..=HOLD_BACK_STEPS {
            relay.set_delay(delay * step / HOLD_BACK_STEPS);
            tokio::time::sleep(HOLD_BACK_PAUSE).await;
        }
        Ok(())
    }

    /// Starts a node that was killed.
    pub fn restart(&mut self, at: usize) -> Result<(), String> {
        self.nodes[at].start()
    }

    /// Waits until a node is back: each of its replicas knows a leader.
    pub async fn wait_back(&mut self, at: usize) -> Result<(), String> {
        self.wait_for(at, Instant::now() + START_DEADLINE, is_well).await
    }

    /// Waits until a node says that it is ready: it may be elected again, knows its leaders, and holds
    /// what they have committed.
    pub async fn wait_ready(&mut self, at: usize) -> Result<(), String> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let told = http_get(&self.nodes[at].http, "/readyz").await;
            if told.as_ref().is_ok_and(|told| told.starts_with("HTTP/1.0 200")) {
                return Ok(());
            }
            if let Some(why) = self.nodes[at].ended() {
                return Err(why);
            }
            if Instant::now() >= deadline {
                return Err(format!("n{} is not ready in time: {told:?}", at + 1));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn wait_for(
        &mut self,
        at: usize,
        deadline: Instant,
        holds: impl Fn(&NodeStatus) -> bool,
    ) -> Result<(), String> {
        loop {
            let status = self.status(at).await;
            if status.as_ref().is_ok_and(&holds) {
                return Ok(());
            }
            if let Some(why) = self.nodes[at].ended() {
                return Err(why);
            }
            if Instant::now() >= deadline {
                let last = status.map_or_else(|why| why, |status| format!("{status:?}"));
                return Err(format!("n{} is not ready in time: {last}", at + 1));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Elections so far, of all groups: the sum of their terms.
    pub async fn terms(&self) -> Result<u64, String> {
        let mut terms = BTreeMap::new();
        for at in 0..self.nodes.len() {
            for group in self.status(at).await?.groups {
                let term = terms.entry(group.shard).or_insert(0);
                *term = group.term.max(*term);
            }
        }
        Ok(terms.values().sum())
    }
}

fn is_well(status: &NodeStatus) -> bool {
    !status.groups.is_empty() && status.groups.iter().all(|group| group.leader.is_some())
}

/// What a node's HTTP listener answers, with its head.
pub async fn http_get(address: &str, path: &str) -> Result<String, String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, io::Error>(text)
    };
    asked.await.map_err(|error| format!("{path} of {address}: {error}"))
}

/// The server's program stands beside the harness.
fn beside() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    let program = own.with_file_name("coracle");
    match program.exists() {
        true => Ok(program),
        false => Err(format!(
            "{} does not exist: build it (cargo build -p coracle-cli), or name it with --program",
            program.display()
        )),
    }
}

fn free_ports(count: usize) -> io::Result<Vec<SocketAddr>> {
    let mut held = Vec::new();
    for _ in 0..100 * count {
        let port = rand::rng().random_range(PORTS);
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            held.push(listener);
        }
        if held.len() == count {
            break;
        }
    }
    let mut ports = held.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
    // Node ids are given in the order of the peers' addresses: let it be that of the processes.
    ports.sort();
    match ports.len() == count {
        true => Ok(ports),
        false => Err(io::Error::other(format!("not {count} free ports in {PORTS:?}"))),
    }
}

impl Process {
    fn signal(&self, signal: Signal) -> Result<(), String> {
        let child = self.child.as_ref().ok_or("it does not run")?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or("it has no process id")?;
        kill_process(pid, signal).map_err(|error| error.to_string())
    }

    fn start(&mut self) -> Result<(), String> {
        assert!(self.child.is_none(), "a node is started when it does not run");
        let failed = |error: io::Error| format!("{}: {error}", self.log.display());
        let log = OpenOptions::new().create(true).append(true).open(&self.log).map_err(failed)?;
        let err = log.try_clone().map_err(failed)?;
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null()).stdout(log).stderr(err);
        // What is set for a node of the user's own is not meant for these.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CORACLE_") {
                command.env_remove(name);
            }
        }
        let child = command.spawn();
        let started = child.map_err(|error| format!("{}: {error}", self.program.display()))?;
        self.child = Some(started);
        Ok(())
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only where it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Why it ended by itself; `None` while it runs.
    fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(20).collect();
        let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
        Some(format!("{} ended ({status}):\n{tail}", self.address))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

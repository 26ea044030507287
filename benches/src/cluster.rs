//! Owns a cluster of server processes on this machine, for a comparison: directories, ports, start and
//! end. The processes are the same binary that people run; nothing here reaches into a node.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use coracle_client::Client;
use coracle_client::admin::Init;
use rand::RngExt;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::failure::Failure;
use crate::metrics::{Page, processor_time};

/// How long a start may take, on a slow machine with slow disks.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(50);

/// Below what the kernel gives to outgoing connections: one of those could take a port between its
/// choice and its use.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// Tries before giving up: most ports of the range are free on any sane machine.
const PORT_TRIES_MAX: usize = 1_000;

/// Several nodes share this machine; all else is as it comes.
const SETTINGS: &[&str] = &["storage.memory_budget=256MiB", "observability.log_filter=warn"];

/// What a cluster shall be.
#[derive(Clone, Debug)]
pub struct ClusterPlan {
    /// The binary `coracle`.
    pub program: PathBuf,
    /// How many nodes.
    pub nodes: usize,
    /// How many shards; 0 means as many as by default.
    pub shards: u32,
    /// The directory in which the cluster gets one of its own.
    pub dir: PathBuf,
    /// Further settings, `key=value`.
    pub settings: Vec<String>,
}

/// A cluster that stands. Dropping it kills the nodes and removes their data.
pub struct Cluster {
    nodes: Vec<Node>,
    // Last: the processes are killed before their directory goes.
    _dir: TempDir,
}

struct Node {
    child: Child,
    client: SocketAddr,
    http: SocketAddr,
    log: PathBuf,
}

impl Cluster {
    /// Starts the nodes and makes a cluster of them.
    pub async fn start(plan: &ClusterPlan) -> Result<Cluster, Failure> {
        let dir = tempfile::Builder::new().prefix("coracle-bench-").tempdir_in(&plan.dir);
        let dir =
            dir.map_err(Failure::of(format!("make a directory in {}", plan.dir.display())))?;
        let ports = free_ports(plan.nodes * 3)?;
        let peers: Vec<SocketAddr> = (0..plan.nodes).map(|node| ports[node * 3 + 1]).collect();
        let nodes = ports.chunks(3).enumerate();
        let nodes = nodes.map(|(at, ports)| Node::start(plan, dir.path(), at, ports, &peers));
        let mut cluster = Cluster { nodes: nodes.collect::<Result<_, _>>()?, _dir: dir };
        let client = Client::builder().seeds(cluster.addresses()).connect_lazy();
        let client = client.map_err(Failure::of("make a client"))?;
        let deadline = Instant::now() + START_DEADLINE;
        for node in &mut cluster.nodes {
            node.wait_answer(&client, deadline).await?;
        }
        let nodes = plan.nodes as u32;
        let init = Init { shards: plan.shards, replicas: 0, nodes };
        client.admin().init(init).await.map_err(Failure::of("make the cluster"))?;
        client.close().await;
        Ok(cluster)
    }

    /// Where clients find the nodes.
    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.client.to_string()).collect()
    }

    /// All nodes' metrics, added up.
    pub async fn metrics(&self) -> Result<Page, Failure> {
        let mut all = Page::default();
        for node in &self.nodes {
            all.add(&Page::read(node.http).await?);
        }
        Ok(all)
    }

    /// Processor time that all nodes have used so far.
    pub fn processor_time(&self) -> Duration {
        self.nodes
            .iter()
            .filter_map(|node| node.child.id())
            .map(|id| processor_time(Some(id)))
            .sum()
    }

    /// Kills the nodes and waits for their end. Their data go.
    pub async fn stop(mut self) {
        for node in &mut self.nodes {
            // It fails only where the process has ended already.
            let _ = node.child.kill().await;
        }
    }
}

impl Node {
    fn start(
        plan: &ClusterPlan,
        dir: &Path,
        at: usize,
        ports: &[SocketAddr],
        peers: &[SocketAddr],
    ) -> Result<Node, Failure> {
        let [client, peer, http] = [ports[0], ports[1], ports[2]];
        let join: Vec<String> = peers.iter().map(SocketAddr::to_string).collect();
        let data_dir = dir.join(format!("node{}", at + 1));
        let log = data_dir.with_extension("log");
        let file = File::create(&log).map_err(Failure::of(format!("write {}", log.display())))?;
        let copy = file.try_clone().map_err(Failure::of("write a log"))?;
        let mut command = Command::new(&plan.program);
        command.arg("server").args([
            format!("--data-dir={}", data_dir.display()),
            format!("--listen={client}"),
            format!("--peer-listen={peer}"),
            format!("--http-listen={http}"),
            format!("--join={}", join.join(",")),
            format!("--zone=z{at}"),
            format!("--exit-with-parent={}", std::process::id()),
        ]);
        let settings = SETTINGS.iter().copied().chain(plan.settings.iter().map(String::as_str));
        command.args(settings.map(|setting| format!("--set={setting}")));
        command.stdin(Stdio::null()).stdout(file).stderr(copy).kill_on_drop(true);
        // What is set for a node of the user's own is not meant for this one.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CORACLE_") {
                command.env_remove(name);
            }
        }
        let child = command.spawn();
        let child = child.map_err(Failure::of(format!("start {}", plan.program.display())))?;
        Ok(Node { child, client, http, log })
    }

    async fn wait_answer(&mut self, client: &Client, deadline: Instant) -> Result<(), Failure> {
        let address = self.client.to_string();
        loop {
            if client.admin().node_status(&address).await.is_ok() {
                return Ok(());
            }
            let ended = self.child.try_wait().map_err(Failure::of("look after a node"))?;
            if ended.is_some() || Instant::now() >= deadline {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().rev().take(10).collect();
                let lines: Vec<&str> = lines.into_iter().rev().collect();
                let text =
                    format!("a node does not start; its log ends with:\n{}", lines.join("\n"));
                return Err(Failure::new(text));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

fn free_ports(count: usize) -> Result<Vec<SocketAddr>, Failure> {
    let mut random = rand::rng();
    let mut held: Vec<TcpListener> = Vec::new();
    for _ in 0..PORT_TRIES_MAX {
        if held.len() == count {
            break;
        }
        // A port that is held here is taken for the next try, so none is chosen twice.
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, random.random_range(PORTS))));
    }
    let ports = held.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>();
    let ports = ports.map_err(Failure::of("choose ports"))?;
    match ports.len() == count {
        true => Ok(ports),
        false => Err(Failure::new(format!("no {count} free ports in {PORTS:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_distinct() {
        let mut ports = free_ports(30).unwrap();
        ports.sort();
        ports.dedup();
        assert_eq!(ports.len(), 30);
    }
}

//! Owns a cluster of server processes on this machine: directories, ports, start and end. The
//! processes are the same binary that people run; nothing here reaches into a node.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_client::Client;
use coracle_client::admin::Init;
use tempfile::TempDir;

use crate::failure::Failure;
use crate::metrics::Page;
use crate::process::{Process, START_DEADLINE, free_ports};

/// Several nodes share this machine; all else is as it comes. The block cache holds a million keys of
/// 256 bytes on every node, since each has a replica of all.
const SETTINGS: &[&str] = &["storage.memory_budget=1GiB", "observability.log_filter=warn"];

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
    process: Process,
    client: SocketAddr,
    http: SocketAddr,
}

impl Cluster {
    /// Starts the nodes and makes a cluster of them.
    pub async fn start(plan: &ClusterPlan) -> Result<Cluster, Failure> {
        let dir = tempfile::Builder::new().prefix("coracle-bench-").tempdir_in(&plan.dir);
        let dir =
            dir.map_err(Failure::of(format!("make a directory in {}", plan.dir.display())))?;
        let ports = free_ports(Ipv4Addr::LOCALHOST.into(), plan.nodes * 3)?;
        let peers: Vec<SocketAddr> = (0..plan.nodes).map(|node| ports[node * 3 + 1]).collect();
        let nodes = ports.chunks(3).enumerate();
        let nodes = nodes.map(|(at, ports)| Node::start(plan, dir.path(), at, ports, &peers));
        let mut cluster = Cluster { nodes: nodes.collect::<Result<_, _>>()?, _dir: dir };
        let client = Client::builder().seeds(cluster.addresses()).connect_lazy();
        let client = client.map_err(Failure::of("make a client"))?;
        let deadline = Instant::now() + START_DEADLINE;
        for node in &mut cluster.nodes {
            let address = node.client.to_string();
            let answers = || async { client.admin().node_status(&address).await.is_ok() };
            node.process.wait_for(deadline, answers).await?;
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

    /// How many nodes it has.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// The processes' numbers.
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(|node| node.process.id()).collect()
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
        self.nodes.iter().map(|node| node.process.processor_time()).sum()
    }

    /// Memory that all nodes hold.
    pub fn memory_bytes(&self) -> u64 {
        self.nodes.iter().map(|node| node.process.memory_bytes()).sum()
    }

    /// Kills the nodes and waits for their end. Their data go.
    pub async fn stop(mut self) {
        for node in &mut self.nodes {
            node.process.stop().await;
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
        let mut args = vec![
            "server".to_owned(),
            format!("--data-dir={}", data_dir.display()),
            format!("--listen={client}"),
            format!("--peer-listen={peer}"),
            format!("--http-listen={http}"),
            format!("--join={}", join.join(",")),
            format!("--zone=z{at}"),
            format!("--exit-with-parent={}", std::process::id()),
        ];
        let settings = SETTINGS.iter().copied().chain(plan.settings.iter().map(String::as_str));
        args.extend(settings.map(|setting| format!("--set={setting}")));
        let process = Process::start(&plan.program, &args, data_dir.with_extension("log"))?;
        Ok(Node { process, client, http })
    }
}

/// Clients of a cluster, each with connections of its own.
pub fn connect(seeds: &[String], connections: usize) -> Result<Vec<Client>, Failure> {
    let client = |_| Client::builder().seeds(seeds).name("coracle-bench").connect_lazy();
    let clients = (0..connections).map(client).collect::<Result<_, _>>();
    clients.map_err(Failure::of("make a client"))
}

//! Owns everything that one report measures, side by side on this machine: a cluster of ours, its peers,
//! an echo server and RocksDB alone, all with the same keys. Measures nothing itself.
//!
//! All of them stay up while each is measured in its turn, so that the turns can be short and what else
//! happens on the machine hits all alike. What they do meanwhile is seen in [`Rig::idle_cores`].

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_client::Client;
use futures_util::TryStreamExt;

use crate::cluster::{Cluster, ClusterPlan, connect};
use crate::failure::Failure;
use crate::limit::alone::Alone;
use crate::load::fill;
use crate::peer::etcd::Etcd;
use crate::peer::redis::Redis;
use crate::port::{Port, System};
use crate::process::{Process, START_DEADLINE, free_ports};
use crate::witness::Witness;
use crate::workload::Workload;

/// Connections of callers of unary calls, ours and etcd's.
const CONNECTIONS: usize = 64;

/// The smart client: one, whose callers share a pipeline to each node.
const CLIENTS: usize = 1;

/// What is put up.
#[derive(Clone, Debug)]
pub struct RigPlan {
    /// The binary `coracle`.
    pub program: PathBuf,
    /// Where everything keeps its data.
    pub dir: PathBuf,
    /// Keys and values.
    pub workload: Workload,
}

/// Everything, loaded and warm. Dropping it ends all and removes their data.
pub struct Rig {
    /// Three nodes of ours.
    pub cluster: Cluster,
    /// Through the smart client.
    pub coracle: System,
    /// Through plain unary calls.
    pub unary: System,
    /// Three nodes of etcd.
    pub etcd: Etcd,
    /// Its callers.
    pub etcd_callers: System,
    /// One node of Redis.
    pub redis: Redis,
    /// Its callers.
    pub redis_callers: System,
    /// Answers with nothing.
    pub echo: SocketAddr,
    /// Callers of unary calls that are answered with nothing.
    pub echo_callers: System,
    /// RocksDB alone.
    pub alone: Alone,
    /// What was loaded.
    pub workload: Workload,
    clients: Vec<Client>,
    dir: PathBuf,
    _echo: Process,
}

impl Rig {
    /// Starts and loads everything. `said` hears what is going on.
    pub async fn start(plan: &RigPlan, said: &dyn Fn(&str)) -> Result<Rig, Failure> {
        let (dir, workload) = (&plan.dir, &plan.workload);
        let keys = workload.keys;
        said("starting three nodes");
        let cluster = Cluster::start(&cluster_plan(plan, 3, 0)).await?;
        let witness = Arc::new(Witness::new(keys));
        let clients = connect(&cluster.addresses(), CLIENTS)?;
        let coracle = System::of_clients(&clients, "default", witness.clone());
        let unary = System::of_unary(&cluster.addresses(), CONNECTIONS, witness)?;
        load(&coracle, workload, said).await?;
        warm(&clients[0]).await?;

        said("starting three nodes of etcd");
        let etcd = Etcd::start(dir).await?;
        let ports = etcd.connect(CONNECTIONS)?.into_iter().map(Port::Etcd).collect();
        let witness = Arc::new(Witness::new(keys));
        let etcd_callers = System::new("etcd", ports, witness);
        load(&etcd_callers, workload, said).await?;

        said("starting Redis");
        let redis = Redis::start(dir).await?;
        let ports = vec![Port::Redis(redis.port())];
        let redis_callers = System::new("Redis", ports, Arc::new(Witness::new(keys)));
        load(&redis_callers, workload, said).await?;

        let (_echo, echo) = start_echo(dir).await?;
        // It has no keys that could be wrong.
        let none = Arc::new(Witness::new(0));
        let echo_callers = System::of_unary(&[echo.to_string()], CONNECTIONS, none)?;
        let echo_callers = System { name: "echo", ..echo_callers };
        said("loading RocksDB alone");
        let alone = Alone::load(dir, workload)?;
        Ok(Rig {
            cluster,
            coracle,
            unary,
            etcd,
            etcd_callers,
            redis,
            redis_callers,
            echo,
            echo_callers,
            alone,
            workload: workload.clone(),
            clients,
            dir: dir.clone(),
            _echo,
        })
    }

    /// Where everything keeps its data.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The first of the smart clients.
    pub fn client(&self) -> &Client {
        &self.clients[0]
    }

    /// Cores that each system keeps busy with nothing to do: ours, etcd, Redis.
    pub async fn idle_cores(&self, window: Duration) -> [f64; 3] {
        let used = || {
            let (cluster, etcd, redis) = (&self.cluster, &self.etcd, &self.redis);
            [cluster.processor_time(), etcd.processor_time(), redis.processor_time()]
        };
        let (began, before) = (Instant::now(), used());
        tokio::time::sleep(window).await;
        let (after, seconds) = (used(), began.elapsed().as_secs_f64());
        [0, 1, 2].map(|at| after[at].saturating_sub(before[at]).as_secs_f64() / seconds)
    }
}

/// A cluster in the rig's place.
pub fn cluster_plan(plan: &RigPlan, nodes: usize, shards: u32) -> ClusterPlan {
    let (program, dir) = (plan.program.clone(), plan.dir.clone());
    ClusterPlan { program, nodes, shards, dir, settings: Vec::new() }
}

/// Writes every key, and says how fast.
pub async fn load(
    system: &System,
    workload: &Workload,
    said: &dyn Fn(&str),
) -> Result<(), Failure> {
    let began = Instant::now();
    fill(system, workload).await?;
    let seconds = began.elapsed().as_secs_f64();
    let per_second = workload.keys as f64 / seconds;
    let (name, keys) = (system.name, workload.keys);
    said(&format!("{name}: {keys} keys in {seconds:.0} s, {per_second:.0} a second"));
    Ok(())
}

/// Reads everything once: into the caches. The keys that were found.
pub async fn warm(client: &Client) -> Result<u64, Failure> {
    let mut found = client.scan(..).pages();
    let mut keys = 0;
    while let Some(page) = found.try_next().await.map_err(Failure::of("scan"))? {
        keys += page.entries.len() as u64;
    }
    Ok(keys)
}

async fn start_echo(dir: &Path) -> Result<(Process, SocketAddr), Failure> {
    let address = free_ports(Ipv4Addr::LOCALHOST.into(), 1)?[0];
    let this = std::env::current_exe().map_err(Failure::of("find this program"))?;
    let args = ["echo".to_owned(), address.to_string()];
    let log = dir.join(format!("coracle-bench-echo-{}.log", std::process::id()));
    let mut process = Process::start(&this, &args, log.clone())?;
    let answers = || async move { tokio::net::TcpStream::connect(address).await.is_ok() };
    process.wait_for(Instant::now() + START_DEADLINE, answers).await?;
    // It is open, and has no further use once the server runs.
    let _ = std::fs::remove_file(log);
    Ok((process, address))
}

//! Owns a cluster of processes on this machine: where its data live, its start, and the faults that can
//! be done to it. Does not know load or people (see `load` and `screen`).

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_client::admin::{GroupStatus, Init, NodeStatus};
use coracle_client::{Admin, Client, NodeId};
use futures_util::future::join_all;
use tempfile::TempDir;

use crate::failure::{Exit, Failure};

use super::ports::{self, Ports};
use super::process::{NodePlan, NodeProcess};

/// How long a start may take, on a slow machine with slow disks.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// How long nodes may take to stop when their data are kept. All go at once, so the last ones find
/// nobody to hand over to; nothing is lost by killing them.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(50);

/// How long one node may take to say how it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// Shards of a demo, the default of every cluster.
pub const SHARDS: u32 = 16;

/// Small budgets: many nodes share this machine, with everything else that runs on it.
const SETTINGS: &[&str] = &[
    "test.fault_injection=true",
    "storage.memory_budget=128MiB",
    "storage.log_segment_bytes=16MiB",
    "storage.log_bytes_target=128MiB",
    "storage.disk_reserve_bytes=64MiB",
    "limits.request_bytes_in_flight=64MiB",
    "observability.log_filter=info,openraft=error",
];

/// What a cluster shall be.
#[derive(Clone, Debug)]
pub struct ClusterPlan {
    /// The program: this one.
    pub program: PathBuf,
    /// How many nodes.
    pub nodes: usize,
    /// Dealt out in turn.
    pub zones: Vec<String>,
    /// Where data are kept; without it they go when the cluster does.
    pub data_dir: Option<PathBuf>,
    /// No disk at all.
    pub in_memory: bool,
    /// Further settings, `key=value`.
    pub settings: Vec<String>,
    /// Ports to choose from; without it those to be remembered, where they are free.
    pub ports: Option<Range<u16>>,
}

/// A cluster of processes. Dropping it kills them.
pub struct Cluster {
    nodes: Vec<Node>,
    client: Client,
    keep: bool,
    is_preferred: bool,
    // Last: the processes are killed before their directory goes.
    scratch: Option<TempDir>,
}

/// One node.
pub struct Node {
    /// In the cluster; 0 until it has one.
    pub id: NodeId,
    process: NodeProcess,
}

impl Node {
    /// As people call it.
    pub fn name(&self) -> String {
        format!("n{}", self.id)
    }

    /// Where clients find it.
    pub fn address(&self) -> String {
        self.process.plan().ports.client.to_string()
    }

    /// Its failure domain.
    pub fn zone(&self) -> &str {
        &self.process.plan().zone
    }

    /// Whether it is meant to run.
    pub fn is_started(&self) -> bool {
        self.process.is_started()
    }
}

impl Cluster {
    /// Chooses directories and ports. Starts nothing.
    pub fn prepare(plan: &ClusterPlan) -> Result<Cluster, Failure> {
        let (dir, scratch) = match &plan.data_dir {
            Some(dir) => (kept_dir(dir, plan.nodes)?, None),
            None => {
                let scratch = tempfile::Builder::new().prefix("coracle-demo-").tempdir();
                let scratch = scratch.map_err(|error| {
                    Failure::io("make a directory in", std::env::temp_dir(), &error)
                })?;
                (scratch.path().to_owned(), Some(scratch))
            }
        };
        let mut rng = rand::rng();
        let chosen = match plan.ports.clone() {
            Some(range) => ports::free(plan.nodes, range, &mut rng).map(|ports| (ports, true)),
            None => ports::preferred_or_free(plan.nodes, &mut rng),
        };
        let (ports, is_preferred) =
            chosen.map_err(|error| Failure::failed(format!("cannot choose ports: {error}")))?;
        let nodes = plans(plan, &dir, &ports).into_iter();
        let nodes = nodes.map(|plan| Node { id: NodeId(0), process: NodeProcess::new(plan) });
        let client = Client::builder()
            .seeds(ports.iter().map(|ports| ports.client.to_string()))
            .name("coracle-demo")
            .connect_lazy()
            .map_err(|error| Failure::call("make a client", &error))?;
        let keep = plan.data_dir.is_some();
        Ok(Cluster { nodes: nodes.collect(), client, keep, is_preferred, scratch })
    }

    /// Whether all ports are those to be remembered.
    pub fn has_preferred_ports(&self) -> bool {
        self.is_preferred
    }

    /// Where the nodes' directories and logs are.
    pub fn dir(&self) -> &Path {
        let data_dir = &self.nodes[0].process.plan().data_dir;
        data_dir.parent().unwrap_or(data_dir)
    }

    /// A client of all nodes.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The nodes, by id.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Starts all nodes, makes the cluster if it does not stand yet, and waits until every shard is
    /// led. `ready` hears of each node, with the time that it took.
    pub async fn start(
        &mut self,
        mut ready: impl FnMut(&Node, Duration),
    ) -> Result<Duration, Failure> {
        let started = Instant::now();
        let deadline = started + START_DEADLINE;
        for node in &mut self.nodes {
            node.process.start()?;
        }
        let mut stands = true;
        for at in 0..self.nodes.len() {
            let status = self.wait_answer(at, deadline).await?;
            stands &= !status.cluster_id.is_empty();
            self.nodes[at].id = match status.node.id {
                // It gets the ids in the order of the addresses, which is this one.
                NodeId(0) => NodeId(at as u64 + 1),
                id => id,
            };
            ready(&self.nodes[at], started.elapsed());
        }
        if !stands {
            let nodes = self.nodes.len() as u32;
            let init = Init { nodes, shards: SHARDS, replicas: 3.min(nodes) };
            let made = self.client.admin().init(init).await;
            made.map_err(|error| self.explained("make the cluster", &error))?;
        }
        self.wait_led(deadline).await?;
        for at in 0..self.nodes.len() {
            self.nodes[at].id = self.wait_answer(at, deadline).await?.node.id;
        }
        self.nodes.sort_by_key(|node| node.id);
        Ok(started.elapsed())
    }

    /// Where a node stands in [`Cluster::nodes`].
    pub fn find(&self, id: NodeId) -> Result<usize, Failure> {
        self.nodes.iter().position(|node| node.id == id).ok_or_else(|| {
            let names: Vec<String> = self.nodes.iter().map(Node::name).collect();
            Failure::usage(format!("there is no n{id}: {}", names.join(", ")))
        })
    }

    /// SIGKILL, now.
    pub fn kill(&mut self, at: usize) -> Instant {
        self.nodes[at].process.kill();
        Instant::now()
    }

    /// Waits for the end of a node that was killed.
    pub async fn reap(&mut self, at: usize) {
        self.nodes[at].process.reap().await;
    }

    /// Starts nodes that were killed, all at once, and waits until each answers.
    pub async fn restart(&mut self, places: &[usize]) -> Result<(), Failure> {
        let deadline = Instant::now() + START_DEADLINE;
        for at in places {
            self.nodes[*at].process.start()?;
        }
        for at in places {
            self.wait_answer(*at, deadline).await?;
        }
        Ok(())
    }

    /// A setting, `key=value`, that holds from a node's next start on.
    pub fn set(&mut self, at: usize, setting: &str) {
        self.nodes[at].process.set(setting);
    }

    /// The process of a node, to be ended gently or looked at.
    pub fn process(&mut self, at: usize) -> &mut NodeProcess {
        &mut self.nodes[at].process
    }

    /// Cuts a node off from all others.
    pub async fn partition(&self, at: usize) -> Result<(), Failure> {
        let node = &self.nodes[at];
        let others = self.nodes.iter().map(|node| node.id).filter(|id| *id != node.id);
        let cut_from: Vec<NodeId> = others.collect();
        let cut = self.client.admin().inject_fault(&node.address(), &cut_from).await;
        cut.map_err(|error| Failure::call(format!("cut off {}", node.name()), &error))
    }

    /// Ends every partition.
    pub async fn heal(&self) -> Result<(), Failure> {
        for node in self.nodes.iter().filter(|node| node.is_started()) {
            let healed = self.client.admin().inject_fault(&node.address(), &[]).await;
            healed.map_err(|error| Failure::call(format!("heal {}", node.name()), &error))?;
        }
        Ok(())
    }

    /// What each node says of itself, in the order of [`Cluster::nodes`].
    pub async fn statuses(&self) -> Vec<Option<NodeStatus>> {
        let admin = self.client.admin();
        join_all(self.nodes.iter().map(|node| status(&admin, node.address()))).await
    }

    /// Waits until a node has applied, in each of its groups, all that the group's leader had when
    /// this was called.
    pub async fn wait_caught_up(&self, at: usize, deadline: Instant) -> Result<(), Failure> {
        let others = self.statuses().await;
        let wanted = |own: &GroupStatus| {
            let groups = others.iter().flatten().flat_map(|status| &status.groups);
            let applied = groups.filter(|group| group.shard == own.shard && group.role == "leader");
            applied.map(|group| group.applied_index).max()
        };
        let admin = self.client.admin();
        loop {
            let status = status(&admin, self.nodes[at].address()).await;
            // A group without a leader has nothing to be caught up with, and is waited for.
            let caught_up = status.is_some_and(|status| {
                !status.groups.is_empty()
                    && status.groups.iter().all(|group| {
                        wanted(group).is_none_or(|wanted| group.applied_index >= wanted)
                            && (group.role == "leader" || group.leader.is_some())
                    })
            });
            if caught_up {
                return Ok(());
            }
            let what = || format!("{} has not caught up in time", self.nodes[at].name());
            self.pause(deadline, what).await?;
        }
    }

    /// Keeps the scratch directory, for its logs.
    pub fn keep_logs(&mut self) {
        if let Some(scratch) = self.scratch.take() {
            // The nodes' plans know the path.
            let _ = scratch.keep();
        }
    }

    /// Stops all nodes: gently where their data are kept, at once where they go anyway.
    pub async fn stop(mut self) {
        let stops = self.nodes.iter_mut().map(|node| async {
            if self.keep {
                node.process.stop(STOP_PATIENCE).await;
            } else {
                node.process.kill();
                node.process.reap().await;
            }
        });
        join_all(stops).await;
        self.client.close().await;
        if let Some(scratch) = self.scratch {
            // What cannot be removed lies in the system's temporary directory, which is cleaned.
            let _ = scratch.close();
        }
    }

    /// Waits until a node answers, and gives up at once when its process has ended.
    async fn wait_answer(&mut self, at: usize, deadline: Instant) -> Result<NodeStatus, Failure> {
        let admin = self.client.admin();
        loop {
            let node = &mut self.nodes[at];
            if let Some(status) = status(&admin, node.address()).await {
                return Ok(status);
            }
            if let Some(why) = node.process.ended() {
                let text = format!("a node does not start ({}): {why}", node.address());
                return Err(Failure::failed(text));
            }
            let address = node.address();
            let log = node.process.plan().log();
            let what = || format!("no answer from {address} in time; its log: {}", log.display());
            self.pause(deadline, what).await?;
        }
    }

    /// Waits until every shard of the map has a leader that says so itself.
    async fn wait_led(&self, deadline: Instant) -> Result<(), Failure> {
        loop {
            if let Ok(map) = self.client.admin().map().await {
                let nodes = self.statuses().await.into_iter().flatten();
                let nodes = nodes.map(|status| (status.node.id, status)).collect();
                let led = |shard| crate::admin::health::leader(shard, &nodes).is_some();
                if map.shards.len() > 1 && map.shards.iter().all(led) {
                    return Ok(());
                }
            }
            self.pause(deadline, || "not every shard has found a leader in time".to_owned())
                .await?;
        }
    }

    async fn pause(&self, deadline: Instant, what: impl FnOnce() -> String) -> Result<(), Failure> {
        if Instant::now() >= deadline {
            let logs = self.dir().display();
            return Err(
                Failure::new(Exit::Unhealthy, what()).next(format!("the logs are in {logs}"))
            );
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }

    fn explained(&self, what: &str, error: &coracle_client::Error) -> Failure {
        Failure::call(what, error).next(format!("the nodes' logs are in {}", self.dir().display()))
    }
}

async fn status(admin: &Admin, address: String) -> Option<NodeStatus> {
    tokio::time::timeout(STATUS_TIMEOUT, admin.node_status(&address)).await.ok()?.ok()
}

fn plans(plan: &ClusterPlan, dir: &Path, ports: &[Ports]) -> Vec<NodePlan> {
    let join: Vec<String> = ports.iter().map(|ports| ports.peer.to_string()).collect();
    let mut settings: Vec<String> = SETTINGS.iter().map(|text| (*text).to_owned()).collect();
    settings.push(format!("test.in_memory={}", plan.in_memory));
    settings.extend(plan.settings.iter().cloned());
    let node = |(at, ports): (usize, &Ports)| NodePlan {
        program: plan.program.clone(),
        data_dir: dir.join(format!("node{}", at + 1)),
        ports: *ports,
        zone: plan.zones[at % plan.zones.len()].clone(),
        join: join.clone(),
        settings: settings.clone(),
    };
    ports.iter().enumerate().map(node).collect()
}

/// The directory to keep data in: absolute, and, where a cluster lies in it already, of as many
/// nodes.
fn kept_dir(dir: &Path, nodes: usize) -> Result<PathBuf, Failure> {
    let failed = |error: std::io::Error| Failure::io("use", dir, &error);
    fs::create_dir_all(dir).map_err(failed)?;
    let dir = dir.canonicalize().map_err(failed)?;
    let found = (1..).take_while(|at| dir.join(format!("node{at}")).is_dir()).count();
    if found != 0 && found != nodes {
        let text = format!("{} holds a cluster of {found} nodes, not {nodes}", dir.display());
        return Err(Failure::usage(text).next(format!("--nodes {found}, or another --data-dir")));
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(nodes: usize, data_dir: Option<PathBuf>) -> ClusterPlan {
        ClusterPlan {
            program: "coracle".into(),
            nodes,
            zones: vec!["a".to_owned(), "b".to_owned()],
            data_dir,
            in_memory: false,
            settings: vec!["raft.heartbeat_interval=50ms".to_owned()],
            // Apart from the ranges of the tests that start real nodes.
            ports: Some(31_000..32_000),
        }
    }

    #[test]
    fn every_node_knows_all_and_has_its_own_place() {
        let ports = ports::free(3, 31_000..32_000, &mut rand::rng()).unwrap();
        let plans = plans(&plan(3, None), Path::new("/d"), &ports);
        let args = plans[2].args();
        let join: Vec<String> = ports.iter().map(|ports| ports.peer.to_string()).collect();
        for wanted in [
            "--data-dir=/d/node3".to_owned(),
            "--zone=a".to_owned(),
            format!("--join={}", join.join(",")),
            format!("--listen={}", ports[2].client),
            "--set=raft.heartbeat_interval=50ms".to_owned(),
            "--set=test.in_memory=false".to_owned(),
        ] {
            assert!(args.contains(&wanted), "{wanted} in {args:?}");
        }
        assert_eq!(plans[1].zone, "b");
    }

    #[tokio::test]
    async fn a_kept_cluster_keeps_its_size() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["node1", "node2"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert!(Cluster::prepare(&plan(2, Some(dir.path().to_owned()))).is_ok());
        let Err(failure) = Cluster::prepare(&plan(3, Some(dir.path().to_owned()))) else {
            panic!("two are three");
        };
        assert!(failure.what.contains("2 nodes"), "{failure:?}");
    }

    #[tokio::test]
    async fn a_node_that_does_not_start_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let mut wrong = plan(1, Some(dir.path().to_owned()));
        wrong.program = "/bin/false".into();
        let mut cluster = Cluster::prepare(&wrong).unwrap();
        let failure = cluster.start(|_, _| {}).await.unwrap_err();
        assert!(failure.what.contains("it ended"), "{failure:?}");
        cluster.stop().await;
    }
}

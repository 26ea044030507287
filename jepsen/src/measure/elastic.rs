//! A cluster that grows, shrinks and restarts under a checked load, and no request fails. Owns the
//! order of what is done to it, and the verdict by phase.

use std::path::PathBuf;
use std::time::Duration;

use coracle_client::topology::NodeState;
use coracle_client::{Client, ErrorKind};
use tokio::time::Instant;

use super::attempts::Attempts;
use super::block_on;
use super::mixed::{Mixed, Phase, Shape};
use super::moves::{self, MapWatch, PATIENCE};
use crate::cluster::process::{Cluster, Setup};

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(15);
/// Between two looks at what is waited for.
const POLL: Duration = Duration::from_millis(100);
/// A percentile needs so many requests: shorter phases are held against the base line together.
const PHASE_REQUESTS_MIN: usize = 1_000;
/// Of the rate that was asked for, so much must have been reached.
const RATE_MIN: f64 = 0.97;

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// How many shards.
    pub shards: u32,
    /// The load goes on for at least so long.
    pub lasts: Duration,
    /// The base line.
    pub base: Duration,
    /// Each other phase lasts at least so long.
    pub phase_min: Duration,
    /// The load.
    pub shape: Shape,
    /// The 99th percentile of a phase may be so many times that of the base line.
    pub p99_times: f64,
    /// The slowest requests of every phase are told, not only of those that are too slow.
    pub slowest: bool,
    /// The control: nodes that are told to stop do not hand over, and answer nobody.
    pub no_drain: bool,
}

/// Runs, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

/// One run.
struct Run<'a> {
    plan: &'a Plan,
    cluster: Cluster,
    load: Mixed,
    /// Of those nodes that are there: the one that goes next is the oldest.
    oldest: usize,
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    let Shape { keys, rate, deadline, .. } = plan.shape;
    println!(
        "{} nodes, {} shards; {rate} requests/s on {keys} keys, each within {deadline:?}{}",
        plan.nodes,
        plan.shards,
        if plan.no_drain { "; the control: nobody drains" } else { "" }
    );
    let attempts = Attempts::listen()?;
    let cluster = Cluster::start_as(Setup {
        program: plan.program.clone(),
        nodes: plan.nodes,
        shards: plan.shards,
        settings: vec![format!("test.skip_drain={}", plan.no_drain)],
        ..Setup::default()
    });
    let cluster = cluster.await?;
    // What moves is what this asks for, so that each phase is what it is called.
    moves::by_hand(cluster.client()).await?;
    let client = Client::builder().seeds(cluster.addresses()).name("coracle-jepsen-load");
    let client = client.operation_timeout(deadline).connect_lazy();
    let client = client.map_err(|error| error.to_string())?;
    let load = Mixed::start(&client, plan.shape, attempts).await?;
    let watch = MapWatch::start(&cluster)?;
    let mut run = Run { plan, cluster, load, oldest: 0 };
    let done = run.rounds().await;
    let Run { load, mut cluster, .. } = run;
    if let Some(why) = cluster.casualty() {
        println!("WRONG: {why}");
    }
    let (phases, lost) = load.stop().await?;
    let held = verdict(plan, &phases, &lost);
    let well = watch.judge(&cluster).await?;
    done?;
    let held = held && well && cluster.casualty().is_none();
    println!("{}", if held { "PASS" } else { "FAIL" });
    Ok(held)
}

impl Run<'_> {
    async fn rounds(&mut self) -> Result<(), String> {
        let (began, plan) = (Instant::now(), self.plan);
        // Caches fill, connections are made: no base line yet.
        self.begin("warm up");
        self.hold(began, plan.base / 3).await;
        let from = self.begin("base line");
        self.hold(from, plan.base).await;
        loop {
            self.grow().await?;
            self.shrink().await?;
            self.split_and_merge().await?;
            self.roll().await?;
            if began.elapsed() >= plan.lasts {
                return Ok(());
            }
        }
    }

    fn begin(&self, name: &str) -> Instant {
        self.tell();
        println!("{name}");
        self.load.enter(name);
        Instant::now()
    }

    fn tell(&self) {
        let phase = self.load.phase();
        if !phase.took.is_empty() {
            println!("    {}", phase.line());
            phase.told().for_each(|line| println!("      {line}"));
        }
    }

    /// Lets the load go on until a phase has lasted so long.
    async fn hold(&self, from: Instant, lasts: Duration) {
        while from.elapsed() < lasts {
            let left = lasts.saturating_sub(from.elapsed());
            tokio::time::sleep(left.min(PROGRESS)).await;
            if left > PROGRESS {
                println!("    {}", self.load.phase().line());
            }
        }
    }

    async fn grow(&mut self) -> Result<(), String> {
        let from = self.begin("add and rebalance");
        let at = self.cluster.add().await?;
        println!("        n{} has joined", at + 1);
        let admin = self.cluster.client().admin();
        let operation = loop {
            let plan = moves::planned(self.cluster.client()).await?;
            match admin.start_rebalance(&plan).await {
                Ok(operation) => break operation,
                // The map has changed meanwhile.
                Err(error) if error.kind() == ErrorKind::Conflict => {
                    println!("        {error}");
                }
                Err(error) => return Err(format!("apply: {error}")),
            }
        };
        moves::done(self.cluster.client(), operation.id).await?;
        self.hold(from, self.plan.phase_min).await;
        Ok(())
    }

    async fn shrink(&mut self) -> Result<(), String> {
        let from = self.begin("drain");
        let at = self.oldest;
        self.oldest += 1;
        let node = self.cluster.status(at).await?.node.id;
        let admin = self.cluster.client().admin();
        admin.drain(node).await.map_err(|error| format!("drain: {error}"))?;
        loop {
            let groups = self.cluster.status(at).await?.groups;
            let led = groups.iter().filter(|group| group.role == "leader").count();
            if led == 0 {
                break;
            }
            if from.elapsed() >= PATIENCE {
                return Err(format!("n{node} still leads {led} shards"));
            }
            tokio::time::sleep(POLL).await;
        }
        println!("        n{node} leads nothing after {:.1} s", from.elapsed().as_secs_f64());
        self.hold(from, self.plan.phase_min).await;
        let from = self.begin("decommission");
        let begun = admin.decommission(node).await;
        let (_, operation) = begun.map_err(|error| format!("decommission: {error}"))?;
        let operation = operation.ok_or("decommission: no operation")?;
        moves::done(self.cluster.client(), operation.id).await?;
        let map = admin.map().await.map_err(|error| error.to_string())?;
        let state = map.node(node).map(|node| node.state);
        if state != Some(NodeState::Decommissioned) {
            return Err(format!("n{node} is {state:?} behind its decommission"));
        }
        let took = self.cluster.terminate(at).await?;
        println!("        n{node} is empty, and stopped in {:.1} s", took.as_secs_f64());
        self.hold(from, self.plan.phase_min).await;
        Ok(())
    }

    /// Every shard becomes two, one after the other, and all of them one again.
    async fn split_and_merge(&mut self) -> Result<(), String> {
        let from = self.begin("split every shard");
        let client = self.cluster.client().clone();
        let before = moves::arcs(&client).await?;
        for shard in before.keys() {
            moves::halve(&client, *shard).await?;
        }
        self.hold(from, self.plan.phase_min).await;
        let from = self.begin("merge back");
        let halves = moves::arcs(&client).await?;
        if halves.len() != before.len() * 2 {
            return Err(format!("{} shards became {}", before.len(), halves.len()));
        }
        for shard in before.keys() {
            let behind = halves.get(shard).ok_or_else(|| format!("shard {shard} is gone"))?.1;
            let right = halves.iter().find(|(_, (start, _))| *start == behind);
            let (right, _) = right.ok_or_else(|| format!("nothing is behind shard {shard}"))?;
            moves::merge(&client, *shard, *right).await?;
        }
        let after = moves::arcs(&client).await?;
        if after != before {
            return Err(format!("the shards were {before:?}, are {after:?}"));
        }
        self.hold(from, self.plan.phase_min).await;
        Ok(())
    }

    async fn roll(&mut self) -> Result<(), String> {
        let from = self.begin("rolling restart");
        for at in self.oldest..self.cluster.len() {
            let took = self.cluster.terminate(at).await?;
            self.cluster.restart(at)?;
            moves::caught_up(&mut self.cluster, at).await?;
            println!("        n{} stopped in {:.1} s, and is back", at + 1, took.as_secs_f64());
        }
        self.hold(from, self.plan.phase_min).await;
        Ok(())
    }
}

/// Prints the phases, and says whether every promise holds.
fn verdict(plan: &Plan, phases: &[Phase], lost: &[String]) -> bool {
    println!();
    phases.iter().for_each(|phase| println!("{}", phase.line()));
    // A request may slip in before the first phase is named.
    let judged = || phases.iter().filter(|phase| !["", "warm up"].contains(&&*phase.name));
    let base = judged().next().map(Phase::quantiles).unwrap_or_default().p99;
    let (mut failed, mut wrong, mut slow) = (0, 0, Vec::new());
    let mut all = Phase { name: "all".to_owned(), ..Phase::default() };
    for phase in phases {
        failed += phase.failed.len();
        wrong += phase.wrong.len();
        all.took.extend(&phase.took);
        all.lasted += phase.lasted;
        phase.attempts.iter().for_each(|(tries, n)| *all.attempts.entry(*tries).or_default() += n);
        phase.met.iter().for_each(|(met, n)| *all.met.entry(met.clone()).or_default() += n);
    }
    for phase in judged().filter(|phase| phase.took.len() >= PHASE_REQUESTS_MIN) {
        let times = phase.quantiles().p99.as_secs_f64() / base.as_secs_f64().max(1e-6);
        if times > plan.p99_times {
            slow.push(format!("{}: p99 is {times:.1} times that of the base line", phase.name));
        }
        if plan.slowest || times > plan.p99_times {
            slow.extend(phase.slowest().map(|line| format!("  {}: {line}", phase.name)));
        }
    }
    let rate = all.took.len() as f64 / all.lasted.as_secs_f64().max(1e-3);
    println!("\nattempts that a request took: how many requests");
    all.attempts.iter().for_each(|(tries, count)| println!("{tries:>8}: {count}"));
    println!("attempts that met:");
    all.met.iter().for_each(|(met, count)| println!("{count:>8}: {met}"));
    println!(
        "\n{} requests in {:.1} min ({rate:.0}/s): {failed} failed, {wrong} wrong answers, {} lost",
        all.took.len(),
        all.lasted.as_secs_f64() / 60.0,
        lost.len()
    );
    println!(
        "p99 of the base line {:.1} ms, at most {} times that",
        base.as_secs_f64() * 1e3,
        plan.p99_times
    );
    phases.iter().flat_map(Phase::told).chain(lost.iter().take(20)).for_each(|line| {
        println!("  {line}");
    });
    slow.iter().for_each(|line| println!("  {line}"));
    let is_slow = slow.iter().any(|line| !line.starts_with(' '));
    let enough = rate >= f64::from(plan.shape.rate) * RATE_MIN;
    if !enough {
        println!(
            "  {rate:.0} requests a second are not the {} that were asked for",
            plan.shape.rate
        );
    }
    failed == 0 && wrong == 0 && lost.is_empty() && !is_slow && enough
}

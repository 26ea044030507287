//! How long writes of a shard do not flow when its leader dies, is paused, or is cut off. Owns the
//! rounds: the next begins only when the node is back and past its embargo.

use std::path::PathBuf;
use std::time::Duration;

use coracle_client::{Client, ShardId};
use tokio::time::Instant;

use super::load::{Ledger, Load};
use super::{Quantiles, block_on};
use crate::cluster::process::Cluster;

/// Two on each shard, five milliseconds apart: a gap is known to a few milliseconds, and five nodes on
/// one small machine still have time for their heartbeats.
const WRITERS_PER_SHARD: usize = 2;
const WRITE_PAUSE: Duration = Duration::from_millis(5);

/// Writes must flow again within this, or the measurement ends.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(30);

/// So many writes after the fault show that they flow.
const FLOW: usize = 20;

/// A gap is looked for at least so long after the fault.
const LOOK: Duration = Duration::from_secs(2);

/// Twice the default lease: a node that is back gives no votes for one.
const EMBARGO: Duration = Duration::from_secs(1);

/// What is done to a leader.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum How {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Stop,
    /// Cut off from all other nodes.
    Cut,
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// How many faults.
    pub rounds: u32,
    /// Which.
    pub how: How,
    /// The 99th percentile must not be longer.
    pub p99_max: Option<Duration>,
}

/// Measures, prints, and says whether all held: nothing lost, and the percentile within its bound.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    let mut cluster = Cluster::start(plan.program.as_deref(), plan.nodes).await?;
    let client = cluster.client().clone();
    let load = Load::start(&client, WRITERS_PER_SHARD, WRITE_PAUSE).await?;
    let map = client.admin().map().await.map_err(|error| error.to_string())?;
    let shards: Vec<ShardId> =
        map.shards.iter().map(|shard| shard.id).filter(|shard| shard.0 != 0).collect();
    tokio::time::sleep(LOOK).await;
    let (mut gaps, mut others, mut acknowledged) = (Vec::new(), Vec::new(), 0);
    for round in 0..plan.rounds {
        let shard = shards[round as usize % shards.len()];
        let (led, victim) = leader(&cluster, &client, shard).await?;
        let began = Instant::now();
        harm(&mut cluster, victim, plan.how).await?;
        let ended = recovered(&load.ledger, shard, began).await?;
        let gap = load.ledger.longest_gap(shard.0, began, ended);
        let untouched = shards.iter().filter(|shard| !led.contains(shard));
        let untouched = untouched.map(|shard| load.ledger.longest_gap(shard.0, began, ended)).max();
        println!(
            "round {:>3}: n{} led shard {shard}; no write for {:.0} ms, elsewhere for {:.0} ms",
            round + 1,
            victim + 1,
            gap.as_secs_f64() * 1e3,
            untouched.unwrap_or_default().as_secs_f64() * 1e3
        );
        gaps.push(gap);
        others.extend(untouched);
        mend(&mut cluster, victim, plan.how).await?;
        acknowledged += load.ledger.acknowledged();
        load.ledger.forget_before(Instant::now());
    }
    let ledger = load.stop().await;
    let lost = ledger.lost(&client).await?;
    let (gaps, others) = (Quantiles::of(&gaps), Quantiles::of(&others));
    println!("{:?}, {} rounds, {} nodes", plan.how, plan.rounds, plan.nodes);
    println!("the longest write gap of the shard: {gaps}");
    println!("of shards led by other nodes:       {others}");
    println!(
        "{acknowledged} writes acknowledged, {} failed, {} lost",
        ledger.failed().len(),
        lost.len()
    );
    lost.iter().chain(ledger.failed().iter().take(10)).for_each(|line| println!("  {line}"));
    let is_late = plan.p99_max.is_some_and(|max| gaps.p99 > max);
    Ok(lost.is_empty() && !is_late)
}

/// The process that leads a shard, and all shards that it leads.
async fn leader(
    cluster: &Cluster,
    client: &Client,
    shard: ShardId,
) -> Result<(Vec<ShardId>, usize), String> {
    let deadline = Instant::now() + RECOVERY_DEADLINE;
    loop {
        for at in 0..cluster.len() {
            let groups = cluster.status(at).await?.groups;
            let leads = groups.iter().filter(|group| group.role == "leader");
            let led: Vec<ShardId> = leads.map(|group| group.shard).collect();
            if led.contains(&shard) {
                return Ok((led, at));
            }
        }
        if Instant::now() >= deadline {
            let map = client.admin().cached_map();
            return Err(format!("nobody leads shard {shard}: {map:?}"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn harm(cluster: &mut Cluster, at: usize, how: How) -> Result<(), String> {
    match how {
        How::Kill => cluster.kill(at),
        How::Stop => cluster.pause(at, true),
        How::Cut => cluster.cut(at, true).await,
    }
}

async fn mend(cluster: &mut Cluster, at: usize, how: How) -> Result<(), String> {
    match how {
        How::Kill => cluster.restart(at)?,
        How::Stop => cluster.pause(at, false)?,
        How::Cut => cluster.cut(at, false).await?,
    }
    cluster.wait_back(at).await?;
    tokio::time::sleep(EMBARGO).await;
    Ok(())
}

async fn recovered(ledger: &Ledger, shard: ShardId, began: Instant) -> Result<Instant, String> {
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = Instant::now();
        if now - began >= LOOK && ledger.since(shard.0, now - LOOK / 4) >= FLOW {
            return Ok(now);
        }
        if now - began >= RECOVERY_DEADLINE {
            return Err(format!("no writes of shard {shard} flow after {RECOVERY_DEADLINE:?}"));
        }
    }
}

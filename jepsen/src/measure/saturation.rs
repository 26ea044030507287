//! As much load as goes, on a healthy cluster: nobody may take a busy leader for a dead one. Owns the
//! run and its verdict: no election.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

use super::block_on;
use super::load::Load;
use crate::cluster::process::Cluster;

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(15);

/// Elections of the start are over by then.
const SETTLE: Duration = Duration::from_secs(3);

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// Writers, each with one write under way.
    pub writers: u32,
    /// For how long.
    pub lasts: Duration,
}

/// Measures, prints, and says whether there was no election, and nothing lost.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    let cluster = Cluster::start(plan.program.as_deref(), plan.nodes).await?;
    let client = cluster.client().clone();
    let map = client.admin().map().await.map_err(|error| error.to_string())?;
    let shards = map.shards.len().saturating_sub(1).max(1);
    let per_shard = (plan.writers as usize).div_ceil(shards);
    let load = Load::start(&client, per_shard, Duration::ZERO).await?;
    tokio::time::sleep(SETTLE).await;
    let (before, began) = (cluster.terms().await?, Instant::now());
    let end = began + plan.lasts;
    let mut acknowledged = 0;
    while Instant::now() < end {
        let from = Instant::now();
        tokio::time::sleep_until(end.min(from + PROGRESS)).await;
        let now = Instant::now();
        let written = load.ledger.acknowledged();
        load.ledger.forget_before(now);
        acknowledged += written;
        println!(
            "{:>5.0} s: {:.0} writes/s, {} elections",
            (now - began).as_secs_f64(),
            written as f64 / (now - from).as_secs_f64(),
            cluster.terms().await?.saturating_sub(before)
        );
    }
    let elections = cluster.terms().await?.saturating_sub(before);
    let ledger = load.stop().await;
    let lost = ledger.lost(&client).await?;
    println!(
        "{acknowledged} writes by {} writers in {:.0} s, {} failed, {} lost; {elections} elections",
        per_shard * shards,
        plan.lasts.as_secs_f64(),
        ledger.failed().len(),
        lost.len()
    );
    lost.iter().chain(ledger.failed().iter().take(10)).for_each(|line| println!("  {line}"));
    Ok(elections == 0 && lost.is_empty())
}

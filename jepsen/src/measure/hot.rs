//! A shard that takes most of the load: it is split by itself, and its halves spread. Owns the load and
//! how its spread is told. Asks the cluster for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use coracle_client::admin::BalancingChange;
use coracle_client::{Client, ShardId};
use tokio::time::Instant;

use super::attempts::Attempts;
use super::block_on;
use super::mixed::{Mixed, Phase, Shape};
use super::moves::{self, MapWatch};
use crate::cluster::process::{Cluster, Setup};

/// Between two looks, and lines.
const LOOK: Duration = Duration::from_secs(5);

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// How many shards.
    pub shards: u32,
    /// What the servers are told besides: `key=value`.
    pub settings: Vec<String>,
    /// A shard is split by itself that has so many keys a second read and written.
    pub split_load: u64,
    /// How long the load before is looked at, and the load after.
    pub look: Duration,
    /// It is split and spread within this.
    pub within: Duration,
    /// No node may serve more than so many percent of the load afterwards.
    pub share_max: f64,
    /// The load.
    pub shape: Shape,
}

/// Runs, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    let attempts = Attempts::listen()?;
    let cluster = Cluster::start_as(Setup {
        program: plan.program.clone(),
        nodes: plan.nodes,
        shards: plan.shards,
        settings: plan.settings.clone(),
        ..Setup::default()
    });
    let cluster = cluster.await?;
    let client = cluster.client().clone();
    let change = BalancingChange {
        automatic: Some(true),
        split_load: Some(plan.split_load),
        ..BalancingChange::default()
    };
    moves::balancing(&client, change).await?;
    let load = Mixed::start(&client, plan.shape, attempts).await?;
    let watch = MapWatch::start(&cluster)?;
    let map = client.admin().map().await.map_err(|error| error.to_string())?;
    let hot = map.shards.iter().map(|shard| shard.id).find(|id| id.0 != 0).ok_or("no shard")?;
    let first: BTreeSet<ShardId> = map.shards.iter().map(|shard| shard.id).collect();
    let keys = load.keys_of(hot.0).await?;
    println!(
        "shard {hot} gets the heat: {} of {} keys; split by itself from {} keys a second on",
        keys.len(),
        plan.shape.keys,
        plan.split_load
    );
    load.heat(keys.clone());
    load.enter("hot");
    tokio::time::sleep(plan.look).await;
    let before = load.phase();
    tell("before", &before);
    let took = spread(plan, &client, &load, &first).await?;
    load.enter("spread");
    tokio::time::sleep(plan.look).await;
    let after = load.phase();
    tell("after", &after);
    let (phases, lost) = load.stop().await?;
    phases.iter().for_each(|phase| println!("{}", phase.line()));
    let failed: usize = phases.iter().map(|p| p.failed.len() + p.wrong.len()).sum();
    phases.iter().flat_map(Phase::told).for_each(|line| println!("  {line}"));
    moves::settle(&client).await?;
    let well = watch.judge(&cluster).await?;
    lost.iter().for_each(|line| println!("  {line}"));
    let (_, share) = most(&after.nodes);
    match took {
        Some(took) => println!("split and spread in {:.0} s by itself", took.as_secs_f64()),
        None => println!("WRONG: not split and spread within {:?}", plan.within),
    }
    let held = took.is_some() && share <= plan.share_max && failed == 0 && lost.is_empty() && well;
    println!("{}", if held { "PASS" } else { "FAIL" });
    Ok(held)
}

/// Waits until there are new shards and no node serves too much; how long that took, `None` when it is
/// not so in time.
async fn spread(
    plan: &Plan,
    client: &Client,
    load: &Mixed,
    first: &BTreeSet<ShardId>,
) -> Result<Option<Duration>, String> {
    let began = Instant::now();
    loop {
        load.recount();
        tokio::time::sleep(LOOK).await;
        let (phase, map) = (load.phase(), client.admin().map().await);
        let map = map.map_err(|error| error.to_string())?;
        let new = map.shards.iter().filter(|shard| !first.contains(&shard.id)).count();
        let (_, share) = most(&phase.nodes);
        println!(
            "{:>5.0} s: {new} new shards; the busiest node serves {share:.0} %",
            began.elapsed().as_secs_f64()
        );
        if new > 0 && share <= plan.share_max {
            return Ok(Some(began.elapsed()));
        }
        if began.elapsed() >= plan.within {
            return Ok(None);
        }
    }
}

/// Who has most, and how many percent of all.
fn most(counts: &BTreeMap<u64, u64>) -> (u64, f64) {
    let all: u64 = counts.values().sum();
    let most = counts.iter().max_by_key(|(_, count)| **count);
    most.map_or((0, 0.0), |(id, count)| (*id, *count as f64 * 100.0 / all.max(1) as f64))
}

fn tell(when: &str, phase: &Phase) {
    let shares = |letter: char, counts: &BTreeMap<u64, u64>| {
        let all = counts.values().sum::<u64>().max(1);
        let share = |(id, count): (&u64, &u64)| {
            format!("{letter}{id} {:.0} %", *count as f64 * 100.0 / all as f64)
        };
        counts.iter().map(share).collect::<Vec<_>>().join(", ")
    };
    println!("{when}: of the load, by node: {}", shares('n', &phase.nodes));
    println!("{:>w$}  by shard: {}", "", shares('s', &phase.shards), w = when.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_is_told_with_its_share() {
        let counts = BTreeMap::from([(1, 10), (2, 80), (3, 10)]);
        assert_eq!(most(&counts), (2, 80.0));
        assert_eq!(most(&BTreeMap::new()), (0, 0.0));
    }
}

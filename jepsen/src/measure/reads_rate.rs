//! How many reads a second three replicas serve, and how many the leader alone, each server held to a
//! quarter of a core. Owns the rounds and the comparison.
//!
//! Fair means: the same cluster, keys and readers, all leaderships on one node, the two ways in turn, and
//! of each the median. With leaderships spread over the nodes, leaders alone use three servers as well;
//! that is measured beside, and is no part of the verdict.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_client::{Client, Consistency};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::reads::{LEADER, Plan};
use crate::cluster::process::{Cluster, Setup};
use crate::cluster::quota::Quota;

/// Of a core, for each server.
const SHARE: f64 = 0.25;

/// Keys that are read; they fit into any cache, so that what is compared is the servers' work.
const KEYS: u64 = 1_000;

/// Clients, and reads that each has under way: enough to keep three servers busy.
const CLIENTS: usize = 8;
const IN_FLIGHT: usize = 32;

/// How long a round lasts, and how much of its beginning is not counted.
const ROUND: Duration = Duration::from_secs(6);
const WARM: Duration = Duration::from_secs(1);

const TIMEOUT: Duration = Duration::from_secs(10);

/// Compares, prints, and says whether three replicas bring as much as asked for.
pub(super) async fn compare(plan: &Plan) -> Result<bool, String> {
    let setup = Setup { program: plan.program.clone(), nodes: 3, ..Setup::default() };
    let cluster = Cluster::start_as(setup).await?;
    let spread = cluster.leaders().await;
    cluster.lead_all(LEADER).await?;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let builder = Client::builder().seeds(cluster.addresses()).name("coracle-jepsen-rate");
        clients.push(builder.connect_lazy().map_err(|error| error.to_string())?);
    }
    for key in 0..KEYS {
        let put = clients[0].put(format!("rate-{key}"), "x".repeat(100)).timeout(TIMEOUT);
        put.await.map_err(|error| format!("rate-{key}: {error}"))?;
    }
    let pids: Option<Vec<u32>> = (0..cluster.len()).map(|at| cluster.pid(at)).collect();
    let quota = Quota::hold(&pids.ok_or("a server does not run")?, SHARE)?;
    println!("each server is held to {SHARE} of a core; n{} leads all shards", LEADER + 1);
    let (mut leader, mut all) = (Vec::new(), Vec::new());
    for round in 1..=plan.rounds {
        leader.push(rate(&clients, Consistency::Linearizable).await?);
        all.push(rate(&clients, Consistency::Session).await?);
        let last = |rates: &[f64]| rates.last().copied().unwrap_or_default();
        println!(
            "round {round}: linearizable at the leader {:.0}/s, session reads at three replicas {:.0}/s",
            last(&leader),
            last(&all)
        );
    }
    for (shard, leads) in spread {
        let to = cluster.status(leads.at).await?.node.id;
        // One that stays where it is makes the figure beside no better.
        let _ = cluster.client().admin().transfer_leader(shard, Some(to)).await;
    }
    let beside = rate(&clients, Consistency::Linearizable).await?;
    drop(quota);
    let (leader, all) = (median(leader), median(all));
    let ratio = all / leader.max(f64::MIN_POSITIVE);
    println!(
        "medians: the leader alone {leader:.0}/s, three replicas {all:.0}/s: {ratio:.2} times"
    );
    println!("beside: linearizable, with leaderships spread over the nodes: {beside:.0}/s");
    Ok(ratio >= plan.ratio_min)
}

/// Reads a second.
async fn rate(clients: &[Client], consistency: Consistency) -> Result<f64, String> {
    let (counted, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let from = Instant::now() + WARM;
    let until = Instant::now() + ROUND;
    let mut readers = JoinSet::new();
    for number in 0..CLIENTS * IN_FLIGHT {
        let client = clients[number % clients.len()].clone();
        let (counted, failed) = (counted.clone(), failed.clone());
        readers.spawn(async move {
            let mut key = number as u64;
            while Instant::now() < until {
                key = (key * 31 + 7) % KEYS;
                let get = client.get(format!("rate-{key}")).consistency(consistency);
                let counter = match get.timeout(TIMEOUT).await {
                    Ok(Some(_)) => &counted,
                    _ => &failed,
                };
                let now = Instant::now();
                if from <= now && now < until {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    while let Some(ended) = readers.join_next().await {
        ended.map_err(|error| format!("a reader: {error}"))?;
    }
    match failed.load(Ordering::Relaxed) {
        0 => Ok(counted.load(Ordering::Relaxed) as f64 / (ROUND - WARM).as_secs_f64()),
        failed => Err(format!("{failed} reads failed or found nothing")),
    }
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_one_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
        assert_eq!(median(vec![]), 0.0);
    }
}

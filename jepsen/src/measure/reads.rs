//! Reads by replicas that do not lead, one of them held back: sessions, bounded reads, and what they
//! bring. Owns the cluster, the steps and the verdict. What reads may return is judged in `reads_judge`,
//! the readers are in `reads_sessions` and `reads_bounded`, the rates in `reads_rate`.

use std::path::PathBuf;
use std::time::Duration;

use super::reads_bounded::{self, Ticking};
use super::{Quantiles, block_on, reads_rate, reads_sessions};
use crate::cluster::process::{Cluster, Setup};
use crate::cluster::proxy::{Mix, Proxies};

/// The leader of all shards, a follower that keeps up, and one that is held back.
pub(super) const LEADER: usize = 0;
pub(super) const FOLLOWER: usize = 1;
pub(super) const LATE: usize = 2;

/// What the bounded reads ask for.
pub(super) const BOUND: Duration = Duration::from_millis(100);

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// At least so many session reads are judged.
    pub checks: u64,
    /// At least so many bounded reads are judged.
    pub bounded: u64,
    /// How late the one follower hears the others.
    pub delay: Duration,
    /// Sessions, each with a client that writes and another that reads.
    pub sessions: u32,
    /// Of session reads, at least this percentage is served by nodes that do not lead.
    pub followers_min: f64,
    /// At least so many had to wait or to move on.
    pub moved_min: u64,
    /// Rounds of the comparison of rates; 0 leaves it out.
    pub rounds: u32,
    /// Three replicas must bring at least so much of what the leader alone does; 0 only prints it.
    pub ratio_min: f64,
    /// What is drawn.
    pub seed: u64,
}

/// Runs, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    println!("seed {}", plan.seed);
    let mut held = true;
    if plan.checks > 0 || plan.bounded > 0 {
        held &= behind(plan).await?;
    }
    if plan.rounds > 0 {
        held &= reads_rate::compare(plan).await?;
    }
    println!("{}", if held { "PASS" } else { "FAIL" });
    Ok(held)
}

/// Sessions and bounded reads, with a follower that lags.
async fn behind(plan: &Plan) -> Result<bool, String> {
    let cluster = Cluster::start_as(Setup {
        program: plan.program.clone(),
        nodes: 3,
        late: Some(LATE),
        ..Setup::default()
    });
    let cluster = cluster.await?;
    cluster.lead_all(LEADER).await?;
    let proxies = Proxies::start(&cluster.addresses(), Mix::default(), plan.seed).await?;
    let ticking = Ticking::start(&cluster).await?;
    cluster.hold_back(plan.delay).await?;
    // By then everything that is on its way is late.
    tokio::time::sleep(2 * plan.delay).await;
    let terms = cluster.terms().await?;
    let mut held = lag(plan, &cluster, &ticking).await?;
    held &= reads_sessions::check(plan, &cluster, &proxies, &ticking).await?;
    held &= reads_bounded::check(plan, &cluster, &proxies, &ticking).await?;
    held &= lag(plan, &cluster, &ticking).await?;
    // Nearly as fresh as is asked for: now and then fresh enough, now and then not.
    cluster.hold_back(BOUND / 2).await?;
    tokio::time::sleep(2 * plan.delay).await;
    println!("now n{} hears the others {:?} late", LATE + 1, BOUND / 2);
    held &= reads_bounded::check(plan, &cluster, &proxies, &ticking).await?;
    let elections = cluster.terms().await?.saturating_sub(terms);
    println!("elections meanwhile: {elections}");
    ticking.stop().await;
    Ok(held)
}

/// How far behind the late follower is, by reads that take whatever it has; and whether that is far
/// enough for the rest to mean anything.
async fn lag(plan: &Plan, cluster: &Cluster, ticking: &Ticking) -> Result<bool, String> {
    let ages = reads_bounded::ages(cluster, ticking).await?;
    let lag = Quantiles::of(&ages);
    let old = ages.iter().filter(|age| **age > BOUND).count();
    println!(
        "n{} is behind: {lag}; of {} reads of whatever it has, {old} lack something older than {BOUND:?}",
        LATE + 1,
        ages.len()
    );
    // Not all of it: an answer to a writer takes its time as well.
    let is_behind = lag.p50 >= plan.delay.mul_f64(0.9);
    if !is_behind {
        println!("FAIL: it is not held back by {:?}", plan.delay);
    }
    Ok(is_behind)
}

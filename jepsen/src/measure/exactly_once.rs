//! Increments by many clients, while leaders change, answers are lost and requests come twice: in the
//! end each counter stands where its acknowledged increments put it. Owns the load, the changes of
//! leaders and the verdict. Losing and doubling is the proxies' (see `cluster::proxy`).
//!
//! The control gives every attempt a request id of its own: then a retry of what was applied counts
//! twice, and the sum must drift. Else the faults would not be ones that exactly-once protects from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_client::{Client, Outcome, ShardId};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::block_on;
use crate::cluster::process::{Cluster, Leads, Setup};
use crate::cluster::proxy::{Counts, Mix, Proxies};

/// An increment is tried for so long: its outcome must be known in the end.
const INCREMENT_TIMEOUT: Duration = Duration::from_secs(120);

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(10);

/// So much more often than asked for do faults come, because they come by chance.
const MARGIN: f64 = 1.3;

/// Twice the default lease: a node that is back gives no votes for one.
const EMBARGO: Duration = Duration::from_secs(1);

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// Clients, each with connections and an id of its own.
    pub clients: u64,
    /// Increments that each has under way.
    pub in_flight: u64,
    /// Counters, each in a place of its own.
    pub counters: usize,
    /// Increments by 1, over all counters.
    pub increments: u64,
    /// At least so many changes of leaders: kills and transfers in turn.
    pub changes: u64,
    /// At least so many answers that are dropped.
    pub drops: u64,
    /// At least so many requests that come twice.
    pub duplicates: u64,
    /// The control.
    pub fresh_ids: bool,
    /// How many runs, each with the next seed.
    pub runs: u64,
    /// Of what is drawn: faults, counters, victims.
    pub seed: u64,
}

/// What clients were told of one counter: the value after each acknowledged increment.
#[derive(Clone, Debug, Default)]
struct Told {
    values: Vec<i64>,
}

/// Everything that clients were told.
#[derive(Debug, Default)]
struct Ledger {
    counters: Vec<Mutex<Told>>,
    acknowledged: AtomicU64,
    /// Said to be not applied, and made again.
    refused: AtomicU64,
    unknown: Mutex<Vec<String>>,
}

/// What was found in the end.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Verdict {
    expected: i64,
    sum: i64,
    /// What cannot be, counter by counter.
    wrong: Vec<String>,
}

/// Runs, prints, and says whether all held: without the control that every increment counts once,
/// with it that the sum drifts in every run.
pub fn run(plan: &Plan) -> Result<bool, String> {
    let mut good = 0;
    for number in 0..plan.runs {
        let plan = Plan { seed: plan.seed + number, ..plan.clone() };
        good += u64::from(block_on(one_run(&plan))?);
    }
    if plan.fresh_ids {
        println!("the control drifted in {good} of {} runs", plan.runs);
    }
    Ok(good == plan.runs)
}

async fn one_run(plan: &Plan) -> Result<bool, String> {
    let ids = if plan.fresh_ids { "a fresh request id on every attempt" } else { "request ids" };
    println!("seed {}: {} increments with {ids}", plan.seed, plan.increments);
    let setup = Setup { program: plan.program.clone(), nodes: plan.nodes, ..Setup::default() };
    let mut cluster = Cluster::start_as(setup).await?;
    let share = |count: u64| (MARGIN * count as f64 / plan.increments as f64).min(0.5);
    let (drop, duplicate) = (share(plan.drops), share(plan.duplicates));
    let mix = Mix { drop, duplicate };
    let proxies = Proxies::start(&cluster.addresses(), mix, plan.seed).await?;
    let ledger = Arc::new(Ledger {
        counters: (0..plan.counters).map(|_| Mutex::default()).collect(),
        ..Ledger::default()
    });
    let began = Instant::now();
    let gate = watch::Sender::new(0);
    let mut load = load(plan, &cluster, &proxies, &ledger, gate.subscribe())?;
    let progress = tokio::spawn(tell(ledger.clone(), began));
    let changes = change_leaders(plan, &mut cluster, &ledger, &gate).await?;
    while let Some(worker) = load.join_next().await {
        worker.map_err(|error| format!("a worker: {error}"))?;
    }
    progress.abort();
    let took = began.elapsed();
    let found = read_back(&cluster, plan.counters).await?;
    let told: Vec<Told> = ledger.counters.iter().map(|told| told.lock().clone()).collect();
    let verdict = judge(&told, &found);
    Ok(summary(plan, &ledger, proxies.counts(), &changes, &verdict, took))
}

/// The clients, each with its workers. Ticket by ticket, as far as the gate lets them.
fn load(
    plan: &Plan,
    cluster: &Cluster,
    proxies: &Proxies,
    ledger: &Arc<Ledger>,
    gate: watch::Receiver<u64>,
) -> Result<JoinSet<()>, String> {
    let tickets = Arc::new(AtomicU64::new(0));
    let mut workers = JoinSet::new();
    for number in 0..plan.clients {
        let mut builder = Client::builder()
            .seeds(cluster.addresses())
            .address_map(proxies.table())
            .name(format!("coracle-jepsen-{number}"));
        if plan.fresh_ids {
            builder = builder.unsafe_fresh_request_ids_for_tests();
        }
        let client = builder.connect_lazy().map_err(|error| error.to_string())?;
        for worker in 0..plan.in_flight {
            let seed = plan.seed ^ (number * plan.in_flight + worker + 1) << 20;
            workers.spawn(increment(
                client.clone(),
                ledger.clone(),
                tickets.clone(),
                plan.increments,
                gate.clone(),
                StdRng::seed_from_u64(seed),
            ));
        }
    }
    Ok(workers)
}

async fn increment(
    client: Client,
    ledger: Arc<Ledger>,
    tickets: Arc<AtomicU64>,
    increments: u64,
    mut gate: watch::Receiver<u64>,
    mut random: StdRng,
) {
    loop {
        let ticket = tickets.fetch_add(1, Ordering::Relaxed);
        if ticket >= increments || gate.wait_for(|open| ticket < *open).await.is_err() {
            return;
        }
        let counter = random.random_range(0..ledger.counters.len());
        loop {
            let call = client.increment(key(counter), 1).timeout(INCREMENT_TIMEOUT);
            match call.await {
                Ok(done) => {
                    ledger.counters[counter].lock().values.push(done.value);
                    ledger.acknowledged.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(error) if error.outcome() == Outcome::NotApplied => {
                    ledger.refused.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    ledger.unknown.lock().push(format!("{}: {error}", key(counter)));
                    break;
                }
            }
        }
    }
}

fn key(counter: usize) -> String {
    format!("counter-{counter:03}")
}

async fn tell(ledger: Arc<Ledger>, began: Instant) {
    let mut before = 0;
    loop {
        tokio::time::sleep(PROGRESS).await;
        let acknowledged = ledger.acknowledged.load(Ordering::Relaxed);
        let rate = (acknowledged - before) as f64 / PROGRESS.as_secs_f64();
        before = acknowledged;
        let at = began.elapsed().as_secs_f64();
        println!("{at:>5.0} s: {acknowledged} increments, {rate:.0}/s");
    }
}

/// What was done to leaders.
#[derive(Clone, Copy, Debug, Default)]
struct Changes {
    kills: u64,
    transfers: u64,
    /// Shards that got another leader by it.
    leaderships: u64,
}

/// Changes leaders, evenly over the increments: each change finds the load in full flow, and the load
/// does not end before the last change.
async fn change_leaders(
    plan: &Plan,
    cluster: &mut Cluster,
    ledger: &Ledger,
    gate: &watch::Sender<u64>,
) -> Result<Changes, String> {
    let mut random = StdRng::seed_from_u64(plan.seed);
    let mut changes = Changes::default();
    let steps = plan.changes + 1;
    for step in 1..steps {
        gate.send_replace(plan.increments * (step + 1) / steps);
        let due = plan.increments * step / steps;
        let stuck = Instant::now() + 2 * INCREMENT_TIMEOUT;
        // Those whose outcome stayed unknown are not counted, and are few.
        while ledger.acknowledged.load(Ordering::Relaxed) + ledger.unknown.lock().len() as u64 * 2
            < due
        {
            if Instant::now() > stuck {
                return Err("the increments do not go on".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let before = cluster.leaders().await;
        match step % 2 {
            1 => changes.leaderships += kill(cluster, &before, &mut random).await?,
            _ => changes.leaderships += transfer(cluster, &before, &mut random).await?,
        }
        changes.kills += step % 2;
        changes.transfers += 1 - step % 2;
    }
    gate.send_replace(plan.increments);
    Ok(changes)
}

/// SIGKILL to a node that leads; it comes back when others have taken its place.
async fn kill(
    cluster: &mut Cluster,
    before: &BTreeMap<ShardId, Leads>,
    random: &mut StdRng,
) -> Result<u64, String> {
    let all: Vec<&Leads> = before.iter().filter(|(id, _)| id.0 != 0).map(|(_, led)| led).collect();
    let victim = all.get(random.random_range(0..all.len().max(1))).ok_or("nobody leads")?.at;
    let led: BTreeMap<_, _> =
        before.iter().filter(|(_, leads)| leads.at == victim).map(|(id, at)| (*id, *at)).collect();
    cluster.kill(victim)?;
    cluster.wait_succeeded(&led).await?;
    cluster.restart(victim)?;
    cluster.wait_back(victim).await?;
    tokio::time::sleep(EMBARGO).await;
    println!("n{} killed and started again: {} shards got another leader", victim + 1, led.len());
    Ok(led.len() as u64)
}

/// A shard is handed to another node.
async fn transfer(
    cluster: &Cluster,
    before: &BTreeMap<ShardId, Leads>,
    random: &mut StdRng,
) -> Result<u64, String> {
    let shards: Vec<(&ShardId, &Leads)> = before.iter().filter(|(id, _)| id.0 != 0).collect();
    let at = random.random_range(0..shards.len().max(1));
    let (shard, leads) = shards.get(at).ok_or("nobody leads")?;
    let to = cluster.client().admin().transfer_leader(**shard, None).await;
    let to = to.map_err(|error| format!("transfer shard {shard}: {error}"))?;
    cluster.wait_succeeded(&BTreeMap::from([(**shard, **leads)])).await?;
    println!("shard {shard} was handed from n{} to n{to}", leads.at + 1);
    Ok(1)
}

/// Linearizable reads of all counters.
async fn read_back(cluster: &Cluster, counters: usize) -> Result<Vec<i64>, String> {
    let mut found = Vec::with_capacity(counters);
    for counter in 0..counters {
        let entry = cluster.client().get(key(counter)).timeout(INCREMENT_TIMEOUT).await;
        let entry = entry.map_err(|error| format!("read {} back: {error}", key(counter)))?;
        let value = entry.map_or(Ok(0), |entry| {
            let text = String::from_utf8_lossy(&entry.value).into_owned();
            text.parse().map_err(|_| format!("{} holds {text:?}", key(counter)))
        });
        found.push(value?);
    }
    Ok(found)
}

/// Every acknowledged increment counts once: the counter stands at their number, and each was told a
/// value that no other was.
fn judge(told: &[Told], found: &[i64]) -> Verdict {
    let mut verdict = Verdict { sum: found.iter().sum(), ..Verdict::default() };
    for (counter, (told, found)) in told.iter().zip(found).enumerate() {
        let acknowledged = told.values.len() as i64;
        verdict.expected += acknowledged;
        if acknowledged != *found {
            let key = key(counter);
            let line = format!("{key}: {acknowledged} acknowledged, and it stands at {found}");
            verdict.wrong.push(line);
        }
        let mut values = told.values.clone();
        values.sort_unstable();
        let odd = values.iter().zip(1..).find(|(value, place)| *value != place);
        if let Some((value, place)) = odd {
            let key = key(counter);
            let line =
                format!("{key}: the answers are not 1 to {acknowledged}: {value} at {place}");
            verdict.wrong.push(line);
        }
    }
    verdict
}

fn summary(
    plan: &Plan,
    ledger: &Ledger,
    counts: Counts,
    changes: &Changes,
    verdict: &Verdict,
    took: Duration,
) -> bool {
    let unknown = ledger.unknown.lock();
    println!(
        "{} increments by {} clients on {} counters in {:.0} s ({:.0}/s)",
        verdict.expected,
        plan.clients,
        plan.counters,
        took.as_secs_f64(),
        verdict.expected as f64 / took.as_secs_f64()
    );
    println!(
        "leader changes {} (asked {}): {} kills, {} transfers; {} leaderships moved",
        changes.kills + changes.transfers,
        plan.changes,
        changes.kills,
        changes.transfers,
        changes.leaderships
    );
    println!("answers dropped on the way back: {} (asked {})", counts.dropped, plan.drops);
    println!(
        "requests that came twice: {} (asked {}): {} answered as applied, {} refused",
        counts.duplicated, plan.duplicates, counts.duplicates_applied, counts.duplicates_refused
    );
    println!(
        "increments refused and made again: {}; with an unknown outcome: {}",
        ledger.refused.load(Ordering::Relaxed),
        unknown.len()
    );
    unknown.iter().take(5).for_each(|line| println!("  {line}"));
    let drift = verdict.sum - verdict.expected;
    println!("the sum is {}, expected {}: drift {drift}", verdict.sum, verdict.expected);
    if !plan.fresh_ids {
        verdict.wrong.iter().take(10).for_each(|line| println!("  {line}"));
    }
    let did_enough = counts.dropped >= plan.drops
        && counts.duplicated >= plan.duplicates
        && changes.kills + changes.transfers >= plan.changes;
    let held = match plan.fresh_ids {
        true => drift != 0,
        false => {
            let all = verdict.sum == plan.increments as i64;
            all && verdict.wrong.is_empty() && unknown.is_empty()
        }
    };
    let verdict = match (plan.fresh_ids, held) {
        (false, true) if did_enough => "PASS: every increment counts once",
        (true, true) if did_enough => "PASS: the control drifts",
        (_, true) => "FAIL: so few faults prove nothing",
        (false, false) => "FAIL: some increment does not count once",
        (true, false) => "FAIL: the control does not drift",
    };
    println!("{verdict}");
    held && did_enough
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(values: &[i64]) -> Told {
        Told { values: values.to_vec() }
    }

    #[test]
    fn each_increment_counts_once_in_any_order() {
        let verdict = judge(&[told(&[2, 1, 3]), told(&[])], &[3, 0]);
        assert_eq!(verdict, Verdict { expected: 3, sum: 3, wrong: Vec::new() });
    }

    #[test]
    fn an_increment_that_counts_twice_or_never_is_seen() {
        assert_eq!(judge(&[told(&[1, 3])], &[3]).wrong.len(), 2, "one was applied twice");
        assert_eq!(judge(&[told(&[1, 2, 3])], &[2]).wrong.len(), 1, "an acknowledged one is lost");
    }

    #[test]
    fn what_cancels_out_in_the_sum_is_seen() {
        let verdict = judge(&[told(&[1, 2]), told(&[1, 2])], &[3, 1]);
        assert_eq!((verdict.sum, verdict.expected, verdict.wrong.len()), (4, 4, 2));
        let verdict = judge(&[told(&[1, 1])], &[2]);
        assert_eq!(verdict.wrong.len(), 1, "two were told the same value");
    }
}

//! Counters that tick, and reads of them that bound how old they may be. Owns the ticking, its ledger
//! and the readers. An answer's own claim of its age counts for nothing here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_client::{Client, Consistency, Entry};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Quantiles;
use super::reads::{BOUND, FOLLOWER, LATE, LEADER, Plan};
use super::reads_judge::Ticks;
use super::reads_sessions::reader;
use crate::cluster::process::Cluster;
use crate::cluster::proxy::{Mix, Proxies};

/// Counters, each with a writer of its own.
pub(super) const COUNTERS: usize = 4;

/// Between two ticks of a counter.
const TICK: Duration = Duration::from_millis(5);

const TIMEOUT: Duration = Duration::from_secs(30);

/// Readers, each with one read under way. Every other reaches all nodes, the rest only the followers.
const READERS: usize = 16;

/// Reads that tell how far behind the late follower is.
const SAMPLES: usize = 400;

pub(super) fn tick_key(counter: usize) -> String {
    format!("tick-{counter}")
}

/// 0 for an absent key.
pub(super) fn value_of(entry: Option<&Entry>) -> u64 {
    let text = entry.map(|entry| String::from_utf8_lossy(&entry.value).into_owned());
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// The writers, and when which tick was acknowledged.
pub(super) struct Ticking {
    ledgers: Vec<Arc<Mutex<Ticks>>>,
    written: Arc<AtomicU64>,
    stop: watch::Sender<bool>,
    writers: JoinSet<()>,
}

impl Ticking {
    pub(super) async fn start(cluster: &Cluster) -> Result<Ticking, String> {
        let (stop, stopped) = watch::channel(false);
        let written = Arc::new(AtomicU64::new(0));
        let ledgers: Vec<Arc<Mutex<Ticks>>> = (0..COUNTERS).map(|_| Arc::default()).collect();
        let mut writers = JoinSet::new();
        for (counter, ledger) in ledgers.iter().enumerate() {
            let (client, ledger) = (cluster.client().clone(), ledger.clone());
            let (stopped, written) = (stopped.clone(), written.clone());
            writers.spawn(async move {
                let mut value = 1_u64;
                while !*stopped.borrow() {
                    let put = client.put(tick_key(counter), value.to_string()).timeout(TIMEOUT);
                    // One that failed is written again, with the same value.
                    if put.await.is_ok() {
                        ledger.lock().push(Instant::now());
                        written.fetch_add(1, Ordering::Relaxed);
                        value += 1;
                    }
                    tokio::time::sleep(TICK).await;
                }
            });
        }
        Ok(Ticking { ledgers, written, stop, writers })
    }

    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    pub(super) async fn stop(mut self) {
        self.stop.send_replace(true);
        while self.writers.join_next().await.is_some() {}
    }
}

/// How old what the late follower has is, by many reads.
pub(super) async fn ages(cluster: &Cluster, ticking: &Ticking) -> Result<Vec<Duration>, String> {
    // Through proxies of its own: what is counted elsewhere shall not know of these.
    let proxies = Proxies::start(&cluster.addresses(), Mix::default(), 0).await?;
    let client = reader(cluster, &proxies, &[LATE])?;
    let mut ages = Vec::with_capacity(SAMPLES);
    for sample in 0..SAMPLES {
        let (counter, begun) = (sample % COUNTERS, Instant::now());
        let get = client.get(tick_key(counter)).consistency(Consistency::Any).timeout(TIMEOUT);
        let read = get.read().await.map_err(|error| format!("n{}: {error}", LATE + 1))?;
        let value = value_of(read.entry.as_ref());
        ages.push(ticking.ledgers[counter].lock().age(begun, value));
    }
    Ok(ages)
}

/// What all readers have met.
#[derive(Default)]
struct Counts {
    reads: AtomicU64,
    by_leader: AtomicU64,
    by_late: AtomicU64,
    ages: Mutex<Vec<Duration>>,
    wrong: Mutex<Vec<String>>,
    failed: Mutex<Vec<String>>,
}

/// Reads until enough is judged, and says whether none was older than it may be.
pub(super) async fn check(
    plan: &Plan,
    cluster: &Cluster,
    proxies: &Proxies,
    ticking: &Ticking,
) -> Result<bool, String> {
    let (counts, began) = (Arc::new(Counts::default()), Instant::now());
    let late = cluster.status(LATE).await?.node.id;
    let mut readers = JoinSet::new();
    for number in 0..READERS {
        let reached: &[usize] =
            if number % 2 == 0 { &[LEADER, FOLLOWER, LATE] } else { &[FOLLOWER, LATE] };
        let client = reader(cluster, proxies, reached)?;
        let (counts, ledgers) = (counts.clone(), ticking.ledgers.clone());
        let wanted = plan.bounded;
        readers.spawn(async move {
            while counts.reads.load(Ordering::Relaxed) < wanted {
                for (counter, ledger) in ledgers.iter().enumerate() {
                    let node = read_one(&client, counter, ledger, &counts).await;
                    let is_late = node == Some(late);
                    counts.by_late.fetch_add(u64::from(is_late), Ordering::Relaxed);
                }
            }
        });
    }
    while let Some(ended) = readers.join_next().await {
        ended.map_err(|error| format!("a reader: {error}"))?;
    }
    Ok(summary(plan, &counts, began.elapsed()))
}

async fn read_one(
    client: &Client,
    counter: usize,
    ledger: &Mutex<Ticks>,
    counts: &Counts,
) -> Option<coracle_client::NodeId> {
    let begun = Instant::now();
    let get = client.get(tick_key(counter)).consistency(Consistency::Bounded(BOUND));
    let read = match get.timeout(TIMEOUT).read().await {
        Ok(read) => read,
        Err(error) => {
            counts.failed.lock().push(error.to_string());
            return None;
        }
    };
    let value = value_of(read.entry.as_ref());
    let (age, too_old) = {
        let ticks = ledger.lock();
        (ticks.age(begun, value), ticks.too_old(begun, value, BOUND))
    };
    counts.reads.fetch_add(1, Ordering::Relaxed);
    counts.by_leader.fetch_add(u64::from(read.served.leader), Ordering::Relaxed);
    counts.ages.lock().push(age);
    counts.wrong.lock().extend(too_old.map(|over| {
        let node = read.served.node;
        format!("{}: n{node} gave {value}, {over:?} older than allowed", tick_key(counter))
    }));
    Some(read.served.node)
}

fn summary(plan: &Plan, counts: &Counts, took: Duration) -> bool {
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let reads = load(&counts.reads);
    let (wrong, failed) = (counts.wrong.lock(), counts.failed.lock());
    println!(
        "reads bounded to {BOUND:?}: {reads} judged (asked {}) in {:.0} s, {} by leaders, {} by n{}",
        plan.bounded,
        took.as_secs_f64(),
        load(&counts.by_leader),
        load(&counts.by_late),
        LATE + 1
    );
    println!("  how old they were, by our own ledger: {}", Quantiles::of(&counts.ages.lock()));
    println!("  older than allowed: {}; failed: {}", wrong.len(), failed.len());
    wrong.iter().chain(failed.iter()).take(10).for_each(|line| println!("  {line}"));
    reads >= plan.bounded && wrong.is_empty() && failed.is_empty()
}

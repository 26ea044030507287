//! Sessions that write at the leader and read at followers. Owns the sessions and the counts. Each has
//! one client that writes, and another that takes in its mark and reads, as a second process would.
//!
//! Readers do not reach the leader: what it serves them all the same was handed on to it by a follower
//! that had waited and was still behind. Most reach only the follower that is held back: after a write
//! they read at once, and again when their follower must have caught up, as somebody does who comes
//! back. The others reach both followers, and meet the late one after the one that is not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_client::{Client, Consistency, NodeId, Served};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::reads::{FOLLOWER, LATE, LEADER, Plan};
use super::reads_bounded::{COUNTERS, Ticking, tick_key, value_of};
use super::reads_judge::Session;
use crate::cluster::process::Cluster;
use crate::cluster::proxy::Proxies;

/// A session waits for as long as its follower needs.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Reads at once after a write, of what was written.
const READS_AT_ONCE: u32 = 4;

/// Reads after that, of a session whose follower is late, and of one that has the choice.
const READS_OF_LATE: u32 = 200;
const READS_OF_BOTH: u32 = 10;

/// One session of so many has the choice.
const BOTH_OF: u32 = 6;

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(10);

/// Nobody listens there.
const NOWHERE: &str = "127.0.0.1:1";

/// What all sessions have met.
#[derive(Default)]
struct Counts {
    checks: AtomicU64,
    own: AtomicU64,
    wrong: Mutex<Vec<String>>,
    failed: Mutex<Vec<String>>,
    /// By node, and whether it led.
    served: Mutex<BTreeMap<(NodeId, bool), u64>>,
}

/// A client that reaches only some nodes, each through its proxy.
pub(super) fn reader(
    cluster: &Cluster,
    proxies: &Proxies,
    reached: &[usize],
) -> Result<Client, String> {
    let mut table = proxies.table();
    for at in (0..cluster.len()).filter(|at| !reached.contains(at)) {
        table.insert(cluster.address(at).to_owned(), NOWHERE.to_owned());
    }
    let builder = Client::builder().seeds(cluster.addresses()).name("coracle-jepsen-reader");
    builder.address_map(table).connect_lazy().map_err(|error| error.to_string())
}

/// Runs the sessions until enough reads are judged, and says whether all held.
pub(super) async fn check(
    plan: &Plan,
    cluster: &Cluster,
    proxies: &Proxies,
    ticking: &Ticking,
) -> Result<bool, String> {
    let (counts, began) = (Arc::new(Counts::default()), Instant::now());
    let mut sessions = JoinSet::new();
    for number in 0..plan.sessions {
        let (reached, reads, pause): (&[usize], u32, _) = match number % BOTH_OF {
            0 => (&[FOLLOWER, LATE], READS_OF_BOTH, Duration::ZERO),
            // An append waits for its turn on the late link, besides.
            _ => (&[LATE], READS_OF_LATE, plan.delay.mul_f64(1.75)),
        };
        let writer = Client::builder().seeds(cluster.addresses()).name("coracle-jepsen-writer");
        let one = One {
            number,
            writer: writer.connect_lazy().map_err(|error| error.to_string())?,
            reader: reader(cluster, proxies, reached)?,
            reads,
            pause,
            checks: plan.checks,
            counts: counts.clone(),
        };
        sessions.spawn(one.run());
    }
    let told = tokio::spawn(tell(counts.clone(), began));
    while let Some(ended) = sessions.join_next().await {
        ended.map_err(|error| format!("a session: {error}"))?;
    }
    told.abort();
    println!("{} ticks were written meanwhile and before", ticking.written());
    Ok(summary(plan, &counts, began.elapsed()))
}

async fn tell(counts: Arc<Counts>, began: Instant) {
    loop {
        tokio::time::sleep(PROGRESS).await;
        let checks = counts.checks.load(Ordering::Relaxed);
        println!("{:>5.0} s: {checks} session reads", began.elapsed().as_secs_f64());
    }
}

/// One session.
struct One {
    number: u32,
    writer: Client,
    reader: Client,
    reads: u32,
    pause: Duration,
    checks: u64,
    counts: Arc<Counts>,
}

impl One {
    async fn run(self) {
        let (own, mut session) = (format!("session-{}", self.number), Session::default());
        let mut value = 0;
        while self.counts.checks.load(Ordering::Relaxed) < self.checks {
            value += 1;
            let put = self.writer.put(own.clone(), value.to_string()).timeout(READ_TIMEOUT);
            if let Err(error) = put.await {
                self.counts.failed.lock().push(format!("{own}: {error}"));
                continue;
            }
            session.wrote(&own, value);
            let taken = self.reader.take_in(&self.writer.session_mark());
            taken.expect("a mark that this client has just given");
            for _ in 0..READS_AT_ONCE {
                self.read(&own, &mut session).await;
            }
            tokio::time::sleep(self.pause).await;
            for number in 0..self.reads {
                let tick = (self.number + number) as usize % COUNTERS;
                match number % 2 {
                    0 => self.read(&own, &mut session).await,
                    _ => self.read(&tick_key(tick), &mut session).await,
                }
            }
        }
    }

    async fn read(&self, key: &str, session: &mut Session) {
        let counts = &self.counts;
        let get = self.reader.get(key.to_owned()).consistency(Consistency::Session);
        let read = match get.timeout(READ_TIMEOUT).read().await {
            Ok(read) => read,
            Err(error) => {
                counts.failed.lock().push(format!("{key}: {error}"));
                return;
            }
        };
        let Served { node, leader, .. } = read.served;
        *counts.served.lock().entry((node, leader)).or_default() += 1;
        counts.checks.fetch_add(1, Ordering::Relaxed);
        counts.own.fetch_add(u64::from(key.starts_with("session")), Ordering::Relaxed);
        let wrong = session.read(key, value_of(read.entry.as_ref()));
        counts.wrong.lock().extend(wrong.map(|wrong| format!("session {}, {wrong}", self.number)));
    }
}

fn summary(plan: &Plan, counts: &Counts, took: Duration) -> bool {
    let checks = counts.checks.load(Ordering::Relaxed);
    let (served, wrong) = (counts.served.lock(), counts.wrong.lock());
    let followers: u64 =
        served.iter().filter(|((_, leader), _)| !leader).map(|(_, count)| count).sum();
    // No reader reaches the leader.
    let moved: u64 = served.iter().filter(|((_, leader), _)| *leader).map(|(_, count)| count).sum();
    let share = followers as f64 * 100.0 / checks.max(1) as f64;
    println!(
        "session reads: {checks} judged (asked {}), {} of keys that the session itself had written, in {:.0} s",
        plan.checks,
        counts.own.load(Ordering::Relaxed),
        took.as_secs_f64()
    );
    for ((node, leader), count) in served.iter() {
        let role = if *leader { "leads" } else { "follows" };
        println!("  served by n{node}, which {role}: {count}");
    }
    println!(
        "  by nodes that do not lead: {share:.1} % (asked {}); readers reach n{} and n{} only, not n{}",
        plan.followers_min,
        FOLLOWER + 1,
        LATE + 1,
        LEADER + 1
    );
    println!(
        "  waited at a follower that was still behind then, and were handed on to the leader: {moved} (asked {})",
        plan.moved_min
    );
    let failed = counts.failed.lock();
    println!("  went back, or missed an own write: {}; failed: {}", wrong.len(), failed.len());
    wrong.iter().chain(failed.iter()).take(10).for_each(|line| println!("  {line}"));
    let enough = checks >= plan.checks && share >= plan.followers_min && moved >= plan.moved_min;
    if !enough {
        println!("FAIL: fewer than asked for");
    }
    enough && wrong.is_empty() && failed.is_empty()
}

//! Scans of a large keyspace while it is written: plain, with leaders that are killed in between, and with
//! a reader that stops for a while. Owns the phases, their bounds and what is printed. Whether a scan is
//! right, `checker::scans` says.
//!
//! **Memory.** A server's is what it has above the most of an idle time before: writers at work, nobody
//! scanning, and all of the keyspace read once before, so that the block cache and the allocator's first
//! fill are not taken for the scan's. Before the scan with failovers the same number of servers is killed
//! without one: what a recovery takes is not the scan's either.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::block_on;
use super::memory::Watch;
use super::scan_load::{Book, Writers};
use super::scan_reader::{Manners, Reader, Told};
use crate::cluster::process::{Cluster, Setup};

/// What a client may need above idle, and each server.
const CLIENT_BYTES_MAX: u64 = 32 << 20;
const SERVER_BYTES_MAX: u64 = 64 << 20;
/// Writers alone, before the first phase: what servers need without a scan.
const IDLE: Duration = Duration::from_secs(10);
/// How long a scan with failovers takes at least: within the history, so that it needs no pin.
const PACED: Duration = Duration::from_secs(40);
/// Between two kills without a scan: as with one.
const BETWEEN_KILLS: Duration = Duration::from_secs(8);
/// A killed server is away for so long.
const DOWN: Duration = Duration::from_secs(1);
/// Progress of a scan is looked at so often.
const POLL: Duration = Duration::from_millis(50);
/// A scan that takes longer hangs.
const SCAN_MAX: Duration = Duration::from_secs(600);

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// How many shards.
    pub shards: u32,
    /// Keys that are there at first.
    pub keys: u64,
    /// Writes a second while it is scanned.
    pub rate: u32,
    /// Servers killed during the second phase.
    pub kills: u32,
    /// How long the reader of the third phase stops.
    pub pause: Duration,
}

/// Runs all phases, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

/// The process that scans (see [`Reader`]).
pub fn read(manners: &Manners) -> Result<bool, String> {
    block_on(async { super::scan_reader::read(manners).await.map(|()| true) })
}

/// What the servers' caches and write buffers may take: little, so that a cache that still grows is not
/// taken for the scan's. Write buffers of a server that was just started do grow for longer than that.
const MEMORY_BUDGET: &str = "96MiB";

async fn measure(plan: &Plan) -> Result<bool, String> {
    let setup = Setup {
        program: plan.program.clone(),
        nodes: plan.nodes,
        shards: plan.shards,
        settings: vec![format!("storage.memory_budget={MEMORY_BUDGET}")],
        ..Setup::default()
    };
    let mut rig = Rig {
        cluster: Cluster::start_as(setup).await?,
        book: Book::new(plan.keys),
        watch: Watch::start(),
        rate: plan.rate,
        round: 0,
        points: Vec::new(),
        idle: Vec::new(),
    };
    for at in 0..rig.cluster.len() {
        rig.watch.set(at, rig.cluster.pid(at));
    }
    let began = Instant::now();
    rig.book.fill(rig.cluster.client()).await?;
    let filled = began.elapsed().as_secs_f64();
    println!("{} keys over {} shards, written in {filled:.0} s", plan.keys, plan.shards);
    let seeds = rig.cluster.addresses().join(",");
    let manners = Manners { seeds, ..Manners::default() };
    for warm_up in ["warm-up", "again"] {
        rig.scan(warm_up, &manners, 0).await?;
    }
    rig.rest(0).await?;
    rig.scan("plain", &manners, 0).await?;
    rig.rest(plan.kills).await?;
    let per_second = plan.keys / PACED.as_secs();
    rig.scan("failovers", &Manners { per_second, ..manners.clone() }, plan.kills).await?;
    let (stop_after, stop_for) = (plan.keys / 2, plan.pause);
    // The servers have begun anew.
    rig.idle.clear();
    for warm_up in ["warm-up of the new processes", "again"] {
        rig.scan(warm_up, &manners, 0).await?;
    }
    rig.rest(0).await?;
    rig.scan("stopped reader", &Manners { stop_after, stop_for, ..manners }, 0).await?;
    let (acknowledged, unknown) = rig.book.ledger().counts();
    println!("{acknowledged} writes acknowledged, {unknown} of unknown outcome");
    rig.book.failed().iter().take(10).for_each(|line| println!("  {line}"));
    println!();
    for (holds, point) in &rig.points {
        println!("{}  {point}", if *holds { "PASS" } else { "FAIL" });
    }
    Ok(rig.points.iter().all(|(holds, _)| *holds))
}

/// All that the phases share.
struct Rig {
    cluster: Cluster,
    book: Arc<Book>,
    watch: Watch,
    rate: u32,
    round: u64,
    points: Vec<(bool, String)>,
    /// The most that each server had while nobody scanned.
    idle: Vec<u64>,
}

impl Rig {
    /// Writers alone, and servers that are killed.
    async fn rest(&mut self, kills: u32) -> Result<(), String> {
        let writers = self.writers();
        self.watch.take();
        tokio::time::sleep(IDLE).await;
        for kill in 0..kills {
            self.fail_over(kill as usize % self.cluster.len()).await?;
            tokio::time::sleep(BETWEEN_KILLS).await;
        }
        writers.stop().await;
        self.idle = self.watch.take().into_values().collect();
        let idle = self.idle.iter().map(|bytes| mib(*bytes));
        let idle = idle.collect::<Vec<_>>().join(", ");
        println!("idle servers, {kills} of them killed: {idle}");
        Ok(())
    }

    fn writers(&mut self) -> Writers {
        self.round += 1;
        Writers::start(&self.book, self.cluster.client(), self.rate, self.round)
    }

    /// One scan with writers at work, and its verdict.
    async fn scan(&mut self, name: &str, manners: &Manners, kills: u32) -> Result<(), String> {
        let writers = self.writers();
        let reader = Reader::start(manners).await?;
        self.watch.take();
        let (began, seen) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
        let reading = tokio::spawn(reader.read(self.book.now_us(), seen.clone()));
        let mut killed = 0;
        for kill in 0..kills {
            // Spread over the scan, and not into its end.
            let due = self.book.ledger().present() * (kill as usize + 1) / (kills as usize + 2);
            while seen.load(Ordering::Relaxed) < due && !reading.is_finished() {
                tokio::time::sleep(POLL).await;
            }
            if reading.is_finished() {
                break;
            }
            self.fail_over(kill as usize % self.cluster.len()).await?;
            killed += 1;
        }
        let told = tokio::time::timeout(SCAN_MAX, reading).await;
        let told = told.map_err(|_| format!("{name}: the scan hangs"))?;
        let told = told.map_err(|error| error.to_string())??;
        let took = began.elapsed();
        let grown = self.watch.take();
        let (sent, per_second) = writers.stop().await;
        println!(
            "{name}: {} keys at version {} in {:.1} s, {sent} writes meanwhile ({per_second:.0} a second)",
            told.scan.entries.len(),
            told.scan.version,
            took.as_secs_f64()
        );
        self.judge(name, &told);
        if kills > 0 {
            let point = format!("{name}: {killed} servers killed while it streamed, of {kills}");
            self.points.push((killed == kills, point));
        }
        if !self.idle.is_empty() {
            let above = |(at, most): (usize, u64)| most.saturating_sub(self.idle[at]);
            let above: Vec<u64> = grown.into_iter().map(above).collect();
            let most = above.iter().copied().max().unwrap_or(0);
            let servers = above.into_iter().map(mib).collect::<Vec<_>>().join(", ");
            println!("  servers above idle: {servers}; client: {}", mib(told.grown_bytes));
            self.points.push(bound(name, "a server", most, SERVER_BYTES_MAX));
        }
        self.points.push(bound(name, "the client", told.grown_bytes, CLIENT_BYTES_MAX));
        Ok(())
    }

    /// SIGKILL, a while without, and back.
    async fn fail_over(&mut self, at: usize) -> Result<(), String> {
        self.cluster.kill(at)?;
        self.watch.set(at, None);
        tokio::time::sleep(DOWN).await;
        self.cluster.restart(at)?;
        self.watch.set(at, self.cluster.pid(at));
        self.cluster.wait_back(at).await
    }

    fn judge(&mut self, name: &str, told: &Told) {
        let verdict = self.book.ledger().judge(&told.scan);
        verdict.told.iter().for_each(|line| println!("  {line}"));
        told.foreign.iter().take(10).for_each(|line| println!("  not ours: {line}"));
        if let Some(why) = &told.error {
            println!("  it ended early: {why}");
        }
        let holds = verdict.holds() && told.foreign.is_empty() && told.error.is_none();
        let broken: Vec<String> =
            verdict.broken.iter().map(|(rule, times)| format!("{rule} {times}")).collect();
        let found = match (holds, broken.is_empty()) {
            (true, _) => "exactly the keys of its version, in order".to_owned(),
            (false, false) => broken.join(", "),
            (false, true) => "it did not come to its end".to_owned(),
        };
        let expected = verdict.expected;
        self.points.push((holds, format!("{name}: {found} ({expected} expected)")));
    }
}

fn bound(name: &str, whose: &str, bytes: u64, most: u64) -> (bool, String) {
    (bytes <= most, format!("{name}: {whose} {} above idle, at most {}", mib(bytes), mib(most)))
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

//! What nobody can read any more leaves the disk, and what has expired never comes back: after a
//! compaction, a crash of all, a failover, a snapshot. Owns the steps and the check that is made after
//! each. What the keys are and what must be found of them stands in `reclaim_keys`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use coracle_client::admin::NewKeyspace;
use coracle_client::{Client, Keyspace, ShardId};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::time::Instant;

use super::block_on;
use super::reclaim_keys::{Finding, Keys};
use crate::cluster::process::{Cluster, Setup};
use crate::cluster::proxy;

const KEYSPACE: &str = "reclaim";

/// A short log: a follower that is away for some seconds finds that it needs a snapshot.
const SETTINGS: &[&str] = &["storage.log_segment_bytes=1MiB", "storage.log_bytes_target=4MiB"];

/// Writes under way.
const IN_FLIGHT: usize = 128;

const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// After a time to live and a history have passed, before anything is expected: the clocks of all nodes
/// are this machine's, but a write's version comes a moment after the write was begun.
const SLACK: Duration = Duration::from_secs(2);

/// What has to go is gone within this, or the command fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two compactions. Each reclaims by what the one before made durable.
const PAUSE: Duration = Duration::from_secs(3);

/// Keys that are written before each compaction, so that every shard's clock goes on: an idle shard's
/// does not, and then nothing ever leaves its history.
const TICKS: u32 = 256;

/// One value of what pushes old entries out of the log.
const FILLER_BYTES: usize = 64 << 10;
const FILLERS_PER_ROUND: u32 = 128;

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many shards.
    pub shards: u32,
    /// Keys with a time to live, written once each.
    pub keys: u32,
    /// The time to live.
    pub ttl: Duration,
    /// The keyspace's history.
    pub history: Duration,
    /// At most so many percent of the bytes may be left.
    pub left_max: f64,
    /// What values are drawn from.
    pub seed: u64,
}

/// Runs, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

/// One run: the cluster, and what was found so far.
struct Run {
    cluster: Cluster,
    kv: Keyspace,
    /// One session through all steps: what was gone for it stays gone.
    session: Keyspace,
    keys: Keys,
    held: bool,
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    println!(
        "seed {}: {} keys with {:?} to live, {} overwritten {} times, history {:?}",
        plan.seed,
        plan.keys,
        plan.ttl,
        Keys::kept_of(plan.keys),
        Keys::ROUNDS,
        plan.history
    );
    let mut run = start(plan).await?;
    let empty = run.disk()?;
    run.load(plan.ttl).await?;
    let loaded = Instant::now();
    compact_all(&run.cluster).await?;
    let before = run.disk()?;
    run.check("written, not yet expired", false).await?;
    tokio::time::sleep_until(loaded + plan.ttl + SLACK).await;
    run.check("expired", true).await?;
    // What has expired stays readable at older versions for as long as the history says.
    tokio::time::sleep_until(loaded + plan.ttl + plan.history + SLACK).await;
    let after = run.reclaim(empty, before, plan.left_max).await?;
    run.check("compacted", true).await?;
    run.crash_all().await?;
    run.check("all killed and started again", true).await?;
    for at in 0..run.cluster.len() {
        run.fail_over(at).await?;
        run.check(&format!("n{} killed, others lead", at + 1), true).await?;
        run.cluster.restart(at)?;
        run.cluster.wait_back(at).await?;
    }
    let shards = run.by_snapshot(plan.seed).await?;
    run.lead_all(run.cluster.len() - 1).await?;
    run.check(&format!("n3 leads, from snapshots of {shards} shards"), true).await?;
    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    println!(
        "bytes on disk, all nodes: empty {:.1} MiB, before {:.1} MiB, after {:.1} MiB: {:.1} % left",
        mib(empty),
        mib(before),
        mib(after),
        left(empty, before, after)
    );
    println!("{}", if run.held { "PASS" } else { "FAIL" });
    Ok(run.held)
}

/// What is left, in percent of what came on top of an empty cluster.
fn left(empty: u64, before: u64, after: u64) -> f64 {
    let came = before.saturating_sub(empty).max(1);
    after.saturating_sub(empty) as f64 * 100.0 / came as f64
}

async fn start(plan: &Plan) -> Result<Run, String> {
    let cluster = Cluster::start_as(Setup {
        program: plan.program.clone(),
        nodes: 3,
        shards: plan.shards,
        settings: SETTINGS.iter().map(ToString::to_string).collect(),
        ..Setup::default()
    });
    let cluster = cluster.await?;
    let history = Some(plan.history);
    let new = NewKeyspace { history, ..NewKeyspace::new(KEYSPACE) };
    let made = cluster.client().admin().create_keyspace(new).await;
    made.map_err(|error| format!("keyspace {KEYSPACE}: {error}"))?;
    let kv = cluster.client().keyspace(KEYSPACE);
    let session = another_client(&cluster)?.keyspace(KEYSPACE);
    let keys = Keys::new(plan.keys, plan.seed);
    Ok(Run { cluster, kv, session, keys, held: true })
}

fn another_client(cluster: &Cluster) -> Result<Client, String> {
    let builder = Client::builder().seeds(cluster.addresses()).name("coracle-jepsen-session");
    let client = builder.connect_lazy().map_err(|error| error.to_string())?;
    Ok(client.with_consistency(coracle_client::Consistency::Session))
}

impl Run {
    /// Writes everything.
    async fn load(&self, ttl: Duration) -> Result<(), String> {
        let began = Instant::now();
        let writes = self.keys.writes();
        let count = writes.len();
        for round in writes.chunk_by(|a, b| a.round == b.round) {
            let puts = stream::iter(round).map(|write| {
                let put = self.kv.put(write.key.clone(), self.keys.value(write));
                let put = if write.expires { put.ttl(ttl) } else { put };
                put.timeout(WRITE_TIMEOUT).into_future()
            });
            let done = puts.buffer_unordered(IN_FLIGHT).try_collect::<Vec<_>>().await;
            done.map_err(|error| format!("load: {error}"))?;
        }
        println!("{count} writes in {:.1} s", began.elapsed().as_secs_f64());
        Ok(())
    }

    /// Reads everything, each way; what is found that must not be, or is not found, is told.
    async fn check(&mut self, step: &str, expired: bool) -> Result<(), String> {
        let began = Instant::now();
        let mut finding = Finding::default();
        for (how, kv) in [("linearizable", &self.kv), ("session", &self.session)] {
            let failed = |error| format!("{step}, {how} reads: {error}");
            for chunk in self.keys.all().chunks(1_000) {
                let read = kv.multi_get(chunk.iter().cloned()).timeout(WRITE_TIMEOUT);
                let found = read.await.map_err(failed)?;
                let found = found.into_iter().map(|entry| entry.map(|entry| entry.value));
                let found = chunk.iter().cloned().zip(found);
                self.keys.judge(how, found, expired, &mut finding);
            }
        }
        let scanned = self.scan().await.map_err(|error| format!("{step}, a scan: {error}"))?;
        self.keys.judge_scan(&scanned, expired, &mut finding);
        let verdict = if finding.wrong.is_empty() { "ok" } else { "WRONG" };
        println!(
            "{verdict:>5}: {step}: {} reads, {} keys scanned, in {:.1} s",
            finding.reads,
            scanned.len(),
            began.elapsed().as_secs_f64()
        );
        finding.wrong.iter().take(5).for_each(|line| println!("       {line}"));
        self.held &= finding.wrong.is_empty();
        Ok(())
    }

    async fn scan(&self) -> Result<BTreeMap<Bytes, Bytes>, coracle_client::Error> {
        let found = self.kv.scan(..).stream();
        found.map_ok(|entry| (entry.key, entry.value)).try_collect().await
    }

    /// Compacts until no more is left than may be.
    async fn reclaim(&mut self, empty: u64, before: u64, left_max: f64) -> Result<u64, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.tick().await?;
            if !compact_all(&self.cluster).await? {
                println!("WRONG: these servers do not compact on request: nothing is reclaimed");
                self.held = false;
                return self.disk();
            }
            let after = self.disk()?;
            let left = left(empty, before, after);
            println!("compacted: {left:.1} % left");
            if left <= left_max {
                return Ok(after);
            }
            if Instant::now() >= deadline {
                println!("WRONG: more than {left_max} % is left after {PATIENCE:?}");
                self.held = false;
                return Ok(after);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn tick(&self) -> Result<(), String> {
        let client = self.cluster.client();
        let puts = (0..TICKS).map(|tick| client.put(format!("tick-{tick}"), "now").into_future());
        let done = stream::iter(puts).buffer_unordered(IN_FLIGHT).try_collect::<Vec<_>>().await;
        done.map(drop).map_err(|error| format!("tick: {error}"))
    }

    /// Bytes that the shards of all nodes take.
    fn disk(&self) -> Result<u64, String> {
        let dirs = (0..self.cluster.len()).map(|at| self.cluster.dir(at).join("shards"));
        dirs.map(|dir| bytes_under(&dir).map_err(|error| format!("{}: {error}", dir.display())))
            .sum()
    }

    async fn crash_all(&mut self) -> Result<(), String> {
        let all = 0..self.cluster.len();
        all.clone().try_for_each(|at| self.cluster.kill(at))?;
        all.clone().try_for_each(|at| self.cluster.restart(at))?;
        for at in all {
            self.cluster.wait_back(at).await?;
        }
        Ok(())
    }

    /// Kills a node that leads everything.
    async fn fail_over(&mut self, at: usize) -> Result<(), String> {
        self.lead_all(at).await?;
        let before = self.cluster.leaders().await;
        self.cluster.kill(at)?;
        self.cluster.wait_succeeded(&before).await
    }

    async fn lead_all(&self, at: usize) -> Result<(), String> {
        self.cluster.lead_all(at).await
    }

    /// The last node is away until the others' logs no longer reach back to it. Returns how many
    /// shards it then got as snapshots.
    async fn by_snapshot(&mut self, seed: u64) -> Result<usize, String> {
        let away = self.cluster.len() - 1;
        self.lead_all(0).await?;
        let had = self.last_indexes(away).await?;
        self.cluster.kill(away)?;
        let deadline = Instant::now() + PATIENCE;
        let mut round = 0;
        let shards = loop {
            self.fill(seed, round).await?;
            round += 1;
            let groups = self.cluster.status(0).await?.groups;
            let beyond = |shard: &ShardId, last: &u64| {
                groups.iter().any(|group| group.shard == *shard && group.first_index > last + 1)
            };
            let count = had.iter().filter(|(shard, last)| beyond(shard, last)).count();
            if count == had.len() {
                break count;
            }
            if Instant::now() >= deadline {
                println!("WRONG: the log of {} shards is not purged", had.len() - count);
                self.held = false;
                break count;
            }
        };
        self.cluster.restart(away)?;
        self.cluster.wait_back(away).await?;
        let wanted = self.last_indexes(0).await?;
        loop {
            let groups = self.cluster.status(away).await?.groups;
            let reached = |(shard, last): (&ShardId, &u64)| {
                groups.iter().any(|group| group.shard == *shard && group.applied_index >= *last)
            };
            if wanted.iter().all(reached) {
                return Ok(shards);
            }
            if Instant::now() >= deadline + PATIENCE {
                return Err(format!("n{} does not catch up: {groups:?}", away + 1));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Of the shards that hold keys.
    async fn last_indexes(&self, at: usize) -> Result<BTreeMap<ShardId, u64>, String> {
        let groups = self.cluster.status(at).await?.groups;
        let groups = groups.iter().filter(|group| group.shard.0 != 0);
        Ok(groups.map(|group| (group.shard, group.last_index)).collect())
    }

    /// Large values under few keys, in another keyspace.
    async fn fill(&self, seed: u64, round: u64) -> Result<(), String> {
        let client = self.cluster.client();
        let puts = (0..FILLERS_PER_ROUND).map(|number| {
            let value =
                super::reclaim_keys::noise(seed ^ round << 32 ^ u64::from(number), FILLER_BYTES);
            client.put(format!("fill-{number}"), value).timeout(WRITE_TIMEOUT).into_future()
        });
        let done = stream::iter(puts).buffer_unordered(16).try_collect::<Vec<_>>().await;
        done.map(drop).map_err(|error| format!("fill the log: {error}"))
    }
}

/// Every replica of every node, one after the other. False: the servers cannot.
async fn compact_all(cluster: &Cluster) -> Result<bool, String> {
    for at in 0..cluster.len() {
        for group in cluster.status(at).await?.groups {
            if !proxy::compact(cluster.address(at), group.shard.0).await? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn bytes_under(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += match entry.file_type()?.is_dir() {
            true => bytes_under(&entry.path()).unwrap_or_default(),
            // One that has just been removed takes nothing.
            false => entry.metadata().map_or(0, |found| found.blocks() * 512),
        };
    }
    Ok(bytes)
}

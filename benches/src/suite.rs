//! Owns the rounds of a report: every cell in its turn, the systems that are compared right behind each
//! other. Does not put them up (see `rig`) and does not judge (see `aims`).

use std::time::{Duration, Instant};

use futures_util::TryStreamExt;

use crate::cluster::{Cluster, connect};
use crate::failure::Failure;
use crate::limit::alone;
use crate::limit::disk;
use crate::limit::echo::{self, Frames};
use crate::load::{self, Plan, Tallies};
use crate::port::System;
use crate::process::Quota;
use crate::report::Row;
use crate::results::Results;
use crate::rig::{Rig, RigPlan, cluster_plan};
use crate::stages::{self, Seen};
use crate::workload::{Distribution, Kind, Mix, Workload, ycsb};

/// Callers of most rows.
pub const CALLERS: usize = 256;

/// Of the rows with batches: as many operations under way as eight batches of etcd's largest have.
const CALLERS_WIDE: usize = 1_024;
const BATCH: usize = 128;

/// What all nodes of the overloaded cluster get together, so that the generator has more.
const OVERLOAD_CORES: f64 = 0.6;

/// Callers that hold the surplus of an overload: as many as 5 s of most peaks.
const OVERLOAD_CALLERS: usize = 8_192;

/// How long and how often is measured.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Rounds over all cells.
    pub rounds: usize,
    /// How long each cell is counted.
    pub window: Duration,
    /// How long its load runs before that.
    pub warmup: Duration,
    /// How long the overload lasts.
    pub overload: Duration,
    /// How long an idle cluster is watched.
    pub idle: Duration,
}

impl Pace {
    /// Within 8 minutes, all in all.
    pub const QUICK: Pace = Pace {
        rounds: 1,
        window: Duration::from_secs(3),
        warmup: Duration::from_secs(1),
        overload: Duration::from_secs(10),
        idle: Duration::from_secs(8),
    };
    /// Within 75 minutes, with the axes of growth.
    pub const FULL: Pace = Pace {
        rounds: 3,
        window: Duration::from_secs(8),
        warmup: Duration::from_secs(2),
        overload: Duration::from_secs(30),
        idle: Duration::from_secs(30),
    };
}

/// A run of the suite.
pub struct Suite<'a> {
    /// What is measured.
    pub rig: &'a Rig,
    /// How long.
    pub pace: Pace,
    /// Where it goes.
    pub results: &'a mut Results,
    /// Hears what is going on.
    pub said: &'a dyn Fn(&str),
}

impl Suite<'_> {
    /// All rounds.
    pub async fn run(&mut self) -> Result<(), Failure> {
        let idle = self.rig.idle_cores(self.pace.warmup * 3).await;
        for (name, cores) in ["coracle", "etcd", "redis"].iter().zip(idle) {
            self.results.note_figure(&format!("idle neighbour/{name}"), cores);
        }
        for round in 1..=self.pace.rounds {
            (self.said)(&format!("round {round} of {}", self.pace.rounds));
            self.disk().await?;
            self.gets().await?;
            self.puts().await?;
            self.unary().await?;
            self.one_caller().await?;
            self.half_rate().await?;
            self.batches().await?;
            self.scans().await?;
            for letter in 'a'..='f' {
                self.ycsb(letter).await?;
            }
        }
        Ok(())
    }

    fn plan(&self, callers: usize) -> Plan {
        let (warmup, window) = (self.pace.warmup, self.pace.window);
        Plan { callers, rate: 0, warmup, window, batch: 1 }
    }

    /// Loads a system and keeps the row of all operations; its rate.
    async fn cell(
        &mut self,
        cell: &str,
        system: &System,
        workload: &Workload,
        plan: Plan,
    ) -> Result<f64, Failure> {
        let tallies = load::run(system, workload, plan).await?;
        Ok(self.keep(cell, &tallies, plan))
    }

    /// The same of our cluster, with what its nodes count.
    async fn seen(
        &mut self,
        cell: &str,
        system: &System,
        workload: &Workload,
        plan: Plan,
    ) -> Result<Seen, Failure> {
        let warmup = Plan { window: plan.warmup, warmup: Duration::ZERO, ..plan };
        load::run(system, workload, warmup).await?;
        let plan = Plan { warmup: Duration::ZERO, ..plan };
        let (tallies, seen) =
            stages::watch(&self.rig.cluster, load::run(system, workload, plan)).await?;
        self.keep(cell, &tallies, plan);
        self.results.note_seen(cell, seen.clone());
        Ok(seen)
    }

    fn keep(&mut self, cell: &str, tallies: &Tallies, plan: Plan) -> f64 {
        let row = Row::new(cell, &tallies.all(), plan.window);
        let rate = row.per_second;
        let failed: u64 = row.errors.values().sum();
        let errors = if failed > 0 { format!(", failed: {:?}", row.errors) } else { String::new() };
        let [p50, p99, ..] = row.latencies;
        (self.said)(&format!("{cell}: {rate:.0}/s, p50 {p50:.1?}, p99 {p99:.1?}{errors}"));
        self.results.note(cell, row);
        rate
    }

    fn figure(&mut self, cell: &str, figure: f64) {
        (self.said)(&format!("{cell}: {figure:.0}/s"));
        self.results.note_figure(cell, figure);
    }

    async fn disk(&mut self) -> Result<(), Failure> {
        let (dir, window) = (self.rig.dir().to_owned(), self.pace.window);
        let measured = tokio::task::spawn_blocking(move || disk::run(&dir, 1, 4 << 10, window));
        let tally = measured.await.map_err(Failure::of("measure the disk"))??;
        self.results.note("disk", Row::new("disk", &tally, window));
        let (window, alone) = (self.pace.window / 2, &self.rig.alone);
        let singly = tokio::task::block_in_place(|| alone::singly(alone, window))?;
        self.results.note("rocksdb singly", Row::new("rocksdb singly", &singly, window));
        for (cell, threads, batch) in [("64 threads", 64, 1), ("batches of 256", 1, 256)] {
            let rate = tokio::task::block_in_place(|| alone.puts(threads, batch, window))?;
            self.figure(&format!("rocksdb {cell}"), rate);
        }
        Ok(())
    }

    async fn gets(&mut self) -> Result<(), Failure> {
        let rig = self.rig;
        let workload = rig.workload.doing(Mix::reads(100), Distribution::Uniform);
        let plan = self.plan(CALLERS);
        self.cell("get/etcd", &rig.etcd_callers, &workload, plan).await?;
        self.seen("get/coracle", &rig.coracle, &workload, plan).await?;
        self.echo(Kind::Get, &workload).await?;
        let (window, threads) = (self.pace.window, cores());
        let rate = tokio::task::block_in_place(|| rig.alone.gets(threads, window))?;
        self.figure("get/rocksdb", rate);
        self.cell("get/redis", &rig.redis_callers, &workload, plan).await?;
        Ok(())
    }

    /// Frames as a pipeline to three nodes sends them, echoed.
    async fn echo(&mut self, kind: Kind, workload: &Workload) -> Result<(), Failure> {
        let window = self.pace.window;
        let (streams, in_flight) = (3, 2);
        let operations = CALLERS / streams / in_flight;
        let frames = Frames { streams, in_flight, operations, kind, window };
        let rate = echo::frames(self.rig.echo, workload, frames).await?;
        self.figure(&format!("{}/echo", kind.name()), rate);
        Ok(())
    }

    async fn puts(&mut self) -> Result<(), Failure> {
        let rig = self.rig;
        let workload = rig.workload.doing(Mix::reads(0), Distribution::Uniform);
        let plan = self.plan(CALLERS);
        self.cell("put/etcd", &rig.etcd_callers, &workload, plan).await?;
        let seen = self.seen("put/coracle", &rig.coracle, &workload, plan).await?;
        self.three("put", &seen, &workload)?;
        self.echo(Kind::Put, &workload).await?;
        self.cell("put/redis", &rig.redis_callers, &workload, plan).await?;
        Ok(())
    }

    /// Three RocksDBs with as many puts to a sync as our nodes had.
    fn three(&mut self, cell: &str, seen: &Seen, workload: &Workload) -> Result<(), Failure> {
        let puts = self.results.rate(&format!("{cell}/coracle")).unwrap_or(0.0);
        let batch = seen.syncs_per_second.map_or(1.0, |syncs| (puts / syncs).round().max(1.0));
        self.results.note_figure(&format!("{cell}/puts per sync"), batch);
        let (dir, window) = (self.rig.dir(), self.pace.window);
        let rate =
            tokio::task::block_in_place(|| alone::three(dir, workload, batch as usize, window))?;
        self.figure(&format!("{cell}/rocksdb"), rate);
        Ok(())
    }

    async fn unary(&mut self) -> Result<(), Failure> {
        let (rig, plan) = (self.rig, self.plan(CALLERS));
        for kind in [Kind::Get, Kind::Put] {
            let reads = if kind == Kind::Get { 100 } else { 0 };
            let workload = rig.workload.doing(Mix::reads(reads), Distribution::Uniform);
            let cell = |system: &str| format!("unary {}/{system}", kind.name());
            self.cell(&cell("etcd"), &rig.etcd_callers, &workload, plan).await?;
            self.cell(&cell("coracle"), &rig.unary, &workload, plan).await?;
            self.cell(&cell("echo"), &rig.echo_callers, &workload, plan).await?;
        }
        Ok(())
    }

    async fn one_caller(&mut self) -> Result<(), Failure> {
        let (rig, plan) = (self.rig, self.plan(1));
        for (name, reads) in [("one put", 0), ("one get", 100)] {
            let workload = rig.workload.doing(Mix::reads(reads), Distribution::Uniform);
            self.cell(&format!("{name}/etcd"), &rig.etcd_callers, &workload, plan).await?;
            self.cell(&format!("{name}/coracle"), &rig.coracle, &workload, plan).await?;
        }
        Ok(())
    }

    /// At half of what etcd gets done at most, due at a constant rate.
    async fn half_rate(&mut self) -> Result<(), Failure> {
        let rig = self.rig;
        for (name, reads) in [("put", 0), ("get", 100)] {
            let workload = rig.workload.doing(Mix::reads(reads), Distribution::Uniform);
            let peak = self.results.rate(&format!("{name}/etcd")).unwrap_or(0.0);
            let plan = Plan { rate: (peak / 2.0).max(1.0) as u64, ..self.plan(CALLERS) };
            self.cell(&format!("half {name}/etcd"), &rig.etcd_callers, &workload, plan).await?;
            self.cell(&format!("half {name}/coracle"), &rig.coracle, &workload, plan).await?;
        }
        Ok(())
    }

    async fn batches(&mut self) -> Result<(), Failure> {
        let rig = self.rig;
        for (name, reads) in [("put", 0), ("get", 100)] {
            let workload = rig.workload.doing(Mix::reads(reads), Distribution::Uniform);
            let plan = Plan { batch: BATCH, ..self.plan(CALLERS_WIDE / BATCH) };
            self.cell(&format!("batch {name}/etcd"), &rig.etcd_callers, &workload, plan).await?;
            let (cell, plan) = (format!("batch {name}/coracle"), self.plan(CALLERS_WIDE));
            let seen = self.seen(&cell, &rig.coracle, &workload, plan).await?;
            if name == "put" {
                self.three("batch put", &seen, &workload)?;
            }
        }
        Ok(())
    }

    async fn scans(&mut self) -> Result<(), Failure> {
        let rig = self.rig;
        let bytes = tokio::task::block_in_place(|| rig.alone.scan())?;
        self.figure("scan/rocksdb", bytes / 1e6);
        let (began, mut bytes) = (Instant::now(), 0);
        let mut pages = rig.client().scan(..).pages();
        while let Some(page) = pages.try_next().await.map_err(Failure::of("scan"))? {
            bytes += page.entries.iter().map(|e| e.key.len() + e.value.len()).sum::<usize>();
        }
        self.figure("scan/coracle", bytes as f64 / 1e6 / began.elapsed().as_secs_f64());
        Ok(())
    }

    async fn ycsb(&mut self, letter: char) -> Result<(), Failure> {
        let Some((mix, distribution)) = ycsb(letter) else { return Ok(()) };
        let (rig, plan) = (self.rig, self.plan(CALLERS));
        let workload = rig.workload.doing(mix, distribution);
        for system in [&rig.etcd_callers, &rig.coracle] {
            let name = if system.name == "etcd" { "etcd" } else { "coracle" };
            self.cell(&format!("ycsb {letter}/{name}"), system, &workload, plan).await?;
        }
        Ok(())
    }

    /// Three times as much as the servers can do, on a cluster that is held to a share of the machine.
    pub async fn overload(&mut self) -> Result<(), Failure> {
        let rig = self.rig;
        let quota = match Quota::hold(&rig.cluster.pids(), OVERLOAD_CORES) {
            Ok(quota) => quota,
            Err(failure) => {
                (self.said)(&format!("overload is left out: {failure}"));
                return Ok(());
            }
        };
        let workload = rig.workload.doing(Mix::reads(50), Distribution::Uniform);
        let window = self.pace.window.max(Duration::from_secs(5));
        let closed = Plan { window, ..self.plan(CALLERS) };
        let peak = self.cell("overload/before", &rig.coracle, &workload, closed).await?;
        let clients = connect(&rig.cluster.addresses(), 1)?;
        let witness = rig.coracle.witness.clone();
        let flood = System::of_clients(&clients, "default", witness);
        let plan = Plan {
            callers: OVERLOAD_CALLERS,
            rate: (peak * 3.0) as u64,
            window: self.pace.overload,
            ..closed
        };
        let before = rig.cluster.memory_bytes();
        self.cell("overload/during", &flood, &workload, plan).await?;
        let after = rig.cluster.memory_bytes();
        self.results.note_figure("overload/memory before", before as f64 / f64::from(1 << 20));
        self.results.note_figure("overload/memory after", after as f64 / f64::from(1 << 20));
        for client in clients {
            client.close().await;
        }
        tokio::time::sleep(Duration::from_secs(10).min(self.pace.overload)).await;
        self.cell("overload/after", &rig.coracle, &workload, closed).await?;
        drop(quota);
        Ok(())
    }
}

/// Cores of this machine.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// What five nodes with nothing to do cost, by shards: cores of one, and memory of all.
pub async fn idle(
    plan: &RigPlan,
    window: Duration,
    results: &mut Results,
    said: &dyn Fn(&str),
) -> Result<(), Failure> {
    for shards in [16, 64] {
        let cluster = Cluster::start(&cluster_plan(plan, 5, shards)).await?;
        // Leaders are chosen and dealt out.
        tokio::time::sleep(window).await;
        let (began, before) = (Instant::now(), cluster.processor_time());
        tokio::time::sleep(window).await;
        let used = cluster.processor_time().saturating_sub(before).as_secs_f64();
        let each = used / began.elapsed().as_secs_f64() / 5.0;
        let memory = cluster.memory_bytes() as f64 / f64::from(1 << 20);
        said(&format!("idle, {shards} shards: {:.1} % of a core per node", each * 100.0));
        results.note_figure(&format!("idle {shards}/cores"), each);
        results.note_figure(&format!("idle {shards}/memory"), memory);
        cluster.stop().await;
    }
    Ok(())
}

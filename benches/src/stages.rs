//! Owns the view into a cluster under load: what its nodes count meanwhile, and the disk's limit beside a
//! cluster on the same disk under more and more callers. Shows what group commit earns, and where the
//! time goes. Judges nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cluster::{Cluster, ClusterPlan, connect};
use crate::failure::Failure;
use crate::limit::disk;
use crate::load::{self, Plan};
use crate::metrics::{Page, processor_time};
use crate::port::System;
use crate::report::{self, Row};
use crate::witness::Witness;
use crate::workload::{Kind, Workload};

/// Of the disk: what one short command appends to the log.
const BLOCK_BYTES: usize = 4 << 10;

/// Syncs of all nodes' logs, and their time.
const SYNCS: &str = "coracle_log_fsync_duration_seconds_count";
const SYNC_SECONDS: &str = "coracle_log_fsync_duration_seconds_sum";

/// Requests of all nodes, and their time.
const REQUESTS: &str = "coracle_request_duration_seconds_count";
const REQUEST_SECONDS: &str = "coracle_request_duration_seconds_sum";

/// Stages of a request, in its order.
pub const STAGES: [&str; 6] = ["queue", "propose", "log_sync", "replicate", "apply", "read"];

/// What shall be looked at.
#[derive(Clone, Debug)]
pub struct StagesPlan {
    /// The servers, and the directory on the disk concerned.
    pub cluster: ClusterPlan,
    /// One step for each: so many callers.
    pub callers: Vec<usize>,
    /// Connected clients that the callers share.
    pub connections: usize,
    /// Of each step; half as long goes before it uncounted.
    pub window: Duration,
}

/// The disk alone, with one writer, and with one for each node.
#[derive(Clone, Debug)]
pub struct DiskLimit {
    /// How many writers the second one has.
    pub writers: usize,
    /// One writer.
    pub one: Row,
    /// As many as there are nodes, all together.
    pub all: Row,
}

/// Two measurements of an undisturbed disk differ by less than this.
const SCATTER: f64 = 1.25;

impl DiskLimit {
    /// Whether one writer was slower than the disk. Several writers share a disk, so that each gets
    /// at most what one alone gets; where they get more, it was not the disk that the one waited
    /// for. On a busy machine it is the processor: woken after each sync, a writer waits for the
    /// scheduler's next tick, which takes many times as long as the sync.
    pub fn is_disturbed(&self) -> bool {
        self.all.per_second > self.one.per_second * self.writers as f64 * SCATTER
    }
}

/// A step of the comparison.
#[derive(Clone, Debug)]
pub struct Step {
    /// So many callers.
    pub callers: usize,
    /// Their puts.
    pub puts: Row,
    /// What the nodes counted.
    pub seen: Seen,
}

/// What the nodes of a cluster counted while something was done to them.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Syncs per second of one node's log, on average; `None` where the nodes counted none.
    pub syncs_per_second: Option<f64>,
    /// How long one took, on average.
    pub sync_mean: Duration,
    /// Cores that all servers, and that the load kept busy.
    pub cores: [f64; 2],
    /// How long a request took on average, from its arrival to its answer.
    pub request: Duration,
    /// How long each stage took on average, where the nodes measured it.
    pub stages: Vec<(&'static str, Duration)>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The limit.
    pub disk: DiskLimit,
    /// In the order of the plan.
    pub steps: Vec<Step>,
}

/// Measures the disk, then the cluster. `said` hears what is going on.
pub async fn run(
    plan: &StagesPlan,
    workload: &Workload,
    said: impl Fn(&str),
) -> Result<Comparison, Failure> {
    said("measuring the disk alone");
    let nodes = plan.cluster.nodes;
    let (one, all) = (disk_row(plan, 1).await?, disk_row(plan, nodes).await?);
    let disk = DiskLimit { writers: nodes, one, all };
    said(&format!("starting {nodes} servers"));
    let cluster = Cluster::start(&plan.cluster).await?;
    let clients = connect(&cluster.addresses(), plan.connections)?;
    let witness = Arc::new(Witness::new(workload.keys));
    let system = System::of_clients(&clients, "default", witness);
    load::fill(&system, workload).await?;
    let mut steps = Vec::new();
    for callers in plan.callers.iter().copied() {
        said(&format!("{callers} callers"));
        steps.push(step(plan, &cluster, &system, workload, callers).await?);
    }
    for client in clients {
        client.close().await;
    }
    cluster.stop().await;
    Ok(Comparison { disk, steps })
}

async fn disk_row(plan: &StagesPlan, writers: usize) -> Result<Row, Failure> {
    let (dir, window) = (plan.cluster.dir.clone(), plan.window / 2);
    let measured =
        tokio::task::spawn_blocking(move || disk::run(&dir, writers, BLOCK_BYTES, window));
    let tally = measured.await.map_err(Failure::of("measure the disk"))??;
    let name = match writers {
        1 => "disk, 1 writer".to_owned(),
        _ => format!("disk, {writers} writers"),
    };
    Ok(Row::new(name, &tally, window))
}

async fn step(
    plan: &StagesPlan,
    cluster: &Cluster,
    system: &System,
    workload: &Workload,
    callers: usize,
) -> Result<Step, Failure> {
    let window = plan.window;
    // A run of its own, so that the servers' counts are of what is counted here, too.
    let warmup = Plan { callers, rate: 0, warmup: Duration::ZERO, window: window / 2, batch: 1 };
    load::run(system, workload, warmup).await?;
    let counted = load::run(system, workload, Plan { window, ..warmup });
    let (counted, seen) = watch(cluster, counted).await?;
    let puts = Row::new(format!("put, {callers} clients"), &counted.of(Kind::Put), window);
    Ok(Step { callers, puts, seen })
}

/// Does something, and tells what the nodes counted meanwhile.
pub async fn watch<T>(
    cluster: &Cluster,
    doing: impl Future<Output = Result<T, Failure>>,
) -> Result<(T, Seen), Failure> {
    let before = (cluster.metrics().await?, cluster.processor_time(), processor_time(None));
    let began = Instant::now();
    let done = doing.await?;
    let seconds = began.elapsed().as_secs_f64();
    let used = cluster.processor_time().saturating_sub(before.1);
    let used_here = processor_time(None).saturating_sub(before.2);
    let metrics = cluster.metrics().await?.since(&before.0);
    let syncs = metrics.sum(SYNCS);
    let request = mean(metrics.sum(REQUEST_SECONDS), metrics.sum(REQUESTS));
    let seen = Seen {
        syncs_per_second: (syncs > 0.0).then(|| syncs / cluster.nodes() as f64 / seconds),
        sync_mean: mean(metrics.sum(SYNC_SECONDS), syncs),
        cores: [used, used_here].map(|used| used.as_secs_f64() / seconds),
        request,
        stages: stages(&metrics),
    };
    Ok((done, seen))
}

fn stages(metrics: &Page) -> Vec<(&'static str, Duration)> {
    let of = |stage: &'static str| {
        let series = |what| format!("coracle_stage_duration_seconds_{what}{{stage=\"{stage}\"}}");
        let count = metrics.sum(&series("count"));
        (count > 0.0).then(|| (stage, mean(metrics.sum(&series("sum")), count)))
    };
    STAGES.into_iter().filter_map(of).collect()
}

fn mean(sum_seconds: f64, count: f64) -> Duration {
    if count > 0.0 {
        Duration::from_secs_f64((sum_seconds / count).max(0.0))
    } else {
        Duration::ZERO
    }
}

impl Step {
    /// How many acknowledged puts shared one sync of a node's log.
    pub fn puts_per_sync(&self) -> Option<f64> {
        self.seen.syncs_per_second.map(|syncs| self.puts.per_second / syncs)
    }

    /// Acknowledged puts, against what one writer gets done that syncs every one of them; `None`
    /// where that is not known, since it was disturbed. One caller waits for a sync at least each
    /// time, so a limit that it passes is none.
    pub fn times_disk(&self, disk: &DiskLimit) -> Option<f64> {
        let times = self.puts.per_second / disk.one.per_second;
        let is_impossible = self.callers == 1 && times > SCATTER;
        (!disk.is_disturbed() && !is_impossible).then_some(times)
    }

    fn cells(&self, disk: &DiskLimit) -> Vec<String> {
        let [p50, p99, ..] = self.puts.latencies.map(report::duration);
        let or_unknown = |rate: Option<f64>| rate.map_or("?".to_owned(), report::rate);
        vec![
            self.callers.to_string(),
            report::rate(self.puts.per_second),
            p50,
            p99,
            self.puts.errors.values().sum::<u64>().to_string(),
            or_unknown(self.seen.syncs_per_second),
            report::duration(self.seen.sync_mean),
            or_unknown(self.puts_per_sync()),
            or_unknown(self.times_disk(disk)),
            report::rate(self.seen.cores[0]),
            report::rate(self.seen.cores[1]),
        ]
    }

    fn json(&self, disk: &DiskLimit) -> Value {
        let micros = |stage: &(&str, Duration)| (stage.0.to_owned(), stage.1.as_micros() as u64);
        let stages: std::collections::BTreeMap<_, _> =
            self.seen.stages.iter().map(micros).collect();
        json!({
            "clients": self.callers,
            "puts": self.puts.json(),
            "syncs_per_second_per_node": self.seen.syncs_per_second,
            "sync_mean_us": self.seen.sync_mean.as_micros() as u64,
            "puts_per_sync": self.puts_per_sync(),
            "puts_per_disk_sync": self.times_disk(disk),
            "cores": { "servers": self.seen.cores[0], "load": self.seen.cores[1] },
            "stage_mean_us": stages,
        })
    }
}

const HEADING: [&str; 11] = [
    "clients",
    "puts/s",
    "p50",
    "p99",
    "errors",
    "syncs/s/node",
    "sync",
    "puts per sync",
    "× disk",
    "server cores",
    "load cores",
];

const DISTURBED: &str = "\
the disk's limit is not known: one writer was slower than each of several, so it waited for the \
processor.\nAll figures are those of a busy machine: run it again on an idle one.\n";

impl Comparison {
    /// For people.
    pub fn text(&self) -> String {
        let disk = report::text("the disk alone", &[self.disk.one.clone(), self.disk.all.clone()]);
        let steps: Vec<_> = self.steps.iter().map(|step| step.cells(&self.disk)).collect();
        let mut text = format!("{disk}\n{}", report::table(&HEADING, &steps));
        if self.disk.is_disturbed() {
            text.push_str(DISTURBED);
        }
        for step in &self.steps {
            for (error, count) in &step.puts.errors {
                text.push_str(&format!("{} clients: {error}: {count}\n", step.callers));
            }
        }
        let measured = self.steps.iter().filter(|step| !step.seen.stages.is_empty());
        let stages: Vec<_> = measured.map(|step| self.stage_cells(step)).collect();
        if !stages.is_empty() {
            let heading = [&["clients"], &STAGES[..]].concat();
            text.push_str("\nmean of each stage, on the servers\n");
            text.push_str(&report::table(&heading, &stages));
        }
        text
    }

    fn stage_cells(&self, step: &Step) -> Vec<String> {
        let of = |wanted: &&str| {
            let found = step.seen.stages.iter().find(|(stage, _)| stage == wanted);
            found.map_or("-".to_owned(), |(_, mean)| report::duration(*mean))
        };
        std::iter::once(step.callers.to_string()).chain(STAGES.iter().map(of)).collect()
    }

    /// For machines.
    pub fn json(&self) -> Value {
        let steps: Vec<Value> = self.steps.iter().map(|step| step.json(&self.disk)).collect();
        json!({
            "machine": report::machine(),
            "command": report::command(),
            "disk": [self.disk.one.json(), self.disk.all.json()],
            "disk_is_disturbed": self.disk.is_disturbed(),
            "steps": steps,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::Tally;

    fn row(per_second: u64) -> Row {
        let mut tally = Tally::default();
        (0..per_second).for_each(|_| tally.note(Duration::from_millis(1), None));
        Row::new("row", &tally, Duration::from_secs(1))
    }

    fn step(callers: usize, puts_per_second: u64) -> Step {
        Step {
            callers,
            puts: row(puts_per_second),
            seen: Seen {
                syncs_per_second: Some(500.0),
                sync_mean: Duration::from_millis(1),
                cores: [1.5, 0.5],
                request: Duration::from_millis(4),
                stages: vec![("queue", Duration::from_millis(2))],
            },
        }
    }

    #[test]
    fn no_ratio_is_given_to_a_limit_that_is_none() {
        // Measured while others compiled: the disk did 10,000.
        let disturbed = DiskLimit { writers: 3, one: row(196), all: row(2_434) };
        assert!(disturbed.is_disturbed());
        assert_eq!(step(256, 5_278).times_disk(&disturbed), None);
        let text = Comparison { disk: disturbed, steps: vec![step(256, 5_278)] }.text();
        assert!(text.contains("busy machine"), "{text}");
        // Not to be seen from the writers, but no caller syncs faster than the disk.
        let slow = DiskLimit { writers: 3, one: row(196), all: row(400) };
        assert!(!slow.is_disturbed());
        assert_eq!(step(1, 276).times_disk(&slow), None);
        assert!(step(8, 276).times_disk(&slow).is_some());
    }

    #[test]
    fn ratios_and_stages_are_of_what_was_counted() {
        let mut step = step(8, 3_000);
        let disk = DiskLimit { writers: 3, one: row(1_000), all: row(2_000) };
        assert_eq!((step.puts_per_sync(), step.times_disk(&disk)), (Some(6.0), Some(3.0)));
        assert_eq!(step.cells(&disk).len(), HEADING.len());
        step.seen.syncs_per_second = None;
        let comparison = Comparison { disk, steps: vec![step] };
        let text = comparison.text();
        let row = text.lines().find(|line| line.starts_with("8  ")).unwrap_or_default();
        assert!(row.contains(" 3000 ") && row.contains(" ? "), "{text}");
        assert!(text.contains("queue") && text.contains("2.00 ms"), "{text}");
        assert!(!text.contains("busy machine"), "{text}");
        assert_eq!(comparison.json()["steps"][0]["puts_per_disk_sync"], 3.0);
        assert_eq!(
            (mean(0.0, 0.0), mean(3.0, 2.0)),
            (Duration::ZERO, Duration::from_millis(1_500))
        );
    }
}

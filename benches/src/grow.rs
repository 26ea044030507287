//! Owns the axes of growth: one thing grows while all else stays, on clusters of their own. Ours only.

use std::sync::Arc;
use std::time::Duration;

use crate::cluster::{Cluster, connect};
use crate::failure::Failure;
use crate::load::{self, Plan};
use crate::port::System;
use crate::report::Row;
use crate::results::Results;
use crate::rig::{RigPlan, cluster_plan, load, warm};
use crate::suite::CALLERS;
use crate::witness::Witness;
use crate::workload::{Distribution, Mix, Workload};

/// Keys of the axes that are not about keys: enough that few are written twice at a time.
const KEYS: u64 = 50_000;

/// Free space that the largest step wants, for each key: three replicas, their logs and compactions.
const DISK_BYTES_PER_KEY: u64 = 1_500;

/// What grows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Axis {
    /// Shards of the cluster.
    Shards,
    /// Keys, from what fits every cache to what fits none.
    Keys,
    /// Callers.
    Clients,
    /// Bytes of a value.
    Values,
}

impl Axis {
    /// All of them.
    pub const ALL: [Axis; 4] = [Axis::Shards, Axis::Keys, Axis::Clients, Axis::Values];

    /// As in cells and names of files.
    pub fn name(self) -> &'static str {
        match self {
            Axis::Shards => "shards",
            Axis::Keys => "keys",
            Axis::Clients => "clients",
            Axis::Values => "value bytes",
        }
    }

    /// Its steps.
    pub fn steps(self) -> &'static [u64] {
        match self {
            Axis::Shards => &[1, 4, 16, 64],
            Axis::Keys => &[1_000, 10_000, 100_000, 1_000_000, 10_000_000],
            Axis::Clients => &[1, 4, 16, 64, 256, 1_024],
            Axis::Values => &[16, 256, 4 << 10, 64 << 10, 1 << 20],
        }
    }
}

/// Measures an axis.
pub async fn run(
    axis: Axis,
    plan: &RigPlan,
    window: Duration,
    results: &mut Results,
    said: &dyn Fn(&str),
) -> Result<(), Failure> {
    let mut standing = None;
    for step in axis.steps().iter().copied() {
        let (mut shards, mut keys, mut callers, mut value) = (0, KEYS, CALLERS, 256);
        match axis {
            Axis::Shards => shards = step as u32,
            Axis::Keys => keys = step,
            Axis::Clients => callers = step as usize,
            Axis::Values => {
                value = step as usize;
                // As many bytes as at 4 KiB, from there on.
                keys = KEYS.min(KEYS * (4 << 10) / step).max(100);
                callers = if step > 4 << 10 { 64 } else { CALLERS };
            }
        }
        let free = free_bytes(&plan.dir)?;
        if free < keys * DISK_BYTES_PER_KEY {
            said(&format!("{} {step} is left out: {} GiB are free", axis.name(), free >> 30));
            continue;
        }
        let workload = Workload::new(Mix::reads(0), Distribution::Uniform, keys, value, 1)?;
        // Only callers grow on a cluster that stands.
        if axis != Axis::Clients || standing.is_none() {
            drop(standing.take());
            let cluster = Cluster::start(&cluster_plan(plan, 3, shards)).await?;
            let clients = connect(&cluster.addresses(), 1)?;
            let witness = Arc::new(Witness::new(keys));
            let system = System::of_clients(&clients, "default", witness);
            load(&system, &workload, said).await?;
            warm(&clients[0]).await?;
            standing = Some((system, clients, cluster));
        }
        let Some((system, _, _)) = &standing else { continue };
        let load = Plan { callers, rate: 0, warmup: window / 3, window, batch: 1 };
        for (name, reads) in [("put", 0), ("get", 100)] {
            let workload = workload.doing(Mix::reads(reads), Distribution::Uniform);
            let tallies = load::run(system, &workload, load).await?;
            let row = Row::new(name, &tallies.all(), window);
            said(&format!("{} {step}: {name} {:.0}/s", axis.name(), row.per_second));
            results.note(&format!("{}/{name}/{step}", axis.name()), row);
        }
    }
    Ok(())
}

fn free_bytes(dir: &std::path::Path) -> Result<u64, Failure> {
    let stat = rustix::fs::statvfs(dir).map_err(Failure::of("look at the disk"))?;
    Ok(stat.f_bavail * stat.f_frsize)
}

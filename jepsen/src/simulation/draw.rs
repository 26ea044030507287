//! What a seed draws beside its faults: sizes, speeds, timings, load. Owns the ranges.

use coracle_storage::fs::faulty::Dice;

use super::Options;
use crate::cluster::sim::Settings;
use crate::cluster::sim::exec::DiskSpeed;
use crate::cluster::sim::net::LinkSpeed;
use crate::workload::register::Load;

/// Heartbeat and election timeouts: those that nodes have by themselves, and a slower set. Runs with
/// the second are cheaper, because most of what idle groups send are heartbeats.
const RAFT_MS: [[u64; 3]; 2] = [[100, 250, 500], [200, 500, 1_000]];

pub(super) fn settings(dice: &mut Dice, options: &Options) -> Settings {
    let latency_ms_max = one_of(dice, [1, 3, 10]);
    Settings {
        nodes: options.nodes.unwrap_or(if dice.one_in(4) { 5 } else { 3 }),
        shards: one_of(dice, [1, 2, 4]) as u32,
        raft_ms: RAFT_MS[dice.below(2) as usize],
        link: LinkSpeed { latency_ms_min: 1, latency_ms_max, slow_one_in: one_of(dice, [50, 500]) },
        disk: DiskSpeed {
            sync_ms_max: one_of(dice, [1, 4, 12]),
            slow_one_in: one_of(dice, [50, 500]),
        },
        clock_offset_ms_max: one_of(dice, [0, 20, 200]),
        clock_drift_ppm_max: one_of(dice, [0, 50, 2_000]),
        lying_disks: options.lying_disks,
    }
}

pub(super) fn load(dice: &mut Dice) -> Load {
    Load {
        keys: one_of(dice, [3, 8, 24]),
        // The last are enough to have the log flushed, purged and freed.
        value_bytes: one_of(dice, [0, 100, 16 << 10]) as usize,
        pause_ms_max: one_of(dice, [20, 80, 200]),
    }
}

/// How long the keyspace's history is, in milliseconds: what it has by itself, or so short that much
/// of it passes within a run.
pub(super) fn history_ms(dice: &mut Dice) -> Option<u64> {
    [None, Some(0), Some(2_000), Some(10_000)][dice.below(4) as usize]
}

pub(super) fn clients(dice: &mut Dice) -> u32 {
    2 + dice.below(4) as u32
}

fn one_of<const N: usize>(dice: &mut Dice, choices: [u64; N]) -> u64 {
    choices[dice.below(N as u64) as usize]
}

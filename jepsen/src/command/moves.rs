//! The arguments of the commands that show how replicas move. Owns their defaults, and the small sizes
//! of `--quick`.

use std::path::PathBuf;
use std::time::Duration;

use crate::measure::mixed::Shape;
use crate::measure::{elastic, foretold, hot, lost, steps};

/// See [`Command::Elastic`](super::Command::Elastic).
#[derive(Debug, clap::Args)]
pub struct Elastic {
    /// For at least so long (default: 20; with --quick one round)
    #[arg(long, value_name = "N")]
    pub minutes: Option<f64>,
    /// Requests a second
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub rate: u32,
    /// Keys (default: 20,000; with --quick 2,000)
    #[arg(long, value_name = "N")]
    pub keys: Option<u64>,
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub nodes: usize,
    /// How many shards
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub shards: u32,
    /// The p99 of a phase may be so many times that of the base line
    #[arg(long, value_name = "TIMES", default_value_t = 3.0)]
    pub p99_times: f64,
    /// The control: nodes that stop do not hand over; it must fail
    #[arg(long)]
    pub no_drain: bool,
    /// Tell the slowest requests of every phase, and what became of each of their attempts
    #[arg(long)]
    pub slowest: bool,
    /// Small and short, to try it
    #[arg(long)]
    pub quick: bool,
    /// What is drawn
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Elastic {
    pub(super) fn plan(self) -> elastic::Plan {
        let (minutes, keys, base, phase_min) =
            if self.quick { (0.0, 2_000, 15, 5) } else { (20.0, 20_000, 90, 20) };
        elastic::Plan {
            program: self.program,
            nodes: self.nodes,
            shards: self.shards,
            lasts: Duration::from_secs_f64(self.minutes.unwrap_or(minutes) * 60.0),
            base: Duration::from_secs(base),
            phase_min: Duration::from_secs(phase_min),
            shape: shape(self.rate, self.keys.unwrap_or(keys), self.seed),
            p99_times: self.p99_times,
            slowest: self.slowest,
            no_drain: self.no_drain,
        }
    }
}

/// See [`Command::Steps`](super::Command::Steps).
#[derive(Debug, clap::Args)]
pub struct Steps {
    /// Only at this point
    #[arg(long, value_name = "POINT")]
    pub point: Option<String>,
    /// Only the controller is killed, not the source and the target
    #[arg(long)]
    pub quick: bool,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Steps {
    pub(super) fn plan(self) -> steps::Plan {
        use steps::Victim::{Controller, Source, Target};
        let victims = if self.quick { vec![Controller] } else { vec![Controller, Source, Target] };
        steps::Plan { program: self.program, victims, only: self.point }
    }
}

/// See [`Command::Plan`](super::Command::Plan).
#[derive(Debug, clap::Args)]
pub struct Plan {
    /// How much is written, in MiB (default: 64; with --quick 16)
    #[arg(long, value_name = "MIB")]
    pub mib: Option<u64>,
    /// How many shards
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub shards: u32,
    /// What is sent may differ from what was planned by so many percent
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
    pub off_max: f64,
    /// Small, to try it
    #[arg(long)]
    pub quick: bool,
    /// What is drawn
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Plan {
    pub(super) fn plan(self) -> foretold::Plan {
        let mib = self.mib.unwrap_or(if self.quick { 16 } else { 64 });
        foretold::Plan {
            program: self.program,
            shards: self.shards,
            bytes: mib << 20,
            value_bytes: 2_048,
            off_max: self.off_max,
            seed: self.seed,
        }
    }
}

/// See [`Command::Hot`](super::Command::Hot).
#[derive(Debug, clap::Args)]
pub struct Hot {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub nodes: usize,
    /// How many shards
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub shards: u32,
    /// Requests a second
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub rate: u32,
    /// It is split and spread within so many seconds
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub within: u64,
    /// No node may serve more than so many percent of the load afterwards
    #[arg(long, value_name = "PERCENT", default_value_t = 60.0)]
    pub share_max: f64,
    /// A shard is split by itself from so many keys a second on (default: a third of the hot one's)
    #[arg(long, value_name = "N")]
    pub split_load: Option<u64>,
    /// What the servers are told besides, `key=value`; may be given again
    #[arg(long, value_name = "SETTING")]
    pub set: Vec<String>,
    /// Short, to try it
    #[arg(long)]
    pub quick: bool,
    /// What is drawn
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Hot {
    pub(super) fn plan(self) -> hot::Plan {
        let look = if self.quick { 10 } else { 60 };
        hot::Plan {
            program: self.program,
            nodes: self.nodes,
            shards: self.shards,
            settings: self.set,
            look: Duration::from_secs(look),
            // A third of what the hot shard gets: its halves are above it, and halves of these are not.
            split_load: self.split_load.unwrap_or(u64::from(self.rate) * 8 / 10 / 3),
            within: Duration::from_secs(self.within),
            share_max: self.share_max,
            // A scan asks every shard, and so says nothing of a hot one.
            shape: Shape { scans: 0, ..shape(self.rate, 4_000, self.seed) },
        }
    }
}

/// See [`Command::Lost`](super::Command::Lost).
#[derive(Debug, clap::Args)]
pub struct Lost {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub nodes: usize,
    /// How many shards (default: 16; with --quick 4)
    #[arg(long, value_name = "N")]
    pub shards: Option<u32>,
    /// How long a node may be silent before it counts as lost, in seconds
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub grace: u64,
    /// Behind the grace, all is as before within so many seconds
    #[arg(long, value_name = "N", default_value_t = 180)]
    pub within: u64,
    /// Requests a second
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub rate: u32,
    /// Keys (default: 20,000; with --quick 2,000)
    #[arg(long, value_name = "N")]
    pub keys: Option<u64>,
    /// Small, to try it
    #[arg(long)]
    pub quick: bool,
    /// What is drawn
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Lost {
    pub(super) fn plan(self) -> lost::Plan {
        let (shards, keys) = if self.quick { (4, 2_000) } else { (16, 20_000) };
        lost::Plan {
            program: self.program,
            nodes: self.nodes,
            shards: self.shards.unwrap_or(shards),
            grace: Duration::from_secs(self.grace),
            within: Duration::from_secs(self.within),
            shape: shape(self.rate, self.keys.unwrap_or(keys), self.seed),
        }
    }
}

fn shape(rate: u32, keys: u64, seed: u64) -> Shape {
    Shape { keys, value_bytes: 256, rate, scans: 4, deadline: Duration::from_secs(2), seed }
}

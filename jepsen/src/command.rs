//! The commands: their arguments, what they print, and how the process ends: 0 when all held, 1 when
//! something did not, 2 when it could not be tried.

mod moves;
mod mutants;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use coracle_storage::Mutant;
use coracle_storage::log::testing::run_history;
use coracle_storage::options::Sabotage;

use crate::measure::scan_reader::Manners;
use crate::measure::{
    elastic, exactly_once, failover, foretold, hot, lost, reads, reclaim, saturation, scan, steps,
};
use crate::replay;
use crate::simulation::{self, Options};
use crate::sweep::{self, REPORT_MARK, Sweep};
use crate::trace::Detail;

pub use moves::{Elastic, Hot, Lost, Plan, Steps};
pub use mutants::Mutants;

/// The fault harness of Coracle.
#[derive(Debug, Parser)]
#[command(name = "coracle-jepsen", version, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// The one seed that this process is to run.
    pub fn seed(&self) -> Option<u64> {
        match &self.command {
            Command::Sim(sim) => sim.seed,
            _ => None,
        }
    }
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Whole clusters in one thread, under faults that a seed decides
    #[command(after_help = "Examples:\n  \
        coracle-jepsen sim --seeds 1000\n  \
        coracle-jepsen sim --seed 17 --trace")]
    Sim(Sim),
    /// The same with one of our own defects put in on purpose after the other: each must be found
    #[command(after_help = "Examples:\n  \
        coracle-jepsen mutants\n  \
        coracle-jepsen mutants --only forgets-votes --seeds 50")]
    Mutants(Mutants),
    /// Both judges over a history in a file: the order that the servers say, and a search for any order
    Check(Check),
    /// Random crash histories of the shared log, held against a model
    LogHistories(LogHistories),
    /// Real processes: the leader of a shard under load is killed, again and again
    Failover(Failover),
    /// Real processes: as much load as goes, and no election
    Saturation(Saturation),
    /// Real processes: increments by many clients, lost answers, doubled requests, leaders that change
    ExactlyOnce(ExactlyOnce),
    /// Real processes: what expired or is overwritten leaves the disk, and never comes back
    Reclaim(Reclaim),
    /// Real processes: scans of everything while it is written, with failovers, with a reader that stops
    Scan(Scan),
    /// One scan, told line by line to whoever started this process
    #[command(hide = true)]
    ScanReader(ScanReader),
    /// Real processes: session and bounded reads with a follower that is held back; what they bring
    Reads(Reads),
    /// Real processes: nodes come, go and restart under a checked load, and no request fails
    Elastic(Elastic),
    /// Real processes: whoever takes part in a move is killed, between any two of its steps
    Steps(Steps),
    /// Real processes: what a plan of the balancer foretells, and what happens
    Plan(Plan),
    /// Real processes: a shard that takes most of the load is split and spread by itself
    Hot(Hot),
    /// Real processes: a node is lost with its disk, and what it held comes back by itself
    Lost(Lost),
}

/// See [`Command::Sim`].
#[derive(Debug, clap::Args)]
pub struct Sim {
    /// One seed, in this process
    #[arg(long, value_name = "SEED", conflicts_with = "seeds")]
    pub seed: Option<u64>,
    /// How many seeds
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub seeds: u64,
    /// The first of them
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub from: u64,
    /// How long faults go on, in virtual seconds
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub seconds: u64,
    /// How many nodes (default: the seed decides, 3 or 5)
    #[arg(long, value_name = "N")]
    pub nodes: Option<usize>,
    /// Processes at a time (default: one per core)
    #[arg(long, value_name = "N")]
    pub jobs: Option<usize>,
    /// With --seed: print what happens
    #[arg(long)]
    pub trace: bool,
    /// With --seed: print every delivered message as well
    #[arg(long)]
    pub messages: bool,
    /// With --seed: print what the nodes log, for example info,coracle_raft=debug
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// With --seed: write the history, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
    /// Disks that lie about syncs: it must fail
    #[arg(long)]
    pub lying_disks: bool,
    /// A defect that is put in on purpose (see `mutants`): it must fail
    #[arg(long, value_name = "NAME", value_parser = mutants::named)]
    pub mutant: Option<Mutant>,
    /// With --seed: print the report for another process
    #[arg(long, hide = true)]
    pub report: bool,
}

/// See [`Command::Check`].
#[derive(Debug, clap::Args)]
pub struct Check {
    /// The history, one JSON object a line, as `sim --history` writes it
    #[arg(value_name = "FILE")]
    pub history: PathBuf,
    /// Where to draw the smallest part of it that has no explanation
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// See [`Command::LogHistories`].
#[derive(Debug, clap::Args)]
pub struct LogHistories {
    /// How many
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub count: u64,
    /// The first seed
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub from: u64,
    /// A fault put in on purpose: the command must then fail
    #[arg(long, value_name = "FAULT")]
    pub sabotage: Option<Fault>,
}

/// Faults of the log that its histories must find.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Fault {
    /// Answers a batch before its sync.
    AckBeforeSync,
    /// Acknowledges votes without writing them.
    LostVote,
    /// Does not write truncations.
    ForgottenTruncate,
}

/// See [`Command::Failover`].
#[derive(Debug, clap::Args)]
pub struct Failover {
    /// How many times
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub kills: u32,
    /// What is done to the leader
    #[arg(long, value_enum, default_value_t = How::Kill)]
    pub how: How,
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub nodes: usize,
    /// Fails when the 99th percentile is longer, in milliseconds
    #[arg(long, value_name = "MS")]
    pub p99_ms_max: Option<u64>,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

/// What is done to a leader.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum How {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Stop,
    /// Cut off from all other nodes.
    Cut,
}

/// See [`Command::Saturation`].
#[derive(Debug, clap::Args)]
pub struct Saturation {
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    pub minutes: f64,
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub nodes: usize,
    /// Writers, each with one write under way
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub writers: u32,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

/// See [`Command::ExactlyOnce`].
#[derive(Debug, clap::Args)]
pub struct ExactlyOnce {
    /// How many increments (default: 1,000,000; with --fresh-ids 50,000)
    #[arg(long, value_name = "N")]
    pub increments: Option<u64>,
    /// Clients, each with an id and connections of its own
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub clients: u64,
    /// Increments that each client has under way
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub in_flight: u64,
    /// Counters
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub counters: usize,
    /// At least so many changes of leaders, by kills and transfers in turn
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub changes: u64,
    /// At least so many answers dropped on the way back
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub drops: u64,
    /// At least so many requests sent twice
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub duplicates: u64,
    /// The control: a fresh request id on every attempt; it holds when the sum drifts in every run
    #[arg(long)]
    pub fresh_ids: bool,
    /// How many runs (default: 1; with --fresh-ids 3)
    #[arg(long, value_name = "N")]
    pub runs: Option<u64>,
    /// What faults, counters and victims are drawn from
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub nodes: usize,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl ExactlyOnce {
    fn plan(self) -> exactly_once::Plan {
        let (increments, runs) = if self.fresh_ids { (50_000, 3) } else { (1_000_000, 1) };
        exactly_once::Plan {
            program: self.program,
            nodes: self.nodes,
            clients: self.clients,
            in_flight: self.in_flight,
            counters: self.counters,
            increments: self.increments.unwrap_or(increments),
            changes: self.changes,
            drops: self.drops,
            duplicates: self.duplicates,
            fresh_ids: self.fresh_ids,
            runs: self.runs.unwrap_or(runs),
            seed: self.seed,
        }
    }
}

/// See [`Command::Reads`].
#[derive(Debug, clap::Args)]
pub struct Reads {
    /// At least so many session reads are judged
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub checks: u64,
    /// At least so many bounded reads are judged
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub bounded: u64,
    /// How late one follower hears the others, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2_000)]
    pub delay: u64,
    /// Sessions, each with a client that writes and another that reads
    #[arg(long, value_name = "N", default_value_t = 48)]
    pub sessions: u32,
    /// Rounds of the comparison of rates, as root; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rounds: u32,
    /// Three replicas must serve so many times what the leader alone does
    #[arg(long, value_name = "TIMES", default_value_t = 2.0)]
    pub ratio_min: f64,
    /// What is drawn
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Reads {
    fn plan(self) -> reads::Plan {
        reads::Plan {
            program: self.program,
            checks: self.checks,
            bounded: self.bounded,
            delay: Duration::from_millis(self.delay),
            sessions: self.sessions,
            followers_min: 90.0,
            moved_min: self.checks / 100,
            rounds: self.rounds,
            ratio_min: self.ratio_min,
            seed: self.seed,
        }
    }
}

/// See [`Command::Reclaim`].
#[derive(Debug, clap::Args)]
pub struct Reclaim {
    /// Keys that expire; as much again in versions that are overwritten
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub keys: u32,
    /// The keys' time to live, in seconds: longer than it takes to write and read them all
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub ttl: u64,
    /// The keyspace's history, in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub history: u64,
    /// At most so many percent of the bytes may be left
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
    pub left_max: f64,
    /// How many shards
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub shards: u32,
    /// What values are drawn from
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

/// See [`Command::Scan`].
#[derive(Debug, clap::Args)]
pub struct Scan {
    /// Keys of 16 bytes, each with a value of 100
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub keys: u64,
    /// How many shards
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub shards: u32,
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub nodes: usize,
    /// Writes a second while it is scanned
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub rate: u32,
    /// Servers that are killed during a scan, one after the other
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub kills: u32,
    /// How long a reader stops, in seconds: longer than the history of 60 needs pins
    #[arg(long, value_name = "N", default_value_t = 90)]
    pub pause: u64,
    /// The server's program (default: `coracle` beside this one)
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

impl Reclaim {
    fn plan(self) -> reclaim::Plan {
        reclaim::Plan {
            program: self.program,
            shards: self.shards,
            keys: self.keys,
            ttl: Duration::from_secs(self.ttl),
            history: Duration::from_secs(self.history),
            left_max: self.left_max,
            seed: self.seed,
        }
    }
}

/// See [`Command::ScanReader`].
#[derive(Debug, clap::Args)]
pub struct ScanReader {
    /// Nodes to begin with
    #[arg(long)]
    pub seeds: String,
    /// Entries a second; 0 is as fast as they come
    #[arg(long)]
    pub per_second: u64,
    /// Stops once after so many entries; 0 is never
    #[arg(long)]
    pub stop_after: u64,
    /// For so long
    #[arg(long)]
    pub stop_ms: u64,
}

/// Runs a command.
pub fn run(args: Args) -> ExitCode {
    let held = match args.command {
        Command::Sim(sim) => match sim.seed {
            Some(seed) => one_seed(seed, &sim),
            None => many_seeds(&sim),
        },
        Command::Mutants(asked) => mutants::run(&asked),
        Command::Check(asked) => replay::check(&asked.history, asked.html.as_deref()),
        Command::LogHistories(histories) => Ok(log_histories(&histories)),
        Command::Failover(asked) => failover::run(&failover::Plan {
            program: asked.program,
            nodes: asked.nodes,
            rounds: asked.kills,
            how: match asked.how {
                How::Kill => failover::How::Kill,
                How::Stop => failover::How::Stop,
                How::Cut => failover::How::Cut,
            },
            p99_max: asked.p99_ms_max.map(Duration::from_millis),
        }),
        Command::Saturation(asked) => saturation::run(&saturation::Plan {
            program: asked.program,
            nodes: asked.nodes,
            writers: asked.writers,
            lasts: Duration::from_secs_f64(asked.minutes * 60.0),
        }),
        Command::ExactlyOnce(asked) => exactly_once::run(&asked.plan()),
        Command::Reclaim(asked) => reclaim::run(&asked.plan()),
        Command::Scan(asked) => scan::run(&scan::Plan {
            program: asked.program,
            nodes: asked.nodes,
            shards: asked.shards,
            keys: asked.keys,
            rate: asked.rate,
            kills: asked.kills,
            pause: Duration::from_secs(asked.pause),
        }),
        Command::ScanReader(asked) => scan::read(&Manners {
            seeds: asked.seeds,
            per_second: asked.per_second,
            stop_after: asked.stop_after,
            stop_for: Duration::from_millis(asked.stop_ms),
        }),
        Command::Reads(asked) => reads::run(&asked.plan()),
        Command::Elastic(asked) => elastic::run(&asked.plan()),
        Command::Steps(asked) => steps::run(&asked.plan()),
        Command::Plan(asked) => foretold::run(&asked.plan()),
        Command::Hot(asked) => hot::run(&asked.plan()),
        Command::Lost(asked) => lost::run(&asked.plan()),
    };
    match held {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(why) => {
            eprintln!("coracle-jepsen: {why}");
            ExitCode::from(2)
        }
    }
}

fn one_seed(seed: u64, sim: &Sim) -> Result<bool, String> {
    if let Some(filter) = &sim.log {
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false).init();
    }
    if let Some(mutant) = sim.mutant
        && !mutant.choose()
    {
        return Err(
            "a release build has no defects to put in: build it without --release".to_owned()
        );
    }
    let report = simulation::run(
        seed,
        &Options {
            lasts: Duration::from_secs(sim.seconds),
            nodes: sim.nodes,
            detail: match (sim.messages, sim.trace) {
                (true, _) => Detail::Messages,
                (false, true) => Detail::Events,
                (false, false) => Detail::Silent,
            },
            history: sim.history.clone(),
            lying_disks: sim.lying_disks,
        },
    );
    if sim.report {
        let json = serde_json::to_string(&report).expect("a report is plain values");
        println!("{REPORT_MARK}{json}");
    } else {
        println!("{}", sweep::line(&report));
        let faults = report.faults.iter().map(|(kind, times)| format!("{kind} {times}"));
        println!("faults: {}", faults.collect::<Vec<_>>().join(", "));
        report.violations.iter().for_each(|violation| println!("  {violation}"));
    }
    Ok(report.violations.is_empty())
}

/// Processes that run beside each other when nobody says how many.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn many_seeds(sim: &Sim) -> Result<bool, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    let mut args = vec!["--seconds".to_owned(), sim.seconds.to_string()];
    if let Some(nodes) = sim.nodes {
        args.extend(["--nodes".to_owned(), nodes.to_string()]);
    }
    if sim.lying_disks {
        args.push("--lying-disks".to_owned());
    }
    if let Some(mutant) = sim.mutant {
        args.extend(["--mutant".to_owned(), mutant.name().to_owned()]);
    }
    let jobs = sim.jobs.unwrap_or_else(cores);
    let (from, seeds) = (sim.from, sim.seeds);
    let sweep = Sweep { program, from, seeds, jobs, until_failure: false, args };
    let summary = sweep.run(|report| {
        println!("{}", sweep::line(report));
        for violation in &report.violations {
            println!("  {violation}");
        }
        if !report.violations.is_empty() {
            println!("  again: {}", sweep.reproduction(report.seed));
        }
    });
    println!("{}", summary.text());
    Ok(summary.failed().is_empty())
}

fn log_histories(asked: &LogHistories) -> bool {
    let sabotage = asked.sabotage.map(|fault| match fault {
        Fault::AckBeforeSync => Sabotage::AckBeforeSync,
        Fault::LostVote => Sabotage::LostVote,
        Fault::ForgottenTruncate => Sabotage::ForgottenTruncate,
    });
    let (mut acknowledged, mut crashes) = (0, 0);
    for seed in asked.from..asked.from + asked.count {
        match run_history(seed, sabotage) {
            Ok(report) => {
                acknowledged += report.acknowledged;
                crashes += report.crashes;
            }
            Err(why) => {
                println!("{why}");
                println!("again: coracle-jepsen log-histories --count 1 --from {seed}");
                println!("histories until then: {}", seed - asked.from + 1);
                return false;
            }
        }
    }
    let count = asked.count;
    println!(
        "{count} histories, {acknowledged} acknowledged operations, {crashes} crashes: all held"
    );
    true
}

//! The program `coracle-bench`: reads the command line, runs what it names, prints, and ends with 0, or
//! with 1 when there are no figures or an answer was wrong. Owns the flags and their defaults.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use coracle_benches::aims::{self, Aim};
use coracle_benches::baseline::Baseline;
use coracle_benches::cluster::{ClusterPlan, connect};
use coracle_benches::failure::Failure;
use coracle_benches::grow::{self, Axis};
use coracle_benches::limit::{disk, echo, rocksdb};
use coracle_benches::load::{self, Plan};
use coracle_benches::page::{self, Page};
use coracle_benches::peer::etcd::Etcd;
use coracle_benches::peer::redis::Redis;
use coracle_benches::port::System;
use coracle_benches::report::{self, Row};
use coracle_benches::results::Results;
use coracle_benches::rig::{Rig, RigPlan};
use coracle_benches::suite::{self, Pace, Suite};
use coracle_benches::witness::Witness;
use coracle_benches::workload::{self, Distribution, Mix, Workload};
use coracle_benches::{micro, stages};

/// How fast a cluster is, and how fast it could be on this machine.
#[derive(Debug, Parser)]
#[command(name = "coracle-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Writes keys
    Put(Load),
    /// Reads keys, linearizably, after writing each once
    Get(Load),
    /// Reads and writes keys
    Mixed {
        /// Of a hundred operations so many are reads
        #[arg(long, default_value_t = 50, value_name = "PERCENT")]
        reads: u32,
        #[command(flatten)]
        load: Load,
    },
    /// One of YCSB's core workloads
    Ycsb {
        /// a to f
        workload: char,
        #[command(flatten)]
        load: Load,
    },
    /// What the disk, or RocksDB, allows on this machine
    #[command(subcommand)]
    Limit(Limit),
    /// Starts servers here and shows where the time of their puts goes, beside the syncs of the disk
    Stages(StagesArgs),
    /// Measures everything beside etcd, Redis, RocksDB and an echo, and writes docs/performance.md
    Report(Report),
    /// Measures what the baseline holds, and shows what changed
    Compare(Compare),
    /// Single parts, each alone
    Micro {
        /// The directory on the disk concerned
        #[arg(long, default_value = ".", value_name = "D")]
        dir: PathBuf,
    },
    /// Prints the versions of the peers, or what is missing
    Peers,
    /// A server that answers everything with nothing: what `report` measures gRPC with
    #[command(hide = true)]
    Echo {
        /// ip:port
        address: SocketAddr,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Skew {
    /// All keys are equally likely
    Uniform,
    /// A few are hot
    Zipfian,
    /// The newest are hot
    Latest,
}

#[derive(Debug, Args)]
struct Load {
    /// Nodes to begin with, host:port, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "127.0.0.1:7400", value_name = "A,B")]
    endpoints: Vec<String>,
    /// Callers, each with one operation under way
    #[arg(long, default_value_t = 64, value_name = "N")]
    clients: usize,
    /// Connected clients that the callers share
    #[arg(long, default_value_t = 1, value_name = "N")]
    connections: usize,
    /// How long is counted
    #[arg(long, default_value_t = 10, value_name = "S")]
    seconds: u64,
    /// How long the load runs before that
    #[arg(long, default_value_t = 2, value_name = "S")]
    warmup: u64,
    /// Operations per second of all callers together; 0: as fast as they are answered (closed loop)
    #[arg(long, default_value_t = 0, value_name = "R")]
    rate: u64,
    #[command(flatten)]
    data: Data,
    /// Which keys are hot [default: none, or as the workload has it]
    #[arg(long, value_enum, value_name = "HOW")]
    skew: Option<Skew>,
    /// The keyspace, which must exist
    #[arg(long, default_value = "default", value_name = "NAME")]
    keyspace: String,
    /// Also write the figures there, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Data {
    /// Length of a value
    #[arg(long, default_value_t = 100, value_name = "BYTES")]
    value: usize,
    /// How many keys there are, all equally likely
    #[arg(long, default_value_t = 10_000, value_name = "K")]
    keys: u64,
    /// Keys and values follow from this
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

#[derive(Debug, Subcommand)]
enum Limit {
    /// Writes blocks one after the other and syncs each, as the Raft log does
    Disk {
        /// The directory on the disk concerned
        #[arg(long, default_value = ".", value_name = "D")]
        dir: PathBuf,
        /// Writers, each with a file of its own
        #[arg(long, default_value_t = 1, value_name = "N")]
        writers: usize,
        /// Length of a block
        #[arg(long, default_value_t = 4_096, value_name = "BYTES")]
        block: usize,
        /// How long
        #[arg(long, default_value_t = 5, value_name = "S")]
        seconds: u64,
        /// Also write the figures there, as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Writes batches to a state store, without a write-ahead log
    Rocksdb {
        /// The directory on the disk concerned
        #[arg(long, default_value = ".", value_name = "D")]
        dir: PathBuf,
        /// Puts of a batch
        #[arg(long, default_value_t = 100, value_name = "N")]
        batch: usize,
        /// How long
        #[arg(long, default_value_t = 5, value_name = "S")]
        seconds: u64,
        #[command(flatten)]
        data: Data,
        /// Also write the figures there, as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
struct StagesArgs {
    /// The directory on the disk concerned
    #[arg(long, default_value = ".", value_name = "D")]
    dir: PathBuf,
    /// Servers
    #[arg(long, default_value_t = 3, value_name = "N")]
    nodes: usize,
    /// Shards; 0: as many as by default
    #[arg(long, default_value_t = 0, value_name = "N")]
    shards: u32,
    /// Callers of each step
    #[arg(long, value_delimiter = ',', default_value = "1,8,64,256", value_name = "N,M")]
    clients: Vec<usize>,
    /// Connected clients that the callers share
    #[arg(long, default_value_t = 1, value_name = "N")]
    connections: usize,
    /// How long each step is counted
    #[arg(long, default_value_t = 10, value_name = "S")]
    seconds: u64,
    #[command(flatten)]
    data: Data,
    /// The servers' program; without it `coracle` beside this one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// A further setting of the servers, key=value
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Also write the figures there, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Report {
    /// One round of short cells over fewer keys, without the axes of growth: at most 8 minutes
    #[arg(long)]
    quick: bool,
    /// Keys that are loaded [default: 1,000,000, quick: 100,000]
    #[arg(long, value_name = "K")]
    keys: Option<u64>,
    /// The directory on the disk concerned
    #[arg(long, default_value = ".", value_name = "D")]
    dir: PathBuf,
    /// Where performance.md is written
    #[arg(long, default_value = "docs", value_name = "D")]
    docs: PathBuf,
    /// Every row that was measured, as lines of JSON
    #[arg(long, default_value = "bench-rows.ndjson", value_name = "FILE")]
    rows: PathBuf,
    /// The servers' program; without it `coracle` beside this one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Only the axes of growth named
    #[arg(long, value_delimiter = ',', value_name = "shards,keys,clients,values")]
    only_growth: Vec<String>,
}

#[derive(Debug, Args)]
struct Compare {
    /// The baseline
    #[arg(long, default_value = "benches/baselines/quick.json", value_name = "FILE")]
    baseline: PathBuf,
    /// Writes what is measured as the new baseline
    #[arg(long)]
    save: bool,
    /// Only the parts that are measured alone: half a minute
    #[arg(long)]
    micro: bool,
    /// The directory on the disk concerned
    #[arg(long, default_value = ".", value_name = "D")]
    dir: PathBuf,
    /// The servers' program; without it `coracle` beside this one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.map_err(Failure::of("start")).and_then(|runtime| match cli.command {
        Command::Put(load) => runtime.block_on(put_load(load, Mix::reads(0), None)),
        Command::Get(load) => runtime.block_on(put_load(load, Mix::reads(100), None)),
        Command::Mixed { reads, load } => runtime.block_on(put_load(load, Mix::reads(reads), None)),
        Command::Ycsb { workload, load } => match workload::ycsb(workload) {
            Some((mix, skew)) => runtime.block_on(put_load(load, mix, Some(skew))),
            None => Err(Failure::new("YCSB's workloads are a to f")),
        },
        Command::Limit(limit) => measure_limit(limit),
        Command::Stages(plan) => runtime.block_on(run_stages(plan)),
        Command::Report(plan) => runtime.block_on(run_report(plan)),
        Command::Compare(plan) => runtime.block_on(run_compare(plan)),
        Command::Micro { dir } => runtime.block_on(run_micro(&dir)).map(|_| ()),
        Command::Peers => {
            println!("etcd:  {}\nRedis: {}", Etcd::version(), Redis::version());
            Ok(())
        }
        Command::Echo { address } => runtime.block_on(echo::serve(address)),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("coracle-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}

impl Data {
    fn workload(&self, mix: Mix, skew: Distribution) -> Result<Workload, Failure> {
        Workload::new(mix, skew, self.keys, self.value, self.seed)
    }

    fn of_puts(&self) -> Result<Workload, Failure> {
        self.workload(Mix::reads(0), Distribution::Uniform)
    }
}

fn said(what: &str) {
    eprintln!("coracle-bench: {what}");
}

async fn put_load(load: Load, mix: Mix, skew: Option<Distribution>) -> Result<(), Failure> {
    let asked = load.skew.map(|skew| match skew {
        Skew::Uniform => Distribution::Uniform,
        Skew::Zipfian => Distribution::Zipfian,
        Skew::Latest => Distribution::Latest,
    });
    let workload = load.data.workload(mix, asked.or(skew).unwrap_or(Distribution::Uniform))?;
    let clients = connect(&load.endpoints, load.connections)?;
    let witness = Arc::new(Witness::new(workload.keys));
    let system = System::of_clients(&clients, &load.keyspace, witness);
    if mix != Mix::reads(0) {
        load::fill(&system, &workload).await?;
    }
    let plan = Plan {
        callers: load.clients,
        rate: load.rate,
        warmup: Duration::from_secs(load.warmup),
        window: Duration::from_secs(load.seconds),
        batch: 1,
    };
    let tallies = load::run(&system, &workload, plan).await?;
    for client in clients {
        client.close().await;
    }
    let rows: Vec<Row> =
        tallies.each().map(|(kind, tally)| Row::new(kind.name(), tally, plan.window)).collect();
    let how = match load.rate {
        0 => "closed loop".to_owned(),
        rate => format!("open loop, {rate} due per second"),
    };
    let title = format!(
        "{} clients on {} connections, {how}, {} s · values of {} bytes, {} keys",
        load.clients, load.connections, load.seconds, load.data.value, load.data.keys
    );
    show(&title, &rows, load.json.as_deref())?;
    let mut errors = rows.iter().flat_map(|row| row.errors.keys());
    if let Some(wrong) = errors.find(|error| error.starts_with("wrong")) {
        return Err(Failure::new(format!("an answer was {wrong}")));
    }
    match rows.iter().any(|row| row.per_second > 0.0) {
        true => Ok(()),
        false => Err(Failure::new("not one operation succeeded")),
    }
}

fn show(title: &str, rows: &[Row], json: Option<&Path>) -> Result<(), Failure> {
    print!("{}", report::text(title, rows));
    json.map_or(Ok(()), |path| report::write_json(path, &report::json(title, rows)))
}

fn measure_limit(limit: Limit) -> Result<(), Failure> {
    match limit {
        Limit::Disk { dir, writers, block, seconds, json } => {
            let window = Duration::from_secs(seconds);
            let tally = disk::run(&dir, writers, block, window)?;
            let title = format!("writes of {block} bytes, each synced, in {}", dir.display());
            let row = Row::new(format!("write + sync, {writers} writers"), &tally, window);
            show(&title, &[row], json.as_deref())
        }
        Limit::Rocksdb { dir, batch, seconds, data, json } => {
            let window = Duration::from_secs(seconds);
            let written = rocksdb::run(&dir, &data.of_puts()?, batch, window)?;
            let title = format!(
                "batches of {batch} puts, values of {} bytes, in {}; the last flush took {}",
                data.value,
                dir.display(),
                report::duration(written.flush)
            );
            let per_second = written.puts_per_second;
            let batches = Row::new("batch", &written.batches, window);
            let puts = Row { name: "put, in batches".to_owned(), per_second, ..batches.clone() };
            show(&title, &[puts, batches], json.as_deref())
        }
    }
}

async fn run_stages(args: StagesArgs) -> Result<(), Failure> {
    let plan = stages::StagesPlan {
        cluster: ClusterPlan {
            program: program(args.program)?,
            nodes: args.nodes,
            shards: args.shards,
            dir: args.dir,
            settings: args.set,
        },
        callers: args.clients,
        connections: args.connections,
        window: Duration::from_secs(args.seconds),
    };
    let found = stages::run(&plan, &args.data.of_puts()?, said).await?;
    print!("{}", found.text());
    let json = args.json.as_deref();
    json.map_or(Ok(()), |path| report::write_json(path, &found.json()))
}

async fn run_report(args: Report) -> Result<(), Failure> {
    let began = Instant::now();
    let pace = if args.quick { Pace::QUICK } else { Pace::FULL };
    let keys = args.keys.unwrap_or(if args.quick { 100_000 } else { 1_000_000 });
    let workload = Workload::new(Mix::reads(0), Distribution::Uniform, keys, 256, 1)?;
    let plan = RigPlan { program: program(args.program)?, dir: args.dir.clone(), workload };
    let mut results = Results::to_file(&args.rows)?;
    let mut parts = Vec::new();
    if args.only_growth.is_empty() {
        measure(&plan, pace, &mut results).await?;
        suite::idle(&plan, pace.idle, &mut results, &said).await?;
        parts = run_micro(&args.dir).await?;
    }
    for axis in Axis::ALL {
        let is_named = args.only_growth.iter().any(|name| axis.name().starts_with(name.as_str()));
        if is_named || (!args.quick && args.only_growth.is_empty()) {
            grow::run(axis, &plan, pace.window / 2, &mut results, &said).await?;
        }
    }
    let page = Page {
        results: &results,
        workload: &plan.workload,
        rounds: pace.rounds,
        window: pace.window,
        took: began.elapsed(),
        micro: &parts,
    };
    page.write(&args.docs)?;
    print!("{}", page::aims_table(&aims::all(&results)));
    let page = args.docs.join("performance.md");
    said(&format!("{} after {:.0} s", page.display(), began.elapsed().as_secs_f64()));
    verdict(&results)
}

async fn measure(plan: &RigPlan, pace: Pace, results: &mut Results) -> Result<(), Failure> {
    let rig = Rig::start(plan, &said).await?;
    let mut suite = Suite { rig: &rig, pace, results, said: &said };
    suite.run().await?;
    suite.overload().await
}

/// Slow answers are figures, wrong ones are not.
fn verdict(results: &Results) -> Result<(), Failure> {
    match results.wrong() {
        wrong if wrong.is_empty() => Ok(()),
        wrong => Err(Failure::new(format!("answers were wrong:\n{}", wrong.join("\n")))),
    }
}

async fn run_micro(dir: &Path) -> Result<Vec<(String, f64)>, Failure> {
    let parts = micro::run(dir).await?;
    let cells = |(name, nanos): &(String, f64)| vec![name.clone(), format!("{nanos:.0}")];
    let rows: Vec<Vec<String>> = parts.iter().map(cells).collect();
    eprint!("{}", report::table(&["part, alone", "ns"], &rows));
    Ok(parts)
}

async fn run_compare(args: Compare) -> Result<(), Failure> {
    let mut results = Results::default();
    if !args.micro {
        let workload = Workload::new(Mix::reads(0), Distribution::Uniform, 100_000, 256, 1)?;
        let program = program(args.program)?;
        let plan = RigPlan { program, dir: args.dir.clone(), workload };
        measure(&plan, Pace::QUICK, &mut results).await?;
    }
    let parts: BTreeMap<String, f64> = run_micro(&args.dir).await?.into_iter().collect();
    let ratio = |aim: Aim| {
        // What is better when it is lower is turned round.
        let reached = aim.reached.filter(|reached| *reached > 0.0)?;
        Some((aim.work, if aim.at_least { reached } else { 1.0 / reached }))
    };
    let ratios = aims::all(&results).into_iter().filter_map(ratio).collect();
    let now = Baseline::now(ratios, parts);
    if args.save {
        now.write(&args.baseline)?;
    } else {
        let (text, worse) = now.since(&Baseline::read(&args.baseline)?);
        print!("{text}");
        if worse > 0 {
            said(&format!("{worse} figures are worse by more than 15 %"));
        }
    }
    verdict(&results)
}

fn program(given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    given.map_or_else(beside_this_one, Ok)
}

fn beside_this_one() -> Result<PathBuf, Failure> {
    let this = std::env::current_exe().map_err(Failure::of("find this program"))?;
    let program = this.with_file_name("coracle");
    match program.exists() {
        true => Ok(program),
        false => {
            let text =
                format!("{} is not there: build it, or name one with --program", program.display());
            Err(Failure::new(text))
        }
    }
}

//! The program `coracle-bench`: reads the command line, runs what it names, prints, and ends with 0, or
//! with 1 when there are no figures. Owns the flags and their defaults.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use coracle_benches::cluster::ClusterPlan;
use coracle_benches::compare;
use coracle_benches::failure::Failure;
use coracle_benches::limit::{disk, rocksdb};
use coracle_benches::load::{self, Plan, Tallies};
use coracle_benches::report::{self, Row};
use coracle_benches::workload::Workload;

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
    /// What the disk, or RocksDB, allows on this machine
    #[command(subcommand)]
    Limit(Limit),
    /// Starts servers here and compares their puts with the syncs of the disk
    Compare(Compare),
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
struct Compare {
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

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.map_err(Failure::of("start")).and_then(|runtime| match cli.command {
        Command::Put(load) => runtime.block_on(put_load(load, 0)),
        Command::Get(load) => runtime.block_on(put_load(load, 100)),
        Command::Mixed { reads, load } => runtime.block_on(put_load(load, reads)),
        Command::Limit(limit) => measure_limit(limit),
        Command::Compare(compare) => runtime.block_on(run_compare(compare)),
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
    fn workload(&self, reads_percent: u32) -> Result<Workload, Failure> {
        Workload::new(reads_percent, self.keys, self.value, self.seed)
    }
}

async fn put_load(load: Load, reads_percent: u32) -> Result<(), Failure> {
    let workload = load.data.workload(reads_percent)?;
    let clients = compare::connect(&load.endpoints, load.connections)?;
    let Some(first) = clients.first() else {
        return Err(Failure::new("there must be a connection at least"));
    };
    if reads_percent > 0 {
        load::fill(first, &load.keyspace, &workload).await?;
    }
    let plan = Plan {
        callers: load.clients,
        rate: load.rate,
        warmup: Duration::from_secs(load.warmup),
        window: Duration::from_secs(load.seconds),
    };
    let Tallies { puts, gets } = load::run(&clients, &load.keyspace, &workload, plan).await?;
    for client in clients {
        client.close().await;
    }
    let rows = [("put", puts), ("get", gets)].into_iter();
    let rows = rows.filter(|(_, tally)| tally.operations() > 0);
    let rows: Vec<Row> = rows.map(|(name, tally)| Row::new(name, &tally, plan.window)).collect();
    let how = match load.rate {
        0 => "closed loop".to_owned(),
        rate => format!("open loop, {rate} due per second"),
    };
    let title = format!(
        "{} clients on {} connections, {how}, {} s · values of {} bytes, {} keys",
        load.clients, load.connections, load.seconds, load.data.value, load.data.keys
    );
    show(&title, &rows, load.json.as_deref())?;
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
            let written = rocksdb::run(&dir, &data.workload(0)?, batch, window)?;
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

async fn run_compare(compare: Compare) -> Result<(), Failure> {
    let program = match compare.program {
        Some(program) => program,
        None => beside_this_one()?,
    };
    let plan = compare::ComparePlan {
        cluster: ClusterPlan {
            program,
            nodes: compare.nodes,
            shards: compare.shards,
            dir: compare.dir,
            settings: compare.set,
        },
        callers: compare.clients,
        connections: compare.connections,
        window: Duration::from_secs(compare.seconds),
    };
    let workload = compare.data.workload(0)?;
    let said = |what: &str| eprintln!("coracle-bench: {what}");
    let comparison = compare::run(&plan, &workload, said).await?;
    print!("{}", comparison.text());
    let json = compare.json.as_deref();
    json.map_or(Ok(()), |path| report::write_json(path, &comparison.json()))
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

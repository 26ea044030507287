//! Owns the command line: every command, flag and help text, and the reading of single values
//! (durations, nodes, shards). Does nothing with them (see `main.rs`).

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use coracle_client::{EntityRule, NodeId, ShardId};

mod cluster;
mod data;

pub use cluster::{
    Apply, Node, Operation, Rebalance, Replica, Setting, Shard, SplitBy, Switch, Which,
    parse_operation,
};
pub use data::{
    Addressing, Delete, DeleteRange, Export, Freshness, Get, Import, Put, RecordFormat, Scan,
    SessionFile,
};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "coracle",
    version,
    about = "A strongly consistent, sharded key-value service",
    after_help = "Examples:\n  \
        coracle demo                        five nodes on this machine, and a load to watch\n  \
        coracle put hello world             in a second terminal\n  \
        coracle get hello\n  \
        coracle status\n\n\
        `coracle COMMAND --help` says more. Exit codes and output formats: docs/cli.md"
)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Nodes to ask, host:port, separated by commas [env: CORACLE_ENDPOINTS]
    #[arg(long, global = true, value_name = "A,B", value_delimiter = ',')]
    pub endpoints: Vec<String>,
    /// Cluster to ask, from `coracle context ls` [env: CORACLE_CONTEXT]
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "endpoints")]
    pub context: Option<String>,
    /// How long a call may take, retries included (default 10s)
    #[arg(long, global = true, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// How results look
    #[arg(short, long, global = true, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
    /// Leave the headings of tables out
    #[arg(long, global = true)]
    pub no_headers: bool,
    /// When to use colours (NO_COLOR is honoured)
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: When,
    /// Say more about what goes wrong
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// How results look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For people, with more columns.
    Wide,
    /// One JSON document.
    Json,
    /// One JSON value per line.
    Jsonl,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum When {
    /// On a terminal.
    #[default]
    Auto,
    /// Also into pipes.
    Always,
    /// Nowhere.
    Never,
}

/// How keys and values are written as text.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Encoding {
    /// The bytes as they are.
    Utf8,
    /// Two digits a byte.
    Hex,
    /// Standard alphabet with padding.
    Base64,
    /// Text with \n, \t, \\ and \x00.
    Escape,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a value
    #[command(after_help = "Examples:\n  \
        coracle put hello world\n  \
        coracle put photo @cat.jpg --ttl 1h\n  \
        date | coracle put now -\n  \
        coracle put lock/a me --if-absent")]
    Put(Put),
    /// Read a value
    #[command(after_help = "Examples:\n  \
        coracle get hello\n  \
        coracle get photo >cat.jpg\n  \
        coracle get hello -o json\n\n\
        A key that does not exist: exit code 3.")]
    Get(Get),
    /// Delete a key
    #[command(after_help = "Examples:\n  \
        coracle delete hello\n  \
        coracle delete lock/a --if-value me")]
    Delete(Delete),
    /// Delete the keys of a range
    #[command(after_help = "Examples:\n  \
        coracle delete-range --prefix user/7/ --atomic\n  \
        coracle delete-range --start a --end b --dry-run\n  \
        coracle delete-range --prefix tmp/ --resume tmp.state\n\n\
        Without --atomic in steps over all shards: what is written once they have begun stays.")]
    DeleteRange(DeleteRange),
    /// List keys in order, at one version
    #[command(after_help = "Examples:\n  \
        coracle scan --prefix user/ --limit 20\n  \
        coracle scan --start a --end b --keys-only\n  \
        coracle scan --prefix user/ -o jsonl | jq .key")]
    Scan(Scan),
    /// Write a file of records
    #[command(after_help = "Examples:\n  \
        coracle import users.ndjson --resume users.state\n  \
        coracle import table.tsv --skip-bad\n  \
        apt-cache dumpavail | coracle import - --format packages --keyspace packages")]
    Import(Import),
    /// Write all keys at one version to a file
    #[command(after_help = "Examples:\n  \
        coracle export all.ndjson --resume all.state\n  \
        coracle export --prefix user/ | gzip >users.ndjson.gz")]
    Export(Export),
    /// Run a node
    #[command(after_help = "Examples:\n  \
        coracle server --data-dir /var/lib/coracle --join n1:7500,n2:7500,n3:7500\n  \
        coracle server --config /etc/coracle.toml --set raft.heartbeat_interval=50ms\n\n\
        Every setting: coracle config init. After the first start of all nodes: coracle init.")]
    Server(Server),
    /// Make a cluster of nodes that were started
    #[command(after_help = "Examples:\n  \
        coracle init --nodes 3\n  \
        coracle init --endpoints n1:7400 --nodes 5 --shards 64")]
    Init(Init),
    /// How the cluster is, and what it can lose
    Status,
    /// Nodes
    #[command(subcommand)]
    Node(Node),
    /// Shards
    #[command(subcommand)]
    Shard(Shard),
    /// Replicas, and how many are only for reads
    #[command(subcommand)]
    Replica(Replica),
    /// Where replicas shall be: plans, and what becomes of them
    #[command(subcommand)]
    Rebalance(Rebalance),
    /// Work of the cluster that goes on by itself
    #[command(subcommand)]
    Operation(Operation),
    /// Keyspaces
    #[command(subcommand)]
    Keyspace(Keyspace),
    /// A server's settings: check, show, explain
    #[command(subcommand)]
    Config(Config),
    /// Clusters by name, so that nobody retypes addresses
    #[command(subcommand)]
    Context(Context),
    /// A cluster on this machine, with a checked load and faults to inject
    #[command(after_help = "Examples:\n  \
        coracle demo\n  \
        coracle demo --nodes 3 --data-dir ./demo-data\n  \
        coracle demo --script tour\n\n\
        Other terminals need no flags meanwhile: coracle put hello world")]
    Demo(Demo),
    /// Print a script for a shell's completion
    #[command(after_help = "Example:\n  \
        coracle completion bash >/etc/bash_completion.d/coracle")]
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all pages to a directory
    Man {
        /// Where to write coracle.1, coracle-put.1, …
        dir: Option<PathBuf>,
    },
}

/// Where settings come from.
#[derive(Clone, Debug, Default, Args)]
pub struct Settings {
    /// The file of settings
    #[arg(long, value_name = "FILE", env = "CORACLE_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// Identity, log and shards of this node
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// gRPC for clients
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Other nodes
    #[arg(long, value_name = "ADDR")]
    pub peer_listen: Option<String>,
    /// Metrics and health
    #[arg(long, value_name = "ADDR")]
    pub http_listen: Option<String>,
    /// What clients are told to dial
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<String>,
    /// What other nodes are told to dial
    #[arg(long, value_name = "ADDR")]
    pub peer_advertise: Option<String>,
    /// Peer addresses of some nodes of the cluster, separated by commas
    #[arg(long, value_name = "A,B")]
    pub join: Option<String>,
    /// What fails together: a rack, an availability zone
    #[arg(long)]
    pub zone: Option<String>,
    /// Listen beyond this machine although nothing is encrypted yet
    #[arg(long)]
    pub insecure: bool,
    /// How log lines look: auto, text or json
    #[arg(long, value_name = "HOW")]
    pub log_format: Option<String>,
    /// What is logged, for example info,coracle_raft=debug
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// Any setting by its name, for example raft.heartbeat_interval=50ms
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// See [`Command::Server`].
#[derive(Debug, Args)]
pub struct Server {
    /// Where settings come from.
    #[command(flatten)]
    pub settings: Settings,
    /// End as soon as this process is no longer the parent
    #[arg(long, value_name = "PID", hide = true)]
    pub exit_with_parent: Option<u32>,
}

/// See [`Command::Init`].
#[derive(Debug, Args)]
pub struct Init {
    /// Wait until this many nodes are known
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub nodes: u32,
    /// Shards (default 16)
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub shards: u32,
    /// Voters per shard (default 3, fewer with fewer nodes)
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub replicas: u32,
}

/// See [`Command::Keyspace`].
#[derive(Debug, Subcommand)]
pub enum Keyspace {
    /// List the keyspaces
    Ls,
    /// Make a keyspace
    #[command(after_help = "Examples:\n  \
        coracle keyspace create orders --entity delimiter:/\n  \
        coracle keyspace create cache --history 0s")]
    Create {
        /// Its name: a to z, 0 to 9, _ and -
        name: String,
        /// What is hashed of a key, fixed for ever: whole, delimiter:/ or prefix:8
        #[arg(long, value_name = "RULE", default_value = "whole", value_parser = parse_entity)]
        entity: EntityRule,
        /// How long old versions stay readable (default 60s; requests under way keep 5s of any)
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        history: Option<Duration>,
        /// Only check
        #[arg(long)]
        dry_run: bool,
    },
    /// Change a keyspace's settings
    #[command(after_help = "Example:\n  coracle keyspace set cache --history 5m")]
    Set {
        /// Which one
        name: String,
        /// How long old versions shall stay readable; a longer history begins to count now
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        history: Duration,
        /// Only check
        #[arg(long)]
        dry_run: bool,
    },
}

/// See [`Command::Config`].
#[derive(Debug, Subcommand)]
pub enum Config {
    /// Check settings without starting anything
    #[command(after_help = "Example:\n  coracle config check /etc/coracle.toml")]
    Check {
        /// The file (the same as --config)
        file: Option<PathBuf>,
        /// Where settings come from.
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Show the settings as they would hold
    Show {
        /// Say behind each where it came from
        #[arg(long)]
        origin: bool,
        /// Only what differs from the defaults
        #[arg(long)]
        diff_default: bool,
        /// Where settings come from.
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Say all about one setting
    #[command(after_help = "Example:\n  coracle config explain raft.heartbeat_interval")]
    Explain {
        /// Its name
        key: String,
    },
    /// Print a file with every setting, commented out
    #[command(visible_alias = "sample")]
    Init,
}

/// See [`Command::Context`].
#[derive(Debug, Subcommand)]
pub enum Context {
    /// List the clusters
    Ls,
    /// Use a cluster from now on
    #[command(after_help = "Examples:\n  coracle context use prod\n  coracle context use -")]
    Use {
        /// Its name; - is the one before
        #[arg(allow_hyphen_values = true)]
        name: String,
    },
    /// Add a cluster, or change one
    #[command(after_help = "Example:\n  coracle context add prod n1:7400,n2:7400")]
    Add {
        /// Its name
        name: String,
        /// Nodes, host:port, separated by commas
        #[arg(required = true, value_delimiter = ',', value_name = "A,B")]
        nodes: Vec<String>,
        /// The keyspace that commands mean
        #[arg(short, long, value_name = "NAME")]
        keyspace: Option<String>,
    },
    /// Remove a cluster
    Rm {
        /// Its name
        name: String,
    },
    /// Show which cluster commands mean now, and why
    Show,
}

/// See [`Command::Demo`].
#[derive(Debug, Args)]
pub struct Demo {
    /// How many nodes, 1 to 9
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=9))]
    pub nodes: u8,
    /// Zones, dealt out in turn
    #[arg(long, value_name = "A,B", value_delimiter = ',', default_value = "a,b,c")]
    pub zones: Vec<String>,
    /// Keep the data here
    #[arg(long, value_name = "DIR", conflicts_with = "in_memory")]
    pub data_dir: Option<PathBuf>,
    /// No disk at all
    #[arg(long)]
    pub in_memory: bool,
    /// Operations per second; 0 for none
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub load: u32,
    /// Nothing but plain lines
    #[arg(long)]
    pub plain: bool,
    /// Run by itself, and end with a verdict
    #[arg(long, value_name = "NAME", conflicts_with = "in_memory")]
    pub script: Option<Script>,
}

/// What a demo can do by itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Script {
    /// Import, kill the busiest leader under load, restart it, check every acknowledged write.
    Tour,
}

/// Help lists the commands under these headings.
const GROUPS: &[(&str, &[&str])] = &[
    ("Try it", &["demo"]),
    ("Key-value", &["put", "get", "delete", "delete-range", "scan", "import", "export"]),
    (
        "Cluster",
        &[
            "server",
            "init",
            "status",
            "node",
            "shard",
            "replica",
            "rebalance",
            "operation",
            "keyspace",
        ],
    ),
    ("Utility", &["config", "context", "completion", "man", "help"]),
];

/// The whole command line with its grouped help.
pub fn command() -> clap::Command {
    let mut command = Cli::command();
    // Adds `help`, which is a command like the others in the list below.
    command.build();
    let width = GROUPS.iter().flat_map(|(_, names)| *names).map(|name| name.len()).max();
    let width = width.unwrap_or(0);
    let mut groups = String::new();
    for (heading, names) in GROUPS {
        groups.push_str(&format!("\n{heading}:\n"));
        for name in *names {
            let about = command.find_subcommand(name).and_then(clap::Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            groups.push_str(&format!("  {name:width$}  {about}\n"));
        }
    }
    // A template knows braces only as its own tags.
    assert!(!groups.contains('{'), "a command's short help has a brace: {groups}");
    let template = format!(
        "{{about}}\n\n{{usage-heading}} {{usage}}\n{groups}\nOptions:\n{{options}}{{after-help}}\n"
    );
    Cli::command().help_template(template)
}

/// A number with its unit: `250ms`, `30s`, `5m`, `12h`, `7d`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!(
            "{text:?} is no duration: write a number with its unit, like 250ms, 30s, 5m, 12h, 7d"
        )
    };
    let at = text.find(|char: char| !char.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..at].parse().map_err(|_| wrong())?;
    let unit_ms: u64 = match &text[at..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wrong)
}

/// A node as people write it: `n3` or `3`.
pub fn parse_node(text: &str) -> Result<NodeId, String> {
    let number = text.strip_prefix('n').unwrap_or(text).parse().ok().filter(|id| *id > 0);
    number.map(NodeId).ok_or_else(|| format!("{text:?} is no node: write n3 or 3"))
}

/// A shard as people write it: `7` or `s7`; `0` is the meta group.
pub fn parse_shard(text: &str) -> Result<ShardId, String> {
    let number = text.strip_prefix('s').unwrap_or(text).parse().ok();
    number.map(ShardId).ok_or_else(|| format!("{text:?} is no shard: write its number"))
}

/// An entity rule: `whole`, `delimiter:/`, `delimiter:0x00`, `prefix:8`.
pub fn parse_entity(text: &str) -> Result<EntityRule, String> {
    let wrong =
        || format!("{text:?} is no entity rule: whole, delimiter:/, delimiter:0x00 or prefix:8");
    match text.split_once(':') {
        None if text == "whole" => Ok(EntityRule::Whole),
        Some(("delimiter", byte)) => match byte.as_bytes() {
            [one] => Ok(EntityRule::Delimiter(*one)),
            _ => byte
                .strip_prefix("0x")
                .and_then(|hex| u8::from_str_radix(hex, 16).ok())
                .map(EntityRule::Delimiter)
                .ok_or_else(wrong),
        },
        Some(("prefix", bytes)) => bytes.parse().map(EntityRule::Prefix).map_err(|_| wrong()),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests;

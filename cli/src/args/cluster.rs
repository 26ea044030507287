//! Owns the arguments of the commands that look at nodes, shards and replicas, and move them.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use coracle_client::admin::OperationId;
use coracle_client::{NodeId, ShardId};

use super::{parse_duration, parse_node, parse_shard};

/// See [`Command::Node`](super::Command::Node).
#[derive(Debug, Subcommand)]
pub enum Node {
    /// List the nodes
    Ls,
    /// Have a node give its leaderships away, and get no new ones
    #[command(after_help = "Examples:\n  \
        coracle node drain n3 --wait\n  \
        coracle node undrain n3\n\n\
        It goes on voting and serving reads. Before a planned stop nothing of this is needed: a\n\
        server drains by itself on SIGTERM.")]
    Drain {
        /// The node
        #[arg(value_parser = parse_node)]
        node: NodeId,
        /// Wait until it leads nothing (--timeout ends the wait)
        #[arg(long)]
        wait: bool,
    },
    /// End a drain or a decommission: the node serves as before
    #[command(after_help = "Example:\n  coracle node undrain n3")]
    Undrain {
        /// The node
        #[arg(value_parser = parse_node)]
        node: NodeId,
    },
    /// Give a node more or fewer replicas than others
    #[command(after_help = "Examples:\n  \
        coracle node weight n3 0.5\n  \
        coracle node weight n3 1\n\n\
        With automatic balancing on, replicas move at once; else by the next plan.")]
    Weight {
        /// The node
        #[arg(value_parser = parse_node)]
        node: NodeId,
        /// Its share beside others: 1 for an ordinary node
        #[arg(value_parser = parse_weight)]
        weight: u32,
    },
    /// Move everything that a node holds to others, until it is safe to stop for good
    #[command(after_help = "Examples:\n  \
        coracle node decommission n3 --dry-run\n  \
        coracle node decommission n3 --wait\n\n\
        Nothing is lost or unavailable meanwhile. coracle node undrain n3 takes it back.")]
    Decommission {
        /// The node
        #[arg(value_parser = parse_node)]
        node: NodeId,
        /// Only say what it holds, and would give away
        #[arg(long)]
        dry_run: bool,
        /// Wait until it holds nothing (--timeout ends the wait)
        #[arg(long, conflicts_with = "dry_run")]
        wait: bool,
    },
    /// Give a node up that is down and never comes back: its replicas are made elsewhere
    #[command(after_help = "Examples:\n  \
        coracle node gone n3\n  \
        coracle node gone n3 --yes-i-mean prod --wait\n\n\
        It is never let in again, and what only it held is lost. Asks for the cluster's name: that of\n\
        the context, or the cluster's id. Of a node that may come back: wait, or start it again.")]
    Gone {
        /// The node
        #[arg(value_parser = parse_node)]
        node: NodeId,
        /// The cluster's name, in place of typing it
        #[arg(long, value_name = "CLUSTER")]
        yes_i_mean: Option<String>,
        /// Wait until all its replicas are made elsewhere (--timeout ends the wait)
        #[arg(long)]
        wait: bool,
    },
}

/// See [`Command::Shard`](super::Command::Shard).
#[derive(Debug, Subcommand)]
pub enum Shard {
    /// List the shards
    Ls,
    /// Show one shard: its arc, its replicas, and how far each is
    #[command(after_help = "Example:\n  coracle shard show 7")]
    Show {
        /// The shard
        #[arg(value_parser = parse_shard)]
        shard: ShardId,
    },
    /// Draw the ring: its shards, who leads them, who holds them, what moves
    #[command(after_help = "Examples:\n  coracle shard ring\n  coracle shard ring --width 60")]
    Ring {
        /// Columns to draw in (default: the terminal's, or 80)
        #[arg(long, value_name = "N")]
        width: Option<usize>,
    },
    /// Hand a shard's leadership to another of its voters
    #[command(after_help = "Example:\n  coracle shard transfer-leader 7 --to n2")]
    TransferLeader {
        /// The shard
        #[arg(value_parser = parse_shard)]
        shard: ShardId,
        /// The node that shall lead (default: the leader chooses)
        #[arg(long, value_name = "NODE", value_parser = parse_node)]
        to: Option<NodeId>,
    },
    /// Move one voter of a shard to another node
    #[command(after_help = "Example:\n  coracle shard move 7 --from n1 --to n4 --wait")]
    Move {
        /// The shard
        #[arg(value_parser = parse_shard)]
        shard: ShardId,
        /// The node whose replica goes
        #[arg(long, value_name = "NODE", value_parser = parse_node)]
        from: NodeId,
        /// The node that takes its place
        #[arg(long, value_name = "NODE", value_parser = parse_node)]
        to: NodeId,
        /// Wait until it has moved (--timeout ends the wait)
        #[arg(long)]
        wait: bool,
    },
    /// Make two shards of one; without --at, --key or --by: with as many bytes on each side
    #[command(after_help = "Examples:\n  \
        coracle shard split 7 --wait\n  \
        coracle shard split 7 --by load --dry-run\n  \
        coracle shard split 7 --at 0x4000000000000000\n  \
        coracle shard split 7 --key user/42/ --keyspace users\n\n\
        No data is copied, and no request fails. coracle rebalance undo merges them again.")]
    Split {
        /// The shard
        #[arg(value_parser = parse_shard)]
        shard: ShardId,
        /// The first position of the new shard, as shard ls writes it
        #[arg(long, value_name = "POSITION", value_parser = parse_position, group = "where")]
        at: Option<u64>,
        /// Where this key's entity stands: it begins the new shard (with --keyspace)
        #[arg(long, value_name = "KEY", group = "where")]
        key: Option<String>,
        /// The key's keyspace (default: the context's, else `default`)
        #[arg(long, value_name = "NAME", requires = "key")]
        keyspace: Option<String>,
        /// Halve the bytes, or what there is to do
        #[arg(long, value_name = "WHAT", group = "where")]
        by: Option<SplitBy>,
        /// Only say where it would be split
        #[arg(long)]
        dry_run: bool,
        /// Wait until the map has both (--timeout ends the wait)
        #[arg(long, conflicts_with = "dry_run")]
        wait: bool,
    },
    /// Make one shard of two neighbours: the right one's replicas move to the left one's nodes first
    #[command(after_help = "Examples:\n  \
        coracle shard merge 7 8 --dry-run\n  \
        coracle shard merge 7 8 --wait\n\n\
        The right one serves nothing for half a second at most; clients wait that long.")]
    Merge {
        /// The shard that stays
        #[arg(value_parser = parse_shard)]
        left: ShardId,
        /// Its right neighbour
        #[arg(value_parser = parse_shard)]
        right: ShardId,
        /// Only say what would move and come of it
        #[arg(long)]
        dry_run: bool,
        /// Wait until it is done (--timeout ends the wait)
        #[arg(long, conflicts_with = "dry_run")]
        wait: bool,
    },
    /// Rewrite a shard's state without what nobody can read any more, replica by replica
    #[command(after_help = "Example:\n  coracle shard compact 7")]
    Compact {
        /// The shard
        #[arg(value_parser = parse_shard)]
        shard: ShardId,
    },
}

/// What a split halves.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum SplitBy {
    /// Bytes.
    Size,
    /// What was read and written of late.
    Load,
}

/// See [`Command::Replica`](super::Command::Replica).
#[derive(Debug, Subcommand)]
pub enum Replica {
    /// List the replicas, and how far each is behind its leader
    #[command(after_help = "Examples:\n  coracle replica ls\n  coracle replica ls 7 -o json")]
    Ls {
        /// Only of this shard
        #[arg(value_parser = parse_shard)]
        shard: Option<ShardId>,
    },
    /// Set how many read replicas every shard has: they never vote, and serve reads that need not
    /// be the newest
    #[command(after_help = "Examples:\n  \
        coracle replica set --learners 1 --zone c --wait\n  \
        coracle replica set --learners 0 --zone c\n  \
        coracle replica set --learners 2 --dry-run")]
    Set {
        /// How many of each shard; 0 removes them
        #[arg(long, value_name = "N")]
        learners: u32,
        /// On nodes of this zone (default: on any, beside those that zones ask for)
        #[arg(long, value_name = "ZONE", default_value = "", hide_default_value = true)]
        zone: String,
        /// Only say what would be made and removed
        #[arg(long)]
        dry_run: bool,
        /// Wait until all are there, and those that go are gone (--timeout ends the wait)
        #[arg(long, conflicts_with = "dry_run")]
        wait: bool,
    },
}

/// See [`Command::Rebalance`](super::Command::Rebalance).
#[derive(Debug, Subcommand)]
pub enum Rebalance {
    /// Show what would be moved, and why; changes nothing
    #[command(after_help = "Examples:\n  \
        coracle rebalance plan\n  \
        coracle rebalance plan --max-moves 10 -o json >plan.json\n  \
        coracle rebalance plan --threshold 5% --weight n3=0.5\n  \
        coracle rebalance plan --exit-code >/dev/null || coracle rebalance apply --yes")]
    Plan {
        /// No more moves than so many
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        max_moves: Option<u32>,
        /// Leave alone what is even within so much (default: as it is set)
        #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
        threshold: Option<u32>,
        /// As if a node had this weight, as n3=0.5; more than once for several nodes
        #[arg(long, value_name = "NODE=WEIGHT", value_parser = parse_node_weight)]
        weight: Vec<(NodeId, u32)>,
        /// End with exit code 10 when there is something to move
        #[arg(long)]
        exit_code: bool,
    },
    /// Carry out a plan: the one in a file, or a new one that is shown first
    #[command(after_help = "Examples:\n  \
        coracle rebalance apply\n  \
        coracle rebalance apply plan.json --yes --wait\n  \
        coracle rebalance plan -o json | coracle rebalance apply - --yes\n\n\
        A plan holds for the map that it was made for. When that has changed: exit code 8.")]
    Apply(Apply),
    /// What the balancer does, why it is stalled, and the operations under way
    Status,
    /// Begin nothing more of an operation; what was begun is finished
    #[command(after_help = "Example:\n  coracle rebalance pause")]
    Pause(Which),
    /// Go on with an operation that was paused
    #[command(after_help = "Example:\n  coracle rebalance resume")]
    Resume(Which),
    /// Give an operation up: what was done stands, what is half done is taken back
    #[command(after_help = "Example:\n  coracle rebalance cancel 7")]
    Cancel(Which),
    /// Move everything back that an operation has moved
    #[command(
        after_help = "Examples:\n  coracle rebalance undo\n  coracle rebalance undo 7 --wait"
    )]
    Undo {
        /// Which one.
        #[command(flatten)]
        which: Which,
        /// Wait until all is back (--timeout ends the wait)
        #[arg(long)]
        wait: bool,
    },
    /// Have the cluster balance itself, or not
    #[command(after_help = "Example:\n  \
        coracle rebalance auto off\n\n\
        Replicas of lost nodes are replaced in any case.")]
    Auto {
        /// Whether
        switch: Switch,
    },
    /// Change how balancing is set; what is not said stays
    #[command(after_help = "Examples:\n  \
        coracle rebalance set --moves-at-a-time 4\n  \
        coracle rebalance set --automatic on --down-after 10m")]
    Set(Setting),
}

/// See [`Rebalance::Apply`].
#[derive(Debug, Args)]
pub struct Apply {
    /// What `rebalance plan -o json` printed; - reads standard input (default: a new plan)
    pub file: Option<PathBuf>,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Only show it
    #[arg(long, conflicts_with_all = ["yes", "wait"])]
    pub dry_run: bool,
    /// Wait until all has moved (--timeout ends the wait)
    #[arg(long)]
    pub wait: bool,
}

/// See [`Rebalance::Set`].
#[derive(Debug, Default, Args)]
#[group(required = true, multiple = true)]
pub struct Setting {
    /// Balance without being asked
    #[arg(long, value_name = "ON")]
    pub automatic: Option<Switch>,
    /// Moves under way at a time, over the whole cluster
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub moves_at_a_time: Option<u32>,
    /// How long a node may be silent before its replicas are made elsewhere
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub down_after: Option<Duration>,
    /// How full a disk may get by moves; 8 GiB free, or twice the largest shard, are always enough
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    pub disk_max: Option<u32>,
    /// Move nothing for balance as long as no node is so much above its share
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    pub threshold: Option<u32>,
    /// Split a shard by itself that is as large as this, with automatic balancing on
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub split_size: Option<u64>,
    /// Split one by itself of which so many keys a second are read and written for a minute, and twice
    /// as many as of others
    #[arg(long, value_name = "KEYS", value_parser = clap::value_parser!(u64).range(1..))]
    pub split_load: Option<u64>,
}

/// An operation, or the only one that is meant.
#[derive(Debug, Args)]
pub struct Which {
    /// The operation (default: the only one that this makes sense for)
    #[arg(value_parser = parse_operation)]
    pub operation: Option<OperationId>,
}

/// On or off.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Switch {
    /// It does.
    On,
    /// It does not.
    Off,
}

/// See [`Command::Operation`](super::Command::Operation).
#[derive(Debug, Subcommand)]
pub enum Operation {
    /// List the operations under way, then the last ones that ended
    Ls,
    /// Show how an operation goes on until it ends
    #[command(after_help = "Examples:\n  coracle operation watch\n  coracle operation watch 7")]
    Watch(Which),
    /// Give an operation up: what was done stands, what is half done is taken back
    #[command(after_help = "Example:\n  coracle operation cancel 7")]
    Cancel(Which),
}

/// A position on the ring, as people write it: 16 hex digits, with or without 0x.
fn parse_position(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let is_hex = digits.len() <= 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let position = u64::from_str_radix(digits, 16).ok().filter(|_| is_hex);
    position.ok_or_else(|| format!("{text:?} is no position: write up to 16 hex digits"))
}

/// Bytes as people write them: `64GiB`, `500MiB`, `1048576`.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: write 64GiB, 500MiB or a number of bytes");
    let at = text.find(|digit: char| !digit.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

/// Thousandths, of a percentage as people write it: `5%`, `12.5`.
fn parse_percent(text: &str) -> Result<u32, String> {
    let number = text.trim_end_matches('%').trim_end();
    thousandths(number, 10.0).ok_or_else(|| format!("{text:?} is no percentage: write 5% or 12.5%"))
}

/// Thousandths, of a weight as people write it: `0.5`.
fn parse_weight(text: &str) -> Result<u32, String> {
    let weight = thousandths(text, 1_000.0).filter(|weight| (1..=0xffff).contains(weight));
    weight.ok_or_else(|| format!("{text:?} is no weight: write a number between 0.001 and 65.535"))
}

fn thousandths(text: &str, by: f64) -> Option<u32> {
    let number = text.parse::<f64>().ok().filter(|number| (0.0..=1e6).contains(number))?;
    Some((number * by).round() as u32)
}

fn parse_node_weight(text: &str) -> Result<(NodeId, u32), String> {
    let (node, weight) = text.split_once('=').ok_or("write it as n3=0.5")?;
    Ok((parse_node(node)?, parse_weight(weight)?))
}

/// An operation as people write it: `7`.
pub fn parse_operation(text: &str) -> Result<OperationId, String> {
    let number = text.parse().ok().filter(|id| *id > 0);
    number.map(OperationId).ok_or_else(|| format!("{text:?} is no operation: write its number"))
}

//! Owns the node's settings: one validated struct, laid together from flags, environment, file and
//! defaults, with the origin of each. Does not read files or the environment (its caller hands them
//! in), and does not hold what belongs to the whole cluster (keyspaces and shards live in Raft).

mod check;
mod key;
mod memory;
mod problem;
mod show;
mod source;
mod suggest;
mod value;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use memory::{memory_bytes, resident_bytes};
pub use problem::{Code, Excerpt, Origin, Problem};
pub use source::{Flag, SourceFile, Sources};
pub use value::Address;

use source::{Found, Layers};
use value::Value;

/// A node's settings. Every value is within what its key allows, and they fit to each other.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[node]`
    pub node: Node,
    /// `[listen]`
    pub listen: Listen,
    /// `[cluster]`
    pub cluster: Cluster,
    /// `[raft]`
    pub raft: Raft,
    /// `[storage]`
    pub storage: Storage,
    /// `[limits]`
    pub limits: Limits,
    /// `[observability]`
    pub observability: Observability,
    /// `[test]`
    pub test: Test,
    found: BTreeMap<&'static str, Found>,
    memory_bytes: Option<u64>,
}

/// This node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Identity, log and shards.
    pub data_dir: PathBuf,
    /// The failure domain.
    pub zone: String,
}

/// Where the node listens. Port 0 means any free one.
#[derive(Clone, Debug)]
pub struct Listen {
    /// gRPC for clients.
    pub client: SocketAddr,
    /// Other nodes.
    pub peer: SocketAddr,
    /// Metrics and health.
    pub http: SocketAddr,
    /// What clients are told to dial; `None`: see [`Listen::client_address`].
    pub advertise_client: Option<Address>,
    /// What nodes are told to dial; `None`: see [`Listen::peer_address`].
    pub advertise_peer: Option<Address>,
    /// Whether it may listen beyond loopback without encryption.
    pub insecure: bool,
}

impl Listen {
    /// What clients are told to dial, once it is known where the listener is `bound`.
    pub fn client_address(&self, bound: SocketAddr) -> Address {
        self.advertise_client.clone().unwrap_or_else(|| bound.into())
    }

    /// What nodes are told to dial, once it is known where the listener is `bound`.
    pub fn peer_address(&self, bound: SocketAddr) -> Address {
        self.advertise_peer.clone().unwrap_or_else(|| bound.into())
    }
}

/// How the node finds its cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Peer addresses to ask. May contain the node's own.
    pub join: Vec<Address>,
}

/// Raft's times.
#[derive(Clone, Debug)]
pub struct Raft {
    /// Between two heartbeats of a leader.
    pub heartbeat_interval: Duration,
    /// The least that a follower waits after the lease.
    pub election_timeout_min: Duration,
    /// The most that it waits, and the lease: at least five heartbeats.
    pub election_timeout_max: Duration,
}

/// Memory and disk, in bytes.
#[derive(Clone, Debug)]
pub struct Storage {
    /// Caches and write buffers of all shards, entries of the log in memory and their index.
    pub memory_budget: u64,
    /// One segment of the log.
    pub log_segment_bytes: u64,
    /// The log, before it is shortened by force.
    pub log_bytes_target: u64,
    /// Free space below which writes are refused.
    pub disk_reserve_bytes: u64,
}

/// What the node holds at a time.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections on the client listener.
    pub connections: usize,
    /// Requests being worked on.
    pub requests_in_flight: usize,
    /// Their keys and values, in bytes.
    pub request_bytes_in_flight: u64,
}

/// Logs.
#[derive(Clone, Debug)]
pub struct Observability {
    /// How log lines look.
    pub log_format: LogFormat,
    /// In the subscriber's own language.
    pub log_filter: String,
    /// Slower requests are logged; `None`: none is.
    pub slow_request: Option<Duration>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// For tests and demos.
#[derive(Clone, Debug)]
pub struct Test {
    /// Faults may be injected from outside.
    pub fault_injection: bool,
    /// Nothing is kept.
    pub in_memory: bool,
    /// A wait between any two steps of work on the cluster; zero: none.
    pub hold_steps: Duration,
    /// A node that is told to stop does so at once.
    pub skip_drain: bool,
}

impl Config {
    /// Lays the sources over each other and checks everything. On failure it returns every problem
    /// that it finds, in the order of the sources, and never an empty list.
    pub fn load(sources: &Sources) -> Result<Config, Vec<Problem>> {
        let mut layers = Layers::read(sources);
        let unfit = check::check(&layers, sources.memory_bytes);
        layers.problems.extend(unfit);
        if !layers.problems.is_empty() {
            return Err(layers.problems);
        }
        let found = layers.into_found();
        let take = Take(&found);
        Ok(Config {
            node: Node {
                data_dir: take.text("node.data_dir").into(),
                zone: take.text("node.zone"),
            },
            listen: Listen {
                client: take.socket("listen.client"),
                peer: take.socket("listen.peer"),
                http: take.socket("listen.http"),
                advertise_client: take.address("listen.advertise_client"),
                advertise_peer: take.address("listen.advertise_peer"),
                insecure: take.bool("listen.insecure"),
            },
            cluster: Cluster { join: take.addresses("cluster.join") },
            raft: Raft {
                heartbeat_interval: take.span("raft.heartbeat_interval"),
                election_timeout_min: take.span("raft.election_timeout_min"),
                election_timeout_max: take.span("raft.election_timeout_max"),
            },
            storage: Storage {
                memory_budget: take.number("storage.memory_budget"),
                log_segment_bytes: take.number("storage.log_segment_bytes"),
                log_bytes_target: take.number("storage.log_bytes_target"),
                disk_reserve_bytes: take.number("storage.disk_reserve_bytes"),
            },
            limits: Limits {
                connections: take.number("limits.connections") as usize,
                requests_in_flight: take.number("limits.requests_in_flight") as usize,
                request_bytes_in_flight: take.number("limits.request_bytes_in_flight"),
            },
            observability: Observability {
                log_format: match take.text("observability.log_format").as_str() {
                    "text" => LogFormat::Text,
                    "json" => LogFormat::Json,
                    _ => LogFormat::Auto,
                },
                log_filter: take.text("observability.log_filter"),
                slow_request: Some(take.span("observability.slow_request"))
                    .filter(|span| !span.is_zero()),
            },
            test: Test {
                fault_injection: take.bool("test.fault_injection"),
                in_memory: take.bool("test.in_memory"),
                hold_steps: take.span("test.hold_steps"),
                skip_drain: take.bool("test.skip_drain"),
            },
            found,
            memory_bytes: sources.memory_bytes,
        })
    }

    /// A file with every key, commented out: `docs/coracle.toml`.
    pub fn sample() -> String {
        show::sample()
    }

    /// The settings as a file that could be loaded again. `origin` says behind each where it came
    /// from; `diff_default` leaves out what is as it would be anyway.
    pub fn show(&self, origin: bool, diff_default: bool) -> String {
        show::show(|name| &self.found[name], self.memory_bytes, origin, diff_default)
    }

    /// All about one key, or what it may have been meant to be.
    pub fn explain(key: &str) -> Result<String, Box<Problem>> {
        match key::find(key) {
            Some(key) => Ok(show::explain(key)),
            None => Err(Box::new(source::unknown_key(key, Origin::Argument, None))),
        }
    }

    /// Where the value of this key came from; `None` for an unknown key.
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.found.get(key).map(|found| &found.origin)
    }

    /// The names of all keys, for completion.
    pub fn keys() -> impl Iterator<Item = &'static str> {
        key::KEYS.iter().map(|key| key.name)
    }
}

/// Takes `key=value` apart, as `--set` has it.
pub fn split_set(text: &str) -> Result<(String, String), Box<Problem>> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.trim().to_owned(), value.trim().to_owned())),
        None => Err(Box::new(Problem {
            code: Code::Form,
            what: format!("{text:?} has no '='"),
            origin: Origin::Flag { flag: "--set".to_owned() },
            excerpt: None,
            allowed: "key=value".to_owned(),
            mend: "write for example --set raft.heartbeat_interval=80ms".to_owned(),
        })),
    }
}

/// Reads checked values back out. That a name has the kind that is asked for is a fact of the table:
/// any load shows it.
struct Take<'a>(&'a BTreeMap<&'static str, Found>);

impl Take<'_> {
    fn text(&self, name: &str) -> String {
        match &self.0[name].value {
            Value::Text(text) => text.clone(),
            other => panic!("{name} is no text but {other:?}"),
        }
    }

    fn bool(&self, name: &str) -> bool {
        match &self.0[name].value {
            Value::Bool(bool) => *bool,
            other => panic!("{name} is no bool but {other:?}"),
        }
    }

    fn number(&self, name: &str) -> u64 {
        match &self.0[name].value {
            Value::Count(number) | Value::Bytes(number) => *number,
            other => panic!("{name} is no number but {other:?}"),
        }
    }

    fn span(&self, name: &str) -> Duration {
        match &self.0[name].value {
            Value::Span(span) => *span,
            other => panic!("{name} is no duration but {other:?}"),
        }
    }

    fn socket(&self, name: &str) -> SocketAddr {
        match &self.0[name].value {
            Value::Listen(address) => *address,
            other => panic!("{name} is no listener but {other:?}"),
        }
    }

    fn address(&self, name: &str) -> Option<Address> {
        match &self.0[name].value {
            Value::Address(address) => Some(address.clone()),
            Value::Unset => None,
            other => panic!("{name} is no address but {other:?}"),
        }
    }

    fn addresses(&self, name: &str) -> Vec<Address> {
        match &self.0[name].value {
            Value::Addresses(list) => list.clone(),
            other => panic!("{name} is no list of addresses but {other:?}"),
        }
    }
}

//! Owns every metric of a node: declared once, in the table below, which yields the registry, the typed
//! handles and `docs/metrics.md`. Does not measure anything itself, but for the uptime.
//!
//! One registry per node: many nodes live in one process in the simulation. Handles are cheap to clone;
//! who counts often takes its own once ([`Metrics::method`], [`Family::with`]) and never looks a series
//! up by name again. No label ever holds a key, a client or a request id.

mod family;
mod page;

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::reason::Reason;
use parking_lot::Mutex;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::time::Instant;

pub use family::Family;
pub use page::page;

/// A gauge of whole things.
pub type Gauge = prometheus_client::metrics::gauge::Gauge;
/// A gauge of seconds and other fractions.
pub type GaugeF64 = prometheus_client::metrics::gauge::Gauge<f64, std::sync::atomic::AtomicU64>;

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises; its name ends in `_total`.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Counts by size, in seconds.
    Histogram,
}

/// One metric, as the table declares it.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// As it is scraped.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// One sentence, without its full stop.
    pub help: &'static str,
}

/// 100 µs to 10 s: below it nothing that is synced ends, above it every deadline has passed.
const SECONDS: [f64; 16] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// What stands in the table: how it is made, and what that is called.
trait Metric {
    const KIND: Kind;
    type Labels;

    fn make(labels: Self::Labels) -> Self;
}

/// One series, without labels.
type Unlabelled = [&'static str; 0];

impl Metric for Counter {
    const KIND: Kind = Kind::Counter;
    type Labels = Unlabelled;

    fn make(_: Unlabelled) -> Counter {
        Counter::default()
    }
}

impl Metric for Gauge {
    const KIND: Kind = Kind::Gauge;
    type Labels = Unlabelled;

    fn make(_: Unlabelled) -> Gauge {
        Gauge::default()
    }
}

impl Metric for GaugeF64 {
    const KIND: Kind = Kind::Gauge;
    type Labels = Unlabelled;

    fn make(_: Unlabelled) -> GaugeF64 {
        GaugeF64::default()
    }
}

impl Metric for Histogram {
    const KIND: Kind = Kind::Histogram;
    type Labels = Unlabelled;

    fn make(_: Unlabelled) -> Histogram {
        Histogram::new(SECONDS)
    }
}

impl<M: Metric<Labels = Unlabelled> + Clone, const N: usize> Metric for Family<M, N> {
    const KIND: Kind = M::KIND;
    type Labels = [&'static str; N];

    fn make(labels: [&'static str; N]) -> Family<M, N> {
        Family::new(labels, || M::make([]))
    }
}

/// Makes table, struct and registration of one list, so that no metric can be in one of them only.
macro_rules! metrics {
    ($($area:literal { $($field:ident: $type:ty, $name:literal, $labels:expr, $help:literal;)* })*) => {
        /// Every metric, by area.
        pub const TABLE: &[(&str, &[Spec])] = &[$(($area, &[$(Spec {
            name: $name,
            kind: <$type as Metric>::KIND,
            labels: &$labels,
            help: $help,
        },)*]),)*];

        /// The handles of all metrics of a node.
        pub struct Metrics {
            $($(#[doc = $help] pub $field: $type,)*)*
            started: Instant,
            registry: Mutex<Registry>,
        }

        impl Metrics {
            fn register() -> Metrics {
                let mut registry = Registry::default();
                $($(
                    let $field = <$type as Metric>::make($labels);
                    // The encoder adds a counter's ending itself.
                    let name = $name.strip_suffix("_total").unwrap_or($name);
                    registry.register(name, $help, $field.clone());
                )*)*
                Metrics { $($($field,)*)* started: Instant::now(), registry: Mutex::new(registry) }
            }
        }
    };
}

metrics! {
    "Build and node" {
        build_info: Family<Gauge, 4>, "coracle_build_info", ["version", "git", "rocksdb", "engine"],
            "Always 1; what runs stands in the labels";
        node_info: Family<Gauge, 2>, "coracle_node_info", ["node", "zone"],
            "Always 1; which node it is stands in the labels";
        uptime_seconds: GaugeF64, "coracle_uptime_seconds", [],
            "Time since the node was started";
    }
    "Requests" {
        requests: Family<Counter, 3>, "coracle_requests_total", ["method", "code", "reason"],
            "Requests answered";
        request_duration_seconds: Family<Histogram, 2>, "coracle_request_duration_seconds", ["method", "consistency"],
            "From a request's arrival to its answer";
        requests_in_flight: Gauge, "coracle_requests_in_flight", [],
            "Requests being worked on";
        forwarded_requests: Counter, "coracle_forwarded_requests_total", [],
            "Requests handed on to the node that serves them";
        deadline_dropped: Family<Counter, 1>, "coracle_deadline_dropped_total", ["stage"],
            "Requests dropped because their deadline had passed";
        reads: Family<Counter, 1>, "coracle_reads_total", ["served"],
            "Reads by how the replica here knew that its state is fresh enough";
        slow_requests: Counter, "coracle_slow_requests_total", [],
            "Requests that took longer than observability.slow_request";
        stage_duration_seconds: Family<Histogram, 1>, "coracle_stage_duration_seconds", ["stage"],
            "What a stage of a request took";
    }
    "Raft" {
        raft_groups: Gauge, "coracle_raft_groups", [],
            "Groups with a replica on this node";
        raft_leaders: Gauge, "coracle_raft_leaders", [],
            "Groups that this node leads";
        raft_groups_without_leader: Gauge, "coracle_raft_groups_without_leader", [],
            "Groups with a replica on this node that know no leader";
        raft_elections: Counter, "coracle_raft_elections_total", [],
            "Leaderships that replicas on this node won";
        snapshot_sent_bytes: Counter, "coracle_snapshot_sent_bytes_total", [],
            "Bytes of replicas' states that this node has sent to others";
        replica_lag_entries: Family<Gauge, 2>, "coracle_replica_lag_entries", ["shard", "peer"],
            "Entries of a group led here that the peer's replica is not known to hold";
        replica_lag_seconds: Family<GaugeF64, 2>, "coracle_replica_lag_seconds", ["shard", "peer"],
            "For how long the first entry that the peer's replica lacks has been in the log led here";
    }
    "Log" {
        log_fsync_duration_seconds: Histogram, "coracle_log_fsync_duration_seconds", [],
            "One sync of the Raft log";
        log_size_bytes: Gauge, "coracle_log_size_bytes", [],
            "Bytes of the Raft log on disk";
    }
    "Shards and disk" {
        shard_size_bytes: Family<Gauge, 1>, "coracle_shard_size_bytes", ["shard"],
            "Approximate size of a shard's replica on this node";
        shard_reads_per_second: Family<Gauge, 1>, "coracle_shard_reads_per_second", ["shard"],
            "Keys read by a shard's replica on this node, of late";
        shard_writes_per_second: Family<Gauge, 1>, "coracle_shard_writes_per_second", ["shard"],
            "Keys written through a shard's replica on this node, of late";
        disk_free_bytes: Gauge, "coracle_disk_free_bytes", [],
            "Free space where the data directory lives";
        disk_total_bytes: Gauge, "coracle_disk_total_bytes", [],
            "Size of the file system where the data directory lives";
    }
    "Memory" {
        resident_memory_bytes: Gauge, "coracle_resident_memory_bytes", [],
            "Resident memory of the process";
        memory_bytes: Family<Gauge, 1>, "coracle_memory_bytes", ["part"],
            "What the parts with a budget hold; the rest of the process's memory is code, stacks and what the allocator keeps";
    }
    "Operations" {
        operations_active: Gauge, "coracle_operations_active", [],
            "Operations under way; only on the node that leads the meta group";
        balancer_automatic: Gauge, "coracle_balancer_automatic", [],
            "1 where balancing is automatic; only on the node that leads the meta group";
        balancer_split_bytes: Gauge, "coracle_balancer_split_bytes", [],
            "The size at which a shard is split by itself; only on the node that leads the meta group";
        balancer_split_keys_per_second: Gauge, "coracle_balancer_split_keys_per_second", [],
            "The load from which one is; only on the node that leads the meta group";
    }
    "Clock" {
        clock_offset_seconds: Family<GaugeF64, 1>, "coracle_clock_offset_seconds", ["peer"],
            "How far a peer's wall clock is ahead of this node's";
    }
}

/// What the labels hold: closed sets, all of them, so that the number of series is bounded.
const LABELS: &[(&str, &str)] = &[
    ("code", "gRPC code: `OK`, `UNAVAILABLE`, …"),
    ("consistency", "`linearizable`, `session`, `bounded`, `any`; empty for writes and the rest"),
    ("engine", "where state is kept: `rocksdb` or `memory`"),
    ("git", "commit of the build"),
    ("method", "gRPC method: `Get`, `Put`, …"),
    ("node", "this node: `n1`"),
    (
        "part",
        "of the memory: `block_cache`, `write_buffers`, `log_cache`, `log_index`, `log_queue`, `requests`",
    ),
    ("peer", "another node: `n2`"),
    ("reason", "the error's reason from the closed list; empty for `OK` and for foreign errors"),
    ("rocksdb", "version of RocksDB"),
    (
        "served",
        "`lease` and `heartbeats` by the leader itself, `asked` by a question to it, `bounded` by an \
         earlier one, `session` and `any` without one",
    ),
    ("shard", "a shard with a replica on this node: `s7`"),
    ("stage", "`queue`, `propose`, `log_sync`, `replicate`, `apply`, `read`"),
    ("version", "version of the program"),
    ("zone", "this node's failure domain"),
];

/// What runs here.
#[derive(Clone, Debug, Default)]
pub struct Build {
    /// The program's version.
    pub version: String,
    /// Commit, where it is known.
    pub git: String,
    /// RocksDB's version.
    pub rocksdb: String,
    /// `rocksdb` or `memory`.
    pub engine: String,
}

/// A part of a request's way, in the order of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Waiting for the shard's queue.
    Queue,
    /// From the queue into an entry and to the log.
    Propose,
    /// The log's write and sync.
    LogSync,
    /// Until a majority has it.
    Replicate,
    /// Into the state.
    Apply,
    /// Reading the state.
    Read,
}

impl Stage {
    /// All of them.
    pub const ALL: [Stage; 6] =
        [Stage::Queue, Stage::Propose, Stage::LogSync, Stage::Replicate, Stage::Apply, Stage::Read];

    /// As in labels and in the slow-request log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Stage::Queue => "queue",
            Stage::Propose => "propose",
            Stage::LogSync => "log_sync",
            Stage::Replicate => "replicate",
            Stage::Apply => "apply",
            Stage::Read => "read",
        }
    }
}

/// How a replica knew that its state is fresh enough for a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReadServed {
    /// It leads, and its lease has not passed.
    Lease,
    /// It leads, and a round of heartbeats said so.
    Heartbeats,
    /// It has asked the leader how far it must have applied.
    Asked,
    /// An earlier answer of the leader was young enough for a bounded read.
    Bounded,
    /// It has applied what the session has seen.
    Session,
    /// Nothing was asked for.
    Any,
}

impl ReadServed {
    const ALL: [ReadServed; 6] = [
        ReadServed::Lease,
        ReadServed::Heartbeats,
        ReadServed::Asked,
        ReadServed::Bounded,
        ReadServed::Session,
        ReadServed::Any,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            ReadServed::Lease => "lease",
            ReadServed::Heartbeats => "heartbeats",
            ReadServed::Asked => "asked",
            ReadServed::Bounded => "bounded",
            ReadServed::Session => "session",
            ReadServed::Any => "any",
        }
    }
}

/// The handles of the counters of reads.
#[derive(Clone, Debug)]
pub struct Reads([Counter; ReadServed::ALL.len()]);

impl Reads {
    /// So many were served in this way.
    pub fn count(&self, how: ReadServed, reads: u64) {
        self.0[how as usize].inc_by(reads);
    }
}

/// How a read was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Consistency {
    /// It was no read.
    None,
    /// Newest.
    Linearizable,
    /// Not behind the token.
    Session,
    /// Not older than.
    Bounded,
    /// Whatever is there.
    Any,
}

impl Consistency {
    const ALL: [Consistency; 5] = [
        Consistency::None,
        Consistency::Linearizable,
        Consistency::Session,
        Consistency::Bounded,
        Consistency::Any,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Consistency::None => "",
            Consistency::Linearizable => "linearizable",
            Consistency::Session => "session",
            Consistency::Bounded => "bounded",
            Consistency::Any => "any",
        }
    }
}

impl Metrics {
    /// All metrics of one node, at zero. What is counted by stage and by shard appears when it is
    /// first touched, except the stages and the ways of reads, which are always shown.
    pub fn new(build: &Build) -> Arc<Metrics> {
        let metrics = Metrics::register();
        let Build { version, git, rocksdb, engine } = build;
        metrics.build_info.with([version, git, rocksdb, engine]).set(1);
        for stage in Stage::ALL {
            metrics.stage_duration_seconds.with([stage.as_str()]);
        }
        metrics.reads();
        Arc::new(metrics)
    }

    /// The node has an identity.
    pub fn identify(&self, node: &str, zone: &str) {
        self.node_info.with([node, zone]).set(1);
    }

    /// The handles of one gRPC method, to be kept by whoever serves it.
    pub fn method(&self, method: &'static str) -> Method {
        Method {
            ok: self.requests.with([method, "OK", ""]),
            durations: Consistency::ALL.map(|consistency| OnFirstUse {
                family: self.request_duration_seconds.clone(),
                labels: [method, consistency.as_str()],
                handle: Arc::default(),
            }),
            method,
            requests: self.requests.clone(),
            in_flight: self.requests_in_flight.clone(),
        }
    }

    /// The handles of the counters of reads, to be kept.
    pub fn reads(&self) -> Reads {
        Reads(ReadServed::ALL.map(|how| self.reads.with([how.as_str()])))
    }

    /// The handles of all stages, to be kept.
    pub fn stages(&self) -> Stages {
        Stages(Stage::ALL.map(|stage| Timed {
            duration: self.stage_duration_seconds.with([stage.as_str()]),
            dropped: self.deadline_dropped.with([stage.as_str()]),
        }))
    }

    /// Everything in OpenMetrics' text form.
    pub fn render(&self) -> String {
        self.uptime_seconds.set(self.started.elapsed().as_secs_f64());
        let mut out = String::with_capacity(16 << 10);
        let registry = self.registry.lock();
        text::encode(&mut out, &registry).expect("a string takes every write");
        out
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// The handles of one gRPC method.
#[derive(Clone, Debug)]
pub struct Method {
    method: &'static str,
    ok: Counter,
    requests: Family<Counter, 3>,
    durations: [OnFirstUse; Consistency::ALL.len()],
    in_flight: Gauge,
}

/// A series that appears when it is first used: a `Put` has no consistency, and no series for one.
#[derive(Clone, Debug)]
struct OnFirstUse {
    family: Family<Histogram, 2>,
    labels: [&'static str; 2],
    handle: Arc<std::sync::OnceLock<Histogram>>,
}

impl OnFirstUse {
    fn get(&self) -> &Histogram {
        self.handle.get_or_init(|| self.family.with(self.labels))
    }
}

impl Method {
    /// A request has come in; it counts as in flight until the guard is dropped.
    pub fn begin(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    /// A request was answered well.
    pub fn succeed(&self, consistency: Consistency, took: Duration) {
        self.ok.inc();
        self.durations[consistency as usize].get().observe(took.as_secs_f64());
    }

    /// A request failed for one of our reasons.
    pub fn fail(&self, reason: Reason, consistency: Consistency, took: Duration) {
        self.fail_foreign(code_name(reason.code()), reason.as_str(), consistency, took);
    }

    /// A request was given up by its caller before it was answered.
    pub fn cancel(&self, consistency: Consistency, took: Duration) {
        self.fail_foreign("CANCELLED", "", consistency, took);
    }

    fn fail_foreign(&self, code: &str, reason: &str, consistency: Consistency, took: Duration) {
        self.requests.with([self.method, code, reason]).inc();
        self.durations[consistency as usize].get().observe(took.as_secs_f64());
    }
}

/// One request being worked on.
#[derive(Debug)]
pub struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The handles of all stages.
#[derive(Clone, Debug)]
pub struct Stages([Timed; Stage::ALL.len()]);

#[derive(Clone, Debug)]
struct Timed {
    duration: Histogram,
    dropped: Counter,
}

impl Stages {
    /// A stage took this long.
    pub fn observe(&self, stage: Stage, took: Duration) {
        self.0[stage as usize].duration.observe(took.as_secs_f64());
    }

    /// A request's deadline had passed when it came to this stage.
    pub fn drop_late(&self, stage: Stage) {
        self.0[stage as usize].dropped.inc();
    }
}

/// As gRPC writes it, not as Rust does.
fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

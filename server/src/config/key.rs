//! Owns the table of all settings: name, kind, default, doc. The sample file, `explain`, the strictness
//! of every source and the defaults come from it. Does not read values.

use std::time::Duration;

use super::value::{Kind, Raw, Value};

/// One setting.
#[derive(Debug)]
pub(super) struct Key {
    /// `section.name`.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) preset: Preset,
    /// Full sentences: what it does, and why one would change it.
    pub(super) doc: &'static str,
}

/// What holds when nobody says anything.
#[derive(Debug)]
pub(super) enum Preset {
    /// Written as on a command line.
    Fixed(&'static str),
    /// A share of the memory that the process may use, kept within bounds; `unknown` where the
    /// machine does not tell.
    MemoryShare { percent: u64, min: u64, max: u64, unknown: u64 },
    /// Derived at run time, as these words say.
    Unset(&'static str),
}

impl Key {
    pub(super) fn section(&self) -> &'static str {
        self.name.split_once('.').expect("every name of the table has a section").0
    }

    pub(super) fn last_name(&self) -> &'static str {
        self.name.split_once('.').expect("every name of the table has a section").1
    }

    /// The environment variable that sets it.
    pub(super) fn env_name(&self) -> String {
        format!("CORACLE__{}", self.name.replace('.', "__").to_ascii_uppercase())
    }

    /// The default on a machine with this much memory.
    pub(super) fn default(&self, memory_bytes: Option<u64>) -> Value {
        match &self.preset {
            Preset::Fixed(text) => {
                self.kind.read(&Raw::Word(text)).expect("a test reads every default of the table")
            }
            Preset::MemoryShare { percent, min, max, unknown } => {
                let share = memory_bytes.map_or(*unknown, |memory| percent_of(memory, *percent));
                // Whole MiB: it is printed.
                Value::Bytes(share.clamp(*min, *max) >> 20 << 20)
            }
            Preset::Unset(_) => Value::Unset,
        }
    }

    /// The default in words that hold on every machine.
    pub(super) fn default_words(&self) -> String {
        match &self.preset {
            Preset::Fixed(_) => self.default(None).to_string(),
            Preset::MemoryShare { percent, .. } => format!("{percent} % of the machine's memory"),
            Preset::Unset(words) => (*words).to_owned(),
        }
    }
}

/// Rounded down. Exact for every size: the product is taken in 128 bits.
pub(super) fn percent_of(amount: u64, percent: u64) -> u64 {
    let share = u128::from(amount) * u128::from(percent) / 100;
    u64::try_from(share).unwrap_or(u64::MAX)
}

/// The key of that name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The sections in their order, each with what it is about.
pub(super) const SECTIONS: &[(&str, &str)] = &[
    ("node", "This node."),
    ("listen", "Where it listens, and what it tells others to dial."),
    ("cluster", "How it finds its cluster."),
    ("raft", "Raft's times. The same on all nodes of a cluster."),
    ("storage", "Memory and disk."),
    ("limits", "What it holds at a time. Beyond a limit callers are refused with OVERLOADED."),
    ("observability", "Logs."),
    ("test", "For tests and demos only."),
];

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Every setting, in the order of the sample file.
pub(super) const KEYS: &[Key] = &[
    Key {
        name: "node.data_dir",
        kind: Kind::Directory,
        preset: Preset::Fixed("coracle-data"),
        doc: "Identity, log and shards of this node. It belongs to one node for ever: never copy it, \
              never give it to another node.",
    },
    Key {
        name: "node.zone",
        kind: Kind::Name,
        preset: Preset::Fixed("default"),
        doc: "The failure domain: what fails together, such as a rack or an availability zone. \
              Replicas of a shard are spread over zones first.",
    },
    Key {
        name: "listen.client",
        kind: Kind::Listen,
        preset: Preset::Fixed("127.0.0.1:7400"),
        doc: "gRPC for clients and for the command line.",
    },
    Key {
        name: "listen.peer",
        kind: Kind::Listen,
        preset: Preset::Fixed("127.0.0.1:7500"),
        doc: "The other nodes of the cluster. Reachable for nodes only, never for clients.",
    },
    Key {
        name: "listen.http",
        kind: Kind::Listen,
        preset: Preset::Fixed("127.0.0.1:7600"),
        doc: "/metrics, /livez and /readyz.",
    },
    Key {
        name: "listen.advertise_client",
        kind: Kind::Address,
        preset: Preset::Unset("the address of listen.client"),
        doc: "What clients are told to dial. Needed behind port forwarding and when listening on all \
              interfaces.",
    },
    Key {
        name: "listen.advertise_peer",
        kind: Kind::Address,
        preset: Preset::Unset("the address of listen.peer"),
        doc: "What other nodes are told to dial. A name is looked up again for every connection.",
    },
    Key {
        name: "listen.insecure",
        kind: Kind::Bool,
        preset: Preset::Fixed("false"),
        doc: "Allows to listen beyond this machine although nothing is encrypted and nobody has to say \
              who they are. Only for networks that are trusted as a whole.",
    },
    Key {
        name: "cluster.join",
        kind: Kind::Addresses,
        preset: Preset::Fixed(""),
        doc: "Peer addresses of some nodes of the cluster, the same list on every node (its own may be \
              in it). Asked until one answers; later starts also try every node known from before.",
    },
    Key {
        name: "raft.heartbeat_interval",
        kind: Kind::Span(ms(10), ms(10_000)),
        preset: Preset::Fixed("100ms"),
        doc: "How often a leader shows that it lives. Raise it, and the election timeouts with it, \
              where messages between nodes take longer than 20 ms.",
    },
    Key {
        name: "raft.election_timeout_min",
        kind: Kind::Span(ms(20), ms(60_000)),
        preset: Preset::Fixed("250ms"),
        doc: "The least that a follower waits, after the leader's lease has ended, before it campaigns. \
              At least twice the heartbeat interval.",
    },
    Key {
        name: "raft.election_timeout_max",
        kind: Kind::Span(ms(50), ms(120_000)),
        preset: Preset::Fixed("500ms"),
        doc: "The most that it waits, and the length of the leader's lease. At least five times the \
              heartbeat interval. After a restart a node gives no votes for as long.",
    },
    Key {
        name: "storage.memory_budget",
        kind: Kind::Bytes(64 * MIB, 16 * TIB),
        preset: Preset::MemoryShare {
            percent: 40,
            min: 64 * MIB,
            max: 16 * TIB,
            unknown: 512 * MIB,
        },
        doc: "Memory for caches and write buffers of all shards together, and for the newest entries of \
              the Raft log (an eighth) and its index (an eighth). Requests under way come on top \
              (limits.request_bytes_in_flight), and some 100 MiB for the process itself.",
    },
    Key {
        name: "storage.log_segment_bytes",
        kind: Kind::Bytes(MIB, GIB),
        preset: Preset::Fixed("64MiB"),
        doc: "Length of one segment of the Raft log, reserved when it is begun.",
    },
    Key {
        name: "storage.log_bytes_target",
        kind: Kind::Bytes(4 * MIB, TIB),
        preset: Preset::Fixed("1GiB"),
        doc: "What the Raft log may take before shards are flushed and old segments rewritten to \
              shorten it. At least four segments.",
    },
    Key {
        name: "storage.disk_reserve_bytes",
        kind: Kind::Bytes(64 * MIB, 16 * TIB),
        preset: Preset::Fixed("1GiB"),
        doc: "Free space below which the node takes no more writes (DISK_FULL). Reads and deletes go \
              on, and writes again as soon as there is room.",
    },
    Key {
        name: "limits.connections",
        kind: Kind::Count(16, 1_000_000),
        preset: Preset::Fixed("4096"),
        doc: "Connections on the client listener. Further ones are closed at once.",
    },
    Key {
        name: "limits.requests_in_flight",
        kind: Kind::Count(16, 10_000_000),
        preset: Preset::Fixed("16384"),
        doc: "Requests that are being worked on.",
    },
    Key {
        name: "limits.request_bytes_in_flight",
        kind: Kind::Bytes(16 * MIB, TIB),
        preset: Preset::MemoryShare {
            percent: 10,
            min: 16 * MIB,
            max: 4 * GIB,
            unknown: 128 * MIB,
        },
        doc: "Keys and values of the requests that are being worked on.",
    },
    Key {
        name: "observability.log_format",
        kind: Kind::Choice(&["auto", "text", "json"]),
        preset: Preset::Fixed("auto"),
        doc: "\"auto\" is text on a terminal and JSON otherwise.",
    },
    Key {
        name: "observability.log_filter",
        kind: Kind::LogFilter,
        preset: Preset::Fixed("info,openraft=warn"),
        doc: "What is logged, for example \"info,coracle_raft=debug\".",
    },
    Key {
        name: "observability.slow_request",
        kind: Kind::Span(ms(0), ms(3_600_000)),
        preset: Preset::Fixed("250ms"),
        doc: "Requests that take longer are logged with the time of each stage. \"0ms\" logs none.",
    },
    Key {
        name: "test.fault_injection",
        kind: Kind::Bool,
        preset: Preset::Fixed("false"),
        doc: "Lets anybody who reaches the client listener break this node on purpose: cut links, \
              stall the disk, jump the clock.",
    },
    Key {
        name: "test.in_memory",
        kind: Kind::Bool,
        preset: Preset::Fixed("false"),
        doc: "Keeps everything in memory: gone when the process ends. The node returns only as a new \
              one.",
    },
    Key {
        name: "test.hold_steps",
        kind: Kind::Span(ms(0), ms(60_000)),
        preset: Preset::Fixed("0ms"),
        doc: "Work on the cluster waits so long between any two of its steps, and logs which: for \
              those who want to end a process right there. Nodes that are silent are given up sooner.",
    },
    Key {
        name: "test.skip_drain",
        kind: Kind::Bool,
        preset: Preset::Fixed("false"),
        doc: "A node that is told to stop keeps its leaderships and lets requests go unanswered: \
              what restarts would do without draining.",
    },
];

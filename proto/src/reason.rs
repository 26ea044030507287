//! Owns the closed list of error reasons: for each its gRPC code, what a client does next, and what
//! is known of a write's outcome; and [`Fault`], an error as both ends hold it. Does not decide when
//! to retry or how often (that is the client's policy).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::limits::{
    FAULT_MESSAGE_BYTES_MAX, FAULT_METADATA_BYTES_MAX, KeyspaceNameError, LimitError,
};
use crate::v1;

/// `google.rpc.ErrorInfo.domain` of every error of ours.
pub const DOMAIN: &str = "coracle";

/// Names of the facts behind a reason, in `ErrorInfo.metadata`. Numbers are decimal.
pub mod metadata {
    /// What is known of a write: see [`super::Outcome`].
    pub const OUTCOME: &str = "outcome";
    /// The shard concerned.
    pub const SHARD: &str = "shard";
    /// That shard's epoch at the answering node.
    pub const EPOCH: &str = "epoch";
    /// Epoch of the answering node's shard map.
    pub const MAP_EPOCH: &str = "map_epoch";
    /// The node that leads the shard, where one is known.
    pub const LEADER_NODE: &str = "leader_node";
    /// Its public address, host:port.
    pub const LEADER_ADDR: &str = "leader_addr";
    /// The term in which it leads: the higher term wins.
    pub const LEADER_TERM: &str = "leader_term";
    /// The answering node, or the one that could not be reached.
    pub const NODE: &str = "node";
    /// The keyspace's name.
    pub const KEYSPACE: &str = "keyspace";
    /// The constant of [`crate::limits`] that was passed.
    pub const LIMIT: &str = "limit";
    /// What the limit allows.
    pub const MAX: &str = "max";
    /// What it was instead.
    pub const GOT: &str = "got";
    /// The field of the request that is at fault; also sent as `google.rpc.BadRequest`.
    pub const FIELD: &str = "field";
    /// How stale the replica is, in milliseconds.
    pub const LAG_MS: &str = "lag_ms";
    /// The oldest version that can still be read.
    pub const OLDEST_VERSION: &str = "oldest_version";
    /// The replicated floor: unknown writes born at or before it are refused.
    pub const FLOOR: &str = "floor";
    /// The server's wall clock in milliseconds: a birth for the next attempt.
    pub const SERVER_TIME_MS: &str = "server_time_ms";
    /// The damaged file.
    pub const FILE: &str = "file";
    /// Where in the file.
    pub const OFFSET: &str = "offset";
    /// A reason that this version does not know, or a foreign error's code, as it was received.
    pub const RECEIVED: &str = "received";
}

/// What is known of a write that failed. Of a failed read it says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It was not applied and never will be, as far as this attempt goes.
    NotApplied,
    /// It was applied; only the answer went wrong.
    Applied,
    /// It may have been applied, or may still be.
    Unknown,
}

impl Outcome {
    /// As in the metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::NotApplied => "not_applied",
            Outcome::Applied => "applied",
            Outcome::Unknown => "unknown",
        }
    }

    /// Whatever is not understood is unknown: that is always true.
    pub fn parse(text: &str) -> Outcome {
        match text {
            "not_applied" => Outcome::NotApplied,
            "applied" => Outcome::Applied,
            _ => Outcome::Unknown,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a client does next. Every retry of a write keeps its request id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retry {
    /// At once, at the leader that is named; where none is, at another replica.
    Redirect,
    /// After a refresh of the shard map.
    RefreshRoute,
    /// After a pause, at least as long as the error says.
    BackOff,
    /// Not at all: the same request gets the same answer.
    Never,
    /// After a pause, anywhere. The request may have been applied: only its request id makes the
    /// retry safe, and only the retry's answer tells what became of it.
    SameRequestId,
}

/// Builds the enum, its names and its list from one table, so that none can be forgotten.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $code:ident, $retry:ident, $outcome:ident;)*) => {
        /// Why a request failed: the closed list. Names are part of the contract and never change;
        /// a version that does not know one goes by the gRPC code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// All of them, in the order of the table.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];

            /// As in `ErrorInfo.reason`.
            pub const fn as_str(self) -> &'static str {
                match self { $(Reason::$name => $text,)* }
            }

            /// The gRPC code that carries it, for clients that know no reasons.
            pub const fn code(self) -> Code {
                match self { $(Reason::$name => Code::$code,)* }
            }

            /// What a client does next.
            pub const fn retry(self) -> Retry {
                match self { $(Reason::$name => Retry::$retry,)* }
            }

            /// What the reason alone says of a write, where the error does not say more.
            pub const fn outcome(self) -> Outcome {
                match self { $(Reason::$name => Outcome::$outcome,)* }
            }

            /// The reason of that name.
            pub fn parse(text: &str) -> Option<Reason> {
                match text { $($text => Some(Reason::$name),)* _ => None }
            }
        }
    };
}

reasons! {
    // --- where to go ---

    /// This replica does not lead the shard. Metadata names the leader where it is known.
    NotLeader = "NOT_LEADER", Unavailable, Redirect, NotApplied;
    /// The route is of another epoch, or the shard does not hold the key (any more).
    StaleRoute = "STALE_ROUTE", Unavailable, RefreshRoute, NotApplied;
    /// The replica is staler than the read allows.
    TooStale = "TOO_STALE", Unavailable, Redirect, NotApplied;
    /// The node is shutting down and takes nothing new.
    Draining = "DRAINING", Unavailable, Redirect, NotApplied;

    // --- what passes by itself ---

    /// The shard has no leader, or its leader no majority.
    NoQuorum = "NO_QUORUM", Unavailable, BackOff, NotApplied;
    /// A queue or a budget is full.
    Overloaded = "OVERLOADED", ResourceExhausted, BackOff, NotApplied;
    /// The state cannot take writes as fast as they come.
    WriteStalled = "WRITE_STALLED", ResourceExhausted, BackOff, NotApplied;
    /// The leader's clock is too far from its peers', or the request's birth too far ahead of it.
    ClockOutOfBound = "CLOCK_OUT_OF_BOUND", Unavailable, BackOff, NotApplied;

    // --- what may have happened ---

    /// The write was proposed, and then leadership, connection or deadline was lost. Why not
    /// `UNAVAILABLE`: middleware retries that by itself, and a write without a request id of its
    /// own would be applied twice; of `DEADLINE_EXCEEDED` gRPC says that it may have succeeded.
    OutcomeUnknown = "OUTCOME_UNKNOWN", DeadlineExceeded, SameRequestId, Unknown;
    /// No answer from the node: the connection failed, or broke. Made by the asking end.
    Unreachable = "UNREACHABLE", Unavailable, SameRequestId, Unknown;
    /// The write's birth is at or before the floor, so nobody can tell any more whether it was
    /// applied. Where no earlier attempt is unanswered, it was not: then a new birth is right.
    RetryWindowPassed = "RETRY_WINDOW_PASSED", FailedPrecondition, Never, Unknown;

    // --- what the caller has to change ---

    /// The deadline passed before anything was proposed or read.
    DeadlineNotApplied = "DEADLINE_NOT_APPLIED", DeadlineExceeded, Never, NotApplied;
    /// The request makes no sense; the message says why.
    InvalidArgument = "INVALID_ARGUMENT", InvalidArgument, Never, NotApplied;
    /// Beyond a limit, which the metadata names.
    TooLarge = "TOO_LARGE", InvalidArgument, Never, NotApplied;
    /// The keys of an atomic batch are of several entities.
    CrossEntity = "CROSS_ENTITY", InvalidArgument, Never, NotApplied;
    /// No keyspace of that name. The node has looked for a newer map before it says so.
    UnknownKeyspace = "UNKNOWN_KEYSPACE", NotFound, Never, NotApplied;
    /// A keyspace of that name stands already, with other settings.
    KeyspaceExists = "KEYSPACE_EXISTS", AlreadyExists, Never, NotApplied;
    /// No shard of that id.
    UnknownShard = "UNKNOWN_SHARD", NotFound, Never, NotApplied;
    /// No node of that id.
    UnknownNode = "UNKNOWN_NODE", NotFound, Never, NotApplied;
    /// The version is older than the keyspace's history.
    VersionGone = "VERSION_GONE", OutOfRange, Never, NotApplied;
    /// Planned on an epoch that has passed.
    Conflict = "CONFLICT", Aborted, Never, NotApplied;
    /// Not for this caller: a write to `system`, fault injection on a server without it.
    NotAllowed = "NOT_ALLOWED", PermissionDenied, Never, NotApplied;
    /// This version cannot do it.
    Unsupported = "UNSUPPORTED", Unimplemented, Never, NotApplied;

    // --- what the operator has to mend ---

    /// The cluster has not been made yet: `coracle init`.
    NotInitialized = "NOT_INITIALIZED", FailedPrecondition, Never, NotApplied;
    /// The cluster has been made before.
    AlreadyInitialized = "ALREADY_INITIALIZED", AlreadyExists, Never, NotApplied;
    /// A voter's disk is under its reserve: only deletes and reads go on.
    DiskFull = "DISK_FULL", ResourceExhausted, Never, NotApplied;
    /// Data on disk are not what was written. Metadata names the file and the offset.
    Corruption = "CORRUPTION", DataLoss, Never, Unknown;
    /// A defect, here or between here and there.
    Internal = "INTERNAL", Internal, Never, Unknown;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error as both ends hold it: made by the server, read by the client, carried by a gRPC status
/// or by an answer on a pipeline with nothing lost but what is beyond the limits on its size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({reason})")]
pub struct Fault {
    /// From the closed list.
    pub reason: Reason,
    /// For people: lower-case, with the mend where there is one.
    pub message: String,
    /// What is known of a write.
    pub outcome: Outcome,
    /// Facts behind the reason, by the names in [`metadata`], the outcome not among them.
    pub metadata: BTreeMap<String, String>,
    /// Wait at least this long before the next attempt; 0 means the client's own back-off.
    pub retry_after_ms: u64,
}

impl Fault {
    /// With the outcome that the reason implies, and no facts.
    pub fn new(reason: Reason, message: impl Into<String>) -> Fault {
        Fault {
            reason,
            message: message.into(),
            outcome: reason.outcome(),
            metadata: BTreeMap::new(),
            retry_after_ms: 0,
        }
    }

    /// Adds a fact.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Fault {
        self.metadata.insert(name.to_owned(), value.to_string());
        self
    }

    /// Says what is known of the write, where that is not what the reason implies.
    #[must_use]
    pub fn with_outcome(mut self, outcome: Outcome) -> Fault {
        self.outcome = outcome;
        self
    }

    /// Asks the client to wait at least this long, rounded up to milliseconds.
    #[must_use]
    pub fn with_retry_after(mut self, pause: Duration) -> Fault {
        let ms = pause.as_nanos().div_ceil(1_000_000);
        self.retry_after_ms = u64::try_from(ms).unwrap_or(u64::MAX);
        self
    }

    /// A request that makes no sense, and the field at fault.
    pub fn invalid(field: &str, message: impl Into<String>) -> Fault {
        Fault::new(Reason::InvalidArgument, message).with(metadata::FIELD, field)
    }

    /// What a client does next. Where the outcome of a write is unknown, a pause is not enough.
    pub fn retry(&self) -> Retry {
        match (self.reason.retry(), self.outcome) {
            (Retry::Never, _) => Retry::Never,
            (_, Outcome::Unknown) => Retry::SameRequestId,
            (retry, _) => retry,
        }
    }

    /// A fact, where it is there.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).map(String::as_str)
    }

    /// A fact that is a number, where it is there and is one.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    /// As a gRPC status with `ErrorInfo`, and `RetryInfo` and `BadRequest` where they apply.
    pub fn to_status(&self) -> Status {
        let message = self.clipped_message();
        let facts: HashMap<_, _> = self.clipped_metadata().into_iter().collect();
        let mut details = ErrorDetails::with_error_info(self.reason.as_str(), DOMAIN, facts);
        if self.retry_after_ms > 0 {
            details.set_retry_info(Some(Duration::from_millis(self.retry_after_ms)));
        }
        if let Some(field) = self.text(metadata::FIELD) {
            details.add_bad_request_violation(clip(field, FAULT_MESSAGE_BYTES_MAX), message);
        }
        Status::with_error_details(self.reason.code(), message, details)
    }

    /// From any status, also one that is not of ours: a transport's, a proxy's, a newer version's.
    pub fn from_status(status: &Status) -> Fault {
        let details = status.get_error_details();
        let pause = details.retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
        let fault = match details.error_info() {
            Some(info) if info.domain == DOMAIN => {
                let facts = info.metadata.clone().into_iter().collect();
                Fault::received(&info.reason, status.code(), status.message(), facts)
            }
            _ => Fault::foreign(status.code(), status.message()),
        };
        fault.with_retry_after(pause)
    }

    /// As an answer on a pipeline.
    pub fn to_pipeline(&self) -> v1::PipelineError {
        v1::PipelineError {
            code: self.reason.code() as i32,
            message: self.clipped_message().to_owned(),
            reason: self.reason.as_str().to_owned(),
            metadata: self.clipped_metadata(),
            retry_after_ms: self.retry_after_ms,
        }
    }

    /// From an answer on a pipeline.
    pub fn from_pipeline(error: &v1::PipelineError) -> Fault {
        let code = Code::from_i32(error.code);
        let mut fault =
            Fault::received(&error.reason, code, &error.message, error.metadata.clone());
        fault.retry_after_ms = error.retry_after_ms;
        fault
    }

    /// From the other end of a contract of ours, of whatever version.
    fn received(
        reason: &str,
        code: Code,
        message: &str,
        mut facts: BTreeMap<String, String>,
    ) -> Fault {
        let said = facts.remove(metadata::OUTCOME).map(|text| Outcome::parse(&text));
        let mut fault = match Reason::parse(reason) {
            Some(reason) => Fault::new(reason, message),
            None => Fault::foreign(code, message).with(metadata::RECEIVED, reason),
        };
        fault.outcome = said.unwrap_or(fault.outcome);
        facts.append(&mut fault.metadata);
        fault.metadata = facts;
        fault
    }

    /// By the code alone. Whoever made the status does not know our outcomes: unless the code means
    /// that no service saw the request, a write may have been applied.
    fn foreign(code: Code, message: &str) -> Fault {
        let (reason, outcome) = match code {
            Code::Unimplemented => (Reason::Unsupported, Outcome::NotApplied),
            Code::PermissionDenied | Code::Unauthenticated => {
                (Reason::NotAllowed, Outcome::NotApplied)
            }
            // tonic says `CANCELLED` when a timeout of its own expires.
            Code::DeadlineExceeded | Code::Cancelled => (Reason::OutcomeUnknown, Outcome::Unknown),
            Code::Unavailable => (Reason::Unreachable, Outcome::Unknown),
            Code::ResourceExhausted => (Reason::Overloaded, Outcome::Unknown),
            Code::InvalidArgument | Code::OutOfRange => (Reason::InvalidArgument, Outcome::Unknown),
            Code::Aborted => (Reason::Conflict, Outcome::Unknown),
            Code::DataLoss => (Reason::Corruption, Outcome::Unknown),
            _ => (Reason::Internal, Outcome::Unknown),
        };
        Fault::new(reason, message)
            .with_outcome(outcome)
            .with(metadata::RECEIVED, format!("{code:?}"))
    }

    fn clipped_message(&self) -> &str {
        clip(&self.message, FAULT_MESSAGE_BYTES_MAX)
    }

    /// The facts as they travel: the outcome always, the others as long as there is room.
    fn clipped_metadata(&self) -> BTreeMap<String, String> {
        let outcome = (metadata::OUTCOME.to_owned(), self.outcome.as_str().to_owned());
        let mut room = FAULT_METADATA_BYTES_MAX - outcome.0.len() - outcome.1.len();
        let fits = |(name, value): &(&String, &String)| {
            let left = room.checked_sub(name.len() + value.len());
            room = left.unwrap_or(0);
            left.is_some()
        };
        let facts = self.metadata.iter().filter(|(name, _)| *name != metadata::OUTCOME);
        let mut facts: BTreeMap<_, _> =
            facts.take_while(fits).map(|(name, value)| (name.clone(), value.clone())).collect();
        facts.extend([outcome]);
        facts
    }
}

impl From<LimitError> for Fault {
    fn from(error: LimitError) -> Fault {
        let reason = if error.is_too_large() { Reason::TooLarge } else { Reason::InvalidArgument };
        Fault::new(reason, error.to_string())
            .with(metadata::FIELD, error.field)
            .with(metadata::LIMIT, error.limit)
            .with(metadata::MAX, error.max)
            .with(metadata::GOT, error.got)
    }
}

impl From<KeyspaceNameError> for Fault {
    fn from(error: KeyspaceNameError) -> Fault {
        match error {
            KeyspaceNameError::Length(error) => Fault::from(error),
            KeyspaceNameError::Byte { .. } => Fault::invalid("keyspace", error.to_string()),
        }
    }
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Status {
        fault.to_status()
    }
}

/// The longest start of `text` that is no more than `bytes_max`, cut between characters.
fn clip(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

//! Owns what is said when a command fails, and with which code the process ends: what failed, where,
//! why, and what to do next. Does not print it (see `output`).

use coracle_client::{Error, ErrorKind, Outcome};

/// How the process ends. Scripts rely on the numbers: they never change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Another failure.
    Failed = 1,
    /// The command line, or what it asks for, makes no sense.
    Usage = 2,
    /// `get` of a key that does not exist.
    NotFound = 3,
    /// A check ran, and found something wrong.
    Unhealthy = 4,
    /// No node within reach, no quorum, no cluster yet.
    Unreachable = 5,
    /// A write may or may not have been applied.
    Unknown = 6,
    /// Not for this caller.
    Denied = 7,
    /// A condition was not met, or something changed meanwhile.
    Precondition = 8,
    /// A quota, an overload, a full disk.
    Overloaded = 9,
    /// A plan was made, and there is something to do; only where that was asked for.
    Changes = 10,
    /// Ctrl-C.
    Interrupted = 130,
}

/// Why a command failed, for people.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    /// How the process ends.
    pub exit: Exit,
    /// What failed and why. Empty: there is nothing to say.
    pub what: String,
    /// What to do next.
    pub next: Option<String>,
    /// For `--verbose`.
    pub details: Option<String>,
}

impl Failure {
    /// With a code of its own.
    pub fn new(exit: Exit, what: impl Into<String>) -> Failure {
        Failure { exit, what: what.into(), next: None, details: None }
    }

    /// Of no special kind.
    pub fn failed(what: impl Into<String>) -> Failure {
        Failure::new(Exit::Failed, what)
    }

    /// The caller has to write something else.
    pub fn usage(what: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, what)
    }

    /// The reader of our output has gone (`… | head`): end without a word.
    pub fn pipe_closed() -> Failure {
        Failure::new(Exit::Done, "")
    }

    /// Says what to do next.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Failure {
        self.next = Some(next.into());
        self
    }

    /// A file could not be used: what was tried, which one.
    pub fn io(what: &str, path: impl AsRef<std::path::Path>, error: &std::io::Error) -> Failure {
        Failure::failed(format!("cannot {what} {}: {error}", path.as_ref().display()))
    }

    /// A call to the cluster failed.
    pub fn call(what: impl std::fmt::Display, error: &Error) -> Failure {
        let mut failure = Failure::new(exit_of(error), format!("cannot {what}: {error}"));
        failure.next = next_of(error).map(str::to_owned);
        failure.details = Some(details_of(error));
        failure
    }
}

/// How a command ends that met this error.
pub fn exit_of(error: &Error) -> Exit {
    if error.outcome() == Outcome::Unknown {
        return Exit::Unknown;
    }
    match error.kind() {
        ErrorKind::InvalidArgument | ErrorKind::TooLarge | ErrorKind::CrossEntity => Exit::Usage,
        ErrorKind::Unavailable | ErrorKind::TimedOut | ErrorKind::NotInitialized => {
            Exit::Unreachable
        }
        ErrorKind::NotAllowed => Exit::Denied,
        ErrorKind::Conflict | ErrorKind::VersionGone => Exit::Precondition,
        ErrorKind::Overloaded | ErrorKind::DiskFull => Exit::Overloaded,
        // Not `NotFound`: that a keyspace is missing says nothing about a key.
        _ => Exit::Failed,
    }
}

fn next_of(error: &Error) -> Option<&'static str> {
    if error.outcome() == Outcome::Unknown {
        return Some("read the key to see whether the write was applied");
    }
    Some(match (error.reason(), error.kind()) {
        // The client itself says so of a keyspace that is not in its map, without a reason.
        (Some("UNKNOWN_KEYSPACE") | None, ErrorKind::NotFound) => {
            "coracle keyspace ls shows them, coracle keyspace create NAME makes one"
        }
        (Some("UNKNOWN_SHARD"), _) => "coracle shard ls",
        (Some("UNKNOWN_NODE"), _) => "coracle node ls",
        (_, ErrorKind::NotInitialized) => "start all nodes, then: coracle init --nodes N",
        (_, ErrorKind::Unavailable | ErrorKind::TimedOut) => {
            "coracle status shows which nodes answer; --timeout waits longer"
        }
        (_, ErrorKind::Overloaded) => "try again later, or with less at a time",
        (_, ErrorKind::DiskFull) => {
            "coracle node ls -o wide shows the disks; make room or delete keys"
        }
        (_, ErrorKind::VersionGone) => {
            "coracle keyspace ls shows how far back; coracle keyspace set NAME --history 1h keeps more from now on"
        }
        (_, ErrorKind::CrossEntity) => "coracle keyspace ls shows the entity rule",
        _ => return None,
    })
}

fn details_of(error: &Error) -> String {
    let mut details = format!("kind {:?}, outcome {}", error.kind(), error.outcome());
    if let Some(pause) = error.retry_after() {
        details.push_str(&format!(", asked to wait {} ms", pause.as_millis()));
    }
    details
}

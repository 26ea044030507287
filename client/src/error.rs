//! Owns the client's error: one type, named by what the caller can do about it, which always says
//! what is known of a write. Does not decide about retries (see `retry`): an error that callers see
//! has outlived them.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use coracle_proto::limits::{KeyspaceNameError, LimitError};
pub use coracle_proto::reason::Outcome;
use coracle_proto::reason::{Fault, Reason, metadata};

use crate::session::RequestId;
use crate::topology::{NodeId, ShardId};

/// A call failed. Cheap to clone.
#[derive(Clone)]
pub struct Error(Arc<Report>);

/// What kind of failure it is, by what the caller can do about it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request makes no sense; the message says why.
    InvalidArgument,
    /// Beyond a limit, which the message names.
    TooLarge,
    /// The keys of an atomic batch are of several entities.
    CrossEntity,
    /// No such keyspace, shard or node.
    NotFound,
    /// It exists already, or has changed since it was looked at.
    Conflict,
    /// The state at that version is no longer kept.
    VersionGone,
    /// Not for this caller.
    NotAllowed,
    /// The server's version cannot do it.
    Unsupported,
    /// The cluster has not been made yet: `coracle init`.
    NotInitialized,
    /// Nobody could serve it: no quorum, no leader, or no node within reach.
    Unavailable,
    /// The cluster is overloaded, or this client's pipeline is full.
    Overloaded,
    /// A disk is full: only reads and deletes go on.
    DiskFull,
    /// No answer in time.
    TimedOut,
    /// The write is too old to be told from a retry of itself.
    RetryWindowPassed,
    /// Data on a disk are not what was written.
    Corruption,
    /// The client has been closed.
    Closed,
    /// A defect, in the client, the server, or between them.
    Internal,
}

/// What an error is made of.
pub(crate) struct Report {
    pub(crate) kind: ErrorKind,
    pub(crate) outcome: Outcome,
    pub(crate) message: String,
    pub(crate) is_write: bool,
    pub(crate) shard: Option<ShardId>,
    pub(crate) node: Option<NodeId>,
    pub(crate) attempts: u32,
    pub(crate) request_id: Option<RequestId>,
    pub(crate) fault: Option<Fault>,
}

impl Error {
    pub(crate) fn new(report: Report) -> Error {
        Error(Arc::new(report))
    }

    /// Of a call that was never sent.
    pub(crate) fn unsent(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(Report {
            kind,
            outcome: Outcome::NotApplied,
            message: message.into(),
            is_write: false,
            shard: None,
            node: None,
            attempts: 0,
            request_id: None,
            fault: None,
        })
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Error {
        Error::unsent(ErrorKind::InvalidArgument, message)
    }

    /// Of a call whose last attempt met this, and nothing else is known.
    pub(crate) fn of_fault(fault: Fault, attempts: u32, is_write: bool) -> Error {
        Error::new(Report {
            kind: ErrorKind::of(fault.reason),
            outcome: if is_write { fault.outcome } else { Outcome::NotApplied },
            message: fault.message.clone(),
            is_write,
            shard: fault.number(metadata::SHARD).map(ShardId),
            node: fault.number(metadata::NODE).map(NodeId),
            attempts,
            request_id: None,
            fault: Some(fault),
        })
    }

    /// The node answered something else than was asked.
    pub(crate) fn wrong_answer(is_write: bool) -> Error {
        let fault = Fault::new(Reason::Internal, "the answer does not fit the request");
        Error::of_fault(fault, 1, is_write)
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What is known of the write. A read is always "not applied".
    pub fn outcome(&self) -> Outcome {
        self.0.outcome
    }

    /// Whether making the same call again may succeed and does no harm. Never for a write that may
    /// have been applied: the new call would be another logical write.
    pub fn is_retryable(&self) -> bool {
        let passes = matches!(
            self.0.kind,
            ErrorKind::Unavailable | ErrorKind::Overloaded | ErrorKind::TimedOut
        );
        passes && self.0.outcome == Outcome::NotApplied
    }

    /// How long the server asked to wait before another try.
    pub fn retry_after(&self) -> Option<Duration> {
        let ms = self.0.fault.as_ref().map_or(0, |fault| fault.retry_after_ms);
        (ms > 0).then(|| Duration::from_millis(ms))
    }

    /// The shard that was asked last.
    pub fn shard(&self) -> Option<ShardId> {
        self.0.shard
    }

    /// The node that was asked last.
    pub fn node(&self) -> Option<NodeId> {
        self.0.node
    }

    /// How often a node was asked; 0 when the call was never sent.
    pub fn attempts(&self) -> u32 {
        self.0.attempts
    }

    /// The id of the logical write, to find it in the servers' logs.
    pub fn request_id(&self) -> Option<RequestId> {
        self.0.request_id
    }

    /// The limit that was passed, by its name in the service's documentation: of a call that a node
    /// refused as [`ErrorKind::TooLarge`].
    pub fn limit(&self) -> Option<&str> {
        self.0.fault.as_ref().and_then(|fault| fault.text(metadata::LIMIT))
    }

    /// The reason from the service's closed list, like `NO_QUORUM`.
    pub fn reason(&self) -> Option<&str> {
        self.0.fault.as_ref().map(|fault| fault.reason.as_str())
    }
}

impl ErrorKind {
    pub(crate) fn of(reason: Reason) -> ErrorKind {
        match reason {
            Reason::InvalidArgument => ErrorKind::InvalidArgument,
            Reason::TooLarge => ErrorKind::TooLarge,
            Reason::CrossEntity => ErrorKind::CrossEntity,
            Reason::UnknownKeyspace | Reason::UnknownShard | Reason::UnknownNode => {
                ErrorKind::NotFound
            }
            Reason::KeyspaceExists | Reason::Conflict | Reason::AlreadyInitialized => {
                ErrorKind::Conflict
            }
            Reason::VersionGone => ErrorKind::VersionGone,
            Reason::NotAllowed => ErrorKind::NotAllowed,
            Reason::Unsupported => ErrorKind::Unsupported,
            Reason::NotInitialized => ErrorKind::NotInitialized,
            Reason::NotLeader
            | Reason::StaleRoute
            | Reason::TooStale
            | Reason::Draining
            | Reason::NoQuorum
            | Reason::ClockOutOfBound
            | Reason::Unreachable => ErrorKind::Unavailable,
            Reason::Overloaded | Reason::WriteStalled => ErrorKind::Overloaded,
            Reason::DiskFull => ErrorKind::DiskFull,
            Reason::OutcomeUnknown | Reason::DeadlineNotApplied => ErrorKind::TimedOut,
            Reason::RetryWindowPassed => ErrorKind::RetryWindowPassed,
            Reason::Corruption => ErrorKind::Corruption,
            Reason::Internal => ErrorKind::Internal,
        }
    }
}

impl From<LimitError> for Error {
    fn from(limit: LimitError) -> Error {
        let kind = match limit.is_too_large() {
            true => ErrorKind::TooLarge,
            false => ErrorKind::InvalidArgument,
        };
        Error::unsent(kind, limit.to_string())
    }
}

impl From<KeyspaceNameError> for Error {
    fn from(name: KeyspaceNameError) -> Error {
        Error::invalid(name.to_string())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.0;
        out.write_str(&report.message)?;
        if let Some(reason) = self.reason() {
            write!(out, " ({reason})")?;
        }
        if report.is_write {
            match report.outcome {
                Outcome::NotApplied => out.write_str("; the write was not applied")?,
                Outcome::Applied => out.write_str("; the write was applied")?,
                Outcome::Unknown => out.write_str("; the write may have been applied")?,
            }
        }
        if let Some(shard) = report.shard {
            write!(out, ", shard {shard}")?;
        }
        if let Some(node) = report.node {
            write!(out, ", node {node}")?;
        }
        if report.attempts > 1 {
            write!(out, ", {} attempts", report.attempts)?;
        }
        if let Some(id) = report.request_id {
            write!(out, ", request {id}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.0;
        out.debug_struct("Error")
            .field("kind", &report.kind)
            .field("outcome", &report.outcome)
            .field("message", &report.message)
            .field("reason", &self.reason())
            .field("shard", &report.shard)
            .field("node", &report.node)
            .field("attempts", &report.attempts)
            .field("request_id", &report.request_id)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.fault.as_ref().map(|fault| fault as &(dyn StdError + 'static))
    }
}

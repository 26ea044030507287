//! Owns the settings of the log with their defaults and reasons. Does not read configuration files.

use std::fmt;
use std::sync::Arc;

use crate::error::Error;

/// Called once when a write or sync has failed; the node then ends the process.
pub type OnFatal = Arc<dyn Fn(&Error) + Send + Sync>;

/// Hears how long a sync took. Must not block.
pub type OnSync = Arc<dyn Fn(std::time::Duration) + Send + Sync>;

/// The settings of a node's [`crate::Log`].
#[derive(Clone)]
pub struct LogOptions {
    /// Length of one segment file, reserved when it is created. 64 MiB: large enough that creating
    /// one (an extra two syncs) is rare, small enough that freeing keeps up. A larger batch gets a
    /// larger segment.
    pub segment_bytes: u64,
    /// What all segments together may hold before live data of lagging replicas is rewritten
    /// forward so that the oldest segment can go. Beyond it the log still accepts: the host flushes
    /// and purges (see `pinners`), and full disks are refused above.
    pub log_bytes_target: u64,
    /// Live bytes in the oldest segment below which it is rewritten at once, whatever the log's
    /// length.
    pub rewrite_small_bytes: u64,
    /// Bytes that one step of the writer rewrites at most, so that rewriting delays nobody for
    /// long.
    pub rewrite_step_bytes: u64,
    /// Entries kept in memory for readers, for all replicas together. Beyond it the oldest are read
    /// from disk.
    pub cache_bytes: u64,
    /// Operations that wait for the writer: half a second of a disk that writes 128 MiB a second.
    /// Beyond it, whoever appends waits; at a multiple, callers get `Overloaded` (see `log`).
    pub queue_bytes: u64,
    /// One batch, that is one write and one sync. Beyond it the rest waits for the next batch.
    pub batch_bytes: u64,
    /// The payload of one entry, or the bytes of one vote or committed record. Beyond it:
    /// `Invalid`.
    pub entry_bytes: u64,
    /// A number of this node that clients cannot know (0 will do in tests), written into every
    /// segment and into every checksum: bytes that a client wrote can then never pass for records
    /// of the log.
    pub salt: u64,
    /// Called once after a failed write or sync.
    pub on_fatal: OnFatal,
    /// Called after each sync, with the time that it took.
    pub on_sync: OnSync,
    /// A fault put in on purpose, to prove that the crash tests can fail.
    #[doc(hidden)]
    pub sabotage: Option<Sabotage>,
}

/// Faults that the crash tests must catch.
#[doc(hidden)]
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Sabotage {
    /// Answers a batch before its sync.
    AckBeforeSync,
    /// Acknowledges votes without writing them.
    LostVote,
    /// Does not write truncations.
    ForgottenTruncate,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions {
            segment_bytes: 64 << 20,
            log_bytes_target: 1 << 30,
            rewrite_small_bytes: 1 << 20,
            rewrite_step_bytes: 4 << 20,
            cache_bytes: 128 << 20,
            queue_bytes: 64 << 20,
            batch_bytes: 8 << 20,
            entry_bytes: 8 << 20,
            salt: 0,
            on_fatal: Arc::new(|error| tracing::error!(%error, "the log has stopped")),
            on_sync: Arc::new(|_| {}),
            sabotage: None,
        }
    }
}

impl LogOptions {
    /// The smallest that works: for tests that want to see segments come and go.
    pub fn test_min() -> LogOptions {
        LogOptions {
            segment_bytes: 32 << 10,
            log_bytes_target: 128 << 10,
            rewrite_small_bytes: 256,
            rewrite_step_bytes: 8 << 10,
            cache_bytes: 2 << 10,
            queue_bytes: 256 << 10,
            batch_bytes: 8 << 10,
            entry_bytes: 16 << 10,
            ..LogOptions::default()
        }
    }
}

impl fmt::Debug for LogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogOptions")
            .field("segment_bytes", &self.segment_bytes)
            .field("log_bytes_target", &self.log_bytes_target)
            .field("rewrite_small_bytes", &self.rewrite_small_bytes)
            .field("rewrite_step_bytes", &self.rewrite_step_bytes)
            .field("cache_bytes", &self.cache_bytes)
            .field("queue_bytes", &self.queue_bytes)
            .field("batch_bytes", &self.batch_bytes)
            .field("entry_bytes", &self.entry_bytes)
            .field("sabotage", &self.sabotage)
            .finish_non_exhaustive()
    }
}

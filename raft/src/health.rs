//! Leadership is earned by fsync.
//!
//! Owns the watch over the log's disk. A node whose log has not finished a sync within the bound
//! must not lead: its heartbeats would keep followers from electing somebody whose disk works. It
//! stops heartbeats, campaigns and thereby its lease, and hands its groups over without touching
//! the disk. A disk that hangs for good stops the process, because no operation on it will ever end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_storage::log::Log;
use tokio::time::Instant;

/// A disk that has not synced for so long is stalled.
pub const STALL: Duration = Duration::from_secs(1);
/// A disk that has not synced for so long will not come back: the process stops.
pub const HANG: Duration = Duration::from_secs(20);
/// Between two probes. The log also uses them to mark its durable end when it is idle.
pub(crate) const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// What the disk looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Syncs end in time.
    Well,
    /// No sync has ended for [`STALL`].
    Stalled,
    /// No sync has ended for [`HANG`].
    Hung,
}

/// Probes the log's disk, one probe at a time.
pub(crate) struct Probe {
    log: Log,
    under_way: Arc<AtomicBool>,
    since: Option<Instant>,
}

impl Probe {
    pub(crate) fn new(log: Log) -> Self {
        Self { log, under_way: Arc::default(), since: None }
    }

    /// Starts a probe unless one is under way, and says how the disk looks.
    pub(crate) fn tick(&mut self) -> Disk {
        if !self.under_way.swap(true, Ordering::AcqRel) {
            self.since = Some(Instant::now());
            let under_way = self.under_way.clone();
            self.log.probe(Box::new(move |result| {
                // A failed probe stays under way: the disk never becomes well again.
                under_way.store(result.is_err(), Ordering::Release);
            }));
        }
        if self.log.stats().full {
            // No room for a segment is not a hang; the node's reserve refuses writes meanwhile.
            self.since = Some(Instant::now());
            self.log.try_again();
            return Disk::Stalled;
        }
        let waited = match (self.under_way.load(Ordering::Acquire), self.since) {
            (true, Some(since)) => since.elapsed(),
            _ => Duration::ZERO,
        };
        if waited >= HANG {
            Disk::Hung
        } else if waited >= STALL {
            Disk::Stalled
        } else {
            Disk::Well
        }
    }
}

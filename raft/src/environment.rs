//! What all groups of a node share: handed to each when it starts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use coracle_storage::exec::Exec;
use coracle_storage::log::Log;
use coracle_storage::state::Engines;
use tokio_util::sync::CancellationToken;

use crate::birth::Births;
use crate::clock::{Circumstances, Clock};
use crate::lease::Timing;
use crate::observer::Observer;
use crate::snapshot::SnapshotSlots;
use crate::transport::Transport;

/// What all groups of a node share.
pub(crate) struct Environment {
    pub(crate) timing: Timing,
    pub(crate) log: Log,
    pub(crate) engines: Arc<dyn Engines>,
    pub(crate) exec: Arc<dyn Exec>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) slots: Arc<SnapshotSlots>,
    pub(crate) stop: CancellationToken,
    pub(crate) healthy: AtomicBool,
    pub(crate) numbers: AtomicU64,
    pub(crate) births: Arc<Births>,
}

impl Circumstances for Environment {
    fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }

    fn observer(&self) -> Arc<dyn Observer> {
        self.observer.clone()
    }

    fn healthy(&self) -> bool {
        self.healthy.load(Ordering::Acquire)
    }

    fn log_has_room(&self) -> bool {
        self.log.has_room()
    }

    fn timing(&self) -> Timing {
        self.timing
    }

    fn exec(&self) -> Arc<dyn Exec> {
        self.exec.clone()
    }
}

impl Environment {
    /// A range of numbers that no group of this start, and no earlier start, has used.
    pub(crate) fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed) << 24
    }
}

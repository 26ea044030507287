//! Wall time for stamps and births: the seam, and hybrid time.
//!
//! Owns the arithmetic of versions (48 bits of milliseconds, 16 of counter). Does not read a clock:
//! the node hands one in, and says when it strays from those of its peers.

use std::sync::Arc;

use coracle_storage::exec::Exec;

use crate::error::GroupError;
use crate::lease::Timing;
use crate::observer::Observer;

/// A leader's source of stamps.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since 1970.
    fn now_ms(&self) -> u64;

    /// Refuses while the clock is too far from the median of the peers' clocks: a stamp from it
    /// would carry versions and expiries away with it.
    fn check(&self) -> Result<(), GroupError>;
}

/// What a group's tasks need to know of their node.
pub(crate) trait Circumstances: Send + Sync + 'static {
    /// Source of stamps.
    fn clock(&self) -> Arc<dyn Clock>;

    /// Hears where time goes.
    fn observer(&self) -> Arc<dyn Observer>;

    /// Whether the log's disk finishes its syncs in time.
    fn healthy(&self) -> bool;

    /// Whether the log takes more: beyond it, writes wait in their groups' queues.
    fn log_has_room(&self) -> bool;

    /// Times of consensus.
    fn timing(&self) -> Timing;

    /// Where work runs.
    fn exec(&self) -> Arc<dyn Exec>;
}

/// A version as time: milliseconds in the upper 48 bits, a counter in the lower 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HybridTime(pub u64);

/// How far an entry's ceiling lies ahead of its stamp: 250 ms. Reads at a version up to the ceiling
/// need no entry of their own, and a new leader stamps above it.
pub(crate) const CEILING_AHEAD: u64 = 250 << 16;

impl HybridTime {
    /// How far a clock may stray, and how far ahead of its own a leader follows a reader: 500 ms.
    pub const BOUND: u64 = 500 << 16;

    /// The first version of a millisecond.
    pub fn at_ms(ms: u64) -> Self {
        Self(ms << 16)
    }

    /// The millisecond that it lies in.
    pub fn ms(self) -> u64 {
        self.0 >> 16
    }
}

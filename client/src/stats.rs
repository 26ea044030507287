//! Owns what a client counts about itself. Does not decide anything.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a client has done since it was made, over all its handles.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Calls of single operations: gets, writes, and each shard's part of a `multi_get`.
    pub calls: u64,
    /// Requests that nodes were sent for them, retries and hedges included.
    pub requests: u64,
    /// Calls that asked the nearest replica, whichever that was.
    pub nearest: u64,
    /// Times that such a call went on to another node, because the one that was asked failed or was
    /// too far behind.
    pub moved_on: u64,
    /// Requests to a second replica because the first took long.
    pub hedges: u64,
    /// Those of them whose answer came first.
    pub hedges_won: u64,
}

/// The same, as it is counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) calls: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) nearest: AtomicU64,
    pub(crate) moved_on: AtomicU64,
    pub(crate) hedges: AtomicU64,
    pub(crate) hedges_won: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stats(&self) -> Stats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            calls: count(&self.calls),
            requests: count(&self.requests),
            nearest: count(&self.nearest),
            moved_on: count(&self.moved_on),
            hedges: count(&self.hedges),
            hedges_won: count(&self.hedges_won),
        }
    }
}

//! Where a node's memory goes: how the budget is divided, and what each part uses now. What keeps to
//! its share is in `storage`; requests under way have a limit of their own (see `admission`).

use coracle_storage::Log;
use coracle_storage::fs::Fs;
use coracle_storage::state::Engines;

use crate::config;
use crate::metrics::Metrics;

/// Entries of the log kept in memory for followers that read its end: an eighth of the budget. More
/// than this is of no use: who is further behind reads from the disk.
const LOG_CACHE_BYTES_MAX: u64 = 128 << 20;
/// The index of the log's entries: an eighth. At some hundred bytes an entry this is a million
/// entries, which no log of the usual size has; then its size on disk is what bounds it.
const LOG_INDEX_BYTES_MAX: u64 = 128 << 20;

/// How `storage.memory_budget` is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    /// Blocks, indexes, filters and write buffers of all state stores.
    pub(crate) state_bytes: u64,
    /// Payloads of the log's newest entries.
    pub(crate) log_cache_bytes: u64,
    /// What the log knows of each entry.
    pub(crate) log_index_bytes: u64,
}

impl Shares {
    /// The shares of a budget; together they are the budget.
    pub(crate) fn of(budget: u64) -> Shares {
        let log_cache_bytes = (budget / 8).min(LOG_CACHE_BYTES_MAX);
        let log_index_bytes = (budget / 8).min(LOG_INDEX_BYTES_MAX);
        let state_bytes = budget - log_cache_bytes - log_index_bytes;
        Shares { state_bytes, log_cache_bytes, log_index_bytes }
    }
}

/// Sets the gauges of memory to what is used now. The process's own figure is read from `fs`: only the
/// real one has it.
pub(crate) fn observe(
    metrics: &Metrics,
    fs: &dyn Fs,
    log: &Log,
    engines: &dyn Engines,
    requests: u64,
) {
    let (log, state) = (log.stats(), engines.memory());
    let parts = [
        ("block_cache", state.cache_bytes.saturating_sub(state.write_buffer_bytes)),
        ("write_buffers", state.write_buffer_bytes),
        ("log_cache", log.cache_bytes),
        ("log_index", log.index_bytes),
        ("log_queue", log.queue_bytes),
        ("requests", requests),
    ];
    for (part, bytes) in parts {
        metrics.memory_bytes.with([part]).set(bytes as i64);
    }
    if let Some(bytes) = config::resident_bytes(fs) {
        metrics.resident_memory_bytes.set(bytes as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_the_budget() {
        for budget in [64 << 20, 512 << 20, 6 << 30, 1 << 40] {
            let Shares { state_bytes, log_cache_bytes, log_index_bytes } = Shares::of(budget);
            assert_eq!(state_bytes + log_cache_bytes + log_index_bytes, budget);
            assert!(state_bytes >= budget / 2);
        }
    }
}

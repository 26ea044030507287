//! How much of the disk and of memory the shared log may take, and how many entries stay in it for
//! followers that were away. Owns the arithmetic; who is flushed, the host decides.

use coracle_storage::Log;
use coracle_storage::log::LogStats;

/// Entries that stay in a group's log behind its last flush: a follower that was away for a moment
/// catches up from them, without a snapshot.
const KEPT_ENTRIES_MAX: u64 = 10_000;
/// All kept entries together take at most this part of the memory for the index: the rest is for
/// those that are not flushed yet.
const KEPT_SHARE: u64 = 2;

/// Beyond either, the replica that holds the log's oldest entries is flushed, and its log purged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogBudget {
    /// Bytes of the log on disk.
    pub disk_bytes: u64,
    /// Bytes of memory for what the log knows of its entries, without their payloads.
    pub index_bytes: u64,
}

/// How full the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fill {
    Within,
    Over,
    /// Kept entries go as well: who wants them takes a snapshot.
    FarOver,
}

impl LogBudget {
    pub(super) fn fill(&self, log: &LogStats) -> Fill {
        let of = |used: u64, budget: u64| match used {
            used if used <= budget => Fill::Within,
            used if used <= budget.saturating_mul(2) => Fill::Over,
            _ => Fill::FarOver,
        };
        of(log.bytes_on_disk, self.disk_bytes).max(of(log.index_bytes, self.index_bytes))
    }

    /// Entries that each of so many groups keeps behind its last flush.
    pub(super) fn kept(&self, groups: usize) -> u64 {
        let all = self.index_bytes / KEPT_SHARE / Log::ENTRY_INDEX_BYTES;
        (all / (groups as u64).max(1)).min(KEPT_ENTRIES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(bytes_on_disk: u64, index_bytes: u64) -> LogStats {
        LogStats {
            bytes_on_disk,
            index_bytes,
            live_bytes: 0,
            segments: 0,
            oldest_segment: 0,
            cache_bytes: 0,
            queue_bytes: 0,
            last_sync: std::time::Duration::ZERO,
            full: false,
            pins: Vec::new(),
        }
    }

    #[test]
    fn either_limit_fills_the_log() {
        let budget = LogBudget { disk_bytes: 100, index_bytes: 10 };
        for (disk, index, fill) in [
            (100, 10, Fill::Within),
            (101, 10, Fill::Over),
            (100, 11, Fill::Over),
            (200, 20, Fill::Over),
            (201, 0, Fill::FarOver),
            (0, 21, Fill::FarOver),
        ] {
            assert_eq!(budget.fill(&log(disk, index)), fill, "{disk} and {index}");
        }
    }

    #[test]
    fn kept_entries_of_all_groups_fit() {
        let budget = LogBudget { disk_bytes: 0, index_bytes: 64 << 20 };
        for groups in [0, 1, 17, 64, 5_000] {
            let kept = budget.kept(groups);
            assert!(kept <= KEPT_ENTRIES_MAX);
            assert!(kept * groups as u64 * Log::ENTRY_INDEX_BYTES <= budget.index_bytes / 2);
        }
        assert_eq!(budget.kept(1), KEPT_ENTRIES_MAX);
    }
}

//! What a node's log holds in memory keeps to its bounds. Owns the bounds as a simulated node has them.

use coracle_storage::LogOptions;
use coracle_storage::log::LogStats;

/// What is wrong with a node's log, if anything is.
pub(super) fn check(node: usize, log: &LogStats) -> Option<String> {
    // Appends are refused at sixteen times what lets new ones wait, control records at 24 times: see the
    // log's queue.
    let queue_max = 24 * LogOptions::default().queue_bytes;
    // What is not written yet cannot leave the cache.
    let cache_max = LogOptions::default().cache_bytes + log.queue_bytes;
    (log.queue_bytes > queue_max || log.cache_bytes > cache_max).then(|| {
        format!(
            "what a log holds in memory is bounded: n{} has {} bytes waiting, {} bytes cached",
            node + 1,
            log.queue_bytes,
            log.cache_bytes
        )
    })
}

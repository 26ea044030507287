//! Owns the order in which payloads leave memory. Does not hold the payloads (see `index`).

use std::collections::VecDeque;

use super::record::ReplicaId;

/// Names one appended entry: replica, index, and the ticket of the append.
pub(crate) type Key = (ReplicaId, u64, u64);

/// What the holder of the payloads says of one.
pub(crate) enum Held {
    /// The entry is gone, or has no payload in memory.
    Gone,
    /// It is not written yet: memory is the only place that has it.
    Pinned,
    /// This many bytes, which are on disk as well.
    Cached(u64),
}

/// Who holds the payloads.
pub(crate) trait Payloads {
    /// What is held under this name.
    fn held(&self, key: Key) -> Held;
    /// Lets go of it.
    fn release(&mut self, key: Key);
}

/// Names of entries that have left the index may stay in the order until there are this many more
/// of them than of the others.
const STALE_MAX: usize = 1024;

/// First in, first out, over all replicas in the order of the log: readers follow the log's end, so
/// what was appended first is what they need least.
pub(crate) struct Cache {
    order: VecDeque<Key>,
    bytes: u64,
    count: usize,
    bytes_max: u64,
}

impl Cache {
    pub(crate) fn new(bytes_max: u64) -> Cache {
        Cache { order: VecDeque::new(), bytes: 0, count: 0, bytes_max }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn added(&mut self, key: Key, bytes: u64) {
        self.order.push_back(key);
        self.bytes += bytes;
        self.count += 1;
    }

    /// A payload left the index with its entry.
    pub(crate) fn removed(&mut self, bytes: u64) {
        self.bytes -= bytes;
        self.count -= 1;
    }

    /// Drops payloads until the budget holds, and names whose entries are gone.
    pub(crate) fn evict(&mut self, payloads: &mut impl Payloads) {
        while let Some(&key) = self.order.front() {
            match payloads.held(key) {
                Held::Gone => {}
                // In the order of the log: when this one is not written, none behind it is.
                Held::Pinned => break,
                Held::Cached(_) if self.bytes <= self.bytes_max => break,
                Held::Cached(bytes) => {
                    payloads.release(key);
                    self.removed(bytes);
                }
            }
            self.order.pop_front();
        }
        if self.order.len() > 2 * self.count + STALE_MAX {
            self.order.retain(|&key| !matches!(payloads.held(key), Held::Gone));
        }
    }
}

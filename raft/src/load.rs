//! Owns how often each part of a group's arc is met: what a split at the median of load is chosen by. Counts
//! on one replica, and forgets slowly. Nothing that is replicated goes by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::Instant;

/// Parts of an arc that are told apart: enough to halve the load of an arc within a few percent.
pub const BUCKETS: usize = 64;
/// After so long every count is halved: what was long ago weighs little.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// How often one part of the arc was met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadBucket {
    /// Its first position; it ends where the next one begins, the last with the arc.
    pub start: u64,
    /// Reads on this replica.
    pub reads: u64,
    /// Writes on this replica, which led.
    pub writes: u64,
}

/// A group's counts.
pub(crate) struct Load(RwLock<Arc<Counts>>);

struct Counts {
    arc: (u64, u64),
    since: Instant,
    reads: [AtomicU64; BUCKETS],
    writes: [AtomicU64; BUCKETS],
}

impl Default for Load {
    fn default() -> Self {
        Self(RwLock::new(Arc::new(Counts::new((0, 0)))))
    }
}

impl Load {
    pub(crate) fn read(&self, arc: (u64, u64), position: u64) {
        let counts = self.counts(arc);
        counts.reads[counts.bucket(position)].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn write(&self, arc: (u64, u64), position: u64) {
        let counts = self.counts(arc);
        counts.writes[counts.bucket(position)].fetch_add(1, Ordering::Relaxed);
    }

    /// All parts of an arc, in order.
    pub(crate) fn buckets(&self, arc: (u64, u64)) -> Vec<LoadBucket> {
        let counts = self.counts(arc);
        let bucket = |at: usize| LoadBucket {
            start: counts.start(at),
            reads: counts.reads[at].load(Ordering::Relaxed),
            writes: counts.writes[at].load(Ordering::Relaxed),
        };
        (0..BUCKETS).map(bucket).collect()
    }

    /// Called now and then.
    pub(crate) fn fade(&self) {
        let counts = self.0.read().clone();
        if counts.since.elapsed() < HALF_LIFE {
            return;
        }
        let faded = Counts::new(counts.arc);
        for at in 0..BUCKETS {
            let half = |count: &AtomicU64| count.load(Ordering::Relaxed) / 2;
            faded.reads[at].store(half(&counts.reads[at]), Ordering::Relaxed);
            faded.writes[at].store(half(&counts.writes[at]), Ordering::Relaxed);
        }
        *self.0.write() = Arc::new(faded);
    }

    /// The counts of an arc: those of another one say nothing of it.
    fn counts(&self, arc: (u64, u64)) -> Arc<Counts> {
        let counts = self.0.read().clone();
        if counts.arc == arc {
            return counts;
        }
        let fresh = Arc::new(Counts::new(arc));
        *self.0.write() = fresh.clone();
        fresh
    }
}

impl Counts {
    fn new(arc: (u64, u64)) -> Self {
        let zeros = || [const { AtomicU64::new(0) }; BUCKETS];
        Self { arc, since: Instant::now(), reads: zeros(), writes: zeros() }
    }

    fn width(&self) -> u128 {
        let (start, end) = self.arc;
        let end = if end == 0 { 1 << 64 } else { u128::from(end) };
        end - u128::from(start)
    }

    fn bucket(&self, position: u64) -> usize {
        let offset = u128::from(position.saturating_sub(self.arc.0)).min(self.width() - 1);
        (offset * BUCKETS as u128 / self.width()) as usize
    }

    /// The first position that falls into a bucket.
    fn start(&self, bucket: usize) -> u64 {
        self.arc.0 + (bucket as u128 * self.width()).div_ceil(BUCKETS as u128) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_counts_where_its_bucket_begins() {
        for arc in [(0, 0), (1 << 63, 0), (10, 1_000), (u64::MAX - 100, 0)] {
            let load = Load::default();
            let buckets = load.buckets(arc);
            assert_eq!((buckets.len(), buckets[0].start), (BUCKETS, arc.0));
            for bucket in &buckets {
                load.read(arc, bucket.start);
                load.write(arc, bucket.start);
            }
            let last = arc.1.wrapping_sub(1);
            load.write(arc, last);
            let counted = load.buckets(arc);
            assert!(counted.iter().all(|bucket| bucket.reads == 1), "{arc:?}");
            assert_eq!(counted[BUCKETS - 1].writes, 2, "{arc:?}");
            assert_eq!(counted.iter().map(|bucket| bucket.writes).sum::<u64>(), 65);
            // Another arc begins anew.
            assert!(load.buckets((0, 7)).iter().all(|bucket| bucket.reads == 0));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn counts_fade() {
        let load = Load::default();
        (0..9).for_each(|_| load.read((0, 0), 5));
        load.fade();
        assert_eq!(load.buckets((0, 0))[0].reads, 9);
        tokio::time::advance(HALF_LIFE).await;
        load.fade();
        load.fade();
        assert_eq!(load.buckets((0, 0))[0].reads, 4);
    }
}

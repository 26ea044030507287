//! How much each replica of this node has to do: keys read and written a second, of late.
//!
//! Owns the counting and the decay. Does not know who leads: the rates of a shard's replicas, added up,
//! stay the same when leadership moves, because all decay alike.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_proto::shard_map::ShardId;
use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;

/// What was counted so long ago counts for a third still: a burst moves nothing, a minute does.
const DECAY: Duration = Duration::from_secs(30);
/// Looks that follow each other sooner find the same.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Keys a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Read.
    pub reads: u64,
    /// Written, deletes among them.
    pub writes: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Loads {
    shards: RwLock<BTreeMap<ShardId, Arc<Load>>>,
}

#[derive(Debug)]
struct Load {
    reads: AtomicU64,
    writes: AtomicU64,
    past: Mutex<Past>,
}

#[derive(Debug)]
struct Past {
    at: Instant,
    reads: u64,
    writes: u64,
    rates: (f64, f64),
}

impl Loads {
    /// Nothing was done yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// So many keys of a shard were read by the replica here, so many written through it.
    pub fn count(&self, shard: ShardId, reads: u64, writes: u64) {
        let known = self.shards.read().get(&shard).cloned();
        let load = known.unwrap_or_else(|| self.shards.write().entry(shard).or_default().clone());
        load.reads.fetch_add(reads, Ordering::Relaxed);
        load.writes.fetch_add(writes, Ordering::Relaxed);
    }

    /// What the replica of a shard has had to do lately.
    pub fn rates(&self, shard: ShardId) -> Rates {
        let load = self.shards.read().get(&shard).cloned();
        load.map_or(Rates::default(), |load| load.rates(Instant::now()))
    }

    /// Of shards that have no replica here any more nothing is remembered.
    pub fn retain(&self, here: impl Fn(ShardId) -> bool) {
        if self.shards.read().keys().any(|shard| !here(*shard)) {
            self.shards.write().retain(|shard, _| here(*shard));
        }
    }
}

impl Default for Load {
    fn default() -> Self {
        let past = Past { at: Instant::now(), reads: 0, writes: 0, rates: (0.0, 0.0) };
        Self { reads: AtomicU64::new(0), writes: AtomicU64::new(0), past: Mutex::new(past) }
    }
}

impl Load {
    fn rates(&self, now: Instant) -> Rates {
        let mut past = self.past.lock();
        let since = now.saturating_duration_since(past.at);
        if since >= LOOK_INTERVAL {
            let reads = self.reads.load(Ordering::Relaxed);
            let writes = self.writes.load(Ordering::Relaxed);
            let kept = (-since.as_secs_f64() / DECAY.as_secs_f64()).exp();
            let next = |rate: f64, count: u64| {
                rate * kept + (1.0 - kept) * count as f64 / since.as_secs_f64()
            };
            let (read, written) = past.rates;
            let rates = (next(read, reads - past.reads), next(written, writes - past.writes));
            *past = Past { at: now, reads, writes, rates };
        }
        let (reads, writes) = past.rates;
        Rates { reads: reads.round() as u64, writes: writes.round() as u64 }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tokio::test expands to Runtime::block_on")]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(7);

    #[tokio::test(start_paused = true)]
    async fn a_steady_load_is_told_after_a_while_and_forgotten_after_another() {
        let loads = Loads::new();
        for _ in 0..240 {
            loads.count(SHARD, 300, 20);
            tokio::time::advance(Duration::from_secs(1)).await;
            loads.rates(SHARD);
        }
        let Rates { reads, writes } = loads.rates(SHARD);
        assert!((295..=300).contains(&reads) && (19..=20).contains(&writes), "{reads}, {writes}");
        tokio::time::advance(DECAY).await;
        let reads = loads.rates(SHARD).reads;
        assert!((100..=115).contains(&reads), "a third of it: {reads}");
        loads.retain(|_| false);
        assert_eq!(loads.rates(SHARD), Rates::default());
    }

    #[tokio::test(start_paused = true)]
    async fn how_often_it_is_looked_at_does_not_matter_and_a_change_of_leaders_keeps_the_sum() {
        let (old, new, seldom) = (Loads::new(), Loads::new(), Loads::new());
        for second in 0..300_u64 {
            let leads = if second < 200 { &old } else { &new };
            leads.count(SHARD, 100, 0);
            seldom.count(SHARD, 100, 0);
            tokio::time::advance(Duration::from_secs(1)).await;
            let sum = old.rates(SHARD).reads + new.rates(SHARD).reads;
            if second > 180 {
                assert!((98..=102).contains(&sum), "{second}: {sum}");
            }
        }
        assert!((98..=102).contains(&seldom.rates(SHARD).reads));
    }
}

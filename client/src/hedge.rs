//! Owns the decision to ask a second replica for a read that the first takes long for: after how long,
//! and whether it can be afforded. Does not ask (see `driver`) and does not choose (see `near`).

use std::time::Duration;

use parking_lot::Mutex;

/// Shorter waits gain nothing: the second request would meet the answer to the first.
const DELAY_MIN: Duration = Duration::from_millis(1);

/// The share of reads that are faster than the wait.
const QUANTILE: f64 = 0.95;

/// Before so many reads were measured nobody knows what is slow.
const SAMPLES_MIN: f64 = 50.0;

/// When so many were, all count for half: what is slow follows the last thousand or two.
const SAMPLES_MAX: f64 = 1_000.0;

/// Buckets for each doubling of the latency: each is a twelfth wide.
const BUCKETS_PER_DOUBLING: f64 = 8.0;

/// From 1 µs to beyond a minute.
const BUCKETS: usize = 216;

/// What a read earns, in hundredths of a hedge: at most 2 requests more for 100 reads.
const EARNED: u32 = 2;

/// What a hedge costs.
const COST: u32 = 100;

/// What can be saved up: five hedges. A cluster that becomes slow all at once gets five requests more
/// before the share holds.
const SAVED_MAX: u32 = 5 * COST;

/// What decides about the hedges of one client, for reads of one kind.
#[derive(Debug, Default)]
pub(crate) struct Hedging {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    latencies: Latencies,
    saved: u32,
}

impl Hedging {
    /// A read begins. After how long a second replica may be asked; `None`: not at all.
    pub(crate) fn begin(&self) -> Option<Duration> {
        let mut state = self.state.lock();
        state.saved = (state.saved + EARNED).min(SAVED_MAX);
        state.latencies.quantile(QUANTILE).map(|delay| delay.max(DELAY_MIN))
    }

    /// Pays for a hedge, if there is enough.
    pub(crate) fn pay(&self) -> bool {
        let mut state = self.state.lock();
        let left = state.saved.checked_sub(COST);
        state.saved = left.unwrap_or(state.saved);
        left.is_some()
    }

    /// How long one replica took; of one that was not waited for to the end, how long at least.
    pub(crate) fn measured(&self, took: Duration) {
        self.state.lock().latencies.add(took);
    }
}

/// An estimate of the distribution of recent latencies: counts in buckets of equal ratio, which fade.
#[derive(Debug)]
struct Latencies {
    buckets: [f64; BUCKETS],
    total: f64,
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies { buckets: [0.0; BUCKETS], total: 0.0 }
    }
}

impl Latencies {
    fn add(&mut self, took: Duration) {
        if self.total >= SAMPLES_MAX {
            self.buckets.iter_mut().for_each(|count| *count /= 2.0);
            self.total /= 2.0;
        }
        let micros = (took.as_nanos() as f64 / 1_000.0).max(1.0);
        let bucket = (micros.log2() * BUCKETS_PER_DOUBLING) as usize;
        self.buckets[bucket.min(BUCKETS - 1)] += 1.0;
        self.total += 1.0;
    }

    /// Below which such a share of the latencies lies: the upper end of its bucket.
    fn quantile(&self, share: f64) -> Option<Duration> {
        if self.total < SAMPLES_MIN {
            return None;
        }
        let mut below = 0.0;
        let within = |count: &f64| {
            below += count;
            below >= self.total * share
        };
        let bucket = self.buckets.iter().position(within).unwrap_or(BUCKETS - 1);
        let micros = ((bucket + 1) as f64 / BUCKETS_PER_DOUBLING).exp2();
        Some(Duration::from_secs_f64(micros / 1e6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_quantile_is_within_a_bucket_of_the_truth_and_follows_it() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantile(QUANTILE), None, "nobody knows yet");
        for n in 1..=900 {
            latencies.add(n * MS);
        }
        let found = latencies.quantile(QUANTILE).expect("enough samples");
        assert!((855 * MS..940 * MS).contains(&found), "{found:?}");
        for _ in 0..10_000 {
            latencies.add(2 * MS);
        }
        let found = latencies.quantile(QUANTILE).expect("enough samples");
        assert!((2 * MS..3 * MS).contains(&found), "{found:?}");
        latencies.add(Duration::ZERO);
        latencies.add(Duration::MAX);
    }

    #[test]
    fn at_most_two_of_a_hundred_reads_are_hedged() {
        let hedging = Hedging::default();
        let mut paid = 0u32;
        for _ in 0..10_000 {
            hedging.begin();
            paid += u32::from(hedging.pay());
        }
        assert_eq!(paid, 200);
        for _ in 0..10_000 {
            hedging.begin();
        }
        let burst = (0..100).filter(|_| hedging.pay()).count();
        assert_eq!(burst, 5, "a long calm saves up for no more");
    }

    #[test]
    fn fast_reads_are_never_waited_for_less_than_the_floor() {
        let hedging = Hedging::default();
        assert_eq!(hedging.begin(), None);
        for _ in 0..100 {
            hedging.measured(Duration::from_micros(90));
        }
        assert_eq!(hedging.begin(), Some(DELAY_MIN));
    }
}

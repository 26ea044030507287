//! Owns the counting: operations, latencies, errors by kind. Does not know where they come from, and
//! does not print (see `report`).

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest latency that is told apart, in microseconds: beyond every timeout.
const LATENCY_MAX_US: u64 = 120_000_000;

/// What operations of one kind did.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Operations that were answered as they should.
    pub ok: u64,
    /// The others, by what went wrong.
    pub errors: BTreeMap<String, u64>,
    /// In microseconds, of all of them.
    latencies: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Tally {
        let latencies = Histogram::new_with_max(LATENCY_MAX_US, 3);
        Tally {
            ok: 0,
            errors: BTreeMap::new(),
            latencies: latencies.expect("the bounds are constants that it takes"),
        }
    }
}

impl Tally {
    /// Counts an operation.
    pub fn note(&mut self, latency: Duration, error: Option<String>) {
        self.note_many(latency, 1, error);
    }

    /// Counts operations that went in one call.
    pub fn note_many(&mut self, latency: Duration, count: u64, error: Option<String>) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.latencies.saturating_record_n(us, count);
        match error {
            None => self.ok += count,
            Some(error) => *self.errors.entry(error).or_default() += count,
        }
    }

    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Tally) {
        self.ok += other.ok;
        for (error, count) in &other.errors {
            *self.errors.entry(error.clone()).or_default() += count;
        }
        let added = self.latencies.add(&other.latencies);
        added.expect("both have the same bounds");
    }

    /// Operations, failed ones included.
    pub fn operations(&self) -> u64 {
        self.latencies.len()
    }

    /// The latency that this share of the operations did not pass, to three digits.
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.latencies.value_at_quantile(quantile))
    }

    /// The longest latency, to three digits.
    pub fn max(&self) -> Duration {
        Duration::from_micros(self.latencies.max())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_three_digits() {
        let mut tally = Tally::default();
        // Not in order: 1 to 10,000 µs.
        (0..10_000_u64)
            .for_each(|n| tally.note(Duration::from_micros(n * 7_919 % 10_000 + 1), None));
        for (quantile, us) in [(0.5, 5_000_u64), (0.99, 9_900), (0.999, 9_990), (1.0, 10_000)] {
            let found = tally.quantile(quantile).as_micros() as u64;
            assert!(found.abs_diff(us) <= us / 1_000, "{quantile}: {found}, not {us}");
        }
        assert!(tally.max().as_micros().abs_diff(10_000) <= 10);
        assert_eq!((tally.ok, tally.operations()), (10_000, 10_000));
    }

    #[test]
    fn tallies_add_up() {
        let mut all = Tally::default();
        for ms in [1, 3] {
            let mut one = Tally::default();
            one.note_many(Duration::from_millis(ms), 10, None);
            one.note(Duration::from_millis(ms), Some("x".to_owned()));
            all.add(&one);
        }
        assert_eq!((all.ok, all.operations(), all.errors["x"]), (20, 22, 2));
        assert!(all.quantile(0.4) < Duration::from_millis(2));
        assert!(all.quantile(0.6) > Duration::from_millis(2));
    }

    #[test]
    fn failures_are_counted_by_kind_and_have_latencies() {
        let mut tally = Tally::default();
        tally.note(Duration::from_millis(1), None);
        for _ in 0..2 {
            tally.note(Duration::from_secs(5), Some("TimedOut".to_owned()));
        }
        // Longer than anything that can be told apart.
        tally.note(Duration::from_secs(1_000_000), Some("Closed".to_owned()));
        assert_eq!((tally.ok, tally.operations()), (1, 4));
        assert_eq!(tally.errors["TimedOut"], 2);
        assert!(tally.quantile(0.75) >= Duration::from_secs(4));
        assert!(tally.max() >= Duration::from_secs(119));
    }
}

//! Figures from real processes. Owns the load that they share and how figures are summed up.

pub mod exactly_once;
pub mod failover;
pub mod load;
pub mod reads;
mod reads_bounded;
mod reads_judge;
mod reads_rate;
mod reads_sessions;
pub mod reclaim;
mod reclaim_keys;
pub mod memory;
pub mod saturation;
pub mod scan_load;
pub mod scan_reader;
pub mod scan;
pub mod attempts;
pub mod mixed;
pub mod moves;
pub mod elastic;
mod steps_work;
pub mod steps;
pub mod foretold;
pub mod hot;
pub mod lost;

use std::time::Duration;

/// What is told of many durations.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Quantiles {
    /// Half are shorter.
    pub p50: Duration,
    /// 99 of 100 are shorter.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

impl Quantiles {
    /// Of these; zeros where there are none.
    pub fn of(durations: &[Duration]) -> Quantiles {
        let mut sorted = durations.to_vec();
        sorted.sort_unstable();
        let at = |share: f64| {
            // The nearest rank: of 100 the 99th, never one that was not measured.
            let rank = (share * sorted.len() as f64).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Quantiles { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl std::fmt::Display for Quantiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |duration: Duration| duration.as_secs_f64() * 1_000.0;
        write!(
            f,
            "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
            ms(self.p50),
            ms(self.p99),
            ms(self.max)
        )
    }
}

/// Runs a measurement on a runtime of its own.
fn block_on(run: impl Future<Output = Result<bool, String>>) -> Result<bool, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| format!("a runtime: {error}"))?.block_on(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_durations_that_were_measured() {
        let all: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        let of = Quantiles::of(&all);
        assert_eq!([of.p50, of.p99, of.max].map(|at| at.as_millis()), [50, 99, 100]);
        assert_eq!(Quantiles::of(&[]), Quantiles::default());
        let one = Quantiles::of(&all[..1]);
        assert_eq!([one.p50, one.p99, one.max].map(|at| at.as_millis()), [100; 3]);
    }
}

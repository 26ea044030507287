//! Owns the moments at which operations are due when their rate is fixed, and from when on a latency
//! counts. Pure: the clock is the caller's.

use std::time::Duration;

use tokio::time::Instant;

/// Waking up this much late is the timer's granularity and the load's own scheduling, and no wait
/// for the service. Beyond it the load itself is overloaded, which must show.
const TIMER_SLACK: Duration = Duration::from_millis(2);

/// How long after the beginning the `number`th operation (from 0) is due, at `rate` per second.
///
/// Exact for each number, so that nothing drifts over a long run.
pub fn offset(number: u64, rate: u64) -> Duration {
    assert!(rate > 0, "a closed loop has no schedule");
    let nanos = u128::from(number) * 1_000_000_000 / u128::from(rate);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// From when on the latency of an operation counts that was `due` and that a caller began `now`.
///
/// From when it was due: a caller that was held up by the operation before must not hide that
/// (coordinated omission). Only one that `slept` until it was due, and was woken late, begins now.
pub fn counted_from(due: Instant, now: Instant, slept: bool) -> Instant {
    if slept && now.saturating_duration_since(due) <= TIMER_SLACK { now } else { due }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_exact_and_never_drifts() {
        assert_eq!(offset(0, 3), Duration::ZERO);
        assert_eq!(offset(1, 4), Duration::from_millis(250));
        // A hundred days of a rate that no number of nanoseconds divides.
        let days = 100 * 24 * 3_600;
        assert_eq!(offset(3 * days, 3), Duration::from_secs(days));
        assert_eq!(offset(7_001 * days, 7_001), Duration::from_secs(days));
        let gaps = (0..1_000).map(|number| offset(number + 1, 7) - offset(number, 7));
        assert!(gaps.into_iter().all(|gap| gap.as_nanos().abs_diff(142_857_142) <= 1));
    }

    #[test]
    fn only_the_timer_is_forgiven() {
        let due = Instant::now();
        let late = |ms| due + Duration::from_millis(ms);
        assert_eq!(counted_from(due, late(1), true), late(1));
        assert_eq!(counted_from(due, late(3), true), due);
        assert_eq!(counted_from(due, late(1), false), due, "it was held up by another operation");
    }
}

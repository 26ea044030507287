//! Owns the retry budget: a token bucket shared by all calls of a client, which keeps retries a
//! fraction of the traffic when the cluster is overloaded. Does not decide what a retry is or
//! whether it must be paid for (see `retry`).

use parking_lot::Mutex;
use tokio::time::{Duration, Instant};

/// Tokens that a full bucket holds. Absorbs the burst when one node of a busy cluster stumbles;
/// beyond it, calls that may stop do stop and report what they met.
const CAPACITY: f64 = 500.0;

/// Tokens that each first attempt earns: in the long run at most one paid retry per five calls.
const EARNED_BY_CALL: f64 = 0.2;

/// Tokens per second that come in by themselves, so that a client with little traffic can always
/// retry a little.
const EARNED_BY_SECOND: f64 = 10.0;

/// The bucket. Starts full.
///
/// Invariants:
/// - `0 <= tokens <= CAPACITY`.
#[derive(Debug)]
pub(crate) struct Budget {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: f64,
    refilled_at: Instant,
}

impl Budget {
    pub(crate) fn new(now: Instant) -> Budget {
        Budget { state: Mutex::new(State { tokens: CAPACITY, refilled_at: now }) }
    }

    /// A call makes its first attempt.
    pub(crate) fn earn(&self, now: Instant) {
        let mut state = self.state.lock();
        state.refill(now);
        state.tokens = (state.tokens + EARNED_BY_CALL).min(CAPACITY);
    }

    /// Whether a paid retry is possible now.
    pub(crate) fn has_token(&self, now: Instant) -> bool {
        let mut state = self.state.lock();
        state.refill(now);
        state.tokens >= 1.0
    }

    /// Pays for one retry. The bucket never goes below zero: retries that must go on regardless
    /// (of a write whose outcome is unknown) take what is there.
    pub(crate) fn spend(&self, now: Instant) {
        let mut state = self.state.lock();
        state.refill(now);
        state.tokens = (state.tokens - 1.0).max(0.0);
        assert!((0.0..=CAPACITY).contains(&state.tokens), "the budget left its bounds");
    }
}

impl State {
    fn refill(&mut self, now: Instant) {
        let elapsed: Duration = now.saturating_duration_since(self.refilled_at);
        self.tokens = (self.tokens + elapsed.as_secs_f64() * EARNED_BY_SECOND).min(CAPACITY);
        self.refilled_at = self.refilled_at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_bucket_runs_dry_and_refills_with_time() {
        let start = Instant::now();
        let budget = Budget::new(start);
        for _ in 0..CAPACITY as usize {
            assert!(budget.has_token(start));
            budget.spend(start);
        }
        assert!(!budget.has_token(start));
        budget.spend(start);
        let later = start + Duration::from_millis(100);
        assert!(budget.has_token(later), "10 tokens a second give one after 100 ms");
        budget.spend(later);
        assert!(!budget.has_token(later));
    }

    #[test]
    fn five_calls_earn_one_retry() {
        let now = Instant::now();
        let budget = Budget::new(now);
        for _ in 0..CAPACITY as usize {
            budget.spend(now);
        }
        for _ in 0..4 {
            budget.earn(now);
        }
        assert!(!budget.has_token(now));
        budget.earn(now);
        budget.earn(now);
        assert!(budget.has_token(now));
    }
}

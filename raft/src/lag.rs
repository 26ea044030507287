//! How far the members of a group are behind its leader: in entries, and in time.
//!
//! Owns the leader's memory of when its log reached which index. Does not know the members: who
//! asks names what a member holds.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Samples that a leader keeps. Beyond: every second one of the older half goes, so that what is long
/// past is known less exactly, and never forgotten. At ten samples a second the newest 25 s are exact.
const SAMPLES_MAX: usize = 512;

/// How far a member is behind its leader.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lag {
    /// Entries of the leader's log that it is not known to hold.
    pub entries: u64,
    /// For how long the first of them has been there, as exact as the samples are; zero when it
    /// holds all that was there at the last sample.
    pub age: Duration,
}

/// When the log of a leader reached which index. Empty on everybody else.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    term: u64,
    /// Rising in both.
    samples: VecDeque<(Instant, u64)>,
}

impl Growth {
    /// Takes down what the log of the leader of a term ends with.
    pub(crate) fn sample(&mut self, now: Instant, term: u64, last_index: u64) {
        if self.term != term {
            self.term = term;
            self.samples.clear();
        }
        if self.samples.back().is_some_and(|(_, index)| *index >= last_index) {
            return;
        }
        if self.samples.len() == SAMPLES_MAX {
            let mut place = 0;
            self.samples.retain(|_| {
                place += 1;
                place > SAMPLES_MAX / 2 || place % 2 == 1
            });
        }
        self.samples.push_back((now, last_index));
    }

    /// This replica leads no more.
    pub(crate) fn forget(&mut self) {
        self.samples.clear();
    }

    /// The lag of a member that holds the log up to `matched`.
    pub(crate) fn lag(&self, now: Instant, last_index: u64, matched: Option<u64>) -> Lag {
        // The first entry has index 0.
        let (held, all) = (matched.map_or(0, |index| index + 1), last_index + 1);
        let entries = all.saturating_sub(held);
        let missing = self.samples.partition_point(|(_, index)| *index < held);
        let since = self.samples.get(missing).filter(|_| entries > 0);
        Lag { entries, age: since.map_or(Duration::ZERO, |(at, _)| now.duration_since(*at)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn lag_is_the_age_of_the_first_missing_entry() {
        let (mut growth, start) = (Growth::default(), Instant::now());
        for (ms, last) in [(0, 10), (100, 10), (200, 15), (300, 20)] {
            growth.sample(at(start, ms), 3, last);
        }
        let now = at(start, 1_000);
        let lag = |matched| {
            let lag = growth.lag(now, 20, matched);
            (lag.entries, lag.age.as_millis())
        };
        assert_eq!(lag(Some(20)), (0, 0));
        assert_eq!(lag(Some(19)), (1, 700));
        assert_eq!(lag(Some(15)), (5, 700));
        assert_eq!(lag(Some(14)), (6, 800));
        assert_eq!(lag(Some(9)), (11, 1_000));
        assert_eq!(lag(None), (21, 1_000));
        // It was appended since the last sample.
        assert_eq!(growth.lag(now, 21, Some(20)), Lag { entries: 1, age: Duration::ZERO });
    }

    #[test]
    fn memory_is_bounded_and_reaches_back_to_the_election() {
        let (mut growth, start) = (Growth::default(), Instant::now());
        for n in 0..100_000 {
            growth.sample(at(start, n * 100), 3, n);
        }
        assert!(growth.samples.len() <= SAMPLES_MAX);
        let now = at(start, 10_000_000);
        let long_ago = growth.lag(now, 99_999, None).age;
        assert_eq!(long_ago, Duration::from_secs(10_000), "the first sample is kept");
        let lately = growth.lag(now, 99_999, Some(99_899)).age;
        assert_eq!(lately, Duration::from_secs(10), "the newest are exact");
        growth.sample(now, 4, 99_999);
        let after = growth.lag(at(now, 50), 99_999, None).age;
        assert_eq!(after, Duration::from_millis(50), "a new term begins anew");
    }
}

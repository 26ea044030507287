//! What reads may return, by what the harness itself has seen: a session never goes back and reads its
//! own writes; a bounded read lacks nothing older than its bound. Owns both judgements. Does not read.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// One session: what it wrote last, and the newest that it has seen, key by key. Values only rise.
#[derive(Debug, Default)]
pub(super) struct Session {
    seen: BTreeMap<String, u64>,
    written: BTreeMap<String, u64>,
}

impl Session {
    /// A write of this session was acknowledged.
    pub(super) fn wrote(&mut self, key: &str, value: u64) {
        self.written.insert(key.to_owned(), value);
    }

    /// A read of this session has returned this. What is wrong with it, if anything is.
    pub(super) fn read(&mut self, key: &str, value: u64) -> Option<String> {
        let seen = self.seen.get(key).copied().unwrap_or_default();
        let written = self.written.get(key).copied().unwrap_or_default();
        self.seen.insert(key.to_owned(), value.max(seen));
        if value < written {
            return Some(format!("{key}: read {value} after its own write of {written}"));
        }
        (value < seen).then(|| format!("{key}: read {value} after it had read {seen}"))
    }
}

/// When which value of one key was acknowledged: 1, 2, 3 and so on.
#[derive(Debug, Default)]
pub(super) struct Ticks {
    acknowledged: Vec<Instant>,
}

impl Ticks {
    /// The next value was acknowledged.
    pub(super) fn push(&mut self, now: Instant) {
        self.acknowledged.push(now);
    }

    /// How much older than allowed this is: a read that was begun at `begun` has returned `value`, and
    /// may lack only what was acknowledged less than `bound` before. `None` when nothing is missing.
    pub(super) fn too_old(&self, begun: Instant, value: u64, bound: Duration) -> Option<Duration> {
        let needed = begun.checked_sub(bound)?;
        // The first that it lacks.
        let missing = self.acknowledged.get(value as usize)?;
        needed.checked_duration_since(*missing).filter(|_| *missing < needed)
    }

    /// How old it was: the age of the first value that it lacks.
    pub(super) fn age(&self, begun: Instant, value: u64) -> Duration {
        self.too_old(begun, value, Duration::ZERO).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_session_reads_its_own_writes_and_never_goes_back() {
        let mut session = Session::default();
        assert_eq!(session.read("a", 0), None, "nothing is there yet");
        session.wrote("a", 3);
        assert!(session.read("a", 2).is_some_and(|why| why.contains("own write")));
        assert_eq!(session.read("a", 3), None);
        assert_eq!(session.read("b", 7), None, "another's, newer");
        assert!(session.read("b", 6).is_some_and(|why| why.contains("had read 7")));
        assert!(session.read("b", 6).is_some(), "it does not get used to it");
        assert_eq!(session.read("b", 7), None);
        assert_eq!(Session::default().read("b", 6), None, "another session has not seen it");
    }

    #[test]
    fn a_bounded_read_lacks_only_what_is_younger_than_its_bound() {
        let start = Instant::now() + 1_000 * MS;
        let mut ticks = Ticks::default();
        [0, 10, 20, 30].into_iter().for_each(|at| ticks.push(start + at * MS));
        let too_old = |begun: u32, value| ticks.too_old(start + begun * MS, value, 100 * MS);
        assert_eq!(too_old(130, 4), None, "the newest");
        assert_eq!(too_old(125, 3), None, "the fourth is 95 ms old");
        assert_eq!(too_old(130, 3), None, "and now just as old as allowed");
        assert_eq!(too_old(131, 3), Some(MS));
        assert_eq!(too_old(131, 2), Some(11 * MS), "counted from the first that is missing");
        assert_eq!(too_old(131, 0), Some(31 * MS), "as if the key were absent");
        assert_eq!(too_old(90, 0), None, "nothing is old enough yet");
        assert_eq!(ticks.age(start + 131 * MS, 3), 101 * MS);
        assert_eq!(ticks.age(start + 131 * MS, 4), Duration::ZERO);
    }
}

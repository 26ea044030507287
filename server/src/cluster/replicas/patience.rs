//! How long a replica may take to come, and where none is asked for again so soon.
//!
//! Owns the memory of one controller: what has moved lately, and where it went wrong. A controller that
//! comes after it begins anew, which costs time and nothing else. Does not ask anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

/// A node that answers, and for so long refuses to make a replica, cannot.
const REFUSED_MAX: Duration = Duration::from_secs(30);
/// A joining replica of which nothing was seen to move for so long takes nothing of anybody: others may
/// come meanwhile.
const MOVES_WITHIN: Duration = Duration::from_secs(60);
/// ...and for so long is given up: of a snapshot on its way nothing is seen here before it is installed,
/// and in an hour even a throttled one of 200 GiB arrives.
const STUCK_MAX: Duration = Duration::from_secs(3_600);
/// Before a place where a replica failed is asked again; doubled each time...
const BACKOFF_MIN: Duration = Duration::from_secs(30);
/// ...up to this, after which it is as good as any other.
const BACKOFF_MAX: Duration = Duration::from_secs(1_800);
/// A node that failed so many shards lately is asked for none.
const NODE_FAILURES: usize = 2;

/// Places where no new replica comes for now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Avoided {
    /// For every shard.
    pub(super) nodes: BTreeSet<u64>,
    /// By shard and node.
    pub(super) places: BTreeSet<(u64, u64)>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Patience {
    joining: BTreeMap<u64, Joining>,
    /// By shard and node.
    failed: BTreeMap<(u64, u64), Failed>,
}

#[derive(Debug)]
struct Joining {
    moved: Instant,
    matched: u64,
    refused: Option<Instant>,
}

#[derive(Debug)]
struct Failed {
    times: u32,
    until: Instant,
}

impl Patience {
    /// These are joining: of others nothing is remembered.
    pub(super) fn follow(&mut self, now: Instant, joining: &BTreeSet<u64>) {
        self.joining.retain(|replica, _| joining.contains(replica));
        for replica in joining {
            let new = || Joining { moved: now, matched: 0, refused: None };
            self.joining.entry(*replica).or_insert_with(new);
        }
        self.failed.retain(|_, failed| now < failed.until + BACKOFF_MAX);
    }

    /// A replica holds the log up to there.
    pub(super) fn holds(&mut self, now: Instant, replica: u64, matched: u64) {
        if let Some(joining) = self.joining.get_mut(&replica)
            && joining.matched < matched
        {
            (joining.moved, joining.matched, joining.refused) = (now, matched, None);
        }
    }

    /// A node was asked to make a replica.
    pub(super) fn asked(&mut self, now: Instant, replica: u64, refused: bool) {
        let Some(joining) = self.joining.get_mut(&replica) else { return };
        match refused {
            true => drop(joining.refused.get_or_insert(now)),
            false => (joining.moved, joining.refused) = (now, None),
        }
    }

    /// Those that shall be given up.
    pub(super) fn stuck(&self, now: Instant) -> BTreeSet<u64> {
        self.joining_where(|joining| {
            now.duration_since(joining.moved) >= STUCK_MAX
                || joining.refused.is_some_and(|since| now.duration_since(since) >= REFUSED_MAX)
        })
    }

    /// Those that keep no other from coming.
    pub(super) fn stalled(&self, now: Instant) -> BTreeSet<u64> {
        self.joining_where(|joining| now.duration_since(joining.moved) >= MOVES_WITHIN)
    }

    fn joining_where(&self, wanted: impl Fn(&Joining) -> bool) -> BTreeSet<u64> {
        let found = self.joining.iter().filter(|(_, joining)| wanted(joining));
        found.map(|(replica, _)| *replica).collect()
    }

    /// A replica of a shard was given up on a node. `lost`: it had been there, and may come back at
    /// once where this is the first time.
    pub(super) fn gave_up(&mut self, now: Instant, shard: u64, node: u64, lost: bool) {
        let new = Failed { times: 0, until: now };
        let failed = self.failed.entry((shard, node)).or_insert(new);
        let doublings = if lost { failed.times.checked_sub(1) } else { Some(failed.times) };
        failed.times += 1;
        let wait = doublings.map(|times| BACKOFF_MIN.saturating_mul(1 << times.min(10)));
        failed.until = now + wait.unwrap_or_default().min(BACKOFF_MAX);
    }

    /// Where nothing new comes for now.
    pub(super) fn avoided(&self, now: Instant) -> Avoided {
        let failed = self.failed.iter().filter(|(_, failed)| now < failed.until);
        let places: BTreeSet<(u64, u64)> = failed.map(|(place, _)| *place).collect();
        let mut shards: BTreeMap<u64, usize> = BTreeMap::new();
        places.iter().for_each(|(_, node)| *shards.entry(*node).or_default() += 1);
        let nodes = shards.into_iter().filter(|(_, shards)| *shards >= NODE_FAILURES);
        Avoided { nodes: nodes.map(|(node, _)| node).collect(), places }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    fn set(replicas: &[u64]) -> BTreeSet<u64> {
        replicas.iter().copied().collect()
    }

    #[test]
    fn one_whose_node_refuses_is_given_up_soon_and_one_that_moves_never() {
        let (mut patience, start) = (Patience::default(), Instant::now());
        patience.follow(start, &set(&[1, 2, 3]));
        for second in (0..5_000).step_by(10) {
            let now = at(start, second);
            patience.follow(now, &set(&[1, 2, 3]));
            patience.asked(now, 1, true);
            patience.holds(now, 2, second);
            let (stuck, stalled) = (patience.stuck(now), patience.stalled(now));
            assert_eq!(stuck.contains(&1), second >= 30, "{second}");
            assert_eq!(stalled.contains(&3), second >= 60, "{second}");
            assert_eq!(stuck.contains(&3), second >= 3_600, "{second}");
            assert!(!stuck.contains(&2) && !stalled.contains(&2), "{second}");
        }
        let now = at(start, 5_000);
        patience.asked(now, 1, false);
        assert_eq!(patience.stuck(now), set(&[3]), "its node has made it in the end");
        patience.follow(now, &set(&[2]));
        assert_eq!(patience.stuck(now), set(&[]));
    }

    #[test]
    fn a_place_that_fails_again_waits_longer_and_others_do_not() {
        let (mut patience, start) = (Patience::default(), Instant::now());
        patience.gave_up(start, 7, 4, false);
        assert_eq!(patience.avoided(at(start, 29)).places, [(7, 4)].into());
        assert_eq!(patience.avoided(at(start, 29)).nodes, set(&[]));
        assert_eq!(patience.avoided(at(start, 30)), Avoided::default());
        patience.gave_up(at(start, 100), 7, 4, false);
        assert_eq!(patience.avoided(at(start, 159)).places.len(), 1);
        assert_eq!(patience.avoided(at(start, 160)), Avoided::default());
        patience.gave_up(at(start, 200), 8, 4, false);
        patience.gave_up(at(start, 201), 9, 4, false);
        assert_eq!(patience.avoided(at(start, 202)).nodes, set(&[4]), "it fails whoever comes");
        for time in 0..40 {
            patience.gave_up(at(start, 300 + time), 7, 4, false);
        }
        assert_eq!(patience.avoided(at(start, 340 + 1_800)), Avoided::default(), "at most so long");
        patience.follow(at(start, 10_000), &set(&[]));
        patience.gave_up(at(start, 10_000), 7, 4, false);
        assert_eq!(patience.avoided(at(start, 10_030)), Avoided::default(), "long forgotten");
    }

    #[test]
    fn what_was_lost_comes_back_at_once_but_not_again_and_again() {
        let (mut patience, start) = (Patience::default(), Instant::now());
        patience.gave_up(start, 7, 4, true);
        assert_eq!(patience.avoided(start), Avoided::default());
        patience.gave_up(at(start, 60), 7, 4, true);
        assert_eq!(patience.avoided(at(start, 61)).places, [(7, 4)].into());
        assert_eq!(patience.avoided(at(start, 90)), Avoided::default());
    }
}

//! Owns what is known of how near each node is, and the order in which the replicas of a shard are
//! asked for a read that any of them may serve. Does not ask, and does not know who is down.
//!
//! The order: not those that have just failed; then the client's own zone; then the lowest latency,
//! where what differs little counts as equal, and among equals the followers, in turn, before the
//! leader, which has the writes to do. Now and then a replica that has not been asked for a while goes
//! first, so that one that has become fast again is found.

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_proto::limits::NODES_MAX;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::topology::{NodeId, ShardId};

/// Latencies that differ by less than this, or by less than half of the lowest, are equal: less than
/// what the load of one moment makes of them.
const EQUAL_WITHIN: Duration = Duration::from_micros(500);

/// How fast the past fades from a node's latency.
const MEMORY: Duration = Duration::from_secs(1);

/// What a new sample counts for at least, however short the time since the last.
const WEIGHT_MIN: f64 = 0.05;

/// A replica that was not measured for so long may be tried first.
const UNMEASURED_AFTER: Duration = Duration::from_secs(1);

/// And is, by one of so many reads.
const EXPLORED_BY: f64 = 1.0 / 16.0;

/// How long a replica that failed, or was too stale, is left to others: some times as long as a replica
/// waits to catch up, so that most reads do not wait for one that does not.
const PENALTY: Duration = Duration::from_secs(1);

/// Penalties that are kept. Beyond: a new one is not taken, and the replica is asked again sooner.
const PENALTIES_MAX: usize = 1_024;

/// What is known of the nodes.
#[derive(Debug, Default)]
pub(crate) struct Near {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    latencies: BTreeMap<NodeId, Latency>,
    penalties: BTreeMap<(ShardId, NodeId), Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Latency {
    seconds: f64,
    /// The first answer, which may have waited for the connection, tells nothing.
    is_first: bool,
    measured_at: Instant,
}

/// A replica that may answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replica {
    pub(crate) node: NodeId,
    /// It is in the client's zone, or the client has none.
    pub(crate) is_in_zone: bool,
    pub(crate) leads: bool,
}

/// The same, with what was found out about it.
#[derive(Clone, Copy, Debug)]
struct Known {
    replica: Replica,
    latency: Option<Duration>,
    is_unmeasured: bool,
    is_penalised: bool,
}

impl Near {
    /// Takes note of how long a node took; of one that was not waited for to the end, how long at
    /// least.
    pub(crate) fn measured(&self, node: NodeId, took: Duration, now: Instant) {
        let mut state = self.state.lock();
        if state.latencies.len() >= NODES_MAX && !state.latencies.contains_key(&node) {
            return;
        }
        let sample = took.as_secs_f64();
        let Some(latency) = state.latencies.get_mut(&node) else {
            let first = Latency { seconds: sample, is_first: true, measured_at: now };
            state.latencies.insert(node, first);
            return;
        };
        if std::mem::take(&mut latency.is_first) {
            latency.seconds = sample;
        }
        let since = now.saturating_duration_since(latency.measured_at);
        let fresh = 1.0 - (-since.as_secs_f64() / MEMORY.as_secs_f64()).exp();
        latency.seconds += (sample - latency.seconds) * fresh.max(WEIGHT_MIN);
        latency.measured_at = now;
    }

    /// Takes note that the node could not answer for the shard.
    pub(crate) fn failed(&self, shard: ShardId, node: NodeId, now: Instant) {
        let mut state = self.state.lock();
        state.penalties.retain(|_, until| *until > now);
        if state.penalties.len() < PENALTIES_MAX {
            state.penalties.insert((shard, node), now + PENALTY);
        }
    }

    /// The replicas in the order in which they are to be asked. `turn` deals out among equals;
    /// `chance`, uniform in `[0, 1)`, decides whether one is explored.
    pub(crate) fn order(
        &self,
        shard: ShardId,
        replicas: &[Replica],
        turn: usize,
        chance: f64,
        now: Instant,
    ) -> Vec<NodeId> {
        let state = self.state.lock();
        let known = |replica: &Replica| {
            let latency = state.latencies.get(&replica.node).filter(|known| !known.is_first);
            let since = latency.map(|known| now.saturating_duration_since(known.measured_at));
            let until = state.penalties.get(&(shard, replica.node));
            Known {
                replica: *replica,
                latency: latency.map(|known| Duration::from_secs_f64(known.seconds.max(0.0))),
                is_unmeasured: since.is_none_or(|since| since >= UNMEASURED_AFTER),
                is_penalised: until.is_some_and(|until| *until > now),
            }
        };
        let mut all: Vec<Known> = replicas.iter().map(known).collect();
        drop(state);
        let count = all.len().max(1);
        all.rotate_left(turn % count);
        ordered(all, chance)
    }
}

/// See the module.
fn ordered(all: Vec<Known>, chance: f64) -> Vec<NodeId> {
    let group = |known: &Known| (known.is_penalised, !known.replica.is_in_zone);
    let Some(first) = all.iter().map(group).min() else { return Vec::new() };
    // Equal are those near the best of their own group; whoever is not measured may be as good.
    let best = |wanted| {
        let same = all.iter().filter(|known| group(known) == wanted);
        same.filter_map(|known| known.latency).min().unwrap_or_default()
    };
    let rank = |known: &Known| {
        let best = best(group(known));
        let equal = best + (best / 2).max(EQUAL_WITHIN);
        let beyond = known.latency.filter(|latency| *latency > equal).unwrap_or_default();
        (group(known), beyond, known.replica.leads)
    };
    let ranks: Vec<_> = all.iter().map(rank).collect();
    let explored = |known: &Known| group(known) == first && known.is_unmeasured;
    let mut places: Vec<usize> = (0..all.len()).collect();
    places.sort_by_key(|place| ranks[*place]);
    // The last of them in the order: the others come first anyway sooner.
    if chance < EXPLORED_BY
        && let Some(at) = places.iter().rposition(|place| explored(&all[*place]))
    {
        let place = places.remove(at);
        places.insert(0, place);
    }
    places.into_iter().map(|place| all[place].replica.node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(1);
    const MS: Duration = Duration::from_millis(1);
    const NEVER: f64 = 0.9;

    fn replica(node: u64, is_in_zone: bool, leads: bool) -> Replica {
        Replica { node: NodeId(node), is_in_zone, leads }
    }

    fn three() -> [Replica; 3] {
        [replica(1, true, true), replica(2, true, false), replica(3, true, false)]
    }

    fn order(near: &Near, replicas: &[Replica], turn: usize, now: Instant) -> Vec<u64> {
        let order = near.order(SHARD, replicas, turn, NEVER, now);
        order.into_iter().map(|node| node.0).collect()
    }

    fn measure(near: &Near, node: NodeId, took: Duration, now: Instant) {
        // The first tells nothing.
        near.measured(node, took, now);
        near.measured(node, took, now);
    }

    #[test]
    fn among_equals_the_followers_take_turns_and_the_leader_is_last() {
        let (near, now) = (Near::default(), Instant::now());
        assert_eq!(order(&near, &three(), 0, now), [2, 3, 1]);
        assert_eq!(order(&near, &three(), 1, now), [2, 3, 1]);
        assert_eq!(order(&near, &three(), 2, now), [3, 2, 1]);
        measure(&near, NodeId(1), 10 * MS, now);
        measure(&near, NodeId(2), 14 * MS, now);
        measure(&near, NodeId(3), 12 * MS, now);
        assert_eq!(order(&near, &three(), 2, now), [3, 2, 1], "so little makes no difference");
    }

    #[test]
    fn the_own_zone_goes_first_then_the_lowest_latency() {
        let (near, now) = (Near::default(), Instant::now());
        let replicas = [replica(1, true, true), replica(2, false, false), replica(3, false, false)];
        measure(&near, NodeId(1), 50 * MS, now);
        measure(&near, NodeId(2), 9 * MS, now);
        measure(&near, NodeId(3), 2 * MS, now);
        assert_eq!(order(&near, &replicas, 0, now), [1, 3, 2], "even its leader");
        assert_eq!(order(&near, &three(), 0, now), [3, 2, 1]);
        measure(&near, NodeId(1), MS, now + 10 * MEMORY);
        measure(&near, NodeId(3), 9 * MS, now + 10 * MEMORY);
        assert_eq!(order(&near, &three(), 0, now)[0], 1, "a leader that is much nearer");
    }

    #[test]
    fn who_has_just_failed_goes_last_for_a_while() {
        let (near, now) = (Near::default(), Instant::now());
        near.failed(SHARD, NodeId(2), now);
        assert_eq!(order(&near, &three(), 0, now), [3, 1, 2]);
        let other = near.order(ShardId(2), &three(), 0, NEVER, now);
        assert_eq!(other[0], NodeId(2), "only of that shard");
        assert_eq!(order(&near, &three(), 0, now + PENALTY), [2, 3, 1]);
    }

    #[test]
    fn who_was_not_measured_for_long_is_tried_now_and_then() {
        let (near, now) = (Near::default(), Instant::now());
        measure(&near, NodeId(1), MS, now);
        measure(&near, NodeId(2), MS, now);
        measure(&near, NodeId(3), 80 * MS, now);
        let first = |chance, now| near.order(SHARD, &three(), 0, chance, now)[0];
        assert_eq!(first(0.0, now), NodeId(2), "all were measured");
        let later = now + UNMEASURED_AFTER;
        measure(&near, NodeId(1), MS, later);
        measure(&near, NodeId(2), MS, later);
        assert_eq!(first(NEVER, later), NodeId(2));
        assert_eq!(first(0.0, later), NodeId(3));
        for _ in 0..3 {
            measure(&near, NodeId(3), MS, later + 10 * MEMORY);
        }
        assert_eq!(order(&near, &three(), 2, later), [3, 2, 1], "fast again");
    }
}

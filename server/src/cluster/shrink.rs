//! Which neighbours become one by themselves: small and idle for long, and more than anybody asked for.
//!
//! Owns the choice, and how long is long. Asks nobody. It takes back what `grow` has done when it is
//! needed no more: below the number of shards that the cluster was made with, and its operators split
//! off, nothing is merged.

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_proto::v1;
use coracle_raft::group::MERGE_BYTES_MAX;
use tokio::time::Instant;

use super::knowledge::Knowledge;
use super::reshape::are_neighbours;
use crate::records::Snapshot;

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long two shards have to be small and idle: the hours of a day come and go, and a split that is
/// needed again costs more than a shard that is there.
const QUIET_FOR: Duration = Duration::from_secs(3_600);
/// Before two that could not be merged are looked at again.
const AGAIN_AFTER: Duration = Duration::from_secs(3_600);
/// Both together are at most such a part of what is split, in bytes and in what there is to do: what was
/// merged must not be split at once.
const PART: u64 = 4;

/// Two neighbours.
type Pair = (u64, u64);

/// What a controller remembers of shards that shrink.
#[derive(Debug, Default)]
pub(super) struct Shrinking {
    looked: Option<Instant>,
    /// Since when they are small and idle.
    quiet: BTreeMap<Pair, Instant>,
    /// When they were not merged.
    refused: BTreeMap<Pair, Instant>,
}

impl Shrinking {
    /// The next two that are to be merged.
    pub(super) fn next(
        &mut self,
        snapshot: &Snapshot,
        known: &Knowledge,
        now: Instant,
    ) -> Option<Pair> {
        if self.looked.is_some_and(|at| now.duration_since(at) < LOOK_INTERVAL) {
            return None;
        }
        self.looked = Some(now);
        let small = small(snapshot, known);
        self.quiet.retain(|pair, _| small.contains_key(pair));
        for pair in small.keys() {
            self.quiet.entry(*pair).or_insert(now);
        }
        self.refused
            .retain(|pair, at| small.contains_key(pair) && now.duration_since(*at) < AGAIN_AFTER);
        // One at a time, as splits.
        let idle = snapshot.operations.active().next().is_none();
        if snapshot.operations.manual || !idle || !known.has_settled(&snapshot.map, now) {
            return None;
        }
        let is_due = |pair: &Pair| {
            let since = self.quiet.get(pair);
            since.is_some_and(|since| now.duration_since(*since) >= QUIET_FOR)
                && !self.refused.contains_key(pair)
        };
        let smallest = small.into_iter().filter(|(pair, _)| is_due(pair));
        smallest.min_by_key(|(_, bytes)| *bytes).map(|(pair, _)| pair)
    }

    /// They were not merged.
    pub(super) fn refused(&mut self, pair: Pair, now: Instant) {
        self.refused.insert(pair, now);
    }
}

/// Neighbours that are small and idle together, and how large; none as long as there are no more shards
/// than were asked for.
fn small(snapshot: &Snapshot, known: &Knowledge) -> BTreeMap<Pair, u64> {
    let ring: Vec<&v1::Shard> = snapshot.map.shards.iter().filter(|shard| shard.id != 0).collect();
    let asked_for = snapshot.operations.shards_asked;
    // Nobody knows, in a cluster that is older than the record.
    if asked_for == 0 || ring.len() as u64 <= asked_for {
        return BTreeMap::new();
    }
    let most_bytes = (snapshot.operations.split_bytes() / PART).min(MERGE_BYTES_MAX);
    let most_load = snapshot.operations.split_load() / PART;
    let pairs = ring.windows(2).filter(|pair| are_neighbours(pair[0], pair[1]));
    let together = pairs.filter_map(|pair| {
        let (left, right) = (pair[0].id, pair[1].id);
        // What nobody has told is not small.
        let bytes = known.bytes.get(&left)?.saturating_add(*known.bytes.get(&right)?);
        let load = known.load(left).saturating_add(known.load(right));
        (bytes <= most_bytes && load <= most_load).then_some(((left, right), bytes))
    });
    together.collect()
}

#[cfg(test)]
mod tests;

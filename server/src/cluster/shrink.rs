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
use super::reshape::{are_neighbours, begin_merge, by_itself};
use crate::records::operations::has_ended;
use crate::records::{Operations, Snapshot};

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long two shards have to be small and idle: the hours of a day come and go, and a split that is
/// needed again costs more than a shard that is there.
const QUIET_FOR: Duration = Duration::from_secs(3_600);
/// Before two that could not be merged are looked at again.
const AGAIN_AFTER: Duration = Duration::from_secs(3_600);
/// The longest of these: it is doubled with each merge of the two that was begun and did not end well.
const AGAIN_MAX: Duration = Duration::from_secs(24 * 3_600);
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
        (now, now_ms): (Instant, u64),
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
                && may_begin(&snapshot.operations, *pair, now_ms).is_some()
        };
        let smallest = small.into_iter().filter(|(pair, _)| is_due(pair));
        smallest.min_by_key(|(_, bytes)| *bytes).map(|(pair, _)| pair)
    }

    /// They were not merged.
    pub(super) fn refused(&mut self, pair: Pair, now: Instant) {
        self.refused.insert(pair, now);
    }
}

/// How often merges of the two that were begun by themselves have failed, or were cancelled, one after the
/// other, where the last was long enough ago; `None`: they are to wait. By the records: whoever leads next
/// knows as well, and an operator who cancels one is heeded for a while.
pub(super) fn may_begin(operations: &Operations, pair: Pair, now_ms: u64) -> Option<u32> {
    let same = |known: &&v1::ClusterOperation| {
        let merge = known.merge.as_ref();
        merge.is_some_and(|merge| merge.automatic && (merge.left, merge.right) == pair)
    };
    let Some(last) = operations.list.iter().rev().find(same) else { return Some(0) };
    if !has_ended(last.state()) {
        return None;
    }
    if last.state() == v1::OperationState::Done {
        return Some(0);
    }
    let wait = AGAIN_AFTER.saturating_mul(1 << last.failures.min(16)).min(AGAIN_MAX);
    let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let is_over = now_ms >= last.ended_ms.saturating_add(wait);
    is_over.then(|| last.failures.saturating_add(1))
}

/// Enters the merge of two by itself; the error says why not.
pub(super) fn begin(snapshot: &mut Snapshot, pair: Pair, now_ms: u64) -> Result<u64, String> {
    let failures = may_begin(&snapshot.operations, pair, now_ms);
    let failures = failures.ok_or("a merge of the two was given up not long ago")?;
    let id = begin_merge(snapshot, pair, 0, now_ms)?;
    by_itself(snapshot, id, true);
    let begun = snapshot.operations.list.iter_mut().find(|known| known.id == id);
    begun.into_iter().for_each(|begun| begun.failures = failures);
    Ok(id)
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

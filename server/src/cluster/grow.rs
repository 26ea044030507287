//! Which shard is split by itself, and where: what is large, and what has much to do for long.
//!
//! Owns the choice, and how long is long. Asks nobody. A shard that is busy because of one key, or one
//! entity, is left alone: no split helps it.

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_proto::{peer, v1};
use tokio::time::Instant;
use v1::SplitBy;

use super::knowledge::Knowledge;
use crate::records::Snapshot;

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long a shard has to be busy before it is split.
const BUSY_FOR: Duration = Duration::from_secs(60);
/// Before what could not be split is looked at again.
const AGAIN_AFTER: Duration = Duration::from_secs(300);
/// A busy shard has so many times the mean of all to do.
const BUSY_MEANS: u64 = 2;
/// It is split only where nodes differ: its leader's has so many hundredths of a node's mean to do.
const UNEVEN_PERCENT: u64 = 120;
/// The larger part of a split by load has at most so many hundredths of it.
const PART_MAX_PERCENT: u128 = 80;

/// What a controller remembers of shards that grow.
#[derive(Debug, Default)]
pub(super) struct Growing {
    looked: Option<Instant>,
    /// By shard: since when it is busy.
    busy: BTreeMap<u64, Instant>,
    /// By shard: why it was not split, and when.
    refused: BTreeMap<u64, (String, Instant)>,
}

impl Growing {
    /// The next shard that is to be split, and by what.
    pub(super) fn next(
        &mut self,
        snapshot: &Snapshot,
        known: &Knowledge,
        now: Instant,
    ) -> Option<(v1::Shard, SplitBy)> {
        if self.looked.is_some_and(|at| now.duration_since(at) < LOOK_INTERVAL) {
            return None;
        }
        self.looked = Some(now);
        let busy = busy(snapshot, known);
        self.busy.retain(|shard, _| busy.contains(shard));
        for shard in busy {
            self.busy.entry(shard).or_insert(now);
        }
        let is_shard = |id: &u64| snapshot.map.shards.iter().any(|shard| shard.id == *id);
        self.refused
            .retain(|shard, (_, at)| is_shard(shard) && now.duration_since(*at) < AGAIN_AFTER);
        // One at a time: what one split makes of loads and sizes is seen before the next.
        let idle = snapshot.operations.active().next().is_none();
        if snapshot.operations.manual || !idle || !known.has_settled(&snapshot.map, now) {
            return None;
        }
        let free = |shard: &&v1::Shard| shard.id != 0 && !self.refused.contains_key(&shard.id);
        let mut shards: Vec<&v1::Shard> = snapshot.map.shards.iter().filter(free).collect();
        shards.sort_by_key(|shard| std::cmp::Reverse(known.load(shard.id)));
        let is_busy = |shard: &v1::Shard| {
            let since = self.busy.get(&shard.id);
            since.is_some_and(|since| now.duration_since(*since) >= BUSY_FOR)
        };
        if let Some(shard) = shards.iter().find(|shard| is_busy(shard)) {
            self.busy.remove(&shard.id);
            return Some(((*shard).clone(), SplitBy::Load));
        }
        let bytes = |shard: &v1::Shard| known.bytes.get(&shard.id).copied().unwrap_or(0);
        let large = shards.into_iter().max_by_key(|shard| bytes(shard))?;
        let is_large = bytes(large) >= snapshot.operations.split_bytes();
        is_large.then(|| (large.clone(), SplitBy::Size))
    }

    /// It was not split.
    pub(super) fn refused(&mut self, shard: u64, why: String, now: Instant) {
        self.refused.insert(shard, (why, now));
    }

    /// What would be split and is not.
    pub(super) fn reasons(&self) -> BTreeMap<u64, String> {
        self.refused.iter().map(|(shard, (why, _))| (*shard, why.clone())).collect()
    }
}

/// Shards with much to do, beside others and by themselves, on nodes that have more to do than others.
fn busy(snapshot: &Snapshot, known: &Knowledge) -> Vec<u64> {
    let shards: Vec<(u64, u64)> = snapshot
        .map
        .shards
        .iter()
        .filter(|shard| shard.id != 0)
        .map(|shard| (shard.id, known.load(shard.id)))
        .collect();
    let all: u64 = shards.iter().fold(0, |sum: u64, (_, load)| sum.saturating_add(*load));
    let mut nodes: BTreeMap<u64, u64> = BTreeMap::new();
    let serving = snapshot.map.nodes.iter().filter(|node| node.state() == v1::NodeState::Active);
    nodes.extend(serving.map(|node| (node.id, 0)));
    for (shard, load) in &shards {
        if let Some(leads) = known.leaders.get(shard).and_then(|node| nodes.get_mut(node)) {
            *leads = leads.saturating_add(*load);
        }
    }
    let count = nodes.len() as u64;
    let uneven = |shard: u64| {
        let leads = known.leaders.get(&shard).and_then(|node| nodes.get(node));
        leads.is_some_and(|leads| leads.saturating_mul(100) > (all / count) * UNEVEN_PERCENT)
    };
    let least = snapshot.operations.split_load();
    let mean = all / (shards.len() as u64).max(1);
    let busy = shards.iter().filter(|(shard, load)| {
        *load >= least && *load >= mean.saturating_mul(BUSY_MEANS) && count > 1 && uneven(*shard)
    });
    busy.map(|(shard, _)| *shard).collect()
}

/// Where to split, or why not.
pub(super) fn position(
    shard: &v1::Shard,
    points: &peer::SplitPoints,
    by: SplitBy,
) -> Result<u64, String> {
    let at = match by {
        SplitBy::Load => by_load(shard, &points.load)?,
        SplitBy::Size | SplitBy::Unspecified => points.by_size.ok_or_else(|| {
            format!("s{} holds too few keys to find its middle, or only one entity", shard.id)
        })?,
    };
    match super::reshape::is_inside(shard, at) {
        true => Ok(at),
        false => Err(format!("the arc of s{} has changed: try again", shard.id)),
    }
}

/// The beginning of a part with as much to do before it as behind it, about.
fn by_load(shard: &v1::Shard, buckets: &[peer::LoadBucket]) -> Result<u64, String> {
    let load = |bucket: &peer::LoadBucket| u128::from(bucket.reads) + u128::from(bucket.writes);
    let all: u128 = buckets.iter().map(load).sum();
    if all == 0 {
        return Err(format!("s{} has had nothing to do lately", shard.id));
    }
    let mut before = 0;
    let mut best: Option<(u128, u64)> = None;
    for bucket in buckets {
        let larger = before.max(all - before);
        let better = best.is_none_or(|(known, _)| larger < known);
        if bucket.start > shard.start && better {
            best = Some((larger, bucket.start));
        }
        before += load(bucket);
    }
    let most = buckets.iter().map(load).max().unwrap_or(0) * 100 / all;
    match best {
        Some((larger, at)) if larger * 100 <= all * PART_MAX_PERCENT => Ok(at),
        _ => Err(format!(
            "{most} % of what s{} has to do is on one narrow part of its arc: one key or entity, that no split divides",
            shard.id
        )),
    }
}

#[cfg(test)]
mod tests;

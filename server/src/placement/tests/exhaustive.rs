//! Small clusters, all of them: no placement that any search finds is better.

use std::collections::{BTreeMap, BTreeSet};

use super::super::model::{Goal, Plan};
use super::worlds::{node, shard, view};
use super::*;

/// How bad a placement is; the part that comes first decides. [`Goal::Balance`]'s order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    /// Replicas that shards lack.
    lacking: usize,
    /// Pairs of a shard's replicas in one zone.
    zones: usize,
    /// Replicas outside of a node's rounded share.
    outside: u64,
    /// The sum over nodes of replicas² ÷ weight, times a common multiple of the weights.
    squares: u64,
    /// Copies.
    moves: usize,
}

/// What weights in these tests divide.
const MULTIPLE: u64 = 3 * 1_000;

/// The one objective: of where replicas stand, and stood.
fn judge(view: &View, settings: &Settings, placed: &[Vec<NodeId>]) -> Score {
    let zones: BTreeMap<NodeId, &str> =
        view.nodes.iter().map(|node| (node.id, node.zone.as_str())).collect();
    let mut score = Score { lacking: 0, zones: 0, outside: 0, squares: 0, moves: 0 };
    let serving = || view.nodes.iter().filter(|node| node.duty == Duty::Serves);
    let mut count: BTreeMap<NodeId, u64> = serving().map(|node| (node.id, 0)).collect();
    for (shard, voters) in view.shards.iter().zip(placed) {
        let good: Vec<NodeId> =
            voters.iter().copied().filter(|node| count.contains_key(node)).collect();
        score.lacking += settings.replicas - good.len();
        for (at, node) in good.iter().enumerate() {
            score.zones += good[..at].iter().filter(|other| zones[other] == zones[node]).count();
            *count.entry(*node).or_default() += 1;
            score.moves += usize::from(shard.voters.iter().all(|seat| seat.node != *node));
        }
    }
    let (all, weights): (u64, u64) =
        (count.values().sum(), serving().map(|node| u64::from(node.weight)).sum());
    for node in serving() {
        let (count, weight) = (count[&node.id], u64::from(node.weight));
        let share = all * weight;
        score.outside += (share / weights).saturating_sub(count);
        score.outside += count.saturating_sub(share.div_ceil(weights));
        score.squares += count * count * (MULTIPLE / weight);
    }
    score
}

pub(super) fn score(view: &View, settings: &Settings, plan: &Plan) -> Option<Score> {
    // Of weights that do not divide nobody asks.
    let placed: Vec<Vec<NodeId>> =
        view.shards.iter().map(|shard| plan.wanted[&shard.id].voters.clone()).collect();
    let odd =
        |node: &NodeView| node.weight == 0 || !MULTIPLE.is_multiple_of(u64::from(node.weight));
    let more = placed.iter().any(|voters| voters.len() > settings.replicas);
    (!view.nodes.iter().any(odd) && !more).then(|| judge(view, settings, &placed))
}

/// All subsets of so many of the nodes.
fn subsets(nodes: &[NodeId], size: usize) -> Vec<Vec<NodeId>> {
    let all = (0..1_u32 << nodes.len()).filter(|set| set.count_ones() as usize == size);
    let pick = |set: u32| {
        let picked = nodes.iter().enumerate().filter(move |(at, _)| set >> at & 1 == 1);
        picked.map(|(_, node)| *node).collect()
    };
    all.map(pick).collect()
}

/// Every list of so many out of the options, in rising order.
fn lists<T: Clone>(options: &[T], length: usize) -> Vec<Vec<T>> {
    if length == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (at, first) in options.iter().enumerate() {
        for mut rest in lists(&options[at..], length - 1) {
            rest.insert(0, first.clone());
            all.push(rest);
        }
    }
    all
}

/// The best score of any placement.
fn least(view: &View, settings: &Settings) -> Score {
    let serving = view.nodes.iter().filter(|node| node.duty == Duty::Serves);
    let serving: Vec<NodeId> = serving.map(|node| node.id).collect();
    let options = subsets(&serving, settings.replicas.min(serving.len()));
    let mut best: Option<Score> = None;
    let mut placed = vec![0_usize; view.shards.len()];
    loop {
        let voters: Vec<Vec<NodeId>> = placed.iter().map(|at| options[*at].clone()).collect();
        let score = judge(view, settings, &voters);
        if best.as_ref().is_none_or(|best| score < *best) {
            best = Some(score);
        }
        let Some(next) = placed.iter().position(|at| *at + 1 < options.len()) else {
            return best.expect("there is one placement at least");
        };
        placed[next] += 1;
        placed[..next].fill(0);
    }
}

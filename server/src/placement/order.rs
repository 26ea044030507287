//! In which order replicas move: from the voters that are to those that are wanted.
//!
//! Owns the pairs of who comes and who goes, their urgency, and that no disk gets too full on the way.
//! A shard never has fewer voters than before or than wanted: who comes, comes first.

use std::collections::{BTreeMap, BTreeSet};

use coracle_proto::shard_map::{NodeId, ShardId};

use super::assignment::Fill;
use super::model::{Duty, Move, Seat, Settings, ShardView, Stall, View, Why};
use super::replicas::{Nodes, disks_full, fill};

/// Moves in order, and where they lead.
pub(super) struct Ordered {
    pub(super) moves: Vec<Move>,
    pub(super) voters: BTreeMap<ShardId, Vec<NodeId>>,
    /// Shards with moves for which no disk has room at any time.
    pub(super) left: BTreeSet<ShardId>,
    pub(super) stall: Option<Stall>,
}

/// Orders what is to be done. Shards that `wanted` does not name stay as they are.
pub(super) fn order(
    view: &View,
    wanted: &BTreeMap<ShardId, Vec<NodeId>>,
    settings: &Settings,
) -> Ordered {
    let nodes = Nodes::of(view);
    let mut queue: Vec<(Move, usize)> = Vec::new();
    let mut voters = BTreeMap::new();
    for shard in &view.shards {
        let now = shard.voters.iter().map(|seat| seat.node);
        voters.insert(shard.id, now.collect::<Vec<NodeId>>());
        let Some(wanted) = wanted.get(&shard.id) else { continue };
        let moves = moves(shard, wanted, &nodes, settings);
        queue.extend(moves.into_iter().zip(0..));
    }
    // A shard is as urgent as the most urgent of its moves: they stay together.
    let mut urgency: BTreeMap<ShardId, Why> = BTreeMap::new();
    for (change, _) in &queue {
        let why = urgency.entry(change.shard).or_insert(change.why);
        *why = change.why.min(*why);
    }
    queue.sort_by_key(|(change, at)| (urgency[&change.shard], *at, change.shard));
    // The nth that comes to a node waits for the nth of every other: none is given all at once.
    let mut nth: BTreeMap<(Why, Option<NodeId>), usize> = BTreeMap::new();
    let mut ranked: Vec<_> = queue
        .into_iter()
        .map(|(change, at)| {
            let why = urgency[&change.shard];
            let nth = nth.entry((why, change.to)).or_default();
            *nth += 1;
            ((why, at, *nth, change.shard), change)
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    let queue = ranked.into_iter().map(|(_, change)| change).collect();
    let sizes = view.shards.iter().map(|shard| (shard.id, shard.bytes)).collect();
    let (moves, left) = fitting(queue, &sizes, &nodes, settings);
    for change in &moves {
        let voters = voters.entry(change.shard).or_default();
        voters.extend(change.to);
        voters.retain(|node| change.from.is_none_or(|from| from.node != *node));
    }
    voters.values_mut().for_each(|voters| voters.sort_unstable());
    let full: BTreeSet<NodeId> = left.iter().filter_map(|change| change.to).collect();
    let left: BTreeSet<ShardId> = left.iter().map(|change| change.shard).collect();
    let full = full.iter().filter_map(|node| nodes.place(*node)).map(|at| nodes.views[at]);
    let stall = (!left.is_empty()).then(|| disks_full(left.len(), full, settings));
    Ordered { moves, voters, left, stall }
}

/// The changes of one shard: additions, then replacements, then removals; its leader goes last.
fn moves(shard: &ShardView, wanted: &[NodeId], nodes: &Nodes, settings: &Settings) -> Vec<Move> {
    let is_voter = |node: &NodeId| shard.voters.iter().any(|seat| seat.node == *node);
    let mut come: Vec<NodeId> = wanted.iter().copied().filter(|node| !is_voter(node)).collect();
    let goes = shard.voters.iter().copied().filter(|seat| !wanted.contains(&seat.node));
    let mut goes: Vec<Seat> = goes.collect();
    goes.sort_by_key(|seat| (shard.leader == Some(seat.node), gone(seat.node, nodes), seat.node));
    let zone = |node: NodeId| nodes.place(node).map(|at| nodes.zones[at]);
    let change = |from: Option<Seat>, to: Option<NodeId>, why| Move {
        shard: shard.id,
        from,
        to,
        hand_over: None,
        bytes: if to.is_some() { shard.bytes } else { 0 },
        why,
    };
    let mut pairs = Vec::new();
    let mut alone = Vec::new();
    for from in goes {
        // In the same zone if it can be: then the shard stands as spread on the way as it will.
        let near = come.iter().position(|to| zone(*to) == zone(from.node));
        match near.or((!come.is_empty()).then_some(0)) {
            Some(at) => {
                let to = come.remove(at);
                let why = match gone(from.node, nodes) {
                    Gone::Lost => Why::Lacking,
                    Gone::Leaves => Why::Leaving,
                    Gone::Chosen if zone(to) == zone(from.node) => Why::Balance,
                    Gone::Chosen => zones_or_balance(shard, wanted, &zone),
                };
                pairs.push(change(Some(from), Some(to), why));
            }
            None => alone.push(change(Some(from), None, Why::Surplus)),
        }
    }
    let short = settings.voters() > shard.voters.len();
    let why = if short { Why::Lacking } else { Why::Balance };
    let come = come.into_iter().map(|to| change(None, Some(to), why));
    come.chain(pairs).chain(alone).collect()
}

/// How a seat came to go; the first goes first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Gone {
    Lost,
    Leaves,
    Chosen,
}

fn gone(node: NodeId, nodes: &Nodes) -> Gone {
    match nodes.duty(node) {
        Duty::Lost => Gone::Lost,
        Duty::Leaves => Gone::Leaves,
        Duty::Serves | Duty::Keeps | Duty::Absent => Gone::Chosen,
    }
}

fn zones_or_balance(
    shard: &ShardView,
    wanted: &[NodeId],
    zone: &impl Fn(NodeId) -> Option<usize>,
) -> Why {
    let pairs = |on: &mut dyn Iterator<Item = NodeId>| -> usize {
        let zones: Vec<_> = on.map(zone).collect();
        let pair = |at: usize| zones[..at].iter().filter(|other| **other == zones[at]).count();
        (0..zones.len()).map(pair).sum()
    };
    let now = pairs(&mut shard.voters.iter().map(|seat| seat.node));
    if pairs(&mut wanted.iter().copied()) < now { Why::Zones } else { Why::Balance }
}

/// The moves in an order in which each fits when its turn comes, and those for which there is none.
fn fitting(
    queue: Vec<Move>,
    sizes: &BTreeMap<ShardId, u64>,
    nodes: &Nodes,
    settings: &Settings,
) -> (Vec<Move>, Vec<Move>) {
    let disks = nodes.views.iter().filter_map(|node| Some((node.id, fill(node, settings)?)));
    let mut disks: BTreeMap<NodeId, Fill> = disks.collect();
    let mut moves = Vec::with_capacity(queue.len());
    let mut waiting = queue;
    loop {
        let mut later = Vec::new();
        let mut held: BTreeSet<ShardId> = BTreeSet::new();
        let before = moves.len();
        for change in waiting {
            let disk = change.to.and_then(|to| disks.get_mut(&to));
            let fits = disk.as_ref().is_none_or(|disk| disk.fits(change.bytes));
            // What a shard does has an order too.
            if held.contains(&change.shard) || !fits {
                held.insert(change.shard);
                later.push(change);
                continue;
            }
            disk.into_iter().for_each(|disk| disk.add(change.bytes));
            let left = change.from.and_then(|from| disks.get_mut(&from.node));
            left.into_iter().for_each(|disk| disk.remove(sizes[&change.shard]));
            moves.push(change);
        }
        if later.is_empty() || moves.len() == before {
            return (moves, later);
        }
        waiting = later;
    }
}

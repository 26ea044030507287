//! That there is nothing better: by the whole network of flows, and by counting where that is enough.
//!
//! Every shard, every zone that it can stand in and every node is a vertex here, and distances are found
//! in it without any shortcut (nothing of the search that plans are made with). No cycle of residual edges
//! costs less than nothing exactly when the placement is the best there is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use coracle_proto::shard_map::{NodeId, ShardId};

use super::super::model::{Duty, Goal, ShardView};
use super::{Checker, State, Wrong};

/// Parts of a cost, by rank.
type Cost = [i128; 4];

/// Fractions of seats and weights, rounded: finer than any two that differ.
const FRACTION: u32 = 64;

/// A shard in a network.
struct Flow {
    /// Where it may have a seat.
    may: BTreeSet<NodeId>,
    /// Where a seat is no move.
    home: BTreeSet<NodeId>,
    on: BTreeSet<NodeId>,
    pinned: Vec<NodeId>,
}

struct Network<'a> {
    checker: &'a Checker<'a>,
    flows: Vec<Flow>,
    /// Seats of each node that serves, and those of them that cannot change.
    seats: BTreeMap<NodeId, (u64, u64)>,
    /// Of all seats.
    shares: BTreeMap<NodeId, (u64, u64)>,
    /// Whether zones count.
    zones: bool,
    /// Whether moves count.
    moves: bool,
}

pub(super) fn prove(checker: &Checker, states: &BTreeMap<ShardId, State>) -> Result<(), Wrong> {
    let bytes: u128 = checker.view.shards.iter().map(|shard| u128::from(shard.bytes)).sum();
    let tight = checker
        .nodes
        .values()
        .filter_map(|node| node.disk)
        .any(|disk| u128::from(disk.used) + bytes > u128::from(checker.settings.limit(disk)));
    // What disks have no room for is no choice, and whether it was one depends on the way.
    if !tight {
        let replicas = replicas(checker, states);
        if !replicas.is_best() {
            return Err(Wrong::NotBest { what: "replicas" });
        }
        if counted(checker).is_some_and(|fewest| {
            let fewest = fewest + checker.plan.for_bytes;
            checker.plan.copies() != fewest
                || checker.plan.lower_bound != fewest - checker.plan.for_bytes
        }) {
            return Err(Wrong::Sum { what: "number of moves" });
        }
    }
    led(checker, states)
}

fn replicas<'a>(checker: &'a Checker<'a>, states: &BTreeMap<ShardId, State>) -> Network<'a> {
    let mut bases: BTreeMap<NodeId, u64> = BTreeMap::new();
    let mut flows = Vec::new();
    for state in states.values() {
        let serving = |node: &NodeId| checker.duty(*node) == Duty::Serves;
        if checker.quorum_lost(state.shard) {
            let stay = state.voters.keys().filter(|node| serving(node));
            stay.for_each(|node| *bases.entry(*node).or_default() += 1);
            continue;
        }
        let on = state.voters.keys().copied();
        let pinned = |node: &NodeId| matches!(checker.duty(*node), Duty::Keeps | Duty::Absent);
        flows.push(Flow {
            may: checker.may(state.shard),
            home: state.shard.voters.iter().map(|seat| seat.node).filter(serving).collect(),
            on: on.clone().filter(serving).collect(),
            pinned: on.filter(pinned).collect(),
        });
    }
    // Copies for an even share of bytes come on top of the fewest.
    let moves = checker.plan.for_bytes == 0;
    Network::new(checker, flows, &bases, true, moves)
}

/// Leaders: always where they may be, and the best by count where they go by count.
fn led(checker: &Checker, states: &BTreeMap<ShardId, State>) -> Result<(), Wrong> {
    let mut flows = Vec::new();
    for state in states.values().filter(|state| !checker.quorum_lost(state.shard)) {
        let serving = state.voters.keys().filter(|node| checker.duty(**node) == Duty::Serves);
        let mut may: BTreeSet<NodeId> = serving.copied().collect();
        let liked =
            |node: &NodeId| checker.settings.leader_zones.contains(&checker.nodes[node].zone);
        if may.iter().any(liked) {
            may.retain(liked);
        }
        let leader = checker.plan.wanted[&state.shard.id].leader;
        if !may.is_empty() && !leader.is_some_and(|leader| may.contains(&leader)) {
            return Err(Wrong::Shard { shard: state.shard.id, why: "its leader stands badly" });
        }
        if may.is_empty() {
            continue;
        }
        let home = match checker.leader(state.shard) {
            Some(leader) => BTreeSet::from([leader]),
            None => may.clone(),
        };
        flows.push(Flow { may, home, on: leader.into_iter().collect(), pinned: Vec::new() });
    }
    let load = checker.view.shards.iter().fold(0, |all: u64, shard| all.saturating_add(shard.load));
    let by_count = load <= checker.settings.load_gap.max(1);
    if by_count && !Network::new(checker, flows, &BTreeMap::new(), false, true).is_best() {
        return Err(Wrong::NotBest { what: "leaders" });
    }
    Ok(())
}

impl<'a> Network<'a> {
    fn new(
        checker: &'a Checker<'a>,
        flows: Vec<Flow>,
        bases: &BTreeMap<NodeId, u64>,
        zones: bool,
        moves: bool,
    ) -> Network<'a> {
        let serving = checker.nodes.values().filter(|node| node.duty == Duty::Serves);
        let mut seats: BTreeMap<NodeId, (u64, u64)> = BTreeMap::new();
        for node in serving {
            let base = bases.get(&node.id).copied().unwrap_or(0);
            let on = flows.iter().filter(|flow| flow.on.contains(&node.id)).count() as u64;
            seats.insert(node.id, (base + on, base));
        }
        let weight = |node: &NodeId| u64::from(checker.nodes[node].weight.max(1));
        let all: u64 = seats.values().map(|(seats, _)| seats).sum();
        let weights: u64 = seats.keys().map(weight).sum();
        let share = |node: &NodeId| {
            let share = all * weight(node);
            (*node, (share / weights, share.div_ceil(weights)))
        };
        let shares = seats.keys().map(share).collect();
        Network { checker, flows, seats, shares, zones, moves }
    }

    fn cost(&self, zones: i128, outside: i128, square: i128, moves: i128) -> Cost {
        let moves = if self.moves { moves } else { 0 };
        match self.checker.goal() {
            Goal::Balance => [zones, outside, square, moves],
            Goal::Repair => [moves, zones, outside, square],
        }
    }

    /// What the next seat of a node adds.
    fn next(&self, node: NodeId, seats: u64) -> Cost {
        let (low, high) = self.shares[&node];
        let outside = i128::from(seats >= high) - i128::from(seats < low);
        let weight = i128::from(self.checker.nodes[&node].weight.max(1));
        self.cost(0, outside, (i128::from(2 * seats + 1) << FRACTION) / weight, 0)
    }

    /// Residual edges: from, to, cost. Vertex 0 is the sink, then nodes, then shards and their zones.
    fn edges(&self) -> (usize, Vec<Vec<(usize, Cost)>>) {
        let places: BTreeMap<NodeId, usize> = self.seats.keys().copied().zip(1..).collect();
        let zone = |node: NodeId| self.checker.nodes[&node].zone.as_str();
        let mut edges: Vec<Vec<(usize, Cost)>> = vec![Vec::new(); places.len() + 1];
        for (node, (seats, base)) in &self.seats {
            edges[places[node]].push((0, self.next(*node, *seats)));
            if seats > base {
                edges[0].push((places[node], negated(self.next(*node, seats - 1))));
            }
        }
        for flow in &self.flows {
            let shard = edges.len();
            edges.push(Vec::new());
            let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
            for node in &flow.may {
                let at = *zones.entry(zone(*node)).or_insert(edges.len());
                if at == edges.len() {
                    edges.push(Vec::new());
                }
                let new = self.cost(0, 0, 0, i128::from(!flow.home.contains(node)));
                match flow.on.contains(node) {
                    true => edges[places[node]].push((at, negated(new))),
                    false => edges[at].push((places[node], new)),
                }
            }
            for (zone_of, at) in zones {
                let here = flow.on.iter().filter(|node| zone(**node) == zone_of).count() as i128;
                let pinned = flow.pinned.iter().filter(|node| zone(**node) == zone_of).count();
                let (mut more, mut fewer) = (here + pinned as i128, here + pinned as i128 - 1);
                if !self.zones {
                    (more, fewer) = (0, 0);
                }
                edges[shard].push((at, self.cost(more, 0, 0, 0)));
                if here > 0 {
                    edges[at].push((shard, self.cost(-fewer, 0, 0, 0)));
                }
            }
        }
        (edges.len(), edges)
    }

    /// Whether no cycle costs less than nothing.
    fn is_best(&self) -> bool {
        let (vertices, edges) = self.edges();
        let mut distance: Vec<Cost> = vec![[0; 4]; vertices];
        // Edges of the way to each vertex: as many as there are vertices only by way of a cycle.
        let mut length = vec![0_usize; vertices];
        let mut waits = vec![true; vertices];
        let mut queue: VecDeque<usize> = (0..vertices).collect();
        while let Some(from) = queue.pop_front() {
            waits[from] = false;
            for (to, cost) in &edges[from] {
                let there = sum(distance[from], *cost);
                if there < distance[*to] {
                    distance[*to] = there;
                    length[*to] = length[from] + 1;
                    if length[*to] >= vertices {
                        return false;
                    }
                    if !std::mem::replace(&mut waits[*to], true) {
                        queue.push_back(*to);
                    }
                }
            }
        }
        true
    }
}

fn sum(a: Cost, b: Cost) -> Cost {
    std::array::from_fn(|at| a[at] + b[at])
}

fn negated(cost: Cost) -> Cost {
    cost.map(|part| -part)
}

/// The fewest copies, by counting alone, where nodes and zones are equal: every shard has what it should on
/// nodes that serve, weights are the same, and zones do not matter or all hold as much of each shard.
fn counted(checker: &Checker) -> Option<usize> {
    let (view, replicas) = (checker.view, checker.settings.voters());
    let serving = || view.nodes.iter().filter(|node| node.duty == Duty::Serves);
    let weight = serving().next()?.weight.max(1);
    let whole = |shard: &ShardView| {
        let all = shard.voters.iter().all(|seat| checker.duty(seat.node) == Duty::Serves);
        all && shard.voters.len() == replicas && shard.learners.is_empty()
    };
    let equal = serving().all(|node| node.weight.max(1) == weight);
    if checker.goal() == Goal::Repair || !equal || !view.shards.iter().all(whole) {
        return None;
    }
    let mut zones: BTreeMap<&str, Vec<NodeId>> = BTreeMap::new();
    serving().for_each(|node| zones.entry(node.zone.as_str()).or_default().push(node.id));
    let in_zone = |shard: &ShardView, nodes: &[NodeId]| {
        shard.voters.iter().filter(|seat| nodes.contains(&seat.node)).count()
    };
    let parts: Vec<Vec<NodeId>> = match zones.values().all(|nodes| nodes.len() == 1) {
        // Each a zone of its own.
        true => vec![zones.into_values().flatten().collect()],
        false => {
            let each = replicas / zones.len();
            let even =
                |nodes: &Vec<NodeId>| view.shards.iter().all(|shard| in_zone(shard, nodes) == each);
            if replicas % zones.len() != 0 || !zones.values().all(even) {
                return None;
            }
            zones.into_values().collect()
        }
    };
    let fewest = |nodes: &Vec<NodeId>| {
        let had = |node: &NodeId| {
            let on = |shard: &&ShardView| shard.voters.iter().any(|seat| seat.node == *node);
            view.shards.iter().filter(on).count()
        };
        let had: Vec<usize> = nodes.iter().map(had).collect();
        let all: usize = had.iter().sum();
        let (low, more) = (all / nodes.len(), all % nodes.len());
        let stay: usize = had.iter().map(|had| *had.min(&low)).sum();
        all - stay - more.min(had.iter().filter(|had| **had > low).count())
    };
    Some(parts.iter().map(fewest).sum())
}

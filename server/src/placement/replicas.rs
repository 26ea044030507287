//! Which nodes vote in which shard: what [`super::flow`] and [`super::even`] make of a view.
//!
//! Owns the meaning of duties and settings for voters, the lower bound on copies, and what remains
//! undone. Does not say in which order things happen (see [`super::order`]).

use std::collections::{BTreeMap, BTreeSet};

use coracle_proto::shard_map::{NodeId, ShardId};

use super::assignment::{Assignment, Fill, Item, Place};
use super::even::even_out;
use super::flow::{Proof, settle};
use super::model::{Duty, Goal, NodeView, Settings, ShardView, Stall, View};

/// Voters of every shard.
pub(super) struct Chosen {
    pub(super) voters: BTreeMap<ShardId, Vec<NodeId>>,
    pub(super) lower_bound: usize,
    pub(super) for_bytes: usize,
    pub(super) stalls: Vec<Stall>,
}

/// Voters of a shard, by what becomes of them.
#[derive(Default)]
struct Sorted {
    /// On nodes that serve.
    stays: Vec<usize>,
    /// On nodes where nothing changes.
    kept: Vec<usize>,
    /// On nodes that leave, then on lost ones: the order in which they stay where no other can be.
    goes: Vec<NodeId>,
    /// On nodes that serve, and shall not move this time.
    frozen: Vec<usize>,
    quorum_lost: bool,
}

/// The nodes by id, so that the order of the view does not matter, and their places.
pub(super) struct Nodes<'a> {
    pub(super) views: Vec<&'a NodeView>,
    places: BTreeMap<NodeId, usize>,
    /// Zone of each, as a number.
    pub(super) zones: Vec<usize>,
}

impl<'a> Nodes<'a> {
    pub(super) fn of(view: &'a View) -> Nodes<'a> {
        let mut views: Vec<&NodeView> = view.nodes.iter().collect();
        views.sort_by_key(|node| node.id);
        let zones: BTreeSet<&str> = views.iter().map(|node| node.zone.as_str()).collect();
        let zones: BTreeMap<&str, usize> = zones.into_iter().zip(0..).collect();
        Nodes {
            places: views.iter().enumerate().map(|(at, node)| (node.id, at)).collect(),
            zones: views.iter().map(|node| zones[node.zone.as_str()]).collect(),
            views,
        }
    }

    pub(super) fn place(&self, id: NodeId) -> Option<usize> {
        self.places.get(&id).copied()
    }

    pub(super) fn duty(&self, id: NodeId) -> Duty {
        self.place(id).map_or(Duty::Lost, |at| self.views[at].duty)
    }

    /// The nodes as an assignment has them, without limits.
    pub(super) fn assignable(&self) -> Vec<Place> {
        let place = |(at, node): (usize, &&NodeView)| Place {
            zone: self.zones[at],
            weight: u64::from(node.weight.max(1)),
            open: node.duty == Duty::Serves,
            disk: None,
            base: 0,
        };
        self.views.iter().enumerate().map(place).collect()
    }
}

/// How full a node's disk is, and may get.
pub(super) fn fill(node: &NodeView, settings: &Settings) -> Option<Fill> {
    let disk = node.disk?;
    Some(Fill { used: disk.used, limit: settings.limit(disk) })
}

/// Chooses the voters of every shard. What frozen shards have stays where it may.
pub(super) fn choose(view: &View, settings: &Settings, frozen: &BTreeSet<ShardId>) -> Chosen {
    let nodes = Nodes::of(view);
    let mut shards: Vec<&ShardView> = view.shards.iter().collect();
    shards.sort_by_key(|shard| shard.id);
    let sort = |shard: &&ShardView| {
        let mut sorted = sort(shard, &nodes, settings.voters());
        if frozen.contains(&shard.id) && !sorted.quorum_lost {
            sorted.frozen = std::mem::take(&mut sorted.stays);
            sorted.frozen.truncate(settings.voters());
        }
        sorted
    };
    let sorted: Vec<Sorted> = shards.iter().map(sort).collect();
    let mut places = nodes.assignable();
    for (place, node) in places.iter_mut().zip(&nodes.views) {
        place.disk = fill(node, settings);
    }
    for shard in &sorted {
        let stays: &[usize] = if shard.quorum_lost { &shard.stays } else { &shard.frozen };
        stays.iter().for_each(|node| places[*node].base += 1);
    }
    let items: Vec<Item> = shards
        .iter()
        .zip(&sorted)
        .map(|(shard, sorted)| item(shard, sorted, &nodes, settings.voters()))
        .collect();
    let mut assignment = Assignment::new(places, items, settings.goal, true);
    let proof = settle(&mut assignment);
    assignment.refused |= !frozen.is_empty();
    let lower_bound = lower_bound(&assignment, &proof, settings.goal);
    let fewest = assignment.moved();
    even_out(&mut assignment, settings);
    let mut chosen = Chosen {
        voters: BTreeMap::new(),
        lower_bound,
        for_bytes: assignment.moved().saturating_sub(fewest),
        stalls: Vec::new(),
    };
    for ((shard, sorted), item) in shards.iter().zip(&sorted).zip(&assignment.items) {
        let mut voters: Vec<NodeId> = match sorted.quorum_lost {
            true => shard.voters.iter().map(|seat| seat.node).collect(),
            false => {
                let seats = item.on.iter().chain(&item.pinned);
                seats.map(|node| nodes.views[*node].id).collect()
            }
        };
        // Rather a replica on a node that should have none than one fewer.
        let least = settings.voters().min(shard.voters.len());
        let stay = sorted.goes.iter().filter(|_| !sorted.quorum_lost);
        let missing = least.saturating_sub(voters.len());
        voters.extend(stay.take(missing));
        voters.sort_unstable();
        chosen.voters.insert(shard.id, voters);
    }
    chosen.stalls = stalls(&chosen, &assignment, &shards, &sorted, &nodes, settings);
    chosen
}

/// Whether so many voters are lost that the group cannot change its members.
pub(super) fn quorum_lost(shard: &ShardView, nodes: &Nodes) -> bool {
    let lost = shard.voters.iter().filter(|seat| nodes.duty(seat.node) == Duty::Lost).count();
    lost > 0 && 2 * lost >= shard.voters.len()
}

fn sort(shard: &ShardView, nodes: &Nodes, replicas: usize) -> Sorted {
    let mut sorted = Sorted::default();
    let (mut absent, mut lost) = (Vec::new(), Vec::new());
    let mut voters: Vec<NodeId> = shard.voters.iter().map(|seat| seat.node).collect();
    voters.sort_unstable();
    for voter in voters {
        match (nodes.duty(voter), nodes.place(voter)) {
            (Duty::Serves, Some(at)) => sorted.stays.push(at),
            (Duty::Keeps, Some(at)) => sorted.kept.push(at),
            (Duty::Absent, Some(at)) => absent.push(at),
            (Duty::Leaves, _) => sorted.goes.push(voter),
            _ => lost.push(voter),
        }
    }
    sorted.quorum_lost = quorum_lost(shard, nodes);
    sorted.goes.extend(lost);
    sorted.kept.extend(absent);
    if !sorted.quorum_lost {
        // More than there should be: those go first that nobody can ask.
        sorted.kept.truncate(replicas.saturating_sub(sorted.stays.len()));
    }
    sorted
}

fn item(shard: &ShardView, sorted: &Sorted, nodes: &Nodes, replicas: usize) -> Item {
    let may = |(at, node): (usize, &&NodeView)| {
        let free = !shard.learners.contains(&node.id) || sorted.stays.contains(&at);
        node.duty == Duty::Serves && free && !sorted.quorum_lost && !sorted.frozen.contains(&at)
    };
    let may: Vec<bool> = nodes.views.iter().enumerate().map(may).collect();
    if sorted.quorum_lost {
        let bytes = shard.bytes;
        let load = shard.load;
        return Item { want: 0, home: vec![], pinned: vec![], may, bytes, load, on: vec![] };
    }
    let possible = may.iter().filter(|may| **may).count();
    let pinned = [&sorted.frozen[..], &sorted.kept[..]].concat();
    Item {
        want: replicas.saturating_sub(pinned.len()).min(possible),
        home: sorted.stays.clone(),
        pinned,
        may,
        bytes: shard.bytes,
        load: shard.load,
        on: Vec::new(),
    }
}

/// Copies that any placement needs which is as good by zones and balance. Counted three ways, by nodes
/// that must gain, by seats that cannot stay for counts, and by those that cannot for zones.
fn lower_bound(assignment: &Assignment, proof: &Proof, goal: Goal) -> usize {
    let wanted: usize = assignment.items.iter().map(|item| item.want).sum();
    let kept = |item: &Item| item.home.len().min(item.want);
    let lacking = |item: &Item| item.on.len().saturating_sub(kept(item));
    let least = assignment.items.iter().map(lacking).sum();
    if goal == Goal::Repair || assignment.refused {
        return least;
    }
    let (mut gain, mut stay) = (0, 0);
    for node in (0..assignment.nodes.len()).filter(|node| assignment.nodes[*node].open) {
        let homes = assignment.items.iter().filter(|item| item.home.contains(&node)).count() as u64;
        let (low, high) = proof.seats(assignment, node);
        let base = assignment.nodes[node].base;
        gain += low.saturating_sub(base + homes) as usize;
        stay += homes.min(high - base) as usize;
    }
    let stay_by_zones: usize =
        assignment.items.iter().map(|item| kept_by_zones(item, assignment)).sum();
    least.max(gain).max(wanted - stay.min(wanted)).max(wanted - stay_by_zones)
}

/// The most seats of an item that can stay when it stands in as many zones as it can, evenly.
fn kept_by_zones(item: &Item, assignment: &Assignment) -> usize {
    let zone = |node: usize| assignment.nodes[node].zone;
    let zones = assignment.nodes.iter().map(|node| node.zone + 1).max().unwrap_or(0);
    let mut seats = vec![0_usize; zones];
    let (mut homes, mut free) = (vec![0_usize; zones], vec![0_usize; zones]);
    item.pinned.iter().for_each(|node| seats[zone(*node)] += 1);
    item.home.iter().for_each(|node| homes[zone(*node)] += 1);
    let may = (0..assignment.nodes.len()).filter(|node| item.may[*node]);
    may.for_each(|node| free[zone(node)] += 1);
    let mut kept = 0;
    for _ in 0..item.want {
        let zones = (0..zones).filter(|zone| free[*zone] > 0);
        // The emptiest; of those, one where a seat can stay.
        let Some(zone) = zones.min_by_key(|zone| (seats[*zone], homes[*zone] == 0)) else { break };
        seats[zone] += 1;
        free[zone] -= 1;
        if homes[zone] > 0 {
            homes[zone] -= 1;
            kept += 1;
        }
    }
    kept
}

fn stalls(
    chosen: &Chosen,
    assignment: &Assignment,
    shards: &[&ShardView],
    sorted: &[Sorted],
    nodes: &Nodes,
    settings: &Settings,
) -> Vec<Stall> {
    let lost = shards.iter().zip(sorted).filter(|(_, sorted)| sorted.quorum_lost);
    let mut stalls: Vec<Stall> =
        lost.map(|(shard, _)| Stall::QuorumLost { shard: shard.id }).collect();
    let alive = assignment.items.iter().zip(sorted).filter(|(_, sorted)| !sorted.quorum_lost);
    let possible: Vec<usize> = alive.map(|(item, _)| item.want + item.pinned.len()).collect();
    let few = possible.iter().copied().filter(|possible| *possible < settings.voters());
    if let Some(possible) = few.clone().min() {
        stalls.push(Stall::TooFewNodes {
            wanted: settings.voters(),
            possible,
            shards: few.count(),
        });
    }
    let waiting = (0..assignment.items.len())
        .filter(|item| assignment.items[*item].on.len() < assignment.items[*item].want);
    let waiting: Vec<usize> = waiting.collect();
    if !waiting.is_empty() {
        let full = |node: &usize| {
            waiting
                .iter()
                .any(|item| assignment.admits(*item, *node) && !assignment.fits(*item, *node))
        };
        let full = (0..nodes.views.len()).filter(full);
        stalls.push(disks_full(waiting.len(), full.map(|node| nodes.views[node]), settings));
    }
    for node in nodes.views.iter().filter(|node| node.duty == Duty::Leaves) {
        let holds = chosen.voters.values().filter(|voters| voters.contains(&node.id)).count();
        if holds > 0 {
            stalls.push(Stall::NotEmptied { node: node.id, replicas: holds });
        }
    }
    stalls
}

/// Nodes without room, and how full they are now.
pub(super) fn disks_full<'a>(
    shards: usize,
    nodes: impl Iterator<Item = &'a NodeView>,
    settings: &Settings,
) -> Stall {
    let full = |node: &NodeView| {
        let disk = node.disk?;
        let fill = u128::from(disk.used) * 1_000 / u128::from(disk.capacity.max(1));
        Some((node.id, u64::try_from(fill).unwrap_or(u64::MAX)))
    };
    Stall::DisksFull {
        shards,
        fill_max: settings.fill_max,
        nodes: nodes.filter_map(full).collect(),
    }
}

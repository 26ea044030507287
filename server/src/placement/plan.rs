//! Plans: what [`super::replicas`], [`super::order`] and [`super::leaders`] choose, put together.
//!
//! Owns what a plan says of itself: bytes, time, spread. Each of its functions gives the same answer to
//! the same question, and a plan that was carried out gives an empty one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_proto::shard_map::{NodeId, ShardId};

use super::leaders::{self, known_leader};
use super::model::{
    Duty, Goal, Move, NodeView, Placed, Plan, Settings, Spread, Stall, Step, Transfer, View,
};
use super::order::{Ordered, order};
use super::replicas::{self, Nodes};

/// Shards that no order has room for are left where they are, and all others chosen again, so often;
/// then only what must move does. Only full disks lead here, and mostly once.
const FREEZES_MAX: usize = 8;

/// What brings a cluster to where its settings want it.
pub fn plan(view: &View, settings: &Settings) -> Plan {
    let mut frozen = BTreeSet::new();
    let mut chosen = replicas::choose(view, settings, &frozen);
    let mut ordered = order(view, &chosen.voters, settings);
    let stall = ordered.stall.clone();
    for again in 0..FREEZES_MAX {
        if ordered.left.is_empty() {
            break;
        }
        frozen.append(&mut ordered.left);
        let goal = if again + 1 == FREEZES_MAX { Goal::Repair } else { settings.goal };
        chosen = replicas::choose(view, &Settings { goal, ..settings.clone() }, &frozen);
        ordered = order(view, &chosen.voters, settings);
    }
    let led = leaders::choose(view, &ordered.voters, settings);
    let mut plan = put_together(view, &ordered, &led.leaders, settings);
    (plan.lower_bound, plan.for_bytes) = (chosen.lower_bound, chosen.for_bytes);
    if !ordered.left.is_empty() {
        // What found no room is not copied.
        plan.lower_bound = plan.lower_bound.min(plan.copies());
        plan.for_bytes = plan.for_bytes.min(plan.copies() - plan.lower_bound);
    }
    plan.stalls = chosen.stalls;
    plan.stalls.extend(stall);
    plan.stalls.extend(led.stalls);
    plan
}

/// What balances leaders, and moves no replica.
pub fn plan_leaders(view: &View, settings: &Settings) -> Plan {
    let ordered = order(view, &BTreeMap::new(), settings);
    let led = leaders::choose(view, &ordered.voters, settings);
    Plan { stalls: led.stalls, ..put_together(view, &ordered, &led.leaders, settings) }
}

/// What brings shards to a placement that is given, as it is: the one before, when a plan is undone.
/// Shards that it does not name stay; a leader that does not vote there is chosen anew.
pub fn plan_towards(view: &View, wanted: &BTreeMap<ShardId, Placed>, settings: &Settings) -> Plan {
    let voters = wanted.iter().map(|(shard, placed)| (*shard, placed.voters.clone())).collect();
    let ordered = order(view, &voters, settings);
    let mut led = leaders::choose(view, &ordered.voters, settings);
    for (shard, leader) in &mut led.leaders {
        let before = wanted.get(shard).and_then(|placed| placed.leader);
        let votes = before.filter(|node| ordered.voters[shard].contains(node));
        let serves =
            votes.filter(|node| view.node(*node).is_some_and(|node| node.duty == Duty::Serves));
        *leader = serves.unwrap_or(*leader);
    }
    let stalls = ordered.stall.clone().into_iter().chain(led.stalls).collect();
    let mut plan = put_together(view, &ordered, &led.leaders, settings);
    plan.lower_bound = plan.copies();
    plan.stalls = stalls;
    plan
}

/// A plan with only its first moves: with what comes of them, and the leaders that are best then.
pub fn cut(view: &View, plan: &Plan, settings: &Settings, moves_max: usize) -> Plan {
    if plan.moves().count() <= moves_max {
        return plan.clone();
    }
    let steps = plan.steps.iter().filter(|step| matches!(step, Step::Move(_))).take(moves_max);
    let first = Plan { steps: steps.cloned().collect(), ..plan.clone() };
    let after = view.after(&first).shards.into_iter().map(|shard| {
        let voters = shard.voters.iter().map(|seat| seat.node).collect();
        (shard.id, Placed { voters, leader: None })
    });
    let made = plan_towards(view, &after.collect(), settings);
    Plan {
        lower_bound: plan.lower_bound.min(made.copies()),
        for_bytes: plan.for_bytes.min(made.copies()),
        stalls: plan.stalls.clone(),
        ..made
    }
}

fn put_together(
    view: &View,
    ordered: &Ordered,
    leaders: &BTreeMap<ShardId, NodeId>,
    settings: &Settings,
) -> Plan {
    let nodes = Nodes::of(view);
    let mut urgent = Vec::new();
    let mut others = Vec::new();
    let mut moves = ordered.moves.clone();
    let mut now: BTreeMap<ShardId, NodeId> = BTreeMap::new();
    for shard in &view.shards {
        if let Some(leader) = known_leader(shard, &nodes) {
            now.insert(shard.id, leader);
        }
    }
    for change in &mut moves {
        let leads = now
            .get(&change.shard)
            .is_some_and(|now| change.from.is_some_and(|from| from.node == *now));
        if leads {
            // Its shard's last: everybody else votes by now.
            change.hand_over = leaders.get(&change.shard).copied();
            now.extend(change.hand_over.map(|to| (change.shard, to)));
        }
    }
    let moving: BTreeSet<ShardId> = moves.iter().map(|change| change.shard).collect();
    for (shard, to) in leaders {
        let Some(from) = now.get(shard).copied().filter(|from| from != to) else { continue };
        let transfer = Transfer { shard: *shard, from, to: *to };
        match !moving.contains(shard) && nodes.duty(from) != Duty::Serves {
            true => urgent.push(Step::Transfer(transfer)),
            false => others.push(Step::Transfer(transfer)),
        }
    }
    let bytes = moves.iter().fold(0, |all: u64, change| all.saturating_add(change.bytes));
    let estimate = estimate(&moves, settings);
    let steps = urgent.into_iter().chain(moves.into_iter().map(Step::Move)).chain(others).collect();
    let wanted = ordered.voters.iter().map(|(shard, voters)| {
        (*shard, Placed { voters: voters.clone(), leader: leaders.get(shard).copied() })
    });
    let wanted: BTreeMap<ShardId, Placed> = wanted.collect();
    let before = view.shards.iter().map(|shard| {
        let voters = shard.voters.iter().map(|seat| seat.node).collect();
        (shard.id, Placed { voters, leader: shard.leader })
    });
    Plan {
        epoch: view.epoch,
        before: spread(view, &before.collect()),
        after: spread(view, &wanted),
        wanted,
        steps,
        bytes,
        estimate,
        lower_bound: 0,
        for_bytes: 0,
        stalls: Vec::<Stall>::new(),
    }
}

/// Moves one after the other, each by whoever of those that work at a time is free first.
fn estimate(moves: &[Move], settings: &Settings) -> Duration {
    let mut free = vec![Duration::ZERO; settings.moves_at_a_time.clamp(1, moves.len().max(1))];
    for change in moves {
        let rate = u128::from(settings.bytes_per_second.max(1));
        let nanos = u128::from(change.bytes) * 1_000_000_000 / rate;
        let copying = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let first = free.iter_mut().min().expect("one works at least");
        *first = first.saturating_add(copying).saturating_add(settings.move_overhead);
    }
    free.into_iter().max().unwrap_or_default()
}

/// How even a placement is.
fn spread(view: &View, placed: &BTreeMap<ShardId, Placed>) -> Spread {
    let mut had: BTreeMap<NodeId, [u128; 4]> = BTreeMap::new();
    for shard in &view.shards {
        let Some(placed) = placed.get(&shard.id) else { continue };
        for node in &placed.voters {
            let had = had.entry(*node).or_default();
            had[0] += 1;
            had[1] += u128::from(shard.bytes);
        }
        if let Some(leader) = placed.leader {
            let had = had.entry(leader).or_default();
            had[2] += 1;
            had[3] += u128::from(shard.load);
        }
    }
    let serving = || view.nodes.iter().filter(|node| node.duty == Duty::Serves);
    let weights: u128 = serving().map(|node| u128::from(node.weight.max(1))).sum();
    let most = |what: usize| -> u64 {
        let all: u128 = had.values().map(|had| had[what]).sum();
        let part = |node: &NodeView| {
            let had = had.get(&node.id).map_or(0, |had| had[what]);
            had * weights * 1_000 / (all.max(1) * u128::from(node.weight.max(1)))
        };
        let most = serving().map(part).max().filter(|_| all > 0);
        most.map_or(1_000, |most| u64::try_from(most).unwrap_or(u64::MAX))
    };
    Spread { replicas: most(0), bytes: most(1), leaders: most(2), load: most(3) }
}

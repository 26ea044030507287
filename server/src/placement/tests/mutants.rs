//! The checker rejects what is wrong: every plan of many, changed in each of many ways.

use std::collections::BTreeMap;

use coracle_proto::shard_map::ReplicaId;
use coracle_storage::fs::faulty::Dice;

use super::super::check::Wrong;
use super::super::model::{Goal, Move, Plan, Seat, Stall, Step, Transfer};
use super::worlds::{seeds, world};
use super::*;

/// A way to spoil a plan; false where the plan has nothing to spoil that way. Where its name begins with
/// `step: `, a step that cannot be done must be what is found.
type Mutation = fn(&View, &mut Plan, &mut Dice) -> bool;

const MUTATIONS: [(&str, Mutation); 19] = [
    ("epoch", |_, plan, _| {
        plan.epoch.0 += 1;
        true
    }),
    ("bytes", |_, plan, _| {
        plan.bytes += 1;
        true
    }),
    ("bytes of a move", |_, plan, dice| {
        changed(plan, dice, |change| change.to.is_some(), |change| change.bytes += 1)
    }),
    ("estimate", |_, plan, _| {
        plan.estimate = plan.estimate * 17 + std::time::Duration::from_secs(1);
        true
    }),
    ("spread", |_, plan, _| {
        plan.after.replicas += 1;
        true
    }),
    ("lower bound", |_, plan, _| {
        plan.lower_bound = plan.copies() + 1;
        true
    }),
    ("step left out", |_, plan, dice| {
        let some = !plan.steps.is_empty();
        some.then(|| plan.steps.remove(dice.below(plan.steps.len() as u64) as usize)).is_some()
    }),
    ("step twice", |_, plan, dice| {
        let some = !plan.steps.is_empty();
        let at = dice.below(plan.steps.len().max(1) as u64) as usize;
        some.then(|| plan.steps.insert(at, plan.steps[at].clone())).is_some()
    }),
    ("move to where it is", |view, plan, dice| {
        let wanted = view.shards.clone();
        changed(
            plan,
            dice,
            |change| change.to.is_some(),
            |change| {
                let shard = wanted.iter().find(|shard| shard.id == change.shard).unwrap();
                change.to = shard.voters.last().map(|seat| seat.node);
            },
        )
    }),
    ("step: move to a node that is not", |_, plan, dice| {
        changed(plan, dice, |change| change.to.is_some(), |change| change.to = Some(NodeId(77)))
    }),
    ("step: move from another replica", |_, plan, dice| {
        changed(
            plan,
            dice,
            |change| change.from.is_some(),
            |change| {
                change.from = change.from.map(|seat| Seat { replica: ReplicaId(9), ..seat });
            },
        )
    }),
    ("step: removal before addition", |view, plan, dice| {
        let full = |change: &Move| {
            let shard = view.shards.iter().find(|shard| shard.id == change.shard).unwrap();
            let pair = change.from.is_some() && change.to.is_some() && change.hand_over.is_none();
            pair && shard.voters.len() <= plan.wanted[&change.shard].voters.len()
        };
        let places = plan.steps.iter().enumerate().filter_map(|(at, step)| match step {
            Step::Move(change) if full(change) => Some((at, change.clone())),
            _ => None,
        });
        let places: Vec<(usize, Move)> = places.collect();
        if places.is_empty() {
            return false;
        }
        let (at, change) = places[dice.below(places.len() as u64) as usize].clone();
        plan.steps[at] = Step::Move(Move { to: None, bytes: 0, ..change.clone() });
        plan.steps.insert(at + 1, Step::Move(Move { from: None, ..change }));
        true
    }),
    ("step: transfer to who may not lead", |view, plan, _| {
        let serves = |node: NodeId| view.node(node).is_some_and(|node| node.duty == Duty::Serves);
        for step in &mut plan.steps {
            let Step::Transfer(transfer) = step else { continue };
            let mut voters = plan.wanted[&transfer.shard].voters.iter().copied();
            if let Some(to) = voters.find(|to| !serves(*to) && *to != transfer.from) {
                transfer.to = to;
                plan.wanted.get_mut(&transfer.shard).unwrap().leader = Some(to);
                return true;
            }
        }
        false
    }),
    ("step: hand-over to nobody", |_, plan, dice| {
        changed(plan, dice, |change| change.hand_over.is_some(), |change| change.hand_over = None)
    }),
    ("step: hand-over by who does not lead", |_, plan, dice| {
        let follower = |change: &Move| change.from.is_some() && change.hand_over.is_none();
        changed(plan, dice, follower, |change| change.hand_over = change.from.map(|seat| seat.node))
    }),
    ("step: transfer to nobody", |_, plan, dice| {
        let at = dice.below(plan.steps.len().max(1) as u64) as usize;
        match plan.steps.get_mut(at) {
            Some(Step::Transfer(transfer)) => transfer.to = NodeId(77),
            _ => return false,
        }
        true
    }),
    ("transfer and back", |_, plan, _| {
        let Some(Step::Transfer(last)) = plan.steps.last().cloned() else { return false };
        plan.steps.push(Step::Transfer(Transfer { from: last.to, to: last.from, ..last }));
        true
    }),
    ("wanted", |_, plan, _| {
        plan.wanted.values_mut().next().is_some_and(|placed| placed.voters.pop().is_some())
    }),
    ("stall made up", |_, plan, _| {
        plan.stalls.push(Stall::QuorumLost { shard: ShardId(77) });
        true
    }),
];

/// Spoils one of the moves that can be.
fn changed(
    plan: &mut Plan,
    dice: &mut Dice,
    which: impl Fn(&Move) -> bool,
    spoil: impl Fn(&mut Move),
) -> bool {
    let moves = plan.steps.iter_mut().filter_map(|step| match step {
        Step::Move(change) if which(change) => Some(change),
        _ => None,
    });
    let mut moves: Vec<&mut Move> = moves.collect();
    if moves.is_empty() {
        return false;
    }
    let at = dice.below(moves.len() as u64) as usize;
    spoil(moves[at]);
    true
}

#[test]
fn every_mutation_of_every_plan_is_rejected() {
    let mut spoilt: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in seeds(1_000) {
        let (view, settings) = world(seed);
        let made = plan(&view, &settings);
        for (name, mutation) in MUTATIONS {
            let mut mutant = made.clone();
            if mutation(&view, &mut mutant, &mut Dice::new(seed)) && mutant != made {
                let checked = check(&view, &settings, &mutant);
                assert!(checked.is_err(), "seed {seed}: {name} is accepted");
                let step = matches!(checked, Err(Wrong::Step { .. }));
                assert!(step || !name.starts_with("step: "), "seed {seed}: {name}: {checked:?}");
                *spoilt.entry(name).or_default() += 1;
            }
        }
    }
    for (name, _) in MUTATIONS {
        assert!(
            spoilt.get(name).is_some_and(|count| *count > 20),
            "{name} was hardly tried: {spoilt:?}"
        );
    }
}

/// Plans that are legal from end to end and merely not the best are rejected too.
#[test]
fn plans_that_could_be_better_are_rejected() {
    let mut rejected = BTreeMap::new();
    for seed in seeds(2_000) {
        let (mut view, settings) = world(seed);
        view.nodes.iter_mut().for_each(|node| node.disk = None);
        let settings = Settings { goal: Goal::Balance, ..settings };
        let best = plan(&view, &settings);
        let mut dice = Dice::new(seed);
        // One more replica goes somewhere else, then all numbers are made to fit.
        let mut wanted = best.wanted.clone();
        let at = dice.below(wanted.len() as u64) as usize;
        let Some(placed) = wanted.values_mut().nth(at) else { continue };
        let serves = |node: &&NodeView| node.duty == Duty::Serves;
        let serving: Vec<NodeId> = view.nodes.iter().filter(serves).map(|node| node.id).collect();
        let free: Vec<NodeId> =
            serving.iter().copied().filter(|node| !placed.voters.contains(node)).collect();
        let Some(from) = placed.voters.iter().position(|node| serving.contains(node)) else {
            continue;
        };
        if free.is_empty() {
            continue;
        }
        placed.voters[from] = free[dice.below(free.len() as u64) as usize];
        placed.voters.sort_unstable();
        let mut worse = plan_towards(&view, &wanted, &settings);
        worse.lower_bound = worse.lower_bound.min(best.lower_bound);
        worse.for_bytes = best.for_bytes.min(worse.copies() - worse.lower_bound);
        worse.stalls = best.stalls.clone();
        // Whether a copy for bytes or load alone is worth it, nobody can tell.
        let parts = if worse.for_bytes > 0 { 4 } else { 5 };
        let after = |plan: &Plan| {
            super::exhaustive::score(&view, &settings, plan).map(|score| score[..parts].to_vec())
        };
        match check(&view, &settings, &worse) {
            Ok(()) => assert_eq!(after(&worse), after(&best), "seed {seed}: it is worse"),
            Err(Wrong::NotBest { .. }) => *rejected.entry("better").or_insert(0) += 1,
            Err(_) => *rejected.entry("otherwise").or_insert(0) += 1,
        }
    }
    assert!(rejected["better"] > 300, "{rejected:?}");
}

//! Controllers that were paused, and act on what they had loaded long before.

use v1::MergeStep;

use super::*;

/// A merge whose first attempt was cancelled because the freeze came too late somewhere; every state of the
/// records that a controller can have loaded before, and what it saw then.
fn second_attempt() -> (World, u64, Vec<(Snapshot, Seen)>) {
    let mut world = world();
    let id = world.merge();
    let mut before = Vec::new();
    while world.operation(id).merge.expect("a merge").attempts == 0 {
        let slow = world.groups[&R].replicas[0].id;
        let freezes = world.operation(id).merge.expect("a merge").step() == MergeStep::Freeze;
        world.group(R).behind = if freezes { [slow].into() } else { BTreeSet::new() };
        before.push((world.snapshot.clone(), world.seen()));
        world.step(id);
    }
    (world, id, before)
}

impl World {
    /// What somebody does who has decided by these records, and not by those of now.
    fn changes_nothing(&mut self, id: u64, known: &v1::ClusterOperation, next: Next) {
        let step = known.merge.as_ref().map(v1::ShardMerge::step);
        match next {
            Next::Wait(_) | Next::Look => {}
            Next::HandOver { .. } => panic!("nothing was decided, in {step:?}"),
            Next::Enter(entry) => {
                let (records, on) = (self.snapshot.clone(), On::of(known));
                let entered = enter(&mut self.snapshot, id, (on, &entry), self.now_ms);
                assert!(!entered, "{entry:?}, of {step:?}");
                assert_eq!(self.snapshot.operations, records.operations);
                assert_eq!(self.snapshot.map, records.map);
            }
            Next::Ask(order) => {
                let groups = self.groups.clone();
                self.obey(&order);
                for (shard, group) in groups {
                    let now = self.groups[&shard].state();
                    assert_eq!(now, group.state(), "s{shard} by {order:?}, of {step:?}");
                }
                self.refused_by = None;
            }
        }
    }
}

#[test]
fn who_was_paused_in_one_attempt_changes_nothing_in_the_next() {
    let (mut world, id, before) = second_attempt();
    let mut asked = 0;
    while !has_ended(world.operation(id).state()) {
        for (old, then) in &before {
            let known = old.operations.find(id).expect("it is remembered").clone();
            for seen in [then.clone(), world.seen()] {
                let next = next(old, &known, &seen);
                asked += usize::from(matches!(next, Next::Ask(_)));
                world.changes_nothing(id, &known, next);
            }
        }
        world.step(id);
    }
    assert!(asked > 0, "else it shows nothing");
    assert_eq!(world.operation(id).state(), OperationState::Done);
}

#[test]
fn what_takes_an_attempt_back_orders_nothing_of_the_next() {
    let (mut world, id, before) = second_attempt();
    let is_back = |(old, _): &&(Snapshot, Seen)| {
        let merge = old.operations.find(id).and_then(|known| known.merge.clone());
        merge.is_some_and(|merge| merge.step() == MergeStep::Cancel)
    };
    let (old, _) = before.iter().find(is_back).expect("it was cancelled").clone();
    let known = old.operations.find(id).expect("it is remembered").clone();
    world.until(id, MergeStep::Absorb);
    assert_ne!(world.groups[&R].frozen_for, 0);
    let next = next(&old, &known, &world.seen());
    assert!(matches!(next, Next::Enter(Entry::Back { .. })), "{next:?}");
}

#[test]
fn an_end_that_was_decided_before_others_went_on_is_void() {
    let mut world = world();
    let id = world.merge();
    world.lost.insert(2);
    let known = world.operation(id);
    let Next::Enter(end) = next(&world.snapshot, &known, &world.seen()) else {
        panic!("it can't be done")
    };
    // Only that controller took the node for lost.
    world.lost.clear();
    world.until(id, MergeStep::Freeze);
    assert!(!enter(&mut world.snapshot, id, (On::of(&known), &end), world.now_ms));
    assert_eq!(world.run(id).state(), OperationState::Done);
}

#[test]
fn what_two_controllers_gather_moves_once() {
    let mut world = world();
    let id = world.merge();
    let known = world.operation(id);
    let Next::Enter(gather) = next(&world.snapshot, &known, &world.seen()) else {
        panic!("they are apart")
    };
    for entered in [true, false] {
        let on = (On::of(&known), &gather);
        assert_eq!(enter(&mut world.snapshot, id, on, world.now_ms), entered);
    }
    assert_eq!(world.run(id).moves.len(), 1);
}

#[test]
fn attempts_are_different_merges_to_groups_and_rise() {
    let operation = |id, attempts| v1::ClusterOperation {
        id,
        merge: Some(v1::ShardMerge { attempts, ..Default::default() }),
        ..Default::default()
    };
    let ids: Vec<u64> = [(1, 0), (1, 1), (1, ATTEMPTS_MAX), (2, 0), (2, 3)]
        .map(|(id, attempts)| attempt(&operation(id, attempts)))
        .to_vec();
    assert!(ids.is_sorted_by(|a, b| a < b) && ids[0] > 0, "{ids:?}");
}

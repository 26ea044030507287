//! Controllers that were paused, and act on what they had loaded long before.

use v1::MergeStep;

use super::*;

/// A merge whose first attempt was cancelled because the freeze came too late somewhere; every state of the
/// records that a controller can have loaded before.
fn second_attempt() -> (World, u64, Vec<Snapshot>) {
    let mut world = world();
    let id = world.merge();
    let mut before = Vec::new();
    while world.operation(id).merge.expect("a merge").attempts == 0 {
        let slow = world.groups[&R].replicas[0].id;
        let freezes = world.operation(id).merge.expect("a merge").step() == MergeStep::Freeze;
        world.group(R).behind = if freezes { [slow].into() } else { BTreeSet::new() };
        before.push(world.snapshot.clone());
        world.step(id);
    }
    (world, id, before)
}

#[test]
fn who_was_paused_in_one_attempt_changes_nothing_in_the_next() {
    let (mut world, id, before) = second_attempt();
    let mut asked = 0;
    while !has_ended(world.operation(id).state()) {
        for old in &before {
            let known = old.operations.find(id).expect("it is remembered").clone();
            match next(old, &known, &world.seen()) {
                Next::Wait(_) | Next::Look => {}
                Next::HandOver { .. } => panic!("nothing was decided"),
                Next::Enter(entry) => {
                    let (records, on) = (world.snapshot.clone(), On::of(&known));
                    let step = known.merge.as_ref().map(v1::ShardMerge::step);
                    assert!(
                        !enter(&mut world.snapshot, id, (on, &entry), world.now_ms),
                        "{entry:?}, of {step:?}"
                    );
                    assert_eq!(world.snapshot.operations, records.operations);
                    assert_eq!(world.snapshot.map, records.map);
                }
                Next::Ask(order) => {
                    asked += 1;
                    let step = known.merge.as_ref().map(v1::ShardMerge::step);
                    let groups = world.groups.clone();
                    world.obey(&order);
                    for (shard, group) in groups {
                        let now = world.groups[&shard].state();
                        assert_eq!(now, group.state(), "s{shard} by {order:?}, of {step:?}");
                    }
                    world.refused_by = None;
                }
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
    let is_back = |old: &&Snapshot| {
        let merge = old.operations.find(id).and_then(|known| known.merge.clone());
        merge.is_some_and(|merge| merge.step() == MergeStep::Cancel)
    };
    let old = before.iter().find(is_back).expect("it was cancelled").clone();
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

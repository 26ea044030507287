//! Splits and merges against groups that do what they are told, or answer that they did not, or do it
//! late; with a controller that dies at every step.

mod world;
mod late;
mod trouble;
mod asked;

use v1::{OperationControl, ReplicaRole};

use self::world::{HALF, L, R, World, replica, world};
use super::*;
use crate::cluster::operations;
use crate::cluster::points::Point;

#[test]
fn a_split_ends_with_both_in_the_map_and_the_childs_replicas_beside_the_parents() {
    for trouble in 0..4 {
        let mut world = world();
        world.trouble = if trouble == 1 { 0 } else { trouble };
        let id = world.split();
        let ended = world.run(id);
        assert_eq!(ended.state(), OperationState::Done);
        let (left, child) =
            (world.shard(L).expect("it stays"), world.shard(3).expect("it is born"));
        assert_eq!((left.start, left.end), (0, HALF / 2));
        assert_eq!((child.start, child.end), (HALF / 2, HALF));
        let nodes: Vec<u64> = child.replicas.iter().map(|replica| replica.node).collect();
        assert_eq!(nodes, [1, 2, 3]);
        assert!(child.replicas.iter().all(|it| it.id >= 100 && it.replaces == 0 && !it.joining));
        assert_eq!((left.epoch, child.epoch), (6, 6));
        world.deliver();
        assert_eq!(world.taken, ["Plan", "Split"].map(str::to_owned).into());
    }
}

#[test]
fn a_split_waits_for_moves_and_is_planned_again_when_members_have_changed() {
    let mut world = world();
    let id = world.split();
    world.snapshot.map.shards[1]
        .replicas
        .push(v1::Replica { joining: true, ..replica(50, 5, ReplicaRole::Learner) });
    assert!(matches!(world.step(id), Next::Wait(_)));
    world.snapshot.map.shards[1].replicas.pop();
    world.step(id);
    let first = world.operation(id).split.expect("a split");
    assert_eq!((first.step(), first.child, first.epoch), (SplitStep::Split, 3, 5));
    // Its group went on: what was asked for can never be heeded any more.
    let group = world.groups.get_mut(&L).expect("it is there");
    group.epoch += 1;
    assert_eq!(world.step(id), Next::Enter(Entry::SplitAgain { epoch: 6 }));
    world.snapshot.map.shards[1].epoch = 6;
    let ended = world.run(id);
    let split = ended.split.expect("a split");
    assert_eq!((ended.state, split.child, split.attempts), (OperationState::Done.into(), 4, 1));
    assert!(split.replicas.iter().all(|replica| replica.id >= 103), "fresh ids each time");
}

#[test]
fn a_split_that_is_cancelled_never_happens_afterwards() {
    let mut world = world();
    let id = world.split();
    world.step(id);
    world.trouble = 1;
    assert!(matches!(world.step(id), Next::Ask(_)));
    world.trouble = 0;
    let mut list = world.snapshot.operations.list.iter_mut();
    list.next().expect("it is there").cancelling = true;
    let ended = world.run(id);
    assert_eq!(ended.state(), OperationState::Cancelled);
    let epoch = world.shard(L).expect("it stays").epoch;
    assert_eq!(epoch, world.groups[&L].epoch, "else nothing can be planned on it");
    world.deliver();
    assert_eq!(world.groups[&L].end, HALF, "the order of before came too late");
    assert!(world.shard(3).is_none());
    let id = world.split();
    let ended = world.run(id);
    assert_eq!((ended.state(), ended.split.expect("a split").attempts), (OperationState::Done, 0));
}

#[test]
fn a_merge_gathers_freezes_takes_in_and_leaves_nothing_behind() {
    for trouble in [0, 2, 3, 4] {
        let mut world = world();
        world.trouble = trouble;
        let id = world.merge();
        let mut serves = 0;
        let mut frozen_since = None;
        let ended = loop {
            if has_ended(world.operation(id).state()) {
                break world.operation(id);
            }
            world.step(id);
            match world.groups[&R].frozen_for != 0 && world.shard(R).is_some() {
                true => {
                    let since = *frozen_since.get_or_insert(world.now_ms);
                    serves = serves.max(world.now_ms - since);
                }
                false => frozen_since = None,
            }
        };
        assert_eq!(ended.state(), OperationState::Done, "{}", ended.message);
        assert!(serves <= FREEZE_MAX_MS + 50, "{serves} ms");
        assert_eq!(ended.moves.len(), 1, "n4's goes to n1");
        let left = world.shard(L).expect("it stays");
        assert_eq!((left.start, left.end), (0, 0));
        assert!(world.shard(R).is_none());
        let group = &world.groups[&L];
        assert_eq!((left.epoch, group.merging), (group.epoch, 0));
        world.deliver();
        let all = ["Gather", "Prepare", "Freeze", "Absorb", "Flush", "End"];
        assert!(all.iter().all(|step| world.taken.contains(*step)), "{:?}", world.taken);
    }
}

#[test]
fn what_goes_is_remembered_until_its_nodes_have_removed_it() {
    let mut world = world();
    let id = world.merge();
    while world.operation(id).merge.expect("a merge").step() != MergeStep::Flush {
        world.step(id);
    }
    let right: Vec<u64> = world.groups[&R].replicas.iter().map(|replica| replica.id).collect();
    let behind = world.groups[&L].replicas[0].id;
    world.groups.get_mut(&L).expect("it is there").behind.insert(behind);
    assert!(matches!(world.step(id), Next::Wait(_)), "one may still need its neighbour's files");
    world.groups.get_mut(&L).expect("it is there").behind.clear();
    let entry = next(&world.snapshot, &world.operation(id), &world.seen());
    assert_eq!(entry, Next::Enter(Entry::Flushed));
    let on = On::of(&world.operation(id));
    enter(&mut world.snapshot, id, (on, &Entry::Flushed), world.now_ms);
    let leaving: Vec<u64> = world.snapshot.leaving.iter().map(|it| it.replica).collect();
    assert_eq!(leaving, right);
}

#[test]
fn a_freeze_that_does_not_come_everywhere_is_cancelled_and_tried_again() {
    let mut world = world();
    let id = world.merge();
    while world.operation(id).merge.expect("a merge").step() != MergeStep::Freeze {
        world.step(id);
    }
    let slow = world.groups[&R].replicas[0].id;
    world.groups.get_mut(&R).expect("it is there").behind.insert(slow);
    let began = world.now_ms;
    while world.operation(id).merge.expect("a merge").step() == MergeStep::Freeze {
        world.step(id);
    }
    assert!(world.now_ms - began <= FREEZE_MAX_MS + 50);
    while world.operation(id).merge.expect("a merge").step() == MergeStep::Cancel {
        world.step(id);
    }
    assert_eq!(world.groups[&R].frozen_for, 0, "it serves again");
    assert!(world.operation(id).message.contains("half a second"));
    world.groups.get_mut(&R).expect("it is there").behind.clear();
    let ended = world.run(id);
    assert_eq!((ended.state(), ended.merge.expect("a merge").attempts), (OperationState::Done, 1));
    // One that never comes is given up in the end, and everything is as it was.
    let mut world = self::world();
    let id = world.merge();
    while world.operation(id).merge.expect("a merge").step() != MergeStep::Freeze {
        world.step(id);
    }
    let slow = world.groups[&R].replicas[0].id;
    let mut rounds = 0;
    while !has_ended(world.operation(id).state()) {
        let frozen = world.operation(id).merge.expect("a merge").step() == MergeStep::Freeze;
        let behind = &mut world.groups.get_mut(&R).expect("it is there").behind;
        *behind = if frozen { [slow].into() } else { BTreeSet::new() };
        world.step(id);
        rounds += 1;
        assert!(rounds < 20_000, "it is tried for ever");
    }
    assert_eq!(world.operation(id).state(), OperationState::Failed);
    let (left, right) = (&world.groups[&L], &world.groups[&R]);
    assert_eq!((left.merging, right.merging, right.frozen_for), (0, 0, 0));
    assert_eq!((left.end, right.start), (HALF, HALF));
}

#[test]
fn a_merge_is_cancelled_at_any_step_before_it_is_decided_and_no_later_order_is_heeded() {
    for stop in [MergeStep::Gather, MergeStep::Prepare, MergeStep::Freeze] {
        let mut world = world();
        let id = world.merge();
        while world.operation(id).merge.expect("a merge").step() != stop {
            world.step(id);
        }
        // The orders of this step are lost, and come when all is over.
        world.trouble = 1;
        world.step(id);
        world.trouble = 0;
        let request = v1::ControlOperationRequest { id, control: OperationControl::Cancel.into() };
        super::super::elastic::control(&mut world.snapshot, &request, world.now_ms)
            .expect("it may be");
        let ended = world.run(id);
        assert_eq!(ended.state(), OperationState::Cancelled, "{stop:?}");
        world.deliver();
        assert_eq!(world.groups[&R].frozen_for, 0, "{stop:?}: it serves");
        assert_eq!(world.groups[&L].end, HALF, "{stop:?}");
    }
    for late in [MergeStep::Absorb, MergeStep::Flush, MergeStep::End] {
        let mut world = world();
        let id = world.merge();
        while world.operation(id).merge.expect("a merge").step() != late {
            world.step(id);
        }
        let request = v1::ControlOperationRequest { id, control: OperationControl::Cancel.into() };
        let refused = super::super::elastic::control(&mut world.snapshot, &request, world.now_ms);
        assert!(refused.is_err(), "{late:?}: it is decided");
        assert_eq!(world.run(id).state(), OperationState::Done);
    }
}

#[test]
fn two_controllers_enter_each_step_once() {
    let mut world = world();
    let id = world.merge();
    for _ in 0..200 {
        let operation = world.operation(id);
        if has_ended(operation.state()) {
            break;
        }
        // One that was paused decided the same, and enters it when the other has gone on.
        let stale = next(&world.snapshot, &operation, &world.seen());
        world.step(id);
        world.step(id);
        if let Next::Enter(entry) = &stale {
            let before = world.operation(id).merge.expect("a merge").step();
            let ended = has_ended(world.operation(id).state());
            enter(&mut world.snapshot, id, (On::of(&operation), entry), world.now_ms);
            world.check();
            let after = world.operation(id).merge.expect("a merge").step();
            assert!(ended || before == after || matches!(entry, Entry::Gather { .. }), "{entry:?}");
        }
    }
    assert_eq!(world.operation(id).state(), OperationState::Done);
}

#[test]
fn a_node_that_does_not_answer_ends_what_is_not_decided_and_holds_up_nothing_that_is() {
    let mut world = world();
    let id = world.merge();
    while world.operation(id).merge.expect("a merge").step() != MergeStep::Prepare {
        world.step(id);
    }
    world.silent.insert(2);
    while world.operation(id).merge.expect("a merge").step() != MergeStep::Gather {
        world.step(id);
    }
    assert!(matches!(world.step(id), Next::Wait(why) if why.contains("n2")));
    world.lost.insert(2);
    assert_eq!(world.run(id).state(), OperationState::Failed, "it is mended first");
    let mut world = self::world();
    let id = world.merge();
    while world.operation(id).merge.expect("a merge").step() != MergeStep::Absorb {
        world.step(id);
    }
    world.silent.insert(2);
    for _ in 0..20 {
        world.step(id);
    }
    assert_eq!(world.operation(id).merge.expect("a merge").step(), MergeStep::Flush);
    world.lost.insert(2);
    assert_eq!(world.run(id).state(), OperationState::Done, "what is lost for good holds nothing");
}

#[test]
fn read_replicas_in_the_way_go_and_come_where_both_have_them() {
    let mut world = world();
    let learner = |id, node| replica(id, node, ReplicaRole::Learner);
    world.snapshot.map.shards[1].replicas.push(learner(60, 5));
    world.settle();
    let id = world.merge();
    let ended = world.run(id);
    assert_eq!(ended.state(), OperationState::Done, "{}", ended.message);
    let left = world.shard(L).expect("it stays");
    assert!(left.replicas.iter().all(|replica| replica.node != 5));
    // Where the other one has a voter to be, it may stay.
    let mut world = self::world();
    world.snapshot.map.shards[1].replicas.push(learner(60, 4));
    world.snapshot.map.shards[2].replicas.push(learner(61, 1));
    world.settle();
    let id = world.merge();
    assert_eq!(world.run(id).state(), OperationState::Done);
}

#[test]
fn what_was_done_is_undone_by_its_reverse() {
    let mut world = world();
    let id = world.split();
    world.run(id);
    let request = v1::ControlOperationRequest { id, control: OperationControl::Undo.into() };
    let undo = super::super::elastic::control(&mut world.snapshot, &request, world.now_ms);
    let undo = undo.expect("it may be");
    let ended = world.run(undo);
    assert_eq!((ended.state(), ended.undoes), (OperationState::Done, id), "{}", ended.message);
    assert_eq!(world.shard(L).expect("it stays").end, HALF);
    let request = v1::ControlOperationRequest { id: undo, control: OperationControl::Undo.into() };
    let again = super::super::elastic::control(&mut world.snapshot, &request, world.now_ms);
    world.run(again.expect("it may be"));
    assert_eq!(world.shard(L).expect("it stays").end, HALF / 2);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut world = world();
    let split = |world: &mut World, shard, at| {
        let work = SplitWork { shard, at, ..SplitWork::default() };
        begin_split(&mut world.snapshot, work, 1).is_ok()
    };
    for (shard, at) in [(0, 5), (9, 5), (L, 0), (L, HALF), (R, HALF), (R, 5)] {
        assert!(!split(&mut world, shard, at), "{shard} at {at}");
    }
    for (left, right) in [(R, L), (L, L), (0, L), (L, 9)] {
        assert!(begin_merge(&mut world.snapshot, (left, right), 0, 1).is_err(), "{left} {right}");
    }
    assert!(split(&mut world, L, 5));
    assert!(!split(&mut world, L, 6), "one after the other");
    assert!(begin_merge(&mut world.snapshot, (L, R), 0, 1).is_err());
    let moves = vec![v1::PlannedMove { shard: L, from_node: 1, to_node: 5, bytes: 0 }];
    let work = operations::Work { kind: v1::OperationKind::Move, moves, ..Default::default() };
    assert!(operations::begin(&mut world.snapshot, work, 1).is_err(), "its members stay");
}

#[test]
fn work_comes_by_every_point_of_splits_and_merges() {
    let cancel = |world: &mut World, id: u64| {
        let request = v1::ControlOperationRequest { id, control: OperationControl::Cancel.into() };
        super::super::elastic::control(&mut world.snapshot, &request, world.now_ms)
            .expect("it may be");
    };
    let mut reached = BTreeSet::new();
    let mut world = world();
    let id = world.split();
    world.run(id);
    reached.append(&mut world.points);
    let mut world = self::world();
    let id = world.split();
    world.step(id);
    cancel(&mut world, id);
    world.run(id);
    reached.append(&mut world.points);
    let mut world = self::world();
    let id = world.merge();
    world.run(id);
    reached.append(&mut world.points);
    let mut world = self::world();
    let id = world.merge();
    world.until(id, MergeStep::Freeze);
    cancel(&mut world, id);
    world.run(id);
    reached.append(&mut world.points);
    let all = Point::SplitPlanned..=Point::MergeTakenBack;
    let all: BTreeSet<Point> = Point::ALL.into_iter().filter(|it| all.contains(it)).collect();
    assert_eq!(reached, all);
}

//! Merges whose shards are too large, have not tidied themselves, or lose replicas on the way.

use v1::MergeStep;

use super::*;

const TOO_LARGE: u64 = coracle_raft::group::MERGE_BYTES_MAX + 1;

fn is_free(world: &World) -> bool {
    [L, R].iter().all(|shard| {
        let group = &world.groups[shard];
        (group.merging, group.frozen_for) == (0, 0)
    })
}

#[test]
fn what_is_too_large_is_not_frozen_and_whoever_asked_is_told() {
    let mut world = world();
    world.group(R).bytes = TOO_LARGE;
    let id = world.merge();
    let ended = world.run(id);
    assert_eq!(ended.state(), OperationState::Failed);
    assert!(ended.message.contains("256 MiB"), "{}", ended.message);
    assert!(!world.taken.contains("Prepare"), "no group was told: {:?}", world.taken);
    // What others' keys take does not count, until they are gone.
    let mut world = self::world();
    let all: BTreeSet<u64> = world.groups[&R].replicas.iter().map(|it| it.id).collect();
    (world.group(R).bytes, world.group(R).untidy) = (TOO_LARGE, all);
    let id = world.merge();
    world.until(id, MergeStep::Prepare);
    world.group(R).untidy.clear();
    let ended = world.run(id);
    assert_eq!(ended.state(), OperationState::Failed, "it was as large without them");
    assert!(ended.message.contains("256 MiB"), "{}", ended.message);
    assert!(!world.taken.contains("Freeze") && is_free(&world), "{:?}", world.taken);
    let mut world = self::world();
    world.group(R).bytes = TOO_LARGE - 1;
    let id = world.merge();
    assert_eq!(world.run(id).state(), OperationState::Done);
}

#[test]
fn nothing_freezes_before_all_replicas_of_both_have_tidied_themselves_and_are_near() {
    for (shard, why) in [(L, "s1 drops"), (R, "s2 drops")] {
        let mut world = world();
        let id = world.merge();
        world.until(id, MergeStep::Prepare);
        let last = world.groups[&shard].replicas[2].id;
        world.group(shard).untidy.insert(last);
        for _ in 0..10 {
            world.step(id);
        }
        let next = world.step(id);
        assert!(matches!(&next, Next::Wait(told) if told.contains(why)), "{next:?}");
        world.group(shard).untidy.clear();
        assert_eq!(world.run(id).state(), OperationState::Done);
    }
    // One that says so of an epoch before, or of long ago.
    for shard in [L, R] {
        for by_epoch in [false, true] {
            let mut world = world();
            let id = world.merge();
            world.until(id, MergeStep::Prepare);
            let last = world.groups[&shard].replicas[2].id;
            match by_epoch {
                true => drop(world.group(shard).behind.insert(last)),
                false => drop(world.group(shard).lag.insert(last, LAG_MAX + 1)),
            }
            for _ in 0..10 {
                world.step(id);
            }
            let next = world.step(id);
            assert!(matches!(&next, Next::Wait(told) if told.contains("behind")), "{next:?}");
            let group = world.group(shard);
            (group.behind, group.lag) = (BTreeSet::new(), BTreeMap::new());
            assert_eq!(world.run(id).state(), OperationState::Done);
        }
    }
}

#[test]
fn another_voter_leads_where_the_leaders_node_has_lost_what_is_to_be_taken_in() {
    let mut world = world();
    let id = world.merge();
    world.until(id, MergeStep::Absorb);
    let leader = world.groups[&L].leader();
    let broken = world.groups[&R].on(leader);
    world.group(R).broken.insert(broken);
    let handed = world.step(id);
    let Next::HandOver { shard: L, from, to } = handed else { panic!("{handed:?}") };
    assert!(from == leader && to != leader);
    world.step(id);
    assert_ne!(world.groups[&L].absorbed, 0, "by the other one");
    assert_eq!(world.run(id).state(), OperationState::Done);
    // Its node says that all is well, and it refuses nevertheless.
    let mut world = self::world();
    let id = world.merge();
    world.until(id, MergeStep::Absorb);
    world.refused_by = Some(world.groups[&L].leader());
    assert!(matches!(world.step(id), Next::HandOver { shard: L, .. }));
    assert!(matches!(world.step(id), Next::Ask(_)), "whoever leads now has not");
    assert_eq!(world.run(id).state(), OperationState::Done);
    // Nobody else could.
    let mut world = self::world();
    let id = world.merge();
    world.until(id, MergeStep::Absorb);
    let all = world.groups[&R].replicas.iter().map(|it| it.id).collect();
    world.group(R).broken = all;
    assert!(matches!(world.step(id), Next::Ask(_)), "it is asked again and again");
}

#[test]
fn what_is_decided_is_not_given_up() {
    for (step, gives_up) in
        [(MergeStep::Prepare, true), (MergeStep::Absorb, false), (MergeStep::Flush, false)]
    {
        let mut world = world();
        let id = world.merge();
        world.until(id, step);
        let on = On::of(&world.operation(id));
        let entry = Entry::GiveUp { why: "it is refused".to_owned() };
        let entered = enter(&mut world.snapshot, id, (on, &entry), world.now_ms);
        assert_eq!((entered, world.operation(id).cancelling), (gives_up, gives_up), "{step:?}");
        assert_eq!(is_decided(&world.operation(id)), !gives_up);
    }
}

#[test]
fn a_replica_that_its_node_has_lost_holds_up_nothing_once_a_majority_holds_all() {
    let mut world = world();
    let id = world.merge();
    world.until(id, MergeStep::Flush);
    let replicas: Vec<u64> = world.groups[&L].replicas.iter().map(|it| it.id).collect();
    world.group(L).broken.insert(replicas[2]);
    world.group(L).behind.insert(replicas[1]);
    assert!(matches!(world.step(id), Next::Wait(_)), "one of three holds it");
    world.lost.insert(world.groups[&L].replicas[1].node);
    assert!(matches!(world.step(id), Next::Wait(_)), "whatever became of the others");
    world.lost.clear();
    world.group(L).behind.clear();
    assert_eq!(world.step(id), Next::Enter(Entry::Flushed));
    assert_eq!(world.run(id).state(), OperationState::Done);
}

#[test]
fn files_that_a_replica_may_need_stay_until_it_says_otherwise_or_goes() {
    let mut world = world();
    let id = world.merge();
    world.until(id, MergeStep::Flush);
    let merge = attempt(&world.operation(id));
    // A node comes back behind its loss: what it has taken in is not durable there.
    let late = world.groups[&L].replicas[2];
    world.group(L).behind.insert(late.id);
    world.lost.insert(late.node);
    let entry = Entry::Flushed;
    assert_eq!(next(&world.snapshot, &world.operation(id), &world.seen()), Next::Enter(entry));
    let on = On::of(&world.operation(id));
    assert!(enter(&mut world.snapshot, id, (on, &Entry::Flushed), world.now_ms));
    let leaving = world.snapshot.leaving.clone();
    assert_eq!(leaving.len(), 3);
    for leaving in &leaving {
        assert_eq!((leaving.shard, leaving.taken_by, leaving.merge), (R, L, merge));
        let needed = needed_by(&world.snapshot, leaving).expect("L is there").id;
        let status = &world.seen().replicas[&needed];
        assert_eq!(has_taken(leaving, status), leaving.node != late.node);
    }
    let its = leaving.iter().find(|it| it.node == late.node).expect("it leaves");
    let told = |absorbed, absorbed_durable| {
        has_taken(its, &v1::GroupStatus { absorbed, absorbed_durable, ..Default::default() })
    };
    assert!(told(merge, true) && told(merge + 1, true), "or a later one");
    assert!(!told(merge - 1, true) && !told(merge, false) && !told(0, false));
    // It is replaced, or L is taken in itself.
    let mut replaced = world.snapshot.clone();
    replaced.map.shards[1].replicas.retain(|replica| replica.node != late.node);
    assert_eq!(needed_by(&replaced, its), None);
    world.snapshot.map.shards.remove(1);
    assert_eq!(needed_by(&world.snapshot, its), None);
    let other = peer::LeavingReplica { shard: 9, replica: 1, node: 1, ..Default::default() };
    assert_eq!(needed_by(&world.snapshot, &other), None, "of no merge");
}

#[test]
fn a_replica_that_its_node_has_lost_ends_what_is_not_decided_so_that_it_can_be_mended() {
    for shard in [L, R] {
        for step in [MergeStep::Gather, MergeStep::Prepare] {
            let mut world = world();
            let id = world.merge();
            world.until(id, step);
            let lost = world.groups[&shard].on(3);
            world.group(shard).broken.insert(lost);
            let ended = world.run(id);
            assert_eq!(ended.state(), OperationState::Failed, "s{shard} in {step:?}");
            assert!(ended.message.contains("n3 has lost its replica"), "{}", ended.message);
            assert!(!world.taken.contains("Freeze") && is_free(&world), "{:?}", world.taken);
            assert!(!world.snapshot.operations.is_busy(shard), "it can be mended");
        }
    }
}

#[test]
fn what_does_not_get_ready_is_cancelled_after_a_while_and_fails_in_the_end() {
    let mut world = world();
    let id = world.merge();
    world.until(id, MergeStep::Prepare);
    let first = world.groups[&L].replicas[0].id;
    world.group(L).untidy.insert(first);
    let began = world.now_ms;
    for attempts in 1..=ATTEMPTS_MAX {
        // It pauses in between.
        world.now_ms += AGAIN_AFTER_MS << attempts;
        world.until(id, MergeStep::Prepare);
        let until = world.operation(id).merge.expect("a merge").freeze_until_ms;
        assert!(until > world.now_ms + PREPARE_MAX_MS / 2, "each has as long");
        for _ in 0..10 {
            assert!(!matches!(world.step(id), Next::Enter(_)), "not before");
        }
        world.now_ms = until;
        let next = world.step(id);
        assert!(matches!(&next, Next::Enter(Entry::Cancel { .. })), "{next:?}");
        while world.operation(id).merge.expect("a merge").step() == MergeStep::Cancel {
            world.step(id);
        }
        assert!(is_free(&world), "attempt {attempts}");
    }
    let ended = world.run(id);
    assert_eq!(ended.state(), OperationState::Failed);
    assert!(ended.message.contains("not ready"), "{}", ended.message);
    assert!(world.now_ms - began < 2 * u64::from(ATTEMPTS_MAX) * PREPARE_MAX_MS);
    // One that gets there in time.
    let mut world = self::world();
    let id = world.merge();
    world.until(id, MergeStep::Prepare);
    world.now_ms += PREPARE_MAX_MS - 1_000;
    assert_eq!(world.run(id).state(), OperationState::Done);
}

#[test]
fn what_others_work_on_for_long_is_not_merged() {
    let mut world = world();
    let id = world.merge();
    // On a node that does not come back, and is not given up either.
    let left = peer::LeavingReplica { shard: L, replica: 90, node: 5, ..Default::default() };
    world.snapshot.leaving.push(left);
    let operation = world.operation(id);
    let merge = next(&world.snapshot, &operation, &world.seen());
    assert!(matches!(merge, Next::Wait(_)), "{merge:?}");
    world.now_ms += GATHER_MAX_MS;
    assert_eq!(world.step(id), failed("replicas of the shards have come and gone for an hour"));
    assert!(has_ended(world.operation(id).state()));
}

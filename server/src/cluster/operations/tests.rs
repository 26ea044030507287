//! Operations against a map that a controller changes as groups and nodes do what is recorded.

use coracle_proto::{peer, v1};
use v1::{NodeState, OperationKind, OperationState, ReplicaRole};

use super::*;
use crate::cluster::testing;

const NOW: u64 = 1_000;
const NOBODY: BTreeSet<u64> = BTreeSet::new();

/// Shards 1 and 2 on n1 to n3, of five nodes.
fn records() -> Snapshot {
    let mut snapshot = testing::records([1, 2].into_iter().map(testing::shard), 5);
    snapshot.ids.next_replica = 100;
    snapshot
}

fn planned(shard: u64, from_node: u64, to_node: u64) -> v1::PlannedMove {
    v1::PlannedMove { shard, from_node, to_node, bytes: 7 }
}

fn work(kind: OperationKind, moves: &[v1::PlannedMove]) -> Work {
    Work { kind, moves: moves.to_vec(), ..Work::default() }
}

fn joining(snapshot: &Snapshot) -> Vec<v1::Replica> {
    let replicas = snapshot.map.shards.iter().flat_map(|shard| &shard.replicas);
    replicas.filter(|replica| replica.joining).copied().collect()
}

fn voters(snapshot: &Snapshot, shard: usize) -> Vec<u64> {
    let replicas = snapshot.map.shards[shard - 1].replicas.iter();
    let voters = replicas.filter(|replica| replica.role() == ReplicaRole::Voter);
    let mut nodes: Vec<u64> = voters.map(|replica| replica.node).collect();
    nodes.sort_unstable();
    nodes
}

/// The groups let those vote that shall, and those go that shall: the map says so.
fn settle(snapshot: &mut Snapshot) {
    for shard in &mut snapshot.map.shards {
        let gone: Vec<u64> =
            shard.replicas.iter().map(|r| r.replaces).filter(|r| *r != 0).collect();
        let goes = |replica: &v1::Replica| gone.contains(&replica.id) || replica.goes;
        shard.replicas.retain(|replica| !goes(replica));
        for replica in shard.replicas.iter_mut().filter(|replica| replica.becomes_voter) {
            let role = ReplicaRole::Voter.into();
            *replica =
                v1::Replica { id: replica.id, node: replica.node, role, ..Default::default() };
        }
    }
}

/// Those that are joining are given up.
fn give_up(snapshot: &mut Snapshot) {
    for shard in &mut snapshot.map.shards {
        shard.replicas.retain(|replica| !replica.joining);
    }
}

fn state(snapshot: &Snapshot, id: u64) -> OperationState {
    snapshot.operations.find(id).expect("it is remembered").state()
}

fn begun(snapshot: &mut Snapshot, work: Work) -> u64 {
    let id = begin(snapshot, work, NOW).expect("nothing stands against it");
    assert!(advance(snapshot, &NOBODY, NOW));
    id
}

#[test]
fn a_move_enters_a_replica_that_takes_a_voters_place_and_ends_when_the_map_says_so() {
    let mut snapshot = records();
    let id = begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 2, 4)]));
    let comes = joining(&snapshot);
    let [comes] = comes.as_slice() else { panic!("one comes, not {comes:?}") };
    assert_eq!((comes.id, comes.node, comes.replaces), (100, 4, 12));
    assert!(comes.becomes_voter && comes.role() == ReplicaRole::Learner);
    assert!(!advance(&mut snapshot, &NOBODY, NOW), "nothing has changed");
    settle(&mut snapshot);
    assert!(advance(&mut snapshot, &NOBODY, NOW + 5));
    assert_eq!(voters(&snapshot, 1), [1, 3, 4]);
    let ended = snapshot.operations.find(id).expect("it is remembered");
    assert_eq!(
        (ended.state(), ended.moves_done, ended.ended_ms),
        (OperationState::Done, 1, NOW + 5)
    );
}

#[test]
fn moves_of_one_shard_follow_each_other_and_a_node_takes_few_at_a_time() {
    let mut snapshot = records();
    let moves = [planned(1, 1, 4), planned(1, 2, 5), planned(2, 1, 4)];
    let id = begun(&mut snapshot, work(OperationKind::Rebalance, &moves));
    let at = |snapshot: &Snapshot| {
        joining(snapshot).iter().map(|r| (r.replaces, r.node)).collect::<Vec<_>>()
    };
    assert_eq!(at(&snapshot), [(11, 4), (21, 4)]);
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(at(&snapshot), [(12, 5)]);
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(state(&snapshot, id), OperationState::Done);
    assert_eq!((voters(&snapshot, 1), voters(&snapshot, 2)), (vec![3, 4, 5], vec![2, 3, 4]));

    let mut snapshot = records();
    snapshot.operations.moves_at_a_time = 1;
    begun(&mut snapshot, work(OperationKind::Rebalance, &moves));
    assert_eq!(at(&snapshot), [(11, 4)], "as many as are set");
}

#[test]
fn a_move_that_its_node_does_not_take_is_tried_again_and_then_given_up() {
    let mut snapshot = records();
    let id = begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 2, 4)]));
    for attempt in 1..=3 {
        assert_eq!(joining(&snapshot).len(), 1, "attempt {attempt}");
        give_up(&mut snapshot);
        advance(&mut snapshot, &NOBODY, NOW);
    }
    assert_eq!(state(&snapshot, id), OperationState::Failed);
    let failed = snapshot.operations.find(id).expect("it is remembered");
    assert!(failed.message.contains("n4"), "{}", failed.message);
    assert_eq!(voters(&snapshot, 1), [1, 2, 3]);
    assert!(snapshot.ids.next_replica > 102, "under a fresh id each time");
}

#[test]
fn a_cancelled_operation_takes_back_what_does_not_vote_yet_and_begins_nothing() {
    let mut snapshot = records();
    snapshot.operations.moves_at_a_time = 1;
    let moves = [planned(1, 2, 4), planned(2, 2, 4)];
    let id = begun(&mut snapshot, work(OperationKind::Rebalance, &moves));
    snapshot.operations.list[0].cancelling = true;
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(joining(&snapshot), [], "it never will vote");
    let left = peer::LeavingReplica { shard: 1, replica: 100, node: 4, ..Default::default() };
    assert_eq!(snapshot.leaving, [left], "it is to be removed");
    assert_eq!(state(&snapshot, id), OperationState::Cancelled);
    assert_eq!((voters(&snapshot, 1), voters(&snapshot, 2)), (vec![1, 2, 3], vec![1, 2, 3]));

    snapshot.leaving.clear();

    // The only move of an operation: the map alone changes.
    begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 2, 4)]));
    snapshot.operations.list[1].cancelling = true;
    assert!(advance(&mut snapshot, &NOBODY, NOW), "it is to be recorded");
    assert_eq!(joining(&snapshot), []);
    snapshot.leaving.clear();

    // One that its group had let vote by then has moved.
    let id = begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 2, 4)]));
    settle(&mut snapshot);
    snapshot.operations.list[2].cancelling = true;
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(voters(&snapshot, 1), [1, 3, 4]);
    let moved = snapshot.operations.find(id).expect("it is remembered");
    assert_eq!((moved.state(), moved.moves_done), (OperationState::Cancelled, 1));
}

#[test]
fn a_paused_operation_ends_what_it_began_and_begins_nothing() {
    let mut snapshot = records();
    snapshot.operations.moves_at_a_time = 1;
    let moves = [planned(1, 2, 4), planned(2, 2, 4)];
    let id = begun(&mut snapshot, work(OperationKind::Rebalance, &moves));
    snapshot.operations.list[0].state = OperationState::Paused.into();
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!((voters(&snapshot, 1), joining(&snapshot).len()), (vec![1, 3, 4], 0));
    assert_eq!(state(&snapshot, id), OperationState::Paused);
    snapshot.operations.list[0].state = OperationState::Running.into();
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(joining(&snapshot).len(), 1);
}

#[test]
fn an_undone_operation_leaves_the_placement_before_it() {
    let mut snapshot = records();
    let moves = [planned(1, 1, 4), planned(1, 2, 5), planned(2, 3, 5)];
    let id = begun(&mut snapshot, work(OperationKind::Rebalance, &moves));
    for _ in 0..3 {
        settle(&mut snapshot);
        advance(&mut snapshot, &NOBODY, NOW);
    }
    assert_eq!(state(&snapshot, id), OperationState::Done);
    let back = reversed(snapshot.operations.find(id).expect("with its moves"));
    let undo = begun(&mut snapshot, back);
    for _ in 0..3 {
        settle(&mut snapshot);
        advance(&mut snapshot, &NOBODY, NOW);
    }
    assert_eq!(state(&snapshot, undo), OperationState::Done);
    assert_eq!((voters(&snapshot, 1), voters(&snapshot, 2)), (vec![1, 2, 3], vec![1, 2, 3]));
}

#[test]
fn a_voter_comes_beside_the_others_and_goes_without_another() {
    let mut snapshot = records();
    begun(&mut snapshot, work(OperationKind::Repair, &[planned(1, 0, 4)]));
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(voters(&snapshot, 1), [1, 2, 3, 4]);
    let id = begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 2, 0)]));
    let goes = snapshot.map.shards[0].replicas.iter().filter(|replica| replica.goes);
    assert_eq!(goes.map(|replica| replica.node).collect::<Vec<_>>(), [2]);
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!((voters(&snapshot, 1), state(&snapshot, id)), (vec![1, 3, 4], OperationState::Done));
}

#[test]
fn a_decommissioned_node_ends_empty_and_only_then() {
    let mut snapshot = records();
    snapshot.map.nodes[2].state = NodeState::Decommissioning.into();
    let moves = [planned(1, 3, 4)];
    let id = begun(&mut snapshot, Work { node: 3, ..work(OperationKind::Decommission, &moves) });
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(state(&snapshot, id), OperationState::Running, "s2 is there still");
    assert!(extend(&mut snapshot, id, &[planned(2, 3, 5)]));
    advance(&mut snapshot, &NOBODY, NOW);
    settle(&mut snapshot);
    snapshot.leaving.push(peer::LeavingReplica {
        shard: 2,
        replica: 23,
        node: 3,
        ..Default::default()
    });
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(state(&snapshot, id), OperationState::Running, "what it held is being removed");
    snapshot.leaving.clear();
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(state(&snapshot, id), OperationState::Done);
    assert_eq!(snapshot.map.nodes[2].state(), NodeState::Decommissioned);
    let ended = snapshot.operations.find(id).expect("it is remembered");
    assert_eq!((ended.moves_done, ended.moves_all), (2, 2));
}

#[test]
fn operations_that_would_undo_each_other_are_refused() {
    let mut snapshot = records();
    let id = begun(&mut snapshot, work(OperationKind::Rebalance, &[planned(1, 2, 4)]));
    for kind in [OperationKind::Rebalance, OperationKind::Move, OperationKind::Balance] {
        let why = begin(&mut snapshot, work(kind, &[planned(2, 2, 4)]), NOW);
        assert!(why.expect_err("one at a time").contains(&id.to_string()));
    }
    // What has to be mended is mended beside, but for what is being moved.
    let moves = [planned(1, 1, 5), planned(2, 1, 5)];
    let repair = begun(&mut snapshot, work(OperationKind::Repair, &moves));
    let repair = snapshot.operations.find(repair).expect("it is remembered");
    assert_eq!(repair.moves.iter().map(|step| step.shard).collect::<Vec<_>>(), [2]);

    // Before what only waits, though it came later and the other is paused.
    let mut snapshot = records();
    snapshot.operations.moves_at_a_time = 1;
    let moves = [planned(1, 2, 4), planned(2, 2, 4)];
    let id = begun(&mut snapshot, work(OperationKind::Rebalance, &moves));
    snapshot.operations.list[0].state = OperationState::Paused.into();
    begin(&mut snapshot, work(OperationKind::Repair, &[planned(2, 1, 5)]), NOW).expect("it mends");
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!(joining(&snapshot).iter().map(|r| r.node).collect::<Vec<_>>(), [5]);
    let waits = snapshot.operations.find(id).expect("it is remembered");
    assert_eq!(waits.moves[1].state(), OperationState::Cancelled);

    let mut snapshot = records();
    for (wrong, why) in
        [(planned(1, 4, 5), "n4"), (planned(9, 1, 4), "s9"), (planned(1, 0, 0), "s1")]
    {
        let refused = begin(&mut snapshot, work(OperationKind::Move, &[wrong]), NOW);
        assert!(refused.expect_err("it makes no sense").contains(why));
    }
    assert!(snapshot.operations.list.is_empty());
}

#[test]
fn a_node_that_takes_nothing_or_holds_a_replica_fails_the_move() {
    for (to, state) in [(4, NodeState::Draining), (4, NodeState::Gone), (3, NodeState::Active)] {
        let mut snapshot = records();
        snapshot.map.nodes[to as usize - 1].state = state.into();
        let id = begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 2, to)]));
        assert_eq!(super::tests::state(&snapshot, id), OperationState::Failed, "n{to} {state:?}");
        assert_eq!(joining(&snapshot), []);
    }
}

#[test]
fn a_move_to_a_node_that_is_given_up_fails_and_waits_for_nothing() {
    let mut snapshot = records();
    let id = begun(&mut snapshot, work(OperationKind::Repair, &[planned(1, 2, 4)]));
    give_up(&mut snapshot);
    // Its node can't remove it: it does not answer.
    snapshot.leaving.push(peer::LeavingReplica {
        shard: 1,
        replica: 100,
        node: 4,
        ..Default::default()
    });
    advance(&mut snapshot, &BTreeSet::from([4]), NOW);
    assert_eq!(state(&snapshot, id), OperationState::Failed);
    assert!(!snapshot.operations.is_busy(1), "another node can take it");
}

#[test]
fn an_only_voter_goes_when_the_other_votes_and_one_that_went_by_itself_ends_the_move() {
    let mut snapshot = records();
    snapshot.map.shards[0].replicas.truncate(1);
    let id = begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 1, 4)]));
    // Its group lets the new one vote, and keeps the old one: it leads.
    let comes = snapshot.map.shards[0].replicas[1];
    let role = ReplicaRole::Voter.into();
    snapshot.map.shards[0].replicas[1] =
        v1::Replica { id: comes.id, node: comes.node, role, ..Default::default() };
    assert!(advance(&mut snapshot, &NOBODY, NOW), "it is to be recorded");
    assert!(snapshot.map.shards[0].replicas[0].goes);
    settle(&mut snapshot);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!((voters(&snapshot, 1), state(&snapshot, id)), (vec![4], OperationState::Done));

    let mut snapshot = records();
    let id = begun(&mut snapshot, work(OperationKind::Move, &[planned(1, 2, 4)]));
    snapshot.map.shards[0].replicas.retain(|replica| replica.node != 2);
    advance(&mut snapshot, &NOBODY, NOW);
    assert_eq!((joining(&snapshot), state(&snapshot, id)), (vec![], OperationState::Failed));
}

#[test]
fn what_has_ended_is_remembered_for_a_while_and_the_newest_with_its_moves() {
    let mut snapshot = records();
    for round in 0..20 {
        let (from, to) = if round % 2 == 0 { (2, 4) } else { (4, 2) };
        begun(&mut snapshot, work(OperationKind::Move, &[planned(1, from, to)]));
        settle(&mut snapshot);
        advance(&mut snapshot, &NOBODY, NOW);
    }
    let list = &snapshot.operations.list;
    assert_eq!((list.len(), list[0].id, snapshot.operations.last_id), (16, 5, 20));
    assert!(list[..15].iter().all(|ended| ended.moves.is_empty() && ended.moves_all == 1));
    assert_eq!(list[15].moves.len(), 1);
    let record = snapshot.operations.to_proto();
    assert_eq!(Operations::from_proto(record), Ok(snapshot.operations));
}

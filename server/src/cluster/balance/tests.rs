//! What begins by itself, on records and what a controller knows of nodes.

use v1::ReplicaRole;

use super::*;
use crate::cluster::testing;
use crate::placement::model::Disk;

const SHARDS: u64 = 6;
const NOW_MS: u64 = 1_000_000;

/// Six shards beside the meta group, all on n1 to n3; n1 leads all. As many more nodes hold nothing. All
/// of them are heard for long, and have said how they are.
fn world(more: u64) -> (Snapshot, Knowledge, Instant) {
    let snapshot = testing::records((0..=SHARDS).map(testing::shard), 3 + more);
    let begun = Instant::now();
    let nodes: Vec<u64> = (1..=3 + more).collect();
    let known = Knowledge {
        bytes: (0..=SHARDS).map(|shard| (shard, 1 << 20)).collect(),
        leaders: (0..=SHARDS).map(|shard| (shard, 1)).collect(),
        reported: nodes.iter().map(|node| (*node, begun)).collect(),
        nodes: Some((nodes, begun)),
        ..Knowledge::default()
    };
    (snapshot, known, begun + Duration::from_secs(60))
}

fn only(snapshot: &Snapshot) -> v1::ClusterOperation {
    let active: Vec<_> = snapshot.operations.active().cloned().collect();
    let [one] = active.as_slice() else { panic!("one operation, not {active:?}") };
    one.clone()
}

fn fail_all(snapshot: &mut Snapshot, now_ms: u64) {
    for operation in snapshot.operations.list.iter_mut().filter(|known| is_active(known)) {
        operation.state = OperationState::Failed.into();
        operation.ended_ms = now_ms;
    }
}

fn ways(operation: &v1::ClusterOperation) -> Vec<(u64, u64, u64)> {
    operation.moves.iter().map(|step| (step.shard, step.from_node, step.to_node)).collect()
}

#[test]
fn a_node_that_is_added_fills_by_itself_once_all_has_settled() {
    let (mut snapshot, mut known, now) = world(1);
    let early = known.nodes.as_ref().expect("set").1 + Duration::from_secs(9);
    assert!(!act(&mut snapshot, &known, early, NOW_MS), "others may be on their way");
    let said = known.reported.remove(&4);
    assert!(!act(&mut snapshot, &known, now, NOW_MS), "nobody knows how it is");
    known.reported.extend(said.map(|at| (4, at)));
    snapshot.operations.manual = true;
    assert!(!act(&mut snapshot, &known, now, NOW_MS), "it is turned off");
    snapshot.operations.manual = false;
    assert!(act(&mut snapshot, &known, now, NOW_MS));
    let balance = only(&snapshot);
    // 21 voters on four nodes.
    assert_eq!((balance.kind(), balance.moves.len()), (OperationKind::Balance, 5));
    assert!(balance.moves.iter().all(|step| step.to_node == 4));
    assert!(!act(&mut snapshot, &known, now, NOW_MS), "one at a time");
}

#[test]
fn a_full_disk_takes_nothing_more_and_it_is_said() {
    let (mut snapshot, mut known, now) = world(1);
    known.disks.insert(4, Disk { capacity: 100 << 20, used: 86 << 20 });
    assert!(!act(&mut snapshot, &known, now, NOW_MS));
    let reasons = balancing(&snapshot, &known, now).reasons;
    assert!(reasons.iter().any(|why| why.contains("n4 is 86 % full")), "{reasons:?}");
    snapshot.operations.disk_fill_max = 950;
    assert!(act(&mut snapshot, &known, now, NOW_MS), "it may be set");
    // Of a large disk the rest is more than anybody needs.
    let (mut snapshot, mut known, now) = world(1);
    known.disks.insert(4, Disk { capacity: 1 << 40, used: (1 << 40) - (10 << 30) });
    assert!(act(&mut snapshot, &known, now, NOW_MS));
}

#[test]
fn weights_count_and_what_is_even_within_the_threshold_stays() {
    let (mut snapshot, known, now) = world(1);
    snapshot.map.nodes[3].weight = 3_000;
    let heavy = planned(&snapshot, &known, Goal::Balance, now);
    assert_eq!(heavy.copies(), 7, "all that one node can hold of seven shards");
    snapshot.map.nodes[3].weight = 0;
    snapshot.operations.threshold = 400;
    assert!(!act(&mut snapshot, &known, now, NOW_MS), "a third above its share at most");
    snapshot.operations.threshold = 300;
    assert!(act(&mut snapshot, &known, now, NOW_MS));
}

#[test]
fn hot_shards_are_led_apart_but_not_all_the_time() {
    let (mut snapshot, mut known, now) = world(0);
    for shard in 0..=SHARDS {
        // Two of its replicas count: leadership has moved lately.
        known.loads.extend([((shard, 1), 300), ((shard, 2), 100)]);
    }
    assert_eq!(known.load(3), 400);
    assert!(act(&mut snapshot, &known, now, NOW_MS));
    let balance = only(&snapshot);
    assert!(balance.moves.is_empty() && balance.transfers.len() >= 3, "{:?}", balance.transfers);
    let end = |snapshot: &mut Snapshot, at: u64| {
        let last = snapshot.operations.list.last_mut().expect("it is there");
        (last.state, last.ended_ms) = (OperationState::Done.into(), at);
        last.transfers.clear();
    };
    end(&mut snapshot, NOW_MS);
    assert!(!act(&mut snapshot, &known, now, NOW_MS + 29_000), "loads are of the past");
    assert!(act(&mut snapshot, &known, now, NOW_MS + 30_000));
    assert_eq!(snapshot.operations.list.len(), 1, "the one before moved nothing that is undone");
    end(&mut snapshot, NOW_MS + 31_000);
    known.loads.values_mut().for_each(|load| *load = 1);
    assert!(!act(&mut snapshot, &known, now, NOW_MS + 99_000), "idle shards are led anywhere");
}

#[test]
fn what_fails_is_tried_again_later_and_later_in_the_place_of_the_one_before() {
    let (mut snapshot, mut known, now) = world(1);
    known.silent.insert(3, now - Duration::from_secs(301));
    let mut at = NOW_MS;
    assert!(act(&mut snapshot, &known, now, at));
    let first = only(&snapshot);
    assert_eq!((first.kind(), first.node, first.failures), (OperationKind::Repair, 3, 0));
    for (failures, wait) in [(1, 5_000), (2, 10_000), (3, 20_000)] {
        fail_all(&mut snapshot, at);
        assert!(!act(&mut snapshot, &known, now, at + wait - 1), "{failures}");
        at += wait;
        assert!(act(&mut snapshot, &known, now, at), "{failures}");
        assert_eq!(only(&snapshot).failures, failures);
        assert_eq!(snapshot.operations.list.len(), 1, "it pushes no other out");
    }
    for _ in 0..20 {
        fail_all(&mut snapshot, at);
        at += 600_000;
        assert!(act(&mut snapshot, &known, now, at), "at least every ten minutes");
    }
    let mut list = snapshot.operations.list.iter_mut();
    let last = list.next_back().expect("it is there");
    (last.state, last.ended_ms) = (OperationState::Done.into(), at);
    assert!(act(&mut snapshot, &known, now, at), "once it went well it is new again");
    assert_eq!(only(&snapshot).failures, 0);
}

#[test]
fn a_voter_that_its_node_has_lost_goes_and_comes_anew() {
    let (mut snapshot, mut known, now) = world(1);
    snapshot.operations.manual = true;
    let lost_since = |seconds| now - Duration::from_secs(seconds);
    known.damaged.insert(22, lost_since(9));
    assert!(!act(&mut snapshot, &known, now, NOW_MS), "maps may differ for a moment");
    known.damaged.insert(22, lost_since(10));
    assert!(act(&mut snapshot, &known, now, NOW_MS));
    let repair = only(&snapshot);
    assert_eq!(repair.kind(), OperationKind::Repair);
    assert_eq!(ways(&repair), [(2, 2, 0), (2, 0, 4)], "it goes, then another comes");
    // Where all others are needed too, nothing is touched.
    for trouble in [
        |known: &mut Knowledge, since| known.silent.extend([(1, since)]),
        |known: &mut Knowledge, since| known.damaged.extend([(23, since)]),
    ] {
        let (mut snapshot, mut known, now) = world(0);
        known.damaged.insert(22, now - Duration::from_secs(10));
        trouble(&mut known, now);
        assert!(!act(&mut snapshot, &known, now, NOW_MS), "{:?}", snapshot.operations.list);
    }
    // On three nodes it comes back where it was.
    let (mut snapshot, mut known, now) = world(0);
    known.damaged.insert(22, now - Duration::from_secs(10));
    assert!(act(&mut snapshot, &known, now, NOW_MS));
    assert_eq!(ways(&only(&snapshot)), [(2, 2, 0), (2, 0, 2)]);
}

#[test]
fn a_replica_that_has_stopped_counts_as_lost_unless_its_node_ends() {
    use coracle_proto::peer;
    use prost::Message;

    let (mut snapshot, mut known, now) = world(1);
    let report = |role: &str| {
        let (shard, replica, role) = (2, 22, role.to_owned());
        let status = v1::GroupStatus { shard, replica, role, ..Default::default() };
        let replicas = vec![status.encode_to_vec().into()];
        peer::NodeReport { replicas, ..Default::default() }
    };
    let later = now + Duration::from_secs(10);
    known.learn(2, &report("stopped"), now);
    known.follow(&snapshot.map);
    assert!(known.is_lost(22, later) && !known.is_lost(22, now));
    assert!(act(&mut snapshot, &known, later, NOW_MS));
    assert_eq!(ways(&only(&snapshot)), [(2, 2, 0), (2, 0, 4)], "it comes anew");
    let (snapshot, ..) = world(1);
    // Its groups stop, then it says nothing.
    known.silent.insert(2, now + Duration::from_secs(6));
    known.follow(&snapshot.map);
    assert!(!known.is_lost(22, later));
    known.silent.clear();
    known.learn(2, &report("stopped"), now);
    known.learn(2, &report("follower"), now);
    assert!(!known.is_lost(22, later), "it was started again");
}

#[test]
fn where_voters_find_no_place_read_replicas_are_raised() {
    let (mut snapshot, mut known, now) = world(1);
    snapshot.operations.manual = true;
    let learner =
        v1::Replica { id: 500, node: 4, role: ReplicaRole::Learner.into(), ..Default::default() };
    snapshot.map.shards[2].replicas.push(learner);
    known.silent.insert(3, now - Duration::from_secs(301));
    assert!(act(&mut snapshot, &known, now, NOW_MS));
    let repair = only(&snapshot);
    assert!(ways(&repair).contains(&(2, 3, 4)), "{:?}", ways(&repair));
    let none = Default::default();
    snapshot.operations.moves_at_a_time = 20;
    for _ in 0..SHARDS {
        operations::advance(&mut snapshot, &none, NOW_MS);
        // Whatever has begun elsewhere ends.
        for shard in snapshot.map.shards.iter_mut().filter(|shard| shard.id != 2) {
            shard.replicas.retain(|replica| replica.node != 3);
            for replica in shard.replicas.iter_mut().filter(|replica| replica.joining) {
                replica.role = ReplicaRole::Voter.into();
                (replica.joining, replica.becomes_voter, replica.replaces) = (false, false, 0);
            }
        }
    }
    let raised = snapshot.map.shards[2].replicas.iter().find(|replica| replica.node == 4);
    let raised = raised.expect("it is there");
    assert_eq!((raised.id, raised.replaces), (500, 23), "the very replica that read");
    assert!(raised.joining && raised.becomes_voter);
}

#[test]
fn a_node_that_leaves_is_emptied_and_says_what_it_waits_for() {
    let (mut snapshot, known, now) = world(0);
    snapshot.map.nodes[2].state = NodeState::Decommissioning.into();
    assert!(act(&mut snapshot, &known, now, NOW_MS), "it waits, visibly");
    assert!(act(&mut snapshot, &known, now, NOW_MS));
    let waits = only(&snapshot);
    assert_eq!((waits.kind(), waits.node), (OperationKind::Decommission, 3));
    assert!(waits.message.contains("n3 still holds 7 replicas"), "{}", waits.message);
    assert!(!act(&mut snapshot, &known, now, NOW_MS), "nothing is new");
    let more = v1::Node { id: 4, state: NodeState::Active.into(), ..Default::default() };
    snapshot.map.nodes.push(more);
    assert!(act(&mut snapshot, &known, now, NOW_MS));
    assert_eq!(only(&snapshot).moves.len(), 7);
}

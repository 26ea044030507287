//! Changes of the records, by themselves: each can be made again, and none undoes what another
//! controller has recorded meanwhile.

use super::*;

fn replica(id: u64, node: u64, role: v1::ReplicaRole, joining: bool) -> v1::Replica {
    v1::Replica { id, node, role: role.into(), joining, ..Default::default() }
}

/// Five nodes in zones a, b, c, a, b; the meta group and two shards on the first three.
fn snapshot() -> Snapshot {
    let shard = |id: u64, start, end| v1::Shard {
        id,
        start,
        end,
        epoch: 1,
        replicas: (1..=3)
            .map(|node| replica(id * 3 + node, node, v1::ReplicaRole::Voter, false))
            .collect(),
        ..Default::default()
    };
    let node = |(id, zone): (u64, &str)| v1::Node {
        id,
        zone: zone.to_owned(),
        state: v1::NodeState::Active.into(),
        ..Default::default()
    };
    Snapshot {
        map: v1::ShardMap {
            cluster_id: "c".to_owned(),
            epoch: 1,
            shards: vec![shard(0, 0, 0), shard(1, 0, 9), shard(2, 9, 0)],
            nodes: (1..).zip(["a", "b", "c", "a", "b"]).map(node).collect(),
            read_replicas: vec![v1::ReadReplicas { zone: "a".to_owned(), learners: 1 }],
            ..Default::default()
        },
        ids: peer::IdCounters { next_replica: 10, ..Default::default() },
        leaving: Vec::new(),
        operations: Default::default(),
        version: 1,
    }
}

fn silent(node: u64) -> Outlook {
    Outlook { silent: BTreeMap::from([(node, Instant::now())]), ..Outlook::default() }
}

fn learners(snapshot: &Snapshot) -> Vec<(u64, u64, u64, bool)> {
    let of = |shard: &v1::Shard| {
        let learners = shard.replicas.iter().filter(|replica| !is_voter(replica));
        learners.map(|r| (shard.id, r.id, r.node, r.joining)).collect::<Vec<_>>()
    };
    snapshot.map.shards.iter().flat_map(of).collect()
}

#[test]
fn plan_is_entered_under_fresh_ids_and_only_once() {
    let mut records = snapshot();
    let nobody = Outlook::default();
    assert!(enter_plan(&mut records, &nobody));
    assert_eq!(learners(&records), [(1, 10, 4, true), (2, 11, 4, true)], "and none of shard 0");
    assert_eq!(records.ids.next_replica, 12);
    assert!(!enter_plan(&mut records, &nobody));
    assert!(enter(&mut records, &Change::Settle { shard: 1, replica: 10 }));
    assert!(!enter(&mut records, &Change::Settle { shard: 1, replica: 10 }));
    assert_eq!(learners(&records), [(1, 10, 4, false), (2, 11, 4, true)]);
}

#[test]
fn only_a_few_join_at_a_time() {
    let mut records = snapshot();
    let shard = records.map.shards[2].clone();
    for id in 3..20 {
        let mut more = v1::Shard { id, ..shard.clone() };
        more.replicas.iter_mut().for_each(|replica| replica.id += 100 * id);
        records.map.shards.push(more);
    }
    assert!(enter_plan(&mut records, &Outlook::default()));
    assert_eq!(learners(&records).len(), JOINING_MAX);
    assert!(!enter_plan(&mut records, &Outlook::default()));
    let waiting = silent(4);
    records.map.read_replicas[0].zone = String::new();
    assert!(enter_plan(&mut records.clone(), &waiting), "those of a silent node hold nobody up");
    let stalled = learners(&records).iter().map(|(_, replica, _, _)| *replica).collect();
    let stalled = Outlook { stalled, ..Outlook::default() };
    assert!(enter_plan(&mut records.clone(), &stalled), "nor do those that do not move");
    records.map.read_replicas[0].zone = "a".to_owned();
    let (shard, replica, _, _) = learners(&records)[0];
    enter(&mut records, &Change::Settle { shard, replica });
    assert!(enter_plan(&mut records, &Outlook::default()));
    assert_eq!(learners(&records).len(), JOINING_MAX + 1);
}

#[test]
fn one_that_leaves_is_remembered_until_it_is_gone_and_keeps_its_place() {
    let mut records = snapshot();
    enter_plan(&mut records, &Outlook::default());
    records.map.read_replicas.clear();
    assert!(enter_plan(&mut records, &Outlook::default()));
    assert_eq!(learners(&records), []);
    let left: Vec<_> = records.leaving.iter().map(|l| (l.shard, l.replica, l.node)).collect();
    assert_eq!(left, [(1, 10, 4), (2, 11, 4)]);
    assert!(!enter_plan(&mut records, &Outlook::default()));
    // Asked for again: not before the node has let go of the last one.
    records.map.read_replicas.push(v1::ReadReplicas { zone: "a".to_owned(), learners: 1 });
    assert!(!enter_plan(&mut records, &Outlook::default()));
    assert!(enter(&mut records, &Change::Forget { replica: 10 }));
    assert!(!enter(&mut records, &Change::Forget { replica: 10 }));
    assert!(enter_plan(&mut records, &Outlook::default()));
    assert_eq!(learners(&records), [(1, 12, 4, true)], "never the old id");
}

#[test]
fn nothing_is_asked_of_a_silent_node() {
    let mut records = snapshot();
    let silent = silent(4);
    assert!(!enter_plan(&mut records, &silent));
    records.map.read_replicas[0].zone = String::new();
    assert!(enter_plan(&mut records, &silent));
    assert_eq!(learners(&records), [(1, 10, 5, true), (2, 11, 5, true)]);
}

#[test]
fn late_word_of_a_stray_does_not_undo_what_was_recorded() {
    let mut records = snapshot();
    enter_plan(&mut records, &Outlook::default());
    let stray = |replica| Change::Withdraw { shard: 1, replica, node: 4, stray: true };
    assert!(!enter(&mut records, &stray(10)), "it was recorded meanwhile");
    assert!(!enter(&mut records, &stray(4)), "it votes");
    assert!(!enter(&mut records, &stray(12)), "no such id was ever given");
    records.ids.next_replica = 13;
    assert!(enter(&mut records, &stray(12)));
    assert!(!enter(&mut records, &stray(12)), "it leaves already");
    let known = Change::Withdraw { shard: 1, replica: 10, node: 4, stray: false };
    assert!(enter(&mut records, &known));
    assert!(!enter(&mut records, &known));
    let voter = Change::Withdraw { shard: 1, replica: 4, node: 1, stray: false };
    assert!(!enter(&mut records, &voter));
    assert!(enter(&mut records, &Change::Epoch { shard: 1, epoch: 3 }));
    assert!(!enter(&mut records, &Change::Epoch { shard: 1, epoch: 2 }), "epochs never fall");
}

#[test]
fn nothing_comes_where_it_failed_and_others_take_its_place() {
    let records = snapshot();
    let entered = |zone: &str, avoided| {
        let mut records = records.clone();
        records.map.read_replicas[0].zone = zone.to_owned();
        enter_plan(&mut records, &Outlook { avoided, ..Outlook::default() });
        learners(&records).iter().map(|(shard, _, node, _)| (*shard, *node)).collect::<Vec<_>>()
    };
    let place = Avoided { places: [(1, 4)].into(), ..Avoided::default() };
    assert_eq!(entered("a", place.clone()), [(2, 4)], "of this shard only");
    assert_eq!(entered("", place), [(1, 5), (2, 4)]);
    let node = Avoided { nodes: [4].into(), ..Avoided::default() };
    assert_eq!(entered("a", node.clone()), []);
    assert_eq!(entered("", node), [(1, 5), (2, 5)]);
}

#[test]
fn the_map_takes_from_a_group_who_votes() {
    let mut records = snapshot();
    let voters = |records: &Snapshot| {
        let replicas = records.map.shards[1].replicas.iter();
        replicas.filter(|r| is_voter(r)).map(|r| (r.id, r.node)).collect::<Vec<_>>()
    };
    let before = voters(&records);
    assert_eq!(before, [(4, 1), (5, 2), (6, 3)]);
    let change =
        |epoch, voters: &[(u64, u64)]| Change::Voters { shard: 1, epoch, voters: voters.to_vec() };
    let role = v1::ReplicaRole::Learner;
    let comes = v1::Replica { becomes_voter: true, replaces: 5, ..replica(70, 4, role, true) };
    records.map.shards[1].replicas.push(comes);
    let moved = [(4, 1), (6, 3), (70, 4)];
    records.map.shards[1].epoch = 3;
    assert!(!enter(&mut records, &change(2, &moved)), "the group has changed since");
    assert_eq!(voters(&records), before);
    assert!(enter(&mut records, &change(4, &moved)));
    assert_eq!((voters(&records), records.map.shards[1].epoch), (moved.to_vec(), 4));
    let settled = records.map.shards[1].replicas[2];
    assert_eq!(settled, replica(70, 4, v1::ReplicaRole::Voter, false));
    let left =
        |shard, replica, node| peer::LeavingReplica { shard, replica, node, ..Default::default() };
    assert_eq!(records.leaving, [left(1, 5, 2)], "it is to be removed");
    assert!(!enter(&mut records, &change(4, &moved)), "the map says so already");

    // One that was given up just as its group let it vote stays after all.
    records.leaving.push(left(1, 71, 5));
    assert!(enter(&mut records, &change(6, &[(4, 1), (70, 4), (71, 5)])));
    assert_eq!(voters(&records), [(4, 1), (70, 4), (71, 5)]);
    assert_eq!(records.leaving, [left(1, 5, 2), left(1, 6, 3)]);
}

//! The shard map: good ones locate every key, bad ones are refused by name, none panics.

use coracle_proto::ring::{Position, TilingError, equal_arcs};
use coracle_proto::shard_map::*;
use coracle_proto::{entity::EntityRule, v1};
use proptest::prelude::*;

fn replica(id: u64, node: u64) -> v1::Replica {
    v1::Replica { id, node, role: v1::ReplicaRole::Voter.into(), ..Default::default() }
}

/// Shard `id` on nodes 1 to 3.
fn shard(id: u64, start: u64, end: u64) -> v1::Shard {
    v1::Shard {
        id,
        start,
        end,
        epoch: 1,
        replicas: (1..=3).map(|node| replica(id * 3 + node, node)).collect(),
        leader_node: 0,
        leader_term: 0,
        forming: id == 2,
    }
}

fn keyspace(id: u32, name: &str, rule: EntityRule) -> v1::Keyspace {
    let (name, entity_rule) = (name.to_owned(), Some(rule.into()));
    v1::Keyspace { id, name, entity_rule, history_ms: 60_000, revision: 2 }
}

fn map(shards: u32) -> v1::ShardMap {
    let arcs = equal_arcs(shards).into_iter().zip(1..);
    let on_ring = arcs.map(|(arc, id)| shard(id, arc.start().0, arc.end()));
    v1::ShardMap {
        cluster_id: "c1".into(),
        hash_seed: 12_626_974,
        epoch: 5,
        shards: [shard(0, 0, 0)].into_iter().chain(on_ring).collect(),
        nodes: (1..=3)
            .map(|id| v1::Node {
                id,
                address: format!("n{id}:7400"),
                state: v1::NodeState::Active.into(),
                join_nonce: id + 70,
                weight: 1_500,
                ..Default::default()
            })
            .collect(),
        keyspaces: vec![
            keyspace(0, "system", EntityRule::Whole),
            keyspace(1, "default", EntityRule::Whole),
            keyspace(2, "users", EntityRule::Delimiter(b'/')),
        ],
        server_time_ms: 99,
        read_replicas: vec![v1::ReadReplicas { zone: "a".into(), learners: 2 }],
        replicas: 5,
    }
}

fn checked(map: &v1::ShardMap) -> ShardMap {
    ShardMap::from_proto(map).expect("a good map")
}

#[test]
fn keys_are_located() {
    let map = checked(&map(16));
    assert_eq!(map.locate(Position(0)).id, ShardId(1));
    assert_eq!(map.locate(Position(u64::MAX)).id, ShardId(16));
    assert_eq!(map.locate(Position(0x1000_0000_0000_0000)).id, ShardId(2));
    assert_eq!(map.locate(Position(0x0fff_ffff_ffff_ffff)).id, ShardId(1));

    // The README's vector for this seed, keyspace and entity: af5a….
    let default = map.keyspace("").expect("always there");
    assert_eq!(map.locate_key(default, b"user:42/").id, ShardId(0xa + 1));
    let users = map.keyspace("users").expect("in the map");
    assert_eq!(map.position_of(users, b"u/1"), map.position_of(users, b"u/2"));
    assert_ne!(map.position_of(default, b"u/1"), map.position_of(default, b"u/2"));
    let system = map.keyspace("system").expect("in the map");
    assert_eq!(map.locate_key(system, b"node/1").id, META_SHARD);
}

#[test]
fn parts_are_found() {
    let map = checked(&map(4));
    assert_eq!(map.shard(META_SHARD).expect("meta").arc, None);
    assert_eq!(map.shard(ShardId(4)).expect("last").id, ShardId(4));
    assert_eq!(map.shard(ShardId(5)), None);
    assert_eq!(map.node(NodeId(3)).expect("node").address, "n3:7400");
    assert_eq!(map.node(NodeId(4)), None);
    assert_eq!(map.keyspace("default").expect("name").id, DEFAULT_KEYSPACE);
    assert_eq!(map.keyspace_by_id(KeyspaceId(2)).expect("id").name, "users");
    assert_eq!(map.keyspace("nope"), None);
    assert_eq!((map.shards().len(), map.all_shards().count()), (4, 5));
    assert_eq!(map.shards()[0].voters().count(), 3);
    assert_eq!(map.shards()[0].replica_on(NodeId(2)).expect("there").id, ReplicaId(5));
}

#[test]
fn order_on_the_wire_does_not_matter() {
    let given = map(7);
    let mut shuffled = given.clone();
    shuffled.shards.reverse();
    shuffled.keyspaces.reverse();
    shuffled.nodes.reverse();
    assert_eq!(checked(&shuffled), checked(&given));
    assert_eq!(checked(&shuffled).to_proto(), given);
}

#[test]
fn bad_maps_are_refused_by_name() {
    type Change = fn(&mut v1::ShardMap);
    let cases: [(&str, Change); 22] = [
        ("of cluster", |map| map.cluster_id.clear()),
        ("no arc covers position 4000000000000000", |map| drop(map.shards.remove(2))),
        ("no arc covers position c000000000000000", |map| drop(map.shards.pop())),
        ("two arcs cover", |map| map.shards[2].start -= 1),
        ("no arc covers position 4000000000000000", |map| map.shards[2].start += 1),
        ("arc is empty or wraps", |map| map.shards[2].end = 5),
        ("meta group is missing", |map| drop(map.shards.remove(0))),
        ("meta group has no arc", |map| map.shards[0].end = 9),
        ("it stands in the map twice", |map| map.shards[2].id = 1),
        ("replica ids stands", |map| map.shards[2].replicas[0].id = 4),
        ("two of its replicas", |map| map.shards[2].replicas[0].node = 2),
        ("no id or no node", |map| map.shards[2].replicas[0].id = 0),
        ("no id or no node", |map| map.shards[2].replicas[0].node = 0),
        ("no known role", |map| map.shards[2].replicas[0].role = 9),
        ("no voter", |map| map.shards[2].replicas.clear()),
        ("node 2: it stands", |map| map.nodes[0].id = 2),
        ("node 0: ids count", |map| map.nodes[0].id = 0),
        ("id or name stands twice", |map| {
            map.keyspaces.push(keyspace(3, "users", EntityRule::Whole))
        }),
        ("belong to the names", |map| map.keyspaces[1].name = "system".into()),
        ("keyspace name has 0x55", |map| map.keyspaces[2].name = "Users".into()),
        ("entity rule is missing", |map| map.keyspaces[2].entity_rule = None),
        ("33 replicas of a shard", |map| {
            map.shards[1].replicas = (1..=33).map(|id| replica(id + 90, id)).collect();
        }),
    ];
    for (expected, change) in cases {
        let mut map = map(4);
        change(&mut map);
        let error = match ShardMap::from_proto(&map) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("accepted: {expected}"),
        };
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
}

#[test]
fn maps_that_lack_something_are_refused() {
    let mut renamed = map(1);
    renamed.keyspaces[2].id = 0;
    renamed.keyspaces.remove(0);
    assert!(ShardMap::from_proto(&renamed).is_err(), "id 0 under another name");
    let empty = v1::ShardMap { cluster_id: "c".into(), ..Default::default() };
    assert!(ShardMap::from_proto(&empty).is_err());
    let mut no_arcs = map(1);
    no_arcs.shards.truncate(1);
    let gap = ShardMapError::Tiling(TilingError::Gap(Position(0)));
    assert_eq!(ShardMap::from_proto(&no_arcs), Err(gap));
}

#[test]
fn states_of_a_newer_version_are_no_error() {
    let mut map = map(1);
    map.nodes[0].state = 77;
    assert_eq!(checked(&map).node(NodeId(1)).expect("node").state, NodeState::Unspecified);
}

#[test]
fn the_higher_term_leads() {
    let mut map = checked(&map(2));
    let id = ShardId(2);
    let leader = |map: &ShardMap| map.shard(id).map(|shard| (shard.leader, shard.leader_term));
    assert_eq!(leader(&map), Some((None, 0)));
    assert!(map.learn_leader(id, NodeId(1), 4));
    assert!(!map.learn_leader(id, NodeId(2), 4), "one leader a term");
    assert!(!map.learn_leader(id, NodeId(2), 3), "older");
    assert!(!map.learn_leader(id, NodeId(9), 8), "no replica there");
    assert!(!map.learn_leader(ShardId(9), NodeId(1), 8), "no such shard");
    assert_eq!(leader(&map), Some((Some(NodeId(1)), 4)));
    assert!(map.learn_leader(id, NodeId(2), 5));
    assert!(map.learn_leader(META_SHARD, NodeId(3), 1));
    assert_eq!(map.meta().leader, Some(NodeId(3)));
    assert_eq!(checked(&map.to_proto()), map);
}

#[test]
fn merging_keeps_the_newer_map_and_the_newer_leaders() {
    let old = map(2);
    let mut new = map(4);
    new.epoch = 6;
    new.server_time_ms = 50;
    let (mut old, mut new) = (checked(&old), checked(&new));
    old.learn_leader(ShardId(1), NodeId(1), 7);
    new.learn_leader(ShardId(1), NodeId(2), 3);
    new.learn_leader(ShardId(3), NodeId(3), 2);

    for (mut into, other, changes) in [(old.clone(), new.clone(), true), (new, old.clone(), true)] {
        assert_eq!(into.merge(other.clone()), Ok(changes));
        assert_eq!((into.epoch(), into.shards().len()), (Epoch(6), 4));
        assert_eq!(into.shard(ShardId(1)).expect("there").leader, Some(NodeId(1)));
        assert_eq!(into.shard(ShardId(3)).expect("there").leader, Some(NodeId(3)));
        assert_eq!(into.server_time_ms(), 99);
        assert_eq!(into.merge(other), Ok(false), "nothing new the second time");
    }

    // A leader whose replica has left is not carried over.
    let mut moved = map(2);
    moved.epoch = 7;
    moved.shards[1].replicas.remove(0);
    assert_eq!(old.merge(checked(&moved)), Ok(true));
    assert_eq!(old.shard(ShardId(1)).expect("there").leader, None);

    let mut foreign = map(2);
    foreign.cluster_id = "c2".into();
    let before = old.clone();
    assert!(matches!(old.merge(checked(&foreign)), Err(ShardMapError::Cluster { .. })));
    assert_eq!(old, before);
}

proptest! {
    #[test]
    fn the_located_shard_holds_the_position(
        mut cuts in prop::collection::btree_set(1_u64.., 0..40),
        probes in prop::collection::vec(any::<u64>(), 20),
    ) {
        cuts.insert(0);
        let starts: Vec<u64> = cuts.iter().copied().collect();
        let mut given = map(1);
        given.shards.truncate(1);
        for (at, start) in starts.iter().enumerate() {
            let end = starts.get(at + 1).copied().unwrap_or(0);
            given.shards.push(shard(at as u64 + 1, *start, end));
        }
        let map = checked(&given);
        let edges = starts.iter().flat_map(|start| [*start, start.wrapping_sub(1)]);
        for probe in probes.into_iter().chain(edges).map(Position) {
            prop_assert!(map.locate(probe).contains(probe));
            let holding = map.all_shards().filter(|shard| shard.contains(probe)).count();
            prop_assert_eq!(holding, 1);
        }
        prop_assert_eq!(map.to_proto(), given);
    }

    /// Small numbers, so that ids collide and arcs touch; whatever is accepted can be asked.
    #[test]
    fn no_map_panics(
        shards in prop::collection::vec(
            (0..4_u64, 0..4_u64, 0..4_u64, prop::collection::vec((0..9_u64, 0..4_u64, 0..4), 0..4)),
            0..5,
        ),
        probe: u64,
    ) {
        let shards = shards.into_iter().map(|(id, start, end, replicas)| {
            let replicas = replicas.into_iter().map(|(id, node, role)| {
                let (joining, becomes_voter) = (id % 2 == 0, id % 4 == 0);
                let (replaces, goes) = (if becomes_voter { id + 100 } else { 0 }, id % 3 == 0);
                v1::Replica { id, node, role, joining, becomes_voter, replaces, goes }
            });
            v1::Shard { replicas: replicas.collect(), ..shard(id, start, end) }
        });
        let given = v1::ShardMap { shards: shards.collect(), ..map(1) };
        if let Ok(map) = ShardMap::from_proto(&given) {
            prop_assert!(map.locate(Position(probe)).contains(Position(probe)));
        }
    }
}

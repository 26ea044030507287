//! Requests over a split, on two nodes whose maps learn of it late. Finds a key that is asked of the wrong half
//! for ever, a scan that misses or repeats keys, and a session that reads what is older than it has seen.

use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::Reason;
use coracle_proto::shard_map::{ShardId, ShardMap};
use coracle_proto::token::{Seen, SessionToken};
use coracle_proto::v1;
use coracle_raft::group::{Split, SplitPlan};
use coracle_raft::rules::Rules;
use coracle_server::admission::Call;
use coracle_server::scan::Scan;
use coracle_storage::ReplicaId;
use tokio::time::Instant;

use crate::service_nodes::{Nodes, get, key_on, put, shard_map, shard_of, until};

/// Shard 2, on node 1, which is split in the middle; its child.
const PARENT: u64 = 2;
const CHILD: u64 = 5;

/// Splits on node 1. Nobody's map knows.
async fn split(nodes: &Nodes) -> Split {
    let map = ShardMap::from_proto(&shard_map(1)).expect("a valid map");
    let arc = map.shard(ShardId(PARENT)).and_then(|shard| shard.arc).expect("of the ring");
    let group = nodes.one.host.group(ShardId(PARENT)).expect("it is here");
    let plan = SplitPlan {
        epoch: group.descriptor().expect("described").epoch,
        at: arc.middle().expect("long enough").0,
        child: ShardId(CHILD),
        replicas: [(ReplicaId(100 + PARENT), ReplicaId(100 + CHILD))].into(),
        rules: Rules::of(&map),
    };
    let split = group.split(plan, Instant::now() + Duration::from_secs(20)).await;
    let leads = || nodes.one.host.group(ShardId(CHILD)).is_some_and(|group| group.leads());
    until(leads).await;
    split.expect("a healthy group")
}

/// The map with the split in it.
fn newer(split: &Split) -> v1::ShardMap {
    let mut map = shard_map(2);
    let parent = map.shards.iter_mut().find(|shard| shard.id == PARENT).expect("it is there");
    let (_, middle) = split.parent.arc.expect("of the ring");
    let (_, end) = split.child.arc.expect("of the ring");
    (parent.end, parent.epoch) = (middle, split.parent.epoch);
    let replica = v1::Replica { id: 100 + CHILD, node: 1, role: 1, ..Default::default() };
    map.shards.push(v1::Shard {
        id: CHILD,
        start: middle,
        end,
        epoch: split.child.epoch,
        replicas: vec![replica],
        ..Default::default()
    });
    map.shards[1..].sort_by_key(|shard| shard.start);
    map
}

fn tell(nodes: &Nodes, split: &Split) {
    for node in [&nodes.one, &nodes.two] {
        *node.source.newer.lock() = Some(newer(split));
    }
}

/// Keys of what was shard 2, of the half that the child holds.
fn keys_of_child(split: &Split) -> impl Iterator<Item = String> {
    let map = ShardMap::from_proto(&newer(split)).expect("a valid map");
    let keys = (0..).map(|n| format!("k{n:04}"));
    keys.filter(move |key| {
        let keyspace = map.keyspace("").expect("the default");
        map.locate_key(keyspace, key.as_bytes()).id.0 == CHILD
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_find_the_child_as_soon_as_the_map_knows_it() {
    let nodes = Nodes::start().await;
    for n in 0..200 {
        let key = format!("k{n:04}");
        nodes.two.put(put(&key, &key)).await.expect("a write");
    }
    let split = split(&nodes).await;
    let key = keys_of_child(&split).next().expect("one of many");
    assert_eq!(shard_of("", &key), PARENT, "as the maps have it");
    // The group knows it before any map does.
    let route = Some(v1::Route { shard: PARENT, shard_epoch: 1 });
    let early = nodes.one.put(v1::PutRequest { route, ..put(&key, "early") }).await;
    let served = early.expect("its node holds the child").served;
    assert_eq!(served.map(|served| served.shard), Some(CHILD));
    for node in [&nodes.one, &nodes.two] {
        assert_eq!(node.map.current().map(|map| map.epoch().0), Some(1), "as before");
        assert_eq!(node.value(&key).await.as_deref(), Some("early"));
    }
    nodes.one.put(put(&key, &key)).await.expect("a write");
    tell(&nodes, &split);
    for node in [&nodes.one, &nodes.two] {
        assert_eq!(node.value(&key).await, Some(key.clone()));
        assert_eq!(node.map.current().map(|map| map.epoch().0), Some(2), "it looked again");
    }
    let answer = nodes.two.put(put(&key, "new")).await.expect("a write");
    assert_eq!(answer.served.map(|served| served.shard), Some(CHILD));
    // One that names the old route is told so.
    let route = Some(v1::Route { shard: PARENT, shard_epoch: 1 });
    let stale = nodes.one.put(v1::PutRequest { route, ..put(&key, "x") }).await;
    assert_eq!(stale.expect_err("another shard's").reason, Reason::StaleRoute);
    for n in 0..200 {
        let other = format!("k{n:04}");
        let wanted = if other == key { "new".to_owned() } else { other.clone() };
        assert_eq!(nodes.one.value(&other).await, Some(wanted), "{other}");
    }
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_goes_on_over_a_split_with_nothing_missing_or_twice() {
    for reverse in [false, true] {
        let nodes = Nodes::start().await;
        let value = "v".repeat(200);
        let mut all: Vec<Bytes> = Vec::new();
        for n in 0..400 {
            let key = format!("k{n:04}");
            nodes.one.put(put(&key, &value)).await.expect("a write");
            all.push(key.into());
        }
        if reverse {
            all.reverse();
        }
        let request = v1::ScanRequest { page_bytes: 16 << 10, reverse, ..Default::default() };
        let call = Call::client(None);
        let scan = Scan::begin(nodes.two.router.clone(), request, call).await;
        let (mut scan, mut found, mut pages) = (scan.expect("taken on"), Vec::new(), 0);
        while let Some(page) = scan.next_page().await.expect("it goes on") {
            found.extend(page.entries.into_iter().map(|entry| entry.key));
            pages += 1;
            if pages == 1 {
                let split = split(&nodes).await;
                tell(&nodes, &split);
                // What is written since is not of the scan.
                let key = keys_of_child(&split).nth(3).expect("one of many");
                nodes.one.put(put(&format!("{key}-late"), &value)).await.expect("a write");
                scan.rest();
            }
        }
        assert!(pages > 3, "{pages} pages");
        assert_eq!(found, all);
        nodes.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_served_by_who_descends_from_what_it_has_seen() {
    let nodes = Nodes::start().await;
    let first = key_on(PARENT);
    nodes.one.put(put(&first, "x")).await.expect("a write");
    let far = Seen { term: 9, index: 1_000_000 };
    let split = split(&nodes).await;
    let key = keys_of_child(&split).next().expect("one of many");
    tell(&nodes, &split);
    nodes.one.put(put(&key, "new")).await.expect("a write");
    // How a session that has seen these shards is served: by what is at hand, or by the leader's word.
    let at_hand = async |shards: &[u64]| {
        let mut token = SessionToken::default();
        shards.iter().for_each(|shard| token.observe(ShardId(*shard), far, 0));
        let read = v1::ReadOptions {
            consistency: v1::Consistency::Session.into(),
            session: token.encode(),
            ..Default::default()
        };
        let request = v1::GetRequest { read: Some(read), ..get(&key) };
        let answer = nodes.one.get(request).await.expect("a read");
        assert_eq!(answer.entry.map(|entry| entry.value), Some("new".into()));
        answer.served.expect("told").staleness_ms > 0
    };
    assert!(at_hand(&[]).await);
    assert!(
        at_hand(&[PARENT]).await,
        "whatever it has seen of the parent is here, or of no concern"
    );
    assert!(at_hand(&[1, 3]).await, "shards of the map hold other keys");
    assert!(!at_hand(&[77]).await, "nobody knows what that one held");
    nodes.stop().await;
}

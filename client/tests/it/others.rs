//! The operators' calls.

use std::time::Duration;

use coracle_client::admin::{Init, NewKeyspace};
use coracle_client::testing::{Act, address};
use coracle_client::topology::NodeState;
use coracle_client::{EntityRule, ErrorKind, NodeId, Outcome, ShardId};

use crate::start::{N1, N2, N3, elect, shape, start};

#[tokio::test(start_paused = true)]
async fn the_map_is_shown_as_it_is() {
    let cluster = start(3, 4);
    let admin = cluster.client().await.admin();
    for map in [admin.map().await, admin.map_of("n2:7400").await, Ok(admin.cached_map())] {
        let map = map.expect("a map");
        assert_eq!((map.cluster_id.as_str(), map.epoch), ("fake", 1));
        assert_eq!((map.shards.len(), map.nodes.len()), (5, 3));
        assert_eq!(map.shard(ShardId(4)).expect("the last").end, 0);
        assert_eq!(map.shard(ShardId(1)).expect("the first").leader, Some(NodeId(1)));
        assert_eq!(map.node(NodeId(3)).expect("the third").state, NodeState::Active);
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_keyspace_can_be_used_at_once() {
    let cluster = start(3, 4);
    let kv = cluster.client().await;
    let admin = kv.admin();
    let made = admin.create_keyspace(NewKeyspace {
        entity_rule: EntityRule::Delimiter(b'/'),
        ..NewKeyspace::new("orders")
    });
    assert_eq!(made.await.expect("made").entity_rule, EntityRule::Delimiter(b'/'));
    let before = cluster.take_requests().len();
    kv.keyspace("orders").put("7/a", "1").await.expect("a put");
    assert_eq!((before, cluster.take_requests().len()), (0, 1));
    let names: Vec<_> =
        admin.keyspaces().await.expect("a list").into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["default", "orders"]);
    let bad = admin.create_keyspace(NewKeyspace::new("Orders!")).await.expect_err("a bad name");
    assert_eq!(bad.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn init_goes_past_dead_seeds_but_never_twice() {
    let cluster = shape(3, 1).before_init().start();
    cluster.stop(N1);
    cluster.stop(N2);
    let kv = cluster.client_builder().connect_lazy().expect("a client");
    let made = kv.admin().init(Init { shards: 8, ..Init::default() }).await.expect("made");
    assert_eq!((made.cluster_id.as_str(), made.shards), ("fake", 8));
    cluster.script(N3, [Act::Cut]);
    let lost = kv.admin().init(Init::default()).await.expect_err("the answer is lost");
    assert_eq!(lost.outcome(), Outcome::Unknown, "{lost}");
    let again = kv.admin().init(Init::default()).await.expect_err("made before");
    assert_eq!((again.kind(), again.outcome()), (ErrorKind::Conflict, Outcome::NotApplied));
}

#[tokio::test(start_paused = true)]
async fn leadership_is_handed_over_by_whoever_has_it() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    elect(&cluster, Some(N2));
    let leads = kv.admin().transfer_leader(ShardId(1), Some(NodeId(3))).await.expect("done");
    assert_eq!(leads, NodeId(3));
    let none = kv.admin().transfer_leader(ShardId(99), None).await.expect_err("no such shard");
    assert_eq!(none.kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn one_node_is_asked_for_itself() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    cluster.advance(Duration::from_millis(1_500));
    let status = kv.admin().node_status(&address(N2)).await.expect("a status");
    assert_eq!(status.node.id, N2);
    assert!(status.uptime >= Duration::from_millis(1_500), "{:?}", status.uptime);
    let refused = kv.admin().inject_fault(&address(N2), &[NodeId(1)]).await.expect_err("refused");
    assert_eq!(refused.kind(), ErrorKind::NotAllowed);
    cluster.stop(N2);
    // Until the break has been noticed, a request may still leave, and its outcome be unknown.
    tokio::time::sleep(Duration::from_millis(1)).await;
    let dead = kv.admin().inject_fault(&address(N2), &[]).await.expect_err("dead");
    assert_eq!((dead.kind(), dead.outcome()), (ErrorKind::Unavailable, Outcome::NotApplied));
    let nonsense = kv.admin().node_status("nonsense").await.expect_err("no address");
    assert_eq!(nonsense.kind(), ErrorKind::InvalidArgument);
}

//! What operators move: plans, moves, states of nodes, and what is told of operations.

use std::time::Duration;

use coracle_client::admin::{
    Balancer, BalancingChange, Control, MergeStep, OperationId, OperationKind, OperationState,
    PlanOptions, SplitAt, SplitStep,
};
use coracle_client::testing::FakeCluster;
use coracle_client::topology::NodeState;
use coracle_client::{ClusterMap, ErrorKind, NodeId, Outcome, ShardId};

use crate::start::{N1, N2, N3};

const N4: NodeId = NodeId(4);

/// Three nodes that hold everything, and one that holds nothing.
fn with_a_spare() -> FakeCluster {
    FakeCluster::shape().nodes(4).spares(1).start()
}

fn voters(map: &ClusterMap, node: NodeId) -> usize {
    let replicas = map.shards.iter().flat_map(|shard| &shard.replicas);
    replicas.filter(|replica| replica.voter && replica.node == node).count()
}

#[tokio::test(start_paused = true)]
async fn a_plan_is_looked_at_carried_out_and_undone() {
    let cluster = with_a_spare();
    let kv = cluster.client().await;
    kv.put("a", "1").await.expect("a put");
    let admin = kv.admin();
    let before = admin.map().await.expect("a map");
    let plan = admin.plan_rebalance(&PlanOptions::default()).await.expect("a plan");
    // 15 voters on four nodes: none has more than four.
    assert_eq!((plan.epoch, plan.moves.len(), plan.moves_min), (before.epoch, 3, 3), "{plan:?}");
    assert!(plan.moves.iter().all(|planned| planned.to == Some(N4)), "{plan:?}");
    assert_eq!(admin.map().await.expect("a map"), before, "a plan changes nothing");
    let one = PlanOptions { moves_max: Some(1), ..PlanOptions::default() };
    let small = admin.plan_rebalance(&one).await.expect("a plan");
    assert_eq!((small.moves.len(), small.moves_min), (1, 3));

    let operation = admin.start_rebalance(&plan).await.expect("begun");
    assert_eq!((operation.kind, operation.state), (OperationKind::Rebalance, OperationState::Done));
    assert_eq!((operation.moves_done, operation.moves_all, operation.has_ended()), (3, 3, true));
    let after = admin.map().await.expect("a map");
    let counts: Vec<usize> = [N1, N2, N3, N4].map(|node| voters(&after, node)).to_vec();
    assert_eq!(counts, [4, 4, 4, 3]);
    let planned: Vec<u32> = plan.nodes.iter().map(|node| node.replicas_after).collect();
    assert_eq!(planned, [4, 4, 4, 3]);
    assert_eq!(kv.get("a").await.expect("a get").expect("it is there").value, "1");
    kv.put("a", "2").await.expect("a put");

    let undone = admin.control(None, Control::Undo).await.expect("undone");
    assert_eq!((undone.kind, undone.undoes), (OperationKind::Undo, Some(operation.id)));
    let back = admin.map().await.expect("a map");
    let counts: Vec<usize> = [N1, N2, N3, N4].map(|node| voters(&back, node)).to_vec();
    assert_eq!(counts, [5, 5, 5, 0]);
    let again = admin.control(Some(operation.id), Control::Undo).await.expect_err("undone before");
    assert_eq!((again.kind(), again.outcome()), (ErrorKind::Conflict, Outcome::NotApplied));
    let list = admin.operations().await.expect("a list").operations;
    let ids: Vec<u64> = list.iter().map(|operation| operation.id.0).collect();
    assert_eq!(ids, [2, 1], "newest first");
    assert_eq!(admin.operation(operation.id).await.expect("a look"), Some(operation));
    assert_eq!(admin.operation(OperationId(9)).await.expect("a look"), None);
}

#[tokio::test(start_paused = true)]
async fn a_plan_of_another_map_is_refused() {
    let cluster = with_a_spare();
    let admin = cluster.client().await.admin();
    let plan = admin.plan_rebalance(&PlanOptions::default()).await.expect("a plan");
    cluster.raise_epoch(ShardId(1));
    let stale = admin.start_rebalance(&plan).await.expect_err("stale");
    assert_eq!((stale.kind(), stale.outcome()), (ErrorKind::Conflict, Outcome::NotApplied));
    let mut other = admin.plan_rebalance(&PlanOptions::default()).await.expect("a plan");
    other.cluster_id.push('x');
    assert_eq!(admin.start_rebalance(&other).await.expect_err("other").kind(), ErrorKind::Conflict);
    assert_eq!(admin.operations().await.expect("a list").operations, []);
}

#[tokio::test(start_paused = true)]
async fn one_replica_moves_under_a_fresh_id() {
    let cluster = with_a_spare();
    let admin = cluster.client().await.admin();
    let refused = |error: coracle_client::Error| (error.kind(), error.reason().map(str::to_owned));
    let moved = |shard: u64, from: NodeId, to: NodeId| admin.move_replica(ShardId(shard), from, to);
    for (asked, reason) in [
        (moved(99, N1, N4), "UNKNOWN_SHARD"),
        (moved(1, N1, NodeId(9)), "UNKNOWN_NODE"),
        (moved(1, N4, N1), "CONFLICT"),
        (moved(1, N1, N2), "CONFLICT"),
    ] {
        assert_eq!(refused(asked.await.expect_err(reason)).1.as_deref(), Some(reason));
    }
    let before = admin.map().await.expect("a map");
    let done = moved(1, N1, N4).await.expect("moved");
    let map = admin.map().await.expect("a map");
    let shard = map.shard(ShardId(1)).expect("the first");
    let ids = before.shards.iter().flat_map(|shard| &shard.replicas).map(|replica| replica.id);
    let new = shard.replicas.iter().find(|replica| replica.node == N4).expect("it is there");
    assert!(ids.into_iter().all(|id| id != new.id), "{new:?}");
    assert_eq!(done.moves[0].to_replica, Some(new.id));
    assert!(shard.epoch > before.shard(ShardId(1)).expect("the first").epoch);
    assert!(shard.replicas.iter().all(|replica| replica.node != N1));
}

#[tokio::test(start_paused = true)]
async fn nodes_drain_leave_and_are_lost() {
    let cluster = with_a_spare();
    let admin = cluster.client().await.admin();
    let drained = admin.drain(N1).await.expect("drained");
    assert_eq!((drained.id, drained.state), (N1, NodeState::Draining));
    assert!(cluster.shards().into_iter().all(|shard| cluster.leader(shard) != Some(N1)));
    assert_eq!(admin.undrain(N1).await.expect("back").state, NodeState::Active);

    let (node, operation) = admin.decommission(N2).await.expect("decommissioned");
    assert_eq!(node.state, NodeState::Decommissioned);
    let operation = operation.expect("it held something");
    assert_eq!((operation.kind, operation.node), (OperationKind::Decommission, Some(N2)));
    let map = admin.map().await.expect("a map");
    assert_eq!((voters(&map, N2), voters(&map, N4)), (0, 5));

    let alive = admin.mark_gone(N3).await.expect_err("it answers");
    assert_eq!(alive.kind(), ErrorKind::Conflict);
    // Nobody can take what it holds, and a fake cluster does not wait.
    let none = admin.decommission(N1).await.expect_err("nobody left");
    assert_eq!(none.kind(), ErrorKind::Unsupported);
    admin.undrain(N2).await.expect("back");
    cluster.fail_over(N3);
    let (node, operation) = admin.mark_gone(N3).await.expect("gone");
    assert_eq!(node.state, NodeState::Gone);
    assert_eq!(operation.expect("it held something").kind, OperationKind::Repair);
    let map = admin.map().await.expect("a map");
    assert_eq!((voters(&map, N3), voters(&map, N2)), (0, 5));
    assert_eq!(admin.undrain(N3).await.expect_err("for ever").kind(), ErrorKind::Conflict);
    assert_eq!(admin.drain(NodeId(9)).await.expect_err("none").reason(), Some("UNKNOWN_NODE"));
}

#[tokio::test(start_paused = true)]
async fn any_node_can_be_asked_and_settings_stay() {
    let cluster = with_a_spare();
    let admin = cluster.client().await.admin();
    cluster.fail_over(N1);
    tokio::time::sleep(Duration::from_millis(1)).await;
    let change = BalancingChange { moves_at_a_time: Some(5), ..BalancingChange::default() };
    admin.set_balancing(change).await.expect("set");
    let weight = admin.set_node_weight(N2, 1_500).await.expect("set").weight;
    let map = admin.map().await.expect("a map");
    assert_eq!((weight, map.node(N2).expect("known").weight), (1_500, 1_500));
    assert_eq!(map.node(N1).expect("known").weight, 1_000, "unless it is said");
    let none = admin.set_node_weight(N2, 0).await.expect_err("nothing");
    assert_eq!(none.kind(), ErrorKind::InvalidArgument);
    let change = BalancingChange {
        threshold: Some(50),
        disk_fill_max: Some(900),
        ..BalancingChange::default()
    };
    let set = admin.set_balancing(change).await.expect("set");
    assert_eq!((set.threshold, set.disk_fill_max, set.moves_at_a_time), (50, 900, 5));
    let down_after = Duration::from_secs(60);
    let change = BalancingChange { down_after: Some(down_after), ..BalancingChange::default() };
    admin.set_balancing(change).await.expect("set");
    let now = admin.operations().await.expect("a list").balancing;
    assert_eq!((set.moves_at_a_time, now.moves_at_a_time, now.down_after), (5, 5, down_after));
    assert_eq!((now.state, now.automatic), (Balancer::Off, false));
    let zero = BalancingChange { moves_at_a_time: Some(0), ..BalancingChange::default() };
    let zero = admin.set_balancing(zero).await.expect_err("none at a time");
    assert_eq!(zero.kind(), ErrorKind::InvalidArgument);
    let pause = admin.control(None, Control::Pause).await.expect_err("nothing to pause");
    assert_eq!((pause.kind(), pause.outcome()), (ErrorKind::Conflict, Outcome::NotApplied));
}

#[tokio::test(start_paused = true)]
async fn a_shard_is_split_merged_again_and_nothing_is_lost() {
    let cluster = with_a_spare();
    let kv = cluster.client().await;
    for number in 0..50 {
        kv.put(format!("k{number}"), "1").await.expect("a put");
    }
    let admin = kv.admin();
    let first = admin.map().await.expect("a map").shards[1].clone();
    let looked = admin.split_shard(first.id, SplitAt::Size, true).await.expect("a look");
    assert!(looked.operation.is_none() && looked.at > first.start);
    let begun = admin.split_shard(first.id, SplitAt::Position(looked.at), false).await;
    let begun = begun.expect("a split").operation.expect("it is begun");
    let split = begun.split.clone().expect("a split");
    assert_eq!(
        (begun.kind, split.step, split.at),
        (OperationKind::Split, SplitStep::Done, looked.at)
    );
    let child = split.child.expect("it has an id");
    let map = admin.map().await.expect("a map");
    let born = map.shard(child).expect("it is there");
    assert_eq!((born.start, born.end), (looked.at, first.end));
    let key = (0..50).map(|number| format!("k{number}"));
    let all = kv.multi_get(key.clone()).await.expect("all");
    assert!(all.iter().all(Option::is_some));
    kv.put("k7", "2").await.expect("a put");
    let position = admin.position("default", b"k7").await.expect("known").expect("it stands");
    let holds = |shard: &&coracle_client::topology::Shard| {
        shard.id.0 != 0 && shard.start <= position && (shard.end == 0 || position < shard.end)
    };
    assert_eq!(map.shards.iter().filter(holds).count(), 1);
    assert_eq!(admin.position("nowhere", b"k7").await.expect("known"), None);
    let wrong = admin.merge_shards(child, first.id, false).await.expect_err("the wrong way");
    assert_eq!(wrong.kind(), ErrorKind::InvalidArgument);
    let undone = admin.control(Some(begun.id), Control::Undo).await.expect("undone");
    let merge = undone.merge.clone().expect("a merge");
    assert_eq!((undone.undoes, merge.step), (Some(begun.id), MergeStep::Done));
    assert_eq!((merge.left, merge.right), (first.id, child));
    let map = admin.map().await.expect("a map");
    assert_eq!(map.shard(first.id).expect("it stays").end, first.end);
    let all = kv.multi_get(key).await.expect("all");
    assert!(all.iter().all(Option::is_some));
    let load = admin.split_shard(first.id, SplitAt::Load, false).await.expect_err("none");
    assert_eq!(load.reason(), Some("UNSUPPORTED"));
}

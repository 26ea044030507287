//! What people see of plans, operations, the balancer and the ring, against what was agreed: the files
//! of `golden`. Only this finds that a picture has moved by a column. The functions are given what a
//! cluster would tell, so that every state can be shown.
//!
//! `CORACLE_REGENERATE=1 cargo test -p coracle-cli pictures` writes the files anew.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_cli::admin::operation;
use coracle_cli::admin::plan::{PlanView, text};
use coracle_cli::admin::rebalance::status_text;
use coracle_cli::admin::ring::{Ring, draw};
use coracle_client::admin::{
    Balancer, Balancing, ClusterOperation, OperationId, OperationKind, OperationMove,
    OperationState, Operations, Plan, PlannedMove, PlannedNode, PlannedTransfer,
};
use coracle_client::topology::{Node, NodeState, Replica, ReplicaId, Shard};
use coracle_client::{ClusterMap, NodeId, ShardId};

use crate::help::{root, same};

fn golden(name: &str, now: &str) {
    same(&root().join("cli/tests/it/golden").join(name), "", now);
}

fn node(id: u64, state: NodeState) -> Node {
    Node {
        id: NodeId(id),
        address: format!("n{id}:7400"),
        peer_address: format!("n{id}:7500"),
        http_address: String::new(),
        zone: ["a", "b", "c"][(id as usize - 1) % 3].to_owned(),
        state,
        version: "0.1.0".to_owned(),
        weight: 1_000,
    }
}

fn voter(shard: u64, node: u64) -> Replica {
    Replica {
        id: ReplicaId(shard * 100 + node),
        node: NodeId(node),
        voter: true,
        joining: false,
        becomes_voter: false,
        replaces: None,
        goes: false,
    }
}

/// So many equal shards on nodes 1, 2 and 3, and the meta group.
fn map(shards: u64, nodes: Vec<Node>) -> ClusterMap {
    let start = |id: u64| ((u128::from(id - 1) << 64) / u128::from(shards)) as u64;
    let shard = |id: u64| Shard {
        id: ShardId(id),
        start: if id == 0 { 0 } else { start(id) },
        end: if id == 0 || id == shards { 0 } else { start(id + 1) },
        epoch: 1,
        replicas: (1..=3).map(|node| voter(id, node)).collect(),
        leader: Some(NodeId(1 + id % 3)),
        leader_term: 1,
    };
    ClusterMap {
        cluster_id: "test".to_owned(),
        epoch: 41,
        shards: (0..=shards).map(shard).collect(),
        nodes,
        keyspaces: Vec::new(),
        voters_wanted: 3,
    }
}

fn ring(map: &ClusterMap, answering: &[u64], width: usize) -> String {
    let leaders: BTreeMap<ShardId, NodeId> =
        map.shards.iter().filter_map(|shard| Some((shard.id, shard.leader?))).collect();
    let answering: BTreeSet<NodeId> = answering.iter().map(|id| NodeId(*id)).collect();
    draw(&Ring { map, leaders: &leaders, answering: &answering }, width)
}

#[test]
fn a_ring_that_rests() {
    let nodes = (1..=3).map(|id| node(id, NodeState::Active)).collect();
    let picture = ring(&map(8, nodes), &[1, 2, 3], 80);
    assert!(picture.lines().all(|line| line.chars().count() <= 80));
    golden("ring.txt", &picture);
}

#[test]
fn a_ring_that_moves() {
    let states = [
        NodeState::Active,
        NodeState::Draining,
        NodeState::Active,
        NodeState::Active,
        NodeState::Decommissioning,
        NodeState::Gone,
    ];
    let nodes = (1..).zip(states).map(|(id, state)| node(id, state)).collect();
    let mut map = map(16, nodes);
    map.shards[3].replicas.push(Replica {
        voter: false,
        joining: true,
        becomes_voter: true,
        replaces: Some(ReplicaId(301)),
        ..voter(3, 4)
    });
    map.shards[7].replicas.push(Replica { voter: false, becomes_voter: true, ..voter(7, 5) });
    map.shards[9].replicas[2].goes = true;
    map.shards[10].replicas.push(Replica { voter: false, ..voter(10, 4) });
    map.shards[11].replicas.push(Replica { voter: false, joining: true, ..voter(11, 4) });
    map.shards[12].leader = None;
    golden("ring-moving.txt", &ring(&map, &[1, 2, 4, 5], 80));
    let narrow = ring(&map, &[1, 2, 4, 5], 50);
    assert!(narrow.lines().all(|line| line.chars().count() <= 50), "{narrow}");
    golden("ring-narrow.txt", &narrow);
}

#[test]
fn no_ring_is_wider_than_it_may_be() {
    for shards in [1, 2, 3, 5, 16, 64, 500] {
        let nodes = (1..=5).map(|id| node(id, NodeState::Active)).collect();
        let map = map(shards, nodes);
        for width in [0, 48, 49, 55, 56, 57, 60, 72, 79, 80, 81, 200] {
            let picture = ring(&map, &[1, 2, 3, 4, 5], width);
            let widest = picture.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(
                widest <= width.max(48),
                "{shards} shards in {width} columns: {widest}\n{picture}"
            );
        }
    }
}

fn plan(moves: u64) -> Plan {
    let node = |id: u64, before: u32, after: u32| PlannedNode {
        node: NodeId(id),
        replicas_before: before,
        replicas_after: after,
        leaders_before: 6,
        leaders_after: if id == 1 { 5 } else { 6 },
        bytes_before: u64::from(before) << 20,
        bytes_after: u64::from(after) << 20,
        load_before: 100 * id,
        load_after: 250,
    };
    let step = |shard: u64| PlannedMove {
        shard: ShardId(shard),
        from: (shard != 3).then_some(NodeId(1 + shard % 3)),
        to: (shard != 4).then_some(NodeId(4)),
        bytes: 1 << 20,
    };
    let transfer =
        PlannedTransfer { shard: ShardId(5), from: Some(NodeId(1)), to: Some(NodeId(4)) };
    Plan {
        cluster_id: "test".to_owned(),
        epoch: 41,
        moves: (1..=moves).map(step).collect(),
        transfers: vec![transfer],
        nodes: vec![node(1, 17, 13), node(2, 17, 13), node(3, 17, 13), node(4, 0, 12)],
        moves_min: 4,
        bytes: moves << 20,
        estimate: Duration::from_millis(9_400),
        stalled: vec!["no eligible target in zone b: disk 87 % > 85 % limit".to_owned()],
    }
}

#[test]
fn plans() {
    let nothing = Plan { epoch: 41, ..Plan::default() };
    let stalled = Plan { stalled: plan(0).stalled, ..nothing.clone() };
    let texts = [
        text(&plan(4), false),
        text(&plan(14), false),
        text(&plan(14), true),
        text(&nothing, false),
        text(&stalled, false),
    ];
    golden("plans.txt", &texts.join("\n----\n"));
}

#[test]
fn a_plan_comes_back_from_its_file() {
    let plan = plan(5);
    let mut document = serde_json::to_value(PlanView::of(&plan)).unwrap();
    document["apiVersion"] = "coracle.cli/v1".into();
    document["kind"] = "RebalancePlan".into();
    // Fields of a newer version are passed over.
    document["another"] = 7.into();
    let read = PlanView::read(document.to_string().as_bytes()).unwrap();
    assert_eq!(read.plan(), plan);
    document["kind"] = "NodeList".into();
    let wrong = PlanView::read(document.to_string().as_bytes()).unwrap_err();
    assert!(wrong.what.contains("it is a NodeList"), "{wrong:?}");
    for text in ["", "{}", "[]", r#"{"kind":"RebalancePlan","epoch":"x"}"#] {
        let wrong = PlanView::read(text.as_bytes()).unwrap_err();
        assert!(wrong.what.contains("no plan") && wrong.next.is_some(), "{text}: {wrong:?}");
    }
}

fn step(shard: u64, state: OperationState, message: &str) -> OperationMove {
    OperationMove {
        shard: ShardId(shard),
        from: Some(NodeId(1)),
        from_replica: Some(ReplicaId(shard)),
        to: Some(NodeId(4)),
        to_replica: None,
        bytes: 10 << 20,
        state,
        message: message.to_owned(),
        attempts: 1,
    }
}

fn under_way() -> ClusterOperation {
    use OperationState::{Done, Pending, Running};
    ClusterOperation {
        id: OperationId(7),
        kind: OperationKind::Rebalance,
        state: Running,
        moves: vec![
            step(1, Done, ""),
            step(2, Running, "copying: 4.0 MiB of 10 MiB"),
            step(3, Pending, ""),
            step(4, Pending, ""),
        ],
        moves_done: 1,
        moves_all: 4,
        began_ms: 100_000,
        ..ClusterOperation::default()
    }
}

#[test]
fn the_balancer_and_its_operations() {
    let now = 108_000;
    let balancing = |state| Balancing {
        state,
        reasons: match state {
            Balancer::Stalled => vec!["n3 does not answer".to_owned()],
            _ => Vec::new(),
        },
        automatic: state != Balancer::Off,
        moves_at_a_time: 2,
        down_after: Duration::from_secs(300),
        disk_fill_max: 850,
        threshold: if state == Balancer::Ready { 50 } else { 0 },
        split_bytes: 64 << 30,
        split_load: 2_000,
    };
    let repair = ClusterOperation {
        id: OperationId(8),
        kind: OperationKind::Repair,
        state: OperationState::Paused,
        node: Some(NodeId(3)),
        message: "paused by an operator".to_owned(),
        moves_all: 12,
        began_ms: 104_000,
        ..ClusterOperation::default()
    };
    let done = ClusterOperation {
        state: OperationState::Done,
        ended_ms: Some(103_000),
        id: OperationId(6),
        ..under_way()
    };
    let mut texts = Vec::new();
    for state in [
        Balancer::Off,
        Balancer::Ready,
        Balancer::Starting,
        Balancer::InProgress,
        Balancer::Stalled,
    ] {
        let operations = match state {
            Balancer::InProgress => vec![repair.clone(), under_way(), done.clone()],
            _ => vec![done.clone()],
        };
        texts.push(status_text(&Operations { operations, balancing: balancing(state) }, now));
    }
    texts.push(operation::progress(&under_way(), now));
    texts.push(operation::done(&done));
    golden("balancer.txt", &texts.join("\n----\n"));
}

#[test]
fn an_estimate_needs_something_to_go_by() {
    let operation = under_way();
    // A quarter of the bytes in 8 s.
    assert_eq!(operation::estimate(&operation, 108_000), Some(Duration::from_secs(24)));
    assert_eq!(operation::estimate(&operation, 99_000), None, "the clocks differ");
    let mut empty = operation.clone();
    empty.moves.clear();
    assert_eq!(operation::estimate(&empty, 108_000), Some(Duration::from_secs(24)), "by moves");
    empty.moves_done = 0;
    assert_eq!(operation::estimate(&empty, 108_000), None);
    let paused = ClusterOperation { state: OperationState::Paused, ..operation };
    assert_eq!(operation::estimate(&paused, 108_000), None);
}

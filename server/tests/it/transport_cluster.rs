//! Tests of how nodes find each other: seeds, gossip, new addresses, commands, cuts.

use std::collections::BTreeSet;
use std::time::Duration;

use coracle_proto::peer::cluster_command::Kind;
use coracle_proto::peer::{Adopt, Join, KnownNode};
use coracle_raft::transport::{Lane, TransportError};
use coracle_raft::types::NodeId;
use coracle_server::transport::Target;
use tokio::time::Instant;

use crate::transport_net::MemoryNet;
use crate::transport_node::{LONG, Node, cluster, known, settings, unreachable, until};

fn ids(known: &[KnownNode]) -> Vec<u64> {
    known.iter().map(|node| node.node).collect()
}

fn moved(node: u64, start_count: u64) -> KnownNode {
    KnownNode { peer_address: format!("m{node}:1"), ..known(node, start_count) }
}

#[tokio::test(start_paused = true)]
async fn one_seed_is_enough_for_all_to_know_all() {
    let net = MemoryNet::default();
    let mut nodes = Vec::new();
    for id in 1..=4 {
        let node = Node::start(&net, settings(known(id, 1), &[])).await;
        node.transport.dial_seed("n1:1");
        nodes.push(node);
    }
    until("everybody knows everybody", || {
        nodes.iter().all(|node| node.transport.peers().len() == 3)
    })
    .await;
    for (node, own) in nodes.iter().zip(1..) {
        let others: Vec<_> = (1..=4).filter(|id| *id != own).collect();
        assert_eq!(ids(&node.transport.peers()), others);
        let mut told = ids(&node.notes.known.lock());
        told.sort();
        assert_eq!(told, others, "each is told once, to be remembered");
        for other in others {
            node.reach(other).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_seed_is_dialled_until_it_is_there() {
    let net = MemoryNet::default();
    let early = Node::start(&net, settings(known(2, 1), &[])).await;
    early.transport.dial_seed("n1:1");
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(early.transport.peers().is_empty());
    let _late = Node::start(&net, settings(known(1, 1), &[])).await;
    until("the seed is found", || ids(&early.transport.peers()) == [1]).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_comes_back_elsewhere_is_followed() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 3).await;
    nodes[2].stop().await;
    // It reaches only the first node; the second hears of it by gossip.
    net.ways("m3", "n2:1", |way| way.silent = true);
    let _back = Node::start(&net, settings(moved(3, 2), &[known(1, 1)])).await;
    let begun = Instant::now();
    for node in &nodes[..2] {
        until("the new address is known", || node.transport.peers().contains(&moved(3, 2))).await;
        node.reach(3).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_cluster_whose_nodes_all_come_back_elsewhere_finds_itself() {
    let net = MemoryNet::default();
    for node in cluster(&net, 3).await {
        node.stop().await;
    }
    let remembered: Vec<_> = (1..=3).map(|id| known(id, 1)).collect();
    let mut nodes = Vec::new();
    for id in 1..=3 {
        let node = Node::start(&net, settings(moved(id, 2), &remembered)).await;
        // One address that is right, known to all.
        node.transport.dial_seed("m2:1");
        nodes.push(node);
    }
    for (node, own) in nodes.iter().zip(1..) {
        for other in (1..=3).filter(|other| *other != own) {
            node.reach(other).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nodes_without_a_cluster_meet_and_are_let_in() {
    let net = MemoryNet::default();
    let unborn = |id: u64| KnownNode { node: 0, ..known(id, 1) };
    let mut nodes = Vec::new();
    for id in 1..=3 {
        let node = Node::start(&net, settings(unborn(id), &[])).await;
        // Only the first is known; the third still hears of the second.
        node.transport.dial_seed("n1:1");
        nodes.push(node);
    }
    for (node, own) in nodes.iter().zip(1..) {
        let others: Vec<_> = (1..=3).filter(|id| *id != own).map(unborn).collect();
        until("the others are met", || node.transport.strangers() == others).await;
        assert!(node.transport.peers().is_empty());
    }

    // Init runs on the third: it takes an identity and hands them to the others.
    for (node, id) in [(&nodes[2], 1), (&nodes[0], 2), (&nodes[1], 3)] {
        if id > 1 {
            let address = node.transport.own().peer_address;
            let adopt = Adopt { cluster_id: "c".into(), node: id, hash_seed: 0 };
            let to = Target::Address(address);
            let answer = nodes[2].transport.command(to, Kind::Adopt(adopt), LONG).await;
            assert!(matches!(answer, Ok(Kind::Done(_))), "{answer:?}");
        }
        node.transport.set_identity("c", NodeId(id));
    }
    let begun = Instant::now();
    for (node, own) in [(&nodes[2], 1), (&nodes[0], 2), (&nodes[1], 3)] {
        for other in (1..=3).filter(|other| *other != own) {
            until("the other is known", || ids(&node.transport.peers()).contains(&other)).await;
            node.reach(other).await;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    until("nobody is a stranger any more", || {
        nodes.iter().all(|node| node.transport.strangers().is_empty())
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_stranger_fades_although_the_others_talk() {
    let net = MemoryNet::default();
    let unborn = |id: u64| KnownNode { node: 0, ..known(id, 1) };
    let mut nodes = Vec::new();
    for id in 1..=3 {
        let node = Node::start(&net, settings(unborn(id), &[])).await;
        for seed in ["n1:1", "n2:1", "n3:1"] {
            node.transport.dial_seed(seed);
        }
        nodes.push(node);
    }
    until("all meet", || nodes.iter().all(|node| node.transport.strangers().len() == 2)).await;
    nodes[2].stop().await;
    for node in &nodes[..2] {
        until("the dead one is gone", || node.transport.strangers().len() == 1).await;
    }
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(nodes[0].transport.strangers(), [unborn(2)]);
    assert_eq!(nodes[1].transport.strangers(), [unborn(1)]);
}

#[tokio::test(start_paused = true)]
async fn commands_reach_nodes_and_addresses() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let joiner = KnownNode { node: 0, ..known(7, 1) };
    let joiner = Node::start(&net, settings(joiner, &[])).await;
    let join = || Kind::Join(Join { from: None });
    for (from, to) in [
        (&nodes[0], Target::Node(NodeId(2))),
        (&nodes[0], Target::Address("n2:1".into())),
        (&joiner, Target::Address("n2:1".into())),
    ] {
        let answer = from.transport.command(to, join(), LONG).await;
        assert!(matches!(answer, Ok(Kind::Done(done)) if done.error == "from 2"));
        let (asker, _) = nodes[1].notes.commands.lock().pop().expect("heard");
        assert_eq!(asker, from.transport.own());
    }
    let nobody = Target::Address("n9:1".into());
    let answer = nodes[0].transport.command(nobody, join(), LONG).await;
    assert!(matches!(answer, Err(TransportError::Unreachable(_))), "{answer:?}");
    let itself = Target::Address("n1:1".into());
    let answer = nodes[0].transport.command(itself, join(), LONG).await;
    assert!(answer.expect_err("no answer").to_string().contains("the node itself"));
    assert!(nodes.iter().all(|node| node.notes.lost.lock().is_empty()), "guests are not missed");
}

#[tokio::test(start_paused = true)]
async fn a_cut_is_a_cut_until_it_is_healed() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 3).await;
    let waits = nodes[1].ask(1, Lane::Appends, "never", LONG);
    until("it was heard", || nodes[0].notes.asked().contains(&"never".into())).await;
    assert!(nodes[0].transport.cut(BTreeSet::from([NodeId(2)])));
    unreachable(waits.await);
    tokio::time::sleep(Duration::from_secs(5)).await;
    for (from, to) in [(0, 2), (1, 1)] {
        unreachable(nodes[from].ask(to, Lane::Control, "hello", LONG).await);
    }
    assert!(nodes[0].notes.lost.lock().contains(&NodeId(2)));
    assert!(nodes[1].notes.lost.lock().contains(&NodeId(1)));
    nodes[0].reach(3).await;
    nodes[1].reach(3).await;
    let healed = Instant::now();
    nodes[0].transport.cut(BTreeSet::new());
    nodes[0].reach(2).await;
    nodes[1].reach(1).await;
    assert!(healed.elapsed() < Duration::from_secs(1), "{:?}", healed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn without_fault_injection_nothing_is_cut() {
    let net = MemoryNet::default();
    let mut safe = settings(known(1, 1), &[known(2, 1)]);
    safe.fault_injection = false;
    let safe = Node::start(&net, safe).await;
    let _other = Node::start(&net, settings(known(2, 1), &[])).await;
    safe.reach(2).await;
    assert!(!safe.transport.cut(BTreeSet::from([NodeId(2)])));
    safe.ask(2, Lane::Appends, "still there?", LONG).await.expect("answered");
}

#[tokio::test(start_paused = true)]
async fn a_removed_node_stays_out() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 3).await;
    nodes[0].transport.forget(NodeId(3));
    assert!(unreachable(nodes[0].ask(3, Lane::Control, "hello", LONG).await).contains("not known"));
    let heard = nodes[0].notes.asked().len();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let why = unreachable(nodes[2].ask(1, Lane::Control, "let me in", LONG).await);
    assert!(why.contains("removed"), "{why}");
    assert_eq!(nodes[0].notes.asked().len(), heard);
    assert_eq!(ids(&nodes[0].transport.peers()), [2], "gossip does not bring it back");
}

//! The transport over TCP, on this machine.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::peer::KnownNode;
use coracle_raft::transport::Lane;
use coracle_server::net::{Net, RealNet};
use futures_util::future::join_all;

use crate::transport_node::{LONG, Node, known, settings};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_over_tcp() {
    let mut nodes: Vec<Node> = Vec::new();
    for id in 1..=2 {
        let listener = RealNet.listen("127.0.0.1:0").await.expect("a free port");
        let own = KnownNode { peer_address: listener.local_address(), ..known(id, 1) };
        let others: Vec<_> = nodes.iter().map(|node| node.transport.own()).collect();
        nodes.push(Node::start_on(Arc::new(RealNet), listener, settings(own, &others)));
    }
    nodes[1].reach(1).await;
    nodes[0].reach(2).await;
    let large = "x".repeat(3 << 20);
    let mut answers = Vec::new();
    for i in 0..2000 {
        let lane = [Lane::Control, Lane::Heartbeat, Lane::Appends][i % 3];
        answers.push(nodes[i % 2].ask(2 - (i as u64 % 2), lane, &format!("question {i}"), LONG));
    }
    answers.push(nodes[0].ask(2, Lane::Bulk, &large, LONG));
    for (i, answer) in join_all(answers).await.into_iter().enumerate() {
        let wanted = if i == 2000 { large.clone() } else { format!("question {i}") };
        assert_eq!(answer.expect("answered"), wanted.as_bytes());
    }
    nodes[1].stop().await;
    let waited = tokio::time::timeout(LONG, async {
        while nodes[0].notes.lost.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    waited.await.expect("the loss is told");
    let forward = nodes[0].transport.forward(
        coracle_raft::types::NodeId(2),
        Bytes::from_static(b"get"),
        Duration::from_secs(1),
    );
    assert!(forward.await.is_err());
    nodes[0].stop().await;
}

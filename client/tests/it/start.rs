//! Owns the fake clusters that the tests begin with: node 1 leads every shard, nodes that do not lead
//! say so, and pages are short.

use std::time::Duration;

use coracle_client::NodeId;
use coracle_client::testing::{Act, FakeCluster, Refusal, Shape};

pub(crate) const N1: NodeId = NodeId(1);
pub(crate) const N2: NodeId = NodeId(2);
pub(crate) const N3: NodeId = NodeId(3);

pub(crate) fn shape(nodes: u32, shards: u32) -> Shape {
    let shape = FakeCluster::shape().nodes(nodes).shards(shards).led_by(N1);
    shape.without_forwarding().page_entries(2)
}

pub(crate) fn start(nodes: u32, shards: u32) -> FakeCluster {
    shape(nodes, shards).start()
}

/// A refusal for the reason of this name.
pub(crate) fn refuse(reason: &str) -> Act {
    Act::Refuse(Refusal::new(reason))
}

/// A new leader for all shards, `None` for none. Nobody is told.
pub(crate) fn elect(cluster: &FakeCluster, node: Option<NodeId>) {
    cluster.hold_map();
    for shard in cluster.shards() {
        match node {
            Some(node) => cluster.move_leader(shard, node),
            None => cluster.depose(shard),
        }
    }
}

/// Waits until the cluster looks as wanted.
pub(crate) async fn until(cluster: &FakeCluster, wanted: impl Fn(&FakeCluster) -> bool) {
    let looks = async {
        while !wanted(cluster) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looks).await.expect("it comes to that");
}

pub(crate) fn number(value: &[u8]) -> i64 {
    std::str::from_utf8(value).expect("text").parse().expect("a number")
}

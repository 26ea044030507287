//! The fake cluster keeps what every cluster promises: the same list runs against real processes in
//! the tests of the program.

use coracle_client::testing::{FakeCluster, conformance};

#[tokio::test(start_paused = true)]
async fn the_fake_cluster_keeps_the_contract() {
    for shape in [
        FakeCluster::shape(),
        FakeCluster::shape().nodes(1).shards(1),
        FakeCluster::shape().nodes(5).voters(3).shards(16).zones(["a", "b", "c"]),
        FakeCluster::shape().without_forwarding(),
    ] {
        let fake = shape.start();
        conformance::run(&fake.client().await, |check| println!("{check}")).await;
    }
}

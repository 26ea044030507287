//! Voters of real processes move: by themselves to a node that is new, by one command, off a node that is decommissioned while the node that
//! sees to it is killed, back by a plan, and away from a node that is lost for good. Nothing that was
//! acknowledged is lost meanwhile, and nothing is left of what went.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use coracle_cli::demo::ledger::Ledger;
use coracle_cli::demo::load::Load;
use coracle_client::Client;
use coracle_client::topology::{NodeId, Shard};

use super::{Bench, nothing_is_lost, until};

const COMES_TRUE: Duration = Duration::from_secs(120);
const SHARDS: usize = 16;

/// The nodes that vote in each shard, the meta group first.
async fn voters(client: &Client) -> Vec<BTreeSet<u64>> {
    let map = client.admin().map().await.expect("somebody knows it");
    let voters = |shard: &Shard| {
        let voters = shard.replicas.iter().filter(|replica| replica.voter);
        voters.map(|replica| replica.node.0).collect()
    };
    map.shards.iter().map(voters).collect()
}

async fn holds(client: &Client, node: u64) -> usize {
    voters(client).await.iter().filter(|voters| voters.contains(&node)).count()
}

impl Bench {
    fn directories_of(&mut self, at: usize) -> usize {
        let dir = self.cluster.process(at).plan().data_dir.join("shards");
        std::fs::read_dir(dir).expect("it is there").count()
    }

    async fn restart_controller(&mut self) {
        let controller = self.meta_leader().await;
        self.cluster.kill(controller);
        self.cluster.reap(controller).await;
        self.cluster.restart(&[controller]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voters_move_and_nodes_leave_without_a_loss() {
    // Zones a, b, c, a, b.
    let mut bench = Bench::start(5).await;
    bench.expect(&["rebalance", "auto", "off"], 0).await;
    let ledger = Arc::new(Ledger::new("moves"));
    let seeds: Vec<String> = bench.cluster.nodes().iter().map(|node| node.address()).collect();
    let client = Client::builder().seeds(seeds).connect_lazy().unwrap();
    let load = Load::start(vec![client.keyspace("default")], ledger.clone(), 200);

    let before = voters(&client).await;
    assert!(before.len() == SHARDS + 1 && before.iter().all(|voters| voters.len() == 3));
    let from = *before[3].first().expect("three of them");
    let to = (1..=5).find(|node| !before[3].contains(node)).expect("two others");
    let (from_name, to_name) = (format!("n{from}"), format!("n{to}"));
    let shard = client.admin().map().await.expect("somebody knows it").shards[3].id.0.to_string();
    let one = ["shard", "move", &shard, "--from", &from_name, "--to", &to_name, "--wait"];
    bench.expect(&one, 0).await;
    let moved = &voters(&client).await[3];
    assert!(moved.contains(&to) && !moved.contains(&from) && moved.len() == 3, "{moved:?}");
    bench.expect(&["rebalance", "undo"], 0).await;
    until("it is undone", COMES_TRUE, async || voters(&client).await == before).await;

    // The fifth goes, and whoever sees to it is killed on the way.
    let held = holds(&client, 5).await;
    assert!(held > 0);
    bench.expect(&["node", "decommission", "n5"], 0).await;
    until("some have gone", COMES_TRUE, async || holds(&client, 5).await < held).await;
    bench.restart_controller().await;
    let wait = ["node", "decommission", "n5", "--wait", "--timeout", "50s"];
    let (out, err) = bench.expect(&wait, 0).await;
    assert!(format!("{out}{err}").contains("holds no data"), "{out}{err}");
    assert_eq!(holds(&client, 5).await, 0);
    assert!(voters(&client).await.iter().all(|voters| voters.len() == 3));
    until("nothing is left there", COMES_TRUE, async || bench.directories_of(4) == 0).await;

    // It comes back, and a plan brings it its share.
    bench.expect(&["node", "undrain", "n5"], 0).await;
    bench.expect(&["rebalance", "plan", "--exit-code"], 10).await;
    bench.expect(&["rebalance", "apply", "--yes", "--wait", "--timeout", "50s"], 0).await;
    assert!(holds(&client, 5).await > 0);
    let (plan, _) = bench.expect(&["rebalance", "plan"], 0).await;
    assert!(plan.contains(": 0 replica moves"), "{plan}");

    // The fourth is lost for good: what it held is made elsewhere by itself.
    bench.cluster.kill(3);
    bench.cluster.reap(3).await;
    bench.expect(&["rebalance", "set", "--down-after", "10s"], 0).await;
    until("all of it is elsewhere", COMES_TRUE, async || {
        let voters = voters(&client).await;
        voters.iter().all(|voters| voters.len() == 3 && !voters.contains(&4))
    })
    .await;
    // When it does come back it has nothing to hold.
    bench.cluster.restart(&[3]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    until("it has removed what it held", COMES_TRUE, async || bench.directories_of(3) == 0).await;
    assert!(client.admin().map().await.expect("known").node(NodeId(4)).is_some());

    nothing_is_lost(load, &client, &ledger).await;
    client.close().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_added_fills_by_itself() {
    let mut bench = Bench::start(3).await;
    let ledger = Arc::new(Ledger::new("fills"));
    let seeds: Vec<String> = bench.cluster.nodes().iter().map(|node| node.address()).collect();
    let client = Client::builder().seeds(seeds).connect_lazy().unwrap();
    let load = Load::start(vec![client.keyspace("default")], ledger.clone(), 100);
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut node = bench.newcomer(&dir.path().join("n4"));
    node.start().unwrap_or_else(|failure| panic!("{failure:?}"));
    // It shares its zone's 17 voters with another node; nobody asks for anything.
    until("it has its share", COMES_TRUE, async || holds(&client, 4).await >= 8).await;
    until("all is done", COMES_TRUE, async || {
        let list = client.admin().operations().await.expect("somebody knows them");
        list.operations.iter().all(|operation| operation.has_ended())
    })
    .await;
    let (operations, _) = bench.expect(&["operation", "ls"], 0).await;
    assert!(operations.contains("balance") && operations.contains("done"), "{operations}");
    assert!(voters(&client).await.iter().all(|voters| voters.len() == 3));
    let (plan, _) = bench.expect(&["rebalance", "plan"], 0).await;
    assert!(plan.contains("Nothing to move") || plan.contains(": 0 replica moves"), "{plan}");
    // Half a node gives some of it back.
    bench.expect(&["node", "weight", "n4", "0.5"], 0).await;
    until("it has less", COMES_TRUE, async || holds(&client, 4).await < 8).await;
    nothing_is_lost(load, &client, &ledger).await;
    client.close().await;
    let ended = node.stop(COMES_TRUE).await;
    assert!(ended.is_some(), "{}", node.log_tail());
    bench.stop().await;
}

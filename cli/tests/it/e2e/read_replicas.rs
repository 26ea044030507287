//! Read replicas of real processes: they come and go by one command, while the node that sees to it is
//! killed; they serve sessions; nothing is left of those that went.

use std::sync::Arc;
use std::time::Duration;

use coracle_cli::demo::ledger::Ledger;
use coracle_cli::demo::load::Load;
use coracle_client::{Client, Consistency};
use serde_json::Value;

use super::{Bench, nothing_is_lost, until};
use crate::lone::text;

const COMES_TRUE: Duration = Duration::from_secs(90);
const SHARDS: usize = 16;

impl Bench {
    async fn replicas(&self) -> Vec<Value> {
        let (out, _) = self.expect(&["replica", "ls", "-o", "json"], 0).await;
        let list: Value = serde_json::from_str(&out).expect("one document");
        list["items"].as_array().expect("a list").clone()
    }

    /// Read replicas that can be read from.
    async fn learners(&self) -> Vec<(u64, u64)> {
        let replicas = self.replicas().await;
        let learners = replicas
            .iter()
            .filter(|replica| replica["role"] == "learner" && replica["state"] == "following");
        let place = |replica: &Value| {
            let number = |field: &str| replica[field].as_u64().expect("a number");
            (number("shard"), number("node"))
        };
        learners.map(place).collect()
    }

    fn directories(&mut self) -> usize {
        let mut count = 0;
        for at in 0..self.cluster.nodes().len() {
            let dir = self.cluster.process(at).plan().data_dir.join("shards");
            count += std::fs::read_dir(dir).expect("it is there").count();
        }
        count
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_replicas_come_and_go_while_their_controller_is_killed() {
    // Zones a, b, c, a, b: in zone a every shard has a voter on n1 or n4, and room on the other.
    let mut bench = Bench::start(5).await;
    let before = bench.directories();
    let ledger = Arc::new(Ledger::new("replicas"));
    let seeds: Vec<String> = bench.cluster.nodes().iter().map(|node| node.address()).collect();
    let client = Client::builder().seeds(seeds).connect_lazy().unwrap();
    let load = Load::start(vec![client.keyspace("default")], ledger.clone(), 200);

    let set = ["replica", "set", "--learners", "1", "--zone", "a"];
    let (planned, _) = bench.expect(&[&set[..], &["--dry-run"]].concat(), 0).await;
    assert!(planned.contains("16 would be made"), "{planned}");
    assert_eq!(bench.learners().await, []);
    let (_, warned) = bench.expect(&["replica", "set", "--learners", "1", "--zone", "c"], 0).await;
    assert!(warned.contains("zone c: 16 shards get fewer than 1 read replicas"), "{warned}");
    bench.expect(&["replica", "set", "--learners", "0", "--zone", "c"], 0).await;

    bench.expect(&set, 0).await;
    until("some are made", COMES_TRUE, async || !bench.learners().await.is_empty()).await;
    let controller = bench.meta_leader().await;
    bench.cluster.kill(controller);
    bench.cluster.reap(controller).await;
    bench.cluster.restart(&[controller]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    bench.expect(&[&set[..], &["--wait", "--timeout", "50s"]].concat(), 0).await;
    let learners = bench.learners().await;
    assert_eq!(learners.len(), SHARDS, "{learners:?}");
    assert!(learners.iter().all(|(_, node)| [1, 4].contains(node)), "{learners:?}");
    assert_eq!(bench.directories(), before + SHARDS);

    // A learner's node serves a session by itself.
    let learner = bench.cluster.nodes()[3].address();
    let reader = Client::builder().seeds([learner]).connect().await.expect("a healthy cluster");
    let reader = reader.with_consistency(Consistency::Session);
    let mut by_learners = 0;
    for number in 0..100 {
        let key = format!("session-{number}");
        client.put(key.clone(), "x").await.expect("a healthy cluster");
        reader.take_in(&client.session_mark()).expect("a mark");
        let read = reader.get(key).read().await.expect("a healthy cluster");
        assert_eq!(read.entry.expect("its own write is there").value, "x");
        by_learners += u32::from(learners.contains(&(read.served.shard.0, read.served.node.0)));
    }
    assert!(by_learners > 0, "no learner has served");
    let mut status = String::new();
    // A group may just be electing: then some keys are not served, and the exit code says so.
    until("all keys are served", COMES_TRUE, async || {
        let run = bench.run_with(&["status"], b"").await;
        status = text(&run.stdout);
        run.status.success()
    })
    .await;
    assert!(status.contains("16 read replicas"), "{status}");

    let none = ["replica", "set", "--learners", "0", "--zone", "a"];
    bench.expect(&none, 0).await;
    let controller = bench.meta_leader().await;
    bench.cluster.kill(controller);
    bench.cluster.reap(controller).await;
    bench.cluster.restart(&[controller]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    bench.expect(&[&none[..], &["--wait", "--timeout", "50s"]].concat(), 0).await;
    assert_eq!(bench.learners().await, []);
    until("nothing is left of them", COMES_TRUE, async || bench.directories() == before).await;

    nothing_is_lost(load, &client, &ledger).await;
    client.close().await;
    bench.stop().await;
}

/// A replica's place: its number, and the directory of its state.
fn learner_on(replicas: &[Value], node: u64) -> Option<(u64, u64)> {
    let on_node = |replica: &&Value| replica["role"] == "learner" && replica["node"] == node;
    let number = |replica: &Value, field: &str| replica[field].as_u64().expect("a number");
    let found = replicas.iter().find(on_node);
    found.map(|replica| (number(replica, "shard"), number(replica, "replica")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_read_replica_comes_anew() {
    let mut bench = Bench::start(4).await;
    // Three vote for each shard; the fourth node, of zone a, reads along for those that n1 votes for.
    let set = ["replica", "set", "--learners", "1", "--zone", "a", "--wait", "--timeout", "50s"];
    bench.expect(&set, 0).await;
    let replicas = bench.replicas().await;
    let (at, node) = (3, 4);
    let (shard, damaged) = learner_on(&replicas, node).expect("it reads along for some shard");
    bench.cluster.kill(at);
    bench.cluster.reap(at).await;
    let shards = bench.cluster.process(at).plan().data_dir.join("shards");
    let store = shards.join(format!("{damaged:016x}"));
    std::fs::remove_dir_all(&store).expect("it was there");
    bench.cluster.restart(&[at]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    let mut said = false;
    until("another one is made", COMES_TRUE, async || {
        let replicas = bench.replicas().await;
        let its = |replica: &&Value| replica["shard"] == shard && replica["node"] == node;
        let found: Vec<&Value> = replicas.iter().filter(its).collect();
        let is = |state: &str, old: bool| {
            let wanted = |replica: &&&Value| {
                replica["state"] == state && (replica["replica"] == damaged) == old
            };
            found.iter().any(|replica| wanted(&replica))
        };
        said |= is("damaged", true);
        is("following", false)
    })
    .await;
    assert!(said, "replica ls did not say that it was damaged");
    assert!(!store.exists(), "the old one left nothing");
    until("all is well", COMES_TRUE, async || {
        let run = bench.run_with(&["status"], b"").await;
        run.status.success()
    })
    .await;
    bench.expect(&set, 0).await;
    bench.stop().await;
}

//! Shards of real processes are split and merged again under a load, while the node that sees to it is
//! killed. Nothing that was acknowledged is lost, every key is found where the map says, scans hold each key
//! once, and nothing is left of what went.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use coracle_cli::demo::ledger::Ledger;
use coracle_cli::demo::load::Load;
use coracle_client::admin::{OperationKind, OperationState};
use coracle_client::{Client, ShardId};
use futures_util::StreamExt;

use super::{Bench, nothing_is_lost, until};

const COMES_TRUE: Duration = Duration::from_secs(120);
const KEYS: usize = 400;

async fn shards(client: &Client) -> BTreeSet<ShardId> {
    let map = client.admin().map().await.expect("somebody knows it");
    map.shards.iter().map(|shard| shard.id).collect()
}

async fn has_all(client: &Client) {
    let found: Vec<_> = client.scan(..).prefix("fixed/").stream().collect().await;
    let keys: Vec<_> = found.into_iter().map(|entry| entry.expect("a scan goes on").key).collect();
    let unique: BTreeSet<_> = keys.iter().cloned().collect();
    assert_eq!((keys.len(), unique.len()), (KEYS, KEYS));
}

/// Directories of replicas, and replicas in the map, on all nodes.
async fn leftovers(bench: &mut Bench, client: &Client) -> (usize, usize) {
    let map = client.admin().map().await.expect("somebody knows it");
    let wanted = map.shards.iter().map(|shard| shard.replicas.len()).sum();
    let nodes = bench.cluster.nodes().len();
    let dirs = (0..nodes).map(|at| {
        let dir = bench.cluster.process(at).plan().data_dir.join("shards");
        std::fs::read_dir(dir).expect("it is there").count()
    });
    (dirs.sum(), wanted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_split_under_a_load_whoever_sees_to_it() {
    let mut bench = Bench::start(3).await;
    bench.expect(&["rebalance", "auto", "off"], 0).await;
    let ledger = Arc::new(Ledger::new("splits"));
    let seeds: Vec<String> = bench.cluster.nodes().iter().map(|node| node.address()).collect();
    let client = Client::builder().seeds(seeds).connect_lazy().unwrap();
    for number in 0..KEYS {
        client.put(format!("fixed/{number}"), "x").await.expect("a put");
    }
    let load = Load::start(vec![client.keyspace("default")], ledger.clone(), 200);
    let before = shards(&client).await;

    // Where, and that nothing is done.
    let (looked, _) = bench.expect(&["shard", "split", "1", "--dry-run", "-o", "json"], 0).await;
    let looked: serde_json::Value = serde_json::from_str(&looked).expect("JSON");
    let at = looked["at"].as_str().expect("a position").to_owned();
    assert_eq!(shards(&client).await, before);
    let (done, _) =
        bench.expect(&["shard", "split", "1", "--at", &at, "--wait", "--timeout", "50s"], 0).await;
    assert!(done.contains("is done"), "{done}");
    let after = shards(&client).await;
    assert_eq!(after.len(), before.len() + 1);
    has_all(&client).await;

    // By a key; what makes no sense has exit codes of its own.
    bench.expect(&["shard", "split", "99"], 1).await;
    bench.expect(&["shard", "split", "1", "--at", "nowhere"], 2).await;
    bench.expect(&["shard", "merge", "1", "1"], 2).await;
    let position = client.admin().position("default", b"fixed/7").await;
    let position = position.expect("known").expect("it stands somewhere");
    let map = client.admin().map().await.expect("somebody knows it");
    let holds = |shard: &&coracle_client::topology::Shard| {
        shard.id.0 != 0 && shard.start < position && (shard.end == 0 || position < shard.end)
    };
    let holder = map.shards.iter().find(holds).expect("one holds it").id.to_string();
    bench.expect(&["shard", "split", &holder, "--key", "fixed/7", "--wait"], 0).await;
    let map = client.admin().map().await.expect("somebody knows it");
    assert!(map.shards.iter().any(|shard| shard.start == position));

    // Several at once, and whoever sees to them is killed.
    let controller = bench.meta_leader().await;
    let some: Vec<String> = after.iter().skip(2).take(6).map(|shard| shard.0.to_string()).collect();
    for shard in &some {
        bench.expect(&["shard", "split", shard], 0).await;
    }
    bench.cluster.kill(controller);
    bench.cluster.reap(controller).await;
    bench.cluster.restart(&[controller]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    until("all are split", COMES_TRUE, async || {
        let Ok(list) = client.admin().operations().await else { return false };
        list.operations.iter().all(|operation| operation.has_ended())
    })
    .await;
    let list = client.admin().operations().await.expect("somebody knows them");
    let splits = list.operations.iter().filter(|it| it.kind == OperationKind::Split);
    assert!(splits.clone().all(|it| it.state == OperationState::Done), "{list:?}");
    assert_eq!(shards(&client).await.len(), before.len() + 2 + some.len());
    has_all(&client).await;
    until("every replica has its directory", COMES_TRUE, async || {
        let (found, wanted) = leftovers(&mut bench, &client).await;
        found == wanted
    })
    .await;
    merged_again(&mut bench, &client, &some).await;
    assert_eq!(shards(&client).await.len(), before.len() + 2);
    nothing_is_lost(load, &client, &ledger).await;
    client.close().await;
    bench.stop().await;
}

/// Each of these takes its right neighbour in, though whoever sees to it is killed.
async fn merged_again(bench: &mut Bench, client: &Client, lefts: &[String]) {
    let before = client.admin().map().await.expect("somebody knows it");
    let find = |id: &str| before.shards.iter().find(|shard| shard.id.0.to_string() == id);
    let right = |left: &String| {
        let end = find(left).expect("it is there").end;
        let mut rights = before.shards.iter().filter(|it| it.id.0 != 0 && it.start == end);
        rights.next().expect("it has a neighbour").id
    };
    let pairs: Vec<(&String, ShardId)> = lefts.iter().map(|left| (left, right(left))).collect();
    let first = pairs[0];
    bench.expect(&["shard", "merge", first.0, &first.1.0.to_string(), "--dry-run"], 0).await;
    for (left, right) in &pairs {
        bench.expect(&["shard", "merge", left, &right.0.to_string()], 0).await;
    }
    let controller = bench.meta_leader().await;
    bench.cluster.kill(controller);
    bench.cluster.reap(controller).await;
    bench.cluster.restart(&[controller]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    until("all are merged", COMES_TRUE, async || {
        let Ok(list) = client.admin().operations().await else { return false };
        if !list.operations.iter().all(|operation| operation.has_ended()) {
            return false;
        }
        let there = shards(client).await;
        let open = pairs.iter().filter(|(_, right)| there.contains(right));
        let open: Vec<_> = open.map(|(left, right)| (left.parse::<u64>(), *right)).collect();
        // One whose freeze was too slow each time, on a machine that has much else to do.
        for (left, right) in &open {
            let left = ShardId(*left.as_ref().expect("a number"));
            let asked = client.admin().merge_shards(left, *right, false).await;
            drop(asked);
        }
        open.is_empty()
    })
    .await;
    has_all(client).await;
    until("nothing is left of what went", COMES_TRUE, async || {
        let (found, wanted) = leftovers(bench, client).await;
        found == wanted
    })
    .await;
}

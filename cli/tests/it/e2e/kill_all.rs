//! All nodes killed at once, again and again, under load. Only this finds an acknowledgement that was
//! given before the disk had it: a majority of survivors hides that in every other test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_cli::demo::ledger::Ledger;
use coracle_cli::demo::load::{Load, verify};
use coracle_client::Client;
use rand::RngExt;

use super::{Bench, until};

const NODES: usize = 3;
const CLIENTS: usize = 64;
const ACKNOWLEDGEMENTS_MIN: u64 = 1_000;

/// `CORACLE_KILL_ROUNDS` makes it longer.
fn rounds() -> u32 {
    let rounds = std::env::var("CORACLE_KILL_ROUNDS").ok();
    rounds.map_or(20, |rounds| rounds.parse().expect("CORACLE_KILL_ROUNDS is a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_the_kill_of_all_nodes() {
    let mut bench = Bench::start(NODES).await;
    let seeds: Vec<String> = bench.cluster.nodes().iter().map(|node| node.address()).collect();
    let ledger = Arc::new(Ledger::new("kill"));
    let clients: Vec<Client> = (0..CLIENTS)
        .map(|_| Client::builder().seeds(seeds.clone()).connect_lazy().unwrap())
        .collect();
    let keyspaces = clients.iter().map(|client| client.keyspace("default")).collect();
    let load = Load::start(keyspaces, ledger.clone(), 0);
    let mut lost = 0;
    for round in 1..=rounds() {
        let before = ledger.acknowledgements();
        let started = Instant::now();
        until("a thousand acknowledgements", Duration::from_secs(60), async || {
            ledger.acknowledgements() >= before + ACKNOWLEDGEMENTS_MIN
        })
        .await;
        // A random moment, as the test says: in the middle of whatever the nodes are doing then.
        let moment = Duration::from_micros(rand::rng().random_range(0..250_000));
        tokio::time::sleep(moment).await;
        let acknowledged = ledger.acknowledgements() - before;
        for at in 0..NODES {
            bench.cluster.kill(at);
        }
        for at in 0..NODES {
            bench.cluster.reap(at).await;
        }
        let places: Vec<usize> = (0..NODES).collect();
        let restarted = bench.cluster.restart(&places).await;
        restarted.unwrap_or_else(|failure| panic!("round {round}: {failure:?}"));
        let window = load.take_window();
        lost += window.lost;
        println!(
            "round {round}: {acknowledged} acknowledged, {} ms, lost so far {lost}",
            started.elapsed().as_millis()
        );
        assert_eq!(lost, 0, "round {round}: a writer did not find what was acknowledged to it");
    }
    load.finish().await;
    let reader = Client::builder()
        .seeds(seeds)
        .operation_timeout(Duration::from_secs(20))
        .connect_lazy()
        .unwrap();
    let verified = verify(&reader, "default", &ledger).await;
    let verified = verified.unwrap_or_else(|failure| panic!("{failure:?}"));
    println!("{verified:?}");
    assert_eq!(verified.lost, Vec::<String>::new());
    assert!(verified.acknowledged >= ACKNOWLEDGEMENTS_MIN * u64::from(rounds()), "{verified:?}");
    for client in clients {
        client.close().await;
    }
    bench.stop().await;
}

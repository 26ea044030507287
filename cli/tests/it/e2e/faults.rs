//! A leader that is killed and one that is cut off, under load: writes go on, nothing is lost, and the
//! node catches up. Only here do clients, elections and real time meet.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_cli::demo::ledger::{Failover, Ledger};
use coracle_cli::demo::load::{Load, verify};
use coracle_cli::demo::tour::busiest;

use super::{Bench, until};

/// Far beyond what is promised, because the machine of a test may be busy: the promise itself is
/// measured by a command of its own.
const FAILOVER: Duration = Duration::from_secs(20);

#[derive(Clone, Copy)]
enum Fault {
    Kill,
    CutOff,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_is_followed_by_another() {
    goes_on(Fault::Kill).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_is_followed_by_another() {
    goes_on(Fault::CutOff).await;
}

async fn goes_on(fault: Fault) {
    let mut bench = Bench::start(3).await;
    let ledger = Arc::new(Ledger::new("fault"));
    let keyspace = bench.cluster.client().keyspace("default");
    let load = Load::start(vec![keyspace; 16], ledger.clone(), 400);
    until("every shard has taken a write", FAILOVER, async || ledger.shards().len() == 16).await;

    let (node, led): (_, BTreeSet<_>) = busiest(&ledger).expect("writes were acknowledged");
    let at = bench.cluster.find(node).unwrap_or_else(|failure| panic!("{failure:?}"));
    let began = Instant::now();
    ledger.watch_failover(node, led, began);
    match fault {
        Fault::Kill => {
            bench.cluster.kill(at);
            bench.cluster.reap(at).await;
        }
        Fault::CutOff => {
            let cut = bench.cluster.partition(at).await;
            cut.unwrap_or_else(|failure| panic!("{failure:?}"));
        }
    }
    let whole = |failover: Failover| failover.first_writes.len() == failover.led.len();
    until("every shard that it led takes writes again", FAILOVER, async || {
        ledger.failover().is_some_and(whole)
    })
    .await;

    match fault {
        Fault::Kill => bench.cluster.restart(&[at]).await,
        Fault::CutOff => bench.cluster.heal().await,
    }
    .unwrap_or_else(|failure| panic!("{failure:?}"));
    let caught_up = bench.cluster.wait_caught_up(at, Instant::now() + FAILOVER).await;
    caught_up.unwrap_or_else(|failure| panic!("{failure:?}"));
    assert_eq!(load.take_window().lost, 0, "a writer did not find what was acknowledged to it");
    load.finish().await;
    let verified = verify(bench.cluster.client(), "default", &ledger).await;
    let verified = verified.unwrap_or_else(|failure| panic!("{failure:?}"));
    assert_eq!(verified.lost, Vec::<String>::new());
    assert!(verified.acknowledged > 100, "{verified:?}");
    bench.stop().await;
}

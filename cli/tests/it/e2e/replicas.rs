//! Reads by whichever replica is asked: the newest state, bounded ones, and keys that expire, each as
//! true as the leader's answer would be.

use std::time::{Duration, Instant};

use coracle_client::Consistency;

use super::Bench;

const KEYS: u32 = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_replica_serves_the_newest_state() {
    let bench = Bench::start(3).await;
    let client = bench.cluster.client();
    let mut by_followers = 0;
    for round in 0..3 {
        for number in 0..KEYS {
            let (key, value) = (format!("k{number}"), format!("{round}"));
            let put = client.put(key.clone(), value.clone());
            match number % 4 {
                // Judged at a version that the leader fixes.
                0 => put.ttl(Duration::from_secs(600)).await.expect("a healthy cluster"),
                _ => put.await.expect("a healthy cluster"),
            };
            let read = client.get(key).from_any_replica().read().await;
            let read = read.expect("a healthy cluster");
            let entry = read.entry.expect("it was just written");
            assert_eq!(entry.value, value, "served by {:?}", read.served);
            assert_eq!(read.served.staleness, Duration::ZERO);
            by_followers += u32::from(!read.served.leader);
        }
    }
    assert!(by_followers > KEYS, "only {by_followers} of {} by followers", 3 * KEYS);
    let keys: Vec<String> = (0..KEYS).map(|number| format!("k{number}")).collect();
    let all = client.multi_get(keys).from_any_replica().await.expect("a healthy cluster");
    assert!(all.into_iter().all(|entry| entry.is_some_and(|entry| entry.value == "2")));
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bounded_reads_are_no_older_than_they_may_be() {
    let bench = Bench::start(3).await;
    let client = bench.cluster.client();
    let bound = Duration::from_millis(200);
    let bounded = client.with_consistency(Consistency::Bounded(bound));
    let (mut by_followers, mut behind) = (0, 0);
    // What was acknowledged, and when.
    let mut acknowledged: Vec<(Instant, u32)> = Vec::new();
    for number in 0..600 {
        client.put("k", number.to_string()).await.expect("a healthy cluster");
        acknowledged.push((Instant::now(), number));
        let began = Instant::now();
        let read = bounded.get("k").read().await.expect("a healthy cluster");
        let seen: u32 = read
            .entry
            .map_or(0, |entry| String::from_utf8_lossy(&entry.value).parse().expect("a number"));
        let due = acknowledged.iter().rev().find(|(at, _)| *at + bound < began);
        let due = due.map_or(0, |(_, number)| *number);
        assert!(seen >= due, "{seen} was read, {due} is older than the bound: {:?}", read.served);
        assert!(read.served.staleness <= bound, "{:?}", read.served);
        by_followers += u32::from(!read.served.leader);
        behind += u32::from(seen < number);
        // Expired is expired, for every replica that may look so far back.
        client.put("e", "x").ttl(Duration::from_millis(1)).await.expect("a healthy cluster");
    }
    assert!(by_followers > 200, "only {by_followers} of 600 by followers");
    println!("{by_followers} by followers, {behind} of them behind the newest write");
    tokio::time::sleep(bound * 2).await;
    for _ in 0..20 {
        assert_eq!(bounded.get("e").await.expect("a healthy cluster"), None);
    }
    bench.stop().await;
}

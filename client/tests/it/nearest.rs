//! Reads that any replica may serve: who is asked, who is left out, when a second one is asked.

use std::time::Duration;

use coracle_client::testing::{Act, FakeCluster, Refusal};
use coracle_client::topology::NodeState;
use coracle_client::{Client, Consistency, NodeId};
use futures_util::StreamExt;
use tokio::time::Instant;

use crate::start::{N1, N2, N3};

const MS: Duration = Duration::from_millis(1);

/// Node 1 leads; it, 2 and 3 vote; 4 and 5 are read replicas. Zones in turn.
fn five(zones: &[&str]) -> FakeCluster {
    let shape = FakeCluster::shape().nodes(5).voters(3).led_by(N1).zones(zones.iter().copied());
    shape.start()
}

async fn client(fake: &FakeCluster, zone: &str) -> Client {
    let builder = fake.client_builder();
    let builder = if zone.is_empty() { builder } else { builder.zone(zone) };
    let kv = builder.connect().await.expect("a client");
    kv.put("k", "v").await.expect("a put");
    fake.take_requests();
    kv.with_consistency(Consistency::Session)
}

/// Reads so often, and counts by node what was asked.
async fn asked(fake: &FakeCluster, kv: &Client, reads: u32) -> Vec<usize> {
    for _ in 0..reads {
        assert_eq!(kv.get("k").await.expect("a get").expect("it is there").value, "v");
    }
    let seen = fake.take_requests();
    let of = |node: &NodeId| seen.iter().filter(|seen| seen.node == *node).count();
    fake.nodes().iter().map(of).collect()
}

/// How long so many reads took, one after the other, shortest first.
async fn took(kv: &Client, reads: u32) -> Vec<Duration> {
    let mut all = Vec::new();
    for _ in 0..reads {
        let started = Instant::now();
        kv.get("k").await.expect("a get");
        all.push(started.elapsed());
    }
    all.sort_unstable();
    all
}

fn percentile(sorted: &[Duration], share: f64) -> Duration {
    sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)]
}

#[tokio::test(start_paused = true)]
async fn the_own_zone_serves_followers_and_read_replicas_alike() {
    let fake = five(&["a", "b", "c"]);
    let kv = client(&fake, "b").await;
    let seen = asked(&fake, &kv, 100).await;
    assert_eq!((seen[0], seen[2], seen[3]), (0, 0, 0), "{seen:?}");
    assert!(seen[1] > 30 && seen[4] > 30, "nodes 2 and 5 take turns: {seen:?}");
    let elsewhere = client(&fake, "d").await;
    let seen = asked(&fake, &elsewhere, 100).await;
    assert!(seen[1..].iter().all(|count| *count > 5), "all followers: {seen:?}");
    assert!(seen[0] < 15, "the leader is last among equals: {seen:?}");
    assert_eq!(kv.stats().nearest, 100);
}

#[tokio::test(start_paused = true)]
async fn the_fastest_serves_and_one_that_becomes_fast_is_found() {
    let fake = five(&[]);
    let kv = client(&fake, "").await;
    for (node, delay) in (1..=5).zip([30, 40, 5, 20, 40]) {
        fake.delay_node(NodeId(node), delay * MS);
    }
    asked(&fake, &kv, 100).await;
    let seen = asked(&fake, &kv, 300).await;
    assert!(seen[2] > 270, "node 3: {seen:?}");
    fake.delay_node(N3, 60 * MS);
    fake.delay_node(N2, 2 * MS);
    asked(&fake, &kv, 2_000).await;
    let seen = asked(&fake, &kv, 300).await;
    assert!(seen[1] > 270, "node 2 now: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_near_leader_serves_when_its_followers_are_far() {
    let fake = five(&[]);
    let kv = client(&fake, "").await;
    (2..=5).for_each(|node| fake.delay_node(NodeId(node), 40 * MS));
    asked(&fake, &kv, 1_000).await;
    let seen = asked(&fake, &kv, 300).await;
    assert!(seen[0] > 270, "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn nodes_that_do_not_serve_are_not_asked() {
    let fake = five(&[]);
    fake.set_node_state(NodeId(4), NodeState::Joining);
    fake.set_node_state(NodeId(5), NodeState::Down);
    let kv = client(&fake, "").await;
    let seen = asked(&fake, &kv, 100).await;
    assert_eq!((seen[3], seen[4]), (0, 0), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_goes_away_costs_one_detour_without_a_wait() {
    let fake = five(&["a", "b"]);
    let kv = client(&fake, "b").await;
    asked(&fake, &kv, 20).await;
    fake.stop(N2);
    fake.stop(NodeId(4));
    let started = Instant::now();
    let seen = asked(&fake, &kv, 20).await;
    assert!(started.elapsed() < 20 * MS, "{:?}", started.elapsed());
    assert_eq!(seen[1] + seen[3], 0);
    assert_eq!(seen[2] + seen[4], 20 - seen[0]);
    assert!(seen[0] <= 5, "the leader only now and then: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn behind_a_replica_that_is_too_stale_the_leader_is_asked_and_the_budget_is_spared() {
    let fake = five(&["a", "b"]);
    let kv = client(&fake, "b").await;
    // Of the two in the zone, one.
    fake.hold_back(N2, Duration::from_secs(5));
    fake.hold_back(NodeId(4), Duration::from_secs(5));
    kv.put("k", "v").await.expect("a put");
    fake.take_requests();
    let started = Instant::now();
    let read = kv.get("k").read().await.expect("a get");
    assert_eq!((read.entry.expect("its own write").value, read.served.node), ("v".into(), N1));
    assert!((250 * MS..260 * MS).contains(&started.elapsed()), "{:?}", started.elapsed());
    assert_eq!(kv.stats().moved_on, 1);
    // Both have failed just now, one after the other; then others are asked.
    kv.get("k").await.expect("a get");
    let seen = asked(&fake, &kv, 20).await;
    assert!(seen[1] + seen[3] <= 3, "{seen:?}");
    // An empty budget changes nothing.
    fake.refuse(2_000, Refusal::overloaded(Duration::ZERO));
    let calls: Vec<_> =
        (0..700).map(|n| tokio::spawn(kv.put(format!("x{n}"), "v").into_future())).collect();
    for call in calls {
        drop(call.await);
    }
    fake.refuse(0, Refusal::overloaded(Duration::ZERO));
    tokio::time::sleep(Duration::ZERO).await;
    fake.script(NodeId(5), [Act::Refuse(Refusal::new("TOO_STALE"))]);
    fake.script(N3, [Act::Refuse(Refusal::new("TOO_STALE"))]);
    kv.get("k").await.expect("another replica, or the leader");
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_a_little_behind_is_waited_for() {
    let fake = five(&["a", "b"]);
    let kv = client(&fake, "b").await;
    fake.hold_back(N2, 100 * MS);
    fake.hold_back(NodeId(4), 100 * MS);
    let started = Instant::now();
    kv.put("k", "v").await.expect("a put");
    let read = kv.get("k").read().await.expect("a get");
    assert!(!read.served.leader && read.entry.is_some());
    assert!((100 * MS..110 * MS).contains(&started.elapsed()), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_session_holds_whoever_answers_also_under_hedges() {
    let fake = FakeCluster::shape().nodes(3).led_by(N1).start();
    let kv = client(&fake, "").await;
    fake.hold_back(N2, 300 * MS);
    fake.hold_back(N3, 20 * MS);
    fake.delay_every(13, 40 * MS);
    let mut by_followers = 0;
    for round in 0..2_000u32 {
        let written = (round / 10).to_string();
        if round % 10 == 0 {
            kv.put("k", written.clone()).await.expect("a put");
        }
        let read = kv.get("k").read().await.expect("a get");
        let entry = read.entry.expect("its own write");
        assert_eq!(entry.value, written, "served by {:?}", read.served);
        by_followers += u32::from(!read.served.leader);
    }
    assert!(by_followers > 200 && kv.stats().hedges > 0, "{by_followers}, {:?}", kv.stats());
}

#[tokio::test(start_paused = true)]
async fn linearizable_reads_go_to_the_leader_unless_any_replica_may_serve() {
    let fake = five(&["a", "b"]);
    let kv = client(&fake, "b").await.with_consistency(Consistency::Linearizable);
    assert_eq!(asked(&fake, &kv, 20).await, [20, 0, 0, 0, 0]);
    fake.hold_back(N2, 30 * MS);
    let near = kv.from_any_replica();
    near.put("k", "v").await.expect("a put");
    let seen = asked(&fake, &near, 20).await;
    assert_eq!(seen[1] + seen[3], 20 + 1 - seen[0], "one put: {seen:?}");
    assert_eq!(near.multi_get(["k", "none"]).await.expect("both")[1], None);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_hedged_while_all_are_fast() {
    let fake = FakeCluster::shape().nodes(3).led_by(N1).start();
    fake.delay(2 * MS);
    let kv = client(&fake, "").await;
    took(&kv, 2_000).await;
    assert_eq!(kv.stats().hedges, 0);
    assert_eq!(kv.stats().requests, 2_001);
}

#[tokio::test(start_paused = true)]
async fn a_hedge_cuts_the_tail_of_slow_answers() {
    let mut tails = Vec::new();
    for hedge in [false, true] {
        let fake = FakeCluster::shape().nodes(3).led_by(N1).start();
        let builder = fake.client_builder().hedge_reads(hedge);
        let kv = builder.connect().await.expect("a client");
        kv.put("k", "v").await.expect("a put");
        let kv = kv.with_consistency(Consistency::Session);
        fake.delay(2 * MS);
        took(&kv, 1_000).await;
        fake.delay_every(67, 200 * MS);
        let all = took(&kv, 5_000).await;
        tails.push(percentile(&all, 0.99));
        let stats = kv.stats();
        assert_eq!(stats.hedges > 0, hedge, "{stats:?}");
        assert!(stats.hedges <= 120 && stats.hedges_won <= stats.hedges, "{stats:?}");
        assert_eq!(stats.requests, stats.calls + stats.hedges, "{stats:?}");
    }
    assert!(tails[0] >= 200 * MS && tails[1] < 10 * MS, "{tails:?}");
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_becomes_slow_is_hedged_and_then_left_out() {
    let fake = FakeCluster::shape().nodes(3).led_by(N1).start();
    let kv = client(&fake, "").await;
    fake.delay(2 * MS);
    took(&kv, 500).await;
    fake.delay_node(N2, 200 * MS);
    let all = took(&kv, 1_000).await;
    assert!(percentile(&all, 0.5) < 4 * MS, "{:?}", percentile(&all, 0.5));
    assert!(percentile(&all, 0.99) < 20 * MS, "{:?}", percentile(&all, 0.99));
    assert!(kv.stats().hedges_won > 0);
    fake.take_requests();
    let seen = asked(&fake, &kv, 300).await;
    assert!(seen[1] <= 5, "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_is_slow_as_a_whole_gets_two_of_a_hundred_reads_twice_at_most() {
    let fake = FakeCluster::shape().nodes(3).led_by(N1).start();
    let kv = client(&fake, "").await;
    fake.delay(MS);
    took(&kv, 500).await;
    fake.delay(50 * MS);
    // More than two of a hundred are slower still, wherever they go.
    fake.delay_every(25, 100 * MS);
    let before = kv.stats();
    let reads = (0..10_000).map(|_| async { kv.get("k").await.expect("a get") });
    futures_util::stream::iter(reads).buffer_unordered(64).for_each(async |_| {}).await;
    let extra = kv.stats().requests - before.requests - 10_000;
    assert!(extra > 0, "it was slower than before");
    assert!(extra <= 205, "{extra} requests more");
    assert_eq!(extra, kv.stats().hedges - before.hedges);
}

#[tokio::test(start_paused = true)]
async fn writes_and_reads_of_the_leader_are_never_hedged() {
    let fake = FakeCluster::shape().nodes(3).led_by(N1).start();
    let kv = fake.client().await;
    fake.delay_every(20, 300 * MS);
    for round in 0..500u32 {
        kv.put("k", round.to_string()).await.expect("a put");
        kv.get("k").await.expect("a get");
    }
    let stats = kv.stats();
    assert_eq!((stats.hedges, stats.nearest, stats.requests), (0, 0, 1_000));
}

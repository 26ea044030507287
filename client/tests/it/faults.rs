//! Calls while nodes fail, move and forget: which attempts are made, and what is said of a write.

use std::time::Duration;

use coracle_client::testing::{Act, FakeCluster, Refusal};
use coracle_client::{ErrorKind, NodeId, Outcome};
use tokio::time::{Instant, sleep};

use crate::start::{N1, N2, N3, elect, number, refuse, start, until};

const MS: Duration = Duration::from_millis(1);

fn nodes(cluster: &FakeCluster) -> Vec<u64> {
    cluster.take_requests().iter().map(|seen| seen.node.0).collect()
}

async fn stored(cluster: &FakeCluster) -> i64 {
    let entry = cluster.client().await.get("n").await.expect("a get");
    number(&entry.expect("it is there").value)
}

fn points_to(leader: NodeId) -> Act {
    Act::Refuse(Refusal::not_leader(Some(leader)))
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_followed_at_once_and_remembered() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    elect(&cluster, Some(N2));
    let started = Instant::now();
    kv.put("a", "1").await.expect("a put");
    assert_eq!(nodes(&cluster), [1, 2]);
    assert!(started.elapsed() < 10 * MS, "without a wait: {:?}", started.elapsed());
    kv.put("b", "1").await.expect("a put");
    assert_eq!(nodes(&cluster), [2]);
}

#[tokio::test(start_paused = true)]
async fn nodes_that_point_at_each_other_are_not_hammered() {
    let cluster = start(2, 1);
    let kv = cluster.client().await;
    for _ in 0..4 {
        cluster.script(N1, [points_to(N2)]);
        cluster.script(N2, [points_to(N1)]);
    }
    let started = Instant::now();
    kv.put("a", "1").await.expect("a put, in the end");
    let seen = nodes(&cluster);
    assert_eq!(seen[..6], [1, 2, 1, 2, 1, 2], "five redirects at once");
    assert!(seen.len() >= 9);
    assert!(started.elapsed() > 3 * MS, "then a wait");
}

#[tokio::test(start_paused = true)]
async fn without_a_known_leader_the_replicas_are_asked_in_turn() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    elect(&cluster, None);
    let put = tokio::spawn(kv.put("a", "1").into_future());
    until(&cluster, |seen| seen.requests_seen() >= 4).await;
    elect(&cluster, Some(N3));
    put.await.expect("no panic").expect("a put");
    let seen = nodes(&cluster);
    for node in 1..=3 {
        assert!(seen.contains(&node), "{seen:?}");
    }
    assert!(seen.windows(2).all(|pair| pair[0] != pair[1]), "never the same twice: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_asked_for_again_under_the_same_id() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::LoseAnswer]);
    let started = Instant::now();
    let counter = kv.increment("n", 1).await.expect("the first result");
    assert_eq!(counter.value, 1);
    let ids: Vec<_> =
        cluster.take_requests().iter().map(|seen| seen.request_id.expect("a write")).collect();
    assert_eq!((stored(&cluster).await, cluster.counts().duplicates), (1, 1), "applied once");
    assert!(ids.len() >= 2);
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert!(started.elapsed() >= Duration::from_secs(1), "one attempt's timeout");
    assert!(started.elapsed() < 1_500 * MS, "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_ends_its_calls_at_once() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::ApplyAndCut]);
    let started = Instant::now();
    assert_eq!(kv.increment("n", 1).await.expect("the first result").value, 1);
    assert_eq!(stored(&cluster).await, 1, "applied once");
    assert!(started.elapsed() < 500 * MS, "no timeout is waited for: {:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_write_whose_answers_are_all_lost_is_unknown() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    for node in 1..=3 {
        cluster.script(NodeId(node), vec![Act::LoseRequest; 50]);
    }
    let started = Instant::now();
    let error = kv.put("a", "1").await.expect_err("no answer");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::TimedOut, Outcome::Unknown));
    assert!(!error.is_retryable());
    assert!(error.attempts() >= 5, "{error}");
    let id = error.request_id().expect("a write has an id");
    let seen = cluster.take_requests();
    assert!(seen.iter().all(|seen| seen.request_id.expect("a write").sequence == id.sequence));
    assert_eq!(started.elapsed().as_secs(), 5);
    let read = kv.get("a").timeout(1_500 * MS).await.expect_err("no answer either");
    assert_eq!((read.kind(), read.outcome()), (ErrorKind::TimedOut, Outcome::NotApplied));
    assert!(read.is_retryable() && read.request_id().is_none());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_attempt_is_not_forgotten_when_later_ones_are_refused() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::LoseRequest, refuse("DISK_FULL")]);
    let error = kv.put("a", "1").await.expect_err("the disk is full");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::DiskFull, Outcome::Unknown));
    cluster.script(N1, [refuse("DISK_FULL")]);
    let error = kv.put("a", "1").await.expect_err("the disk is full");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::DiskFull, Outcome::NotApplied));
    assert_eq!(error.reason(), Some("DISK_FULL"));
}

#[tokio::test(start_paused = true)]
async fn without_a_quorum_a_write_is_not_applied() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    for node in 1..=3 {
        cluster.script(NodeId(node), vec![refuse("NO_QUORUM"); 200]);
    }
    let started = Instant::now();
    let error = kv.put("a", "1").await.expect_err("no quorum");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotApplied));
    assert_eq!(error.reason(), Some("NO_QUORUM"));
    assert!(error.is_retryable());
    assert!(started.elapsed() <= Duration::from_secs(5));
    assert!(started.elapsed() > Duration::from_secs(4), "tried as long as there was time");
    assert!((8..60).contains(&error.attempts()), "and not too often: {}", error.attempts());
}

#[tokio::test(start_paused = true)]
async fn a_write_that_never_left_is_not_applied() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    [N1, N2, N3].into_iter().for_each(|node| cluster.stop(node));
    let error = kv.put("a", "1").timeout(2_000 * MS).await.expect_err("nobody is there");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotApplied));
}

#[tokio::test(start_paused = true)]
async fn a_passed_window_means_a_new_id_when_nothing_is_open() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    let written = kv.put("a", "1").await.expect("a put");
    cluster.advance(Duration::from_secs(60));
    cluster.take_requests();
    let now_ms = (written.version.0 >> 16) + 60_000;
    let passed = Refusal::new("RETRY_WINDOW_PASSED").fact("server_time_ms", now_ms);
    cluster.script(N1, [Act::Refuse(passed)]);
    kv.increment("n", 1).await.expect("under a new id");
    let seen = cluster.take_requests();
    let ids: Vec<_> = seen.iter().map(|seen| seen.request_id.expect("a write")).collect();
    assert_eq!(ids.len(), 2);
    assert!(ids[1].sequence > ids[0].sequence);
    assert_eq!(ids[1].birth, now_ms);
    assert_eq!(seen[1].lowest_unanswered, ids[1].sequence, "the old one is given up");
}

#[tokio::test(start_paused = true)]
async fn a_passed_window_leaves_an_open_write_unknown() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::LoseAnswer, refuse("RETRY_WINDOW_PASSED")]);
    let error = kv.increment("n", 1).await.expect_err("nobody can tell any more");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::RetryWindowPassed, Outcome::Unknown));
    assert_eq!(stored(&cluster).await, 1, "never twice");
}

#[tokio::test(start_paused = true)]
async fn a_stale_route_is_refreshed() {
    let cluster = start(3, 4);
    let kv = cluster.client().await;
    cluster.hold_map();
    cluster.shards().into_iter().for_each(|shard| cluster.raise_epoch(shard));
    kv.put("a", "1").await.expect("a put");
    let seen = cluster.take_requests();
    let epochs: Vec<_> = seen.iter().map(|seen| seen.shard_epoch).collect();
    assert_eq!(epochs, [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn overload_is_waited_out_as_the_server_asks() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    cluster.refuse(2, Refusal::overloaded(300 * MS));
    let started = Instant::now();
    kv.put("a", "1").await.expect("a put");
    assert!(started.elapsed() >= 600 * MS, "{:?}", started.elapsed());
    assert_eq!(nodes(&cluster), [1, 1, 1], "another node would not be the leader");
    cluster.refuse(1, Refusal::overloaded(Duration::from_secs(60)));
    let started = Instant::now();
    let error = kv.put("a", "1").await.expect_err("it would be too late then");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Overloaded, Outcome::NotApplied));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(60)));
    assert!(started.elapsed() < 10 * MS);
}

#[tokio::test(start_paused = true)]
async fn the_budget_keeps_an_overload_from_feeding_itself() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    cluster.script(N1, vec![refuse("OVERLOADED"); 10_000]);
    let started = Instant::now();
    let calls: Vec<_> =
        (0..400).map(|n| tokio::spawn(kv.put(format!("k{n}"), "v").into_future())).collect();
    for call in calls {
        let error = call.await.expect("no panic").expect_err("overloaded");
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Overloaded, Outcome::NotApplied));
    }
    let (asked, seconds) = (nodes(&cluster).len(), started.elapsed().as_secs() as usize);
    let allowed = 400 + 500 + 10 * (seconds + 1);
    assert!((600..=allowed).contains(&asked), "{asked} requests in {seconds} s");
}

#[tokio::test(start_paused = true)]
async fn an_empty_budget_does_not_end_an_open_write() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::LoseAnswer]);
    let open = tokio::spawn(kv.increment("n", 1).timeout(Duration::from_secs(60)).into_future());
    until(&cluster, |seen| seen.requests_seen() == 1).await;
    cluster.script(N1, vec![refuse("OVERLOADED"); 1_300]);
    let others: Vec<_> =
        (0..700).map(|n| tokio::spawn(kv.put(format!("k{n}"), "v").into_future())).collect();
    let mut refused = 0;
    for other in others {
        refused += usize::from(other.await.expect("no panic").is_err());
    }
    assert!(refused > 0, "the budget is empty");
    let counter = open.await.expect("no panic").expect("the first result, in the end");
    assert_eq!(counter.value, 1);
}

#[tokio::test(start_paused = true)]
async fn a_killed_leader_costs_no_more_than_the_election() {
    let cluster = start(3, 4);
    let kv = cluster.client().await;
    kv.put("warm", "1").await.expect("a put");
    cluster.script(N1, [Act::ApplyAndCut]);
    let under_way = tokio::spawn(kv.increment("n", 1).into_future());
    until(&cluster, |seen| seen.requests_seen() == 2).await;
    cluster.stop(N1);
    elect(&cluster, None);
    let started = Instant::now();
    let election = 700 * MS;
    sleep(election).await;
    elect(&cluster, Some(N3));
    cluster.publish_map();
    let counter = under_way.await.expect("no panic").expect("carried over");
    assert_eq!((counter.value, counter.written.served.term), (1, 1), "the first result");
    assert_eq!(counter.written.served.node, N3, "told by the new leader");
    let gap = started.elapsed() - election;
    assert!(gap < 20 * MS, "waiting calls hear of the new leader: {gap:?}");
    let started = Instant::now();
    kv.put("b", "1").await.expect("a put");
    assert!(started.elapsed() < 5 * MS, "others go straight to it: {:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_falls_silent_is_left_for_its_successor() {
    let cluster = start(3, 1);
    let kv = cluster.client_builder().seed(7).connect().await.expect("a client");
    kv.put("warm", "1").await.expect("a put");
    cluster.freeze(N1);
    let started = Instant::now();
    let under_way = tokio::spawn(kv.put("a", "1").into_future());
    sleep(1_400 * MS).await;
    elect(&cluster, Some(N2));
    cluster.publish_map();
    under_way.await.expect("no panic").expect("a put");
    assert!(started.elapsed() < 1_600 * MS, "{:?}", started.elapsed());
    let started = Instant::now();
    kv.put("b", "1").await.expect("a put");
    assert!(started.elapsed() < 5 * MS, "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn news_of_a_successor_ends_the_wait_for_an_old_leader() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::LoseRequest]);
    let started = Instant::now();
    let under_way = tokio::spawn(kv.put("a", "1").into_future());
    until(&cluster, |seen| seen.requests_seen() == 1).await;
    sleep(200 * MS).await;
    elect(&cluster, Some(N2));
    cluster.publish_map();
    let written = under_way.await.expect("no panic").expect("a put");
    assert_eq!(written.served.node, NodeId(2));
    assert!(started.elapsed() < 250 * MS, "long before the timeout: {:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_node_that_comes_back_is_used_again() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    for round in 0..3 {
        cluster.stop(N1);
        let put = tokio::spawn(kv.put("a", format!("{round}")).into_future());
        sleep(500 * MS).await;
        cluster.restart(N1);
        put.await.expect("no panic").expect("a put");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_write_lets_the_mark_go_on() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::LoseRequest]);
    let dropped = tokio::time::timeout(10 * MS, kv.put("a", "1").into_future()).await;
    assert!(dropped.is_err());
    kv.put("b", "1").await.expect("a put");
    let seen = cluster.take_requests();
    assert_eq!(seen[1].lowest_unanswered, seen[1].request_id.expect("a write").sequence);
}

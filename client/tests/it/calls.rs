//! Single calls on a healthy cluster: what goes in, what comes out, where it goes.

use std::time::Duration;

use coracle_client::EntityRule;
use coracle_client::testing::Hold;
use coracle_client::{
    Cas, Client, ErrorKind, NodeId, Operation, Outcome, ShardId, Version, WhenFull,
};
use tokio::time::{Instant, timeout};

use crate::start::{N1, refuse, start, until};
use coracle_client::testing::Act;

#[tokio::test(start_paused = true)]
async fn what_is_written_is_read() {
    let cluster = start(3, 4);
    let kv = cluster.client().await;
    let written = kv.put("a", "1").await.expect("a put");
    assert!(written.version > Version(0));
    assert_eq!((written.served.node, written.served.leader), (NodeId(1), true));
    let entry = kv.get("a").await.expect("a get").expect("present");
    assert_eq!((&entry.value[..], entry.expires_at_ms), (&b"1"[..], None));
    kv.delete("a").await.expect("a delete");
    assert_eq!(kv.get("a").await.expect("a get"), None);
    let read = kv.get("a").read().await.expect("a get");
    assert_eq!(read.entry, None);
    assert_ne!(read.served.shard, ShardId(0), "also of an absent key");
}

#[tokio::test(start_paused = true)]
async fn a_failed_condition_is_an_answer() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    let first = kv.put("lock", "me").if_absent().await.expect("an answer");
    assert!(first.is_applied());
    let Cas::Mismatch { current, .. } = kv.put("lock", "you").if_absent().await.expect("an answer")
    else {
        panic!("the lock is held");
    };
    let current = current.expect("present");
    assert_eq!(&current.value[..], b"me");
    let second = kv.put("lock", "you").ttl(Duration::from_secs(1)).if_version(current.version);
    assert!(second.await.expect("an answer").is_applied());
    let stale = kv.delete("lock").if_value("me").await.expect("an answer");
    assert!(!stale.is_applied());
    assert!(kv.delete("lock").if_value("you").await.expect("an answer").is_applied());
}

#[tokio::test(start_paused = true)]
async fn batches_and_counters() {
    let cluster = start(1, 1);
    cluster.create_keyspace("orders", EntityRule::Delimiter(b'/'));
    let kv = cluster.client().await.keyspace("orders");
    let operations = [
        Operation::put("7/a", "1").ttl(Duration::from_micros(1_500)),
        Operation::increment("7/n", -3),
        Operation::delete("7/b"),
        Operation::check("7/c").if_absent(),
    ];
    let outcome = kv.batch(operations).await.expect("a batch");
    assert!(outcome.applied.is_some());
    assert_eq!(outcome.results.len(), 4);
    assert_eq!(outcome.results[1].counter, -3);
    assert_eq!(kv.increment("7/n", 10).await.expect("a counter").value, 7);
    let entry = kv.get("7/a").await.expect("a get").expect("it has 2 ms");
    let born_ms = entry.version.0 >> 16;
    assert_eq!(entry.expires_at_ms, Some(born_ms + 2), "rounded up, never down to for ever");
}

#[tokio::test(start_paused = true)]
async fn multi_get_keeps_the_callers_order_over_shards() {
    let cluster = start(3, 8);
    let kv = cluster.client().await;
    for n in 0..50 {
        kv.put(format!("k{n}"), format!("v{n}")).await.expect("a put");
    }
    cluster.take_requests();
    let wanted: Vec<u32> = [49, 7, 7, 100, 0].into_iter().chain(10..40).collect();
    let got = kv.multi_get(wanted.iter().map(|n| format!("k{n}"))).await.expect("a multi-get");
    let got: Vec<_> = got.into_iter().map(|entry| entry.map(|entry| entry.value)).collect();
    let expected: Vec<_> =
        wanted.iter().map(|n| (*n < 50).then(|| format!("v{n}").into())).collect();
    assert_eq!(got, expected);
    let parts = cluster.take_requests().len();
    assert!((2..=8).contains(&parts), "one request a shard: {parts}");
    assert_eq!(kv.multi_get(Vec::<&str>::new()).await.expect("nothing").len(), 0);
}

#[tokio::test(start_paused = true)]
async fn multi_get_reports_each_key_by_itself() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    kv.put("k", "v").await.expect("a put");
    let each = kv.multi_get(["k", "", "none"]).each().await;
    assert!(matches!(&each[0], Ok(Some(entry)) if entry.value == "v"));
    assert_eq!(each[1].as_ref().expect_err("empty").kind(), ErrorKind::InvalidArgument);
    assert!(matches!(each[2], Ok(None)));
    let whole = kv.multi_get(["k", ""]).await.expect_err("one key fails the whole");
    assert_eq!(whole.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_would_be_too_large_is_asked_for_in_parts() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    for n in 0..5 {
        kv.put(format!("k{n}"), format!("v{n}")).await.expect("a put");
    }
    cluster.take_requests();
    cluster.script(N1, [refuse("TOO_LARGE"), refuse("TOO_LARGE")]);
    let got = kv.multi_get((0..5).map(|n| format!("k{n}"))).await.expect("in parts");
    let got: Vec<_> = got.into_iter().map(|entry| entry.expect("present").value).collect();
    assert_eq!(got, ["v0", "v1", "v2", "v3", "v4"]);
    assert_eq!(cluster.take_requests().len(), 5, "5 = 2 + 3, 2 = 1 + 1");
    cluster.script(N1, [refuse("TOO_LARGE")]);
    let single = kv.multi_get(["k0"]).await.expect_err("one key cannot be cut");
    assert_eq!(single.kind(), ErrorKind::TooLarge);
}

#[tokio::test(start_paused = true)]
async fn what_lies_beyond_a_limit_is_never_sent() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    let long = kv.put(vec![b'k'; 4097], "v").await.expect_err("too long");
    assert_eq!((long.kind(), long.outcome()), (ErrorKind::TooLarge, Outcome::NotApplied));
    assert!(long.to_string().contains("KEY_BYTES_MAX"), "{long}");
    let empty = kv.get("").await.expect_err("empty");
    assert_eq!(empty.kind(), ErrorKind::InvalidArgument);
    let ttl = kv.put("k", "v").ttl(Duration::ZERO).await.expect_err("zero would mean for ever");
    assert_eq!(ttl.kind(), ErrorKind::InvalidArgument);
    let ttl = kv.batch([Operation::put("k", "v").ttl(Duration::ZERO)]).await;
    assert!(ttl.is_err());
    let batch = kv.batch([]).await.expect_err("nothing to do");
    assert_eq!((batch.kind(), batch.attempts()), (ErrorKind::InvalidArgument, 0));
    assert!(cluster.take_requests().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_keyspace_is_looked_for_again_before_it_is_missing() {
    let cluster = start(1, 4);
    let kv = cluster.client().await;
    let missing = kv.keyspace("orders").get("k").await.expect_err("no such keyspace");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    // Made behind our back, and the watch has not told yet.
    cluster.hold_map();
    cluster.create_keyspace("orders", EntityRule::Delimiter(b'/'));
    kv.keyspace("orders").put("7/a", "1").await.expect("found by asking again");
    let seen = cluster.take_requests();
    assert_eq!((seen[0].method, seen[0].keyspace.as_str()), ("put", "orders"));
}

#[tokio::test(start_paused = true)]
async fn the_mark_is_the_oldest_write_that_is_still_tried() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    let go = Hold::new();
    cluster.script(N1, [Act::Hold(go.clone())]);
    let held = tokio::spawn(kv.put("held", "1").into_future());
    until(&cluster, |seen| seen.requests_seen() == 1).await;
    kv.put("a", "1").await.expect("a put");
    kv.put("b", "1").await.expect("a put");
    go.release();
    held.await.expect("no panic").expect("a put");
    cluster.advance(Duration::from_secs(1));
    kv.get("c").await.expect("it tells the time");
    kv.put("c", "1").await.expect("a put");
    let seen = cluster.take_requests();
    let writes = seen.iter().filter_map(|seen| Some((seen.request_id?, seen.lowest_unanswered)));
    let (ids, lowest): (Vec<_>, Vec<_>) = writes.unzip();
    let marks: Vec<_> = ids.iter().map(|id| id.sequence).zip(lowest).collect();
    assert_eq!(marks, [(1, 1), (2, 1), (3, 1), (4, 4)]);
    assert!(ids.iter().all(|id| id.client == ids[0].client && id.client != 0));
    assert!(ids.iter().all(|id| id.birth >= 1_000_000), "births are server times: {ids:?}");
    assert!(ids[3].birth > ids[0].birth, "and follow them");
}

#[tokio::test(start_paused = true)]
async fn in_flight_is_bounded_and_calls_wait() {
    let cluster = start(1, 1);
    let kv = cluster.client_builder().max_in_flight_per_node(4).connect().await.expect("a client");
    let calls: Vec<_> =
        (0..40).map(|n| tokio::spawn(kv.put(format!("k{n}"), "v").into_future())).collect();
    for call in calls {
        call.await.expect("no panic").expect("a put");
    }
    let most = cluster.most_at_once(N1);
    assert!((1..=4).contains(&most), "{most} at once");
}

#[tokio::test(start_paused = true)]
async fn in_flight_is_bounded_and_calls_fail_if_that_is_wanted() {
    let cluster = start(1, 1);
    let builder = cluster.client_builder().max_in_flight_per_node(1).when_full(WhenFull::Refuse);
    let kv = builder.connect().await.expect("a client");
    let go = Hold::new();
    cluster.script(N1, [Act::Hold(go.clone())]);
    let first = tokio::spawn(kv.put("a", "1").into_future());
    until(&cluster, |seen| seen.requests_seen() == 1).await;
    let full = kv.put("b", "1").await.expect_err("no place");
    assert_eq!((full.kind(), full.outcome()), (ErrorKind::Overloaded, Outcome::NotApplied));
    assert!(full.is_retryable());
    go.release();
    first.await.expect("no panic").expect("a put");
    kv.put("b", "1").await.expect("there is a place again");
}

#[tokio::test(start_paused = true)]
async fn a_lazy_client_waits_for_its_cluster() {
    let cluster = start(1, 1);
    cluster.stop(N1);
    let kv = cluster.client_builder().connect_lazy().expect("nothing is sent yet");
    let put = tokio::spawn(kv.put("a", "1").into_future());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!put.is_finished());
    cluster.restart(N1);
    put.await.expect("no panic").expect("a put");
    cluster.stop(N1);
    let started = Instant::now();
    let builder = cluster.client_builder().operation_timeout(Duration::from_secs(2));
    let nobody = builder.connect().await.map(drop).expect_err("nobody is there");
    assert_eq!((nobody.kind(), nobody.outcome()), (ErrorKind::Unavailable, Outcome::NotApplied));
    assert!(nobody.to_string().contains("n1:7400"), "{nobody}");
    assert_eq!(started.elapsed().as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_takes_the_tasks_with_it() {
    let cluster = start(3, 4);
    let kv = cluster.client().await;
    let keyspace = kv.keyspace("default");
    drop(kv);
    keyspace.put("a", "1").await.expect("another handle keeps the client alive");
    assert!(cluster.connections() > 0);
    drop(keyspace);
    let gone = async {
        while cluster.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(1), gone).await.expect("all connections are closed");
}

#[tokio::test(start_paused = true)]
async fn a_closed_client_says_so() {
    let cluster = start(1, 1);
    let kv = cluster.client().await;
    cluster.script(N1, [Act::LoseRequest]);
    let under_way = tokio::spawn(kv.put("a", "1").into_future());
    until(&cluster, |seen| seen.requests_seen() == 1).await;
    kv.clone().close().await;
    let ended = under_way.await.expect("no panic").expect_err("closed under way");
    assert_eq!((ended.kind(), ended.outcome()), (ErrorKind::Closed, Outcome::Unknown));
    let later = kv.put("b", "1").await.expect_err("closed");
    assert_eq!((later.kind(), later.outcome()), (ErrorKind::Closed, Outcome::NotApplied));
}

#[tokio::test]
async fn settings_that_make_no_sense_are_refused() {
    let refused = |builder: coracle_client::Builder| {
        let error = builder.connect_lazy().map(drop).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        error.to_string()
    };
    let seeded = || Client::builder().seeds(["n1:7400"]);
    assert!(refused(Client::builder()).contains("seed"));
    assert!(refused(Client::builder().seeds(["n1"])).contains("\"n1\""));
    assert!(refused(Client::builder().seeds(["n1:port"])).contains("host:port"));
    assert!(refused(seeded().max_in_flight_per_node(0)).contains("max_in_flight_per_node"));
    assert!(refused(seeded().max_in_flight_per_node(1_025)).contains("1024"));
    assert!(refused(seeded().attempt_timeout(Duration::ZERO)).contains("attempt_timeout"));
    assert!(refused(seeded().name("a\nb")).contains("name"));
}

#[test]
fn handles_and_calls_can_cross_threads() {
    fn check<T: Send>(_: impl FnOnce(Client) -> T) {}
    fn is_shared<T: Clone + Send + Sync + 'static>() {}
    is_shared::<Client>();
    is_shared::<coracle_client::Keyspace>();
    is_shared::<coracle_client::Admin>();
    is_shared::<coracle_client::Error>();
    check(|kv| kv.get("a").into_future());
    check(|kv| kv.get("a").read());
    check(|kv| kv.multi_get(["a"]).each());
    check(|kv| kv.scan(..).stream());
    check(|kv| async move { kv.admin().map().await });
    check(|kv| async move { kv.admin().init(Default::default()).await });
    check(|kv| async move { kv.admin().transfer_leader(ShardId(1), None).await });
}

#[tokio::test(start_paused = true)]
async fn a_read_at_a_version_says_so_whatever_the_handle_says() {
    let cluster = start(3, 4);
    let kv = cluster.client().await.with_consistency(coracle_client::Consistency::Any);
    for error in [
        kv.get("a").at(Version(7)).await.map(drop).expect_err("long gone"),
        kv.multi_get(["a"]).at(Version(8)).await.map(drop).expect_err("long gone"),
    ] {
        assert_eq!((error.kind(), error.attempts()), (ErrorKind::VersionGone, 1));
    }
    let seen = cluster.take_requests();
    let asked: Vec<_> =
        seen.iter().map(|seen| (seen.method, seen.at_version, seen.consistency)).collect();
    assert_eq!(asked, [("get", 7, None), ("batch_get", 8, None)]);
    // The answers are those of the version, and of the leader alone.
    let mut versions = Vec::new();
    for value in ["1", "2"] {
        versions.push(kv.put("a", value).await.expect("a put").version);
    }
    versions.push(kv.delete("a").await.expect("a delete").version);
    let nodes = || cluster.take_requests().into_iter().map(|seen| seen.node).collect::<Vec<_>>();
    nodes();
    for (version, value) in versions.iter().zip([Some("1"), Some("2"), None]) {
        let entry = kv.get("a").at(*version).await.expect("a get");
        assert_eq!(entry.map(|entry| entry.value), value.map(Into::into));
        let entries = kv.multi_get(["a"]).at(*version).await.expect("a multi-get");
        let entries = entries.into_iter().map(|entry| entry.map(|entry| entry.value));
        assert_eq!(entries.collect::<Vec<_>>(), [value.map(Into::into)]);
    }
    assert_eq!(nodes(), [N1; 6]);
    let error = kv.get("a").at(Version(0)).await.expect_err("there is no version 0");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

//! Delete-ranges: at once under one request id, or in steps that go on behind the last progress when
//! a node fails.

use std::time::Duration;

use coracle_client::testing::{Act, FakeCluster, Hold, Refusal};
use coracle_client::{
    Client, EntityRule, Error, ErrorKind, Keyspace, NodeId, Operation, Outcome, Version,
};
use futures_util::TryStreamExt;
use tokio::time::Instant;

use crate::start::{N1, refuse, shape, start};

const NODES: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];

/// Steps take two keys, as pages show two.
async fn filled(shards: u32, count: u32) -> (FakeCluster, Client) {
    let cluster = start(3, shards);
    let kv = cluster.client().await;
    for n in 0..count {
        kv.put(format!("k{n:02}"), format!("{n}")).await.expect("a put");
    }
    cluster.take_requests();
    (cluster, kv)
}

/// All of one entity.
async fn one_entity(cluster: &FakeCluster, kv: &Client, count: u32) -> Keyspace {
    cluster.create_keyspace("lists", EntityRule::Delimiter(b'/'));
    let lists = kv.keyspace("lists");
    for first in (0..count).step_by(1_000) {
        let keys = first..count.min(first + 1_000);
        let puts = keys.map(|n| Operation::put(format!("l/{n:05}"), format!("{n}")));
        lists.batch(puts).await.expect("a batch");
    }
    cluster.take_requests();
    lists
}

async fn left(cluster: &FakeCluster) -> Vec<u32> {
    numbers(&cluster.client().await.keyspace("default")).await
}

async fn numbers(kv: &Keyspace) -> Vec<u32> {
    let pairs: Vec<_> = kv.scan(..).stream().try_collect().await.expect("a scan");
    let number = |key: &[u8]| {
        let digits: Vec<u8> = key.iter().copied().filter(u8::is_ascii_digit).collect();
        String::from_utf8_lossy(&digits).parse().expect("a number")
    };
    pairs.iter().map(|pair| number(&pair.key)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_range_is_deleted_in_steps_and_nothing_beyond_it() {
    for shards in [1, 4] {
        let (cluster, kv) = filled(shards, 30).await;
        let before = kv.put("other", "x").await.expect("a put").version;
        kv.delete("other").await.expect("a delete");
        let done = kv.delete_range("k05".."k10").await.expect("a delete-range");
        assert_eq!(done.deleted, 5);
        // Each shard has versions of its own.
        assert!(shards > 1 || done.version > before, "{} after {before}", done.version);
        let served = done.served.expect("by a shard");
        assert_eq!((served.node, served.leader), (N1, true));
        assert_eq!(left(&cluster).await, (0..5).chain(10..30).collect::<Vec<_>>());
        let done = kv.delete_range("k2"..).prefix("k2").await.expect("a delete-range");
        assert_eq!(done.deleted, 10);
        assert_eq!(kv.delete_range(..).await.expect("a delete-range").deleted, 15);
        assert!(left(&cluster).await.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn an_empty_range_is_empty_and_not_everything() {
    let (cluster, kv) = filled(4, 3).await;
    for atomic in [false, true] {
        for (start, end) in [("k00", ""), ("", ""), ("k02", "k01")] {
            let call = kv.delete_range(start..end);
            let call = if atomic { call.atomic() } else { call };
            assert_eq!(call.await.expect("nothing to do").deleted, 0);
        }
        let outside = kv.delete_range(.."k").prefix("k0");
        assert_eq!(outside.await.expect("nothing to do").deleted, 0);
    }
    assert!(cluster.take_requests().is_empty(), "nobody is asked");
    assert_eq!(left(&cluster).await.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_broken_delete_range_goes_on_behind_its_last_progress() {
    let (cluster, kv) = filled(1, 20).await;
    let other = cluster.client().await;
    let streams = || {
        let sent = cluster.take_requests();
        sent.iter().filter(|seen| seen.method == "delete_range").count()
    };
    for node in NODES {
        let acts = [1, 2, 0, 1, 0, 1, 1].map(Act::CutAfterPages);
        cluster.script(node, acts);
    }
    let started = Instant::now();
    let mut stream = kv.delete_range(..).stream();
    let mut told = Vec::new();
    let mut before = 0;
    while let Some(progress) = stream.try_next().await.expect("it goes on by itself") {
        told.push(progress.deleted);
        if told.len() == 5 {
            // Behind it, and before it: neither is its own any more.
            before = streams();
            other.put("k00", "newer").await.expect("a put");
            other.put("k19", "newer").await.expect("a put");
        }
    }
    let expected: Vec<u64> = (0..10).map(|round| 2 * round).chain([19]).collect();
    assert_eq!(told, expected, "each key once");
    assert_eq!(left(&cluster).await, [0, 19]);
    let after = streams();
    assert!(before >= 3 && after >= 3, "it was broken before and after: {before}, {after}");
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_broken_one_over_many_shards_goes_on_behind_its_last_progress() {
    let (cluster, kv) = filled(4, 80).await;
    for node in NODES {
        let acts = [Act::CutAfterPages(1), Act::CutAfterPages(2), Act::CutAfterPages(0)];
        cluster.script(node, acts);
    }
    let mut stream = kv.delete_range("k04".."k76").stream();
    let (mut told, mut is_done) = (vec![0], false);
    while let Some(progress) = stream.try_next().await.expect("it goes on by itself") {
        let last = *told.last().expect("one was put in");
        assert!((last..=last + 8).contains(&progress.deleted), "two keys of each shard at most");
        told.push(progress.deleted);
        is_done = progress.done;
    }
    assert!(is_done && told.len() > 9, "{told:?}");
    assert_eq!(told.last(), Some(&72), "each key once");
    assert_eq!(left(&cluster).await, (0..4).chain(76..80).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_lost_progress_is_not_waited_for_and_what_it_did_stays_done() {
    let (cluster, kv) = filled(4, 12).await;
    // Those of calls that fix the version, and those of others.
    cluster.lose_answers(2);
    let mut stream = kv.delete_range(..).stream();
    let mut last = stream.try_next().await.expect("the third is answered").expect("a progress");
    assert_eq!((cluster.counts().lost_answers, last.deleted), (2, 0));
    assert_eq!(left(&cluster).await.len(), 12);
    cluster.lose_answers(2);
    while let Some(progress) = stream.try_next().await.expect("the third is answered") {
        last = progress;
    }
    assert_eq!(cluster.counts().lost_answers, 4);
    assert!(last.deleted < 12, "what was not told of is not counted: {}", last.deleted);
    assert!(left(&cluster).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn another_client_goes_on_with_the_token() {
    let (cluster, kv) = filled(1, 10).await;
    let mut stream = kv.delete_range(..).stream();
    let first = stream.try_next().await.expect("a progress").expect("not the end");
    assert_eq!((first.deleted, first.done), (0, false));
    // Without it the node goes on for a while before it hears that nobody listens.
    NODES.into_iter().for_each(|node| cluster.script(node, [Act::CutAfterPages(1)]));
    let first = stream.try_next().await.expect("a progress").expect("not the end");
    assert_eq!((first.deleted, first.done), (2, false));
    drop(stream);
    let other = cluster.client_builder().seed(80).connect().await.expect("a client");
    let before = left(&cluster).await;
    assert_eq!(before, (2..10).collect::<Vec<_>>());
    other.put("k00", "newer").await.expect("a put");
    let token = first.resume_token;
    let rest = other.delete_range(..).resume(token.clone()).await.expect("the rest");
    assert_eq!((rest.deleted, left(&cluster).await), (before.len() as u64, vec![0]));
    let error = other.delete_range("k".."l").resume(token).await.expect_err("of another range");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn what_failed_says_whether_something_may_be_deleted() {
    let refused = |error: Error| (error.kind(), error.outcome());
    let (cluster, kv) = filled(4, 6).await;
    NODES.into_iter().for_each(|node| cluster.script(node, [refuse("CROSS_ENTITY")]));
    let error = kv.delete_range(..).await.expect_err("refused");
    assert_eq!(refused(error), (ErrorKind::CrossEntity, Outcome::NotApplied));
    // Whatever became of calls that fix the version.
    let (cluster, kv) = filled(4, 6).await;
    let acts = [Act::LoseAnswer, refuse("NOT_ALLOWED")];
    NODES.into_iter().for_each(|node| cluster.script(node, acts.clone()));
    let error = kv.delete_range(..).await.expect_err("refused");
    assert_eq!(cluster.counts().lost_answers, 3);
    assert_eq!(refused(error), (ErrorKind::NotAllowed, Outcome::NotApplied));
    // Whichever node comes next: after one that has deleted, a refusal is not the whole story.
    let later = |pages| {
        let never = Refusal::new("NOT_ALLOWED");
        [
            vec![Act::CutAfterPages(pages), Act::Refuse(never.clone())],
            vec![Act::RefuseAfterPages(pages, never)],
        ]
    };
    for acts in later(1) {
        let (cluster, kv) = filled(1, 6).await;
        let mut stream = kv.delete_range(..).stream();
        assert_eq!(stream.try_next().await.expect("a progress").map(|told| told.deleted), Some(0));
        NODES.into_iter().for_each(|node| cluster.script(node, acts.clone()));
        let error = loop {
            match stream.try_next().await {
                Ok(progress) => assert!(progress.is_some_and(|progress| !progress.done)),
                Err(error) => break error,
            }
        };
        assert_eq!(refused(error), (ErrorKind::NotAllowed, Outcome::Unknown));
        assert!(stream.try_next().await.expect("it has ended").is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn an_atomic_one_is_one_write_under_one_request_id() {
    let cluster = start(3, 4);
    let kv = cluster.client().await;
    let lists = one_entity(&cluster, &kv, 8).await;
    // Carried out, and the answer lost; in between somebody writes one of the keys anew.
    let retry = Hold::new();
    cluster.script(N1, [Act::ApplyAndCut, Act::Hold(retry.clone())]);
    let call = tokio::spawn(lists.delete_range("l/00002".."l/00005").atomic().into_future());
    let at_the_leader = || {
        let sent = cluster.take_requests();
        sent.into_iter().filter(|seen| seen.node == N1).collect::<Vec<_>>()
    };
    let mut sent = Vec::new();
    while sent.len() < 2 {
        sent.extend(at_the_leader());
        assert!(!call.is_finished(), "the retry waits");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let other = cluster.client().await.keyspace("lists");
    assert_eq!(numbers(&other).await, [0, 1, 5, 6, 7], "all of it, and nothing else");
    other.put("l/00002", "newer").await.expect("a put");
    retry.release();
    let done = call.await.expect("no panic").expect("the first answer");
    assert_eq!(done.deleted, 3);
    let newer = other.get("l/00002").await.expect("a get").expect("newer").version;
    assert!(Version(0) < done.version && done.version < newer, "the version of the first attempt");
    assert_eq!(numbers(&other).await, [0, 1, 2, 5, 6, 7], "the retry deletes nothing newer");
    assert_eq!(cluster.counts().duplicates, 1);
    assert!(sent.iter().all(|seen| seen.method == "delete_range"), "{sent:?}");
    let ids: Vec<_> = sent.iter().map(|seen| seen.request_id.expect("a write")).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    // All at one version: the state before it has all of them.
    let before: Vec<_> = lists
        .scan(..)
        .at(Version(done.version.0 - 1))
        .stream()
        .try_collect()
        .await
        .expect("a scan");
    assert_eq!(before.len(), 8);
}

#[tokio::test(start_paused = true)]
async fn an_atomic_one_whose_answers_are_all_lost_is_unknown() {
    let cluster = start(3, 1);
    let kv = cluster.client().await;
    let lists = one_entity(&cluster, &kv, 3).await;
    cluster.lose_answers(100);
    let error = lists.delete_range(..).prefix("l/").atomic().await.expect_err("no answer");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::TimedOut, Outcome::Unknown));
    assert!(cluster.counts().duplicates > 0);
    assert!(numbers(&lists).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn too_many_keys_at_once_are_refused_by_the_limits_name() {
    let cluster = shape(3, 4).page_entries(usize::MAX).start();
    let kv = cluster.client().await;
    let lists = one_entity(&cluster, &kv, 10_001).await;
    let all = || lists.delete_range(..).prefix("l/").atomic();
    let error = all().await.expect_err("10,001");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::TooLarge, Outcome::NotApplied));
    assert_eq!(error.limit(), Some("DELETE_RANGE_KEYS_MAX"));
    assert_eq!(numbers(&lists).await.len(), 10_001, "nothing was deleted");
    lists.delete("l/00000").await.expect("a delete");
    assert_eq!(all().await.expect("10,000 are not too many").deleted, 10_000);
    let several = kv.delete_range("a".."b").atomic().await.expect_err("of several entities");
    assert_eq!(several.kind(), ErrorKind::CrossEntity);
}

//! Delete-ranges: at once under one request id, or in steps that go on behind the last progress when
//! a node fails.

use std::time::Duration;

use coracle_client::{Client, Error, ErrorKind, Outcome, Version};
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::v1::pipeline_request::Operation;
use futures_util::TryStreamExt;
use tokio::time::Instant;

use crate::fake::{Act, Cluster};

async fn filled(count: u32) -> (Cluster, Client) {
    let cluster = Cluster::start(3, 4);
    cluster.with(|state| (0..count).for_each(|n| state.put(format!("k{n:02}"), format!("{n}"))));
    let kv = cluster.client().await;
    (cluster, kv)
}

fn left(cluster: &Cluster, count: u32) -> Vec<u32> {
    let there = |n: &u32| cluster.with(|state| state.get(&format!("k{n:02}")).is_some());
    (0..count).filter(there).collect()
}

#[tokio::test(start_paused = true)]
async fn a_range_is_deleted_in_steps_and_nothing_beyond_it() {
    let (cluster, kv) = filled(30).await;
    let done = kv.delete_range("k05".."k10").await.expect("a delete-range");
    assert_eq!((done.deleted, done.version), (5, Version(702)));
    assert_eq!(left(&cluster, 30), (0..5).chain(10..30).collect::<Vec<_>>());
    let done = kv.delete_range("k2"..).prefix("k2").await.expect("a delete-range");
    assert_eq!(done.deleted, 10);
    assert_eq!(kv.delete_range(..).await.expect("a delete-range").deleted, 15);
    assert!(left(&cluster, 30).is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_empty_range_is_empty_and_not_everything() {
    let (cluster, kv) = filled(3).await;
    for atomic in [false, true] {
        for (start, end) in [("k00", ""), ("", ""), ("k02", "k01")] {
            let call = kv.delete_range(start..end);
            let call = if atomic { call.atomic() } else { call };
            assert_eq!(call.await.expect("nothing to do").deleted, 0);
        }
        let outside = kv.delete_range(.."k").prefix("k0");
        assert_eq!(outside.await.expect("nothing to do").deleted, 0);
    }
    assert_eq!(left(&cluster, 3).len(), 3);
    assert!(cluster.take_seen().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_broken_delete_range_goes_on_behind_its_last_progress() {
    let (cluster, kv) = filled(20).await;
    for node in 1..=3 {
        cluster.script(node, [Act::CutAfterPages(1), Act::CutAfterPages(2), Act::CutAfterPages(0)]);
    }
    let started = Instant::now();
    let mut stream = kv.delete_range(..).stream();
    let mut told = Vec::new();
    while let Some(progress) = stream.try_next().await.expect("it goes on by itself") {
        told.push(progress.deleted);
        if told.len() == 4 {
            // A key behind which it has gone on is its own again.
            cluster.with(|state| state.put("k00", "newer"));
        }
    }
    assert_eq!(told, (1..=10).map(|round| 2 * round).collect::<Vec<_>>(), "each key once");
    assert_eq!(left(&cluster, 20), [0]);
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn another_client_goes_on_with_the_token() {
    let (cluster, kv) = filled(10).await;
    let mut stream = kv.delete_range(..).stream();
    let first = stream.try_next().await.expect("a progress").expect("not the end");
    assert_eq!((first.deleted, first.done), (2, false));
    drop(stream);
    let before = left(&cluster, 10).len() as u64;
    let other = cluster.builder().seed(8).connect().await.expect("a client");
    let rest = other.delete_range(..).resume(first.resume_token).await.expect("the rest");
    assert_eq!((rest.deleted, left(&cluster, 10).len()), (before, 0));
}

#[tokio::test(start_paused = true)]
async fn what_failed_says_whether_something_may_be_deleted() {
    let (cluster, kv) = filled(6).await;
    let refuse = |fault: Fault| {
        (1..=3).for_each(|node| cluster.script(node, [Act::Fault(fault.clone())]));
    };
    let refused = |error: Error| (error.kind(), error.outcome());
    refuse(Fault::new(Reason::CrossEntity, "several"));
    let error = kv.delete_range(..).await.expect_err("refused");
    assert_eq!(refused(error), (ErrorKind::CrossEntity, Outcome::NotApplied));
    let (cluster, kv) = filled(6).await;
    for node in 1..=3 {
        let never = Act::Fault(Fault::new(Reason::NotAllowed, "no more"));
        cluster.script(node, [Act::CutAfterPages(1), never]);
    }
    // Whichever node comes next: after one that has deleted, a refusal is not the whole story.
    let mut stream = kv.delete_range(..).stream();
    let error = loop {
        match stream.try_next().await {
            Ok(progress) => assert!(progress.is_some_and(|progress| !progress.done)),
            Err(error) => break error,
        }
    };
    assert_eq!(refused(error), (ErrorKind::NotAllowed, Outcome::Unknown));
}

#[tokio::test(start_paused = true)]
async fn an_atomic_one_is_one_write_under_one_request_id() {
    let (cluster, kv) = filled(8).await;
    // Carried out, and the answer lost; in between somebody writes one of the keys anew.
    cluster.script(1, [Act::ApplyAndCut]);
    let call = kv.delete_range("k02".."k05").atomic();
    let (done, ()) = tokio::join!(call, async {
        cluster.until(|state| state.get("k02").is_none()).await;
        cluster.with(|state| state.put("k02", "newer"));
    });
    assert_eq!(done.expect("the first answer").deleted, 3);
    assert_eq!(left(&cluster, 8), [0, 1, 2, 5, 6, 7], "the retry deletes nothing newer");
    let sent: Vec<_> = cluster.take_seen();
    let ids: Vec<_> = sent
        .iter()
        .filter(|seen| matches!(seen.operation, Operation::DeleteRange(_)))
        .map(|seen| seen.request_id().sequence)
        .collect();
    assert!(ids.len() >= 2 && ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

#[tokio::test(start_paused = true)]
async fn too_many_keys_at_once_are_refused_by_the_limits_name() {
    let (cluster, kv) = filled(12).await;
    let error = kv.delete_range(..).prefix("k").atomic().await.expect_err("twelve");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::TooLarge, Outcome::NotApplied));
    assert_eq!(error.limit(), Some("DELETE_RANGE_KEYS_MAX"));
    assert_eq!(left(&cluster, 12).len(), 12);
}

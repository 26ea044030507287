//! Reads by replicas that do not lead: what they may answer from, and what they must not. Finds a
//! point that is older than its question, a state that is read before it is reached, a bound that is
//! not kept; the server's part, arcs and expiry, is not here.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::apply::{Outcome, Reply};
use coracle_raft::clock::{Clock, HybridTime};
use coracle_raft::error::GroupError;
use coracle_raft::group::Group;
use coracle_raft::leadership::Standing;
use coracle_raft::state_machine::ReadState;
use coracle_raft::types::NodeId;
use tokio::time::Instant;

use crate::cluster::{Cluster, READ_POINT, SHARD, WallClock};

fn soon(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

fn look(key: &'static str, version: u64) -> impl FnOnce(&ReadState) -> Option<Bytes> + Send {
    move |state| {
        let found = state.reader.get_at(1, key.as_bytes(), version).expect("readable");
        found.map(|found| found.value)
    }
}

fn newest(key: &'static str) -> impl FnOnce(&ReadState) -> Option<Bytes> + Send {
    look(key, u64::MAX)
}

fn version(reply: &Reply) -> u64 {
    match reply.outcome {
        Outcome::Applied { version, .. } => version,
        _ => panic!("{reply:?}"),
    }
}

/// Reads until it is answered: a follower may have lost its leader for a moment.
async fn read(group: &Group, key: &'static str) -> Option<Bytes> {
    let until = soon(20_000);
    loop {
        match group.read(soon(2_000), newest(key)).await {
            Ok(found) => return found,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_followers_read_waits_for_what_was_acknowledged_before_it() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    let (id, follower) = cluster.follower().await;
    assert_eq!(read(&follower, "k0").await.as_deref(), Some(&b"v0"[..]));
    for n in 1..20 {
        cluster.wires.held.lock().insert(id);
        let value = format!("v{n}");
        cluster.put("k0", &value).await;
        let held = follower.clone();
        let local = held.read_local(0, soon(1_000), newest("k0")).await.expect("readable");
        assert_ne!(local.as_deref(), Some(value.as_bytes()), "it is held back");
        let asked = tokio::spawn(async move { held.read(soon(5_000), newest("k0")).await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!asked.is_finished(), "what it has is too old");
        cluster.wires.held.lock().clear();
        match asked.await.expect("no panic") {
            Ok(found) => assert_eq!(found.as_deref(), Some(value.as_bytes())),
            // On a busy machine the entries may come too late; the old value may not come at all.
            Err(error) => assert_eq!(error, GroupError::TooStale),
        }
        assert_eq!(read(&follower, "k0").await.as_deref(), Some(value.as_bytes()));
    }
    cluster.wires.held.lock().insert(id);
    cluster.put("k0", "last").await;
    let late = follower.read(soon(5_000), newest("k0")).await;
    assert!(matches!(late, Err(GroupError::TooStale | GroupError::NotLeader { .. })), "{late:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deposed_leader_gives_no_point_after_another_was_elected() {
    let mut cluster = Cluster::of(5).await;
    cluster.put("k0", "old").await;
    let (led, old) = cluster.leader().expect("a leader");
    let (with, follower) = cluster.follower().await;
    assert_eq!(read(&follower, "k0").await.as_deref(), Some(&b"old"[..]));
    let asked = |from: NodeId| {
        let answer = cluster.nodes[&led].host.answer(
            from,
            SHARD,
            old.replica(),
            Bytes::from_static(READ_POINT),
        );
        async move { answer.await.expect("it is there") }
    };
    assert_eq!(asked(with).await[..2], [1, 9], "while it leads it gives points");
    // Both believe in each other for a while; the others elect somebody, and write.
    cluster.wires.apart.lock().extend([led, with]);
    cluster.another_leads(led).await;
    assert_eq!(old.status().state, Standing::Leader, "it has not heard of it");
    assert_eq!(asked(with).await[..3], [1, 11, 1], "its lease has passed");
    let stale = follower.read(soon(2_000), newest("k0")).await;
    assert!(matches!(stale, Err(GroupError::NotLeader { .. })), "{stale:?}");
    let stale = follower.fix_version(None).await;
    assert!(matches!(stale, Err(GroupError::NotLeader { .. })), "{stale:?}");
    let bound = Duration::from_millis(300);
    let stale = follower.read_bounded(bound, soon(2_000), newest("k0")).await;
    assert_eq!(stale.expect_err("nobody can vouch"), GroupError::TooStale);
    cluster.wires.apart.lock().clear();
    cluster.put("k0", "new").await;
    assert_eq!(read(&follower, "k0").await.as_deref(), Some(&b"new"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bounded_read_needs_no_question_while_an_earlier_answer_is_young_enough() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "old").await;
    let (id, follower) = cluster.follower().await;
    assert_eq!(read(&follower, "k0").await.as_deref(), Some(&b"old"[..]));
    let minute = Duration::from_secs(60);
    let questions = || cluster.wires.points.load(Ordering::SeqCst);
    let before = questions();
    for _ in 0..100 {
        let read = follower.read_bounded(minute, soon(2_000), newest("k0")).await;
        let (found, age) = read.expect("served here");
        assert_eq!(found.as_deref(), Some(&b"old"[..]));
        assert!(age < minute, "{age:?}");
    }
    assert_eq!(questions(), before, "a minute has not passed");
    // One that is over half of its age is refreshed beside the reads, before anybody has to wait.
    let bound = Duration::from_secs(1);
    for _ in 0..3 {
        let until = soon(20_000);
        let before = loop {
            assert!(Instant::now() < until, "nothing grows old");
            let before = questions();
            let read = follower.read_bounded(bound, soon(2_000), newest("k0")).await;
            let (_, age) = read.expect("the leader is there");
            assert!(age <= bound, "{age:?}");
            if age > bound / 2 {
                break before;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        while questions() == before {
            assert!(Instant::now() < until, "nothing is refreshed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    // Cut off, it serves what it has for as long as the bound allows, and says how old it is.
    let known = Instant::now();
    cluster.wires.cut.lock().insert(id);
    cluster.put("k0", "new").await;
    let read = follower.read_bounded(minute, soon(2_000), newest("k0")).await;
    assert_eq!(read.expect("young enough").0.as_deref(), Some(&b"old"[..]));
    let bound = Duration::from_millis(200);
    tokio::time::sleep_until(known + bound).await;
    let read = follower.read_bounded(bound, soon(5_000), newest("k0")).await;
    assert_eq!(read.expect_err("too old"), GroupError::TooStale);
    let read = follower.read_bounded(minute, soon(2_000), newest("k0")).await;
    let (_, age) = read.expect("young enough");
    assert!(age >= bound, "{age:?}");
    cluster.wires.cut.lock().clear();
    let until = soon(20_000);
    loop {
        assert!(Instant::now() < until, "it does not come back");
        let read = follower.read_bounded(bound, soon(1_000), newest("k0")).await;
        if let Ok((found, age)) = read {
            assert_eq!(found.as_deref(), Some(&b"new"[..]));
            assert!(age <= bound, "{age:?}");
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_a_follower_has_fixed_holds_for_every_later_write() {
    let mut cluster = Cluster::new().await;
    for n in 0..20 {
        let written = cluster.put("k0", &format!("v{n}")).await;
        let (_, follower) = cluster.follower().await;
        let fixed = follower.fix_version(None).await.expect("the leader is there");
        assert!(fixed.version >= version(&written), "it holds what was acknowledged");
        // Some lie beyond every ceiling, so that an entry has to be committed first.
        let ahead = HybridTime::at_ms(WallClock.now_ms() + (n % 4) * 100).0;
        let ahead = follower.fix_version(Some(fixed.version.max(ahead))).await;
        let fixed = ahead.expect("within the clock's bound");
        let later = cluster.put("k0", "later").await;
        assert!(version(&later) > fixed.version, "stamped above what was promised");
        let found = follower.read_at(fixed, soon(5_000), look("k0", fixed.version)).await;
        assert_eq!(found.expect("served here").as_deref(), Some(format!("v{n}").as_bytes()));
    }
    let (_, follower) = cluster.follower().await;
    let far = follower.fix_version(Some(u64::MAX / 2)).await;
    assert_eq!(far.expect_err("beyond every clock"), GroupError::ClockOutOfBound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_of_all_replicas_follow_the_writes_over_leader_changes() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    for n in 1..60 {
        if n % 20 == 0 {
            let (led, group) = cluster.leader().expect("a leader");
            let handed = group.hand_over(None, soon(5_000)).await;
            assert!(handed.is_ok() || led == cluster.leader().expect("a leader").0, "{handed:?}");
        }
        let value = format!("v{n}");
        cluster.put("k0", &value).await;
        let groups = cluster.nodes.values().map(|node| node.host.group(SHARD).expect("there"));
        let all: Vec<_> = groups
            .map(|group: Arc<Group>| tokio::spawn(async move { read(&group, "k0").await }))
            .collect();
        for one in all {
            let found = one.await.expect("no panic");
            assert_eq!(found.as_deref(), Some(value.as_bytes()), "acknowledged before the read");
        }
    }
}

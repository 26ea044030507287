//! A group that is split, on three hosts. Finds a write that is lost, applied twice, or answered by the wrong
//! half; a crash between two steps after which a child is lacking, or there twice; a child that comes back;
//! a replica that never gets one.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::apply::{BIRTH, Outcome};
use coracle_raft::birth::{Failpoint, SplitStep};
use coracle_raft::command::Change;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::ChangeError;
use coracle_raft::group::{Group, SplitPlan};
use coracle_raft::host::Condition;
use coracle_raft::types::{NodeId, Position, Role};
use coracle_storage::ReplicaId;
use tokio::time::Instant;

use crate::cluster::SHARD;
use crate::members::{FOURTH, LEARNER, soon, until};
use crate::ring_rig::{AT, CHILD, Ring, child_of, position};

/// Keys of the lower and of the upper half.
fn sides(keys: std::ops::Range<u32>) -> (Vec<u32>, Vec<u32>) {
    keys.partition(|n| position(&format!("k{n}")) < AT)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_go_on_over_a_split_and_each_is_applied_once() {
    let ring = Ring::new().await;
    ring.fill(0..40).await;
    let over = AtomicBool::new(false);
    let counting = async {
        let mut count = 0;
        // Both sides, and some more once the split is over.
        let mut more = 20;
        while more > 0 {
            count += 1;
            for counter in ["a", "b", "c", "d", "e", "f"] {
                assert_eq!(ring.count(counter).await, count, "{counter}: lost, or applied twice");
            }
            more -= i32::from(over.load(Ordering::SeqCst));
        }
        count
    };
    let splitting = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let split = ring.split().await;
        over.store(true, Ordering::SeqCst);
        split
    };
    let (count, split) = tokio::join!(counting, splitting);
    let split = split.expect("nobody died");
    assert_eq!(split.parent, Descriptor { shard: 1, arc: Some((0, AT)), epoch: split.child.epoch });
    assert_eq!(split.child.arc, Some((AT, 0)));
    ring.check(0..40).await;
    let holders: BTreeSet<_> = {
        let mut holders = BTreeSet::new();
        for counter in ["a", "b", "c", "d", "e", "f"] {
            holders.insert(ring.put(&format!("{counter}-holder"), "x").await.0);
            assert_eq!(ring.get(counter).await, Some(count.to_string()));
        }
        holders
    };
    assert_eq!(holders, BTreeSet::from([SHARD, CHILD]));
    ring.agree((1..=3).map(NodeId)).await;
    // Half of the ring each: neither shows what the other holds.
    let (lower, upper) = sides(0..40);
    assert!(!lower.is_empty() && !upper.is_empty());
    for n in lower {
        assert_eq!(ring.put(&format!("k{n}"), &format!("v{n}")).await.0, SHARD);
    }
    for n in upper {
        assert_eq!(ring.put(&format!("k{n}"), &format!("v{n}")).await.0, CHILD);
    }
}

/// Lets one node's replica of the parent go as far as a step, and tells when it is there.
fn stop_at(step: SplitStep) -> (Failpoint, Arc<AtomicBool>) {
    let reached = Arc::new(AtomicBool::new(false));
    let seen = reached.clone();
    let failpoint: Failpoint = Arc::new(move |_, at| {
        if at == step {
            seen.store(true, Ordering::SeqCst);
        }
        at != step
    });
    (failpoint, reached)
}

/// One node dies at each step of a split, loses what it had not synced, and comes back.
async fn dies_at_each_step(leads: bool) {
    for (round, step) in SplitStep::ALL.into_iter().enumerate() {
        let mut ring = Ring::new().await;
        ring.fill(0..20).await;
        let led = ring.leading(SHARD).await.status().leader;
        let nodes = (1..=3).map(NodeId);
        let node = nodes.clone().find(|node| (led == Some(*node)) == leads).expect("three nodes");
        let (failpoint, reached) = stop_at(step);
        ring.cluster.nodes[&node].host.set_failpoint(Some(failpoint));
        let group = ring.leading(SHARD).await;
        let soon = Instant::now() + Duration::from_secs(1);
        let (_, ()) = tokio::join!(group.split(Ring::plan(&group), soon), async {
            until(&format!("{step:?} is reached"), || reached.load(Ordering::SeqCst)).await;
        });
        drop(group);
        ring.cluster.stop(node).await;
        ring.split().await;
        ring.fill(20..30).await;
        ring.cluster.restart(node, 2 + round as u64).await;
        let child = ring.caught_up(node, CHILD).await;
        let parent = ring.caught_up(node, SHARD).await;
        assert_eq!(child.replica().0, child_of(parent.replica().0), "{step:?}");
        assert_eq!(child.descriptor().and_then(|known| known.arc), Some((AT, 0)), "{step:?}");
        assert_eq!(parent.descriptor().and_then(|known| known.arc), Some((0, AT)), "{step:?}");
        assert_eq!(ring.cluster.nodes[&node].host.failed(), Vec::<String>::new(), "{step:?}");
        ring.check(0..30).await;
        ring.agree(nodes).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_dies_at_any_step_comes_to_the_same_end() {
    dies_at_each_step(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_dies_at_any_step_comes_to_the_same_end() {
    dies_at_each_step(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_that_die_at_any_step_come_to_the_same_end() {
    for step in SplitStep::ALL {
        let mut ring = Ring::new().await;
        ring.fill(0..10).await;
        let mut all = Vec::new();
        for node in ring.cluster.nodes.values() {
            let (failpoint, reached) = stop_at(step);
            node.host.set_failpoint(Some(failpoint));
            all.push(reached);
        }
        let group = ring.leading(SHARD).await;
        let asked = group.split(Ring::plan(&group), Instant::now() + Duration::from_secs(1));
        let reached = || all.iter().all(|reached| reached.load(Ordering::SeqCst));
        let (_, ()) = tokio::join!(asked, until("all are there", reached));
        drop(group);
        for node in (1..=3).map(NodeId) {
            ring.cluster.stop(node).await;
        }
        for node in (1..=3).map(NodeId) {
            ring.cluster.restart(node, 2).await;
        }
        ring.split().await;
        ring.fill(10..20).await;
        ring.check(0..20).await;
        ring.agree((1..=3).map(NodeId)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_planned_on_another_group_changes_nothing() {
    let ring = Ring::new().await;
    ring.fill(0..3).await;
    let group = ring.leading(SHARD).await;
    let plan = Ring::plan(&group);
    let before = group.descriptor();
    let refused = async |plan: SplitPlan| {
        let refused = group.split(plan, soon()).await.expect_err("it does not fit");
        assert_eq!(group.descriptor(), before);
        refused
    };
    let late = SplitPlan { epoch: plan.epoch + 1, ..plan.clone() };
    assert_eq!(refused(late).await, ChangeError::EpochPassed { epoch: plan.epoch });
    for at in [0, u64::MAX] {
        // The last position is inside the arc, the first is not.
        if at == 0 {
            let why = refused(SplitPlan { at, ..plan.clone() }).await;
            assert!(matches!(why, ChangeError::Refused(_)), "{why:?}");
        }
    }
    let mut few = plan.clone();
    few.replicas.pop_first();
    let mut same = plan.clone();
    same.replicas.insert(ReplicaId(11), ReplicaId(child_of(12)));
    let mut own = plan.clone();
    own.replicas.insert(ReplicaId(11), ReplicaId(12));
    for plan in [few, same, own, SplitPlan { child: SHARD, ..plan.clone() }] {
        let why = refused(plan).await;
        assert!(matches!(why, ChangeError::Refused(_)), "{why:?}");
    }
    let follower = ring.groups().map(|(_, group)| group).find(|group| !group.leads());
    let elsewhere = follower.expect("two follow").split(plan.clone(), soon()).await;
    assert!(matches!(elsewhere, Err(ChangeError::NotLeader { .. })), "{elsewhere:?}");
    group.split(plan.clone(), soon()).await.expect("as it was planned");
    let again = group.split(plan, soon()).await;
    assert!(matches!(again, Err(ChangeError::EpochPassed { .. })), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_of_what_was_written_before_a_split_finds_its_result_in_the_child() {
    let ring = Ring::new().await;
    let upper = (0..).map(|n| format!("k{n}")).find(|key| position(key) >= AT).expect("half");
    let request = ring.request(&upper, Change::Increment { by: 5 });
    let (shard, first) = ring.write(&request).await;
    assert_eq!((shard, first.duplicate), (SHARD, false));
    ring.split().await;
    let (shard, again) = ring.write(&request).await;
    assert_eq!((shard, again.duplicate), (CHILD, true));
    assert_eq!(again.outcome, first.outcome);
    assert_eq!((again.term, again.index), (BIRTH.term, BIRTH.index), "a place in the child's log");
    assert_eq!(ring.get(&upper).await, Some("5".to_owned()));
    let next = ring.count(&upper).await;
    assert_eq!(next, 6);
    // One that was refused by the parent after the split is new to the child.
    let parent = ring.leading(SHARD).await;
    let request = ring.request(&upper, Change::Increment { by: 1 });
    let sent = parent.write(request.clone(), soon()).await.expect("it answers");
    assert!(matches!(sent.reply.outcome, Outcome::StaleRoute { .. }), "{sent:?}");
    let (shard, applied) = ring.write(&request).await;
    assert_eq!((shard, applied.duplicate), (CHILD, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_of_the_child_lie_above_all_that_was_served_before() {
    let ring = Ring::new().await;
    ring.fill(0..5).await;
    let parent = ring.leading(SHARD).await;
    let fixed = parent.fix_version(None).await.expect("it leads");
    let split = ring.split().await.expect("nobody died");
    assert!(split.version > fixed.version, "a version that was served is not given again");
    let upper = (0..).map(|n| format!("k{n}")).find(|key| position(key) >= AT).expect("half");
    let (_, reply) = ring.put(&upper, "new").await;
    let Outcome::Applied { version, .. } = reply.outcome else { unreachable!() };
    assert!(version > split.version);
    let child = ring.leading(CHILD).await;
    let old = child.fix_version(Some(fixed.version)).await.expect("it leads");
    let name = upper.clone();
    let look = move |state: &coracle_raft::state_machine::ReadState| {
        assert!(state.descends_from(SHARD.0) && !state.descends_from(CHILD.0));
        let found = state.reader.get_at(1, name.as_bytes(), fixed.version).expect("readable");
        found.map(|found| found.value)
    };
    let read = child.read_at(old, soon(), look).await.expect("as before the split");
    assert_ne!(read.as_deref(), Some(&b"new"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_replica_gets_its_child_as_the_voters_do() {
    let mut ring = Ring::new().await;
    ring.fill(0..10).await;
    drop(ring.cluster.make_learner().await);
    ring.cluster.add_learner().await;
    ring.caught_up(FOURTH, SHARD).await;
    ring.split().await;
    ring.fill(10..20).await;
    let child = ring.caught_up(FOURTH, CHILD).await;
    assert_eq!(child.replica(), ReplicaId(child_of(LEARNER.0)));
    let role = |id: u64| child.status().members[&id].role;
    assert_eq!(role(child_of(LEARNER.0)), Role::Learner);
    assert_eq!(role(child_of(11)), Role::Voter);
    ring.agree((1..=4).map(NodeId)).await;
}

/// Stops a follower, splits, and lets the parent's log pass what it has; returns it, running again.
async fn left_behind(ring: &mut Ring) -> NodeId {
    ring.fill(0..10).await;
    let led = ring.leading(SHARD).await.status().leader;
    let node = (1..=3).map(NodeId).find(|node| led != Some(*node)).expect("three nodes");
    ring.cluster.stop(node).await;
    ring.split().await;
    let body = "x".repeat(200 << 10);
    let lower = (0..).map(|n| format!("b{n}")).find(|key| position(key) < AT).expect("half");
    let purged = |ring: &Ring| {
        let status = ring.leader(SHARD).map(|group| group.status());
        status.is_some_and(|status| status.purged.is_some_and(|at| at.index >= 25))
    };
    while !purged(ring) {
        ring.put(&lower, &body).await;
    }
    ring.cluster.restart(node, 2).await;
    node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_takes_the_split_by_snapshot_gets_its_child_by_snapshot() {
    let mut ring = Ring::new().await;
    let node = left_behind(&mut ring).await;
    let parent = ring.caught_up(node, SHARD).await;
    assert_eq!(parent.descriptor().and_then(|known| known.arc), Some((0, AT)));
    let host = ring.cluster.nodes[&node].host.clone();
    assert!(host.group(CHILD).is_none(), "the snapshot was of behind the split");
    // Whoever looks after replicas sees one in the map that its node has not made.
    let replica = ReplicaId(child_of(parent.replica().0));
    assert_eq!(host.condition(replica), Condition::Absent);
    let initial = ring.leading(CHILD).await.descriptor().expect("described");
    host.create(replica, initial).await.expect("a new replica");
    ring.caught_up(node, CHILD).await;
    ring.fill(10..20).await;
    ring.agree((1..=3).map(NodeId)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_split_leaves_a_child_alone_that_is_there_or_was_destroyed() {
    for destroyed in [false, true] {
        let mut ring = Ring::new().await;
        ring.fill(0..10).await;
        let led = ring.leading(SHARD).await.status().leader;
        let node = (1..=3).map(NodeId).find(|node| led != Some(*node)).expect("three nodes");
        let host = ring.cluster.nodes[&node].host.clone();
        let (failpoint, reached) = stop_at(SplitStep::Judged);
        host.set_failpoint(Some(failpoint));
        ring.split().await;
        until("it has come to the split", || reached.load(Ordering::SeqCst)).await;
        let parent = host.group(SHARD).expect("it runs").replica();
        let replica = ReplicaId(child_of(parent.0));
        let initial = ring.leading(CHILD).await.descriptor().expect("described");
        if destroyed {
            host.destroy(CHILD, replica).await.expect("never made, and remembered");
        } else {
            drop(host.create(replica, initial).await.expect("a new replica"));
            ring.caught_up(node, CHILD).await;
        }
        drop(host);
        ring.cluster.stop(node).await;
        ring.fill(10..20).await;
        ring.cluster.restart(node, 2).await;
        let parent = ring.caught_up(node, SHARD).await;
        assert_eq!(parent.descriptor().and_then(|known| known.arc), Some((0, AT)));
        let host = ring.cluster.nodes[&node].host.clone();
        if destroyed {
            assert!(host.group(CHILD).is_none(), "it was revived");
            assert_eq!(host.failed(), Vec::<String>::new());
            assert!(!ring.cluster.disks[&node].exists_under_shards(replica.0));
        } else {
            ring.agree((1..=3).map(NodeId)).await;
        }
        ring.check(0..20).await;
    }
}

trait Looks {
    fn exists_under_shards(&self, replica: u64) -> bool;
}

impl Looks for coracle_storage::fs::faulty::FaultyFs {
    fn exists_under_shards(&self, replica: u64) -> bool {
        use coracle_storage::fs::Fs as _;
        self.exists(std::path::Path::new(&format!("/shards/{replica:016x}")))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_begins_without_a_vote_and_its_log_behind_its_birth() {
    let ring = Ring::new().await;
    ring.put("k0", "v0").await;
    ring.split().await;
    let child: Arc<Group> = ring.leading(CHILD).await;
    let status = child.status();
    assert_eq!(status.purged, Some(BIRTH));
    assert_eq!(status.members.keys().copied().collect::<Vec<_>>(), [21, 22, 23]);
    assert!(status.applied.is_some_and(|at| at > Position { term: 0, index: 1 }));
    let value = Bytes::from_static(b"x");
    let request = ring.request("k0", Change::Put { value, ttl_ms: 0 });
    ring.write(&request).await;
}

//! A group that takes its neighbour in, on three hosts. Finds a write that is lost or applied twice, a frozen
//! group that still serves, a key that comes back from what a split had left behind, and a crash or a cancel
//! between two steps after which a key is of no group, or of two.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_raft::apply::{GroupState, Outcome};
use coracle_raft::birth::MergeStep;
use coracle_raft::clock::Clock;
use coracle_raft::command::Change;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::ChangeError;
use coracle_raft::group::{MergePlan, PrepareMerge, SplitPlan};
use coracle_raft::history::Settings;
use coracle_raft::host::Condition;
use coracle_raft::leadership::Standing;
use coracle_raft::state_machine::ReadState;
use coracle_raft::types::{NodeId, ShardId};
use coracle_storage::ReplicaId;
use coracle_storage::fs::Fs;
use coracle_storage::state::{MapEngines, OpenState, Overlay, ReplicaState};
use tokio::time::{Instant, timeout};

use crate::cluster::{SHARD, WallClock};
use crate::members::{FOURTH, LEARNER, soon, until};
use crate::ring_rig::{AT, CHILD, KEYSPACE, Ring, child_of, position, rules};
use crate::split::stop_at;

const MERGE: u64 = 77;

fn nodes() -> impl Iterator<Item = NodeId> + Clone {
    (1..=3).map(NodeId)
}

/// A key of the upper half.
fn upper() -> String {
    (0..).map(|n| format!("k{n}")).find(|key| position(key) >= AT).expect("half")
}

impl Ring {
    /// Waits until nobody can read what was superseded up to now, and has every replica drop it: a delete
    /// marker goes with all that it hides.
    async fn forget_the_past(&self, shard: ShardId) {
        let group = self.leading(shard).await;
        let short = Settings { keyspace: KEYSPACE, history_ms: 0, revision: 1 };
        group.adopt(vec![short]).await.expect("it leads");
        let now = group.fix_version(None).await.expect("it leads").version;
        let until = Instant::now() + Duration::from_secs(30);
        while nodes().any(|node| {
            let group = self.cluster.nodes[&node].host.group(shard);
            group.is_none_or(|group| group.threshold(KEYSPACE) <= now)
        }) {
            assert!(Instant::now() < until, "the history does not pass");
            let _ = self.leading(shard).await.adopt(Vec::new()).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for node in nodes() {
            let host = &self.cluster.nodes[&node].host;
            let group = host.group(shard).expect("it is here");
            while host.reclaim(group.clone()).await.is_err() {
                assert!(Instant::now() < until, "it is not reclaimed");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// What a node that is stopped has of a replica.
    fn on_disk(&self, node: NodeId, replica: u64) -> Overlay {
        let engines = MapEngines::new(Arc::new(self.cluster.disks[&node].clone()));
        let dir = format!("/shards/{replica:016x}");
        let store = ReplicaState::open(&engines, dir.as_ref(), OpenState { create: false });
        store.expect("it is there").overlay()
    }

    /// A merge goes on until a follower of the lower half has found its neighbour, and that node dies; its log
    /// says durably that what it was to apply is committed.
    async fn dies_taking_in(&mut self) -> NodeId {
        let led = self.leading(SHARD).await.status().leader;
        let node = nodes().find(|node| led != Some(*node)).expect("three nodes");
        let (failpoint, reached) = stop_at(MergeStep::Found);
        self.cluster.nodes[&node].host.set_failpoint(Some(failpoint));
        tokio::select! {
            () = self.merge() => {}
            () = until("it is found", || reached.load(Ordering::SeqCst)) => {}
        }
        let whole = |known: Descriptor| known.arc == Some((0, 0));
        until("the others have taken it in", || {
            self.leader(SHARD).and_then(|group| group.descriptor()).is_some_and(whole)
        })
        .await;
        self.fill(20..30).await;
        self.cluster.stop(node).await;
        node
    }

    fn prepare(&self, shard: ShardId, epoch: u64) -> PrepareMerge {
        let other = if shard == SHARD { CHILD } else { SHARD };
        let absorbs = shard == SHARD;
        let members = self.leader(shard).map(|group| group.status().members.into_keys());
        let replicas = members.into_iter().flatten().map(ReplicaId).collect();
        PrepareMerge { merge: MERGE, epoch, other, absorbs, replicas, rules: rules() }
    }

    fn epoch_of(&self, shard: ShardId) -> u64 {
        let group = self.leader(shard);
        group.and_then(|group| group.descriptor()).map_or(0, |descriptor| descriptor.epoch)
    }

    /// Whether every node has a replica of the shard of which this holds.
    fn all(
        &self,
        shard: ShardId,
        holds: impl Fn(&coracle_raft::group::MergeStatus) -> bool,
    ) -> bool {
        nodes().all(|node| {
            let group = self.cluster.nodes.get(&node).and_then(|node| node.host.group(shard));
            group.is_some_and(|group| holds(&group.merge_status()))
        })
    }

    /// Freezes the upper half, in as many tries as it takes.
    async fn freeze(&self) {
        let until = Instant::now() + Duration::from_secs(30);
        while !self.all(CHILD, |status| status.frozen.is_some()) {
            assert!(Instant::now() < until, "it does not freeze everywhere");
            for shard in [SHARD, CHILD] {
                if let Some(group) = self.leader(shard) {
                    let plan = self.prepare(shard, self.epoch_of(shard));
                    let _ = group.prepare_merge(plan, soon()).await;
                }
            }
            if let Some(group) = self.leader(CHILD) {
                let _ = group.freeze(MERGE, self.epoch_of(CHILD), soon()).await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn plan_to_absorb(&self) -> Option<MergePlan> {
        let (into, from) = (self.leader(SHARD)?, self.leader(CHILD)?);
        let members = into.status().members.into_keys();
        Some(MergePlan {
            merge: MERGE,
            epoch: into.descriptor()?.epoch,
            other: from.descriptor()?,
            frozen_at: from.merge_status().frozen?.index,
            replicas: members.map(|id| (ReplicaId(id), ReplicaId(child_of(id)))).collect(),
            rules: rules(),
        })
    }

    /// Carries the merge to its end, from wherever it stands.
    async fn merge(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        let whole = |ring: &Ring| {
            let group = ring.leader(SHARD).and_then(|group| group.descriptor());
            group.is_some_and(|known| known.arc == Some((0, 0)))
        };
        while !whole(self) {
            assert!(Instant::now() < until, "it is not taken in");
            self.freeze().await;
            if let (Some(group), Some(plan)) = (self.leader(SHARD), self.plan_to_absorb()) {
                let _ = group.absorb(plan, Instant::now() + Duration::from_secs(2)).await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let durable = |status: &coracle_raft::group::MergeStatus| {
            status.absorbed.is_some_and(|absorbed| absorbed.merge == MERGE && absorbed.flushed)
        };
        while !self.all(SHARD, durable) {
            assert!(Instant::now() < until, "not every replica has taken it in");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for node in nodes() {
            let host = self.cluster.nodes[&node].host.clone();
            let replica = ReplicaId(20 + node.0);
            host.destroy(CHILD, replica).await.expect("it is needed no more");
        }
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let group = self.leading(SHARD).await;
            if group.end_merge(MERGE, self.epoch_of(SHARD), soon()).await.is_ok() {
                break;
            }
            assert!(Instant::now() < end, "it does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn halves(keys: u32) -> Ring {
    let ring = Ring::new().await;
    ring.fill(0..keys).await;
    ring.split().await;
    ring.leading(CHILD).await;
    ring
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_go_on_over_a_merge_and_each_is_applied_once() {
    let ring = halves(20).await;
    let over = AtomicBool::new(false);
    let counting = async {
        let (mut count, mut more) = (0, 10);
        while more > 0 {
            count += 1;
            for counter in ["a", "b", "c", "d", "e", "f"] {
                assert_eq!(ring.count(counter).await, count, "{counter}: lost, or applied twice");
            }
            more -= i32::from(over.load(Ordering::SeqCst));
        }
    };
    let merging = async {
        ring.merge().await;
        over.store(true, Ordering::SeqCst);
    };
    tokio::join!(counting, merging);
    ring.check(0..20).await;
    ring.agree_on(&[SHARD], nodes()).await;
    let group = ring.leading(SHARD).await;
    let status = group.merge_status();
    assert_eq!((status.merging, status.frozen), (None, None));
    let look = |state: &ReadState| state.descends_from(CHILD.0);
    assert!(group.read_local(0, soon(), look).await.expect("it runs"));
    assert!(nodes().all(|node| ring.cluster.nodes[&node].host.group(CHILD).is_none()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_group_serves_nothing_also_after_a_crash_and_serves_again_when_thawed() {
    let mut ring = halves(10).await;
    let key = upper();
    ring.freeze().await;
    for round in 0..2 {
        for node in nodes() {
            let group = ring.cluster.nodes[&node].host.group(CHILD).expect("it is here");
            let look = |state: &ReadState| state.descriptor.clone();
            let held = group.read_local(0, soon(), look).await.expect("it runs");
            assert_eq!(held, None, "round {round}: n{} serves", node.0);
        }
        let group = ring.leading(CHILD).await;
        let request = ring.request(&key, Change::Increment { by: 1 });
        let written = group.write(request, soon()).await.expect("it answers");
        assert!(matches!(written.reply.outcome, Outcome::StaleRoute { .. }), "{written:?}");
        if round == 0 {
            for node in nodes() {
                ring.cluster.stop(node).await;
                // What it had said is on the disk: it does not wait for the log to say it again.
                let state = GroupState::load(&ring.on_disk(node, 20 + node.0));
                assert!(state.expect("readable").merge.frozen.is_some(), "n{}", node.0);
            }
            for node in nodes() {
                ring.cluster.restart(node, 2).await;
            }
        }
    }
    let before = ring.epoch_of(CHILD);
    let child = ring.leading(CHILD).await;
    let after = child.thaw(MERGE, before, soon()).await.expect("it is cancelled");
    assert_eq!(after, before + 1);
    ring.check(0..10).await;
    let late = child.freeze(MERGE, before, soon()).await;
    assert!(matches!(late, Err(ChangeError::EpochPassed { .. })), "{late:?}");
    ring.put(&key, "again").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_comes_after_a_cancel_fails() {
    let ring = halves(5).await;
    let (into, from) = (ring.leading(SHARD).await, ring.leading(CHILD).await);
    let (left, right) = (ring.epoch_of(SHARD), ring.epoch_of(CHILD));
    // Cancelled before anything had happened: all of it comes late.
    from.thaw(MERGE, right, soon()).await.expect("not frozen, and thawed");
    into.end_merge(MERGE, left, soon()).await.expect("not announced, and ended");
    let passed = |error: ChangeError| matches!(error, ChangeError::EpochPassed { .. });
    assert!(passed(into.prepare_merge(ring.prepare(SHARD, left), soon()).await.expect_err("late")));
    assert!(passed(
        from.prepare_merge(ring.prepare(CHILD, right), soon()).await.expect_err("late")
    ));
    assert!(passed(from.freeze(MERGE, right, soon()).await.expect_err("late")));
    // Cancelled once it was frozen.
    ring.freeze().await;
    let plan = ring.plan_to_absorb().expect("both lead");
    from.thaw(MERGE, ring.epoch_of(CHILD), soon()).await.expect("thawed");
    let epoch = ring.epoch_of(SHARD);
    into.end_merge(MERGE, epoch, soon()).await.expect("ended");
    assert!(passed(into.absorb(plan.clone(), soon()).await.expect_err("late")));
    let newer = MergePlan { epoch: ring.epoch_of(SHARD), ..plan };
    let refused = into.absorb(newer, soon()).await;
    assert_eq!(refused, Err(ChangeError::UnderWay), "no such merge is under way");
    ring.fill(5..10).await;
    ring.check(0..10).await;
    // And another one may begin.
    ring.merge().await;
    ring.check(0..10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_and_arcs_stay_as_they_are_while_a_merge_is_under_way() {
    let mut ring = halves(5).await;
    drop(ring.cluster.make_learner().await);
    let into = ring.leading(SHARD).await;
    let epoch = ring.epoch_of(SHARD);
    into.prepare_merge(ring.prepare(SHARD, epoch), soon()).await.expect("announced");
    into.prepare_merge(ring.prepare(SHARD, epoch), soon()).await.expect("the same again");
    let refused = into.add_learner(LEARNER, FOURTH, epoch, soon()).await;
    assert_eq!(refused, Err(ChangeError::UnderWay));
    let plan = SplitPlan { at: 1 << 62, child: ShardId(3), ..Ring::plan(&into) };
    assert_eq!(into.split(plan, soon()).await, Err(ChangeError::UnderWay));
    let other = PrepareMerge { merge: MERGE + 1, ..ring.prepare(SHARD, epoch) };
    assert_eq!(into.prepare_merge(other, soon()).await, Err(ChangeError::UnderWay));
    assert!(into.end_merge(MERGE + 1, epoch, soon()).await.is_err(), "it is another's");
    let now = into.end_merge(MERGE, epoch, soon()).await.expect("ended");
    into.add_learner(LEARNER, FOURTH, now, soon()).await.expect("nothing is under way");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_was_deleted_in_the_neighbour_does_not_come_back() {
    let ring = Ring::new().await;
    let key = upper();
    ring.put(&key, "old").await;
    ring.split().await;
    let request = ring.request(&key, Change::Delete);
    assert_eq!(ring.write(&request).await.0, CHILD);
    ring.forget_the_past(CHILD).await;
    ring.merge().await;
    assert_eq!(ring.get(&key).await, None, "the lower half had it from before the split");
    // The same delete again: its result came along, and is told with a place in this log.
    let (shard, again) = ring.write(&request).await;
    assert_eq!((shard, again.duplicate), (SHARD, true));
    let (_, next) = ring.put(&key, "new").await;
    assert!(again.index < next.index && !next.duplicate);
    assert_eq!(ring.get(&key).await.as_deref(), Some("new"));
}

/// What happens to a group that has just taken its neighbour in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Nothing,
    AnotherLeads,
    AllDie,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_joins_after_a_merge_holds_what_all_hold() {
    for after in [After::Nothing, After::AnotherLeads, After::AllDie] {
        let mut ring = halves(20).await;
        ring.merge().await;
        match after {
            After::Nothing => {}
            After::AnotherLeads => {
                let before = ring.leading(SHARD).await;
                before.hand_over(None, soon()).await.expect("the others are well");
                until("another leads", || {
                    ring.leader(SHARD).is_some_and(|now| now.replica() != before.replica())
                })
                .await;
            }
            After::AllDie => {
                for node in nodes() {
                    ring.cluster.stop(node).await;
                }
                for node in nodes() {
                    ring.cluster.restart(node, 2).await;
                }
            }
        }
        drop(ring.cluster.make_learner().await);
        ring.cluster.add_learner().await;
        ring.fill(20..25).await;
        let learner = ring.caught_up(FOURTH, SHARD).await;
        assert_eq!(learner.status().failed, None, "{after:?}");
        ring.agree_on(&[SHARD], nodes().chain([FOURTH])).await;
        ring.check(0..25).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_version_is_fixed_below_what_the_neighbour_has_acknowledged() {
    let ring = halves(10).await;
    let tidy = || ring.all(CHILD, |it| it.foreign_free.is_some());
    until("no foreign key is left", tidy).await;
    let (into, from) = (ring.leading(SHARD).await, ring.leading(CHILD).await);
    // Its clock is ahead, as that of its leader's node may be, or of whoever reads.
    let ahead = (WallClock.now_ms() + 450) << 16;
    from.fix_version(Some(ahead)).await.expect("within the bound");
    let lower = (0..).map(|n| format!("l{n}")).find(|key| position(key) < AT).expect("half");
    let (_, written) = ring.put(&upper(), "ahead").await;
    let Outcome::Applied { version, .. } = written.outcome else { panic!("{written:?}") };
    assert!(version > ahead);
    ring.freeze().await;
    // Others have taken it in, and the one that leads has not.
    let led = into.status().leader.expect("it leads");
    let (failpoint, reached) = stop_at(MergeStep::Found);
    ring.cluster.nodes[&led].host.set_failpoint(Some(failpoint));
    ring.put(&lower, "v").await;
    let plan = ring.plan_to_absorb().expect("both lead");
    tokio::select! {
        done = into.absorb(plan, soon()) => panic!("{done:?}"),
        () = until("it is found", || reached.load(Ordering::SeqCst)) => {}
    }
    // It may wait until that is applied; what it fixes at once lies above.
    let fixed = timeout(Duration::from_millis(300), into.fix_version(None)).await;
    if let Ok(fixed) = fixed {
        let fixed = fixed.expect("it leads").version;
        assert!(fixed >= version, "{fixed} is below {version}, which was acknowledged");
    }
}

/// One node dies at each step of a merge, loses what it had not synced, and comes back.
async fn dies_at_each_step(leads: bool) {
    for (round, step) in MergeStep::ALL.into_iter().enumerate() {
        let mut ring = halves(20).await;
        let shard = if step <= MergeStep::Sealed { CHILD } else { SHARD };
        let led = ring.leading(shard).await.status().leader;
        let node = nodes().find(|node| (led == Some(*node)) == leads).expect("three nodes");
        let (failpoint, reached) = stop_at(step);
        ring.cluster.nodes[&node].host.set_failpoint(Some(failpoint));
        let name = format!("{step:?} is reached");
        tokio::select! {
            () = ring.merge() => {}
            () = until(&name, || reached.load(Ordering::SeqCst)) => {}
        }
        assert!(reached.load(Ordering::SeqCst), "{step:?}");
        ring.cluster.stop(node).await;
        ring.cluster.restart(node, 2 + round as u64).await;
        ring.merge().await;
        ring.fill(20..30).await;
        ring.check(0..30).await;
        assert_eq!(ring.cluster.nodes[&node].host.failed(), Vec::<String>::new(), "{step:?}");
        ring.agree_on(&[SHARD], nodes()).await;
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
async fn a_merge_that_is_cancelled_at_any_step_before_it_is_decided_leaves_both_as_they_were() {
    for step in [MergeStep::Frozen, MergeStep::Sealed] {
        let mut ring = halves(10).await;
        let led = ring.leading(CHILD).await.status().leader;
        let node = nodes().find(|node| led != Some(*node)).expect("three nodes");
        let (failpoint, reached) = stop_at(step);
        ring.cluster.nodes[&node].host.set_failpoint(Some(failpoint));
        let name = format!("{step:?} is reached");
        tokio::select! {
            () = ring.freeze() => {}
            () = until(&name, || reached.load(Ordering::SeqCst)) => {}
        }
        let child = ring.leading(CHILD).await;
        child.thaw(MERGE, ring.epoch_of(CHILD), soon()).await.expect("thawed");
        let into = ring.leading(SHARD).await;
        into.end_merge(MERGE, ring.epoch_of(SHARD), soon()).await.expect("ended");
        drop((child, into));
        ring.check(0..10).await;
        ring.cluster.stop(node).await;
        ring.cluster.restart(node, 2).await;
        ring.fill(10..20).await;
        ring.check(0..20).await;
        ring.agree(nodes()).await;
        let status = ring.cluster.nodes[&node].host.group(CHILD).expect("it runs").merge_status();
        assert_eq!(status.frozen, None, "{step:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_hold_keys_of_others_is_not_frozen() {
    let ring = Ring::new().await;
    let group = ring.leading(SHARD).await;
    let refused = group.freeze(MERGE, ring.epoch_of(SHARD), soon()).await;
    let Err(ChangeError::Refused(why)) = &refused else { panic!("{refused:?}") };
    assert!(why.contains("left behind"), "{why}");
    ring.put("k0", "v0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_starts_while_one_of_its_replicas_takes_its_neighbour_in() {
    let mut ring = halves(20).await;
    let node = ring.dies_taking_in().await;
    let (failpoint, again) = stop_at(MergeStep::Found);
    let started = ring.cluster.restart_with(node, 2, failpoint);
    timeout(Duration::from_secs(20), started).await.expect("it waits for none of its replicas");
    until("it is found again", || again.load(Ordering::SeqCst)).await;
    let host = ring.cluster.nodes[&node].host.clone();
    let waiting = host.group(SHARD).expect("it is here").merge_status();
    assert_eq!(waiting.absorbed, None);
    assert!(host.group(CHILD).expect("it is here").merge_status().frozen.is_some());
    drop(host);
    ring.cluster.stop(node).await;
    ring.cluster.restart(node, 3).await;
    ring.merge().await;
    ring.check(0..30).await;
    ring.agree_on(&[SHARD], nodes()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_neighbour_is_lost_says_that_it_has_stopped_and_its_node_starts() {
    let mut ring = halves(20).await;
    let node = ring.dies_taking_in().await;
    let (own, other) = (ReplicaId(10 + node.0), ReplicaId(20 + node.0));
    let lost = format!("/shards/{:016x}", other.0);
    ring.cluster.disks[&node].remove_dir_all(lost.as_ref()).expect("it is there");
    let started = ring.cluster.restart(node, 2);
    timeout(Duration::from_secs(20), started).await.expect("it waits for none of its replicas");
    let host = ring.cluster.nodes[&node].host.clone();
    assert_eq!(host.condition(other), Condition::Damaged);
    until("it stops", || host.condition(own) == Condition::Damaged).await;
    let group = host.group(SHARD).expect("it is here");
    let status = group.status();
    assert_eq!(status.state, Standing::Stopped);
    assert!(status.failed.is_some_and(|why| why.contains("to be taken in")));
    assert_eq!(group.merge_status().absorbed, None);
    drop(group);
    // The others go on, and it can be removed to be made anew.
    ring.fill(30..40).await;
    for (shard, replica) in [(SHARD, own), (CHILD, other)] {
        let removed = timeout(Duration::from_secs(20), host.destroy(shard, replica)).await;
        removed.expect("it waits for nobody").expect("destroyed");
        assert_eq!(host.condition(replica), Condition::Absent);
    }
}

//! Read replicas that come to a group and go. Finds a learner that counts for the quorum, leads, or is
//! left behind by a purged log; a change that was planned on a group that is no more so; an id that
//! comes back.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::ChangeError;
use coracle_raft::group::Group;
use coracle_raft::lag::Lag;
use coracle_raft::leadership::Standing;
use coracle_raft::types::{NodeId, Role};
use coracle_storage::ReplicaId;
use coracle_storage::fs::Fs;
use tokio::time::Instant;

use crate::cluster::{Cluster, SHARD};

pub(crate) const LEARNER: ReplicaId = ReplicaId(14);
pub(crate) const FOURTH: NodeId = NodeId(4);

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Cluster {
    pub(crate) async fn leading(&self) -> Arc<Group> {
        until("somebody leads", || self.leader().is_some()).await;
        self.leader().expect("just seen").1
    }

    pub(crate) async fn make_learner(&mut self) -> Arc<Group> {
        self.add(FOURTH).await;
        let initial = Descriptor { shard: SHARD.0, arc: Some((0, 0)), epoch: 1 };
        self.nodes[&FOURTH].host.create(LEARNER, initial).await.expect("a new replica")
    }

    pub(crate) async fn add_learner(&self) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < deadline, "the learner is not taken in");
            let group = self.leading().await;
            let epoch = group.descriptor().map_or(0, |descriptor| descriptor.epoch);
            match group.add_learner(LEARNER, FOURTH, epoch, soon()).await {
                Ok(now) => return now,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Waits until the learner holds all that the leader holds now.
    pub(crate) async fn caught_up(&self) {
        until("the learner has caught up", || {
            self.learner_lag().is_some_and(|lag| lag.entries == 0)
        })
        .await;
    }

    /// How far it is behind whoever leads now: that may change at any time.
    fn learner_lag(&self) -> Option<Lag> {
        self.leader()?.1.lags().get(&LEARNER.0).copied()
    }
}

async fn value(group: &Group, index: u64, key: &'static str) -> Option<String> {
    let found = group.read_local(index, soon(), move |state| {
        state.reader.get_at(1, key.as_bytes(), u64::MAX).expect("readable")
    });
    let found = found.await.expect("served");
    found.map(|found| String::from_utf8_lossy(&found.value).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_takes_a_snapshot_of_a_purged_log_and_follows_over_a_restart() {
    let mut cluster = Cluster::new().await;
    let body = "x".repeat(200 << 10);
    for n in 0..120 {
        cluster.put(&format!("k{n}"), &format!("v{n}")).await;
        cluster.put("body", &body).await;
    }
    let leader = cluster.leading().await;
    until("the log is purged", || leader.status().purged.is_some_and(|at| at.index >= 20)).await;
    let learner = cluster.make_learner().await;
    let epoch = leader.descriptor().expect("described").epoch;
    assert_eq!(cluster.add_learner().await, epoch + 1, "a change of the members raises the epoch");
    cluster.caught_up().await;
    let at = leader.status().applied.expect("applied").index;
    assert_eq!(value(&learner, at, "k119").await.as_deref(), Some("v119"));
    assert_eq!(learner.descriptor().map(|descriptor| descriptor.epoch), Some(epoch + 1));
    let (status, known) = (learner.status(), leader.status());
    assert_eq!(status.state, Standing::Learner);
    assert_eq!(known.members[&LEARNER.0].role, Role::Learner);
    assert_eq!(known.members[&LEARNER.0].node, FOURTH);

    drop(learner);
    cluster.stop(FOURTH).await;
    cluster.put("k0", "meanwhile").await;
    until("its lag is seen", || {
        cluster
            .learner_lag()
            .is_some_and(|lag| lag.entries > 0 && lag.age > Duration::from_millis(300))
    })
    .await;
    cluster.restart(FOURTH, 2).await;
    let learner = cluster.nodes[&FOURTH].host.group(SHARD).expect("it is there");
    cluster.caught_up().await;
    let at = cluster.leading().await.status().applied.expect("applied").index;
    assert_eq!(value(&learner, at, "k0").await.as_deref(), Some("meanwhile"));
    assert_eq!(learner.status().state, Standing::Learner);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_counts_for_no_quorum_and_never_campaigns() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    let learner = cluster.make_learner().await;
    cluster.add_learner().await;
    cluster.caught_up().await;
    let (leader, group) = cluster.leader().expect("a leader");
    let followers: Vec<NodeId> = (1..=3).map(NodeId).filter(|node| *node != leader).collect();
    for node in &followers {
        cluster.stop(*node).await;
    }
    // The learner is alive, and holds everything: still nothing is committed by it.
    let before = learner.status().committed;
    let far = Instant::now() + Duration::from_secs(3);
    let refused = group.add_learner(ReplicaId(99), NodeId(9), 2, far).await;
    assert!(refused.is_err(), "a change without a majority: {refused:?}");
    group.hand_over(None, Instant::now() + Duration::from_secs(1)).await.expect_err("to nobody");
    cluster.stop(leader).await;
    let host = cluster.nodes[&FOURTH].host.clone();
    host.peer_lost(leader);
    let watched = Instant::now() + Duration::from_secs(3);
    while Instant::now() < watched {
        let status = learner.status();
        assert_eq!(status.state, Standing::Learner, "{status:?}");
        assert_eq!(status.committed, before, "nothing is committed without a majority");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for node in followers {
        cluster.restart(node, 2).await;
    }
    cluster.put("k1", "v1").await;
    cluster.caught_up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_planned_on_another_epoch_or_against_what_is_changes_nothing() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    let _learner = cluster.make_learner().await;
    let epoch = cluster.add_learner().await;
    let leader = cluster.leading().await;
    let members = leader.status().members.len();
    let passed = Err(ChangeError::EpochPassed { epoch });
    let other = ReplicaId(15);
    assert_eq!(leader.add_learner(other, NodeId(5), epoch - 1, soon()).await, passed);
    assert_eq!(leader.add_learner(other, NodeId(5), epoch + 1, soon()).await, passed);
    assert_eq!(leader.remove_learner(LEARNER, epoch - 1, soon()).await, passed);
    // Done already: whatever epoch it was planned on.
    assert_eq!(leader.add_learner(LEARNER, FOURTH, epoch - 1, soon()).await, Ok(epoch));
    assert_eq!(leader.remove_learner(other, epoch - 1, soon()).await, Ok(epoch));
    for (replica, node) in [(other, FOURTH), (other, NodeId(1)), (LEARNER, NodeId(5))] {
        let refused = leader.add_learner(replica, node, epoch, soon()).await;
        assert!(matches!(refused, Err(ChangeError::Refused(_))), "{refused:?}");
    }
    let voter = ReplicaId(11);
    let refused = leader.remove_learner(voter, epoch, soon()).await;
    assert!(matches!(refused, Err(ChangeError::Refused(_))), "{refused:?}");
    assert_eq!(leader.status().members.len(), members);
    assert_eq!(leader.descriptor().map(|descriptor| descriptor.epoch), Some(epoch));
    // Of two at once only one is made.
    let (one, two) = tokio::join!(
        leader.add_learner(other, NodeId(5), epoch, soon()),
        leader.add_learner(ReplicaId(16), NodeId(6), epoch, soon()),
    );
    assert!(one.is_ok() != two.is_ok(), "{one:?}, {two:?}");
    let follower = cluster.nodes.values().find_map(|node| {
        node.host.group(SHARD).filter(|group| group.status().state == Standing::Follower)
    });
    let follower = follower.expect("a follower");
    let asked = follower.members(soon()).await;
    assert!(
        matches!(asked, Err(ChangeError::NotLeader { .. })),
        "it reads, but leads not: {asked:?}"
    );
    let elsewhere = follower.remove_learner(LEARNER, epoch + 1, soon()).await;
    assert!(matches!(elsewhere, Err(ChangeError::NotLeader { .. })), "{elsewhere:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_learner_is_destroyed_and_its_id_never_comes_back() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    let learner = cluster.make_learner().await;
    let epoch = cluster.add_learner().await;
    cluster.caught_up().await;
    let leader = cluster.leading().await;
    let removed = leader.remove_learner(LEARNER, epoch, soon()).await;
    assert_eq!(removed, Ok(epoch + 1));
    until("it is a member no more", || !leader.status().members.contains_key(&LEARNER.0)).await;
    drop(learner);
    let dir = PathBuf::from("/shards/000000000000000e");
    let never_made = ReplicaId(15);
    let initial = || Descriptor { shard: SHARD.0, arc: Some((0, 0)), epoch: 1 };
    for round in 2..4 {
        let host = cluster.nodes[&FOURTH].host.clone();
        assert!(round > 2 || cluster.disks[&FOURTH].exists(&dir));
        host.destroy(SHARD, LEARNER).await.expect("destroyed, or done already");
        host.destroy(SHARD, never_made).await.expect("remembered");
        assert!(host.group(SHARD).is_none());
        assert!(!cluster.disks[&FOURTH].exists(&dir), "its directory is gone");
        drop(host);
        cluster.stop(FOURTH).await;
        cluster.restart(FOURTH, round).await;
        let host = cluster.nodes[&FOURTH].host.clone();
        assert_eq!(host.failed(), Vec::<String>::new());
        for replica in [LEARNER, never_made] {
            let again = host.create(replica, initial()).await;
            assert!(again.is_err(), "replica {} was destroyed", replica.0);
        }
        assert!(!cluster.disks[&FOURTH].exists(&dir), "and stays gone");
    }
    let host = cluster.nodes[&FOURTH].host.clone();
    host.create(ReplicaId(16), initial()).await.expect("a fresh id");
    // Another replica's destruction does not touch it.
    host.destroy(SHARD, LEARNER).await.expect("done already");
    assert_eq!(host.group(SHARD).map(|group| group.replica()), Some(ReplicaId(16)));
}

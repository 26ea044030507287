//! Voters that take the place of others. Finds an acknowledged write that is lost with the voter that
//! went, a change that stops the group, and one that is left half done for ever.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::time::Duration;

use coracle_raft::error::ChangeError;
use coracle_raft::leadership::Standing;
use coracle_raft::types::{NodeId, Role};
use coracle_storage::ReplicaId;
use tokio::time::Instant;

use crate::cluster::{Cluster, SHARD};
use crate::members::{FOURTH, LEARNER, soon, until};

/// The replica that the cluster makes on a node.
fn on(node: NodeId) -> ReplicaId {
    ReplicaId(10 + node.0)
}

fn is_refused(result: &Result<u64, ChangeError>) -> bool {
    matches!(result, Err(ChangeError::Refused(_)))
}

impl Cluster {
    /// A read replica on the fourth node that holds all.
    async fn with_learner(&mut self) {
        let _ = self.make_learner().await;
        self.add_learner().await;
        self.caught_up().await;
    }

    async fn epoch(&self) -> u64 {
        self.leading().await.descriptor().expect("described").epoch
    }

    /// A voter that does not lead.
    async fn other_voter(&self) -> NodeId {
        self.follower().await.0
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_takes_the_place_of_another_and_no_write_is_lost() {
    let mut cluster = Cluster::new().await;
    for n in 0..20 {
        cluster.put(&format!("k{n}"), &format!("v{n}")).await;
    }
    cluster.with_learner().await;
    let (leader, epoch) = (cluster.leading().await, cluster.epoch().await);
    let (led, _) = cluster.leader().expect("a leader");
    let old = (1..=3).map(NodeId).find(|node| *node != led).expect("three of them");
    let behind = leader
        .change_voters(Some(LEARNER), Some(on(old)), epoch, soon())
        .await
        .expect("all are well");
    assert!(behind > epoch, "a change of the members raises the epoch");
    let told = leader.members(soon()).await.expect("it leads");
    assert!(!told.joint);
    assert_eq!(told.members.get(&LEARNER.0), Some(&(FOURTH, Role::Voter)));
    assert!(!told.members.contains_key(&on(old).0), "nor does it stay as a read replica");
    assert_eq!(told.members.len(), 3);
    let again = leader.change_voters(Some(LEARNER), Some(on(old)), epoch, soon()).await;
    assert_eq!(again, Ok(behind), "done already");

    // The one that went is not asked any more: without it and one other the new voter counts.
    cluster.put("k20", "v20").await;
    let third = (1..=3).map(NodeId).find(|node| *node != led && *node != old).expect("a third");
    cluster.stop(third).await;
    cluster.put("k21", "v21").await;
    cluster.stop(led).await;
    cluster.restart(third, 2).await;
    cluster.put("k22", "v22").await;
    for n in 0..23 {
        let value = cluster.get(&format!("k{n}")).await;
        assert_eq!(value.as_deref(), Some(format!("v{n}").as_bytes()), "k{n}");
    }
    // It was not told, campaigns maybe, and is never elected.
    let removed = cluster.nodes[&old].host.group(SHARD).expect("nobody removed it");
    assert_ne!(removed.status().state, Standing::Leader);
    drop(removed);
    cluster.nodes[&old].host.destroy(SHARD, on(old)).await.expect("a member no more");
    cluster.put("k23", "v23").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_gains_a_voter() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    cluster.with_learner().await;
    let epoch = cluster.epoch().await;
    let behind = cluster.leading().await.change_voters(Some(LEARNER), None, epoch, soon()).await;
    assert!(behind.expect("all are well") > epoch);
    let told = cluster.leading().await.members(soon()).await.expect("it leads");
    assert!(told.members.values().all(|(_, role)| *role == Role::Voter));
    assert_eq!(told.members.len(), 4);
    cluster.put("k1", "v1").await;

    // And loses one again: three of three are enough, two of four were not.
    let (old, epoch) = (cluster.other_voter().await, cluster.epoch().await);
    let behind = cluster.leading().await.change_voters(None, Some(on(old)), epoch, soon()).await;
    assert!(behind.expect("all are well") > epoch);
    let told = cluster.leading().await.members(soon()).await.expect("it leads");
    assert!(told.members.len() == 3 && !told.members.contains_key(&on(old).0));
    cluster.stop(old).await;
    let third = cluster.other_voter().await;
    cluster.stop(third).await;
    cluster.put("k2", "v2").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_the_group_could_not_stand_is_refused_and_changes_nothing() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    cluster.with_learner().await;
    let (leader, epoch) = (cluster.leading().await, cluster.epoch().await);
    let (led, other) = (cluster.leader().expect("a leader").0, cluster.other_voter().await);
    let before = leader.members(soon()).await.expect("it leads");

    let passed = leader.change_voters(Some(LEARNER), Some(on(other)), epoch - 1, soon()).await;
    assert_eq!(passed, Err(ChangeError::EpochPassed { epoch }));
    for (replica, instead_of, why) in [
        (LEARNER, Some(on(led)), "the leader itself"),
        (LEARNER, Some(ReplicaId(99)), "nobody"),
        (ReplicaId(99), Some(on(other)), "no member"),
        (on(other), Some(on(led)), "a voter already"),
    ] {
        let refused = leader.change_voters(Some(replica), instead_of, epoch, soon()).await;
        assert!(is_refused(&refused), "{why}: {refused:?}");
    }

    // It has fallen behind by more than a few entries.
    cluster.stop(FOURTH).await;
    for n in 0..1_100 {
        cluster.put("k0", &format!("v{n}")).await;
    }
    let refused = leader.change_voters(Some(LEARNER), Some(on(other)), epoch, soon()).await;
    assert!(is_refused(&refused), "it lacks too much: {refused:?}");
    cluster.restart(FOURTH, 2).await;
    cluster.caught_up().await;

    // Of those who would vote, two are silent: with the new one the group would stand still.
    let third = (1..=3).map(NodeId).find(|node| *node != led && *node != other).expect("a third");
    cluster.stop(FOURTH).await;
    cluster.stop(third).await;
    until("both are silent", || {
        let status = leader.status();
        let silent = |id: u64| {
            status.members.get(&id).and_then(|member| member.heard) > Some(Duration::from_secs(1))
        };
        silent(LEARNER.0) && silent(on(third).0)
    })
    .await;
    let refused = leader.change_voters(Some(LEARNER), Some(on(other)), epoch, soon()).await;
    assert!(is_refused(&refused), "no majority of those to be: {refused:?}");
    assert_eq!(leader.members(soon()).await.expect("it leads"), before);
    cluster.put("k1", "v1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_voters_that_was_left_half_done_is_ended_by_whoever_leads() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    cluster.with_learner().await;
    let (leader, epoch) = (cluster.leading().await, cluster.epoch().await);
    let old = cluster.other_voter().await;
    // Nothing comes through until the caller has gone: its second step is never proposed.
    let (led, _) = cluster.leader().expect("a leader");
    cluster.wires.held.lock().extend((1..=4).map(NodeId).filter(|node| *node != led));
    let brief = Instant::now() + Duration::from_millis(300);
    let gone = leader.change_voters(Some(LEARNER), Some(on(old)), epoch, brief).await;
    assert!(matches!(gone, Err(ChangeError::Unknown(_))), "{gone:?}");
    cluster.wires.held.lock().clear();
    until("half of the change is committed", || {
        cluster.leader().is_some_and(|(_, group)| {
            let status = group.status();
            status.joint && status.committed.map(|at| at.index) == status.last_index
        })
    })
    .await;
    cluster.put("k1", "v1").await;

    let leader = cluster.leading().await;
    let told = leader.members(soon()).await.expect("it leads");
    assert!(told.joint);
    let other = leader.change_voters(Some(LEARNER), Some(on(old)), told.epoch, soon()).await;
    assert_eq!(other, Err(ChangeError::UnderWay), "nothing is built upon it");
    let ended = leader.finish_change(soon()).await.expect("all are well");
    assert!(ended > told.epoch);
    let told = leader.members(soon()).await.expect("it leads");
    assert!(!told.joint);
    assert_eq!(told.members.get(&LEARNER.0), Some(&(FOURTH, Role::Voter)));
    assert!(!told.members.contains_key(&on(old).0));
    assert_eq!(leader.finish_change(soon()).await, Ok(ended), "nothing is left to end");
    for (key, value) in [("k0", "v0"), ("k1", "v1")] {
        assert_eq!(cluster.get(key).await.as_deref(), Some(value.as_bytes()));
    }
}

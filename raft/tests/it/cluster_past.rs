//! Settings and pins of a group over the loss of its leader, the restart of all its nodes, and a
//! snapshot. What they mean is `apply_past`.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::time::Duration;

use coracle_raft::clock::{Clock, HybridTime};
use coracle_raft::group::Group;
use coracle_raft::history::{Pin, Pinned, Settings};
use coracle_raft::types::NodeId;
use tokio::time::Instant;

use crate::cluster::{Cluster, SHARD, WallClock};

const KEYSPACE: u32 = 1;

impl Cluster {
    /// Asks whoever leads, until it is done.
    async fn adopt(&self, history_ms: u64, revision: u64) {
        let settings = Settings { keyspace: KEYSPACE, history_ms, revision };
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "the settings were not adopted");
            if let Some((_, group)) = self.leader()
                && group.adopt(vec![settings]).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn pin(&self, version: u64, until_ms: u64) -> Pinned {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "the version was not pinned");
            if let Some((_, group)) = self.leader() {
                let pin = Pin { keyspace: KEYSPACE, version, until_ms };
                if let Ok(pinned) = group.pin(pin).await {
                    return pinned;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Every replica comes to have them.
    async fn all_have(&self, revision: u64, threshold: u64) {
        let until = Instant::now() + Duration::from_secs(20);
        let has = |group: &Group| {
            group.settings_revision(KEYSPACE) == revision && group.threshold(KEYSPACE) == threshold
        };
        for (id, node) in &self.nodes {
            let group = node.host.group(SHARD).expect("it is there");
            while !has(&group) {
                assert!(Instant::now() < until, "node {id} lacks the settings or the pin");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_and_pins_survive_failover_restart_and_snapshot() {
    let mut cluster = Cluster::new().await;
    cluster.put("k", "v").await;
    cluster.adopt(3_600_000, 1).await;
    cluster.adopt(6_000, 2).await;
    let now_ms = WallClock.now_ms();
    let version = HybridTime::at_ms(now_ms).0;
    let until_ms = now_ms + 500_000;
    assert_eq!(cluster.pin(version, until_ms).await, Pinned::Held { until_ms });
    // The pin holds what six seconds of history would have passed.
    let until = Instant::now() + Duration::from_secs(30);
    while WallClock.now_ms() < now_ms + 6_500 {
        assert!(Instant::now() < until, "the clock stands still");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.put("k", "w").await;
    cluster.all_have(2, version).await;

    let (leader, _) = cluster.leader().expect("a leader");
    cluster.stop(leader).await;
    cluster.another_leads(leader).await;
    cluster.put("k", "x").await;
    cluster.restart(leader, 2).await;
    cluster.all_have(2, version).await;

    // One that is down while the log behind it is purged gets them with a snapshot.
    let (leader, _) = cluster.leader().expect("a leader");
    let away = *cluster.nodes.keys().find(|id| **id != leader).expect("a follower");
    cluster.stop(away).await;
    let body = "x".repeat(200 << 10);
    let until = Instant::now() + Duration::from_secs(60);
    let applied = |cluster: &Cluster| {
        let (_, group) = cluster.leader()?;
        group.status().applied.map(|at| at.index)
    };
    let before = applied(&cluster).expect("it has applied a few");
    while cluster
        .leader()
        .is_none_or(|(_, group)| group.status().purged.is_none_or(|purged| purged.index <= before))
    {
        assert!(Instant::now() < until, "the log was not purged");
        cluster.put("body", &body).await;
    }
    cluster.restart(away, 3).await;
    cluster.all_have(2, version).await;

    for id in (1..=3).map(NodeId) {
        cluster.stop(id).await;
    }
    for id in (1..=3).map(NodeId) {
        cluster.restart(id, 100).await;
    }
    cluster.put("k", "y").await;
    cluster.all_have(2, version).await;
}

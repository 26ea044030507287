//! Clearing away what splits leave behind: keys that a replica still stores and its group holds no more.
//!
//! Owns when that is done. Nobody reads such keys; they take room, and make a shard look larger than it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::ReplicaId;
use tokio::time::Instant;

use super::Host;
use crate::group::Group;

/// How often a replica is looked for that has something to clear away.
const TIDY_INTERVAL: Duration = Duration::from_secs(1);

/// Until one whose rewriting failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(30);
/// What is rewritten in a second at the least. The replicas of a group begin one after the other by it, so that
/// not all of them rewrite their stores at once.
const REWRITTEN_A_SECOND: u64 = 32 << 20;
/// What is left free on the disk: the log goes on growing meanwhile.
const ROOM_LEFT: u64 = 256 << 20;

impl Host {
    /// One replica at a time, and none while somebody rewrites one for other reasons, nor where the disk
    /// could not hold a second copy. A replica that cannot tell its keys apart waits for the next split or
    /// merge, which tells it how; one that failed is tried again after a while.
    pub(super) async fn tidy(self: Arc<Self>) {
        let mut tried: BTreeSet<Tried> = BTreeSet::new();
        let mut failed: BTreeMap<ReplicaId, Instant> = BTreeMap::new();
        let mut since: BTreeMap<Tried, Instant> = BTreeMap::new();
        loop {
            tokio::select! {
                () = self.environment.stop.cancelled() => return,
                () = tokio::time::sleep(TIDY_INTERVAL) => {}
            }
            let groups = self.groups();
            let name = |group: &Group| {
                let epoch = group.descriptor().map_or(0, |descriptor| descriptor.epoch);
                (group.replica(), group.store_name(), epoch, group.merge_status().merging)
            };
            tried.retain(|(replica, ..)| groups.iter().any(|group| group.replica() == *replica));
            failed.retain(|_, at| at.elapsed() < RETRY_PAUSE);
            let untidy: BTreeSet<Tried> =
                groups.iter().filter(|group| group.is_untidy()).map(|group| name(group)).collect();
            since.retain(|name, _| untidy.contains(name));
            for name in &untidy {
                since.entry(*name).or_insert_with(Instant::now);
            }
            // Somebody waits for those of a merge.
            let merging = |group: &&Arc<Group>| group.merge_status().merging.is_some();
            let is_due = |group: &&Arc<Group>| {
                let waited = since.get(&name(group)).map(Instant::elapsed);
                waited.is_some_and(|waited| merging(group) || waited >= turn(group))
                    && !tried.contains(&name(group))
                    && !failed.contains_key(&group.replica())
                    && self.has_room_for(group.state_bytes())
            };
            let first = groups.iter().filter(is_due).find(merging);
            let untidy = first.or_else(|| groups.iter().find(is_due)).cloned();
            let Some(group) = untidy else { continue };
            let Ok(_turn) = self.reclaiming.clone().try_lock_owned() else { continue };
            let named = name(&group);
            match group.drop_foreign().await {
                Ok(all) => {
                    if !all {
                        tried.insert(named);
                    }
                    tracing::info!(shard = %group.shard(), all, "keys of other shards are dropped")
                }
                Err(error) => {
                    failed.insert(group.replica(), Instant::now());
                    tracing::warn!(shard = %group.shard(), %error, "keys of other shards stay for now");
                }
            }
        }
    }

    /// Whether the disk holds a store twice, and [`ROOM_LEFT`] besides. Rewriting needs the room until the
    /// old files go; a full disk would end the node.
    fn has_room_for(&self, bytes: u64) -> bool {
        let space = self.environment.engines.fs().space(&self.shards);
        space.is_ok_and(|space| space.free_bytes >= bytes.saturating_mul(2) + ROOM_LEFT)
    }
}

/// How long a replica leaves it to those of its group that come before it.
fn turn(group: &Group) -> Duration {
    let before = group.status().members.range(..group.replica().0).count() as u32;
    Duration::from_secs(group.state_bytes() / REWRITTEN_A_SECOND) * before
}

/// A replica, its store, its epoch and its merge.
type Tried = (ReplicaId, usize, u64, Option<u64>);

//! Clearing away what splits leave behind: keys that a replica still stores and its group holds no more.
//!
//! Owns when that is done. Nobody reads such keys; they take room, and make a shard look larger than it is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::ReplicaId;

use super::Host;

/// How often a replica is looked for that has something to clear away.
const TIDY_INTERVAL: Duration = Duration::from_secs(5);

impl Host {
    /// One replica at a time, and none while somebody rewrites one for other reasons. A replica and epoch
    /// is tried once: one that cannot tell its keys apart waits for the next split or merge, which tells
    /// it how.
    pub(super) async fn tidy(self: Arc<Self>) {
        let mut tried: BTreeSet<(ReplicaId, u64)> = BTreeSet::new();
        loop {
            tokio::select! {
                () = self.environment.stop.cancelled() => return,
                () = tokio::time::sleep(TIDY_INTERVAL) => {}
            }
            let groups = self.groups();
            let epoch = |group: &crate::group::Group| {
                group.descriptor().map_or(0, |descriptor| descriptor.epoch)
            };
            tried.retain(|(replica, _)| groups.iter().any(|group| group.replica() == *replica));
            let untidy = groups.into_iter().find(|group| {
                group.is_untidy() && !tried.contains(&(group.replica(), epoch(group)))
            });
            let Some(group) = untidy else { continue };
            let Ok(_turn) = self.reclaiming.clone().try_lock_owned() else { continue };
            tried.insert((group.replica(), epoch(&group)));
            match group.drop_foreign().await {
                Ok(all) => {
                    tracing::info!(shard = %group.shard(), all, "keys of other shards are dropped")
                }
                Err(error) => {
                    tracing::warn!(shard = %group.shard(), %error, "keys of other shards stay");
                }
            }
        }
    }
}

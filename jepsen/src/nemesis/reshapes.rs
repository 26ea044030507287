//! Shards that are split and merged while everything else goes wrong. No fault, but work that faults
//! interrupt. Owns what is asked for, and when.

use std::time::Duration;

use coracle_client::Client;
use coracle_client::admin::SplitAt;
use coracle_client::topology::{ClusterMap, Shard};
use tokio::time::Instant;

use super::Nemesis;

/// A thing is asked for once; without an answer nobody knows whether it was begun.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// More shards than this are merged only: a run stays as dear as it was.
const SHARDS_MAX: usize = 8;

/// Arcs below this part of the ring are not split: keys that are tried at the end must reach all.
const ARC_PARTS_MAX: u64 = 16;

impl Nemesis<'_> {
    /// Has shards split and neighbours merged now and then, until the end.
    pub(super) async fn reshape(&self, end: Instant) {
        if !self.mix.reshapes {
            return;
        }
        let client = match self.cluster.client("shaper").connect_lazy() {
            Ok(client) => client,
            Err(error) => {
                self.unexplained.borrow_mut().push(format!("the shaper's client: {error}"));
                return;
            }
        };
        while self.pause(100, 3_000, end).await {
            let admin = client.admin();
            let Ok(Ok(map)) = tokio::time::timeout(ASK_TIMEOUT, admin.map()).await else {
                continue;
            };
            let ring = on_the_ring(&map);
            if ring.len() < SHARDS_MAX && (ring.len() < 2 || self.one_in(2)) {
                self.split_one(&client, &ring).await;
            } else {
                self.merge_two(&client, &ring).await;
            }
        }
        client.close().await;
    }

    async fn split_one(&self, client: &Client, ring: &[&Shard]) {
        let shard = ring[self.below(ring.len() as u64) as usize];
        let size = shard.end.wrapping_sub(shard.start);
        // The whole ring is 2^64: none.
        if size != 0 && size < u64::MAX / ARC_PARTS_MAX {
            return;
        }
        let (begin, quarter) = (shard.start, if size == 0 { 1 << 62 } else { size / 4 });
        let at = match self.below(4) {
            0 => SplitAt::Size,
            1 => SplitAt::Load,
            _ => SplitAt::Position(begin + quarter + self.below(2 * quarter)),
        };
        self.trace.event(format_args!("{} is split at {at:?}", shard.id));
        let admin = client.admin();
        let asked = tokio::time::timeout(ASK_TIMEOUT, admin.split_shard(shard.id, at, false)).await;
        if matches!(asked, Ok(Ok(_))) {
            self.note("shard split");
        }
    }

    async fn merge_two(&self, client: &Client, ring: &[&Shard]) {
        let at = self.below(ring.len() as u64 - 1) as usize;
        let (left, right) = (ring[at].id, ring[at + 1].id);
        self.trace.event(format_args!("{left} and {right} are merged"));
        let admin = client.admin();
        let asked = tokio::time::timeout(ASK_TIMEOUT, admin.merge_shards(left, right, false)).await;
        if matches!(asked, Ok(Ok(_))) {
            self.note("shards merged");
        }
    }
}

/// The shards that have an arc, in ring order: the meta group has none.
fn on_the_ring(map: &ClusterMap) -> Vec<&Shard> {
    map.shards.iter().filter(|shard| shard.id.0 != 0).collect()
}

//! Splits and merges that nobody asks for: the cluster begins them by itself.
//!
//! Owns that they begin. Which, is chosen in `grow` and `shrink`; what then happens is an operation
//! (`reshape`).

use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::cluster::grow::{self, Growing};
use crate::cluster::points::Point;
use crate::cluster::reshape::{self, SplitWork};
use crate::cluster::shrink::{self, Shrinking};
use crate::records::Snapshot;

/// What a controller remembers of shards that grow and shrink.
#[derive(Default)]
pub(super) struct Unasked {
    growing: Growing,
    shrinking: Shrinking,
}

impl Cluster {
    pub(super) async fn unasked(&self, snapshot: &Snapshot, memory: &mut Unasked) {
        self.grow(snapshot, &mut memory.growing).await;
        self.shrink(snapshot, &mut memory.shrinking).await;
    }

    /// Splits what is large, or has much to do, by itself.
    async fn grow(&self, snapshot: &Snapshot, growing: &mut Growing) {
        let (known, now) = (self.knowledge.lock().clone(), Instant::now());
        let Some((shard, by)) = growing.next(snapshot, &known, now) else { return };
        let points = self.split_points(snapshot, shard.id).await;
        let at = points.and_then(|points| grow::position(&shard, &points, by));
        let begun = match at {
            Err(why) => Err(why),
            Ok(at) => {
                let work = SplitWork { shard: shard.id, at, by, automatic: true, undoes: 0 };
                let now_ms = self.records.now_ms();
                let begun = self.records.change_all(|snapshot| {
                    reshape::begin_split(snapshot, work, now_ms).map(|_| true)
                });
                begun.await.map(drop).map_err(|error| error.to_string())
            }
        };
        if begun.is_ok() {
            self.holding.at(Point::OperationRecorded, shard.id, 0).await;
        }
        match begun {
            Ok(()) => tracing::info!(shard = shard.id, ?by, "a shard is split by itself"),
            Err(why) => {
                tracing::info!(shard = shard.id, ?by, why, "a shard is not split by itself");
                growing.refused(shard.id, why, now);
            }
        }
        self.knowledge.lock().unsplit = growing.reasons();
    }

    /// Merges what is small and idle, and more than anybody asked for, by itself.
    async fn shrink(&self, snapshot: &Snapshot, shrinking: &mut Shrinking) {
        let (known, now) = (self.knowledge.lock().clone(), Instant::now());
        let now_ms = self.records.now_ms();
        let Some(pair) = shrinking.next(snapshot, &known, (now, now_ms)) else { return };
        let begun =
            self.records.change_all(|snapshot| shrink::begin(snapshot, pair, now_ms).map(|_| true));
        let (left, right) = pair;
        match begun.await {
            Ok(_) => {
                self.holding.at(Point::OperationRecorded, left, 0).await;
                tracing::info!(left, right, "two shards are merged by themselves");
            }
            Err(why) => {
                tracing::info!(left, right, %why, "two shards are not merged by themselves");
                shrinking.refused(pair, now);
            }
        }
    }
}

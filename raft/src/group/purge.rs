//! Purging a replica's log: behind a flush, and up to where the group has taken its neighbour in.
//!
//! Owns the order: never beyond what is durable. How many entries are kept is the host's decision.
//!
//! **What was taken in is not in the log.** The entry that does it only says so, and a replica that meets it
//! takes the keys from the neighbour on its own node. Whoever joins later has none: it must never be sent that
//! entry. So every replica purges its log up to there, as any of them may lead next, and says that it has taken
//! the neighbour in only then; until all have, the members stay as they are. What is lost of a purge in a crash
//! is done again before the embargo ends. A group that was born of a split begins with such a log.

use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use tokio::time::Instant;

use crate::command::Command;
use crate::error::GroupError;
use crate::group::Group;
use crate::snapshot::blocking;
use crate::types::TypeConfig;

/// How long a flush may take before the next replica's turn comes; it goes on meanwhile.
const FLUSH_MAX: Duration = Duration::from_secs(60);
/// How often a flush is asked for until it is seen to be done.
const FLUSH_RETRY: Duration = Duration::from_secs(1);
/// How often a purge is asked for until it is seen to be done.
const PURGE_RETRY: Duration = Duration::from_secs(1);

impl Group {
    /// Makes the state durable and frees the log behind it, but for the last `keep` entries, which
    /// a follower that was away for a moment may still want.
    pub(crate) async fn compact(&self, keep: u64) -> Result<(), GroupError> {
        self.flush_and_purge(|durable| durable.saturating_sub(keep)).await
    }

    /// Makes the state durable, and purges the log up to what is named then, at most all of it.
    async fn flush_and_purge(
        &self,
        upto: impl FnOnce(u64) -> u64 + Send,
    ) -> Result<(), GroupError> {
        let Some(applied) = self.status().applied else {
            return Ok(());
        };
        let stopped = |_| GroupError::Stopped;
        let mut progress = self.raft.metrics();
        let reached = |metrics: &openraft::RaftMetrics<TypeConfig>| {
            metrics.snapshot.is_some_and(|id| id.index() >= applied.index)
                || metrics.running_state.is_err()
        };
        let until = Instant::now() + FLUSH_MAX;
        loop {
            let built = async {
                // Again and again: openraft drops the wish while it builds an earlier snapshot.
                self.raft.trigger().snapshot().await.map_err(stopped)?;
                while !reached(&progress.borrow_watched()) {
                    progress.changed().await.map_err(|_| GroupError::Stopped)?;
                }
                Ok(())
            };
            match tokio::time::timeout(FLUSH_RETRY, built).await {
                Ok(built) => break built?,
                Err(_) if Instant::now() < until => {}
                Err(_) => {
                    let why = format!("a flush has not ended within {FLUSH_MAX:?}");
                    return Err(GroupError::Storage(why));
                }
            }
        }
        // Never beyond what a flush made durable: a crash replays from there.
        let state = self.state.clone();
        let durable = blocking(&*self.environment.exec, move || state.durable_index()).await;
        let durable = durable.map_err(|_| GroupError::Stopped)?.unwrap_or(0);
        let durable = applied.index.min(durable);
        let upto = upto(durable).min(durable);
        if upto == 0 {
            return Ok(());
        }
        self.raft.trigger().purge_log(upto).await.map_err(stopped)
    }

    /// Whether a flush by [`Group::compact`] would wait for another group of the node.
    pub(crate) fn is_busy(&self) -> bool {
        self.state.is_busy()
    }

    /// Whether the log still holds the entry with which the group took over what it had not written itself.
    pub(super) fn may_send_what_it_took(&self) -> bool {
        self.leadership.applied_and_purged().1 < self.state.taken_over_at()
    }

    /// Purges the log up to where the group has taken something over, each time that it has.
    pub(super) async fn purge_what_came_before(&self) {
        let mut leadership = self.leadership.clone();
        loop {
            let place = self.state.taken_over_at();
            let (applied, purged) = leadership.applied_and_purged();
            // Seen to be applied: before, the state machine is still busy with it.
            if purged >= place || applied < place {
                if !leadership.changed().await {
                    return;
                }
                continue;
            }
            if let Err(error) = self.flush_and_purge(|_| place).await {
                tracing::warn!(shard = %self.shard, %error, "the log is not purged of what was taken in");
            }
            let mut seen = self.leadership.clone();
            let done =
                async { while seen.applied_and_purged().1 < place && seen.changed().await {} };
            if tokio::time::timeout(PURGE_RETRY, done).await.is_err() && self.leads() {
                // openraft puts off what a follower may still be sent, and looks again when one makes
                // progress: in a quiet group none does.
                let _ = self.proposer.own(Command::Advance).await;
            }
            if leadership.status().failed.is_some() {
                return;
            }
        }
    }
}

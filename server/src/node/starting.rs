//! A node that has started again: when it is as good as before.
//!
//! Owns that wait, and what is told of it meanwhile. What a node refuses as long as it waits is
//! `admission`'s.

use std::sync::Arc;
use std::time::Duration;

use coracle_raft::group::Group;
use coracle_raft::host::Host;
use coracle_raft::leadership::Standing;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admission::Admission;

/// Between two looks at a replica.
const LOOK: Duration = Duration::from_millis(20);
/// A look is a read, for which a replica asks its leader.
const READ_MAX: Duration = Duration::from_millis(500);
/// Beyond, the node is taken for started: a shard that has lost its majority must not keep all others of
/// the node from those who ask only nodes that are ready.
const STARTING_MAX: Duration = Duration::from_secs(30);

/// How many of a node's replicas are not yet as good as before its restart.
pub(crate) struct Starting(watch::Sender<usize>);

impl Starting {
    /// Of a node with these replicas.
    pub(crate) fn new(replicas: usize) -> Arc<Starting> {
        Arc::new(Starting(watch::Sender::new(replicas)))
    }

    /// How many are left to wait for.
    pub(crate) fn left(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until none is.
    pub(crate) async fn done(&self) {
        let mut left = self.0.subscribe();
        // The sender lives in self.
        let _ = left.wait_for(|left| *left == 0).await;
    }

    /// Waits for the replicas that were there before this process: each may be elected again, and has
    /// served a read, so it knows its leader, reaches it, and holds what that has committed.
    pub(crate) async fn run(
        self: Arc<Self>,
        host: Arc<Host>,
        groups: Vec<Arc<Group>>,
        admission: Arc<Admission>,
        stop: CancellationToken,
    ) {
        let wait = |group: Arc<Group>| {
            let (host, left) = (&host, &self.0);
            async move {
                caught_up(host, &group).await;
                left.send_modify(|left| *left = left.saturating_sub(1));
            }
        };
        let all = futures_util::future::join_all(groups.into_iter().map(wait));
        tokio::select! {
            () = stop.cancelled() => return,
            ended = tokio::time::timeout(STARTING_MAX, all) => if ended.is_err() {
                let left = self.left();
                tracing::warn!(left, "replicas have no leader after {STARTING_MAX:?}: the node serves without them");
            },
        }
        admission.set_starting(false);
        self.0.send_replace(0);
    }
}

/// Returns when a replica has caught up, or is there no more.
async fn caught_up(host: &Host, group: &Arc<Group>) {
    loop {
        let is_there = host.group(group.shard()).is_some_and(|now| Arc::ptr_eq(&now, group));
        if !is_there || group.status().state == Standing::Stopped {
            return;
        }
        let read = || group.read(Instant::now() + READ_MAX, |state| state.position);
        if !group.is_under_embargo() && read().await.is_ok() {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

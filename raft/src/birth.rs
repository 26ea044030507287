//! How a group that is born of a split comes to be on a node: the steps, in their order, and who takes them.
//!
//! Owns their names. The parent's state machine asks for a birth before it writes the batch of the split,
//! and the host, which knows what is on the node, carries it out.

use std::sync::{Arc, OnceLock, Weak};

use coracle_storage::state::ReplicaState;
use coracle_storage::{Error, ReplicaId};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;

use crate::apply::GroupState;
use crate::descriptor::Descriptor;
use crate::types::StoredMembership;

/// What a replica of the parent does one after the other. A crash behind any of them comes to the same
/// end: until the parent's batch is durable, the split is applied again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SplitStep {
    /// Everything before the split is written; it is judged, and accepted.
    Judged,
    /// The parent's state is durable, as a checkpoint under a name that a restart clears away.
    Checkpointed,
    /// The checkpoint says what the child is, under another such name.
    Rewritten,
    /// It stands under the child's own name, synced.
    Renamed,
    /// The log knows the child: from here on it is never made again.
    Created,
    /// The parent's batch with the split is written.
    Applied,
    /// The child runs.
    Started,
}

impl SplitStep {
    /// All of them, in order.
    pub const ALL: [SplitStep; 7] = [
        SplitStep::Judged,
        SplitStep::Checkpointed,
        SplitStep::Rewritten,
        SplitStep::Renamed,
        SplitStep::Created,
        SplitStep::Applied,
        SplitStep::Started,
    ];
}

/// Told of each step of the replica of a parent that was taken; where it says false, the replica goes no
/// further, as if its node had died there.
pub type Failpoint = Arc<dyn Fn(ReplicaId, SplitStep) -> bool + Send + Sync>;

/// A child to be made.
pub(crate) struct Birth {
    /// What it holds, which names its shard.
    pub(crate) descriptor: Descriptor,
    pub(crate) replica: ReplicaId,
    pub(crate) state: GroupState,
    pub(crate) membership: StoredMembership,
    /// The parent on this node, and its store, as it is before the split.
    pub(crate) of: ReplicaId,
    pub(crate) store: ReplicaState,
}

/// A child that is there, durably, and does not run yet. Called when the parent's batch is written.
pub(crate) type Start = Box<dyn FnOnce() + Send>;

/// Makes children.
pub(crate) trait Nursery: Send + Sync {
    /// Makes a child's replica; durable when it returns. `None` where it was made before, or was made and
    /// destroyed, or the node has another replica of its shard.
    fn bear(self: Arc<Self>, birth: Birth) -> BoxFuture<'static, Result<Option<Start>, Error>>;
}

/// The way to the host, which is there before any group is; and to a test's hook.
#[derive(Default)]
pub(crate) struct Births {
    nursery: OnceLock<Weak<dyn Nursery>>,
    failpoint: Mutex<Option<Failpoint>>,
}

impl Births {
    pub(crate) fn set_nursery(&self, nursery: Weak<dyn Nursery>) {
        assert!(self.nursery.set(nursery).is_ok(), "a node has one host");
    }

    pub(crate) fn set_failpoint(&self, failpoint: Option<Failpoint>) {
        *self.failpoint.lock() = failpoint;
    }

    pub(crate) async fn bear(&self, birth: Birth) -> Result<Option<Start>, Error> {
        match self.nursery.get().and_then(Weak::upgrade) {
            Some(nursery) => nursery.bear(birth).await,
            None => Err(Error::invalid("the node is stopping")),
        }
    }

    /// A step was taken.
    pub(crate) async fn reach(&self, of: ReplicaId, step: SplitStep) {
        tracing::debug!(replica = of.0, ?step, "split");
        let failpoint = self.failpoint.lock().clone();
        if failpoint.is_some_and(|goes_on| !goes_on(of, step)) {
            std::future::pending::<()>().await;
        }
    }
}

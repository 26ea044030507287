//! The steps of splits and merges on a node, in their order, and the way to other groups of the node.
//!
//! Owns their names. The parent's state machine asks for a birth before it writes the batch of a split, and
//! that of a group which takes its neighbour in for the neighbour; the host, which knows what is on the
//! node, sees to both.

use std::sync::{Arc, OnceLock, Weak};

use coracle_storage::state::ReplicaState;
use coracle_storage::{Error, ReplicaId};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;

use crate::apply::GroupState;
use crate::descriptor::Descriptor;
use crate::types::{ShardId, StoredMembership};

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

/// What the replicas of the two groups of a merge do one after the other. A crash behind any of them comes to
/// the same end: what is not durable is applied again, from a neighbour that stays until it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MergeStep {
    /// Of the one that is taken in: the batch of the freeze is written.
    Frozen,
    /// It is durable: the replica may say so.
    Sealed,
    /// Of the one that takes in: its neighbour is there, frozen.
    Found,
    /// No key outside its arc is left.
    Tidied,
    /// The neighbour's keys are written.
    Ingested,
    /// The batch that makes them its own is written.
    Absorbed,
    /// All of it is durable.
    Flushed,
}

impl MergeStep {
    /// All of them, in order.
    pub const ALL: [MergeStep; 7] = [
        MergeStep::Frozen,
        MergeStep::Sealed,
        MergeStep::Found,
        MergeStep::Tidied,
        MergeStep::Ingested,
        MergeStep::Absorbed,
        MergeStep::Flushed,
    ];
}

/// A step of either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Of a split.
    Split(SplitStep),
    /// Of a merge.
    Merge(MergeStep),
}

impl From<SplitStep> for Step {
    fn from(step: SplitStep) -> Self {
        Step::Split(step)
    }
}

impl From<MergeStep> for Step {
    fn from(step: MergeStep) -> Self {
        Step::Merge(step)
    }
}

/// Told of each step that a replica (of a split: the parent's) has taken; where it says false, the replica goes no
/// further, as if its node had died there.
pub type Failpoint = Arc<dyn Fn(ReplicaId, Step) -> bool + Send + Sync>;

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

/// A frozen replica of this node, for whoever takes its group in.
pub(crate) struct Sealed {
    pub(crate) state: GroupState,
    pub(crate) store: ReplicaState,
}

/// Makes children, and finds neighbours.
pub(crate) trait Nursery: Send + Sync {
    /// Makes a child's replica; durable when it returns. `None` where it was made before, or was made and
    /// destroyed, or the node has another replica of its shard.
    fn bear(self: Arc<Self>, birth: Birth) -> BoxFuture<'static, Result<Option<Start>, Error>>;

    /// Waits until a replica of this node has been frozen for a merge. An error when it does not run.
    fn sealed(
        self: Arc<Self>,
        shard: ShardId,
        replica: ReplicaId,
        merge: u64,
    ) -> BoxFuture<'static, Result<Sealed, Error>>;
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

    /// See [`Nursery::sealed`].
    pub(crate) async fn sealed(
        &self,
        shard: ShardId,
        replica: ReplicaId,
        merge: u64,
    ) -> Result<Sealed, Error> {
        match self.nursery.get().and_then(Weak::upgrade) {
            Some(nursery) => nursery.sealed(shard, replica, merge).await,
            None => Err(Error::invalid("the node is stopping")),
        }
    }

    /// A step was taken.
    pub(crate) async fn reach(&self, of: ReplicaId, step: impl Into<Step>) {
        let step = step.into();
        tracing::debug!(replica = of.0, ?step, "a shard changes");
        let failpoint = self.failpoint.lock().clone();
        if failpoint.is_some_and(|goes_on| !goes_on(of, step)) {
            std::future::pending::<()>().await;
        }
    }
}

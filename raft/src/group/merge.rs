//! Merging a group R into its left neighbour L: the calls of whoever carries it out. All on the leaders of
//! the two groups, each on the epoch that it was planned on.
//!
//! 1. [`Group::prepare_merge`] on L (`absorbs`), then on R: both refuse splits and changes of members
//!    from then on, and L's replicas drop what earlier splits have left behind, and say so
//!    ([`MergeStatus::foreign_free`]).
//! 2. [`Group::freeze`] on R: from its apply on a replica of R serves nothing, also after a crash, and says
//!    so ([`MergeStatus::frozen`]).
//! 3. The controller decides, once, in the records: absorb or cancel.
//! 4. [`Group::absorb`] on L, when every replica of R is frozen; each replica of L takes what its node's
//!    replica of R holds, and says when that is durable ([`MergeStatus::absorbed`]). Or
//!    [`Group::thaw`] on R and [`Group::end_merge`] on L, whatever had happened there: both raise the
//!    epoch, so that whatever comes late fails.
//! 5. When every replica of L says absorbed, R is destroyed; [`Group::end_merge`] on L ends it.

use std::collections::BTreeMap;

use coracle_storage::ReplicaId;
use tokio::time::Instant;

use crate::descriptor::Descriptor;
use crate::error::ChangeError;
use crate::group::Group;
use crate::rules::Rules;
use crate::types::ShardId;

/// A merge as it is announced to one of its two groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrepareMerge {
    /// The merge: the id of the operation, never used before.
    pub merge: u64,
    /// This group's epoch.
    pub epoch: u64,
    /// The other group.
    pub other: ShardId,
    /// Whether this one takes the other in (L), or is taken in (R).
    pub absorbs: bool,
    /// The rules of all keyspaces, read after the epoch was: see [`Rules::of`].
    pub rules: Rules,
}

/// The decision to take a frozen neighbour in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergePlan {
    /// The merge.
    pub merge: u64,
    /// L's epoch.
    pub epoch: u64,
    /// R as it is frozen: its arc begins where L's ends.
    pub other: Descriptor,
    /// The index of R's freeze ([`Frozen::index`]).
    pub frozen_at: u64,
    /// For each replica of L, that of R on the same node.
    pub replicas: BTreeMap<ReplicaId, ReplicaId>,
    /// The rules of all keyspaces, read after the freeze was seen.
    pub rules: Rules,
}

/// That a group serves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// For which merge.
    pub merge: u64,
    /// The index of the freeze in R's log. It is durable here.
    pub index: u64,
}

/// What a group has taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absorbed {
    /// By which merge.
    pub merge: u64,
    /// Whether this replica holds all of it durably: R's replica on its node is needed no more.
    pub flushed: bool,
}

/// How far a merge is on one replica. Everything that it says survives a crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeStatus {
    /// The merge under way, by [`Group::prepare_merge`].
    pub merging: Option<u64>,
    /// Of R.
    pub frozen: Option<Frozen>,
    /// The epoch at which this replica was found to hold no key outside its arc, where that is still so.
    pub foreign_free: Option<u64>,
    /// Of L: the last merge that took something in.
    pub absorbed: Option<Absorbed>,
}

fn not_built<T>() -> Result<T, ChangeError> {
    Err(ChangeError::Unavailable("merges are not built yet".to_owned()))
}

impl Group {
    /// Announces a merge: no split and no change of members from then on. Returns the epoch, which
    /// stays. Done already is no error.
    pub async fn prepare_merge(
        &self,
        plan: PrepareMerge,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        let _ = (plan, deadline);
        not_built()
    }

    /// Freezes the group (R). Fails where the epoch is another by the time that it is applied. Done
    /// already is no error.
    pub async fn freeze(
        &self,
        merge: u64,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Frozen, ChangeError> {
        let _ = (merge, epoch, deadline);
        not_built()
    }

    /// Ends R's part of a merge that is cancelled: the epoch rises, frozen or not. Returns it.
    pub async fn thaw(
        &self,
        merge: u64,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        let _ = (merge, epoch, deadline);
        not_built()
    }

    /// Takes the frozen neighbour in (L). Returns what L holds from then on.
    pub async fn absorb(
        &self,
        plan: MergePlan,
        deadline: Instant,
    ) -> Result<Descriptor, ChangeError> {
        let _ = (plan, deadline);
        not_built()
    }

    /// Ends L's part of a merge, cancelled or done: the epoch rises. Returns it.
    pub async fn end_merge(
        &self,
        merge: u64,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        let _ = (merge, epoch, deadline);
        not_built()
    }

    /// How far a merge is on this replica.
    pub fn merge_status(&self) -> MergeStatus {
        MergeStatus::default()
    }
}

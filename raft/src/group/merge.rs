//! Merging a group R into its left neighbour L: the calls of whoever carries it out. All on the leaders of
//! the two groups, each on the epoch that it was planned on.
//!
//! 1. [`Group::prepare_merge`] on L (`absorbs`), then on R: both refuse splits and changes of members
//!    from then on, and the replicas of both drop what earlier splits have left behind, and say so
//!    ([`MergeStatus::foreign_free`]): before all of them have, nobody may freeze R, since L's would do it
//!    while both groups stand still, and R's would be read for the sake of keys that are not R's.
//! 2. [`Group::freeze`] on R: from its apply on a replica of R serves nothing, also after a crash, and says
//!    so ([`MergeStatus::frozen`]).
//! 3. The controller decides, once, in the records: absorb or cancel.
//! 4. [`Group::absorb`] on L, when every replica of R is frozen; each replica of L takes what its node's
//!    replica of R holds, and says when that is durable ([`MergeStatus::absorbed`]). Or
//!    [`Group::thaw`] on R and [`Group::end_merge`] on L, whatever had happened there: both raise the
//!    epoch, so that whatever comes late fails.
//!
//!    Both stand still until that is done, for as long as reading and writing R takes: so R may be no larger
//!    than [`MERGE_BYTES_MAX`], and remember no more than [`crate::dedup::MERGE_MEMORY_MAX`].
//! 5. When every replica of L says absorbed, R is destroyed; [`Group::end_merge`] on L ends it.

use std::collections::{BTreeMap, BTreeSet};

use coracle_storage::ReplicaId;
use tokio::time::Instant;

use super::members::unchanged;
use crate::birth::Sealed;
use crate::command::{AbsorbShard, AnnounceMerge, Command, EndMerge, FreezeShard};
use crate::dedup::Remembered;
use crate::descriptor::Descriptor;
use crate::error::ChangeError;
use crate::group::Group;
pub use crate::merge_status::{Absorbed, Frozen, MergeStatus};
use crate::rules::Rules;
use crate::types::ShardId;

/// What a group may take that is taken in, in bytes. While it is copied neither of the two serves anything:
/// some seconds, on a disk that reads and writes 100 MB a second.
pub const MERGE_BYTES_MAX: u64 = 256 << 20;

/// A merge as it is announced to one of its two groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrepareMerge {
    /// The merge: never used before, another one with each attempt of an operation.
    pub merge: u64,
    /// This group's epoch.
    pub epoch: u64,
    /// The other group.
    pub other: ShardId,
    /// Whether this one takes the other in (L), or is taken in (R).
    pub absorbs: bool,
    /// This group's replicas, all that the map knows: it stays as it is from then on, so that the decision
    /// finds what it names.
    pub replicas: BTreeSet<ReplicaId>,
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

impl Group {
    /// Announces a merge: no split and no change of members from then on. Returns the epoch, which
    /// stays. Refused where it is known already that it would be too much. Done already is no error.
    pub async fn prepare_merge(
        &self,
        plan: PrepareMerge,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        let Ok(_one) = self.changing.try_lock() else {
            return Err(ChangeError::UnderWay);
        };
        let planned = self.planned(plan.epoch, deadline).await?;
        if self.merge_status().merging != Some(plan.merge) {
            self.size().may_be_announced(plan.absorbs).map_err(ChangeError::Refused)?;
        }
        let PrepareMerge { merge, absorbs, replicas, rules, .. } = plan;
        let replicas = replicas.into_iter().map(|replica| replica.0).collect();
        let announce = AnnounceMerge { planned, merge, absorbs, replicas, rules };
        let reshaped = self.reshape(Command::Announce(announce), deadline).await?;
        Ok(reshaped.descriptor.epoch)
    }

    /// Freezes the group (R). Fails where the epoch is another by the time that it is applied, and where
    /// what would be taken in is too much. Done already is no error.
    pub async fn freeze(
        &self,
        merge: u64,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Frozen, ChangeError> {
        let Ok(_one) = self.changing.try_lock() else {
            return Err(ChangeError::UnderWay);
        };
        let planned = self.planned(epoch, deadline).await?;
        if self.merge_status().frozen.is_none() {
            self.size().may_be_frozen().map_err(ChangeError::Refused)?;
        }
        let freeze = Command::Freeze(FreezeShard { planned, merge });
        let reshaped = self.reshape(freeze, deadline).await?;
        Ok(Frozen { merge, index: reshaped.place })
    }

    /// Ends R's part of a merge that is cancelled: the epoch rises, frozen or not. Returns it.
    pub async fn thaw(
        &self,
        merge: u64,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        self.leads_here()?;
        let reshaped = self.reshape(Command::Thaw(EndMerge { merge, epoch }), deadline).await?;
        Ok(reshaped.descriptor.epoch)
    }

    /// Takes the frozen neighbour in (L). Returns what L holds from then on. Nothing is decided here: the
    /// records have said so before, and every replica of R is frozen.
    pub async fn absorb(
        &self,
        plan: MergePlan,
        deadline: Instant,
    ) -> Result<Descriptor, ChangeError> {
        let Ok(_one) = self.changing.try_lock() else {
            return Err(ChangeError::UnderWay);
        };
        let planned = self.planned(plan.epoch, deadline).await?;
        if self.merge_status().merging != Some(plan.merge) {
            return Err(ChangeError::UnderWay);
        }
        let above = self.check_neighbour(&plan, deadline).await?;
        let replicas = plan.replicas.iter().map(|(own, other)| (own.0, other.0)).collect();
        let MergePlan { merge, other, frozen_at, rules, .. } = plan;
        let absorb = AbsorbShard { planned, merge, other, frozen_at, replicas, rules };
        let reshaped = self.reshape_above(above, Command::Absorb(absorb), deadline).await?;
        Ok(reshaped.descriptor)
    }

    /// Ends L's part of a merge, cancelled or done: the epoch rises. Returns it.
    pub async fn end_merge(
        &self,
        merge: u64,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        self.leads_here()?;
        let end = Command::EndMerge(EndMerge { merge, epoch });
        Ok(self.reshape(end, deadline).await?.descriptor.epoch)
    }

    /// How far a merge is on this replica.
    pub fn merge_status(&self) -> MergeStatus {
        let mut status = self.state.merge_status();
        if let Some(absorbed) = &mut status.absorbed {
            absorbed.flushed &= !self.may_send_what_it_took();
        }
        status
    }

    fn size(&self) -> Size {
        Size {
            shard: self.shard,
            bytes: self.state_bytes(),
            is_foreign_free: self.merge_status().foreign_free.is_some(),
            remembered: self.state.remembered(),
        }
    }

    /// See [`crate::birth::Nursery::sealed`].
    pub(crate) fn sealed(&self, merge: u64) -> Option<Sealed> {
        self.state.sealed(merge)
    }

    /// Looks at the neighbour on this node: once the command is in the log, every replica waits for its
    /// own, and does nothing else. Returns the highest version that was served of its keys.
    async fn check_neighbour(
        &self,
        plan: &MergePlan,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        let refused = |why: &str| Err(ChangeError::Refused(why.to_owned()));
        let Some(replica) = plan.replicas.get(&self.replica()) else {
            return refused("the plan names no replica of the neighbour for this one");
        };
        let shard = ShardId(plan.other.shard);
        let sealed = self.environment.births.sealed(shard, *replica, plan.merge);
        let sealed = match tokio::time::timeout_at(deadline, sealed).await {
            Ok(Ok(sealed)) => sealed,
            Ok(Err(error)) => return Err(ChangeError::Refused(error.to_string())),
            Err(_) => return refused("the neighbour is not frozen on this node"),
        };
        let frozen = (plan.merge, plan.frozen_at);
        if sealed.state.merge.frozen != Some(frozen)
            || sealed.state.descriptor.as_ref() != Some(&plan.other)
        {
            return refused("the neighbour is not what the plan says");
        }
        Ok(sealed.state.ceiling.max(sealed.state.clock))
    }

    fn leads_here(&self) -> Result<(), ChangeError> {
        self.leadership.leads().map(drop).map_err(unchanged)
    }
}

/// How much a merge would have to carry, by one replica of a group.
struct Size {
    shard: ShardId,
    bytes: u64,
    is_foreign_free: bool,
    remembered: Remembered,
}

impl Size {
    fn may_be_announced(&self, absorbs: bool) -> Result<(), String> {
        match absorbs {
            true if !self.remembered.has_room_for_another() => Err(self.remembers_too_much()),
            // What it takes is not known before other groups' keys are gone.
            false if self.is_foreign_free => self.may_be_frozen(),
            _ => Ok(()),
        }
    }

    fn may_be_frozen(&self) -> Result<(), String> {
        let shard = self.shard;
        if !self.is_foreign_free {
            return Err(format!(
                "shard {shard} still holds keys that earlier splits have left behind: they are dropped first"
            ));
        }
        if self.bytes > MERGE_BYTES_MAX {
            let (mib, most) = (self.bytes >> 20, MERGE_BYTES_MAX >> 20);
            return Err(format!(
                "shard {shard} takes {mib} MiB, and at most {most} MiB are taken in by a merge: neither shard would serve \
                 anything while they are copied"
            ));
        }
        if !self.remembered.may_come_along() {
            return Err(self.remembers_too_much());
        }
        Ok(())
    }

    fn remembers_too_much(&self) -> String {
        let (shard, Remembered { results, marks, .. }) = (self.shard, self.remembered);
        format!(
            "shard {shard} remembers {results} requests of {marks} clients, too many for a merge: try again in some minutes"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dedup::MERGE_MEMORY_MAX;

    #[test]
    fn what_is_too_much_is_refused_before_the_freeze() {
        let small = || Size {
            shard: ShardId(4),
            bytes: MERGE_BYTES_MAX,
            is_foreign_free: true,
            remembered: MERGE_MEMORY_MAX,
        };
        for absorbs in [false, true] {
            assert_eq!(small().may_be_announced(absorbs), Ok(()));
        }
        assert_eq!(small().may_be_frozen(), Ok(()));
        let refused = |size: Size, why: &str| {
            let error = size.may_be_frozen().expect_err(why);
            assert!(error.contains(why) && error.starts_with("shard 4 "), "{error}");
        };
        refused(Size { bytes: MERGE_BYTES_MAX + 1, ..small() }, "at most 256 MiB");
        refused(Size { is_foreign_free: false, ..small() }, "left behind");
        let clients = Remembered { marks: MERGE_MEMORY_MAX.marks + 1, ..MERGE_MEMORY_MAX };
        refused(Size { remembered: clients, ..small() }, "too many for a merge");
        let fat = || Size { bytes: MERGE_BYTES_MAX + 1, ..small() };
        assert!(fat().may_be_announced(false).is_err(), "as soon as it is known");
        let untidy = Size { is_foreign_free: false, ..fat() };
        assert_eq!(untidy.may_be_announced(false), Ok(()), "its own keys may be few");
        assert_eq!(fat().may_be_announced(true), Ok(()), "only what is taken in is copied");
        let full = Remembered { results: crate::dedup::RESULTS_MAX, ..Remembered::default() };
        let full = Size { remembered: full, ..small() };
        assert!(full.may_be_announced(true).is_err(), "there is no room for the other's");
    }
}

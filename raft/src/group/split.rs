//! Splitting a group: the leader's call. What it does to a state is `apply`'s, how the child comes to be on
//! each node is the host's.

use std::collections::BTreeMap;

use coracle_storage::ReplicaId;
use tokio::time::Instant;

use super::members::unchanged;
use crate::apply::{NotReshaped, Outcome, Reshaped};
use crate::command::{Command, Planned, SplitShard};
use crate::descriptor::Descriptor;
use crate::error::{ChangeError, GroupError};
use crate::group::Group;
use crate::load::LoadBucket;
use crate::rules::Rules;
use crate::snapshot::blocking;
use crate::types::{ShardId, position};

/// A split as it was planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitPlan {
    /// The parent's epoch.
    pub epoch: u64,
    /// The first position of the child: inside the parent's arc, and not its first.
    pub at: u64,
    /// The child's shard, which was never used before.
    pub child: ShardId,
    /// For each replica of the parent, voters and read replicas, that of the child on the same node,
    /// which was never used before.
    pub replicas: BTreeMap<ReplicaId, ReplicaId>,
    /// The rules of all keyspaces: see [`Rules::of`].
    pub rules: Rules,
}

/// A split that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// What the parent holds from now on.
    pub parent: Descriptor,
    /// What the child holds.
    pub child: Descriptor,
    /// The version of the split: every earlier one is the parent's.
    pub version: u64,
}

/// Where an arc might be split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SplitPoints {
    /// The position with half of the bytes on each side; `None` where there are too few keys, or all of
    /// them are of one entity.
    pub by_size: Option<u64>,
    /// What the arc's own keys take, about.
    pub bytes: u64,
    /// How often each part of the arc was met lately, on this replica; in order.
    pub load: Vec<LoadBucket>,
}

impl Group {
    /// Splits the group: everything from a position on becomes a group of its own, with replicas on the
    /// same nodes. On the leader, on the epoch and the very membership that it was planned on, else
    /// nothing changes. An unknown outcome shows in the group's epoch.
    pub async fn split(&self, plan: SplitPlan, deadline: Instant) -> Result<Split, ChangeError> {
        let Ok(_one) = self.changing.try_lock() else {
            return Err(ChangeError::UnderWay);
        };
        // Reads and writes wait while the split is applied, and that begins with a flush: a small one,
        // when this is done before.
        let state = self.state.clone();
        let flushed = blocking(&*self.environment.exec, move || state.seal()).await;
        flushed
            .map_err(ChangeError::Refused)?
            .map_err(|why| ChangeError::Refused(why.to_string()))?;
        let planned = self.planned(plan.epoch, deadline).await?;
        let replicas = plan.replicas.iter().map(|(parent, child)| (parent.0, child.0)).collect();
        let SplitPlan { at, child, rules, .. } = plan;
        let command = SplitShard { planned, at, child: child.0, replicas, rules };
        let reshaped = self.reshape(Command::Split(command), deadline).await?;
        let child = reshaped.child.expect("a split has a child");
        Ok(Split { parent: reshaped.descriptor, child, version: reshaped.version })
    }

    /// The membership of the epoch that a command was planned on, confirmed by a majority. On the leader,
    /// which changes no members meanwhile.
    pub(super) async fn planned(
        &self,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Planned, ChangeError> {
        let (known, stored) = self.confirmed(deadline).await?;
        if known != epoch {
            return Err(ChangeError::EpochPassed { epoch: known });
        }
        let membership = stored.log_id().as_ref().map(position);
        let membership = membership.ok_or(ChangeError::UnderWay)?;
        Ok(Planned { epoch, membership })
    }

    /// Proposes a command that changes what the group holds, and waits for its end.
    pub(super) async fn reshape(
        &self,
        command: Command,
        deadline: Instant,
    ) -> Result<Reshaped, ChangeError> {
        self.reshape_above(0, command, deadline).await
    }

    /// The same, stamped above a version that is no more to be given by this group.
    pub(super) async fn reshape_above(
        &self,
        version: u64,
        command: Command,
        deadline: Instant,
    ) -> Result<Reshaped, ChangeError> {
        let unknown = || ChangeError::Unknown("it was proposed, and is not applied yet".to_owned());
        let proposed = self.proposer.own_above(version, command);
        let replies = match tokio::time::timeout_at(deadline, proposed).await {
            Ok(Ok(replies)) => replies,
            Ok(Err(GroupError::Unknown(why))) => return Err(ChangeError::Unknown(why)),
            Ok(Err(error)) => return Err(unchanged(error)),
            Err(_) => return Err(unknown()),
        };
        match replies.0.into_iter().next().map(|reply| reply.outcome) {
            Some(Outcome::Reshaped(Ok(reshaped))) => Ok(reshaped),
            Some(Outcome::Reshaped(Err(refused))) => Err(refusal(refused)),
            other => panic!("apply answers such a command with what became of it, not {other:?}"),
        }
    }

    /// Where this group's arc might be split, as far as this replica knows. By the rules of all keyspaces:
    /// of one that is lacking no key counts.
    pub async fn split_points(&self, rules: Rules) -> Result<SplitPoints, GroupError> {
        let state = self.state.clone();
        let sampled = blocking(&*self.environment.exec, move || state.median(&rules));
        let sampled = sampled.await.map_err(|_| GroupError::Stopped)?;
        let (by_size, bytes) = sampled.map_err(|error| GroupError::Storage(error.to_string()))?;
        let arc = self.descriptor().and_then(|descriptor| descriptor.arc);
        let load = arc.map_or_else(Vec::new, |arc| self.load.buckets(arc));
        Ok(SplitPoints { by_size, bytes, load })
    }

    /// Reads at these positions were served here.
    pub fn count_reads(&self, positions: impl IntoIterator<Item = u64>) {
        if let Some(arc) = self.descriptor().and_then(|descriptor| descriptor.arc) {
            positions.into_iter().for_each(|position| self.load.read(arc, position));
        }
    }

    /// Lets what was counted long ago weigh less.
    pub(crate) fn fade_load(&self) {
        self.load.fade();
    }

    /// Whether this replica may hold keys outside its arc, which a split has left behind.
    pub(crate) fn is_untidy(&self) -> bool {
        self.state.is_untidy()
    }

    /// Tells one store of this replica from the next, which a snapshot brought.
    pub(crate) fn store_name(&self) -> usize {
        self.state.store_marker().as_ptr().addr()
    }

    /// Drops keys outside the arc. Blocks a thread for as long as rewriting the store takes.
    pub(crate) async fn drop_foreign(&self) -> Result<bool, GroupError> {
        let state = self.state.clone();
        let dropped = blocking(&*self.environment.exec, move || state.drop_foreign());
        let dropped = dropped.await.map_err(|_| GroupError::Stopped)?;
        dropped.map_err(|error| GroupError::Storage(error.to_string()))
    }
}

/// Why the group would not do it.
fn refusal(refused: NotReshaped) -> ChangeError {
    let why = match refused {
        NotReshaped::Epoch { epoch } => return ChangeError::EpochPassed { epoch },
        NotReshaped::Members | NotReshaped::Merging => return ChangeError::UnderWay,
        NotReshaped::Replicas => {
            "the plan does not name each of the group's replicas, and nothing else"
        }
        NotReshaped::Position => "the position is not inside the group's arc, or is its first",
        NotReshaped::Child => "the child's shard is the group's own, or the meta group's",
    };
    ChangeError::Refused(why.to_owned())
}

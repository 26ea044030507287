//! Owns what splits and merges do to a group's replicated state. Pure, as all of `apply`; what they do to
//! files, and to the other group, is the state machine's and the host's.
//!
//! # A split
//!
//! It happens only on the epoch and the membership that it was planned on, not between two
//! configurations, with a replica of the child for each of the group's, at a position inside the arc.
//! Else nothing changes.
//!
//! The child begins with all that the group had: clock, ceiling, history, pins, results, marks and floor.
//! So whatever version was served of its keys is above no later one, a pinned version stays readable on
//! both sides, and a retry of what was written before finds its result there. The group's arc ends where
//! the child's begins, and both have a new epoch: whatever was routed by the old one looks again.

use std::collections::BTreeSet;

use super::{Entry, GroupState};
use crate::command::{Planned, SplitShard};
use crate::descriptor::Descriptor;
use crate::position::Position;

/// Where a group that was born of a split begins: term 0 is nobody's, so that whoever is elected first
/// compares higher, and the log is purged up to there, so that whoever joins takes a snapshot.
pub const BIRTH: Position = Position { term: 0, index: 1 };

/// Who belongs to a group, as far as commands look at it. Not a record of its own: it follows from the
/// membership.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// Where it stands in the log.
    pub at: Position,
    /// Between two sets of voters.
    pub joint: bool,
    /// All members.
    pub replicas: BTreeSet<u64>,
}

/// What a command has made of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reshaped {
    /// What it holds now.
    pub descriptor: Descriptor,
    /// Of a split: what the child holds.
    pub child: Option<Descriptor>,
    /// The version of the change.
    pub version: u64,
    /// Of a freeze, and of what takes a neighbour in: the index in the log; else 0.
    pub place: u64,
}

/// Why a command has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReshaped {
    /// It was planned on another epoch.
    Epoch {
        /// The group's.
        epoch: u64,
    },
    /// It was planned on other members, or they are between two configurations.
    Members,
    /// The replicas that it names are not the members, or not one for each.
    Replicas,
    /// The position is not inside the arc, or is its first.
    Position,
    /// The child is the group itself, or the meta group.
    Child,
    /// A merge is under way, and this is not part of it.
    Merging,
}

/// A group that is born of another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// Its replicated state.
    pub state: GroupState,
    /// Its replica for each of the parent's.
    pub replicas: std::collections::BTreeMap<u64, u64>,
}

/// Splits a group; its own state becomes the parent's. After a refusal it is as before.
pub(super) fn split(
    state: &mut GroupState,
    at: &Entry,
    plan: &SplitShard,
) -> Result<(Reshaped, Child), NotReshaped> {
    let descriptor = planned(state, &plan.planned)?;
    if state.merge.merging.is_some() || state.merge.frozen.is_some() {
        return Err(NotReshaped::Merging);
    }
    let (start, end) = descriptor.arc.ok_or(NotReshaped::Position)?;
    if plan.at <= start || end != 0 && plan.at >= end {
        return Err(NotReshaped::Position);
    }
    if plan.child == descriptor.shard || plan.child == coracle_proto::shard_map::META_SHARD.0 {
        return Err(NotReshaped::Child);
    }
    let children: BTreeSet<u64> = plan.replicas.values().copied().collect();
    if !plan.replicas.keys().eq(&state.membership.replicas)
        || children.len() < plan.replicas.len()
        || !children.is_disjoint(&state.membership.replicas)
    {
        return Err(NotReshaped::Replicas);
    }
    let epoch = descriptor.epoch + 1;
    let version = at.stamp.max(state.clock + 1);
    state.clock = version;
    state.ceiling = state.ceiling.max(version);
    state.kin.learn(&plan.rules);
    let mut child = state.clone();
    let born = Descriptor { shard: plan.child, arc: Some((plan.at, end)), epoch };
    let parent = Descriptor { arc: Some((start, plan.at)), epoch, ..descriptor };
    state.descriptor = Some(parent.clone());
    child.descriptor = Some(born.clone());
    child.kin.take_over(parent.shard, &state.kin.lineage().clone(), version, BIRTH);
    child.history.end_entry(version);
    let reshaped = Reshaped { descriptor: parent, child: Some(born), version, place: 0 };
    Ok((reshaped, Child { state: child, replicas: plan.replicas.clone() }))
}

/// Whether the group is still what a command was planned on.
pub(super) fn planned(state: &GroupState, planned: &Planned) -> Result<Descriptor, NotReshaped> {
    let descriptor = state.descriptor.clone().ok_or(NotReshaped::Epoch { epoch: 0 })?;
    if descriptor.epoch != planned.epoch {
        return Err(NotReshaped::Epoch { epoch: descriptor.epoch });
    }
    if state.membership.joint || state.membership.at != planned.membership {
        return Err(NotReshaped::Members);
    }
    Ok(descriptor)
}

//! Splits and merges as operations: what happens next, and what it makes of the records.
//!
//! Owns their steps, as pure functions of the records and of what replicas say of themselves. A step is
//! recorded (`enter`) before it is done, and each can be done again: whoever leads the meta group next
//! decides the same from the same. Does not ask anybody (see `super::reshaping`).
//!
//! A replica tells of states that a majority has agreed upon, of now or of before. So what one says that is
//! past an epoch settles what became of an order that was planned on it: done, or never any more.
//!
//! A **split** waits until nothing of its shard moves, gets ids for the child, and has the group split. Then
//! the map has both, in one change. A **merge** first gathers the right one's replicas where the left one's
//! are, announces itself, freezes the right one for half a second at most, and is then decided, by one change
//! of the records: absorb, or cancel. What is cancelled raises both epochs, so that a late order fails, and
//! is tried again a few times. Groups know each attempt as a merge of its own: who was paused in one cannot
//! take the next one back.

mod merge;
mod hold;
mod enter;

use std::collections::{BTreeMap, BTreeSet};

use coracle_proto::{peer, v1};
use peer::ReshapeStep;
use v1::{MergeStep, OperationState, SplitStep};

pub(super) use self::enter::{
    SplitWork, begin_merge, begin_split, begin_undo, by_itself, check_free, check_merge, enter,
};
pub(super) use self::hold::{around, behind};
use self::merge::is_voter;
pub(super) use self::merge::{apart, are_neighbours, check_size, has_taken, is_decided, needed_by};
use super::members::is_lost_role;
use crate::records::Snapshot;
use crate::records::operations::has_ended;

/// How long the right one of a merge may serve nothing before it is cancelled.
pub(super) const FREEZE_MAX_MS: u64 = 500;
/// How often a split or a merge is begun before it is given up.
const ATTEMPTS_MAX: u32 = 5;
/// Before a merge that was cancelled by itself is tried again; doubled each time.
const AGAIN_AFTER_MS: u64 = 1_000;
/// How long both of a merge may take until they can freeze, before that is cancelled: neither is mended
/// meanwhile, and nothing else is begun by itself. What they drop by then stays dropped.
const PREPARE_MAX_MS: u64 = 10 * 60_000;
/// How long a merge may wait for others' work on its shards before it fails, for the same reason.
const GATHER_MAX_MS: u64 = 60 * 60_000;
/// How many entries a replica may lack that is to freeze within [`FREEZE_MAX_MS`].
const LAG_MAX: u64 = 1_000;
/// Bits of a merge's id that tell its attempts apart.
const ATTEMPT_BITS: u32 = 8;
const _: () = assert!(ATTEMPTS_MAX < 1 << ATTEMPT_BITS);

/// What replicas and nodes say.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// By replica.
    pub(super) replicas: BTreeMap<u64, v1::GroupStatus>,
    /// Nodes that are not heard.
    pub(super) silent: BTreeSet<u64>,
    /// Nodes that do not come back.
    pub(super) lost: BTreeSet<u64>,
    /// The node that leads a group and has refused the last order to it.
    pub(super) refused_by: Option<u64>,
    /// Wall clock.
    pub(super) now_ms: u64,
    /// How long a test holds each step.
    pub(super) hold_ms: u64,
}

impl Seen {
    /// The furthest that any replica of a shard has come.
    pub(super) fn shard(&self, shard: u64) -> Option<&v1::GroupStatus> {
        let its = self.replicas.values().filter(|status| status.shard == shard && status.epoch > 0);
        its.max_by_key(|status| (status.epoch, status.applied_index))
    }

    /// Who leads a shard, by its own word; of several the one of the highest term.
    fn leading(&self, shard: u64) -> Option<&v1::GroupStatus> {
        let is_leader = |it: &&v1::GroupStatus| it.role == "leader" && it.leader_node != 0;
        let its = self.replicas.values().filter(|it| it.shard == shard).filter(is_leader);
        its.max_by_key(|status| status.term)
    }

    /// Its node.
    pub(super) fn leader(&self, shard: u64) -> Option<u64> {
        self.leading(shard).map(|status| status.leader_node)
    }

    fn of(&self, replica: &v1::Replica) -> Option<&v1::GroupStatus> {
        self.replicas.get(&replica.id)
    }

    /// Its node says that it does not run there any more.
    fn is_broken(&self, replica: &v1::Replica) -> bool {
        self.of(replica).is_some_and(|status| is_lost_role(&status.role))
    }
}

/// What happens next.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Next {
    /// Nothing, before something else has happened.
    Wait(String),
    /// Nothing, for a moment.
    Look,
    /// A group's leader is told.
    Ask(Box<peer::Reshape>),
    /// Another node is to lead a shard.
    HandOver {
        /// The shard.
        shard: u64,
        /// Who leads it.
        from: u64,
        /// Who shall.
        to: u64,
    },
    /// The records change.
    Enter(Entry),
}

/// A change of the records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// The child gets its ids.
    PlanSplit,
    /// The group has split: the map has both.
    Split { epoch: u64, child_epoch: u64 },
    /// It was planned on an epoch that has passed: the group has come to this one.
    SplitAgain { epoch: u64 },
    /// Replicas of the right one move; read replicas that are in the way go.
    Gather { moves: Vec<(u64, u64)>, withdraw: Vec<(u64, u64, u64)> },
    /// Both are told of the merge.
    Prepare,
    /// The right one freezes, for so long at most.
    Freeze { for_ms: u64 },
    /// It is decided: it is taken in.
    Absorb { frozen_at: u64, epoch: u64 },
    /// The left one has taken it in: the map has one.
    Taken { epoch: u64 },
    /// All replicas hold it.
    Flushed,
    /// The left one knows that it is over.
    Ended { epoch: u64 },
    /// It is decided: both go on.
    Cancel { why: String },
    /// Both do.
    Back { left: u64, right: u64 },
    /// It is over.
    End { state: OperationState, message: String },
    /// It is to be cancelled, because a group refuses it.
    GiveUp { why: String },
}

/// What a change of the records follows on. On anything else it is void: another controller was faster, and
/// what was seen tells nothing of where it has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct On {
    step: i32,
    attempts: u32,
}

impl On {
    pub(super) fn of(operation: &v1::ClusterOperation) -> Self {
        match (&operation.split, &operation.merge) {
            (Some(split), _) => On { step: split.step, attempts: split.attempts },
            (None, Some(merge)) => On { step: merge.step, attempts: merge.attempts },
            (None, None) => On { step: 0, attempts: 0 },
        }
    }
}

fn failed(why: impl Into<String>) -> Next {
    Next::Enter(Entry::End { state: OperationState::Failed, message: why.into() })
}

fn cancelled() -> Next {
    Next::Enter(Entry::End { state: OperationState::Cancelled, message: String::new() })
}

fn wait(why: impl Into<String>) -> Next {
    Next::Wait(why.into())
}

/// The replicas that are asked before it is decided what happens next.
pub(super) fn asked(
    snapshot: &Snapshot,
    operation: &v1::ClusterOperation,
) -> Vec<(u64, v1::Replica)> {
    let of = |id: u64| {
        let shard = find(snapshot, id);
        shard.into_iter().flat_map(move |shard| shard.replicas.iter().map(move |r| (id, *r)))
    };
    if let Some(split) = &operation.split {
        let children = split.replicas.iter().map(|replica| (split.child, *replica));
        return match split.step() {
            SplitStep::Split => of(split.shard).chain(children).collect(),
            _ => Vec::new(),
        };
    }
    let Some(merge) = &operation.merge else { return Vec::new() };
    match merge.step() {
        MergeStep::Gather if has_open_moves(operation) => Vec::new(),
        MergeStep::Flush | MergeStep::End => of(merge.left).collect(),
        _ => of(merge.left).chain(of(merge.right)).collect(),
    }
}

/// Decides.
pub(super) fn next(snapshot: &Snapshot, operation: &v1::ClusterOperation, seen: &Seen) -> Next {
    match (&operation.split, &operation.merge) {
        (Some(split), _) => split_next(snapshot, operation, split, seen),
        (None, Some(merge)) => merge::next(snapshot, operation, merge, seen),
        (None, None) => failed("neither a split nor a merge"),
    }
}

fn find(snapshot: &Snapshot, id: u64) -> Option<&v1::Shard> {
    snapshot.map.shards.iter().find(|shard| shard.id == id)
}

/// Whether replicas of a shard come or go.
fn moves(snapshot: &Snapshot, shard: &v1::Shard) -> bool {
    let changes = |replica: &v1::Replica| replica.joining || replica.becomes_voter || replica.goes;
    shard.forming
        || shard.replicas.iter().any(changes)
        || snapshot.leaving.iter().any(|leaving| leaving.shard == shard.id)
}

/// Whether a position is inside an arc, and not its first.
pub(super) fn is_inside(shard: &v1::Shard, at: u64) -> bool {
    at > shard.start && (shard.end == 0 || at < shard.end)
}

fn has_open_moves(operation: &v1::ClusterOperation) -> bool {
    operation.moves.iter().any(|step| !has_ended(step.state()))
}

fn is_paused(operation: &v1::ClusterOperation) -> bool {
    operation.state() == OperationState::Paused
}

fn split_next(
    snapshot: &Snapshot,
    operation: &v1::ClusterOperation,
    split: &v1::ShardSplit,
    seen: &Seen,
) -> Next {
    let Some(shard) = find(snapshot, split.shard) else {
        return failed(format!("there is no shard s{} any more", split.shard));
    };
    if split.step() != SplitStep::Split {
        return match () {
            () if operation.cancelling => cancelled(),
            () if is_paused(operation) => wait("paused"),
            () if !is_inside(shard, split.at) => failed("the position is not in its arc any more"),
            () if moves(snapshot, shard) => wait("it waits until nothing of the shard moves"),
            () => Next::Enter(Entry::PlanSplit),
        };
    }
    let Some(group) = seen.shard(split.shard) else {
        return wait(format!("s{} does not answer", split.shard));
    };
    if group.epoch > split.epoch && group.end == split.at {
        // Any of the child's replicas knows what it began with.
        return match seen.shard(split.child) {
            Some(child) => {
                Next::Enter(Entry::Split { epoch: group.epoch, child_epoch: child.epoch })
            }
            None => Next::Look,
        };
    }
    if group.epoch > split.epoch {
        return Next::Enter(Entry::SplitAgain { epoch: group.epoch });
    }
    let order = match operation.cancelling {
        // Raises the epoch: whatever was asked for before fails from then on.
        true => order(operation, split.shard, ReshapeStep::Thaw, split.epoch),
        false => {
            let pair = |child: &v1::Replica| peer::ReplicaPair {
                replica: child.replaces,
                other: child.id,
            };
            peer::Reshape {
                at: split.at,
                other: split.child,
                replicas: split.replicas.iter().map(pair).collect(),
                ..order(operation, split.shard, ReshapeStep::Split, split.epoch)
            }
        }
    };
    Next::Ask(Box::new(order))
}

fn order(
    operation: &v1::ClusterOperation,
    shard: u64,
    step: ReshapeStep,
    epoch: u64,
) -> peer::Reshape {
    let (step, operation) = (step.into(), attempt(operation));
    peer::Reshape { shard, step, epoch, operation, ..Default::default() }
}

/// How groups know an attempt of an operation: never used before, and rising.
fn attempt(operation: &v1::ClusterOperation) -> u64 {
    operation.id << ATTEMPT_BITS | u64::from(On::of(operation).attempts)
}

#[cfg(test)]
mod tests;

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
//! is tried again a few times.

mod enter;

use std::collections::{BTreeMap, BTreeSet};

use coracle_proto::{peer, v1};
use peer::ReshapeStep;
use v1::{MergeStep, OperationState, SplitStep};

pub(super) use self::enter::{
    SplitWork, begin_merge, begin_split, begin_undo, check_free, check_merge, enter,
};
use crate::records::Snapshot;
use crate::records::operations::has_ended;

/// How long the right one of a merge may serve nothing before it is cancelled.
pub(super) const FREEZE_MAX_MS: u64 = 500;
/// How often a split or a merge is begun before it is given up.
const ATTEMPTS_MAX: u32 = 5;
/// Before a merge that was cancelled by itself is tried again; doubled each time.
const AGAIN_AFTER_MS: u64 = 1_000;
/// How many entries a replica may lack that is to freeze within [`FREEZE_MAX_MS`].
const LAG_MAX: u64 = 1_000;

/// What replicas and nodes say.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// By replica.
    pub(super) replicas: BTreeMap<u64, v1::GroupStatus>,
    /// Nodes that are not heard.
    pub(super) silent: BTreeSet<u64>,
    /// Nodes that do not come back.
    pub(super) lost: BTreeSet<u64>,
    /// Wall clock.
    pub(super) now_ms: u64,
}

impl Seen {
    /// The furthest that any replica of a shard has come.
    pub(super) fn shard(&self, shard: u64) -> Option<&v1::GroupStatus> {
        let its = self.replicas.values().filter(|status| status.shard == shard && status.epoch > 0);
        its.max_by_key(|status| (status.epoch, status.applied_index))
    }

    fn of(&self, replica: &v1::Replica) -> Option<&v1::GroupStatus> {
        self.replicas.get(&replica.id)
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
    /// It was planned on an epoch that has passed.
    SplitAgain,
    /// Replicas of the right one move; read replicas that are in the way go.
    Gather { moves: Vec<(u64, u64)>, withdraw: Vec<(u64, u64, u64)> },
    /// Both are told of the merge.
    Prepare,
    /// The right one freezes.
    Freeze,
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
        MergeStep::Gather => Vec::new(),
        MergeStep::Flush | MergeStep::End | MergeStep::Absorb => of(merge.left).collect(),
        _ => of(merge.left).chain(of(merge.right)).collect(),
    }
}

/// Decides.
pub(super) fn next(snapshot: &Snapshot, operation: &v1::ClusterOperation, seen: &Seen) -> Next {
    match (&operation.split, &operation.merge) {
        (Some(split), _) => split_next(snapshot, operation, split, seen),
        (None, Some(merge)) => merge_next(snapshot, operation, merge, seen),
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
        return Next::Enter(Entry::SplitAgain);
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
    let (step, operation) = (step.into(), operation.id);
    peer::Reshape { shard, step, epoch, operation, ..Default::default() }
}

fn merge_next(
    snapshot: &Snapshot,
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    seen: &Seen,
) -> Next {
    let (left, right) = (find(snapshot, merge.left), find(snapshot, merge.right));
    match (merge.step(), left, right) {
        (MergeStep::Absorb, Some(left), Some(_)) => absorb(operation, merge, left, seen),
        (MergeStep::Flush, Some(left), _) => flush(operation, left, seen),
        (MergeStep::End, Some(left), _) => end(operation, merge, left, seen),
        (MergeStep::Cancel, Some(_), Some(_)) => back(operation, merge, seen),
        (MergeStep::Freeze, Some(left), Some(right)) => {
            freeze(operation, merge, (left, right), seen)
        }
        (MergeStep::Prepare, Some(left), Some(right)) => {
            prepare(operation, merge, (left, right), seen)
        }
        (_, Some(left), Some(right)) => gather(snapshot, operation, merge, (left, right), seen),
        _ => failed("one of the two shards is there no more"),
    }
}

/// Whether one shard's arc ends where the other one's begins; both have one.
pub(super) fn are_neighbours(left: &v1::Shard, right: &v1::Shard) -> bool {
    left.id != 0 && right.id != 0 && left.id != right.id && left.end != 0 && left.end == right.start
}

/// Nodes of either shard for which this holds.
fn nodes<'a>(
    (left, right): (&'a v1::Shard, &'a v1::Shard),
    of: &'a BTreeSet<u64>,
) -> impl Iterator<Item = u64> + 'a {
    let replicas = left.replicas.iter().chain(&right.replicas);
    replicas.map(|replica| replica.node).filter(|node| of.contains(node))
}

fn gather(
    snapshot: &Snapshot,
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    (left, right): (&v1::Shard, &v1::Shard),
    seen: &Seen,
) -> Next {
    let pair = (left, right);
    let is_open = |step: &v1::OperationMove| !has_ended(step.state());
    if operation.moves.iter().any(is_open) {
        return wait("replicas move to the same nodes");
    }
    if operation.cancelling {
        return cancelled();
    }
    if !are_neighbours(left, right) {
        return failed("they are no neighbours any more");
    }
    let mut steps = operation.moves.iter();
    if let Some(step) = steps.find(|step| step.state() == OperationState::Failed) {
        return failed(step.message.clone());
    }
    if let Some(node) = nodes(pair, &seen.lost).next() {
        return failed(format!("n{node} is lost: what it held is made anew first"));
    }
    if let Some(node) = nodes(pair, &seen.silent).next() {
        return wait(format!("n{node} does not answer"));
    }
    if is_paused(operation) {
        return wait("paused");
    }
    if moves(snapshot, left) || moves(snapshot, right) {
        return wait("it waits until nothing of the shards moves");
    }
    let (moves, withdraw) = (apart(left, right), in_the_way(left, right));
    if !moves.is_empty() || !withdraw.is_empty() {
        return Next::Enter(Entry::Gather { moves, withdraw });
    }
    let pause = match merge.attempts {
        0 => 0,
        attempts => AGAIN_AFTER_MS << attempts.min(ATTEMPTS_MAX),
    };
    match seen.now_ms < merge.freeze_until_ms.saturating_add(pause) {
        true => Next::Wait(operation.message.clone()),
        false => Next::Enter(Entry::Prepare),
    }
}

fn is_voter(replica: &v1::Replica) -> bool {
    replica.role() == v1::ReplicaRole::Voter
}

/// Voters of the right one that are not where the left one's are, and where they go; 0 is nowhere.
pub(super) fn apart(left: &v1::Shard, right: &v1::Shard) -> Vec<(u64, u64)> {
    let on = |shard: &v1::Shard| -> BTreeSet<u64> {
        shard.replicas.iter().filter(|replica| is_voter(replica)).map(|r| r.node).collect()
    };
    let (left, right) = (on(left), on(right));
    let mut from = right.difference(&left).copied();
    let mut to = left.difference(&right).copied();
    let mut moves = Vec::new();
    loop {
        match (from.next(), to.next()) {
            (None, None) => return moves,
            (from, to) => moves.push((from.unwrap_or(0), to.unwrap_or(0))),
        }
    }
}

/// Read replicas of one on nodes where the other has nothing: shard, replica, node. They come again.
fn in_the_way(left: &v1::Shard, right: &v1::Shard) -> Vec<(u64, u64, u64)> {
    let lone = |shard: &v1::Shard, other: &v1::Shard| -> Vec<(u64, u64, u64)> {
        let lone = shard.replicas.iter().filter(|replica| {
            !is_voter(replica) && other.replicas.iter().all(|o| o.node != replica.node)
        });
        lone.map(|replica| (shard.id, replica.id, replica.node)).collect()
    };
    [lone(left, right), lone(right, left)].concat()
}

fn prepare(
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    (left, right): (&v1::Shard, &v1::Shard),
    seen: &Seen,
) -> Next {
    let pair = (left, right);
    let stop = |why: String| Next::Enter(Entry::Cancel { why });
    if operation.cancelling {
        return stop(operation.message.clone());
    }
    if let Some(node) = nodes(pair, &seen.silent).chain(nodes(pair, &seen.lost)).next() {
        return stop(format!("n{node} does not answer"));
    }
    for (shard, epoch, absorbs) in
        [(left, merge.left_epoch, true), (right, merge.right_epoch, false)]
    {
        let Some(group) = seen.shard(shard.id) else {
            return wait(format!("s{} does not answer", shard.id));
        };
        if group.epoch > epoch {
            return stop(format!("the members of s{} have changed", shard.id));
        }
        if group.merging != operation.id {
            let other = if absorbs { merge.right } else { merge.left };
            let order = order(operation, shard.id, ReshapeStep::Prepare, epoch);
            return Next::Ask(Box::new(peer::Reshape { other, absorbs, ..order }));
        }
    }
    let clean = |replica: &v1::Replica| seen.of(replica).is_some_and(|it| it.foreign_free > 0);
    if !left.replicas.iter().all(clean) {
        return wait(format!("s{} drops what earlier splits have left behind", left.id));
    }
    let near = seen.shard(right.id).map_or(0, |group| group.applied_index);
    let near = |replica: &v1::Replica| {
        seen.of(replica).is_some_and(|it| it.applied_index + LAG_MAX >= near)
    };
    if !right.replicas.iter().all(near) {
        return wait(format!("replicas of s{} are behind", right.id));
    }
    match is_paused(operation) {
        true => wait("paused"),
        false => Next::Enter(Entry::Freeze),
    }
}

fn freeze(
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    (left, right): (&v1::Shard, &v1::Shard),
    seen: &Seen,
) -> Next {
    let frozen =
        |replica: &v1::Replica| seen.of(replica).filter(|status| status.frozen_for == operation.id);
    let all: Vec<Option<&v1::GroupStatus>> = right.replicas.iter().map(frozen).collect();
    if operation.cancelling || seen.now_ms >= merge.freeze_until_ms {
        let why = match operation.cancelling {
            true => operation.message.clone(),
            false => format!("s{} was not frozen everywhere within half a second", right.id),
        };
        return Next::Enter(Entry::Cancel { why });
    }
    let passed = |shard: &v1::Shard, epoch| seen.shard(shard.id).is_some_and(|it| it.epoch > epoch);
    // A freeze leaves the epoch as it is: anything else that raised it has ended this.
    if passed(left, merge.left_epoch) || passed(right, merge.right_epoch) {
        return Next::Enter(Entry::Cancel { why: "another controller has ended it".to_owned() });
    }
    if let Some(first) = all.iter().flatten().next() {
        return match all.iter().all(Option::is_some) {
            true => {
                let (frozen_at, epoch) = (first.frozen_at, first.epoch);
                Next::Enter(Entry::Absorb { frozen_at, epoch })
            }
            false => Next::Look,
        };
    }
    let order = order(operation, right.id, ReshapeStep::Freeze, merge.right_epoch);
    Next::Ask(Box::new(order))
}

fn absorb(
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    left: &v1::Shard,
    seen: &Seen,
) -> Next {
    let Some(taken) = &merge.taken else { return wait("it is not known what is taken in") };
    let Some(group) = seen.shard(left.id) else {
        return wait(format!("s{} does not answer", left.id));
    };
    if group.absorbed == operation.id || (group.epoch > merge.left_epoch && group.end == taken.end)
    {
        return Next::Enter(Entry::Taken { epoch: group.epoch });
    }
    let pair = |replica: &v1::Replica| {
        let other = taken.replicas.iter().find(|other| other.node == replica.node)?;
        Some(peer::ReplicaPair { replica: replica.id, other: other.id })
    };
    let order = peer::Reshape {
        other: taken.id,
        replicas: left.replicas.iter().filter_map(pair).collect(),
        descriptor: prost::Message::encode_to_vec(taken).into(),
        frozen_at: merge.frozen_at,
        ..order(operation, left.id, ReshapeStep::Absorb, merge.left_epoch)
    };
    Next::Ask(Box::new(order))
}

fn flush(operation: &v1::ClusterOperation, left: &v1::Shard, seen: &Seen) -> Next {
    let durable = |replica: &&v1::Replica| {
        seen.lost.contains(&replica.node)
            || seen.of(replica).is_some_and(|it| it.absorbed == operation.id && it.absorbed_durable)
    };
    match left.replicas.iter().find(|replica| !durable(replica)) {
        Some(replica) => wait(format!("n{} does not hold all of it durably yet", replica.node)),
        None => Next::Enter(Entry::Flushed),
    }
}

fn end(
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    left: &v1::Shard,
    seen: &Seen,
) -> Next {
    match seen.shard(left.id) {
        None => wait(format!("s{} does not answer", left.id)),
        Some(group) if group.epoch > merge.left_epoch && group.merging != operation.id => {
            Next::Enter(Entry::Ended { epoch: group.epoch })
        }
        Some(_) => {
            Next::Ask(Box::new(order(operation, left.id, ReshapeStep::End, merge.left_epoch)))
        }
    }
}

/// Both epochs rise: no order of before can still be heeded.
fn back(operation: &v1::ClusterOperation, merge: &v1::ShardMerge, seen: &Seen) -> Next {
    let mut epochs = Vec::new();
    for (shard, epoch, step) in [
        (merge.right, merge.right_epoch, ReshapeStep::Thaw),
        (merge.left, merge.left_epoch, ReshapeStep::End),
    ] {
        let Some(group) = seen.shard(shard) else {
            return wait(format!("s{shard} does not answer"));
        };
        let is_free = group.merging != operation.id && group.frozen_for != operation.id;
        if group.epoch <= epoch || !is_free {
            return Next::Ask(Box::new(order(operation, shard, step, group.epoch.max(epoch))));
        }
        epochs.push(group.epoch);
    }
    Next::Enter(Entry::Back { right: epochs[0], left: epochs[1] })
}

#[cfg(test)]
mod tests;

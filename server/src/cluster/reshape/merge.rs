//! A merge, step by step: what happens next to two neighbours that become one, and to what is left of the
//! right one.
//!
//! Owns the decisions, as pure functions. What they make of the records is `enter`'s.
//!
//! How large the right one may be is raft's ([`MERGE_BYTES_MAX`]): both serve nothing for as long as it takes
//! to copy it.

use std::collections::BTreeSet;

use coracle_proto::{peer, v1};
use coracle_raft::group::MERGE_BYTES_MAX;
use peer::ReshapeStep;
use v1::{MergeStep, OperationState};

use super::{
    AGAIN_AFTER_MS, ATTEMPTS_MAX, Entry, FREEZE_MAX_MS, GATHER_MAX_MS, LAG_MAX, Next, Seen,
    attempt, cancelled, failed, find, has_open_moves, is_paused, moves, order, wait,
};
use crate::records::Snapshot;

/// Points that lie between the record of a freeze and the decision, and some more: a test that holds each
/// gives so much more time.
const FREEZE_POINTS: u64 = 6;

/// Decides.
pub(super) fn next(
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
pub(in crate::cluster) fn are_neighbours(left: &v1::Shard, right: &v1::Shard) -> bool {
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

/// A replica of either shard that its node has lost: nobody makes it anew as long as they merge.
fn broken((left, right): (&v1::Shard, &v1::Shard), seen: &Seen) -> Option<String> {
    let mut replicas =
        [left, right].into_iter().flat_map(|it| it.replicas.iter().map(|replica| (it.id, replica)));
    let (shard, lost) = replicas.find(|(_, replica)| seen.is_broken(replica))?;
    Some(format!("n{} has lost its replica of s{shard}", lost.node))
}

fn gather(
    snapshot: &Snapshot,
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    (left, right): (&v1::Shard, &v1::Shard),
    seen: &Seen,
) -> Next {
    let pair = (left, right);
    if has_open_moves(operation) {
        return wait("replicas move to the same nodes");
    }
    if operation.cancelling {
        return cancelled();
    }
    if !are_neighbours(left, right) {
        return failed("they are no neighbours any more");
    }
    if let Some(why) = too_large(right, seen) {
        return failed(why);
    }
    let mut steps = operation.moves.iter();
    if let Some(step) = steps.find(|step| step.state() == OperationState::Failed) {
        return failed(step.message.clone());
    }
    if let Some(node) = nodes(pair, &seen.lost).next() {
        return failed(format!("n{node} is lost: what it held is made anew first"));
    }
    if let Some(why) = broken(pair, seen) {
        return failed(format!("{why}: it is made anew first"));
    }
    if let Some(node) = nodes(pair, &seen.silent).next() {
        return wait(format!("n{node} does not answer"));
    }
    if is_paused(operation) {
        return wait("paused");
    }
    if moves(snapshot, left) || moves(snapshot, right) {
        let since = operation.began_ms.max(merge.freeze_until_ms);
        return match seen.now_ms >= since.saturating_add(GATHER_MAX_MS) {
            true => failed("replicas of the shards have come and gone for an hour"),
            false => wait("it waits until nothing of the shards moves"),
        };
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

pub(super) fn is_voter(replica: &v1::Replica) -> bool {
    replica.role() == v1::ReplicaRole::Voter
}

/// Voters of the right one that are not where the left one's are, and where they go; 0 is nowhere.
pub(in crate::cluster) fn apart(left: &v1::Shard, right: &v1::Shard) -> Vec<(u64, u64)> {
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
    if let Some(why) = broken(pair, seen) {
        return stop(why);
    }
    if seen.now_ms >= merge.freeze_until_ms {
        return stop(format!("they were not ready within ten minutes: {}", operation.message));
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
        if group.merging != attempt(operation) {
            let other = if absorbs { merge.right } else { merge.left };
            let order = order(operation, shard.id, ReshapeStep::Prepare, epoch);
            // What the group compares with its members, as long as nothing is lost yet.
            let own = |replica: &v1::Replica| peer::ReplicaPair { replica: replica.id, other: 0 };
            let replicas = shard.replicas.iter().map(own).collect();
            return Next::Ask(Box::new(peer::Reshape { other, absorbs, replicas, ..order }));
        }
    }
    for shard in [left, right] {
        if let Some(why) = unready(shard, seen) {
            return wait(why);
        }
    }
    if let Some(why) = too_large(right, seen) {
        return stop(why);
    }
    match is_paused(operation) {
        true => wait("paused"),
        false => {
            Next::Enter(Entry::Freeze { for_ms: FREEZE_MAX_MS + FREEZE_POINTS * seen.hold_ms })
        }
    }
}

/// Why a shard can't be frozen, or take another one in, for now. What a replica says of foreign keys counts
/// at the epoch that the others have come to: before, it may be of the time before a split.
fn unready(shard: &v1::Shard, seen: &Seen) -> Option<String> {
    let group = seen.shard(shard.id)?;
    let near = |it: &v1::GroupStatus| {
        it.epoch == group.epoch && it.applied_index + LAG_MAX >= group.applied_index
    };
    let all = |fits: &dyn Fn(&v1::GroupStatus) -> bool| {
        shard.replicas.iter().all(|replica| seen.of(replica).is_some_and(fits))
    };
    if !all(&near) {
        return Some(format!("replicas of s{} are behind", shard.id));
    }
    let clean = |it: &v1::GroupStatus| it.foreign_free > 0;
    let why = || format!("s{} drops what earlier splits have left behind", shard.id);
    (!all(&clean)).then(why)
}

/// Why a shard is not taken in, if its leader says how large it is, and counts no foreign keys.
fn too_large(right: &v1::Shard, seen: &Seen) -> Option<String> {
    let leader = seen.leading(right.id).filter(|leader| leader.foreign_free > 0)?;
    check_size(right.id, leader.state_bytes).err()
}

/// Whether a shard is small enough to be taken in; the error is for whoever asked.
pub(in crate::cluster) fn check_size(right: u64, bytes: u64) -> Result<(), String> {
    if bytes <= MERGE_BYTES_MAX {
        return Ok(());
    }
    Err(format!(
        "s{right} holds {} MiB, and at most {} MiB are taken in at a time: nobody serves them meanwhile. \
         Split it, and merge its parts one after the other",
        bytes >> 20,
        MERGE_BYTES_MAX >> 20
    ))
}

fn freeze(
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    (left, right): (&v1::Shard, &v1::Shard),
    seen: &Seen,
) -> Next {
    let frozen = |replica: &v1::Replica| {
        seen.of(replica).filter(|status| status.frozen_for == attempt(operation))
    };
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
    if group.absorbed == attempt(operation)
        || (group.epoch > merge.left_epoch && group.end == taken.end)
    {
        return Next::Enter(Entry::Taken { epoch: group.epoch });
    }
    if let Some((from, to)) = led_elsewhere(attempt(operation), (left, taken), seen) {
        return Next::HandOver { shard: left.id, from, to };
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

/// Who leads the left one looks at its own node's replica of the right one. Where that is not frozen, or was
/// no good, only another voter can take it in: it is decided, there is no other way on.
fn led_elsewhere(
    merge: u64,
    (left, taken): (&v1::Shard, &v1::Shard),
    seen: &Seen,
) -> Option<(u64, u64)> {
    let from = seen.leader(left.id)?;
    let frozen = |node: u64| {
        let right = taken.replicas.iter().find(|replica| replica.node == node);
        right.and_then(|right| seen.of(right)).map(|right| right.frozen_for == merge)
    };
    if frozen(from) != Some(false) && seen.refused_by != Some(from) {
        return None;
    }
    let runs = |voter: &&v1::Replica| {
        !seen.silent.contains(&voter.node) && seen.of(voter).is_some() && !seen.is_broken(voter)
    };
    let voters = left.replicas.iter().filter(|replica| is_voter(replica)).filter(runs);
    let mut others = voters.map(|voter| voter.node).filter(|node| *node != from);
    others.find(|node| frozen(*node) == Some(true)).map(|to| (from, to))
}

fn flush(operation: &v1::ClusterOperation, left: &v1::Shard, seen: &Seen) -> Next {
    let merge = attempt(operation);
    let durable = |replica: &v1::Replica| {
        seen.of(replica).is_some_and(|it| it.absorbed == merge && it.absorbed_durable)
    };
    let voters: Vec<&v1::Replica> = left.replicas.iter().filter(|it| is_voter(it)).collect();
    let hold = voters.iter().filter(|voter| durable(voter)).count();
    // What is lost or broken is made anew, from the others: only they have to hold it.
    let goes_on = |replica: &v1::Replica| {
        2 * hold > voters.len() && (seen.lost.contains(&replica.node) || seen.is_broken(replica))
    };
    match left.replicas.iter().find(|replica| !durable(replica) && !goes_on(replica)) {
        Some(replica) => wait(format!("n{} does not hold all of it durably yet", replica.node)),
        None => Next::Enter(Entry::Flushed),
    }
}

/// The replica that may need the files of one that leaves: that of the shard which has taken the other in, on
/// the same node.
pub(in crate::cluster) fn needed_by<'a>(
    snapshot: &'a Snapshot,
    leaving: &peer::LeavingReplica,
) -> Option<&'a v1::Replica> {
    let shard = find(snapshot, leaving.taken_by).filter(|_| leaving.taken_by != 0)?;
    shard.replicas.iter().find(|replica| replica.node == leaving.node)
}

/// Whether that one needs them no more, by its own word: it holds durably what this merge, or one after it,
/// has taken in.
pub(in crate::cluster) fn has_taken(
    leaving: &peer::LeavingReplica,
    status: &v1::GroupStatus,
) -> bool {
    status.absorbed >= leaving.merge && status.absorbed_durable
}

/// A merge that is decided only ends forwards.
pub(in crate::cluster) fn is_decided(operation: &v1::ClusterOperation) -> bool {
    use MergeStep::{Absorb, Done, End, Flush};
    let merge = operation.merge.as_ref();
    merge.is_some_and(|merge| matches!(merge.step(), Absorb | Flush | End | Done))
}

fn end(
    operation: &v1::ClusterOperation,
    merge: &v1::ShardMerge,
    left: &v1::Shard,
    seen: &Seen,
) -> Next {
    match seen.shard(left.id) {
        None => wait(format!("s{} does not answer", left.id)),
        Some(group) if group.epoch > merge.left_epoch && group.merging != attempt(operation) => {
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
        let is_free = ![group.merging, group.frozen_for].contains(&attempt(operation));
        if group.epoch <= epoch || !is_free {
            return Next::Ask(Box::new(order(operation, shard, step, group.epoch.max(epoch))));
        }
        epochs.push(group.epoch);
    }
    Next::Enter(Entry::Back { right: epochs[0], left: epochs[1] })
}

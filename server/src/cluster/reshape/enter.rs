//! What splits and merges make of the records: each change by itself, in one write with the map.
//!
//! Owns how they begin, go on in the records, and end. Each entry names what it follows on ([`On`]): one of
//! another controller that was faster makes it void. Does not decide what comes next.

use coracle_proto::{peer, v1};
use v1::{MergeStep, OperationKind, OperationState, SplitStep};

use super::{
    ATTEMPTS_MAX, Entry, On, PREPARE_MAX_MS, are_neighbours, attempt, find, has_open_moves,
    is_decided, is_inside, is_voter, moves,
};
use crate::cluster::operations;
use crate::records::Snapshot;
use crate::records::operations::has_ended;

/// Splits and merges under way. Each asks all replicas of its shards several times a second.
const RESHAPES_MAX: usize = 16;

/// Enters a change. False when it makes no sense any more: another controller was faster.
pub(in crate::cluster) fn enter(
    snapshot: &mut Snapshot,
    id: u64,
    (on, entry): (On, &Entry),
    now_ms: u64,
) -> bool {
    let mut list = std::mem::take(&mut snapshot.operations.list);
    let operation = list
        .iter_mut()
        .find(|known| known.id == id && !has_ended(known.state()) && On::of(known) == on);
    let entered = operation.is_some_and(|operation| enter_one(snapshot, operation, entry, now_ms));
    snapshot.operations.list = list;
    entered
}

fn enter_one(
    snapshot: &mut Snapshot,
    operation: &mut v1::ClusterOperation,
    entry: &Entry,
    now_ms: u64,
) -> bool {
    match entry {
        Entry::End { state, message } => {
            close(operation, *state, message.clone(), now_ms);
            return true;
        }
        Entry::GiveUp { why } => {
            if operation.cancelling || is_decided(operation) {
                return false;
            }
            (operation.cancelling, operation.message) = (true, why.clone());
            return true;
        }
        _ => {}
    }
    match (&operation.split, &operation.merge) {
        (Some(_), _) => enter_split(snapshot, operation, entry, now_ms),
        (None, Some(_)) => enter_merge(snapshot, operation, entry, now_ms),
        (None, None) => false,
    }
}

fn close(
    operation: &mut v1::ClusterOperation,
    state: OperationState,
    message: String,
    now_ms: u64,
) {
    operation.state = state.into();
    operation.ended_ms = now_ms;
    operation.message = message;
}

/// What was tried and did not work is tried again, or ends: cancelled where somebody wants that.
fn tried(operation: &mut v1::ClusterOperation, attempts: u32, why: String, now_ms: u64) {
    if operation.cancelling {
        close(operation, OperationState::Cancelled, operation.message.clone(), now_ms);
    } else if attempts >= ATTEMPTS_MAX {
        close(operation, OperationState::Failed, why, now_ms);
    } else {
        operation.message = why;
    }
}

fn enter_split(
    snapshot: &mut Snapshot,
    operation: &mut v1::ClusterOperation,
    entry: &Entry,
    now_ms: u64,
) -> bool {
    let Some(split) = &mut operation.split else { return false };
    let Some(at) = snapshot.map.shards.iter().position(|shard| shard.id == split.shard) else {
        return false;
    };
    let shard = &snapshot.map.shards[at];
    match (entry, split.step()) {
        (Entry::PlanSplit, SplitStep::Plan | SplitStep::Unspecified) => {
            if moves(snapshot, shard) || !is_inside(shard, split.at) {
                return false;
            }
            (split.epoch, split.child) = (shard.epoch, snapshot.ids.next_shard);
            split.replicas.clear();
            for parent in &shard.replicas {
                split.replicas.push(v1::Replica {
                    id: snapshot.ids.next_replica,
                    node: parent.node,
                    role: parent.role,
                    replaces: parent.id,
                    ..Default::default()
                });
                snapshot.ids.next_replica += 1;
            }
            snapshot.ids.next_shard += 1;
            split.set_step(SplitStep::Split);
            operation.message.clear();
        }
        (Entry::Split { epoch, child_epoch }, SplitStep::Split) => {
            let child = v1::Shard {
                id: split.child,
                start: split.at,
                end: shard.end,
                epoch: *child_epoch,
                replicas: split.replicas.clone(),
                ..Default::default()
            };
            split.set_step(SplitStep::Done);
            if !split.automatic {
                snapshot.operations.asked_for(1);
            }
            let shards = &mut snapshot.map.shards;
            (shards[at].end, shards[at].epoch) = (split.at, *epoch);
            shards.insert(at + 1, child);
            shards[at + 1].replicas.iter_mut().for_each(|replica| replica.replaces = 0);
            close(operation, OperationState::Done, String::new(), now_ms);
        }
        (Entry::SplitAgain { epoch }, SplitStep::Split) => {
            if operation.cancelling {
                // By this operation itself. Else members have changed: the map hears of them first.
                let shard = &mut snapshot.map.shards[at];
                shard.epoch = shard.epoch.max(*epoch);
            }
            split.set_step(SplitStep::Plan);
            split.attempts += 1;
            let attempts = split.attempts;
            tried(operation, attempts, "the shard's members have changed".to_owned(), now_ms);
        }
        _ => return false,
    }
    true
}

fn enter_merge(
    snapshot: &mut Snapshot,
    operation: &mut v1::ClusterOperation,
    entry: &Entry,
    now_ms: u64,
) -> bool {
    let merge_id = attempt(operation);
    let Some(merge) = &mut operation.merge else { return false };
    let place =
        |snapshot: &Snapshot, id: u64| snapshot.map.shards.iter().position(|shard| shard.id == id);
    let (left, right) = (place(snapshot, merge.left), place(snapshot, merge.right));
    let Some(left) = left else { return false };
    match (entry, merge.step(), right) {
        (Entry::Gather { moves, withdraw }, MergeStep::Gather, Some(_)) => {
            return enter_gather(snapshot, operation, moves, withdraw);
        }
        (Entry::Prepare, MergeStep::Gather, Some(right)) => {
            let shards = &snapshot.map.shards;
            (merge.left_epoch, merge.right_epoch) = (shards[left].epoch, shards[right].epoch);
            merge.set_step(MergeStep::Prepare);
            // A new controller finds it passed, as it does in the next step.
            merge.freeze_until_ms = now_ms + PREPARE_MAX_MS;
            operation.message.clear();
        }
        (Entry::Freeze { for_ms }, MergeStep::Prepare, Some(_)) => {
            merge.freeze_until_ms = now_ms + for_ms;
            merge.set_step(MergeStep::Freeze);
        }
        (Entry::Absorb { frozen_at, epoch }, MergeStep::Freeze, Some(right)) => {
            let taken = v1::Shard { epoch: *epoch, ..snapshot.map.shards[right].clone() };
            (merge.frozen_at, merge.taken) = (*frozen_at, Some(taken));
            merge.set_step(MergeStep::Absorb);
        }
        (Entry::Taken { epoch }, MergeStep::Absorb, Some(right)) => {
            let end = snapshot.map.shards[right].end;
            let shards = &mut snapshot.map.shards;
            (shards[left].end, shards[left].epoch) = (end, *epoch);
            shards.remove(right);
            merge.left_epoch = *epoch;
            merge.set_step(MergeStep::Flush);
        }
        (Entry::Flushed, MergeStep::Flush, _) => {
            let taken = merge.taken.clone().unwrap_or_default();
            snapshot.leaving.extend(taken.replicas.iter().map(|replica| peer::LeavingReplica {
                shard: taken.id,
                replica: replica.id,
                node: replica.node,
                taken_by: merge.left,
                merge: merge_id,
            }));
            merge.set_step(MergeStep::End);
        }
        (Entry::Ended { epoch }, MergeStep::End, _) => {
            snapshot.map.shards[left].epoch = *epoch;
            merge.set_step(MergeStep::Done);
            if !merge.automatic {
                snapshot.operations.asked_for(-1);
            }
            close(operation, OperationState::Done, String::new(), now_ms);
        }
        (Entry::Cancel { why }, MergeStep::Prepare | MergeStep::Freeze, Some(_)) => {
            merge.set_step(MergeStep::Cancel);
            operation.message = why.clone();
        }
        (Entry::Back { left: first, right: second }, MergeStep::Cancel, Some(right)) => {
            let shards = &mut snapshot.map.shards;
            shards[left].epoch = shards[left].epoch.max(*first);
            shards[right].epoch = shards[right].epoch.max(*second);
            merge.set_step(MergeStep::Gather);
            merge.freeze_until_ms = now_ms;
            merge.attempts += 1;
            let (attempts, why) = (merge.attempts, operation.message.clone());
            tried(operation, attempts, why, now_ms);
        }
        _ => return false,
    }
    true
}

fn enter_gather(
    snapshot: &mut Snapshot,
    operation: &mut v1::ClusterOperation,
    moves: &[(u64, u64)],
    withdraw: &[(u64, u64, u64)],
) -> bool {
    if has_open_moves(operation) {
        return false;
    }
    let right = operation.merge.as_ref().map_or(0, |merge| merge.right);
    let mut changed = false;
    for (from_node, to_node) in moves.iter().copied() {
        let planned = v1::PlannedMove { shard: right, from_node, to_node, bytes: 0 };
        let Ok(step) = operations::entered(&snapshot.map, &planned) else { continue };
        operation.moves.push(step);
        operation.moves_all += 1;
        changed = true;
    }
    for (shard, replica, node) in withdraw.iter().copied() {
        let known = snapshot.map.shards.iter_mut().find(|known| known.id == shard);
        let Some(known) = known else { continue };
        let before = known.replicas.len();
        known.replicas.retain(|known| known.id != replica || is_voter(known));
        if known.replicas.len() < before {
            let left = peer::LeavingReplica { shard, replica, node, ..Default::default() };
            snapshot.leaving.push(left);
            changed = true;
        }
    }
    changed
}

/// What a split begins with.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::cluster) struct SplitWork {
    pub(in crate::cluster) shard: u64,
    pub(in crate::cluster) at: u64,
    pub(in crate::cluster) by: v1::SplitBy,
    pub(in crate::cluster) automatic: bool,
    pub(in crate::cluster) undoes: u64,
}

/// Enters a new split.
pub(in crate::cluster) fn begin_split(
    snapshot: &mut Snapshot,
    work: SplitWork,
    now_ms: u64,
) -> Result<u64, String> {
    check_free(snapshot, &[work.shard])?;
    let shard = find(snapshot, work.shard);
    let shard = shard.ok_or_else(|| format!("there is no shard s{}", work.shard))?;
    if !is_inside(shard, work.at) {
        return Err(format!("{:016x} is not inside the arc of s{}", work.at, work.shard));
    }
    if snapshot.map.shards.len() > coracle_proto::limits::SHARDS_MAX {
        let most = coracle_proto::limits::SHARDS_MAX;
        return Err(format!("a cluster has at most {most} shards"));
    }
    let split = v1::ShardSplit {
        shard: work.shard,
        at: work.at,
        step: SplitStep::Plan.into(),
        by: work.by.into(),
        automatic: work.automatic,
        ..Default::default()
    };
    Ok(begin(snapshot, OperationKind::Split, now_ms, |operation| {
        (operation.split, operation.undoes) = (Some(split), work.undoes);
    }))
}

/// Enters a new merge.
pub(in crate::cluster) fn begin_merge(
    snapshot: &mut Snapshot,
    (left, right): (u64, u64),
    undoes: u64,
    now_ms: u64,
) -> Result<u64, String> {
    check_free(snapshot, &[left, right])?;
    let boundary = check_merge(snapshot, (left, right))?;
    let step = MergeStep::Gather.into();
    let merge = v1::ShardMerge { left, right, step, boundary, ..Default::default() };
    Ok(begin(snapshot, OperationKind::Merge, now_ms, |operation| {
        (operation.merge, operation.undoes) = (Some(merge), undoes);
    }))
}

/// Notes of a merge whether the cluster began it by itself.
pub(in crate::cluster) fn by_itself(snapshot: &mut Snapshot, id: u64, automatic: bool) -> u64 {
    let begun = snapshot.operations.list.iter_mut().find(|known| known.id == id);
    if let Some(merge) = begun.and_then(|begun| begun.merge.as_mut()) {
        merge.automatic = automatic;
    }
    id
}

/// Where two neighbours meet; the error is for whoever asked.
pub(in crate::cluster) fn check_merge(
    snapshot: &Snapshot,
    (left, right): (u64, u64),
) -> Result<u64, String> {
    let shard = |id: u64| find(snapshot, id).ok_or_else(|| format!("there is no shard s{id}"));
    let (left, right) = (shard(left)?, shard(right)?);
    match are_neighbours(left, right) {
        true => Ok(right.start),
        false => Err(format!(
            "s{} does not begin where s{} ends: only a shard and its right neighbour merge",
            right.id, left.id
        )),
    }
}

pub(in crate::cluster) fn check_free(snapshot: &Snapshot, shards: &[u64]) -> Result<(), String> {
    for shard in shards {
        if *shard == 0 {
            return Err("the meta group has no arc".to_owned());
        }
        if snapshot.operations.is_busy(*shard) {
            return Err(format!("another operation is under way on s{shard}"));
        }
    }
    let reshapes = |known: &&v1::ClusterOperation| known.split.is_some() || known.merge.is_some();
    match snapshot.operations.active().filter(reshapes).count() < RESHAPES_MAX {
        true => Ok(()),
        false => Err(format!("{RESHAPES_MAX} splits and merges are under way already")),
    }
}

fn begin(
    snapshot: &mut Snapshot,
    kind: OperationKind,
    now_ms: u64,
    with: impl FnOnce(&mut v1::ClusterOperation),
) -> u64 {
    let id = snapshot.operations.last_id + 1;
    let (kind, state) = (kind.into(), OperationState::Running.into());
    let mut operation =
        v1::ClusterOperation { id, kind, state, began_ms: now_ms, ..Default::default() };
    with(&mut operation);
    snapshot.operations.last_id = id;
    snapshot.operations.list.push(operation);
    id
}

/// Begins what takes a split or a merge back: the one is the other's reverse.
pub(in crate::cluster) fn begin_undo(
    snapshot: &mut Snapshot,
    done: &v1::ClusterOperation,
    now_ms: u64,
) -> Result<u64, String> {
    if done.state() != OperationState::Done {
        return Err(format!("operation {} changed nothing", done.id));
    }
    if let Some(split) = &done.split {
        let pair = (split.shard, split.child);
        let begun = begin_merge(snapshot, pair, done.id, now_ms)?;
        return Ok(by_itself(snapshot, begun, split.automatic));
    }
    let merge = done.merge.as_ref().ok_or("it was neither a split nor a merge")?;
    let work = SplitWork {
        shard: merge.left,
        at: merge.boundary,
        automatic: merge.automatic,
        undoes: done.id,
        ..SplitWork::default()
    };
    begin_split(snapshot, work, now_ms)
}

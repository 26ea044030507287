//! Operations: work on replicas that goes on by itself, whoever leads the meta group.
//!
//! Owns what the records of operations make of the map, and the map of them: which move begins, which is
//! done, which is given up, when an operation ends. Pure functions of the records: they stand in one
//! batch with the map, so that a controller that dies leaves nothing that the next one does not see.
//! Does not touch a group (see `super::replicas`) and does not plan (see `super::balance`).
//!
//! A move *begins* by entering a joining replica that will vote, and names the voter whose place it
//! takes; it is *done* when the map, which copies what the group says, has the new voter and not the old
//! one. A replica that vanishes from the map before it votes was given up by `super::replicas`: the move
//! begins again, a few times.

use std::collections::{BTreeMap, BTreeSet};

use coracle_proto::{peer, v1};
use v1::{NodeState, OperationKind, OperationState};

use crate::records::operations::{has_ended, is_active};
use crate::records::{Operations, Snapshot};

/// Operations under way: each that moves replicas by a plan has the cluster to itself, the others are
/// few. Beyond it: `CONFLICT`.
const ACTIVE_MAX: usize = 4;
/// So many more that mend: one for each node that is lost or leaves.
const MENDING_MAX: usize = 16;
/// Moves of one operation, and as many transfers; the records keep all operations in one value. What a plan has beyond it, the
/// next plan has again.
pub(super) const MOVES_MAX: usize = 2_048;
/// How often a move is begun before it is given up.
const ATTEMPTS_MAX: u32 = 3;
/// Moves to one node at a time: each is a snapshot that it takes in.
const MOVES_TO_A_NODE: usize = 2;

/// What an operation is begun with.
#[derive(Debug, Clone, Default)]
pub(super) struct Work {
    pub(super) kind: OperationKind,
    pub(super) node: u64,
    pub(super) undoes: u64,
    /// How often the same has failed, one after the other.
    pub(super) failures: u32,
    pub(super) moves: Vec<v1::PlannedMove>,
    pub(super) transfers: Vec<v1::PlannedTransfer>,
}

/// Moves replicas by a plan of the whole cluster: two such plans would undo each other.
fn has_the_cluster(kind: OperationKind) -> bool {
    matches!(kind, OperationKind::Rebalance | OperationKind::Balance | OperationKind::Undo)
}

/// Mends what is broken, or must be: goes before all that is only better.
fn mends(kind: OperationKind) -> bool {
    matches!(kind, OperationKind::Repair | OperationKind::Decommission)
}

/// Enters a new operation; the error is for whoever asked for it. What mends takes shards from
/// operations that have not begun to move them, and leaves alone those that are being moved; anything
/// else is refused where another operation moves the same.
pub(super) fn begin(snapshot: &mut Snapshot, work: Work, now_ms: u64) -> Result<u64, String> {
    let operations = &snapshot.operations;
    let active: Vec<&v1::ClusterOperation> = operations.active().collect();
    let reshapes = |other: &v1::ClusterOperation| other.split.is_some() || other.merge.is_some();
    let active: Vec<_> = active.into_iter().filter(|other| !reshapes(other)).collect();
    let other =
        active.iter().find(|other| has_the_cluster(work.kind) || has_the_cluster(other.kind()));
    let mends = mends(work.kind);
    if let Some(other) = other.filter(|_| !mends) {
        return Err(format!("operation {} is under way: wait for it, or cancel it", other.id));
    }
    let limit = ACTIVE_MAX + usize::from(mends) * MENDING_MAX;
    if active.len() >= limit {
        return Err(format!("{limit} operations are under way already"));
    }
    if mends {
        give_way(&mut snapshot.operations, &work.moves);
    }
    let operations = &snapshot.operations;
    let mut moves = Vec::new();
    for planned in &work.moves {
        if operations.is_busy(planned.shard) {
            if mends {
                continue;
            }
            return Err(format!("another operation moves s{} already", planned.shard));
        }
        moves.push(entered(&snapshot.map, planned)?);
        if moves.len() == MOVES_MAX {
            break;
        }
    }
    let id = operations.last_id + 1;
    let operations = &mut snapshot.operations;
    operations.last_id = id;
    operations.list.push(v1::ClusterOperation {
        id,
        kind: work.kind.into(),
        state: OperationState::Running.into(),
        moves_all: moves.len() as u32,
        moves,
        transfers: work.transfers.into_iter().take(MOVES_MAX).collect(),
        began_ms: now_ms,
        node: work.node,
        undoes: work.undoes,
        failures: work.failures,
        ..Default::default()
    });
    Ok(id)
}

/// Ends what others would do, and have not begun, to shards that are to be mended.
fn give_way(operations: &mut Operations, moves: &[v1::PlannedMove]) {
    let others =
        operations.list.iter_mut().filter(|known| is_active(known) && !mends(known.kind()));
    for step in others.flat_map(|operation| &mut operation.moves) {
        let taken = moves.iter().any(|planned| planned.shard == step.shard);
        if taken && step.state() == OperationState::Pending {
            step.state = OperationState::Cancelled.into();
            step.message = "its shard is mended first".to_owned();
        }
    }
}

/// Gives an operation that goes on until its node is empty more to do. False when there is nothing.
pub(super) fn extend(snapshot: &mut Snapshot, id: u64, moves: &[v1::PlannedMove]) -> bool {
    give_way(&mut snapshot.operations, moves);
    let new: Vec<v1::OperationMove> = moves
        .iter()
        .filter(|planned| !snapshot.operations.is_busy(planned.shard))
        .filter_map(|planned| entered(&snapshot.map, planned).ok())
        .take(MOVES_MAX)
        .collect();
    let operation = snapshot.operations.list.iter_mut().find(|operation| operation.id == id);
    let Some(operation) = operation.filter(|_| !new.is_empty()) else {
        return false;
    };
    // What ended is counted; kept, it would grow with every round.
    operation.moves.retain(|step| !has_ended(step.state()));
    operation.moves_all = operation.moves_done + (operation.moves.len() + new.len()) as u32;
    operation.moves.extend(new);
    operation.message.clear();
    true
}

/// A planned move as an operation keeps it: with the replica that goes.
pub(super) fn entered(
    map: &v1::ShardMap,
    planned: &v1::PlannedMove,
) -> Result<v1::OperationMove, String> {
    let shard = map.shards.iter().find(|shard| shard.id == planned.shard);
    let shard = shard.ok_or_else(|| format!("there is no shard s{}", planned.shard))?;
    let from = match planned.from_node {
        0 => 0,
        node => {
            let voter = shard
                .replicas
                .iter()
                .find(|replica| replica.node == node && replica.role() == v1::ReplicaRole::Voter);
            let voter = voter.ok_or_else(|| format!("no voter of s{} is on n{node}", shard.id))?;
            voter.id
        }
    };
    if planned.from_node == 0 && planned.to_node == 0 {
        return Err(format!("a move of s{} has neither end", shard.id));
    }
    Ok(v1::OperationMove {
        shard: shard.id,
        from_replica: from,
        from_node: planned.from_node,
        to_node: planned.to_node,
        bytes: planned.bytes,
        state: OperationState::Pending.into(),
        ..Default::default()
    })
}

/// Takes operations as far as the map says they are, and begins what has room, though nothing towards
/// nodes that are given up. True when anything changed.
pub(super) fn advance(snapshot: &mut Snapshot, given_up: &BTreeSet<u64>, now_ms: u64) -> bool {
    // Most of the time there is nothing: it is looked at several times a second.
    if snapshot.operations.active().next().is_none() {
        return false;
    }
    let before = (snapshot.operations.clone(), snapshot.ids);
    let mut list = std::mem::take(&mut snapshot.operations.list);
    let mut map_changed = false;
    for operation in list.iter_mut().filter(|operation| is_active(operation)) {
        map_changed |= follow(snapshot, operation);
    }
    snapshot.operations.list = list;
    start_moves(snapshot, given_up);
    let mut list = std::mem::take(&mut snapshot.operations.list);
    for operation in list.iter_mut().filter(|operation| is_active(operation)) {
        end(snapshot, operation, now_ms);
    }
    snapshot.operations.list = list;
    snapshot.operations.forget_old();
    map_changed || before != (snapshot.operations.clone(), snapshot.ids)
}

/// What has become of the moves that were begun. True when the map was changed.
fn follow(snapshot: &mut Snapshot, operation: &mut v1::ClusterOperation) -> bool {
    let (cancelling, mut map_changed) = (operation.cancelling, false);
    for step in &mut operation.moves {
        match step.state() {
            OperationState::Pending if cancelling => {
                step.state = OperationState::Cancelled.into();
            }
            OperationState::Running => {
                if cancelling {
                    map_changed |= take_back(snapshot, step);
                }
                map_changed |= follow_one(snapshot, step, cancelling);
            }
            _ => continue,
        }
        if step.state() == OperationState::Done {
            operation.moves_done += 1;
        }
    }
    map_changed
}

/// A replica that does not vote yet leaves, one that was to go stays. Should the group have let it vote
/// meanwhile, the map will hear of it, and it stays. True when there was anything to take back.
fn take_back(snapshot: &mut Snapshot, step: &v1::OperationMove) -> bool {
    let Snapshot { map, leaving, .. } = snapshot;
    let Some(shard) = map.shards.iter_mut().find(|shard| shard.id == step.shard) else {
        return false;
    };
    let comes = |replica: &v1::Replica| replica.id == step.to_replica && replica.joining;
    let left = shard.replicas.iter().filter(|replica| comes(replica)).map(|replica| {
        let (shard, replica, node) = (step.shard, replica.id, replica.node);
        peer::LeavingReplica { shard, replica, node, ..Default::default() }
    });
    let before = leaving.len();
    leaving.extend(left);
    shard.replicas.retain(|replica| !comes(replica));
    let goes = shard.replicas.iter_mut().find(|replica| replica.id == step.from_replica);
    let stays = goes.filter(|replica| replica.goes).map(|replica| replica.goes = false);
    leaving.len() > before || stays.is_some()
}

/// True when the map was changed.
fn follow_one(snapshot: &mut Snapshot, step: &mut v1::OperationMove, cancelling: bool) -> bool {
    let shard = snapshot.map.shards.iter().find(|shard| shard.id == step.shard);
    let find = |id: u64| shard.and_then(|shard| shard.replicas.iter().find(|r| r.id == id));
    let comes = find(step.to_replica).filter(|_| step.to_node != 0);
    let goes = find(step.from_replica).filter(|_| step.from_replica != 0);
    let came = step.to_node == 0
        || comes.is_some_and(|comes| comes.role() == v1::ReplicaRole::Voter && !comes.joining);
    let lost = step.to_node != 0 && comes.is_none();
    let (state, message) = match (came, goes) {
        (true, None) => (OperationState::Done, String::new()),
        _ if cancelling && (lost || step.to_node == 0) => {
            (OperationState::Cancelled, String::new())
        }
        // A group's only voter can't go before another votes.
        (true, Some(goes)) if !goes.goes && step.to_node != 0 => {
            let goes = goes.id;
            let shards = snapshot.map.shards.iter_mut().filter(|shard| shard.id == step.shard);
            let mut replicas = shards.flat_map(|shard| &mut shard.replicas);
            replicas.find(|r| r.id == goes).into_iter().for_each(|replica| replica.goes = true);
            return true;
        }
        _ if lost && step.attempts >= ATTEMPTS_MAX => {
            let why = format!("n{} did not take it in {ATTEMPTS_MAX} tries", step.to_node);
            (OperationState::Failed, why)
        }
        _ if lost => {
            step.to_replica = 0;
            let why = format!("n{} did not take it: it is tried again", step.to_node);
            (OperationState::Pending, why)
        }
        (false, None) if step.from_replica != 0 => {
            take_back(snapshot, step);
            let why = format!("the voter on n{} went by itself", step.from_node);
            (OperationState::Failed, why)
        }
        _ => return false,
    };
    step.state = state.into();
    step.message = message;
    false
}

/// Begins moves as far as there is room: what mends goes first, then the older operation.
fn start_moves(snapshot: &mut Snapshot, given_up: &BTreeSet<u64>) {
    let mut room = (snapshot.operations.moves_at_a_time() as usize)
        .saturating_sub(snapshot.operations.running().count());
    let mut taking: BTreeMap<u64, usize> = BTreeMap::new();
    let mut moving: Vec<u64> = Vec::new();
    for step in snapshot.operations.running() {
        *taking.entry(step.to_node).or_default() += 1;
        moving.push(step.shard);
    }
    let mut list = std::mem::take(&mut snapshot.operations.list);
    let mut running: Vec<_> =
        list.iter_mut().filter(|known| known.state() == OperationState::Running).collect();
    running.sort_by_key(|operation| !mends(operation.kind()));
    for step in running.into_iter().flat_map(|operation| &mut operation.moves) {
        if room == 0 {
            break;
        }
        let taken = taking.entry(step.to_node).or_default();
        let full = step.to_node != 0 && *taken >= MOVES_TO_A_NODE;
        // One move of a shard after the other: its voters change one at a time.
        if step.state() != OperationState::Pending || full || moving.contains(&step.shard) {
            continue;
        }
        match start_one(snapshot, step, given_up) {
            Ok(true) => {
                (room, *taken) = (room - 1, *taken + 1);
                moving.push(step.shard);
                step.state = OperationState::Running.into();
            }
            Ok(false) => moving.push(step.shard),
            Err(why) => {
                step.message = why;
                step.state = OperationState::Failed.into();
            }
        }
    }
    snapshot.operations.list = list;
}

/// Enters what begins a move. False when it has to wait; the error says why it never can.
fn start_one(
    snapshot: &mut Snapshot,
    step: &mut v1::OperationMove,
    given_up: &BTreeSet<u64>,
) -> Result<bool, String> {
    if given_up.contains(&step.to_node) {
        return Err(format!("n{} does not answer", step.to_node));
    }
    let leaves = |leaving: &peer::LeavingReplica| {
        leaving.shard == step.shard && leaving.node == step.to_node
    };
    let node_is_there = snapshot.map.nodes.iter().any(|node| {
        node.id == step.to_node
            && matches!(node.state(), NodeState::Active | NodeState::Unspecified)
    });
    let leaves_there = snapshot.leaving.iter().any(leaves);
    let shard = snapshot.map.shards.iter_mut().find(|shard| shard.id == step.shard);
    let shard = shard.ok_or_else(|| format!("there is no shard s{} any more", step.shard))?;
    if step.from_replica != 0 && shard.replicas.iter().all(|r| r.id != step.from_replica) {
        return Err(format!("the replica on n{} is gone already", step.from_node));
    }
    let changes = |replica: &v1::Replica| replica.becomes_voter || replica.goes;
    if shard.forming || shard.replicas.iter().any(changes) || leaves_there {
        return Ok(false);
    }
    if step.to_node == 0 {
        let goes = shard.replicas.iter_mut().find(|replica| replica.id == step.from_replica);
        goes.ok_or("the replica is gone already")?.goes = true;
    } else {
        if !node_is_there {
            return Err(format!("n{} takes no replicas", step.to_node));
        }
        let here = shard.replicas.iter_mut().find(|replica| replica.node == step.to_node);
        let id = here.as_ref().map_or(snapshot.ids.next_replica, |replica| replica.id);
        let comes = v1::Replica {
            id,
            node: step.to_node,
            role: v1::ReplicaRole::Learner.into(),
            joining: true,
            becomes_voter: true,
            replaces: step.from_replica,
            goes: false,
        };
        match here {
            // A read replica holds all that it takes: it is raised, and another read replica may come.
            Some(replica) if replica.role() == v1::ReplicaRole::Learner && !replica.joining => {
                *replica = comes;
            }
            Some(_) => {
                let (node, shard) = (step.to_node, step.shard);
                return Err(format!("n{node} holds a replica of s{shard} already"));
            }
            None => {
                shard.replicas.push(comes);
                snapshot.ids.next_replica += 1;
            }
        }
        step.to_replica = id;
    }
    step.attempts += 1;
    step.message.clear();
    Ok(true)
}

/// Ends what has nothing left to do.
fn end(snapshot: &mut Snapshot, operation: &mut v1::ClusterOperation, now_ms: u64) {
    // Splits and merges end by themselves (`super::reshape`).
    let reshapes = operation.split.is_some() || operation.merge.is_some();
    if reshapes || operation.moves.iter().any(|step| !has_ended(step.state())) {
        return;
    }
    let failed = operation.moves.iter().filter(|step| step.state() == OperationState::Failed);
    let failed: Vec<&str> = failed.map(|step| step.message.as_str()).collect();
    let state = if operation.cancelling {
        OperationState::Cancelled
    } else if operation.kind() == OperationKind::Decommission {
        if !is_empty(snapshot, operation.node) {
            return;
        }
        let node = snapshot.map.nodes.iter_mut().find(|node| node.id == operation.node);
        if let Some(node) = node.filter(|node| node.state() == NodeState::Decommissioning) {
            node.state = NodeState::Decommissioned.into();
        }
        OperationState::Done
    } else if !failed.is_empty() {
        operation.message = format!("{} moves failed: {}", failed.len(), failed[0]);
        OperationState::Failed
    } else if !operation.transfers.is_empty() {
        return;
    } else {
        OperationState::Done
    };
    operation.transfers.clear();
    operation.state = state.into();
    operation.ended_ms = now_ms;
}

/// Whether a node holds nothing, and nothing of it is left to remove.
pub(super) fn is_empty(snapshot: &Snapshot, node: u64) -> bool {
    let holds = snapshot.map.shards.iter().flat_map(|shard| &shard.replicas);
    let mut holds = holds.filter(|replica| replica.node == node);
    holds.next().is_none() && snapshot.leaving.iter().all(|leaving| leaving.node != node)
}

/// The leaderships that are to move next: of operations whose replicas have moved.
pub(super) fn due_transfers(snapshot: &Snapshot) -> Vec<v1::PlannedTransfer> {
    let operations = snapshot.operations.active().filter(|operation| {
        operation.state() == OperationState::Running
            && operation.moves.iter().all(|step| has_ended(step.state()))
    });
    operations.flat_map(|operation| operation.transfers.iter().copied()).collect()
}

/// These have moved, or were given up. False when no operation names them.
pub(super) fn forget_transfers(snapshot: &mut Snapshot, over: &[v1::PlannedTransfer]) -> bool {
    let before = snapshot.operations.clone();
    for operation in &mut snapshot.operations.list {
        operation.transfers.retain(|transfer| !over.contains(transfer));
    }
    before != snapshot.operations
}

/// The moves that take back what an operation did, the last first.
pub(super) fn reversed(operation: &v1::ClusterOperation) -> Work {
    let done = operation.moves.iter().filter(|step| step.state() == OperationState::Done);
    let moves = done.rev().map(|step| v1::PlannedMove {
        shard: step.shard,
        from_node: step.to_node,
        to_node: step.from_node,
        bytes: step.bytes,
    });
    Work {
        kind: OperationKind::Undo,
        undoes: operation.id,
        moves: moves.collect(),
        ..Work::default()
    }
}

#[cfg(test)]
mod tests;

//! What the cluster does of its own accord: it empties nodes that leave or are lost, makes voters that
//! lack, and with automatic balancing spreads replicas.
//!
//! Owns the planner's view of the records and of what is known beside them (`knowledge`), and the rules by
//! which operations begin by themselves. The choice of moves is `placement`'s, what becomes of them
//! `operations`'.

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_proto::shard_map::{Epoch, NodeId, ReplicaId, ShardId};
use coracle_proto::v1;
use tokio::time::Instant;
use v1::{NodeState, OperationKind, OperationState};

use super::knowledge::Knowledge;
use super::operations::{self, Work};
use crate::placement;
use crate::placement::model::{
    Duty, Goal, NodeView, Plan, Seat, Settings, ShardView, Stall, View, WEIGHT_ONE,
};
use crate::records::operations::{has_ended, is_active};
use crate::records::{Operations, Snapshot};

/// Before what failed is tried again; doubled each time...
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// ...up to this.
const AGAIN_MAX: Duration = Duration::from_secs(600);
/// Leaders alone move for load no more often: loads are told by half a minute's past.
const LEADERS_EVERY: Duration = Duration::from_secs(30);
/// What is enough free room on a disk however large it is...
const FREE_ENOUGH: u64 = 8 << 30;
/// ...if it is so many times the largest shard: rewriting takes as much, and a snapshot that comes in.
const FREE_SHARDS: u64 = 2;

/// The records as the planner sees them. A voter that its node has lost is none. `raised`: read replicas
/// that are there may become voters, and so stand in no voter's way.
pub(super) fn view(snapshot: &Snapshot, known: &Knowledge, now: Instant, raised: bool) -> View {
    let nodes = snapshot.map.nodes.iter().map(|node| NodeView {
        id: NodeId(node.id),
        zone: node.zone.clone(),
        weight: weight(node.weight),
        duty: known.duty(node, &snapshot.operations, now),
        disk: known.disks.get(&node.id).copied(),
    });
    let shards = snapshot.map.shards.iter().filter(|shard| !shard.forming).map(|shard| {
        let (voters, others): (Vec<&v1::Replica>, Vec<&v1::Replica>) =
            shard.replicas.iter().partition(|replica| is_voter(replica));
        let seat =
            |voter: &v1::Replica| Seat { replica: ReplicaId(voter.id), node: NodeId(voter.node) };
        let stays = |voter: &&v1::Replica| !voter.goes && !known.is_lost(voter.id, now);
        let stands = |replica: &&v1::Replica| !raised || replica.joining;
        ShardView {
            id: ShardId(shard.id),
            voters: voters.into_iter().filter(stays).map(seat).collect(),
            learners: {
                let avoided = known.avoided_places.iter().filter(|(id, _)| *id == shard.id);
                let avoided = avoided.map(|(_, node)| *node);
                let others = others.into_iter().filter(stands).map(|replica| replica.node);
                others.chain(avoided).map(NodeId).collect()
            },
            leader: known.leaders.get(&shard.id).copied().map(NodeId),
            bytes: known.bytes.get(&shard.id).copied().unwrap_or(0),
            load: known.load(shard.id),
        }
    });
    let (nodes, shards) = (nodes.collect(), shards.collect());
    View { epoch: Epoch(snapshot.map.epoch), nodes, shards }
}

/// A weight as it is recorded.
pub(super) fn weight(recorded: u32) -> u16 {
    match recorded {
        0 => WEIGHT_ONE,
        weight => u16::try_from(weight).unwrap_or(u16::MAX),
    }
}

fn is_voter(replica: &v1::Replica) -> bool {
    replica.role() == v1::ReplicaRole::Voter
}

pub(super) fn settings(snapshot: &Snapshot, known: &Knowledge, goal: Goal) -> Settings {
    let largest = known.bytes.values().copied().max().unwrap_or(0);
    Settings {
        replicas: match snapshot.map.replicas {
            0 => Settings::default().replicas,
            count => count as usize,
        },
        goal,
        fill_max: snapshot.operations.disk_fill_max(),
        free_enough: FREE_ENOUGH.max(largest.saturating_mul(FREE_SHARDS)),
        moves_at_a_time: snapshot.operations.moves_at_a_time() as usize,
        ..Settings::default()
    }
}

/// A plan, by the records and what is known.
pub(super) fn planned(snapshot: &Snapshot, known: &Knowledge, goal: Goal, now: Instant) -> Plan {
    let settings = settings(snapshot, known, goal);
    let made = plan_within(&view(snapshot, known, now, false), &settings, threshold(snapshot));
    let is_short = |plan: &Plan| {
        let short =
            |stall: &Stall| matches!(stall, Stall::TooFewNodes { .. } | Stall::NotEmptied { .. });
        plan.stalls.iter().filter(|stall| short(stall)).count()
    };
    // Where voters find no place, read replicas are raised.
    if goal == Goal::Balance || is_short(&made) == 0 {
        return made;
    }
    let raised = placement::plan(&view(snapshot, known, now, true), &settings);
    match is_short(&raised) < is_short(&made) || raised.copies() > made.copies() {
        true => raised,
        false => made,
    }
}

fn threshold(snapshot: &Snapshot) -> u64 {
    u64::from(snapshot.operations.threshold)
}

/// What would move for balance if disks had room, and what they lack.
fn held_up(view: &View, settings: &Settings, made: &Plan) -> Option<Stall> {
    let largest = view.shards.iter().map(|shard| shard.bytes).max().unwrap_or(0);
    let is_tight = |node: &&NodeView| {
        let disk = node.disk.filter(|_| node.duty == Duty::Serves);
        disk.is_some_and(|disk| disk.used.saturating_add(largest) > settings.limit(disk))
    };
    let tight: Vec<&NodeView> = view.nodes.iter().filter(is_tight).collect();
    let is_said = made.stalls.iter().any(|stall| matches!(stall, Stall::DisksFull { .. }));
    if settings.goal == Goal::Repair || tight.is_empty() || is_said {
        return None;
    }
    let mut roomy = view.clone();
    roomy.nodes.iter_mut().for_each(|node| node.disk = None);
    let wanted = placement::plan(&roomy, settings).copies();
    let full = |node: &NodeView| {
        let disk = node.disk?;
        let part = u128::from(disk.used) * 1_000 / u128::from(disk.capacity.max(1));
        Some((node.id, u64::try_from(part).unwrap_or(u64::MAX)))
    };
    (wanted > made.copies()).then(|| Stall::DisksFull {
        shards: wanted - made.copies(),
        fill_max: settings.fill_max,
        nodes: tight.into_iter().filter_map(full).collect(),
    })
}

/// A plan that leaves alone what is even within a threshold, in thousandths of a node's share: then only
/// what must move does.
pub(super) fn plan_within(view: &View, settings: &Settings, threshold: u64) -> Plan {
    let mut made = placement::plan(view, settings);
    made.stalls.extend(held_up(view, settings, &made));
    let most = made.before.replicas.max(made.before.bytes);
    if settings.goal == Goal::Repair || threshold == 0 || most > 1_000 + threshold {
        return made;
    }
    placement::plan(view, &Settings { goal: Goal::Repair, ..settings.clone() })
}

pub(super) fn moves_of(plan: &Plan) -> Vec<v1::PlannedMove> {
    let moves = plan.moves().map(|change| v1::PlannedMove {
        shard: change.shard.0,
        from_node: change.from.map_or(0, |seat| seat.node.0),
        to_node: change.to.map_or(0, |node| node.0),
        bytes: change.bytes,
    });
    moves.collect()
}

pub(super) fn transfers_of(plan: &Plan) -> Vec<v1::PlannedTransfer> {
    let transfers = plan.transfers().map(|transfer| v1::PlannedTransfer {
        shard: transfer.shard.0,
        from_node: transfer.from.0,
        to_node: transfer.to.0,
    });
    transfers.collect()
}

/// A plan as people see it.
pub(super) fn told(snapshot: &Snapshot, view: &View, plan: &Plan) -> v1::RebalancePlan {
    let mut nodes: BTreeMap<u64, v1::PlannedNode> = BTreeMap::new();
    for node in &view.nodes {
        nodes.insert(node.id.0, v1::PlannedNode { node: node.id.0, ..Default::default() });
    }
    for shard in &view.shards {
        for voter in &shard.voters {
            let node = nodes.entry(voter.node.0).or_default();
            node.replicas_before += 1;
            node.bytes_before += shard.bytes;
        }
        if let Some(leader) = shard.leader {
            let node = nodes.entry(leader.0).or_default();
            node.leaders_before += 1;
            node.load_before += shard.load;
        }
        let Some(placed) = plan.wanted.get(&shard.id) else { continue };
        for voter in &placed.voters {
            let node = nodes.entry(voter.0).or_default();
            node.replicas_after += 1;
            node.bytes_after += shard.bytes;
        }
        if let Some(leader) = placed.leader {
            let node = nodes.entry(leader.0).or_default();
            node.leaders_after += 1;
            node.load_after += shard.load;
        }
    }
    v1::RebalancePlan {
        cluster_id: snapshot.map.cluster_id.clone(),
        epoch: snapshot.map.epoch,
        bytes: plan.bytes,
        moves: moves_of(plan),
        transfers: transfers_of(plan),
        nodes: nodes.into_values().collect(),
        moves_min: plan.lower_bound as u32,
        estimate_ms: u64::try_from(plan.estimate.as_millis()).unwrap_or(u64::MAX),
        stalled: plan.stalls.iter().map(ToString::to_string).collect(),
    }
}

/// What the records shall have by themselves: work of nodes that go, of voters that lack, of balance.
/// True when anything changed.
pub(super) fn act(snapshot: &mut Snapshot, known: &Knowledge, now: Instant, now_ms: u64) -> bool {
    let mut changed = false;
    let leaving: Vec<(u64, OperationKind)> = snapshot
        .map
        .nodes
        .iter()
        .filter_map(|node| match node.state() {
            NodeState::Decommissioning => Some((node.id, OperationKind::Decommission)),
            _ if known.lost(node, &snapshot.operations, now) => {
                Some((node.id, OperationKind::Repair))
            }
            _ => None,
        })
        .collect();
    let holds = |snapshot: &Snapshot, node: u64| {
        let voters = snapshot.map.shards.iter().flat_map(|shard| &shard.replicas);
        let mut voters = voters.filter(|replica| is_voter(replica));
        voters.any(|voter| voter.node == node)
    };
    for (node, kind) in leaving {
        if kind == OperationKind::Decommission || holds(snapshot, node) {
            changed |= work_on_node(snapshot, known, (node, kind), now, now_ms);
        }
    }
    changed |= fill_up(snapshot, known, now, now_ms);
    let is_idle = snapshot.operations.active().next().is_none();
    if is_idle && !snapshot.operations.manual && known.has_settled(&snapshot.map, now) {
        changed |= balance(snapshot, known, now, now_ms);
    }
    changed
}

/// Voters that their nodes have lost go, and come anew under fresh ids, as those do that lack.
fn fill_up(snapshot: &mut Snapshot, known: &Knowledge, now: Instant, now_ms: u64) -> bool {
    let filling = |operation: &v1::ClusterOperation| {
        operation.kind() == OperationKind::Repair && operation.node == 0
    };
    let Some(failures) = may_begin(&snapshot.operations, OperationKind::Repair, 0, now_ms) else {
        return false;
    };
    if snapshot.operations.active().any(filling) {
        return false;
    }
    let mut moves = lost_voters(snapshot, known, now);
    let wanted = settings(snapshot, known, Goal::Repair).voters();
    let voters = |shard: &v1::Shard| {
        let stays =
            |voter: &&v1::Replica| is_voter(voter) && !voter.goes && !known.is_lost(voter.id, now);
        shard.replicas.iter().filter(stays).count()
    };
    let mut shards = snapshot.map.shards.iter();
    if moves.is_empty() && !shards.any(|shard| !shard.forming && voters(shard) < wanted) {
        return false;
    }
    let goes: Vec<u64> = moves.iter().map(|step| step.shard).collect();
    let lost_here = |shard: u64| {
        let shard = snapshot.map.shards.iter().find(|known| known.id == shard);
        let voters = shard.into_iter().flat_map(|shard| &shard.replicas);
        voters.into_iter().any(|voter| is_voter(voter) && known.is_lost(voter.id, now))
    };
    let fills = moves_of(&planned(snapshot, known, Goal::Repair, now));
    let fills = fills.into_iter().filter(|step| {
        let is_free = step.from_node == 0 && !snapshot.operations.is_moving(step.shard);
        // One that its node has lost counts still, until it goes.
        is_free && (goes.contains(&step.shard) || !lost_here(step.shard))
    });
    moves.extend(fills.collect::<Vec<_>>());
    let kind = OperationKind::Repair;
    begin(snapshot, Work { kind, moves, failures, ..Work::default() }, now_ms)
}

/// Voters that nodes have lost, which are up themselves, and that their groups can do without.
fn lost_voters(snapshot: &Snapshot, known: &Knowledge, now: Instant) -> Vec<v1::PlannedMove> {
    if known.damaged.is_empty() {
        return Vec::new();
    }
    let one = |shard: &v1::Shard| {
        let voters: Vec<&v1::Replica> =
            shard.replicas.iter().filter(|replica| is_voter(replica)).collect();
        let well = |voter: &&&v1::Replica| {
            !known.damaged.contains_key(&voter.id) && !known.silent.contains_key(&voter.node)
        };
        let well = voters.iter().filter(well).count();
        let lost = voters.iter().find(|voter| known.is_lost(voter.id, now))?;
        let is_free = !shard.forming
            && !snapshot.operations.is_moving(shard.id)
            && voters.iter().all(|voter| !voter.goes);
        // A majority now, and of those that stay.
        (is_free && 2 * well > voters.len()).then_some(v1::PlannedMove {
            shard: shard.id,
            from_node: lost.node,
            to_node: 0,
            bytes: 0,
        })
    };
    snapshot.map.shards.iter().filter_map(one).collect()
}

/// Replicas and leaders by the balancer's own plan; leaders alone only for load, and not too often.
fn balance(snapshot: &mut Snapshot, known: &Knowledge, now: Instant, now_ms: u64) -> bool {
    let kind = OperationKind::Balance;
    let Some(failures) = may_begin(&snapshot.operations, kind, 0, now_ms) else {
        return false;
    };
    let plan = planned(snapshot, known, Goal::Balance, now);
    let (moves, transfers) = (moves_of(&plan), transfers_of(&plan));
    if moves.is_empty() {
        let load: u64 = snapshot.map.shards.iter().map(|shard| known.load(shard.id)).sum();
        let is_busy = load > settings(snapshot, known, Goal::Balance).load_gap;
        let last = snapshot.operations.list.iter().rev().find(|known| known.kind() == kind);
        let every = u64::try_from(LEADERS_EVERY.as_millis()).unwrap_or(u64::MAX);
        let is_early = last.is_some_and(|last| now_ms < last.ended_ms.saturating_add(every));
        if transfers.is_empty() || !is_busy || is_early {
            return false;
        }
        // Of those before it nothing can be undone: they would only push others out.
        snapshot
            .operations
            .list
            .retain(|known| known.kind() != kind || known.moves_all > 0 || is_active(known));
    }
    begin(snapshot, Work { kind, moves, transfers, failures, ..Work::default() }, now_ms)
}

/// How often the same has failed before, where it was long enough ago; `None`: it is to wait.
fn may_begin(operations: &Operations, kind: OperationKind, node: u64, now_ms: u64) -> Option<u32> {
    let same = |known: &&v1::ClusterOperation| {
        known.kind() == kind && known.node == node && !is_active(known)
    };
    let last = operations.list.iter().rev().find(same);
    let Some(failed) = last.filter(|last| last.state() == OperationState::Failed) else {
        return Some(0);
    };
    let wait = AGAIN_AFTER.saturating_mul(1 << failed.failures.min(16)).min(AGAIN_MAX);
    let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    (now_ms >= failed.ended_ms.saturating_add(wait)).then(|| failed.failures.saturating_add(1))
}

/// Begins it. One that is tried again takes the place of the one that failed.
fn begin(snapshot: &mut Snapshot, work: Work, now_ms: u64) -> bool {
    let (kind, node, failures) = (work.kind, work.node, work.failures);
    if work.moves.is_empty() && work.transfers.is_empty() {
        return false;
    }
    match operations::begin(snapshot, work, now_ms) {
        Ok(id) => {
            let is_older = |known: &v1::ClusterOperation| {
                known.id != id
                    && (known.kind(), known.node) == (kind, node)
                    && known.state() == OperationState::Failed
            };
            snapshot.operations.list.retain(|known| failures == 0 || !is_older(known));
            true
        }
        Err(why) => {
            tracing::debug!(?kind, node, why, "nothing begins by itself");
            false
        }
    }
}

/// Sees to it that an operation empties a node, and has something to do. True when anything changed.
fn work_on_node(
    snapshot: &mut Snapshot,
    known: &Knowledge,
    (node, kind): (u64, OperationKind),
    now: Instant,
    now_ms: u64,
) -> bool {
    let its = |operation: &&v1::ClusterOperation| {
        operation.node == node && operation.kind() == kind && !operation.cancelling
    };
    let active = snapshot.operations.active().find(its).map(|operation| {
        let steps = operation.moves.iter();
        let open = steps.filter(|step| !has_ended(step.state()));
        (operation.id, open.count())
    });
    if active.is_some_and(|(_, open)| open > 0) {
        return false;
    }
    let Some(failures) = may_begin(&snapshot.operations, kind, node, now_ms) else {
        return false;
    };
    let plan = planned(snapshot, known, Goal::Repair, now);
    let moves = moves_of(&plan);
    let its: Vec<_> = moves
        .into_iter()
        .filter(|step| step.from_node == node && !snapshot.operations.is_moving(step.shard))
        .collect();
    let Some((id, _)) = active else {
        let work = Work { kind, node, moves: its, failures, ..Work::default() };
        return match kind {
            // Goes on until its node is empty, and waits where nothing can be moved yet.
            OperationKind::Decommission => operations::begin(snapshot, work, now_ms).is_ok(),
            _ => begin(snapshot, work, now_ms),
        };
    };
    if operations::extend(snapshot, id, &its) {
        return true;
    }
    let stalled: Vec<String> = plan.stalls.iter().map(ToString::to_string).collect();
    let message = stalled.join("; ");
    let mut list = snapshot.operations.list.iter_mut();
    let operation = list.find(|known| known.id == id && known.message != message);
    operation.map(|operation| operation.message = message).is_some()
}

/// What the balancer does, as people see it.
pub(super) fn balancing(snapshot: &Snapshot, known: &Knowledge, now: Instant) -> v1::Balancing {
    let operations = &snapshot.operations;
    let mut reasons = Vec::new();
    let active: Vec<_> = operations.active().collect();
    let state = if !active.is_empty() {
        let messages = active.iter().map(|operation| &operation.message);
        reasons.extend(messages.filter(|message| !message.is_empty()).cloned());
        let paused = active.iter().any(|known| known.state() == OperationState::Paused);
        if paused {
            reasons.push("an operation is paused".to_owned());
        }
        let moving = active.iter().flat_map(|operation| &operation.moves);
        let moving = moving.into_iter().any(|step| step.state() == OperationState::Running);
        match moving || reasons.is_empty() {
            true => v1::BalancerState::InProgress,
            false => v1::BalancerState::Stalled,
        }
    } else if operations.manual {
        v1::BalancerState::Off
    } else if !known.has_settled(&snapshot.map, now) {
        reasons.extend(known.missed(&snapshot.map).map(|node| format!("n{node} is not heard")));
        let lost = known.damaged.len();
        if lost > 0 {
            reasons.push(format!("{lost} replicas are damaged: they are replaced first"));
        }
        v1::BalancerState::Starting
    } else {
        let plan = planned(snapshot, known, Goal::Balance, now);
        reasons.extend(known.unsplit.values().cloned());
        reasons.extend(plan.stalls.iter().map(ToString::to_string));
        match reasons.is_empty() {
            true => v1::BalancerState::Ready,
            false => v1::BalancerState::Stalled,
        }
    };
    v1::Balancing {
        state: state.into(),
        reasons,
        automatic: !operations.manual,
        moves_at_a_time: operations.moves_at_a_time(),
        down_after_ms: operations.down_after_ms(),
        disk_fill_max: operations.disk_fill_max(),
        threshold: operations.threshold,
        split_bytes: operations.split_bytes(),
        split_load: operations.split_load(),
    }
}

#[cfg(test)]
mod tests;

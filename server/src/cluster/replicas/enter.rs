//! What is entered into the records for replicas: what a plan wants, and what has been done.
//!
//! Owns the changes of the records. Each can be made again, and none undoes what another controller has
//! recorded meanwhile. Does not ask anybody.

use std::collections::{BTreeMap, BTreeSet};

use coracle_proto::limits::REPLICAS_MAX;
use coracle_proto::shard_map::{META_SHARD, NodeId, ReadReplicas, ReplicaId, ShardId};
use coracle_proto::{peer, v1};
use tokio::time::Instant;

use super::patience::Avoided;
use crate::placement::learners::{Holder, LearnerPlan, Placed, plan};
use crate::records::Snapshot;

/// Replicas that are joining at a time, in the whole cluster: each takes a snapshot from a leader,
/// beside what clients ask of it.
const JOINING_MAX: usize = 4;

/// A change of the records. Each says what shall be, and can be made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Settle {
        shard: u64,
        replica: u64,
    },
    Epoch {
        shard: u64,
        epoch: u64,
    },
    /// Who votes, as a majority of the group has confirmed at this epoch.
    Voters {
        shard: u64,
        epoch: u64,
        voters: Vec<(u64, u64)>,
    },
    /// A stray is in no record: a command that came late brought it into its group.
    Withdraw {
        shard: u64,
        replica: u64,
        node: u64,
        stray: bool,
    },
    Forget {
        replica: u64,
    },
}

/// What a plan goes by, beside the records.
#[derive(Debug, Clone, Default)]
pub(super) struct Outlook {
    /// Nodes that are not heard, and since when: nothing is asked of them.
    pub(super) silent: BTreeMap<u64, Instant>,
    /// Where none comes for now.
    pub(super) avoided: Avoided,
    /// Replicas that are joining and take nothing of anybody.
    pub(super) stalled: BTreeSet<u64>,
}

pub(super) fn is_voter(replica: &v1::Replica) -> bool {
    replica.role() == v1::ReplicaRole::Voter
}

/// Members come and go once a shard stands.
pub(super) fn is_tended(shard: &v1::Shard) -> bool {
    !shard.forming
}

/// Read replicas are of shards that hold keys.
fn has_read_replicas(shard: &v1::Shard) -> bool {
    shard.id != META_SHARD.0 && is_tended(shard)
}

/// Neither votes nor shall.
fn is_read_replica(replica: &v1::Replica) -> bool {
    !is_voter(replica) && !replica.becomes_voter
}

/// What the records lack, and have too much, by their own setting.
pub(super) fn planned(snapshot: &Snapshot, outlook: &Outlook) -> LearnerPlan {
    let map = &snapshot.map;
    let nodes = map.nodes.iter().filter(|node| {
        !matches!(
            node.state(),
            v1::NodeState::Gone | v1::NodeState::Decommissioning | v1::NodeState::Decommissioned
        )
    });
    let holders = nodes.map(|node| Holder {
        node: NodeId(node.id),
        zone: node.zone.clone(),
        takes: node.state() == v1::NodeState::Active
            && !outlook.silent.contains_key(&node.id)
            && !outlook.avoided.nodes.contains(&node.id),
    });
    let stays = |shard: &&v1::Shard| !snapshot.operations.will_be_reshaped(shard.id);
    let shards = map.shards.iter().filter(|shard| has_read_replicas(shard)).filter(stays);
    let placed = shards.map(|shard| Placed {
        shard: ShardId(shard.id),
        voters: {
            let voters = shard.replicas.iter().filter(|replica| !is_read_replica(replica));
            voters.map(|replica| NodeId(replica.node)).collect()
        },
        learners: shard
            .replicas
            .iter()
            .filter(|replica| is_read_replica(replica))
            .map(|replica| (ReplicaId(replica.id), NodeId(replica.node)))
            .collect(),
        avoided: {
            let places = outlook.avoided.places.iter().filter(|(id, _)| *id == shard.id);
            places.map(|(_, node)| NodeId(*node)).collect()
        },
    });
    let rules = map
        .read_replicas
        .iter()
        .map(|rule| ReadReplicas { zone: rule.zone.clone(), learners: rule.learners });
    let (holders, placed): (Vec<_>, Vec<_>) = (holders.collect(), placed.collect());
    plan(&holders, &placed, &rules.collect::<Vec<_>>())
}

/// Enters the next part of what is planned. False when there is nothing to enter.
pub(super) fn enter_plan(snapshot: &mut Snapshot, outlook: &Outlook) -> bool {
    let learners =
        |map: &v1::ShardMap| map.shards.iter().flat_map(|s| &s.replicas).any(is_read_replica);
    if snapshot.map.read_replicas.is_empty() && !learners(&snapshot.map) {
        return false;
    }
    let plan = planned(snapshot, outlook);
    let mut changed = false;
    for (shard, replica, node) in plan.remove {
        let (shard, replica, node) = (shard.0, replica.0, node.0);
        changed |= enter(snapshot, &Change::Withdraw { shard, replica, node, stray: false });
    }
    let shards = &mut snapshot.map.shards;
    // Those that wait for a silent node, or do not move, take nothing of anybody: others may come
    // meanwhile.
    let joining = shards.iter().flat_map(|shard| &shard.replicas).filter(|replica| {
        replica.joining
            && !outlook.silent.contains_key(&replica.node)
            && !outlook.stalled.contains(&replica.id)
    });
    let joining = joining.count();
    let mut room = JOINING_MAX.saturating_sub(joining);
    for (shard, node) in plan.add {
        let leaves = snapshot
            .leaving
            .iter()
            .any(|leaving| leaving.shard == shard.0 && leaving.node == node.0);
        let Some(entry) = shards.iter_mut().find(|entry| entry.id == shard.0) else { continue };
        let full = entry.replicas.len() >= REPLICAS_MAX;
        if room == 0 || leaves || full || entry.replicas.iter().any(|r| r.node == node.0) {
            continue;
        }
        entry.replicas.push(v1::Replica {
            id: snapshot.ids.next_replica,
            node: node.0,
            role: v1::ReplicaRole::Learner.into(),
            joining: true,
            ..Default::default()
        });
        snapshot.ids.next_replica += 1;
        room -= 1;
        changed = true;
    }
    changed
}

/// Enters a change. False when it stands already, or makes no sense any more.
pub(super) fn enter(snapshot: &mut Snapshot, change: &Change) -> bool {
    let Snapshot { map, ids, leaving, operations, .. } = snapshot;
    if let Change::Epoch { shard, .. } | Change::Voters { shard, .. } = change
        && operations.is_reshaped(*shard)
    {
        // Decided upon before it was: an epoch without its arc would send everybody to a wrong place.
        return false;
    }
    match *change {
        Change::Settle { shard, replica } => find(map, shard).is_some_and(|shard| {
            let mut replicas = shard.replicas.iter_mut();
            let joining = replicas.find(|known| known.id == replica && known.joining);
            joining.map(|replica| replica.joining = false).is_some()
        }),
        Change::Epoch { shard, epoch } => find(map, shard).is_some_and(|shard| {
            let newer = epoch > shard.epoch;
            if newer {
                shard.epoch = epoch;
            }
            newer
        }),
        Change::Voters { shard, epoch, ref voters } => {
            find(map, shard).is_some_and(|shard| enter_voters(shard, leaving, epoch, voters))
        }
        Change::Withdraw { shard, replica, node, stray } => {
            // One that was recorded as leaving meanwhile, or votes by now; an id that was never given.
            if leaving.iter().any(|known| known.replica == replica) || replica >= ids.next_replica {
                return false;
            }
            if let Some(entry) = find(map, shard) {
                let known = entry.replicas.iter().find(|known| known.id == replica);
                if known.is_some_and(|known| stray || is_voter(known))
                    || (known.is_none() && !stray)
                {
                    return false;
                }
                entry.replicas.retain(|known| known.id != replica);
                if entry.leader_node == node {
                    entry.leader_node = 0;
                }
            }
            let left = peer::LeavingReplica { shard, replica, node, ..Default::default() };
            leaving.push(left);
            true
        }
        Change::Forget { replica } => {
            let before = leaving.len();
            leaving.retain(|known| known.replica != replica);
            leaving.len() < before
        }
    }
}

/// The map takes over who votes. Those who did and do so no more are left to be removed. False when it
/// says so already, or the group has changed since.
fn enter_voters(
    shard: &mut v1::Shard,
    leaving: &mut Vec<peer::LeavingReplica>,
    epoch: u64,
    voters: &[(u64, u64)],
) -> bool {
    let known: BTreeSet<(u64, u64)> =
        shard.replicas.iter().filter(|r| is_voter(r)).map(|r| (r.id, r.node)).collect();
    if epoch < shard.epoch || known == voters.iter().copied().collect() {
        return false;
    }
    shard.epoch = epoch;
    let votes = |replica: &v1::Replica| voters.contains(&(replica.id, replica.node));
    for gone in shard.replicas.iter().filter(|replica| is_voter(replica) && !votes(replica)) {
        leaving.push(peer::LeavingReplica {
            shard: shard.id,
            replica: gone.id,
            node: gone.node,
            ..Default::default()
        });
        if shard.leader_node == gone.node {
            shard.leader_node = 0;
        }
    }
    shard.replicas.retain(|replica| !is_voter(replica) || votes(replica));
    for (id, node) in voters {
        // One that was given up while its group let it vote stays after all.
        leaving.retain(|leaving| leaving.replica != *id);
        if shard.replicas.iter().any(|replica| replica.id == *id && is_voter(replica)) {
            continue;
        }
        shard.replicas.retain(|replica| replica.id != *id);
        let role = v1::ReplicaRole::Voter.into();
        shard.replicas.push(v1::Replica { id: *id, node: *node, role, ..Default::default() });
    }
    shard.replicas.sort_by_key(|replica| replica.id);
    true
}

fn find(map: &mut v1::ShardMap, id: u64) -> Option<&mut v1::Shard> {
    map.shards.iter_mut().find(|shard| shard.id == id)
}

pub(super) fn told(plan: &LearnerPlan) -> v1::SetReadReplicasResponse {
    let made = plan.add.iter().map(|(shard, node)| v1::ReplicaChange {
        shard: shard.0,
        node: node.0,
        replica: 0,
    });
    let removed = plan.remove.iter().map(|(shard, replica, node)| v1::ReplicaChange {
        shard: shard.0,
        node: node.0,
        replica: replica.0,
    });
    v1::SetReadReplicasResponse {
        made: made.collect(),
        removed: removed.collect(),
        warnings: plan.short.iter().map(ToString::to_string).collect(),
    }
}

#[cfg(test)]
mod tests;

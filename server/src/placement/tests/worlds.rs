//! Random clusters, one per seed.

use coracle_proto::shard_map::ReplicaId;
use coracle_storage::fs::faulty::Dice;

use super::super::model::{Disk, Goal, Seat};
use super::*;

/// The seeds to run: one, when the environment names it.
pub(super) fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("CORACLE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..count).collect(),
    }
}

pub(super) fn node(id: u64, zone: &str) -> NodeView {
    NodeView {
        id: NodeId(id),
        zone: zone.to_owned(),
        weight: WEIGHT_ONE,
        duty: Duty::Serves,
        disk: None,
    }
}

/// A shard whose replica ids say where they are: 1007 is shard 1's on n7. Its first voter leads it.
pub(super) fn shard(id: u64, voters: &[u64]) -> ShardView {
    let seat =
        |node: &u64| Seat { replica: ReplicaId(1_000 * (id + 1) + node), node: NodeId(*node) };
    ShardView {
        id: ShardId(id),
        voters: voters.iter().map(seat).collect(),
        learners: Vec::new(),
        leader: voters.first().copied().map(NodeId),
        bytes: 1 << 20,
        load: 0,
    }
}

pub(super) fn view(nodes: Vec<NodeView>, shards: Vec<ShardView>) -> View {
    View { epoch: Epoch(41), nodes, shards }
}

/// A cluster in which everything that a plan knows of may be.
pub(super) fn world(seed: u64) -> (View, Settings) {
    let mut dice = Dice::new(seed);
    let count = 1 + dice.below(12);
    let zones = 1 + dice.below(5);
    let (weighted, troubled, disks) = (dice.one_in(3), dice.one_in(2), dice.one_in(4));
    let mut nodes = Vec::new();
    for id in 1..=count {
        let mut made = node(id, &format!("z{}", dice.below(zones)));
        if weighted {
            made.weight = [0, 333, 500, 1_000, 1_500, 4_000][dice.below(6) as usize];
        }
        if troubled {
            let duties = [Duty::Keeps, Duty::Absent, Duty::Leaves, Duty::Leaves, Duty::Lost];
            made.duty = *duties.get(dice.below(15) as usize).unwrap_or(&Duty::Serves);
        }
        nodes.push(made);
    }
    let replicas = 1 + dice.below(5);
    let (sized, loaded, learners) = (dice.one_in(2), dice.one_in(3), dice.one_in(5));
    let shards = (0..1 + dice.below(24)).map(|id| {
        // Sometimes one that is not in the list any more.
        let mut free: Vec<u64> = (1..=count + u64::from(dice.one_in(9))).collect();
        let mut voters = Vec::new();
        while !free.is_empty() && (voters.len() as u64) < replicas {
            voters.push(free.remove(dice.below(free.len() as u64) as usize));
        }
        match dice.below(12) {
            0 => voters.truncate(1),
            1 => drop(voters.pop()),
            2 => voters.extend(free.pop()),
            _ => {}
        }
        let mut made = shard(id, &voters);
        made.leader = made.leader.filter(|_| !dice.one_in(6));
        made.bytes = if sized { dice.below(300) } else { 64 };
        made.load = if loaded { dice.below(400) } else { 0 };
        if learners && !free.is_empty() {
            made.learners.push(NodeId(free[0]));
        }
        made
    });
    let shards: Vec<ShardView> = shards.collect();
    for node in nodes.iter_mut().filter(|_| disks) {
        let here = |shard: &&ShardView| shard.voters.iter().any(|seat| seat.node == node.id);
        let held: u64 = shards.iter().filter(here).map(|shard| shard.bytes).sum();
        let used = held + dice.below(500);
        // From overfull to room for all.
        let capacity = used * 10 / (1 + dice.below(10));
        node.disk = (!dice.one_in(3)).then_some(Disk { capacity, used });
    }
    let settings = Settings {
        replicas: replicas as usize,
        goal: if dice.one_in(5) { Goal::Repair } else { Goal::Balance },
        leader_zones: if dice.one_in(4) { vec!["z0".to_owned()] } else { Vec::new() },
        bytes_gap: if dice.one_in(2) { 100 } else { 1 << 30 },
        bytes_per_second: 64,
        ..Settings::default()
    };
    (view(nodes, shards), settings)
}

//! Records as tests begin with them: shards on the first three nodes, all of them active, and nothing under
//! way. Owns no test.

use coracle_proto::{peer, v1};

use crate::records::{Operations, Snapshot};

pub(super) fn voter(id: u64, node: u64) -> v1::Replica {
    v1::Replica { id, node, role: v1::ReplicaRole::Voter.into(), ..Default::default() }
}

/// On n1 to n3; the replica on n2 of s5 is 52.
pub(super) fn shard(id: u64) -> v1::Shard {
    let replicas = (1..=3).map(|node| voter(id * 10 + node, node)).collect();
    v1::Shard { id, epoch: 1, replicas, ..Default::default() }
}

fn node(id: u64) -> v1::Node {
    v1::Node { id, state: v1::NodeState::Active.into(), ..Default::default() }
}

/// The next replica is 1000.
pub(super) fn records(shards: impl Iterator<Item = v1::Shard>, nodes: u64) -> Snapshot {
    Snapshot {
        map: v1::ShardMap {
            cluster_id: "c".to_owned(),
            epoch: 1,
            shards: shards.collect(),
            nodes: (1..=nodes).map(node).collect(),
            ..Default::default()
        },
        ids: peer::IdCounters { next_replica: 1_000, ..Default::default() },
        leaving: Vec::new(),
        operations: Operations::default(),
        version: 1,
    }
}

//! Equal index, equal state: replicas of a group that have applied the same have the same to show.
//! Owns the comparison at the end of a run, when everybody has caught up.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::shard_map::{KeyspaceId, ShardMap};
use coracle_raft::group::Group;
use coracle_raft::types::Position;
use coracle_storage::state::ArcFilter;
use tokio::time::Instant;

use crate::cluster::sim::Cluster;

/// One look may take so long: it reads everything.
const LOOK: Duration = Duration::from_secs(5);

/// A replica's state in one number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Digest {
    at: Position,
    clock: u64,
    hash: u64,
}

/// Waits until all replicas of all groups show one state; says what did not come to agree in time.
pub async fn check(cluster: &Cluster, within: Duration) -> Vec<String> {
    let deadline = Instant::now() + within;
    loop {
        let different = differences(cluster).await;
        // Different states at one index will not become equal; different indexes may.
        let is_final = different.iter().any(|(is_final, _)| *is_final);
        if different.is_empty() || is_final || Instant::now() >= deadline {
            return different.into_iter().map(|(_, why)| why).collect();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn differences(cluster: &Cluster) -> Vec<(bool, String)> {
    let mut groups: Vec<(usize, Arc<Group>)> = Vec::new();
    for node in 0..cluster.len() {
        let host = cluster.node(node).and_then(|node| node.host());
        groups.extend(host.iter().flat_map(|host| host.groups()).map(|group| (node, group)));
    }
    groups.sort_by_key(|(node, group)| (group.shard(), *node));
    let Some(map) = (0..cluster.len()).find_map(|at| cluster.node(at)?.map()) else {
        return vec![(false, "no node has a map".to_owned())];
    };
    let mut different = Vec::new();
    for replicas in groups.chunk_by(|(_, one), (_, other)| one.shard() == other.shard()) {
        let shard = replicas[0].1.shard();
        let mut digests: Vec<(usize, Digest)> = Vec::new();
        for (node, group) in replicas {
            match digest(group, map.clone()).await {
                Ok(digest) => digests.push((*node, digest)),
                Err(why) => different.push((false, format!("{shard} on n{}: {why}", node + 1))),
            }
        }
        for pair in digests.windows(2) {
            let ((left, one), (right, other)) = (pair[0], pair[1]);
            if one != other {
                let (left, right) = (left + 1, right + 1);
                let why = format!("{shard}: n{left} shows {one:?}, n{right} shows {other:?}");
                different.push((one.at == other.at, format!("equal index, equal state: {why}")));
            }
        }
    }
    different
}

/// Of what belongs to the group: what a split has left behind goes sooner here than there.
async fn digest(group: &Group, map: Arc<ShardMap>) -> Result<Digest, String> {
    let look = move |state: &coracle_raft::state_machine::ReadState| {
        let held = state.descriptor.clone();
        let owns: ArcFilter = Arc::new(move |keyspace, key| {
            let position = match map.keyspace_by_id(KeyspaceId(keyspace)) {
                Some(keyspace) => map.position_of(keyspace, key).0,
                None => 0,
            };
            held.as_ref().is_some_and(|held| held.owns(keyspace, position))
        });
        let hash = state.reader.state_hash(Some(&owns), state.clock);
        hash.map(|hash| Digest { at: state.position, clock: state.clock, hash })
    };
    let read = group.read_local(0, Instant::now() + LOOK, look).await;
    read.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
}

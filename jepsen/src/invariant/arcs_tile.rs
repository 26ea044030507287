//! The arcs of all groups, as their own leaders have them, tile the ring. Owns the look at the end of a
//! run: while a shard splits, its leader may be an entry behind the new one's.

use coracle_raft::leadership::Standing;

use crate::cluster::sim::Cluster;

/// What is wrong; nothing when they tile.
pub fn check(cluster: &Cluster) -> Option<String> {
    let mut arcs = Vec::new();
    for node in 0..cluster.len() {
        let host = cluster.node(node).and_then(|node| node.host());
        for group in host.iter().flat_map(|host| host.groups()) {
            let arc = group.descriptor().and_then(|held| held.arc);
            if group.status().state == Standing::Leader {
                arcs.extend(arc.map(|arc| (arc, group.shard())));
            }
        }
    }
    arcs.sort_unstable();
    let mut next = 0;
    let tiles = arcs.iter().enumerate().all(|(at, ((start, end), _))| {
        let fits = *start == next && (*end != 0 || at + 1 == arcs.len());
        next = *end;
        fits
    });
    (!tiles || next != 0 || arcs.is_empty()).then(|| format!("the arcs tile the ring: {arcs:?}"))
}

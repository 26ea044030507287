//! Where the first replicas of a new cluster go: a pure function of its nodes.
//!
//! Owns the choice only. Zones are spread first, then replicas, then leaders; ties go by node id, so
//! that the same nodes give the same cluster.

pub mod learners;

use std::collections::BTreeMap;

use coracle_proto::shard_map::NodeId;

/// A node that can take replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub node: NodeId,
    /// Its failure domain.
    pub zone: String,
}

/// For each shard the nodes that hold it; the first of each forms the group, and so leads it first.
///
/// Every shard gets `min(replicas, nodes)` distinct nodes, in as many zones as there are; no node
/// holds more than one replica above another, where zones allow it.
pub fn place(candidates: &[Candidate], shards: usize, replicas: usize) -> Vec<Vec<NodeId>> {
    assert!(!candidates.is_empty(), "a cluster has at least one node");
    let mut held: BTreeMap<NodeId, usize> = candidates.iter().map(|c| (c.node, 0)).collect();
    let mut led = held.clone();
    let count = replicas.min(candidates.len());
    (0..shards)
        .map(|_| {
            let mut chosen: Vec<&Candidate> = Vec::with_capacity(count);
            while chosen.len() < count {
                let in_zone = |zone: &str| chosen.iter().filter(|c| c.zone == zone).count();
                let best = candidates
                    .iter()
                    .filter(|candidate| chosen.iter().all(|c| c.node != candidate.node))
                    .min_by_key(|c| (in_zone(&c.zone), held[&c.node], c.node))
                    .expect("fewer are chosen than there are");
                chosen.push(best);
            }
            chosen.sort_by_key(|c| (led[&c.node], c.node));
            for candidate in &chosen {
                *held.entry(candidate.node).or_default() += 1;
            }
            *led.entry(chosen[0].node).or_default() += 1;
            chosen.into_iter().map(|c| c.node).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn nodes(zones: &[&str]) -> Vec<Candidate> {
        let candidate = |(n, zone): (usize, &&str)| Candidate {
            node: NodeId(n as u64 + 1),
            zone: (*zone).to_owned(),
        };
        zones.iter().enumerate().map(candidate).collect()
    }

    #[test]
    fn replicas_of_a_shard_stand_on_distinct_nodes_in_distinct_zones() {
        let candidates = nodes(&["a", "b", "c", "a", "b"]);
        for shard in place(&candidates, 16, 3) {
            let zones: BTreeSet<&str> =
                shard.iter().map(|node| candidates[node.0 as usize - 1].zone.as_str()).collect();
            assert_eq!((shard.len(), zones.len()), (3, 3));
        }
    }

    #[test]
    fn leaders_and_replicas_are_balanced_within_a_zone_and_over_equal_nodes() {
        let placed = place(&nodes(&["a", "b", "c"]), 17, 3);
        let mut led = BTreeMap::<NodeId, usize>::new();
        placed.iter().for_each(|shard| *led.entry(shard[0]).or_default() += 1);
        assert_eq!(led.values().max(), Some(&6));
        assert_eq!(led.values().min(), Some(&5));
        let placed = place(&nodes(&["a"; 4]), 16, 3);
        let mut held = BTreeMap::<NodeId, usize>::new();
        placed.iter().flatten().for_each(|node| *held.entry(*node).or_default() += 1);
        assert!(held.values().all(|count| *count == 12), "{held:?}");
    }

    #[test]
    fn fewer_nodes_than_replicas_give_fewer_replicas() {
        assert!(place(&nodes(&["a", "a"]), 4, 3).iter().all(|shard| shard.len() == 2));
        assert!(place(&nodes(&["a"]), 4, 3).iter().all(|shard| shard.len() == 1));
    }
}

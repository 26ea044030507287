//! Two maps of one epoch are one map, and a running node's map never gets older. Owns what was seen of
//! each epoch, and each node's newest.

use std::collections::BTreeMap;

use coracle_proto::shard_map::ShardMap;

/// See the module.
#[derive(Default)]
pub(super) struct MapsAgree {
    /// By epoch.
    maps: BTreeMap<u64, String>,
    /// By machine and start.
    epochs: BTreeMap<(usize, u64), u64>,
}

impl MapsAgree {
    /// Looks at what a node knows; says what is wrong.
    pub(super) fn look(&mut self, node: usize, boot: u64, map: &ShardMap) -> Option<String> {
        let epoch = map.epoch().0;
        // Leaders are hints: everybody has others.
        let arcs: Vec<_> = map.shards().iter().map(|one| (one.id, one.arc, one.epoch)).collect();
        let shown = format!("{arcs:?}");
        let before = self.epochs.insert((node, boot), epoch).unwrap_or(0);
        if epoch < before {
            return Some(format!(
                "a node's map gets no older: n{} had {before}, has {epoch}",
                node + 1
            ));
        }
        let known = self.maps.entry(epoch).or_insert_with(|| shown.clone());
        (*known != shown).then(|| {
            format!("maps of epoch {epoch} are one map: {known}, and {shown} on n{}", node + 1)
        })
    }
}

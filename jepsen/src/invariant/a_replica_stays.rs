//! A replica's number names one replica of one shard on one machine, for ever. Owns where each was seen
//! first.

use std::collections::BTreeMap;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct AReplicaStays {
    /// By replica: shard and machine.
    places: BTreeMap<u64, (u64, usize)>,
}

impl Invariant for AReplicaStays {
    fn sentence(&self) -> &'static str {
        "a replica's number is never used for another"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let here = (look.shard, look.node);
        let (shard, node) = *self.places.entry(look.replica).or_insert(here);
        ((shard, node) != here).then(|| {
            let (replica, now) = (look.replica, look.node + 1);
            format!("replica {replica} was of shard {shard} on n{}, and is on n{now}", node + 1)
        })
    }
}

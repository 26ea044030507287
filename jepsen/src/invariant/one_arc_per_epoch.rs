//! At one epoch, a shard is one arc: all its replicas say the same. Owns what was said first.

use std::collections::BTreeMap;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct OneArcPerEpoch {
    /// By shard and epoch.
    arcs: BTreeMap<(u64, u64), Option<(u64, u64)>>,
}

impl Invariant for OneArcPerEpoch {
    fn sentence(&self) -> &'static str {
        "at one epoch, a shard is one arc"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let held = look.descriptor.as_ref()?;
        if held.shard != look.shard {
            return Some(format!("replica {} says that it is shard {}", look.replica, held.shard));
        }
        let known = *self.arcs.entry((look.shard, held.epoch)).or_insert(held.arc);
        (known != held.arc).then(|| {
            let (node, epoch, arc) = (look.node + 1, held.epoch, held.arc);
            format!("at epoch {epoch} it is {known:?}, and {arc:?} on n{node}")
        })
    }
}

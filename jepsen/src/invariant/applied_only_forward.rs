//! While a process runs, what its replicas have applied, and the clock of that, only grow. Owns the last
//! look at each.

use std::collections::BTreeMap;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct AppliedOnlyForward {
    /// By replica and start of its machine: index and clock.
    seen: BTreeMap<(u64, u64), (u64, u64)>,
}

impl Invariant for AppliedOnlyForward {
    fn sentence(&self) -> &'static str {
        "what a running replica has applied only grows, and its clock with it"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let now = (look.status.applied.map_or(0, |at| at.index), look.clock);
        let before = self.seen.insert((look.replica, look.boot), now).unwrap_or_default();
        (now.0 < before.0 || now.1 < before.1).then(|| {
            format!("replica {} had (index, clock) {before:?}, and has {now:?}", look.replica)
        })
    }
}

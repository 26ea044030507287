//! While a process runs, the epochs of its replicas only rise. Owns the last one of each.

use std::collections::BTreeMap;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct EpochsOnlyForward {
    /// By replica and start of its machine.
    epochs: BTreeMap<(u64, u64), u64>,
}

impl Invariant for EpochsOnlyForward {
    fn sentence(&self) -> &'static str {
        "the epoch of a running replica never goes back"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let epoch = look.descriptor.as_ref()?.epoch;
        let before = self.epochs.insert((look.replica, look.boot), epoch).unwrap_or(0);
        (epoch < before)
            .then(|| format!("replica {} was at epoch {before}, and is at {epoch}", look.replica))
    }
}

//! Whoever is elected holds all that was committed before. Owns the highest index that was seen to be
//! committed in each group, and in which term.

use std::collections::BTreeMap;

use coracle_raft::leadership::Standing;
use coracle_raft::types::Position;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct LeadersHoldWhatIsCommitted {
    /// By shard: the highest.
    committed: BTreeMap<u64, Position>,
}

impl Invariant for LeadersHoldWhatIsCommitted {
    fn sentence(&self) -> &'static str {
        "a leader holds all that was committed before its term"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let known = self.committed.entry(look.shard).or_default();
        if let Some(committed) = look.status.committed
            && committed.index > known.index
        {
            *known = committed;
        }
        // A leader of an older term may be cut off, and lack what newer ones committed.
        let leads = look.status.state == Standing::Leader && look.status.term >= known.term;
        let last = look.status.last_index.unwrap_or(0);
        (leads && last < known.index).then(|| {
            let (term, known) = (look.status.term, known.index);
            format!("n{} leads term {term} up to index {last}, {known} is committed", look.node + 1)
        })
    }
}

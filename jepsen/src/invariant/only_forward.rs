//! A replica's term never goes back, not over a crash either: its vote was synced before it counted.
//! Owns the highest term that each replica was seen to lead or follow.

use std::collections::BTreeMap;

use coracle_raft::leadership::Standing;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct OnlyForward {
    /// By replica.
    terms: BTreeMap<u64, u64>,
}

impl Invariant for OnlyForward {
    fn sentence(&self) -> &'static str {
        "the term in which a replica leads never goes back"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        // A follower shows a term before its vote is on disk; a leader has been elected in it.
        if look.status.state != Standing::Leader {
            return None;
        }
        let term = look.status.term;
        let before = self.terms.insert(look.replica, term).unwrap_or(0);
        (term < before).then(|| {
            format!("replica {} led term {before}, and now leads term {term}", look.replica)
        })
    }
}

//! What is committed at an index is final: nobody ever has another entry applied there. Owns which
//! term was seen at which index of which group.

use std::collections::BTreeMap;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct CommittedIsFinal {
    /// By shard and index: the term.
    terms: BTreeMap<(u64, u64), u64>,
}

impl Invariant for CommittedIsFinal {
    fn sentence(&self) -> &'static str {
        "what is committed at an index is final"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let seen = [look.status.committed, look.status.applied];
        for position in seen.into_iter().flatten() {
            let at = (look.shard, position.index);
            let term = *self.terms.entry(at).or_insert(position.term);
            if term != position.term {
                return Some(format!(
                    "index {} is of term {term}, and of term {} on n{}",
                    position.index,
                    position.term,
                    look.node + 1
                ));
            }
        }
        None
    }
}

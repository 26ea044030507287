//! Of two entries of a group, the later one has no lower term. Owns which term was seen where.

use std::collections::BTreeMap;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct TermsRiseWithTheLog {
    /// By shard and index: the term of what is committed there.
    terms: BTreeMap<(u64, u64), u64>,
}

impl Invariant for TermsRiseWithTheLog {
    fn sentence(&self) -> &'static str {
        "of two entries of a group, the later one has no lower term"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        for position in [look.status.committed, look.status.applied].into_iter().flatten() {
            let (at, term) = ((look.shard, position.index), position.term);
            self.terms.insert(at, term);
            let before = self.terms.range((look.shard, 0)..at).next_back();
            let after = self.terms.range(at..=(look.shard, u64::MAX)).nth(1);
            let higher_before = before.filter(|(_, before)| **before > term);
            let lower_after = after.filter(|(_, after)| **after < term);
            if let Some(((_, index), other)) = higher_before.or(lower_after) {
                let own = position.index;
                return Some(format!("index {own} is of term {term}, index {index} of {other}"));
            }
        }
        None
    }
}

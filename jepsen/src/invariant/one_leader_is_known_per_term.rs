//! All replicas of a group that know who leads a term know the same one. Owns whom they named first.

use std::collections::BTreeMap;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct OneLeaderIsKnownPerTerm {
    /// By shard and term: the leader.
    leaders: BTreeMap<(u64, u64), u64>,
}

impl Invariant for OneLeaderIsKnownPerTerm {
    fn sentence(&self) -> &'static str {
        "all who know who leads a term know the same one"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let leader = look.status.leader_replica?;
        let known = *self.leaders.entry((look.shard, look.status.term)).or_insert(leader);
        (known != leader).then(|| {
            let (node, term) = (look.node + 1, look.status.term);
            format!("n{node} takes replica {leader} for the leader of term {term}, not {known}")
        })
    }
}

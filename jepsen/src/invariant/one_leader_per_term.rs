//! In one term, one replica of a group leads. Owns who was seen to lead which term.

use std::collections::BTreeMap;

use coracle_raft::leadership::Standing;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct OneLeaderPerTerm {
    /// By shard and term: the replica, and its machine.
    leaders: BTreeMap<(u64, u64), (u64, usize)>,
}

impl OneLeaderPerTerm {
    pub(super) fn leaders(&self) -> u64 {
        self.leaders.len() as u64
    }

    pub(super) fn leader(&self, shard: u64) -> Option<usize> {
        let mut terms = self.leaders.range((shard, 0)..=(shard, u64::MAX));
        terms.next_back().map(|(_, (_, node))| *node)
    }
}

impl Invariant for OneLeaderPerTerm {
    fn sentence(&self) -> &'static str {
        "in one term, one replica of a group leads"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        if look.status.state != Standing::Leader {
            return None;
        }
        let at = (look.shard, look.status.term);
        let (leader, _) = *self.leaders.entry(at).or_insert((look.replica, look.node));
        (leader != look.replica).then(|| {
            let (term, replica) = (look.status.term, look.replica);
            format!("replicas {leader} and {replica} both lead term {term}")
        })
    }
}

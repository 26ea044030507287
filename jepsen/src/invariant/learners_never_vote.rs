//! A read replica never votes, campaigns or leads. Owns which replicas were seen to be read replicas, in
//! the eyes of any member of their group.

use std::collections::BTreeSet;

use coracle_raft::leadership::Standing;
use coracle_raft::types::Role;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub struct LearnersNeverVote {
    learners: BTreeSet<u64>,
}

impl Invariant for LearnersNeverVote {
    fn sentence(&self) -> &'static str {
        "a read replica never votes, campaigns or leads"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        for (replica, member) in &look.status.members {
            match member.role {
                Role::Learner => drop(self.learners.insert(*replica)),
                Role::Voter if self.learners.contains(replica) => {
                    return Some(format!("replica {replica} votes, for n{}", look.node + 1));
                }
                Role::Voter => {}
            }
        }
        let wants = matches!(look.status.state, Standing::Leader | Standing::Candidate);
        (wants && self.learners.contains(&look.replica))
            .then(|| format!("replica {} is {:?}", look.replica, look.status.state))
    }
}

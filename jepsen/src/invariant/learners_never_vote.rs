//! Who does not vote by its own log neither campaigns nor leads. Owns no memory: a read replica may
//! become a voter later.

use coracle_raft::leadership::Standing;
use coracle_raft::types::Role;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct LearnersNeverVote;

impl Invariant for LearnersNeverVote {
    fn sentence(&self) -> &'static str {
        "a read replica never campaigns or leads"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let wants = matches!(look.status.state, Standing::Leader | Standing::Candidate);
        let member = look.status.members.get(&look.replica);
        let learns = member.is_some_and(|member| member.role == Role::Learner);
        (wants && learns).then(|| format!("replica {} is {:?}", look.replica, look.status.state))
    }
}

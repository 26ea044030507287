//! A group has at least one voter, and no two of its members are on one node but while one takes the
//! other's place. Owns no memory.

use std::collections::BTreeMap;

use coracle_raft::types::Role;

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct MembersAreKnownOnce;

impl Invariant for MembersAreKnownOnce {
    fn sentence(&self) -> &'static str {
        "a group has voters, and no two of them on one node"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let members = &look.status.members;
        // Nobody told it yet.
        if members.is_empty() {
            return None;
        }
        let mut voters: BTreeMap<u64, u64> = BTreeMap::new();
        for (replica, member) in members.iter().filter(|(_, one)| one.role == Role::Voter) {
            if let Some(other) = voters.insert(member.node.0, *replica) {
                return Some(format!(
                    "replicas {other} and {replica} vote on node {}",
                    member.node
                ));
            }
        }
        voters.is_empty().then(|| format!("replica {} knows no voter", look.replica))
    }
}

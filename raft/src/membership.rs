//! Who may lead next: pure choices over a group's status.
//!
//! Owns the choice of a transfer's target and the order of campaigns. Does not change members.

use std::time::Duration;

use coracle_storage::ReplicaId;

use crate::leadership::GroupStatus;
use crate::types::{NodeId, Role};

/// Whether there is anybody to hand leadership to, now or later.
pub(crate) fn has_other_voter(status: &GroupStatus, own: ReplicaId, to: Option<NodeId>) -> bool {
    let wanted = |node| to.is_none_or(|to| node == to);
    status
        .members
        .iter()
        .any(|(id, member)| *id != own.0 && member.role == Role::Voter && wanted(member.node))
}

/// The voters to which leadership can go now, with their nodes: on `to`, or any. Each holds the leader's
/// whole log, so it neither refuses nor keeps the group waiting, and was heard within `fresh`: a transfer
/// to a dead one leaves the group without a leader until its timeouts. The one heard last is the first.
pub(crate) fn transfer_targets(
    status: &GroupStatus,
    own: ReplicaId,
    to: Option<NodeId>,
    fresh: Duration,
) -> Vec<(u64, NodeId)> {
    let Some(last) = status.last_index else { return Vec::new() };
    let eligible = status.members.iter().filter(|(id, member)| {
        **id != own.0
            && member.role == Role::Voter
            && to.is_none_or(|node| member.node == node)
            && member.matched.is_some_and(|matched| matched.index >= last)
            && member.heard.is_some_and(|heard| heard <= fresh)
    });
    let mut eligible: Vec<_> = eligible.collect();
    eligible.sort_by_key(|(_, member)| member.heard);
    eligible.into_iter().map(|(id, member)| (*id, member.node)).collect()
}

/// Whether no other voter was heard within `patience`: there is nobody to hand over to, and a leader
/// without them commits nothing anyway.
pub(crate) fn is_alone(status: &GroupStatus, own: ReplicaId, patience: Duration) -> bool {
    !status.members.iter().any(|(id, member)| {
        *id != own.0
            && member.role == Role::Voter
            && member.heard.is_some_and(|heard| heard <= patience)
    })
}

/// The place of a replica among the voters that may follow a lost leader; `None` for others.
pub(crate) fn campaign_rank(status: &GroupStatus, own: ReplicaId) -> Option<u32> {
    let voters = status.members.iter().filter(|(_, member)| member.role == Role::Voter);
    let followers = voters.filter(|(id, _)| Some(**id) != status.leader_replica);
    // Turned by the term, so that one replica does not inherit every group of a lost node.
    let ids: Vec<u64> = followers.map(|(id, _)| *id).collect();
    let place = ids.iter().position(|id| *id == own.0)?;
    let turned = (place as u64 + status.term) % ids.len() as u64;
    Some(turned as u32)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::leadership::{Member, Standing};
    use crate::types::Position;

    fn status(matched: [Option<u64>; 3]) -> GroupStatus {
        let member = |n: usize| Member {
            node: NodeId(n as u64 + 1),
            role: Role::Voter,
            matched: matched[n].map(|index| Position { term: 1, index }),
            heard: Some(Duration::from_millis(10 * (3 - n as u64))),
        };
        GroupStatus {
            state: Standing::Leader,
            term: 1,
            leader_replica: Some(10),
            leader: Some(NodeId(1)),
            last_index: Some(7),
            committed: None,
            applied: None,
            purged: None,
            members: BTreeMap::from([(10, member(0)), (11, member(1)), (12, member(2))]),
            joint: false,
            failed: None,
        }
    }

    fn transfer_target(
        status: &GroupStatus,
        own: ReplicaId,
        to: Option<NodeId>,
        fresh: Duration,
    ) -> Option<u64> {
        transfer_targets(status, own, to, fresh).first().map(|(id, _)| *id)
    }

    #[test]
    fn only_a_voter_with_the_whole_log_takes_over() {
        let own = ReplicaId(10);
        let fresh = Duration::from_millis(300);
        let behind = status([Some(7), Some(6), Some(7)]);
        assert_eq!(transfer_target(&behind, own, None, fresh), Some(12));
        assert_eq!(transfer_target(&behind, own, Some(NodeId(2)), fresh), None);
        assert_eq!(transfer_target(&behind, own, Some(NodeId(3)), fresh), Some(12));
        let mut silent = status([Some(7), Some(7), Some(7)]);
        assert_eq!(
            transfer_targets(&silent, own, None, fresh),
            [(12, NodeId(3)), (11, NodeId(2))],
            "heard last"
        );
        assert!(!is_alone(&silent, own, fresh));
        silent.members.get_mut(&12).expect("a member").heard = Some(Duration::from_secs(2));
        assert_eq!(transfer_target(&silent, own, None, fresh), Some(11), "12 may be dead");
        assert!(!is_alone(&silent, own, fresh), "11 is there");
        silent.members.get_mut(&11).expect("a member").heard = None;
        assert_eq!(transfer_target(&silent, own, None, fresh), None);
        assert!(is_alone(&silent, own, fresh));
    }

    #[test]
    fn a_learner_takes_nothing_over() {
        let (own, fresh) = (ReplicaId(10), Duration::from_millis(300));
        let mut status = status([Some(7), None, Some(7)]);
        let learner = status.members.get_mut(&12).expect("a member");
        learner.role = Role::Learner;
        assert_eq!(transfer_target(&status, own, None, fresh), None, "it holds all, and votes not");
        assert!(!has_other_voter(&status, own, Some(NodeId(3))));
        assert!(has_other_voter(&status, own, Some(NodeId(2))));
        assert_eq!(campaign_rank(&status, ReplicaId(12)), None);
        assert_eq!(campaign_rank(&status, ReplicaId(11)), Some(0));
        status.members.get_mut(&11).expect("a member").heard = None;
        assert!(is_alone(&status, own, fresh), "a learner is no company");
    }

    #[test]
    fn followers_campaign_in_an_order_that_turns_with_the_term() {
        let mut status = status([None, None, None]);
        let ranks = |status: &GroupStatus| {
            [11, 12].map(|id| campaign_rank(status, ReplicaId(id)).expect("a voter"))
        };
        let first = ranks(&status);
        assert_eq!(
            {
                let mut sorted = first;
                sorted.sort_unstable();
                sorted
            },
            [0, 1]
        );
        status.term = 2;
        assert_ne!(ranks(&status), first);
        assert_eq!(
            campaign_rank(&status, ReplicaId(10)),
            None,
            "the lost leader is not among them"
        );
    }
}

//! Decides which node serves a shard. Pure: a function of the map, of the replica here, and of what
//! the attempts before have taught.

use coracle_proto::shard_map::{NodeId, Shard};
use coracle_raft::leadership::{GroupStatus, Standing};

use crate::fault::Leader;

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whom {
    /// The replica of this node.
    Here,
    /// That node.
    Node(NodeId),
    /// Nobody is known to lead.
    Nobody,
}

/// What the attempts so far have taught about who leads.
#[derive(Default)]
pub(crate) struct Trail {
    /// Named by the node that was asked last.
    pub(crate) follow: Option<NodeId>,
    /// Gave no answer at the last attempt.
    pub(crate) avoid: Option<NodeId>,
    /// The highest term that a named leader had.
    pub(crate) term: u64,
    /// The replica here could not serve the read as one that does not lead.
    pub(crate) behind: bool,
}

/// Who serves a shard. Its replica here knows best; the map's hint stands where it is of a higher
/// term, or where there is no replica here; and where all else fails some replica is asked, which
/// tells the leader if it knows one. `number`: how many attempts were made.
pub(crate) fn whom(
    shard: &Shard,
    own: NodeId,
    local: Option<&GroupStatus>,
    trail: &Trail,
    number: u32,
) -> Whom {
    let local = local.filter(|status| status.state != Standing::Stopped);
    if local.is_some_and(|status| leads(status) && status.term >= trail.term) {
        return Whom::Here;
    }
    if let Some(follow) = trail.follow {
        return Whom::Node(follow);
    }
    let usable = |node: &NodeId| *node != own && Some(*node) != trail.avoid;
    let hint = shard.leader.map(|node| Leader { node, term: shard.leader_term });
    let named = match local {
        // In a higher term than the hint's: an election is under way, or its winner is known here.
        Some(status) if status.term > shard.leader_term => leader_in(status),
        Some(status) => hint.or(leader_in(status)),
        None => hint,
    };
    if let Some(leader) = named.filter(|leader| usable(&leader.node)) {
        return Whom::Node(leader.node);
    }
    if local.is_some() && trail.avoid.is_none() {
        return Whom::Nobody;
    }
    let others: Vec<NodeId> = shard.voters().map(|replica| replica.node).filter(usable).collect();
    match others.len() {
        // Only the silent one is left: what was lost may have been the answer alone.
        0 => trail
            .avoid
            .filter(|node| shard.replica_on(*node).is_some())
            .map_or(Whom::Nobody, Whom::Node),
        len => Whom::Node(others[number as usize % len]),
    }
}

/// Whether the replica here is to serve a read that any may. `waits`: it has yet to hear from its leader
/// since its node started, and would keep the read until then.
pub(crate) fn reads_here(local: Option<&GroupStatus>, trail: &Trail, waits: bool) -> bool {
    let runs = local.is_some_and(|status| status.state != Standing::Stopped);
    runs && !trail.behind && !waits
}

/// Whether a replica leads.
pub(crate) fn leads(status: &GroupStatus) -> bool {
    status.state == Standing::Leader
}

/// The leader that a replica knows, with the term in which it does: from one look.
pub(crate) fn leader_in(status: &GroupStatus) -> Option<Leader> {
    status.leader.map(|node| Leader { node, term: status.term })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use coracle_proto::v1;

    use super::*;

    const OWN: NodeId = NodeId(1);

    fn shard(leader: u64, term: u64) -> Shard {
        let replicas = [1, 2, 3]
            .map(|node| v1::Replica { id: node, node, role: 1, ..Default::default() })
            .to_vec();
        let shard = v1::Shard { id: 4, epoch: 1, replicas, ..Default::default() };
        Shard::from_proto(&v1::Shard { leader_node: leader, leader_term: term, ..shard }).unwrap()
    }

    fn replica(state: Standing, term: u64, leader: Option<u64>) -> GroupStatus {
        GroupStatus {
            state,
            term,
            leader_replica: leader,
            leader: leader.map(NodeId),
            last_index: None,
            committed: None,
            applied: None,
            purged: None,
            members: BTreeMap::new(),
            joint: false,
            failed: None,
        }
    }

    fn asked(shard: &Shard, local: Option<GroupStatus>, trail: &Trail) -> Whom {
        whom(shard, OWN, local.as_ref(), trail, 0)
    }

    #[test]
    fn replica_here_is_believed_unless_the_hint_is_of_a_higher_term() {
        let trail = Trail::default();
        let leads = replica(Standing::Leader, 5, Some(1));
        assert_eq!(asked(&shard(2, 4), Some(leads), &trail), Whom::Here);
        let follows = replica(Standing::Follower, 5, Some(3));
        assert_eq!(asked(&shard(2, 4), Some(follows.clone()), &trail), Whom::Node(NodeId(3)));
        assert_eq!(asked(&shard(2, 6), Some(follows), &trail), Whom::Node(NodeId(2)));
        let campaigns = replica(Standing::Candidate, 5, None);
        assert_eq!(asked(&shard(2, 4), Some(campaigns), &trail), Whom::Nobody);
    }

    #[test]
    fn without_replica_the_hint_is_asked_and_without_hint_anybody() {
        let trail = Trail::default();
        assert_eq!(asked(&shard(3, 4), None, &trail), Whom::Node(NodeId(3)));
        assert_eq!(asked(&shard(0, 0), None, &trail), Whom::Node(NodeId(2)));
        assert_eq!(whom(&shard(0, 0), OWN, None, &trail, 1), Whom::Node(NodeId(3)));
        let stopped = replica(Standing::Stopped, 9, None);
        assert_eq!(asked(&shard(3, 4), Some(stopped), &trail), Whom::Node(NodeId(3)));
    }

    #[test]
    fn a_replica_reads_here_unless_it_is_behind_or_has_just_started() {
        let (fresh, trail) = (replica(Standing::Follower, 5, Some(3)), Trail::default());
        assert!(reads_here(Some(&fresh), &trail, false));
        assert!(!reads_here(Some(&fresh), &trail, true), "its leader is asked at once");
        assert_eq!(asked(&shard(3, 5), Some(fresh.clone()), &trail), Whom::Node(NodeId(3)));
        assert!(!reads_here(Some(&fresh), &Trail { behind: true, ..Trail::default() }, false));
        assert!(!reads_here(Some(&replica(Standing::Stopped, 5, None)), &trail, false));
        assert!(!reads_here(None, &trail, false));
    }

    #[test]
    fn named_leader_is_followed_and_a_silent_one_avoided() {
        let named = Trail { follow: Some(NodeId(3)), term: 7, ..Trail::default() };
        assert_eq!(asked(&shard(2, 4), None, &named), Whom::Node(NodeId(3)));
        let deposed = replica(Standing::Leader, 5, Some(1));
        assert_eq!(asked(&shard(1, 5), Some(deposed), &named), Whom::Node(NodeId(3)));
        let silent = Trail { avoid: Some(NodeId(2)), ..Trail::default() };
        assert_eq!(asked(&shard(2, 4), None, &silent), Whom::Node(NodeId(3)));
        let follows = replica(Standing::Follower, 4, Some(2));
        assert_eq!(asked(&shard(2, 4), Some(follows), &silent), Whom::Node(NodeId(3)));
        let mut alone = shard(2, 4);
        alone.replicas.retain(|replica| replica.node == NodeId(2));
        assert_eq!(asked(&alone, None, &silent), Whom::Node(NodeId(2)));
    }
}

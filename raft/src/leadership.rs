//! Who leads a group, as this replica knows it.
//!
//! Owns the reading of openraft's metrics. Decides nothing: a write proposed on an old belief is
//! refused by openraft, because it names the term.

use std::collections::BTreeMap;
use std::time::Duration;

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::type_config::alias::WatchReceiverOf;
use openraft::{Instant as _, RaftMetrics};

use crate::error::GroupError;
use crate::state_machine::StateMachine;
use crate::types::{NodeId, Position, Role, TypeConfig, position};

pub(crate) type Raft = openraft::Raft<TypeConfig, StateMachine>;

/// A cheap view of one replica's metrics.
#[derive(Clone)]
pub(crate) struct Leadership(WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>);

/// One member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The node that holds it.
    pub node: NodeId,
    /// What it counts for.
    pub role: Role,
    /// On the leader: how far it is known to hold the log.
    pub matched: Option<Position>,
    /// On the leader: when it last answered a heartbeat.
    pub heard: Option<Duration>,
}

/// What a replica is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Leads its term.
    Leader,
    /// Follows.
    Follower,
    /// Asks for votes.
    Candidate,
    /// Reads along.
    Learner,
    /// Stopped.
    Stopped,
}

/// A replica's view of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// What this replica is.
    pub state: Standing,
    /// Its term.
    pub term: u64,
    /// The replica that leads, as far as it is known here.
    pub leader_replica: Option<u64>,
    /// Its node.
    pub leader: Option<NodeId>,
    /// Last index in the log.
    pub last_index: Option<u64>,
    /// Up to where the group has committed, as far as it is known here.
    pub committed: Option<Position>,
    /// Up to where this replica has applied.
    pub applied: Option<Position>,
    /// Up to where the log is purged.
    pub purged: Option<Position>,
    /// All members by replica id.
    pub members: BTreeMap<u64, Member>,
    /// Whether the membership is between two configurations.
    pub joint: bool,
    /// Why the replica stopped by itself.
    pub failed: Option<String>,
}

impl Leadership {
    pub(crate) fn new(raft: &Raft) -> Self {
        Self(raft.metrics())
    }

    /// The term in which this replica leads; otherwise who does.
    pub(crate) fn leads(&self) -> Result<u64, GroupError> {
        let metrics = self.0.borrow_watched();
        if metrics.running_state.is_err() {
            return Err(GroupError::Stopped);
        }
        if metrics.state == ServerState::Leader {
            return Ok(metrics.current_term);
        }
        let membership = metrics.membership_config.membership();
        let leader = metrics.current_leader.and_then(|id| membership.get_node(&id));
        Err(GroupError::NotLeader { leader: leader.map(|place| place.node) })
    }

    /// Up to where this replica has applied, and up to where its log is purged; 0: nothing.
    pub(crate) fn applied_and_purged(&self) -> (u64, u64) {
        let metrics = self.0.borrow_watched();
        let index = |id: &Option<crate::types::LogId>| id.as_ref().map_or(0, |id| id.index());
        (index(&metrics.last_applied), index(&metrics.purged))
    }

    /// This replica.
    pub(crate) fn own(&self) -> u64 {
        self.0.borrow_watched().id
    }

    /// The replica that leads and its node, where it is another one than this.
    pub(crate) fn other_leader(&self) -> Option<(u64, NodeId)> {
        let metrics = self.0.borrow_watched();
        let leader = metrics.current_leader.filter(|leader| *leader != metrics.id)?;
        let place = metrics.membership_config.membership().get_node(&leader)?;
        Some((leader, place.node))
    }

    pub(crate) fn status(&self) -> GroupStatus {
        let metrics = self.0.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let matched = |id: &u64| {
            let replication = metrics.replication.as_ref()?;
            replication.get(id)?.as_ref().map(position)
        };
        let heard = |id: &u64| Some(metrics.heartbeat.as_ref()?.get(id)?.as_ref()?.elapsed());
        let member = |(id, place): (&u64, &crate::types::Place)| {
            let role = if voters.contains(id) { Role::Voter } else { Role::Learner };
            (*id, Member { node: place.node, role, matched: matched(id), heard: heard(id) })
        };
        GroupStatus {
            state: match (&metrics.running_state, metrics.state) {
                (Err(_), _) | (_, ServerState::Shutdown) => Standing::Stopped,
                (_, ServerState::Leader) => Standing::Leader,
                (_, ServerState::Follower) => Standing::Follower,
                (_, ServerState::Candidate) => Standing::Candidate,
                (_, ServerState::Learner) => Standing::Learner,
            },
            term: metrics.current_term,
            leader_replica: metrics.current_leader,
            leader: metrics
                .current_leader
                .and_then(|id| membership.get_node(&id))
                .map(|place| place.node),
            last_index: metrics.last_log_index,
            committed: metrics.local_committed.as_ref().map(position),
            applied: metrics.last_applied.as_ref().map(position),
            purged: metrics.purged.as_ref().map(position),
            members: membership.nodes().map(member).collect(),
            joint: membership.get_joint_config().len() > 1,
            failed: metrics.running_state.as_ref().err().map(ToString::to_string),
        }
    }

    /// Waits until anything changes; false when the replica is gone.
    pub(crate) async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

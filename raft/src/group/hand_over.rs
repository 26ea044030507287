//! Leadership that goes to another voter, by wish.
//!
//! Owns the check right before, and the wait behind it. Who is eligible by what the leader knows is
//! `membership`'s choice.

use std::time::Duration;

use coracle_storage::ReplicaId;
use tokio::time::Instant;

use super::Group;
use crate::error::GroupError;
use crate::leadership::Standing;
use crate::membership;
use crate::message::{Answer, Question};
use crate::transport::{Address, Lane};
use crate::types::NodeId;

/// A group whose other voters were not heard for this many leases has nobody to hand over to.
const PATIENCE_LEASES: u32 = 2;

impl Group {
    /// Hands leadership to the replica on `to`, or to the best voter. Checked right before: the
    /// target votes, holds the whole log, and says itself that it can be elected. Returns once another
    /// leader is known here.
    pub async fn hand_over(
        &self,
        to: Option<NodeId>,
        deadline: Instant,
    ) -> Result<NodeId, GroupError> {
        let mut leadership = self.leadership.clone();
        let patience = self.timing.lease() * PATIENCE_LEASES;
        let entered = Instant::now();
        loop {
            let status = self.status();
            if status.state != Standing::Leader {
                return match status.leader {
                    Some(leader) => Ok(leader),
                    None => Err(GroupError::NotLeader { leader: None }),
                };
            }
            if !membership::has_other_voter(&status, self.replica, to) {
                return Err(GroupError::NotLeader { leader: None });
            }
            if let Some(target) = self.willing_target(to).await {
                let asked = self.raft.trigger().transfer_leader(target).await;
                asked.map_err(|_| GroupError::Stopped)?;
                break;
            }
            // A leader of a moment ago has not heard of anybody yet.
            let alone = membership::is_alone(&status, self.replica, patience);
            if Instant::now() >= deadline || alone && entered.elapsed() >= patience {
                return Err(GroupError::TooStale);
            }
            let look = deadline.min(Instant::now() + self.timing.heartbeat);
            // In time or not, it is looked at again.
            if let Ok(false) = tokio::time::timeout_at(look, leadership.changed()).await {
                return Err(GroupError::Stopped);
            }
        }
        // By then the target has campaigned, or another voter has: a target that died keeps this
        // leader waiting for good.
        let deadline =
            deadline.min(Instant::now() + (self.timing.lease() + self.timing.election_max) * 2);
        loop {
            let status = self.status();
            if let (false, Some(leader)) = (status.state == Standing::Leader, status.leader) {
                return Ok(leader);
            }
            if !matches!(tokio::time::timeout_at(deadline, leadership.changed()).await, Ok(true)) {
                return Err(GroupError::TooStale);
            }
        }
    }

    /// The first of the eligible voters that says it can be elected. From the transfer on this leader
    /// takes no writes: one that went to a node that has just restarted, and may not campaign yet, would
    /// cost the group a whole election timeout.
    async fn willing_target(&self, to: Option<NodeId>) -> Option<u64> {
        let fresh = self.timing.heartbeat * 3;
        let eligible = || membership::transfer_targets(&self.status(), self.replica, to, fresh);
        for (target, node) in eligible() {
            if !self.may_lead(target, node, self.timing.heartbeat).await {
                continue;
            }
            // The log may have grown meanwhile; then it is looked at again soon.
            return eligible().into_iter().map(|(id, _)| id).find(|id| *id == target);
        }
        None
    }

    async fn may_lead(&self, replica: u64, node: NodeId, within: Duration) -> bool {
        let to = Address { node, shard: self.shard, replica: ReplicaId(replica) };
        let question = Question::MayLead.encode();
        let answer = self.environment.transport.ask(to, Lane::Control, question, within).await;
        let answer = answer.ok().and_then(|bytes| Answer::decode(bytes).ok());
        matches!(answer, Some(Answer::Transfer(true)))
    }
}

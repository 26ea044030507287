//! Who belongs to a group, and its changes: read replicas that come and go, voters that take the place
//! of others.
//!
//! Owns the conditions under which a change is proposed. Does not wait for a new member to catch up,
//! and does not plan: whoever does names the epoch on which it did, so that one who was paused and
//! wakes changes nothing.
//!
//! What is committed is looked at first, by a read that a majority confirms: a leader that was deposed
//! a moment ago must not say of a member that it has gone. Then openraft is asked, on the condition
//! that the last membership in its log is still the one that was looked at, and that this replica
//! still leads the same term. So there is one change at a time, and none upon a joint configuration.
//!
//! Voters change through a joint configuration: two entries. A leader lost between the two leaves it
//! behind, and nothing ends it by itself: [`Group::finish_change`] does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::ReplicaId;
use openraft::ChangeMembers;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::Precondition;
use tokio::time::Instant;

use super::Group;
use crate::error::{ChangeError, GroupError};
use crate::lag::Lag;
use crate::leadership::{GroupStatus, Standing};
use crate::types::{NodeId, Place, Role, StoredMembership, TypeConfig};

/// What shall become of the members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Add { replica: u64, node: NodeId },
    Remove { replica: u64 },
    Voters { add: Option<u64>, remove: Option<u64> },
    Finish,
}

/// How many entries a read replica may lack that becomes a voter: a majority may need it from then on,
/// and so waits until it has them.
const PROMOTE_LAG_MAX: u64 = 1_000;

/// Who belongs to a group, as a majority has confirmed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// The group's epoch.
    pub epoch: u64,
    /// Between two sets of voters: a change that is half done.
    pub joint: bool,
    /// By replica: its node, and what it counts for.
    pub members: BTreeMap<u64, (NodeId, Role)>,
}

impl Group {
    /// Who belongs to the group, confirmed by a majority: whoever goes by it does not act on the word
    /// of a leader that was deposed. On the leader.
    pub async fn members(&self, deadline: Instant) -> Result<Members, ChangeError> {
        let (epoch, stored) = self.confirmed(deadline).await?;
        let membership = stored.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let role = |id| if voters.contains(id) { Role::Voter } else { Role::Learner };
        let members = membership.nodes().map(|(id, place)| (*id, (place.node, role(id))));
        Ok(Members { epoch, joint: is_joint(&stored), members: members.collect() })
    }

    pub(super) async fn confirmed(
        &self,
        deadline: Instant,
    ) -> Result<(u64, Arc<StoredMembership>), ChangeError> {
        // Any replica reads what a majority has confirmed; only the leader knows who follows how far.
        self.leadership.leads().map_err(unchanged)?;
        let look = |state: &crate::state_machine::ReadState| {
            (state.held.as_ref().map(|known| known.epoch), state.membership.clone())
        };
        match self.reads.linearizable(deadline, look).await.map_err(unchanged)? {
            (Some(epoch), stored) => Ok((epoch, stored)),
            // Its first leader is about to describe it.
            (None, _) => Err(ChangeError::UnderWay),
        }
    }

    /// Takes a read replica in, without waiting for it to catch up (see [`Group::lags`]). Its id
    /// must be new: it never was one of another log. On the leader. Returns the group's epoch
    /// behind the change; one that is in already is no error.
    pub async fn add_learner(
        &self,
        replica: ReplicaId,
        node: NodeId,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        self.change(Change::Add { replica: replica.0, node }, epoch, deadline).await
    }

    /// Ends a read replica's membership; it is not told. On the leader. Returns the group's epoch
    /// behind the change; one that is gone already is no error.
    pub async fn remove_learner(
        &self,
        replica: ReplicaId,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        self.change(Change::Remove { replica: replica.0 }, epoch, deadline).await
    }

    /// Makes a read replica a voter, ends the membership of a voter, or both: the one takes the other's
    /// place. The one that goes is not told. Refused while the read replica lacks more than a few
    /// entries, and while fewer than a majority of the voters to be are heard: the change would stop
    /// the group. On the leader, which does not go itself: it hands over first. Returns the group's
    /// epoch behind the change; done already is no error.
    pub async fn change_voters(
        &self,
        add: Option<ReplicaId>,
        remove: Option<ReplicaId>,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        let (add, remove) = (add.map(|id| id.0), remove.map(|id| id.0));
        self.change(Change::Voters { add, remove }, epoch, deadline).await
    }

    /// Ends a change of voters that a lost leader left half done, towards what it was to become. On
    /// the leader, at whatever epoch: what it does was decided before. Returns the group's epoch
    /// behind it; nothing to end is no error.
    pub async fn finish_change(&self, deadline: Instant) -> Result<u64, ChangeError> {
        self.change(Change::Finish, 0, deadline).await
    }

    /// On the leader: how far each member is behind; empty elsewhere.
    pub fn lags(&self) -> BTreeMap<u64, Lag> {
        let status = self.status();
        let (Standing::Leader, Some(last)) = (status.state, status.last_index) else {
            return BTreeMap::new();
        };
        let (now, growth) = (Instant::now(), self.growth.lock());
        let lag = |(id, member): (&u64, &crate::leadership::Member)| {
            let matched = member.matched.map(|at| at.index);
            // Its own log is what it is measured by.
            let own = *id == self.replica.0;
            (*id, if own { Lag::default() } else { growth.lag(now, last, matched) })
        };
        status.members.iter().map(lag).collect()
    }

    /// Takes down how far the log is, where this replica leads.
    pub(crate) fn sample_growth(&self) {
        let status = self.status();
        match (status.state, status.last_index) {
            (Standing::Leader, Some(last)) => {
                self.growth.lock().sample(Instant::now(), status.term, last);
            }
            _ => self.growth.lock().forget(),
        }
    }

    /// What openraft is asked for; an error when the group could not stand it now.
    fn proposal(
        &self,
        stored: &StoredMembership,
        change: Change,
    ) -> Result<ChangeMembers<u64, Place>, ChangeError> {
        Ok(match change {
            Change::Add { replica, node } => {
                ChangeMembers::AddNodes(BTreeMap::from([(replica, Place { node })]))
            }
            Change::Remove { replica } => ChangeMembers::RemoveNodes(BTreeSet::from([replica])),
            Change::Finish => ChangeMembers::AddVoterIds(BTreeSet::new()),
            Change::Voters { add, remove } => {
                let mut voters: BTreeSet<u64> = stored.membership().voter_ids().collect();
                voters.extend(add);
                voters.retain(|id| Some(*id) != remove);
                let lease = self.timing.lease();
                check_voters(&self.status(), self.replica, add, &voters, lease)?;
                ChangeMembers::ReplaceAllVoters(voters)
            }
        })
    }

    async fn change(
        &self,
        change: Change,
        epoch: u64,
        deadline: Instant,
    ) -> Result<u64, ChangeError> {
        let Ok(_one) = self.changing.try_lock() else {
            return Err(ChangeError::UnderWay);
        };
        let term = self.leadership.leads().map_err(unchanged)?;
        let (known, stored) = self.confirmed(deadline).await?;
        let (joint, finish) = (is_joint(&stored), change == Change::Finish);
        let merge = self.merge_status();
        // A merge counts on the members as they are.
        let merges = merge.merging.is_some() || merge.frozen.is_some();
        if (joint || merges) && !finish {
            return Err(ChangeError::UnderWay);
        }
        if is_done(&stored, change)? {
            return Ok(known);
        }
        if matches!(change, Change::Add { .. }) && self.may_send_what_it_took() {
            // It would be sent an entry that only those can apply who were there; the purge is under way.
            return Err(ChangeError::UnderWay);
        }
        if !finish && known != epoch {
            return Err(ChangeError::EpochPassed { epoch: known });
        }
        let change = self.proposal(&stored, change)?;
        let conditions = [
            Precondition::LastMembershipLogId { last_membership_log_id: *stored.log_id() },
            Precondition::CommittedLeaderId {
                committed_leader_id: openraft::vote::leader_id_std::CommittedLeaderId::new(term),
            },
        ];
        // A voter that is replaced does not stay as a read replica.
        let asked = self.raft.change_membership_if(change, false, conditions);
        match tokio::time::timeout_at(deadline, asked).await {
            // The entry is applied here by now.
            Ok(Ok(_)) => Ok(self.descriptor().map_or(known, |descriptor| descriptor.epoch)),
            Ok(Err(error)) => Err(refusal(error)),
            Err(_) => Err(ChangeError::Unknown("it was proposed, and is not applied yet".into())),
        }
    }
}

fn is_joint(stored: &StoredMembership) -> bool {
    stored.membership().get_joint_config().len() > 1
}

/// Whether the members are as the change would leave them; an error when it must not be made.
fn is_done(stored: &StoredMembership, change: Change) -> Result<bool, ChangeError> {
    let membership = stored.membership();
    let votes = |replica: u64| membership.voter_ids().any(|id| id == replica);
    let refused = |why: String| Err(ChangeError::Refused(why));
    match change {
        Change::Finish => Ok(!is_joint(stored)),
        Change::Voters { add, remove } => {
            let is_member = |replica: u64| membership.get_node(&replica).is_some();
            let added = add.is_none_or(votes);
            let removed = remove.is_none_or(|replica| !is_member(replica));
            match (add, remove) {
                _ if added && removed => Ok(true),
                (Some(add), _) if !is_member(add) => refused(format!("replica {add} is no member")),
                (Some(add), Some(_)) if added => refused(format!("replica {add} votes already")),
                (_, Some(remove)) if !votes(remove) => {
                    refused(format!("replica {remove} does not vote"))
                }
                _ => Ok(false),
            }
        }
        Change::Remove { replica } if votes(replica) => {
            refused(format!("replica {replica} votes: it is no read replica"))
        }
        Change::Remove { replica } => Ok(membership.get_node(&replica).is_none()),
        Change::Add { replica, node } => {
            let other =
                membership.nodes().find(|(id, place)| **id != replica && place.node == node);
            match (membership.get_node(&replica), other) {
                (Some(place), _) if place.node != node => {
                    refused(format!("replica {replica} is on n{} already", place.node))
                }
                (Some(_), _) if votes(replica) => {
                    refused(format!("replica {replica} votes already"))
                }
                (Some(_), _) => Ok(true),
                (None, Some((id, _))) => refused(format!("replica {id} is on n{node} already")),
                (None, None) => Ok(false),
            }
        }
    }
}

/// Whether a group that this replica leads goes on at once with these voters.
fn check_voters(
    status: &GroupStatus,
    own: ReplicaId,
    add: Option<u64>,
    voters: &BTreeSet<u64>,
    fresh: Duration,
) -> Result<(), ChangeError> {
    let refused = |why: String| Err(ChangeError::Refused(why));
    if !voters.contains(&own.0) {
        return refused("the leader is to go: it hands over first".to_owned());
    }
    if let Some(add) = add {
        let matched = status.members.get(&add).and_then(|member| member.matched);
        let lacks = status.last_index.unwrap_or(0).saturating_sub(matched.map_or(0, |at| at.index));
        if matched.is_none() || lacks > PROMOTE_LAG_MAX {
            return refused(format!(
                "replica {add} lacks {lacks} entries: it is not ready to vote"
            ));
        }
    }
    let heard = |id: &&u64| {
        let heard = status.members.get(id).and_then(|member| member.heard);
        **id == own.0 || heard.is_some_and(|heard| heard <= fresh)
    };
    if let Some(add) = add.filter(|add| !heard(&add)) {
        // In a quiet group a dead one lacks nothing.
        return refused(format!("replica {add} is not heard: it is not ready to vote"));
    }
    let (heard, all) = (voters.iter().filter(heard).count(), voters.len());
    if heard * 2 <= all {
        return refused(format!("of the {all} voters to be only {heard} are heard"));
    }
    Ok(())
}

/// Before anything was proposed.
pub(super) fn unchanged(error: GroupError) -> ChangeError {
    match error {
        GroupError::NotLeader { leader } => ChangeError::NotLeader { leader },
        GroupError::Stopped => ChangeError::NotLeader { leader: None },
        other => ChangeError::Unavailable(other.to_string()),
    }
}

fn refusal(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> ChangeError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            ChangeError::NotLeader { leader: forward.leader_node.map(|place| place.node) }
        }
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => {
            ChangeError::Unknown("another leader was elected meanwhile".to_owned())
        }
        // Another membership is in the log: of a change that is not committed, or was made since.
        RaftError::APIError(_) => ChangeError::UnderWay,
        RaftError::Fatal(fatal) => ChangeError::Unknown(fatal.to_string()),
    }
}

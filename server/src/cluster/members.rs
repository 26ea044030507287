//! A group's members: what its leader tells of them, and the changes that it is asked for.
//!
//! Owns the answer of a node to `ChangeMembers`, `HandOver` and `DestroyReplica`. Does not plan (see
//! `super::replicas`).

use std::time::Duration;

use coracle_proto::shard_map::{NodeId, ShardId};
use coracle_proto::{peer, v1};
use coracle_raft::error::ChangeError;
use coracle_raft::group::Group;
use coracle_raft::host::Condition;
use coracle_raft::leadership::Standing;
use coracle_raft::types::Role;
use coracle_storage::ReplicaId;
use peer::MemberChange;
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;

use super::{COMMAND_TIMEOUT, Cluster, Target, refused};

/// How a node calls a replica that is there and does not run.
pub(super) const DAMAGED: &str = "recovering";
/// How it calls one that is not there.
pub(super) const ABSENT: &str = "absent";

/// How it calls one that was running, and has stopped.
pub(super) const STOPPED: &str = "stopped";

/// Whether a replica that its node calls so does not come back by itself.
pub(super) fn is_lost_role(role: &str) -> bool {
    [DAMAGED, ABSENT, STOPPED].contains(&role)
}

/// The members of a group, as its leader on this node sees them; none where another leads.
pub(super) fn member_statuses(group: &Group) -> Vec<v1::MemberStatus> {
    let (status, lags) = (group.status(), group.lags());
    let one = |(id, lag): (u64, coracle_raft::lag::Lag)| {
        let member = status.members.get(&id)?;
        let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let own = Some(id) == status.leader_replica;
        Some(v1::MemberStatus {
            replica: id,
            node: member.node.0,
            role: role(member.role).into(),
            matched_index: match own {
                true => status.last_index.unwrap_or(0),
                false => member.matched.map_or(0, |at| at.index),
            },
            lag_entries: lag.entries,
            lag_ms: ms(lag.age),
            heard_ms: if own { 0 } else { member.heard.map_or(u64::MAX, ms) },
        })
    };
    lags.into_iter().filter_map(one).collect()
}

fn role(role: Role) -> v1::ReplicaRole {
    match role {
        Role::Voter => v1::ReplicaRole::Voter,
        Role::Learner => v1::ReplicaRole::Learner,
    }
}

impl Cluster {
    /// Changes a group's members, or only looks, where this node leads it. The answer tells of the
    /// group as a majority has confirmed it behind the change.
    pub(super) async fn change_members(&self, asked: peer::ChangeMembers) -> peer::CommandDone {
        let shard = ShardId(asked.shard);
        let Some(group) = self.host.group(shard) else {
            return refused(format!("shard {shard} has no replica on this node"));
        };
        // Its end comes before that of whoever waits for the answer.
        let deadline = Instant::now() + COMMAND_TIMEOUT * 3 / 4;
        let (replica, node) = (ReplicaId(asked.replica), NodeId(asked.node));
        let changed = match asked.change() {
            MemberChange::Unspecified => Ok(0),
            MemberChange::AddLearner => {
                group.add_learner(replica, node, asked.epoch, deadline).await
            }
            MemberChange::RemoveLearner => {
                group.remove_learner(replica, asked.epoch, deadline).await
            }
            MemberChange::Voters => {
                let some = |id: u64| (id != 0).then_some(ReplicaId(id));
                let (comes, goes) = (some(asked.replica), some(asked.remove));
                group.change_voters(comes, goes, asked.epoch, deadline).await
            }
            MemberChange::Finish => group.finish_change(deadline).await,
        };
        let looked = match changed {
            Ok(_) => group.members(deadline).await,
            Err(error) => Err(error),
        };
        let told = match looked {
            Ok(members) => members,
            Err(error) => return not_changed(&error),
        };
        // How far each is, from a look of its own; who they are, from the one that was confirmed.
        let far = member_statuses(&group);
        let member = |(id, (node, is)): (u64, (NodeId, Role))| {
            let known = far.iter().find(|member| member.replica == id).copied();
            let unknown = v1::MemberStatus {
                lag_entries: u64::MAX,
                lag_ms: u64::MAX,
                heard_ms: u64::MAX,
                ..Default::default()
            };
            v1::MemberStatus {
                replica: id,
                node: node.0,
                role: role(is).into(),
                ..known.unwrap_or(unknown)
            }
        };
        let status = v1::GroupStatus {
            shard: shard.0,
            replica: group.replica().0,
            epoch: told.epoch,
            joint: told.joint,
            state_bytes: group.state_bytes(),
            members: told.members.into_iter().map(member).collect(),
            ..Default::default()
        };
        peer::CommandDone { body: status.encode_to_vec().into(), ..Default::default() }
    }

    /// Hands a shard over, where this node leads it; another leader already is no error.
    pub(super) async fn hand_over_here(&self, asked: peer::HandOver) -> Result<(), String> {
        let shard = ShardId(asked.shard);
        let Some(group) = self.host.group(shard) else {
            return Err(format!("shard {shard} has no replica on this node"));
        };
        if group.status().state != Standing::Leader {
            return Ok(());
        }
        let to = (asked.to_node != 0).then_some(NodeId(asked.to_node));
        let handed = group.hand_over(to, Instant::now() + COMMAND_TIMEOUT * 3 / 4).await;
        handed.map(drop).map_err(|error| format!("shard {shard} was not handed over: {error}"))
    }

    pub(super) async fn tell_hand_over(
        &self,
        node: NodeId,
        hand_over: peer::HandOver,
    ) -> Result<(), String> {
        if self.membership.identity().is_some_and(|(_, own)| own == node) {
            return self.hand_over_here(hand_over).await;
        }
        let kind = Kind::HandOver(hand_over);
        let answer = self.commands.command(Target::Node(node), kind, COMMAND_TIMEOUT).await?;
        if answer.error.is_empty() { Ok(()) } else { Err(answer.error) }
    }

    /// Has a node remove a replica for ever.
    pub(super) async fn tell_destroy(
        &self,
        node: u64,
        destroy: peer::DestroyReplica,
    ) -> Result<(), String> {
        if self.membership.identity().is_some_and(|(_, own)| own.0 == node) {
            return self.destroy_here(destroy).await;
        }
        let target = Target::Node(NodeId(node));
        let kind = Kind::DestroyReplica(destroy);
        let answer = self.commands.command(target, kind, COMMAND_TIMEOUT).await?;
        if answer.error.is_empty() { Ok(()) } else { Err(answer.error) }
    }

    /// Removes a replica of this node for ever. It goes on where that takes longer than the caller
    /// waits, who asks again.
    pub(super) async fn destroy_here(&self, asked: peer::DestroyReplica) -> Result<(), String> {
        let (shard, replica) = (ShardId(asked.shard), ReplicaId(asked.replica));
        let destroyed = self.host.destroy(shard, replica);
        match tokio::time::timeout(COMMAND_TIMEOUT * 3 / 4, destroyed).await {
            Ok(destroyed) => destroyed.map_err(|error| error.to_string()),
            Err(_) => Err(format!("replica {} is still being removed", asked.replica)),
        }
    }

    /// Asks a replica's node how it is. A node that is just starting, or that does not answer in time, says
    /// nothing.
    pub(super) async fn probe(
        &self,
        shard: u64,
        replica: v1::Replica,
        timeout: Duration,
    ) -> Option<v1::GroupStatus> {
        let probe = peer::Probe { shard, replica: replica.id, node: false };
        let own = self.membership.identity().is_some_and(|(_, own)| own.0 == replica.node);
        let answer = match own {
            true => self.answer_probe(probe),
            false => {
                let target = Target::Node(NodeId(replica.node));
                self.commands.command(target, Kind::Probe(probe), timeout).await.ok()?
            }
        };
        let status = v1::GroupStatus::decode(answer.body).ok()?;
        (status.replica == replica.id).then_some(status)
    }

    /// Says how a replica of this node is, or the node, where that is asked for.
    pub(super) fn answer_probe(&self, probe: peer::Probe) -> peer::CommandDone {
        if probe.node {
            let body = self.report().encode_to_vec().into();
            return peer::CommandDone { body, ..Default::default() };
        }
        if probe.replica == 0 {
            return peer::CommandDone::default();
        }
        let running = self.host.group(ShardId(probe.shard));
        let running = running.filter(|group| group.replica().0 == probe.replica);
        if let Some(group) = running.filter(|group| group.status().failed.is_none()) {
            let body = self.replica_status(&group, false).encode_to_vec().into();
            return peer::CommandDone { body, ..Default::default() };
        }
        let role = match self.host.condition(ReplicaId(probe.replica)) {
            Condition::Runs => "",
            Condition::Damaged => DAMAGED,
            Condition::Absent => ABSENT,
        };
        let (shard, replica, role) = (probe.shard, probe.replica, role.to_owned());
        let status = v1::GroupStatus { shard, replica, role, ..Default::default() };
        peer::CommandDone { body: status.encode_to_vec().into(), ..Default::default() }
    }
}

fn not_changed(error: &ChangeError) -> peer::CommandDone {
    let ask_node = match error {
        ChangeError::NotLeader { leader } => leader.map_or(0, |node| node.0),
        _ => 0,
    };
    peer::CommandDone { error: error.to_string(), ask_node, ..Default::default() }
}

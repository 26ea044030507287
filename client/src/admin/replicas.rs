//! Owns what operators ask of replicas: where they are, how far, and how many read replicas there
//! shall be.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::v1;

use super::Admin;
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::topology::{NodeId, ReplicaId, ShardId};

/// A member of a group, as the group's leader sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemberStatus {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// Whether it counts for the quorum.
    pub voter: bool,
    /// Up to which index it holds the log.
    pub matched_index: u64,
    /// Entries that it is not known to hold.
    pub lag_entries: u64,
    /// For how long the first of them has been there.
    pub lag: Duration,
    /// Since it last answered; `None` when it never did.
    pub heard: Option<Duration>,
}

/// A replica, by the map.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReplicaPlace {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// Whether it counts for the quorum.
    pub voter: bool,
    /// It does not hold what the others hold yet.
    pub joining: bool,
    /// Of one that does not vote: it will.
    pub becomes_voter: bool,
}

/// How many read replicas every shard shall have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReadReplicas {
    /// On nodes of this zone; empty: on any, beside those that zones ask for.
    pub zone: String,
    /// Of each shard.
    pub learners: u32,
}

/// The replicas of all shards, and what is asked for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Replicas {
    /// The settings.
    pub read_replicas: Vec<ReadReplicas>,
    /// All replicas, by shard as in the map.
    pub places: Vec<ReplicaPlace>,
}

/// A read replica that is to come or to go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReplicaChange {
    /// The shard.
    pub shard: ShardId,
    /// The node.
    pub node: NodeId,
    /// The replica, where it has an id.
    pub replica: Option<ReplicaId>,
}

/// What comes of a setting.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ReadReplicasSet {
    /// Will be made.
    pub made: Vec<ReplicaChange>,
    /// Will be removed.
    pub removed: Vec<ReplicaChange>,
    /// Where there will be fewer than asked for.
    pub warnings: Vec<String>,
}

impl Admin {
    /// The replicas of all shards and the settings of read replicas, as any node knows them now.
    pub async fn replicas(&self) -> Result<Replicas, Error> {
        let map = self.any(self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().cluster().get_map(v1::GetMapRequest {}).await
        });
        let map = map.await?.map.unwrap_or_default();
        let place = |shard: ShardId, replica: &v1::Replica| ReplicaPlace {
            shard,
            replica: ReplicaId(replica.id),
            node: NodeId(replica.node),
            voter: replica.role() == v1::ReplicaRole::Voter,
            joining: replica.joining,
            becomes_voter: replica.becomes_voter,
        };
        let places = map.shards.iter().flat_map(|shard| {
            shard.replicas.iter().map(|replica| place(ShardId(shard.id), replica))
        });
        let rules = map.read_replicas.iter();
        let rule = |rule: &v1::ReadReplicas| ReadReplicas {
            zone: rule.zone.clone(),
            learners: rule.learners,
        };
        Ok(Replicas { read_replicas: rules.map(rule).collect(), places: places.collect() })
    }

    /// Sets how many read replicas every shard has in a zone (an empty one: on any nodes, beside
    /// those that zones ask for). Returns when it is recorded: the replicas are made and removed
    /// afterwards. With `validate_only` it only says which.
    pub async fn set_read_replicas(
        &self,
        zone: &str,
        learners: u32,
        validate_only: bool,
    ) -> Result<ReadReplicasSet, Error> {
        coracle_proto::limits::check_learners(learners.into())?;
        let set = self.any(self.timeout(), !validate_only, |node: Arc<Pipeline>| {
            let zone = zone.to_owned();
            let request = v1::SetReadReplicasRequest { zone, learners, validate_only };
            async move { node.connection().admin().set_read_replicas(request).await }
        });
        let set = set.await?;
        Ok(ReadReplicasSet {
            made: set.made.iter().map(ReplicaChange::from_wire).collect(),
            removed: set.removed.iter().map(ReplicaChange::from_wire).collect(),
            warnings: set.warnings,
        })
    }
}

impl ReplicaChange {
    fn from_wire(change: &v1::ReplicaChange) -> ReplicaChange {
        ReplicaChange {
            shard: ShardId(change.shard),
            node: NodeId(change.node),
            replica: (change.replica != 0).then_some(ReplicaId(change.replica)),
        }
    }
}

impl MemberStatus {
    pub(super) fn from_wire(member: &v1::MemberStatus) -> MemberStatus {
        MemberStatus {
            replica: ReplicaId(member.replica),
            node: NodeId(member.node),
            voter: member.role() == v1::ReplicaRole::Voter,
            matched_index: member.matched_index,
            lag_entries: member.lag_entries,
            lag: Duration::from_millis(member.lag_ms),
            heard: (member.heard_ms != u64::MAX).then(|| Duration::from_millis(member.heard_ms)),
        }
    }
}

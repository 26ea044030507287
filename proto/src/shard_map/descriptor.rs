//! Owns the parts of a shard map, each checked by itself: ids, shards, replicas, keyspaces, nodes.
//! Does not check what holds between them (see [`super::ShardMap`]).

use std::collections::BTreeSet;
use std::fmt;

use crate::entity::{EntityRule, EntityRuleError};
use crate::limits::{KeyspaceNameError, REPLICAS_MAX, check_keyspace_name};
use crate::ring::{Arc, Position, TilingError};
use crate::v1;
pub use crate::v1::NodeState;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        /// The plain number.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A server process, by the id in its data directory, never by its address. From 1.
    NodeId(u64)
}
number! {
    /// A shard and its group. [`META_SHARD`] is 0; the arcs' shards count from 1.
    ShardId(u64)
}
number! {
    /// A group's member on a node. From 1, allocated once, never reused.
    ReplicaId(u64)
}
number! {
    /// A keyspace. Never reused.
    KeyspaceId(u32)
}
number! {
    /// Counts the versions of a shard's descriptor, or of the whole map: the higher one is newer.
    Epoch(u64)
}

/// The meta group: holds the cluster's own records. It has no arc.
pub const META_SHARD: ShardId = ShardId(0);
/// The cluster's own records. Outside the ring, wholly in [`META_SHARD`]; clients may not write it.
pub const SYSTEM_KEYSPACE: KeyspaceId = KeyspaceId(0);
/// See [`SYSTEM_KEYSPACE`].
pub const SYSTEM_KEYSPACE_NAME: &str = "system";
/// The keyspace that always exists, and that an empty name means.
pub const DEFAULT_KEYSPACE: KeyspaceId = KeyspaceId(1);
/// See [`DEFAULT_KEYSPACE`].
pub const DEFAULT_KEYSPACE_NAME: &str = "default";

/// What a replica may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplicaRole {
    /// Votes and counts for the quorum.
    Voter,
    /// A read replica.
    Learner,
}

/// One replica of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    /// Its own id.
    pub id: ReplicaId,
    /// The node that holds it.
    pub node: NodeId,
    /// What it may do.
    pub role: ReplicaRole,
    /// It does not hold what the others hold yet: readers go elsewhere.
    pub joining: bool,
    /// Of one that is joining: it will vote. Until then it is a learner.
    pub becomes_voter: bool,
    /// Of one that will vote: the replica that goes when it does.
    pub replaces: Option<ReplicaId>,
    /// Of a voter: it goes, and nobody takes its place.
    pub goes: bool,
}

/// How many read replicas every shard of the ring shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadReplicas {
    /// On nodes of this zone; empty: on any nodes, beside those that zones ask for.
    pub zone: String,
    /// Of each shard.
    pub learners: u32,
}

/// One shard and who replicates it.
///
/// Invariants: at least one voter; at most one replica a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Its id.
    pub id: ShardId,
    /// Its stretch of the ring; `None` for [`META_SHARD`], and only for it.
    pub arc: Option<Arc>,
    /// Raised by every split, merge and membership change.
    pub epoch: Epoch,
    /// All replicas.
    pub replicas: Vec<Replica>,
    /// The last known leader: a hint. Always one of the replicas' nodes.
    pub leader: Option<NodeId>,
    /// The term of that hint; 0 before the first.
    pub leader_term: u64,
    /// True until every first replica has been made.
    pub forming: bool,
}

/// A keyspace and its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyspace {
    /// Its id.
    pub id: KeyspaceId,
    /// `[a-z0-9_-]{1,64}`.
    pub name: String,
    /// How its keys find their entities. Fixed at creation.
    pub rule: EntityRule,
    /// How long old versions stay readable, in milliseconds.
    pub history_ms: u64,
    /// Counts the changes of the settings; 0: the defaults.
    pub revision: u64,
}

/// One server process as the map knows it. An address may be empty where none is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// host:port of the public listener.
    pub address: String,
    /// host:port of the listener for peers.
    pub peer_address: String,
    /// host:port of the HTTP listener.
    pub http_address: String,
    /// Failure domain.
    pub zone: String,
    /// What it is doing; `Unspecified` for a state of a newer version.
    pub state: NodeState,
    /// Software version.
    pub version: String,
    /// What it drew when it asked to join; 0 for a node of the first hour.
    pub join_nonce: u64,
    /// Its share of replicas, in thousandths of an ordinary node's; 0 means 1,000.
    pub weight: u32,
}

/// A map that would send somebody to a wrong place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardMapError {
    /// The arcs do not tile the ring.
    #[error("shard map: {0}")]
    Tiling(#[from] TilingError),
    /// A shard that cannot be one.
    #[error("shard map: shard {id}: {why}")]
    Shard {
        /// Its id.
        id: ShardId,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A keyspace that cannot be one.
    #[error("shard map: keyspace {id}: {why}")]
    Keyspace {
        /// Its id.
        id: KeyspaceId,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A keyspace's name that cannot be one.
    #[error("shard map: {0}")]
    Name(#[from] KeyspaceNameError),
    /// An entity rule that cannot be one.
    #[error("shard map: {0}")]
    Rule(#[from] EntityRuleError),
    /// A node that cannot be one.
    #[error("shard map: node {id}: {why}")]
    Node {
        /// Its id.
        id: NodeId,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The map of another cluster, or of none.
    #[error("shard map: of cluster {got:?}, not of {wanted:?}")]
    Cluster {
        /// The cluster that is meant; empty when any is.
        wanted: String,
        /// The cluster in the map.
        got: String,
    },
    /// More than any cluster may have.
    #[error("shard map: {got} {what}, at most {max}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
        /// How many.
        got: usize,
    },
}

impl Shard {
    /// Checks one descriptor by itself.
    pub fn from_proto(shard: &v1::Shard) -> Result<Shard, ShardMapError> {
        let id = ShardId(shard.id);
        let wrong = |why| ShardMapError::Shard { id, why };
        let arc = match id {
            META_SHARD if shard.start == 0 && shard.end == 0 => None,
            META_SHARD => return Err(wrong("the meta group has no arc")),
            _ => Some(Arc::new(shard.start, shard.end).ok_or(wrong("its arc is empty or wraps"))?),
        };
        check_count("replicas of a shard", REPLICAS_MAX, shard.replicas.len())?;
        let mut replicas = Vec::with_capacity(shard.replicas.len());
        let mut nodes = BTreeSet::new();
        for replica in &shard.replicas {
            let role = match replica.role() {
                v1::ReplicaRole::Voter => ReplicaRole::Voter,
                v1::ReplicaRole::Learner => ReplicaRole::Learner,
                v1::ReplicaRole::Unspecified => return Err(wrong("a replica has no known role")),
            };
            if replica.id == 0 || replica.node == 0 {
                return Err(wrong("a replica has no id or no node"));
            }
            if !nodes.insert(replica.node) {
                return Err(wrong("a node holds two of its replicas"));
            }
            replicas.push(Replica {
                id: ReplicaId(replica.id),
                node: NodeId(replica.node),
                role,
                joining: replica.joining,
                becomes_voter: replica.becomes_voter,
                replaces: (replica.replaces != 0).then_some(ReplicaId(replica.replaces)),
                goes: replica.goes,
            });
        }
        if !replicas.iter().any(|replica| replica.role == ReplicaRole::Voter) {
            return Err(wrong("it has no voter"));
        }
        let epoch = Epoch(shard.epoch);
        let mut checked = Shard {
            id,
            arc,
            epoch,
            replicas,
            leader: None,
            leader_term: 0,
            forming: shard.forming,
        };
        checked.learn_leader(NodeId(shard.leader_node), shard.leader_term);
        Ok(checked)
    }

    /// As it travels.
    pub fn to_proto(&self) -> v1::Shard {
        let replica = |replica: &Replica| v1::Replica {
            id: replica.id.0,
            node: replica.node.0,
            role: match replica.role {
                ReplicaRole::Voter => v1::ReplicaRole::Voter,
                ReplicaRole::Learner => v1::ReplicaRole::Learner,
            }
            .into(),
            joining: replica.joining,
            becomes_voter: replica.becomes_voter,
            replaces: replica.replaces.map_or(0, |id| id.0),
            goes: replica.goes,
        };
        v1::Shard {
            id: self.id.0,
            start: self.arc.map_or(0, |arc| arc.start().0),
            end: self.arc.map_or(0, |arc| arc.end()),
            epoch: self.epoch.0,
            replicas: self.replicas.iter().map(replica).collect(),
            leader_node: self.leader.map_or(0, |node| node.0),
            leader_term: self.leader_term,
            forming: self.forming,
        }
    }

    /// Whether a position of the ring lies in the shard. The meta group has none.
    pub fn contains(&self, position: Position) -> bool {
        self.arc.is_some_and(|arc| arc.contains(position))
    }

    /// The replica on a node.
    pub fn replica_on(&self, node: NodeId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.node == node)
    }

    /// The replicas that vote.
    pub fn voters(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter(|replica| replica.role == ReplicaRole::Voter)
    }

    /// The read replicas.
    pub fn learners(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter(|replica| replica.role == ReplicaRole::Learner)
    }

    /// Takes a leader hint when its term is higher, or the same and none was known. True when it
    /// changed something. Hints for nodes without a replica are dropped: the map is too old for
    /// them, or they for the map.
    pub fn learn_leader(&mut self, node: NodeId, term: u64) -> bool {
        let newer = term > self.leader_term || (term == self.leader_term && self.leader.is_none());
        let take = newer && self.replica_on(node).is_some();
        if take {
            (self.leader, self.leader_term) = (Some(node), term);
        }
        take
    }
}

impl Keyspace {
    /// Checks a keyspace by itself.
    pub fn from_proto(keyspace: &v1::Keyspace) -> Result<Keyspace, ShardMapError> {
        let id = KeyspaceId(keyspace.id);
        check_keyspace_name(&keyspace.name)?;
        let reserved = match keyspace.name.as_str() {
            SYSTEM_KEYSPACE_NAME => Some(SYSTEM_KEYSPACE),
            DEFAULT_KEYSPACE_NAME => Some(DEFAULT_KEYSPACE),
            _ => None,
        };
        if reserved.unwrap_or(id) != id
            || (reserved.is_none() && (id == SYSTEM_KEYSPACE || id == DEFAULT_KEYSPACE))
        {
            let why = "ids 0 and 1 belong to the names system and default, and only they";
            return Err(ShardMapError::Keyspace { id, why });
        }
        let rule = keyspace.entity_rule.as_ref().ok_or(EntityRuleError::Unknown)?;
        let (rule, name) = (EntityRule::try_from(rule)?, keyspace.name.clone());
        Ok(Keyspace {
            id,
            name,
            rule,
            history_ms: keyspace.history_ms,
            revision: keyspace.revision,
        })
    }

    /// As it travels.
    pub fn to_proto(&self) -> v1::Keyspace {
        v1::Keyspace {
            id: self.id.0,
            name: self.name.clone(),
            entity_rule: Some(self.rule.into()),
            history_ms: self.history_ms,
            revision: self.revision,
        }
    }
}

impl Node {
    /// Checks a node by itself.
    pub fn from_proto(node: &v1::Node) -> Result<Node, ShardMapError> {
        let id = NodeId(node.id);
        if id.0 == 0 {
            return Err(ShardMapError::Node { id, why: "ids count from 1" });
        }
        Ok(Node {
            id,
            address: node.address.clone(),
            peer_address: node.peer_address.clone(),
            http_address: node.http_address.clone(),
            zone: node.zone.clone(),
            state: node.state(),
            version: node.version.clone(),
            join_nonce: node.join_nonce,
            weight: node.weight,
        })
    }

    /// As it travels.
    pub fn to_proto(&self) -> v1::Node {
        v1::Node {
            id: self.id.0,
            address: self.address.clone(),
            peer_address: self.peer_address.clone(),
            zone: self.zone.clone(),
            state: self.state.into(),
            version: self.version.clone(),
            join_nonce: self.join_nonce,
            weight: self.weight,
            http_address: self.http_address.clone(),
        }
    }
}

pub(super) fn check_count(what: &'static str, max: usize, got: usize) -> Result<(), ShardMapError> {
    if got > max {
        return Err(ShardMapError::TooMany { what, max, got });
    }
    Ok(())
}

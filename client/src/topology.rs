//! Owns the public picture of a cluster: nodes, shards, replicas, keyspaces, as plain values. Does
//! not route (see `route`): what is here is for people and tools to look at.

use std::fmt;
use std::time::Duration;

pub use coracle_proto::entity::EntityRule;
use coracle_proto::shard_map;
pub use coracle_proto::shard_map::{NodeId, ReplicaId, ShardId};
use coracle_proto::v1;

/// The shard map as one node knew it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ClusterMap {
    /// The cluster's id.
    pub cluster_id: String,
    /// Rises with every change of arcs or replicas.
    pub epoch: u64,
    /// In ring order, the meta group first.
    pub shards: Vec<Shard>,
    /// All nodes.
    pub nodes: Vec<Node>,
    /// All keyspaces.
    pub keyspaces: Vec<KeyspaceInfo>,
    /// Voters that every shard shall have, where there are so many nodes.
    pub voters_wanted: usize,
}

/// One shard of the map.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Shard {
    /// The shard.
    pub id: ShardId,
    /// First position of its arc; the meta group has no arc.
    pub start: u64,
    /// One past the last position; 0 means 2^64.
    pub end: u64,
    /// Raised by every split, merge and membership change.
    pub epoch: u64,
    /// All its replicas.
    pub replicas: Vec<Replica>,
    /// The last known leader.
    pub leader: Option<NodeId>,
    /// The term of that leader.
    pub leader_term: u64,
}

/// One replica of a shard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Replica {
    /// The replica.
    pub id: ReplicaId,
    /// The node that holds it.
    pub node: NodeId,
    /// Whether it votes; a learner only reads.
    pub voter: bool,
    /// It does not hold yet what the others hold: reads go elsewhere.
    pub joining: bool,
    /// Of one that does not vote: it will.
    pub becomes_voter: bool,
    /// Of one that will vote: the replica of this shard that goes when it does.
    pub replaces: Option<ReplicaId>,
    /// Of a voter: it goes, and nobody takes its place.
    pub goes: bool,
}

/// One node of the map.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// The node.
    pub id: NodeId,
    /// `host:port` for clients.
    pub address: String,
    /// `host:port` for other nodes.
    pub peer_address: String,
    /// `host:port` for metrics and health; empty when there is none.
    pub http_address: String,
    /// Failure domain.
    pub zone: String,
    /// What it is doing.
    pub state: NodeState,
    /// Software version.
    pub version: String,
    /// Its share of replicas, in thousandths of an ordinary node's.
    pub weight: u32,
}

/// What a node is doing.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum NodeState {
    /// Not said.
    #[default]
    Unknown,
    /// Known, holds nothing yet.
    Joining,
    /// Serves.
    Active,
    /// Gives its leaderships away.
    Draining,
    /// Gives away its leaderships and its replicas.
    Decommissioning,
    /// Holds no data any more.
    Decommissioned,
    /// Does not answer.
    Down,
    /// Removed for ever.
    Gone,
}

impl fmt::Display for NodeState {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            NodeState::Unknown => "unknown",
            NodeState::Joining => "joining",
            NodeState::Active => "active",
            NodeState::Draining => "draining",
            NodeState::Decommissioning => "decommissioning",
            NodeState::Decommissioned => "decommissioned",
            NodeState::Down => "down",
            NodeState::Gone => "gone",
        })
    }
}

/// A keyspace and its settings.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyspaceInfo {
    /// Never reused.
    pub id: u32,
    /// `[a-z0-9_-]{1,64}`.
    pub name: String,
    /// Fixed when the keyspace was created.
    pub entity_rule: EntityRule,
    /// How long old versions stay readable.
    pub history: Duration,
}

impl ClusterMap {
    pub(crate) fn of(map: &shard_map::ShardMap) -> ClusterMap {
        ClusterMap {
            cluster_id: map.cluster_id().to_owned(),
            epoch: map.epoch().0,
            shards: map.all_shards().map(Shard::of).collect(),
            nodes: map.nodes().map(|node| Node::from_wire(node.to_proto())).collect(),
            keyspaces: map.keyspaces().map(KeyspaceInfo::of).collect(),
            voters_wanted: map.replicas(),
        }
    }

    /// The node with this id.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// The shard with this id.
    pub fn shard(&self, id: ShardId) -> Option<&Shard> {
        self.shards.iter().find(|shard| shard.id == id)
    }
}

impl NodeState {
    pub(crate) fn to_wire(self) -> v1::NodeState {
        match self {
            NodeState::Unknown => v1::NodeState::Unspecified,
            NodeState::Joining => v1::NodeState::Joining,
            NodeState::Active => v1::NodeState::Active,
            NodeState::Draining => v1::NodeState::Draining,
            NodeState::Decommissioning => v1::NodeState::Decommissioning,
            NodeState::Decommissioned => v1::NodeState::Decommissioned,
            NodeState::Down => v1::NodeState::Down,
            NodeState::Gone => v1::NodeState::Gone,
        }
    }

    /// It has left for good: nobody waits for it.
    pub fn has_left(self) -> bool {
        matches!(self, NodeState::Decommissioned | NodeState::Gone)
    }
}

impl Shard {
    fn of(shard: &shard_map::Shard) -> Shard {
        Shard {
            id: shard.id,
            start: shard.arc.map_or(0, |arc| arc.start().0),
            end: shard.arc.map_or(0, |arc| arc.end()),
            epoch: shard.epoch.0,
            replicas: shard.replicas.iter().map(Replica::of).collect(),
            leader: shard.leader,
            leader_term: shard.leader_term,
        }
    }
}

impl Replica {
    fn of(replica: &shard_map::Replica) -> Replica {
        Replica {
            id: replica.id,
            node: replica.node,
            voter: replica.role == shard_map::ReplicaRole::Voter,
            joining: replica.joining,
            becomes_voter: replica.becomes_voter,
            replaces: replica.replaces,
            goes: replica.goes,
        }
    }
}

impl Node {
    pub(crate) fn from_wire(node: v1::Node) -> Node {
        Node {
            state: match node.state() {
                v1::NodeState::Unspecified => NodeState::Unknown,
                v1::NodeState::Joining => NodeState::Joining,
                v1::NodeState::Active => NodeState::Active,
                v1::NodeState::Draining => NodeState::Draining,
                v1::NodeState::Decommissioning => NodeState::Decommissioning,
                v1::NodeState::Decommissioned => NodeState::Decommissioned,
                v1::NodeState::Down => NodeState::Down,
                v1::NodeState::Gone => NodeState::Gone,
            },
            id: NodeId(node.id),
            address: node.address,
            peer_address: node.peer_address,
            http_address: node.http_address,
            zone: node.zone,
            weight: if node.weight == 0 { 1_000 } else { node.weight },
            version: node.version,
        }
    }
}

impl KeyspaceInfo {
    pub(crate) fn of(keyspace: &shard_map::Keyspace) -> KeyspaceInfo {
        KeyspaceInfo {
            id: keyspace.id.0,
            name: keyspace.name.clone(),
            entity_rule: keyspace.rule,
            history: Duration::from_millis(keyspace.history_ms),
        }
    }
}

//! Owns the shard map: the checked table arc → shard → replicas, with nodes and keyspaces, and the
//! way from a key to its shard. Does not fetch or watch it: client and server do.

use std::collections::{BTreeMap, BTreeSet};

use crate::limits::{KEYSPACES_MAX, LEARNERS_MAX, NODES_MAX, SHARDS_MAX};
use crate::ring::{self, Arc, Position};
use crate::v1;

mod descriptor;

use descriptor::check_count;
pub use descriptor::{
    DEFAULT_KEYSPACE, DEFAULT_KEYSPACE_NAME, Epoch, Keyspace, KeyspaceId, META_SHARD, Node, NodeId,
    NodeState, ReadReplicas, Replica, ReplicaId, ReplicaRole, SYSTEM_KEYSPACE,
    SYSTEM_KEYSPACE_NAME, Shard, ShardId, ShardMapError,
};

/// Voters of a shard where nobody said how many: they outlive one of them.
const REPLICAS_DEFAULT: usize = 3;

/// The versioned table of the ring, checked.
///
/// Invariants:
/// - the arcs tile the ring exactly, so that [`ShardMap::locate`] always finds one shard;
/// - no shard, replica, node or keyspace id and no keyspace name stands twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardMap {
    cluster_id: String,
    hash_seed: u64,
    epoch: Epoch,
    server_time_ms: u64,
    meta: Shard,
    /// In ring order; each has an arc.
    shards: Vec<Shard>,
    /// First position of each shard, in the same order: a search touches only these.
    starts: Vec<Position>,
    /// Id → place in `shards`.
    places: BTreeMap<ShardId, usize>,
    nodes: BTreeMap<NodeId, Node>,
    keyspaces: BTreeMap<KeyspaceId, Keyspace>,
    names: BTreeMap<String, KeyspaceId>,
    read_replicas: Vec<ReadReplicas>,
    replicas: u32,
}

impl ShardMap {
    /// Checks a map that came from outside, in any order. Never panics.
    pub fn from_proto(map: &v1::ShardMap) -> Result<ShardMap, ShardMapError> {
        if map.cluster_id.is_empty() {
            let (wanted, got) = (String::new(), String::new());
            return Err(ShardMapError::Cluster { wanted, got });
        }
        let (meta, shards) = checked_shards(&map.shards)?;
        let (keyspaces, names) = checked_keyspaces(&map.keyspaces)?;
        let starts = shards.iter().filter_map(|shard| shard.arc).map(Arc::start).collect();
        let places = shards.iter().enumerate().map(|(at, shard)| (shard.id, at)).collect();
        Ok(ShardMap {
            cluster_id: map.cluster_id.clone(),
            hash_seed: map.hash_seed,
            epoch: Epoch(map.epoch),
            server_time_ms: map.server_time_ms,
            meta,
            shards,
            starts,
            places,
            nodes: checked_nodes(&map.nodes)?,
            keyspaces,
            names,
            read_replicas: checked_rules(&map.read_replicas)?,
            replicas: map.replicas,
        })
    }

    /// As it travels: shard 0 first, then in ring order.
    pub fn to_proto(&self) -> v1::ShardMap {
        v1::ShardMap {
            cluster_id: self.cluster_id.clone(),
            hash_seed: self.hash_seed,
            epoch: self.epoch.0,
            shards: self.all_shards().map(Shard::to_proto).collect(),
            nodes: self.nodes.values().map(Node::to_proto).collect(),
            keyspaces: self.keyspaces.values().map(Keyspace::to_proto).collect(),
            server_time_ms: self.server_time_ms,
            read_replicas: self.read_replicas.iter().map(rule_to_proto).collect(),
            replicas: self.replicas,
        }
    }

    /// The cluster.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Seed of the position hash, fixed at init.
    pub fn hash_seed(&self) -> u64 {
        self.hash_seed
    }

    /// Rises with every change of arcs, replicas, nodes or keyspaces; not with leader hints.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The wall clock, in milliseconds, of the server that gave the map.
    pub fn server_time_ms(&self) -> u64 {
        self.server_time_ms
    }

    /// The shard at a position.
    pub fn locate(&self, position: Position) -> &Shard {
        let behind = self.starts.partition_point(|start| *start <= position);
        // Not before the first: the arcs tile the ring, so the first starts at 0.
        &self.shards[behind - 1]
    }

    /// The shard of a key.
    pub fn locate_key(&self, keyspace: &Keyspace, key: &[u8]) -> &Shard {
        match keyspace.id {
            SYSTEM_KEYSPACE => &self.meta,
            _ => self.locate(self.position_of(keyspace, key)),
        }
    }

    /// The position of a key's entity. Means nothing for keys of [`SYSTEM_KEYSPACE`].
    pub fn position_of(&self, keyspace: &Keyspace, key: &[u8]) -> Position {
        ring::position(self.hash_seed, keyspace.id.0, keyspace.rule.entity(key))
    }

    /// The shards of the ring, in its order; the meta group is not among them.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The meta group.
    pub fn meta(&self) -> &Shard {
        &self.meta
    }

    /// The meta group, then the shards of the ring in its order.
    pub fn all_shards(&self) -> impl Iterator<Item = &Shard> {
        std::iter::once(&self.meta).chain(&self.shards)
    }

    /// A shard by its id, the meta group too.
    pub fn shard(&self, id: ShardId) -> Option<&Shard> {
        match id {
            META_SHARD => Some(&self.meta),
            _ => self.places.get(&id).map(|at| &self.shards[*at]),
        }
    }

    /// A keyspace by name, as requests have it: the empty name means `default`.
    pub fn keyspace(&self, name: &str) -> Option<&Keyspace> {
        let name = if name.is_empty() { DEFAULT_KEYSPACE_NAME } else { name };
        self.names.get(name).and_then(|id| self.keyspaces.get(id))
    }

    /// A keyspace by id.
    pub fn keyspace_by_id(&self, id: KeyspaceId) -> Option<&Keyspace> {
        self.keyspaces.get(&id)
    }

    /// The keyspaces, by id.
    pub fn keyspaces(&self) -> impl Iterator<Item = &Keyspace> {
        self.keyspaces.values()
    }

    /// How many read replicas every shard shall have, by zone.
    pub fn read_replicas(&self) -> &[ReadReplicas] {
        &self.read_replicas
    }

    /// How many voters every shard shall have, where there are so many nodes.
    pub fn replicas(&self) -> usize {
        if self.replicas == 0 { REPLICAS_DEFAULT } else { self.replicas as usize }
    }

    /// A node by id.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// The nodes, by id.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// Takes a leader hint, see [`Shard::learn_leader`]. False also for an unknown shard.
    pub fn learn_leader(&mut self, shard: ShardId, node: NodeId, term: u64) -> bool {
        let found = match shard {
            META_SHARD => Some(&mut self.meta),
            _ => self.places.get(&shard).map(|at| &mut self.shards[*at]),
        };
        found.is_some_and(|shard| shard.learn_leader(node, term))
    }

    /// Takes another map of the same cluster in: of the two the one with the higher epoch stands
    /// (the other one where both are the same), and of each shard the leader with the higher term.
    /// True when anything but the server's time changed.
    pub fn merge(&mut self, other: ShardMap) -> Result<bool, ShardMapError> {
        if other.cluster_id != self.cluster_id || other.hash_seed != self.hash_seed {
            let (wanted, got) = (self.cluster_id.clone(), other.cluster_id);
            return Err(ShardMapError::Cluster { wanted, got });
        }
        let server_time_ms = self.server_time_ms.max(other.server_time_ms);
        let other_stands = other.epoch >= self.epoch;
        let (mut merged, hints) =
            if other_stands { (other, &*self) } else { (self.clone(), &other) };
        for hint in hints.all_shards() {
            if let Some(leader) = hint.leader {
                merged.learn_leader(hint.id, leader, hint.leader_term);
            }
        }
        merged.server_time_ms = self.server_time_ms;
        let changed = merged != *self;
        merged.server_time_ms = server_time_ms;
        *self = merged;
        Ok(changed)
    }
}

/// The meta group, and the others in ring order.
fn checked_shards(given: &[v1::Shard]) -> Result<(Shard, Vec<Shard>), ShardMapError> {
    check_count("shards", SHARDS_MAX + 1, given.len())?;
    let mut meta = None;
    let mut shards = Vec::with_capacity(given.len());
    let (mut ids, mut replicas) = (BTreeSet::new(), BTreeSet::new());
    for shard in given {
        let shard = Shard::from_proto(shard)?;
        let wrong = |why| ShardMapError::Shard { id: shard.id, why };
        if !ids.insert(shard.id) {
            return Err(wrong("it stands in the map twice"));
        }
        if !shard.replicas.iter().all(|replica| replicas.insert(replica.id)) {
            return Err(wrong("one of its replica ids stands in the map twice"));
        }
        match shard.id {
            META_SHARD => meta = Some(shard),
            _ => shards.push(shard),
        }
    }
    let why = "the meta group is missing";
    let meta = meta.ok_or(ShardMapError::Shard { id: META_SHARD, why })?;
    shards.sort_by_key(|shard| shard.arc.map(Arc::start));
    ring::check_tiling(shards.iter().filter_map(|shard| shard.arc))?;
    Ok((meta, shards))
}

fn checked_nodes(given: &[v1::Node]) -> Result<BTreeMap<NodeId, Node>, ShardMapError> {
    check_count("nodes", NODES_MAX, given.len())?;
    let mut nodes = BTreeMap::new();
    for node in given {
        let node = Node::from_proto(node)?;
        let id = node.id;
        if nodes.insert(id, node).is_some() {
            return Err(ShardMapError::Node { id, why: "it stands in the map twice" });
        }
    }
    Ok(nodes)
}

fn checked_rules(given: &[v1::ReadReplicas]) -> Result<Vec<ReadReplicas>, ShardMapError> {
    check_count("settings of read replicas", LEARNERS_MAX as usize, given.len())?;
    let rule =
        |rule: &v1::ReadReplicas| ReadReplicas { zone: rule.zone.clone(), learners: rule.learners };
    Ok(given.iter().map(rule).collect())
}

fn rule_to_proto(rule: &ReadReplicas) -> v1::ReadReplicas {
    v1::ReadReplicas { zone: rule.zone.clone(), learners: rule.learners }
}

type Keyspaces = (BTreeMap<KeyspaceId, Keyspace>, BTreeMap<String, KeyspaceId>);

fn checked_keyspaces(given: &[v1::Keyspace]) -> Result<Keyspaces, ShardMapError> {
    // Besides those that may be created, the two that always are.
    check_count("keyspaces", KEYSPACES_MAX + 2, given.len())?;
    let (mut keyspaces, mut names) = (BTreeMap::new(), BTreeMap::new());
    for keyspace in given {
        let keyspace = Keyspace::from_proto(keyspace)?;
        let id = keyspace.id;
        let named_twice = names.insert(keyspace.name.clone(), id).is_some();
        if keyspaces.insert(id, keyspace).is_some() || named_twice {
            return Err(ShardMapError::Keyspace { id, why: "its id or name stands twice" });
        }
    }
    Ok((keyspaces, names))
}

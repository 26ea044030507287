//! Owns the state of a fake cluster: its map, its clock, and every version of every key. Plain data
//! and plain functions: nothing here waits or sends. What a write does is in `write`, what a read
//! finds in `read`, the pages of a scan in `scan`, the steps of a delete-range in `range`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::entity::EntityRule;
use coracle_proto::limits;
use coracle_proto::reason::{Fault, Reason, metadata};
use coracle_proto::ring::equal_arcs;
use coracle_proto::shard_map::{
    DEFAULT_KEYSPACE, DEFAULT_KEYSPACE_NAME, Keyspace, KeyspaceId, Shard, ShardMap,
};
use coracle_proto::v1;
use tokio::time::Instant;

use super::operations::Ledger;
use super::write::Memory;
use super::{Shape, address};
use crate::topology::{NodeId, ShardId};

/// What a fake cluster's clock shows at first, in milliseconds since 1970: always the same, so that
/// two runs of a test see the same.
const FIRST_MS: u64 = 1_700_000_000_000;

/// Bits of a version below the millisecond.
const COUNTER_BITS: u32 = 16;

/// Steps of a shard that a replica can be held back by. Beyond: it is at least so far.
const STEPS_MAX: usize = 10_000;

/// What every keyspace keeps readable, whatever its settings say: as in the servers.
const HISTORY_MS_MIN: u64 = 5_000;

/// When to come back to a shard without a leader, as servers say it.
const NO_QUORUM_RETRY: Duration = Duration::from_millis(200);

/// The state of all nodes together: one truth, which each replica shows up to where it has come.
pub(super) struct Model {
    /// As it travels; without the time.
    wire: v1::ShardMap,
    /// The same, checked.
    pub(super) map: ShardMap,
    pub(super) groups: BTreeMap<ShardId, Group>,
    pub(super) keys: BTreeMap<(KeyspaceId, Bytes), Vec<Held>>,
    /// What was gone when a keyspace's history changed: a longer one does not bring it back.
    gone: BTreeMap<KeyspaceId, u64>,
    pub(super) down: BTreeSet<NodeId>,
    pub(super) lags: BTreeMap<NodeId, Duration>,
    pub(super) shape: Shape,
    pub(super) is_made: bool,
    pub(super) forwards: bool,
    pub(super) page_entries: usize,
    started: Instant,
    advanced: Duration,
    pub(super) hops: u64,
    pub(super) duplicates: u64,
    /// What operators began.
    pub(super) ledger: Ledger,
}

/// One version of a key.
#[derive(Clone)]
pub(super) struct Held {
    pub(super) version: u64,
    /// `None` for a deletion.
    pub(super) value: Option<Bytes>,
    /// 0 for never.
    pub(super) expires_at: u64,
}

/// What belongs to one shard.
#[derive(Default)]
pub(super) struct Group {
    /// The highest version given out, or promised not to be given out any more.
    pub(super) clock: u64,
    pub(super) last: Step,
    /// The newest last; those before it, for replicas that are held back.
    steps: VecDeque<(Instant, Step)>,
    pub(super) memory: Memory,
}

/// A place in a shard's order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Step {
    pub(super) term: u64,
    pub(super) index: u64,
    /// The highest version up to there.
    pub(super) version: u64,
}

/// Where a key lives.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) keyspace: KeyspaceId,
    pub(super) shard: ShardId,
}

impl Held {
    /// Whether nothing is there for a read at `version`, or a write of it.
    pub(super) fn is_absent_at(&self, version: u64) -> bool {
        self.value.is_none() || (self.expires_at != 0 && self.expires_at <= version)
    }

    pub(super) fn entry(&self) -> v1::Entry {
        v1::Entry {
            value: self.value.clone().unwrap_or_default(),
            version: self.version,
            expires_at_ms: ms_of(self.expires_at),
        }
    }
}

impl Group {
    /// Takes the next place in the shard's order.
    pub(super) fn step(&mut self, now: Instant, term: u64, version: u64) -> Step {
        let step = Step { term, index: self.last.index + 1, version };
        self.steps.push_back((now, self.last));
        self.last = step;
        while self.steps.len() > STEPS_MAX {
            self.steps.pop_front();
        }
        step
    }

    /// What a shard begins with that was split off.
    pub(super) fn child(&self) -> Group {
        Group { clock: self.clock, memory: self.memory.clone(), ..Group::default() }
    }

    /// Takes in what a neighbour has.
    pub(super) fn absorb(&mut self, other: Group) {
        self.clock = self.clock.max(other.clock);
        self.last.version = self.last.version.max(other.last.version);
        self.memory.unite(other.memory);
    }

    /// How far a replica is that sees everything so much later, and when it is further.
    fn seen_after(&self, lag: Duration, now: Instant) -> Step {
        // Each entry holds what stood before its moment.
        let unseen = self.steps.iter().find(|(at, _)| *at + lag > now);
        unseen.map_or(self.last, |(_, before)| *before)
    }

    /// When a replica that sees everything so much later has come to `index`.
    pub(super) fn reached_at(&self, index: u64, lag: Duration) -> Option<Instant> {
        let reached = self.steps.iter().find(|(_, before)| before.index + 1 >= index);
        reached.map(|(at, _)| *at + lag)
    }
}

impl Model {
    pub(super) fn new(shape: &Shape) -> Model {
        let wire = map_of(shape);
        let map = ShardMap::from_proto(&wire).expect("the shape was checked");
        let groups = map.all_shards().map(|shard| (shard.id, Group::default())).collect();
        Model {
            wire,
            map,
            groups,
            keys: BTreeMap::new(),
            gone: BTreeMap::new(),
            down: BTreeSet::new(),
            lags: BTreeMap::new(),
            shape: shape.clone(),
            is_made: shape.is_made,
            forwards: shape.forwards,
            page_entries: shape.page_entries.min(limits::SCAN_PAGE_ENTRIES),
            started: Instant::now(),
            advanced: Duration::ZERO,
            hops: 0,
            duplicates: 0,
            ledger: Ledger::default(),
        }
    }

    /// The cluster's clock: what the test has advanced it by, and the time that has passed.
    pub(super) fn now_ms(&self) -> u64 {
        let passed = Instant::now().saturating_duration_since(self.started) + self.advanced;
        FIRST_MS + passed.as_millis() as u64
    }

    /// The clock as a version.
    pub(super) fn stamp(&self) -> u64 {
        version_at(self.now_ms())
    }

    pub(super) fn advance(&mut self, by: Duration) {
        self.advanced += by;
    }

    /// How long the cluster has been there.
    pub(super) fn uptime_ms(&self) -> u64 {
        self.now_ms() - FIRST_MS
    }

    /// The map as a node gives it; an empty one before the cluster was made.
    pub(super) fn wire_map(&self) -> v1::ShardMap {
        if !self.is_made {
            return v1::ShardMap { server_time_ms: self.now_ms(), ..Default::default() };
        }
        v1::ShardMap { server_time_ms: self.now_ms(), ..self.wire.clone() }
    }

    pub(super) fn change_map(&mut self, change: impl FnOnce(&mut v1::ShardMap)) {
        change(&mut self.wire);
        self.map = ShardMap::from_proto(&self.wire).expect("a change keeps the map whole");
    }

    pub(super) fn nodes(&self) -> Vec<NodeId> {
        self.map.nodes().map(|node| node.id).collect()
    }

    pub(super) fn leader(&self, shard: ShardId) -> Option<NodeId> {
        self.map.shard(shard)?.leader
    }

    /// Makes another node lead, or none, in a new term.
    pub(super) fn elect(&mut self, shard: ShardId, node: Option<NodeId>) {
        let known = self.map.shard(shard).unwrap_or_else(|| panic!("there is no shard {shard}"));
        let votes = |node: NodeId| known.voters().any(|voter| voter.node == node);
        assert!(node.is_none_or(votes), "{node:?} is no voter of shard {shard}");
        self.change_map(|map| {
            let shards = map.shards.iter_mut().filter(|other| other.id == shard.0);
            for shard in shards {
                shard.leader_node = node.map_or(0, |node| node.0);
                shard.leader_term += 1;
            }
        });
    }

    /// Raises the epoch of a shard, as a split or a change of replicas does.
    pub(super) fn raise_epoch(&mut self, shard: ShardId) {
        self.change_map(|map| {
            map.epoch += 1;
            map.shards
                .iter_mut()
                .filter(|other| other.id == shard.0)
                .for_each(|shard| shard.epoch += 1);
        });
    }

    /// Another state of a node in the map.
    pub(super) fn set_state(&mut self, node: NodeId, state: v1::NodeState) {
        self.change_map(|map| {
            map.epoch += 1;
            map.nodes
                .iter_mut()
                .filter(|other| other.id == node.0)
                .for_each(|node| node.state = state.into());
        });
    }

    pub(super) fn create_keyspace(
        &mut self,
        request: &v1::CreateKeyspaceRequest,
    ) -> Result<v1::Keyspace, Fault> {
        limits::check_keyspace_name(&request.name)?;
        limits::check_history(request.history_ms)?;
        let rule = EntityRule::from_request(request.entity_rule.as_ref())?;
        let history_ms = match request.has_history || request.history_ms > 0 {
            true => request.history_ms,
            false => limits::HISTORY_DEFAULT.as_millis() as u64,
        };
        if let Some(known) = self.map.keyspace(&request.name) {
            let same = known.rule == rule && known.history_ms == history_ms;
            let message = "a keyspace of this name stands, with other settings";
            let exists = Fault::new(Reason::KeyspaceExists, message);
            return if same { Ok(known.to_proto()) } else { Err(exists) };
        }
        let highest = self.map.keyspaces().map(|keyspace| keyspace.id.0).max().unwrap_or(0);
        let made = v1::Keyspace {
            id: highest + 1,
            name: request.name.clone(),
            entity_rule: Some(rule.into()),
            history_ms,
            revision: 1,
        };
        if !request.validate_only {
            self.change_map(|map| {
                map.epoch += 1;
                map.keyspaces.push(made.clone());
            });
        }
        Ok(made)
    }

    pub(super) fn update_keyspace(
        &mut self,
        request: &v1::UpdateKeyspaceRequest,
    ) -> Result<v1::Keyspace, Fault> {
        limits::check_history(request.history_ms)?;
        let mut changed = self.keyspace(&request.name)?.to_proto();
        let asked = request.has_history || request.history_ms > 0;
        if !asked || changed.history_ms == request.history_ms {
            return Ok(changed);
        }
        (changed.history_ms, changed.revision) = (request.history_ms, changed.revision + 1);
        if !request.validate_only {
            let id = KeyspaceId(changed.id);
            self.gone.insert(id, self.history_threshold(id));
            self.change_map(|map| {
                map.epoch += 1;
                let known = map.keyspaces.iter_mut().find(|known| known.id == changed.id);
                *known.expect("it was found just now") = changed.clone();
            });
        }
        Ok(changed)
    }

    /// A keyspace that clients may use.
    pub(super) fn keyspace(&self, name: &str) -> Result<&Keyspace, Fault> {
        let Some(keyspace) = self.map.keyspace(name) else {
            let fault = Fault::new(Reason::UnknownKeyspace, "there is no keyspace of this name");
            return Err(fault.with(metadata::KEYSPACE, name));
        };
        Ok(keyspace)
    }

    /// Where a key lives, if the caller's route leads there.
    pub(super) fn place(
        &self,
        keyspace: &str,
        key: &[u8],
        route: Option<&v1::Route>,
    ) -> Result<Place, Fault> {
        let keyspace = self.keyspace(keyspace)?;
        let shard = self.map.locate_key(keyspace, key);
        self.check_route(shard, route)?;
        Ok(Place { keyspace: keyspace.id, shard: shard.id })
    }

    /// Whether the caller's route, if it names a shard, names this one as it is.
    pub(super) fn check_route(
        &self,
        shard: &Shard,
        route: Option<&v1::Route>,
    ) -> Result<(), Fault> {
        let fits = |route: &v1::Route| {
            let epoch = route.shard_epoch;
            route.shard == shard.id.0 && (epoch == 0 || epoch == shard.epoch.0)
        };
        if !route.filter(|route| route.shard != 0).is_none_or(fits) {
            let message = "the route is of another epoch, or the shard does not hold the key";
            return Err(Fault::new(Reason::StaleRoute, message)
                .with(metadata::SHARD, shard.id)
                .with(metadata::EPOCH, shard.epoch.0));
        }
        Ok(())
    }

    /// The shard's leader, if a request that came to `asked` reaches it: there itself, or one hop on.
    pub(super) fn leader_from(&mut self, asked: NodeId, shard: ShardId) -> Result<NodeId, Fault> {
        let known = self.map.shard(shard).expect("a place is of a shard");
        match known.leader {
            Some(leader) if leader == asked => Ok(leader),
            Some(leader) if self.forwards && !self.down.contains(&leader) => {
                self.hops += 1;
                Ok(leader)
            }
            _ if self.forwards => {
                let message = "the shard has no leader, or its leader no majority";
                Err(Fault::new(Reason::NoQuorum, message)
                    .with(metadata::SHARD, shard)
                    .with_retry_after(NO_QUORUM_RETRY))
            }
            _ => Err(not_leader(known)),
        }
    }

    /// A fault that names the shard's leader as the place to go to.
    pub(super) fn towards_leader(&self, fault: Fault, shard: ShardId) -> Fault {
        match self.map.shard(shard) {
            Some(shard) => name_leader(fault.with(metadata::SHARD, shard.id), shard),
            None => fault,
        }
    }

    /// Whether the node holds a replica of the shard.
    pub(super) fn has_replica(&self, node: NodeId, shard: ShardId) -> bool {
        self.map.shard(shard).is_some_and(|shard| shard.replica_on(node).is_some())
    }

    /// How far a node's replica of a shard has come.
    pub(super) fn seen(&self, node: NodeId, shard: ShardId) -> Step {
        let group = &self.groups[&shard];
        match self.lag(node, shard) {
            Duration::ZERO => group.last,
            lag => group.seen_after(lag, Instant::now()),
        }
    }

    /// What a node's replica of a shard is held back by. A leader has everything.
    pub(super) fn lag(&self, node: NodeId, shard: ShardId) -> Duration {
        match self.leader(shard) == Some(node) {
            true => Duration::ZERO,
            false => self.lags.get(&node).copied().unwrap_or_default(),
        }
    }

    /// The newest version of a key up to `version`, deletions and what has expired included.
    pub(super) fn held(&self, keyspace: KeyspaceId, key: &Bytes, version: u64) -> Option<&Held> {
        let versions = self.keys.get(&(keyspace, key.clone()))?;
        versions.iter().rev().find(|held| held.version <= version)
    }

    pub(super) fn served(&self, place: Place, step: Step, node: NodeId) -> v1::Served {
        v1::Served {
            shard: place.shard.0,
            term: step.term,
            index: step.index,
            node: node.0,
            leader: true,
            staleness_ms: 0,
            server_time_ms: self.now_ms(),
            judged_at: 0,
        }
    }

    /// What lies below this version may be gone.
    pub(super) fn history_threshold(&self, keyspace: KeyspaceId) -> u64 {
        let history_ms = self.map.keyspace_by_id(keyspace).map_or(0, |known| known.history_ms);
        let kept_ms = history_ms.max(HISTORY_MS_MIN);
        let gone = self.gone.get(&keyspace).copied().unwrap_or_default();
        version_at(self.now_ms().saturating_sub(kept_ms)).max(gone)
    }

    /// Writes new versions of keys, and drops the old ones that no read can find any more.
    pub(super) fn put_all(
        &mut self,
        keyspace: KeyspaceId,
        writes: impl IntoIterator<Item = (Bytes, Held)>,
    ) {
        let oldest = self.history_threshold(keyspace);
        for (key, held) in writes {
            let versions = self.keys.entry((keyspace, key)).or_default();
            versions.push(held);
            // The newest that a read at the oldest version still finds stays.
            let reachable = versions.iter().rposition(|held| held.version <= oldest);
            versions.drain(..reachable.unwrap_or(0));
        }
    }
}

/// The first version of a millisecond.
pub(super) fn version_at(ms: u64) -> u64 {
    ms << COUNTER_BITS
}

/// The millisecond of a version.
pub(super) fn ms_of(version: u64) -> u64 {
    version >> COUNTER_BITS
}

fn not_leader(shard: &Shard) -> Fault {
    let fault = Fault::new(Reason::NotLeader, "this node does not lead the shard");
    name_leader(fault.with(metadata::SHARD, shard.id), shard)
}

fn name_leader(fault: Fault, shard: &Shard) -> Fault {
    match shard.leader {
        Some(leader) => fault
            .with(metadata::LEADER_NODE, leader)
            .with(metadata::LEADER_ADDR, address(leader))
            .with(metadata::LEADER_TERM, shard.leader_term),
        None => fault,
    }
}

/// The first map: every node but the spare ones has a replica of every shard; the shards cut the ring
/// evenly.
fn map_of(shape: &Shape) -> v1::ShardMap {
    let holders = shape.nodes - shape.spares;
    let voters = shape.voters.unwrap_or(holders).min(holders);
    let replica = |shard: u64, node: u64| v1::Replica {
        id: shard * limits::NODES_MAX as u64 + node,
        node,
        role: match node <= u64::from(voters) {
            true => v1::ReplicaRole::Voter.into(),
            false => v1::ReplicaRole::Learner.into(),
        },
        ..Default::default()
    };
    let shard = |id: u64, (start, end): (u64, u64)| v1::Shard {
        id,
        start,
        end,
        epoch: 1,
        replicas: (1..=u64::from(holders)).map(|node| replica(id, node)).collect(),
        leader_node: match shape.leader {
            Some(leader) => leader.0,
            None => 1 + id % u64::from(voters),
        },
        leader_term: 1,
        ..Default::default()
    };
    let zone = |node: u64| match shape.zones.len() {
        0 => String::new(),
        count => shape.zones[(node as usize - 1) % count].clone(),
    };
    let node = |id: u64| v1::Node {
        id,
        address: address(NodeId(id)),
        zone: zone(id),
        state: v1::NodeState::Active.into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    };
    let keyspace = |id: KeyspaceId, name: &str| v1::Keyspace {
        id: id.0,
        name: name.to_owned(),
        entity_rule: Some(EntityRule::Whole.into()),
        history_ms: limits::HISTORY_DEFAULT.as_millis() as u64,
        revision: 0,
    };
    let arcs = equal_arcs(shape.shards).into_iter().map(|arc| (arc.start().0, arc.end()));
    let arcs = std::iter::once((0, 0)).chain(arcs).enumerate();
    v1::ShardMap {
        cluster_id: "fake".to_owned(),
        hash_seed: 42,
        epoch: 1,
        shards: arcs.map(|(id, arc)| shard(id as u64, arc)).collect(),
        nodes: (1..=u64::from(shape.nodes)).map(node).collect(),
        keyspaces: vec![keyspace(DEFAULT_KEYSPACE, DEFAULT_KEYSPACE_NAME)],
        server_time_ms: 0,
        read_replicas: Vec::new(),
        replicas: voters,
    }
}

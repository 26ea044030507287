//! How nodes become a cluster, and how the cluster's records become replicas.
//!
//! Owns init, joining, the making of first replicas, the ways of replicas and leaders (`replicas`,
//! `leaders`), the operations that ask for them (`elastic`, `operations`), what begins them unasked
//! (`survey`, `knowledge`, `balance`), and the spreading of the shard map and of the keyspaces' settings (`keyspaces`). Does not carry messages (`transport`).
//!
//! **Init** writes its plan to the data directory first: run again after a crash it goes on with the
//! same cluster id and the same node ids. **Replicas** are made only while their shard is *forming*;
//! when all of a shard's first replicas have been made, the meta group's leader ends that with a
//! conditional write, and from then on a replica id is never made again: a node that lost it must
//! not come back empty under the same id.

#[cfg(test)]
mod testing;
mod found;
mod keyspaces;
mod members;
mod operations;
mod knowledge;
mod survey;
mod balance;
mod points;
mod reshape;
mod grow;
mod shrink;
mod elastic;
mod leaders;
mod replicas;
mod reshaping;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::shard_map::{DEFAULT_KEYSPACE, META_SHARD, NodeId};
use coracle_proto::{peer, v1};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::host::Host;
use coracle_raft::leadership::Standing;
use coracle_storage::ReplicaId;
use coracle_storage::fs::Space;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::load::Loads;
use crate::map::MapCache;
use crate::records::{Records, RecordsError};

/// Making a replica syncs a few files.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a change that somebody waits for may take to reach the nodes; one that is down answers at
/// once, one that hangs must not hold the caller up for long.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two looks at what is to be made or sent.
const RECONCILE_INTERVAL: Duration = Duration::from_millis(100);

pub use found::{InitError, InitOptions, gather, join_when_alone};
pub use knowledge::{BalancingSet, Knowledge};
pub use points::{Holding, Point};

/// Whom a command goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A member.
    Node(NodeId),
    /// Whoever listens there: a node that has no id yet.
    Address(String),
}

/// The way to other nodes, as far as commands need it.
pub trait Commands: Send + Sync + 'static {
    /// Asks and waits for the answer. An error is the transport's, not the other node's.
    fn command(
        &self,
        to: Target,
        command: Kind,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<peer::CommandDone, String>>;

    /// This node, as it introduces itself.
    fn own(&self) -> peer::KnownNode;

    /// The nodes of the cluster that this node has heard of, itself included.
    fn known(&self) -> Vec<peer::KnownNode>;

    /// Since a node was last heard; zero for this one, `None` for one that was not heard yet.
    fn silence(&self, node: NodeId) -> Option<Duration>;

    /// Nodes without a cluster that this node has heard of, itself included as long as it is one.
    fn strangers(&self) -> Vec<peer::KnownNode>;

    /// The members of a cluster that this node has heard of, as long as it is in none.
    fn hosts(&self) -> Vec<peer::KnownNode>;
}

/// What a node is told of its cluster, once: kept in its data directory.
pub trait Membership: Send + Sync + 'static {
    /// The cluster id and node id, once the node is in.
    fn identity(&self) -> Option<(String, NodeId)>;
    /// Takes the node into a cluster, durably; done already with the same values is no error.
    fn adopt(&self, adopt: &peer::Adopt) -> Result<(), String>;
    /// The plan of an init that this node began, if any; durable.
    fn plan(&self) -> Option<Bytes>;
    /// Keeps the plan of an init.
    fn keep_plan(&self, plan: &[u8]) -> Result<(), String>;
    /// Forgets the plan: another init was first.
    fn drop_plan(&self);
}

/// See the module.
pub struct Cluster {
    /// Creates and hosts replicas.
    pub host: Arc<Host>,
    /// The meta group's records.
    pub records: Arc<Records>,
    /// The cached map.
    pub map: Arc<MapCache>,
    /// The way to other nodes.
    pub commands: Arc<dyn Commands>,
    /// This node's own place.
    pub membership: Arc<dyn Membership>,
    /// Which replicas were made: only as long as this node leads.
    pub made: Mutex<BTreeSet<u64>>,
    /// Which start of each node has which epoch of the map: likewise.
    pub told: Mutex<BTreeMap<u64, (u64, u64)>>,
    /// What is known beside the records: likewise.
    pub knowledge: Mutex<Knowledge>,
    /// For tests: a wait between any two steps.
    pub holding: Holding,
    /// When this node started.
    pub started: Instant,
    /// What each replica of this node has to do.
    pub loads: Arc<Loads>,
    /// The data directory's file system.
    pub space: Arc<dyn Fn() -> Option<Space> + Send + Sync>,
}

impl Cluster {
    async fn take_first_map(&self, bytes: Bytes) -> Result<(), RecordsError> {
        let map = v1::ShardMap::decode(bytes)
            .map_err(|error| RecordsError::Refused(format!("not a shard map: {error}")))?;
        let next = |ids: &mut dyn Iterator<Item = u64>| ids.max().unwrap_or(0) + 1;
        let ids = peer::IdCounters {
            next_node: next(&mut map.nodes.iter().map(|node| node.id)),
            next_replica: next(
                &mut map.shards.iter().flat_map(|s| s.replicas.iter().map(|replica| replica.id)),
            ),
            next_shard: next(&mut map.shards.iter().map(|shard| shard.id)),
            next_keyspace: DEFAULT_KEYSPACE.0 + 1,
        };
        self.records.write_first(map, ids).await
    }

    /// Answers another node's command.
    pub async fn answer(&self, command: Kind) -> peer::CommandDone {
        let result = match command {
            Kind::Adopt(adopt) => self.membership.adopt(&adopt).map(|()| Bytes::new()),
            Kind::Create(create) => self.create(create).await.map(|()| Bytes::new()),
            Kind::Map(bytes) => self.take_map(bytes).map(|()| Bytes::new()),
            Kind::FirstMap(bytes) => return done(self.take_first_map(bytes).await, self),
            Kind::Join(join) => return self.join(join).await,
            Kind::CreateKeyspace(bytes) => return self.create_keyspace_here(bytes).await,
            Kind::UpdateKeyspace(bytes) => return self.update_keyspace_here(bytes).await,
            Kind::SetReadReplicas(bytes) => match v1::SetReadReplicasRequest::decode(bytes) {
                Ok(request) => return self.set_read_replicas_here(request).await,
                Err(error) => Err(format!("not a request: {error}")),
            },
            Kind::ChangeMembers(asked) => return self.change_members(asked).await,
            Kind::DestroyReplica(asked) => self.destroy_here(asked).await.map(|()| Bytes::new()),
            Kind::HandOver(asked) => self.hand_over_here(asked).await.map(|()| Bytes::new()),
            Kind::Elastic(asked) => return self.answer_elastic(asked).await,
            Kind::Probe(probe) => return self.answer_probe(probe),
            Kind::Reshape(asked) => return self.reshape_here(asked).await,
            Kind::Done(_) => Err("an answer where a question was expected".to_owned()),
        };
        match result {
            Ok(body) => peer::CommandDone { body, ..Default::default() },
            Err(error) => peer::CommandDone { error, ..Default::default() },
        }
    }

    async fn create(&self, create: peer::CreateReplica) -> Result<(), String> {
        let shard = v1::Shard::decode(create.descriptor).map_err(|error| error.to_string())?;
        let arc = (shard.id != META_SHARD.0).then_some((shard.start, shard.end));
        let initial = Descriptor { shard: shard.id, arc, epoch: shard.epoch };
        if !initial.is_valid() {
            return Err(format!("the descriptor of s{} makes no sense", shard.id));
        }
        let group = self.host.create(ReplicaId(create.replica), initial).await;
        let group = group.map_err(|error| error.to_string())?;
        if create.initialize {
            let members: BTreeMap<u64, NodeId> =
                shard.replicas.iter().map(|r| (r.id, NodeId(r.node))).collect();
            group.initialize(members).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn take_map(&self, bytes: Bytes) -> Result<(), String> {
        let map = v1::ShardMap::decode(bytes).map_err(|error| error.to_string())?;
        self.map.update_from_proto(&map).map_err(|error| error.to_string())
    }

    /// Lets a node in: it gets a new id. A repeated question gets the same one.
    async fn join(&self, join: peer::Join) -> peer::CommandDone {
        let Some(from) = join.from else {
            return refused("the question does not say who asks".to_owned());
        };
        let changed = self.records.change(|map, ids| {
            if map.nodes.iter().any(|node| node.join_nonce == from.start_count) {
                return Ok(false);
            }
            map.nodes.push(v1::Node {
                id: ids.next_node,
                address: from.address.clone(),
                peer_address: from.peer_address.clone(),
                zone: from.zone.clone(),
                state: v1::NodeState::Active.into(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                http_address: from.http_address.clone(),
                join_nonce: from.start_count,
                weight: 0,
            });
            ids.next_node += 1;
            Ok(true)
        });
        match changed.await {
            Ok(snapshot) => {
                let entry = snapshot.map.nodes.iter().find(|n| n.join_nonce == from.start_count);
                let adopt = peer::Adopt {
                    cluster_id: snapshot.map.cluster_id.clone(),
                    node: entry.expect("just found or added").id,
                    hash_seed: snapshot.map.hash_seed,
                };
                let body = adopt.encode_to_vec().into();
                peer::CommandDone { body, ..Default::default() }
            }
            Err(error) => done(Err(error), self),
        }
    }

    /// Has the meta group's leader do something, wherever it is, until it says that it is done, or
    /// why it never will be.
    async fn by_meta_leader(
        &self,
        kind: Kind,
        deadline: Instant,
    ) -> Result<Bytes, peer::CommandDone> {
        let (mut ask, mut failed) = (None, 0);
        loop {
            let own = self.membership.identity().map(|(_, node)| node);
            // A node without a replica of the meta group may know no leader, or one of long ago: any
            // that votes there tells.
            let known = ask.take().or_else(|| self.meta_leader().filter(|_| failed % 2 == 0));
            let leader = known.or_else(|| self.meta_voter(failed));
            failed += 1;
            let answer = match leader {
                Some(leader) if Some(leader) != own => {
                    let target = Target::Node(leader);
                    self.commands.command(target, kind.clone(), COMMAND_TIMEOUT).await
                }
                _ => Ok(self.answer(kind.clone()).await),
            };
            match answer {
                Ok(done) if done.error.is_empty() => return Ok(done.body),
                Ok(done) if !done.reason.is_empty() => return Err(done),
                Ok(done) if Instant::now() >= deadline => return Err(done),
                Ok(done) => ask = (done.ask_node != 0).then_some(NodeId(done.ask_node)),
                Err(why) if Instant::now() >= deadline => return Err(refused(why)),
                Err(_) => {}
            }
            tokio::time::sleep(RECONCILE_INTERVAL).await;
        }
    }

    fn meta_voter(&self, number: usize) -> Option<NodeId> {
        let map = self.map.current()?;
        let voters: Vec<NodeId> = map.meta().voters().map(|replica| replica.node).collect();
        voters.get(number % voters.len().max(1)).copied()
    }

    /// The meta group's leader, as this node's replica or its map knows it.
    pub fn meta_leader(&self) -> Option<NodeId> {
        let here = self.host.group(META_SHARD).and_then(|group| group.status().leader);
        here.or_else(|| self.map.current()?.shard(META_SHARD)?.leader)
    }

    /// Follows the records where this node holds them, and where it leads makes them come true.
    pub async fn reconcile(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RECONCILE_INTERVAL) => {}
            }
            self.learn_leaders();
            let Some(snapshot) = self.records.local().await else {
                continue;
            };
            if let Err(error) = self.map.update_from_proto(&snapshot.map) {
                tracing::error!(%error, "the cluster's map is not one");
                continue;
            }
            let group = self.host.group(META_SHARD);
            if group.is_none_or(|group| group.status().state != Standing::Leader) {
                self.made.lock().clear();
                self.told.lock().clear();
                continue;
            }
            self.make_replicas(&snapshot.map).await;
            self.refresh_addresses(&snapshot.map).await;
            self.tell_map(&snapshot.map, RECONCILE_INTERVAL).await;
        }
    }

    fn learn_leaders(&self) {
        for group in self.host.groups() {
            let status = group.status();
            if let Some(leader) = status.leader {
                self.map.observe_leader(group.shard(), status.term, leader);
            }
        }
    }

    async fn make_replicas(&self, map: &v1::ShardMap) {
        let forming: Vec<_> = map.shards.iter().filter(|shard| shard.forming).collect();
        if forming.is_empty() {
            return;
        }
        let mut whole = BTreeSet::new();
        for shard in forming {
            let first = shard.replicas.first().map(|replica| replica.id);
            let later = shard.replicas.iter().filter(|replica| Some(replica.id) != first);
            let mut all = true;
            for replica in later.chain(shard.replicas.first()) {
                if self.made.lock().contains(&replica.id) {
                    continue;
                }
                let create = create_command(shard, replica, Some(replica.id) == first);
                match self.tell_create(replica.node, create).await {
                    Ok(()) => drop(self.made.lock().insert(replica.id)),
                    Err(why) => {
                        tracing::info!(shard = shard.id, node = replica.node, why, "not made yet");
                        all = false;
                    }
                }
            }
            if all {
                whole.insert(shard.id);
            }
        }
        let formed = self.records.change(|map, _| {
            let mut changed = false;
            for shard in map.shards.iter_mut().filter(|shard| whole.contains(&shard.id)) {
                changed |= std::mem::replace(&mut shard.forming, false);
            }
            Ok(changed)
        });
        if let Err(error) = formed.await {
            tracing::info!(%error, "the records could not be changed");
        }
    }

    async fn tell_create(&self, node: u64, create: peer::CreateReplica) -> Result<(), String> {
        if self.membership.identity().is_some_and(|(_, own)| own.0 == node) {
            return self.create(create).await;
        }
        let target = Target::Node(NodeId(node));
        let answer = self.commands.command(target, Kind::Create(create), COMMAND_TIMEOUT).await?;
        if answer.error.is_empty() { Ok(()) } else { Err(answer.error) }
    }

    /// Nodes that came back at other addresses are entered under them.
    async fn refresh_addresses(&self, map: &v1::ShardMap) {
        let known = self.commands.known();
        let moved = |node: &v1::Node| {
            let known = known.iter().find(|known| known.node == node.id)?;
            let same = known.address == node.address
                && known.peer_address == node.peer_address
                && known.http_address == node.http_address
                && known.zone == node.zone;
            (!same).then(|| known.clone())
        };
        if map.nodes.iter().all(|node| moved(node).is_none()) {
            return;
        }
        let changed = self.records.change(|map, _| {
            let mut changed = false;
            for node in &mut map.nodes {
                if let Some(known) = moved(node) {
                    node.address = known.address;
                    node.peer_address = known.peer_address;
                    node.http_address = known.http_address;
                    node.zone = known.zone;
                    changed = true;
                }
            }
            Ok(changed)
        });
        if let Err(error) = changed.await {
            tracing::info!(%error, "addresses could not be entered");
        }
    }

    /// Lets every node that answers know the map at once: whoever asks one of them next finds there what
    /// was just changed. Those that do not answer hear of it when they are back.
    async fn publish(&self, map: &v1::ShardMap) {
        if let Err(error) = self.map.update_from_proto(map) {
            tracing::error!(%error, "the cluster's map is not one");
        }
        self.tell_map(map, PUBLISH_TIMEOUT).await;
    }

    /// Sends the map to every node that has not acknowledged this epoch since it started: one that was
    /// told just before it stopped may not have kept it.
    async fn tell_map(&self, map: &v1::ShardMap, within: Duration) {
        let own = self.membership.identity().map(|(_, node)| node.0);
        let known = self.commands.known().into_iter();
        let starts: BTreeMap<u64, u64> = known.map(|node| (node.node, node.start_count)).collect();
        let behind: Vec<(u64, u64)> = {
            let told = self.told.lock();
            let nodes = map.nodes.iter().map(|node| node.id).filter(|id| Some(*id) != own);
            let nodes = nodes.filter_map(|id| Some((id, *starts.get(&id)?)));
            nodes.filter(|(id, start)| told.get(id) != Some(&(*start, map.epoch))).collect()
        };
        let bytes = Bytes::from(map.encode_to_vec());
        let tell = behind.into_iter().map(|(id, start)| {
            let kind = Kind::Map(bytes.clone());
            let asked = self.commands.command(Target::Node(NodeId(id)), kind, within);
            async move {
                if asked.await.is_ok_and(|done| done.error.is_empty()) {
                    let mut told = self.told.lock();
                    // An older map may be on its way still.
                    let known = told.entry(id).or_default();
                    *known = (start, map.epoch).max(*known);
                }
            }
        });
        futures_util::future::join_all(tell).await;
    }
}

fn refused(error: String) -> peer::CommandDone {
    peer::CommandDone { error, ..Default::default() }
}

fn done(result: Result<(), RecordsError>, cluster: &Cluster) -> peer::CommandDone {
    match result {
        Ok(()) => peer::CommandDone::default(),
        Err(error) => peer::CommandDone {
            error: error.to_string(),
            ask_node: cluster.meta_leader().map_or(0, |node| node.0),
            ..Default::default()
        },
    }
}

fn create_command(
    shard: &v1::Shard,
    replica: &v1::Replica,
    initialize: bool,
) -> peer::CreateReplica {
    peer::CreateReplica {
        shard: shard.id,
        replica: replica.id,
        descriptor: shard.encode_to_vec().into(),
        initialize,
    }
}

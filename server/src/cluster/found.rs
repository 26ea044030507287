//! How a cluster begins, and how a node comes in: init in its two halves, and joining.
//!
//! Owns the plan of a new cluster. What is kept afterwards, and what is made of it, is `super`'s.

use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits::HISTORY_DEFAULT;
use coracle_proto::ring::equal_arcs;
use coracle_proto::shard_map::{
    DEFAULT_KEYSPACE, DEFAULT_KEYSPACE_NAME, META_SHARD, NodeId, ShardId, ShardMap,
};
use coracle_proto::{peer, v1};
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    COMMAND_TIMEOUT, Cluster, Commands, Membership, RECONCILE_INTERVAL, Target, create_command,
};
use crate::placement::{Candidate, place};

/// Shards that a new cluster gets: enough to spread over dozens of nodes before the first split.
const SHARDS_DEFAULT: u32 = 16;
/// Voters of a shard: survives one node.
const REPLICAS_DEFAULT: u32 = 3;
/// A node that a cluster is to be made with answers within this, or is left out.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// A node without cluster asks again after so long.
const JOIN_INTERVAL: Duration = Duration::from_millis(300);

/// What init was asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct InitOptions {
    /// 0 means 16.
    pub shards: u32,
    /// 0 means 3.
    pub replicas: u32,
    /// Waits for so many nodes; 0 takes those that are known.
    pub nodes: u32,
}

/// The first half of init, on a node that may have no cluster yet: plans, and takes every node in.
/// The second half is [`Cluster::found`].
pub async fn gather(
    commands: &dyn Commands,
    membership: &dyn Membership,
    options: InitOptions,
    random: (String, u64),
    deadline: Instant,
) -> Result<v1::ShardMap, InitError> {
    let plan = match membership.plan() {
        Some(plan) => {
            let plan = v1::ShardMap::decode(plan).map_err(|error| {
                InitError::Failed(format!("the plan of an earlier init: {error}"))
            })?;
            if membership.identity().is_some_and(|(cluster, _)| cluster != plan.cluster_id) {
                // It has joined another cluster since.
                membership.drop_plan();
                return Err(InitError::Already);
            }
            plan
        }
        None if membership.identity().is_some() => return Err(InitError::Already),
        None => {
            if let Some(host) = commands.hosts().first() {
                let address = &host.peer_address;
                return Err(InitError::Failed(format!(
                    "{address}, one of the addresses in cluster.join, is in a cluster already: this node joins it by itself"
                )));
            }
            let nodes = first_nodes(commands, options.nodes, deadline).await?;
            let plan = first_map(nodes, &options, random);
            ShardMap::from_proto(&plan).map_err(|error| InitError::Failed(error.to_string()))?;
            membership.keep_plan(&plan.encode_to_vec()).map_err(InitError::Failed)?;
            plan
        }
    };
    adopt_all(commands, membership, &plan, deadline).await?;
    Ok(plan)
}

async fn first_nodes(
    commands: &dyn Commands,
    wanted: u32,
    deadline: Instant,
) -> Result<Vec<peer::KnownNode>, InitError> {
    loop {
        let mut known = commands.strangers();
        known.sort_by(|a, b| a.peer_address.cmp(&b.peer_address));
        known.dedup_by(|a, b| a.peer_address == b.peer_address);
        // One that greeted a moment ago and is gone would be in the plan for good.
        let answers = known.iter().map(|node| is_there(commands, node));
        let answers = futures_util::future::join_all(answers).await;
        let there: Vec<_> = known.into_iter().zip(answers).filter(|(_, there)| *there).collect();
        if there.len() >= wanted.max(1) as usize {
            return Ok(there.into_iter().map(|(node, _)| node).collect());
        }
        let what = format!("for {wanted} nodes: {} answer so far", there.len());
        pause(deadline, &what).await?;
    }
}

async fn is_there(commands: &dyn Commands, node: &peer::KnownNode) -> bool {
    if node.peer_address == commands.own().peer_address {
        return true;
    }
    let target = Target::Address(node.peer_address.clone());
    commands.command(target, Kind::Probe(peer::Probe::default()), PROBE_TIMEOUT).await.is_ok()
}

async fn adopt_all(
    commands: &dyn Commands,
    membership: &dyn Membership,
    plan: &v1::ShardMap,
    deadline: Instant,
) -> Result<(), InitError> {
    let own = commands.own().peer_address;
    // In the order of the addresses, the same on whichever node init runs: of two inits at once the
    // first adoption decides, and the other one stops before it has touched anything.
    let mut nodes: Vec<_> = plan.nodes.iter().collect();
    nodes.sort_by(|a, b| a.peer_address.cmp(&b.peer_address));
    for (n, node) in nodes.into_iter().enumerate() {
        let adopt = peer::Adopt {
            cluster_id: plan.cluster_id.clone(),
            node: node.id,
            hash_seed: plan.hash_seed,
        };
        if node.peer_address == own {
            if let Err(error) = membership.adopt(&adopt) {
                return Err(refused_adoption(membership, n, error));
            }
            continue;
        }
        let target = Target::Address(node.peer_address.clone());
        loop {
            let kind = Kind::Adopt(adopt.clone());
            match commands.command(target.clone(), kind, COMMAND_TIMEOUT).await {
                Ok(done) if done.error.is_empty() => break,
                Ok(done) => return Err(refused_adoption(membership, n, done.error)),
                Err(why) => pause(deadline, &format!("for {}: {why}", node.peer_address)).await?,
            }
        }
    }
    Ok(())
}

/// When the very first node refuses, it is in another cluster: this plan comes to nothing.
fn refused_adoption(membership: &dyn Membership, n: usize, error: String) -> InitError {
    if n == 0 {
        membership.drop_plan();
    }
    InitError::Failed(error)
}

impl Cluster {
    /// The second half of init, on the node that gathered: forms the meta group, writes the first
    /// map, and waits until every shard was made. Returns the map, and warnings.
    pub async fn found(
        &self,
        plan: &v1::ShardMap,
        options: InitOptions,
        deadline: Instant,
    ) -> Result<(v1::ShardMap, Vec<String>), InitError> {
        if self.map.current().is_some_and(|map| map.epoch().0 > plan.epoch) {
            return Err(InitError::Already);
        }
        self.form_meta(plan, deadline).await?;
        self.write_first(plan, deadline).await?;
        loop {
            let map = self.map.current();
            let formed = map.as_ref().is_some_and(|map| map.all_shards().all(|s| !s.forming));
            if let (true, Some(map)) = (formed, map) {
                // Run again, it would take in whoever stands at the addresses of then.
                self.membership.drop_plan();
                return Ok((map.to_proto(), warnings(plan, &options)));
            }
            pause(deadline, "for the shards to be made").await?;
        }
    }

    /// Makes the meta group's replicas; the first of them forms it.
    async fn form_meta(&self, plan: &v1::ShardMap, deadline: Instant) -> Result<(), InitError> {
        let meta = plan.shards.iter().find(|shard| shard.id == META_SHARD.0);
        let meta =
            meta.ok_or_else(|| InitError::Failed("the plan has no meta group".to_owned()))?;
        // The one that initializes comes last, so that the others can already vote.
        let first = meta.replicas.first().map(|replica| replica.id);
        let later = meta.replicas.iter().filter(|replica| Some(replica.id) != first);
        for replica in later.chain(meta.replicas.first()) {
            let create = create_command(meta, replica, Some(replica.id) == first);
            while let Err(why) = self.tell_create(replica.node, create.clone()).await {
                pause(deadline, &format!("for n{}: {why}", replica.node)).await?;
            }
        }
        Ok(())
    }

    async fn write_first(&self, plan: &v1::ShardMap, deadline: Instant) -> Result<(), InitError> {
        let bytes = Bytes::from(plan.encode_to_vec());
        let meta = plan.shards.iter().filter(|shard| shard.id == META_SHARD.0);
        let holders = meta.flat_map(|meta| &meta.replicas).map(|replica| NodeId(replica.node));
        let holders: Vec<NodeId> = holders.collect();
        loop {
            let leader = self.host.group(META_SHARD).and_then(|group| group.status().leader);
            // A node without a replica of the meta group does not know who leads it: all are asked.
            let asked = leader.map_or_else(|| holders.clone(), |leader| vec![leader]);
            let mut why = "it has no replicas".to_owned();
            for node in asked {
                match self.hand_first_map(node, bytes.clone()).await {
                    Ok(()) => return Ok(()),
                    Err(refused) => why = refused,
                }
            }
            pause(deadline, &format!("for the meta group: {why}")).await?;
        }
    }

    async fn hand_first_map(&self, to: NodeId, map: Bytes) -> Result<(), String> {
        if self.membership.identity().is_some_and(|(_, own)| own == to) {
            return self.take_first_map(map).await.map_err(|error| error.to_string());
        }
        let asked = self.commands.command(Target::Node(to), Kind::FirstMap(map), COMMAND_TIMEOUT);
        match asked.await {
            Ok(done) if done.error.is_empty() => Ok(()),
            Ok(done) => Err(done.error),
            Err(why) => Err(why),
        }
    }
}

/// Asks the members that this node meets to be let in, until one does.
pub async fn join_when_alone(
    commands: &dyn Commands,
    membership: &dyn Membership,
    nonce: u64,
    stop: CancellationToken,
) {
    while membership.identity().is_none() {
        let own = peer::KnownNode { node: 0, start_count: nonce, ..commands.own() };
        for member in commands.hosts() {
            let kind = Kind::Join(peer::Join { from: Some(own.clone()) });
            let target = Target::Address(member.peer_address);
            let answer = commands.command(target, kind, COMMAND_TIMEOUT).await;
            let Ok(answer) = answer else { continue };
            if answer.error.is_empty()
                && let Ok(adopt) = peer::Adopt::decode(answer.body)
            {
                match membership.adopt(&adopt) {
                    Ok(()) => return,
                    Err(error) => tracing::error!(error, "joining failed"),
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(JOIN_INTERVAL) => {}
        }
    }
}

/// Why a cluster was not made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// It is one already.
    #[error("this node belongs to a cluster already")]
    Already,
    /// Time ran out; run again, it goes on where it stopped.
    #[error("time ran out while waiting {0}; run init again on this node, it goes on from there")]
    TimedOut(String),
    /// Something refused.
    #[error("{0}")]
    Failed(String),
}

async fn pause(deadline: Instant, what: &str) -> Result<(), InitError> {
    if Instant::now() >= deadline {
        return Err(InitError::TimedOut(what.to_owned()));
    }
    tokio::time::sleep(RECONCILE_INTERVAL).await;
    Ok(())
}

/// The plan of a new cluster: ids by the order of the nodes, arcs of equal length.
fn first_map(
    nodes: Vec<peer::KnownNode>,
    options: &InitOptions,
    (cluster_id, hash_seed): (String, u64),
) -> v1::ShardMap {
    let shards = if options.shards == 0 { SHARDS_DEFAULT } else { options.shards };
    let replicas = if options.replicas == 0 { REPLICAS_DEFAULT } else { options.replicas };
    let nodes: Vec<v1::Node> =
        nodes.into_iter().zip(1..).map(|(known, id)| first_node(known, id)).collect();
    let candidates: Vec<Candidate> = nodes
        .iter()
        .map(|node| Candidate { node: NodeId(node.id), zone: node.zone.clone() })
        .collect();
    let mut next_replica = 0;
    let placed = place(&candidates, shards as usize + 1, replicas as usize);
    let arcs = std::iter::once(None).chain(equal_arcs(shards).into_iter().map(Some));
    let shards = placed.into_iter().zip(arcs).zip(0..).map(|((on, arc), id)| v1::Shard {
        id: ShardId(id).0,
        start: arc.map_or(0, |arc| arc.start().0),
        end: arc.map_or(0, |arc| arc.end()),
        epoch: 1,
        replicas: on
            .into_iter()
            .map(|node| {
                next_replica += 1;
                let role = v1::ReplicaRole::Voter.into();
                v1::Replica { id: next_replica, node: node.0, role, ..Default::default() }
            })
            .collect(),
        leader_node: 0,
        leader_term: 0,
        forming: true,
    });
    v1::ShardMap {
        cluster_id,
        hash_seed,
        epoch: 1,
        shards: shards.collect(),
        nodes,
        keyspaces: vec![default_keyspace()],
        server_time_ms: 0,
        read_replicas: Vec::new(),
        replicas,
    }
}

fn first_node(known: peer::KnownNode, id: u64) -> v1::Node {
    v1::Node {
        id,
        address: known.address,
        peer_address: known.peer_address,
        zone: known.zone,
        state: v1::NodeState::Active.into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        http_address: known.http_address,
        join_nonce: 0,
        weight: 0,
    }
}

fn default_keyspace() -> v1::Keyspace {
    let whole = v1::entity_rule::Kind::Whole(v1::WholeKey {});
    v1::Keyspace {
        id: DEFAULT_KEYSPACE.0,
        name: DEFAULT_KEYSPACE_NAME.to_owned(),
        entity_rule: Some(v1::EntityRule { kind: Some(whole) }),
        history_ms: HISTORY_DEFAULT.as_millis() as u64,
        revision: 0,
    }
}

fn warnings(plan: &v1::ShardMap, options: &InitOptions) -> Vec<String> {
    let wanted = if options.replicas == 0 { REPLICAS_DEFAULT } else { options.replicas };
    let have = plan.nodes.len() as u32;
    if have >= wanted {
        return Vec::new();
    }
    let survives = (have - 1) / 2;
    vec![format!(
        "only {have} of {wanted} replicas per shard: there are {have} nodes, and the cluster survives the loss of {survives}"
    )]
}

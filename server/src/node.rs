//! A node: builds and joins everything, from its seams to its listeners.
//!
//! Owns the order of starting and stopping. A node listens first, so that its own address is known;
//! then it either is in a cluster already, or answers only operators and other nodes until it is
//! taken into one (`init` or `join`); then its log and its groups start, and it serves.

mod front;
mod gauges;
mod starting;
mod member;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits::MESSAGE_BYTES_MAX;
use coracle_proto::peer::{self, KnownNode};
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::shard_map::ShardMap;
use coracle_proto::v1;
use coracle_proto::v1::admin_service_server::AdminServiceServer;
use coracle_proto::v1::cluster_service_server::ClusterServiceServer;
use coracle_proto::v1::kv_service_server::KvServiceServer;
use coracle_raft::host::Host;
use coracle_raft::types::NodeId;
use coracle_storage::exec::Exec;
use coracle_storage::fs::Fs;
use coracle_storage::state::Engines;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::clock::{Clock, PeerClocks};
use crate::cluster::{self, Commands, InitError, InitOptions};
use crate::config::Config;
use crate::home::Home;
use crate::http::{Check, Probe};
use crate::identity::{ClusterId, Locking};
use crate::map::MapCache;
use crate::memory;
use crate::metrics::{Build, Metrics};
use crate::net::{Listener, Net};
use crate::peers::Neighbours;
use crate::service::admin::{Admin, Operator, not_initialized};
use crate::service::cluster::ClusterFacts;
use crate::service::health::{Health, reflection};
use crate::service::kv::Kv;
use crate::service::unsent;
use crate::transport::{PeerTransport, Settings};
use front::Front;
use member::{Answers, CommandsOverTransport, KeyspacesOfCluster, Member};

/// How long requests under way may take to end once a node gives up its leaderships: those of shards
/// that moved end within an election.
const FINISH_MAX: Duration = Duration::from_secs(2);

/// What a node is made of: every seam, and the settings.
pub struct Parts {
    /// Settings, checked.
    pub config: Config,
    /// Sockets.
    pub net: Arc<dyn Net>,
    /// Files.
    pub fs: Arc<dyn Fs>,
    /// State stores.
    pub engines: Arc<dyn Engines>,
    /// Tasks, threads, blocking work.
    pub exec: Arc<dyn Exec>,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// Whether the data directory is locked against other processes.
    pub locking: Locking,
    /// Source of all randomness of the node.
    pub seed: u64,
    /// Ends the process: the log or a store has failed, or another process has this identity.
    pub on_fatal: Arc<dyn Fn(String) + Send + Sync>,
}

/// Where a node listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// gRPC for clients.
    pub client: String,
    /// Other nodes.
    pub peer: String,
    /// Metrics and health.
    pub http: String,
}

/// What all rooms of a node share.
pub struct Shared {
    pub(crate) parts: Parts,
    pub(crate) home: Arc<Home>,
    pub(crate) map: Arc<MapCache>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) neighbours: Arc<Neighbours>,
    pub(crate) transport: PeerTransport,
    /// Cancelled when the node gives its leaderships away.
    pub(crate) draining: CancellationToken,
    /// Cancelled when the node ends.
    pub(crate) stop: CancellationToken,
    member: watch::Sender<Option<Arc<Member>>>,
    rng: Mutex<StdRng>,
    began: Instant,
    /// One init at a time: two would write two plans.
    init: tokio::sync::Mutex<()>,
}

impl Shared {
    fn new(parts: Parts, home: Arc<Home>, addresses: &Addresses) -> Arc<Self> {
        let stop = CancellationToken::new();
        let mut rng = StdRng::seed_from_u64(parts.seed);
        let in_memory = parts.config.test.in_memory;
        let map = MapCache::new();
        if let Some(kept) = home.map()
            && let Err(error) = map.update_from_proto(&kept)
        {
            tracing::warn!(%error, "the kept shard map is not used");
        }
        let clocks = Arc::new(PeerClocks::new(parts.clock.clone()));
        let neighbours = Neighbours::new(
            (parts.fs.clone(), parts.exec.clone()),
            parts.config.storage.disk_reserve_bytes,
            clocks,
            map.clone(),
            home.clone(),
            parts.on_fatal.clone(),
        );
        let transport = PeerTransport::new(
            settings(&home, &parts.config, addresses, &mut rng),
            parts.net.clone(),
            parts.exec.clone(),
            stop.clone(),
        );
        Arc::new(Shared {
            parts,
            home,
            map,
            metrics: Metrics::new(&Build {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                engine: if in_memory { "memory" } else { "rocksdb" }.to_owned(),
                ..Build::default()
            }),
            neighbours,
            transport,
            draining: CancellationToken::new(),
            stop,
            member: watch::Sender::new(None),
            rng: Mutex::new(rng),
            began: Instant::now(),
            init: tokio::sync::Mutex::default(),
        })
    }

    pub(crate) fn member(&self) -> Option<Arc<Member>> {
        self.member.borrow().clone()
    }

    /// Waits until the node is in a cluster and its groups run.
    async fn started(&self) -> Arc<Member> {
        let mut members = self.member.subscribe();
        let started = members.wait_for(Option::is_some).await;
        started.expect("the sender lives in self").clone().expect("waited for")
    }

    pub(crate) fn commands(&self) -> Arc<dyn Commands> {
        Arc::new(CommandsOverTransport(self.transport.clone()))
    }

    /// A random number; `what` names its use in the trace.
    pub(crate) fn draw(&self, what: &'static str) -> u64 {
        let drawn = self.rng.lock().random();
        tracing::trace!(what, drawn, "a number was drawn");
        drawn
    }
}

#[tonic::async_trait]
impl Operator for Shared {
    async fn init(
        &self,
        options: InitOptions,
        deadline: Instant,
    ) -> Result<(v1::ShardMap, Vec<String>), InitError> {
        let _one = self.init.lock().await;
        // A map beyond its first epoch: the cluster stands, whatever plan is left.
        if let Some(map) = self.map.current().filter(|map| map.epoch().0 > 1) {
            if map.all_shards().all(|shard| !shard.forming) {
                cluster::Membership::drop_plan(&*self.home);
            }
            return Err(InitError::Already);
        }
        let random = {
            let mut rng = self.rng.lock();
            (ClusterId::generate(&mut *rng).as_str().to_owned(), rng.random())
        };
        let commands = self.commands();
        let plan = cluster::gather(&*commands, &*self.home, options, random, deadline).await?;
        let member = tokio::time::timeout_at(deadline, self.started()).await;
        let member =
            member.map_err(|_| InitError::TimedOut("for this node to start".to_owned()))?;
        member.cluster.found(&plan, options, deadline).await
    }

    async fn set_read_replicas(
        &self,
        request: v1::SetReadReplicasRequest,
        deadline: Instant,
    ) -> Result<v1::SetReadReplicasResponse, Fault> {
        let member = self.member().ok_or_else(not_initialized)?;
        let set = member.cluster.set_read_replicas(request, deadline).await;
        set.map_err(|done| {
            let reason = Reason::parse(&done.reason).unwrap_or(Reason::NoQuorum);
            Fault::new(reason, done.error)
        })
    }

    async fn elastic(&self, asked: peer::elastic::Kind, deadline: Instant) -> Result<Bytes, Fault> {
        let member = self.member().ok_or_else(not_initialized)?;
        let answered = member.cluster.elastic(asked, deadline).await;
        answered.map_err(|done| {
            let reason = Reason::parse(&done.reason).unwrap_or(Reason::NoQuorum);
            Fault::new(reason, done.error)
        })
    }

    fn host(&self) -> Option<Arc<Host>> {
        self.member().map(|member| member.host.clone())
    }

    fn cut(&self, nodes: BTreeSet<NodeId>) -> bool {
        self.transport.cut(nodes)
    }

    fn status(&self) -> v1::NodeStatusResponse {
        let known = self.transport.own();
        let space = self.neighbours.space();
        let member = self.member();
        v1::NodeStatusResponse {
            node: Some(v1::Node {
                id: known.node,
                address: known.address,
                peer_address: known.peer_address,
                zone: known.zone,
                state: v1::NodeState::Active.into(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                http_address: known.http_address,
                join_nonce: 0,
                weight: 0,
            }),
            cluster_id: self.home.own().map(|own| own.cluster_id).unwrap_or_default(),
            start_count: known.start_count,
            groups: member
                .iter()
                .flat_map(|member| member.cluster.replica_statuses(true))
                .collect(),
            peers: self.transport.status().into_iter().map(peer_status).collect(),
            disk_free_bytes: space.map_or(0, |space| space.free_bytes),
            disk_total_bytes: space.map_or(0, |space| space.total_bytes),
            log_bytes: member.as_ref().map_or(0, |member| member.log.stats().bytes_on_disk),
            recovering: member.iter().flat_map(|member| damages(member)).collect(),
            uptime_ms: self.began.elapsed().as_millis() as u64,
            draining: self.draining.is_cancelled(),
        }
    }
}

fn damages(member: &Member) -> Vec<String> {
    let one = |damage: &coracle_storage::log::Damage| {
        let file = damage.file.display();
        format!("replica {}: {file} at {}: {}", damage.replica.0, damage.offset, damage.why)
    };
    // One that was removed since is no concern of anybody's.
    let is_there = |damage: &&coracle_storage::log::Damage| {
        !member.log.was_destroyed(damage.replica).unwrap_or(false)
    };
    member.recovering.iter().filter(is_there).map(one).chain(member.host.failed()).collect()
}

fn peer_status(status: crate::transport::PeerStatus) -> v1::PeerStatus {
    v1::PeerStatus {
        node: status.known.node,
        address: status.known.peer_address,
        // The other lanes are dialled when they are first needed.
        connected: status.dialled.contains(&crate::transport::Connection::Control),
        silent_ms: status.silence.map_or(u64::MAX, |silence| silence.as_millis() as u64),
    }
}

/// A running node.
pub struct Node {
    shared: Arc<Shared>,
    addresses: Addresses,
}

impl Node {
    /// Starts a node. Returns when it listens; whether it serves, its health says.
    pub async fn start(parts: Parts) -> Result<Node, String> {
        let config = parts.config.clone();
        let dir: &Path = &config.node.data_dir;
        let home = Home::open(parts.fs.clone(), dir, parts.locking);
        let home = home.map_err(|error| error.to_string())?;
        let client = listen(&*parts.net, &config.listen.client, "listen.client").await?;
        let peer = listen(&*parts.net, &config.listen.peer, "listen.peer").await?;
        let http = listen(&*parts.net, &config.listen.http, "listen.http").await?;
        let addresses = Addresses {
            client: advertised(&client.local_address(), &config.listen.advertise_client),
            peer: advertised(&peer.local_address(), &config.listen.advertise_peer),
            http: http.local_address(),
        };
        let shared = Shared::new(parts, home, &addresses);
        let exec = shared.parts.exec.clone();
        let stop = shared.stop.clone();
        let (front, accept) = Front::new(client, config.limits.connections, stop.clone());
        exec.spawn("client listener", Box::pin(accept));
        let probe = Arc::new(NodeHealth(shared.clone()));
        let metrics = crate::http::serve(http, probe, exec.clone(), stop);
        exec.spawn("http listener", Box::pin(metrics));
        if let Some(own) = shared.home.own() {
            let member = Member::start(own, &shared).await?;
            shared.member.send_replace(Some(member));
        }
        let answers = Arc::new(Answers(shared.clone()));
        shared.transport.start(peer, answers, shared.neighbours.clone());
        for seed in &config.cluster.join {
            let seed = seed.to_string();
            if seed != addresses.peer {
                shared.transport.dial_seed(&seed);
            }
        }
        let serving = shared.clone();
        exec.spawn("node", Box::pin(async move { serving.live(front).await }));
        Ok(Node { shared, addresses })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Whether it is in a cluster, and where it stands.
    pub fn status(&self) -> v1::NodeStatusResponse {
        self.shared.status()
    }

    /// Waits until the node is as good as before its restart: its replicas may be elected, and have caught
    /// up; half a minute at most. At once where it is in no cluster yet.
    pub async fn ready(&self) {
        if let Some(member) = self.shared.member() {
            member.starting.done().await;
        }
    }

    /// The groups of the node, once it is in a cluster: for harnesses.
    pub fn host(&self) -> Option<Arc<Host>> {
        self.shared.member().map(|member| member.host.clone())
    }

    /// The shard map as the node knows it: for harnesses.
    pub fn map(&self) -> Option<Arc<ShardMap>> {
        self.shared.member().and_then(|member| member.cluster.map.current())
    }

    /// Gives all leaderships away, finishes requests, then stops. Returns how many leaderships were
    /// not taken over before `deadline`.
    pub async fn drain_and_stop(&self, deadline: Instant) -> usize {
        self.shared.draining.cancel();
        let left = match self.shared.member() {
            Some(member) => member.host.hand_over_all(deadline).await,
            None => 0,
        };
        if let Some(member) = self.shared.member() {
            // New requests are refused; those under way get their answers.
            let until = deadline.min(Instant::now() + FINISH_MAX);
            while member.router.admission().in_flight().0 > 0 && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        self.stop().await;
        left
    }

    /// Stops at once. Nothing is lost: the log holds what was acknowledged.
    pub async fn stop(&self) {
        self.shared.stop.cancel();
        if let Some(member) = self.shared.member.send_replace(None) {
            member.host.shutdown().await;
            member.log.close();
        }
        self.shared.transport.stopped().await;
    }
}

async fn listen(
    net: &dyn Net,
    address: &std::net::SocketAddr,
    key: &str,
) -> Result<Box<dyn Listener>, String> {
    net.listen(&address.to_string()).await.map_err(|error| {
        format!(
            "cannot listen at {address} ({key}): {error}. Stop what listens there, or choose another address"
        )
    })
}

fn advertised(bound: &str, advertise: &Option<crate::config::Address>) -> String {
    advertise.as_ref().map_or_else(|| bound.to_owned(), ToString::to_string)
}

fn settings(home: &Home, config: &Config, addresses: &Addresses, rng: &mut StdRng) -> Settings {
    let own = home.own();
    Settings {
        cluster_id: own.as_ref().map(|own| own.cluster_id.clone()).unwrap_or_default(),
        own: KnownNode {
            node: own.as_ref().map_or(0, |own| own.node.0),
            peer_address: addresses.peer.clone(),
            address: addresses.client.clone(),
            zone: config.node.zone.clone(),
            start_count: own.as_ref().map_or(1, |own| own.start_count),
            http_address: addresses.http.clone(),
            incarnation: rng.random_range(1..u64::MAX),
        },
        known: home.known(),
        seed: rng.random(),
        fault_injection: config.test.fault_injection,
    }
}

impl Shared {
    /// The node's life: alone until it is taken into a cluster, then a member until it stops.
    async fn live(self: Arc<Self>, front: Front) {
        let (health, health_server) = Health::new().await;
        let member = match self.member() {
            Some(member) => member,
            None => {
                let Some(member) = self.clone().live_alone(&front, health_server.clone()).await
                else {
                    return;
                };
                member
            }
        };
        self.metrics.identify(&member.own.node.to_string(), &self.parts.config.node.zone);
        let keeping = self.clone();
        self.parts.exec.spawn("keep map", Box::pin(async move { keeping.keep_maps().await }));
        let (v1, v1alpha) = reflection();
        let keyspaces = Arc::new(KeyspacesOfCluster(member.cluster.clone()));
        let limit = MESSAGE_BYTES_MAX;
        let routes = Routes::new(health_server)
            .add_service(v1)
            .add_service(v1alpha)
            .add_service(
                KvServiceServer::new(Kv::new(member.router.clone(), self.parts.exec.clone()))
                    .max_decoding_message_size(limit)
                    .max_encoding_message_size(limit),
            )
            .add_service(
                ClusterServiceServer::new(ClusterFacts::new(member.router.clone(), keyspaces))
                    .max_encoding_message_size(limit),
            )
            .add_service(AdminServiceServer::new(Admin(self.clone())));
        let routes = unsent::counted(routes, member.router.admission());
        let served = front.serve(routes, self.stop.clone());
        let told = async {
            tokio::select! {
                biased;
                () = self.draining.cancelled() => {}
                () = member.starting.done() => health.set_ready(true).await,
            }
            self.draining.cancelled().await;
            health.set_ready(false).await;
            std::future::pending::<()>().await
        };
        tokio::select! { () = served => {}, () = told => {} }
    }

    /// Answers operators and other nodes, and waits to be taken into a cluster.
    async fn live_alone<H>(
        self: Arc<Self>,
        front: &Front,
        health: tonic_health::pb::health_server::HealthServer<H>,
    ) -> Option<Arc<Member>>
    where
        H: tonic_health::pb::health_server::Health,
    {
        let ended = self.stop.child_token();
        let (v1, v1alpha) = reflection();
        let routes = Routes::new(health)
            .add_service(v1)
            .add_service(v1alpha)
            .add_service(AdminServiceServer::new(Admin(self.clone())));
        // Every other method says what to do, instead of that it does not exist.
        let refuse =
            async || tonic::Status::from(not_initialized()).into_http::<axum::body::Body>();
        let routes = Routes::from(routes.into_axum_router().fallback(refuse));
        let served = front.serve(routes, ended.clone());
        self.parts.exec.spawn("alone", Box::pin(served));
        let (joining, stop) = (self.clone(), ended.clone());
        let join = async move {
            let fresh = joining.draw("join nonce") | 1;
            let (home, (answer, kept)) = (joining.home.clone(), tokio::sync::oneshot::channel());
            joining.parts.exec.blocking(Box::new(move || {
                let _ = answer.send(home.join_nonce(fresh));
            }));
            let commands = joining.commands();
            match kept.await {
                Ok(Ok(nonce)) => {
                    cluster::join_when_alone(&*commands, &*joining.home, nonce, stop).await;
                }
                Ok(Err(error)) => tracing::error!(error, "this node joins no cluster by itself"),
                Err(_) => {}
            }
        };
        self.parts.exec.spawn("join", Box::pin(join));
        let own = tokio::select! {
            () = self.stop.cancelled() => return None,
            own = self.home.joined() => own,
        };
        tracing::info!(node = %own.node, cluster = own.cluster_id, "taken into a cluster");
        let started = Member::start(own.clone(), &self).await;
        let member = match started {
            Ok(member) => member,
            Err(error) => {
                (self.parts.on_fatal)(error);
                return None;
            }
        };
        self.transport.set_identity(&own.cluster_id, own.node);
        self.member.send_replace(Some(member.clone()));
        // Requests under way (an init, above all) are finished by the server that has them.
        ended.cancel();
        Some(member)
    }

    /// Keeps the newest map on disk, and tells where this node now knows the others to be.
    async fn keep_maps(&self) {
        let mut changes = self.map.watch();
        let mut kept = 0;
        loop {
            if let Some(map) = self.map.current()
                && map.epoch().0 != kept
            {
                kept = map.epoch().0;
                let (home, map) = (self.home.clone(), map.to_proto());
                let (done, kept) = tokio::sync::oneshot::channel();
                self.parts.exec.blocking(Box::new(move || {
                    home.keep_map(&map);
                    let _ = done.send(());
                }));
                // One at a time, so that the newest is the last.
                let _ = kept.await;
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
    }
}

/// What HTTP says of the node's health.
struct NodeHealth(Arc<Shared>);

impl Probe for NodeHealth {
    fn live(&self) -> Result<(), String> {
        match self.0.member() {
            Some(member) if !member.host.healthy() => {
                Err("the log's disk has not finished a sync for a second".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn ready(&self) -> Vec<Check> {
        let member = self.0.member();
        let left = member.as_ref().map_or(0, |member| member.starting.left());
        let full = self.0.neighbours.disk_full();
        let draining = self.0.draining.is_cancelled();
        vec![
            Check {
                name: "joined",
                ok: member.is_some(),
                detail: self.0.home.own().map_or("no cluster yet".to_owned(), |own| own.cluster_id),
            },
            Check {
                name: "caught up",
                ok: left == 0,
                detail: match left {
                    0 => "yes".to_owned(),
                    left => format!("{left} replicas have not, or may not be elected yet"),
                },
            },
            Check {
                name: "disk",
                ok: !full,
                detail: if full { "under its reserve" } else { "has room" }.to_owned(),
            },
            Check {
                name: "serving",
                ok: !draining,
                detail: if draining { "draining" } else { "yes" }.to_owned(),
            },
        ]
    }

    fn metrics(&self) -> String {
        if let Some(member) = self.0.member() {
            let (clocks, space) = (&self.0.neighbours.clocks, self.0.neighbours.space());
            gauges::collect(&self.0.metrics, &member, clocks, space);
            let (_, requests) = member.router.admission().in_flight();
            let Parts { fs, engines, .. } = &self.0.parts;
            memory::observe(&self.0.metrics, &**fs, &member.log, &**engines, requests);
        }
        self.0.metrics.render()
    }
}

//! What a node runs once it has an identity: log, groups, records, router.
//!
//! Owns their assembly and their end. Everything here starts when the node is in a cluster, and the
//! log never before: a log without identity would be nobody's.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use coracle_proto::peer::{self, GroupMessage, KnownNode};
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::shard_map::ShardId;
use coracle_proto::v1;
use coracle_raft::host::{Host, LogBudget, Options};
use coracle_raft::lease::Timing;
use coracle_raft::observer::{self, Observer};
use coracle_raft::transport::TransportError;
use coracle_raft::types::NodeId;
use coracle_storage::log::{Damage, Log};
use coracle_storage::{Error, LogOptions, ReplicaId};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use peer::cluster_command::Kind;
use tokio::time::Instant;

use super::starting::Starting;
use super::{Parts, Shared};
use crate::admission::{Admission, Call};
use crate::cluster::{Cluster, Commands, Holding, Target};
use crate::home::Own;
use crate::load::Loads;
use crate::memory::Shares;
use crate::metrics::{Metrics, ReadServed, Reads, Stage, Stages};
use crate::peers::StampClock;
use crate::records::Records;
use crate::router::{self, ForwardError, Forwarder, RequestIds, Router};
use crate::service::cluster::Keyspaces;
use crate::transport::{Inbound, PeerTransport};

/// A node in a cluster.
pub(crate) struct Member {
    /// Who it is.
    pub(crate) own: Own,
    /// Its groups.
    pub(crate) host: Arc<Host>,
    /// Its log.
    pub(crate) log: Log,
    /// Init's second half, records made true.
    pub(crate) cluster: Arc<Cluster>,
    /// The request path.
    pub(crate) router: Arc<Router>,
    /// Replicas that came up damaged: not running.
    pub(crate) recovering: Vec<Damage>,
    /// Those that came up, and have yet to catch up.
    pub(crate) starting: Arc<Starting>,
}

impl Member {
    /// Opens the log and every replica, and starts the node's duties.
    pub(crate) async fn start(own: Own, shared: &Arc<Shared>) -> Result<Arc<Self>, String> {
        let parts = &shared.parts;
        let (log, recovery) = open_log(own.start_count, shared)?;
        for damage in &recovery.recovering {
            tracing::error!(
                replica = damage.replica.0, file = %damage.file.display(), offset = damage.offset,
                why = %damage.why, "a replica's log is damaged: it does not run"
            );
        }
        let clock = Arc::new(StampClock(shared.neighbours.clocks.clone()));
        let host = new_host(shared, log.clone(), clock.clone(), own.start_count);
        host.open_all(&recovery).await.map_err(|error| error.to_string())?;
        shared.neighbours.set_host(host.clone());
        let records =
            Arc::new(Records::new(host.clone(), clock.clone(), shared.draw("records client")));
        let cluster = Arc::new(Cluster {
            host: host.clone(),
            records,
            map: shared.map.clone(),
            commands: shared.commands(),
            membership: shared.home.clone(),
            made: Mutex::default(),
            told: Mutex::default(),
            knowledge: Mutex::default(),
            holding: Holding(parts.config.test.hold_steps),
            started: tokio::time::Instant::now(),
            loads: Loads::new(),
            space: {
                let neighbours = shared.neighbours.clone();
                Arc::new(move || neighbours.space())
            },
        });
        let router = new_router(shared, own.node, &cluster, clock);
        let (reconciled, stop) = (cluster.clone(), shared.stop.clone());
        parts.exec.spawn("reconcile", Box::pin(async move { reconciled.reconcile(stop).await }));
        let (settled, stop) = (cluster.clone(), shared.stop.clone());
        let settle = async move { settled.settle_keyspaces(stop).await };
        parts.exec.spawn("settle keyspaces", Box::pin(settle));
        let (tended, stop) = (cluster.clone(), shared.stop.clone());
        parts.exec.spawn("replicas", Box::pin(async move { tended.tend_replicas(stop).await }));
        let starting = start_up(shared, &host, &router);
        let recovering = recovery.recovering;
        Ok(Arc::new(Self { own, host, log, cluster, router, recovering, starting }))
    }
}

/// Waits, beside all else, until the replicas that are there already have caught up.
fn start_up(shared: &Arc<Shared>, host: &Arc<Host>, router: &Router) -> Arc<Starting> {
    let groups = host.groups();
    let starting = Starting::new(groups.len());
    let admission = router.admission().clone();
    admission.set_starting(!groups.is_empty());
    let wait = starting.clone().run(host.clone(), groups, admission, shared.stop.clone());
    shared.parts.exec.spawn("starting", Box::pin(wait));
    starting
}

fn new_host(shared: &Arc<Shared>, log: Log, clock: Arc<StampClock>, start_count: u64) -> Arc<Host> {
    let parts = &shared.parts;
    let on_fatal = parts.on_fatal.clone();
    Host::new(Options {
        shards: parts.config.node.data_dir.join("shards"),
        timing: timing(parts),
        log,
        log_budget: LogBudget {
            disk_bytes: parts.config.storage.log_bytes_target,
            index_bytes: Shares::of(parts.config.storage.memory_budget).log_index_bytes,
        },
        engines: parts.engines.clone(),
        exec: parts.exec.clone(),
        clock,
        transport: Arc::new(shared.transport.clone()),
        observer: Arc::new(GroupMetrics {
            stages: shared.metrics.stages(),
            reads: shared.metrics.reads(),
            metrics: shared.metrics.clone(),
        }),
        incarnation: start_count,
        stop: shared.stop.clone(),
        on_hang: Arc::new(move || on_fatal("the log's disk hangs".to_owned())),
    })
}

fn new_router(
    shared: &Arc<Shared>,
    node: NodeId,
    cluster: &Arc<Cluster>,
    clock: Arc<StampClock>,
) -> Arc<Router> {
    let config = &shared.parts.config;
    let limits = &config.limits;
    Router::new(router::Parts {
        node,
        map: shared.map.clone(),
        source: Arc::new(MapFromPeers(cluster.clone())),
        host: cluster.host.clone(),
        forwarder: Arc::new(ForwardOverTransport(shared.transport.clone())),
        clock: clock.clone(),
        gate: shared.neighbours.clone(),
        ids: RequestIds::new(shared.draw("request ids"), clock),
        admission: Admission::new(
            limits.requests_in_flight,
            limits.request_bytes_in_flight,
            shared.draining.clone(),
        ),
        metrics: shared.metrics.clone(),
        loads: cluster.loads.clone(),
        slow: config.observability.slow_request.unwrap_or(std::time::Duration::MAX),
    })
}

fn timing(parts: &Parts) -> Timing {
    let raft = &parts.config.raft;
    Timing {
        heartbeat: raft.heartbeat_interval,
        election_min: raft.election_timeout_min,
        election_max: raft.election_timeout_max,
    }
}

fn open_log(
    start_count: u64,
    shared: &Arc<Shared>,
) -> Result<(Log, coracle_storage::log::Recovery), String> {
    let parts = &shared.parts;
    let dir = parts.config.node.data_dir.join("log");
    check_log_is_there(parts, &dir, start_count)?;
    let on_fatal = parts.on_fatal.clone();
    let options = LogOptions {
        segment_bytes: parts.config.storage.log_segment_bytes,
        log_bytes_target: parts.config.storage.log_bytes_target,
        cache_bytes: Shares::of(parts.config.storage.memory_budget).log_cache_bytes,
        salt: shared.home.salt(shared.draw("log salt"))?,
        on_fatal: Arc::new(move |error: &Error| on_fatal(error.to_string())),
        on_sync: {
            let (metrics, stages) = (shared.metrics.clone(), shared.metrics.stages());
            Arc::new(move |took| {
                metrics.log_fsync_duration_seconds.observe(took.as_secs_f64());
                stages.observe(Stage::LogSync, took);
            })
        },
        ..LogOptions::default()
    };
    Log::open(parts.fs.clone(), parts.exec.clone(), &dir, options)
        .map_err(|error| error.to_string())
}

/// A node that was in its cluster before has a log. Without it its votes are forgotten: it must not
/// come up as if it had never given one.
fn check_log_is_there(parts: &Parts, dir: &Path, start_count: u64) -> Result<(), String> {
    let shards = parts.config.node.data_dir.join("shards");
    let replicas = if parts.fs.exists(&shards) {
        parts.fs.read_dir(&shards).map_err(|error| format!("{}: {error}", shards.display()))?.len()
    } else {
        0
    };
    let empty = !parts.fs.exists(dir)
        || parts
            .fs
            .read_dir(dir)
            .map_err(|error| format!("{}: {error}", dir.display()))?
            .is_empty();
    if start_count > 1 && replicas > 0 && empty {
        return Err(format!(
            "{}: the log is gone, but {replicas} replicas are there: their votes and entries are lost. Put the directory back, or remove the whole data directory and start it as a new node",
            dir.display()
        ));
    }
    Ok(())
}

/// Answers the other nodes' questions: those before the node is in a cluster too.
pub(crate) struct Answers(pub(crate) Arc<Shared>);

impl Inbound for Answers {
    fn question(
        &self,
        from: NodeId,
        question: GroupMessage,
    ) -> BoxFuture<'static, Result<Bytes, String>> {
        let Some(member) = self.0.member() else {
            return std::future::ready(Err("this node is still starting".to_owned())).boxed();
        };
        let (shard, replica) = (ShardId(question.shard), ReplicaId(question.to_replica));
        let answer = member.host.answer(from, shard, replica, question.body);
        answer.map(|answer| answer.map_err(|error| error.to_string())).boxed()
    }

    fn forward(&self, from: NodeId, body: Bytes) -> BoxFuture<'static, Result<Bytes, String>> {
        match self.0.member() {
            Some(member) => member.router.serve_forwarded(from, body),
            None => std::future::ready(Err("this node is still starting".to_owned())).boxed(),
        }
    }

    fn command(&self, _from: KnownNode, command: Kind) -> BoxFuture<'static, Kind> {
        let shared = self.0.clone();
        async move {
            let done = match (shared.member(), command) {
                (Some(member), command) => member.cluster.answer(command).await,
                (None, Kind::Adopt(adopt)) => {
                    use crate::cluster::Membership as _;
                    let error = shared.home.adopt(&adopt).err().unwrap_or_default();
                    peer::CommandDone { error, ..Default::default() }
                }
                (None, Kind::Probe(_)) => peer::CommandDone::default(),
                (None, _) => peer::CommandDone {
                    error: "this node is still starting".to_owned(),
                    ..Default::default()
                },
            };
            Kind::Done(done)
        }
        .boxed()
    }
}

/// Counts what groups do.
struct GroupMetrics {
    stages: Stages,
    reads: Reads,
    metrics: Arc<Metrics>,
}

impl Observer for GroupMetrics {
    fn stage(&self, stage: observer::Stage, took: std::time::Duration) {
        let stage = match stage {
            observer::Stage::Queue => Stage::Queue,
            observer::Stage::Propose => Stage::Propose,
            observer::Stage::Replicate => Stage::Replicate,
            observer::Stage::Apply => Stage::Apply,
        };
        self.stages.observe(stage, took);
    }

    fn elected(&self) {
        self.metrics.raft_elections.inc();
    }

    fn read_points(&self, way: observer::ReadWay, reads: usize) {
        let how = match way {
            observer::ReadWay::Lease => ReadServed::Lease,
            observer::ReadWay::Quorum => ReadServed::Heartbeats,
            observer::ReadWay::Asked => ReadServed::Asked,
            observer::ReadWay::Known => ReadServed::Bounded,
        };
        self.reads.count(how, reads as u64);
    }
}

struct ForwardOverTransport(PeerTransport);

impl Forwarder for ForwardOverTransport {
    fn forward(
        &self,
        to: NodeId,
        body: Bytes,
        timeout: std::time::Duration,
    ) -> BoxFuture<'static, Result<Bytes, ForwardError>> {
        let answer = self.0.forward(to, body, timeout);
        let answer = answer.map(|answer| {
            answer.map_err(|error| match error {
                TransportError::NotSent(why) => ForwardError::NotSent(why),
                other => ForwardError::Lost(other.to_string()),
            })
        });
        answer.boxed()
    }
}

/// Maps are pushed by the meta group's leader, and read where this node holds the meta group: asking
/// means looking at the own replica once more.
struct MapFromPeers(Arc<Cluster>);

impl crate::map::MapSource for MapFromPeers {
    fn refresh(&self) -> BoxFuture<'static, ()> {
        let cluster = self.0.clone();
        async move {
            if let Some(snapshot) = cluster.records.local().await
                && let Err(error) = cluster.map.update_from_proto(&snapshot.map)
            {
                tracing::error!(%error, "the cluster's map is not one");
            }
        }
        .boxed()
    }
}

/// Cluster commands over the transport.
pub(crate) struct CommandsOverTransport(pub(crate) PeerTransport);

impl Commands for CommandsOverTransport {
    fn command(
        &self,
        to: Target,
        command: Kind,
        timeout: std::time::Duration,
    ) -> BoxFuture<'static, Result<peer::CommandDone, String>> {
        let target = match to {
            Target::Node(node) => crate::transport::Target::Node(node),
            Target::Address(address) => crate::transport::Target::Address(address),
        };
        let answer = self.0.command(target, command, timeout);
        let done = |kind| match kind {
            Ok(Kind::Done(done)) => Ok(done),
            Ok(_) => Err("a question came back as the answer".to_owned()),
            Err(error) => Err(format!("{error}")),
        };
        answer.map(done).boxed()
    }

    fn own(&self) -> KnownNode {
        self.0.own()
    }

    fn known(&self) -> Vec<KnownNode> {
        let mut known = self.0.peers();
        let own = self.0.own();
        if own.node != 0 {
            known.push(own);
        }
        known
    }

    fn silence(&self, node: NodeId) -> Option<std::time::Duration> {
        if self.0.own().node == node.0 {
            return Some(std::time::Duration::ZERO);
        }
        self.0.silence(node)
    }

    fn hosts(&self) -> Vec<KnownNode> {
        self.0.hosts()
    }

    fn strangers(&self) -> Vec<KnownNode> {
        let mut strangers = self.0.strangers();
        let own = self.0.own();
        if own.node == 0 {
            strangers.push(own);
        }
        strangers
    }
}

/// Creates and changes keyspaces through the meta group's leader.
pub(crate) struct KeyspacesOfCluster(pub(crate) Arc<Cluster>);

impl Keyspaces for KeyspacesOfCluster {
    fn create(
        &self,
        request: v1::CreateKeyspaceRequest,
        call: Call,
    ) -> BoxFuture<'static, Result<v1::Keyspace, Fault>> {
        let cluster = self.0.clone();
        let deadline = Instant::now() + call.left();
        async move { cluster.create_keyspace(request, deadline).await.map_err(not_done) }.boxed()
    }

    fn update(
        &self,
        request: v1::UpdateKeyspaceRequest,
        call: Call,
    ) -> BoxFuture<'static, Result<v1::Keyspace, Fault>> {
        let cluster = self.0.clone();
        let deadline = Instant::now() + call.left();
        async move { cluster.update_keyspace(request, deadline).await.map_err(not_done) }.boxed()
    }
}

fn not_done(done: peer::CommandDone) -> Fault {
    Fault::new(Reason::parse(&done.reason).unwrap_or(Reason::NoQuorum), done.error)
}

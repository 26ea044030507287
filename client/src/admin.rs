//! Owns the calls of operators: make a cluster, look at nodes and the map, keyspaces, leaderships,
//! injected faults. Thin: one request, one answer, plain values. A change is not retried once it
//! may have been carried out, because it has no request id.

mod plan;
mod reshape;
mod operations;
mod replicas;

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::limits;
use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::shard_map::{self, ShardMap};
use coracle_proto::v1;
use tokio::time::{Instant, timeout_at};
use tonic::{Response, Status};

pub use self::operations::{
    Balancer, Balancing, BalancingChange, ClusterOperation, Control, OperationId, OperationKind,
    OperationMove, OperationState, Operations,
};
pub use self::plan::{Plan, PlanOptions, PlannedMove, PlannedNode, PlannedTransfer};
pub use self::replicas::{
    MemberStatus, ReadReplicas, ReadReplicasSet, ReplicaChange, ReplicaPlace, Replicas,
};
pub use self::reshape::{Merge, MergeStep, ShardMerge, ShardSplit, Split, SplitAt, SplitStep};
use crate::connection::fault_of;
use crate::driver::{Driver, closed};
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::retry::REDIRECTS_MAX;
use crate::topology::{ClusterMap, EntityRule, KeyspaceInfo, Node, NodeId, ReplicaId, ShardId};

/// One request on its way to one node.
trait Asking<T>: Future<Output = Result<Response<T>, Status>> {}

impl<T, F: Future<Output = Result<Response<T>, Status>>> Asking<T> for F {}

/// Making a cluster waits for nodes and for every shard's first leader.
const INIT_TIMEOUT: Duration = Duration::from_secs(30);
/// Gigabytes are read and written.
const COMPACT_TIMEOUT: Duration = Duration::from_secs(1_800);

/// The operators' calls. Cheap to clone.
#[derive(Clone)]
pub struct Admin {
    driver: Arc<Driver>,
}

/// What [`Admin::init`] shall make.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Init {
    /// Shards; 0 means 16.
    pub shards: u32,
    /// Voters per shard; 0 means 3, or fewer when there are fewer nodes.
    pub replicas: u32,
    /// Waits until this many nodes are known; 0 means no wait.
    pub nodes: u32,
}

/// What [`Admin::init`] has made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Initialized {
    /// The new cluster's id.
    pub cluster_id: String,
    /// Shards made.
    pub shards: u32,
    /// Voters per shard.
    pub replicas: u32,
    /// What is not as it was wanted.
    pub warnings: Vec<String>,
}

/// A node's own view of itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeStatus {
    /// The node.
    pub node: Node,
    /// Empty before init.
    pub cluster_id: String,
    /// Starts of its data directory.
    pub start_count: u64,
    /// Its replicas.
    pub groups: Vec<GroupStatus>,
    /// The other nodes, as it sees them.
    pub peers: Vec<PeerStatus>,
    /// Free bytes where its data directory lives.
    pub disk_free_bytes: u64,
    /// All bytes there.
    pub disk_total_bytes: u64,
    /// Bytes of the shared log.
    pub log_bytes: u64,
    /// Replicas that came up damaged, with file and offset.
    pub recovering: Vec<String>,
    /// Since the process started.
    pub uptime: Duration,
    /// It is shutting down.
    pub draining: bool,
}

/// One replica on a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GroupStatus {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// leader, follower, candidate, learner, recovering.
    pub role: String,
    /// Its term.
    pub term: u64,
    /// The leader that it knows.
    pub leader: Option<NodeId>,
    /// Last index in its log.
    pub last_index: u64,
    /// Last index applied.
    pub applied_index: u64,
    /// First index still in its log.
    pub first_index: u64,
    /// The shard's epoch.
    pub epoch: u64,
    /// Approximate bytes of state.
    pub state_bytes: u64,
    /// Of a leader: the members of its group, and how far each is.
    pub members: Vec<MemberStatus>,
    /// Between two sets of voters: a change that is under way or half done.
    pub joint: bool,
    /// Keys read a second by this replica, of late.
    pub reads_per_second: u64,
    /// Keys written a second through it, of late.
    pub writes_per_second: u64,
}

/// Another node, as a node sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerStatus {
    /// The other node.
    pub node: NodeId,
    /// Its address for nodes.
    pub address: String,
    /// All connections stand.
    pub connected: bool,
    /// Since its last message.
    pub silent: Duration,
}

/// A keyspace to be made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewKeyspace {
    /// `[a-z0-9_-]{1,64}`.
    pub name: String,
    /// Fixed for ever.
    pub entity_rule: EntityRule,
    /// How long old versions stay readable; `None` for the default.
    pub history: Option<Duration>,
    /// Only checks.
    pub validate_only: bool,
}

/// What a replica's state took before it was rewritten, and takes now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Compacted {
    /// In bytes.
    pub bytes_before: u64,
    /// In bytes.
    pub bytes_after: u64,
}

impl NewKeyspace {
    /// With the defaults: the entity is the whole key.
    pub fn new(name: impl Into<String>) -> NewKeyspace {
        NewKeyspace {
            name: name.into(),
            entity_rule: EntityRule::Whole,
            history: None,
            validate_only: false,
        }
    }
}

impl Admin {
    pub(crate) fn new(driver: Arc<Driver>) -> Admin {
        Admin { driver }
    }

    /// Makes a cluster of the nodes that the first seed within reach knows. Once per cluster.
    pub async fn init(&self, init: Init) -> Result<Initialized, Error> {
        limits::check_shards(init.shards)?;
        let Init { shards, replicas, nodes } = init;
        let request = v1::InitRequest { shards, replicas, nodes };
        let made = self.any(INIT_TIMEOUT, true, |node: Arc<Pipeline>| async move {
            node.connection().admin().init(request).await
        });
        let v1::InitResponse { cluster_id, shards, replicas, warnings } = made.await?;
        Ok(Initialized { cluster_id, shards, replicas, warnings })
    }

    /// A node's own view, also without a quorum.
    pub async fn node_status(&self, address: &str) -> Result<NodeStatus, Error> {
        let status = self.one(address, self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().admin().node_status(v1::NodeStatusRequest {}).await
        });
        Ok(NodeStatus::from_wire(status.await?))
    }

    /// The map as any node knows it now.
    pub async fn map(&self) -> Result<ClusterMap, Error> {
        let map = self.any(self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().cluster().get_map(v1::GetMapRequest {}).await
        });
        checked(map.await?.map)
    }

    /// The map as one node knows it now.
    pub async fn map_of(&self, address: &str) -> Result<ClusterMap, Error> {
        let map = self.one(address, self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().cluster().get_map(v1::GetMapRequest {}).await
        });
        checked(map.await?.map)
    }

    /// The map as this client knows it, without asking; empty before the first one has come.
    pub fn cached_map(&self) -> ClusterMap {
        self.driver.follower.routes.table().snapshot()
    }

    /// The keyspaces, by name.
    pub async fn keyspaces(&self) -> Result<Vec<KeyspaceInfo>, Error> {
        let list = self.any(self.timeout(), false, |node: Arc<Pipeline>| async move {
            node.connection().cluster().list_keyspaces(v1::ListKeyspacesRequest {}).await
        });
        list.await?.keyspaces.iter().map(keyspace).collect()
    }

    /// Makes a keyspace, and waits until this client can use it.
    pub async fn create_keyspace(&self, new: NewKeyspace) -> Result<KeyspaceInfo, Error> {
        limits::check_keyspace_name(&new.name)?;
        let history_ms = new.history.map_or(0, |history| history.as_millis() as u64);
        limits::check_history(history_ms)?;
        let request = v1::CreateKeyspaceRequest {
            name: new.name.clone(),
            entity_rule: Some(new.entity_rule.into()),
            history_ms,
            has_history: new.history.is_some(),
            validate_only: new.validate_only,
        };
        let deadline = Instant::now() + self.timeout();
        let made = self.any(self.timeout(), true, |node: Arc<Pipeline>| {
            let request = request.clone();
            async move { node.connection().cluster().create_keyspace(request).await }
        });
        let made = made.await?.keyspace.unwrap_or_default();
        if !new.validate_only {
            let routes = &self.driver.follower.routes;
            let known = routes.wait(|table| table.has_keyspace(&new.name).then_some(()));
            if timeout_at(deadline, known).await.is_err() {
                let message = format!("keyspace {:?} was made, but no map shows it yet", new.name);
                let fault = Fault::new(Reason::Unreachable, message);
                return Err(Error::of_fault(fault.with_outcome(Outcome::Applied), 1, true));
            }
        }
        keyspace(&made)
    }

    /// Changes how long a keyspace keeps old versions readable. A longer history begins to count now:
    /// what is gone stays gone. The shards follow within moments.
    pub async fn set_history(
        &self,
        keyspace_name: &str,
        history: Duration,
        validate_only: bool,
    ) -> Result<KeyspaceInfo, Error> {
        limits::check_keyspace_name(keyspace_name)?;
        let history_ms = history.as_millis() as u64;
        limits::check_history(history_ms)?;
        let request = v1::UpdateKeyspaceRequest {
            name: keyspace_name.to_owned(),
            history_ms,
            has_history: true,
            validate_only,
        };
        let changed = self.any(self.timeout(), true, |node: Arc<Pipeline>| {
            let request = request.clone();
            async move { node.connection().cluster().update_keyspace(request).await }
        });
        keyspace(&changed.await?.keyspace.unwrap_or_default())
    }

    /// Rewrites the state of a shard's replica on a node without what nobody can read any more:
    /// superseded versions, deletes, expired values. On the leader's node first, whose clock the
    /// others follow. Takes as long as reading and writing all of it does; one at a time on a node.
    pub async fn compact_shard(&self, address: &str, shard: ShardId) -> Result<Compacted, Error> {
        let request = v1::CompactShardRequest { shard: shard.0 };
        let done = self.one(address, COMPACT_TIMEOUT, false, |node: Arc<Pipeline>| async move {
            node.connection().admin().compact_shard(request).await
        });
        let v1::CompactShardResponse { bytes_before, bytes_after } = done.await?;
        Ok(Compacted { bytes_before, bytes_after })
    }

    /// Hands a shard's leadership to a voter on another node; `None` lets the leader choose.
    /// Returns the node that leads now.
    pub async fn transfer_leader(
        &self,
        shard: ShardId,
        to: Option<NodeId>,
    ) -> Result<NodeId, Error> {
        let deadline = Instant::now() + self.timeout();
        self.driver.ready(deadline).await?;
        let request =
            v1::TransferLeaderRequest { shard: shard.0, to_node: to.map_or(0, |node| node.0) };
        let routes = &self.driver.follower.routes;
        let mut redirects = 0;
        loop {
            let table = routes.table();
            let unknown = || Fault::new(Reason::UnknownShard, format!("no shard {shard}"));
            let route =
                table.route_of(shard).ok_or_else(|| Error::of_fault(unknown(), 0, false))?;
            let pool = &self.driver.follower.pool;
            let usable = |node| table.address(node).is_some_and(|address| pool.is_usable(address));
            let node = route.choose(redirects as usize, None, usable);
            let address = node.and_then(|node| table.address(node)).unwrap_or_default();
            let asked = self.ask(address, deadline, |node: Arc<Pipeline>| async move {
                node.connection().admin().transfer_leader(request).await
            });
            let fault = match asked.await {
                Ok(response) => return Ok(NodeId(response.leader_node)),
                Err(fault) => fault,
            };
            redirects += 1;
            if fault.reason != Reason::NotLeader || redirects > REDIRECTS_MAX {
                return Err(Error::of_fault(fault, redirects, true));
            }
            if let Some(node) = node {
                routes.saw_follower(shard, node);
            }
            if let (Some(leader), Some(term)) =
                (fault.number(metadata::LEADER_NODE), fault.number(metadata::LEADER_TERM))
            {
                routes.saw_leader(shard, NodeId(leader), term, false);
            }
        }
    }

    /// Cuts a node off from others, both ways; an empty list heals all. Only where the server was
    /// started with fault injection.
    pub async fn inject_fault(&self, address: &str, cut_from: &[NodeId]) -> Result<(), Error> {
        let cut_from: Vec<u64> = cut_from.iter().map(|node| node.0).collect();
        let request = v1::InjectFaultRequest { cut_from };
        let done = self.one(address, self.timeout(), true, |node: Arc<Pipeline>| {
            let request = request.clone();
            async move { node.connection().admin().inject_fault(request).await }
        });
        let v1::InjectFaultResponse {} = done.await?;
        Ok(())
    }

    fn timeout(&self) -> Duration {
        self.driver.settings.operation_timeout
    }

    /// Asks one node.
    async fn one<T, F: Asking<T>>(
        &self,
        address: &str,
        timeout: Duration,
        is_write: bool,
        call: impl Fn(Arc<Pipeline>) -> F,
    ) -> Result<T, Error> {
        let asked = self.ask(address, Instant::now() + timeout, call).await;
        asked.map_err(|fault| Error::of_fault(fault, 1, is_write))
    }

    /// Asks one node after the other until one answers. A change goes on to the next only when it
    /// was surely not carried out.
    async fn any<T, F: Asking<T>>(
        &self,
        timeout: Duration,
        is_write: bool,
        call: impl Fn(Arc<Pipeline>) -> F,
    ) -> Result<T, Error> {
        // A node that stays silent must not take the time of all the others; but a change may
        // not be asked twice, so it gets all there is.
        let each = match is_write {
            true => timeout,
            false => self.driver.settings.attempt_timeout,
        };
        self.any_for(timeout, each, is_write, call).await
    }

    /// The same, where each node may take so long.
    async fn any_for<T, F: Asking<T>>(
        &self,
        timeout: Duration,
        each: Duration,
        is_write: bool,
        call: impl Fn(Arc<Pipeline>) -> F,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + timeout;
        let mut attempts = 0;
        let mut last =
            Fault::new(Reason::Unreachable, "no node is known").with_outcome(Outcome::NotApplied);
        for address in self.driver.follower.candidates() {
            if self.driver.is_closed() {
                return Err(closed());
            }
            let until = deadline.min(Instant::now() + each);
            attempts += 1;
            last = match self.ask(&address, until, &call).await {
                Ok(response) => return Ok(response),
                Err(fault) => fault,
            };
            let elsewhere = matches!(
                last.reason,
                Reason::Unreachable
                    | Reason::OutcomeUnknown
                    | Reason::Draining
                    | Reason::NotLeader
                    | Reason::NoQuorum
                    // It has joined, and has yet to hear of it; where nobody is in a cluster, the
                    // last one says so.
                    | Reason::NotInitialized
            );
            if !elsewhere || (is_write && last.outcome == Outcome::Unknown) {
                break;
            }
        }
        Err(Error::of_fault(last, attempts, is_write))
    }

    async fn ask<T, F: Asking<T>>(
        &self,
        address: &str,
        until: Instant,
        call: impl Fn(Arc<Pipeline>) -> F,
    ) -> Result<T, Fault> {
        let Some(pipeline) = self.driver.follower.pool.get(address) else {
            return Err(Fault::invalid("address", format!("{address:?} is no host:port")));
        };
        match timeout_at(until, call(pipeline.clone())).await {
            Ok(Ok(response)) => {
                pipeline.connection().heard();
                Ok(response.into_inner())
            }
            Ok(Err(status)) => Err(fault_of(&status, address)),
            Err(_) => {
                let message = format!("no answer from {address} in time");
                Err(Fault::new(Reason::OutcomeUnknown, message))
            }
        }
    }
}

fn checked(map: Option<v1::ShardMap>) -> Result<ClusterMap, Error> {
    let map = map.unwrap_or_default();
    if map.cluster_id.is_empty() {
        let fault = Fault::new(Reason::NotInitialized, "the cluster has not been made yet");
        return Err(Error::of_fault(fault, 1, false));
    }
    ShardMap::from_proto(&map).map(|map| ClusterMap::of(&map)).map_err(unreadable)
}

fn keyspace(keyspace: &v1::Keyspace) -> Result<KeyspaceInfo, Error> {
    let checked = shard_map::Keyspace::from_proto(keyspace).map_err(unreadable)?;
    Ok(KeyspaceInfo::of(&checked))
}

fn unreadable(error: shard_map::ShardMapError) -> Error {
    Error::of_fault(Fault::new(Reason::Internal, error.to_string()), 1, false)
}

impl NodeStatus {
    fn from_wire(status: v1::NodeStatusResponse) -> NodeStatus {
        NodeStatus {
            node: Node::from_wire(status.node.unwrap_or_default()),
            cluster_id: status.cluster_id,
            start_count: status.start_count,
            groups: status.groups.into_iter().map(GroupStatus::from_wire).collect(),
            peers: status.peers.into_iter().map(PeerStatus::from_wire).collect(),
            disk_free_bytes: status.disk_free_bytes,
            disk_total_bytes: status.disk_total_bytes,
            log_bytes: status.log_bytes,
            recovering: status.recovering,
            uptime: Duration::from_millis(status.uptime_ms),
            draining: status.draining,
        }
    }
}

impl GroupStatus {
    fn from_wire(group: v1::GroupStatus) -> GroupStatus {
        GroupStatus {
            shard: ShardId(group.shard),
            replica: ReplicaId(group.replica),
            role: group.role,
            term: group.term,
            leader: (group.leader_node != 0).then_some(NodeId(group.leader_node)),
            last_index: group.last_index,
            applied_index: group.applied_index,
            first_index: group.first_index,
            epoch: group.epoch,
            state_bytes: group.state_bytes,
            members: group.members.iter().map(MemberStatus::from_wire).collect(),
            joint: group.joint,
            reads_per_second: group.reads_per_second,
            writes_per_second: group.writes_per_second,
        }
    }
}

impl PeerStatus {
    fn from_wire(peer: v1::PeerStatus) -> PeerStatus {
        PeerStatus {
            node: NodeId(peer.node),
            address: peer.address,
            connected: peer.connected,
            silent: Duration::from_millis(peer.silent_ms),
        }
    }
}

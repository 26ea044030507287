//! The cluster's own records: ordinary versioned keys of the system keyspace in the meta group.
//!
//! Owns their keys, their encoding and their conditional changes. Works on the replica of this node,
//! which must lead: whoever wants a change elsewhere asks the leader's node (`cluster`).
//!
//! | key | value |
//! |---|---|
//! | `map` | `coracle.v1.ShardMap`: shards, nodes, keyspaces, and the map's epoch |
//! | `ids` | `coracle.peer.v1.IdCounters`: the next id of each kind |
//!
//! | `leaving` | `coracle.peer.v1.LeavingReplicas`: replicas that are out of the map, and not yet gone |
//! | `operations` | `coracle.peer.v1.Operations`: work on replicas, and how balancing is set |
//!
//! They change together, in one batch, conditional on the version of `map` that was read: two
//! controllers never overwrite each other, and an epoch names one map for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::shard_map::{META_SHARD, SYSTEM_KEYSPACE, ShardMap};
use coracle_proto::{peer, v1};
use coracle_raft::apply::Outcome;
use coracle_raft::clock::Clock;
use coracle_raft::command::{Change, Condition, Operation, Request, RequestId};
use coracle_raft::error::GroupError;
use coracle_raft::group::Group;
use coracle_raft::host::Host;
use coracle_raft::leadership::Standing;
use coracle_raft::state_machine::ReadState;
use prost::Message;
use tokio::time::Instant;

pub mod operations;

pub use operations::Operations;

/// A change takes one round of the meta group; during an election it waits for the next leader.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Conflicts with other controllers before a change is given up.
const CONFLICTS_MAX: usize = 16;

const MAP: &[u8] = b"map";
const IDS: &[u8] = b"ids";
const LEAVING: &[u8] = b"leaving";
const OPERATIONS: &[u8] = b"operations";

/// The records, as read at one version.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Shards, nodes, keyspaces.
    pub map: v1::ShardMap,
    /// The next ids.
    pub ids: peer::IdCounters,
    /// Replicas that are out of the map, and not yet gone.
    pub leaving: Vec<peer::LeavingReplica>,
    /// Work on replicas.
    pub operations: Operations,
    pub(crate) version: u64,
}

/// Why the records did not change.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RecordsError {
    /// This node does not hold, or does not lead, the meta group.
    #[error("this node does not lead the meta group")]
    NotLeader,
    /// There is no map yet.
    #[error("the cluster has no map yet")]
    NoMap,
    /// The change makes no sense on the records as they are.
    #[error("{0}")]
    Refused(String),
    /// What would come of it is no shard map: every node would refuse it.
    #[error("{0}")]
    Invalid(String),
    /// The meta group did not answer in time; it may still happen.
    #[error("the meta group: {0}")]
    Unavailable(String),
}

/// See the module.
pub struct Records {
    host: Arc<Host>,
    clock: Arc<dyn Clock>,
    client: u64,
    sequence: AtomicU64,
}

impl Records {
    /// `client` is the random id under which this start of the node writes records.
    pub fn new(host: Arc<Host>, clock: Arc<dyn Clock>, client: u64) -> Self {
        Self { host, clock, client, sequence: AtomicU64::new(1) }
    }

    /// The wall clock, in milliseconds.
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    fn group(&self) -> Result<Arc<Group>, RecordsError> {
        self.host.group(META_SHARD).ok_or(RecordsError::NotLeader)
    }

    /// What this node's replica of the meta group has, however old; `None` without one, or without a
    /// map in it.
    pub async fn local(&self) -> Option<Snapshot> {
        let group = self.group().ok()?;
        let deadline = Instant::now() + CHANGE_TIMEOUT;
        group.read_local(0, deadline, read).await.ok()?.ok()
    }

    /// The newest records. On the leader's node.
    pub async fn load(&self) -> Result<Snapshot, RecordsError> {
        let group = self.group()?;
        // Whoever acts on the newest records does so as the leader: others are sent to it.
        if group.status().state != Standing::Leader {
            return Err(RecordsError::NotLeader);
        }
        let deadline = Instant::now() + CHANGE_TIMEOUT;
        group.read(deadline, read).await.map_err(unavailable)?
    }

    /// Changes the records: `change` gets them as they are and returns whether anything is to be
    /// written. It is called again when somebody else was faster. The map's epoch is raised here.
    pub async fn change(
        &self,
        mut change: impl FnMut(&mut v1::ShardMap, &mut peer::IdCounters) -> Result<bool, String> + Send,
    ) -> Result<Snapshot, RecordsError> {
        self.change_all(|snapshot| change(&mut snapshot.map, &mut snapshot.ids)).await
    }

    /// [`Records::change`], of all records.
    pub async fn change_all(
        &self,
        mut change: impl FnMut(&mut Snapshot) -> Result<bool, String> + Send,
    ) -> Result<Snapshot, RecordsError> {
        for _ in 0..CONFLICTS_MAX {
            let mut snapshot = self.load().await?;
            let condition = Condition::IfVersion(snapshot.version);
            let changed = change(&mut snapshot);
            if !changed.map_err(RecordsError::Refused)? {
                return Ok(snapshot);
            }
            snapshot.map.epoch += 1;
            // A map that the nodes do not take up would end every later change too.
            ShardMap::from_proto(&snapshot.map)
                .map_err(|error| RecordsError::Invalid(error.to_string()))?;
            if self.write(&snapshot, condition).await? {
                return Ok(snapshot);
            }
        }
        Err(RecordsError::Unavailable("others keep changing the records".to_owned()))
    }

    /// Writes the first map of a new cluster; one that is there stays.
    pub async fn write_first(
        &self,
        map: v1::ShardMap,
        ids: peer::IdCounters,
    ) -> Result<(), RecordsError> {
        let shards_asked = map.shards.iter().filter(|shard| shard.id != META_SHARD.0).count();
        let operations = Operations { shards_asked: shards_asked as u64, ..Operations::default() };
        let snapshot = Snapshot { map, ids, leaving: Vec::new(), operations, version: 0 };
        self.write(&snapshot, Condition::IfAbsent).await.map(drop)
    }

    /// False when the condition failed. A retry carries the same request id, so that an attempt whose
    /// answer was lost is found, not repeated.
    async fn write(&self, snapshot: &Snapshot, condition: Condition) -> Result<bool, RecordsError> {
        let put = |key: &'static [u8], value: Vec<u8>, condition| Operation {
            key: Bytes::from_static(key),
            condition,
            change: Change::Put { value: value.into(), ttl_ms: 0 },
        };
        let leaving = peer::LeavingReplicas { replicas: snapshot.leaving.clone() };
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let request = Request {
            id: RequestId {
                client: self.client,
                sequence,
                birth_ms: self.clock.now_ms(),
                lowest_unanswered: 0,
            },
            keyspace: SYSTEM_KEYSPACE.0,
            position: 0,
            epoch: 0,
            operations: vec![
                put(MAP, snapshot.map.encode_to_vec(), Some(condition)),
                put(IDS, snapshot.ids.encode_to_vec(), None),
                put(LEAVING, leaving.encode_to_vec(), None),
                put(OPERATIONS, snapshot.operations.to_proto().encode_to_vec(), None),
            ],
        };
        let deadline = Instant::now() + CHANGE_TIMEOUT;
        loop {
            let reply = match self.group()?.write(request.clone(), deadline).await {
                Ok(written) => written.reply,
                Err(GroupError::Unknown(why)) if Instant::now() < deadline => {
                    tracing::debug!(why, "a change of the records is asked for again");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                Err(error) => return Err(unavailable(error)),
            };
            return match reply.outcome {
                Outcome::Applied { .. } => Ok(true),
                Outcome::ConditionFailed { .. } => Ok(false),
                Outcome::StaleRoute { .. } => Err(RecordsError::NoMap),
                other => Err(RecordsError::Unavailable(format!("{other:?}"))),
            };
        }
    }
}

fn unavailable(error: GroupError) -> RecordsError {
    match error {
        GroupError::NotLeader { .. } | GroupError::Stopped => RecordsError::NotLeader,
        other => RecordsError::Unavailable(other.to_string()),
    }
}

fn read(state: &ReadState) -> Result<Snapshot, RecordsError> {
    let unreadable = |error: &dyn std::fmt::Display| RecordsError::Unavailable(error.to_string());
    let find = |key: &[u8]| {
        let found = state.reader.get_at(SYSTEM_KEYSPACE.0, key, u64::MAX);
        found.map_err(|error| unreadable(&error))
    };
    let get = |key: &[u8]| find(key)?.ok_or(RecordsError::NoMap);
    let (map, ids) = (get(MAP)?, get(IDS)?);
    let leaving = find(LEAVING)?.map(|found| peer::LeavingReplicas::decode(found.value));
    let leaving = leaving.transpose().map_err(|error| unreadable(&error))?;
    let operations = find(OPERATIONS)?.map(|found| peer::Operations::decode(found.value));
    let operations = operations.transpose().map_err(|error| unreadable(&error))?;
    Ok(Snapshot {
        map: v1::ShardMap::decode(map.value).map_err(|error| unreadable(&error))?,
        ids: peer::IdCounters::decode(ids.value).map_err(|error| unreadable(&error))?,
        leaving: leaving.unwrap_or_default().replicas,
        operations: Operations::from_proto(operations.unwrap_or_default())
            .map_err(|error| unreadable(&error))?,
        version: map.version,
    })
}

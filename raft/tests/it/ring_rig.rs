//! Owns a cluster whose group may be split: keys that find the group which holds them, as clients do. Does
//! not judge anything but that what was acknowledged is there, once.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::entity::EntityRule;
use coracle_raft::apply::{Outcome, Reply};
use coracle_raft::clock::Clock;
use coracle_raft::command::{Change, Operation, Request, RequestId};
use coracle_raft::error::ChangeError;
use coracle_raft::group::{Group, Split, SplitPlan};
use coracle_raft::rules::Rules;
use coracle_raft::state_machine::ReadState;
use coracle_raft::types::{NodeId, ShardId};
use coracle_storage::ReplicaId;
use tokio::time::Instant;

use crate::cluster::{Cluster, SHARD, WallClock};

pub(crate) const KEYSPACE: u32 = 1;
pub(crate) const CHILD: ShardId = ShardId(2);
/// The middle of the ring.
pub(crate) const AT: u64 = 1 << 63;

pub(crate) fn rules() -> Rules {
    Rules { hash_seed: 7, keyspaces: BTreeMap::from([(KEYSPACE, EntityRule::Whole)]) }
}

pub(crate) fn position(key: &str) -> u64 {
    rules().position(KEYSPACE, key.as_bytes()).expect("its rule is known")
}

/// The child's replica for one of the parent's.
pub(crate) fn child_of(replica: u64) -> u64 {
    replica + 10
}

pub(crate) struct Ring {
    pub(crate) cluster: Cluster,
    sequence: AtomicU64,
}

impl Ring {
    pub(crate) async fn new() -> Ring {
        Ring { cluster: Cluster::new().await, sequence: AtomicU64::new(0) }
    }

    pub(crate) fn request(&self, key: &str, change: Change) -> Request {
        let sequence = self.sequence.fetch_add(1, Ordering::SeqCst) + 1;
        let key = Bytes::copy_from_slice(key.as_bytes());
        Request {
            id: RequestId {
                client: 7,
                sequence,
                birth_ms: WallClock.now_ms(),
                lowest_unanswered: 1,
            },
            keyspace: KEYSPACE,
            position: rules().position(KEYSPACE, &key).expect("its rule is known"),
            epoch: 0,
            operations: vec![Operation { key, condition: None, change }],
        }
    }

    pub(crate) fn groups(&self) -> impl Iterator<Item = (NodeId, Arc<Group>)> + '_ {
        let all = self.cluster.nodes.iter();
        all.flat_map(|(id, node)| node.host.groups().into_iter().map(|group| (*id, group)))
    }

    /// Who leads the group of a shard.
    pub(crate) fn leader(&self, shard: ShardId) -> Option<Arc<Group>> {
        let mut led = self.groups().filter(|(_, group)| group.shard() == shard && group.leads());
        led.next().map(|(_, group)| group)
    }

    pub(crate) async fn leading(&self, shard: ShardId) -> Arc<Group> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(group) = self.leader(shard) {
                return group;
            }
            assert!(Instant::now() < until, "nobody leads {shard}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends a write to whoever holds its key until it is answered: the first time and after every
    /// doubt under the same id.
    pub(crate) async fn write(&self, request: &Request) -> (ShardId, Reply) {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            assert!(Instant::now() < until, "{request:?} was not acknowledged");
            let holds = |group: &Arc<Group>| {
                let descriptor = group.descriptor();
                descriptor.is_some_and(|known| known.owns(KEYSPACE, request.position))
            };
            let holder = self.groups().find(|(_, group)| group.leads() && holds(group));
            if let Some((_, group)) = holder {
                let deadline = Instant::now() + Duration::from_secs(2);
                match group.write(request.clone(), deadline).await {
                    Ok(written) if !matches!(written.reply.outcome, Outcome::StaleRoute { .. }) => {
                        return (group.shard(), written.reply);
                    }
                    _ => {}
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn put(&self, key: &str, value: &str) -> (ShardId, Reply) {
        let value = Bytes::copy_from_slice(value.as_bytes());
        let request = self.request(key, Change::Put { value, ttl_ms: 0 });
        let (shard, reply) = self.write(&request).await;
        assert!(matches!(reply.outcome, Outcome::Applied { .. }), "{reply:?}");
        (shard, reply)
    }

    /// Counts up, which shows what is applied twice.
    pub(crate) async fn count(&self, key: &str) -> i64 {
        let request = self.request(key, Change::Increment { by: 1 });
        match self.write(&request).await.1.outcome {
            Outcome::Applied { results, .. } => results[0].counter.expect("an increment"),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn get(&self, key: &str) -> Option<String> {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            assert!(Instant::now() < until, "{key} could not be read");
            for (_, group) in self.groups().filter(|(_, group)| group.leads()) {
                let name = key.to_owned();
                let look = move |state: &ReadState| {
                    let known = state.descriptor.as_ref();
                    let owns = known.is_some_and(|known| known.owns(KEYSPACE, position(&name)));
                    let found = state.reader.get_at(KEYSPACE, name.as_bytes(), u64::MAX);
                    owns.then(|| found.expect("readable").filter(|found| !found.tombstone))
                };
                let deadline = Instant::now() + Duration::from_secs(2);
                if let Ok(Some(found)) = group.read(deadline, look).await {
                    return found.map(|found| String::from_utf8_lossy(&found.value).into_owned());
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn fill(&self, keys: std::ops::Range<u32>) {
        for n in keys {
            self.put(&format!("k{n}"), &format!("v{n}")).await;
        }
    }

    pub(crate) async fn check(&self, keys: std::ops::Range<u32>) {
        for n in keys {
            assert_eq!(self.get(&format!("k{n}")).await, Some(format!("v{n}")), "k{n}");
        }
    }

    pub(crate) fn plan(group: &Group) -> SplitPlan {
        let members = group.status().members.into_keys();
        SplitPlan {
            epoch: group.descriptor().map_or(0, |descriptor| descriptor.epoch),
            at: AT,
            child: CHILD,
            replicas: members.map(|id| (ReplicaId(id), ReplicaId(child_of(id)))).collect(),
            rules: rules(),
        }
    }

    /// Splits the first group in the middle. In doubt it looks whether it has happened.
    pub(crate) async fn split(&self) -> Option<Split> {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            assert!(Instant::now() < until, "it was not split");
            let group = self.leading(SHARD).await;
            let arc = group.descriptor().and_then(|descriptor| descriptor.arc);
            if arc == Some((0, AT)) {
                return None;
            }
            let deadline = Instant::now() + Duration::from_secs(3);
            match group.split(Ring::plan(&group), deadline).await {
                Ok(split) => return Some(split),
                Err(ChangeError::Refused(why)) => panic!("{why}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// Waits until a node's replica of a shard has all that its leader has.
    pub(crate) async fn caught_up(&self, node: NodeId, shard: ShardId) -> Arc<Group> {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let leader = self.leading(shard).await;
            let target = leader.status().applied;
            let group = self.cluster.nodes[&node].host.group(shard);
            if let Some(group) = group.filter(|group| group.status().applied >= target) {
                return group;
            }
            assert!(Instant::now() < until, "{shard} on {node} is not there, or behind {target:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// All replicas of both shards hold the same, and only what is theirs is shown.
    pub(crate) async fn agree(&self, nodes: impl IntoIterator<Item = NodeId>) {
        let nodes: Vec<NodeId> = nodes.into_iter().collect();
        for shard in [SHARD, CHILD] {
            let mut hashes = BTreeMap::new();
            for node in &nodes {
                let group = self.caught_up(*node, shard).await;
                let deadline = Instant::now() + Duration::from_secs(5);
                let look = |state: &ReadState| {
                    let descriptor = state.descriptor.clone().expect("described");
                    let mine: coracle_storage::state::ArcFilter =
                        Arc::new(move |keyspace, key: &[u8]| {
                            let position = rules().position(keyspace, key);
                            position.is_some_and(|at| descriptor.owns(keyspace, at))
                        });
                    let hash = state.reader.state_hash(Some(&mine), u64::MAX).expect("readable");
                    (state.position, hash)
                };
                let (position, hash) = group.read_local(0, deadline, look).await.expect("it runs");
                hashes.entry(position).or_insert_with(Vec::new).push((hash, *node));
            }
            for (position, found) in hashes {
                assert!(
                    found.iter().all(|one| one.0 == found[0].0),
                    "{shard} {position:?} {found:?}"
                );
            }
        }
    }
}

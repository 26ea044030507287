//! Steps of splits and merges on the node that leads the group: what a controller orders, and how it is
//! answered.
//!
//! Owns the reading of orders and their answers. What they do is raft's.

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_proto::reason::Reason;
use coracle_proto::shard_map::ShardId;
use coracle_proto::{peer, v1};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::error::ChangeError;
use coracle_raft::group::{Group, MergePlan, PrepareMerge, SplitPlan};
use coracle_raft::rules::Rules;
use coracle_storage::ReplicaId;
use peer::ReshapeStep;
use prost::Message;
use tokio::time::Instant;

use crate::cluster::{COMMAND_TIMEOUT, Cluster, refused, reshape};

impl Cluster {
    /// Does a step of a split or a merge, where this node leads the group.
    pub(in crate::cluster) async fn reshape_here(&self, asked: peer::Reshape) -> peer::CommandDone {
        let shard = ShardId(asked.shard);
        let Some(group) = self.host.group(shard) else {
            return refused(format!("shard {shard} has no replica on this node"));
        };
        if asked.step() == ReshapeStep::Points {
            return match points(&group, &asked).await {
                Ok(points) => {
                    let body = points.encode_to_vec().into();
                    peer::CommandDone { body, ..Default::default() }
                }
                Err(why) => refused(why),
            };
        }
        let ordered = match order(&asked) {
            Ok(ordered) => ordered,
            Err(why) => return refused(why),
        };
        match carry_out(&group, ordered).await {
            Ok(()) => {
                let body = self.replica_status(&group, false).encode_to_vec().into();
                peer::CommandDone { body, ..Default::default() }
            }
            Err(error) => {
                let ask_node = match &error {
                    ChangeError::NotLeader { leader } => leader.map_or(0, |node| node.0),
                    _ => 0,
                };
                let reason = match &error {
                    ChangeError::Refused(_) => Reason::Conflict.as_str().to_owned(),
                    _ => String::new(),
                };
                peer::CommandDone {
                    error: error.to_string(),
                    ask_node,
                    reason,
                    ..Default::default()
                }
            }
        }
    }
}

/// What a group is told.
enum Order {
    Split(SplitPlan),
    Prepare(PrepareMerge),
    Freeze { merge: u64, epoch: u64 },
    Thaw { merge: u64, epoch: u64 },
    Absorb(MergePlan),
    End { merge: u64, epoch: u64 },
}

fn order(asked: &peer::Reshape) -> Result<Order, String> {
    let (merge, epoch) = (asked.operation, asked.epoch);
    let pairs = asked.replicas.iter();
    let replicas: BTreeMap<ReplicaId, ReplicaId> =
        pairs.map(|pair| (ReplicaId(pair.replica), ReplicaId(pair.other))).collect();
    Ok(match asked.step() {
        ReshapeStep::Split => Order::Split(SplitPlan {
            epoch,
            at: asked.at,
            child: ShardId(asked.other),
            replicas,
            rules: rules(asked)?,
        }),
        ReshapeStep::Prepare => Order::Prepare(PrepareMerge {
            merge,
            epoch,
            other: ShardId(asked.other),
            absorbs: asked.absorbs,
            replicas: replicas.into_keys().collect(),
            rules: rules(asked)?,
        }),
        ReshapeStep::Freeze => Order::Freeze { merge, epoch },
        ReshapeStep::Thaw => Order::Thaw { merge, epoch },
        ReshapeStep::End => Order::End { merge, epoch },
        ReshapeStep::Absorb => {
            let other = v1::Shard::decode(asked.descriptor.clone());
            let other = other.map_err(|error| format!("not a shard: {error}"))?;
            let arc = Some((other.start, other.end));
            Order::Absorb(MergePlan {
                merge,
                epoch,
                other: Descriptor { shard: other.id, arc, epoch: other.epoch },
                frozen_at: asked.frozen_at,
                replicas,
                rules: rules(asked)?,
            })
        }
        ReshapeStep::Unspecified | ReshapeStep::Points => {
            return Err("an order of no kind, or of one that this version does not know".to_owned());
        }
    })
}

fn rules(asked: &peer::Reshape) -> Result<Rules, String> {
    let mut keyspaces = BTreeMap::new();
    for bytes in &asked.keyspaces {
        let keyspace = v1::Keyspace::decode(bytes.clone());
        let keyspace = keyspace.map_err(|error| format!("not a keyspace: {error}"))?;
        let keyspace = coracle_proto::shard_map::Keyspace::from_proto(&keyspace);
        let keyspace = keyspace.map_err(|error| error.to_string())?;
        if keyspace.id != coracle_proto::shard_map::SYSTEM_KEYSPACE {
            keyspaces.insert(keyspace.id.0, keyspace.rule);
        }
    }
    Ok(Rules { hash_seed: asked.hash_seed, keyspaces })
}

async fn carry_out(group: &Group, order: Order) -> Result<(), ChangeError> {
    // Its end comes before that of whoever waits for the answer.
    let deadline = Instant::now() + COMMAND_TIMEOUT * 3 / 4;
    match order {
        Order::Split(plan) => group.split(plan, deadline).await.map(drop),
        Order::Prepare(plan) => group.prepare_merge(plan, deadline).await.map(drop),
        Order::Freeze { merge, epoch } => {
            let soon = Instant::now() + Duration::from_millis(reshape::FREEZE_MAX_MS);
            group.freeze(merge, epoch, soon).await.map(drop)
        }
        Order::Thaw { merge, epoch } => group.thaw(merge, epoch, deadline).await.map(drop),
        Order::Absorb(plan) => group.absorb(plan, deadline).await.map(drop),
        Order::End { merge, epoch } => group.end_merge(merge, epoch, deadline).await.map(drop),
    }
}

async fn points(group: &Group, asked: &peer::Reshape) -> Result<peer::SplitPoints, String> {
    if !group.leads() {
        return Err("it is led elsewhere".to_owned());
    }
    let points = group.split_points(rules(asked)?).await.map_err(|error| error.to_string())?;
    let load = points.load.iter().map(|bucket| peer::LoadBucket {
        start: bucket.start,
        reads: bucket.reads,
        writes: bucket.writes,
    });
    Ok(peer::SplitPoints { by_size: points.by_size, bytes: points.bytes, load: load.collect() })
}

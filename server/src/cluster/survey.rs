//! How nodes are: the meta group's leader asks each, about once a second.
//!
//! Owns the asking, and a node's answer. What is made of it is `knowledge`'s.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::shard_map::{META_SHARD, NodeId};
use coracle_proto::{peer, v1};
use coracle_raft::group::Group;
use coracle_raft::host::Condition;
use coracle_raft::leadership::Standing;
use coracle_storage::ReplicaId;
use peer::cluster_command::Kind;
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::knowledge::{BalancingSet, last_heard};
use super::members::{ABSENT, DAMAGED, STOPPED, member_statuses};
use super::{Cluster, PUBLISH_TIMEOUT, Target};

/// Between two rounds of asking.
const SURVEY_INTERVAL: Duration = Duration::from_secs(1);

impl Cluster {
    /// Asks all nodes again and again, where this node leads the meta group.
    pub(super) async fn survey(&self, stop: &CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(SURVEY_INTERVAL) => {}
            }
            if self.leads_meta() {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = self.ask_all() => {}
                }
            }
        }
    }

    pub(super) fn leads_meta(&self) -> bool {
        let group = self.host.group(META_SHARD);
        group.is_some_and(|group| group.status().state == Standing::Leader)
    }

    /// How balancing is set, where this node leads the meta group.
    pub fn balancing_set(&self) -> BalancingSet {
        self.knowledge.lock().set
    }

    async fn ask_all(&self) {
        let Some(map) = self.map.current() else { return };
        let own = self.membership.identity().map(|(_, node)| node);
        let ask = map.nodes().map(|node| node.id).map(|node| async move {
            let probe = peer::Probe { node: true, ..Default::default() };
            let answer = match own == Some(node) {
                true => self.answer_probe(probe),
                false => {
                    let kind = Kind::Probe(probe);
                    self.commands.command(Target::Node(node), kind, PUBLISH_TIMEOUT).await.ok()?
                }
            };
            // One that is starting answers nothing.
            let body = Some(answer.body).filter(|body| !body.is_empty())?;
            Some((node, peer::NodeReport::decode(body).ok()?))
        });
        let reports = futures_util::future::join_all(ask).await;
        if !self.leads_meta() {
            return;
        }
        let now = Instant::now();
        let mut known = self.knowledge.lock();
        let mut leaders: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        for (node, report) in reports.into_iter().flatten() {
            for (shard, term) in known.learn(node.0, &report, now) {
                let leader = leaders.entry(shard).or_default();
                *leader = (term, node.0).max(*leader);
            }
        }
        drop(known);
        for (shard, (term, node)) in leaders {
            self.map.observe_leader(coracle_proto::shard_map::ShardId(shard), term, NodeId(node));
        }
    }

    /// How this node is.
    pub(super) fn report(&self) -> peer::NodeReport {
        let space = (self.space)();
        let replicas = self.replica_statuses(false);
        let map = self.map.current();
        let up = self.started.elapsed();
        let heard = map.iter().flat_map(|map| map.nodes()).filter_map(|node| {
            let silence = last_heard(self.commands.silence(node.id), up);
            let silent_ms = u64::try_from(silence.as_millis()).ok()?;
            Some(peer::NodeHeard { node: node.id.0, silent_ms })
        });
        peer::NodeReport {
            heard: heard.collect(),
            disk_free_bytes: space.map_or(0, |space| space.free_bytes),
            disk_total_bytes: space.map_or(0, |space| space.total_bytes),
            replicas: replicas.iter().map(|status| Bytes::from(status.encode_to_vec())).collect(),
        }
    }

    /// The replicas of this node: those that run, and those of the map that do not.
    /// `members`: with what leaders know of the others.
    pub fn replica_statuses(&self, members: bool) -> Vec<v1::GroupStatus> {
        let groups = self.host.groups();
        self.loads.retain(|shard| groups.iter().any(|group| group.shard() == shard));
        let running = groups.iter().map(|group| self.replica_status(group, members));
        running.chain(self.lost()).collect()
    }

    /// How a replica of this node is.
    pub(super) fn replica_status(&self, group: &Group, members: bool) -> v1::GroupStatus {
        let (status, rates) = (group.status(), self.loads.rates(group.shard()));
        let (held, merge) = (group.descriptor(), group.merge_status());
        let (start, end) = held.as_ref().and_then(|held| held.arc).unwrap_or_default();
        v1::GroupStatus {
            shard: group.shard().0,
            replica: group.replica().0,
            role: match status.state {
                Standing::Leader => "leader",
                Standing::Follower => "follower",
                Standing::Candidate => "candidate",
                Standing::Learner => "learner",
                Standing::Stopped => STOPPED,
            }
            .to_owned(),
            term: status.term,
            leader_node: status.leader.map_or(0, |node| node.0),
            last_index: status.last_index.unwrap_or(0),
            applied_index: status.applied.map_or(0, |at| at.index),
            first_index: status.purged.map_or(0, |at| at.index + 1),
            epoch: held.map_or(0, |held| held.epoch),
            state_bytes: group.state_bytes(),
            joint: status.joint,
            members: if members { member_statuses(group) } else { Vec::new() },
            reads_per_second: rates.reads,
            writes_per_second: rates.writes,
            start,
            end,
            merging: merge.merging.unwrap_or(0),
            frozen_for: merge.frozen.map_or(0, |frozen| frozen.merge),
            frozen_at: merge.frozen.map_or(0, |frozen| frozen.index),
            foreign_free: merge.foreign_free.unwrap_or(0),
            absorbed: merge.absorbed.map_or(0, |absorbed| absorbed.merge),
            absorbed_durable: merge.absorbed.is_some_and(|absorbed| absorbed.flushed),
        }
    }

    /// Replicas of the map that are on this node and do not run: as far as it can tell of which shard
    /// they are. One that is not there at all is told of where it votes: others may just be made, or
    /// removed.
    fn lost(&self) -> Vec<v1::GroupStatus> {
        let own = self.membership.identity().map(|(_, node)| node);
        let (Some(map), Some(own)) = (self.map.current(), own) else { return Vec::new() };
        let here = |shard: &coracle_proto::shard_map::Shard| {
            let replica = shard.replica_on(own)?;
            let votes = shard.voters().any(|voter| voter.id == replica.id) && !shard.forming;
            let role = match self.host.condition(ReplicaId(replica.id.0)) {
                Condition::Damaged if self.host.group(shard.id).is_none() => DAMAGED,
                Condition::Absent if votes => ABSENT,
                _ => return None,
            };
            Some(v1::GroupStatus {
                shard: shard.id.0,
                replica: replica.id.0,
                role: role.to_owned(),
                ..Default::default()
            })
        };
        map.all_shards().filter_map(here).collect()
    }
}

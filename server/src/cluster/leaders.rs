//! Leaderships that go elsewhere: away from nodes that are drained, to where an operation wants them.
//!
//! Owns the asking of leaders to hand over, a few at a time. Whom a leader hands to, where nobody says,
//! is its own choice (`coracle_raft`'s `membership`).

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_proto::shard_map::{META_SHARD, NodeId};
use coracle_proto::{peer, v1};
use tokio::time::Instant;
use v1::NodeState;

use super::Cluster;
use super::elastic::Knowledge;
use super::operations;
use crate::records::Snapshot;

/// Groups that hand over at a time: each of them serves nobody for the length of an election.
const AT_A_TIME: usize = 4;
/// A leader that could not hand over is asked again no sooner.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Who was asked lately.
#[derive(Debug, Default)]
pub(super) struct Asked(BTreeMap<u64, Instant>);

impl Cluster {
    /// Asks those leaders that shall lead no more, and those that an operation names.
    pub(super) async fn spread_leaders(&self, snapshot: &Snapshot, asked: &mut Asked) {
        let known = self.knowledge.lock().clone();
        let now = Instant::now();
        asked.0.retain(|_, at| now.duration_since(*at) < AGAIN_AFTER);
        let mut wanted = hand_overs(snapshot, &known);
        let transfers = operations::due_transfers(snapshot);
        wanted.extend(transfers.iter().map(|due| (due.shard, due.from_node, due.to_node)));
        wanted.retain(|(shard, _, _)| !asked.0.contains_key(shard));
        wanted.truncate(AT_A_TIME);
        let ask = wanted.iter().map(|(shard, from, to_node)| {
            let hand_over = peer::HandOver { shard: *shard, to_node: *to_node };
            let told = self.tell_hand_over(NodeId(*from), hand_over);
            async move {
                if let Err(why) = told.await {
                    tracing::info!(shard, from, why, "a leader stays for now");
                }
            }
        });
        futures_util::future::join_all(ask).await;
        asked.0.extend(wanted.iter().map(|(shard, _, _)| (*shard, now)));
        let tried: Vec<v1::PlannedTransfer> =
            transfers.into_iter().filter(|due| asked.0.contains_key(&due.shard)).collect();
        if tried.is_empty() {
            return;
        }
        // Asked for once: where it did not work, the next plan says so again.
        let recorded =
            self.records.change_all(|snapshot| Ok(operations::forget_transfers(snapshot, &tried)));
        if let Err(error) = recorded.await {
            tracing::info!(%error, "transfers could not be recorded");
        }
    }
}

/// Whether leadership of a shard may stay where it is, by the records.
fn may_lead(map: &v1::ShardMap, node: u64) -> bool {
    let node = map.nodes.iter().find(|known| known.id == node);
    !node.is_some_and(|node| {
        matches!(node.state(), NodeState::Draining | NodeState::Decommissioning)
    })
}

/// The shards whose leaders shall go, and whither; 0 leaves it to the leader.
fn hand_overs(snapshot: &Snapshot, known: &Knowledge) -> Vec<(u64, u64, u64)> {
    let mut wanted: Vec<(u64, u64, u64)> = Vec::new();
    for (shard, leader) in &known.leaders {
        // The meta group's last: whoever leads it does all this.
        if !may_lead(&snapshot.map, *leader) && *shard != META_SHARD.0 {
            wanted.push((*shard, *leader, 0));
        }
    }
    if let Some(leader) = known.leaders.get(&META_SHARD.0).filter(|l| !may_lead(&snapshot.map, **l))
        && wanted.is_empty()
    {
        wanted.push((META_SHARD.0, *leader, 0));
    }
    wanted
}

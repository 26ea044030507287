//! Leaderships that go elsewhere: away from nodes that are drained, to where an operation wants them.
//!
//! Owns the asking of leaders to hand over, a few at a time. Whom a leader hands to, where nobody says,
//! is its own choice (`coracle_raft`'s `membership`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_proto::shard_map::{META_SHARD, NodeId};
use coracle_proto::{peer, v1};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use v1::NodeState;

use super::Cluster;
use super::knowledge::Knowledge;
use super::operations;
use crate::records::Snapshot;

/// Between two looks at who shall hand over.
const SPREAD_INTERVAL: Duration = Duration::from_millis(200);
/// Groups that hand over at a time: each of them serves nobody for the length of an election.
const AT_A_TIME: usize = 4;
/// A leader that could not hand over is asked again no sooner.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How often a leadership of a plan is asked for.
const TRIES_MAX: u32 = 5;

/// Who was asked lately.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// By shard.
    lately: BTreeMap<u64, Instant>,
    /// By shard and the node that shall lead: how often.
    tries: BTreeMap<(u64, u64), u32>,
}

impl Cluster {
    /// Has leaders hand over again and again, where this node leads the meta group.
    pub(super) async fn spread_leaders(&self, stop: &CancellationToken) {
        let mut asked = Asked::default();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(SPREAD_INTERVAL) => {}
            }
            if !self.leads_meta() {
                asked = Asked::default();
                continue;
            }
            let Ok(snapshot) = self.records.load().await else { continue };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.spread_once(&snapshot, &mut asked) => {}
            }
        }
    }

    /// Asks those leaders that shall lead no more, and those that an operation names.
    async fn spread_once(&self, snapshot: &Snapshot, asked: &mut Asked) {
        let known = self.knowledge.lock().clone();
        let now = Instant::now();
        asked.lately.retain(|_, at| now.duration_since(*at) < AGAIN_AFTER);
        let mut wanted = hand_overs(snapshot, &known);
        let transfers = operations::due_transfers(snapshot);
        let leader = |due: &v1::PlannedTransfer| known.leaders.get(&due.shard).copied();
        let (done, open): (Vec<_>, Vec<_>) =
            transfers.into_iter().partition(|due| leader(due) == Some(due.to_node));
        // Whoever leads by now.
        let from = |due: &v1::PlannedTransfer| leader(due).unwrap_or(due.from_node);
        wanted.extend(open.iter().map(|due| (due.shard, from(due), due.to_node)));
        let mut once = BTreeSet::new();
        wanted.retain(|(shard, _, _)| !asked.lately.contains_key(shard) && once.insert(*shard));
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
        asked.lately.extend(wanted.iter().map(|(shard, _, _)| (*shard, now)));
        let mut over = done;
        for due in open {
            let tries = asked.tries.entry((due.shard, due.to_node)).or_default();
            *tries += u32::from(wanted.iter().any(|(shard, _, _)| *shard == due.shard));
            // Where it does not work, the next plan says so again.
            if *tries > TRIES_MAX {
                over.push(due);
            }
        }
        asked.tries.retain(|(shard, to), _| {
            over.iter().all(|due| (due.shard, due.to_node) != (*shard, *to))
        });
        let shards = wanted.iter().map(|(shard, _, _)| *shard);
        self.knowledge.lock().handed_over.extend(shards);
        if over.is_empty() {
            return;
        }
        let recorded =
            self.records.change_all(|snapshot| Ok(operations::forget_transfers(snapshot, &over)));
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

/// The shards whose leaders shall go, and whither: to a voter whose node is heard and may lead. Where
/// there is none, the leader stays: handing over among those that shall not lead only costs elections.
fn hand_overs(snapshot: &Snapshot, known: &Knowledge) -> Vec<(u64, u64, u64)> {
    let mut led: BTreeMap<u64, usize> = BTreeMap::new();
    known.leaders.values().for_each(|leader| *led.entry(*leader).or_default() += 1);
    let mut wanted: Vec<(u64, u64, u64)> = Vec::new();
    for shard in &snapshot.map.shards {
        let leader = known.leaders.get(&shard.id).copied();
        let Some(leader) = leader.filter(|leader| {
            !may_lead(&snapshot.map, *leader) && !known.silent.contains_key(leader)
        }) else {
            continue;
        };
        let voters =
            shard.replicas.iter().filter(|r| r.role() == v1::ReplicaRole::Voter && !r.goes);
        let others = voters.map(|voter| voter.node).filter(|node| {
            *node != leader && may_lead(&snapshot.map, *node) && !known.silent.contains_key(node)
        });
        if let Some(to) = others.min_by_key(|node| (led.get(node).copied().unwrap_or(0), *node)) {
            *led.entry(to).or_default() += 1;
            wanted.push((shard.id, leader, to));
        }
    }
    // The meta group's last: whoever leads it does all this.
    wanted.sort_by_key(|(shard, _, _)| *shard == META_SHARD.0);
    if wanted.len() > 1 {
        wanted.retain(|(shard, _, _)| *shard != META_SHARD.0);
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::testing;

    /// The meta group and two shards on n1 to n3; n1 leads all.
    fn world() -> (Snapshot, Knowledge) {
        let snapshot = testing::records((0..3).map(testing::shard), 3);
        let leaders = (0..3).map(|shard| (shard, 1)).collect();
        (snapshot, Knowledge { leaders, ..Knowledge::default() })
    }

    #[test]
    fn a_drained_node_hands_over_to_those_that_may_lead_and_the_meta_group_last() {
        let (mut snapshot, mut known) = world();
        assert_eq!(hand_overs(&snapshot, &known), []);
        snapshot.map.nodes[0].state = NodeState::Draining.into();
        assert_eq!(
            hand_overs(&snapshot, &known),
            [(1, 1, 3), (2, 1, 2)],
            "n2 is to get the meta group"
        );
        known.leaders.extend([(1, 2), (2, 3)]);
        assert_eq!(hand_overs(&snapshot, &known), [(0, 1, 2)]);
    }

    #[test]
    fn nobody_hands_over_to_a_node_that_shall_not_lead_or_is_not_heard() {
        let (mut snapshot, mut known) = world();
        snapshot.map.nodes[0].state = NodeState::Draining.into();
        known.silent.insert(2, Instant::now());
        assert_eq!(hand_overs(&snapshot, &known), [(1, 1, 3), (2, 1, 3)]);
        snapshot.map.nodes[2].state = NodeState::Decommissioning.into();
        assert_eq!(hand_overs(&snapshot, &known), [], "it stays where it is");
    }
}

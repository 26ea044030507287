//! What a leader of the meta group knows beside the records: who is silent, how full disks are, how large
//! and how busy shards are, which replicas are lost.
//!
//! Owns its keeping. Asks nobody (see `super::survey`), decides nothing (see `super::balance`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_proto::{peer, v1};
use prost::Message;
use tokio::time::Instant;
use v1::NodeState;

use super::members::is_lost_role;
use crate::placement::model::{Disk, Duty};
use crate::records::Operations;

/// How long the nodes of a cluster must have been the same, and all heard, before replicas move for
/// balance: nodes join one after the other, and restart.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// A node that was not heard for so long is asked for nothing: it takes no replicas, and leads nothing.
pub(super) const SILENT: Duration = Duration::from_secs(5);
/// A voter that its node says is damaged or not there is replaced after so long: nodes and this one may
/// have different maps for a moment.
const LOST_AFTER: Duration = Duration::from_secs(10);

/// How balancing is set, for those who watch; all 0 on nodes that do not lead the meta group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalancingSet {
    /// Operations under way.
    pub active: usize,
    /// It moves replicas by itself.
    pub automatic: bool,
    /// The size at which a shard is split by itself.
    pub split_bytes: u64,
    /// The keys a second from which one is.
    pub split_load: u64,
}

/// See the module. Forgotten by one that leads no more.
#[derive(Debug, Clone, Default)]
pub struct Knowledge {
    /// How balancing is set.
    pub(super) set: BalancingSet,
    /// By node: since when it is silent.
    pub(super) silent: BTreeMap<u64, Instant>,
    /// By node: its disk, as it last said.
    pub(super) disks: BTreeMap<u64, Disk>,
    /// By shard: what its leader says a copy takes, in bytes.
    pub(super) bytes: BTreeMap<u64, u64>,
    /// Shards whose leaders say that they hold nothing of what is others' since a split.
    pub(super) tidy: BTreeSet<u64>,
    /// By shard and node: keys read and written a second by the replica there.
    pub(super) loads: BTreeMap<(u64, u64), u64>,
    /// By shard: who leads it.
    pub(super) leaders: BTreeMap<u64, u64>,
    /// Shards whose leaders were asked to hand over, or whose members may be others by now, until somebody
    /// has looked.
    pub(super) handed_over: BTreeSet<u64>,
    /// By shard: why it is not split by itself, though it is large or busy.
    pub(super) unsplit: BTreeMap<u64, String>,
    /// By replica: since when its node says that it is damaged, not there, or has stopped.
    pub(super) damaged: BTreeMap<u64, Instant>,
    /// Where no replica comes for now: nodes, and shards with nodes.
    pub(super) avoided_nodes: BTreeSet<u64>,
    pub(super) avoided_places: BTreeSet<(u64, u64)>,
    /// The nodes, and since when they are the same.
    pub(super) nodes: Option<(Vec<u64>, Instant)>,
    /// By node: when it last said how it is.
    pub(super) reported: BTreeMap<u64, Instant>,
    /// By node: when anybody who has said so last heard it, or may have, before a start.
    pub(super) heard: BTreeMap<u64, Instant>,
}

/// How long ago a node heard another at the latest: one that was not heard since it started may have been
/// right before.
pub(super) fn last_heard(silence: Option<Duration>, up: Duration) -> Duration {
    silence.unwrap_or(up)
}

impl Knowledge {
    /// What a node says of itself. Returns who leads which of its shards, where it is that node.
    pub(super) fn learn(
        &mut self,
        node: u64,
        report: &peer::NodeReport,
        now: Instant,
    ) -> BTreeMap<u64, u64> {
        self.reported.insert(node, now);
        for heard in &report.heard {
            let at = now.checked_sub(Duration::from_millis(heard.silent_ms)).unwrap_or(now);
            let last = self.heard.entry(heard.node).or_insert(at);
            *last = at.max(*last);
        }
        if report.disk_total_bytes > 0 {
            let capacity = report.disk_total_bytes;
            let used = capacity.saturating_sub(report.disk_free_bytes);
            self.disks.insert(node, Disk { capacity, used });
        }
        let mut leads = BTreeMap::new();
        self.loads.retain(|(_, at), _| *at != node);
        for replica in &report.replicas {
            let Ok(replica) = v1::GroupStatus::decode(replica.clone()) else { continue };
            if is_lost_role(&replica.role) {
                self.damaged.entry(replica.replica).or_insert(now);
                continue;
            }
            self.damaged.remove(&replica.replica);
            let load = replica.reads_per_second.saturating_add(replica.writes_per_second);
            self.loads.insert((replica.shard, node), load);
            if replica.role == "leader" {
                leads.insert(replica.shard, replica.term);
                self.bytes.insert(replica.shard, replica.state_bytes);
                match replica.foreign_free > 0 {
                    true => self.tidy.insert(replica.shard),
                    false => self.tidy.remove(&replica.shard),
                };
            }
        }
        leads
    }

    /// How balancing is set, and how much is under way.
    pub(super) fn note(&mut self, operations: &Operations) {
        self.set = BalancingSet {
            active: operations.active().count(),
            automatic: !operations.manual,
            split_bytes: operations.split_bytes(),
            split_load: operations.split_load(),
        };
    }

    /// What is known of nodes and shards that are there no more goes.
    pub(super) fn follow(&mut self, map: &v1::ShardMap) {
        let is_node = |id: &u64| map.nodes.iter().any(|node| node.id == *id);
        let is_shard = |id: &u64| map.shards.iter().any(|shard| shard.id == *id);
        // What a node said of its replicas before it fell silent was of its end, or will be said again.
        let replicas = map.shards.iter().flat_map(|shard| &shard.replicas);
        let replicas = replicas.filter(|replica| !self.silent.contains_key(&replica.node));
        let replicas: BTreeSet<u64> = replicas.map(|replica| replica.id).collect();
        self.disks.retain(|node, _| is_node(node));
        self.reported.retain(|node, _| is_node(node));
        self.heard.retain(|node, _| is_node(node));
        self.bytes.retain(|shard, _| is_shard(shard));
        self.tidy.retain(is_shard);
        self.loads.retain(|(shard, node), _| is_shard(shard) && is_node(node));
        self.damaged.retain(|replica, _| replicas.contains(replica));
    }

    /// What a shard has to do, whoever of its replicas does it: so it stays the same when leaders change.
    pub(super) fn load(&self, shard: u64) -> u64 {
        let its = self.loads.range((shard, 0)..=(shard, u64::MAX));
        its.fold(0, |sum, (_, load)| sum.saturating_add(*load))
    }

    /// Whether a node has given up, itself, on a replica that it should hold.
    pub(super) fn is_lost(&self, replica: u64, now: Instant) -> bool {
        let since = self.damaged.get(&replica);
        since.is_some_and(|since| now.duration_since(*since) >= LOST_AFTER)
    }

    /// Whether a node will not come back.
    pub(super) fn lost(&self, node: &v1::Node, operations: &Operations, now: Instant) -> bool {
        let down_after = Duration::from_millis(operations.down_after_ms());
        let silent = self.silent.get(&node.id);
        node.state() == NodeState::Gone
            || silent.is_some_and(|since| now.duration_since(*since) >= down_after)
    }

    pub(super) fn duty(&self, node: &v1::Node, operations: &Operations, now: Instant) -> Duty {
        match node.state() {
            _ if self.lost(node, operations, now) => Duty::Lost,
            NodeState::Decommissioning | NodeState::Decommissioned => Duty::Leaves,
            _ if self.silent.contains_key(&node.id) => Duty::Absent,
            NodeState::Active if self.avoided_nodes.contains(&node.id) => Duty::Keeps,
            state => Duty::of(state),
        }
    }

    /// Since when nodes are silent: since anybody last heard them, or may have, not only since this node
    /// began to look (`began`): a grace goes on under a new leader of the meta group. Only once all that are
    /// not silent have said whom they have heard. What others that are silent have heard nobody knows, up to
    /// when they were last heard themselves; so news of them takes a moment back.
    pub(super) fn silent_since(
        &self,
        map: &v1::ShardMap,
        began: &BTreeMap<u64, Instant>,
    ) -> BTreeMap<u64, Instant> {
        let is_over =
            |node: &v1::Node| matches!(node.state(), NodeState::Gone | NodeState::Decommissioned);
        let has_said = |node: &v1::Node| {
            is_over(node) || began.contains_key(&node.id) || self.reported.contains_key(&node.id)
        };
        if !map.nodes.iter().all(has_said) {
            return began.clone();
        }
        let ears: Vec<u64> = map
            .nodes
            .iter()
            .filter(|node| !is_over(node) && began.contains_key(&node.id))
            .map(|node| node.id)
            .collect();
        let since = |(node, began): (&u64, &Instant)| {
            // Its own last moment, and those of others that may have heard it until then.
            let moments = std::iter::once(node).chain(&ears).map(|ear| self.heard.get(ear));
            let last = moments.map(|heard| heard.copied().unwrap_or(*began)).max();
            (*node, last.map_or(*began, |last| last.min(*began)))
        };
        began.iter().map(since).collect()
    }

    /// Nodes that are not heard, though they should be.
    pub(super) fn missed<'a>(&'a self, map: &'a v1::ShardMap) -> impl Iterator<Item = u64> + 'a {
        let expected = map
            .nodes
            .iter()
            .filter(|node| !matches!(node.state(), NodeState::Gone | NodeState::Decommissioned));
        expected.map(|node| node.id).filter(|node| self.silent.contains_key(node))
    }

    /// The nodes are what they were for a while, all of them are heard and have said how they are, none
    /// has lost a replica, and the size of every shard is known: else what is known last would look large.
    pub(super) fn has_settled(&self, map: &v1::ShardMap, now: Instant) -> bool {
        let since = self.nodes.as_ref().map(|(_, since)| *since);
        let sized = |shard: &v1::Shard| shard.forming || self.bytes.contains_key(&shard.id);
        let said = |node: &v1::Node| {
            matches!(node.state(), NodeState::Gone | NodeState::Decommissioned)
                || self.reported.contains_key(&node.id)
        };
        since.is_some_and(|at| now.duration_since(at) >= SETTLED_AFTER)
            && self.missed(map).next().is_none()
            && self.damaged.is_empty()
            && map.shards.iter().all(sized)
            && map.nodes.iter().all(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn map(nodes: u64) -> v1::ShardMap {
        let node = |id| v1::Node { id, state: NodeState::Active.into(), ..Default::default() };
        v1::ShardMap { nodes: (1..=nodes).map(node).collect(), ..Default::default() }
    }

    fn heard(others: &[(u64, Duration)]) -> peer::NodeReport {
        let one = |(node, silent): &(u64, Duration)| peer::NodeHeard {
            node: *node,
            silent_ms: silent.as_millis() as u64,
        };
        peer::NodeReport { heard: others.iter().map(one).collect(), ..Default::default() }
    }

    #[test]
    fn a_new_controller_goes_on_with_the_grace_of_a_silent_node() {
        // n4 is down. n1, n2 and n3 are there, and n3 has started a minute ago.
        let (map, now) = (map(4), Instant::now() + 1_000 * SECOND);
        let (mut known, began) = (Knowledge::default(), BTreeMap::from([(4, now)]));
        known.learn(1, &heard(&[(2, SECOND), (4, 70 * SECOND)]), now);
        known.learn(3, &heard(&[(1, SECOND), (4, 60 * SECOND)]), now);
        assert_eq!(known.silent_since(&map, &began)[&4], now, "n2 has not said whom it has heard");
        known.learn(2, &heard(&[(4, 50 * SECOND)]), now);
        known.silent = known.silent_since(&map, &began);
        assert_eq!(known.silent[&4], now - 50 * SECOND, "since anybody heard it, never longer");
        let (operations, later) = (Operations::default(), now + 250 * SECOND);
        assert!(known.lost(&map.nodes[3], &operations, later), "the five minutes are over");
        assert!(!known.lost(&map.nodes[3], &operations, later - SECOND), "and not sooner");
    }

    #[test]
    fn a_node_that_somebody_hears_is_silent_only_since_this_one_looks() {
        let (map, now) = (map(3), Instant::now() + 1_000 * SECOND);
        let (mut known, since) = (Knowledge::default(), now - 9 * SECOND);
        known.learn(1, &heard(&[(3, 400 * SECOND)]), now);
        known.learn(2, &heard(&[(3, Duration::ZERO)]), now);
        let began = BTreeMap::from([(3, since)]);
        assert_eq!(known.silent_since(&map, &began)[&3], since, "n2 hears it all the time");
    }

    #[test]
    fn what_a_silent_node_may_have_heard_counts_until_it_says_what_it_did() {
        // Only n2 hears n3, and led. It falls silent; n1 leads, and n4 is there.
        let (map, now) = (map(4), Instant::now() + 1_000 * SECOND);
        let (mut known, operations) = (Knowledge::default(), Operations::default());
        let mut began = BTreeMap::from([(3, now - 5 * SECOND), (2, now)]);
        known.learn(1, &heard(&[(2, 5 * SECOND), (3, 400 * SECOND)]), now);
        known.learn(4, &heard(&[(2, 6 * SECOND), (3, 400 * SECOND)]), now);
        known.silent = known.silent_since(&map, &began);
        assert_eq!(known.silent[&3], now - 5 * SECOND, "n2 may have heard it until then");
        assert_eq!(known.silent[&2], now - 5 * SECOND);
        assert!(!known.lost(&map.nodes[2], &operations, now));
        // Both are silent for longer: so is n3's grace.
        began.insert(3, now);
        let later = now + 200 * SECOND;
        known.learn(1, &heard(&[(2, 205 * SECOND), (3, 600 * SECOND)]), later);
        known.learn(4, &heard(&[(2, 206 * SECOND), (3, 600 * SECOND)]), later);
        assert_eq!(known.silent_since(&map, &began)[&3], now - 5 * SECOND);
        // It was cut off, and has heard it all the time.
        began.remove(&2);
        known.learn(2, &heard(&[(1, SECOND), (3, SECOND)]), later);
        assert_eq!(known.silent_since(&map, &began)[&3], now, "as this one began to look");
    }

    #[test]
    fn a_node_that_starts_again_may_have_heard_others_until_it_did() {
        // As before, but n2 has only been restarted, a second ago: it was away for three.
        let (map, now) = (map(4), Instant::now() + 1_000 * SECOND);
        let (mut known, began) = (Knowledge::default(), BTreeMap::from([(3, now)]));
        known.learn(1, &heard(&[(2, SECOND), (3, 400 * SECOND)]), now);
        known.learn(4, &heard(&[(2, SECOND), (3, 400 * SECOND)]), now);
        known.learn(2, &heard(&[(1, SECOND), (3, last_heard(None, SECOND))]), now);
        assert_eq!(known.silent_since(&map, &began)[&3], now - SECOND);
        assert_eq!(last_heard(Some(9 * SECOND), 70 * SECOND), 9 * SECOND, "it knows");
    }
}

//! Owns the verdict on a cluster: what it can lose, and what is wrong. A plain function of the picture.
//! Asks nobody.

use std::collections::{BTreeMap, BTreeSet};

use coracle_client::admin::NodeStatus;
use coracle_client::topology::{NodeState, Shard};
use coracle_client::{ClusterMap, NodeId, ShardId};
use serde::Serialize;

/// How a cluster is.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Any so many more nodes may be lost, and every key is still served.
    pub nodes_to_lose: usize,
    /// Any one whole zone may be lost, and every key is still served.
    pub zone_to_lose: bool,
    /// Shards of which fewer than a majority of voters answer.
    pub without_quorum: Vec<u64>,
    /// Shards whose leader nobody knows, or is down.
    pub without_leader: Vec<u64>,
    /// Shards with voters that do not answer, or fewer than they shall have.
    pub under_replicated: Vec<u64>,
    /// Nodes of the map that do not answer.
    pub silent_nodes: Vec<u64>,
    /// What nodes say of damaged replicas.
    pub recovering: Vec<String>,
    /// Nodes that give their leaderships away.
    pub draining_nodes: Vec<u64>,
    /// Nodes that give everything away: what they hold still counts.
    pub decommissioning_nodes: Vec<u64>,
    /// Replicas that come.
    pub joining_replicas: usize,
}

impl Health {
    /// Judges.
    pub fn of(map: &ClusterMap, nodes: &BTreeMap<NodeId, NodeStatus>) -> Health {
        let answers = |node: NodeId| nodes.contains_key(&node);
        // Nobody waits for a node that has left for good.
        let stay = || map.nodes.iter().filter(|node| !node.state.has_left());
        let silent = stay().filter(|node| !answers(node.id));
        let is = |state: NodeState| {
            stay().filter(move |node| node.state == state).map(|node| node.id.0).collect()
        };
        let decommissioning: Vec<u64> = is(NodeState::Decommissioning);
        let wanted = map.voters_wanted.min(stay().count() - decommissioning.len());
        let replicas = map.shards.iter().flat_map(|shard| &shard.replicas);
        let recovering = nodes.values().flat_map(|status| {
            let node = status.node.id;
            status.recovering.iter().map(move |text| format!("n{node}: {text}"))
        });
        let mut health = Health {
            nodes_to_lose: usize::MAX,
            zone_to_lose: true,
            silent_nodes: silent.map(|node| node.id.0).collect(),
            recovering: recovering.collect(),
            draining_nodes: is(NodeState::Draining),
            decommissioning_nodes: decommissioning,
            joining_replicas: replicas.filter(|it| it.joining || it.becomes_voter).count(),
            ..Health::default()
        };
        let zones: BTreeSet<&str> = stay().map(|node| node.zone.as_str()).collect();
        for shard in &map.shards {
            let voters: Vec<NodeId> = voters(shard).collect();
            let majority = voters.len() / 2 + 1;
            let live: Vec<NodeId> = voters.iter().copied().filter(|node| answers(*node)).collect();
            let id = shard.id.0;
            if live.len() < majority {
                health.without_quorum.push(id);
            } else if leader(shard, nodes).is_none() {
                health.without_leader.push(id);
            }
            if live.len() < voters.len().max(wanted) {
                health.under_replicated.push(id);
            }
            health.nodes_to_lose = health.nodes_to_lose.min(live.len().saturating_sub(majority));
            health.zone_to_lose &= zones.iter().all(|zone| {
                let elsewhere =
                    live.iter().filter(|id| map.node(**id).is_none_or(|node| node.zone != *zone));
                elsewhere.count() >= majority
            });
        }
        if map.shards.is_empty() {
            (health.nodes_to_lose, health.zone_to_lose) = (0, false);
        }
        health
    }

    /// Every key is served.
    pub fn is_available(&self) -> bool {
        self.without_quorum.is_empty() && self.without_leader.is_empty()
    }

    /// Nothing is wrong.
    pub fn is_well(&self) -> bool {
        self.is_available()
            && self.under_replicated.is_empty()
            && self.silent_nodes.is_empty()
            && self.recovering.is_empty()
    }

    /// The sentence that `status` begins with.
    pub fn sentence(&self) -> String {
        if !self.without_quorum.is_empty() {
            let shards = self.without_quorum.len();
            return format!(
                "Fault tolerance: lost. {} no quorum: bring nodes back",
                plural(shards, "shard has", "shards have")
            );
        }
        let nodes = match self.nodes_to_lose {
            0 => {
                return "Fault tolerance: none. One more node lost, and some keys are not served"
                    .to_owned();
            }
            1 => "any 1 node".to_owned(),
            many => format!("any {many} nodes"),
        };
        let zone = if self.zone_to_lose { ", or any 1 zone," } else { "" };
        format!("Fault tolerance: can lose {nodes}{zone} and keep every key and every write")
    }

    /// What is wrong, one line each.
    pub fn problems(&self) -> Vec<String> {
        let shards = |ids: &[u64], what: &str| {
            let names: Vec<String> = ids.iter().map(u64::to_string).collect();
            (!ids.is_empty()).then(|| format!("{what}: shards {}", names.join(", ")))
        };
        let nodes: Vec<String> = self.silent_nodes.iter().map(|id| format!("n{id}")).collect();
        let silent = (!nodes.is_empty()).then(|| format!("no answer from: {}", nodes.join(", ")));
        let lists = [
            silent,
            shards(&self.without_quorum, "no quorum"),
            shards(&self.without_leader, "no leader"),
            shards(&self.under_replicated, "a voter is missing"),
        ];
        let recovering = self.recovering.iter().map(|text| format!("recovering: {text}"));
        lists.into_iter().flatten().chain(recovering).collect()
    }
}

fn plural(number: usize, one: &str, many: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {many}") }
}

/// The nodes that vote on a shard.
pub fn voters(shard: &Shard) -> impl Iterator<Item = NodeId> + '_ {
    shard.replicas.iter().filter(|replica| replica.voter).map(|replica| replica.node)
}

/// Who leads a shard: of the nodes that say so of themselves, the one in the highest term. The map's
/// word counts only where that node answers and does not deny it.
pub fn leader(shard: &Shard, nodes: &BTreeMap<NodeId, NodeStatus>) -> Option<NodeId> {
    let group = |node: NodeId, id: ShardId| {
        nodes.get(&node)?.groups.iter().find(move |group| group.shard == id)
    };
    let claims = voters(shard).filter_map(|node| {
        let group = group(node, shard.id)?;
        (group.role == "leader").then_some((group.term, node))
    });
    claims.max().map(|(_, node)| node)
}

#[cfg(test)]
pub(super) mod tests {
    use coracle_client::admin::GroupStatus;
    use coracle_client::topology::{Node, Replica, ReplicaId};

    use super::*;

    /// Five nodes in zones a, b, c, a, b; one shard on the first three, led by the first.
    pub(crate) fn map() -> ClusterMap {
        let nodes = (1..=5).map(|id| Node {
            weight: 1_000,
            id: NodeId(id),
            address: format!("x:{id}"),
            peer_address: String::new(),
            http_address: String::new(),
            zone: ["a", "b", "c"][(id as usize - 1) % 3].to_owned(),
            state: NodeState::Active,
            version: String::new(),
        });
        let replicas = (1..=3).map(|id| Replica {
            id: ReplicaId(id),
            node: NodeId(id),
            voter: true,
            joining: false,
            becomes_voter: false,
            replaces: None,
            goes: false,
        });
        let shard = Shard {
            id: ShardId(1),
            start: 0,
            end: 0,
            epoch: 1,
            replicas: replicas.collect(),
            leader: Some(NodeId(1)),
            leader_term: 1,
        };
        ClusterMap { nodes: nodes.collect(), shards: vec![shard], ..ClusterMap::default() }
    }

    /// What the nodes of these ids say, of which one leads.
    pub(crate) fn statuses(
        map: &ClusterMap,
        ids: &[u64],
        leader: u64,
    ) -> BTreeMap<NodeId, NodeStatus> {
        let status = |id: u64| NodeStatus {
            node: map.node(NodeId(id)).unwrap().clone(),
            cluster_id: String::new(),
            start_count: 1,
            groups: vec![GroupStatus {
                shard: ShardId(1),
                replica: ReplicaId(id),
                role: if id == leader { "leader" } else { "follower" }.to_owned(),
                term: 1,
                leader: Some(NodeId(leader)),
                last_index: 1,
                applied_index: 1,
                first_index: 1,
                epoch: 1,
                state_bytes: 0,
                members: Vec::new(),
                joint: false,
                reads_per_second: 0,
                writes_per_second: 0,
            }],
            peers: Vec::new(),
            disk_free_bytes: 0,
            disk_total_bytes: 0,
            log_bytes: 0,
            recovering: Vec::new(),
            uptime: std::time::Duration::ZERO,
            draining: false,
        };
        ids.iter().map(|id| (NodeId(*id), status(*id))).collect()
    }

    #[test]
    fn all_well() {
        let map = map();
        let health = Health::of(&map, &statuses(&map, &[1, 2, 3, 4, 5], 1));
        assert!(health.is_well() && health.zone_to_lose, "{health:?}");
        assert_eq!(
            health.sentence(),
            "Fault tolerance: can lose any 1 node, or any 1 zone, and keep every key and every write"
        );
        assert_eq!(health.problems(), Vec::<String>::new());
    }

    #[test]
    fn a_node_without_replicas_does_not_count() {
        let map = map();
        let health = Health::of(&map, &statuses(&map, &[1, 2, 3, 4], 1));
        assert_eq!((health.nodes_to_lose, health.zone_to_lose), (1, true));
        assert_eq!(health.problems(), ["no answer from: n5"]);
    }

    #[test]
    fn the_last_one_that_may_go_has_gone() {
        let map = map();
        let health = Health::of(&map, &statuses(&map, &[1, 2, 4, 5], 1));
        assert!(health.is_available() && !health.is_well() && !health.zone_to_lose);
        assert!(health.sentence().contains("none"), "{}", health.sentence());
        assert_eq!(health.problems(), ["no answer from: n3", "a voter is missing: shards 1"]);
    }

    #[test]
    fn no_leader_and_no_quorum_are_told_apart() {
        let map = map();
        let headless = Health::of(&map, &statuses(&map, &[2, 3, 4, 5], 1));
        assert_eq!((headless.without_leader, headless.without_quorum), (vec![1], vec![]));
        let lost = Health::of(&map, &statuses(&map, &[3, 4, 5], 1));
        assert!(lost.sentence().contains("1 shard has no quorum"), "{}", lost.sentence());
        assert_eq!((lost.without_leader, lost.without_quorum), (vec![], vec![1]));
    }

    #[test]
    fn two_replicas_in_a_zone_make_it_one_that_may_not_go() {
        let mut map = map();
        map.shards[0].replicas[2].node = NodeId(4);
        let health = Health::of(&map, &statuses(&map, &[1, 2, 3, 4, 5], 1));
        assert_eq!((health.nodes_to_lose, health.zone_to_lose), (1, false));
    }
    #[test]
    fn who_has_left_is_not_missed_and_who_leaves_still_counts() {
        let mut map = map();
        map.voters_wanted = 3;
        map.nodes[3].state = NodeState::Gone;
        map.nodes[4].state = NodeState::Decommissioned;
        let health = Health::of(&map, &statuses(&map, &[1, 2, 3], 1));
        assert!(health.is_well(), "{health:?}");
        map.nodes[2].state = NodeState::Decommissioning;
        let health = Health::of(&map, &statuses(&map, &[1, 2, 3], 1));
        assert!(health.is_well(), "{health:?}");
        assert_eq!((health.nodes_to_lose, health.decommissioning_nodes), (1, vec![3]));
    }

    #[test]
    fn a_shard_with_fewer_voters_than_it_shall_have_lacks_one() {
        let mut map = map();
        map.voters_wanted = 3;
        map.shards[0].replicas.pop();
        let health = Health::of(&map, &statuses(&map, &[1, 2, 3, 4, 5], 1));
        assert_eq!((health.under_replicated.clone(), health.nodes_to_lose), (vec![1], 0));
        assert_eq!(health.problems(), ["a voter is missing: shards 1"]);
        // Where there are not more nodes, none lacks.
        for node in &mut map.nodes[2..] {
            node.state = NodeState::Gone;
        }
        assert!(Health::of(&map, &statuses(&map, &[1, 2], 1)).is_well());
    }
}

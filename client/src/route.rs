//! Owns the cached shard map and who leads each shard, as one immutable table that is swapped.
//! Finds the shard of a key and the node to ask. Does not fetch maps (see `follow`) and does not
//! know which nodes answer: callers say which are usable.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use coracle_proto::shard_map::{self, ShardMap};
use coracle_proto::v1;
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::Status;

use crate::near::Replica;
use crate::topology::{ClusterMap, NodeId, ShardId};

/// The cached routes. Readers take the current table without a lock.
pub(crate) struct Routes {
    table: ArcSwap<Table>,
    /// Held while a new table is made from the current one.
    changing: Mutex<()>,
    changed: watch::Sender<()>,
}

/// What is known of the cluster at one moment.
///
/// All its tables are ordered, so that a seeded client always does things in the same order.
///
/// Invariants:
/// - the map's epoch never falls, and its cluster never changes;
/// - the leader of a shard is the one of the highest term that was ever heard of.
#[derive(Clone, Default)]
pub(crate) struct Table {
    /// `None` until the cluster has been initialised and a node has been reached.
    map: Option<Arc<ShardMap>>,
    leaders: BTreeMap<ShardId, Leader>,
    /// Epochs that groups have named, and the map does not have yet.
    epochs: BTreeMap<ShardId, u64>,
    /// Of the nodes in use.
    addresses: BTreeMap<NodeId, String>,
    maps: u64,
}

/// Who leads a shard, as far as is known.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Leader {
    /// `None` once it has said that it no longer does.
    pub(crate) node: Option<NodeId>,
    pub(crate) term: u64,
}

/// The way to one shard.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) shard: ShardId,
    pub(crate) epoch: u64,
    pub(crate) leader: Leader,
    /// Those that may lead.
    pub(crate) voters: Vec<NodeId>,
}

/// Why a key has no route.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NoRoute {
    /// There is no map yet.
    Map,
    /// The map has no such keyspace.
    Keyspace,
}

impl Routes {
    pub(crate) fn new() -> Routes {
        Routes {
            table: ArcSwap::default(),
            changing: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// Takes a map that a node gave. An older one only adds what it knows of leaders; one of
    /// another cluster is refused.
    pub(crate) fn install(&self, map: &v1::ShardMap) -> Result<(), Status> {
        self.change(|table| table.install(map))
    }

    /// Takes note that `node` leads the shard in `term`; `sure` when it has just answered as such.
    pub(crate) fn saw_leader(&self, shard: ShardId, node: NodeId, term: u64, sure: bool) {
        let known = self.table.load().leader(shard);
        if known.is_older_than(node, term, sure) {
            self.change(|table| {
                table.learn_leader(shard, node, term, sure);
                Ok(())
            })
            .expect("learning a leader cannot be refused");
        }
    }

    /// Takes note that `node` says it does not lead the shard.
    pub(crate) fn saw_follower(&self, shard: ShardId, node: NodeId) {
        if self.table.load().leader(shard).node == Some(node) {
            self.change(|table| {
                let leader = table.leaders.entry(shard).or_default();
                if leader.node == Some(node) {
                    leader.node = None;
                }
                Ok(())
            })
            .expect("forgetting a leader cannot be refused");
        }
    }

    /// Takes note that the shard's group is at an epoch: the map copies it later. That the arc may be
    /// another by then does no harm, the group knows which keys it holds.
    pub(crate) fn saw_epoch(&self, shard: ShardId, epoch: u64) {
        let route = self.table.load().route_of(shard);
        if route.is_some_and(|route| route.epoch < epoch) {
            self.change(|table| {
                let known = table.epochs.entry(shard).or_default();
                *known = epoch.max(*known);
                Ok(())
            })
            .expect("learning an epoch cannot be refused");
        }
    }

    /// Takes note of the address of a node that the map does not have yet.
    pub(crate) fn saw_address(&self, node: NodeId, address: &str) {
        if self.table.load().address(node).is_none() {
            self.change(|table| {
                table.addresses.entry(node).or_insert_with(|| address.to_owned());
                Ok(())
            })
            .expect("learning an address cannot be refused");
        }
    }

    /// Waits until the table satisfies `wanted`.
    pub(crate) async fn wait<T>(&self, wanted: impl Fn(&Table) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(found) = wanted(&self.table.load()) {
                return found;
            }
            changed.changed().await.expect("the sender lives as long as the routes");
        }
    }

    /// Waits until the shard has a leader that succeeds `known` and is not `asked`, or is gone.
    pub(crate) async fn leader_after(&self, shard: ShardId, known: Leader, asked: Option<NodeId>) {
        self.wait(|table| {
            let leader = table.leader(shard);
            let succeeded =
                leader.term > known.term && leader.node.is_some() && leader.node != asked;
            (succeeded || !table.has_shard(shard)).then_some(())
        })
        .await;
    }

    fn change(&self, change: impl FnOnce(&mut Table) -> Result<(), Status>) -> Result<(), Status> {
        let _changing = self.changing.lock();
        let mut table = Table::clone(&self.table.load());
        change(&mut table)?;
        self.table.store(Arc::new(table));
        self.changed.send_replace(());
        Ok(())
    }
}

impl Table {
    fn install(&mut self, wire: &v1::ShardMap) -> Result<(), Status> {
        self.maps += 1;
        if wire.cluster_id.is_empty() && wire.shards.is_empty() {
            // Not initialised yet; the node will say when it is.
            return Ok(());
        }
        let map =
            ShardMap::from_proto(wire).map_err(|error| Status::internal(error.to_string()))?;
        if let Some(known) = &self.map
            && (known.cluster_id() != map.cluster_id() || known.hash_seed() != map.hash_seed())
        {
            return Err(Status::failed_precondition(format!(
                "the node belongs to cluster {}, this client to {}",
                map.cluster_id(),
                known.cluster_id()
            )));
        }
        for shard in map.all_shards() {
            if let Some(node) = shard.leader {
                self.learn_leader(shard.id, node, shard.leader_term, false);
            }
        }
        if self.map.as_ref().is_none_or(|known| known.epoch() <= map.epoch()) {
            self.addresses = map
                .nodes()
                .filter(|node| !node.address.is_empty() && is_in_use(node.state))
                .map(|node| (node.id, node.address.clone()))
                .collect();
            self.leaders.retain(|shard, _| map.shard(*shard).is_some());
            self.epochs.retain(|shard, epoch| {
                map.shard(*shard).is_some_and(|shard| shard.epoch.0 < *epoch)
            });
            self.map = Some(Arc::new(map));
        }
        Ok(())
    }

    fn learn_leader(&mut self, shard: ShardId, node: NodeId, term: u64, sure: bool) {
        let known = self.leaders.entry(shard).or_default();
        if known.is_older_than(node, term, sure) {
            *known = Leader { node: Some(node), term };
        }
    }

    /// How many maps have been taken so far.
    pub(crate) fn maps(&self) -> u64 {
        self.maps
    }

    /// Whether there is a map with shards: the cluster has been initialised.
    pub(crate) fn is_ready(&self) -> bool {
        self.map.is_some()
    }

    pub(crate) fn leader(&self, shard: ShardId) -> Leader {
        self.leaders.get(&shard).copied().unwrap_or_default()
    }

    pub(crate) fn has_shard(&self, shard: ShardId) -> bool {
        self.map.as_ref().is_some_and(|map| map.shard(shard).is_some())
    }

    pub(crate) fn has_keyspace(&self, name: &str) -> bool {
        self.map.as_ref().is_some_and(|map| map.keyspace(name).is_some())
    }

    pub(crate) fn address(&self, node: NodeId) -> Option<&str> {
        self.addresses.get(&node).map(String::as_str)
    }

    pub(crate) fn has_address(&self, address: &str) -> bool {
        self.addresses.values().any(|known| known == address)
    }

    /// All nodes' addresses, by node.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.addresses.values().cloned().collect()
    }

    /// The way to the shard that holds `key`.
    pub(crate) fn route(&self, keyspace: &str, key: &[u8]) -> Result<Route, NoRoute> {
        let map = self.map.as_ref().ok_or(NoRoute::Map)?;
        let keyspace = map.keyspace(keyspace).ok_or(NoRoute::Keyspace)?;
        Ok(self.route_to(map.locate_key(keyspace, key)))
    }

    /// The way to the one shard that holds all keys of a range; `None` when it may be several.
    pub(crate) fn route_of_range(&self, scan: &v1::ScanRequest) -> Option<Route> {
        let map = self.map.as_ref()?;
        let keyspace = map.keyspace(&scan.keyspace)?;
        let by_prefix = keyspace.rule.entity_of_prefix(&scan.prefix);
        let entity = by_prefix.or_else(|| keyspace.rule.entity_of_range(&scan.start, &scan.end))?;
        Some(self.route_to(map.locate_key(keyspace, entity)))
    }

    /// The way to a shard by its id.
    pub(crate) fn route_of(&self, shard: ShardId) -> Option<Route> {
        Some(self.route_to(self.map.as_ref()?.shard(shard)?))
    }

    fn route_to(&self, shard: &shard_map::Shard) -> Route {
        let heard = self.epochs.get(&shard.id).copied().unwrap_or(0);
        Route {
            shard: shard.id,
            epoch: shard.epoch.0.max(heard),
            leader: self.leader(shard.id),
            voters: shard.voters().map(|replica| replica.node).collect(),
        }
    }

    /// The replicas of a shard that may serve reads, as far as the map says: not those that are
    /// joining. `zone` is the client's.
    pub(crate) fn readable(&self, shard: ShardId, zone: Option<&str>) -> Vec<Replica> {
        let Some(map) = &self.map else { return Vec::new() };
        let leader = self.leader(shard).node;
        let replicas = map.shard(shard).into_iter().flat_map(|shard| &shard.replicas);
        let readable = replicas.filter(|replica| !replica.joining).filter_map(|replica| {
            let node = map.node(replica.node).filter(|node| serves(node.state))?;
            Some(Replica {
                node: node.id,
                is_in_zone: zone.is_none_or(|zone| node.zone == zone),
                leads: leader == Some(node.id),
            })
        });
        readable.collect()
    }

    /// What is known, for people and tools; with the newest leaders.
    pub(crate) fn snapshot(&self) -> ClusterMap {
        let mut map = self.map.as_deref().map(ClusterMap::of).unwrap_or_default();
        for shard in &mut map.shards {
            let leader = self.leader(shard.id);
            shard.leader = leader.node;
            shard.leader_term = leader.term;
        }
        map
    }
}

impl Leader {
    /// Whether the news that `node` leads in `term` replaces this. Within one term there is one
    /// leader, so equal terms only matter when the node itself has just answered as the leader:
    /// then an answer out of an older term (a stored result) may stand for a newer one.
    fn is_older_than(self, node: NodeId, term: u64, sure: bool) -> bool {
        term > self.term || (term == self.term && self.node != Some(node) && sure)
    }
}

impl Route {
    /// The node to ask: the leader, else the voters in turn; not `avoid`, and only usable ones as
    /// long as there is a choice.
    pub(crate) fn choose(
        &self,
        turn: usize,
        avoid: Option<NodeId>,
        usable: impl Fn(NodeId) -> bool,
    ) -> Option<NodeId> {
        if let Some(leader) = self.leader.node
            && Some(leader) != avoid
            && usable(leader)
        {
            return Some(leader);
        }
        let count = self.voters.len();
        let in_turn = || (0..count).map(|offset| self.voters[(turn % count + offset) % count]);
        in_turn()
            .find(|node| Some(*node) != avoid && usable(*node))
            .or_else(|| in_turn().find(|node| Some(*node) != avoid))
            .or_else(|| in_turn().next())
            .or(self.leader.node)
    }
}

/// Whether a node's replicas hold what was written, and are there to be asked.
fn serves(state: v1::NodeState) -> bool {
    use v1::NodeState::{Active, Decommissioning, Draining, Unspecified};
    matches!(state, Active | Draining | Decommissioning | Unspecified)
}

fn is_in_use(state: v1::NodeState) -> bool {
    !matches!(state, v1::NodeState::Decommissioned | v1::NodeState::Gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(1);
    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);

    fn map(cluster: &str, epoch: u64, leader: NodeId, term: u64) -> v1::ShardMap {
        let shard = |id: u64| v1::Shard {
            id,
            epoch,
            replicas: [A, B, C]
                .map(|node| v1::Replica {
                    id: id * 10 + node.0,
                    node: node.0,
                    role: v1::ReplicaRole::Voter.into(),
                    ..Default::default()
                })
                .to_vec(),
            leader_node: leader.0,
            leader_term: term,
            ..Default::default()
        };
        let node = |id: NodeId| v1::Node {
            id: id.0,
            address: format!("node-{id}:7400"),
            state: v1::NodeState::Active.into(),
            ..Default::default()
        };
        v1::ShardMap {
            cluster_id: cluster.to_owned(),
            epoch,
            shards: vec![shard(0), shard(1)],
            nodes: vec![node(A), node(B), node(C)],
            keyspaces: vec![v1::Keyspace {
                id: 1,
                name: "default".to_owned(),
                entity_rule: Some(coracle_proto::entity::EntityRule::Whole.into()),
                history_ms: 0,
                revision: 0,
            }],
            ..Default::default()
        }
    }

    fn leader(routes: &Routes) -> Option<NodeId> {
        routes.table().leader(SHARD).node
    }

    #[test]
    fn the_higher_term_leads() {
        let routes = Routes::new();
        routes.install(&map("c", 1, A, 5)).expect("a first map");
        assert_eq!(leader(&routes), Some(A));
        routes.saw_leader(SHARD, B, 4, true);
        assert_eq!(leader(&routes), Some(A), "an older term changes nothing");
        routes.saw_leader(SHARD, B, 5, false);
        assert_eq!(leader(&routes), Some(A), "nor does hearsay of the same");
        routes.saw_leader(SHARD, B, 6, false);
        assert_eq!(leader(&routes), Some(B));
        routes.install(&map("c", 2, A, 5)).expect("a newer map");
        assert_eq!(leader(&routes), Some(B), "a map knows no better for being new");
        routes.install(&map("c", 1, C, 7)).expect("an older map");
        assert_eq!(leader(&routes), Some(C), "but even an old one for its term");
        assert_eq!(routes.table().snapshot().epoch, 2, "the map itself stays");
    }

    #[test]
    fn who_denies_leading_is_not_believed_to_lead() {
        let routes = Routes::new();
        routes.install(&map("c", 1, A, 5)).expect("a first map");
        routes.saw_follower(SHARD, B);
        assert_eq!(leader(&routes), Some(A), "it was never believed of this one");
        routes.saw_follower(SHARD, A);
        assert_eq!(leader(&routes), None);
        routes.install(&map("c", 1, A, 5)).expect("the same map");
        assert_eq!(leader(&routes), None, "the map only repeats what was denied");
        routes.saw_leader(SHARD, A, 5, true);
        assert_eq!(leader(&routes), Some(A), "until it answers as the leader");
    }

    #[test]
    fn an_epoch_that_its_group_names_holds_until_the_map_has_it() {
        let routes = Routes::new();
        routes.saw_epoch(SHARD, 9);
        routes.install(&map("c", 5, A, 5)).expect("a first map");
        let epoch = || routes.table().route_of(SHARD).expect("a route").epoch;
        assert_eq!(epoch(), 5, "of a shard that no map has, nothing is kept");
        routes.saw_epoch(SHARD, 4);
        assert_eq!(epoch(), 5, "an older one");
        routes.saw_epoch(SHARD, 7);
        assert_eq!(epoch(), 7);
        routes.install(&map("c", 6, A, 5)).expect("a newer map, older than the group's word");
        assert_eq!(epoch(), 7);
        routes.install(&map("c", 8, A, 5)).expect("a map that has it");
        assert_eq!(epoch(), 8);
        assert!(routes.table().epochs.is_empty(), "and nothing is kept");
    }

    #[test]
    fn another_clusters_map_is_refused() {
        let routes = Routes::new();
        routes.install(&v1::ShardMap::default()).expect("a node before init is no error");
        assert!(!routes.table().is_ready());
        routes.install(&map("c", 5, A, 5)).expect("a first map");
        assert!(routes.install(&map("other", 6, B, 9)).is_err());
        assert_eq!(leader(&routes), Some(A));
        let route = routes.table().route("default", b"key").expect("a route");
        assert_eq!((route.shard, route.epoch), (SHARD, 5));
        assert_eq!(routes.table().route("none", b"key").err(), Some(NoRoute::Keyspace));
    }

    #[test]
    fn asks_the_leader_then_the_others_in_turn() {
        let route = Route {
            shard: SHARD,
            epoch: 1,
            leader: Leader { node: Some(A), term: 5 },
            voters: vec![A, B, C],
        };
        let all = |_| true;
        assert_eq!(route.choose(0, None, all), Some(A));
        assert_eq!(route.choose(7, None, all), Some(A), "whatever the turn");
        assert_eq!(route.choose(0, Some(A), all), Some(B));
        assert_eq!(route.choose(2, Some(A), all), Some(C));
        assert_eq!(route.choose(0, None, |node| node == C), Some(C), "only one answers");
        assert_eq!(route.choose(0, Some(C), |node| node == C), Some(A), "not twice in a row");
        assert_eq!(route.choose(1, None, |_| false), Some(B), "nobody answers: still somebody");
        let nobody = Route { leader: Leader::default(), voters: vec![], ..route };
        assert_eq!(nobody.choose(3, None, all), None);
    }

    #[test]
    fn replicas_that_serve_reads_are_those_of_nodes_that_do() {
        use v1::NodeState::{Active, Decommissioned, Down, Draining, Gone, Joining};
        let routes = Routes::new();
        let mut wire = map("c", 1, A, 5);
        let states = [Active, Draining, Joining, Down, Gone, Decommissioned];
        for shard in &mut wire.shards {
            shard.replicas = (1..=6)
                .map(|node| v1::Replica {
                    id: shard.id * 10 + node,
                    node,
                    role: match node {
                        1 | 3 => v1::ReplicaRole::Voter.into(),
                        _ => v1::ReplicaRole::Learner.into(),
                    },
                    ..Default::default()
                })
                .collect();
        }
        wire.nodes = (1..=6)
            .zip(states)
            .map(|(id, state)| v1::Node {
                id,
                state: state.into(),
                zone: format!("z{id}"),
                ..Default::default()
            })
            .collect();
        routes.install(&wire).expect("a map");
        let readable = routes.table().readable(SHARD, Some("z2"));
        let told: Vec<_> =
            readable.iter().map(|known| (known.node, known.is_in_zone, known.leads)).collect();
        assert_eq!(told, [(A, false, true), (B, true, false)], "voters and learners alike");
        let anywhere = routes.table().readable(SHARD, None);
        assert!(anywhere.iter().all(|known| known.is_in_zone), "without a zone all are near");
        // A replica that is joining has nothing to say yet, whatever its node does.
        wire.epoch += 1;
        for shard in &mut wire.shards {
            shard.replicas[1].joining = true;
        }
        routes.install(&wire).expect("a map");
        let nodes = |known: Vec<Replica>| known.iter().map(|known| known.node).collect::<Vec<_>>();
        assert_eq!(nodes(routes.table().readable(SHARD, Some("z2"))), [A]);
        let shown = routes.table().snapshot();
        let replicas = &shown.shard(SHARD).expect("it is in the map").replicas;
        let joining = replicas.iter().filter(|replica| replica.joining).map(|known| known.node);
        assert_eq!(joining.collect::<Vec<_>>(), [B], "people are shown which");
    }

    #[tokio::test]
    async fn waiting_calls_hear_of_a_new_leader() {
        let routes = Arc::new(Routes::new());
        routes.install(&map("c", 1, A, 5)).expect("a first map");
        let known = routes.table().leader(SHARD);
        let waiting = tokio::spawn({
            let routes = routes.clone();
            async move { routes.leader_after(SHARD, known, Some(A)).await }
        });
        tokio::task::yield_now().await;
        routes.saw_leader(SHARD, A, 6, true);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "the node that is being asked is no news");
        routes.saw_leader(SHARD, C, 7, false);
        waiting.await.expect("it ends");
    }
}

//! Who is who: this node's identity, the nodes it knows, and whom it lets in.
//!
//! Owns the judgement of a Hello and what is remembered of nodes. Does no I/O, reads no clock: the
//! decisions are functions of what is known and what was said.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_proto::peer::{Hello, KnownNode};
use coracle_raft::types::NodeId;
use tokio::time::Instant;

use super::frame::Broken;

/// Of the frames. Raised with every change that an older node could misread.
pub(crate) const PROTOCOL: u32 = 1;

/// Nodes remembered, and strangers. Far above any cluster that this design is for; beyond it, new
/// ones are not remembered.
const KNOWN_MAX: usize = 1024;
/// Nodes that ride in one envelope; the rest follow in the next.
const GOSSIP_MAX: usize = 256;
/// A stranger, or the member of a cluster that this node is not in yet, that was not heard of for
/// this long is gone. They greet once a second.
const STRANGER_MAX_AGE: Duration = Duration::from_secs(10);

/// What a connection may carry.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Both ends are nodes of one cluster, and each knows whom it talks to: everything.
    Member(NodeId),
    /// One end has no cluster yet, or only the address was known: gossip and cluster commands.
    Guest,
}

/// What a piece of news changed.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// Nodes that are new or started anew, each as it is known now.
    pub(crate) changed: Vec<KnownNode>,
    /// Another process goes by this node's id, and began later or beside it.
    pub(crate) superseded: Option<KnownNode>,
}

struct Entry {
    known: KnownNode,
    /// The version of the directory that brought it.
    version: u64,
}

struct Stranger {
    known: KnownNode,
    seen: Instant,
    /// It greeted us, or we it. Only such strangers are passed on: two nodes that tell each other
    /// what they were told would keep a dead one alive for ever.
    direct: bool,
}

/// Invariants: of each node the entry with the highest start count that was ever heard; among equal
/// counts the incarnation that was heard first. Never this node itself, never a forgotten one.
pub(crate) struct Directory {
    cluster_id: String,
    own: KnownNode,
    nodes: BTreeMap<u64, Entry>,
    /// Nodes without an id, by peer address.
    strangers: BTreeMap<String, Stranger>,
    /// While this node has no cluster: the members of one that it met, by peer address. It may ask
    /// them to be let in; they are not its peers.
    hosts: BTreeMap<String, (KnownNode, Instant)>,
    /// Ids are never reused, so a removed node stays out.
    forgotten: BTreeSet<u64>,
    version: u64,
}

impl Directory {
    pub(crate) fn new(cluster_id: String, own: KnownNode) -> Self {
        assert!(own.incarnation != 0, "0 stands for an incarnation that is not known");
        Self {
            cluster_id,
            own,
            nodes: BTreeMap::new(),
            strangers: BTreeMap::new(),
            hosts: BTreeMap::new(),
            forgotten: BTreeSet::new(),
            version: 0,
        }
    }

    pub(crate) fn own(&self) -> &KnownNode {
        &self.own
    }

    pub(crate) fn set_identity(&mut self, cluster_id: &str, node: NodeId) {
        assert!(
            self.cluster_id.is_empty() || self.cluster_id == cluster_id,
            "a node never changes its cluster"
        );
        assert!(self.own.node == 0 || self.own.node == node.0, "a node never changes its id");
        self.cluster_id = cluster_id.to_owned();
        self.own.node = node.0;
        self.hosts.clear();
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn get(&self, node: NodeId) -> Option<&KnownNode> {
        self.nodes.get(&node.0).map(|entry| &entry.known)
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &KnownNode> {
        self.nodes.values().map(|entry| &entry.known)
    }

    pub(crate) fn strangers(&self, now: Instant) -> Vec<KnownNode> {
        self.strangers
            .values()
            .filter(|stranger| now - stranger.seen < STRANGER_MAX_AGE)
            .map(|stranger| stranger.known.clone())
            .collect()
    }

    /// Members of a cluster that were met a moment ago; none once this node is in one.
    pub(crate) fn hosts(&self, now: Instant) -> Vec<KnownNode> {
        let fresh = self.hosts.values().filter(|(_, seen)| now - *seen < STRANGER_MAX_AGE);
        fresh.map(|(known, _)| known.clone()).collect()
    }

    pub(crate) fn forget(&mut self, node: NodeId) {
        self.nodes.remove(&node.0);
        self.forgotten.insert(node.0);
    }

    /// The first frame of a connection. `refused` is empty on one that is wanted.
    pub(crate) fn hello(&self, to_node: u64, lane: i32, now: Instant, refused: String) -> Hello {
        let strangers = self
            .strangers
            .values()
            .filter(|stranger| stranger.direct && now - stranger.seen < STRANGER_MAX_AGE)
            .map(|stranger| stranger.known.clone());
        Hello {
            protocol: PROTOCOL,
            cluster_id: self.cluster_id.clone(),
            from: Some(self.own.clone()),
            to_node,
            lane,
            known: self.nodes().cloned().chain(strangers).collect(),
            refused,
        }
    }

    /// Whether to talk to whoever said this Hello. `expected` is the node that was dialled, 0 if
    /// only its address was known.
    pub(crate) fn judge(&self, hello: &Hello, expected: u64) -> Result<Standing, Broken> {
        let refuse = |why: String| Err(Broken::Refused(why));
        let Some(from) = &hello.from else {
            return refuse("a Hello that does not say from whom".into());
        };
        if from.incarnation == self.own.incarnation {
            return Err(Broken::Myself);
        }
        if !hello.refused.is_empty() {
            return refuse(hello.refused.clone());
        }
        if hello.protocol != PROTOCOL {
            return refuse(format!("protocol {}, not {PROTOCOL}", hello.protocol));
        }
        if from.incarnation == 0 {
            return refuse("a Hello without an incarnation".into());
        }
        if hello.cluster_id.is_empty() || self.cluster_id.is_empty() {
            return Ok(Standing::Guest);
        }
        if hello.cluster_id != self.cluster_id {
            return refuse(format!(
                "this is a node of cluster {}, not {}",
                self.cluster_id, hello.cluster_id
            ));
        }
        self.judge_member(from, hello.to_node, expected).map_err(Broken::Refused)
    }

    /// Both are of one cluster.
    fn judge_member(
        &self,
        from: &KnownNode,
        to_node: u64,
        expected: u64,
    ) -> Result<Standing, String> {
        if to_node != 0 && to_node != self.own.node {
            return Err(format!("this is node {}, not {to_node}", self.own.node));
        }
        if expected != 0 && from.node != expected {
            return Err(format!("node {} answered in the place of {expected}", from.node));
        }
        if from.node == 0 {
            return Err("a node of this cluster without an id".into());
        }
        if from.node == self.own.node {
            return Err(format!("this is node {}: another process goes by its id", from.node));
        }
        if self.forgotten.contains(&from.node) {
            return Err(format!("node {} was removed from the cluster", from.node));
        }
        if let Some(known) = self.get(NodeId(from.node)) {
            let (node, said) = (from.node, from.start_count);
            if said < known.start_count {
                return Err(format!(
                    "node {node} says start {said}, but start {} was seen: its directory was \
                     copied or rolled back",
                    known.start_count
                ));
            }
            if same_start_of_another(known, from) {
                return Err(format!(
                    "start {said} of node {node} was seen from another process: its directory \
                     was copied"
                ));
            }
        }
        // Who dialled an address, or was dialled by one, is a guest on this connection.
        Ok(if to_node == 0 { Standing::Guest } else { Standing::Member(NodeId(from.node)) })
    }

    /// Takes up what a Hello tells of its sender and of others. Call it after `judge`, under the
    /// same lock; of a refused Hello only when the sender is of this cluster.
    pub(crate) fn learn_hello(&mut self, hello: &Hello, admitted: bool, now: Instant) -> News {
        let mut news = News::default();
        if self.cluster_id.is_empty() && !hello.cluster_id.is_empty() && admitted {
            self.hosts.retain(|_, (_, seen)| now - *seen < STRANGER_MAX_AGE);
            for known in hello.from.iter().chain(&hello.known).filter(|known| known.node != 0) {
                if self.hosts.len() < KNOWN_MAX {
                    self.hosts.insert(known.peer_address.clone(), (known.clone(), now));
                }
            }
            return news;
        }
        let same_cluster = hello.cluster_id == self.cluster_id;
        if let Some(from) = &hello.from {
            if from.node == 0 && admitted {
                self.meet(from, true, now);
            } else if same_cluster {
                self.learn(from, &mut news);
            }
        }
        if same_cluster {
            self.learn_all(&hello.known, now, &mut news);
        }
        news
    }

    /// Takes up gossip.
    pub(crate) fn learn_all(&mut self, told: &[KnownNode], now: Instant, news: &mut News) {
        for known in told {
            if known.node == 0 {
                self.meet(known, false, now);
            } else {
                self.learn(known, news);
            }
        }
    }

    fn learn(&mut self, said: &KnownNode, news: &mut News) {
        if said.node == 0 || self.cluster_id.is_empty() || self.forgotten.contains(&said.node) {
            return;
        }
        if said.node == self.own.node {
            let beside = same_start_of_another(&self.own, said);
            if said.start_count > self.own.start_count || beside {
                news.superseded = Some(said.clone());
            }
            return;
        }
        match self.nodes.get(&said.node) {
            None if self.nodes.len() >= KNOWN_MAX => return,
            Some(Entry { known, .. })
                if said.start_count < known.start_count
                    || (said.start_count == known.start_count
                        && (known.incarnation != 0 || said.incarnation == 0)) =>
            {
                return;
            }
            _ => {}
        }
        self.version += 1;
        self.strangers.remove(&said.peer_address);
        self.nodes.insert(said.node, Entry { known: said.clone(), version: self.version });
        news.changed.push(said.clone());
    }

    fn meet(&mut self, said: &KnownNode, direct: bool, now: Instant) {
        let own = said.incarnation == self.own.incarnation;
        let member = self.nodes().any(|known| known.peer_address == said.peer_address);
        if own || (member && !direct) {
            return;
        }
        self.strangers.retain(|_, stranger| now - stranger.seen < STRANGER_MAX_AGE);
        if self.strangers.len() >= KNOWN_MAX && !self.strangers.contains_key(&said.peer_address) {
            return;
        }
        let direct_before =
            self.strangers.get(&said.peer_address).is_some_and(|stranger| stranger.direct);
        if !direct && direct_before {
            return;
        }
        let stranger = Stranger { known: said.clone(), seen: now, direct };
        self.strangers.insert(said.peer_address.clone(), stranger);
    }

    /// Some of the nodes that changed after `version`, and the version up to which they reach.
    pub(crate) fn changed_since(&self, version: u64) -> (Vec<KnownNode>, u64) {
        let mut changed: Vec<&Entry> =
            self.nodes.values().filter(|entry| entry.version > version).collect();
        changed.sort_by_key(|entry| entry.version);
        let upto = match changed.get(GOSSIP_MAX - 1) {
            Some(last) => last.version,
            None => self.version,
        };
        changed.truncate(GOSSIP_MAX);
        (changed.into_iter().map(|entry| entry.known.clone()).collect(), upto)
    }
}

fn same_start_of_another(known: &KnownNode, said: &KnownNode) -> bool {
    said.start_count == known.start_count
        && said.incarnation != known.incarnation
        && said.incarnation != 0
        && known.incarnation != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(node: u64, start_count: u64, incarnation: u64) -> KnownNode {
        KnownNode {
            node,
            peer_address: format!("n{node}:{start_count}"),
            start_count,
            incarnation,
            ..Default::default()
        }
    }

    fn directory(own: u64) -> Directory {
        Directory::new(if own == 0 { "" } else { "c" }.into(), node(own, 1, 1000 + own))
    }

    fn hello(from: KnownNode, to_node: u64) -> Hello {
        Hello {
            protocol: PROTOCOL,
            cluster_id: if from.node == 0 { "" } else { "c" }.into(),
            from: Some(from),
            to_node,
            lane: 1,
            ..Default::default()
        }
    }

    fn refusal(result: Result<Standing, Broken>) -> String {
        match result {
            Err(Broken::Refused(why)) => why,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn who_is_let_in() {
        let directory = directory(1);
        let from_2 = hello(node(2, 1, 7), 1);
        assert_eq!(directory.judge(&from_2, 0).expect("a member"), Standing::Member(NodeId(2)));
        let by_address = hello(node(2, 1, 7), 0);
        assert_eq!(directory.judge(&by_address, 0).expect("a guest"), Standing::Guest);
        let unborn = hello(node(0, 1, 7), 0);
        assert_eq!(directory.judge(&unborn, 0).expect("a guest"), Standing::Guest);

        let other_cluster = Hello { cluster_id: "d".into(), ..from_2.clone() };
        assert!(refusal(directory.judge(&other_cluster, 0)).contains("cluster c, not d"));
        let newer = Hello { protocol: PROTOCOL + 1, ..from_2.clone() };
        assert!(refusal(directory.judge(&newer, 0)).contains("protocol"));
        let astray = hello(node(2, 1, 7), 3);
        assert!(refusal(directory.judge(&astray, 0)).contains("this is node 1, not 3"));
        assert!(refusal(directory.judge(&from_2, 3)).contains("in the place of 3"));
        let twin = hello(node(1, 9, 7), 0);
        assert!(refusal(directory.judge(&twin, 0)).contains("goes by its id"));
        let own = hello(directory.own().clone(), 0);
        assert!(matches!(directory.judge(&own, 0), Err(Broken::Myself)));
        assert!(refusal(directory.judge(&Hello::default(), 0)).contains("from whom"));
    }

    #[test]
    fn a_lower_start_or_a_second_process_with_the_same_one_is_refused() {
        let mut directory = directory(1);
        let now = Instant::now();
        let first = hello(node(2, 5, 7), 1);
        assert_eq!(directory.learn_hello(&first, true, now).changed.len(), 1);
        assert!(directory.judge(&first, 2).is_ok(), "the same process again");
        assert!(refusal(directory.judge(&hello(node(2, 4, 8), 1), 2)).contains("rolled back"));
        assert!(refusal(directory.judge(&hello(node(2, 5, 8), 1), 2)).contains("was copied"));
        assert!(directory.judge(&hello(node(2, 6, 8), 1), 2).is_ok(), "a restart");

        let stale = hello(node(2, 4, 8), 1);
        assert!(directory.learn_hello(&stale, false, now).changed.is_empty());
        assert_eq!(directory.get(NodeId(2)).expect("known").start_count, 5);
    }

    #[test]
    fn an_incarnation_that_was_not_known_is_learned_with_the_same_start() {
        let mut directory = directory(1);
        let mut news = News::default();
        directory.learn_all(&[node(2, 5, 0)], Instant::now(), &mut news);
        assert!(directory.judge(&hello(node(2, 5, 7), 1), 2).is_ok());
        directory.learn_hello(&hello(node(2, 5, 7), 1), true, Instant::now());
        assert!(refusal(directory.judge(&hello(node(2, 5, 8), 1), 2)).contains("was copied"));
    }

    #[test]
    fn a_node_hears_of_its_own_double() {
        let mut directory = directory(1);
        let now = Instant::now();
        for (said, superseded) in [
            (node(1, 0, 9), false),
            (directory.own().clone(), false),
            (node(1, 1, 9), true),
            (node(1, 2, 9), true),
        ] {
            let mut news = News::default();
            directory.learn_all(std::slice::from_ref(&said), now, &mut news);
            assert_eq!(news.superseded.is_some(), superseded, "{said:?}");
        }
    }

    #[test]
    fn a_forgotten_node_stays_out() {
        let mut directory = directory(1);
        let now = Instant::now();
        directory.learn_hello(&hello(node(2, 5, 7), 1), true, now);
        directory.forget(NodeId(2));
        assert!(refusal(directory.judge(&hello(node(2, 6, 8), 1), 0)).contains("removed"));
        let news = directory.learn_hello(&hello(node(2, 6, 8), 1), false, now);
        assert!(news.changed.is_empty() && directory.get(NodeId(2)).is_none());
    }

    #[test]
    fn gossip_goes_on_where_it_stopped() {
        let mut directory = directory(1);
        let all: Vec<_> = (2..2 + 600).map(|id| node(id, 1, id)).collect();
        directory.learn_all(&all, Instant::now(), &mut News::default());
        let (mut heard, mut version) = (Vec::new(), 0);
        while version < directory.version() {
            let (some, upto) = directory.changed_since(version);
            assert!(!some.is_empty() && some.len() <= GOSSIP_MAX && upto > version);
            heard.extend(some);
            version = upto;
        }
        assert_eq!(heard, all);
    }

    #[test]
    fn strangers_are_passed_on_one_step_and_then_fade() {
        let mut directory = directory(0);
        let met = Instant::now();
        let mut from = hello(node(0, 1, 7), 0);
        from.from.as_mut().expect("set above").peer_address = "direct:1".into();
        from.known = vec![KnownNode { peer_address: "told:1".into(), ..node(0, 1, 8) }];
        directory.learn_hello(&from, true, met);
        let known: Vec<_> = directory.strangers(met).into_iter().map(|s| s.peer_address).collect();
        assert_eq!(known, ["direct:1", "told:1"]);
        let said = directory.hello(0, 1, met, String::new()).known;
        assert_eq!(said.len(), 1, "only the one that was met");
        assert!(directory.strangers(met + STRANGER_MAX_AGE).is_empty());
    }

    #[test]
    fn a_node_without_a_cluster_knows_whom_to_ask_to_be_let_in() {
        let mut directory = directory(0);
        let mut from = hello(node(2, 5, 7), 0);
        from.known = vec![node(3, 1, 8), node(0, 1, 9)];
        assert_eq!(directory.judge(&from, 0).expect("a guest"), Standing::Guest);
        let met = Instant::now();
        let news = directory.learn_hello(&from, true, met);
        assert!(news.changed.is_empty() && directory.nodes().next().is_none(), "no peers");
        let hosts = |directory: &Directory, at| {
            directory.hosts(at).into_iter().map(|known| known.node).collect::<Vec<_>>()
        };
        assert_eq!(hosts(&directory, met), [2, 3]);
        assert_eq!(hosts(&directory, met + STRANGER_MAX_AGE), []);
        directory.learn_hello(&hello(node(4, 1, 9), 0), false, met);
        assert_eq!(hosts(&directory, met), [2, 3], "not one that was refused");
        directory.set_identity("c", NodeId(9));
        assert_eq!(hosts(&directory, met), [], "it is in");
        directory.learn_hello(&from, true, met);
        assert_eq!(directory.nodes().count(), 2);
        assert_eq!(hosts(&directory, met), []);
    }
}

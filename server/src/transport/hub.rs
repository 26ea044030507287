//! What all connections of a node share.
//!
//! Owns the peers that follow from the directory, the ears of the node, and what is cut off. Does
//! no I/O: the tasks that do stand in `dial`, `accept` and `seed`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use bytes::Bytes;
use coracle_proto::peer::cluster_command::Kind;
use coracle_proto::peer::{Envelope, GroupMessage, Hello, KnownNode, NodeFacts};
use coracle_raft::types::NodeId;
use coracle_storage::exec::Exec;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::directory::{Directory, News, Standing};
use super::frame::Broken;
use super::gate::Gates;
use super::message::Connection;
use super::peer::Peer;
use crate::net::Net;

/// Refusals remembered so that each is logged once.
const REFUSALS_MAX: usize = 1024;

/// Who answers the questions of other nodes.
///
/// The methods are called in the order in which the questions of one connection arrived, and never
/// wait: a call takes the question's place in its group's queue, the future that it returns awaits
/// the answer. The futures of one connection run in turn on one task, so what computes for long
/// belongs elsewhere. A future is dropped when its connection breaks. The call itself, unlike the
/// future, must not change what the transport knows (`set_known`, `forget`, `cut`): it would wait for
/// itself.
pub trait Inbound: Send + Sync + 'static {
    /// A question to a replica. An error says why it could not be taken: the asker sees
    /// `Unreachable`.
    fn question(
        &self,
        from: NodeId,
        question: GroupMessage,
    ) -> BoxFuture<'static, Result<Bytes, String>>;

    /// A client's request, from the node that it entered.
    fn forward(&self, from: NodeId, body: Bytes) -> BoxFuture<'static, Result<Bytes, String>>;

    /// A cluster command. `from.node` is 0 while the sender has no cluster; nothing else of it is
    /// proven either.
    fn command(&self, from: KnownNode, command: Kind) -> BoxFuture<'static, Kind>;
}

/// Who is told what happens between nodes. Called from the connections' tasks: must not block.
pub trait PeerEvents: Send + Sync + 'static {
    /// A control or appends connection with this node broke. Told once, until the node is met again.
    fn lost(&self, node: NodeId);

    /// A node is new, or started anew: remember it beyond a restart, and hand it back in
    /// [`Settings::known`](super::Settings::known). Of two calls for one node the one with the
    /// higher start count is newer, in whichever order they come.
    fn known(&self, node: &KnownNode);

    /// What this node says of itself with its heartbeats.
    fn facts(&self) -> NodeFacts;

    /// What another node said of itself.
    fn heard_facts(&self, node: NodeId, facts: NodeFacts, at: Instant);

    /// Another process goes by this node's id, and began later or beside it: this directory is a
    /// copy, or was copied. The others refuse one of the two.
    fn superseded(&self, by: &KnownNode);
}

pub(crate) struct Handlers {
    pub(crate) inbound: Arc<dyn Inbound>,
    pub(crate) events: Arc<dyn PeerEvents>,
}

pub(crate) struct Hub {
    pub(crate) net: Arc<dyn Net>,
    exec: Arc<dyn Exec>,
    pub(crate) seed: u64,
    pub(crate) ended: CancellationToken,
    /// Wakes the seeds: with an identity, members answer as such.
    pub(crate) identity_given: Notify,
    tasks: TaskTracker,
    handlers: OnceLock<Handlers>,
    directory: Mutex<Directory>,
    peers: ArcSwap<BTreeMap<NodeId, Arc<Peer>>>,
    /// Held while `peers` changes.
    peers_change: Mutex<()>,
    pub(crate) gates: Gates,
    cut: Mutex<BTreeSet<NodeId>>,
    refusals: Mutex<BTreeMap<String, String>>,
}

impl Hub {
    pub(crate) fn new(
        directory: Directory,
        net: Arc<dyn Net>,
        exec: Arc<dyn Exec>,
        seed: u64,
        ended: CancellationToken,
    ) -> Self {
        Self {
            net,
            exec,
            seed,
            ended,
            identity_given: Notify::new(),
            tasks: TaskTracker::new(),
            handlers: OnceLock::new(),
            directory: Mutex::new(directory),
            peers: ArcSwap::default(),
            peers_change: Mutex::new(()),
            gates: Gates::default(),
            cut: Mutex::new(BTreeSet::new()),
            refusals: Mutex::new(BTreeMap::new()),
        }
    }

    pub(crate) fn set_handlers(&self, handlers: Handlers) {
        assert!(self.handlers.set(handlers).is_ok(), "a transport is started once");
    }

    pub(crate) fn handlers(&self) -> &Handlers {
        self.handlers.get().expect("tasks begin after the start, which sets the handlers")
    }

    pub(crate) fn started(&self) -> bool {
        self.handlers.get().is_some()
    }

    /// Spawns a task that ends with the transport.
    pub(crate) fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let ended = self.ended.clone();
        let task = async move {
            ended.run_until_cancelled(task).await;
        };
        self.exec.spawn(name, Box::pin(self.tasks.track_future(task)));
    }

    /// Waits until all tasks are gone.
    pub(crate) async fn stopped(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub(crate) fn directory<T>(&self, of: impl FnOnce(&mut Directory) -> T) -> T {
        of(&mut self.directory.lock())
    }

    pub(crate) fn peer(&self, node: NodeId) -> Option<Arc<Peer>> {
        self.peers.load().get(&node).cloned()
    }

    pub(crate) fn peers(&self) -> Arc<BTreeMap<NodeId, Arc<Peer>>> {
        self.peers.load_full()
    }

    /// Judges a Hello and learns from it, in one step: of two copies of a node that greet at once,
    /// one is refused.
    pub(crate) fn admit(
        self: &Arc<Self>,
        hello: &Hello,
        expected: u64,
    ) -> Result<Standing, Broken> {
        if hello.from.as_ref().is_some_and(|from| self.is_cut(NodeId(from.node))) {
            return Err(Broken::Cut);
        }
        let now = Instant::now();
        let (standing, news) = self.directory(|directory| {
            let standing = directory.judge(hello, expected);
            let news = directory.learn_hello(hello, standing.is_ok(), now);
            (standing, news)
        });
        self.spread(&news);
        standing
    }

    /// Takes up the gossip and facts of a member's envelope.
    pub(crate) fn hear(self: &Arc<Self>, peer: &Peer, envelope: &mut Envelope) {
        if !envelope.known.is_empty() {
            let mut news = News::default();
            let now = Instant::now();
            self.directory(|directory| directory.learn_all(&envelope.known, now, &mut news));
            self.spread(&news);
        }
        peer.note_heard();
        if let Some(facts) = envelope.facts.take() {
            self.handlers().events.heard_facts(peer.node, facts, Instant::now());
        }
    }

    /// Lets what was learned take effect: new peers, new addresses, gossip.
    pub(crate) fn spread(self: &Arc<Self>, news: &News) {
        if !self.started() {
            return;
        }
        if let Some(by) = &news.superseded {
            self.handlers().events.superseded(by);
        }
        if news.changed.is_empty() {
            return;
        }
        for known in &news.changed {
            self.handlers().events.known(known);
            self.gates.close(NodeId(known.node), known.start_count);
            match self.peer(NodeId(known.node)) {
                Some(peer) => peer.redial(),
                None => self.add_peer(NodeId(known.node)),
            }
        }
        for peer in self.peers().values() {
            peer.lane(Connection::Control).make_due();
        }
    }

    /// Makes peers of all nodes known.
    pub(crate) fn add_peers(self: &Arc<Self>) {
        let nodes: Vec<_> = self.directory(|d| d.nodes().map(|known| NodeId(known.node)).collect());
        for node in nodes {
            self.add_peer(node);
        }
    }

    fn add_peer(self: &Arc<Self>, node: NodeId) {
        let peer = {
            let _change = self.peers_change.lock();
            let mut peers = BTreeMap::clone(&self.peers.load());
            if peers.contains_key(&node) {
                return;
            }
            let peer = Arc::new(Peer::new(node, self.ended.child_token()));
            peers.insert(node, peer.clone());
            self.peers.store(Arc::new(peers));
            peer
        };
        super::dial::spawn(self, &peer);
    }

    pub(crate) fn forget(&self, node: NodeId) {
        self.directory(|directory| directory.forget(node));
        let removed = {
            let _change = self.peers_change.lock();
            let mut peers = BTreeMap::clone(&self.peers.load());
            let removed = peers.remove(&node);
            self.peers.store(Arc::new(peers));
            removed
        };
        if let Some(peer) = removed {
            peer.ended.cancel();
        }
        self.gates.close(node, u64::MAX);
    }

    /// A connection with this node broke.
    pub(crate) fn lose(&self, peer: &Peer, lane: Connection, why: &Broken) {
        let told = matches!(lane, Connection::Control | Connection::Appends);
        if told && !self.ended.is_cancelled() && !peer.ended.is_cancelled() && peer.note_lost() {
            tracing::info!(node = %peer.node, connection = ?lane, %why, "connection lost");
            self.handlers().events.lost(peer.node);
        }
    }

    pub(crate) fn is_cut(&self, node: NodeId) -> bool {
        self.cut.lock().contains(&node)
    }

    pub(crate) fn cut(&self, nodes: BTreeSet<NodeId>) {
        let before = std::mem::replace(&mut *self.cut.lock(), nodes.clone());
        for node in nodes.union(&before) {
            if nodes.contains(node) {
                self.gates.close(*node, u64::MAX);
            }
            if let Some(peer) = self.peer(*node) {
                peer.redial();
            }
        }
    }

    /// Why a connection was ended from this side.
    pub(crate) fn ended_by_us(&self, node: NodeId) -> Broken {
        if self.is_cut(node) { Broken::Cut } else { Broken::Replaced }
    }

    /// Logs a refusal, once for each reason.
    pub(crate) fn note_refusal(&self, who: &str, why: &Broken) {
        let Broken::Refused(why) = why else { return };
        let mut refusals = self.refusals.lock();
        if refusals.get(who) == Some(why) {
            return;
        }
        if refusals.len() >= REFUSALS_MAX {
            refusals.clear();
        }
        refusals.insert(who.to_owned(), why.clone());
        tracing::warn!(who, why, "a connection between nodes was refused");
    }

    pub(crate) fn note_accord(&self, who: &str) {
        self.refusals.lock().remove(who);
    }
}

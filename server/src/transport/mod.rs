//! Between nodes: who is there, and the questions that they ask each other.
//!
//! Owns the connections of a node to the others, and what it remembers of them. Implements the raft
//! crate's `Transport`; does not know what groups say to each other.
//!
//! # How it works
//!
//! Every node dials every other one: [`Connection`] lists the four connections that it keeps, each a
//! lane of its own, so that a snapshot holds up no entry and an entry no heartbeat. A node asks on
//! the connections that it dialled, and is answered on the same ones; what it is asked comes in on
//! those that the others dialled.
//!
//! *Asking* takes a place in the lane's queue, under one lock, and returns a future for the answer.
//! The lane's task takes everything that waits as one `Envelope`, one frame, one write; answers come
//! back the same way, in any order, matched by call number. Nobody is waited for without a limit:
//! what a lane has under way is bounded in bytes and number, every answer has its timeout, and when a
//! connection breaks or goes silent all of its questions fail at once, as they do while the node is
//! down. A question is never sent twice, so nothing arrives twice or out of order: when a node dials
//! anew, its older connection is closed before the first question of the newer one is taken.
//!
//! *Who is who* stands in `directory`: the first frame both ways says cluster, node, start count and
//! incarnation, and a copied or rolled-back directory is refused. Addresses are not identity: the
//! newest start of a node wins, and the news goes round with every Hello and, when something changed,
//! with the next control envelope. So a cluster whose nodes all come back elsewhere finds itself as
//! long as one address that anybody knows is right.
//!
//! # Not here
//!
//! Encryption, and proof that a node is who it says: whoever reaches the peer listener is trusted.
//! Both belong into `Net`, below the frames.

mod frame;

mod directory;

mod message;

mod lane;

mod gate;

mod peer;

mod hub;

mod handshake;

mod dial;

mod outbox;

mod accept;

mod seed;

use std::collections::BTreeSet;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::peer::KnownNode;
use coracle_proto::peer::cluster_command::Kind;
use coracle_raft::transport::{Address, Answering, Transport, TransportError};
use coracle_raft::types::NodeId;
use coracle_storage::exec::Exec;
use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use hub::{Inbound, PeerEvents};
pub use message::Connection;
pub use peer::PeerStatus;

use crate::net::{Listener, Net};
use directory::{Directory, News};
use hub::{Handlers, Hub};
use lane::Asked;
use message::{Question, Reply};

/// What a transport begins with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster; empty before `init` or `join`.
    pub cluster_id: String,
    /// This node: its id (0 before `init` or `join`), the addresses that others reach it at, its
    /// start count as synced to disk, and an incarnation drawn for this process, never 0.
    pub own: KnownNode,
    /// What [`PeerEvents::known`] told before the restart.
    pub known: Vec<KnownNode>,
    /// Of the pauses between attempts to connect.
    pub seed: u64,
    /// Whether [`PeerTransport::cut`] does anything.
    pub fault_injection: bool,
}

/// Whom a cluster command goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A known node, over its control connection.
    Node(NodeId),
    /// Whoever listens at this peer address, over a connection of its own.
    Address(String),
}

/// A node's way to the others. Cheap to clone; ends with the token that it was made with.
#[derive(Clone)]
pub struct PeerTransport {
    hub: Arc<Hub>,
    fault_injection: bool,
}

impl PeerTransport {
    /// A transport that can be asked, and handed to the group host, but does nothing before
    /// [`start`](Self::start). All of its tasks end when `ended` is cancelled.
    pub fn new(
        settings: Settings,
        net: Arc<dyn Net>,
        exec: Arc<dyn Exec>,
        ended: CancellationToken,
    ) -> Self {
        let Settings { cluster_id, own, known, seed, fault_injection } = settings;
        let mut directory = Directory::new(cluster_id, own);
        directory.learn_all(&known, Instant::now(), &mut News::default());
        Self { hub: Arc::new(Hub::new(directory, net, exec, seed, ended)), fault_injection }
    }

    /// Begins to dial the known nodes and to accept. Call it once.
    pub fn start(
        &self,
        listener: Box<dyn Listener>,
        inbound: Arc<dyn Inbound>,
        events: Arc<dyn PeerEvents>,
    ) {
        self.hub.set_handlers(Handlers { inbound, events });
        self.hub.add_peers();
        self.hub.spawn("peer listener", accept::run(self.hub.clone(), listener));
    }

    /// Gives the node its identity, once. Call it when the identity is durable.
    pub fn set_identity(&self, cluster_id: &str, node: NodeId) {
        self.hub.directory(|directory| directory.set_identity(cluster_id, node));
        self.hub.identity_given.notify_waiters();
    }

    /// Keeps greeting whoever is at this peer address, until a member of the cluster answered.
    pub fn dial_seed(&self, address: &str) {
        assert!(self.hub.started(), "seeds are dialled after the start");
        self.hub.spawn("seed", seed::run(self.hub.clone(), address.to_owned()));
    }

    /// Takes up what is known of a node from elsewhere; news only if its start count is higher.
    pub fn set_known(&self, known: &KnownNode) {
        let mut news = News::default();
        let told = std::slice::from_ref(known);
        self.hub.directory(|directory| directory.learn_all(told, Instant::now(), &mut news));
        self.hub.spread(&news);
    }

    /// A node was removed from the cluster: ends its connections, and refuses it from now on.
    pub fn forget(&self, node: NodeId) {
        self.hub.forget(node);
    }

    /// The other nodes of the cluster that are known, each with its newest addresses.
    pub fn peers(&self) -> Vec<KnownNode> {
        self.hub.directory(|directory| directory.nodes().cloned().collect())
    }

    /// Nodes without a cluster that greeted a moment ago, or of which one that did tells.
    pub fn strangers(&self) -> Vec<KnownNode> {
        self.hub.directory(|directory| directory.strangers(Instant::now()))
    }

    /// While this node has no cluster: members of one that greeted a moment ago, or of which one that
    /// did tells.
    pub fn hosts(&self) -> Vec<KnownNode> {
        self.hub.directory(|directory| directory.hosts(Instant::now()))
    }

    /// This node, as it introduces itself.
    pub fn own(&self) -> KnownNode {
        self.hub.directory(|directory| directory.own().clone())
    }

    /// Since a node was last heard; `None` when it was not heard since this node started.
    pub fn silence(&self, node: NodeId) -> Option<Duration> {
        self.hub.peers().get(&node)?.silence()
    }

    /// The connections to and from every known node.
    pub fn status(&self) -> Vec<PeerStatus> {
        let peers = self.hub.peers();
        let status = |known: KnownNode| {
            let peer = peers.get(&NodeId(known.node))?;
            let up = peer.lanes().iter().filter(|lane| lane.is_up());
            Some(PeerStatus {
                dialled: up.map(|lane| lane.connection()).collect(),
                accepted: self.hub.gates.of(peer.node),
                silence: peer.silence(),
                known,
            })
        };
        self.peers().into_iter().filter_map(status).collect()
    }

    /// Hands a client's request to the node that serves it.
    pub fn forward(&self, node: NodeId, body: Bytes, timeout: Duration) -> Answering {
        match self.place(node, Connection::Forward, Question::Forward(body), timeout) {
            Ok(asked) => Box::pin(bytes_of(asked)),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    /// Sends a cluster command, and returns its answer.
    pub fn command(
        &self,
        target: Target,
        command: Kind,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Kind, TransportError>> {
        let node = match target {
            Target::Node(node) => node,
            Target::Address(address) => {
                let hub = self.hub.clone();
                return Box::pin(
                    async move { seed::command(&hub, &address, command, timeout).await },
                );
            }
        };
        match self.place(node, Connection::Control, Question::Command(command), timeout) {
            Ok(asked) => Box::pin(async move {
                match asked.answer().await? {
                    Reply::Command(kind) => Ok(kind),
                    Reply::Bytes(_) => Err(mismatched()),
                }
            }),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    /// Fault injection: cuts this node off from exactly these nodes, both ways, until the next call.
    /// False if fault injection is not enabled.
    pub fn cut(&self, nodes: BTreeSet<NodeId>) -> bool {
        if self.fault_injection {
            self.hub.cut(nodes);
        }
        self.fault_injection
    }

    /// Waits until every task of the transport is gone; they go when its token is cancelled.
    pub async fn stopped(&self) {
        self.hub.stopped().await;
    }

    fn place(
        &self,
        node: NodeId,
        connection: Connection,
        question: Question,
        timeout: Duration,
    ) -> Result<Asked, TransportError> {
        match self.hub.peer(node) {
            Some(peer) => peer.lane(connection).ask(question, timeout),
            None => Err(TransportError::NotSent(format!("node {node} is not known here"))),
        }
    }
}

impl Transport for PeerTransport {
    fn ask(
        &self,
        to: Address,
        lane: coracle_raft::transport::Lane,
        question: Bytes,
        timeout: Duration,
    ) -> Answering {
        use coracle_raft::transport::Lane;
        let (connection, lingers) = match lane {
            Lane::Control => (Connection::Control, false),
            Lane::Heartbeat => (Connection::Control, true),
            Lane::Appends => (Connection::Appends, false),
            Lane::Bulk => (Connection::Bulk, false),
        };
        let question = Question::Group { to, body: question, lingers };
        match self.place(to.node, connection, question, timeout) {
            Ok(asked) => Box::pin(bytes_of(asked)),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }
}

async fn bytes_of(asked: Asked) -> Result<Bytes, TransportError> {
    match asked.answer().await? {
        Reply::Bytes(bytes) => Ok(bytes),
        Reply::Command(_) => Err(mismatched()),
    }
}

fn mismatched() -> TransportError {
    TransportError::Unreachable("the answer is not of the question's kind".into())
}

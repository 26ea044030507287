//! A node under test: a transport whose groups note what they are asked and answer on demand.
//!
//! Owns the answers and the notes. The network stands in `transport_net`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::peer::cluster_command::Kind;
use coracle_proto::peer::{CommandDone, GroupMessage, KnownNode, NodeFacts};
use coracle_raft::transport::{Address, Answering, Lane, Transport, TransportError};
use coracle_raft::types::{NodeId, ShardId};
use coracle_server::net::{Listener, Net};
use coracle_server::transport::{Inbound, PeerEvents, PeerTransport, Settings};
use coracle_storage::ReplicaId;
use coracle_storage::exec::RealExec;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::transport_net::MemoryNet;

pub(crate) const LONG: Duration = Duration::from_secs(20);

/// What a node was asked and told.
#[derive(Default)]
pub(crate) struct Notes {
    pub(crate) questions: Mutex<Vec<(NodeId, Bytes)>>,
    pub(crate) commands: Mutex<Vec<(KnownNode, Kind)>>,
    pub(crate) lost: Mutex<Vec<NodeId>>,
    pub(crate) known: Mutex<Vec<KnownNode>>,
    pub(crate) facts: Mutex<Vec<(NodeId, u64)>>,
    pub(crate) superseded: Mutex<Vec<KnownNode>>,
    /// The questions that are held.
    held: Mutex<Vec<oneshot::Sender<()>>>,
    node: u64,
}

impl Inbound for Notes {
    /// "hold…" waits for `release`, "never…" for ever, "refuse…" is not taken; all else comes back.
    fn question(
        &self,
        from: NodeId,
        question: GroupMessage,
    ) -> BoxFuture<'static, Result<Bytes, String>> {
        let body = question.body;
        self.questions.lock().push((from, body.clone()));
        if body.starts_with(b"hold") {
            let (release, released) = oneshot::channel();
            self.held.lock().push(release);
            return Box::pin(async move {
                released.await.map_err(|_| "the node ended".to_owned())?;
                Ok(body)
            });
        }
        if body.starts_with(b"never") {
            return Box::pin(std::future::pending());
        }
        if body.starts_with(b"refuse") {
            return Box::pin(async { Err("no such group".to_owned()) });
        }
        Box::pin(async move { Ok(body) })
    }

    fn forward(&self, from: NodeId, body: Bytes) -> BoxFuture<'static, Result<Bytes, String>> {
        Box::pin(async move {
            if body.starts_with(b"refuse") {
                return Err(String::new());
            }
            Ok([format!("{from}:").as_bytes(), &body].concat().into())
        })
    }

    fn command(&self, from: KnownNode, command: Kind) -> BoxFuture<'static, Kind> {
        self.commands.lock().push((from, command));
        let error = format!("from {}", self.node);
        Box::pin(async move { Kind::Done(CommandDone { error, ..Default::default() }) })
    }
}

impl Notes {
    /// Lets the question that was held last be answered.
    pub(crate) fn release_last(&self) {
        let last = self.held.lock().pop().expect("a question is held");
        last.send(()).expect("its answer is awaited");
    }

    pub(crate) fn held(&self) -> usize {
        self.held.lock().len()
    }

    pub(crate) fn asked(&self) -> Vec<Bytes> {
        self.questions.lock().iter().map(|(_, body)| body.clone()).collect()
    }
}

impl PeerEvents for Notes {
    fn lost(&self, node: NodeId) {
        self.lost.lock().push(node);
    }

    fn known(&self, node: &KnownNode) {
        self.known.lock().push(node.clone());
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts { map_epoch: self.node, ..Default::default() }
    }

    fn heard_facts(&self, node: NodeId, facts: NodeFacts, at: Instant) {
        assert!(at <= Instant::now());
        self.facts.lock().push((node, facts.map_epoch));
    }

    fn superseded(&self, by: &KnownNode) {
        self.superseded.lock().push(by.clone());
    }
}

/// One process.
pub(crate) struct Node {
    pub(crate) transport: PeerTransport,
    pub(crate) notes: Arc<Notes>,
    ended: CancellationToken,
}

/// A member of cluster "c" that says it began for the `start_count`th time.
pub(crate) fn known(node: u64, start_count: u64) -> KnownNode {
    KnownNode {
        node,
        peer_address: format!("n{node}:1"),
        address: format!("n{node}:2"),
        zone: format!("zone{node}"),
        start_count,
        incarnation: 1000 * (node + 1) + start_count,
        ..Default::default()
    }
}

pub(crate) fn settings(own: KnownNode, others: &[KnownNode]) -> Settings {
    Settings {
        cluster_id: if own.node == 0 { "" } else { "c" }.to_owned(),
        own,
        known: others.to_vec(),
        seed: 7,
        fault_injection: true,
    }
}

impl Node {
    /// Starts a node; its host in the network is what its peer address begins with.
    pub(crate) async fn start(net: &MemoryNet, settings: Settings) -> Self {
        let address = settings.own.peer_address.clone();
        let host = net.host(address.split(':').next().expect("the part before the port"));
        let listener = host.listen(&address).await.expect("memory listens everywhere");
        Self::start_on(host, listener, settings)
    }

    pub(crate) fn start_on(
        net: Arc<dyn Net>,
        listener: Box<dyn Listener>,
        settings: Settings,
    ) -> Self {
        let notes = Arc::new(Notes { node: settings.own.node, ..Default::default() });
        let exec = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 1));
        let ended = CancellationToken::new();
        let transport = PeerTransport::new(settings, net, exec, ended.clone());
        transport.start(listener, notes.clone(), notes.clone());
        Self { transport, notes, ended }
    }

    pub(crate) async fn stop(&self) {
        self.ended.cancel();
        self.transport.stopped().await;
    }

    pub(crate) fn ask(&self, to: u64, lane: Lane, body: &str, timeout: Duration) -> Answering {
        let to = Address { node: NodeId(to), shard: ShardId(3), replica: ReplicaId(4) };
        self.transport.ask(to, lane, Bytes::copy_from_slice(body.as_bytes()), timeout)
    }

    /// Asks until there is an answer: the connection may have to come first.
    pub(crate) async fn reach(&self, to: u64) {
        let deadline = Instant::now() + LONG;
        while let Err(error) = self.ask(to, Lane::Appends, "reach", LONG).await {
            assert!(Instant::now() < deadline, "n{to} is not reached: {error}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Nodes 1 to `count` that know each other.
pub(crate) async fn cluster(net: &MemoryNet, count: u64) -> Vec<Node> {
    let all: Vec<_> = (1..=count).map(|node| known(node, 1)).collect();
    let mut nodes = Vec::new();
    for own in &all {
        nodes.push(Node::start(net, settings(own.clone(), &all)).await);
    }
    for from in &nodes {
        for to in (1..=count).filter(|to| *to != from.transport.own().node) {
            from.reach(to).await;
        }
    }
    nodes
}

/// Waits until it holds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "not in {LONG:?}: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub(crate) fn unreachable(answer: Result<Bytes, TransportError>) -> String {
    match answer {
        Err(TransportError::Unreachable(why) | TransportError::NotSent(why)) => why,
        other => panic!("not unreachable: {other:?}"),
    }
}

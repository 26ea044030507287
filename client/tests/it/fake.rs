//! Owns a cluster of scripted nodes within the test's process: the real gRPC services over an
//! in-memory network. By default nodes behave as real ones do (leaders serve, others point to
//! them, retries get their first result); a script says otherwise, request by request.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_client::net::{Connecting, Net, Stream};
use coracle_client::{Builder, Client};
use coracle_proto::reason::{Fault, Reason, metadata};
use coracle_proto::shard_map::ShardMap;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::v1::{PipelineRequest, RequestId};
use parking_lot::Mutex;
use tokio::io::{DuplexStream, copy_bidirectional, duplex};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::sleep;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server;

use crate::services::Node;

/// What a node does with one request instead of serving it.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Refuses it.
    Fault(Fault),
    /// Never answers, and does nothing.
    Ignore,
    /// Carries it out, and never answers.
    LoseAnswer,
    /// Breaks all its connections.
    Cut,
    /// Carries it out, then breaks all its connections.
    ApplyAndCut,
    /// Serves it when told to.
    Hold(Arc<Notify>),
    /// Of a scan or a delete-range: breaks off after this many pages or rounds.
    CutAfterPages(usize),
    /// Of a scan: refuses to go on after this many pages.
    FaultAfterPages(usize, Fault),
}

/// Keys that an atomic delete-range may meet here.
pub(crate) const ATOMIC_KEYS_MAX: usize = 10;

/// A request as a node saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) node: u64,
    pub(crate) operation: Operation,
}

impl Seen {
    pub(crate) fn request_id(&self) -> RequestId {
        match &self.operation {
            Operation::Put(put) => put.request_id,
            Operation::Delete(delete) => delete.request_id,
            Operation::Write(write) => write.request_id,
            Operation::DeleteRange(delete) => delete.request_id,
            _ => None,
        }
        .expect("every write carries a request id")
    }
}

/// The cluster. The network that leads to it is the same handle.
#[derive(Clone)]
pub(crate) struct Cluster {
    state: Arc<Mutex<State>>,
    published: watch::Sender<v1::ShardMap>,
}

pub(crate) struct State {
    /// The truth; what is published may lag behind it.
    map: v1::ShardMap,
    data: BTreeMap<Bytes, v1::Entry>,
    /// Terms, indexes and versions all come from it.
    counter: u64,
    results: HashMap<(u64, u64, u64), Answer>,
    scripts: HashMap<u64, VecDeque<Act>>,
    pub(crate) seen: Vec<Seen>,
    links: HashMap<u64, Link>,
    pub(crate) at_once: HashMap<u64, (usize, usize)>,
}

struct Link {
    is_up: bool,
    is_frozen: watch::Sender<bool>,
    incoming: mpsc::UnboundedSender<io::Result<DuplexStream>>,
    proxies: Vec<AbortHandle>,
}

pub(crate) fn address(node: u64) -> String {
    format!("n{node}:7400")
}

impl Cluster {
    /// `nodes` nodes, each a voter of every shard; shards cut the ring evenly; node 1 leads all.
    pub(crate) fn start(nodes: u64, shards: u32) -> Cluster {
        let cluster = Cluster {
            state: Arc::new(Mutex::new(State {
                map: map(nodes, shards),
                data: BTreeMap::new(),
                counter: 100,
                results: HashMap::new(),
                scripts: HashMap::new(),
                seen: Vec::new(),
                links: HashMap::new(),
                at_once: HashMap::new(),
            })),
            published: watch::Sender::new(map(nodes, shards)),
        };
        for node in 1..=nodes {
            let (incoming, connections) = mpsc::unbounded_channel();
            let (is_frozen, proxies) = (watch::Sender::new(false), Vec::new());
            let link = Link { is_up: true, is_frozen, incoming, proxies };
            cluster.state.lock().links.insert(node, link);
            let service = Node { id: node, cluster: cluster.clone() };
            let server = Server::builder()
                .add_service(v1::kv_service_server::KvServiceServer::new(service.clone()))
                .add_service(v1::cluster_service_server::ClusterServiceServer::new(service.clone()))
                .add_service(v1::admin_service_server::AdminServiceServer::new(service));
            tokio::spawn(server.serve_with_incoming(UnboundedReceiverStream::new(connections)));
        }
        cluster
    }

    /// A client's settings that lead here.
    pub(crate) fn builder(&self) -> Builder {
        let seeds: Vec<String> =
            self.state.lock().map.nodes.iter().map(|node| address(node.id)).collect();
        Client::builder().seeds(seeds).net(Arc::new(self.clone())).seed(7)
    }

    pub(crate) async fn client(&self) -> Client {
        self.builder().connect().await.expect("a healthy cluster")
    }

    /// The next requests of a node meet these, in this order.
    pub(crate) fn script(&self, node: u64, acts: impl IntoIterator<Item = Act>) {
        self.state.lock().scripts.entry(node).or_default().extend(acts);
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock())
    }

    /// Waits until the cluster looks as wanted.
    pub(crate) async fn until(&self, wanted: impl Fn(&State) -> bool) {
        let looks = async {
            while !self.with(|state| wanted(state)) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), looks).await.expect("it comes to that");
    }

    /// The nodes that have seen a request, in order; and forgets them.
    pub(crate) fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.lock().seen)
    }

    /// A new leader for all shards; 0 for none. Nobody is told.
    pub(crate) fn elect(&self, node: u64) {
        let mut state = self.state.lock();
        for shard in &mut state.map.shards {
            shard.leader_node = node;
            shard.leader_term += 1;
        }
    }

    /// Raises the epoch of every shard, as a split or a move does. Nobody is told.
    pub(crate) fn raise_epochs(&self) {
        let mut state = self.state.lock();
        state.map.epoch += 1;
        for shard in &mut state.map.shards {
            shard.epoch += 1;
        }
    }

    /// Adds a keyspace whose entities end at `/`.
    pub(crate) fn add_keyspace(&self, name: &str) -> v1::Keyspace {
        let mut state = self.state.lock();
        let keyspace = v1::Keyspace {
            id: 1 + state.map.keyspaces.len() as u32,
            name: name.to_owned(),
            entity_rule: Some(coracle_proto::entity::EntityRule::Delimiter(b'/').into()),
            history_ms: 0,
            revision: 0,
        };
        state.map.epoch += 1;
        state.map.keyspaces.push(keyspace.clone());
        keyspace
    }

    /// Tells all who watch the map.
    pub(crate) fn announce(&self) {
        self.published.send_replace(self.state.lock().map.clone());
    }

    pub(crate) fn published(&self) -> watch::Receiver<v1::ShardMap> {
        self.published.subscribe()
    }

    /// The true map, with the time.
    pub(crate) fn map(&self) -> v1::ShardMap {
        self.state.lock().map.clone()
    }

    /// Breaks a node's connections and refuses new ones.
    pub(crate) fn kill(&self, node: u64) {
        self.cut(node);
        self.state.lock().links.get_mut(&node).expect("a node").is_up = false;
    }

    /// Lets a killed node be reached again.
    pub(crate) fn revive(&self, node: u64) {
        self.state.lock().links.get_mut(&node).expect("a node").is_up = true;
    }

    /// Nothing passes any more, and nobody is told: a paused process, a cable pulled.
    pub(crate) fn freeze(&self, node: u64) {
        self.state.lock().links[&node].is_frozen.send_replace(true);
    }

    /// Breaks a node's connections.
    pub(crate) fn cut(&self, node: u64) {
        let mut state = self.state.lock();
        for proxy in state.links.get_mut(&node).expect("a node").proxies.drain(..) {
            proxy.abort();
        }
    }

    /// Connections that stand.
    pub(crate) fn connections(&self) -> usize {
        let state = self.state.lock();
        let proxies = state.links.values().flat_map(|link| &link.proxies);
        proxies.filter(|proxy| !proxy.is_finished()).count()
    }

    pub(crate) fn next_act(&self, node: u64) -> Option<Act> {
        self.state.lock().scripts.get_mut(&node)?.pop_front()
    }

    /// Serves one operation of a pipeline; `None` when there is never an answer.
    pub(crate) async fn serve(&self, node: u64, request: PipelineRequest) -> Option<Answer> {
        let operation = request.operation.expect("an operation");
        self.with(|state| {
            state.seen.push(Seen { node, operation: operation.clone() });
            let (now, most) = state.at_once.entry(node).or_default();
            *now += 1;
            *most = (*most).max(*now);
        });
        let answer = self.act(node, operation).await;
        self.with(|state| state.at_once.entry(node).or_default().0 -= 1);
        answer
    }

    async fn act(&self, node: u64, operation: Operation) -> Option<Answer> {
        let apply = |operation| self.with(|state| state.answer(node, operation));
        match self.next_act(node) {
            None | Some(Act::CutAfterPages(_) | Act::FaultAfterPages(..)) => Some(apply(operation)),
            Some(Act::Fault(fault)) => Some(Answer::Error(fault.to_pipeline())),
            Some(Act::Ignore) => None,
            Some(Act::LoseAnswer) => {
                apply(operation);
                None
            }
            Some(Act::Cut) => {
                self.cut(node);
                None
            }
            Some(Act::ApplyAndCut) => {
                apply(operation);
                self.cut(node);
                None
            }
            Some(Act::Hold(go)) => {
                go.notified().await;
                Some(apply(operation))
            }
        }
    }
}

impl State {
    pub(crate) fn get(&self, key: &str) -> Option<Bytes> {
        self.data.get(key.as_bytes()).map(|entry| entry.value.clone())
    }

    pub(crate) fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.counter += 1;
        let entry = v1::Entry { value: value.into(), version: self.counter, expires_at_ms: 0 };
        self.data.insert(key.into(), entry);
    }

    /// Entries behind `after` in the order of the scan.
    pub(crate) fn range(&self, scan: &v1::ScanRequest, after: Option<&[u8]>) -> Vec<v1::KeyValue> {
        let wanted =
            |key: &Bytes| {
                *key >= scan.start
                    && (scan.end.is_empty() || *key < scan.end)
                    && key.starts_with(&scan.prefix)
                    && after.is_none_or(|after| {
                        if scan.reverse { &key[..] < after } else { &key[..] > after }
                    })
            };
        let pairs = self.data.iter().filter(|(key, _)| wanted(key));
        let mut pairs: Vec<_> = pairs
            .map(|(key, entry)| v1::KeyValue { key: key.clone(), entry: Some(entry.clone()) })
            .collect();
        if scan.reverse {
            pairs.reverse();
        }
        pairs
    }

    /// Keys of a delete-range from `from` on.
    pub(crate) fn keys_in(&self, delete: &v1::DeleteRangeRequest, from: &[u8]) -> Vec<Bytes> {
        let v1::DeleteRangeRequest { start, end, prefix, .. } = delete.clone();
        let range = v1::ScanRequest { start, end, prefix, ..Default::default() };
        let keys = self.range(&range, None).into_iter().map(|pair| pair.key);
        keys.filter(|key| &key[..] >= from).collect()
    }

    /// Deletes one step's keys: how many, and where the next goes on.
    pub(crate) fn delete_step(&mut self, keys: &[Bytes]) -> Option<Bytes> {
        keys.iter().for_each(|key| drop(self.data.remove(key)));
        self.counter += 1;
        keys.last().cloned()
    }

    fn answer(&mut self, node: u64, operation: Operation) -> Answer {
        match self.try_answer(node, operation) {
            Ok(answer) => answer,
            Err(fault) => Answer::Error(fault.to_pipeline()),
        }
    }

    fn try_answer(&mut self, node: u64, operation: Operation) -> Result<Answer, Fault> {
        let (keyspace, key, route, id) = match &operation {
            Operation::Get(get) => (&get.keyspace, &get.key, get.route, None),
            Operation::Put(put) => (&put.keyspace, &put.key, put.route, put.request_id),
            Operation::Delete(delete) => {
                (&delete.keyspace, &delete.key, delete.route, delete.request_id)
            }
            Operation::Write(write) => {
                (&write.keyspace, &write.operations[0].key, write.route, write.request_id)
            }
            Operation::BatchGet(batch) => (&batch.keyspace, &batch.keys[0], None, None),
            Operation::DeleteRange(delete) => {
                let first = (&delete.start).max(&delete.prefix);
                (&delete.keyspace, first, delete.only_shard, delete.request_id)
            }
            other => panic!("the client never sends {other:?}"),
        };
        let served = self.serve_as_leader(node, keyspace, key, route)?;
        let id = id.map(|id| (id.client, id.sequence, id.birth));
        if let Some(first) = id.and_then(|id| self.results.get(&id)) {
            return Ok(first.clone());
        }
        let answer = self.apply(operation, served);
        if let Some(id) = id {
            self.results.insert(id, answer.clone());
        }
        Ok(answer)
    }

    fn serve_as_leader(
        &mut self,
        node: u64,
        keyspace: &str,
        key: &[u8],
        route: Option<v1::Route>,
    ) -> Result<v1::Served, Fault> {
        let map = ShardMap::from_proto(&self.map).expect("a map");
        let keyspace = map.keyspace(keyspace).expect("a keyspace");
        let shard = map.locate_key(keyspace, key);
        if route
            .is_some_and(|route| (route.shard, route.shard_epoch) != (shard.id.0, shard.epoch.0))
        {
            return Err(Fault::new(Reason::StaleRoute, "another epoch"));
        }
        let leader = shard.leader.map_or(0, |leader| leader.0);
        if leader != node {
            let fault =
                Fault::new(Reason::NotLeader, "not the leader").with(metadata::SHARD, shard.id);
            return Err(match leader {
                0 => fault,
                leader => fault
                    .with(metadata::LEADER_NODE, leader)
                    .with(metadata::LEADER_ADDR, address(leader))
                    .with(metadata::LEADER_TERM, shard.leader_term),
            });
        }
        self.counter += 1;
        Ok(v1::Served {
            shard: shard.id.0,
            term: shard.leader_term,
            index: self.counter,
            node,
            leader: true,
            staleness_ms: 0,
            server_time_ms: 1_000_000 + self.counter,
            judged_at: 0,
        })
    }

    fn apply(&mut self, operation: Operation, served: v1::Served) -> Answer {
        let (version, served) = (self.counter, Some(served));
        match operation {
            Operation::Get(get) => {
                let entry = self.data.get(&get.key).cloned();
                Answer::Get(v1::GetResponse { entry, served })
            }
            Operation::BatchGet(batch) => {
                let item = |key| v1::BatchGetItem { entry: self.data.get(key).cloned(), served };
                Answer::BatchGet(v1::BatchGetResponse {
                    items: batch.keys.iter().map(item).collect(),
                })
            }
            Operation::Put(put) => {
                let current = self.data.get(&put.key).cloned();
                let applied = holds(put.condition.as_ref(), current.as_ref());
                if applied {
                    self.put(put.key, put.value);
                }
                let current = current.filter(|_| !applied);
                Answer::Put(v1::PutResponse { applied, version, current, served })
            }
            Operation::Delete(delete) => {
                let current = self.data.get(&delete.key).cloned();
                let applied = holds(delete.condition.as_ref(), current.as_ref());
                if applied {
                    self.data.remove(&delete.key);
                }
                let current = current.filter(|_| !applied);
                Answer::Delete(v1::DeleteResponse { applied, version, current, served })
            }
            Operation::DeleteRange(delete) => {
                let keys = self.keys_in(&delete, b"");
                if keys.len() > ATOMIC_KEYS_MAX {
                    let fault = Fault::new(Reason::TooLarge, "too many keys")
                        .with(metadata::LIMIT, "DELETE_RANGE_KEYS_MAX");
                    return Answer::Error(fault.to_pipeline());
                }
                keys.iter().for_each(|key| drop(self.data.remove(key)));
                Answer::DeleteRange(v1::DeleteRangeResponse {
                    deleted: keys.len() as u64,
                    done: true,
                    version,
                    served,
                    ..Default::default()
                })
            }
            Operation::Scan(_) | Operation::FixVersion(_) | Operation::PinVersion(_) => {
                panic!("refused before")
            }
            Operation::Write(write) => {
                let results =
                    write.operations.into_iter().map(|operation| self.step(operation)).collect();
                Answer::Write(v1::WriteResponse { applied: true, version, results, served })
            }
        }
    }

    /// One operation of a batch; conditions are not looked at.
    fn step(&mut self, operation: v1::Operation) -> v1::OperationResult {
        use v1::operation::Kind;
        let mut result = v1::OperationResult::default();
        match operation.kind.expect("a kind") {
            Kind::Put(put) => self.put(operation.key, put.value),
            Kind::Delete(_) => drop(self.data.remove(&operation.key)),
            Kind::Increment(increment) => {
                let old = self.data.get(&operation.key).map_or(0, |entry| number(&entry.value));
                result.counter = old + increment.by;
                self.put(operation.key, result.counter.to_string());
            }
            Kind::Check(_) => {}
        }
        result
    }
}

pub(crate) fn number(value: &[u8]) -> i64 {
    std::str::from_utf8(value).expect("text").parse().expect("a number")
}

fn holds(condition: Option<&v1::Condition>, current: Option<&v1::Entry>) -> bool {
    use v1::condition::Kind;
    match condition.and_then(|condition| condition.kind.as_ref()) {
        None => true,
        Some(Kind::IfAbsent(_)) => current.is_none(),
        Some(Kind::IfVersion(version)) => current.is_some_and(|entry| entry.version == *version),
        Some(Kind::IfValue(value)) => current.is_some_and(|entry| entry.value == *value),
    }
}

impl Net for Cluster {
    fn connect(&self, address: &str) -> Connecting {
        let node = address.trim_start_matches('n').trim_end_matches(":7400");
        let node: u64 = node.parse().expect("an address of this cluster");
        let cluster = self.clone();
        Box::pin(async move {
            // Connecting takes a moment, so that nothing happens in no time.
            sleep(Duration::from_millis(1)).await;
            cluster.with(|state| {
                let link = state.links.get_mut(&node).expect("a node");
                if !link.is_up {
                    return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
                }
                let (client, mut near) = duplex(64 << 10);
                let (mut far, server) = duplex(64 << 10);
                let mut is_frozen = link.is_frozen.subscribe();
                let proxy = tokio::spawn(async move {
                    let frozen = tokio::select! {
                        biased;
                        frozen = is_frozen.wait_for(|frozen| *frozen) => frozen.is_ok(),
                        _ = copy_bidirectional(&mut near, &mut far) => false,
                    };
                    if frozen {
                        std::future::pending().await
                    }
                });
                link.proxies.push(proxy.abort_handle());
                link.incoming.send(Ok(server)).expect("the server runs");
                Ok(Box::new(client) as Box<dyn Stream>)
            })
        })
    }
}

fn map(nodes: u64, shards: u32) -> v1::ShardMap {
    let shard = |id: u64, (start, end): (u64, u64)| v1::Shard {
        id,
        start,
        end,
        epoch: 1,
        replicas: (1..=nodes)
            .map(|node| v1::Replica {
                id: id * 100 + node,
                node,
                role: v1::ReplicaRole::Voter.into(),
                joining: false,
            })
            .collect(),
        leader_node: 1,
        leader_term: 1,
        ..Default::default()
    };
    let arcs = coracle_proto::ring::equal_arcs(shards);
    let arcs = arcs.into_iter().map(|arc| (arc.start().0, arc.end()));
    let arcs = std::iter::once((0, 0)).chain(arcs).enumerate();
    v1::ShardMap {
        cluster_id: "fake".to_owned(),
        hash_seed: 42,
        epoch: 1,
        shards: arcs.map(|(id, arc)| shard(id as u64, arc)).collect(),
        nodes: (1..=nodes)
            .map(|id| v1::Node {
                id,
                address: address(id),
                state: v1::NodeState::Active.into(),
                ..Default::default()
            })
            .collect(),
        keyspaces: vec![v1::Keyspace {
            id: 1,
            name: "default".to_owned(),
            entity_rule: Some(coracle_proto::entity::EntityRule::Whole.into()),
            history_ms: 0,
            revision: 0,
        }],
        server_time_ms: 1_000_000,
        read_replicas: Vec::new(),
    }
}

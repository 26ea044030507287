//! A cluster in memory for the tests of services: the same [`Client`], no process, no
//! socket, no disk. Owns what a test says to it; how it behaves is in the modules beneath.
//!
//! A [`FakeCluster`] keeps the whole contract: versions, conditions, atomic batches within an entity,
//! counters, times to live, scans at one version, delete-ranges, reads of the past, sessions, writes
//! that are applied once however often they are sent. It is several nodes with leaders, replicas and
//! a shard map, behind the client's own network seam ([`net`](crate::net)): what the client does in
//! front of a real cluster, it does here. [`conformance`] is the list of what both promise; it runs
//! against either.
//!
//! And it goes wrong when told to: slow nodes, lost answers, refusals, leaders that move, nodes that
//! go away. With tokio's paused clock (`#[tokio::test(start_paused = true)]`) a test of a five-second
//! timeout takes no time, and every run is the same.
//!
//! ```
//! use std::time::Duration;
//! use coracle_client::testing::FakeCluster;
//!
//! # fn main() -> Result<(), coracle_client::Error> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(async {
//! let fake = FakeCluster::start();
//! let kv = fake.client().await;
//!
//! // Times to live follow a clock that the test moves.
//! kv.put("session/7", "Ada").ttl(Duration::from_secs(3600)).await?;
//! fake.advance(Duration::from_secs(3601));
//! assert_eq!(kv.get("session/7").await?, None);
//!
//! // A leader moves while the service works; the client finds it.
//! kv.put("user/42", "Ada").await?;
//! let leader = kv.get("user/42").read().await?.served;
//! let other = fake.nodes().into_iter().find(|node| *node != leader.node).expect("three nodes");
//! fake.move_leader(leader.shard, other);
//! assert_eq!(kv.put("user/42", "Grace").await?.served.node, other);
//! # Ok(())
//! # })
//! # }
//! ```
//!
//! What a test of retries looks like:
//!
//! ```
//! # use coracle_client::testing::FakeCluster;
//! # async fn example() -> Result<(), coracle_client::Error> {
//! let fake = FakeCluster::start();
//! let kv = fake.client().await;
//! fake.lose_answers(1);
//! assert_eq!(kv.increment("visits", 1).await?.value, 1); // sent twice, applied once
//! assert_eq!(fake.counts().duplicates, 1);
//! # Ok(())
//! # }
//! ```
//!
//! Not here: splits of shards (only their epochs), moves that take time (a replica has moved at once), disks that fill up, clocks that differ
//! between nodes, the limits on deleted versions that an atomic delete-range may pass. Tests of those
//! take a real cluster: `coracle demo`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_proto::reason::{Fault, Reason};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::client::{Builder, Client};
use crate::topology::{EntityRule, NodeId, NodeState, ShardId};

pub mod conformance;
mod admin;
mod faults;
mod model;
mod operations;
mod reshape;
mod range;
mod read;
mod scan;
mod seen;
mod services;
mod wire;
mod write;

pub use faults::{Act, Hold, Refusal};
pub use seen::{Counts, Request};

use faults::Faults;
use model::Model;
use read::Missed;
use seen::Log;
use wire::Links;
use write::Write;

/// How long a replica waits to have what a session has seen, before it says that it is too stale: as
/// long as a server does.
const CATCH_UP_MAX: Duration = Duration::from_millis(250);

/// A cluster in memory. See the module. Cheap to clone; all clones are one cluster.
#[derive(Clone)]
pub struct FakeCluster {
    state: Arc<Mutex<State>>,
    /// The map as those who follow it are told.
    published: watch::Sender<v1::ShardMap>,
    clients: Arc<AtomicU64>,
}

/// Makes a [`FakeCluster`].
#[derive(Clone, Debug)]
#[must_use = "it ends with start"]
pub struct Shape {
    nodes: u32,
    shards: u32,
    voters: Option<u32>,
    spares: u32,
    zones: Vec<String>,
    leader: Option<NodeId>,
    forwards: bool,
    page_entries: usize,
    is_made: bool,
}

struct State {
    model: Model,
    faults: Faults,
    links: Links,
    log: Log,
    map_is_held: bool,
}

/// Where a node of a fake cluster is found: `n1:7400` for node 1.
pub fn address(node: NodeId) -> String {
    format!("n{node}:7400")
}

fn node_at(address: &str) -> Option<NodeId> {
    let node = address.strip_prefix('n')?.strip_suffix(":7400")?;
    node.parse().ok().map(NodeId)
}

impl Shape {
    /// How many nodes. Default 3.
    pub fn nodes(self, nodes: u32) -> Shape {
        Shape { nodes, ..self }
    }

    /// How many shards. Default 4.
    pub fn shards(self, shards: u32) -> Shape {
        Shape { shards, ..self }
    }

    /// Only the first so many nodes vote; the others are read replicas. Default: all vote.
    pub fn voters(self, voters: u32) -> Shape {
        Shape { voters: Some(voters), ..self }
    }

    /// The last so many nodes hold nothing yet: as if they had just joined. Default: none.
    pub fn spares(self, spares: u32) -> Shape {
        Shape { spares, ..self }
    }

    /// The zones of the nodes, dealt out in turn. Default: none.
    pub fn zones<S: Into<String>>(self, zones: impl IntoIterator<Item = S>) -> Shape {
        Shape { zones: zones.into_iter().map(Into::into).collect(), ..self }
    }

    /// One node leads all shards. Default: the voters in turn.
    pub fn led_by(self, node: NodeId) -> Shape {
        Shape { leader: Some(node), ..self }
    }

    /// A node that does not lead a shard says so, and names the leader. Default: it passes the request
    /// on to the leader, one hop, as servers do.
    pub fn without_forwarding(self) -> Shape {
        Shape { forwards: false, ..self }
    }

    /// Entries of a scan's page at most, and keys of a step of a delete-range. Default: as many as
    /// servers give and take.
    pub fn page_entries(self, entries: usize) -> Shape {
        Shape { page_entries: entries, ..self }
    }

    /// The cluster has yet to be made, by [`Admin::init`](crate::Admin::init).
    pub fn before_init(self) -> Shape {
        Shape { is_made: false, ..self }
    }

    /// Makes the cluster. Nothing runs until a client connects.
    ///
    /// # Panics
    /// When there is no node, no shard, no voter or no entry on a page.
    pub fn start(self) -> FakeCluster {
        let holders = self.nodes.saturating_sub(self.spares);
        let voters = self.voters.unwrap_or(holders);
        let counts = [u64::from(holders), u64::from(self.shards), u64::from(voters)];
        assert!(counts.iter().all(|count| *count > 0), "a fake cluster of nothing: {self:?}");
        assert!(self.page_entries > 0, "pages without entries never end: {self:?}");
        let model = Model::new(&self);
        let links = Links::new(model.nodes());
        let published = watch::Sender::new(model.wire_map());
        let (faults, log) = (Faults::default(), Log::default());
        let state = State { model, faults, links, log, map_is_held: false };
        let clients = Arc::new(AtomicU64::new(0));
        FakeCluster { state: Arc::new(Mutex::new(state)), published, clients }
    }
}

impl FakeCluster {
    /// Three nodes, four shards, each led by one of the nodes.
    pub fn start() -> FakeCluster {
        FakeCluster::shape().start()
    }

    /// Another number of nodes, shards, zones.
    pub fn shape() -> Shape {
        Shape {
            nodes: 3,
            shards: 4,
            voters: None,
            spares: 0,
            zones: Vec::new(),
            leader: None,
            forwards: true,
            page_entries: usize::MAX,
            is_made: true,
        }
    }

    /// A client of this cluster, with the default settings. Each call makes another one.
    ///
    /// # Panics
    /// When the cluster does not let it connect: for that, see [`FakeCluster::client_builder`].
    pub async fn client(&self) -> Client {
        self.client_builder().connect().await.expect("a healthy fake cluster")
    }

    /// A client's settings that lead here. Each call has another seed, always the same one in the same
    /// test.
    pub fn client_builder(&self) -> Builder {
        let seed = 1 + self.clients.fetch_add(1, Ordering::Relaxed);
        let seeds: Vec<String> = self.nodes().into_iter().map(address).collect();
        Client::builder().seeds(seeds).net(Arc::new(self.clone())).seed(seed)
    }

    /// The nodes: `n1` to `nN`.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.state.lock().model.nodes()
    }

    /// The shards that hold keys.
    pub fn shards(&self) -> Vec<ShardId> {
        self.state.lock().model.map.shards().iter().map(|shard| shard.id).collect()
    }

    /// Who leads a shard.
    pub fn leader(&self, shard: ShardId) -> Option<NodeId> {
        self.state.lock().model.leader(shard)
    }

    /// Makes a keyspace. Clients hear of it as they do of everything: from the map.
    ///
    /// # Panics
    /// When there is one of this name with another rule, or the name cannot be one.
    pub fn create_keyspace(&self, name: &str, entity_rule: EntityRule) {
        let request = v1::CreateKeyspaceRequest {
            name: name.to_owned(),
            entity_rule: Some(entity_rule.into()),
            ..Default::default()
        };
        let made = self.change(|model| model.create_keyspace(&request));
        made.unwrap_or_else(|fault| panic!("keyspace {name:?}: {fault}"));
    }

    // --- time ---

    /// The cluster's wall clock moves on by this much, beside the time that passes. What expires by
    /// then is gone; the memory of request ids ages too.
    pub fn advance(&self, by: Duration) {
        self.state.lock().model.advance(by);
    }

    // --- who leads ---

    /// Another voter leads the shard from now on, in a new term.
    ///
    /// # Panics
    /// When there is no such shard, or the node is no voter of it.
    pub fn move_leader(&self, shard: ShardId, to: NodeId) {
        self.change(|model| model.elect(shard, Some(to)));
    }

    /// Nobody leads the shard until [`FakeCluster::move_leader`].
    pub fn depose(&self, shard: ShardId) {
        self.change(|model| model.elect(shard, None));
    }

    /// The shard's epoch rises, as after a split or a move: requests of clients with an older map are
    /// refused once.
    pub fn raise_epoch(&self, shard: ShardId) {
        self.change(|model| model.raise_epoch(shard));
    }

    /// Those who follow the map hear nothing of changes from now on: they work with a stale map until
    /// [`FakeCluster::publish_map`]. Who asks for the map gets the true one.
    pub fn hold_map(&self) {
        self.state.lock().map_is_held = true;
    }

    /// Ends [`FakeCluster::hold_map`], and tells everybody.
    pub fn publish_map(&self) {
        self.state.lock().map_is_held = false;
        self.change(|_| ());
    }

    // --- nodes ---

    /// The node is gone: its connections break, and it takes no new ones. What it led has no leader
    /// until [`FakeCluster::move_leader`]; see also [`FakeCluster::fail_over`].
    pub fn stop(&self, node: NodeId) {
        self.cut(node);
        let mut state = self.state.lock();
        state.links.set_up(node, false);
        state.model.down.insert(node);
    }

    /// The node is back, with all that was written meanwhile.
    pub fn restart(&self, node: NodeId) {
        let mut state = self.state.lock();
        state.links.set_up(node, true);
        state.model.down.remove(&node);
    }

    /// Stops a node, and has others lead what it led.
    ///
    /// # Panics
    /// When no voter is left for that.
    pub fn fail_over(&self, node: NodeId) {
        self.stop(node);
        self.change(|model| model.elect_others(node));
    }

    /// The node's connections break. It takes new ones.
    pub fn cut(&self, node: NodeId) {
        self.state.lock().links.cut(node);
    }

    /// Nothing passes to or from the node, and nobody is told: a paused process, a cable pulled.
    pub fn freeze(&self, node: NodeId) {
        self.state.lock().links.set_frozen(node, true);
    }

    /// Ends [`FakeCluster::freeze`]: connections that were frozen break.
    pub fn thaw(&self, node: NodeId) {
        self.state.lock().links.set_frozen(node, false);
        self.cut(node);
    }

    /// The node's replicas see everything so much later, where they do not lead. Session reads wait
    /// for them a little, and go elsewhere then.
    pub fn hold_back(&self, node: NodeId, by: Duration) {
        self.state.lock().model.lags.insert(node, by);
    }

    /// What the map says that the node is doing.
    pub fn set_node_state(&self, node: NodeId, to: NodeState) {
        self.change(|model| model.set_state(node, to.to_wire()));
    }

    // --- requests ---

    /// Every request takes so much longer.
    pub fn delay(&self, by: Duration) {
        self.state.lock().faults.delay = by;
    }

    /// Every request to the node takes so much longer.
    pub fn delay_node(&self, node: NodeId, by: Duration) {
        self.state.lock().faults.node_delays.insert(node, by);
    }

    /// Every nth request of all takes so much longer.
    ///
    /// # Panics
    /// When `nth` is 0.
    pub fn delay_every(&self, nth: u64, by: Duration) {
        assert!(nth > 0, "each 0th request is none");
        self.state.lock().faults.nth_delay = Some((nth, by));
    }

    /// The next so many writes, retries included, are carried out and never answered.
    pub fn lose_answers(&self, writes: u64) {
        self.state.lock().faults.answers_to_lose = writes;
    }

    /// The next so many requests, retries included, are neither carried out nor answered.
    pub fn lose_requests(&self, requests: u64) {
        self.state.lock().faults.requests_to_lose = requests;
    }

    /// The next so many requests, retries included, are refused.
    pub fn refuse(&self, requests: u64, refusal: Refusal) {
        self.state.lock().faults.refusals = Some((requests, refusal));
    }

    /// The next requests to the node meet these, in this order; before all that the other calls say.
    pub fn script(&self, node: NodeId, acts: impl IntoIterator<Item = Act>) {
        self.state.lock().faults.script(node, acts);
    }

    // --- what was seen ---

    /// How often what happened.
    pub fn counts(&self) -> Counts {
        let state = self.state.lock();
        let (duplicates, forwards) = (state.model.duplicates, state.model.hops);
        Counts { duplicates, forwards, ..state.log.counts }
    }

    /// The requests since the last time, in the order in which they came: at most 100,000.
    pub fn take_requests(&self) -> Vec<Request> {
        self.state.lock().log.take()
    }

    /// How many requests [`FakeCluster::take_requests`] would give.
    pub fn requests_seen(&self) -> usize {
        self.state.lock().log.len()
    }

    /// The most requests that were under way at a node at one time.
    pub fn most_at_once(&self, node: NodeId) -> usize {
        self.state.lock().log.most_at_once(node)
    }

    /// The clients' connections that stand.
    pub fn connections(&self) -> usize {
        self.state.lock().links.count()
    }

    /// Changes the state, and tells those who follow the map, unless it is held.
    fn change<T>(&self, change: impl FnOnce(&mut Model) -> T) -> T {
        let mut state = self.state.lock();
        let changed = change(&mut state.model);
        if !state.map_is_held {
            let map = state.model.wire_map();
            self.published.send_replace(map);
        }
        changed
    }

    /// Serves one operation; `None` when there is never an answer.
    async fn serve(&self, node: NodeId, operation: Operation) -> Option<Answer> {
        self.state.lock().log.came(node, &operation);
        let answer = self.act(node, operation).await;
        self.state.lock().log.went(node);
        answer
    }

    async fn act(&self, node: NodeId, operation: Operation) -> Option<Answer> {
        let is_write = matches!(
            operation,
            Operation::Put(_)
                | Operation::Delete(_)
                | Operation::Write(_)
                | Operation::DeleteRange(_)
        );
        match self.next(node, is_write).await {
            Act::Refuse(refusal) => Some(Answer::Error(refusal.0.to_pipeline())),
            Act::LoseRequest => None,
            Act::LoseAnswer => {
                self.carry_out(node, &operation).await;
                None
            }
            Act::Cut => {
                self.cut(node);
                None
            }
            Act::ApplyAndCut => {
                self.carry_out(node, &operation).await;
                self.cut(node);
                None
            }
            Act::Serve
            | Act::Delay(_)
            | Act::Hold(_)
            | Act::CutAfterPages(_)
            | Act::RefuseAfterPages(..) => Some(self.carry_out(node, &operation).await),
        }
    }

    /// What becomes of a request that has come; waits as long as it is to wait.
    async fn next(&self, node: NodeId, is_write: bool) -> Act {
        let (delay, act) = self.state.lock().faults.next(node, is_write);
        if !delay.is_zero() {
            sleep(delay).await;
        }
        match &act {
            Act::Delay(delay) => sleep(*delay).await,
            Act::Hold(hold) => hold.released().await,
            _ => {}
        }
        let counts = &mut self.state.lock().log.counts;
        match &act {
            Act::Refuse(_) => counts.refused += 1,
            Act::LoseRequest | Act::Cut => counts.lost_requests += 1,
            Act::LoseAnswer | Act::ApplyAndCut => counts.lost_answers += 1,
            _ => {}
        }
        act
    }

    /// What becomes of a scan, or a delete-range in steps, that has come.
    async fn next_walk(&self, node: NodeId, operation: &Operation) -> Act {
        self.state.lock().log.came(node, operation);
        let is_write = matches!(operation, Operation::DeleteRange(_));
        let act = self.next(node, is_write).await;
        self.state.lock().log.went(node);
        act
    }

    /// What the script says of an init that has come.
    fn next_init(&self, node: NodeId) -> Option<Act> {
        self.state.lock().faults.scripted(node)
    }

    async fn carry_out(&self, node: NodeId, operation: &Operation) -> Answer {
        let patience = Instant::now() + CATCH_UP_MAX;
        loop {
            let served = self.state.lock().model.serve(node, operation);
            match served {
                Ok(answer) => return answer,
                Err(Missed::Refused(fault)) => return Answer::Error(fault.to_pipeline()),
                Err(Missed::Behind { at: Some(at), .. }) if at <= patience => sleep_until(at).await,
                Err(Missed::Behind { fault, .. }) => {
                    sleep_until(patience).await;
                    return Answer::Error(fault.to_pipeline());
                }
            }
        }
    }
}

impl Model {
    fn serve(&mut self, node: NodeId, operation: &Operation) -> Result<Answer, Missed> {
        self.check_made()?;
        let write = match operation.clone() {
            Operation::Get(get) => return self.get(node, &get),
            Operation::BatchGet(batch) => return self.batch_get(node, &batch),
            Operation::DeleteRange(range) => return Ok(self.delete_range(node, &range)?),
            Operation::Put(put) => Write::put(put)?,
            Operation::Delete(delete) => Write::delete(delete)?,
            Operation::Write(write) => Write::batch(write)?,
            _ => {
                let message = "an operation that a fake cluster does not know";
                return Err(Fault::new(Reason::Unsupported, message).into());
            }
        };
        Ok(self.write(node, &write)?)
    }
}

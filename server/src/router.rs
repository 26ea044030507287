//! Owns the way of a request on this node: to the group here, one hop on, or back with a reason. Does
//! not decide what follows a failure (see `attempts`) or what an operation asks for (see `plan`).
//!
//! A request enters the cluster at one node, which alone may pass it on and try again, until its
//! deadline and always under the same request id. Where it is passed on to, it is served or refused,
//! never passed on: stale maps cannot send it in circles.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits;
use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::shard_map::{META_SHARD, NodeId, ShardId, ShardMap};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_raft::clock::Clock;
use coracle_raft::group::Group;
use coracle_raft::host::Host;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt};
use prost::Message;
use tokio::time::Instant;

use crate::admission::{Admission, Call, Origin, Permit};
use crate::fault::{self, Leader};
use crate::load::Loads;
use crate::map::{MapCache, MapSource};
use crate::metrics::{Metrics, Reads, Stage, Stages};

mod answer;
mod attempts;
mod held;
mod ids;
mod page;
mod pin;
mod plan;
pub(crate) mod range;
mod read;
mod serve;
mod steps;
mod whom;

pub use ids::RequestIds;

pub(crate) use answer::{bytes as answer_bytes, pipelined};
use attempts::{Attempts, Next};
use held::Held;
pub(crate) use ids::Issued;
pub(crate) use page::{PAGE_BYTES_MIN, PageSpec, entry_bytes};
use plan::Plan;
pub(crate) use plan::keyspace as open_keyspace;
use steps::{Step, Steps};
use whom::{Trail, Whom, leader_in, leads, reads_here, whom};

/// What a forwarded request's answer needs to come back in.
const FORWARD_MARGIN: Duration = Duration::from_millis(10);
/// How long one forwarded attempt may take: a node that is paused or cut off answers nothing, and
/// within this time its shards have new leaders. Beyond: the attempt counts as lost.
const FORWARD_MAX: Duration = Duration::from_secs(2);
/// How long a look for a newer map may take.
const REFRESH_MAX: Duration = Duration::from_secs(1);
/// Shards that one `BatchGet` reads at a time.
const PARTS_AT_A_TIME: usize = 32;
/// How often a `BatchGet` is divided anew because shards have changed hands meanwhile.
const DIVISIONS_MAX: usize = 3;

/// Why a forwarded request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardError {
    /// It did not leave this node.
    NotSent(String),
    /// It may have been served.
    Lost(String),
}

/// The way of a request to another node.
pub trait Forwarder: Send + Sync + 'static {
    /// Hands an encoded `PipelineRequest` to a node and waits for the encoded `PipelineResponse`.
    fn forward(
        &self,
        to: NodeId,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, ForwardError>>;
}

/// Whether a shard takes writes at the moment.
pub trait WriteGate: Send + Sync + 'static {
    /// Refuses (`DISK_FULL`) while the disk of one of the shard's voters is under its reserve; what
    /// only deletes goes through.
    fn check(&self, shard: ShardId, only_deletes: bool) -> Result<(), Fault>;
}

/// What a router is made of.
pub struct Parts {
    /// This node.
    pub node: NodeId,
    /// The cached map.
    pub map: Arc<MapCache>,
    /// Where a newer one comes from.
    pub source: Arc<dyn MapSource>,
    /// The groups of this node.
    pub host: Arc<Host>,
    /// The way to the others.
    pub forwarder: Arc<dyn Forwarder>,
    /// The node's wall clock.
    pub clock: Arc<dyn Clock>,
    /// Refuses writes when disks are full.
    pub gate: Arc<dyn WriteGate>,
    /// Ids of writes that come without one.
    pub ids: Arc<RequestIds>,
    /// What the node takes on.
    pub admission: Arc<Admission>,
    /// Where things are counted.
    pub metrics: Arc<Metrics>,
    /// What each replica here has to do.
    pub loads: Arc<Loads>,
    /// Requests that take longer are logged (`observability.slow_request`).
    pub slow: Duration,
}

/// See the module.
pub struct Router {
    parts: Parts,
    stages: Stages,
    reads: Reads,
    /// One look for a newer map at a time; holds when the last one began.
    refreshing: tokio::sync::Mutex<Option<Instant>>,
}

impl Router {
    /// A router over its parts.
    pub fn new(parts: Parts) -> Arc<Router> {
        let (stages, reads) = (parts.metrics.stages(), parts.metrics.reads());
        Arc::new(Router { parts, stages, reads, refreshing: tokio::sync::Mutex::default() })
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.parts.node
    }

    /// The cached map.
    pub fn map(&self) -> &Arc<MapCache> {
        &self.parts.map
    }

    /// What the node takes on.
    pub fn admission(&self) -> &Arc<Admission> {
        &self.parts.admission
    }

    /// Where things are counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.parts.metrics
    }

    /// Ids of writes that come without one.
    pub(crate) fn ids(&self) -> &Arc<RequestIds> {
        &self.parts.ids
    }

    /// The node's wall clock in milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.parts.clock.now_ms()
    }

    /// Serves one operation, here or elsewhere.
    ///
    /// What seldom happens is boxed, here and below: an operation's future has room for all that may
    /// happen to it, and is made, moved and freed once for each operation.
    pub async fn execute(&self, mut operation: Operation, call: &Call) -> Result<Answer, Fault> {
        let (began, name) = (Instant::now(), name_of(&operation));
        let mut steps = Steps::default();
        let key_bytes = key_bytes(&operation);
        let result = match &mut operation {
            Operation::BatchGet(request) => {
                Box::pin(self.batch_get(request, call, &mut steps)).await
            }
            _ => {
                let empty = plan::request_id(&mut operation).filter(|id| id.is_none());
                // Held until the write is answered: the mark of later ones stays below it.
                let issued = empty.map(|id| {
                    let issued = self.parts.ids.issue();
                    *id = Some(issued.id);
                    issued
                });
                self.on_shard(&operation, call, issued.is_some(), &mut steps).await
            }
        };
        let took = began.elapsed();
        if took >= self.parts.slow {
            let reason = result.as_ref().err().map(|fault| fault.reason.as_str());
            self.parts.metrics.slow_requests.inc();
            let origin = call.origin;
            tracing::warn!(name, ?took, reason, key_bytes, ?origin, %steps, "slow request");
        }
        result
    }

    /// Serves what another node has passed on: an encoded `PipelineRequest`.
    pub fn serve_forwarded(
        self: &Arc<Self>,
        from: NodeId,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, String>> {
        let router = self.clone();
        Box::pin(async move {
            let size = body.len() as u64;
            let request = v1::PipelineRequest::decode(body);
            let request =
                request.map_err(|error| format!("node {from} sent no request: {error}"))?;
            let call = Call::forwarded(request.timeout_ms);
            let served = router.admitted(size, request.operation, &call).await;
            let result = served.map(|(answer, _permit)| answer);
            Ok(answer::pipelined(request.id, result).encode_to_vec().into())
        })
    }

    /// Takes an operation on, serves it, and hands back what its answer holds: for as long as the
    /// permit lives, the answer's bytes count.
    pub async fn admitted(
        &self,
        bytes: u64,
        operation: Option<Operation>,
        call: &Call,
    ) -> Result<(Answer, Permit), Fault> {
        let mut permit = self.parts.admission.admit(bytes, call.origin)?;
        let operation = operation.ok_or_else(|| {
            let message = "an operation of no kind, or of one that this version does not know";
            Fault::new(Reason::Unsupported, message)
        })?;
        let write = is_write(&operation);
        let answer = self.execute(operation, call).await?;
        // An applied write is answered whatever it costs: its answer is the only proof of it.
        match permit.charge(answer_bytes(&answer)) {
            Err(fault) if !write => Err(fault),
            _ => Ok((answer, permit)),
        }
    }

    /// Looks for a newer map. Who comes while another look is under way waits for the next one:
    /// what was written before the question is then found.
    pub async fn refresh(&self, deadline: Instant) {
        let asked = Instant::now();
        let look = async {
            let mut last = self.refreshing.lock().await;
            if last.is_none_or(|last| last < asked) {
                *last = Some(Instant::now());
                self.parts.source.refresh().await;
            }
        };
        // In time or not, the caller goes by what the cache holds then.
        let _ = tokio::time::timeout_at(deadline.min(asked + REFRESH_MAX), look).await;
    }

    /// The cached map, or the reason why there is none.
    pub fn current_map(&self) -> Result<Arc<ShardMap>, Fault> {
        let message = "the cluster has not been made yet: run `coracle init`";
        self.parts.map.current().ok_or_else(|| Fault::new(Reason::NotInitialized, message))
    }

    /// Keys of any shards, answered in the caller's order.
    async fn batch_get(
        &self,
        request: &v1::BatchGetRequest,
        call: &Call,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        limits::check_batch_get(&request.keys)?;
        // What is wrong with it is wrong for every shard.
        plan::freshness(request.read.as_ref(), META_SHARD, None)?;
        for _ in 1..DIVISIONS_MAX {
            match self.batch_get_once(request, call, steps).await {
                Err(fault) if fault.reason == Reason::StaleRoute && call.origin != Origin::Peer => {
                    self.refresh(call.deadline).await;
                }
                Err(fault) if fault.reason == Reason::UnknownKeyspace => {
                    self.refresh(call.deadline).await;
                }
                result => return result,
            }
        }
        self.batch_get_once(request, call, steps).await
    }

    async fn batch_get_once(
        &self,
        request: &v1::BatchGetRequest,
        call: &Call,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        let map = self.current_map()?;
        let keyspace = plan::keyspace(&map, &request.keyspace, call.origin)?;
        let mut parts: BTreeMap<ShardId, Vec<usize>> = BTreeMap::new();
        for (place, key) in request.keys.iter().enumerate() {
            parts.entry(map.locate_key(keyspace, key).id).or_default().push(place);
        }
        let parts: Vec<_> = parts.into_values().collect();
        let ask = |places: Vec<usize>| async move {
            let keys = places.iter().map(|place| request.keys[*place].clone()).collect();
            let (keyspace, read) = (request.keyspace.clone(), request.read.clone());
            let part = Operation::BatchGet(v1::BatchGetRequest { keyspace, keys, read });
            let mut steps = Steps::default();
            let answer = self.on_shard(&part, call, false, &mut steps).await;
            answer.map(|answer| (places, answer, steps))
        };
        let mut answers =
            stream::iter(parts.into_iter().map(ask)).buffer_unordered(PARTS_AT_A_TIME);
        let mut items = vec![v1::BatchGetItem::default(); request.keys.len()];
        let mut bytes = 0;
        while let Some(part) = answers.next().await {
            let (places, answer, its_steps) = part?;
            // The part that comes last is the one that was waited for.
            *steps = its_steps;
            bytes += answer_bytes(&answer) as usize;
            limits::check_batch_get_answer(bytes)?;
            let Answer::BatchGet(found) = answer else {
                return Err(mismatched());
            };
            if found.items.len() != places.len() {
                return Err(mismatched());
            }
            places.into_iter().zip(found.items).for_each(|(place, item)| items[place] = item);
        }
        Ok(Answer::BatchGet(v1::BatchGetResponse { items }))
    }

    /// Serves an operation of one shard, trying again for as long as that may help.
    async fn on_shard(
        &self,
        operation: &Operation,
        call: &Call,
        own_id: bool,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        let retries = call.origin != Origin::Peer && call.may_forward;
        let route_named = plan::route_named(operation);
        let mut attempts = Attempts::new(is_write(operation), own_id, retries, route_named);
        let mut trail = Trail::default();
        loop {
            let fault = match self.attempt(operation, call, &trail, attempts.made(), steps).await {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            };
            let shard = fault.number(metadata::SHARD).map(ShardId);
            let learned = self.learn(&fault, &mut trail);
            let stale = fault.reason == Reason::StaleRoute;
            match attempts.failed(fault, learned, call.left()) {
                Next::Fail(fault) => return Err(self.told(fault, retries)),
                Next::Again { pause } => {
                    let began = Instant::now();
                    Box::pin(async {
                        if stale {
                            self.refresh(call.deadline).await;
                        }
                        self.pause(shard, pause).await;
                    })
                    .await;
                    steps.add(Step::Pause, began.elapsed());
                }
            }
        }
    }

    /// Takes from a fault who leads and who does not answer. True when the next attempt goes to a
    /// leader that this request has not heard of.
    fn learn(&self, fault: &Fault, trail: &mut Trail) -> bool {
        let silent = fault.reason == Reason::Unreachable || fault.reason == Reason::Draining;
        trail.avoid = fault.number(metadata::NODE).map(NodeId).filter(|_| silent);
        trail.follow = None;
        // The replica here is too far behind, or finds no leader to vouch for it: the leader itself
        // is asked.
        trail.behind |= matches!(fault.reason, Reason::TooStale | Reason::NotLeader);
        let Some(leader) = fault::leader_of(fault) else {
            return false;
        };
        if let Some(shard) = fault.number(metadata::SHARD) {
            self.parts.map.observe_leader(ShardId(shard), leader.term, leader.node);
        }
        let news = leader.term > trail.term && leader.node != self.parts.node;
        if news {
            (trail.follow, trail.term) = (Some(leader.node), leader.term);
        }
        news
    }

    /// Waits, though not longer than until another leader of the shard is known.
    async fn pause(&self, shard: Option<ShardId>, pause: Duration) {
        if pause.is_zero() {
            return;
        }
        let hint = || {
            let map = self.parts.map.current()?;
            map.shard(shard?).map(|shard| (shard.leader, shard.leader_term))
        };
        let mut changes = self.parts.map.watch();
        let before = hint();
        let news = async { while hint() == before && changes.changed().await.is_ok() {} };
        // Without news the pause just ends.
        let _ = tokio::time::timeout(pause, news).await;
    }

    /// The last word: where this node has looked everywhere, "not here" means "nowhere".
    fn told(&self, fault: Fault, looked: bool) -> Fault {
        let nowhere = fault.reason == Reason::NotLeader && fault::leader_of(&fault).is_none();
        match fault.number(metadata::SHARD) {
            Some(shard) if nowhere && looked => {
                let map = self.parts.map.current();
                fault::no_quorum(map.as_deref(), ShardId(shard)).with_outcome(fault.outcome)
            }
            _ => fault,
        }
    }

    /// Asks the shard that the map names; and the one that holds the key by now, where a group here
    /// knows better than the map.
    async fn attempt(
        &self,
        operation: &Operation,
        call: &Call,
        trail: &Trail,
        number: u32,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        let asked = self.attempt_at(None, operation, call, trail, number, steps).await;
        let Err(Fault { reason: Reason::StaleRoute, .. }) = &asked else { return asked };
        Box::pin(self.refresh(call.deadline)).await;
        match self.held(operation, call) {
            None => asked,
            held => Box::pin(self.attempt_at(held, operation, call, trail, number, steps)).await,
        }
    }

    async fn attempt_at(
        &self,
        held: Option<Held>,
        operation: &Operation,
        call: &Call,
        trail: &Trail,
        number: u32,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        if call.left().is_zero() {
            self.stages.drop_late(Stage::Queue);
            return Err(fault::expired());
        }
        let (map, plan) = self.plan(held, operation, call).await?;
        let group = self.parts.host.group(plan.shard);
        // Most requests come to the leader: no more is asked of the group than that it leads.
        if let Some(group) = group.as_deref().filter(|group| trail.term == 0 && group.leads()) {
            return self.serve_here(&map, group, plan, call, steps).await;
        }
        let status = group.as_deref().map(Group::status);
        // A replica that has not heard from its leader since the node started would only wait.
        let waits = self.parts.admission.is_starting() && !plan.takes_anything();
        let here = plan.any_replica() && reads_here(status.as_ref(), trail, waits);
        let whom = match map.shard(plan.shard) {
            _ if here => Whom::Here,
            Some(shard) => whom(shard, self.parts.node, status.as_ref(), trail, number),
            None if status.as_ref().is_some_and(leads) => Whom::Here,
            None => Whom::Nobody,
        };
        let began = Instant::now();
        match (whom, group) {
            (Whom::Here, Some(group)) => {
                Box::pin(self.serve_here(&map, &group, plan, call, steps)).await
            }
            (Whom::Node(node), _) if call.may_forward => {
                let operation = plan::named(operation, &plan);
                let answer = Box::pin(self.forward(node, operation, plan.shard, call)).await;
                steps.add(Step::Forward(node), began.elapsed());
                answer
            }
            (_, _) => {
                let hinted = map.shard(plan.shard).and_then(|shard| {
                    Some(Leader { node: shard.leader?, term: shard.leader_term })
                });
                let leader = status.as_ref().and_then(leader_in).into_iter().chain(hinted);
                let leader = leader.filter(|leader| leader.node != self.parts.node);
                let leader = leader.max_by_key(|leader| leader.term);
                Err(fault::not_leader(Some(&map), plan.shard, leader))
            }
        }
    }

    async fn serve_here(
        &self,
        map: &ShardMap,
        group: &Group,
        plan: Plan,
        call: &Call,
        steps: &mut Steps,
    ) -> Result<Answer, Fault> {
        let began = Instant::now();
        let served = self.serve(map, group, plan, call, steps).await;
        if served.is_err() {
            steps.add(Step::Tried, began.elapsed());
        }
        served
    }

    /// Plans by the cached map; where that does not know the keyspace or the named shard, or the two
    /// contradict each other, by a newer one if there is one.
    async fn plan(
        &self,
        held: Option<Held>,
        operation: &Operation,
        call: &Call,
    ) -> Result<(Arc<ShardMap>, Plan), Fault> {
        let planned = |map: Arc<ShardMap>| {
            let plan = plan::plan(&map, operation, call.origin)?.of_held(held);
            let descriptor = self.parts.host.group(plan.shard).and_then(|group| group.descriptor());
            let epoch = map.shard(plan.shard).map(|shard| shard.epoch.0);
            let epoch = descriptor.as_ref().map(|descriptor| descriptor.epoch).or(epoch);
            plan::check_epoch(&map, &plan, epoch)?;
            // The group's own word is above the map's.
            let owned = descriptor.is_some_and(|descriptor| match plan.position {
                Some(position) => descriptor.owns(plan.keyspace.0, position),
                None => true,
            });
            if plan.differs_from(&map) && !owned {
                return Err(fault::stale_route(Some(&map), plan.shard, None));
            }
            Ok((map, plan))
        };
        match planned(self.current_map()?) {
            Err(fault)
                if fault.reason == Reason::UnknownKeyspace
                    || fault.reason == Reason::StaleRoute =>
            {
                Box::pin(self.refresh(call.deadline)).await;
                planned(self.current_map()?)
            }
            result => result,
        }
    }

    /// Passes an operation on. Without an answer nobody knows what became of it.
    async fn forward(
        &self,
        to: NodeId,
        operation: Operation,
        shard: ShardId,
        call: &Call,
    ) -> Result<Answer, Fault> {
        let left = call.left().min(FORWARD_MAX);
        let Some(timeout) = left.checked_sub(FORWARD_MARGIN).filter(|left| !left.is_zero()) else {
            self.stages.drop_late(Stage::Queue);
            return Err(fault::expired());
        };
        let timeout_ms = (timeout.as_millis() as u64).max(1);
        let request = v1::PipelineRequest { id: 0, timeout_ms, operation: Some(operation) };
        self.parts.metrics.forwarded_requests.inc();
        let body = Bytes::from(request.encode_to_vec());
        let answered = self.parts.forwarder.forward(to, body, left).await;
        let silent = |message: String| {
            Fault::new(Reason::Unreachable, message)
                .with(metadata::NODE, to)
                .with(metadata::SHARD, shard)
        };
        let body = answered.map_err(|error| match error {
            ForwardError::NotSent(why) => {
                silent(format!("node {to} is not reached: {why}")).with_outcome(Outcome::NotApplied)
            }
            ForwardError::Lost(why) => silent(format!("node {to} gave no answer: {why}")),
        })?;
        let response = v1::PipelineResponse::decode(body);
        let response =
            response.map_err(|error| silent(format!("node {to} gave no answer: {error}")))?;
        answer::unpipelined(response).map_err(|fault| match fault.reason {
            Reason::Draining => fault.with(metadata::NODE, to).with(metadata::SHARD, shard),
            _ => fault,
        })
    }
}

fn is_write(operation: &Operation) -> bool {
    match operation {
        Operation::Put(_)
        | Operation::Delete(_)
        | Operation::Write(_)
        | Operation::DeleteRange(_) => true,
        Operation::Get(_)
        | Operation::BatchGet(_)
        | Operation::Scan(_)
        | Operation::FixVersion(_)
        // Asked for again it is the same pin.
        | Operation::PinVersion(_) => false,
    }
}

/// As in logs.
fn name_of(operation: &Operation) -> &'static str {
    match operation {
        Operation::Get(_) => "get",
        Operation::Put(_) => "put",
        Operation::Delete(_) => "delete",
        Operation::Write(_) => "write",
        Operation::BatchGet(_) => "batch_get",
        Operation::Scan(_) => "scan",
        Operation::FixVersion(_) => "fix_version",
        Operation::DeleteRange(_) => "delete_range",
        Operation::PinVersion(_) => "pin_version",
    }
}

/// The length of the operation's first key: all of a key that a log ever shows.
fn key_bytes(operation: &Operation) -> usize {
    match operation {
        Operation::Get(request) => request.key.len(),
        Operation::Put(request) => request.key.len(),
        Operation::Delete(request) => request.key.len(),
        Operation::Write(request) => request.operations.first().map_or(0, |first| first.key.len()),
        Operation::BatchGet(request) => request.keys.first().map_or(0, Bytes::len),
        Operation::Scan(request) => request.start.len().max(request.prefix.len()),
        Operation::DeleteRange(request) => request.start.len().max(request.prefix.len()),
        Operation::FixVersion(_) | Operation::PinVersion(_) => 0,
    }
}

/// A peer's answer that does not fit the question.
pub(crate) fn mismatched() -> Fault {
    Fault::new(Reason::Internal, "an answer does not fit its question")
        .with_outcome(Outcome::Unknown)
}

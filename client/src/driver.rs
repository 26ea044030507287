//! Owns the only loop of the client: one logical call, attempt by attempt, until it has an answer,
//! or the decision (see `retry`) is to stop, or its deadline has passed. All waiting is here, no
//! policy is.
//!
//! What must hold for a write: all attempts carry one request id; once an attempt may have been
//! applied, the call is *unresolved*, and only an answer makes it resolved again. A call that ends
//! unresolved ends with the outcome "unknown", whatever the last attempt met.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::DropGuard;

use crate::budget::Budget;
use crate::error::{Error, ErrorKind, Report};
use crate::follow::Follower;
use crate::hedge::Hedging;
use crate::near::Near;
use crate::pipeline::{Pipeline, Reply, Tasks, WhenFull};
use crate::retry::{AttemptInfo, Decision, Failure, Step, decide};
use crate::route::{Leader, NoRoute, Route};
use crate::session::{Consistency, OpenWrite};
use crate::stats::Counters;
use crate::topology::{NodeId, ShardId};

mod nearest;

/// A node that owes an answer and says nothing for this long, to anybody, counts as down: longer than
/// any healthy node takes for the fastest of what it has to do.
pub(crate) const SILENCE: Duration = Duration::from_millis(500);

/// What all calls of a client share. Dropped with the client's last handle, which ends the
/// background tasks.
pub(crate) struct Driver {
    pub(crate) follower: Arc<Follower>,
    pub(crate) settings: Settings,
    pub(crate) counters: Counters,
    budget: Budget,
    near: Near,
    /// Of single keys, and of many.
    hedging: [Hedging; 2],
    tasks: Tasks,
    _stop: DropGuard,
}

/// How calls behave.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) operation_timeout: Duration,
    pub(crate) attempt_timeout: Duration,
    pub(crate) when_full: WhenFull,
    /// See `Builder::unsafe_fresh_request_ids_for_tests`.
    pub(crate) fresh_request_ids: bool,
    /// The client's own zone.
    pub(crate) zone: Option<String>,
    /// Whether a second replica may be asked where the first takes long.
    pub(crate) hedge_reads: bool,
}

/// One logical call.
pub(crate) struct Call {
    pub(crate) keyspace: Arc<str>,
    /// The key that decides where it goes.
    pub(crate) key: bytes::Bytes,
    /// Without route and request id: they are of each attempt.
    pub(crate) operation: Operation,
    /// `None` for the client's own.
    pub(crate) timeout: Option<Duration>,
    /// What a read asks for.
    pub(crate) consistency: Consistency,
    /// Whether a read may go to any replica, whatever it asks for.
    pub(crate) any_replica: bool,
}

impl Driver {
    pub(crate) fn new(follower: Follower, settings: Settings, tasks: Tasks) -> Driver {
        let follower = Arc::new(follower);
        let stop = tasks.stop.clone();
        let following = follower.clone().run();
        tasks.tracker.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = following => {}
            }
        });
        let stop = tasks.stop.clone().drop_guard();
        Driver {
            follower,
            settings,
            counters: Counters::default(),
            budget: Budget::new(Instant::now()),
            near: Near::default(),
            hedging: Default::default(),
            tasks,
            _stop: stop,
        }
    }

    /// Makes a call.
    pub(crate) async fn call(&self, call: Call) -> Result<Answer, Error> {
        Attempts::new(self, call).run().await
    }

    /// Waits for a first map.
    pub(crate) async fn ready(&self, until: Instant) -> Result<(), Error> {
        tokio::select! {
            biased;
            () = self.tasks.stop.cancelled() => Err(closed()),
            ready = self.follower.ready(until) => match ready {
                true => Ok(()),
                false => Err(self.no_map()),
            }
        }
    }

    fn no_map(&self) -> Error {
        let seeds = self.follower.seeds().join(", ");
        let why = self.follower.last_failure().unwrap_or_else(|| "no answer yet".to_owned());
        let message = format!("no node gave a shard map (seeds: {seeds}; last: {why})");
        Error::unsent(ErrorKind::Unavailable, message)
    }

    /// The shard of a key, as far as is known.
    pub(crate) fn shard_of(&self, keyspace: &str, key: &[u8]) -> Option<ShardId> {
        let route = self.follower.routes.table().route(keyspace, key);
        route.ok().map(|route| route.shard)
    }

    /// Ends the background tasks, and waits until they have ended.
    pub(crate) async fn close(&self) {
        self.tasks.stop.cancel();
        self.tasks.tracker.close();
        self.tasks.tracker.wait().await;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.tasks.stop.is_cancelled()
    }
}

pub(crate) fn closed() -> Error {
    Error::unsent(ErrorKind::Closed, "the client has been closed")
}

/// A logical call on its way.
struct Attempts<'a> {
    driver: &'a Driver,
    call: Call,
    deadline: Instant,
    is_write: bool,
    /// The write's request id, taken when the first attempt is about to be made.
    write: Option<OpenWrite>,
    /// An attempt may have been applied. Never goes back to false.
    unresolved: bool,
    attempts: u32,
    backoffs: u32,
    detours: u32,
    /// Whom to ask when nobody is known to lead.
    turn: usize,
    /// Where the next attempt goes, when that is decided.
    next: Option<NodeId>,
    /// Whom the next attempt leaves out, as long as there is a choice and no other leader is known
    /// than then.
    avoid: Option<(NodeId, Leader)>,
    /// Of a read that the leader need not serve, as long as the nearest replica is to be asked: those
    /// that were.
    tried: Option<Vec<NodeId>>,
    /// The map has been asked for again because it lacks the keyspace.
    looked_again: bool,
    /// The last attempt that had the time it needed: what it met says more than that a later one
    /// was cut short by the call's deadline.
    telling: Option<Setback>,
}

/// An attempt without the answer that was hoped for.
struct Setback {
    failure: Failure,
    fault: Fault,
    node: Option<NodeId>,
    /// The call's deadline came before the attempt's own.
    cut_short: bool,
}

impl<'a> Attempts<'a> {
    fn new(driver: &'a Driver, call: Call) -> Attempts<'a> {
        let now = Instant::now();
        driver.budget.earn(now);
        Counters::add(&driver.counters.calls);
        let is_write = matches!(
            call.operation,
            Operation::Put(_)
                | Operation::Delete(_)
                | Operation::Write(_)
                | Operation::DeleteRange(_)
        );
        let call_is_local = call.any_replica || call.consistency != Consistency::Linearizable;
        Attempts {
            deadline: now + call.timeout.unwrap_or(driver.settings.operation_timeout),
            driver,
            call,
            is_write,
            write: None,
            unresolved: false,
            attempts: 0,
            backoffs: 0,
            detours: 0,
            turn: (driver.follower.random() * f64::from(u16::MAX)) as usize,
            next: None,
            avoid: None,
            tried: (!is_write && call_is_local).then(Vec::new),
            looked_again: false,
            telling: None,
        }
    }

    async fn run(mut self) -> Result<Answer, Error> {
        loop {
            if self.driver.is_closed() {
                return Err(self.give_up(ErrorKind::Closed, "the client has been closed"));
            }
            let route = self.route().await?;
            if Instant::now() >= self.deadline {
                return Err(match self.telling.take() {
                    Some(setback) => self.error(&route, setback),
                    None => self.give_up(ErrorKind::TimedOut, "no time was left to ask a node"),
                });
            }
            let setback = match self.attempt(&route).await {
                Ok(answer) => return Ok(answer),
                Err(setback) => setback,
            };
            self.settle(&route, setback).await?;
        }
    }

    async fn route(&mut self) -> Result<Route, Error> {
        loop {
            let table = self.driver.follower.routes.table();
            match table.route(&self.call.keyspace, &self.call.key) {
                Ok(route) => return Ok(route),
                Err(NoRoute::Map) => self.driver.ready(self.deadline).await?,
                Err(NoRoute::Keyspace) if !self.looked_again => {
                    self.looked_again = true;
                    let follower = &self.driver.follower;
                    follower.refresh(table.maps(), None, self.deadline).await;
                }
                Err(NoRoute::Keyspace) => {
                    let message = format!("no keyspace {:?}", self.call.keyspace);
                    return Err(self.give_up(ErrorKind::NotFound, message));
                }
            }
        }
    }

    /// Asks one node once; of a read that any replica may serve, the nearest.
    async fn attempt(&mut self, route: &Route) -> Result<Answer, Setback> {
        if self.tried.is_some() {
            match self.attempt_nearest(route).await {
                Some(ended) => return ended,
                // Nobody is left but those who can always serve.
                None => self.tried = None,
            }
        }
        let follower = &self.driver.follower;
        let table = follower.routes.table();
        let avoid = self.avoid.filter(|(_, leader)| *leader == route.leader);
        let avoid = avoid.map(|(node, _)| node);
        let usable =
            |node| table.address(node).is_some_and(|address| follower.pool.is_usable(address));
        let node = self.next.take().or_else(|| route.choose(self.turn, avoid, usable));
        let pipeline = node
            .and_then(|node| table.address(node))
            .and_then(|address| follower.pool.get(address));
        let (Some(node), Some(pipeline)) = (node, pipeline) else {
            let message = match node {
                Some(node) => format!("the address of node {node} is not known"),
                None => format!("shard {} has no voter in the map", route.shard),
            };
            let fault = Fault::new(Reason::Unreachable, message).with_outcome(Outcome::NotApplied);
            return Err(Setback { failure: Failure::StaleRoute, fault, node, cut_short: false });
        };
        self.attempts = self.attempts.saturating_add(1);
        let operation = self.operation(route);
        let is_get = matches!(operation, Operation::Get(_));
        let started = Instant::now();
        let ended = self.exchange(Some(route), node, &pipeline, operation).await;
        if is_get && ended.is_ok() {
            self.driver.near.measured(node, started.elapsed(), Instant::now());
        }
        match ended {
            Ok(Answer::Error(error)) => {
                let fault = Fault::from_pipeline(&error);
                Err(self.judge(route, node, fault))
            }
            Ok(answer) => {
                self.learn(&answer);
                Ok(answer)
            }
            Err((failure, fault)) => {
                let cut_short = failure == Failure::TimedOut && Instant::now() >= self.deadline;
                Err(Setback { failure, fault, node: Some(node), cut_short })
            }
        }
    }

    /// Sends one operation and waits for its answer, the attempt's timeout, or, with the route by
    /// which the node was taken for the leader, news that another one leads the shard now: then the
    /// answer may never come, and waiting would only cost time.
    async fn exchange(
        &self,
        route: Option<&Route>,
        node: NodeId,
        pipeline: &Arc<Pipeline>,
        operation: Operation,
    ) -> Result<Answer, (Failure, Fault)> {
        let settings = &self.driver.settings;
        let started = Instant::now();
        let until = self.deadline.min(started + settings.attempt_timeout);
        // An unresolved write goes on until its outcome is known, so it waits in any case.
        let when_full = if self.unresolved { WhenFull::Wait } else { settings.when_full };
        let slot = match timeout_at(until, pipeline.slot(when_full)).await {
            Ok(Some(slot)) => slot,
            Ok(None) => {
                let message = format!("the pipeline to node {node} is full");
                return Err((Failure::Fatal, Fault::new(Reason::Overloaded, message)));
            }
            Err(_) => return Err((Failure::TimedOut, self.no_answer(pipeline, started, false))),
        };
        Counters::add(&self.driver.counters.requests);
        let mut ticket = pipeline.submit(slot, operation, until - Instant::now());
        let routes = &self.driver.follower.routes;
        let superseded = async {
            match route {
                Some(route) => routes.leader_after(route.shard, route.leader, Some(node)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            reply = ticket.answer() => match reply {
                Reply::Answer(answer) => Ok(answer),
                Reply::Broken { left, why } => {
                    let message = format!("no answer from {}: {}",
                        pipeline.connection().address(), why.message());
                    let fault = Fault::new(Reason::Unreachable, message)
                        .with_outcome(outcome_of(left));
                    Err((Failure::Unavailable, fault))
                }
            },
            () = superseded => {
                let left = ticket.withdraw();
                let fault = Fault::new(Reason::NotLeader, format!("node {node} no longer leads"))
                    .with_outcome(outcome_of(left));
                Err((Failure::LeaderChanged, fault))
            }
            () = sleep_until(until) => {
                let left = ticket.withdraw();
                Err((Failure::TimedOut, self.no_answer(pipeline, started, left)))
            }
        }
    }

    /// An attempt has run out of time. A node from which nothing at all has come meanwhile counts as
    /// down, so that other calls ask elsewhere at once.
    fn no_answer(&self, pipeline: &Pipeline, started: Instant, left: bool) -> Fault {
        let connection = pipeline.connection();
        // A caller in a hurry says nothing about the node.
        let is_long = started.elapsed() >= SILENCE.min(self.driver.settings.attempt_timeout);
        if is_long && connection.is_silent_since(started) {
            connection.failed();
        }
        let message = format!("no answer from {} in time", connection.address());
        match left {
            true => Fault::new(Reason::OutcomeUnknown, message),
            false => Fault::new(Reason::DeadlineNotApplied, message),
        }
    }

    /// The operation as this attempt sends it: with the route that it relies on, and the write's
    /// request id.
    fn operation(&mut self, route: &Route) -> Operation {
        if self.driver.settings.fresh_request_ids {
            self.write = None;
        }
        if self.is_write && self.write.is_none() {
            self.write = Some(self.driver.follower.session.open());
        }
        let id = self.write.as_ref().map(|write| {
            let id = write.id();
            v1::RequestId {
                client: id.client,
                sequence: id.sequence,
                birth: id.birth,
                lowest_unanswered: write.lowest_unanswered(),
            }
        });
        let shard = route.shard;
        let route = Some(v1::Route { shard: route.shard.0, shard_epoch: route.epoch });
        let mut operation = self.call.operation.clone();
        match &mut operation {
            Operation::Get(get) => {
                get.route = route;
                get.read = get.read.take().or_else(|| self.read_options(Some(shard)));
            }
            // Without a route of its own; so are the next ones, which are between nodes.
            Operation::BatchGet(get) => {
                get.read = get.read.take().or_else(|| self.read_options(None));
            }
            Operation::Scan(_) | Operation::FixVersion(_) | Operation::PinVersion(_) => {}
            Operation::Put(put) => (put.route, put.request_id) = (route, id),
            Operation::Delete(delete) => (delete.route, delete.request_id) = (route, id),
            Operation::Write(write) => (write.route, write.request_id) = (route, id),
            Operation::DeleteRange(delete) => (delete.only_shard, delete.request_id) = (route, id),
        }
        operation
    }

    /// `shard` is the only one that may answer; without it the node divides the keys by its own map.
    fn read_options(&self, shard: Option<ShardId>) -> Option<v1::ReadOptions> {
        let session = &self.driver.follower.session;
        let (consistency, session) = match (self.call.consistency, shard) {
            (Consistency::Linearizable, _) => return None,
            (Consistency::Session, Some(shard)) => {
                (v1::Consistency::Session, session.token_for(shard))
            }
            (Consistency::Session, None) => {
                (v1::Consistency::Session, session.mark().as_bytes().clone())
            }
            (Consistency::Bounded(_), _) => (v1::Consistency::Bounded, bytes::Bytes::new()),
            (Consistency::Any, _) => (v1::Consistency::Any, bytes::Bytes::new()),
        };
        let max_staleness_ms = match self.call.consistency {
            // Rounded down: never older than asked for.
            Consistency::Bounded(bound) => u64::try_from(bound.as_millis()).unwrap_or(u64::MAX),
            _ => 0,
        };
        let consistency = consistency.into();
        Some(v1::ReadOptions { consistency, session, max_staleness_ms, ..Default::default() })
    }

    /// Takes from an answer who leads, what time it is, and what was seen.
    fn learn(&self, answer: &Answer) {
        let version = |entry: Option<&v1::Entry>| entry.map_or(0, |entry| entry.version);
        let (served, version) = match answer {
            Answer::Get(response) => (response.served.as_ref(), version(response.entry.as_ref())),
            Answer::Put(response) => (response.served.as_ref(), response.version),
            Answer::Delete(response) => (response.served.as_ref(), response.version),
            Answer::Write(response) => (response.served.as_ref(), response.version),
            Answer::DeleteRange(response) => (response.served.as_ref(), response.version),
            Answer::BatchGet(response) => {
                let session = &self.driver.follower.session;
                for item in &response.items {
                    let version = version(item.entry.as_ref());
                    item.served.iter().for_each(|served| session.observe(served, version));
                }
                (response.items.first().and_then(|item| item.served.as_ref()), 0)
            }
            Answer::Scan(_) | Answer::FixVersion(_) | Answer::PinVersion(_) | Answer::Error(_) => {
                return;
            }
        };
        let Some(served) = served else { return };
        self.driver.follower.session.observe(served, version);
        self.driver.follower.session.saw_server_time(served.server_time_ms);
        let (shard, node) = (ShardId(served.shard), NodeId(served.node));
        if served.leader {
            self.driver.follower.routes.saw_leader(shard, node, served.term, true);
        } else {
            // It serves, but whoever took it for the leader looks for the right one.
            self.driver.follower.routes.saw_follower(shard, node);
        }
    }

    /// Takes from a node's refusal what it says of the cluster, and sorts it for the decision.
    fn judge(&self, route: &Route, asked: NodeId, fault: Fault) -> Setback {
        let follower = &self.driver.follower;
        if let Some(time) = fault.number(metadata::SERVER_TIME_MS) {
            follower.session.saw_server_time(time);
        }
        let shard = fault.number(metadata::SHARD).map_or(route.shard, ShardId);
        let leader = fault.number(metadata::LEADER_NODE).filter(|node| *node != 0).map(NodeId);
        match (fault.reason, fault.number(metadata::EPOCH)) {
            (Reason::NotLeader, _) => follower.routes.saw_follower(shard, asked),
            (Reason::StaleRoute, Some(epoch)) => follower.routes.saw_epoch(shard, epoch),
            _ => {}
        }
        if let Some(leader) = leader {
            if let Some(address) = fault.text(metadata::LEADER_ADDR) {
                follower.routes.saw_address(leader, address);
            }
            if let Some(term) = fault.number(metadata::LEADER_TERM) {
                follower.routes.saw_leader(shard, leader, term, false);
            }
        }
        let table = follower.routes.table();
        let can_be_asked = |node: &NodeId| {
            let address = table.address(*node);
            *node != asked && address.is_some_and(|address| follower.pool.is_usable(address))
        };
        let failure = Failure::of(fault.reason, leader.filter(can_be_asked));
        Setback { failure, fault, node: Some(asked), cut_short: false }
    }

    /// Decides what follows from a failed attempt, and prepares it, waits included.
    async fn settle(&mut self, route: &Route, setback: Setback) -> Result<(), Error> {
        // That the window has passed says nothing of this attempt: it was refused. Whether an
        // earlier one was applied is what cannot be told.
        let refused = setback.failure == Failure::WindowPassed;
        if self.is_write && !refused && setback.fault.outcome == Outcome::Unknown {
            self.unresolved = true;
        }
        let now = Instant::now();
        let retry_after_ms = setback.fault.retry_after_ms;
        let step = decide(&AttemptInfo {
            failure: setback.failure,
            backoffs: self.backoffs,
            detours: self.detours,
            unresolved: self.unresolved,
            budget: self.driver.budget.has_token(now),
            retry_after: (retry_after_ms > 0).then(|| Duration::from_millis(retry_after_ms)),
            remaining: self.deadline.saturating_duration_since(now),
            jitter: self.driver.follower.random(),
        });
        tracing::debug!(
            shard = route.shard.0,
            node = setback.node.map(|node| node.0),
            attempt = self.attempts,
            failure = %setback.fault,
            ?step,
            "attempt failed"
        );
        if step.decision == Decision::Stop {
            let telling = match setback.cut_short {
                true => self.telling.take().unwrap_or(setback),
                false => setback,
            };
            return Err(self.error(route, telling));
        }
        if step.paid {
            self.driver.budget.spend(now);
        }
        self.pause(route, &setback, step).await;
        self.prepare(route, &setback, step.decision).await;
        self.telling = Some(setback);
        Ok(())
    }

    /// Waits as decided; when it is for somebody to serve at all, until somebody is known to.
    async fn pause(&mut self, route: &Route, setback: &Setback, step: Step) {
        if step.wait.is_zero() {
            self.detours = self.detours.saturating_add(1);
            return;
        }
        self.detours = 0;
        self.backoffs = self.backoffs.saturating_add(1);
        let leader_known =
            self.driver.follower.routes.leader_after(route.shard, route.leader, None);
        match setback.failure {
            Failure::Unavailable | Failure::NotLeader { .. } => tokio::select! {
                biased;
                () = leader_known => {}
                () = sleep(step.wait) => {}
            },
            _ => sleep(step.wait).await,
        }
    }

    async fn prepare(&mut self, route: &Route, setback: &Setback, decision: Decision) {
        self.avoid = None;
        match decision {
            Decision::SameNode => self.next = setback.node,
            Decision::OtherReplica => {
                self.avoid = setback.node.map(|node| (node, route.leader));
                self.turn = self.turn.wrapping_add(1);
            }
            Decision::Redirect(node) => self.next = Some(node),
            Decision::RefreshRoute => {
                let follower = &self.driver.follower;
                let table = follower.routes.table();
                let preferred = setback.node.and_then(|node| table.address(node));
                let until = self.deadline;
                follower.refresh(table.maps(), preferred, until).await;
            }
            Decision::FreshRequestId => {
                assert!(!self.unresolved, "an unresolved write keeps its request id");
                // The old id is closed first: nothing is sent under it any more.
                self.write = None;
            }
            Decision::Stop => {}
        }
    }

    fn error(&self, route: &Route, setback: Setback) -> Error {
        Error::new(Report {
            kind: ErrorKind::of(setback.fault.reason),
            outcome: self.outcome(setback.fault.outcome),
            message: setback.fault.message.clone(),
            is_write: self.is_write,
            shard: Some(route.shard),
            node: setback.node,
            attempts: self.attempts,
            request_id: self.write.as_ref().map(OpenWrite::id),
            fault: Some(setback.fault),
        })
    }

    /// Ends without another attempt.
    fn give_up(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(Report {
            kind,
            outcome: self.outcome(Outcome::NotApplied),
            message: message.into(),
            is_write: self.is_write,
            shard: None,
            node: None,
            attempts: self.attempts,
            request_id: self.write.as_ref().map(OpenWrite::id),
            fault: None,
        })
    }

    /// What is known of the whole call, when its last attempt says `last` of itself.
    fn outcome(&self, last: Outcome) -> Outcome {
        match last {
            _ if !self.is_write => Outcome::NotApplied,
            Outcome::Applied => Outcome::Applied,
            _ if self.unresolved => Outcome::Unknown,
            _ => Outcome::NotApplied,
        }
    }
}

fn outcome_of(left: bool) -> Outcome {
    match left {
        true => Outcome::Unknown,
        false => Outcome::NotApplied,
    }
}

//! The way of a write into a group's log: everything that waits becomes one entry.
//!
//! Owns the queue, the stamps and the answers. Does not judge conditions or duplicates: that is
//! `apply`, after the entry is committed.
//!
//! One task per group takes all waiting writes, stamps them with the leader's clock and proposes
//! them as one entry; a few entries are under way at a time, so that while one is being synced the
//! next fills up. Each write is answered exactly once: *not applied* only where the entry certainly
//! was not appended, with its result where it was applied, and *unknown* for everything between.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::Mutant;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::impls::ProgressResponder;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::Reply;
use crate::clock::{CEILING_AHEAD, Circumstances, Clock, HybridTime};
use crate::command::{Command, Request, Stamped};
use crate::error::{GroupError, Outcome};
use crate::leadership::{Leadership, Raft};
use crate::observer::{Observer, Stage};
use crate::state_machine::SharedState;
use crate::types::{Position, Proposal, Replies, log_id};

/// Bytes of writes that may wait for one group. A proposal that waits for more than this stands
/// behind several seconds of disk; beyond it the answer is `Overloaded`, not applied.
const QUEUE_BYTES_MAX: usize = 16 << 20;
/// Bytes of one entry: what one message to a follower carries at a time.
const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Requests of one entry: bounds the time that one apply takes.
const ENTRY_REQUESTS_MAX: usize = 1_024;
/// Entries under way at a time: enough to keep the disk and the network busy at once, few enough
/// that what waits gathers into large entries.
const ENTRIES_IN_FLIGHT_MAX: usize = 8;
/// How often the log is asked again for room when it had none.
const ROOM_POLL: Duration = Duration::from_millis(5);
/// How long a leader without a finished first entry of its term keeps writes waiting.
const FIRST_ENTRY_WAIT: Duration = Duration::from_millis(20);

type Answer = oneshot::Sender<Result<Written, GroupError>>;

/// A write that was applied, and where its time went.
#[derive(Debug, Clone)]
pub struct Written {
    /// What became of it.
    pub reply: Reply,
    /// It waited so long until it was part of an entry.
    pub queued: Duration,
    /// From then until the entry was applied here.
    pub replicated: Duration,
}

struct Waiting {
    request: Request,
    bytes: usize,
    deadline: Instant,
    queued: Instant,
    answer: Answer,
}

enum Item {
    Write(Waiting),
    /// Entries that carry no request: the group's own. Stamped above a version; 0: above what is usual.
    Own(Command, u64, oneshot::Sender<Result<Replies, GroupError>>),
    /// Fixes a version for reads: later stamps lie above it.
    Fix {
        version: Option<u64>,
        answer: oneshot::Sender<Result<u64, GroupError>>,
    },
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    bytes: usize,
    closed: bool,
}

/// The handle: hands writes to the task.
#[derive(Clone)]
pub(crate) struct Proposer {
    queue: Arc<Mutex<Queue>>,
    wake: Arc<Notify>,
}

impl Proposer {
    /// The handle, and the task to spawn.
    pub(crate) fn new(
        raft: Raft,
        leadership: Leadership,
        state: SharedState,
        environment: Arc<dyn Circumstances>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let handle = Self { queue: Arc::default(), wake: Arc::default() };
        let task = Task {
            handle: handle.clone(),
            raft,
            leadership,
            state,
            clock: environment.clock(),
            observer: environment.observer(),
            environment,
            stamps: Stamps::default(),
        };
        (handle, task.run(stop))
    }

    /// Queues a write and waits for its result. When `deadline` passes before it was proposed, it
    /// is not applied; afterwards the outcome is unknown.
    pub(crate) async fn write(
        &self,
        request: Request,
        deadline: Instant,
    ) -> Result<Written, GroupError> {
        let bytes = request.weight();
        let (answer, receiver) = oneshot::channel();
        self.push(
            bytes,
            Item::Write(Waiting { request, bytes, deadline, queued: Instant::now(), answer }),
        )?;
        match tokio::time::timeout_at(deadline, receiver).await {
            Ok(Ok(result)) => result,
            // The task answers everything that it ever took; a dropped answer means that it was
            // torn down with entries under way.
            Ok(Err(_)) => Err(GroupError::Unknown("the group stopped".to_owned())),
            Err(_) if Mutant::UnknownIsNotApplied.is_in() => Err(GroupError::Expired),
            Err(_) => Err(GroupError::Unknown("the deadline passed".to_owned())),
        }
    }

    /// Proposes a command of the group's own and waits until it is applied.
    pub(crate) async fn own(&self, command: Command) -> Result<Replies, GroupError> {
        self.own_above(0, command).await
    }

    /// The same, stamped above a version, as is all that comes later: also before it is applied here, and on
    /// another replica is already.
    pub(crate) async fn own_above(
        &self,
        version: u64,
        command: Command,
    ) -> Result<Replies, GroupError> {
        let (answer, receiver) = oneshot::channel();
        self.push(64, Item::Own(command, version, answer))?;
        receiver.await.unwrap_or(Err(GroupError::Stopped))
    }

    /// Fixes `version`, or the newest one, for reads: every write that is proposed from now on gets
    /// a higher version, under this leader or any later one. The caller then waits until the log's
    /// last entry of this moment is applied, and reads.
    pub(crate) async fn fix(&self, version: Option<u64>) -> Result<u64, GroupError> {
        let (answer, receiver) = oneshot::channel();
        self.push(64, Item::Fix { version, answer })?;
        receiver.await.unwrap_or(Err(GroupError::Stopped))
    }

    fn push(&self, bytes: usize, item: Item) -> Result<(), GroupError> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(GroupError::Stopped);
        }
        if queue.bytes + bytes > QUEUE_BYTES_MAX {
            return Err(GroupError::Overloaded { retry_after: Duration::from_millis(100) });
        }
        queue.bytes += bytes;
        queue.items.push_back(item);
        drop(queue);
        self.wake.notify_one();
        Ok(())
    }
}

/// What the next stamp must lie above. Starts anew with every term.
#[derive(Default)]
struct Stamps {
    term: u64,
    last: u64,
    /// The highest ceiling that is committed, as far as this leader knows: versions up to it may
    /// be served.
    committed_ceiling: u64,
}

struct Task {
    handle: Proposer,
    raft: Raft,
    leadership: Leadership,
    state: SharedState,
    clock: Arc<dyn Clock>,
    observer: Arc<dyn Observer>,
    environment: Arc<dyn Circumstances>,
    stamps: Stamps,
}

impl Task {
    async fn run(mut self, stop: CancellationToken) {
        let mut under_way = FuturesUnordered::new();
        loop {
            // Without room in the log an entry would hold up the group's core, heartbeats included.
            let mut log_has_room = true;
            while under_way.len() < ENTRIES_IN_FLIGHT_MAX {
                log_has_room = self.environment.log_has_room();
                if !log_has_room {
                    self.refuse_unless_leading();
                    break;
                }
                match self.step().await {
                    Some(entry) => under_way.push(entry),
                    None => break,
                }
            }
            let room = under_way.len() < ENTRIES_IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(_) = under_way.next(), if !under_way.is_empty() => {}
                () = self.handle.wake.notified(), if room && log_has_room => {}
                () = tokio::time::sleep(ROOM_POLL), if !log_has_room => {}
            }
        }
        let items = {
            let mut queue = self.handle.queue.lock();
            queue.closed = true;
            std::mem::take(&mut queue.items)
        };
        for item in items {
            refuse(item, &GroupError::Stopped);
        }
    }

    /// Takes what waits and proposes it; the future that is returned answers when it is applied.
    async fn step(&mut self) -> Option<futures_util::future::BoxFuture<'static, ()>> {
        let mut items = self.take();
        if items.is_empty() {
            return None;
        }
        let term = match self.ready().await {
            Ok(term) => term,
            Err(error) => {
                items.into_iter().for_each(|item| refuse(item, &error));
                return Some(Box::pin(std::future::ready(())));
            }
        };
        if matches!(items.first(), Some(Item::Fix { .. })) {
            let Some(Item::Fix { version, answer }) = items.pop() else {
                unreachable!("an item that is not a write is taken alone")
            };
            return Some(self.fix(term, version, answer).await);
        }
        let mut answers = Vec::with_capacity(items.len());
        let mut requests = Vec::with_capacity(items.len());
        let mut own = None;
        let now = Instant::now();
        for item in items {
            match item {
                Item::Write(waiting) if waiting.deadline <= now => {
                    let _ = waiting.answer.send(Err(GroupError::Expired));
                }
                Item::Write(waiting) => {
                    let queued = now.duration_since(waiting.queued);
                    self.observer.stage(Stage::Queue, queued);
                    requests.push(waiting.request);
                    answers.push((waiting.answer, queued));
                }
                Item::Own(command, above, answer) => own = Some((command, above, answer)),
                Item::Fix { .. } => unreachable!("an item that is not a write is taken alone"),
            }
        }
        if let Some((command, above, answer)) = own {
            self.stamps.last = self.stamps.last.max(above);
            let result = self.propose(term, command, 0).await;
            return Some(Box::pin(async move {
                let _ = answer.send(applied(result).await);
            }));
        }
        if requests.is_empty() {
            return Some(Box::pin(std::future::ready(())));
        }
        let result = self.propose(term, Command::Requests(requests), 0).await;
        self.observer.stage(Stage::Propose, now.elapsed());
        let observer = self.observer.clone();
        Some(Box::pin(async move {
            let result = applied(result).await;
            let replicated = now.elapsed();
            observer.stage(Stage::Replicate, replicated);
            answer_all(answers, result, replicated);
        }))
    }

    /// What waits for room waits in vain where another leads, and was certainly not proposed.
    fn refuse_unless_leading(&self) {
        let Err(error) = self.leads() else { return };
        loop {
            let items = self.take();
            if items.is_empty() {
                return;
            }
            items.into_iter().for_each(|item| refuse(item, &error));
        }
    }

    /// The next writes that fit one entry, or one item of another kind alone.
    fn take(&self) -> Vec<Item> {
        let mut queue = self.handle.queue.lock();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(item) = queue.items.front() {
            let size = match item {
                Item::Write(waiting) => waiting.bytes,
                Item::Own(..) | Item::Fix { .. } => {
                    if taken.is_empty() {
                        queue.bytes -= 64;
                        taken.extend(queue.items.pop_front());
                    }
                    break;
                }
            };
            let full = bytes + size > ENTRY_BYTES_MAX || taken.len() == ENTRY_REQUESTS_MAX;
            if full && !taken.is_empty() {
                break;
            }
            bytes += size;
            queue.bytes -= size;
            taken.extend(queue.items.pop_front());
        }
        taken
    }

    /// The term in which this replica leads and may stamp: it has applied its term's first entry,
    /// so it knows every ceiling and version of the terms before.
    async fn ready(&mut self) -> Result<u64, GroupError> {
        let term = self.leads()?;
        if self.state.applied().term < term {
            // Elected just now: the first entry is under way.
            self.state.wait_for_term(term, FIRST_ENTRY_WAIT).await;
            if self.state.applied().term < term {
                return Err(GroupError::NotLeader { leader: None });
            }
        }
        if self.stamps.term != term {
            let group = self.state.clock_and_ceiling();
            self.stamps = Stamps {
                term,
                last: match Mutant::IgnoresCeilings.is_in() {
                    true => group.clock,
                    false => group.clock.max(group.ceiling),
                },
                committed_ceiling: group.ceiling,
            };
        }
        self.clock.check()?;
        Ok(term)
    }

    fn leads(&self) -> Result<u64, GroupError> {
        if !self.environment.healthy() {
            // Entries would renew the followers' leases and pile up before the disk: leadership is
            // to go where a disk works.
            return Err(GroupError::NotLeader { leader: None });
        }
        self.leadership.leads()
    }

    fn now(&self) -> u64 {
        HybridTime::at_ms(self.clock.now_ms()).0
    }

    async fn propose(
        &mut self,
        term: u64,
        command: Command,
        ceiling_min: u64,
    ) -> Result<Proposed, GroupError> {
        let stamp = self.now().max(self.stamps.last + 1);
        let ceiling = (stamp + CEILING_AHEAD).max(ceiling_min);
        self.stamps.last = stamp;
        let proposal = Proposal(Stamped { stamp, ceiling, command }.encode());
        let (responder, receiver) = ProgressResponder::complete_only();
        let leader = log_id(Position { term, index: 0 }).leader_id;
        // Only in this term: in another one these stamps promise nothing.
        let sent = self.raft.write(proposal).with_leader(leader).responder(responder).await;
        sent.map_err(|fatal| GroupError::Unknown(fatal.to_string()))?;
        Ok(Proposed { receiver })
    }

    /// See [`Proposer::fix`]. Versions up to the committed ceiling need nothing but that later
    /// stamps lie above; beyond it, an entry raises the ceiling first.
    async fn fix(
        &mut self,
        term: u64,
        version: Option<u64>,
        answer: oneshot::Sender<Result<u64, GroupError>>,
    ) -> futures_util::future::BoxFuture<'static, ()> {
        let group = self.state.clock_and_ceiling();
        self.stamps.committed_ceiling = self.stamps.committed_ceiling.max(group.ceiling);
        let newest = self.now().max(self.stamps.last).max(group.clock);
        let version = version.unwrap_or(newest);
        // Measured from this node's clock, not from what earlier readers fixed: else repeated
        // questions would carry the group's clock away.
        if version > newest.max(self.now() + HybridTime::BOUND) {
            let _ = answer.send(Err(GroupError::ClockOutOfBound));
            return Box::pin(std::future::ready(()));
        }
        if !Mutant::FixesNothing.is_in() {
            self.stamps.last = self.stamps.last.max(version);
        }
        if version <= self.stamps.committed_ceiling {
            let _ = answer.send(Ok(version));
            return Box::pin(std::future::ready(()));
        }
        let result = self.propose(term, Command::Advance, version).await;
        Box::pin(async move {
            let _ = answer.send(applied(result).await.map(|_| version));
        })
    }
}

struct Proposed {
    receiver: openraft::alias::OneshotReceiverOf<
        crate::types::TypeConfig,
        openraft::raft::ClientWriteResult<crate::types::TypeConfig>,
    >,
}

/// Waits until the entry is applied, or until it is certain or doubtful that it is not.
async fn applied(proposed: Result<Proposed, GroupError>) -> Result<Replies, GroupError> {
    use openraft::errors::ClientWriteError;
    match proposed?.receiver.await {
        Ok(Ok(response)) => Ok(response.data),
        Ok(Err(ClientWriteError::ForwardToLeader(forward))) => {
            Err(GroupError::NotLeader { leader: forward.leader_node.map(|place| place.node) })
        }
        Ok(Err(error)) => Err(GroupError::Unknown(error.to_string())),
        Err(_) => Err(GroupError::Unknown("the group stopped".to_owned())),
    }
}

fn answer_all(
    answers: Vec<(Answer, Duration)>,
    result: Result<Replies, GroupError>,
    replicated: Duration,
) {
    match result {
        Ok(mut replies) => {
            if Mutant::SwapsAnswers.is_in() {
                replies.0.reverse();
            }
            assert_eq!(
                replies.0.len(),
                answers.len(),
                "apply gives every request of an entry exactly one reply"
            );
            for ((answer, queued), reply) in answers.into_iter().zip(replies.0) {
                // A caller whose deadline passed is gone; it knows its outcome as unknown.
                let _ = answer.send(Ok(Written { reply, queued, replicated }));
            }
        }
        Err(error) => {
            for (answer, _) in answers {
                let _ = answer.send(Err(error.clone()));
            }
        }
    }
}

fn refuse(item: Item, error: &GroupError) {
    assert!(error.outcome() == Outcome::NotApplied, "what was never proposed was not applied");
    match item {
        Item::Write(waiting) => drop(waiting.answer.send(Err(error.clone()))),
        Item::Own(_, _, answer) => drop(answer.send(Err(error.clone()))),
        Item::Fix { answer, .. } => drop(answer.send(Err(error.clone()))),
    }
}

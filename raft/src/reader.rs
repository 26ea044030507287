//! The way of a read: a point in the log that it must not be behind, a wait, one look at the state.
//!
//! Owns the batching of reads. One check of the leader, or one question to it, serves every read that
//! arrived before it was made, and no other: after a pause a deposed leader must not answer late
//! comers from an old check. Peers' questions wait in the same batches as the leader's own reads.
//! Where a point comes from is `read_point`'s business.

use std::sync::Arc;
use std::time::Duration;

use coracle_storage::exec::Exec;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::GroupError;
use crate::looks::{Look, Looks};
use crate::message::Answer;
use crate::observer::ReadWay;
use crate::read_point::{Age, Fixed, ReadPoints, refusal_of};
use crate::state_machine::{ReadState, SharedState};

/// Reads and peers' questions that may wait for one group: each holds a closure of about a kilobyte.
/// Beyond it the answer is `Overloaded`.
const READS_WAITING_MAX: usize = 8_192;
/// Read points asked for at a time: the next batch need not wait for the heartbeats of the last.
const BATCHES_UNDER_WAY_MAX: usize = 4;
/// How long a replica that does not lead may take to apply what a read has to hold: a few
/// heartbeats, by which it hears what is committed. Beyond it the answer is `TooStale`, and the
/// leader can be asked.
const CATCH_UP_MAX: Duration = Duration::from_millis(250);

/// Batches whose version is being fixed: a leader that cannot commit answers none of them. Beyond it
/// the answer is `Overloaded`.
const FIXES_UNDER_WAY_MAX: usize = 64;
/// When to come back after `Overloaded`.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// After a read has waited in vain, others do not wait for so long, unless what it waited for has
/// come: a replica that is far behind must not delay every read that meets it.
const LAG_KNOWN: Duration = Duration::from_secs(1);

type Sender<T> = oneshot::Sender<Result<T, GroupError>>;

struct Waiting {
    deadline: Instant,
    look: Look,
}

enum Item {
    Read(Waiting),
    /// A version to fix, the newest, for a read of this node.
    Fix(Sender<Fixed>),
    /// The same for a read of a peer: it is not passed on.
    FixForPeer(Sender<Fixed>),
    /// A point for a peer's reads.
    PointForPeer(Sender<u64>),
    /// The point alone, for bounded reads to come.
    Refresh,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Item>,
    /// A refresh waits, or is under way.
    refreshing: bool,
    closed: bool,
}

/// The handle: hands reads to the task.
#[derive(Clone)]
pub(crate) struct Reads {
    queue: Arc<Mutex<Queue>>,
    wake: Arc<Notify>,
    state: SharedState,
    exec: Arc<dyn Exec>,
    looks: Looks,
    points: ReadPoints,
    fixing: Arc<Semaphore>,
    /// What was not applied in time, and until when that is held against this replica.
    lag: Arc<Mutex<Option<(u64, Instant)>>>,
}

impl Reads {
    /// The handle, and the task to spawn.
    pub(crate) fn new(
        points: ReadPoints,
        state: SharedState,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let exec = points.environment().exec();
        let fixing = Arc::new(Semaphore::new(FIXES_UNDER_WAY_MAX));
        let (queue, wake) = (Arc::default(), Arc::default());
        let lag = Arc::default();
        let looks = Looks::new(state.clone(), exec.clone());
        let handle = Self { queue, wake, state, exec, looks, points, fixing, lag };
        (handle.clone(), run(handle, stop))
    }

    /// Reads a state that holds everything acknowledged before this call began.
    pub(crate) async fn linearizable<T: Send + 'static>(
        &self,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        let (answer, receiver) = oneshot::channel();
        let look: Look = Box::new(move |state| {
            let _ = answer.send(state.map(look));
        });
        self.push(Item::Read(Waiting { deadline, look }))?;
        match tokio::time::timeout_at(deadline, receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(GroupError::Stopped),
            Err(_) => Err(GroupError::Expired),
        }
    }

    /// Reads a state that is not older than `bound`, and says how old at most it was. Without a
    /// question where what is known of the state is fresh enough.
    pub(crate) async fn bounded<T: Send + 'static>(
        &self,
        bound: Duration,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<(T, Duration), GroupError> {
        if self.points.leads() {
            // The check that confirms it is the note by which the view is judged: a pause between
            // the two makes it old here as anywhere.
            let read = self.linearizable(deadline, self.judged(bound, look)).await?;
            return read.map_err(|_| GroupError::TooStale);
        }
        let look = match self.at_hand(bound, look).await? {
            Ok(read) => return Ok(read),
            Err(look) => look,
        };
        let until = Instant::now().checked_add(bound).map_or(deadline, |end| deadline.min(end));
        let asked = self.linearizable(until, self.judged(bound, look)).await;
        match asked {
            Ok(Ok(read)) => Ok(read),
            Err(GroupError::Expired) if until == deadline => Err(GroupError::Expired),
            // Whoever leads, it is out of this replica's reach.
            Ok(Err(_)) | Err(GroupError::Expired | GroupError::NotLeader { .. }) => {
                Err(GroupError::TooStale)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads at once where what was learnt before says that the state is fresh enough; else hands
    /// the look back.
    async fn at_hand<T, L>(
        &self,
        bound: Duration,
        look: L,
    ) -> Result<Result<(T, Duration), L>, GroupError>
    where
        T: Send + 'static,
        L: FnOnce(&ReadState) -> T + Send + 'static,
    {
        let age = self.points.age(self.state.applied().index);
        let Some(age) = age.filter(|age| age.is_within(bound)) else {
            return Ok(Err(look));
        };
        if !age.is_within(bound / 2) {
            self.refresh();
        }
        let (answer, receiver) = oneshot::channel();
        let judged = self.judged(bound, look);
        let look: Look = Box::new(move |state| {
            let _ = answer.send(state.map(judged));
        });
        self.looks.push([look]);
        let read = receiver.await.unwrap_or(Err(GroupError::Stopped))?;
        if read.is_ok() {
            self.points.environment().observer().read_points(ReadWay::Known, 1);
        }
        Ok(read)
    }

    /// A look that judges how old the very view is that it gets, and gives itself back if too old.
    fn judged<T, L>(
        &self,
        bound: Duration,
        look: L,
    ) -> impl FnOnce(&ReadState) -> Result<(T, Duration), L> + Send + 'static
    where
        T: Send + 'static,
        L: FnOnce(&ReadState) -> T + Send + 'static,
    {
        let points = self.points.clone();
        move |state| {
            let age = points.age(state.position.index).filter(|age| age.is_within(bound));
            match age.map(Age::told) {
                Some(told) => Ok((look(state), told)),
                None => Err(look),
            }
        }
    }

    /// Reads whatever this replica has, once it has applied `index` (0: at once).
    pub(crate) async fn local<T: Send + 'static>(
        &self,
        index: u64,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        let applied = self.state.wait_for_index(index);
        if tokio::time::timeout_at(deadline, applied).await.is_err() {
            return Err(GroupError::TooStale);
        }
        let (answer, receiver) = oneshot::channel();
        let look: Look = Box::new(move |state| {
            let _ = answer.send(state.map(look));
        });
        self.looks.push([look]);
        receiver.await.unwrap_or(Err(GroupError::Stopped))
    }

    /// The same where what is waited for was learnt from the leader: a replica that does not lead
    /// has only so long.
    pub(crate) async fn caught_up<T: Send + 'static>(
        &self,
        index: u64,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        self.local(index, self.catch_up(deadline), look).await
    }

    fn catch_up(&self, deadline: Instant) -> Instant {
        if self.points.leads() { deadline } else { deadline.min(Instant::now() + CATCH_UP_MAX) }
    }

    /// Fixes a version for reads; without one the newest: no lower than that of any write that was
    /// acknowledged before this call began.
    pub(crate) async fn fix(&self, version: Option<u64>) -> Result<Fixed, GroupError> {
        match version {
            Some(_) if self.points.leads() => self.points.fix(version).await,
            Some(_) => self.points.fix_asked(version).await,
            None => self.ask(Item::Fix).await,
        }
    }

    /// Whether a read has just waited in vain, and would again.
    fn lags(&self) -> bool {
        let lag = *self.lag.lock();
        lag.is_some_and(|(index, until)| {
            self.state.applied().index < index && Instant::now() < until
        })
    }

    /// Answers a peer's question for a point.
    pub(crate) async fn point_for_peer(&self) -> Answer {
        match self.ask(Item::PointForPeer).await {
            Ok(index) => Answer::ReadPoint { index },
            Err(error) => refusal_of(&error),
        }
    }

    /// Answers a peer's question for a fixed version.
    pub(crate) async fn fix_for_peer(&self, version: Option<u64>) -> Answer {
        let fixed = match version {
            Some(_) => self.points.fix(version).await,
            None => self.ask(Item::FixForPeer).await,
        };
        match fixed {
            Ok(Fixed { version, index }) => Answer::Fixed { version, index },
            Err(error) => refusal_of(&error),
        }
    }

    async fn ask<T>(&self, item: impl FnOnce(Sender<T>) -> Item) -> Result<T, GroupError> {
        let (answer, receiver) = oneshot::channel();
        self.push(item(answer))?;
        receiver.await.unwrap_or(Err(GroupError::Stopped))
    }

    /// Learns in the background how far the leader is, unless that is under way.
    fn refresh(&self) {
        let mut queue = self.queue.lock();
        if queue.closed || std::mem::replace(&mut queue.refreshing, true) {
            return;
        }
        queue.waiting.push(Item::Refresh);
        drop(queue);
        self.wake.notify_one();
    }

    fn push(&self, item: Item) -> Result<(), GroupError> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(GroupError::Stopped);
        }
        if queue.waiting.len() >= READS_WAITING_MAX {
            return Err(GroupError::Overloaded { retry_after: RETRY_AFTER });
        }
        queue.waiting.push(item);
        drop(queue);
        self.wake.notify_one();
        Ok(())
    }
}

async fn run(reads: Reads, stop: CancellationToken) {
    let mut under_way = FuturesUnordered::new();
    loop {
        let room = under_way.len() < BATCHES_UNDER_WAY_MAX;
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            () = reads.wake.notified(), if room => {}
        }
        if under_way.len() < BATCHES_UNDER_WAY_MAX {
            let items = std::mem::take(&mut reads.queue.lock().waiting);
            if !items.is_empty() {
                under_way.push(serve(Batch::of(items), &reads));
            }
        }
    }
    let waiting = {
        let mut queue = reads.queue.lock();
        queue.closed = true;
        std::mem::take(&mut queue.waiting)
    };
    Batch::of(waiting).refuse(&GroupError::Stopped);
}

/// Everything in it arrived before its read point is asked for.
#[derive(Default)]
struct Batch {
    reads: Vec<Waiting>,
    fixes: Vec<Sender<Fixed>>,
    peers_fixes: Vec<Sender<Fixed>>,
    peers_points: Vec<Sender<u64>>,
    refreshes: bool,
}

impl Batch {
    fn of(items: Vec<Item>) -> Self {
        let mut batch = Self::default();
        for item in items {
            match item {
                Item::Read(waiting) => batch.reads.push(waiting),
                Item::Fix(answer) => batch.fixes.push(answer),
                Item::FixForPeer(answer) => batch.peers_fixes.push(answer),
                Item::PointForPeer(answer) => batch.peers_points.push(answer),
                Item::Refresh => batch.refreshes = true,
            }
        }
        batch
    }

    fn refuse(self, error: &GroupError) {
        let mut batch = self;
        batch.refuse_peers(error);
        refuse_all(batch.fixes, error);
        refuse_reads(batch.reads, error);
    }

    fn refuse_peers(&mut self, error: &GroupError) {
        refuse_all(std::mem::take(&mut self.peers_fixes), error);
        refuse_all(std::mem::take(&mut self.peers_points), error);
    }
}

fn refuse_reads(reads: Vec<Waiting>, error: &GroupError) {
    reads.into_iter().for_each(|read| (read.look)(Err(error.clone())));
}

fn refuse_all<T>(answers: Vec<Sender<T>>, error: &GroupError) {
    // Whoever has given up waiting hears nothing, here and below.
    answers.into_iter().for_each(|answer| drop(answer.send(Err(error.clone()))));
}

fn answer_all<T: Clone>(answers: Vec<Sender<T>>, result: &Result<T, GroupError>) {
    answers.into_iter().for_each(|answer| drop(answer.send(result.clone())));
}

async fn serve(mut batch: Batch, reads: &Reads) {
    let refreshes = batch.refreshes;
    if !reads.points.environment().healthy() {
        // A stale lease would be renewed by heartbeats that a stalled disk must not send.
        batch.refuse(&GroupError::NotLeader { leader: None });
    } else {
        match reads.points.confirmed().await {
            Ok((index, way)) => serve_leading(batch, reads, index, way).await,
            Err(error @ GroupError::NotLeader { .. }) => {
                // A question is never passed on: its sender asks whoever leads by now.
                batch.refuse_peers(&error);
                serve_following(batch, reads).await;
            }
            Err(error) => batch.refuse(&error),
        }
    }
    if refreshes {
        reads.queue.lock().refreshing = false;
    }
}

/// The leader has confirmed itself behind everything in the batch.
async fn serve_leading(mut batch: Batch, reads: &Reads, index: u64, way: ReadWay) {
    answer_all(batch.peers_points, &Ok(index));
    batch.fixes.append(&mut batch.peers_fixes);
    fix_all(batch.fixes, reads, true);
    look_all(batch.reads, reads, index, way).await;
}

async fn serve_following(batch: Batch, reads: &Reads) {
    fix_all(batch.fixes, reads, false);
    if batch.reads.is_empty() && !batch.refreshes {
        return;
    }
    if reads.lags() {
        return refuse_reads(batch.reads, &GroupError::TooStale);
    }
    match reads.points.asked().await {
        Ok(index) => look_all(batch.reads, reads, index, ReadWay::Asked).await,
        Err(error) => refuse_reads(batch.reads, &error),
    }
}

/// Fixes one version for all. In a task of its own: it may take an entry, and no read waits for it.
fn fix_all(answers: Vec<Sender<Fixed>>, reads: &Reads, leads: bool) {
    if answers.is_empty() {
        return;
    }
    let Ok(permit) = reads.fixing.clone().try_acquire_owned() else {
        return refuse_all(answers, &GroupError::Overloaded { retry_after: RETRY_AFTER });
    };
    let points = reads.points.clone();
    let fix = async move {
        let fixed = if leads { points.fix(None).await } else { points.fix_asked(None).await };
        answer_all(answers, &fixed);
        drop(permit);
    };
    reads.exec.spawn("fix", Box::pin(fix));
}

/// Looks at the state once it holds everything up to a point.
async fn look_all(batch: Vec<Waiting>, reads: &Reads, point: u64, way: ReadWay) {
    let Some(last_deadline) = batch.iter().map(|read| read.deadline).max() else { return };
    reads.points.environment().observer().read_points(way, batch.len());
    let deadline = match way {
        ReadWay::Asked => last_deadline.min(Instant::now() + CATCH_UP_MAX),
        _ => last_deadline,
    };
    let applied = reads.state.wait_for_index(point);
    if tokio::time::timeout_at(deadline, applied).await.is_err() {
        if deadline < last_deadline {
            *reads.lag.lock() = Some((point, Instant::now() + LAG_KNOWN));
        }
        return refuse_reads(batch, &GroupError::TooStale);
    }
    reads.looks.push(batch.into_iter().map(|read| read.look));
}

//! One of the connections to a node, as a queue: what waits to be sent and what waits for an answer.
//!
//! Owns the order, the bounds and the coalescing. Does not dial and does not write: a task takes
//! envelopes from here while the connection is up (see `dial`).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::peer::Envelope;
use coracle_proto::peer::cluster_command::Kind;
use coracle_raft::transport::TransportError;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::message::{Connection, IN_FLIGHT_MAX, Item, MESSAGE_BYTES_MAX, Packer, Question, Reply};

/// How long a heartbeat waits for those of other groups: a twentieth of the heartbeat interval.
const LINGER: Duration = Duration::from_millis(5);

type Answer = Result<Reply, TransportError>;

enum Phase {
    /// Not dialled yet, or dialled for the first time: questions wait for the connection.
    Fresh,
    Up,
    /// The last connection or attempt failed, for this reason: so do questions, at once.
    Down(Arc<str>),
    /// The transport ended, or the node was forgotten.
    Closed,
}

struct Queued {
    call: u64,
    lingers: bool,
    /// None: nobody waits for the answer any more.
    item: Option<Item>,
}

struct Waiting {
    bytes: usize,
    answer: oneshot::Sender<Answer>,
}

/// Invariants: calls rise along `queue`; every live item in `queue` has its call in `waiting`;
/// `bytes` is the sum over `waiting`; both are empty unless the phase is `Fresh` or `Up`.
struct State {
    phase: Phase,
    queue: VecDeque<Queued>,
    waiting: BTreeMap<u64, Waiting>,
    bytes: usize,
    last_call: u64,
    /// Live items in the queue that do not linger.
    urgent: usize,
    /// When what lingers leaves at the latest.
    linger_until: Option<Instant>,
    /// An envelope shall leave, empty if need be.
    due: bool,
    /// Was asked for once: keep it connected.
    wanted: bool,
    /// Dial at once: the node was heard of.
    hurry: bool,
}

/// What the writer waits for.
enum Idle {
    /// More to send, or this moment.
    Until(Instant),
    /// Something to send.
    Forever,
}

/// See the module.
pub(crate) struct Lane {
    connection: Connection,
    state: Mutex<State>,
    stir: Notify,
}

impl Lane {
    pub(crate) fn new(connection: Connection) -> Self {
        let state = State {
            phase: Phase::Fresh,
            queue: VecDeque::new(),
            waiting: BTreeMap::new(),
            bytes: 0,
            last_call: 0,
            urgent: 0,
            linger_until: None,
            due: false,
            // Gossip and loss of the node go by this connection: it is always kept.
            wanted: connection == Connection::Control,
            hurry: false,
        };
        Self { connection, state: Mutex::new(state), stir: Notify::new() }
    }

    pub(crate) fn connection(&self) -> Connection {
        self.connection
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(self.state.lock().phase, Phase::Up)
    }

    /// Gives the question its place in the order. What comes back awaits the answer; dropped, it
    /// withdraws the question if it was not sent yet.
    pub(crate) fn ask(
        self: &Arc<Self>,
        question: Question,
        timeout: Duration,
    ) -> Result<Asked, TransportError> {
        let now = Instant::now();
        let lingers = matches!(question, Question::Group { lingers: true, .. });
        let (sender, answer) = oneshot::channel();
        let (call, stir) = {
            let mut state = self.state.lock();
            let call = state.last_call + 1;
            let item = question.into_item(call);
            let bytes = item.bytes();
            state.check(bytes, self.connection)?;
            state.last_call = call;
            state.bytes += bytes;
            state.waiting.insert(call, Waiting { bytes, answer: sender });
            state.queue.push_back(Queued { call, lingers, item: Some(item) });
            let stir = state.note_queued(lingers, now);
            (call, stir)
        };
        if stir {
            self.stir.notify_one();
        }
        let deadline = now + timeout;
        Ok(Asked { lane: self.clone(), call, answer, deadline, timeout, open: true })
    }

    /// Waits until the connection is wanted.
    pub(crate) async fn wanted(&self) {
        while !self.state.lock().wanted {
            self.stir.notified().await;
        }
    }

    /// Waits for `pause`, or less when there is news of the node.
    pub(crate) async fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !std::mem::take(&mut self.state.lock().hurry) {
            if tokio::time::timeout_at(until, self.stir.notified()).await.is_err() {
                return;
            }
        }
    }

    /// The node was heard of: no more resting.
    pub(crate) fn hurry(&self) {
        self.state.lock().hurry = true;
        self.stir.notify_one();
    }

    /// Lets an envelope leave even if nothing is queued: gossip, or a sign of life.
    pub(crate) fn make_due(&self) {
        self.state.lock().due = true;
        self.stir.notify_one();
    }

    pub(crate) fn up(&self) {
        let mut state = self.state.lock();
        state.hurry = false;
        if !matches!(state.phase, Phase::Closed) {
            state.phase = Phase::Up;
        }
    }

    /// Fails everything that waits.
    pub(crate) fn down(&self, why: &str) {
        self.fail_all(Phase::Down(why.into()), why);
    }

    pub(crate) fn close(&self) {
        self.fail_all(Phase::Closed, "the transport to this node has ended");
    }

    fn fail_all(&self, phase: Phase, why: &str) {
        let waiting = {
            let mut state = self.state.lock();
            if !matches!(state.phase, Phase::Closed) {
                state.phase = phase;
            }
            state.queue.clear();
            state.bytes = 0;
            state.urgent = 0;
            state.linger_until = None;
            state.due = false;
            std::mem::take(&mut state.waiting)
        };
        for waiting in waiting.into_values() {
            // The asker may have gone in this moment.
            let _ = waiting.answer.send(Err(TransportError::Unreachable(why.to_owned())));
        }
    }

    /// The next envelope to send, and whether heartbeats are in it. Cancel safe.
    pub(crate) async fn next_envelope(&self) -> (Envelope, bool) {
        loop {
            let taken = self.state.lock().take(Instant::now());
            match taken {
                Ok(envelope) => return envelope,
                Err(Idle::Until(until)) => {
                    // Whether it was time or more work: look again.
                    let _ = tokio::time::timeout_at(until, self.stir.notified()).await;
                }
                Err(Idle::Forever) => self.stir.notified().await,
            }
        }
    }

    /// Hands the answers of one envelope to those who wait for them; late ones are dropped.
    pub(crate) fn answered(&self, envelope: Envelope) {
        let Envelope { messages, forwards, cluster, .. } = envelope;
        let count = messages.len() + forwards.len() + usize::from(cluster.is_some());
        if count == 0 {
            return;
        }
        let groups = messages.into_iter().map(|m| (m.call, answer(m.body, m.unreachable)));
        let forwards = forwards.into_iter().map(|m| (m.call, answer(m.body, m.unreachable)));
        let commands = cluster.into_iter().map(|c| (c.call, command_answer(c.kind)));
        let mut taken = Vec::with_capacity(count);
        {
            let mut state = self.state.lock();
            for (call, answer) in groups.chain(forwards).chain(commands) {
                if let Some(waiting) = state.waiting.remove(&call) {
                    state.bytes -= waiting.bytes;
                    taken.push((waiting.answer, answer));
                }
            }
        }
        for (waiting, answer) in taken {
            // The asker may have gone in this moment.
            let _ = waiting.send(answer);
        }
    }
}

fn answer(body: Bytes, unreachable: String) -> Answer {
    if unreachable.is_empty() {
        Ok(Reply::Bytes(body))
    } else {
        Err(TransportError::Unreachable(unreachable))
    }
}

fn command_answer(kind: Option<Kind>) -> Answer {
    match kind {
        Some(kind) => Ok(Reply::Command(kind)),
        None => Err(TransportError::Unreachable("a cluster command's answer is unknown".into())),
    }
}

impl State {
    fn check(&self, bytes: usize, connection: Connection) -> Result<(), TransportError> {
        let refuse = |why: String| Err(TransportError::NotSent(why));
        match &self.phase {
            Phase::Fresh | Phase::Up => {}
            Phase::Down(why) => return refuse(why.to_string()),
            Phase::Closed => return refuse("the transport to this node has ended".into()),
        }
        if bytes > MESSAGE_BYTES_MAX {
            return refuse(format!("a message of {bytes} bytes is over {MESSAGE_BYTES_MAX}"));
        }
        // One message always has room, however large.
        if self.bytes > 0 && self.bytes + bytes > connection.bytes_max() {
            return refuse(format!("{connection:?} has {} bytes under way", self.bytes));
        }
        if self.waiting.len() >= IN_FLIGHT_MAX || self.queue.len() >= IN_FLIGHT_MAX {
            return refuse(format!("{connection:?} has {IN_FLIGHT_MAX} questions under way"));
        }
        Ok(())
    }

    /// Whether the writer has to look now.
    fn note_queued(&mut self, lingers: bool, now: Instant) -> bool {
        let first = !std::mem::replace(&mut self.wanted, true);
        if !lingers {
            self.urgent += 1;
            return true;
        }
        let first_to_linger = self.linger_until.is_none();
        self.linger_until.get_or_insert(now + LINGER);
        first || first_to_linger
    }

    fn take(&mut self, now: Instant) -> Result<(Envelope, bool), Idle> {
        self.drop_withdrawn();
        if !self.due && self.urgent == 0 {
            match self.linger_until {
                Some(until) if until > now => return Err(Idle::Until(until)),
                Some(_) => {}
                None => return Err(Idle::Forever),
            }
        }
        self.due = false;
        let mut packer = Packer::default();
        let mut heartbeats = false;
        while let Some(front) = self.queue.front() {
            if front.item.as_ref().is_some_and(|item| !packer.fits(item)) {
                break;
            }
            let Some(Queued { lingers, item: Some(item), .. }) = self.queue.pop_front() else {
                continue;
            };
            heartbeats |= lingers;
            self.urgent -= usize::from(!lingers);
            packer.add(item);
        }
        self.drop_withdrawn();
        Ok((packer.envelope, heartbeats))
    }

    fn drop_withdrawn(&mut self) {
        while self.queue.front().is_some_and(|front| front.item.is_none()) {
            self.queue.pop_front();
        }
        if self.queue.is_empty() {
            self.linger_until = None;
        }
    }

    fn withdraw(&mut self, call: u64) {
        let Some(waiting) = self.waiting.remove(&call) else {
            return;
        };
        self.bytes -= waiting.bytes;
        if let Ok(at) = self.queue.binary_search_by_key(&call, |queued| queued.call) {
            let queued = &mut self.queue[at];
            if queued.item.take().is_some() && !queued.lingers {
                self.urgent -= 1;
            }
        }
    }
}

/// A question that has its place; awaits the answer.
pub(crate) struct Asked {
    lane: Arc<Lane>,
    call: u64,
    answer: oneshot::Receiver<Answer>,
    deadline: Instant,
    timeout: Duration,
    /// The lane may still hold the call.
    open: bool,
}

impl Asked {
    /// The answer, or what is known in its place when the time is over.
    pub(crate) async fn answer(mut self) -> Answer {
        let answer = tokio::time::timeout_at(self.deadline, &mut self.answer).await;
        match answer {
            Ok(answer) => {
                self.open = false;
                answer.unwrap_or_else(|_| {
                    Err(TransportError::Unreachable("the transport has ended".into()))
                })
            }
            Err(_) => Err(TransportError::Timeout(self.timeout)),
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if self.open {
            self.lane.state.lock().withdraw(self.call);
        }
    }
}

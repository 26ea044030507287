//! Owns the fast path to a node: one bidirectional stream that carries all operations for it. Does
//! not retry and does not judge answers (see `driver`); what it says of an operation without an
//! answer is only whether it had left.
//!
//! Operations that wait leave together: the stream is polled when the connection can take more, and
//! hands over all that is queued. Answers come in any order and find their operation by id. When
//! the stream breaks, every operation in flight ends at once; the next one opens a new stream.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use coracle_proto::limits::{PIPELINE_FRAME_BYTES, PIPELINE_IN_FLIGHT_MAX};
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response;
use coracle_proto::v1::{PipelineRequest, PipelineRequests, PipelineResponse};
use futures_util::Stream;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::connection::{Connection, Dialer};

/// What a call does when a node's pipeline is full.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum WhenFull {
    /// Waits for room, within its timeouts.
    #[default]
    Wait,
    /// Fails at once with [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded).
    Refuse,
}

/// How an operation came back.
#[derive(Debug)]
pub(crate) enum Reply {
    /// With the node's answer, good or bad.
    Answer(pipeline_response::Result),
    /// Without: the stream broke. Only what had left may have been carried out.
    Broken { left: bool, why: Arc<Status> },
}

/// The connections to all nodes, each with its pipeline, by address.
pub(crate) struct Pool {
    dialer: Dialer,
    in_flight_max: usize,
    tasks: Tasks,
    by_address: Mutex<BTreeMap<String, Arc<Pipeline>>>,
}

/// The client's background tasks, and what ends them.
#[derive(Clone)]
pub(crate) struct Tasks {
    pub(crate) tracker: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// The pipeline to one node. Dropping it ends its stream.
pub(crate) struct Pipeline {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
    tracker: TaskTracker,
    stop: DropGuard,
}

struct Shared {
    connection: Connection,
    state: Mutex<State>,
}

/// Invariants:
/// - an operation is in `waiting` until the answer is there, the stream breaks, or its caller has
///   lost interest; in `queued` besides until it leaves;
/// - `queued` is empty while no stream is open.
#[derive(Default)]
struct State {
    next_id: u64,
    /// The stream that is open, by number.
    stream: Option<u64>,
    streams: u64,
    queued: BTreeMap<u64, PipelineRequest>,
    waiting: BTreeMap<u64, oneshot::Sender<Reply>>,
    /// Of the open stream, when it has found `queued` empty.
    waker: Option<Waker>,
}

impl Pool {
    pub(crate) fn new(dialer: Dialer, in_flight_max: usize, tasks: Tasks) -> Pool {
        Pool { dialer, in_flight_max, tasks, by_address: Mutex::default() }
    }

    /// The pipeline to `address`, made when there is none yet. `None` for what is no `host:port`.
    pub(crate) fn get(&self, address: &str) -> Option<Arc<Pipeline>> {
        let mut by_address = self.by_address.lock();
        if let Some(pipeline) = by_address.get(address) {
            return Some(pipeline.clone());
        }
        let connection = self.dialer.dial(address)?;
        let pipeline = Arc::new(Pipeline::new(connection, self.in_flight_max, &self.tasks));
        by_address.insert(address.to_owned(), pipeline.clone());
        Some(pipeline)
    }

    /// Whether the node at `address` may be asked, as far as is known.
    pub(crate) fn is_usable(&self, address: &str) -> bool {
        let pipeline = self.by_address.lock().get(address).cloned();
        pipeline.is_none_or(|pipeline| pipeline.connection().is_usable())
    }

    /// Forgets the addresses that are none of `wanted`. Calls under way still finish.
    pub(crate) fn keep(&self, wanted: impl Fn(&str) -> bool) {
        self.by_address.lock().retain(|address, _| wanted(address));
    }
}

impl Pipeline {
    fn new(connection: Connection, in_flight_max: usize, tasks: &Tasks) -> Pipeline {
        Pipeline {
            shared: Arc::new(Shared { connection, state: Mutex::default() }),
            slots: Arc::new(Semaphore::new(in_flight_max)),
            tracker: tasks.tracker.clone(),
            stop: tasks.stop.child_token().drop_guard(),
        }
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.shared.connection
    }

    /// Takes one of the places for operations in flight. `None`: there is none, and `when_full`
    /// says not to wait.
    pub(crate) async fn slot(&self, when_full: WhenFull) -> Option<OwnedSemaphorePermit> {
        match when_full {
            WhenFull::Refuse => self.slots.clone().try_acquire_owned().ok(),
            WhenFull::Wait => self.slots.clone().acquire_owned().await.ok(),
        }
    }

    /// Queues an operation.
    pub(crate) fn submit(
        self: &Arc<Self>,
        slot: OwnedSemaphorePermit,
        operation: Operation,
        timeout: Duration,
    ) -> Ticket {
        let (sender, answer) = oneshot::channel();
        let mut state = self.shared.state.lock();
        state.next_id += 1;
        let id = state.next_id;
        // Rounded up: 0 would mean the server's maximum.
        let timeout_ms = timeout.as_millis() as u64 + 1;
        let request = PipelineRequest { id, timeout_ms, operation: Some(operation) };
        state.queued.insert(id, request);
        state.waiting.insert(id, sender);
        match state.stream {
            Some(_) => {
                let waker = state.waker.take();
                drop(state);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            None => {
                state.streams += 1;
                let stream = state.streams;
                state.stream = Some(stream);
                drop(state);
                let stop = self.stop.token().clone();
                self.tracker.spawn(run(self.shared.clone(), stream, stop));
            }
        }
        Ticket { pipeline: self.clone(), id, answer, _slot: slot }
    }

    #[cfg(test)]
    fn counts(&self) -> (usize, usize) {
        let state = self.shared.state.lock();
        (state.queued.len(), state.waiting.len())
    }
}

/// An operation in flight. Dropping it gives up waiting; a late answer is ignored.
pub(crate) struct Ticket {
    pipeline: Arc<Pipeline>,
    id: u64,
    answer: oneshot::Receiver<Reply>,
    _slot: OwnedSemaphorePermit,
}

impl Ticket {
    /// Waits for the operation to come back.
    pub(crate) async fn answer(&mut self) -> Reply {
        let reply = (&mut self.answer).await;
        reply.unwrap_or_else(|_| Reply::Broken {
            // The sender goes away only after a reply, or with the whole pipeline.
            left: true,
            why: Arc::new(Status::cancelled("the pipeline was dropped")),
        })
    }

    /// Gives up. Returns whether the operation had left; if not, it never will.
    pub(crate) fn withdraw(self) -> bool {
        let mut state = self.pipeline.shared.state.lock();
        state.waiting.remove(&self.id);
        state.queued.remove(&self.id).is_none()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.pipeline.shared.state.lock();
        state.waiting.remove(&self.id);
        state.queued.remove(&self.id);
    }
}

/// Runs one stream to its end.
async fn run(shared: Arc<Shared>, stream: u64, stop: CancellationToken) {
    let why = tokio::select! {
        biased;
        () = stop.cancelled() => Status::cancelled("the client was closed"),
        why = carry(&shared, stream) => {
            tracing::debug!(node = shared.connection.address(), %why, "pipeline ended");
            why
        }
    };
    shared.broke(stream, why);
}

async fn carry(shared: &Arc<Shared>, stream: u64) -> Status {
    let outgoing = Outgoing { shared: shared.clone(), stream };
    let mut answers = match shared.connection.kv().pipeline(outgoing).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    loop {
        match answers.message().await {
            Ok(Some(together)) => {
                together.responses.into_iter().for_each(|answer| shared.deliver(answer));
            }
            Ok(None) => return Status::unavailable("the node ended the pipeline"),
            Err(status) => return status,
        }
    }
}

impl Shared {
    fn deliver(&self, answer: PipelineResponse) {
        self.connection.heard();
        let waiting = self.state.lock().waiting.remove(&answer.id);
        match (waiting, answer.result) {
            // A caller that has gone meanwhile does not mind.
            (Some(waiting), Some(result)) => drop(waiting.send(Reply::Answer(result))),
            // Dropped without an answer, it ends as one that left and may have been carried out.
            (Some(waiting), None) => drop(waiting),
            (None, _) => tracing::trace!(id = answer.id, "answer after its call had ended"),
        }
    }

    /// Ends everything that is in flight.
    fn broke(&self, stream: u64, why: Status) {
        let (waiting, queued, waker) = {
            let mut state = self.state.lock();
            if state.stream != Some(stream) {
                return;
            }
            state.stream = None;
            let waiting = std::mem::take(&mut state.waiting);
            (waiting, std::mem::take(&mut state.queued), state.waker.take())
        };
        // A node that ends an idle stream is only shutting down in good order, perhaps to be back
        // at once; anything else counts against it.
        if !waiting.is_empty() {
            self.connection.failed();
        }
        let why = Arc::new(why);
        for (id, sender) in waiting {
            let left = !queued.contains_key(&id);
            drop(sender.send(Reply::Broken { left, why: why.clone() }));
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The requests of one stream.
struct Outgoing {
    shared: Arc<Shared>,
    stream: u64,
}

impl Stream for Outgoing {
    type Item = PipelineRequests;

    fn poll_next(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<PipelineRequests>> {
        let mut state = self.shared.state.lock();
        if state.stream != Some(self.stream) {
            return Poll::Ready(None);
        }
        let (mut requests, mut bytes) = (Vec::new(), 0);
        while bytes < PIPELINE_FRAME_BYTES && requests.len() < PIPELINE_IN_FLIGHT_MAX {
            let Some((_, request)) = state.queued.pop_first() else { break };
            bytes += request.encoded_len();
            requests.push(request);
        }
        if requests.is_empty() {
            state.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Some(PipelineRequests { requests }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::RealNet;
    use coracle_proto::v1::PutRequest;
    use futures_util::StreamExt;

    fn pipeline(slots: usize) -> Arc<Pipeline> {
        let dialer = Dialer::new(Arc::new(RealNet), "test", Duration::from_millis(250));
        let tasks = Tasks { tracker: TaskTracker::new(), stop: CancellationToken::new() };
        let connection = dialer.dial("localhost:1").expect("an address");
        let pipeline = Arc::new(Pipeline::new(connection, slots, &tasks));
        // A stream that the test itself polls.
        pipeline.shared.state.lock().stream = Some(1);
        pipeline
    }

    async fn submit(pipeline: &Arc<Pipeline>) -> Ticket {
        let slot = pipeline.slot(WhenFull::Refuse).await.expect("room");
        pipeline.submit(slot, Operation::Get(Default::default()), Duration::from_secs(1))
    }

    async fn next_ids(outgoing: &mut Outgoing) -> Vec<u64> {
        let together = outgoing.next().await.expect("the stream is open");
        together.requests.iter().map(|request| request.id).collect()
    }

    #[tokio::test]
    async fn what_waits_leaves_together_but_for_what_is_large() {
        let pipeline = pipeline(3);
        let mut outgoing = Outgoing { shared: pipeline.shared.clone(), stream: 1 };
        let put = |bytes: usize| {
            let value = vec![0; bytes].into();
            Operation::Put(PutRequest { value, ..Default::default() })
        };
        let mut tickets = Vec::new();
        for bytes in [1, PIPELINE_FRAME_BYTES, 1] {
            let slot = pipeline.slot(WhenFull::Refuse).await.expect("room");
            tickets.push(pipeline.submit(slot, put(bytes), Duration::from_secs(1)));
        }
        assert_eq!(next_ids(&mut outgoing).await, [tickets[0].id, tickets[1].id]);
        assert_eq!(next_ids(&mut outgoing).await, [tickets[2].id]);
    }

    #[tokio::test]
    async fn a_break_tells_what_had_left() {
        let pipeline = pipeline(2);
        let mut first = submit(&pipeline).await;
        let mut outgoing = Outgoing { shared: pipeline.shared.clone(), stream: 1 };
        assert_eq!(next_ids(&mut outgoing).await, [first.id]);
        let mut second = submit(&pipeline).await;
        pipeline.shared.broke(1, Status::unavailable("cut"));
        assert!(matches!(first.answer().await, Reply::Broken { left: true, .. }));
        assert!(matches!(second.answer().await, Reply::Broken { left: false, .. }));
        assert!(outgoing.next().await.is_none(), "the broken stream is over");
        assert_eq!(pipeline.counts(), (0, 0));
        assert!(!pipeline.connection().is_usable());
    }

    #[tokio::test]
    async fn what_is_withdrawn_before_it_left_never_leaves() {
        let pipeline = pipeline(2);
        let first = submit(&pipeline).await;
        let second = submit(&pipeline).await;
        assert!(!first.withdraw());
        let mut outgoing = Outgoing { shared: pipeline.shared.clone(), stream: 1 };
        assert_eq!(next_ids(&mut outgoing).await, [second.id]);
        assert!(second.withdraw());
        assert_eq!(pipeline.counts(), (0, 0), "nothing is kept for calls that gave up");
    }

    #[tokio::test]
    async fn places_in_flight_are_bounded_and_come_back() {
        let pipeline = pipeline(2);
        let first = submit(&pipeline).await;
        let _second = submit(&pipeline).await;
        assert!(pipeline.slot(WhenFull::Refuse).await.is_none());
        drop(first);
        assert!(pipeline.slot(WhenFull::Refuse).await.is_some());
    }
}

//! Owns the stream that carries many operations: so many at a time, answered as they finish, each
//! within its own timeout. Does not serve them (see [`crate::router`]).
//!
//! Operations go on whether the caller takes its answers or not: a request that only waits to be polled
//! would hold its place among the node's requests for ever. What waits for a caller is bounded three
//! ways: at most [`PIPELINE_IN_FLIGHT_MAX`] operations are under way or finished and not taken, and no
//! more are read; finished answers count in the node's byte budget; and a caller that takes nothing for
//! `STOPPED_MAX` loses its stream, also when it has nothing more to ask.
//!
//! What waits for its turn is one message, of at most [`PIPELINE_IN_FLIGHT_MAX`] operations, and counts in
//! the byte budget from its arrival: operations beyond the budget are refused and dropped at once.
//!
//! Answers that are there together travel in one message.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use coracle_proto::limits::{DEADLINE_MAX, PIPELINE_FRAME_BYTES, PIPELINE_IN_FLIGHT_MAX};
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_storage::Exec;
use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;

use crate::admission::{Call, Charge, Permit};
use crate::router::{answer_bytes, pipelined};
use crate::service::kv::Kv;

/// How long a caller may leave finished answers untaken: nobody waits longer for any of them. Beyond: the
/// stream breaks, and what it holds is dropped.
const STOPPED_MAX: Duration = DEADLINE_MAX;

/// The answers to a stream of operations. Ends when the caller's side ends, or breaks, or the node
/// drains, and everything that was taken on is answered.
pub(crate) fn answers(
    kv: Kv,
    exec: &dyn Exec,
    requests: impl Stream<Item = Result<v1::PipelineRequests, Status>> + Send + 'static,
    call: Call,
) -> BoxStream<'static, Result<v1::PipelineResponses, Status>> {
    let (unread, stop) = (Arc::new(Mutex::new(Unread::default())), CancellationToken::new());
    let (into, stopped) = (unread.clone(), stop.clone());
    let carry = async move {
        stopped.run_until_cancelled(carry(kv, requests, call, into)).await;
    };
    exec.spawn("pipeline", Box::pin(carry));
    Taken { unread, _stop: stop.drop_guard() }.boxed()
}

/// Serves the operations until their end, or until nobody takes the answers.
async fn carry(
    kv: Kv,
    requests: impl Stream<Item = Result<v1::PipelineRequests, Status>> + Send + 'static,
    call: Call,
    into: Arc<Mutex<Unread>>,
) {
    let draining = kv.router().admission().draining().clone().cancelled_owned();
    let slots = Arc::new(Semaphore::new(PIPELINE_IN_FLIGHT_MAX));
    let (ending, broken) = (Ending(into.clone()), into.clone());
    let of_operations = kv.clone();
    let serve = requests
        .take_until(draining)
        // A broken stream has no more to say; what it has asked for is still served.
        .take_while(|request| std::future::ready(request.is_ok()))
        .filter_map(|request| std::future::ready(request.ok()))
        .take_while(move |together| std::future::ready(is_allowed(together, &broken)))
        .flat_map(move |together| stream::iter(taken_on(&of_operations, together)))
        .then(move |waiting| {
            let slot = slots.clone().acquire_owned();
            async move { (waiting, slot.await.expect("it is never closed")) }
        })
        // Boxed: on its way among those under way a future is moved three times.
        .map(move |(waiting, slot)| Box::pin(answer(kv.clone(), waiting, slot, call)))
        .buffer_unordered(PIPELINE_IN_FLIGHT_MAX)
        .for_each(|finished| {
            into.lock().push(finished);
            std::future::ready(())
        });
    let served = async {
        serve.await;
        // The caller is told of the end, but what it has yet to take is still watched over.
        into.lock().end();
        all_taken(&into).await;
    };
    tokio::select! {
        () = served => {}
        () = nobody_takes(&into) => {
            let message = format!("nobody took the answers of this pipeline for {STOPPED_MAX:?}");
            into.lock().give_up(Fault::new(Reason::OutcomeUnknown, message));
        }
    }
    drop(ending);
}

/// Whether a message has no more operations than one may: who sends more loses the stream.
fn is_allowed(together: &v1::PipelineRequests, into: &Mutex<Unread>) -> bool {
    let got = together.requests.len();
    let allowed = got <= PIPELINE_IN_FLIGHT_MAX;
    if !allowed {
        let message =
            format!("{got} operations in one message, of at most {PIPELINE_IN_FLIGHT_MAX}");
        into.lock().refused = Some(Fault::invalid("requests", message));
    }
    allowed
}

/// An operation that waits for its turn, with the charge for it; or why it is not taken on.
struct Waiting {
    id: u64,
    operation: Result<(v1::PipelineRequest, Charge), Fault>,
}

/// The operations of a message, as far as there is room for them.
fn taken_on(kv: &Kv, together: v1::PipelineRequests) -> Vec<Waiting> {
    let take = |request: v1::PipelineRequest| {
        let mut charge = kv.router().admission().hold(0);
        let id = request.id;
        let operation = match charge.set(waiting_bytes(&request)) {
            Ok(()) => Ok((request, charge)),
            Err(fault) => match &request.operation {
                Some(operation) => kv.counted(operation).end(Err(fault)),
                None => Err(fault),
            },
        };
        Waiting { id, operation }
    };
    together.requests.into_iter().map(take).collect()
}

/// What an operation holds while it waits for its turn.
fn waiting_bytes(request: &v1::PipelineRequest) -> u64 {
    request.encoded_len() as u64 + size_of::<v1::PipelineRequest>() as u64
}

async fn answer(kv: Kv, waiting: Waiting, slot: OwnedSemaphorePermit, call: Call) -> Finished {
    let mut charge = None;
    let answer = match waiting.operation {
        Ok((request, waited)) => {
            let served = serve_one(kv, request, waited, call).await;
            served.map(|(answer, permit)| {
                charge = Some(permit.end(answer_bytes(&answer)));
                answer
            })
        }
        Err(fault) => Err(fault),
    };
    Finished { answer: pipelined(waiting.id, answer), _slot: slot, _charge: charge }
}

async fn serve_one(
    kv: Kv,
    request: v1::PipelineRequest,
    waited: Charge,
    call: Call,
) -> Result<(Answer, Permit), Fault> {
    let size = request.encoded_len() as u64;
    let call = call.pipelined(request.timeout_ms);
    let operation = request.operation;
    let counted = operation.as_ref().map(|operation| kv.counted(operation));
    // From here on it counts as a request.
    drop(waited);
    let served = kv.router().admitted(size, operation, &call).await;
    match counted {
        Some(counted) => counted.end(served),
        None => served,
    }
}

/// An answer that was not taken yet.
struct Finished {
    answer: v1::PipelineResponse,
    _slot: OwnedSemaphorePermit,
    _charge: Option<Charge>,
}

/// What a pipeline's caller has not taken.
///
/// Invariant: at most [`PIPELINE_IN_FLIGHT_MAX`] answers; each holds a slot.
#[derive(Default)]
struct Unread {
    finished: VecDeque<Finished>,
    /// Answers taken so far.
    taken: u64,
    /// Nothing will be added.
    ended: bool,
    /// The stream has ended before its answers.
    broken: Option<Fault>,
    /// The stream ends behind its answers, because of what was asked.
    refused: Option<Fault>,
    /// Told when nothing is left that waits.
    emptied: Arc<Notify>,
    /// Of the caller's end, when it has found nothing.
    waker: Option<Waker>,
}

impl Unread {
    fn push(&mut self, finished: Finished) {
        self.finished.push_back(finished);
        self.wake();
    }

    /// What is there, up to [`PIPELINE_FRAME_BYTES`] and what goes beyond it.
    fn take(&mut self) -> Vec<v1::PipelineResponse> {
        let (mut responses, mut bytes) = (Vec::new(), 0);
        while bytes < PIPELINE_FRAME_BYTES {
            let Some(Finished { answer, .. }) = self.finished.pop_front() else { break };
            bytes += answer.encoded_len();
            responses.push(answer);
        }
        self.taken += responses.len() as u64;
        if self.finished.is_empty() {
            self.emptied.notify_one();
        }
        responses
    }

    fn end(&mut self) {
        self.ended = true;
        self.wake();
    }

    fn give_up(&mut self, fault: Fault) {
        self.finished.clear();
        self.broken = Some(fault);
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// Returns when nothing waits for its caller any more.
async fn all_taken(unread: &Mutex<Unread>) {
    let emptied = unread.lock().emptied.clone();
    while !unread.lock().finished.is_empty() {
        emptied.notified().await;
    }
}

/// Returns when answers have waited for [`STOPPED_MAX`] and none was taken.
async fn nobody_takes(unread: &Mutex<Unread>) {
    let look = || {
        let unread = unread.lock();
        (unread.taken, unread.finished.is_empty())
    };
    let mut before = look();
    loop {
        tokio::time::sleep(STOPPED_MAX).await;
        let now = look();
        if now.0 == before.0 && !before.1 {
            return;
        }
        before = now;
    }
}

/// Says that nothing more comes, however its task ends.
struct Ending(Arc<Mutex<Unread>>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.lock().end();
    }
}

/// The caller's end. Dropping it ends the operations' task.
struct Taken {
    unread: Arc<Mutex<Unread>>,
    _stop: DropGuard,
}

impl Stream for Taken {
    type Item = Result<v1::PipelineResponses, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut unread = self.unread.lock();
        if let Some(fault) = unread.broken.take() {
            return Poll::Ready(Some(Err(fault.to_status())));
        }
        let responses = unread.take();
        if !responses.is_empty() {
            return Poll::Ready(Some(Ok(v1::PipelineResponses { responses })));
        }
        if unread.ended {
            let refused = unread.refused.take();
            return Poll::Ready(refused.map(|fault| Err(fault.to_status())));
        }
        unread.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tokio::test expands to Runtime::block_on")]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_caller_that_takes_nothing_is_given_up() {
        let slots = Arc::new(Semaphore::new(PIPELINE_IN_FLIGHT_MAX));
        let finished = || {
            let slot = slots.clone().try_acquire_owned().expect("room");
            Finished { answer: v1::PipelineResponse::default(), _slot: slot, _charge: None }
        };
        let unread = Arc::new(Mutex::new(Unread::default()));
        let stop = CancellationToken::new();
        let mut caller = Taken { unread: unread.clone(), _stop: stop.clone().drop_guard() };
        let mut nobody = std::pin::pin!(nobody_takes(&unread));
        for _ in 0..5 {
            unread.lock().push(finished());
            unread.lock().push(finished());
            tokio::time::advance(STOPPED_MAX).await;
            assert!((&mut nobody).now_or_never().is_none(), "it takes some");
            let taken = caller.next().await.expect("not the end").expect("answers");
            assert_eq!(taken.responses.len(), 2, "what is there travels together");
        }
        unread.lock().push(finished());
        let gave_up = tokio::time::timeout(3 * STOPPED_MAX, &mut nobody).await;
        gave_up.expect("nothing was taken any more");
        unread.lock().give_up(Fault::new(Reason::OutcomeUnknown, "nobody took them"));
        assert_eq!(slots.available_permits(), PIPELINE_IN_FLIGHT_MAX, "what waited is dropped");
        assert!(caller.next().await.is_some_and(|answer| answer.is_err()));
        drop(Ending(unread.clone()));
        assert!(caller.next().await.is_none());
        drop(caller);
        assert!(stop.is_cancelled(), "a caller that goes ends the task");
    }
}

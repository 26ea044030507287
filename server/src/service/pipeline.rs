//! Owns the stream that carries many operations: so many at a time, answered as they finish, each
//! within its own timeout. Does not serve them (see [`crate::router`]).
//!
//! Back-pressure runs both ways: while as many operations are unanswered as may be, no more are read;
//! while the caller does not take its answers, none are made beyond those under way. A finished
//! answer counts in the node's budget until the stream takes it.
//!
//! Answers that are there together travel in one message.

use std::pin::Pin;
use std::task::{Context, Poll};

use coracle_proto::limits::{PIPELINE_FRAME_BYTES, PIPELINE_IN_FLIGHT_MAX};
use coracle_proto::reason::Fault;
use coracle_proto::v1;
use futures_util::stream::{self, BoxStream, Fuse, Stream, StreamExt};
use prost::Message;
use tonic::Status;

use crate::admission::Call;
use crate::router::pipelined;
use crate::service::kv::Kv;

/// The answers to a stream of operations. Ends when the caller's side ends, or breaks, or the node
/// drains, and everything that was taken on is answered.
pub(crate) fn answers(
    kv: Kv,
    requests: impl Stream<Item = Result<v1::PipelineRequests, Status>> + Send + 'static,
    call: Call,
) -> BoxStream<'static, Result<v1::PipelineResponses, Status>> {
    let draining = kv.router().admission().draining().clone().cancelled_owned();
    let answers = requests
        .take_until(draining)
        // A broken stream has no more to say; what it has asked for is still served.
        .take_while(|request| std::future::ready(request.is_ok()))
        .filter_map(|request| std::future::ready(request.ok()))
        .flat_map(|together| stream::iter(together.requests))
        .map(move |request| answer(kv.clone(), request, call))
        .buffer_unordered(PIPELINE_IN_FLIGHT_MAX);
    Together { answers: answers.boxed().fuse() }.map(Ok).boxed()
}

/// Puts into one message what is there, up to [`PIPELINE_FRAME_BYTES`]; waits for nothing.
struct Together<S> {
    answers: Fuse<S>,
}

impl<S: Stream<Item = v1::PipelineResponse> + Unpin> Stream for Together<S> {
    type Item = v1::PipelineResponses;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let (mut responses, mut bytes) = (Vec::new(), 0);
        while bytes < PIPELINE_FRAME_BYTES && responses.len() < PIPELINE_IN_FLIGHT_MAX {
            match self.answers.poll_next_unpin(context) {
                Poll::Ready(Some(response)) => {
                    bytes += response.encoded_len();
                    responses.push(response);
                }
                Poll::Ready(None) if responses.is_empty() => return Poll::Ready(None),
                Poll::Pending if responses.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(v1::PipelineResponses { responses }))
    }
}

async fn answer(kv: Kv, request: v1::PipelineRequest, call: Call) -> v1::PipelineResponse {
    let size = request.encoded_len() as u64;
    let call = call.pipelined(request.timeout_ms);
    let v1::PipelineRequest { id, operation, .. } = request;
    let counted = operation.as_ref().map(|operation| kv.counted(operation));
    let served = kv.router().admitted(size, operation, &call).await;
    let served: Result<_, Fault> = match counted {
        Some(counted) => counted.end(served),
        None => served,
    };
    pipelined(id, served.map(|(answer, _permit)| answer))
}

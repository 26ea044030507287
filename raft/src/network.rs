//! openraft's network over the transport that was handed in.
//!
//! Owns the pipeline to one follower and the translation of errors. Every answer is awaited under a
//! time limit of ours, because openraft enforces none on streams; whatever fails is `Unreachable`,
//! because openraft retries every other kind at once.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_storage::ReplicaId;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use openraft::base::BoxFuture;
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    StreamAppendResult, TransferLeaderError, TransferLeaderRequest, VoteRequest, VoteResponse,
};

use crate::message::{Answer, Question};
use crate::snapshot::{SnapshotData, Snapshots};
use crate::transport::{Address, Lane, Transport, TransportError};
use crate::types::{Place, ShardId, TypeConfig, Vote};

/// Appends that one follower may have unanswered: as many entries as a leader has under way. With a
/// mebibyte each, a follower that catches up takes a quarter of the lane to its node at most, so that
/// it does not hold up other groups.
const APPENDS_IN_FLIGHT_MAX: usize = 8;
/// An append waits for the follower's sync, and syncs stall: longer than an ordinary stall, shorter
/// than the time after which a node with a hung disk stops itself.
const APPEND_TIMEOUT: Duration = Duration::from_secs(5);
/// A vote is one sync at most; an election that has no answer by then is lost anyway.
const VOTE_TIMEOUT: Duration = Duration::from_millis(750);

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

/// Makes networks to the members of one group.
#[derive(Clone)]
pub(crate) struct Networks {
    pub(crate) shard: ShardId,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) snapshots: Arc<Snapshots>,
    /// Numbers the append streams of this group, so that a receiver tells an old one's late
    /// messages from a new one's.
    pub(crate) sessions: Arc<AtomicU64>,
}

impl Networks {
    fn network(&self, replica: u64, place: &Place, heartbeat: bool) -> Network {
        Network {
            to: Address { node: place.node, shard: self.shard, replica: ReplicaId(replica) },
            transport: self.transport.clone(),
            snapshots: self.snapshots.clone(),
            sessions: self.sessions.clone(),
            heartbeat,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Networks {
    type Network = Network;

    async fn new_client(&mut self, target: u64, place: &Place) -> Network {
        self.network(target, place, false)
    }

    async fn new_heartbeat_client(&mut self, target: u64, place: &Place) -> Network {
        self.network(target, place, true)
    }
}

/// The way to one replica.
pub(crate) struct Network {
    to: Address,
    transport: Arc<dyn Transport>,
    snapshots: Arc<Snapshots>,
    sessions: Arc<AtomicU64>,
    heartbeat: bool,
}

impl Network {
    async fn ask(&self, lane: Lane, question: Bytes, timeout: Duration) -> RpcResult<Answer> {
        decode(self.transport.ask(self.to, lane, question, timeout).await)
    }
}

fn unreachable(why: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(why))
}

fn decode(answer: Result<Bytes, TransportError>) -> RpcResult<Answer> {
    Answer::decode(answer.map_err(unreachable)?).map_err(unreachable)
}

fn append_result(answer: RpcResult<Answer>) -> RpcResult<StreamAppendResult<TypeConfig>> {
    match answer? {
        Answer::Append(result) => Ok(result),
        other => Err(unreachable(format!("an append was answered with {other:?}"))),
    }
}

impl RaftNetworkV2<TypeConfig> for Network {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let question = Question::Heartbeat(request).encode();
        let answer = self.ask(Lane::Heartbeat, question, APPEND_TIMEOUT).await;
        Ok(match append_result(answer)? {
            Ok(_) => AppendEntriesResponse::Success,
            Err(StreamAppendError::Conflict(_)) => AppendEntriesResponse::Conflict,
            Err(StreamAppendError::HigherVote(vote)) => AppendEntriesResponse::HigherVote(vote),
        })
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>>
            + openraft::OptionalSend
            + Unpin
            + 'static,
    {
        if self.heartbeat {
            return openraft::network::stream_append_sequential(self, input, option);
        }
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let (transport, to) = (self.transport.clone(), self.to);
        let mut first = true;
        // `ask` takes the question's place in the lane when it is called, so the stream's order is
        // the order on the wire; `buffered` gives the answers back in that order.
        let answers = input
            .map(move |request| {
                let question = Question::Append { session, first, request }.encode();
                first = false;
                transport.ask(to, Lane::Appends, question, APPEND_TIMEOUT)
            })
            .buffered(APPENDS_IN_FLIGHT_MAX)
            .map(|answer| append_result(decode(answer)));
        // Ends with the first failure: what was sent behind it belongs to a stream that is over.
        let until_failure = stream::unfold(Some(answers), |answers| async move {
            let mut answers = answers?;
            let answer = answers.next().await?;
            let goes_on = matches!(answer, Ok(Ok(_)));
            Some((answer, goes_on.then_some(answers)))
        });
        Box::pin(async move { Ok(until_failure.boxed()) })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(false, request).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(true, request).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::alias::SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + openraft::OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let send = self.snapshots.send(&*self.transport, self.to, vote, snapshot);
        tokio::select! {
            biased;
            closed = cancel => Err(closed.into()),
            sent = send => match sent {
                Ok(vote) => Ok(SnapshotResponse::new(vote)),
                Err(why) => Err(StreamingError::Unreachable(Unreachable::from_string(why))),
            },
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<Result<(), TransferLeaderError<TypeConfig>>> {
        let vote = *request.from_leader();
        let question = Question::Transfer(request).encode();
        match self.ask(Lane::Control, question, VOTE_TIMEOUT).await? {
            Answer::Transfer(true) => Ok(Ok(())),
            Answer::Transfer(false) => {
                Ok(Err(TransferLeaderError::VoteChanged { expected: vote, actual: vote }))
            }
            other => Err(unreachable(format!("a transfer was answered with {other:?}"))),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        // A peer that comes back is found within a tenth of a second; one that stays away costs
        // ten attempts a second, which fail at once.
        let steps = [10, 20, 40, 80].into_iter().chain(std::iter::repeat(100));
        Some(Backoff::new(steps.map(Duration::from_millis)))
    }
}

impl Network {
    async fn ask_vote(
        &self,
        pre: bool,
        request: VoteRequest<TypeConfig>,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let question = Question::Vote { pre, request }.encode();
        match self.ask(Lane::Control, question, VOTE_TIMEOUT).await? {
            Answer::Vote(response) => Ok(response),
            other => Err(unreachable(format!("a vote was answered with {other:?}"))),
        }
    }
}

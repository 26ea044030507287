//! Owns delete-ranges: at once within one entity, or in steps over all shards with their progress,
//! carried on by the resume token when a node fails. Does not step through shards: any node does.
//!
//! In steps: every key that existed when the call began and was not written since is gone when it is
//! done. A key that is written while it runs may be deleted or not; a call that goes on with a token is
//! part of the one that the token came from.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::v1::pipeline_request::Operation as Wire;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::{entity, limits, v1};
use futures_util::stream::try_unfold;
use futures_util::{Stream, TryStreamExt};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Status, Streaming};

use crate::answer::{Served, Version};
use crate::connection::fault_of;
use crate::driver::Call;
use crate::error::{Error, ErrorKind, Report};
use crate::pipeline::Pipeline;
use crate::request::{Pending, Target};
use crate::retry::{AttemptInfo, Decision, Failure, decide};
use crate::scan::KeyRange;

/// Deletes a range. Awaiting it goes to the end and gives [`DeletedRange`]; [`DeleteRange::stream`]
/// tells how far it is.
#[must_use = "a call is made when it is awaited"]
pub struct DeleteRange {
    target: Target,
    request: v1::DeleteRangeRequest,
    /// Nothing can be in it; on the wire an empty end would mean no end.
    is_empty: bool,
}

/// What a delete-range did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeletedRange {
    /// Keys that were deleted. Steps whose answers were lost for good are not counted.
    pub deleted: u64,
    /// The version of the deletions; in steps, of the last one. 0 when none was needed.
    pub version: Version,
    /// Where it stands in the shard's log; in steps, the last one. `None` when none was needed.
    pub served: Option<Served>,
}

/// How far a delete-range is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DeleteProgress {
    /// Keys that this call has deleted so far.
    pub deleted: u64,
    /// The version of the last step.
    pub version: Version,
    /// Where that step stands in its shard's log.
    pub served: Option<Served>,
    /// For [`DeleteRange::resume`], to go on from here.
    pub resume_token: Bytes,
    /// Nothing is left.
    pub done: bool,
}

impl DeleteProgress {
    fn of(answer: v1::DeleteRangeResponse) -> DeleteProgress {
        DeleteProgress {
            deleted: answer.deleted,
            version: Version(answer.version),
            served: answer.served.as_ref().map(|served| Served::from_wire(Some(served))),
            resume_token: answer.resume_token,
            done: answer.done,
        }
    }
}

impl DeleteRange {
    pub(crate) fn new(target: Target, range: impl KeyRange) -> DeleteRange {
        let (start, end) = range.bounds();
        let is_empty = end.as_ref().is_some_and(|end| *end <= start);
        let request = v1::DeleteRangeRequest {
            keyspace: target.keyspace.as_ref().to_owned(),
            start,
            end: end.unwrap_or_default(),
            ..Default::default()
        };
        DeleteRange { target, request, is_empty }
    }

    /// Only keys with this prefix, of those in the range.
    pub fn prefix(mut self, prefix: impl Into<Bytes>) -> DeleteRange {
        self.request.prefix = prefix.into();
        self
    }

    /// All or nothing, at one version: the range must lie within one entity, else the error is
    /// `CrossEntity`. Where more keys exist in it than the service deletes at once
    /// (`DELETE_RANGE_KEYS_MAX`, 10,000), nothing changes and the error is `TooLarge`.
    pub fn atomic(mut self) -> DeleteRange {
        self.request.atomic = true;
        self
    }

    /// Keys that one step on a shard deletes at most, up to 10,000. Default: 1,000.
    pub fn step_keys(mut self, keys: u32) -> DeleteRange {
        self.request.step_keys = keys.max(1);
        self
    }

    /// How long each progress may take, retries included; of an atomic one, the whole call. In steps,
    /// it has no deadline as a whole.
    pub fn timeout(mut self, timeout: Duration) -> DeleteRange {
        self.target.timeout = Some(timeout);
        self
    }

    /// Goes on with an earlier delete-range of the same range. Not with `atomic`.
    pub fn resume(mut self, resume_token: impl Into<Bytes>) -> DeleteRange {
        self.request.resume_token = resume_token.into();
        self
    }

    /// Deletes as it is polled, and tells the progress. An atomic one has a single progress. Dropping
    /// it begins no further step.
    pub fn stream(self) -> DeleteStream {
        let walk = Walk {
            timeout: self.target.timeout.unwrap_or(self.target.driver.settings.operation_timeout),
            bounds: (!self.is_empty).then(|| bounds(&self.request)).flatten(),
            target: self.target,
            request: self.request,
            open: None,
            avoid: None,
            before: 0,
            deleted: 0,
            may_have_deleted: false,
            state: State::New,
        };
        let progress = try_unfold(walk, |mut walk| async move {
            let progress = walk.next().await?;
            Ok(progress.map(|progress| (progress, walk)))
        });
        DeleteStream { progress: Box::pin(progress) }
    }
}

impl IntoFuture for DeleteRange {
    type Output = Result<DeletedRange, Error>;
    type IntoFuture = Pending<DeletedRange>;

    fn into_future(self) -> Pending<DeletedRange> {
        let mut progress = self.stream();
        Box::pin(async move {
            let mut last = DeletedRange { deleted: 0, version: Version(0), served: None };
            while let Some(progress) = progress.try_next().await? {
                let DeleteProgress { deleted, version, served, .. } = progress;
                last = DeletedRange { deleted, version, served };
            }
            Ok(last)
        })
    }
}

/// The progress of a delete-range. Ends after an error; the token of the last progress goes on.
#[must_use = "it deletes as it is polled"]
pub struct DeleteStream {
    progress: Pin<Box<dyn Stream<Item = Result<DeleteProgress, Error>> + Send>>,
}

impl Stream for DeleteStream {
    type Item = Result<DeleteProgress, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.progress.as_mut().poll_next(context)
    }
}

/// The first key of a range and the first behind it; `None` when no key can be in it.
fn bounds(request: &v1::DeleteRangeRequest) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    entity::bounds(&request.start, &request.end, &request.prefix)
}

#[derive(PartialEq, Eq)]
enum State {
    New,
    Going,
    Done,
}

/// A delete-range on its way. The request's token always stands at the last progress.
struct Walk {
    target: Target,
    timeout: Duration,
    request: v1::DeleteRangeRequest,
    /// `None`: nothing can be in it.
    bounds: Option<(Vec<u8>, Option<Vec<u8>>)>,
    open: Option<(Arc<Pipeline>, Streaming<v1::DeleteRangeResponse>)>,
    /// The address that failed last.
    avoid: Option<String>,
    /// Deleted by the streams before the one that is open.
    before: u64,
    deleted: u64,
    may_have_deleted: bool,
    state: State,
}

impl Walk {
    /// The next progress; `None` behind the last.
    async fn next(&mut self) -> Result<Option<DeleteProgress>, Error> {
        if self.state == State::New {
            limits::check_delete_range(&self.request)?;
            self.state = State::Going;
        }
        if self.state == State::Done {
            return Ok(None);
        }
        let Some((first, _)) = &self.bounds else {
            self.state = State::Done;
            return Ok(Some(DeleteProgress::of(v1::DeleteRangeResponse {
                done: true,
                ..Default::default()
            })));
        };
        if self.request.atomic {
            self.state = State::Done;
            let key = first.clone().into();
            return self.at_once(key).await.map(Some);
        }
        self.steps().await.map(Some)
    }

    /// One write like any other: routed to the leader, retried under its id.
    async fn at_once(&self, key: Bytes) -> Result<DeleteProgress, Error> {
        let operation = Wire::DeleteRange(self.request.clone());
        let Target { driver, keyspace, timeout, consistency, .. } = self.target.clone();
        let any_replica = false;
        let call = Call { keyspace, key, operation, timeout, consistency, any_replica };
        let answer = driver.call(call).await?;
        match answer {
            Answer::DeleteRange(answer) => Ok(DeleteProgress::of(answer)),
            _ => Err(Error::wrong_answer(true)),
        }
    }

    /// Until the next progress, of whatever node.
    async fn steps(&mut self) -> Result<DeleteProgress, Error> {
        let driver = self.target.driver.clone();
        let deadline = Instant::now() + self.timeout;
        let mut attempts = 0u32;
        let mut backoffs = 0;
        loop {
            if driver.is_closed() {
                return Err(self.closed());
            }
            attempts += 1;
            // A round of steps may take long without anybody being at fault: the later an attempt,
            // the longer it waits.
            let patience = driver.settings.attempt_timeout.saturating_mul(attempts.div_ceil(2));
            let until = deadline.min(Instant::now() + patience);
            let (failure, fault) = match self.attempt(until).await {
                Ok(progress) => return Ok(progress),
                Err(fault) => (Failure::of(fault.reason, None), fault),
            };
            self.open = None;
            self.before = self.deleted;
            self.may_have_deleted |= fault.outcome == Outcome::Unknown;
            let retry_after_ms = fault.retry_after_ms;
            let step = decide(&AttemptInfo {
                failure,
                backoffs,
                detours: attempts - 1,
                // The token makes every attempt safe.
                unresolved: false,
                budget: true,
                retry_after: (retry_after_ms > 0).then(|| Duration::from_millis(retry_after_ms)),
                remaining: deadline.saturating_duration_since(Instant::now()),
                jitter: driver.follower.random(),
            });
            tracing::debug!(attempts, failure = %fault, ?step, "round of a delete-range failed");
            if step.decision == Decision::Stop {
                return Err(Error::of_steps(fault, attempts, self.may_have_deleted));
            }
            if !step.wait.is_zero() {
                backoffs += 1;
                sleep(step.wait).await;
            }
        }
    }

    fn closed(&self) -> Error {
        Error::new(Report {
            kind: ErrorKind::Closed,
            outcome: match self.may_have_deleted {
                true => Outcome::Unknown,
                false => Outcome::NotApplied,
            },
            message: "the client has been closed".to_owned(),
            is_write: true,
            shard: None,
            node: None,
            attempts: 0,
            request_id: None,
            fault: None,
        })
    }

    /// Waits for one progress, on the stream that is open or on a new one.
    async fn attempt(&mut self, until: Instant) -> Result<DeleteProgress, Fault> {
        let started = Instant::now();
        if self.open.is_none() {
            let pipeline = self.choose()?;
            // Whatever goes wrong from here on, goes wrong at this node.
            self.avoid = Some(pipeline.connection().address().to_owned());
            let mut client = pipeline.connection().kv();
            let answer = match timeout_at(until, client.delete_range(self.request.clone())).await {
                Ok(answer) => answer.map_err(|status| failed(&pipeline, &status)),
                Err(_) => Err(silent(&pipeline, started)),
            };
            self.open = Some((pipeline, answer?.into_inner()));
        }
        let (pipeline, stream) = self.open.as_mut().expect("it was opened above");
        let progress = match timeout_at(until, stream.message()).await {
            Ok(Ok(Some(progress))) => progress,
            Ok(Ok(None)) => {
                let message = "the node ended the delete-range midway";
                return Err(Fault::new(Reason::Unreachable, message));
            }
            Ok(Err(status)) => return Err(failed(pipeline, &status)),
            Err(_) => return Err(silent(pipeline, started)),
        };
        pipeline.connection().heard();
        self.avoid = None;
        if progress.done {
            (self.state, self.open) = (State::Done, None);
        } else if progress.resume_token.is_empty() {
            return Err(Fault::new(Reason::Internal, "a progress came without a resume token"));
        }
        let session = &self.target.driver.follower.session;
        progress.steps.iter().for_each(|served| session.observe(served, progress.version));
        self.may_have_deleted = true;
        self.deleted = self.before + progress.deleted;
        self.request.resume_token = progress.resume_token.clone();
        Ok(DeleteProgress { deleted: self.deleted, ..DeleteProgress::of(progress) })
    }

    /// The node to ask: the leader where all keys are of one entity, else any.
    fn choose(&self) -> Result<Arc<Pipeline>, Fault> {
        let follower = &self.target.driver.follower;
        let table = follower.routes.table();
        let v1::DeleteRangeRequest { keyspace, start, end, prefix, .. } = self.request.clone();
        let range = v1::ScanRequest { keyspace, start, end, prefix, ..Default::default() };
        let leader = table.route_of_range(&range).and_then(|route| route.leader.node);
        let leader = leader.and_then(|node| table.address(node)).map(str::to_owned);
        let leader = leader.filter(|address| follower.pool.is_usable(address));
        let mut candidates: Vec<String> = leader.into_iter().collect();
        candidates.extend(follower.candidates());
        let others = candidates.iter().filter(|address| Some(*address) != self.avoid.as_ref());
        let mut in_order = others.chain(&candidates);
        in_order.find_map(|address| follower.pool.get(address)).ok_or_else(|| {
            let fault = Fault::new(Reason::Unreachable, "no node is known");
            fault.with_outcome(Outcome::NotApplied)
        })
    }
}

fn failed(pipeline: &Pipeline, status: &Status) -> Fault {
    fault_of(status, pipeline.connection().address())
}

fn silent(pipeline: &Pipeline, started: Instant) -> Fault {
    let connection = pipeline.connection();
    if connection.is_silent_since(started) {
        connection.failed();
    }
    let message = format!("no progress from {} in time", connection.address());
    Fault::new(Reason::OutcomeUnknown, message)
}

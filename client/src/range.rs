//! Owns delete-ranges: at once within one entity, or in steps over all shards with their progress,
//! carried on by the resume token when a node fails. Does not step through shards: any node does.
//!
//! In steps: every key that existed when the call began and was not written since is gone when it is
//! done. The first progress has deleted nothing, and its token names a version: whatever is written once
//! it was given out stays, however late a step that was sent under it comes. A call that goes on with a
//! token is part of the one that the token came from.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::Outcome;
use coracle_proto::v1::pipeline_request::Operation as Wire;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::{entity, limits, v1};
use futures_util::stream::try_unfold;
use futures_util::{Stream, TryStreamExt};
use tonic::{Response, Status, Streaming};

use crate::answer::{Served, Version};
use crate::connection::Connection;
use crate::driver::Call;
use crate::error::{Error, ErrorKind, Report};
use crate::request::{Pending, Target};
use crate::resume::{Behind, Broken, Resumable, Resumed};
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

    /// Deletes as it is polled, and tells the progress. The first has deleted nothing: what is written
    /// from then on stays. An atomic one has a single progress. Dropping it begins no further step.
    pub fn stream(self) -> DeleteStream {
        let Target { driver, timeout, .. } = self.target.clone();
        let timeout = timeout.unwrap_or(driver.settings.operation_timeout);
        let walk = Walk {
            first: (!self.is_empty).then(|| first_key(&self.request)).flatten(),
            target: self.target,
            rounds: Resumed::new(driver, timeout, self.request),
            stream: 0,
            before: 0,
            deleted: 0,
            may_have_deleted: false,
            is_new: true,
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

/// The first key of a range; `None` when no key can be in it.
fn first_key(request: &v1::DeleteRangeRequest) -> Option<Bytes> {
    let bounds = entity::bounds(&request.start, &request.end, &request.prefix);
    bounds.map(|(first, _)| first.into())
}

/// A delete-range on its way.
struct Walk {
    target: Target,
    rounds: Resumed<v1::DeleteRangeRequest>,
    /// `None`: nothing can be in it.
    first: Option<Bytes>,
    /// The stream that the last progress came on.
    stream: u64,
    /// Deleted by the streams before that one.
    before: u64,
    deleted: u64,
    may_have_deleted: bool,
    is_new: bool,
}

impl Walk {
    /// The next progress; `None` behind the last.
    async fn next(&mut self) -> Result<Option<DeleteProgress>, Error> {
        if std::mem::take(&mut self.is_new) {
            limits::check_delete_range(&self.rounds.request)?;
        }
        if self.rounds.over {
            return Ok(None);
        }
        let Some(first) = &self.first else {
            self.rounds.over = true;
            return Ok(Some(DeleteProgress::of(v1::DeleteRangeResponse {
                done: true,
                ..Default::default()
            })));
        };
        if self.rounds.request.atomic {
            self.rounds.over = true;
            let key = first.clone();
            return self.at_once(key).await.map(Some);
        }
        self.round().await
    }

    /// One write like any other: routed to the leader, retried under its id.
    async fn at_once(&self, key: Bytes) -> Result<DeleteProgress, Error> {
        let operation = Wire::DeleteRange(self.rounds.request.clone());
        let Target { driver, keyspace, timeout, consistency, .. } = self.target.clone();
        let any_replica = false;
        let call = Call { keyspace, key, operation, timeout, consistency, any_replica };
        let answer = driver.call(call).await?;
        match answer {
            Answer::DeleteRange(answer) => Ok(DeleteProgress::of(answer)),
            _ => Err(Error::wrong_answer(true)),
        }
    }

    async fn round(&mut self) -> Result<Option<DeleteProgress>, Error> {
        // Without a token a call only fixes its version, whatever becomes of it.
        let deletes = !self.rounds.request.resume_token.is_empty();
        let round = self.rounds.next().await;
        self.may_have_deleted |= deletes && (self.rounds.unknown || round.is_ok());
        self.rounds.unknown = false;
        let round = round.map_err(|broken| match broken {
            Broken::Closed => self.closed(),
            Broken::Fault(fault, attempts) => {
                let outcome = match self.may_have_deleted {
                    true => Outcome::Unknown,
                    false if deletes => fault.outcome,
                    false => Outcome::NotApplied,
                };
                Error::of_fault(fault.with_outcome(outcome), attempts, true)
            }
        })?;
        let Some(round) = round else { return Ok(None) };
        if std::mem::replace(&mut self.stream, self.rounds.streams) != self.stream {
            self.before = self.deleted;
        }
        let session = &self.target.driver.follower.session;
        round.steps.iter().for_each(|served| session.observe(served, round.version));
        self.deleted = self.before + round.deleted;
        Ok(Some(DeleteProgress { deleted: self.deleted, ..DeleteProgress::of(round) }))
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
}

impl Resumable for v1::DeleteRangeRequest {
    type Part = v1::DeleteRangeResponse;

    const NAMES: (&'static str, &'static str) = ("delete-range", "progress");

    async fn open(
        self,
        connection: &Connection,
    ) -> Result<Response<Streaming<v1::DeleteRangeResponse>>, Status> {
        connection.kv().delete_range(self).await
    }

    fn range(&self) -> v1::ScanRequest {
        let (start, end) = (self.start.clone(), self.end.clone());
        let (keyspace, prefix) = (self.keyspace.clone(), self.prefix.clone());
        v1::ScanRequest { keyspace, start, end, prefix, ..Default::default() }
    }

    fn advance(&mut self, progress: &v1::DeleteRangeResponse) -> Behind {
        if progress.done {
            return Behind::End;
        }
        if progress.resume_token.is_empty() {
            return Behind::NoToken;
        }
        let before = std::mem::replace(&mut self.resume_token, progress.resume_token.clone());
        // The call that fixes the version deletes nothing, and ends.
        if before.is_empty() { Behind::Another } else { Behind::Same }
    }
}

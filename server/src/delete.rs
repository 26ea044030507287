//! Owns a delete-range over the shards of a keyspace: which arcs are under way, the steps on them, the
//! token that goes on. Does not delete on a shard (see `router`).
//!
//! **One version.** A call that comes without a token deletes nothing: it fixes a version on all shards
//! (see `fence`), and answers once, with a token that holds it. Every step is of a call that came with
//! a token, and leaves alone what was written above its version. So a caller that has lost its node may
//! go on at another, by the token, or anew when it has got none: what the lost one still does, however
//! late, it does under a version that lies below all that is written once the token was out. Were the
//! version fixed by the call that begins with the steps, one that is held up before it could fix one
//! above what was written after another had finished, and delete it.
//!
//! **Steps.** Each is a logical write of its own on one shard, with a request id of its own, which it
//! keeps over its retries: so it is counted once. An answer whose step is unknown to the end is left in
//! the token as not done; to go over it again does no harm.
//!
//! **Changes on the way.** The token names arcs of the ring, and a step says which arc its group held
//! when it was applied. So a split or a move in between leaves nothing out: what a step has not covered
//! is asked of whoever holds it then.
//!
//! **What it promises.** Every key that existed when the call began and was not written since is gone
//! when it is done. A key that is written before the token was answered may be deleted or not. What is
//! written after stays, also between a call that broke off and the one that goes on with its token.
//!
//! **Slow readers.** It works on a round that somebody waits for, and only then is it a request in
//! flight. When nobody asks for long, it gives its request ids back ([`DeleteRange::rest`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::{Fault, Outcome, Reason, Retry};
use coracle_proto::ring::Position;
use coracle_proto::shard_map::ShardId;
use coracle_proto::token::{DeleteToken, Lane};
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::{delete_range, ring, v1};
use futures_util::stream::{self, StreamExt};
use prost::Message;

use crate::admission::Call;
use crate::fault;
use crate::router::{Issued, Router, mismatched, open_keyspace};

mod fence;
mod rounds;

pub use rounds::{IDLE_MAX, REST_AFTER, Rounds, open};

/// Arcs that one delete-range is under way in at a time: their leaders are many nodes' disks, and one
/// caller shall not take all of what each can do. Beyond: they follow in ring order.
const LANES_AT_A_TIME: usize = 16;
/// After a round in which every step failed, where the refusals name no other time.
const PAUSE: Duration = Duration::from_millis(100);

/// A delete-range under way. Holds nothing on any shard: dropping it begins no further step.
pub struct DeleteRange {
    router: Arc<Router>,
    request: v1::DeleteRangeRequest,
    call: Call,
    token: DeleteToken,
    /// Steps that may have been applied, with the lane as it was sent: only the same step may go
    /// again under its id.
    open: BTreeMap<u64, (Lane, Issued)>,
    deleted: u64,
    /// The last applied step's.
    version: u64,
    served: Option<v1::Served>,
    /// Of the steps since the last progress.
    steps: Vec<v1::Served>,
    /// Something may have been deleted: a failure says no more than that.
    may_have_deleted: bool,
    done: bool,
}

impl DeleteRange {
    /// Checks a delete-range and takes it on. Nothing is deleted yet.
    pub async fn begin(
        router: Arc<Router>,
        request: v1::DeleteRangeRequest,
        call: Call,
    ) -> Result<DeleteRange, Fault> {
        if !request.atomic && request.request_id.is_some() {
            let message = "the steps of a delete-range have ids of their own: leave it out";
            return Err(Fault::invalid("request_id", message));
        }
        // A node that takes nothing new on takes no delete-range on either.
        router.admission().admit(request.encoded_len() as u64, call.origin)?;
        let token = match begun(&router, &request, &call) {
            Err(Fault { reason: Reason::UnknownKeyspace | Reason::StaleRoute, .. }) => {
                router.refresh(call.deadline).await;
                begun(&router, &request, &call)?
            }
            token => token?,
        };
        Ok(DeleteRange {
            router,
            call,
            token,
            open: BTreeMap::new(),
            deleted: 0,
            version: 0,
            served: None,
            steps: Vec::new(),
            may_have_deleted: false,
            done: false,
            request: v1::DeleteRangeRequest { resume_token: Bytes::new(), ..request },
        })
    }

    /// The next progress; `None` behind the last. After an error it is over here; the token of the
    /// last progress goes on anywhere.
    pub async fn next_round(&mut self) -> Result<Option<v1::DeleteRangeResponse>, Fault> {
        let round = self.until_progress().await;
        round.map_err(|fault| match self.may_have_deleted {
            true => fault.with_outcome(Outcome::Unknown),
            false => fault,
        })
    }

    async fn until_progress(&mut self) -> Result<Option<v1::DeleteRangeResponse>, Fault> {
        if self.done {
            return Ok(None);
        }
        // While this node shuts down another one goes on, by the token of the last progress.
        let held = (self.request.encoded_len() + self.token_bytes()) as u64;
        let _permit = self.router.admission().admit(held, self.call.origin)?;
        let call = self.call.next_page();
        if self.request.atomic && !self.token.is_done() {
            let operation = Operation::DeleteRange(self.request.clone());
            let answer = self.router.execute(operation, &call).await;
            self.done = true;
            return match answer? {
                Answer::DeleteRange(answer) => Ok(Some(answer)),
                _ => Err(mismatched()),
            };
        }
        if self.token.version == 0 && !self.token.is_done() {
            self.token.version = fence::fix(&self.router, &self.token, &call).await?;
            let first = self.progress();
            // The caller has it before anything is deleted under it.
            self.done = true;
            return Ok(Some(first));
        }
        loop {
            let round = self.round(&call).await?;
            let Some(failed) = round else { break };
            let asked = Duration::from_millis(failed.retry_after_ms);
            let pause = if asked.is_zero() { PAUSE } else { asked };
            if pause >= call.left() {
                return Err(failed);
            }
            tokio::time::sleep(pause).await;
        }
        Ok(Some(self.progress()))
    }

    /// Gives back what is held between rounds. A step that may have been applied goes again under
    /// another id, to no effect but on the count.
    pub fn rest(&mut self) {
        self.open.clear();
    }

    fn token_bytes(&self) -> usize {
        self.token.lanes.iter().map(|lane| lane.from.len()).sum()
    }

    fn progress(&mut self) -> v1::DeleteRangeResponse {
        self.done = self.token.is_done();
        // Nothing can be in the range: no version was fixed.
        let has_token = self.token.version > 0;
        v1::DeleteRangeResponse {
            deleted: self.deleted,
            resume_token: if has_token { self.token.encode() } else { Bytes::new() },
            done: self.done,
            version: self.version,
            served: self.served,
            steps: std::mem::take(&mut self.steps),
        }
    }

    /// One step on each arc under way. Gives the last fault when none was applied.
    async fn round(&mut self, call: &Call) -> Result<Option<Fault>, Fault> {
        let token = &mut self.token;
        let map = self.router.current_map()?;
        while token.lanes.len() < LANES_AT_A_TIME
            && let Some(rest) = token.rest
        {
            let arc = map.locate(Position(rest)).arc;
            token.open_lane(arc.expect("a shard of the ring has an arc"));
        }
        if token.lanes.is_empty() {
            return Ok(None);
        }
        let mut steps = Vec::new();
        for lane in &token.lanes {
            let start = lane.arc.start().0;
            let same = self.open.get(&start).is_some_and(|(sent, _)| sent == lane);
            if !same {
                self.open.insert(start, (lane.clone(), self.router.ids().issue()));
            }
            let (lane, issued) = &self.open[&start];
            let only = DeleteToken { lanes: vec![lane.clone()], rest: None, ..token.clone() };
            steps.push((
                start,
                v1::DeleteRangeRequest {
                    request_id: Some(issued.id),
                    resume_token: only.encode(),
                    // Whoever holds the lane's beginning; the router looks for it anew on every attempt.
                    only_shard: None,
                    ..self.request.clone()
                },
            ));
        }
        let router = &self.router;
        let ask = |(start, request): (u64, v1::DeleteRangeRequest)| async move {
            (start, router.execute(Operation::DeleteRange(request), call).await)
        };
        let answers: Vec<_> = stream::iter(steps.into_iter().map(ask))
            .buffer_unordered(LANES_AT_A_TIME)
            .collect()
            .await;
        let (mut failed, mut applied) = (None, false);
        for (start, answer) in answers {
            match answer {
                Ok(Answer::DeleteRange(step)) => {
                    self.take(start, step)?;
                    applied = true;
                }
                Ok(_) => return Err(mismatched()),
                Err(fault) => failed = Some(self.tolerate(start, fault)?),
            }
        }
        Ok(failed.filter(|_| !applied))
    }

    /// An applied step: its lane goes on from where it has come to.
    fn take(&mut self, start: u64, step: v1::DeleteRangeResponse) -> Result<(), Fault> {
        let left = DeleteToken::decode(&step.resume_token).map_err(|_| mismatched())?;
        let sent = self.open.remove(&start).map(|(lane, _)| lane);
        self.deleted += step.deleted;
        (self.version, self.served) = (step.version, step.served);
        self.steps.extend(step.served);
        self.may_have_deleted = true;
        // A lane that was united with its neighbour meanwhile covers more than this step did: it goes
        // over it again, to no effect.
        if sent.is_some_and(|sent| self.token.lanes.contains(&sent)) {
            self.token.replace(start, left.lanes);
        }
        Ok(())
    }

    /// A failed step that may be tried again, within the time of the round or by the token.
    fn tolerate(&mut self, start: u64, fault: Fault) -> Result<Fault, Fault> {
        self.may_have_deleted |= fault.outcome == Outcome::Unknown;
        if fault.reason == Reason::RetryWindowPassed {
            // Applied or not, what is left is deleted under another id.
            self.open.remove(&start);
            return Ok(fault);
        }
        match fault.retry() {
            Retry::Never if fault.reason != Reason::DeadlineNotApplied => Err(fault),
            _ => Ok(fault),
        }
    }
}

/// Where a request stands: at its token, or before its first step. That of an atomic one only says
/// whether any key can be in it.
fn begun(
    router: &Router,
    request: &v1::DeleteRangeRequest,
    call: &Call,
) -> Result<DeleteToken, Fault> {
    let map = router.current_map()?;
    let keyspace = open_keyspace(&map, &request.keyspace, call.origin)?;
    let Some(asked) = delete_range::read(&map, keyspace, request)? else {
        return Ok(DeleteToken { rest: None, ..DeleteToken::begin(request, keyspace.id) });
    };
    asked.begun(keyspace, request, |route| {
        let id = ShardId(route.shard);
        let named = map.shard(id).filter(|shard| [0, shard.epoch.0].contains(&route.shard_epoch));
        let arc: Option<ring::Arc> = named.and_then(|shard| shard.arc);
        arc.ok_or_else(|| fault::stale_route(Some(&map), id, None))
    })
}

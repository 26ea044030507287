//! Owns calls that a node answers part by part and that go on behind the last part at any node, by its
//! resume token: the attempts at each part, the stream that is open, the node that is asked. Does not
//! know what the parts hold.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::v1;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Response, Status, Streaming};

use crate::connection::{Connection, fault_of};
use crate::driver::Driver;
use crate::pipeline::Pipeline;
use crate::retry::{AttemptInfo, Decision, Failure, decide};

/// A request that is answered part by part, and that takes a token to go on with.
pub(crate) trait Resumable: Clone + Send + Sync + 'static {
    type Part: Send + 'static;

    /// What it is, and what a part of it is, in messages.
    const NAMES: (&'static str, &'static str);

    fn open(
        self,
        connection: &Connection,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Part>>, Status>> + Send;

    /// Which keys it is about.
    fn range(&self) -> v1::ScanRequest;

    /// Stands behind a part, which is left with its token: see [`Behind`].
    fn advance(&mut self, part: &Self::Part) -> Behind;
}

/// What comes behind a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// The stream goes on.
    Same,
    /// Another stream, by the token.
    Another,
    /// Nothing.
    End,
    /// The part is not the last, and brings no token.
    NoToken,
}

/// Why there is no further part.
pub(crate) enum Broken {
    /// The client has been closed.
    Closed,
    /// The last fault, and how often it was tried.
    Fault(Box<Fault>, u32),
}

/// A call on its way. Its request always stands behind the last part that was given out.
pub(crate) struct Resumed<R: Resumable> {
    driver: Arc<Driver>,
    /// How long each part may take, attempts included.
    timeout: Duration,
    pub(crate) request: R,
    open: Option<(Arc<Pipeline>, Streaming<R::Part>)>,
    /// The address that failed last.
    avoid: Option<String>,
    /// Streams that were opened.
    pub(crate) streams: u64,
    /// An attempt that failed may have had an effect.
    pub(crate) unknown: bool,
    pub(crate) over: bool,
}

impl<R: Resumable> Resumed<R> {
    pub(crate) fn new(driver: Arc<Driver>, timeout: Duration, request: R) -> Resumed<R> {
        let (open, avoid) = (None, None);
        Resumed { driver, timeout, request, open, avoid, streams: 0, unknown: false, over: false }
    }

    /// The next part, of whatever node; `None` behind the last.
    pub(crate) async fn next(&mut self) -> Result<Option<R::Part>, Broken> {
        if self.over {
            return Ok(None);
        }
        let driver = self.driver.clone();
        let deadline = Instant::now() + self.timeout;
        let mut attempts = 0u32;
        let mut backoffs = 0;
        loop {
            if driver.is_closed() {
                return Err(Broken::Closed);
            }
            attempts += 1;
            // A part may take long without anybody being at fault: the later an attempt, the longer
            // it waits.
            let patience = driver.settings.attempt_timeout.saturating_mul(attempts.div_ceil(2));
            let until = deadline.min(Instant::now() + patience);
            let (failure, fault) = match self.attempt(until).await {
                Ok(part) => return Ok(Some(part)),
                Err(fault) => (Failure::of(fault.reason, None), fault),
            };
            self.open = None;
            self.unknown |= fault.outcome == Outcome::Unknown;
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
            let (call, part) = R::NAMES;
            tracing::debug!(attempts, failure = %fault, ?step, "{part} of a {call} failed");
            if step.decision == Decision::Stop {
                return Err(Broken::Fault(Box::new(fault), attempts));
            }
            if !step.wait.is_zero() {
                backoffs += 1;
                sleep(step.wait).await;
            }
        }
    }

    /// Waits for one part, on the stream that is open or on a new one.
    async fn attempt(&mut self, until: Instant) -> Result<R::Part, Fault> {
        let started = Instant::now();
        // Whatever goes wrong from here on, goes wrong at the node that is asked: also at one that was
        // well when it gave the part before, and whose stream broke while the reader was away.
        if let Some((pipeline, _)) = &self.open {
            self.avoid = Some(pipeline.connection().address().to_owned());
        } else {
            let pipeline = self.choose()?;
            self.avoid = Some(pipeline.connection().address().to_owned());
            let opening = self.request.clone().open(pipeline.connection());
            let answer = match timeout_at(until, opening).await {
                Ok(answer) => answer.map_err(|status| failed(&pipeline, &status)),
                Err(_) => Err(silent::<R>(&pipeline, started)),
            };
            self.open = Some((pipeline, answer?.into_inner()));
            self.streams += 1;
        }
        let (pipeline, stream) = self.open.as_mut().expect("it was opened above");
        let part = match timeout_at(until, stream.message()).await {
            Ok(Ok(Some(part))) => part,
            Ok(Ok(None)) => {
                let message = format!("the node ended the {} midway", R::NAMES.0);
                return Err(Fault::new(Reason::Unreachable, message));
            }
            Ok(Err(status)) => return Err(failed(pipeline, &status)),
            Err(_) => return Err(silent::<R>(pipeline, started)),
        };
        pipeline.connection().heard();
        self.avoid = None;
        match self.request.advance(&part) {
            Behind::Same => {}
            Behind::Another => self.open = None,
            Behind::End => (self.open, self.over) = (None, true),
            Behind::NoToken => {
                let message = format!("a {} came without a resume token", R::NAMES.1);
                return Err(Fault::new(Reason::Internal, message));
            }
        }
        Ok(part)
    }

    /// The node to ask: the leader where all keys are of one entity, else any.
    fn choose(&self) -> Result<Arc<Pipeline>, Fault> {
        let follower = &self.driver.follower;
        let table = follower.routes.table();
        let leader = table.route_of_range(&self.request.range());
        let leader = leader.and_then(|route| route.leader.node);
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

fn silent<R: Resumable>(pipeline: &Pipeline, started: Instant) -> Fault {
    let connection = pipeline.connection();
    if connection.is_silent_since(started) {
        connection.failed();
    }
    let message = format!("no {} from {} in time", R::NAMES.1, connection.address());
    Fault::new(Reason::OutcomeUnknown, message)
}

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
use crate::driver::{Driver, SILENCE};
use crate::pipeline::Pipeline;
use crate::retry::{AttemptInfo, Decision, Failure, decide};

/// Attempts of the shortest kind that fit into the time for one part. With it the first three do, and
/// the third may take half of it: what a page of 1 MiB needs on any disk that keeps up at all.
const FITTING: u32 = 4;
/// What an attempt may take at least: a page ends after a quarter of a second of looking for keys.
const PATIENCE_MIN: Duration = Duration::from_millis(300);

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
    /// The addresses that failed since the last part, in the order in which they did.
    failed: Vec<String>,
    /// Streams that were opened.
    pub(crate) streams: u64,
    /// An attempt that failed may have had an effect.
    pub(crate) unknown: bool,
    pub(crate) over: bool,
}

impl<R: Resumable> Resumed<R> {
    pub(crate) fn new(driver: Arc<Driver>, timeout: Duration, request: R) -> Resumed<R> {
        let (open, failed) = (None, Vec::new());
        Resumed { driver, timeout, request, open, failed, streams: 0, unknown: false, over: false }
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
            let patience = patience(driver.settings.attempt_timeout, self.timeout, attempts);
            // A node that is well takes a call on at once, however long its first part takes.
            let taken_on = Instant::now() + SILENCE.max(patience / 2);
            let until = deadline.min(Instant::now() + patience);
            let (failure, fault) = match self.attempt(until.min(taken_on), until).await {
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

    /// Waits for one part, on the stream that is open or on a new one, which is taken on in time.
    async fn attempt(&mut self, taken_on: Instant, until: Instant) -> Result<R::Part, Fault> {
        let started = Instant::now();
        // Whatever goes wrong from here on, goes wrong at the node that is asked: also at one that was
        // well when it gave the part before, and whose stream broke while the reader was away.
        if let Some((pipeline, _)) = &self.open {
            note_failed(&mut self.failed, pipeline.connection().address());
        } else {
            let pipeline = self.choose()?;
            note_failed(&mut self.failed, pipeline.connection().address());
            let opening = self.request.clone().open(pipeline.connection());
            let answer = match timeout_at(taken_on, opening).await {
                Ok(answer) => answer.map_err(|status| {
                    let fault = failed(&pipeline, &status);
                    if fault.reason == Reason::Unreachable {
                        pipeline.connection().failed();
                    }
                    fault
                }),
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
        self.failed.clear();
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

    /// The node to ask: the leader where all keys are of one entity, else any. Those that failed come
    /// behind the others, the one that did so longest ago first; behind them those that do not answer
    /// at all.
    fn choose(&self) -> Result<Arc<Pipeline>, Fault> {
        let follower = &self.driver.follower;
        let table = follower.routes.table();
        let leader = table.route_of_range(&self.request.range());
        let leader = leader.and_then(|route| route.leader.node);
        let leader = leader.and_then(|node| table.address(node)).map(str::to_owned);
        let leader = leader.filter(|address| follower.pool.is_usable(address));
        let mut candidates: Vec<String> = leader.into_iter().collect();
        candidates.extend(follower.candidates());
        candidates.sort_by_key(|address| {
            let place = self.failed.iter().position(|failed| failed == address);
            (!follower.is_well(&table, address), place)
        });
        candidates.iter().find_map(|address| follower.pool.get(address)).ok_or_else(|| {
            let fault = Fault::new(Reason::Unreachable, "no node is known");
            fault.with_outcome(Outcome::NotApplied)
        })
    }
}

/// How long an attempt may take: so that several fit, whatever the whole may take. A part may take long
/// without anybody being at fault: the later an attempt, the longer it waits.
fn patience(attempt_timeout: Duration, timeout: Duration, attempts: u32) -> Duration {
    let first = attempt_timeout.min((timeout / FITTING).max(PATIENCE_MIN));
    first.saturating_mul(attempts.div_ceil(2))
}

/// Notes that an address failed last.
fn note_failed(failed: &mut Vec<String>, address: &str) {
    failed.retain(|known| known != address);
    failed.push(address.to_owned());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_attempts_fit_into_the_time_for_a_part() {
        let ms = Duration::from_millis;
        let of = |timeout| [1, 2, 3, 4, 5].map(|n| patience(ms(1_000), timeout, n).as_millis());
        assert_eq!(of(ms(2_000)), [500, 500, 1_000, 1_000, 1_500]);
        assert_eq!(of(ms(5_000)), [1_000, 1_000, 2_000, 2_000, 3_000], "as without");
        assert_eq!(of(ms(400)), [300, 300, 600, 600, 900], "a page has its time");
    }

    #[test]
    fn who_failed_last_is_asked_last() {
        let mut failed = Vec::new();
        for address in ["a", "b", "a"] {
            note_failed(&mut failed, address);
        }
        assert_eq!(failed, ["b", "a"]);
    }
}

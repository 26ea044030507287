//! Owns scans: a range as a stream of keys or of pages, carried on behind the last page by its
//! resume token when a node fails, with nothing missing and nothing twice. Does not merge shards:
//! any node does.

use std::collections::VecDeque;
use std::ops::{Range, RangeFrom, RangeFull, RangeTo};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::{limits, v1};
use futures_util::Stream;
use futures_util::stream::try_unfold;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Status, Streaming};

use crate::answer::{KeyValue, Version};
use crate::connection::fault_of;
use crate::driver::closed;
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::request::{Target, no_version_0};
use crate::retry::{AttemptInfo, Decision, Failure, decide};

/// What can be scanned: `a..b`, `a..`, `..b` and `..` over keys.
pub trait KeyRange {
    /// The first key, and the first behind the last. Without an end, all to the last key.
    fn bounds(self) -> (Bytes, Option<Bytes>);
}

impl<K: Into<Bytes>> KeyRange for Range<K> {
    fn bounds(self) -> (Bytes, Option<Bytes>) {
        (self.start.into(), Some(self.end.into()))
    }
}

impl<K: Into<Bytes>> KeyRange for RangeFrom<K> {
    fn bounds(self) -> (Bytes, Option<Bytes>) {
        (self.start.into(), None)
    }
}

impl<K: Into<Bytes>> KeyRange for RangeTo<K> {
    fn bounds(self) -> (Bytes, Option<Bytes>) {
        (Bytes::new(), Some(self.end.into()))
    }
}

impl KeyRange for RangeFull {
    fn bounds(self) -> (Bytes, Option<Bytes>) {
        (Bytes::new(), None)
    }
}

/// A range read in key order at one version, over all shards of the keyspace. It holds every write
/// acknowledged before it began.
#[must_use = "a scan begins when its stream is polled"]
pub struct Scan {
    target: Target,
    request: v1::ScanRequest,
    /// Nothing can be in it; on the wire an empty end would mean no end.
    is_empty: bool,
}

/// Consecutive entries of a scan. They share one buffer: copy what is kept for long.
#[derive(Clone, Debug)]
pub struct Page {
    /// In the order of the scan. May be empty, also before the end.
    pub entries: Vec<KeyValue>,
    /// The version at which the whole scan reads.
    pub version: Version,
    /// For [`Scan::resume`], to go on behind this page.
    pub resume_token: Bytes,
    /// Nothing is left behind this page.
    pub is_last: bool,
}

impl Scan {
    pub(crate) fn new(target: Target, range: impl KeyRange) -> Scan {
        let (start, end) = range.bounds();
        let is_empty = end.as_ref().is_some_and(|end| *end <= start);
        let request = v1::ScanRequest {
            keyspace: target.keyspace.as_ref().to_owned(),
            start,
            end: end.unwrap_or_default(),
            ..Default::default()
        };
        Scan { target, request, is_empty }
    }

    /// Only keys with this prefix, of those in the range.
    pub fn prefix(mut self, prefix: impl Into<Bytes>) -> Scan {
        self.request.prefix = prefix.into();
        self
    }

    /// At most this many keys.
    pub fn limit(mut self, limit: u64) -> Scan {
        self.request.limit = limit;
        self.is_empty |= limit == 0;
        self
    }

    /// From the last key to the first.
    pub fn reverse(mut self) -> Scan {
        self.request.reverse = true;
        self
    }

    /// Without the values.
    pub fn keys_only(mut self) -> Scan {
        self.request.keys_only = true;
        self
    }

    /// The state at a version, instead of one that is fixed when the scan begins.
    /// [`crate::ErrorKind::VersionGone`] where the keyspace's history does not reach back to it. There is
    /// no version 0.
    pub fn at(mut self, version: Version) -> Scan {
        self.request.read = Some(v1::ReadOptions { at_version: version.0, ..Default::default() });
        self
    }

    /// Pages of about this many bytes, instead of 1 MiB; servers make none smaller than 16 KiB.
    pub fn page_bytes(mut self, bytes: u32) -> Scan {
        self.request.page_bytes = bytes;
        self
    }

    /// How long each page may take, retries included. A scan as a whole has no deadline.
    pub fn timeout(mut self, timeout: Duration) -> Scan {
        self.target.timeout = Some(timeout);
        self
    }

    /// Goes on behind a page of an earlier scan of the same range, limit and direction.
    pub fn resume(mut self, resume_token: impl Into<Bytes>) -> Scan {
        self.request.resume_token = resume_token.into();
        self
    }

    /// The keys, one by one.
    pub fn stream(self) -> ScanStream {
        ScanStream { pages: self.pages(), ready: VecDeque::new() }
    }

    /// The keys, page by page: at most 1 MiB or one entry, or what [`Scan::page_bytes`] says.
    pub fn pages(self) -> Pages {
        let is_empty = self.is_empty;
        let pager = Pager {
            page_timeout: self
                .target
                .timeout
                .unwrap_or(self.target.driver.settings.operation_timeout),
            target: self.target,
            request: self.request,
            open: None,
            avoid: None,
            done: is_empty,
            checked: false,
        };
        let pages = try_unfold(pager, |mut pager| async move {
            let page = pager.next_page().await?;
            Ok(page.map(|page| (page, pager)))
        });
        Pages { pages: Box::pin(pages) }
    }
}

/// The pages of a scan. Ends after an error.
#[must_use = "a scan begins when its stream is polled"]
pub struct Pages {
    pages: Pin<Box<dyn Stream<Item = Result<Page, Error>> + Send>>,
}

impl Stream for Pages {
    type Item = Result<Page, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.pages.as_mut().poll_next(context)
    }
}

/// The keys of a scan. Ends after an error.
#[must_use = "a scan begins when its stream is polled"]
pub struct ScanStream {
    pages: Pages,
    ready: VecDeque<KeyValue>,
}

impl Stream for ScanStream {
    type Item = Result<KeyValue, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pair) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(pair)));
            }
            match Pin::new(&mut self.pages).poll_next(context) {
                Poll::Ready(Some(Ok(page))) => self.ready = page.entries.into(),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// A scan on its way. The request's token always stands behind the last page that was given out.
struct Pager {
    target: Target,
    page_timeout: Duration,
    request: v1::ScanRequest,
    open: Option<(Arc<Pipeline>, Streaming<v1::ScanResponse>)>,
    /// The address that failed last.
    avoid: Option<String>,
    done: bool,
    checked: bool,
}

impl Pager {
    /// The next page; `None` at the end.
    async fn next_page(&mut self) -> Result<Option<Page>, Error> {
        if !self.checked {
            limits::check_scan(&self.request)?;
            // On the wire 0 would mean the newest.
            if self.request.read.as_ref().is_some_and(|read| read.at_version == 0) {
                return Err(no_version_0());
            }
            self.checked = true;
        }
        if self.done {
            return Ok(None);
        }
        let driver = self.target.driver.clone();
        let deadline = Instant::now() + self.page_timeout;
        let mut attempts = 0u32;
        let mut backoffs = 0;
        loop {
            if driver.is_closed() {
                return Err(closed());
            }
            attempts += 1;
            // A page of a wide range may take long without anybody being at fault: the later an
            // attempt, the longer it waits.
            let patience = driver.settings.attempt_timeout.saturating_mul(attempts.div_ceil(2));
            let until = deadline.min(Instant::now() + patience);
            let (failure, fault) = match self.attempt(until).await {
                Ok(page) => return Ok(Some(page)),
                Err(fault) => (Failure::of(fault.reason, None), fault),
            };
            self.open = None;
            let retry_after_ms = fault.retry_after_ms;
            let step = decide(&AttemptInfo {
                failure,
                backoffs,
                detours: attempts - 1,
                unresolved: false,
                budget: true,
                retry_after: (retry_after_ms > 0).then(|| Duration::from_millis(retry_after_ms)),
                remaining: deadline.saturating_duration_since(Instant::now()),
                jitter: driver.follower.random(),
            });
            tracing::debug!(attempts, failure = %fault, ?step, "page of a scan failed");
            if step.decision == Decision::Stop {
                return Err(Error::of_fault(fault, attempts, false));
            }
            if !step.wait.is_zero() {
                backoffs += 1;
                sleep(step.wait).await;
            }
        }
    }

    /// Waits for one page, on the stream that is open or on a new one.
    async fn attempt(&mut self, until: Instant) -> Result<Page, Fault> {
        let started = Instant::now();
        // Whatever goes wrong from here on, goes wrong at the node that is asked: also at one that was
        // well when it gave the page before, and whose stream broke while the reader was away.
        if let Some((pipeline, _)) = &self.open {
            self.avoid = Some(pipeline.connection().address().to_owned());
        } else {
            let pipeline = self.choose()?;
            self.avoid = Some(pipeline.connection().address().to_owned());
            let mut client = pipeline.connection().scans();
            let answer = match timeout_at(until, client.scan(self.request.clone())).await {
                Ok(answer) => answer.map_err(|status| failed(&pipeline, &status)),
                Err(_) => Err(silent(&pipeline, started)),
            };
            self.open = Some((pipeline, answer?.into_inner()));
        }
        let (pipeline, stream) = self.open.as_mut().expect("it was opened above");
        let page = match timeout_at(until, stream.message()).await {
            Ok(Ok(Some(page))) => page,
            Ok(Ok(None)) => {
                return Err(Fault::new(Reason::Unreachable, "the node ended the scan midway"));
            }
            Ok(Err(status)) => return Err(failed(pipeline, &status)),
            Err(_) => return Err(silent(pipeline, started)),
        };
        pipeline.connection().heard();
        self.avoid = None;
        self.done = page.done;
        if page.done {
            self.open = None;
        } else if page.resume_token.is_empty() {
            return Err(Fault::new(Reason::Internal, "a page came without a resume token"));
        }
        self.request.resume_token = page.resume_token.clone();
        Ok(Page {
            entries: page.entries.into_iter().map(KeyValue::from_wire).collect(),
            version: Version(page.version),
            resume_token: page.resume_token,
            is_last: page.done,
        })
    }

    /// The node to ask: the leader where all keys are of one entity, else any.
    fn choose(&self) -> Result<Arc<Pipeline>, Fault> {
        let follower = &self.target.driver.follower;
        let table = follower.routes.table();
        let leader = table.route_of_range(&self.request).and_then(|route| route.leader.node);
        let leader = leader.and_then(|node| table.address(node)).map(str::to_owned);
        let leader = leader.filter(|address| follower.pool.is_usable(address));
        let mut candidates: Vec<String> = leader.into_iter().collect();
        candidates.extend(follower.candidates());
        let others = candidates.iter().filter(|address| Some(*address) != self.avoid.as_ref());
        let mut in_order = others.chain(&candidates);
        in_order
            .find_map(|address| follower.pool.get(address))
            .ok_or_else(|| Fault::new(Reason::Unreachable, "no node is known"))
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
    let message = format!("no page from {} in time", connection.address());
    Fault::new(Reason::OutcomeUnknown, message)
}

//! Owns scans: a range as a stream of keys or of pages, with nothing missing and nothing twice. Does
//! not merge shards: any node does; and does not choose the node (see `resume`).

use std::collections::VecDeque;
use std::ops::{Range, RangeFrom, RangeFull, RangeTo};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::{limits, v1};
use futures_util::Stream;
use futures_util::stream::try_unfold;
use tonic::{Response, Status, Streaming};

use crate::answer::{KeyValue, Version};
use crate::connection::Connection;
use crate::driver::closed;
use crate::error::Error;
use crate::request::{Target, no_version_0};
use crate::resume::{Behind, Broken, Resumable, Resumed};

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
        let driver = self.target.driver.clone();
        let timeout = self.target.timeout.unwrap_or(driver.settings.operation_timeout);
        let mut pager =
            Pager { pages: Resumed::new(driver, timeout, self.request), checked: false };
        pager.pages.over = self.is_empty;
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

/// A scan on its way.
struct Pager {
    pages: Resumed<v1::ScanRequest>,
    checked: bool,
}

impl Pager {
    /// The next page; `None` at the end.
    async fn next_page(&mut self) -> Result<Option<Page>, Error> {
        if !self.checked {
            limits::check_scan(&self.pages.request)?;
            // On the wire 0 would mean the newest.
            if self.pages.request.read.as_ref().is_some_and(|read| read.at_version == 0) {
                return Err(no_version_0());
            }
            self.checked = true;
        }
        let page = self.pages.next().await.map_err(|broken| match broken {
            Broken::Closed => closed(),
            Broken::Fault(fault, attempts) => Error::of_fault(*fault, attempts, false),
        })?;
        Ok(page.map(|page| Page {
            entries: page.entries.into_iter().map(KeyValue::from_wire).collect(),
            version: Version(page.version),
            resume_token: page.resume_token,
            is_last: page.done,
        }))
    }
}

impl Resumable for v1::ScanRequest {
    type Part = v1::ScanResponse;

    const NAMES: (&'static str, &'static str) = ("scan", "page");

    async fn open(
        self,
        connection: &Connection,
    ) -> Result<Response<Streaming<v1::ScanResponse>>, Status> {
        connection.scans().scan(self).await
    }

    fn range(&self) -> v1::ScanRequest {
        let (start, end) = (self.start.clone(), self.end.clone());
        let (keyspace, prefix) = (self.keyspace.clone(), self.prefix.clone());
        v1::ScanRequest { keyspace, start, end, prefix, ..Default::default() }
    }

    fn advance(&mut self, page: &v1::ScanResponse) -> Behind {
        if page.resume_token.is_empty() && !page.done {
            return Behind::NoToken;
        }
        self.resume_token = page.resume_token.clone();
        if page.done { Behind::End } else { Behind::Same }
    }
}

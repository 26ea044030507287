//! Owns a scan over the shards of a keyspace: one version, one order, pages that can be resumed. Does
//! not read a shard (see `router`) or order keys (see `merge`).
//!
//! **One version.** Every shard's leader is asked for a version that holds all that was acknowledged
//! before; the highest is the scan's, once the arcs that the groups themselves named tile the ring.
//! Each shard is then read at it. So a scan holds every write acknowledged before it began. Of two
//! concurrent writes on different shards it may show the later without the earlier.
//!
//! **Changes on the way.** Pages name the epoch at which their shard was asked. When a shard has
//! changed since, all are asked again, at the same version, and the scan goes on behind the last key
//! that was handed out: nothing is missing and nothing comes twice.
//!
//! **Long gaps.** A page ends after [`PAGE_TIME`], with what was found or empty, and its token stands behind
//! the last key up to which all shards have looked: a run of deleted keys, however long, is passed in
//! steps, and a reader whose node dies in the midst of it goes on from the last of them.
//!
//! **Slow readers.** A scan works only on a page that somebody waits for, and only then is it a request
//! in flight. What it has read ahead counts in the node's budget, and is dropped when nobody asks for
//! long ([`Scan::rest`]): it is read again behind the last key that was handed out. Nothing of the store,
//! no iterator and no view, outlives a page; so a scan pins no file and no log. One that nobody reads for
//! [`IDLE_MAX`] is ended, and its token resumes it.
//!
//! **Long scans** over several shards pin their version (see `pin`), for ten minutes at most. Beyond,
//! and where one shard holds all of it, a scan that the history passes ends with `VERSION_GONE`.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::limits::{self, SCAN_PAGE_BYTES, SCAN_PAGE_ENTRIES};
use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::shard_map::SYSTEM_KEYSPACE;
use coracle_proto::token::ScanToken;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::admission::{Call, Charge, Seat};
use crate::router::{PAGE_BYTES_MIN, PageSpec, Router, entry_bytes, mismatched, open_keyspace};
use crate::versions::{self, ASKED_AT_A_TIME};

mod merge;
mod pages;
mod pin;

use merge::{Merge, OutOfOrder};
pub use pages::{IDLE_MAX, NewPins, Pages, Pins, REST_AFTER, open};
pub use pin::pins;

/// Keys and values that one scan reads ahead over all its shards; half of it more where pages meet.
/// With small entries it takes twice that in memory, and as much again on its way. Many shards get
/// smaller pages, down to [`PAGE_BYTES_MIN`].
const AHEAD_BYTES: usize = 2 << 20;
/// How long one page looks for keys, once a lane has come up empty. Beyond, and after at least one page of
/// every lane that holds nothing, it ends: well within what a client waits before it asks another
/// node, so that no gap is too long to be passed, and far above what a page costs.
pub const PAGE_TIME: Duration = Duration::from_millis(250);
/// How often a scan lays its lanes out anew before one page. Beyond: the last fault; its token still
/// resumes it.
const LAYOUTS_MAX: u32 = 8;
/// Between two layouts: a split takes about so long to come to the map.
const LAYOUT_PAUSE: Duration = Duration::from_millis(50);

/// A scan under way. Holds no iterator and no version: dropping it costs nothing.
pub struct Scan {
    router: Arc<Router>,
    request: v1::ScanRequest,
    call: Call,
    /// Where the scan stands: behind the last page handed out.
    token: ScanToken,
    shape: Shape,
    page_bytes: usize,
    /// At which all is read, once it is known: before the first page is.
    version: watch::Sender<Option<u64>>,
    /// What the lanes hold.
    ahead: Charge,
    done: bool,
    _seat: Seat,
}

enum Shape {
    /// One shard holds all of it: its pages are the scan's.
    One,
    /// All shards; `None` before they are laid out.
    All(Option<Lanes>),
}

struct Lanes {
    merge: Merge,
    lanes: Vec<Lane>,
    page_bytes: usize,
}

/// One shard's part.
struct Lane {
    shard: u64,
    epoch: u64,
    token: ScanToken,
}

impl Scan {
    /// Checks a scan and takes it on. Nothing is read yet.
    pub async fn begin(
        router: Arc<Router>,
        request: v1::ScanRequest,
        call: Call,
    ) -> Result<Scan, Fault> {
        limits::check_scan(&request)?;
        limits::check_read(request.read.as_ref())?;
        let plan = || {
            let map = router.current_map()?;
            let keyspace = open_keyspace(&map, &request.keyspace, call.origin)?;
            let spec = PageSpec::new(&map, keyspace, &request)?;
            let named = request.only_shard.is_some_and(|route| route.shard != 0);
            // The cluster's own records are one entity by definition, outside the ring.
            let one = named || keyspace.id == SYSTEM_KEYSPACE || spec.entity(keyspace).is_some();
            Ok((one, spec))
        };
        let (one, spec) = match plan() {
            Err(Fault { reason: Reason::UnknownKeyspace, .. }) => {
                router.refresh(call.deadline).await;
                plan()?
            }
            planned => planned?,
        };
        let page_bytes = match request.page_bytes as usize {
            0 => SCAN_PAGE_BYTES,
            asked => asked.clamp(PAGE_BYTES_MIN, SCAN_PAGE_BYTES),
        };
        // A node that takes nothing new on takes no scan on either.
        router.admission().admit(0, call.origin)?;
        let (seat, ahead) =
            (router.admission().open_scan(call.origin)?, router.admission().hold(0));
        let token = spec.token().clone();
        Ok(Scan {
            done: spec.is_over(),
            version: watch::Sender::new((token.version > 0).then_some(token.version)),
            token,
            shape: if one { Shape::One } else { Shape::All(None) },
            router,
            request,
            call,
            page_bytes,
            ahead,
            _seat: seat,
        })
    }

    /// The next page; `None` behind the last one. After an error the scan is over here; the token of
    /// the last page resumes it anywhere.
    pub async fn next_page(&mut self) -> Result<Option<v1::ScanResponse>, Fault> {
        if self.done {
            return Ok(None);
        }
        let call = self.call.next_page();
        let page = self.admitted_page(&call).await;
        self.done = page.as_ref().map_or(true, |page| page.done);
        if self.done {
            self.rest();
        }
        page.map(Some)
    }

    /// Drops what was read ahead, and gives its charge back. The next page reads it again.
    pub fn rest(&mut self) {
        if let Shape::All(lanes) = &mut self.shape {
            *lanes = None;
        }
        self.ahead.set(0).expect("holding less is always allowed");
    }

    /// The version at which all is read, as soon as it is known.
    pub fn version(&self) -> watch::Receiver<Option<u64>> {
        self.version.subscribe()
    }

    /// Whether its version is pinned when it takes long: a scan of one entity never is.
    fn pinnable(&self) -> bool {
        matches!(self.shape, Shape::All(_))
    }

    async fn admitted_page(&mut self, call: &Call) -> Result<v1::ScanResponse, Fault> {
        let room = self.page_bytes as u64;
        let _permit = self.router.admission().admit(room, call.origin)?;
        match self.shape {
            Shape::One => self.page_of_one(call).await,
            Shape::All(_) => self.page_of_all(call).await,
        }
    }

    async fn page_of_one(&mut self, call: &Call) -> Result<v1::ScanResponse, Fault> {
        let mut request =
            v1::ScanRequest { page_bytes: self.page_bytes as u32, ..self.request.clone() };
        if self.token.version > 0 {
            request.resume_token = self.token.encode();
        }
        let page = ask_page(&self.router, request, call).await?;
        self.token = position_of(&page)?;
        Ok(page)
    }

    async fn page_of_all(&mut self, call: &Call) -> Result<v1::ScanResponse, Fault> {
        for layouts in 1.. {
            match self.merged_page(call).await {
                Err(fault) if fault.reason == Reason::StaleRoute && layouts < LAYOUTS_MAX => {
                    self.shape = Shape::All(None);
                    if call.left() <= LAYOUT_PAUSE {
                        return Err(fault);
                    }
                    self.router.refresh(call.deadline).await;
                    tokio::time::sleep(LAYOUT_PAUSE * (layouts - 1)).await;
                }
                result => return result,
            }
        }
        unreachable!("the last layout returns")
    }

    async fn merged_page(&mut self, call: &Call) -> Result<v1::ScanResponse, Fault> {
        let Shape::All(slot) = &mut self.shape else { unreachable!("asked by page_of_all alone") };
        let lanes = match slot {
            Some(lanes) => lanes,
            None => {
                let (version, lanes) =
                    lay_out(&self.router, &self.token, &self.request, call).await?;
                self.token.version = version;
                self.version.send_replace(Some(version));
                slot.insert(lanes)
            }
        };
        let most = self.token.remaining.and_then(|left| usize::try_from(left).ok());
        let most = most.map_or(SCAN_PAGE_ENTRIES, |left| left.min(SCAN_PAGE_ENTRIES));
        let (mut entries, mut bytes, mut until) = (Vec::new(), 0, None);
        // Whether all that the lanes are known to hold is in the page.
        let drained = loop {
            if entries.len() >= most || bytes >= self.page_bytes {
                break false;
            }
            if let Some(entry) = lanes.merge.next().map_err(broken)? {
                bytes += entry_bytes(&entry);
                entries.push(entry);
            } else if !lanes.merge.starved() || until.is_some_and(|until| Instant::now() >= until) {
                break true;
            } else {
                until.get_or_insert_with(|| Instant::now() + PAGE_TIME);
                lanes.feed(&self.router, &self.request, call).await?;
                self.ahead.set(lanes.merge.held_bytes() as u64)?;
            }
        };
        self.ahead.set(lanes.merge.held_bytes() as u64)?;
        // What the merge still holds is behind the token.
        let looked = lanes.merge.frontier().filter(|_| drained).cloned();
        if let Some(last) = looked.or_else(|| entries.last().map(|last| last.key.clone())) {
            self.token = self.token.advance(last, entries.len() as u64);
        }
        Ok(v1::ScanResponse {
            done: drained && !lanes.merge.starved() || self.token.remaining == Some(0),
            entries,
            version: self.token.version,
            resume_token: self.token.encode(),
            served: None,
        })
    }
}

impl Lanes {
    /// Asks the lanes that hold little for their next pages.
    async fn feed(
        &mut self,
        router: &Arc<Router>,
        request: &v1::ScanRequest,
        call: &Call,
    ) -> Result<(), Fault> {
        let ask = |at: usize| {
            let lane = &self.lanes[at];
            let request = v1::ScanRequest {
                only_shard: Some(v1::Route { shard: lane.shard, shard_epoch: lane.epoch }),
                resume_token: lane.token.encode(),
                page_bytes: self.page_bytes as u32,
                ..request.clone()
            };
            async move { ask_page(router, request, call).await.map(|page| (at, page)) }
        };
        let hungry = self.merge.hungry(self.page_bytes / 2);
        let pages = stream::iter(hungry.into_iter().map(ask)).buffer_unordered(ASKED_AT_A_TIME);
        let pages: Vec<_> = pages.try_collect().await?;
        for (at, page) in pages {
            self.lanes[at].token = position_of(&page)?;
            let looked = self.lanes[at].token.last_key.clone();
            self.merge.bring(at, page.entries, !page.done, looked).map_err(broken)?;
        }
        Ok(())
    }
}

/// Asks every shard of the ring for the scan's version, or for the lowest that it may have, and lays
/// out a lane for each.
async fn lay_out(
    router: &Arc<Router>,
    token: &ScanToken,
    request: &v1::ScanRequest,
    call: &Call,
) -> Result<(u64, Lanes), Fault> {
    let fixed = versions::fix_on_ring(router, token.version, call).await?;
    let highest = fixed.iter().map(|(_, fixed)| fixed.version).max().unwrap_or(0);
    let version = if token.version > 0 { token.version } else { highest };
    let token = ScanToken { version, ..token.clone() };
    let lane = |(shard, fixed): (u64, v1::FixVersionResponse)| Lane {
        shard,
        epoch: fixed.epoch,
        token: token.clone(),
    };
    let lanes: Vec<Lane> = fixed.into_iter().map(lane).collect();
    let page_bytes = (AHEAD_BYTES / lanes.len()).clamp(PAGE_BYTES_MIN, SCAN_PAGE_BYTES);
    let merge = Merge::new(lanes.len(), request.reverse);
    Ok((version, Lanes { merge, lanes, page_bytes }))
}

async fn ask_page(
    router: &Arc<Router>,
    request: v1::ScanRequest,
    call: &Call,
) -> Result<v1::ScanResponse, Fault> {
    match router.execute(Operation::Scan(request), call).await? {
        Answer::Scan(page) => Ok(page),
        _ => Err(mismatched()),
    }
}

/// Where a page leaves its scan.
fn position_of(page: &v1::ScanResponse) -> Result<ScanToken, Fault> {
    ScanToken::decode(&page.resume_token).map_err(|_| mismatched())
}

/// A shard has answered with keys that are not its own, or not in order.
fn broken(_: OutOfOrder) -> Fault {
    let message =
        "two shards gave the same key, or one gave its keys out of order or went no further";
    Fault::new(Reason::Internal, message).with_outcome(Outcome::NotApplied)
}

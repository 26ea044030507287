//! Owns the task behind a scan that a client reads as a stream: it makes a page when the reader asks for
//! one, drops what was read ahead when the reader stops, keeps the version pinned meanwhile, and ends the
//! scan when the reader does not come back. A
//! stream that nobody polls runs nothing: hence a task. Does not read or merge (see [`Scan`]), and
//! does not know when and how a version is pinned (see [`Pins`]).

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::shard_map::Shard;
use coracle_proto::v1;
use coracle_storage::Exec;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::Scan;
use crate::admission::Call;
use crate::router::Router;

/// How long a reader may stop before its scan drops what it has read ahead: longer than the way to any
/// client and back, so that a reader that works is never made to wait for the shards again.
pub const REST_AFTER: Duration = Duration::from_secs(1);
/// How long a reader may stop before its scan is ended: its place is one of few, and every stopped
/// reader keeps one from others. Many times what a reader is away for that means to come back, and
/// half of what a pin can last: what is resumed soon after still finds its version.
pub const IDLE_MAX: Duration = Duration::from_secs(300);
/// How often a scan looks whether its version must be pinned; a small part of any history.
const PIN_LOOK: Duration = Duration::from_secs(1);
/// How long pinning may take; a shard that elects a leader is asked again at the next look.
const PIN_MAX: Duration = Duration::from_secs(5);

/// What one scan holds of its version on the shards.
pub trait Pins: Send {
    /// Pins a version of a keyspace on shards, if it is time to: asked again and again for as long as
    /// the scan goes on. `STALE_ROUTE` when the shards are others by now.
    fn keep<'a>(
        &'a mut self,
        router: &'a Arc<Router>,
        shards: &'a [v1::Route],
        keyspace: &'a str,
        version: u64,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(), Fault>>;
}

/// Pins of a scan that holds none yet.
pub type NewPins = Arc<dyn Fn() -> Box<dyn Pins> + Send + Sync>;

type Paged = Result<Option<v1::ScanResponse>, Fault>;

/// The reader's end of a scan. Dropping it ends the scan.
pub struct Pages {
    asks: mpsc::Sender<oneshot::Sender<Paged>>,
    /// Why the task has ended, when it did so by itself.
    ended: oneshot::Receiver<Fault>,
    over: bool,
}

/// Starts the task of a scan. Without `pins` it ends with `VERSION_GONE` when it outlives its keyspace's
/// history. One whose reader stops for [`IDLE_MAX`] ends with `OVERLOADED`, and can be resumed.
pub fn open(scan: Scan, exec: &dyn Exec, pins: Option<NewPins>) -> Pages {
    let (asks, asked) = mpsc::channel(1);
    let (end, ended) = oneshot::channel();
    exec.spawn("scan", Box::pin(run(scan, Reader { asked, end }, pins)));
    Pages { asks, ended, over: false }
}

impl Pages {
    /// The next page; `None` behind the last one and after an error.
    pub async fn next(&mut self) -> Result<Option<v1::ScanResponse>, Fault> {
        if self.over {
            return Ok(None);
        }
        let (answer, answered) = oneshot::channel();
        // A task that has ended answers nothing.
        let _ = self.asks.send(answer).await;
        let page = answered.await.unwrap_or_else(|_| {
            // It was ended from without, as when the node stops, unless it says why.
            let stopped = |_| Fault::new(Reason::Draining, "this node is shutting down");
            Err(self.ended.try_recv().unwrap_or_else(stopped).with_outcome(Outcome::NotApplied))
        });
        self.over = is_last(&page);
        page
    }
}

/// Whether nothing comes behind it.
fn is_last(page: &Paged) -> bool {
    !matches!(page, Ok(Some(page)) if !page.done)
}

/// The reader as its scan's task sees it.
struct Reader {
    asked: mpsc::Receiver<oneshot::Sender<Paged>>,
    end: oneshot::Sender<Fault>,
}

async fn run(scan: Scan, reader: Reader, pins: Option<NewPins>) {
    let Some(pins) = pins.filter(|_| scan.pinnable()) else {
        return serve(scan, reader).await;
    };
    let (router, keyspace) = (scan.router.clone(), scan.request.keyspace.clone());
    let pinned = keep_pinned(router, keyspace, scan.version(), pins);
    tokio::select! {
        () = serve(scan, reader) => {}
        () = pinned => {}
    }
}

/// Makes pages as they are asked for, until the last or until the reader is gone.
async fn serve(mut scan: Scan, Reader { mut asked, end }: Reader) {
    loop {
        let since = Instant::now();
        let answer = match timeout_at(since + REST_AFTER, asked.recv()).await {
            Ok(answer) => answer,
            Err(_) => {
                scan.rest();
                let Ok(answer) = timeout_at(since + IDLE_MAX, asked.recv()).await else {
                    // The reader may be gone by now.
                    let _ = end.send(left_alone());
                    return;
                };
                answer
            }
        };
        let Some(mut answer) = answer else { return };
        let page = tokio::select! {
            page = scan.next_page() => page,
            () = answer.closed() => return,
        };
        let is_over = is_last(&page);
        // A page that nobody takes leaves a gap: the scan is over either way.
        if answer.send(page).is_err() || is_over {
            return;
        }
    }
}

/// What a reader hears that comes back too late. Clients resume by themselves.
fn left_alone() -> Fault {
    let message = format!(
        "nobody read this scan for {} s, and its place is free for others: go on with the resume token \
         of the last page",
        IDLE_MAX.as_secs()
    );
    Fault::new(Reason::Overloaded, message)
}

/// Keeps the version of a scan pinned on all shards, once it is known. Never ends: a scan whose version
/// is gone hears of it with its next page.
async fn keep_pinned(
    router: Arc<Router>,
    keyspace: String,
    versions: watch::Receiver<Option<u64>>,
    new: NewPins,
) {
    let mut pins = new();
    loop {
        tokio::time::sleep(PIN_LOOK).await;
        let version = *versions.borrow();
        let (Some(version), Ok(map)) = (version, router.current_map()) else { continue };
        let route = |shard: &Shard| v1::Route { shard: shard.id.0, shard_epoch: shard.epoch.0 };
        let shards: Vec<v1::Route> = map.shards().iter().map(route).collect();
        let call = Call::own(PIN_MAX);
        let Err(fault) = pins.keep(&router, &shards, &keyspace, version, &call).await else {
            continue;
        };
        tracing::debug!(version, %fault, "a scan's version could not be pinned");
        if fault.reason == Reason::StaleRoute {
            router.refresh(call.deadline).await;
            pins = new();
        }
    }
}

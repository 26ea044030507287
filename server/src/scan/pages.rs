//! Owns the task behind a scan that a client reads as a stream: it makes a page when the reader asks for
//! one, drops what was read ahead when the reader stops, and keeps the version pinned meanwhile. A
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

use super::Scan;
use crate::admission::Call;
use crate::router::Router;

/// How long a reader may stop before its scan drops what it has read ahead: longer than the way to any
/// client and back, so that a reader that works is never made to wait for the shards again.
pub const REST_AFTER: Duration = Duration::from_secs(1);
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
    over: bool,
}

/// Starts the task of a scan. Without `pins` it ends with `VERSION_GONE` when it outlives its keyspace's
/// history.
pub fn open(scan: Scan, exec: &dyn Exec, pins: Option<NewPins>) -> Pages {
    let (asks, asked) = mpsc::channel(1);
    exec.spawn("scan", Box::pin(run(scan, asked, pins)));
    Pages { asks, over: false }
}

impl Pages {
    /// The next page; `None` behind the last one and after an error.
    pub async fn next(&mut self) -> Result<Option<v1::ScanResponse>, Fault> {
        if self.over {
            return Ok(None);
        }
        let (answer, answered) = oneshot::channel();
        // A task that was ended from without, as when the node stops, answers nothing.
        let _ = self.asks.send(answer).await;
        let page = answered.await.unwrap_or_else(|_| {
            let fault = Fault::new(Reason::Draining, "this node is shutting down");
            Err(fault.with_outcome(Outcome::NotApplied))
        });
        self.over = is_last(&page);
        page
    }
}

/// Whether nothing comes behind it.
fn is_last(page: &Paged) -> bool {
    !matches!(page, Ok(Some(page)) if !page.done)
}

async fn run(scan: Scan, asked: mpsc::Receiver<oneshot::Sender<Paged>>, pins: Option<NewPins>) {
    let versions = watch::Sender::new(None);
    let Some(pins) = pins.filter(|_| scan.pinnable()) else {
        return serve(scan, asked, versions).await;
    };
    let (router, keyspace) = (scan.router.clone(), scan.request.keyspace.clone());
    let pinned = keep_pinned(router, keyspace, versions.subscribe(), pins);
    tokio::select! {
        () = serve(scan, asked, versions) => {}
        () = pinned => {}
    }
}

/// Makes pages as they are asked for, until the last or until the reader is gone.
async fn serve(
    mut scan: Scan,
    mut asked: mpsc::Receiver<oneshot::Sender<Paged>>,
    versions: watch::Sender<Option<u64>>,
) {
    loop {
        let answer = match tokio::time::timeout(REST_AFTER, asked.recv()).await {
            Ok(answer) => answer,
            Err(_) => {
                scan.rest();
                asked.recv().await
            }
        };
        let Some(mut answer) = answer else { return };
        let page = tokio::select! {
            page = scan.next_page() => page,
            () = answer.closed() => return,
        };
        versions.send_if_modified(|version| std::mem::replace(version, scan.version()) != *version);
        let is_over = is_last(&page);
        // A page that nobody takes leaves a gap: the scan is over either way.
        if answer.send(page).is_err() || is_over {
            return;
        }
    }
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

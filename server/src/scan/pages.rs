//! Owns the task behind a scan that a client reads as a stream: it makes a page when the reader asks for
//! one, drops what was read ahead when the reader stops, and keeps the version pinned meanwhile. A
//! stream that nobody polls runs nothing: hence a task. Does not read or merge (see [`Scan`]), and
//! does not know how a version is pinned (see [`Pins`]).

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::shard_map::KeyspaceId;
use coracle_proto::v1;
use coracle_raft::clock::HybridTime;
use coracle_storage::Exec;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};

use super::Scan;

/// How long a reader may stop before its scan drops what it has read ahead: longer than the way to any
/// client and back, so that a reader that works is never made to wait for the shards again.
pub const REST_AFTER: Duration = Duration::from_secs(1);
/// After a pin that failed: an election is over by then.
const PIN_PAUSE: Duration = Duration::from_secs(1);

/// Keeps a version readable for longer than its keyspace's history, on all shards.
pub trait Pins: Send + Sync + 'static {
    /// Pins a version, or pins it anew. Says after how long it must be pinned again.
    fn pin(
        &self,
        keyspace: KeyspaceId,
        version: u64,
    ) -> BoxFuture<'static, Result<Duration, Fault>>;

    /// Gives the pin up: nobody reads at the version any more.
    fn unpin(&self, keyspace: KeyspaceId, version: u64) -> BoxFuture<'static, ()>;
}

type Paged = Result<Option<v1::ScanResponse>, Fault>;

/// The reader's end of a scan. Dropping it ends the scan.
pub struct Pages {
    asks: mpsc::Sender<oneshot::Sender<Paged>>,
    over: bool,
}

/// Starts the task of a scan. Without `pins` it ends with `VERSION_GONE` when it outlives its keyspace's
/// history.
pub fn open(scan: Scan, exec: &dyn Exec, pins: Option<Arc<dyn Pins>>) -> Pages {
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

async fn run(
    scan: Scan,
    asked: mpsc::Receiver<oneshot::Sender<Paged>>,
    pins: Option<Arc<dyn Pins>>,
) {
    let Some(pins) = pins.filter(|_| scan.pinnable()) else {
        return serve(scan, asked, watch::Sender::new(None)).await;
    };
    let (keyspace, versions) = (scan.keyspace, watch::Sender::new(None));
    let mut pinner = Pinner {
        pins: pins.clone(),
        scan: (keyspace, scan.history, scan.router.clone()),
        versions: versions.subscribe(),
        tried: None,
    };
    tokio::select! {
        () = serve(scan, asked, versions) => {}
        () = pinner.keep() => {}
    }
    if let Some(version) = pinner.tried {
        pins.unpin(keyspace, version).await;
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

/// Keeps the version of a scan pinned.
struct Pinner {
    pins: Arc<dyn Pins>,
    scan: (KeyspaceId, Duration, Arc<crate::router::Router>),
    versions: watch::Receiver<Option<u64>>,
    /// What may be pinned by now.
    tried: Option<u64>,
}

impl Pinner {
    /// Pins as soon as half of the history has passed since the version, so that a scan that ends in
    /// time writes nothing; a scan that is resumed late pins at once. Never ends.
    async fn keep(&mut self) {
        let (keyspace, history, router) = self.scan.clone();
        let Ok(Some(version)) = self.versions.wait_for(Option::is_some).await.map(|v| *v) else {
            return std::future::pending().await;
        };
        let age_ms = router.now_ms().saturating_sub(HybridTime(version).ms());
        let mut wait = (history / 2).saturating_sub(Duration::from_millis(age_ms));
        loop {
            tokio::time::sleep(wait).await;
            self.tried = Some(version);
            wait = self.pins.pin(keyspace, version).await.unwrap_or_else(|fault| {
                tracing::debug!(version, %fault, "a scan's version could not be pinned");
                PIN_PAUSE
            });
        }
    }
}

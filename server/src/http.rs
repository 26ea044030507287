//! Owns the HTTP listener: `/metrics`, `/livez`, `/readyz`. Does not judge the node's health (whoever
//! implements [`Probe`] does), and serves no data.
//!
//! `/livez` says whether a restart would help: the node's own threads and disk. Losing the quorum is
//! not its matter, or losing it would restart nodes. `/readyz` says whether to send requests here.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use coracle_storage::Exec;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::net::{Listener, Stream};

/// Scrapers and probes are few; what is more waits in the system's backlog. Beyond any sane number,
/// so that a leak of connections shows in time and takes no memory.
const CONNECTIONS_MAX: usize = 256;

/// For the headers of a request, also of a further one on the same connection: longer than scrapers
/// wait between two scrapes.
const HEADERS_WAIT_MAX: Duration = Duration::from_secs(90);

/// Nobody needs a connection for longer; one that reads nothing does not keep its place for ever.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(600);

/// For an answer that is on its way when the connection has to end.
const GRACE: Duration = Duration::from_secs(1);

/// After an error of the listener itself, as when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Looks at the node. Called for every request, on the async threads: must answer at once.
pub trait Probe: Send + Sync + 'static {
    /// Whether the process works. The error says what does not.
    fn live(&self) -> Result<(), String>;

    /// Whether requests should be sent here: ready when every check is.
    fn ready(&self) -> Vec<Check>;

    /// All metrics, in OpenMetrics' text form.
    fn metrics(&self) -> String;
}

/// One condition of being ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// In a word: `joined`, `disk`.
    pub name: &'static str,
    /// Whether it holds.
    pub ok: bool,
    /// What was found.
    pub detail: String,
}

/// Serves until `stop`, then ends within a second. Connections are tasks of `exec`.
pub async fn serve(
    mut listener: Box<dyn Listener>,
    probe: Arc<dyn Probe>,
    exec: Arc<dyn Exec>,
    stop: CancellationToken,
) {
    let router = router(probe);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = stop.run_until_cancelled(async {
            let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
            (slot, listener.accept().await)
        });
        let Some((slot, accepted)) = accepted.await else {
            break;
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = connection(stream, router.clone(), stop.clone());
                exec.spawn(
                    "http connection",
                    Box::pin(async move {
                        connection.await;
                        drop(slot);
                    }),
                );
            }
            Err(error) => {
                tracing::warn!(%error, "the http listener could not accept a connection");
                stop.run_until_cancelled(tokio::time::sleep(ACCEPT_PAUSE)).await;
            }
        }
    }
    // Closed before the wait: nobody new comes in while the last answers go out.
    drop(listener);
    let all = slots.acquire_many(CONNECTIONS_MAX as u32);
    // Connections end by themselves within the same time; beyond it they belong to `exec`.
    let _ = tokio::time::timeout(GRACE, all).await;
}

async fn connection(stream: Box<dyn Stream>, router: Router, stop: CancellationToken) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS_WAIT_MAX);
    let service = TowerToHyperService::new(router);
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    let mut serving = std::pin::pin!(serving);
    let end = stop.run_until_cancelled(tokio::time::sleep(CONNECTION_AGE_MAX));
    tokio::select! {
        // Errors are the other end's: it went away, or does not speak HTTP.
        _ = serving.as_mut() => return,
        _ = end => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(GRACE, serving).await;
}

fn router(probe: Arc<dyn Probe>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .fallback(|| async {
            plain(
                StatusCode::NOT_FOUND,
                "here are /metrics, /livez and /readyz?verbose\n".to_owned(),
            )
        })
        .with_state(probe)
}

async fn metrics(State(probe): State<Arc<dyn Probe>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store")], probe.metrics()).into_response()
}

async fn livez(State(probe): State<Arc<dyn Probe>>) -> Response {
    match probe.live() {
        Ok(()) => plain(StatusCode::OK, "live\n".to_owned()),
        Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("not live: {why}\n")),
    }
}

async fn readyz(State(probe): State<Arc<dyn Probe>>, RawQuery(query): RawQuery) -> Response {
    let verbose = query.is_some_and(|query| {
        query.split('&').any(|pair| pair == "verbose" || pair.starts_with("verbose="))
    });
    let checks = probe.ready();
    let ready = checks.iter().all(|check| check.ok);
    plain(
        if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE },
        verdict(&checks, ready, verbose),
    )
}

/// The checks that fail, or all of them, and the verdict in the last line.
fn verdict(checks: &[Check], ready: bool, verbose: bool) -> String {
    let mut out = String::new();
    for check in checks.iter().filter(|check| verbose || !check.ok) {
        let mark = if check.ok { '+' } else { '-' };
        let _ = writeln!(out, "[{mark}] {}: {}", check.name, check.detail);
    }
    out.push_str(if ready { "ready\n" } else { "not ready\n" });
    out
}

fn plain(status: StatusCode, body: String) -> Response {
    let headers = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, "no-store")];
    (status, headers, body).into_response()
}

//! Owns the gRPC channels to each node, one for calls and one for scans, and what is known of the
//! node's health: whether it answers, and since when it does not. Does not choose nodes (see `route`)
//! or carry operations (see `pipeline`).

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use coracle_proto::limits::MESSAGE_BYTES_MAX;
use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::v1::admin_service_client::AdminServiceClient;
use coracle_proto::v1::cluster_service_client::ClusterServiceClient;
use coracle_proto::v1::kv_service_client::KvServiceClient;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tonic::{ConnectError, Status};

use crate::net::{Net, Stream};

/// A node that does not answer is left alone this long at first, while other replicas are asked.
/// Short, because it may only have been restarted.
const DOWN_FIRST: Duration = Duration::from_millis(100);

/// And at most this long, so that a node that comes back is found soon.
const DOWN_MAX: Duration = Duration::from_secs(2);

/// A ping after this much silence tells a cut-off node from an idle one. Together with the timeout
/// it bounds how long a watch or a scan hangs on a node that has vanished without a word.
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// How long a ping may stay unanswered.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// HTTP/2 windows: what may be under way to us unread, per stream and per connection. Large enough
/// for a fast link (4 MiB at 1 ms is 32 Gbit/s); beyond it the server waits.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// The same of scans: what one may hold here is half of the pages that a node may hold for it, and
/// sixteen readers may stop before others on their connection have to wait.
const SCAN_WINDOW: u32 = 2 << 20;
const SCANS_WINDOW: u32 = 32 << 20;

/// Opens connections.
pub(crate) struct Dialer {
    net: Arc<dyn Net>,
    name: String,
    connect_timeout: Duration,
}

/// One node at one address. A channel connects when it is first used, and again after a break.
pub(crate) struct Connection {
    address: String,
    channel: Channel,
    /// A connection of their own: streams whose reader has stopped fill the window of theirs, and would
    /// hold up every call.
    scans: Channel,
    health: Mutex<Health>,
    went_down: Notify,
}

#[derive(Debug)]
struct Health {
    /// Failures since the last answer.
    failures: u32,
    /// Until when others are preferred.
    down_until: Option<Instant>,
    /// The last answer of any kind.
    heard_at: Option<Instant>,
}

impl Dialer {
    pub(crate) fn new(net: Arc<dyn Net>, name: &str, connect_timeout: Duration) -> Dialer {
        Dialer { net, name: name.to_owned(), connect_timeout }
    }

    /// Whether `address` is a `host:port`.
    pub(crate) fn is_address(address: &str) -> bool {
        let valid_port = address
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        valid_port && Endpoint::from_shared(format!("http://{address}")).is_ok()
    }

    /// Prepares a connection; nothing is sent yet. `None` for what is no `host:port`.
    pub(crate) fn dial(&self, address: &str) -> Option<Connection> {
        if !Dialer::is_address(address) {
            return None;
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .ok()?
            .user_agent(self.name.clone())
            .ok()?
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true);
        let channel = |stream_window, connection_window| {
            let connector = Connector { net: self.net.clone(), address: address.to_owned() };
            let endpoint = endpoint.clone().initial_stream_window_size(stream_window);
            let endpoint = endpoint.initial_connection_window_size(connection_window);
            endpoint.connect_with_connector_lazy(connector)
        };
        Some(Connection {
            address: address.to_owned(),
            channel: channel(STREAM_WINDOW, CONNECTION_WINDOW),
            scans: channel(SCAN_WINDOW, SCANS_WINDOW),
            health: Mutex::new(Health { failures: 0, down_until: None, heard_at: None }),
            went_down: Notify::new(),
        })
    }
}

impl Connection {
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn kv(&self) -> KvServiceClient<Channel> {
        KvServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(crate) fn scans(&self) -> KvServiceClient<Channel> {
        KvServiceClient::new(self.scans.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(crate) fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(crate) fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The node answered, whatever it said.
    pub(crate) fn heard(&self) {
        let mut health = self.health.lock();
        health.failures = 0;
        health.down_until = None;
        health.heard_at = Some(Instant::now());
    }

    /// The node could not be reached, broke the connection, or stayed silent.
    pub(crate) fn failed(&self) {
        let now = Instant::now();
        let mut health = self.health.lock();
        // Many calls may notice one break: it counts once.
        if health.down_until.is_some_and(|until| now < until) {
            return;
        }
        let pause = DOWN_FIRST.saturating_mul(1 << health.failures.min(8)).min(DOWN_MAX);
        health.failures = health.failures.saturating_add(1);
        health.down_until = Some(now + pause);
        drop(health);
        tracing::debug!(node = %self.address, ?pause, "node does not answer");
        self.went_down.notify_waiters();
    }

    /// Whether the node may be asked, as far as is known.
    pub(crate) fn is_usable(&self) -> bool {
        self.health.lock().down_until.is_none_or(|until| until <= Instant::now())
    }

    /// Whether nothing at all has come from the node since `since`.
    pub(crate) fn is_silent_since(&self, since: Instant) -> bool {
        self.health.lock().heard_at.is_none_or(|at| at < since)
    }

    /// Completes when the node is next found not to answer.
    pub(crate) async fn went_down(&self) {
        self.went_down.notified().await;
    }
}

/// What a failed call outside the pipeline says. A status that has a cause was made on this side: no
/// node said anything, whatever code the transport found for it; and where not even a connection
/// stood, nothing was done.
pub(crate) fn fault_of(status: &Status, address: &str) -> Fault {
    let Some(cause) = status.source() else {
        return Fault::from_status(status);
    };
    let outcome = match is_unconnected(cause) {
        true => Outcome::NotApplied,
        false => Outcome::Unknown,
    };
    let message = format!("no answer from {address}: {}", status.message());
    Fault::new(Reason::Unreachable, message).with_outcome(outcome)
}

fn is_unconnected(mut cause: &(dyn Error + 'static)) -> bool {
    loop {
        if cause.is::<ConnectError>() {
            return true;
        }
        match cause.source() {
            Some(deeper) => cause = deeper,
            None => return false,
        }
    }
}

/// The seam as tonic wants it. The address is the connection's own: tonic's `Uri` only repeats it.
#[derive(Clone)]
struct Connector {
    net: Arc<dyn Net>,
    address: String,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connecting = self.net.connect(&self.address);
        Box::pin(async move { connecting.await.map(TokioIo::new) })
    }
}

//! The client listener: accepts connections and hands them to the gRPC server of the moment.
//!
//! Owns the listener, and the limit of connections. There are two servers in a node's life: one for
//! as long as it has no cluster, one from then on; the listener outlives the change.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use coracle_proto::limits::PIPELINE_IN_FLIGHT_MAX;

use crate::net::{Listener, Stream};

/// Connections that wait for the server to take them.
const ACCEPTED_MAX: usize = 64;
/// After an error of the listener itself, as when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A connection that is silent for so long is asked whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// And ended when it does not answer within this.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// One client's connection. Holds its place among all until it is closed.
pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Where accepted connections go: changed when the node's server changes.
pub(crate) struct Front {
    servers: watch::Sender<Option<mpsc::Sender<Connection>>>,
}

impl Front {
    /// The front, and the task that accepts.
    pub(crate) fn new(
        listener: Box<dyn Listener>,
        connections_max: usize,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let servers = watch::Sender::new(None);
        let to = servers.subscribe();
        (Self { servers }, accept(listener, connections_max, to, stop))
    }

    /// Serves `routes` on all connections from now on, until `stop`; requests under way are finished.
    pub(crate) fn serve(
        &self,
        routes: Routes,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (sender, receiver) = mpsc::channel(ACCEPTED_MAX);
        self.servers.send_replace(Some(sender));
        let incoming = tokio_stream::wrappers::ReceiverStream::new(receiver);
        async move {
            let served = Server::builder()
                .max_concurrent_streams(PIPELINE_IN_FLIGHT_MAX as u32)
                .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
                .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
                .http2_max_header_list_size(16 << 10)
                .add_routes(routes)
                .serve_with_incoming_shutdown(Accepted(incoming), stop.cancelled_owned())
                .await;
            if let Err(error) = served {
                tracing::error!(%error, "the gRPC server ended");
            }
        }
    }
}

/// tonic wants connections or errors; there are no errors left here.
struct Accepted(tokio_stream::wrappers::ReceiverStream<Connection>);

impl futures_util::Stream for Accepted {
    type Item = Result<Connection, io::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(context).map(|next| next.map(Ok))
    }
}

async fn accept(
    mut listener: Box<dyn Listener>,
    connections_max: usize,
    mut servers: watch::Receiver<Option<mpsc::Sender<Connection>>>,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(connections_max));
    loop {
        let next = stop.run_until_cancelled(async {
            // Beyond the limit new clients wait in the system's backlog.
            let place = places.clone().acquire_owned().await.expect("it is never closed");
            (place, listener.accept().await)
        });
        let Some((place, accepted)) = next.await else {
            return;
        };
        match accepted {
            Ok((stream, _)) => {
                let server = servers.wait_for(Option::is_some).await;
                let Some(server) = server.ok().and_then(|server| server.clone()) else {
                    return;
                };
                // A server that is going away drops the connection: its client dials again.
                let _ = server.send(Connection { stream, _place: place }).await;
            }
            Err(error) => {
                tracing::warn!(%error, "the client listener could not accept a connection");
                stop.run_until_cancelled(tokio::time::sleep(ACCEPT_PAUSE)).await;
            }
        }
    }
}

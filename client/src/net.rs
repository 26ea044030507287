//! Owns the seam to the network: how a connection to a node is opened. Everything that the client
//! sends passes here, so that a simulation can hand in a network of its own. Does not know gRPC,
//! and does not decide when to connect (see `connection`).

use std::io;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// An open connection: bytes both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What [`Net::connect`] returns: the connection, once it stands.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send>>;

/// Opens connections to nodes.
pub trait Net: Send + Sync + 'static {
    /// Connects to `address`, a `host:port`. Names are resolved anew each time, so that a node may
    /// come back elsewhere. The caller applies the connect timeout.
    fn connect(&self, address: &str) -> Connecting;
}

/// The real network: TCP without Nagle's delay.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealNet;

impl Net for RealNet {
    fn connect(&self, address: &str) -> Connecting {
        let address = address.to_owned();
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            // A batch is already one write: waiting for more would only add latency.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

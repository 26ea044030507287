//! The seam to the network: all sockets of a node.
//!
//! Owns connecting and listening, and their real side over TCP. Does not know what travels: frames
//! stand in `transport`, gRPC and HTTP above their own listeners. The simulation hands in another.

use std::io;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// Both directions of one connection.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Where connections come from and go to. Addresses are `host:port`.
pub trait Net: Send + Sync + 'static {
    /// Connects. Bounded by the caller: a network that answers nothing keeps this waiting.
    fn connect(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Stream>>>;

    /// Listens; port 0 takes a free one.
    fn listen(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Listener>>>;
}

/// A connection that came in, and its other end's address.
pub type Accepted = (Box<dyn Stream>, String);

/// One listening socket; dropping it closes it.
pub trait Listener: Send {
    /// The next connection. Cancel safe. An error is of that one connection, or passes when the
    /// system has descriptors again: the listener stays open.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Accepted>>;

    /// The address bound, with the port that the system chose.
    fn local_address(&self) -> String;
}

/// TCP, as the system has it. Names are resolved anew for every connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealNet;

impl Net for RealNet {
    fn connect(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let address = address.to_owned();
        Box::pin(async move {
            #[allow(clippy::disallowed_methods, reason = "this is the seam")]
            let stream = TcpStream::connect(address).await?;
            // Frames are written whole, and answers are waited for: nothing is gained by delay.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }

    fn listen(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Listener>>> {
        let address = address.to_owned();
        Box::pin(async move {
            // tokio sets SO_REUSEADDR, so a node that restarts gets its port back at once.
            #[allow(clippy::disallowed_methods, reason = "this is the seam")]
            let listener = TcpListener::bind(address).await?;
            let local_address = listener.local_addr()?.to_string();
            Ok(Box::new(RealListener { listener, local_address }) as Box<dyn Listener>)
        })
    }
}

struct RealListener {
    listener: TcpListener,
    local_address: String,
}

impl Listener for RealListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Accepted>> {
        Box::pin(async move {
            let (stream, from) = self.listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok((Box::new(stream) as Box<dyn Stream>, from.to_string()))
        })
    }

    fn local_address(&self) -> String {
        self.local_address.clone()
    }
}

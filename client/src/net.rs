//! Owns the seam to the network: how a connection to a node is opened, and at which address. All that
//! the client sends passes here, so that a simulation can hand in a network of its own. Does not know
//! gRPC, and does not decide when to connect (see `connection`).

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::pin::Pin;
use std::sync::Arc;

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

/// Where a node can be reached from here, when that is not the address it tells others: behind NAT,
/// port forwarding or a tunnel. A table from one address to the other, or a function.
pub trait AddressMap: Send + Sync + 'static {
    /// The `host:port` to dial for a node that goes by `address`; `None` where that is the same.
    fn dial_instead(&self, address: &str) -> Option<String>;
}

impl<F: Fn(&str) -> Option<String> + Send + Sync + 'static> AddressMap for F {
    fn dial_instead(&self, address: &str) -> Option<String> {
        self(address)
    }
}

impl AddressMap for BTreeMap<String, String> {
    fn dial_instead(&self, address: &str) -> Option<String> {
        self.get(address).cloned()
    }
}

impl AddressMap for HashMap<String, String> {
    fn dial_instead(&self, address: &str) -> Option<String> {
        self.get(address).cloned()
    }
}

/// A network in which some nodes are reached elsewhere.
pub(crate) struct MappedNet {
    pub(crate) net: Arc<dyn Net>,
    pub(crate) map: Arc<dyn AddressMap>,
}

impl Net for MappedNet {
    fn connect(&self, address: &str) -> Connecting {
        match self.map.dial_instead(address) {
            Some(instead) => self.net.connect(&instead),
            None => self.net.connect(address),
        }
    }
}

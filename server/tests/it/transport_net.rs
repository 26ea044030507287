//! A network in memory, for the tests of the transport.
//!
//! Owns links between named hosts that can go silent, be slow, or damage what passes, and that count
//! the frames. Does not decide anything by itself.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use coracle_server::net::{Accepted, Listener, Net, Stream};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

/// What happens on the way from one host to another.
#[derive(Clone, Default)]
pub(crate) struct Way {
    /// Nothing arrives, nothing breaks.
    pub(crate) silent: bool,
    /// Nobody listens: only of the way forth, and only for new connections.
    pub(crate) refused: bool,
    pub(crate) delay: Duration,
    /// One bit of the next bytes is flipped.
    pub(crate) damage: bool,
    /// Bodies of all frames that passed, keep-alives left out.
    pub(crate) frames: Vec<Vec<u8>>,
}

#[derive(Default)]
struct World {
    listeners: BTreeMap<String, mpsc::UnboundedSender<Accepted>>,
    /// By dialling host and address dialled, then direction: `true` from the dialler.
    ways: BTreeMap<(String, String, bool), Way>,
    breaks: BTreeMap<String, u64>,
}

/// All hosts and links.
#[derive(Clone, Default)]
pub(crate) struct MemoryNet(Arc<Mutex<World>>);

impl MemoryNet {
    /// The network as one host sees it.
    pub(crate) fn host(&self, name: &str) -> Arc<dyn Net> {
        Arc::new(Host { net: self.clone(), name: name.to_owned() })
    }

    /// Changes or reads the way of what `from`'s connections to `address` carry: forth, or back.
    pub(crate) fn way<T>(
        &self,
        from: &str,
        address: &str,
        forth: bool,
        of: impl FnOnce(&mut Way) -> T,
    ) -> T {
        let key = (from.to_owned(), address.to_owned(), forth);
        of(self.0.lock().ways.entry(key).or_default())
    }

    /// Both directions of the connections that `from` dials to `address`.
    pub(crate) fn ways(&self, from: &str, address: &str, mut of: impl FnMut(&mut Way)) {
        for forth in [true, false] {
            self.way(from, address, forth, &mut of);
        }
    }

    /// Breaks all connections to `address`, as a process that dies does. New ones are let through.
    pub(crate) fn break_connections(&self, address: &str) {
        *self.0.lock().breaks.entry(address.to_owned()).or_default() += 1;
    }

    fn breaks(&self, address: &str) -> u64 {
        self.0.lock().breaks.get(address).copied().unwrap_or_default()
    }
}

struct Host {
    net: MemoryNet,
    name: String,
}

impl Net for Host {
    fn connect(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let (net, name, address) = (self.net.clone(), self.name.clone(), address.to_owned());
        Box::pin(async move {
            if net.way(&name, &address, true, |way| way.silent) {
                std::future::pending::<()>().await;
            }
            let listener = net.0.lock().listeners.get(&address).cloned();
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            if net.way(&name, &address, true, |way| way.refused) {
                return Err(refused());
            }
            let listener = listener.ok_or_else(refused)?;
            let (near, near_end) = tokio::io::duplex(64 << 10);
            let (far_end, far) = tokio::io::duplex(64 << 10);
            listener.send((Box::new(far), format!("{name}:1"))).map_err(|_| refused())?;
            tokio::spawn(relay(net, name, address, near_end, far_end));
            Ok(Box::new(near) as Box<dyn Stream>)
        })
    }

    fn listen(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Listener>>> {
        let (sender, incoming) = mpsc::unbounded_channel();
        self.net.0.lock().listeners.insert(address.to_owned(), sender);
        let listener = MemoryListener { incoming, address: address.to_owned() };
        Box::pin(async move { Ok(Box::new(listener) as Box<dyn Listener>) })
    }
}

struct MemoryListener {
    incoming: mpsc::UnboundedReceiver<Accepted>,
    address: String,
}

impl Listener for MemoryListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Accepted>> {
        Box::pin(async move {
            self.incoming.recv().await.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
        })
    }

    fn local_address(&self) -> String {
        self.address.clone()
    }
}

/// Carries one connection until an end closes it or it is broken.
async fn relay(
    net: MemoryNet,
    name: String,
    address: String,
    near: DuplexStream,
    far: DuplexStream,
) {
    let born = net.breaks(&address);
    let (near_read, near_write) = tokio::io::split(near);
    let (far_read, far_write) = tokio::io::split(far);
    let broken = async {
        while net.breaks(&address) == born {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        () = carry(&net, &name, &address, true, near_read, far_write) => {}
        () = carry(&net, &name, &address, false, far_read, near_write) => {}
        () = broken => {}
    }
}

async fn carry(
    net: &MemoryNet,
    name: &str,
    address: &str,
    forth: bool,
    mut from: impl AsyncReadExt + Unpin,
    mut into: impl AsyncWriteExt + Unpin,
) {
    let mut seen = Vec::new();
    let mut bytes = vec![0; 64 << 10];
    loop {
        let Ok(len @ 1..) = from.read(&mut bytes).await else {
            return;
        };
        let (silent, delay) = net.way(name, address, forth, |way| {
            if std::mem::take(&mut way.damage) {
                bytes[len - 1] ^= 0x10;
            }
            if !way.silent {
                seen.extend_from_slice(&bytes[..len]);
                way.frames.extend(whole_frames(&mut seen));
            }
            (way.silent, way.delay)
        });
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if !silent && into.write_all(&bytes[..len]).await.is_err() {
            return;
        }
    }
}

fn whole_frames(seen: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let Some(length) = seen.first_chunk::<4>() {
        let end = 8 + u32::from_be_bytes(*length) as usize;
        if seen.len() < end {
            break;
        }
        let frame: Vec<u8> = seen.drain(..end).skip(8).collect();
        if !frame.is_empty() {
            frames.push(frame);
        }
    }
    frames
}

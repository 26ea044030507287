//! A relay on the way to one node's peer listener: what other nodes send it arrives late, in order, and
//! nothing is lost. Owns the sockets and the delay. Does not look at what it carries.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Pieces under way on one connection: far more than comes in the longest delay. Beyond it the sender
/// waits, as on a narrow link.
const PIECES_MAX: usize = 64 << 10;
const PIECE_BYTES: usize = 64 << 10;

/// The relay. Dropping it breaks its connections.
pub(crate) struct Relay {
    address: SocketAddr,
    delay_ms: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Relay {
    /// Listens, and carries everything to `target`, at first without delay.
    pub(crate) async fn start(target: SocketAddr) -> std::io::Result<Relay> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let delay_ms = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, target, delay_ms.clone()));
        Ok(Relay { address, delay_ms, _tasks: tasks })
    }

    /// Where to dial.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How late everything arrives from now on.
    pub(crate) fn set_delay(&self, delay: Duration) {
        self.delay_ms.store(delay.as_millis() as u64, Ordering::Relaxed);
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, delay_ms: Arc<AtomicU64>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((near, _)) = listener.accept().await else { continue };
        let delay_ms = delay_ms.clone();
        connections.spawn(async move {
            // Who dials sees a connection that ends at once.
            let Ok(far) = TcpStream::connect(target).await else { return };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let (near_read, near_write) = near.into_split();
            let (far_read, far_write) = far.into_split();
            let no_delay = AtomicU64::new(0);
            tokio::select! {
                () = carry(near_read, far_write, &delay_ms) => {}
                () = carry(far_read, near_write, &no_delay) => {}
            }
        });
    }
}

/// Until either end closes.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay_ms: &AtomicU64) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Bytes)>(PIECES_MAX);
    let read = async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE_BYTES);
            match from.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let due = Instant::now() + Duration::from_millis(delay_ms.load(Ordering::Relaxed));
            if sender.send((due, buffer.split().freeze())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_goes_there_is_late_and_what_comes_back_is_not() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let target = listener.local_addr().expect("an address");
        let relay = Relay::start(target).await.expect("a relay");
        let mut near = TcpStream::connect(relay.address()).await.expect("the relay listens");
        let (mut far, _) = listener.accept().await.expect("the relay dials");
        let mut byte = [0];
        near.write_all(b"a").await.expect("open");
        far.read_exact(&mut byte).await.expect("a byte");
        let delay = Duration::from_millis(300);
        relay.set_delay(delay);
        let sent = Instant::now();
        near.write_all(b"b").await.expect("open");
        far.write_all(b"c").await.expect("open");
        near.read_exact(&mut byte).await.expect("a byte");
        assert_eq!(byte, *b"c");
        let back = sent.elapsed();
        far.read_exact(&mut byte).await.expect("a byte");
        assert_eq!(byte, *b"b");
        assert!(sent.elapsed() >= delay && back < sent.elapsed(), "{back:?}, {:?}", sent.elapsed());
    }
}

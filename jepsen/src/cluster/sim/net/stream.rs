//! Owns one end of a connection as the runtime's reader and writer. What travels is in `pipe`.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::SimNet;
use super::pipe::{Pull, Push};

/// One end. Dropping it closes it.
pub(super) struct SimStream {
    net: SimNet,
    connection: u64,
    side: usize,
    arrival: Option<Pin<Box<Sleep>>>,
}

impl SimStream {
    pub(super) fn new(net: SimNet, connection: u64, side: usize) -> SimStream {
        SimStream { net, connection, side, arrival: None }
    }
}

fn broken() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for SimStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let pulled = self.net.pull(self.connection, self.side, buffer.remaining(), context);
            match pulled {
                Pull::Bytes(bytes) => {
                    buffer.put_slice(&bytes);
                    return Poll::Ready(Ok(()));
                }
                Pull::End => return Poll::Ready(Ok(())),
                Pull::Broken => return Poll::Ready(Err(broken())),
                Pull::Wait => return Poll::Pending,
                Pull::Until(arrives) => {
                    let arrival = self
                        .arrival
                        .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(arrives)));
                    if arrival.deadline() != arrives {
                        arrival.as_mut().reset(arrives);
                    }
                    match arrival.as_mut().poll(context) {
                        Poll::Ready(()) => {}
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }
        }
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.net.push(self.connection, self.side, data, context) {
            Push::Taken => Poll::Ready(Ok(data.len())),
            Push::Wait => Poll::Pending,
            Push::Broken => Poll::Ready(Err(broken())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.net.finish(self.connection, self.side);
        Poll::Ready(Ok(()))
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.net.close(self.connection, self.side);
    }
}

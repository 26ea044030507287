//! Frames: how messages lie in a byte stream.
//!
//! Owns `[length u32][CRC32 of the body u32][body]`, big-endian, the body one protobuf message; the
//! watch over a silent connection; and the reasons for which a connection ends. Does not know what
//! the messages mean.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest body. Four times the largest batch of a client, so that every entry fits; beyond it
/// the connection is closed, because a length like that is damage or not ours.
pub(crate) const FRAME_BYTES_MAX: usize = 16 << 20;
/// The largest body before the other end has said who it is: a Hello with all nodes it knows.
pub(crate) const HELLO_BYTES_MAX: usize = 1 << 20;

const HEADER_BYTES: usize = 8;
/// What one read asks for: small frames come many at a time.
const READ_BYTES: usize = 64 << 10;
/// A writer's buffer above this is given back after a large frame.
const WRITE_BUFFER_BYTES_MAX: usize = 2 << 20;

/// An end that has written nothing for this long writes an empty frame.
const KEEPALIVE: Duration = Duration::from_millis(500);
/// Turns of `KEEPALIVE` without a byte after which the connection is given up: a cut cable sends no
/// reset, and TCP would go on for minutes. Six, so that an end that is only slow is kept.
const SILENT_TURNS_MAX: u32 = 6;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("closed by the other end")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("a frame of {bytes} bytes, over the limit of {max}")]
    TooLarge { bytes: usize, max: usize },
    #[error("a frame's checksum is wrong")]
    Damaged,
    #[error("a frame does not decode: {0}")]
    Malformed(String),
    #[error("nothing was heard for {:?}", KEEPALIVE * SILENT_TURNS_MAX)]
    Silent,
    /// No connection, or no greeting, in the time given.
    #[error("no {0} in time")]
    Slow(&'static str),
    /// By the other end (or by us, about the other end): who is who does not fit.
    #[error("refused: {0}")]
    Refused(String),
    /// The address is our own.
    #[error("this is the node itself")]
    Myself,
    #[error("cut off by fault injection")]
    Cut,
    /// A newer connection, or a newer start of the node, took its place.
    #[error("replaced by a newer connection")]
    Replaced,
}

/// Signs of life of one connection, counted by its two halves.
#[derive(Default)]
pub(crate) struct Pulse {
    heard: AtomicU64,
    sent: AtomicU64,
}

impl Pulse {
    /// Ends with `Silent` when nothing is heard any more; calls `keep_alive` when nothing is sent.
    pub(crate) async fn watch(&self, keep_alive: impl Fn()) -> Broken {
        let (mut heard, mut sent, mut silent) = (0, 0, 0);
        loop {
            tokio::time::sleep(KEEPALIVE).await;
            let (heard_now, sent_now) =
                (self.heard.load(Ordering::Relaxed), self.sent.load(Ordering::Relaxed));
            if sent == sent_now {
                keep_alive();
            }
            silent = if heard == heard_now { silent + 1 } else { 0 };
            if silent >= SILENT_TURNS_MAX {
                return Broken::Silent;
            }
            (heard, sent) = (heard_now, sent_now);
        }
    }
}

/// Takes frames from a stream.
pub(crate) struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
    bytes_max: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(stream: R, bytes_max: usize) -> Self {
        Self { stream, buffer: BytesMut::new(), bytes_max }
    }

    pub(crate) fn set_bytes_max(&mut self, bytes_max: usize) {
        self.bytes_max = bytes_max;
    }

    /// The next message. Cancel safe: what was read stays. Byte fields are slices of the frame, which
    /// shares its memory with no other frame (unless it is longer than a read).
    pub(crate) async fn next<M: Message + Default>(&mut self, pulse: &Pulse) -> Result<M, Broken> {
        loop {
            if let Some(body) = self.parse()? {
                return M::decode(body).map_err(|error| Broken::Malformed(error.to_string()));
            }
            let read = self.stream.read_buf(&mut self.buffer).await?;
            if read == 0 {
                return Err(Broken::Closed);
            }
            pulse.heard.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A whole frame's body, or room for what is missing.
    fn parse(&mut self) -> Result<Option<Bytes>, Broken> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else {
            self.buffer.reserve(READ_BYTES);
            return Ok(None);
        };
        let [l0, l1, l2, l3, c0, c1, c2, c3] = *header;
        let bytes = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        let crc = u32::from_be_bytes([c0, c1, c2, c3]);
        if bytes > self.bytes_max {
            return Err(Broken::TooLarge { bytes, max: self.bytes_max });
        }
        let whole = HEADER_BYTES + bytes;
        if self.buffer.len() < whole {
            self.buffer.reserve((whole - self.buffer.len()).max(READ_BYTES));
            return Ok(None);
        }
        if crc32fast::hash(&self.buffer[HEADER_BYTES..whole]) != crc {
            return Err(Broken::Damaged);
        }
        if whole < READ_BYTES {
            // A copy of its own: a slice of a few bytes, kept for long (an entry in the log's cache),
            // would keep all of the buffer that it was read into.
            let body = Bytes::copy_from_slice(&self.buffer[HEADER_BYTES..whole]);
            self.buffer.advance(whole);
            return Ok(Some(body));
        }
        let mut body = self.buffer.split_to(whole).freeze();
        body.advance(HEADER_BYTES);
        Ok(Some(body))
    }
}

/// Puts frames on a stream.
pub(crate) struct FrameWriter<W> {
    stream: W,
    buffer: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub(crate) fn new(stream: W) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// Writes one message as one frame. Not cancel safe: a frame that was begun must be ended, or
    /// the connection dropped.
    ///
    /// Why the bodies are copied into one buffer: the copy costs less than the system call that it
    /// saves, and less than the checksum over the same bytes.
    pub(crate) async fn send<M: Message>(
        &mut self,
        message: &M,
        pulse: &Pulse,
    ) -> Result<(), Broken> {
        let bytes = message.encoded_len();
        if bytes > FRAME_BYTES_MAX {
            return Err(Broken::TooLarge { bytes, max: FRAME_BYTES_MAX });
        }
        self.buffer.clear();
        self.buffer.reserve(HEADER_BYTES + bytes);
        self.buffer.put_u32(u32::try_from(bytes).expect("checked against the frame limit"));
        self.buffer.put_u32(0);
        message.encode(&mut self.buffer).expect("a Vec grows as needed");
        let crc = crc32fast::hash(&self.buffer[HEADER_BYTES..]);
        self.buffer[4..HEADER_BYTES].copy_from_slice(&crc.to_be_bytes());
        self.stream.write_all(&self.buffer).await?;
        self.stream.flush().await?;
        pulse.sent.fetch_add(1, Ordering::Relaxed);
        if self.buffer.capacity() > WRITE_BUFFER_BYTES_MAX {
            self.buffer = Vec::new();
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tokio::test expands to Runtime::block_on")]
mod tests {
    use coracle_proto::peer::{Envelope, GroupMessage};

    use super::*;

    fn envelope(bodies: &[&'static [u8]]) -> Envelope {
        let messages = bodies
            .iter()
            .zip(1..)
            .map(|(body, call)| GroupMessage {
                call,
                body: Bytes::from_static(body),
                ..Default::default()
            })
            .collect();
        Envelope { messages, ..Default::default() }
    }

    async fn framed(message: &Envelope) -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new());
        writer.send(message, &Pulse::default()).await.expect("written");
        writer.stream
    }

    async fn read(bytes: &[u8], bytes_max: usize) -> Result<Envelope, Broken> {
        FrameReader::new(bytes, bytes_max).next(&Pulse::default()).await
    }

    /// The bytes of format 1: they may not change without a new `Hello.protocol`.
    #[tokio::test]
    async fn the_bytes_of_a_frame() {
        let bytes = framed(&envelope(&[b"abc"])).await;
        assert_eq!(&bytes[..4], [0, 0, 0, 9]);
        assert_eq!(&bytes[4..8], crc32fast::hash(&bytes[8..]).to_be_bytes());
        assert_eq!(&bytes[8..], [0x0a, 7, 0x08, 1, 0x2a, 3, b'a', b'b', b'c']);
        assert_eq!(framed(&Envelope::default()).await, [0; 8], "a keep-alive");
    }

    #[tokio::test]
    async fn frames_come_back_however_they_are_cut() {
        let sent = [envelope(&[b"one", b"two"]), Envelope::default(), envelope(&[b"three"])];
        let mut bytes = Vec::new();
        for message in &sent {
            bytes.extend(framed(message).await);
        }
        for room in [1, 3, 7, 8, 9, 1024] {
            let (mut into, from) = tokio::io::duplex(room);
            let bytes = bytes.clone();
            let write = async move { into.write_all(&bytes).await.expect("read below") };
            let read = async {
                let mut reader = FrameReader::new(from, FRAME_BYTES_MAX);
                let pulse = Pulse::default();
                for message in &sent {
                    assert_eq!(reader.next::<Envelope>(&pulse).await.expect("whole"), *message);
                }
                assert!(matches!(reader.next::<Envelope>(&pulse).await, Err(Broken::Closed)));
            };
            tokio::join!(write, read);
        }
    }

    #[tokio::test]
    async fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = framed(&envelope(&[b"some entry", b"another"])).await;
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged, FRAME_BYTES_MAX).await.is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(matches!(read(&bytes[..len], FRAME_BYTES_MAX).await, Err(Broken::Closed)));
        }
    }

    #[tokio::test]
    async fn what_is_kept_of_a_small_frame_keeps_no_read_buffer() {
        let mut bytes = Vec::new();
        for _ in 0..1_000 {
            bytes.extend(framed(&envelope(&[b"a small entry"])).await);
        }
        let mut reader = FrameReader::new(&bytes[..], FRAME_BYTES_MAX);
        let pulse = Pulse::default();
        reader.buffer.reserve(READ_BYTES);
        let buffer = reader.buffer.as_ptr() as usize;
        let buffer = buffer..buffer + reader.buffer.capacity();
        for _ in 0..1_000 {
            let kept = reader.next::<Envelope>(&pulse).await.expect("whole");
            let kept = kept.messages[0].body.as_ptr() as usize;
            assert!(!buffer.contains(&kept), "a slice of the buffer that frames are read into");
        }
    }

    #[tokio::test]
    async fn a_frame_over_the_limit_is_refused_before_it_takes_memory() {
        let header = [0xff; HEADER_BYTES];
        let mut reader = FrameReader::new(&header[..], HELLO_BYTES_MAX);
        let refused = reader.next::<Envelope>(&Pulse::default()).await;
        assert!(matches!(refused, Err(Broken::TooLarge { max: HELLO_BYTES_MAX, .. })));
        assert!(reader.buffer.capacity() <= 2 * READ_BYTES);
    }
}

//! Owns the walk over the segments at open: which bytes are records, where the log ends, and what
//! is lost. Does not interpret records (see `replay`) and changes no file (see `recovery`).
//!
//! The one question is: torn or lost? A crash may tear the last batch, which nobody was promised.
//! Anything before it was synced. A batch head and a segment header are only written after
//! everything before them is durable; so damage that is followed by one of these, found whole, is
//! loss, and damage that is followed by neither is a torn tail.
//!
//! Batches begin on block boundaries and their heads stand for themselves, without the chain. So
//! the walk finds its way again behind any damage. What is lost is told as narrowly as can be
//! proved: a record whose header is sound costs its replica; a batch whose head is sound costs the
//! replicas that the head lists; anything else costs all replicas that existed before the next
//! sound batch.

use std::io;
use std::path::{Path, PathBuf};

use super::index::Place;
use super::record::{
    BLOCK, BatchHead, HEADER_LEN, Header, Kind, Origin, RECORD_VERSION, ReplicaId, align,
    decode_header,
};
use super::replay::{Found, Replay};
use super::segment::{HeaderRead, Segment, SegmentHeader, segment_path};
use crate::error::Error;
use crate::fs::{File, read_full_at};

/// A part of the log that was durable and cannot be read.
#[derive(Clone, Debug)]
pub(crate) struct Loss {
    pub(crate) file: PathBuf,
    pub(crate) offset: u64,
    pub(crate) why: String,
    /// The first batch behind it.
    pub(crate) next_batch: u64,
    /// Who had records in it; None when nobody knows.
    pub(crate) replicas: Option<Vec<ReplicaId>>,
}

/// A segment with its content.
pub(crate) struct Content {
    pub(crate) segment: Segment,
    pub(crate) bytes: Vec<u8>,
    pub(crate) header: HeaderRead,
    /// The first block that could not be read, with the reason. Unreadable blocks stand as zeros in
    /// `bytes`.
    pub(crate) unreadable: Option<(u64, io::Error)>,
}

/// A batch that was found whole, or torn.
#[derive(Clone)]
pub(crate) struct Batch {
    pub(crate) segment: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A batch with damage inside. Torn, if nothing sound follows.
struct Suspect {
    batch: Batch,
    head: BatchHead,
    /// Its segment's bytes, as far as they are needed.
    bytes: Vec<u8>,
    records: Vec<(Header, Kind, Place, bool)>,
    /// Where the framing ends, if it does.
    broken: Option<u64>,
    file: PathBuf,
}

/// Where the walk stands, and what it has found.
pub(crate) struct Scan<'a> {
    replay: &'a mut Replay,
    dir: PathBuf,
    pub(crate) losses: Vec<Loss>,
    /// A loss that waits for the number of the next sound batch.
    open_loss: Option<Loss>,
    suspect: Option<Suspect>,
    /// Header checksum of the last record; None when it is not known.
    pub(crate) chain: Option<u32>,
    /// None when it is not known.
    pub(crate) next_batch: Option<u64>,
    /// The last batch that was found whole.
    pub(crate) last: Option<Batch>,
    /// A segment header is damaged, be anything lost or not.
    pub(crate) unsound: bool,
    /// Where the last segment's batches end.
    pub(crate) end: u64,
}

impl Content {
    pub(crate) fn read(segment: Segment) -> Result<Content, Error> {
        let mut bytes = vec![0; segment.capacity as usize];
        let unreadable = read_blocks(&*segment.file, &mut bytes);
        let header = SegmentHeader::decode(&segment.path, segment.number, &bytes)?;
        Ok(Content { segment, bytes, header, unreadable })
    }

    /// The salt of this segment; when its header is damaged, the one it should have.
    fn salt(&self) -> u64 {
        match &self.header {
            HeaderRead::Good(header) => header.salt,
            HeaderRead::Bad(_) => self.segment.salt,
        }
    }

    /// The head of the batch at `offset`, when a sound one stands there.
    fn batch_at(&self, offset: u64) -> Result<Option<(BatchHead, Header)>, Error> {
        let Some(bytes) = self.bytes.get(offset as usize..) else {
            return Ok(None);
        };
        let origin = Origin { salt: self.salt(), segment: self.segment.number, offset };
        let Some(header) = decode_header(bytes, origin, 0) else {
            return Ok(None);
        };
        if header.version != RECORD_VERSION {
            return Err(self.format(&header));
        }
        let Some(body) = bytes.get(HEADER_LEN..header.record_len() as usize) else {
            return Ok(None);
        };
        if header.kind != Kind::Batch as u8 || crc32fast::hash(body) != header.body_crc {
            return Ok(None);
        }
        let head = BatchHead::decode(body);
        Ok(head
            .filter(|head| u64::from(head.len) >= header.record_len())
            .filter(|head| head.len as usize <= bytes.len())
            .map(|head| (head, header)))
    }

    /// The first sound batch from `from` on.
    fn next_batch(&self, from: u64) -> Result<Option<u64>, Error> {
        let mut offset = align(from.max(BLOCK));
        while offset < self.bytes.len() as u64 {
            if self.batch_at(offset)?.is_some() {
                return Ok(Some(offset));
            }
            offset += BLOCK;
        }
        Ok(None)
    }

    /// Whether this is a segment that was being created when the crash came: no sound header, and
    /// nothing was ever written behind it.
    pub(crate) fn is_torn_creation(&self) -> bool {
        let behind = self.bytes.get(BLOCK as usize..).unwrap_or_default();
        matches!(self.header, HeaderRead::Bad(_))
            && self.unreadable.is_none()
            && behind.iter().all(|&byte| byte == 0)
    }

    /// The newest `log_start` that a batch of this segment names.
    pub(crate) fn log_start(&self) -> Result<Option<u64>, Error> {
        let mut newest = None;
        let mut offset = BLOCK;
        while let Some(at) = self.next_batch(offset)? {
            newest = newest.max(self.batch_at(at)?.map(|(head, _)| head.log_start));
            offset = at + BLOCK;
        }
        Ok(newest)
    }

    fn format(&self, header: &Header) -> Error {
        Error::Format {
            file: self.segment.path.to_path_buf(),
            found: u32::from(header.version),
            known: u32::from(RECORD_VERSION),
        }
    }
}

/// Reads all it can; returns the first block that it cannot.
fn read_blocks(file: &dyn File, bytes: &mut [u8]) -> Option<(u64, io::Error)> {
    if read_full_at(file, bytes, 0).is_ok() {
        return None;
    }
    let mut unreadable = None;
    for (number, block) in bytes.chunks_mut(BLOCK as usize).enumerate() {
        let offset = number as u64 * BLOCK;
        if let Err(error) = read_full_at(file, block, offset) {
            block.fill(0);
            unreadable = unreadable.or(Some((offset, error)));
        }
    }
    unreadable
}

impl<'a> Scan<'a> {
    pub(crate) fn new(replay: &'a mut Replay, dir: &Path) -> Scan<'a> {
        Scan {
            replay,
            dir: dir.to_path_buf(),
            losses: Vec::new(),
            open_loss: None,
            suspect: None,
            chain: None,
            next_batch: None,
            last: None,
            unsound: false,
            end: BLOCK,
        }
    }

    /// A segment that is needed has no file.
    pub(crate) fn missing(&mut self, number: u64) {
        self.lose(&segment_path(&self.dir, number), 0, "the segment is missing");
    }

    fn lose(&mut self, file: &Path, offset: u64, why: &str) {
        self.chain = None;
        self.next_batch = None;
        if self.open_loss.is_none() {
            self.open_loss = Some(Loss {
                file: file.to_path_buf(),
                offset,
                why: why.to_owned(),
                next_batch: u64::MAX,
                replicas: None,
            });
        }
    }

    /// Something sound stands behind everything so far: what is damaged before it was durable.
    fn settle(&mut self, next_batch: u64) {
        if let Some(suspect) = self.suspect.take() {
            self.settle_suspect(suspect);
        }
        if let Some(loss) = self.open_loss.take() {
            self.losses.push(Loss { next_batch, ..loss });
        }
    }

    fn settle_suspect(&mut self, suspect: Suspect) {
        for &(header, kind, place, sound) in &suspect.records {
            let start = (place.body_offset() - suspect.batch.offset) as usize;
            let body = &suspect.bytes[start..start + place.body_len as usize];
            let body = sound.then_some(body);
            let batch = suspect.head.number;
            self.replay.record(&Found { header, kind, place, batch, body });
        }
        if let Some(offset) = suspect.broken {
            self.losses.push(Loss {
                file: suspect.file,
                offset,
                why: "the header of a record does not match its checksum".to_owned(),
                next_batch: suspect.head.number + 1,
                replicas: Some(suspect.head.replicas),
            });
        }
    }

    /// Walks one segment. Call in order.
    pub(crate) fn segment(
        &mut self,
        content: &Content,
        previous: Option<u64>,
    ) -> Result<(), Error> {
        let path = &content.segment.path;
        let number = content.segment.number;
        match &content.header {
            HeaderRead::Bad(why) => {
                self.unsound = true;
                if !self.goes_on(content, previous)? {
                    self.lose(path, 0, why);
                }
            }
            HeaderRead::Good(header) => {
                let end = previous.map(|previous| (previous, self.end));
                match end {
                    None => {}
                    Some((previous, _)) if previous + 1 != number => self.missing(previous + 1),
                    Some(end) if end == (header.durable_segment, header.durable_offset) => {}
                    Some((previous, end)) => {
                        let file = segment_path(&self.dir, previous);
                        self.lose(&file, end, "the segment ends before its durable end");
                    }
                }
                self.settle(header.first_batch);
                self.chain = Some(header.chain);
                self.next_batch = Some(header.first_batch);
            }
        }
        let mut offset = BLOCK;
        loop {
            if let Some((head, header)) = content.batch_at(offset)? {
                offset = self.batch(content, offset, head, &header)?;
            } else if let Some(next) = content.next_batch(offset)? {
                self.lose(path, offset, "the head of a batch does not match its checksum");
                offset = next;
            } else {
                break;
            }
        }
        self.end = offset;
        Ok(())
    }

    /// Whether the first batch of a segment with a damaged header follows the last one: nothing is
    /// lost then.
    fn goes_on(&self, content: &Content, previous: Option<u64>) -> Result<bool, Error> {
        let Some((head, _)) = content.batch_at(BLOCK)? else {
            return Ok(false);
        };
        Ok(match previous {
            // What would be before it was freed.
            None => self.open_loss.is_none(),
            Some(previous) => {
                previous + 1 == content.segment.number
                    && self.chain == Some(head.chain)
                    && self.next_batch == Some(head.number)
            }
        })
    }

    /// Takes a batch whose head is sound; returns where the next one starts.
    fn batch(
        &mut self,
        content: &Content,
        offset: u64,
        head: BatchHead,
        header: &Header,
    ) -> Result<u64, Error> {
        let follows = self.chain.is_none_or(|chain| chain == head.chain)
            && self.next_batch.is_none_or(|next| next == head.number);
        if !follows {
            self.lose(&content.segment.path, offset, "a batch before this one is missing");
        }
        self.settle(head.number);
        let batch = Batch { segment: content.segment.number, offset, len: u64::from(head.len) };
        let next = offset + align(batch.len);
        let suspect = self.records(content, batch.clone(), &head, header)?;
        self.next_batch = Some(head.number + 1);
        if suspect.broken.is_none() && suspect.records.iter().all(|(.., sound)| *sound) {
            self.settle_suspect(suspect);
            self.last = Some(batch);
        } else {
            self.suspect = Some(suspect);
        }
        Ok(next)
    }

    /// Reads the records of a batch and sets the chain behind it.
    fn records(
        &mut self,
        content: &Content,
        batch: Batch,
        head: &BatchHead,
        header: &Header,
    ) -> Result<Suspect, Error> {
        let range = batch.offset as usize..(batch.offset + batch.len) as usize;
        let bytes = &content.bytes[range];
        let mut records = Vec::new();
        let mut chain = header.header_crc;
        let mut at = header.record_len();
        let mut broken = None;
        while records.len() < head.records as usize {
            let origin =
                Origin { salt: content.salt(), segment: batch.segment, offset: batch.offset + at };
            let rest = bytes.get(at as usize..).unwrap_or_default();
            let read = decode_header(rest, origin, chain)
                .filter(|read| read.record_len() <= rest.len() as u64);
            let Some(read) = read else {
                broken = Some(origin.offset);
                break;
            };
            let kind = Kind::from_byte(read.kind).filter(|_| read.version == RECORD_VERSION);
            let Some(kind) = kind else {
                return Err(content.format(&read));
            };
            let body = &rest[HEADER_LEN..read.record_len() as usize];
            let place = Place::new(batch.segment, origin.offset, &read);
            records.push((read, kind, place, crc32fast::hash(body) == read.body_crc));
            chain = read.header_crc;
            at += read.record_len();
        }
        if broken.is_none() && at != batch.len {
            broken = Some(batch.offset + at);
        }
        self.chain = broken.is_none().then_some(chain);
        Ok(Suspect {
            batch,
            head: head.clone(),
            bytes: bytes.to_vec(),
            records,
            broken,
            file: content.segment.path.to_path_buf(),
        })
    }

    /// The walk is over. A batch that is still suspect is torn: it is left out, and the log ends
    /// before it.
    pub(crate) fn finish(&mut self) {
        if let Some(suspect) = self.suspect.take() {
            self.end = suspect.batch.offset;
            self.chain = Some(suspect.head.chain);
            self.next_batch = Some(suspect.head.number);
        }
        self.losses.extend(self.open_loss.take());
    }
}

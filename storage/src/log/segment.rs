//! Owns one segment file: its name, its header, creating and reading it. Does not know what records
//! mean.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::{BLOCK, u32_at, u64_at};
use crate::error::Error;
use crate::fs::{File, Fs, OpenMode, read_exact_at};

const MAGIC: [u8; 8] = *b"coraclog";
/// The one version of the log that this program reads and writes.
pub(crate) const LOG_VERSION: u32 = 1;
/// Bytes of the segment header, its checksum included. The rest of its block is zero.
const HEADER_LEN: usize = 68;

/// The first block of a segment. Written and synced before the first batch of the segment is.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) struct SegmentHeader {
    /// Consecutive, from 1.
    pub(crate) number: u64,
    pub(crate) salt: u64,
    /// Number of the first batch in it.
    pub(crate) first_batch: u64,
    /// Header checksum of the last record before it.
    pub(crate) chain: u32,
    /// The durable-end mark: the segment before ends here.
    pub(crate) durable_segment: u64,
    pub(crate) durable_offset: u64,
}

/// What a segment's first block turned out to be.
pub(crate) enum HeaderRead {
    Good(SegmentHeader),
    /// Not what was written: torn while it was created, or damaged.
    Bad(&'static str),
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK as usize);
        block.extend_from_slice(&MAGIC);
        block.extend_from_slice(&LOG_VERSION.to_le_bytes());
        block.extend_from_slice(&(BLOCK as u32).to_le_bytes());
        block.extend_from_slice(&self.number.to_le_bytes());
        block.extend_from_slice(&self.salt.to_le_bytes());
        block.extend_from_slice(&self.first_batch.to_le_bytes());
        block.extend_from_slice(&self.durable_segment.to_le_bytes());
        block.extend_from_slice(&self.durable_offset.to_le_bytes());
        block.extend_from_slice(&self.chain.to_le_bytes());
        block.extend_from_slice(&[0; 4]);
        let crc = crc32fast::hash(&block);
        block.extend_from_slice(&crc.to_le_bytes());
        assert_eq!(block.len(), HEADER_LEN, "the layout of the segment header is fixed");
        block.resize(BLOCK as usize, 0);
        block
    }

    /// Reads a header. A sound header of another version is an error of its own: that file was
    /// written by another program, and nothing in it may be judged, let alone cut.
    pub(crate) fn decode(path: &Path, number: u64, block: &[u8]) -> Result<HeaderRead, Error> {
        if block.len() < BLOCK as usize {
            return Ok(HeaderRead::Bad("the segment is shorter than its first block"));
        }
        let bytes = &block[..HEADER_LEN];
        if u32_at(bytes, HEADER_LEN - 4) != Some(crc32fast::hash(&bytes[..HEADER_LEN - 4])) {
            return Ok(HeaderRead::Bad("the checksum of the segment header does not match"));
        }
        if bytes[..8] != MAGIC {
            return Ok(HeaderRead::Bad("this is not a log segment"));
        }
        let u32_of = |at| u32_at(bytes, at).expect("inside the header, whose length was checked");
        let u64_of = |at| u64_at(bytes, at).expect("inside the header, whose length was checked");
        if u32_of(8) != LOG_VERSION || u32_of(12) != BLOCK as u32 {
            return Err(Error::Format {
                file: path.to_path_buf(),
                found: u32_of(8),
                known: LOG_VERSION,
            });
        }
        if u64_of(16) != number {
            return Ok(HeaderRead::Bad("the segment carries another number than its name"));
        }
        Ok(HeaderRead::Good(SegmentHeader {
            number,
            salt: u64_of(24),
            first_batch: u64_of(32),
            durable_segment: u64_of(40),
            durable_offset: u64_of(48),
            chain: u32_of(56),
        }))
    }
}

/// A segment's path.
pub(crate) fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016}.log"))
}

/// The number in a segment's name; `None` for a name that is not a segment's.
pub(crate) fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    if digits.len() != 16 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// An open segment. Reads go on through it after its name is gone.
#[derive(Clone)]
pub(crate) struct Segment {
    pub(crate) number: u64,
    pub(crate) salt: u64,
    pub(crate) path: Arc<Path>,
    pub(crate) file: Arc<dyn File>,
    /// Length of the file: the room for batches.
    pub(crate) capacity: u64,
}

impl Segment {
    /// Creates a segment with room for `capacity` bytes. It and its name are durable when it
    /// returns. When that fails nothing of it is left behind, as far as the disk lets us.
    pub(crate) fn create(
        fs: &dyn Fs,
        dir: &Path,
        header: SegmentHeader,
        capacity: u64,
    ) -> io::Result<Segment> {
        let path = segment_path(dir, header.number);
        if fs.exists(&path) {
            // An attempt before this one that failed half way: no batch was ever written into it.
            fs.remove_file(&path)?;
        }
        let file = fs.open(&path, OpenMode::CreateNew)?;
        let filled = file
            .allocate(capacity)
            .and_then(|()| file.write_at(&header.encode(), 0))
            .and_then(|()| file.sync())
            .and_then(|()| fs.sync_dir(dir));
        if let Err(error) = filled {
            // The first error is the one that counts.
            let _ = fs.remove_file(&path);
            return Err(error);
        }
        Ok(Segment { number: header.number, salt: header.salt, path: path.into(), file, capacity })
    }

    /// The body of a record, checked against its checksum.
    pub(crate) fn read_body(&self, offset: u64, len: u32, crc: u32) -> Result<Vec<u8>, Error> {
        let mut body = vec![0; len as usize];
        read_exact_at(&*self.file, &mut body, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::corruption(&self.path, offset, "the file ends inside the record")
            }
            _ => Error::io(&self.path, error),
        })?;
        if crc32fast::hash(&body) != crc {
            return Err(Error::corruption(
                &self.path,
                offset,
                "the checksum of the record's body does not match",
            ));
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree() {
        let path = segment_path(Path::new("log"), 42);
        let name = path.file_name().and_then(|name| name.to_str()).expect("a plain name");
        assert_eq!(segment_number(name), Some(42));
        for name in
            ["42.log", "000000000000004x.log", "0000000000000042.tmp", "+000000000000042.log"]
        {
            assert_eq!(segment_number(name), None, "{name}");
        }
    }

    #[test]
    fn a_header_reads_back_and_a_newer_version_is_refused() {
        let header = SegmentHeader {
            number: 3,
            salt: 4,
            first_batch: 5,
            chain: 6,
            durable_segment: 2,
            durable_offset: 8192,
        };
        let block = header.encode();
        let path = Path::new("segment");
        let read = SegmentHeader::decode(path, 3, &block).expect("a known version");
        assert!(matches!(read, HeaderRead::Good(read) if read == header));
        let mut newer = block.clone();
        newer[8] = 2;
        let crc = crc32fast::hash(&newer[..64]);
        newer[64..68].copy_from_slice(&crc.to_le_bytes());
        let refused = SegmentHeader::decode(path, 3, &newer);
        assert!(matches!(refused, Err(Error::Format { found: 2, known: 1, .. })));
        for bit in 0..HEADER_LEN * 8 {
            let mut bad = block.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let read = SegmentHeader::decode(path, 3, &bad).expect("damage is not a version");
            assert!(matches!(read, HeaderRead::Bad(_)), "bit {bit}");
        }
    }
}

//! Owns the bytes of one record: frame, checksums, chain, and what the kinds carry. Does not touch
//! files (see `segment`). The layout is documented in `FORMAT.md` and pinned by golden bytes.

pub(crate) use crate::replica::ReplicaId;
use bytes::Bytes;
use crc32fast::Hasher;

/// One entry of a replica's log. The log does not look into id and payload.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct LogEntry {
    /// Its place; entries of a replica are consecutive.
    pub index: u64,
    /// Opaque log id (for Raft: term and index), kept beside the index so that it can be asked for
    /// alone.
    pub id: [u8; 16],
    /// What is replicated. Kept in memory as it is: a slice of a large buffer would keep the whole
    /// buffer.
    pub payload: Bytes,
}

/// Every batch starts on a multiple of this, so a write never touches the page of an acknowledged
/// batch: the unit in which kernels and drives rewrite, and in which they may tear.
pub(crate) const BLOCK: u64 = 4096;
/// Length of a record's header.
pub(crate) const HEADER_LEN: usize = 32;
/// Version of the record layout.
pub(crate) const RECORD_VERSION: u8 = 1;
/// Set in the flags of a copy forward: on replay it fills a place in the index, and never
/// truncates.
const FLAG_REWRITTEN: u8 = 1;

/// `offset`, rounded up to a block.
pub(crate) fn align(offset: u64) -> u64 {
    offset.div_ceil(BLOCK) * BLOCK
}

/// What a record says. The numbers are on disk.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Starts a batch; body: [`BatchHead`].
    Batch = 1,
    /// One entry: index in the header; body: id, payload.
    Entry = 2,
    /// The newest vote; body: opaque.
    Vote = 3,
    /// Removes all entries from the header's index on; no body.
    Truncate = 4,
    /// Removes all entries up to the header's index; body: its id.
    Purge = 5,
    /// How far the replica knew its log to be committed; body: opaque.
    Committed = 6,
    /// The replica exists; header's index: number of the batch that first said so, 0 = this one; no
    /// body.
    Create = 7,
    /// The replica is gone for ever; no body.
    Destroy = 8,
    /// The destroy need not be remembered any longer; no body.
    Forget = 9,
    /// The replica lost acknowledged data and is recovering; body: the reason as text.
    Damaged = 10,
}

impl Kind {
    pub(crate) fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Batch,
            2 => Kind::Entry,
            3 => Kind::Vote,
            4 => Kind::Truncate,
            5 => Kind::Purge,
            6 => Kind::Committed,
            7 => Kind::Create,
            8 => Kind::Destroy,
            9 => Kind::Forget,
            10 => Kind::Damaged,
            _ => return None,
        })
    }
}

/// Where a record begins, with what protects it from being taken for another place's record.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Origin {
    /// The segment's salt: bytes inside a payload cannot pass for a record without it.
    pub(crate) salt: u64,
    /// The segment's number.
    pub(crate) segment: u64,
    /// The record's first byte.
    pub(crate) offset: u64,
}

/// A record's header, checked.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) struct Header {
    /// Checksum of this header, its origin and the chain: the next record's chain.
    pub(crate) header_crc: u32,
    pub(crate) body_crc: u32,
    pub(crate) body_len: u32,
    pub(crate) version: u8,
    pub(crate) kind: u8,
    pub(crate) rewritten: bool,
    pub(crate) replica: ReplicaId,
    pub(crate) index: u64,
}

impl Header {
    /// Bytes of the whole record.
    pub(crate) fn record_len(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.body_len)
    }
}

/// What a batch says about itself and about what stands before it.
#[derive(Clone, Eq, PartialEq, Debug)]
pub(crate) struct BatchHead {
    /// Consecutive over the log's whole life.
    pub(crate) number: u64,
    /// From the first byte of this record to the end of the last record of the batch.
    pub(crate) len: u32,
    /// Records after this one.
    pub(crate) records: u32,
    /// The durable-end mark: everything before this place was synced before this batch was written.
    pub(crate) durable_segment: u64,
    pub(crate) durable_offset: u64,
    /// The oldest segment that is still needed; older ones may be gone.
    pub(crate) log_start: u64,
    /// Header checksum of the last record before this batch: a batch that is missing breaks it.
    pub(crate) chain: u32,
    /// The replicas that have records in this batch, sorted: who is at risk when its inside cannot
    /// be read.
    pub(crate) replicas: Vec<ReplicaId>,
}

const BATCH_FIXED_LEN: usize = 48;

impl BatchHead {
    /// Bytes of the batch record when it names `replicas` replicas.
    pub(crate) fn record_len(replicas: usize) -> usize {
        HEADER_LEN + BATCH_FIXED_LEN + 8 * replicas
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(BATCH_FIXED_LEN + 8 * self.replicas.len());
        body.extend_from_slice(&self.number.to_le_bytes());
        body.extend_from_slice(&self.len.to_le_bytes());
        body.extend_from_slice(&self.records.to_le_bytes());
        body.extend_from_slice(&self.durable_segment.to_le_bytes());
        body.extend_from_slice(&self.durable_offset.to_le_bytes());
        body.extend_from_slice(&self.log_start.to_le_bytes());
        body.extend_from_slice(&self.chain.to_le_bytes());
        body.extend_from_slice(&(self.replicas.len() as u32).to_le_bytes());
        for replica in &self.replicas {
            body.extend_from_slice(&replica.0.to_le_bytes());
        }
        body
    }

    pub(crate) fn decode(body: &[u8]) -> Option<BatchHead> {
        let count = u32_at(body, 44)? as usize;
        if body.len() != BATCH_FIXED_LEN + 8 * count {
            return None;
        }
        let replicas = (0..count)
            .map(|i| u64_at(body, BATCH_FIXED_LEN + 8 * i).map(ReplicaId))
            .collect::<Option<Vec<_>>>()?;
        Some(BatchHead {
            number: u64_at(body, 0)?,
            len: u32_at(body, 8)?,
            records: u32_at(body, 12)?,
            durable_segment: u64_at(body, 16)?,
            durable_offset: u64_at(body, 24)?,
            log_start: u64_at(body, 32)?,
            chain: u32_at(body, 40)?,
            replicas,
        })
    }
}

/// A record to be written.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Draft<'a> {
    pub(crate) kind: Kind,
    pub(crate) rewritten: bool,
    pub(crate) replica: ReplicaId,
    pub(crate) index: u64,
    /// The body, in two parts so that an entry's payload is copied once.
    pub(crate) body: (&'a [u8], &'a [u8]),
}

/// Appends a record to `out` and returns its header. `chain` is the header checksum of the record
/// before it in the batch, and 0 for the batch record itself: that one must be found by itself
/// after damage.
pub(crate) fn encode(out: &mut Vec<u8>, origin: Origin, chain: u32, draft: Draft<'_>) -> Header {
    let mut body = Hasher::new();
    body.update(draft.body.0);
    body.update(draft.body.1);
    let body_crc = body.finalize();
    let body_len = u32::try_from(draft.body.0.len() + draft.body.1.len())
        .expect("the limits of the options keep bodies far below 4 GiB");
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&body_crc.to_le_bytes());
    out.extend_from_slice(&body_len.to_le_bytes());
    let flags = if draft.rewritten { FLAG_REWRITTEN } else { 0 };
    out.extend_from_slice(&[RECORD_VERSION, draft.kind as u8, flags, 0]);
    out.extend_from_slice(&draft.replica.0.to_le_bytes());
    out.extend_from_slice(&draft.index.to_le_bytes());
    let header_crc = header_crc(origin, chain, &out[start + 4..start + HEADER_LEN]);
    out[start..start + 4].copy_from_slice(&header_crc.to_le_bytes());
    out.extend_from_slice(draft.body.0);
    out.extend_from_slice(draft.body.1);
    Header {
        header_crc,
        body_crc,
        body_len,
        version: RECORD_VERSION,
        kind: draft.kind as u8,
        rewritten: draft.rewritten,
        replica: draft.replica,
        index: draft.index,
    }
}

/// Reads a record's header; `None` when it is not what was written at this place after this chain.
pub(crate) fn decode_header(bytes: &[u8], origin: Origin, chain: u32) -> Option<Header> {
    let bytes = bytes.get(..HEADER_LEN)?;
    let stored = u32_at(bytes, 0)?;
    if header_crc(origin, chain, &bytes[4..]) != stored {
        return None;
    }
    Some(Header {
        header_crc: stored,
        body_crc: u32_at(bytes, 4)?,
        body_len: u32_at(bytes, 8)?,
        version: bytes[12],
        kind: bytes[13],
        rewritten: bytes[14] & FLAG_REWRITTEN != 0,
        replica: ReplicaId(u64_at(bytes, 16)?),
        index: u64_at(bytes, 24)?,
    })
}

fn header_crc(origin: Origin, chain: u32, header: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&origin.salt.to_le_bytes());
    hasher.update(&origin.segment.to_le_bytes());
    hasher.update(&origin.offset.to_le_bytes());
    hasher.update(&chain.to_le_bytes());
    hasher.update(header);
    hasher.finalize()
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// An entry's or a purge's id, with what follows it.
pub(crate) fn split_id(body: &[u8]) -> Option<([u8; 16], &[u8])> {
    let (id, rest) = body.split_at_checked(16)?;
    Some((id.try_into().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin = Origin { salt: 7, segment: 3, offset: 8192 };

    fn entry(out: &mut Vec<u8>, chain: u32) -> Header {
        let draft = Draft {
            kind: Kind::Entry,
            rewritten: false,
            replica: ReplicaId(9),
            index: 5,
            body: (&[1; 16], b"payload"),
        };
        encode(out, ORIGIN, chain, draft)
    }

    #[test]
    fn a_record_reads_back_only_at_its_place_and_after_its_chain() {
        let mut out = Vec::new();
        let header = entry(&mut out, 77);
        assert_eq!(decode_header(&out, ORIGIN, 77), Some(header));
        assert_eq!(decode_header(&out, ORIGIN, 78), None);
        assert_eq!(decode_header(&out, Origin { offset: 12288, ..ORIGIN }, 77), None);
        assert_eq!(decode_header(&out, Origin { segment: 4, ..ORIGIN }, 77), None);
        assert_eq!(decode_header(&out, Origin { salt: 8, ..ORIGIN }, 77), None);
        assert_eq!(decode_header(&out[..HEADER_LEN - 1], ORIGIN, 77), None);
        assert_eq!(header.record_len(), out.len() as u64);
    }

    #[test]
    fn every_flipped_bit_is_seen_by_one_of_the_two_checksums() {
        let mut out = Vec::new();
        let header = entry(&mut out, 1);
        for bit in 0..out.len() * 8 {
            let mut bad = out.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match decode_header(&bad, ORIGIN, 1) {
                None => assert!(bit / 8 < HEADER_LEN),
                Some(read) => {
                    assert_eq!(read, header);
                    assert_ne!(crc32fast::hash(&bad[HEADER_LEN..]), header.body_crc);
                }
            }
        }
    }

    #[test]
    fn a_batch_head_reads_back_and_refuses_other_lengths() {
        let head = BatchHead {
            number: 1,
            len: 2,
            records: 3,
            durable_segment: 4,
            durable_offset: 5,
            log_start: 6,
            chain: 7,
            replicas: vec![ReplicaId(8), ReplicaId(9)],
        };
        let body = head.encode();
        assert_eq!(HEADER_LEN + body.len(), BatchHead::record_len(2));
        assert_eq!(BatchHead::decode(&body), Some(head));
        for len in 0..body.len() {
            assert_eq!(BatchHead::decode(&body[..len]), None);
        }
    }
}

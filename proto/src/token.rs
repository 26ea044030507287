//! Owns the tokens that clients carry: what a session has seen, where a scan stands, and where a
//! delete-range does (`delete`). Opaque to callers; both ends of a socket read them here. Does not decide which replica is fresh enough.
//!
//! All are framed alike: kind (1 byte), format (1 byte), body, CRC32 of all before it (4 bytes).
//! Integers are big-endian. The CRC finds damage; it does not keep anybody from making a token up,
//! so a decoded token is still input: it can ask for nothing that its bearer could not ask for.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::Xxh3;

use crate::limits::{
    KEY_BYTES_MAX, SCAN_TOKEN_BYTES_MAX, SESSION_SHARDS_MAX, SESSION_TOKEN_BYTES_MAX,
};
use crate::reason::Fault;
use crate::shard_map::{KeyspaceId, ShardId};
use crate::v1;

mod delete;

pub use delete::{DeleteToken, Lane};

const FORMAT: u8 = 1;
const KIND_SESSION: u8 = b's';
const KIND_SCAN: u8 = b'c';
const KIND_DELETE: u8 = b'd';
const CRC_BYTES: usize = 4;

/// A token that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Damaged, cut, made up, or a token of the other kind.
    #[error("token is damaged: {0}")]
    Damaged(&'static str),
    /// Of a newer version.
    #[error("token has format {0}, this version reads {FORMAT}")]
    Format(u8),
    /// Of a scan with another keyspace, range, limit or direction.
    #[error("token belongs to another scan: {0} differs")]
    OtherScan(&'static str),
    /// Of a delete-range with another keyspace or range.
    #[error("token belongs to another delete-range: {0} differs")]
    OtherDelete(&'static str),
}

impl From<TokenError> for Fault {
    fn from(error: TokenError) -> Fault {
        Fault::invalid("token", error.to_string())
    }
}

/// A place in a shard's replicated order. Ordered by term, then index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seen {
    /// Of the entry.
    pub term: u64,
    /// Of the entry.
    pub index: u64,
}

/// What a read in a session asks of one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing was seen of this shard.
    Nothing,
    /// A replica that has applied up to here.
    Applied(Seen),
    /// The token has overflowed: read linearizably.
    Linearizable,
}

/// What a client has seen: per shard the place that it must not read behind, and the highest
/// version, by which reads judge expiry. It only ever grows; services may pass it on and merge it.
///
/// Invariant: at most [`SESSION_SHARDS_MAX`] shards. Beyond them the list is given up for
/// [`Need::Linearizable`] everywhere: slower, and never wrong.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SessionToken {
    version: u64,
    overflowed: bool,
    seen: BTreeMap<ShardId, Seen>,
}

impl SessionToken {
    /// Takes in what an answer said: where it was served, and the version that it wrote or read.
    pub fn observe(&mut self, shard: ShardId, seen: Seen, version: u64) {
        self.version = self.version.max(version);
        if self.overflowed {
            return;
        }
        let known = self.seen.entry(shard).or_default();
        *known = seen.max(*known);
        if self.seen.len() > SESSION_SHARDS_MAX {
            self.overflowed = true;
            self.seen.clear();
        }
    }

    /// Takes in all that the other has seen.
    pub fn merge(&mut self, other: &SessionToken) {
        self.version = self.version.max(other.version);
        if other.overflowed {
            self.overflowed = true;
            self.seen.clear();
        }
        for (shard, seen) in &other.seen {
            self.observe(*shard, *seen, 0);
        }
    }

    /// What a read of this shard needs.
    pub fn need(&self, shard: ShardId) -> Need {
        match self.seen.get(&shard) {
            _ if self.overflowed => Need::Linearizable,
            Some(seen) => Need::Applied(*seen),
            None => Need::Nothing,
        }
    }

    /// The highest version seen; 0 when none was.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// True when the list of shards was given up.
    pub fn overflowed(&self) -> bool {
        self.overflowed
    }

    /// Every shard of which something was seen; a child of a split asks for its parent's here.
    pub fn seen(&self) -> impl Iterator<Item = (ShardId, Seen)> + '_ {
        self.seen.iter().map(|(shard, seen)| (*shard, *seen))
    }

    /// As it travels.
    pub fn encode(&self) -> Bytes {
        let mut out = begin(KIND_SESSION, 9 + 24 * self.seen.len());
        out.put_u8(self.overflowed.into());
        out.put_u64(self.version);
        for (shard, seen) in &self.seen {
            out.put_u64(shard.0);
            out.put_u64(seen.term);
            out.put_u64(seen.index);
        }
        finish(out, SESSION_TOKEN_BYTES_MAX)
    }

    /// Reads what [`SessionToken::encode`] wrote; no bytes at all are a session that has seen
    /// nothing. Never panics.
    pub fn decode(token: &[u8]) -> Result<SessionToken, TokenError> {
        if token.is_empty() {
            return Ok(SessionToken::default());
        }
        let mut body = open(KIND_SESSION, token, SESSION_TOKEN_BYTES_MAX)?;
        let overflowed = body.flag()?;
        let version = body.u64()?;
        let mut seen = BTreeMap::new();
        while !body.0.is_empty() {
            let shard = ShardId(body.u64()?);
            let (term, index) = (body.u64()?, body.u64()?);
            if seen.last_key_value().is_some_and(|(last, _)| *last >= shard) {
                return Err(TokenError::Damaged("shards out of order"));
            }
            seen.insert(shard, Seen { term, index });
        }
        if seen.len() > SESSION_SHARDS_MAX || (overflowed && !seen.is_empty()) {
            return Err(TokenError::Damaged("too many shards"));
        }
        Ok(SessionToken { version, overflowed, seen })
    }
}

/// Where a scan stands after a page. With it another node, after a failover, split or move, goes on
/// at the same version right behind the last key, with nothing missing and nothing twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanToken {
    /// At which the whole scan reads.
    pub version: u64,
    /// Of the scan.
    pub keyspace: KeyspaceId,
    /// The last key that was delivered; empty before the first.
    pub last_key: Bytes,
    /// How many keys may still come; `None` without a limit.
    pub remaining: Option<u64>,
    /// From the last key to the first.
    pub reverse: bool,
    /// Of range, limit and direction: see [`scan_digest`].
    pub digest: u64,
}

impl ScanToken {
    /// The token of a scan that is about to begin.
    pub fn begin(request: &v1::ScanRequest, keyspace: KeyspaceId, version: u64) -> ScanToken {
        ScanToken {
            version,
            keyspace,
            last_key: Bytes::new(),
            remaining: (request.limit > 0).then_some(request.limit),
            reverse: request.reverse,
            digest: scan_digest(request),
        }
    }

    /// The token behind a page that delivered `keys` keys, `last` being the last of them.
    #[must_use]
    pub fn advance(&self, last: Bytes, keys: u64) -> ScanToken {
        let remaining = self.remaining.map(|remaining| remaining.saturating_sub(keys));
        ScanToken { last_key: last, remaining, ..self.clone() }
    }

    /// Whether the token belongs to this scan. The shard of a single-shard scan may differ: after a
    /// split the rest lives on another.
    pub fn check(&self, request: &v1::ScanRequest, keyspace: KeyspaceId) -> Result<(), TokenError> {
        if self.keyspace != keyspace {
            return Err(TokenError::OtherScan("keyspace"));
        }
        if self.reverse != request.reverse {
            return Err(TokenError::OtherScan("direction"));
        }
        if self.digest != scan_digest(request) {
            return Err(TokenError::OtherScan("range or limit"));
        }
        Ok(())
    }

    /// As it travels.
    ///
    /// # Panics
    /// When the last key is longer than a key can be.
    pub fn encode(&self) -> Bytes {
        assert!(self.last_key.len() <= KEY_BYTES_MAX, "a scan delivers keys within KEY_BYTES_MAX");
        let mut out = begin(KIND_SCAN, 31 + self.last_key.len());
        out.put_u8(self.reverse.into());
        out.put_u8(self.remaining.is_some().into());
        out.put_u64(self.remaining.unwrap_or(0));
        out.put_u64(self.version);
        out.put_u32(self.keyspace.0);
        out.put_u64(self.digest);
        out.extend_from_slice(&self.last_key);
        finish(out, SCAN_TOKEN_BYTES_MAX)
    }

    /// Reads what [`ScanToken::encode`] wrote. Never panics.
    pub fn decode(token: &[u8]) -> Result<ScanToken, TokenError> {
        let mut body = open(KIND_SCAN, token, SCAN_TOKEN_BYTES_MAX)?;
        let (reverse, limited) = (body.flag()?, body.flag()?);
        let remaining = body.u64()?;
        if !limited && remaining != 0 {
            return Err(TokenError::Damaged("a rest without a limit"));
        }
        let (version, keyspace) = (body.u64()?, KeyspaceId(body.u32()?));
        let digest = body.u64()?;
        if body.0.len() > KEY_BYTES_MAX {
            return Err(TokenError::Damaged("key too long"));
        }
        let (last_key, remaining) = (Bytes::copy_from_slice(body.0), limited.then_some(remaining));
        Ok(ScanToken { version, keyspace, last_key, remaining, reverse, digest })
    }
}

/// Tells scans apart by what may not change between their pages: start, end, prefix, limit and
/// direction. XXH3-64 over each bound with its length before it.
pub fn scan_digest(request: &v1::ScanRequest) -> u64 {
    let mut hash = Xxh3::new();
    for bound in [&request.start, &request.end, &request.prefix] {
        hash.update(&(bound.len() as u64).to_be_bytes());
        hash.update(bound);
    }
    hash.update(&request.limit.to_be_bytes());
    hash.update(&[request.reverse.into()]);
    hash.digest()
}

fn begin(kind: u8, body_bytes: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(2 + body_bytes + CRC_BYTES);
    out.put_u8(kind);
    out.put_u8(FORMAT);
    out
}

fn finish(mut out: BytesMut, bytes_max: usize) -> Bytes {
    out.put_u32(crc32fast::hash(&out));
    assert!(out.len() <= bytes_max, "the limits on tokens follow from the limits on their parts");
    out.freeze()
}

/// Checks the frame. The format comes before the CRC: a newer one may have another.
fn open(kind: u8, token: &[u8], bytes_max: usize) -> Result<Body<'_>, TokenError> {
    let [got, format, ..] = *token else {
        return Err(TokenError::Damaged("too short"));
    };
    if got != kind {
        return Err(TokenError::Damaged("of another kind"));
    }
    if format != FORMAT {
        return Err(TokenError::Format(format));
    }
    if token.len() > bytes_max {
        return Err(TokenError::Damaged("too long"));
    }
    let (framed, crc) = token.split_last_chunk().ok_or(TokenError::Damaged("too short"))?;
    if crc32fast::hash(framed) != u32::from_be_bytes(*crc) {
        return Err(TokenError::Damaged("checksum does not match"));
    }
    // Absent where the CRC took part of the header for itself.
    framed.get(2..).map(Body).ok_or(TokenError::Damaged("too short"))
}

/// What is left to read.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(TokenError::Damaged("too short"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn u64(&mut self) -> Result<u64, TokenError> {
        self.take().map(u64::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, TokenError> {
        self.take().map(u32::from_be_bytes)
    }

    /// Only 0 and 1: other values would be lost by writing the token again.
    fn flag(&mut self) -> Result<bool, TokenError> {
        match self.take()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(TokenError::Damaged("flag")),
        }
    }
}

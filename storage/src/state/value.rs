//! Owns the header before every stored value of a data key. Does not judge expiry (readers do, at
//! their version).

use bytes::{BufMut, Bytes, BytesMut};

/// Format byte of a value.
const FORMAT: u8 = 1;
const FLAG_TOMBSTONE: u8 = 1;
/// Format, flags, expiry.
pub const HEADER_BYTES: usize = 10;

/// The stored form of one version.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct Value {
    /// Whether this version is a delete marker.
    pub tombstone: bool,
    /// The version from which on the value counts as absent; 0: never.
    pub expires_at: u64,
    /// The user's bytes; empty for a delete marker.
    pub bytes: Bytes,
}

impl Value {
    /// Whether a reader at `version` finds nothing here.
    pub fn is_absent_at(&self, version: u64) -> bool {
        is_absent_at(self.tombstone, self.expires_at, version)
    }

    /// The stored bytes.
    pub fn encode(&self) -> Bytes {
        encode(self.tombstone, self.expires_at, &self.bytes)
    }

    /// Takes stored bytes apart, without copying; the reason when they are not ours.
    pub fn decode(stored: &Bytes) -> Result<Value, &'static str> {
        let (tombstone, expires_at) = decode_header(stored)?;
        Ok(Value { tombstone, expires_at, bytes: stored.slice(HEADER_BYTES..) })
    }
}

/// Whether a version with these properties reads as absent at `version`.
pub(crate) fn is_absent_at(tombstone: bool, expires_at: u64, version: u64) -> bool {
    tombstone || (expires_at != 0 && version >= expires_at)
}

pub(crate) fn encode(tombstone: bool, expires_at: u64, bytes: &[u8]) -> Bytes {
    assert!(!tombstone || (bytes.is_empty() && expires_at == 0), "a delete marker carries nothing");
    let mut stored = BytesMut::with_capacity(HEADER_BYTES + bytes.len());
    stored.put_u8(FORMAT);
    stored.put_u8(if tombstone { FLAG_TOMBSTONE } else { 0 });
    stored.put_u64(expires_at);
    stored.put_slice(bytes);
    stored.freeze()
}

/// Tombstone flag and expiry of stored bytes.
pub(crate) fn decode_header(stored: &[u8]) -> Result<(bool, u64), &'static str> {
    let Some((header, rest)) = stored.split_first_chunk::<HEADER_BYTES>() else {
        return Err("a stored value is shorter than its header");
    };
    let [format, flags, expiry @ ..] = *header;
    if format != FORMAT {
        return Err("a stored value has an unknown format");
    }
    if flags & !FLAG_TOMBSTONE != 0 {
        return Err("a stored value has unknown flags");
    }
    let (tombstone, expires_at) = (flags & FLAG_TOMBSTONE != 0, u64::from_be_bytes(expiry));
    if tombstone && (expires_at != 0 || !rest.is_empty()) {
        return Err("a delete marker carries a value");
    }
    Ok((tombstone, expires_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let golden: [(Value, &[u8]); 2] = [
            (
                Value { tombstone: false, expires_at: 0x0102, bytes: Bytes::from_static(b"v") },
                b"\x01\x00\0\0\0\0\0\0\x01\x02v",
            ),
            (
                Value { tombstone: true, expires_at: 0, bytes: Bytes::new() },
                b"\x01\x01\0\0\0\0\0\0\0\0",
            ),
        ];
        for (value, stored) in golden {
            assert_eq!(value.encode(), stored);
            assert_eq!(Value::decode(&Bytes::copy_from_slice(stored)), Ok(value));
        }
    }

    #[test]
    fn what_is_not_a_value_is_refused() {
        let refused: [&[u8]; 5] = [
            b"",
            b"\x01\x00\0\0\0\0\0\0\0",
            b"\x02\x00\0\0\0\0\0\0\0\0v",
            b"\x01\x02\0\0\0\0\0\0\0\0v",
            b"\x01\x01\0\0\0\0\0\0\0\0v",
        ];
        for stored in refused {
            assert!(Value::decode(&Bytes::copy_from_slice(stored)).is_err(), "{stored:?}");
        }
    }

    #[test]
    fn expiry_begins_at_its_version() {
        let value = Value { tombstone: false, expires_at: 10, bytes: Bytes::new() };
        assert!(!value.is_absent_at(9));
        assert!(value.is_absent_at(10));
        assert!(!Value { expires_at: 0, ..value }.is_absent_at(u64::MAX));
    }
}

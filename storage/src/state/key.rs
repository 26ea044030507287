//! Owns the physical keys of a replica's store: every record kind, its layout and its order. Does
//! not own values (see `value`) and does not know what a record is for.
//!
//! The layouts are listed in `FORMAT.md`, pinned by golden bytes below, and never change within a
//! format version.

use std::ops::Range;

use bytes::Bytes;

/// The record kinds: the first byte of every physical key.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// One-of-a-kind records of the replica (applied position, membership, clock, …).
    Meta = 0x01,
    /// The stored result of one request id.
    Result = 0x02,
    /// Index over `Result` in the order in which results are evicted.
    ResultAge = 0x03,
    /// A client's lowest unanswered sequence.
    Mark = 0x04,
    /// One version of one user key.
    Data = 0x10,
}

impl Kind {
    /// The physical range that holds all records of this kind.
    pub fn range(self) -> Range<Vec<u8>> {
        vec![self as u8]..vec![self as u8 + 1]
    }
}

/// The name of a `Meta` record. Numbers are for ever; what the record holds is its writer's
/// business.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct MetaName(pub u8);

impl MetaName {
    /// Format version of the store. Written by this crate at the first open.
    pub const FORMAT: MetaName = MetaName(0x01);
    /// The log id that was applied last.
    pub const APPLIED: MetaName = MetaName(0x02);
    /// The last applied membership and its log id.
    pub const MEMBERSHIP: MetaName = MetaName(0x03);
    /// The group clock.
    pub const CLOCK: MetaName = MetaName(0x04);
    /// The highest reserved version.
    pub const CEILING: MetaName = MetaName(0x05);
    /// Requests born at or before it, and unknown, are refused.
    pub const FLOOR: MetaName = MetaName(0x06);
    /// The group's own descriptor: shard, arc, epoch.
    pub const DESCRIPTOR: MetaName = MetaName(0x07);
    /// Versions that running scans hold.
    pub const PINS: MetaName = MetaName(0x09);
    /// Keyspace settings that the group has adopted.
    pub const KEYSPACES: MetaName = MetaName(0x0a);
    /// The epoch since which no foreign key is left.
    pub const FOREIGN_FREE: MetaName = MetaName(0x0b);
    /// The cluster format version that the group may write.
    pub const ACTIVE_VERSION: MetaName = MetaName(0x0c);
    /// The groups that this one comes from.
    pub const LINEAGE: MetaName = MetaName(0x0d);
    /// How keys are told apart: the keyspaces' entity rules.
    pub const RULES: MetaName = MetaName(0x0e);
}

/// A physical key, taken apart.
#[derive(Clone, Eq, PartialEq, Debug)]
pub enum Key {
    /// See [`Kind::Meta`].
    Meta(MetaName),
    /// See [`Kind::Result`].
    Result {
        /// The client id.
        client: u64,
        /// The client's sequence.
        sequence: u64,
        /// The birth of the request.
        birth: u64,
    },
    /// See [`Kind::ResultAge`]; the same three, in the order of eviction.
    ResultAge {
        /// The birth of the request.
        birth: u64,
        /// The client id.
        client: u64,
        /// The client's sequence.
        sequence: u64,
    },
    /// See [`Kind::Mark`].
    Mark {
        /// The client id.
        client: u64,
    },
    /// See [`Kind::Data`].
    Data {
        /// The keyspace id.
        keyspace: u32,
        /// The user key, unescaped.
        key: Vec<u8>,
        /// The version; newer versions of a key are ordered before older ones.
        version: u64,
    },
}

const VERSION_BYTES: usize = 8;
/// Where the escaped user key begins: after kind and keyspace.
const DATA_KEY_AT: usize = 5;
const ESCAPE: u8 = 0x00;
const ESCAPED_ZERO: u8 = 0xff;
const TERMINATOR: u8 = 0x01;

impl Key {
    /// The physical key.
    pub fn encode(&self) -> Bytes {
        match self {
            Key::Meta(name) => meta(*name),
            Key::Result { client, sequence, birth } => result(*client, *sequence, *birth),
            Key::ResultAge { birth, client, sequence } => result_age(*birth, *client, *sequence),
            Key::Mark { client } => mark(*client),
            Key::Data { keyspace, key, version } => data(*keyspace, key, *version),
        }
    }

    /// Takes a physical key apart; `None` when it is none of ours.
    pub fn decode(bytes: &[u8]) -> Option<Key> {
        let (&kind, rest) = bytes.split_first()?;
        match kind {
            k if k == Kind::Meta as u8 && rest.len() == 1 => Some(Key::Meta(MetaName(rest[0]))),
            k if k == Kind::Result as u8 => {
                let [client, sequence, birth] = numbers(rest)?;
                Some(Key::Result { client, sequence, birth })
            }
            k if k == Kind::ResultAge as u8 => {
                let [birth, client, sequence] = numbers(rest)?;
                Some(Key::ResultAge { birth, client, sequence })
            }
            k if k == Kind::Mark as u8 => numbers(rest).map(|[client]| Key::Mark { client }),
            k if k == Kind::Data as u8 => {
                let (prefix, version) = split_data(bytes)?;
                let (keyspace, key) = decode_prefix(prefix)?;
                Some(Key::Data { keyspace, key, version })
            }
            _ => None,
        }
    }
}

fn numbers<const N: usize>(mut bytes: &[u8]) -> Option<[u64; N]> {
    let mut numbers = [0; N];
    for number in &mut numbers {
        let (head, rest) = bytes.split_first_chunk()?;
        *number = u64::from_be_bytes(*head);
        bytes = rest;
    }
    bytes.is_empty().then_some(numbers)
}

fn join(kind: Kind, numbers: &[u64]) -> Bytes {
    let mut bytes = Vec::with_capacity(1 + numbers.len() * 8);
    bytes.push(kind as u8);
    for number in numbers {
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    bytes.into()
}

/// The key of a `Meta` record.
pub fn meta(name: MetaName) -> Bytes {
    Bytes::copy_from_slice(&[Kind::Meta as u8, name.0])
}

/// The key of a `Result` record.
pub fn result(client: u64, sequence: u64, birth: u64) -> Bytes {
    join(Kind::Result, &[client, sequence, birth])
}

/// The range of all `Result` records of a client with a sequence below `sequence`.
pub fn results_below(client: u64, sequence: u64) -> Range<Vec<u8>> {
    join(Kind::Result, &[client]).to_vec()..join(Kind::Result, &[client, sequence]).to_vec()
}

/// The key of a `ResultAge` record.
pub fn result_age(birth: u64, client: u64, sequence: u64) -> Bytes {
    join(Kind::ResultAge, &[birth, client, sequence])
}

/// The key of a `Mark` record.
pub fn mark(client: u64) -> Bytes {
    join(Kind::Mark, &[client])
}

/// The key of one version of a user key.
pub fn data(keyspace: u32, key: &[u8], version: u64) -> Bytes {
    let mut bytes = prefix_with_room(keyspace, key);
    bytes.extend_from_slice(&(!version).to_be_bytes());
    bytes.into()
}

/// What all versions of a user key begin with, and nothing else does.
pub fn data_prefix(keyspace: u32, key: &[u8]) -> Vec<u8> {
    prefix_with_room(keyspace, key)
}

/// The key of a version, from the prefix that [`data_prefix`] made.
pub fn data_at(prefix: &[u8], version: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(prefix.len() + VERSION_BYTES);
    bytes.extend_from_slice(prefix);
    bytes.extend_from_slice(&(!version).to_be_bytes());
    bytes
}

/// The first physical key behind all versions of a prefix: the terminator, raised by one, which no
/// key has there.
pub fn data_prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    let last = end.last_mut().expect("a data prefix ends in its terminator");
    assert_eq!(*last, TERMINATOR, "a data prefix ends in its terminator");
    *last += 1;
    end
}

/// The physical range of all versions of the user keys `start..end`; no `end` means to the end of
/// the keyspace.
pub fn data_range(keyspace: u32, start: &[u8], end: Option<&[u8]>) -> Range<Vec<u8>> {
    let start = data_prefix(keyspace, start);
    let end = match (end, keyspace.checked_add(1)) {
        (Some(end), _) => data_prefix(keyspace, end),
        (None, Some(next)) => keyspace_start(next),
        (None, None) => vec![Kind::Data as u8 + 1],
    };
    start..end
}

/// The keyspace of a data key; `None` when it is not one.
pub(crate) fn keyspace_of(bytes: &[u8]) -> Option<u32> {
    let kind = *bytes.first()?;
    let keyspace = bytes.get(1..DATA_KEY_AT)?.try_into().ok()?;
    (kind == Kind::Data as u8).then(|| u32::from_be_bytes(keyspace))
}

/// Splits a data key into prefix and version; `None` when it is not a data key.
pub fn split_data(bytes: &[u8]) -> Option<(&[u8], u64)> {
    let (prefix, rest) = bytes.split_at_checked(data_prefix_len(bytes)?)?;
    let inverted = u64::from_be_bytes(rest.try_into().ok()?);
    Some((prefix, !inverted))
}

/// Keyspace and user key of a data prefix; `None` when it is not one.
pub fn decode_prefix(prefix: &[u8]) -> Option<(u32, Vec<u8>)> {
    if data_prefix_len(prefix)? != prefix.len() {
        return None;
    }
    let keyspace = u32::from_be_bytes(prefix.get(1..DATA_KEY_AT)?.try_into().ok()?);
    let escaped = prefix.get(DATA_KEY_AT..prefix.len() - 2)?;
    let mut key = Vec::with_capacity(escaped.len());
    let mut at = 0;
    while let Some(&byte) = escaped.get(at) {
        key.push(byte);
        at += if byte == ESCAPE { 2 } else { 1 };
    }
    Some((keyspace, key))
}

/// Length of the part before the version, terminator included; `None` when `bytes` is not a data
/// key or prefix.
///
/// It depends on nothing behind the terminator, so the prefix of a prefix is that prefix: the bloom
/// filter needs it.
pub(crate) fn data_prefix_len(bytes: &[u8]) -> Option<usize> {
    if bytes.first() != Some(&(Kind::Data as u8)) {
        return None;
    }
    let mut at = DATA_KEY_AT;
    loop {
        let zero = bytes.get(at..)?.iter().position(|byte| *byte == ESCAPE)? + at;
        match bytes.get(zero + 1) {
            Some(&ESCAPED_ZERO) => at = zero + 2,
            Some(&TERMINATOR) => return Some(zero + 2),
            _ => return None,
        }
    }
}

fn keyspace_start(keyspace: u32) -> Vec<u8> {
    let mut bytes = vec![Kind::Data as u8];
    bytes.extend_from_slice(&keyspace.to_be_bytes());
    bytes
}

fn prefix_with_room(keyspace: u32, key: &[u8]) -> Vec<u8> {
    let zeros = key.iter().filter(|byte| **byte == ESCAPE).count();
    let mut bytes = Vec::with_capacity(DATA_KEY_AT + key.len() + zeros + 2 + VERSION_BYTES);
    bytes.push(Kind::Data as u8);
    bytes.extend_from_slice(&keyspace.to_be_bytes());
    for &byte in key {
        bytes.push(byte);
        if byte == ESCAPE {
            bytes.push(ESCAPED_ZERO);
        }
    }
    bytes.extend_from_slice(&[ESCAPE, TERMINATOR]);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Many zeros and 0xff, so that escapes and terminators meet.
    fn user_key() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xff), any::<u8>()], 0..8)
    }

    #[test]
    fn golden_bytes() {
        let golden: [(Key, &[u8]); 6] = [
            (Key::Meta(MetaName::APPLIED), b"\x01\x02"),
            (
                Key::Result { client: 1, sequence: 2, birth: 3 },
                b"\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03",
            ),
            (
                Key::ResultAge { birth: 3, client: 1, sequence: 2 },
                b"\x03\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02",
            ),
            (Key::Mark { client: 0x0102 }, b"\x04\0\0\0\0\0\0\x01\x02"),
            (
                Key::Data { keyspace: 7, key: b"a\0b".to_vec(), version: 1 },
                b"\x10\0\0\0\x07a\0\xffb\0\x01\xff\xff\xff\xff\xff\xff\xff\xfe",
            ),
            (
                Key::Data { keyspace: u32::MAX, key: Vec::new(), version: u64::MAX },
                b"\x10\xff\xff\xff\xff\0\x01\0\0\0\0\0\0\0\0",
            ),
        ];
        for (key, bytes) in golden {
            assert_eq!(key.encode(), bytes, "{key:?}");
            assert_eq!(Key::decode(bytes), Some(key));
        }
    }

    #[test]
    fn what_is_not_a_key_is_refused() {
        let refused: [&[u8]; 9] = [
            b"",
            b"\x00",
            b"\x01",
            b"\x01\x02\x03",
            b"\x02\0\0\0\0\0\0\0\x01",
            b"\x10\0\0\0\x07a\0\x01\xff",
            b"\x10\0\0\0\x07a",
            b"\x10\0\0\0\x07a\0\x05\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x99",
        ];
        for bytes in refused {
            assert_eq!(Key::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn range_of_the_last_keyspace_ends_with_the_kind() {
        let range = data_range(u32::MAX, b"", None);
        assert!(range.contains(&data(u32::MAX, &[0xff; 9], 0).to_vec()));
        assert_eq!(range.end, Kind::Data.range().end);
    }

    proptest! {
        #[test]
        fn order_is_keyspace_then_key_then_newest_first(
            a in (0u32..3, user_key(), 0u64..4), b in (0u32..3, user_key(), 0u64..4)
        ) {
            let physical = data(a.0, &a.1, a.2).cmp(&data(b.0, &b.1, b.2));
            let wanted = (a.0, &a.1).cmp(&(b.0, &b.1)).then(b.2.cmp(&a.2));
            prop_assert_eq!(physical, wanted);
        }

        #[test]
        fn decode_returns_what_was_encoded(
            keyspace in any::<u32>(), key in user_key(), version in any::<u64>()
        ) {
            let bytes = data(keyspace, &key, version);
            prop_assert_eq!(Key::decode(&bytes), Some(Key::Data { keyspace, key, version }));
        }

        #[test]
        fn prefixes_are_prefix_free_and_bound_their_versions(
            a in user_key(), b in user_key(), version in any::<u64>()
        ) {
            let (pa, pb) = (data_prefix(1, &a), data_prefix(1, &b));
            prop_assert_eq!(pa.starts_with(&pb), a == b);
            let physical = data_at(&pa, version);
            prop_assert_eq!(&physical[..], &data(1, &a, version)[..]);
            prop_assert!(pa < physical && physical < data_prefix_end(&pa));
            prop_assert_eq!(data_prefix_len(&physical), Some(pa.len()));
            prop_assert_eq!(data_prefix_len(&pa), Some(pa.len()));
            if a < b {
                prop_assert!(data_prefix_end(&pa) <= pb);
            }
        }

        #[test]
        fn range_holds_exactly_its_keys(
            start in user_key(), end in user_key(), key in user_key(), version in any::<u64>()
        ) {
            let range = data_range(1, &start, Some(&end));
            let physical = data(1, &key, version).to_vec();
            prop_assert_eq!(range.contains(&physical), start <= key && key < end);
        }

        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(key) = Key::decode(&bytes) {
                prop_assert_eq!(&key.encode()[..], &bytes[..]);
            }
        }
    }
}

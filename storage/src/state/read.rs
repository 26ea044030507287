//! Owns reading versions: the newest at or below a version, and scans in both directions. Does not
//! know the arc, sessions or who may read at which version.

use std::ops::Range;

use bytes::Bytes;

use crate::error::Error;
use crate::state::engine::{Cursor, View};
use crate::state::filter::ArcFilter;
use crate::state::key::{self, Kind};
use crate::state::value::Value;

/// Versions of one key that a scan walks over before it seeks past the rest: a seek costs about
/// this many steps.
const STEPS_BEFORE_SEEK: u32 = 8;

/// One version of a key, as it is stored.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct Versioned {
    /// The version.
    pub version: u64,
    /// The user's bytes; empty for a delete marker.
    pub value: Bytes,
    /// From this version on the value counts as absent; 0: never.
    pub expires_at_version: u64,
    /// Whether it is a delete marker.
    pub tombstone: bool,
}

impl Versioned {
    /// Whether a reader at `version` finds nothing here. A condition and an answer must treat such
    /// a version exactly like none at all, its number included: one replica may have compacted it
    /// away, another not yet.
    pub fn is_absent_at(&self, version: u64) -> bool {
        super::value::is_absent_at(self.tombstone, self.expires_at_version, version)
    }
}

/// The user keys `start..end` of one keyspace.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct KeyRange {
    /// The first key.
    pub start: Vec<u8>,
    /// The first key behind the range; `None`: to the end of the keyspace.
    pub end: Option<Vec<u8>>,
}

impl KeyRange {
    /// All keys of a keyspace.
    pub fn all() -> KeyRange {
        KeyRange::default()
    }

    /// The keys that begin with `prefix`.
    pub fn prefix(prefix: &[u8]) -> KeyRange {
        let mut end = prefix.to_vec();
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                return KeyRange { start: prefix.to_vec(), end: Some(end) };
            }
        }
        KeyRange { start: prefix.to_vec(), end: None }
    }
}

/// What a scan finds.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct Found {
    /// The user key.
    pub key: Bytes,
    /// Its newest version at the scan's version.
    pub version: u64,
    /// The value.
    pub value: Bytes,
    /// When it will expire; 0: never.
    pub expires_at_version: u64,
}

/// Reads versions from one consistent view.
///
/// What lies below the history threshold may be gone, and the filter ignores views: check the
/// version against the threshold again after reading, or hold a pin.
pub struct Reader<'a> {
    view: Box<dyn View + 'a>,
}

impl<'a> Reader<'a> {
    /// Reads from this view.
    pub fn new(view: Box<dyn View + 'a>) -> Reader<'a> {
        Reader { view }
    }

    /// The view below, for records that are not data.
    pub fn view(&self) -> &(dyn View + 'a) {
        &*self.view
    }

    /// The newest version of a key at or below `version_max`, delete markers and expired values
    /// included: the caller judges. One seek.
    pub fn get_at(
        &self,
        keyspace: u32,
        user_key: &[u8],
        version_max: u64,
    ) -> Result<Option<Versioned>, Error> {
        let prefix = key::data_prefix(keyspace, user_key);
        let first = self.view.first(&key::data_at(&prefix, version_max), &prefix)?;
        first.map(|(physical, stored)| versioned(&physical, &stored)).transpose()
    }

    /// The keys of a range with their newest versions at or below `version_max`, in key order or in
    /// reverse. What is deleted or expired at `version_max` is passed over.
    pub fn scan(
        &self,
        keyspace: u32,
        range: KeyRange,
        reverse: bool,
        version_max: u64,
    ) -> Result<Scan<'_>, Error> {
        let range = key::data_range(keyspace, &range.start, range.end.as_deref());
        Scan::new(&*self.view, range, reverse, version_max)
    }

    /// A hash over everything that can be read at `version`: data, results and marks, in order.
    /// Equal state, equal hash, whatever was compacted. Keys outside `arc` do not count. Reads
    /// everything.
    pub fn state_hash(&self, arc: Option<&ArcFilter>, version: u64) -> Result<u64, Error> {
        let mut hash = Fnv64::new();
        for kind in [Kind::Result, Kind::Mark] {
            let mut cursor = self.view.seek(kind.range(), false)?;
            while let Some((key, value)) = cursor.next()? {
                hash.part(&key);
                hash.part(&value);
            }
        }
        let mut scan = Scan::new(&*self.view, Kind::Data.range(), false, version)?;
        while let Some((prefix, found)) = scan.step()? {
            let (keyspace, user_key) =
                key::decode_prefix(&prefix).expect("a scan returns what it decoded");
            if arc.is_some_and(|inside| !inside(keyspace, &user_key)) {
                continue;
            }
            hash.part(&prefix);
            hash.part(&found.version.to_be_bytes());
            hash.part(&found.expires_at_version.to_be_bytes());
            hash.part(&found.value);
        }
        Ok(hash.0)
    }
}

pub(crate) fn versioned(physical: &[u8], stored: &Bytes) -> Result<Versioned, Error> {
    let (_, version) =
        key::split_data(physical).ok_or_else(|| damaged(physical, "not a data key"))?;
    let value = Value::decode(stored).map_err(|why| damaged(physical, why))?;
    Ok(Versioned {
        version,
        value: value.bytes,
        expires_at_version: value.expires_at,
        tombstone: value.tombstone,
    })
}

/// The file is not known here: RocksDB's own checksums matched.
fn damaged(physical: &[u8], why: &str) -> Error {
    Error::corruption(
        std::path::Path::new("state"),
        0,
        format!("{why}, at key {}", physical.escape_ascii()),
    )
}

/// A running scan. Holds its view: keep it for one page.
pub struct Scan<'a> {
    view: &'a (dyn View + 'a),
    cursor: Box<dyn Cursor + 'a>,
    reverse: bool,
    version_max: u64,
    /// In reverse, the entry that ended the key before it.
    ahead: Option<(Bytes, Bytes)>,
}

impl<'a> Scan<'a> {
    fn new(
        view: &'a (dyn View + 'a),
        range: Range<Vec<u8>>,
        reverse: bool,
        version_max: u64,
    ) -> Result<Scan<'a>, Error> {
        Ok(Scan { view, cursor: view.seek(range, reverse)?, reverse, version_max, ahead: None })
    }

    /// The next key with something to show: its data prefix and version.
    fn step(&mut self) -> Result<Option<(Bytes, Versioned)>, Error> {
        loop {
            let Some((prefix, newest)) =
                (if self.reverse { self.previous_key()? } else { self.next_key()? })
            else {
                return Ok(None);
            };
            if let Some(newest) = newest.filter(|newest| !newest.is_absent_at(self.version_max)) {
                return Ok(Some((prefix, newest)));
            }
        }
    }

    /// Walks over all versions of the next key, newest first. Ends before the key after it.
    fn next_key(&mut self) -> Result<Option<(Bytes, Option<Versioned>)>, Error> {
        let Some((physical, stored)) = self.next_entry()? else {
            return Ok(None);
        };
        let prefix = prefix_of(&physical)?;
        let mut newest = None;
        let mut entry = (physical, stored);
        for steps in 0.. {
            let found = versioned(&entry.0, &entry.1)?;
            if newest.is_none() && found.version <= self.version_max {
                newest = Some(found);
            }
            if steps >= STEPS_BEFORE_SEEK {
                if newest.is_none() {
                    let first =
                        self.view.first(&key::data_at(&prefix, self.version_max), &prefix)?;
                    newest = first
                        .map(|(physical, stored)| versioned(&physical, &stored))
                        .transpose()?;
                }
                self.cursor.seek_to(&key::data_prefix_end(&prefix))?;
                break;
            }
            match self.cursor.next()? {
                Some(next) if next.0.starts_with(&prefix) => entry = next,
                other => {
                    self.ahead = other;
                    break;
                }
            }
        }
        Ok(Some((prefix, newest)))
    }

    /// Walks over the versions of the key before, oldest first. Ends before the key before that.
    fn previous_key(&mut self) -> Result<Option<(Bytes, Option<Versioned>)>, Error> {
        let Some((physical, stored)) = self.next_entry()? else {
            return Ok(None);
        };
        let prefix = prefix_of(&physical)?;
        let mut newest = None;
        let mut entry = (physical, stored);
        for steps in 0.. {
            let found = versioned(&entry.0, &entry.1)?;
            let beyond = found.version > self.version_max;
            if !beyond {
                newest = Some(found);
            }
            if beyond || steps >= STEPS_BEFORE_SEEK {
                if !beyond {
                    let first =
                        self.view.first(&key::data_at(&prefix, self.version_max), &prefix)?;
                    newest = first
                        .map(|(physical, stored)| versioned(&physical, &stored))
                        .transpose()?;
                }
                // The prefix itself is no entry, and stands before all of its versions.
                self.cursor.seek_to(&prefix)?;
                break;
            }
            match self.cursor.next()? {
                Some(next) if next.0.starts_with(&prefix) => entry = next,
                other => {
                    self.ahead = other;
                    break;
                }
            }
        }
        Ok(Some((prefix, newest)))
    }

    fn next_entry(&mut self) -> Result<Option<(Bytes, Bytes)>, Error> {
        match self.ahead.take() {
            Some(entry) => Ok(Some(entry)),
            None => self.cursor.next(),
        }
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Found, Error>;

    fn next(&mut self) -> Option<Result<Found, Error>> {
        let (prefix, found) = match self.step() {
            Ok(step) => step?,
            Err(error) => return Some(Err(error)),
        };
        let (_, user_key) = key::decode_prefix(&prefix).expect("the step decoded it");
        Some(Ok(Found {
            key: user_key.into(),
            version: found.version,
            value: found.value,
            expires_at_version: found.expires_at_version,
        }))
    }
}

fn prefix_of(physical: &Bytes) -> Result<Bytes, Error> {
    let (prefix, _) =
        key::split_data(physical).ok_or_else(|| damaged(physical, "not a data key"))?;
    Ok(physical.slice_ref(prefix))
}

/// FNV-1a, 64 bits, over parts with their lengths: fixed for ever, and enough against accidents.
struct Fnv64(u64);

impl Fnv64 {
    fn new() -> Fnv64 {
        Fnv64(0xcbf2_9ce4_8422_2325)
    }

    fn part(&mut self, bytes: &[u8]) {
        for byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ranges() {
        assert_eq!(
            KeyRange::prefix(b"ab"),
            KeyRange { start: b"ab".to_vec(), end: Some(b"ac".to_vec()) }
        );
        assert_eq!(
            KeyRange::prefix(b"a\xff"),
            KeyRange { start: b"a\xff".to_vec(), end: Some(b"b".to_vec()) }
        );
        assert_eq!(
            KeyRange::prefix(b"\xff\xff"),
            KeyRange { start: b"\xff\xff".to_vec(), end: None }
        );
        assert_eq!(KeyRange::prefix(b""), KeyRange::all());
    }

    #[test]
    fn hash_is_fixed() {
        let mut hash = Fnv64::new();
        hash.part(b"a");
        // FNV-1a of 01 00 00 00 00 00 00 00 61.
        let by_hand =
            [1u8, 0, 0, 0, 0, 0, 0, 0, b'a'].iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
                (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
            });
        assert_eq!(hash.0, by_hand);
    }
}

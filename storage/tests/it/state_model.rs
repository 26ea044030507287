//! Owns the model of versioned data that the state tests compare with: it forgets nothing. Does not
//! hold tests of its own.

use std::collections::BTreeMap;

use coracle_storage::state::{Found, KeyRange, Overlay, Reader, ReplicaState, Versioned};
use proptest::prelude::*;

/// Every version ever written: value and expiry, or a delete marker.
#[derive(Clone, Default)]
pub(crate) struct Model(pub(crate) BTreeMap<(u32, Vec<u8>), Versions>);

/// By version; `None` is a delete marker.
type Versions = BTreeMap<u64, Option<(Vec<u8>, u64)>>;

impl Model {
    pub(crate) fn at(&self, keyspace: u32, user_key: &[u8], version: u64) -> Option<Versioned> {
        let versions = self.0.get(&(keyspace, user_key.to_vec()))?;
        let (version, stored) = versions.range(..=version).next_back()?;
        let (value, expires_at_version) = stored.clone().unwrap_or_default();
        let (version, tombstone) = (*version, stored.is_none());
        Some(Versioned { version, value: value.into(), expires_at_version, tombstone })
    }

    pub(crate) fn visible(
        &self,
        keyspace: u32,
        user_key: &[u8],
        version: u64,
    ) -> Option<Versioned> {
        self.at(keyspace, user_key, version).filter(|found| !found.is_absent_at(version))
    }

    pub(crate) fn scan(
        &self,
        keyspace: u32,
        range: &KeyRange,
        reverse: bool,
        version: u64,
    ) -> Vec<Found> {
        let inside = |user_key: &Vec<u8>| {
            *user_key >= range.start && range.end.as_ref().is_none_or(|end| user_key < end)
        };
        let keys = self.0.keys().filter(|(of, user_key)| *of == keyspace && inside(user_key));
        let mut found: Vec<Found> = keys
            .filter_map(|(_, user_key)| {
                let found = self.visible(keyspace, user_key, version)?;
                Some(Found {
                    key: user_key.clone().into(),
                    version: found.version,
                    value: found.value,
                    expires_at_version: found.expires_at_version,
                })
            })
            .collect();
        if reverse {
            found.reverse();
        }
        found
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Write {
    keyspace: u32,
    key: Vec<u8>,
    /// `None`: a delete marker.
    expires_in: Option<u64>,
}

pub(crate) fn user_key() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xff)], 0..3)
}

pub(crate) fn writes(max: usize) -> impl Strategy<Value = Vec<Write>> {
    let key = prop_oneof![user_key(), Just(b"hot".to_vec())];
    let expires_in =
        prop_oneof![3 => Just(Some(0)), 1 => (1u64..9).prop_map(Some), 2 => Just(None)];
    let write = (0u32..2, key, expires_in).prop_map(|(keyspace, key, expires_in)| Write {
        keyspace,
        key,
        expires_in,
    });
    prop::collection::vec(write, 0..max)
}

/// One version for each write, as apply gives them.
pub(crate) fn add(overlay: &mut Overlay, model: &mut Model, clock: &mut u64, writes: &[Write]) {
    for write in writes {
        *clock += 1;
        let versions = model.0.entry((write.keyspace, write.key.clone())).or_default();
        match write.expires_in {
            Some(expires_in) => {
                let value = clock.to_be_bytes().to_vec();
                let expires_at = if expires_in == 0 { 0 } else { *clock + expires_in };
                overlay.put(write.keyspace, &write.key, *clock, &value, expires_at);
                versions.insert(*clock, Some((value, expires_at)));
            }
            None => {
                overlay.delete(write.keyspace, &write.key, *clock);
                versions.insert(*clock, None);
            }
        }
    }
}

pub(crate) fn scan(
    reader: &Reader<'_>,
    keyspace: u32,
    range: &KeyRange,
    reverse: bool,
    version: u64,
) -> Vec<Found> {
    let scan = reader.scan(keyspace, range.clone(), reverse, version).expect("a scan");
    scan.collect::<Result<_, _>>().expect("entries that read")
}

pub(crate) fn puts(state: &ReplicaState, puts: &[(&str, u64, Option<&str>)]) {
    let mut overlay = state.overlay();
    for (user_key, version, value) in puts {
        match value {
            Some(value) => overlay.put(1, user_key.as_bytes(), *version, value.as_bytes(), 0),
            None => overlay.delete(1, user_key.as_bytes(), *version),
        }
    }
    state.write(overlay.into_batch()).expect("a write");
    state.flush().expect("a flush");
}

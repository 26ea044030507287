//! Owns a look at what a store holds without reading all of it: some of its entries, each standing for
//! many. Does not know positions.

use std::collections::BTreeSet;

use crate::error::Error;
use crate::state::engine::{Engine, Stratum};
use crate::state::key::{self, Kind};

/// Entries that are looked at in each part of the store, at least: fewer say little of it.
const PART_MIN: usize = 16;

/// A key that was met, and for how many bytes it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its keyspace.
    pub keyspace: u32,
    /// The user key.
    pub key: Vec<u8>,
    /// Its share of the store, about.
    pub bytes: u64,
}

/// Looks at about `max` entries of user keys, spread over the store's parts.
pub(crate) fn sample(engine: &dyn Engine, max: usize) -> Result<Vec<Sample>, Error> {
    let data = Kind::Data.range();
    let mut parts = engine.strata()?;
    parts.retain(|part| part.last[..] >= data.start[..]);
    if parts.is_empty() {
        let whole = engine.approximate_bytes();
        let (first, last) = (data.start.clone().into(), data.end.clone().into());
        parts.push(Stratum { first, last, bytes: whole });
    }
    let each = (max / parts.len()).max(PART_MIN);
    let view = engine.view()?;
    let mut samples = Vec::new();
    for part in parts {
        let from = part.first.to_vec().max(data.start.clone());
        let mut cursor = view.seek(from..data.end.clone(), false)?;
        let (begin, mut met) = (samples.len(), 0);
        while samples.len() - begin < each
            && let Some((physical, stored)) = cursor.next()?
            && physical[..] <= part.last[..]
        {
            let bytes = (physical.len() + stored.len()) as u64;
            let prefix =
                key::split_data(&physical).and_then(|(prefix, _)| key::decode_prefix(prefix));
            let Some((keyspace, key)) = prefix else { continue };
            met += bytes;
            samples.push(Sample { keyspace, key, bytes });
        }
        for sample in &mut samples[begin..] {
            let share = u128::from(sample.bytes) * u128::from(part.bytes) / u128::from(met.max(1));
            // A small part may be looked at as a whole, and take less than its entries: it is packed.
            sample.bytes = (share as u64).max(1);
        }
    }
    Ok(samples)
}

/// The keyspaces of which the store holds anything.
pub(crate) fn keyspaces(engine: &dyn Engine) -> Result<BTreeSet<u32>, Error> {
    let view = engine.view()?;
    let mut cursor = view.seek(Kind::Data.range(), false)?;
    let mut found = BTreeSet::new();
    while let Some((physical, _)) = cursor.next()? {
        let Some(keyspace) = key::keyspace_of(&physical) else { continue };
        found.insert(keyspace);
        cursor.seek_to(&key::data_range(keyspace, b"", None).end)?;
    }
    Ok(found)
}

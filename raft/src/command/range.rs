//! Owns a delete-range as it stands in an entry, and its bytes (FORMAT.md). Does not walk over keys
//! (see `apply::range`).

use bytes::{BufMut, Bytes, BytesMut};
use coracle_proto::entity::EntityRule;
use coracle_proto::ring;

use super::{DecodeError, put_bytes};
use crate::rules::{get_rule, put_rule};
use crate::wire::Reader;

/// The bytes that are counted for each key that a delete-range may delete: a delete marker with a
/// short key, and what it takes while its batch is built. So one entry deletes about ten thousand
/// keys at most, and what waits for a group a few hundred thousand.
const KEY_WEIGHT_BYTES: usize = 100;

/// A fence that stops at nothing: what one request does at once, its id keeps from happening again.
pub const NO_FENCE: u64 = u64::MAX;

/// The live keys from the operation's key on, in key order: they get delete markers of the request's
/// version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteRange {
    /// The first key behind the range; empty: to the last key of the keyspace.
    pub end: Bytes,
    /// Live keys that are deleted at most; at least 1.
    pub limit: u32,
    /// A key whose newest version lies above this one is not counted and not touched; it lies below
    /// the request's own version. So a step is the same as none once another has passed its keys,
    /// whatever was written since, and whenever it comes. [`NO_FENCE`]: there is no such version.
    pub fence: u64,
    /// All or nothing: where more than `limit` keys live in the range, nothing is deleted.
    pub whole: bool,
    /// How the position of each key is found, where they may be of several entities: a key outside
    /// the group's arc is not counted and not touched. `None`: all keys are of the request's
    /// position.
    pub owned: Option<Owned>,
}

/// What places the keys of a keyspace; constants of it, which the request carries because apply
/// knows no settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned {
    /// The keyspace's entity rule.
    pub rule: EntityRule,
    /// The cluster's hash seed.
    pub hash_seed: u64,
}

impl Owned {
    /// Where a key stands on the ring.
    pub fn position(&self, keyspace: u32, key: &[u8]) -> u64 {
        ring::position(self.hash_seed, keyspace, self.rule.entity(key)).0
    }
}

impl DeleteRange {
    pub(super) fn size(&self) -> usize {
        4 + self.end.len() + 4 + 8 + 1 + 1 + self.owned.map_or(0, |_| 1 + 4 + 8)
    }

    pub(super) fn weight(&self) -> usize {
        self.limit as usize * KEY_WEIGHT_BYTES
    }

    pub(super) fn put(&self, out: &mut BytesMut) {
        put_bytes(out, &self.end);
        out.put_u32(self.limit);
        out.put_u64(self.fence);
        out.put_u8(u8::from(self.whole));
        out.put_u8(u8::from(self.owned.is_some()));
        let Some(Owned { rule, hash_seed }) = self.owned else { return };
        put_rule(out, &rule);
        out.put_u64(hash_seed);
    }

    pub(super) fn get(reader: &mut Reader) -> Result<DeleteRange, DecodeError> {
        let (end, limit, fence) = (reader.bytes()?, reader.u32()?, reader.u64()?);
        let whole = match reader.u8()? {
            0 => false,
            1 => true,
            found => return Err(DecodeError::UnknownKind { what: "delete-range", found }),
        };
        let owned = match reader.u8()? {
            0 => None,
            1 => {
                let rule = get_rule(reader)?;
                Some(Owned { rule, hash_seed: reader.u64()? })
            }
            found => return Err(DecodeError::UnknownKind { what: "ownership", found }),
        };
        Ok(DeleteRange { end, limit, fence, whole, owned })
    }
}

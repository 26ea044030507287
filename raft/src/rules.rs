//! Owns how a group finds the position of a key that it holds: the entity rules of keyspaces, and the
//! cluster's hash seed. Does not know where they come from, and does not know arcs.
//!
//! Apply needs none of it for a request, which carries its position. They are needed where keys are
//! told apart without a request: what a split has left behind on each side, and what a merge brings. So
//! they enter the group's own log with the command that needs them. A keyspace's rule is fixed for ever:
//! what was once learnt stays true.

use std::collections::BTreeMap;

use bytes::{BufMut, BytesMut};
use coracle_proto::entity::EntityRule;
use coracle_proto::ring;
use coracle_proto::shard_map::{SYSTEM_KEYSPACE, ShardMap};

use crate::wire::{Malformed, Reader};

const FORMAT_VERSION: u8 = 1;

const RULE_WHOLE: u8 = 1;
const RULE_DELIMITER: u8 = 2;
const RULE_PREFIX: u8 = 3;

/// The entity rules of keyspaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The cluster's hash seed.
    pub hash_seed: u64,
    /// By keyspace; the cluster's own is not among them.
    pub keyspaces: BTreeMap<u32, EntityRule>,
}

impl Rules {
    /// Those of all keyspaces of a map. Whoever plans a split or a merge takes them from the records
    /// *after* it has learnt the epoch that it plans on: then no keyspace is missing that may have keys
    /// which an earlier split has left behind.
    pub fn of(map: &ShardMap) -> Rules {
        let ours = map.keyspaces().filter(|keyspace| keyspace.id != SYSTEM_KEYSPACE);
        let keyspaces = ours.map(|keyspace| (keyspace.id.0, keyspace.rule)).collect();
        Rules { hash_seed: map.hash_seed(), keyspaces }
    }

    /// Where a key stands on the ring; `None` for a keyspace whose rule is not known.
    pub fn position(&self, keyspace: u32, key: &[u8]) -> Option<u64> {
        let rule = self.keyspaces.get(&keyspace)?;
        Some(ring::position(self.hash_seed, keyspace, rule.entity(key)).0)
    }

    /// Takes in what others know. The seed is one for all; that of no rules at all says nothing.
    pub(crate) fn learn(&mut self, others: &Rules) {
        if others.keyspaces.is_empty() {
            return;
        }
        self.hash_seed = others.hash_seed;
        for (keyspace, rule) in &others.keyspaces {
            self.keyspaces.entry(*keyspace).or_insert(*rule);
        }
    }

    pub(crate) fn size(&self) -> usize {
        1 + 8 + 4 + self.keyspaces.len() * 9
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u8(FORMAT_VERSION);
        out.put_u64(self.hash_seed);
        out.put_u32(self.keyspaces.len() as u32);
        for (keyspace, rule) in &self.keyspaces {
            out.put_u32(*keyspace);
            put_rule(out, rule);
        }
    }

    pub(crate) fn get(reader: &mut Reader) -> Result<Rules, Malformed> {
        if reader.u8()? != FORMAT_VERSION {
            return Err(Malformed("entity rules of an unknown format version"));
        }
        let hash_seed = reader.u64()?;
        let mut keyspaces = BTreeMap::new();
        for _ in 0..reader.count(9)? {
            let keyspace = reader.u32()?;
            keyspaces.insert(keyspace, get_rule(reader)?);
        }
        Ok(Rules { hash_seed, keyspaces })
    }
}

pub(crate) fn put_rule(out: &mut BytesMut, rule: &EntityRule) {
    let (kind, detail) = match *rule {
        EntityRule::Whole => (RULE_WHOLE, 0),
        EntityRule::Delimiter(byte) => (RULE_DELIMITER, byte.into()),
        EntityRule::Prefix(bytes) => (RULE_PREFIX, bytes),
    };
    out.put_u8(kind);
    out.put_u32(detail);
}

pub(crate) fn get_rule(reader: &mut Reader) -> Result<EntityRule, Malformed> {
    let (kind, detail) = (reader.u8()?, reader.u32()?);
    Ok(match kind {
        RULE_WHOLE if detail == 0 => EntityRule::Whole,
        RULE_DELIMITER => EntityRule::Delimiter(
            u8::try_from(detail).map_err(|_| Malformed("a delimiter of no byte"))?,
        ),
        RULE_PREFIX => EntityRule::Prefix(detail),
        _ => return Err(Malformed("an unknown entity rule")),
    })
}

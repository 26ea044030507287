//! Owns the commands that change what a group holds, and their bytes (FORMAT.md). Does not say what they
//! do (see `apply::reshape`).

use std::collections::BTreeMap;

use bytes::{BufMut, BytesMut};

use crate::position::Position;
use crate::rules::Rules;
use crate::wire::{Malformed, Reader};

/// Everything of the arc from a position on becomes a group of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitShard {
    /// What the group was when this was planned.
    pub planned: Planned,
    /// The child's first position.
    pub at: u64,
    /// The child's shard.
    pub child: u64,
    /// The child's replica for each of the group's.
    pub replicas: BTreeMap<u64, u64>,
    /// Of all keyspaces.
    pub rules: Rules,
}

/// What a group was when a command was planned: on anything else the command does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Its epoch.
    pub epoch: u64,
    /// Where its membership stood in the log.
    pub membership: Position,
}

impl Planned {
    const BYTES: usize = 24;

    fn put(&self, out: &mut BytesMut) {
        out.put_u64(self.epoch);
        out.put_u64(self.membership.term);
        out.put_u64(self.membership.index);
    }

    fn get(reader: &mut Reader) -> Result<Planned, Malformed> {
        let epoch = reader.u64()?;
        let membership = Position { term: reader.u64()?, index: reader.u64()? };
        Ok(Planned { epoch, membership })
    }
}

impl SplitShard {
    pub(super) fn size(&self) -> usize {
        Planned::BYTES + 8 + 8 + 4 + 16 * self.replicas.len() + self.rules.size()
    }

    pub(super) fn put(&self, out: &mut BytesMut) {
        self.planned.put(out);
        out.put_u64(self.at);
        out.put_u64(self.child);
        put_pairs(out, &self.replicas);
        self.rules.put(out);
    }

    pub(super) fn get(reader: &mut Reader) -> Result<SplitShard, Malformed> {
        let planned = Planned::get(reader)?;
        let (at, child) = (reader.u64()?, reader.u64()?);
        let replicas = get_pairs(reader)?;
        Ok(SplitShard { planned, at, child, replicas, rules: Rules::get(reader)? })
    }
}

fn put_pairs(out: &mut BytesMut, pairs: &BTreeMap<u64, u64>) {
    out.put_u32(pairs.len() as u32);
    for (one, other) in pairs {
        out.put_u64(*one);
        out.put_u64(*other);
    }
}

fn get_pairs(reader: &mut Reader) -> Result<BTreeMap<u64, u64>, Malformed> {
    let mut pairs = BTreeMap::new();
    for _ in 0..reader.count(16)? {
        pairs.insert(reader.u64()?, reader.u64()?);
    }
    Ok(pairs)
}

//! Owns the commands that change what a group holds, and their bytes (FORMAT.md). Does not say what they
//! do (see `apply::reshape`).

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, BytesMut};

use crate::descriptor::Descriptor;
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

/// Announces a merge to one of its two groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnnounceMerge {
    /// What the group was when this was planned.
    pub planned: Planned,
    /// The merge.
    pub merge: u64,
    /// Whether the group takes the other in, or is taken in.
    pub absorbs: bool,
    /// The group's replicas.
    pub replicas: BTreeSet<u64>,
    /// Of all keyspaces.
    pub rules: Rules,
}

/// The group serves nothing from then on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreezeShard {
    /// What the group was when this was planned.
    pub planned: Planned,
    /// For which merge.
    pub merge: u64,
}

/// Ends a group's part of a merge: its epoch rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndMerge {
    /// The merge.
    pub merge: u64,
    /// The group's epoch.
    pub epoch: u64,
}

/// The group takes its frozen neighbour in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AbsorbShard {
    /// What the group was when this was planned.
    pub planned: Planned,
    /// The merge.
    pub merge: u64,
    /// The neighbour, as it is frozen.
    pub other: Descriptor,
    /// The index of its freeze.
    pub frozen_at: u64,
    /// The neighbour's replica on the node of each of the group's.
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

impl AnnounceMerge {
    pub(super) fn size(&self) -> usize {
        Planned::BYTES + 8 + 1 + 4 + 8 * self.replicas.len() + self.rules.size()
    }

    pub(super) fn put(&self, out: &mut BytesMut) {
        self.planned.put(out);
        out.put_u64(self.merge);
        out.put_u8(u8::from(self.absorbs));
        out.put_u32(self.replicas.len() as u32);
        self.replicas.iter().for_each(|replica| out.put_u64(*replica));
        self.rules.put(out);
    }

    pub(super) fn get(reader: &mut Reader) -> Result<AnnounceMerge, Malformed> {
        let (planned, merge) = (Planned::get(reader)?, reader.u64()?);
        let (absorbs, mut replicas) = (reader.bool()?, BTreeSet::new());
        for _ in 0..reader.count(8)? {
            replicas.insert(reader.u64()?);
        }
        Ok(AnnounceMerge { planned, merge, absorbs, replicas, rules: Rules::get(reader)? })
    }
}

impl FreezeShard {
    pub(super) const BYTES: usize = Planned::BYTES + 8;

    pub(super) fn put(&self, out: &mut BytesMut) {
        self.planned.put(out);
        out.put_u64(self.merge);
    }

    pub(super) fn get(reader: &mut Reader) -> Result<FreezeShard, Malformed> {
        Ok(FreezeShard { planned: Planned::get(reader)?, merge: reader.u64()? })
    }
}

impl EndMerge {
    pub(super) const BYTES: usize = 16;

    pub(super) fn put(&self, out: &mut BytesMut) {
        out.put_u64(self.merge);
        out.put_u64(self.epoch);
    }

    pub(super) fn get(reader: &mut Reader) -> Result<EndMerge, Malformed> {
        Ok(EndMerge { merge: reader.u64()?, epoch: reader.u64()? })
    }
}

impl AbsorbShard {
    pub(super) fn size(&self) -> usize {
        Planned::BYTES + 8 + 34 + 8 + 4 + 16 * self.replicas.len() + self.rules.size()
    }

    pub(super) fn put(&self, out: &mut BytesMut) {
        self.planned.put(out);
        out.put_u64(self.merge);
        self.other.put(out);
        out.put_u64(self.frozen_at);
        put_pairs(out, &self.replicas);
        self.rules.put(out);
    }

    pub(super) fn get(reader: &mut Reader) -> Result<AbsorbShard, Malformed> {
        let (planned, merge) = (Planned::get(reader)?, reader.u64()?);
        let (other, frozen_at) = (Descriptor::get(reader)?, reader.u64()?);
        let replicas = get_pairs(reader)?;
        let rules = Rules::get(reader)?;
        Ok(AbsorbShard { planned, merge, other, frozen_at, replicas, rules })
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

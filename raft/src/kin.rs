//! Owns what a group remembers of the groups that it comes from: whose keys it has taken over, and where
//! that stands in its own log. Part of the replicated state. Does not split or merge.
//!
//! **Sessions.** Whoever has seen an index of another shard has seen it here too, once that shard is among
//! the ancestors: a group born of a split began with all that its parent held, and one that took its
//! neighbour in holds all of it behind the entry that did so.
//!
//! **Results** that came along name places in another log. A retry that finds one is told the place in
//! this log behind which it is known to be here.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};

use crate::position::Position;
use crate::rules::Rules;
use crate::wire::{Malformed, Reader};

/// Ancestors that a group remembers: those with the lowest ids, which are the oldest, are forgotten
/// first. A session that still names one then reads by the leader.
const ANCESTORS_MAX: usize = 256;

const FORMAT_VERSION: u8 = 1;

/// See the module.
///
/// Invariant: no result with a version at or below `until` names a place of this log behind `place`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kin {
    lineage: Arc<Lineage>,
    /// How this group tells keys apart.
    rules: Arc<Rules>,
    /// Whether the records in the store are older.
    changed: bool,
}

/// Where a group's keys come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lineage {
    ancestors: BTreeSet<u64>,
    /// The version at which it last took something over; 0: never.
    until: u64,
    /// Where that was.
    place: Position,
}

impl Kin {
    pub(crate) fn load(lineage: Lineage, rules: Rules) -> Kin {
        Kin { lineage: Arc::new(lineage), rules: Arc::new(rules), changed: false }
    }

    pub(crate) fn lineage(&self) -> &Arc<Lineage> {
        &self.lineage
    }

    pub(crate) fn rules(&self) -> &Arc<Rules> {
        &self.rules
    }

    pub(crate) fn learn(&mut self, rules: &Rules) {
        Arc::make_mut(&mut self.rules).learn(rules);
        self.changed = true;
    }

    /// Takes over what another shard, with these kin, held. It is all here from `place` on, in this log;
    /// whatever was written in it has a version at or below `until`.
    pub(crate) fn take_over(&mut self, shard: u64, of: &Lineage, until: u64, place: Position) {
        assert!(until >= self.lineage.until, "versions rise with the log");
        let lineage = Arc::make_mut(&mut self.lineage);
        lineage.ancestors.extend(of.ancestors.iter().copied());
        lineage.ancestors.insert(shard);
        while lineage.ancestors.len() > ANCESTORS_MAX {
            lineage.ancestors.pop_first();
        }
        (lineage.until, lineage.place) = (until, place);
        self.changed = true;
    }

    /// Has the records written whether they changed or not: into another store.
    pub(crate) fn touch(&mut self) {
        self.changed = true;
    }

    /// The bytes of both records, when those in the store are older: lineage and rules.
    pub(crate) fn take_changed(&mut self) -> Option<(BytesMut, BytesMut)> {
        if !std::mem::replace(&mut self.changed, false) {
            return None;
        }
        let (mut lineage, mut rules) = (BytesMut::new(), BytesMut::new());
        self.lineage.put(&mut lineage);
        self.rules.put(&mut rules);
        Some((lineage, rules))
    }
}

impl Lineage {
    /// Whether all that a shard ever held of these keys is here.
    pub(crate) fn descends_from(&self, shard: u64) -> bool {
        self.ancestors.contains(&shard)
    }

    /// Where it last took something over, in this log.
    pub(crate) fn place(&self) -> Position {
        self.place
    }

    /// Where a result is to be looked for in this log.
    pub(crate) fn place_of(&self, version: u64, stored: Position) -> Position {
        if version <= self.until { self.place } else { stored }
    }

    fn put(&self, out: &mut BytesMut) {
        out.put_u8(FORMAT_VERSION);
        out.put_u64(self.until);
        out.put_u64(self.place.term);
        out.put_u64(self.place.index);
        out.put_u32(self.ancestors.len() as u32);
        self.ancestors.iter().for_each(|shard| out.put_u64(*shard));
    }

    pub(crate) fn get(reader: &mut Reader) -> Result<Lineage, Malformed> {
        if reader.u8()? != FORMAT_VERSION {
            return Err(Malformed("a lineage of an unknown format version"));
        }
        let until = reader.u64()?;
        let place = Position { term: reader.u64()?, index: reader.u64()? };
        let mut ancestors = BTreeSet::new();
        for _ in 0..reader.count(8)? {
            ancestors.insert(reader.u64()?);
        }
        Ok(Lineage { ancestors, until, place })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn golden_bytes() {
        let mut kin = Kin::default();
        kin.learn(&Rules { hash_seed: 9, keyspaces: [].into() });
        kin.take_over(3, &Lineage::default(), 7, Position { term: 0, index: 1 });
        let (lineage, rules) = kin.take_changed().expect("it has changed");
        let wanted = "01".to_owned()
            + "0000000000000007"
            + "00000000000000000000000000000001"
            + "00000001"
            + "0000000000000003";
        assert_eq!(hex(&lineage), wanted);
        assert_eq!(hex(&rules), "01000000000000000000000000", "no rules say nothing of the seed");
        let read = Lineage::get(&mut Reader::new(lineage.freeze())).expect("our own bytes");
        assert_eq!(read, **kin.lineage());
        assert!(kin.take_changed().is_none());
    }

    #[test]
    fn the_oldest_ancestors_are_forgotten_first() {
        let mut kin = Kin::default();
        for shard in 0..ANCESTORS_MAX as u64 + 3 {
            kin.take_over(shard, &Lineage::default(), shard, Position::default());
        }
        let descends = |shard| kin.lineage().descends_from(shard);
        assert_eq!([2, 3, ANCESTORS_MAX as u64 + 2].map(descends), [false, true, true]);
    }

    #[test]
    fn only_what_came_along_is_told_with_the_place_of_the_change() {
        let mut kin = Kin::default();
        let (stored, place) = (Position { term: 4, index: 44 }, Position { term: 0, index: 1 });
        assert_eq!(kin.lineage().place_of(7, stored), stored);
        kin.take_over(3, &Lineage::default(), 7, place);
        assert_eq!(kin.lineage().place_of(7, stored), place);
        assert_eq!(kin.lineage().place_of(8, stored), stored);
    }
}

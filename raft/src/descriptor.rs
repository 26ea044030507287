//! Owns the group's own replicated word on what it holds: shard, arc, epoch. Does not know the
//! shard map, which copies it, nor the members, which Raft's own records name.

use bytes::{BufMut, BytesMut};
use coracle_storage::Mutant;

use crate::wire::{Malformed, Reader};

/// The keyspace of the cluster's own records: one entity, outside the ring, in the meta group
/// alone.
pub const SYSTEM_KEYSPACE: u32 = 0;

const FORMAT_VERSION: u8 = 1;

/// What a group holds. The truth about it stands in the group's own state, changed only by entries
/// of its own log; every copy elsewhere yields to the one with the higher epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The shard that the group replicates; 0 is the meta group.
    pub shard: u64,
    /// `[start, end)` on the ring, `end = 0` meaning 2⁶⁴. `None` is the meta group: it owns exactly
    /// [`SYSTEM_KEYSPACE`] and nothing of the ring.
    pub arc: Option<(u64, u64)>,
    /// Rises with every membership change (and split and merge); never 0, which in a request means
    /// "not named".
    pub epoch: u64,
}

impl Descriptor {
    /// Whether the arc is one: not empty, not wrapping, and the epoch can be named.
    pub fn is_valid(&self) -> bool {
        self.epoch > 0 && self.arc.is_none_or(|(start, end)| end == 0 || start < end)
    }

    /// Whether a key at this position belongs to the group.
    pub fn owns(&self, keyspace: u32, position: u64) -> bool {
        match self.arc {
            Some(_) if Mutant::ServesForeignKeys.is_in() => keyspace != SYSTEM_KEYSPACE,
            None => keyspace == SYSTEM_KEYSPACE,
            Some((start, end)) => {
                keyspace != SYSTEM_KEYSPACE && position >= start && (end == 0 || position < end)
            }
        }
    }

    /// Whether some position belongs to both.
    pub(crate) fn overlaps(&self, other: &Descriptor) -> bool {
        let last = |(_, end): (u64, u64)| end.wrapping_sub(1);
        match (self.arc, other.arc) {
            (Some(one), Some(other)) => one.0 <= last(other) && other.0 <= last(one),
            _ => false,
        }
    }

    /// Whether the group serves a request that was routed by `epoch` (0: not named). Both are
    /// checked again in apply and against the view of a read: what was planned on another epoch
    /// must fail, because the arc may have changed hands in between.
    pub fn serves(&self, keyspace: u32, position: u64, epoch: u64) -> bool {
        let is_known = epoch == 0 || epoch == self.epoch || Mutant::ServesForeignKeys.is_in();
        is_known && self.owns(keyspace, position)
    }

    /// A membership entry was applied: whoever planned on the old members must look again.
    pub fn apply_membership(&mut self) {
        self.epoch = self.epoch.checked_add(1).expect("2⁶⁴ membership changes never happen");
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u8(FORMAT_VERSION);
        out.put_u64(self.shard);
        out.put_u64(self.epoch);
        out.put_u8(u8::from(self.arc.is_some()));
        if let Some((start, end)) = self.arc {
            out.put_u64(start);
            out.put_u64(end);
        }
    }

    pub(crate) fn get(reader: &mut Reader) -> Result<Descriptor, Malformed> {
        if reader.u8()? != FORMAT_VERSION {
            return Err(Malformed("a descriptor of an unknown format version"));
        }
        let (shard, epoch) = (reader.u64()?, reader.u64()?);
        let arc = reader.option(|reader| Ok((reader.u64()?, reader.u64()?)))?;
        let descriptor = Descriptor { shard, arc, epoch };
        if !descriptor.is_valid() {
            return Err(Malformed("a descriptor without an arc or epoch"));
        }
        Ok(descriptor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(arc: Option<(u64, u64)>) -> Descriptor {
        Descriptor { shard: 7, arc, epoch: 3 }
    }

    #[test]
    fn arc_is_half_open_and_its_end_zero_is_the_end_of_the_ring() {
        let middle = shard(Some((10, 20)));
        assert!([10, 19].iter().all(|at| middle.owns(1, *at)));
        assert!(![9, 20, 0, u64::MAX].iter().any(|at| middle.owns(1, *at)));
        let last = shard(Some((10, 0)));
        assert!(last.owns(1, u64::MAX) && !last.owns(1, 9));
        assert!(shard(Some((0, 0))).owns(1, 0));
    }

    #[test]
    fn system_keyspace_is_owned_by_the_meta_group_alone() {
        assert!(shard(None).owns(SYSTEM_KEYSPACE, 5) && !shard(None).owns(1, 5));
        assert!(!shard(Some((0, 0))).owns(SYSTEM_KEYSPACE, 5));
    }

    #[test]
    fn arcs_overlap_where_a_position_is_in_both() {
        let overlap = |one, other| shard(one).overlaps(&shard(other));
        assert!(overlap(Some((0, 0)), Some((5, 9))) && overlap(Some((5, 9)), Some((8, 0))));
        assert!(overlap(Some((u64::MAX, 0)), Some((0, 0))));
        assert!(!overlap(Some((5, 9)), Some((9, 0))) && !overlap(Some((9, 0)), Some((5, 9))));
        assert!(!overlap(None, Some((0, 0))));
    }

    #[test]
    fn named_epoch_must_be_the_present_one() {
        let mut descriptor = shard(Some((0, 0)));
        assert!(descriptor.serves(1, 5, 3) && descriptor.serves(1, 5, 0));
        assert!(!descriptor.serves(1, 5, 2) && !descriptor.serves(1, 5, 4));
        descriptor.apply_membership();
        assert_eq!(descriptor.epoch, 4);
        assert!(!descriptor.serves(1, 5, 3));
    }

    #[test]
    fn bytes_come_back_and_nonsense_is_refused() {
        for descriptor in [shard(None), shard(Some((0, 0))), shard(Some((10, 20)))] {
            let mut out = BytesMut::new();
            descriptor.put(&mut out);
            let mut reader = Reader::new(out.freeze());
            assert_eq!(Descriptor::get(&mut reader), Ok(descriptor));
            assert_eq!(reader.end(), Ok(()));
        }
        for bad in
            [shard(Some((20, 20))), shard(Some((20, 10))), Descriptor { epoch: 0, ..shard(None) }]
        {
            let mut out = BytesMut::new();
            bad.put(&mut out);
            assert!(Descriptor::get(&mut Reader::new(out.freeze())).is_err());
        }
    }
}

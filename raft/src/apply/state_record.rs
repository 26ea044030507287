//! Owns a group's replicated state beside its records, and its bytes (FORMAT.md). Does not change
//! it, but for the epoch (see `apply`).

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use coracle_proto::entity::EntityRule;
use coracle_storage::state::{ArcFilter, MetaName, Overlay, Sample};

use crate::apply::{ApplyError, Membership};
use crate::dedup::Dedup;
use crate::descriptor::Descriptor;
use crate::history::{History, Keyspaces, Pins};
use crate::kin::{Kin, Lineage};
use crate::rules::Rules;
use crate::wire::{Malformed, Reader};

const FORMAT_VERSION: u8 = 1;

/// A group's replicated state beside its records. Loaded once, changed by `apply`, and stored
/// into every batch before it is written; after an error it must be thrown away together with the
/// batch.
///
/// Invariants: clock, ceiling, thresholds, floor and epoch never fall; `clock ≤ ceiling`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupState {
    /// The group clock: no version that was given, and no stamp of an entry with requests, is
    /// higher.
    pub clock: u64,
    /// The highest version that any leader may have served: the next leader stamps above it.
    pub ceiling: u64,
    /// Below which version of a keyspace what was superseded may be gone, and reads are refused.
    pub history: History,
    /// What the group holds; `None` until the first `Describe`, and then it serves nothing.
    pub descriptor: Option<Descriptor>,
    /// The memory of request ids.
    pub dedup: Dedup,
    /// The groups that it comes from.
    pub(crate) kin: Kin,
    /// Who belongs to it, by the entry applied last. Set by whoever keeps that record.
    pub membership: Membership,
}

impl GroupState {
    /// Reads the state that [`GroupState::store`] wrote; a store without one is a fresh group's.
    pub fn load(overlay: &Overlay) -> Result<GroupState, ApplyError> {
        let number = |name, record| {
            record_of(overlay, name, record, |reader| {
                format(reader)?;
                reader.u64()
            })
        };
        let clock = number(MetaName::CLOCK, "clock")?.unwrap_or_default();
        let ceiling = number(MetaName::CEILING, "ceiling")?.unwrap_or_default();
        let keyspaces = record_of(overlay, MetaName::KEYSPACES, "keyspaces", Keyspaces::get)?;
        let pins = record_of(overlay, MetaName::PINS, "pins", Pins::get)?;
        let (keyspaces, pins) = (keyspaces.unwrap_or_default(), pins.unwrap_or_default());
        let history = History::load(clock, keyspaces, pins);
        let descriptor = record_of(overlay, MetaName::DESCRIPTOR, "descriptor", Descriptor::get)?;
        let dedup = record_of(overlay, MetaName::FLOOR, "floor", Dedup::get)?.unwrap_or_default();
        let lineage = record_of(overlay, MetaName::LINEAGE, "lineage", Lineage::get)?;
        let rules = record_of(overlay, MetaName::RULES, "rules", Rules::get)?;
        let kin = Kin::load(lineage.unwrap_or_default(), rules.unwrap_or_default());
        let membership = Membership::default();
        Ok(GroupState { clock, ceiling, history, descriptor, dedup, kin, membership })
    }

    /// Writes the state into the batch. Once per batch, after its last entry and before it is
    /// written.
    pub fn store(&mut self, overlay: &mut Overlay) {
        assert!(self.clock <= self.ceiling, "every version that is used is at most the ceiling");
        let numbers = [(MetaName::CLOCK, self.clock), (MetaName::CEILING, self.ceiling)];
        for (name, number) in numbers {
            let mut out = BytesMut::with_capacity(9);
            out.put_u8(FORMAT_VERSION);
            out.put_u64(number);
            overlay.put_meta(name, out.freeze());
        }
        if let Some((keyspaces, pins)) = self.history.take_changed() {
            overlay.put_meta(MetaName::KEYSPACES, keyspaces.freeze());
            overlay.put_meta(MetaName::PINS, pins.freeze());
        }
        if let Some((lineage, rules)) = self.kin.take_changed() {
            overlay.put_meta(MetaName::LINEAGE, lineage.freeze());
            overlay.put_meta(MetaName::RULES, rules.freeze());
        }
        let mut out = BytesMut::new();
        self.dedup.put(&mut out);
        overlay.put_meta(MetaName::FLOOR, out.freeze());
        if let Some(descriptor) = &self.descriptor {
            let mut out = BytesMut::new();
            descriptor.put(&mut out);
            overlay.put_meta(MetaName::DESCRIPTOR, out.freeze());
        }
    }

    /// Which keys of the store are the group's; `None` where it cannot tell any apart. Keys of a keyspace
    /// whose rule is not known count as its own.
    pub fn arc_filter(&self) -> Option<ArcFilter> {
        let rules = self.kin.rules().clone();
        let descriptor = self.descriptor.clone().filter(|descriptor| descriptor.arc.is_some())?;
        if rules.keyspaces.is_empty() {
            return None;
        }
        Some(Arc::new(move |keyspace, key| {
            let position = rules.position(keyspace, key);
            position.is_none_or(|position| descriptor.owns(keyspace, position))
        }))
    }

    /// Whether it can tell keys apart at all: it has taken part in a split or a merge.
    pub(crate) fn can_tell_keys(&self) -> bool {
        !self.kin.rules().keyspaces.is_empty()
    }

    /// The keyspaces whose keys it can tell apart.
    pub(crate) fn known_keyspaces(&self) -> &BTreeMap<u32, EntityRule> {
        &self.kin.rules().keyspaces
    }

    pub(crate) fn has_the_arc_of(&self, other: &GroupState) -> bool {
        let arc = |state: &GroupState| state.descriptor.as_ref().map(|descriptor| descriptor.arc);
        arc(self) == arc(other)
    }

    /// Of the samples that are the group's own: the position that halves their bytes best, where they are
    /// of several entities, and the bytes.
    pub(crate) fn median(&self, samples: &[Sample], rules: &Rules) -> (Option<u64>, u64) {
        let mut by_position: BTreeMap<u64, u64> = BTreeMap::new();
        for sample in samples {
            let position = rules.position(sample.keyspace, &sample.key);
            let owns = |position: &u64| {
                self.descriptor.as_ref().is_some_and(|known| known.owns(sample.keyspace, *position))
            };
            if let Some(position) = position.filter(owns) {
                *by_position.entry(position).or_default() += sample.bytes;
            }
        }
        let bytes: u64 = by_position.values().sum();
        let mut below = 0_u64;
        let mut best: Option<(u64, u64)> = None;
        for (position, here) in by_position {
            let distance = (2 * below).abs_diff(bytes);
            // With nothing below, the position would leave the parent empty.
            if below > 0 && best.is_none_or(|(least, _)| distance < least) {
                best = Some((distance, position));
            }
            below += here;
        }
        (best.map(|(_, position)| position), bytes)
    }

    /// Writes all of the state into the batch, whatever the store below holds.
    pub(crate) fn store_whole(&mut self, overlay: &mut Overlay) {
        self.history.touch();
        self.kin.touch();
        self.store(overlay);
    }

    /// A membership entry was applied: the epoch rises, so that whatever was planned on the old
    /// members fails.
    pub fn apply_membership(&mut self) {
        if let Some(descriptor) = &mut self.descriptor {
            descriptor.apply_membership();
        }
    }
}

fn record_of<T>(
    overlay: &Overlay,
    name: MetaName,
    record: &'static str,
    read: impl FnOnce(&mut Reader) -> Result<T, Malformed>,
) -> Result<Option<T>, ApplyError> {
    let Some(bytes) = overlay.meta(name)? else {
        return Ok(None);
    };
    let mut reader = Reader::new(bytes);
    let whole = read(&mut reader).and_then(|value| reader.end().map(|()| value));
    whole.map(Some).map_err(|source| ApplyError::Record { record, source })
}

fn format(reader: &mut Reader) -> Result<(), Malformed> {
    if reader.u8()? != FORMAT_VERSION {
        return Err(Malformed("a record of an unknown format version"));
    }
    Ok(())
}

//! Owns what a merge does to the replicated state of its two groups, the one that is frozen and the one that
//! takes it in. Pure; the keys themselves, and the order of what is durable, are the state machine's.
//!
//! **A frozen group** changes no more: neither keys nor clock, ceiling, pins or settings, whatever its log
//! still brings, so that all of its replicas hold the same for whoever takes it in. Only a thaw ends that.
//!
//! **The group that takes it in** becomes what both were: the higher clock, ceiling, floor and thresholds of
//! history, and the results, marks and pins of both. A pin that lies below the other's threshold is dropped:
//! what it held there is gone already. Its clock passes the neighbour's ceiling, so that no version that was
//! served of the neighbour's keys is given again.
//!
//! The end of a merge raises the epoch on both sides, whether anything had happened there or not. So what
//! was planned for it and comes late fails.

use bytes::{BufMut, BytesMut};
use coracle_storage::state::{Overlay, View};

use super::reshape::planned;
use super::{ApplyError, Entry, GroupState, NotReshaped, Reshaped};
use crate::command::{AbsorbShard, AnnounceMerge, EndMerge, FreezeShard};
use crate::descriptor::Descriptor;
use crate::history::physical_ms;
use crate::position::Position;
use crate::wire::{Malformed, Reader};

const FORMAT_VERSION: u8 = 1;

/// How far a merge is. Part of the replicated state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeState {
    /// The merge under way, and whether this group takes the other in.
    pub merging: Option<(u64, bool)>,
    /// For which merge it is frozen, and the index of the freeze.
    pub frozen: Option<(u64, u64)>,
    /// By which merge it last took a neighbour in.
    pub absorbed: Option<u64>,
    /// Whether the record in the store is older.
    changed: bool,
}

/// A group that is taken in, as its frozen replica on this node holds it.
pub struct Neighbour<'a> {
    /// Its replicated state.
    pub state: &'a GroupState,
    /// Its records.
    pub view: &'a dyn View,
}

impl MergeState {
    pub(super) fn take_changed(&mut self) -> Option<BytesMut> {
        std::mem::replace(&mut self.changed, false).then(|| {
            let mut out = BytesMut::with_capacity(40);
            out.put_u8(FORMAT_VERSION);
            out.put_u8(u8::from(self.merging.is_some()));
            if let Some((merge, absorbs)) = self.merging {
                out.put_u64(merge);
                out.put_u8(u8::from(absorbs));
            }
            out.put_u8(u8::from(self.frozen.is_some()));
            if let Some((merge, index)) = self.frozen {
                out.put_u64(merge);
                out.put_u64(index);
            }
            out.put_u8(u8::from(self.absorbed.is_some()));
            if let Some(merge) = self.absorbed {
                out.put_u64(merge);
            }
            out
        })
    }

    pub(super) fn get(reader: &mut Reader) -> Result<MergeState, Malformed> {
        if reader.u8()? != FORMAT_VERSION {
            return Err(Malformed("a merge of an unknown format version"));
        }
        let merging = reader.option(|reader| Ok((reader.u64()?, reader.bool()?)))?;
        let frozen = reader.option(|reader| Ok((reader.u64()?, reader.u64()?)))?;
        let absorbed = reader.option(Reader::u64)?;
        Ok(MergeState { merging, frozen, absorbed, changed: false })
    }

    pub(super) fn touch(&mut self) {
        self.changed = true;
    }
}

fn done(state: &GroupState) -> Reshaped {
    let descriptor = state.descriptor.clone().expect("only a described group is reshaped");
    Reshaped { descriptor, child: None, version: state.clock, place: 0 }
}

/// Announces a merge; the same again changes nothing.
pub(super) fn announce(
    state: &mut GroupState,
    plan: &AnnounceMerge,
) -> Result<Reshaped, NotReshaped> {
    let announced = Some((plan.merge, plan.absorbs));
    if state.merge.merging != announced {
        if state.merge.merging.is_some() || state.merge.frozen.is_some() {
            return Err(NotReshaped::Merging);
        }
        planned(state, &plan.planned)?;
        // They stay from here on, and the decision names them: of another one it could not be carried out.
        if plan.replicas != state.membership.replicas {
            return Err(NotReshaped::Replicas);
        }
        state.kin.learn(&plan.rules);
        state.merge.merging = announced;
        state.merge.touch();
    }
    Ok(done(state))
}

/// Freezes; the same again changes nothing.
pub(super) fn freeze(
    state: &mut GroupState,
    at: &Entry,
    plan: &FreezeShard,
) -> Result<Reshaped, NotReshaped> {
    match (state.merge.frozen, state.merge.merging) {
        (Some((merge, _)), _) if merge == plan.merge => {}
        (Some(_), _) => return Err(NotReshaped::Merging),
        (None, Some((merge, absorbs))) if merge != plan.merge || absorbs => {
            return Err(NotReshaped::Merging);
        }
        (None, _) => {
            planned(state, &plan.planned)?;
            state.clock = at.stamp.max(state.clock + 1);
            state.merge.frozen = Some((plan.merge, at.index));
            state.merge.touch();
        }
    }
    let place = state.merge.frozen.map_or(0, |(_, index)| index);
    Ok(Reshaped { place, ..done(state) })
}

/// Ends a group's part of a merge, on either side, also of one that it has never heard of. A frozen group
/// serves again.
pub(super) fn end(state: &mut GroupState, plan: &EndMerge) -> Result<Reshaped, NotReshaped> {
    let other = |merge: u64| merge != plan.merge;
    if state.merge.merging.is_some_and(|(merge, _)| other(merge))
        || state.merge.frozen.is_some_and(|(merge, _)| other(merge))
    {
        return Err(NotReshaped::Merging);
    }
    let descriptor = state.descriptor.as_mut().ok_or(NotReshaped::Epoch { epoch: 0 })?;
    if descriptor.epoch != plan.epoch {
        return Err(NotReshaped::Epoch { epoch: descriptor.epoch });
    }
    descriptor.epoch += 1;
    (state.merge.merging, state.merge.frozen) = (None, None);
    state.merge.touch();
    Ok(done(state))
}

/// Whether a group may take its neighbour in: what it will hold.
pub(super) fn may_absorb(
    state: &GroupState,
    plan: &AbsorbShard,
) -> Result<Descriptor, NotReshaped> {
    let own = planned(state, &plan.planned)?;
    if state.merge.merging != Some((plan.merge, true)) || state.merge.frozen.is_some() {
        return Err(NotReshaped::Merging);
    }
    let arcs = own.arc.zip(plan.other.arc);
    let ((start, middle), (begin, end)) = arcs.ok_or(NotReshaped::Position)?;
    if middle != begin || middle == 0 {
        return Err(NotReshaped::Position);
    }
    if !plan.replicas.keys().eq(&state.membership.replicas) {
        return Err(NotReshaped::Replicas);
    }
    let epoch = own.epoch.max(plan.other.epoch) + 1;
    Ok(Descriptor { arc: Some((start, end)), epoch, ..own })
}

/// Takes the neighbour in: everything but its keys.
pub(super) fn absorb(
    overlay: &mut Overlay,
    state: &mut GroupState,
    at: &Entry,
    plan: &AbsorbShard,
    neighbour: &Neighbour<'_>,
) -> Result<Result<Reshaped, NotReshaped>, ApplyError> {
    let united = match may_absorb(state, plan) {
        Ok(united) => united,
        Err(refused) => return Ok(Err(refused)),
    };
    let other = neighbour.state;
    assert_eq!(
        (other.merge.frozen, other.descriptor.as_ref()),
        (Some((plan.merge, plan.frozen_at)), Some(&plan.other)),
        "a neighbour is taken in as it was frozen"
    );
    let now_ms = physical_ms(at.stamp.max(state.clock).max(other.clock));
    state.dedup.unite(overlay, &other.dedup, neighbour.view, now_ms)?;
    state.history.unite(&other.history);
    state.kin.learn(&plan.rules);
    // Above all that was served of its keys: the leader here goes on with stamps of its own.
    let version = at.stamp.max(state.clock.max(other.clock).max(other.ceiling) + 1);
    state.clock = version;
    state.ceiling = state.ceiling.max(other.ceiling);
    let place = Position { term: at.term, index: at.index };
    state.kin.take_over(plan.other.shard, other.kin.lineage(), version, place);
    state.descriptor = Some(united);
    state.merge.absorbed = Some(plan.merge);
    state.merge.touch();
    Ok(Ok(Reshaped { place: at.index, ..done(state) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut state = MergeState {
            merging: Some((1, true)),
            frozen: Some((2, 3)),
            absorbed: Some(4),
            changed: true,
        };
        let bytes = state.take_changed().expect("it has changed").freeze();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let wanted = "01".to_owned()
            + "01000000000000000101"
            + "0100000000000000020000000000000003"
            + "010000000000000004";
        assert_eq!(hex, wanted);
        assert_eq!(MergeState::get(&mut Reader::new(bytes)), Ok(state));
        assert_eq!(state.take_changed(), None);
    }
}

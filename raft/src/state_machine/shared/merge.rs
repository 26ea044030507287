//! What a merge needs of a replica's state: how far it is, the keys of the one in the other, and that no key
//! outside the arc is left.
//!
//! Owns what of it is durable, and when compaction is held. In which order it happens is the state machine's
//! business.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use coracle_storage::Mutant;
use coracle_storage::state::{Batch, Kind, MetaName, key};

use super::{Current, SharedState, no_store};
use crate::apply::Neighbour;
use crate::birth::Sealed;
use crate::command::AbsorbShard;
use crate::dedup::Remembered;
use crate::merge_status::{Absorbed, Frozen, MergeStatus};
use crate::state_machine::flush;
use crate::types::{Entry, Replies};
use crate::wire::{Malformed, Reader};

/// Bytes of a neighbour's keys that are written at a time.
const INGEST_BATCH_BYTES: u64 = 1 << 20;

/// What of a merge survives a crash of this replica.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Durable {
    frozen: Option<(u64, u64)>,
    absorbed: Option<u64>,
    foreign_free: Option<u64>,
}

impl Current {
    /// What would survive, were all of this flushed.
    pub(super) fn once_durable(&self) -> Durable {
        let merge = self.group.merge;
        let foreign_free = self.foreign_free;
        Durable { frozen: merge.frozen, absorbed: merge.absorbed, foreign_free }
    }

    /// Takes note of what a flush has made durable. One that began before the state changed may end after one
    /// that began later: it says nothing of what is now.
    fn note_flushed(&mut self, flushed: Durable) {
        let (now, durable) = (self.once_durable(), &mut self.durable);
        if flushed.frozen == now.frozen {
            durable.frozen = now.frozen;
        }
        if flushed.absorbed == now.absorbed {
            durable.absorbed = now.absorbed;
        }
        if flushed.foreign_free == now.foreign_free {
            durable.foreign_free = now.foreign_free;
        }
    }

    /// Whether keys of a neighbour may be here that are not counted as the group's own yet: a crash came
    /// before the batch that makes them so was durable. Only a replica that is free of foreign keys, durably,
    /// takes in what it must not lose.
    pub(super) fn may_be_taking_in(&self) -> bool {
        let merge = self.group.merge;
        let takes_in = |(of, absorbs)| absorbs && merge.absorbed != Some(of);
        merge.merging.is_some_and(takes_in) && self.foreign_free.is_some()
    }
}

impl SharedState {
    /// How far a merge is on this replica.
    pub(crate) fn merge_status(&self) -> MergeStatus {
        let seen = self.0.seen.read();
        let durable = seen.durable;
        let frozen = durable.frozen.filter(|_| durable.frozen == seen.merge.frozen);
        let absorbed = seen
            .merge
            .absorbed
            .map(|merge| Absorbed { merge, flushed: durable.absorbed == Some(merge) });
        MergeStatus {
            merging: seen.merge.merging.map(|(merge, _)| merge),
            frozen: frozen.map(|(merge, index)| Frozen { merge, index }),
            foreign_free: seen.foreign_free.filter(|_| durable.foreign_free == seen.foreign_free),
            absorbed,
        }
    }

    /// The index in the log at which the group last took over what it had not written itself; 0: never.
    pub(crate) fn taken_over_at(&self) -> u64 {
        self.0.seen.read().taken_over_at
    }

    /// Makes all of it durable, and lets compaction and the merge's controller go by it.
    pub(crate) fn seal(&self) -> io::Result<()> {
        let (store, filter, durable) = {
            let current = self.0.current.read();
            let store = current.store.clone().ok_or_else(no_store)?;
            (store, current.filter(), current.once_durable())
        };
        flush(&store, filter).map_err(io::Error::other)?;
        let mut current = self.0.current.write();
        current.note_flushed(durable);
        *self.0.seen.write() = current.seen();
        Ok(())
    }

    /// This replica as whoever takes its group in needs it, once it is frozen for that merge.
    pub(crate) fn sealed(&self, merge: u64) -> Option<Sealed> {
        let current = self.0.current.read();
        let frozen = current.group.merge.frozen.is_some_and(|(by, _)| by == merge);
        let store = current.store.clone().filter(|_| frozen)?;
        Some(Sealed { state: current.group.clone(), store })
    }

    /// Writes the keys of a neighbour's arc, and no others. What is written twice is the same.
    pub(in crate::state_machine) fn ingest(
        &self,
        sealed: &Sealed,
        plan: &AbsorbShard,
    ) -> io::Result<()> {
        if Mutant::TakesNothingIn.is_in() {
            return Ok(());
        }
        let store = self.store()?;
        let view = sealed.store.engine().view().map_err(io::Error::other)?;
        let mut cursor = view.seek(Kind::Data.range(), false).map_err(io::Error::other)?;
        let (mut batch, mut prefix, mut own) = (Batch::new(), Vec::new(), false);
        while let Some((physical, stored)) = cursor.next().map_err(io::Error::other)? {
            let not_data = || io::Error::other("a neighbour's record of data has no such key");
            let (now, _) = key::split_data(&physical).ok_or_else(not_data)?;
            if prefix != now {
                prefix = now.to_vec();
                let (keyspace, user_key) = key::decode_prefix(now).ok_or_else(not_data)?;
                let position = plan.rules.position(keyspace, &user_key).ok_or_else(|| {
                    io::Error::other(format!("the rule of keyspace {keyspace} did not come along"))
                })?;
                own = plan.other.owns(keyspace, position);
            }
            if own {
                batch.put(physical, stored);
            }
            if batch.bytes() >= INGEST_BATCH_BYTES {
                store.write(std::mem::take(&mut batch)).map_err(io::Error::other)?;
            }
        }
        store.write(batch).map_err(io::Error::other)
    }

    /// Holds compaction back, or lets it go on.
    pub(in crate::state_machine) fn hold_compaction(&self, holds: bool) -> io::Result<()> {
        self.store()?.filter().hold(holds);
        Ok(())
    }

    /// Applies the entry that takes a neighbour in, whose keys are in the store.
    pub(in crate::state_machine) fn absorb(
        &self,
        entry: &Entry,
        sealed: &Sealed,
    ) -> io::Result<Vec<Replies>> {
        let view = sealed.store.engine().view().map_err(io::Error::other)?;
        let neighbour = Neighbour { state: &sealed.state, view: &*view };
        let prepared = self.prepare(std::slice::from_ref(entry), Some(&neighbour))?;
        self.commit(prepared)
    }

    /// Whether keys outside the arc may be here, and can be told apart.
    pub(crate) fn is_untidy(&self) -> bool {
        let seen = self.0.seen.read();
        // One that is frozen is being read, and goes.
        seen.foreign_free.is_none() && seen.can_tell && seen.merge.frozen.is_none()
    }

    /// Drops keys outside the arc, and remembers that none is left. False where keys of a keyspace are here
    /// whose rule the group does not know, unless a merge is under way: it has brought the rules of all that
    /// there can be foreign keys of. Blocks for as long as rewriting all of the store takes.
    pub(crate) fn drop_foreign(&self) -> io::Result<bool> {
        let (store, filter, group) = {
            let current = self.0.current.read();
            let store = current.store.clone().ok_or_else(no_store)?;
            (store, current.filter(), current.group.clone())
        };
        let all_known = group.merge.merging.is_some();
        flush(&store, filter).map_err(io::Error::other)?;
        store.compact(None).map_err(io::Error::other)?;
        let known = group.known_keyspaces();
        let keyspaces = store.keyspaces().map_err(io::Error::other)?;
        if !all_known && !keyspaces.iter().all(|keyspace| known.contains_key(keyspace)) {
            return Ok(false);
        }
        let epoch = group.descriptor.as_ref().map_or(0, |descriptor| descriptor.epoch);
        {
            // Under the lock: no batch changes the arc meanwhile.
            let mut current = self.0.current.write();
            if current.store.is_none() || !current.group.has_the_arc_of(&group) {
                return Ok(false);
            }
            let mut overlay = store.overlay();
            overlay.put_meta(MetaName::FOREIGN_FREE, foreign_free_bytes(epoch));
            store.write(overlay.into_batch()).map_err(io::Error::other)?;
            current.foreign_free = Some(epoch);
            *self.0.seen.write() = current.seen();
        }
        // A merge is decided by it, so it has to be there after a crash too.
        store.flush().map_err(io::Error::other)?;
        let mut current = self.0.current.write();
        if current.store.is_some() && current.foreign_free == Some(epoch) {
            current.durable.foreign_free = Some(epoch);
            *self.0.seen.write() = current.seen();
        }
        Ok(true)
    }

    /// How many requests the group remembers.
    pub(crate) fn remembered(&self) -> Remembered {
        self.0.seen.read().remembered
    }
}

fn foreign_free_bytes(epoch: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(9);
    bytes.put_u8(1);
    bytes.put_u64(epoch);
    bytes.freeze()
}

pub(super) fn foreign_free_from(bytes: Bytes) -> io::Result<u64> {
    let mut reader = Reader::new(bytes);
    let epoch = match reader.u8() {
        Ok(1) => reader.u64(),
        _ => Err(Malformed("a foreign-free record of an unknown format version")),
    };
    epoch.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::sync::Arc;

    use coracle_proto::entity::EntityRule;
    use coracle_storage::fs::faulty::{FaultyFs, Loss};
    use coracle_storage::state::{MapEngines, OpenState, ReplicaState};
    use openraft::EntryPayload;

    use super::*;
    use crate::apply::GroupState;
    use crate::descriptor::Descriptor;
    use crate::rules::Rules;
    use crate::types::{Position, log_id};

    const AT: u64 = 1 << 63;
    const KEYSPACE: u32 = 1;

    /// A store that was left by a crash, as `merge` says, with a key on each side of the arc's end.
    fn left_behind(merging: Option<(u64, bool)>, absorbed: Option<u64>) -> SharedState {
        made((merging, absorbed), Some(4), &FaultyFs::new(0))
    }

    fn made(
        (merging, absorbed): (Option<(u64, bool)>, Option<u64>),
        foreign_free: Option<u64>,
        disk: &FaultyFs,
    ) -> SharedState {
        let rules =
            Rules { hash_seed: 7, keyspaces: BTreeMap::from([(KEYSPACE, EntityRule::Whole)]) };
        let engines = MapEngines::new(Arc::new(disk.clone()));
        let store = ReplicaState::open(&engines, Path::new("/state"), OpenState { create: true });
        let store = store.expect("an empty disk");
        let mut overlay = store.overlay();
        let mut state = GroupState { clock: 9, ceiling: 9, ..GroupState::default() };
        state.descriptor = Some(Descriptor { shard: 1, arc: Some((0, AT)), epoch: 4 });
        state.kin.learn(&rules);
        (state.merge.merging, state.merge.absorbed) = (merging, absorbed);
        for upper in [false, true] {
            let name = (0..).map(|n: u32| n.to_be_bytes()).find(|key| {
                rules.position(KEYSPACE, key).is_some_and(|position| (position >= AT) == upper)
            });
            overlay.put(KEYSPACE, &name.expect("half of them"), 5, b"v", 0);
        }
        if let Some(epoch) = foreign_free {
            overlay.put_meta(MetaName::FOREIGN_FREE, foreign_free_bytes(epoch));
        }
        state.store_whole(&mut overlay);
        store.write(overlay.into_batch()).expect("a healthy disk");
        store.flush().expect("a healthy disk");
        SharedState::open(store).expect("our own records")
    }

    fn keys(state: &SharedState) -> usize {
        let view = state.store().expect("open").engine().view().expect("a healthy disk");
        let mut cursor = view.seek(Kind::Data.range(), false).expect("a healthy disk");
        std::iter::from_fn(|| cursor.next().expect("a healthy disk")).count()
    }

    #[test]
    fn after_a_crash_what_may_be_half_taken_in_is_kept_until_it_is_taken_in_again() {
        for (merging, absorbed, kept) in [
            (Some((7, true)), None, 2),
            (Some((7, true)), Some(6), 2),
            (Some((7, true)), Some(7), 1),
            (Some((7, false)), None, 1),
            (None, Some(7), 1),
        ] {
            let state = left_behind(merging, absorbed);
            state.reclaim().expect("a healthy disk");
            assert_eq!(keys(&state), kept, "{merging:?} {absorbed:?}");
            state.hold_compaction(false).expect("open");
            state.reclaim().expect("a healthy disk");
            assert_eq!(keys(&state), 1, "{merging:?} {absorbed:?}");
        }
    }

    #[test]
    fn a_flush_that_ends_late_takes_back_nothing_that_is_durable() {
        let state = left_behind(Some((7, true)), None);
        let said = |state: &SharedState| {
            let status = state.merge_status();
            (status.absorbed.is_some_and(|it| it.flushed), status.foreign_free)
        };
        let early = {
            let mut current = state.0.current.write();
            let early = Durable { foreign_free: None, ..current.once_durable() };
            current.group.merge.absorbed = Some(7);
            (current.foreign_free, current.durable) = (Some(5), Durable::default());
            *state.0.seen.write() = current.seen();
            early
        };
        assert_eq!(said(&state), (false, None), "not before it is flushed");
        state.seal().expect("a healthy disk");
        assert_eq!(said(&state), (true, Some(5)));
        {
            let mut current = state.0.current.write();
            current.note_flushed(early);
            *state.0.seen.write() = current.seen();
        }
        assert_eq!(said(&state), (true, Some(5)));
    }

    #[test]
    fn that_no_foreign_key_is_left_is_said_once_it_survives_a_crash() {
        let disk = FaultyFs::new(0);
        let state = made((None, None), None, &disk);
        assert!(state.is_untidy() && state.merge_status().foreign_free.is_none());
        assert!(state.drop_foreign().expect("a healthy disk"), "all rules are known");
        assert_eq!((keys(&state), state.merge_status().foreign_free), (1, Some(4)));
        assert!(!state.is_untidy());
        drop(state);
        let engines = MapEngines::new(Arc::new(disk.crash(Loss::All)));
        let store = ReplicaState::open(&engines, Path::new("/state"), OpenState { create: false });
        let after = SharedState::open(store.expect("it is there")).expect("our own records");
        assert_eq!(after.merge_status().foreign_free, Some(4));
    }

    #[test]
    fn that_no_foreign_key_is_left_is_not_forgotten_over_a_batch_that_was_judged_before() {
        let state = made((None, None), None, &FaultyFs::new(0));
        let entry =
            Entry { log_id: log_id(Position { term: 1, index: 1 }), payload: EntryPayload::Blank };
        let prepared = state.prepare(std::slice::from_ref(&entry), None).expect("a sound entry");
        assert!(state.drop_foreign().expect("a healthy disk"), "all rules are known");
        state.commit(prepared).expect("a healthy disk");
        assert_eq!(state.merge_status().foreign_free, Some(4));
        assert!(!state.is_untidy(), "else all of it is rewritten again");
    }

    #[test]
    fn who_is_to_be_taken_in_drops_others_keys_too_until_it_is_frozen() {
        let state = made((Some((7, false)), None), None, &FaultyFs::new(0));
        assert!(state.is_untidy(), "else they were read for the sake of nobody");
        {
            let mut current = state.0.current.write();
            current.group.merge.frozen = Some((7, 3));
            *state.0.seen.write() = current.seen();
        }
        assert!(!state.is_untidy());
    }
}

//! Owns the way from records, in the order of the log, to the index. Does not read files (see
//! `scan`).
//!
//! The log may begin in the middle of a replica's life: older segments were freed after what was
//! live in them was copied forward. So records of a replica may come before its `create`, and
//! entries may come before the copies of older ones; only at the end everything must fit together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;

use super::index::{Damage, Index, Live, Place, Replica, Slot, Stored};
use super::record::{Header, Kind, ReplicaId, split_id};
use super::scan::Loss;
use super::segment::segment_path;

/// A record whose frame is sound.
pub(crate) struct Found<'a> {
    pub(crate) header: Header,
    pub(crate) kind: Kind,
    pub(crate) place: Place,
    /// Number of the batch that it stands in.
    pub(crate) batch: u64,
    /// None when it does not match its checksum.
    pub(crate) body: Option<&'a [u8]>,
}

/// The newest record of its kind: its value, or none when it is damaged.
type Newest<T> = Option<(Option<T>, Place)>;

#[derive(Default)]
struct Life {
    created: Option<(u64, Place)>,
    vote: Newest<Bytes>,
    committed: Option<(Bytes, Place)>,
    purged: Option<(u64, Option<[u8; 16]>, Place)>,
    damage: Option<(Damage, Place)>,
    /// By index: id (none when damaged) and place.
    entries: BTreeMap<u64, (Option<[u8; 16]>, Place)>,
    /// Where the next appended entry must stand, when that is known. The entries in between may be
    /// missing here, because only copies of them are left, further on.
    next: Option<u64>,
    /// A record that contradicts the ones before it.
    broken: Option<(Place, &'static str)>,
}

/// What the records said so far.
#[derive(Default)]
pub(crate) struct Replay {
    lives: BTreeMap<ReplicaId, Life>,
    destroyed: BTreeMap<ReplicaId, Place>,
    forgotten: BTreeSet<ReplicaId>,
}

impl Replay {
    pub(crate) fn record(&mut self, found: &Found<'_>) {
        let id = found.header.replica;
        match found.kind {
            Kind::Batch => {}
            Kind::Forget => {
                self.lives.remove(&id);
                self.destroyed.remove(&id);
                self.forgotten.insert(id);
            }
            Kind::Destroy => {
                self.lives.remove(&id);
                self.destroyed.insert(id, found.place);
            }
            _ if self.destroyed.contains_key(&id) || self.forgotten.contains(&id) => {}
            _ => self.lives.entry(id).or_default().record(found),
        }
    }

    /// The index, and the replicas that have lost something, be it now or before.
    pub(crate) fn finish(
        mut self,
        dir: &Path,
        losses: &[Loss],
        cache_bytes: u64,
    ) -> (Index, Vec<Damage>) {
        for loss in losses {
            // Only their records in the lost part told of them.
            for id in loss.replicas.iter().flatten() {
                if !self.destroyed.contains_key(id) && !self.forgotten.contains(id) {
                    self.lives.entry(*id).or_default();
                }
            }
        }
        let mut index = Index::new(cache_bytes);
        let mut damages = Vec::new();
        for (id, place) in self.destroyed {
            index.adopt_destroyed(id, place);
        }
        for (id, life) in self.lives {
            let known = life.damage.as_ref().map(|(damage, _)| damage.clone());
            let damage = known.or_else(|| life.find_damage(id, dir, losses));
            index.adopt(id, life.replica(damage.is_some()));
            damages.extend(damage);
        }
        (index, damages)
    }
}

impl Life {
    fn record(&mut self, found: &Found<'_>) {
        let Found { header, place, .. } = *found;
        match found.kind {
            Kind::Create => {
                let first_said = if header.rewritten { header.index } else { found.batch };
                self.created = Some((first_said, place));
            }
            Kind::Vote => self.vote = Some((found.body.map(Bytes::copy_from_slice), place)),
            // Only a hint for its reader: when it is damaged there is none.
            Kind::Committed => {
                self.committed = found.body.map(|body| (Bytes::copy_from_slice(body), place));
            }
            Kind::Truncate => {
                self.entries.split_off(&header.index);
                self.next = None;
            }
            Kind::Purge => {
                self.next = self.next.map(|next| next.max(header.index + 1));
                let id = found.body.and_then(split_id).map(|(id, _)| id);
                self.purged = Some((header.index, id, place));
                self.entries = self.entries.split_off(&(header.index + 1));
            }
            Kind::Damaged => {
                let damage = Damage::decode(header.replica, found.body.unwrap_or_default());
                self.damage = Some((damage, place));
            }
            Kind::Entry => {
                let id = found.body.and_then(split_id).map(|(id, _)| id);
                self.entry(header.index, id, place, header.rewritten);
            }
            Kind::Batch | Kind::Destroy | Kind::Forget => {}
        }
    }

    fn entry(&mut self, index: u64, id: Option<[u8; 16]>, place: Place, rewritten: bool) {
        let purged = self.purged.is_some_and(|(purged, ..)| index <= purged);
        let last = self.entries.last_key_value().map(|(&last, _)| last);
        let broken = if rewritten {
            let other = self.entries.get(&index).and_then(|(known, _)| *known);
            let differs = other.is_some_and(|other| id.is_some_and(|id| id != other));
            (purged || differs).then_some("a copy forward is not of the entry that was live")
        } else {
            let gap = self.next.is_some_and(|next| index != next);
            let known = last.is_some_and(|last| index <= last);
            self.next = Some(index + 1);
            (purged || gap || known).then_some("an entry does not follow the one before it")
        };
        match broken {
            Some(why) => self.broken = self.broken.or(Some((place, why))),
            None => {
                self.entries.insert(index, (id, place));
            }
        }
    }

    fn find_damage(&self, id: ReplicaId, dir: &Path, losses: &[Loss]) -> Option<Damage> {
        let at = |place: Place, why: &str| Damage {
            replica: id,
            file: segment_path(dir, place.segment),
            offset: place.offset,
            why: why.to_owned(),
        };
        let created = self.created.map_or(0, |(batch, _)| batch);
        // A replica that was first named behind the loss has nothing in it.
        let lost = losses.iter().find(|loss| match &loss.replicas {
            Some(listed) => listed.contains(&id),
            None => created < loss.next_batch,
        });
        if let Some(loss) = lost {
            let (file, offset, why) = (loss.file.clone(), loss.offset, loss.why.clone());
            return Some(Damage { replica: id, file, offset, why });
        }
        if let Some((place, why)) = self.broken {
            return Some(at(place, why));
        }
        if let Some((None, place)) = self.vote {
            return Some(at(place, "the vote does not match its checksum"));
        }
        if let Some((_, None, place)) = self.purged {
            return Some(at(place, "the purge position does not match its checksum"));
        }
        let mut expected = self.purged.map(|(purged, ..)| purged + 1);
        for (&index, &(entry_id, place)) in &self.entries {
            if entry_id.is_none() {
                return Some(at(place, &format!("entry {index} does not match its checksum")));
            }
            if expected.is_some_and(|expected| expected != index) {
                return Some(at(place, &format!("the entries before entry {index} are missing")));
            }
            expected = Some(index + 1);
        }
        if self.created.is_none() {
            let why = "the record of its creation is missing".to_owned();
            return Some(Damage { replica: id, file: dir.to_path_buf(), offset: 0, why });
        }
        None
    }

    fn replica(self, damaged: bool) -> Replica {
        fn stored<T>(value: T, place: Place) -> Stored<T> {
            Stored { value, ticket: 0, place: Some(place) }
        }
        let created = match self.created {
            Some((batch, place)) => stored(batch, place),
            None => Stored { value: 0, ticket: 0, place: None },
        };
        let mut replica = Replica::new(created);
        replica.damage = self.damage.map(|(damage, place)| stored(damage, place));
        if damaged {
            return replica;
        }
        let sound = "a replica without damage has no damaged record";
        replica.vote = self.vote.map(|(vote, place)| stored(vote.expect(sound), place));
        replica.committed = self.committed.map(|(committed, place)| stored(committed, place));
        replica.purged =
            self.purged.map(|(index, id, place)| stored((index, id.expect(sound)), place));
        replica.first = self.entries.keys().next().copied().unwrap_or(0);
        let mut live = Live::default();
        for (_, (id, place)) in self.entries {
            live.add(place);
            let payload_len = place.body_len - 16;
            replica.payload_bytes += u64::from(payload_len);
            replica.entries.push_back(Slot {
                id: id.expect(sound),
                payload_len,
                ticket: 0,
                place: Some(place),
                payload: None,
            });
        }
        replica.entries_live = live;
        replica
    }
}

//! Owns what the log knows in memory: per replica its vote, positions and entries, where each
//! record stands, which segments hold live data, and the payloads kept for readers. Does not touch
//! files.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use bytes::Bytes;

use super::cache::{Cache, Held, Key, Payloads};
use super::record::{HEADER_LEN, Header, Kind, LogEntry, ReplicaId, u64_at};
use crate::error::Error;

/// A replica that lost acknowledged data: it may not vote, acknowledge or serve, until it is
/// destroyed and rebuilt from its group under a fresh id.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct Damage {
    /// Whose data it is.
    pub replica: ReplicaId,
    /// The damaged file.
    pub file: PathBuf,
    /// Where in the file.
    pub offset: u64,
    /// What does not hold.
    pub why: String,
}

impl Damage {
    /// The damage that an error speaks of.
    pub(crate) fn of(replica: ReplicaId, error: &Error) -> Damage {
        let (file, offset, why) = match error {
            Error::Corruption { file, offset, why } => (file.clone(), *offset, why.clone()),
            Error::Io { path, source } => (path.clone(), 0, source.to_string()),
            other => (PathBuf::new(), 0, other.to_string()),
        };
        Damage { replica, file, offset, why }
    }

    /// The error that every call for this replica gets.
    pub(crate) fn error(&self) -> Error {
        let Damage { replica, file, offset, why } = self;
        let why = format!("{} is damaged at byte {offset}: {why}", file.display());
        Error::Recovering { replica: *replica, why }
    }

    /// The body of its record: offset, then file and reason, each up to a line's end.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = self.offset.to_le_bytes().to_vec();
        body.extend_from_slice(format!("{}\n{}", self.file.display(), self.why).as_bytes());
        body
    }

    /// Reads the body back; what cannot be read is left empty: that there is damage is what counts.
    pub(crate) fn decode(replica: ReplicaId, body: &[u8]) -> Damage {
        let offset = u64_at(body, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(body.get(8..).unwrap_or_default()).into_owned();
        let (file, why) = text.split_once('\n').unwrap_or(("", &text));
        Damage { replica, file: PathBuf::from(file), offset, why: why.to_owned() }
    }
}

/// Position of an operation in the queue. Everything queued gets one, in order.
pub(crate) type Ticket = u64;

/// Where a record stands on disk.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) struct Place {
    pub(crate) segment: u64,
    /// The first byte of its header.
    pub(crate) offset: u64,
    pub(crate) body_len: u32,
    pub(crate) body_crc: u32,
}

impl Place {
    pub(crate) fn new(segment: u64, offset: u64, header: &Header) -> Place {
        Place { segment, offset, body_len: header.body_len, body_crc: header.body_crc }
    }

    pub(crate) fn body_offset(&self) -> u64 {
        self.offset + HEADER_LEN as u64
    }

    pub(crate) fn record_len(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.body_len)
    }
}

/// One entry in the index.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) id: [u8; 16],
    pub(crate) payload_len: u32,
    /// The append that made it: an index that was truncated and appended again is another entry.
    pub(crate) ticket: Ticket,
    /// None until it is written.
    pub(crate) place: Option<Place>,
    /// None when readers have to go to the disk. Never None before it is written.
    pub(crate) payload: Option<Bytes>,
}

/// Memory that one entry needs beside its payload: its slot, and its name in the cache's order.
pub(crate) const SLOT_BYTES: u64 = (size_of::<Slot>() + size_of::<Key>()) as u64;
/// Room for slots that stays when there are few entries.
const SLOTS_KEPT: usize = 1024;

/// A value of which only the newest record counts.
#[derive(Clone, Debug)]
pub(crate) struct Stored<T> {
    pub(crate) value: T,
    pub(crate) ticket: Ticket,
    /// None until it is written.
    pub(crate) place: Option<Place>,
}

impl<T> Stored<T> {
    pub(crate) fn queued(value: T, ticket: Ticket) -> Stored<T> {
        Stored { value, ticket, place: None }
    }
}

/// Bytes of live records per segment. Invariant: the sum over all live records, and no segment with
/// 0.
#[derive(Clone, Default, Debug)]
pub(crate) struct Live(BTreeMap<u64, u64>);

impl Live {
    pub(crate) fn add(&mut self, place: Place) {
        *self.0.entry(place.segment).or_default() += place.record_len();
    }

    pub(crate) fn remove(&mut self, place: Option<Place>) {
        let Some(place) = place else { return };
        let bytes =
            self.0.get_mut(&place.segment).expect("what stands in a segment was added to it");
        *bytes =
            bytes.checked_sub(place.record_len()).expect("never less live than what stands there");
        if *bytes == 0 {
            self.0.remove(&place.segment);
        }
    }

    pub(crate) fn bytes_in(&self, segment: u64) -> u64 {
        self.0.get(&segment).copied().unwrap_or(0)
    }

    pub(crate) fn oldest(&self) -> Option<u64> {
        self.0.keys().next().copied()
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// What the log knows of one replica.
///
/// Invariants: entries are consecutive from `first`; with a purge position and entries, `first` is
/// the one after it; a replica with `damage` has no entries.
#[derive(Debug)]
pub(crate) struct Replica {
    /// The number of the batch that first said it, 0 while that is not written.
    pub(crate) created: Stored<u64>,
    pub(crate) vote: Option<Stored<Bytes>>,
    pub(crate) committed: Option<Stored<Bytes>>,
    pub(crate) purged: Option<Stored<(u64, [u8; 16])>>,
    /// Why it is recovering.
    pub(crate) damage: Option<Stored<Damage>>,
    pub(crate) first: u64,
    pub(crate) entries: VecDeque<Slot>,
    pub(crate) payload_bytes: u64,
    /// Live entries only, by segment.
    pub(crate) entries_live: Live,
}

impl Replica {
    pub(crate) fn new(created: Stored<u64>) -> Replica {
        Replica {
            created,
            vote: None,
            committed: None,
            purged: None,
            damage: None,
            first: 0,
            entries: VecDeque::new(),
            payload_bytes: 0,
            entries_live: Live::default(),
        }
    }

    /// The index after the last entry.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    pub(crate) fn slot(&self, index: u64) -> Option<&Slot> {
        self.entries.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    fn slot_mut(&mut self, index: u64) -> Option<&mut Slot> {
        self.entries.get_mut(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    pub(crate) fn purged(&self) -> Option<(u64, [u8; 16])> {
        self.purged.as_ref().map(|purged| purged.value)
    }

    pub(crate) fn last(&self) -> Option<(u64, [u8; 16])> {
        match self.entries.back() {
            Some(slot) => Some((self.end() - 1, slot.id)),
            None => self.purged(),
        }
    }

    /// Where everything but entries stands.
    fn places(&self) -> impl Iterator<Item = Place> + '_ {
        let stored = [
            self.created.place,
            self.vote.as_ref().and_then(|stored| stored.place),
            self.committed.as_ref().and_then(|stored| stored.place),
            self.purged.as_ref().and_then(|stored| stored.place),
            self.damage.as_ref().and_then(|stored| stored.place),
        ];
        stored.into_iter().flatten()
    }
}

/// Everything that the log knows in memory.
pub(crate) struct Index {
    pub(crate) replicas: BTreeMap<ReplicaId, Replica>,
    /// Replicas that are gone for ever.
    pub(crate) destroyed: BTreeMap<ReplicaId, Stored<()>>,
    pub(crate) live: Live,
    pub(crate) cache: Cache,
}

impl Index {
    pub(crate) fn new(cache_bytes: u64) -> Index {
        Index {
            replicas: BTreeMap::new(),
            destroyed: BTreeMap::new(),
            live: Live::default(),
            cache: Cache::new(cache_bytes),
        }
    }

    fn known(&mut self, id: ReplicaId) -> &mut Replica {
        self.replicas.get_mut(&id).expect("the caller has checked that the replica is known")
    }

    pub(crate) fn create(&mut self, id: ReplicaId, ticket: Ticket) {
        let before = self.replicas.insert(id, Replica::new(Stored::queued(0, ticket)));
        assert!(before.is_none(), "a replica is created once");
    }

    /// Takes over a replica that was read from the disk.
    pub(crate) fn adopt(&mut self, id: ReplicaId, replica: Replica) {
        for place in replica.places() {
            self.live.add(place);
        }
        for slot in &replica.entries {
            // A replica's own account was kept while it was built.
            self.live.add(slot.place.expect("read from the disk, so it stands there"));
        }
        self.replicas.insert(id, replica);
    }

    pub(crate) fn adopt_destroyed(&mut self, id: ReplicaId, place: Place) {
        self.live.add(place);
        self.destroyed.insert(id, Stored { value: (), ticket: 0, place: Some(place) });
    }

    pub(crate) fn destroy(&mut self, id: ReplicaId, ticket: Ticket) {
        self.truncate(id, 0);
        let replica = self.replicas.remove(&id).expect("the caller has checked that it is known");
        for place in replica.places() {
            self.live.remove(Some(place));
        }
        self.destroyed.insert(id, Stored::queued((), ticket));
    }

    pub(crate) fn forget(&mut self, id: ReplicaId) {
        if let Some(stored) = self.destroyed.remove(&id) {
            self.live.remove(stored.place);
        }
    }

    pub(crate) fn append(&mut self, id: ReplicaId, entries: &[LogEntry], ticket: Ticket) {
        let replica =
            self.replicas.get_mut(&id).expect("the caller has checked that the replica is known");
        for entry in entries {
            if replica.entries.is_empty() {
                replica.first = entry.index;
            }
            assert_eq!(entry.index, replica.end(), "entries of a replica are consecutive");
            replica.payload_bytes += entry.payload.len() as u64;
            replica.entries.push_back(Slot {
                id: entry.id,
                payload_len: entry.payload.len() as u32,
                ticket,
                place: None,
                payload: Some(entry.payload.clone()),
            });
            self.cache.added((id, entry.index, ticket), entry.payload.len() as u64);
        }
    }

    /// Removes all entries from `from` on.
    pub(crate) fn truncate(&mut self, id: ReplicaId, from: u64) {
        while self
            .replicas
            .get(&id)
            .is_some_and(|replica| !replica.entries.is_empty() && replica.end() > from)
        {
            let slot = self.known(id).entries.pop_back();
            self.dropped(id, slot);
        }
    }

    pub(crate) fn purge(&mut self, id: ReplicaId, upto: (u64, [u8; 16]), ticket: Ticket) {
        let old = self.known(id).purged.replace(Stored::queued(upto, ticket));
        self.live.remove(old.and_then(|old| old.place));
        while self.known(id).entries.front().is_some() && self.known(id).first <= upto.0 {
            let replica = self.known(id);
            let slot = replica.entries.pop_front();
            replica.first += 1;
            self.dropped(id, slot);
        }
        // A long log that became short gives its room back.
        let entries = &mut self.known(id).entries;
        if entries.capacity() > 4 * entries.len().max(SLOTS_KEPT) {
            entries.shrink_to(2 * entries.len().max(SLOTS_KEPT));
        }
    }

    /// Memory that the entries of all replicas need beside their payloads.
    pub(crate) fn bytes(&self) -> u64 {
        self.replicas.values().map(|replica| replica.entries.len() as u64 * SLOT_BYTES).sum()
    }

    fn dropped(&mut self, id: ReplicaId, slot: Option<Slot>) {
        let slot = slot.expect("the caller has seen that there is one");
        self.live.remove(slot.place);
        if slot.payload.is_some() {
            self.cache.removed(u64::from(slot.payload_len));
        }
        let replica = self.known(id);
        replica.entries_live.remove(slot.place);
        replica.payload_bytes -= u64::from(slot.payload_len);
    }

    pub(crate) fn set_vote(&mut self, id: ReplicaId, vote: Bytes, ticket: Ticket) {
        let old = self.known(id).vote.replace(Stored::queued(vote, ticket));
        self.live.remove(old.and_then(|old| old.place));
    }

    pub(crate) fn set_committed(&mut self, id: ReplicaId, committed: Bytes, ticket: Ticket) {
        let stored = &mut self.known(id).committed;
        // The record before stays live until this one is written: nobody waits for that, and it may
        // take long.
        let place = stored.as_ref().and_then(|stored| stored.place);
        *stored = Some(Stored { value: committed, ticket, place });
    }

    /// The replica has lost data: everything but its name and the reason is dropped.
    pub(crate) fn set_damage(&mut self, damage: Damage, ticket: Ticket) {
        let id = damage.replica;
        self.truncate(id, 0);
        let replica = self.known(id);
        let old = [
            replica.vote.take().and_then(|stored| stored.place),
            replica.committed.take().and_then(|stored| stored.place),
            replica.purged.take().and_then(|stored| stored.place),
            replica.damage.replace(Stored::queued(damage, ticket)).and_then(|stored| stored.place),
        ];
        for place in old {
            self.live.remove(place);
        }
    }

    /// A record now stands at `place`; what it replaces on disk is dead. A record that something
    /// newer has overtaken in the meantime (another ticket) is dead at once.
    pub(crate) fn placed(&mut self, written: &Written, batch: u64) {
        let Written { replica: id, kind, index, ticket, place } = *written;
        if kind == Kind::Destroy {
            let stored = self.destroyed.get_mut(&id).filter(|stored| stored.ticket == ticket);
            if let Some(stored) = stored {
                self.live.remove(stored.place.replace(place));
                self.live.add(place);
            }
            return;
        }
        let Some(replica) = self.replicas.get_mut(&id) else {
            return;
        };
        let spot = match kind {
            Kind::Entry => replica.slot_mut(index).map(|slot| (slot.ticket, &mut slot.place)),
            Kind::Vote => replica.vote.as_mut().map(|stored| (stored.ticket, &mut stored.place)),
            Kind::Committed => {
                replica.committed.as_mut().map(|stored| (stored.ticket, &mut stored.place))
            }
            Kind::Purge => replica.purged.as_mut().map(|stored| (stored.ticket, &mut stored.place)),
            Kind::Damaged => {
                replica.damage.as_mut().map(|stored| (stored.ticket, &mut stored.place))
            }
            Kind::Create => {
                if replica.created.value == 0 {
                    replica.created.value = batch;
                }
                Some((replica.created.ticket, &mut replica.created.place))
            }
            Kind::Batch | Kind::Truncate | Kind::Destroy | Kind::Forget => None,
        };
        let Some((newest, spot)) = spot else { return };
        if newest != ticket {
            return;
        }
        let old = spot.replace(place);
        self.live.remove(old);
        self.live.add(place);
        if kind == Kind::Entry {
            replica.entries_live.remove(old);
            replica.entries_live.add(place);
        }
    }

    /// Lets go of payloads beyond the cache's budget, oldest first, but never of one that is not
    /// written.
    pub(crate) fn evict(&mut self) {
        self.cache.evict(&mut self.replicas);
    }
}

impl Payloads for BTreeMap<ReplicaId, Replica> {
    fn held(&self, (id, index, ticket): Key) -> Held {
        let slot = self.get(&id).and_then(|replica| replica.slot(index));
        match slot.filter(|slot| slot.ticket == ticket && slot.payload.is_some()) {
            None => Held::Gone,
            Some(slot) if slot.place.is_none() => Held::Pinned,
            Some(slot) => Held::Cached(u64::from(slot.payload_len)),
        }
    }

    fn release(&mut self, (id, index, ticket): Key) {
        let slot = self.get_mut(&id).and_then(|replica| replica.slot_mut(index));
        if let Some(slot) = slot.filter(|slot| slot.ticket == ticket) {
            slot.payload = None;
        }
    }
}

/// A record that was written, and what in the index it stands for.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Written {
    pub(crate) replica: ReplicaId,
    pub(crate) kind: Kind,
    pub(crate) index: u64,
    pub(crate) ticket: Ticket,
    pub(crate) place: Place,
}

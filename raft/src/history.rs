//! Owns how far back a group can be read: the keyspaces' settings, the pins, and the threshold that
//! follows from both. Does not drop anything (compaction does, by what was flushed of this) and does
//! not know where settings come from.
//!
//! **The threshold** of a keyspace is the lowest version that may still be read at: the group clock
//! less the keyspace's history. It never falls. A longer history begins to count where the shorter
//! one had ended (`Kept::floor`), and a pin must lie at or above the threshold when it is taken.
//! It is a function of replicated state alone, so it needs no record of its own.
//!
//! **A pin** holds one keyspace's threshold at or below a version, until a time. Pins are shared:
//! whoever asks for the same keyspace and version takes part in the same pin, which lasts until the
//! latest time that anybody asked for. There is no release, because nobody could tell whose it is:
//! pins are asked for in short pieces, and again while they are needed, and run out by themselves.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};

use crate::wire::{Malformed, Reader};

/// How long superseded versions stay readable in a keyspace of which the group knows no settings:
/// 60 s, twice the longest deadline.
pub const HISTORY_MS: u64 = 60_000;
/// What every keyspace keeps, whatever its settings say, 0 among them: requests under way read at
/// versions that were fixed a moment ago, and a scan pins its version only after that. Twice what a
/// request may hang on a node that has died.
pub const HISTORY_MS_MIN: u64 = 5_000;
/// Keyspaces whose settings a group keeps: as many as a cluster may have.
pub const KEYSPACES_MAX: usize = 1_000;
/// Pins of a group. Each may hold back what compaction would reclaim, and all travel through every
/// apply. Beyond it, new ones are refused.
pub const PINS_MAX: usize = 64;
/// How far beyond its version a pin may reach: what a scan that nobody ends can cost in disk.
pub const PIN_MS_MAX: u64 = 600_000;

/// Bits of a version below the millisecond.
pub(crate) const COUNTER_BITS: u32 = 16;

const FORMAT_VERSION: u8 = 1;

/// A keyspace's settings, as a group takes them over.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The keyspace.
    pub keyspace: u32,
    /// How long superseded versions stay readable, at least.
    pub history_ms: u64,
    /// Counts the changes of the keyspace's settings, from 1: older ones never replace newer ones.
    pub revision: u64,
}

/// A wish to keep a version readable.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The keyspace.
    pub keyspace: u32,
    /// What is to stay readable: this version and every later one.
    pub version: u64,
    /// Until the group clock passes this millisecond.
    pub until_ms: u64,
}

/// What became of a pin.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Pinned {
    /// The version stays readable until then: as asked for, or longer, for somebody else.
    Held {
        /// In milliseconds of the group clock.
        until_ms: u64,
    },
    /// The version may be gone already.
    Gone {
        /// The lowest that is readable.
        oldest: u64,
    },
    /// The group holds as many pins as it may.
    Full,
    /// The time asked for is past, or too far away ([`PIN_MS_MAX`]).
    OutOfRange,
}

/// What a group keeps of a keyspace.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Kept {
    history_ms: u64,
    revision: u64,
    /// The threshold when these settings were taken over: it does not fall below.
    floor: u64,
}

/// See the module. Part of the replicated state.
///
/// Invariants: no keyspace's threshold ever falls; every pin lies at or above its keyspace's
/// threshold, so it is the lowest pin that holds the threshold down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The group clock at the end of the last entry: within an entry nothing moves.
    clock: u64,
    keyspaces: Arc<BTreeMap<u32, Kept>>,
    /// Keyspace and version, and until when.
    pins: BTreeMap<(u32, u64), u64>,
    /// Whether the records in the store are older.
    changed: bool,
}

impl History {
    /// The lowest version that may be read in a keyspace.
    pub fn threshold(&self, keyspace: u32) -> u64 {
        let kept = self.keyspaces.get(&keyspace);
        let history_ms = kept.map_or(HISTORY_MS, |kept| kept.history_ms.max(HISTORY_MS_MIN));
        let reach = physical_ms(self.clock).saturating_sub(history_ms);
        let free = (reach << COUNTER_BITS).max(kept.map_or(0, |kept| kept.floor));
        let mut pins = self.pins.range((keyspace, 0)..=(keyspace, u64::MAX));
        pins.next().map_or(free, |((_, version), _)| free.min(*version))
    }

    /// Of which revision a keyspace's settings are here; 0: none.
    pub fn revision(&self, keyspace: u32) -> u64 {
        self.keyspaces.get(&keyspace).map_or(0, |kept| kept.revision)
    }

    /// The thresholds that differ, or may differ, from that of a keyspace without settings.
    pub(crate) fn thresholds(&self) -> BTreeMap<u32, u64> {
        let pinned = self.pins.keys().map(|(keyspace, _)| *keyspace);
        let keyspaces = self.keyspaces.keys().copied().chain(pinned);
        keyspaces.map(|keyspace| (keyspace, self.threshold(keyspace))).collect()
    }

    /// The threshold of a keyspace without settings and pins.
    pub(crate) fn default_threshold(&self) -> u64 {
        physical_ms(self.clock).saturating_sub(HISTORY_MS) << COUNTER_BITS
    }

    /// Takes settings over, unless newer ones are here, or more keyspaces than there can be.
    pub(crate) fn adopt(&mut self, settings: &Settings) {
        let known = self.keyspaces.contains_key(&settings.keyspace);
        if settings.revision <= self.revision(settings.keyspace)
            || !known && self.keyspaces.len() >= KEYSPACES_MAX
        {
            return;
        }
        let floor = self.threshold(settings.keyspace);
        let Settings { keyspace, history_ms, revision } = *settings;
        let kept = Kept { history_ms, revision, floor };
        Arc::make_mut(&mut self.keyspaces).insert(keyspace, kept);
        self.changed = true;
    }

    /// Takes a pin, or lengthens it.
    pub(crate) fn pin(&mut self, pin: &Pin, now_ms: u64) -> Pinned {
        let Pin { keyspace, version, until_ms } = *pin;
        let oldest = self.threshold(keyspace);
        if version < oldest {
            return Pinned::Gone { oldest };
        }
        let farthest = physical_ms(version).min(now_ms).saturating_add(PIN_MS_MAX);
        if until_ms <= now_ms || until_ms > farthest {
            return Pinned::OutOfRange;
        }
        let full = self.pins.len() >= PINS_MAX;
        let held = match self.pins.get_mut(&(keyspace, version)) {
            Some(held) => held,
            None if full => return Pinned::Full,
            None => self.pins.entry((keyspace, version)).or_default(),
        };
        *held = until_ms.max(*held);
        self.changed = true;
        Pinned::Held { until_ms: *held }
    }

    /// The end of an entry: the clock moves, and what it has passed runs out.
    pub(crate) fn end_entry(&mut self, clock: u64) {
        self.clock = clock;
        let (now_ms, before) = (physical_ms(clock), self.pins.len());
        self.pins.retain(|_, until_ms| *until_ms > now_ms);
        self.changed |= self.pins.len() < before;
    }

    /// From the records, and the group clock of the last entry.
    pub(crate) fn load(clock: u64, keyspaces: Keyspaces, pins: Pins) -> History {
        History { clock, keyspaces: Arc::new(keyspaces.0), pins: pins.0, changed: false }
    }

    /// Has the records written whether they changed or not: into another store.
    pub(crate) fn touch(&mut self) {
        self.changed = true;
    }

    /// The bytes of both records, when those in the store are older.
    pub(crate) fn take_changed(&mut self) -> Option<(BytesMut, BytesMut)> {
        if !std::mem::replace(&mut self.changed, false) {
            return None;
        }
        let begin = |count: usize| {
            let mut out = BytesMut::with_capacity(5 + 28 * count);
            out.put_u8(FORMAT_VERSION);
            out.put_u32(count as u32);
            out
        };
        let mut keyspaces = begin(self.keyspaces.len());
        for (keyspace, kept) in &*self.keyspaces {
            keyspaces.put_u32(*keyspace);
            keyspaces.put_u64(kept.history_ms);
            keyspaces.put_u64(kept.revision);
            keyspaces.put_u64(kept.floor);
        }
        let mut pins = begin(self.pins.len());
        for ((keyspace, version), until_ms) in &self.pins {
            pins.put_u32(*keyspace);
            pins.put_u64(*version);
            pins.put_u64(*until_ms);
        }
        Some((keyspaces, pins))
    }
}

/// The record of the keyspaces.
#[derive(Default)]
pub(crate) struct Keyspaces(BTreeMap<u32, Kept>);

/// The record of the pins.
#[derive(Default)]
pub(crate) struct Pins(BTreeMap<(u32, u64), u64>);

impl Keyspaces {
    pub(crate) fn get(reader: &mut Reader) -> Result<Keyspaces, Malformed> {
        let mut keyspaces = BTreeMap::new();
        for _ in 0..count(reader, 28)? {
            let keyspace = reader.u32()?;
            let (history_ms, revision) = (reader.u64()?, reader.u64()?);
            keyspaces.insert(keyspace, Kept { history_ms, revision, floor: reader.u64()? });
        }
        Ok(Keyspaces(keyspaces))
    }
}

impl Pins {
    pub(crate) fn get(reader: &mut Reader) -> Result<Pins, Malformed> {
        let mut pins = BTreeMap::new();
        for _ in 0..count(reader, 20)? {
            let (keyspace, version) = (reader.u32()?, reader.u64()?);
            pins.insert((keyspace, version), reader.u64()?);
        }
        Ok(Pins(pins))
    }
}

fn count(reader: &mut Reader, item_bytes: usize) -> Result<usize, Malformed> {
    if reader.u8()? != FORMAT_VERSION {
        return Err(Malformed("a record of an unknown format version"));
    }
    reader.count(item_bytes)
}

impl Settings {
    /// What settings take in an entry.
    pub(crate) const BYTES: usize = 20;

    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u32(self.keyspace);
        out.put_u64(self.history_ms);
        out.put_u64(self.revision);
    }

    pub(crate) fn get(reader: &mut Reader) -> Result<Settings, Malformed> {
        let keyspace = reader.u32()?;
        Ok(Settings { keyspace, history_ms: reader.u64()?, revision: reader.u64()? })
    }
}

impl Pin {
    /// What a pin takes in an entry.
    pub(crate) const BYTES: usize = 20;

    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u32(self.keyspace);
        out.put_u64(self.version);
        out.put_u64(self.until_ms);
    }

    pub(crate) fn get(reader: &mut Reader) -> Result<Pin, Malformed> {
        let keyspace = reader.u32()?;
        Ok(Pin { keyspace, version: reader.u64()?, until_ms: reader.u64()? })
    }
}

/// The milliseconds of a version.
pub(crate) fn physical_ms(version: u64) -> u64 {
    version >> COUNTER_BITS
}

//! Owns what a committed command does to a replica's state: a pure function of entry and state.
//! Does not know Raft, when a batch is written, or who waits for the replies.
//!
//! It reads the entry and, through the batch being built, the state; no clock, no settings, no
//! chance. So all replicas come to the same bytes and the same replies, in one pass or replayed
//! after a crash, whatever the cut of entries into batches.
//!
//! A delete-range is judged in `range`, a split in `reshape`, a merge in
//! `merge`.
//!
//! # A request
//!
//! 1. The descriptor must serve its position under its epoch, and a delete-range's fence lie below its
//!    version, else nothing happens and nothing is kept.
//! 2. Its id must be new (see `dedup`); a known one is answered with its first result, term and
//!    index.
//! 3. It gets a version of its own: the entry's stamp, or one above the group clock, whichever is
//!    higher.
//! 4. All its conditions are judged at that version, against the state before the request. If one
//!    fails, nothing changes.
//! 5. Its operations apply in order, each on top of those before. They share the version, so of
//!    several on one key only the last is ever seen: a put followed by an increment leaves one
//!    number.
//! 6. Its result is stored in the same batch, whatever it was from 3 on.
//!
//! An increment takes the key's value as a decimal number, an absent, deleted or expired key as 0,
//! and leaves decimal text without expiry: the time to live belonged to the value that it replaces.

use std::collections::BTreeMap;

use bytes::Bytes;
use coracle_storage::Mutant;
use coracle_storage::state::{self, ArcFilter, MetaName, Overlay, Versioned, View, key};

use crate::command::{
    AbsorbShard, Change, Command, Condition, DecodeError, Request, RequestId, Stamped,
};
use crate::dedup::{Admission, SEQUENCE_OF_MARK};
use crate::descriptor::Descriptor;
use crate::history::{COUNTER_BITS, Pinned, physical_ms};
use crate::kin::Lineage;
use crate::position::Position;
use crate::wire::{Malformed, Reader};

mod merge;
mod range;
mod reshape;
mod result;
mod state_record;

pub use merge::{MergeState, Neighbour};
pub use reshape::{BIRTH, Child, Membership, NotReshaped, Reshaped};
pub use state_record::GroupState;

use result::{Invalid, Met, StoredResult, Verdict};

/// Values of failed conditions that one reply carries, in bytes: as much as a batch may have
/// brought. Behind the first that does not fit, only versions are told.
pub const CURRENT_BYTES_MAX: usize = 4 << 20;
/// When to come back after `Overloaded`: results age by the second.
const RETRY_AFTER_MS: u64 = 1_000;
/// The last millisecond that a version can name.
const LAST_MS: u64 = u64::MAX >> COUNTER_BITS;

const NO_OPERATIONS: &str = "the request has no operations";
const ID_CONTRADICTS: &str = "the request id's lowest unanswered sequence lies above its sequence";
const SEQUENCE_RESERVED: &str = "the request id's sequence is the reserved one";

/// What became of a request, or of a pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It happened, as a whole.
    Applied {
        /// The version of everything that it wrote.
        version: u64,
        /// One per operation.
        results: Vec<OperationResult>,
    },
    /// The delete-range happened. What was live at its version, in the keys from its own up to
    /// `next` and within the arc, is gone.
    RangeDeleted {
        /// The version of the deletions.
        version: u64,
        /// How many there were.
        deleted: u32,
        /// Where the next step begins; empty behind the last key of the keyspace.
        next: Bytes,
        /// The group's arc at that version: the part of the ring that was gone through.
        arc: Option<(u64, u64)>,
    },
    /// More keys live in the range than an atomic delete-range may meet. Nothing changed.
    RangeTooLarge {
        /// How many it may.
        limit: u32,
    },
    /// A condition did not hold; nothing changed.
    ConditionFailed {
        /// One per operation.
        results: Vec<OperationResult>,
    },
    /// The group does not hold the key, or not under the epoch that was named. Nothing was kept:
    /// the same id may be sent elsewhere.
    StaleRoute {
        /// What the group does hold.
        descriptor: Option<Descriptor>,
    },
    /// The id is too old to tell whether it was applied before; this time it was not.
    RetryWindowPassed,
    /// The id's birth lies beyond the bound on clocks. Not applied.
    BirthBeyondClock,
    /// A delete-range names a fence that the group clock has not reached. Not applied, and nothing was
    /// kept.
    FenceBeyondClock,
    /// The memory of request ids is full of young ones. Not applied.
    Overloaded {
        /// When to try again, with the same id.
        retry_after_ms: u64,
    },
    /// The request cannot be done; nothing changed, and no retry will fare better.
    Invalid {
        /// The rule that it breaks.
        why: &'static str,
    },
    /// Of a pin, and never of a request.
    Pinned(Pinned),
    /// Of a split, or of a step of a merge, and never of a request.
    Reshaped(Result<Reshaped, NotReshaped>),
}

/// What became of one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationResult {
    /// Its condition did not hold.
    pub condition_failed: bool,
    /// What stood there when its condition failed; `None` also when nothing did.
    pub current: Option<Current>,
    /// The number that an increment left.
    pub counter: Option<i64>,
}

/// What a failed condition met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// The key's version.
    pub version: u64,
    /// The version from which on it is gone; 0: never.
    pub expires_at: u64,
    /// The key's value; `None` when the reply has no room for it ([`CURRENT_BYTES_MAX`]), or on a
    /// retry so late that the history does not reach back to it.
    pub value: Option<Bytes>,
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// What became of it.
    pub outcome: Outcome,
    /// The term of the entry that decided it; for a duplicate, of the first.
    pub term: u64,
    /// The index of the entry that decided it; for a duplicate, of the first.
    pub index: u64,
    /// A retry of what was decided before.
    pub duplicate: bool,
}

/// Why apply cannot go on. The replica stops where it is: nothing of the entry's batch may be
/// written.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The entry is no command that this program knows.
    #[error("entry {index}: {source}")]
    Decode {
        /// The entry.
        index: u64,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// A record of the state is not what was written.
    #[error("state record {record}: {source}")]
    Record {
        /// Which one.
        record: &'static str,
        /// What is wrong with it.
        source: Malformed,
    },
    /// The state could not be read.
    #[error(transparent)]
    Storage(#[from] coracle_storage::Error),
    /// No version is left above the group clock: an entry's stamp was nonsense.
    #[error("entry {index}: no version is left above the group clock")]
    ClockExhausted {
        /// The entry.
        index: u64,
    },
}

/// What an entry has done, beside its changes.
#[derive(Debug, Default)]
pub struct Applied {
    /// One per request, in order, and one for a pin, a split or a step of a merge; none for entries of
    /// other kinds.
    pub replies: Vec<Reply>,
    /// A group that begins with what this one holds: it must be there, durably, before the entry's
    /// batch is written.
    pub child: Option<Box<Child>>,
    /// A neighbour that is to be taken in: nothing was done yet. Its keys must be in the store before the
    /// entry is applied again, with the neighbour.
    pub wants: Option<Box<AbsorbShard>>,
}

/// Applies one entry: changes go into the overlay's batch and into `state`. `neighbour`: what the entry
/// takes in, once it is there.
pub fn apply(
    overlay: &mut Overlay,
    state: &mut GroupState,
    Position { term, index }: Position,
    entry: &Bytes,
    neighbour: Option<&Neighbour<'_>>,
) -> Result<Applied, ApplyError> {
    let stamped = Stamped::decode(entry).map_err(|source| ApplyError::Decode { index, source })?;
    let at = Entry { stamp: stamped.stamp, term, index };
    let Applied { mut replies, mut child, mut wants } = Applied::default();
    let was_frozen = state.is_frozen();
    if was_frozen && !matches!(stamped.command, Command::Thaw(_)) {
        replies = frozen(state, &at, &stamped.command);
        return Ok(Applied { replies, child, wants });
    }
    match stamped.command {
        Command::Requests(requests) => {
            replies.reserve(requests.len());
            for request in &requests {
                replies.push(apply_request(overlay, state, &at, request)?);
            }
            // Even when nothing got a version: the time by which ids age must never step back, or an
            // id that was forgotten as old would be young again under a leader whose clock is behind.
            state.clock = state.clock.max(at.stamp);
        }
        Command::Advance => {}
        Command::Describe(descriptor) => {
            state.descriptor.get_or_insert(descriptor);
        }
        Command::Settings(settings) => {
            settings.iter().for_each(|settings| state.history.adopt(settings));
            state.clock = state.clock.max(at.stamp);
        }
        Command::Pin(pin) => {
            state.clock = state.clock.max(at.stamp);
            let pinned = state.history.pin(&pin, physical_ms(state.clock));
            replies.push(at.own_reply(Outcome::Pinned(pinned)));
        }
        Command::Split(plan) => {
            let done = reshape::split(state, &at, &plan);
            let done = done.map(|(reshaped, born)| {
                // What the child holds now is foreign here.
                overlay.delete_raw(key::meta(MetaName::FOREIGN_FREE));
                child = Some(Box::new(born));
                reshaped
            });
            replies.push(at.own_reply(Outcome::Reshaped(done)));
        }
        Command::Announce(plan) => {
            let done = merge::announce(state, &plan);
            replies.push(at.own_reply(Outcome::Reshaped(done)));
        }
        Command::Freeze(plan) => {
            let done = merge::freeze(state, &at, &plan);
            replies.push(at.own_reply(Outcome::Reshaped(done)));
        }
        Command::Thaw(plan) | Command::EndMerge(plan) => {
            let done = merge::end(state, &plan);
            replies.push(at.own_reply(Outcome::Reshaped(done)));
        }
        Command::Absorb(plan) => {
            let done = match (merge::may_absorb(state, &plan), neighbour) {
                (Ok(_), None) => {
                    wants = Some(Box::new(plan));
                    return Ok(Applied { replies, child, wants });
                }
                (Ok(_), Some(neighbour)) => merge::absorb(overlay, state, &at, &plan, neighbour)?,
                (Err(refused), _) => Err(refused),
            };
            replies.push(at.own_reply(Outcome::Reshaped(done)));
        }
    }
    if was_frozen && state.is_frozen() {
        // A thaw that was refused: nothing of it, its stamp included, may be left, since whoever takes the
        // group in need not have waited for it.
        return Ok(Applied { replies, child, wants });
    }
    for state in child.iter_mut().map(|child| &mut child.state).chain([state]) {
        state.ceiling = state.ceiling.max(stamped.ceiling).max(state.clock);
        state.history.end_entry(state.clock);
    }
    Ok(Applied { replies, child, wants })
}

/// A hash over what `reader` can show at the group clock; `group` must stand at the reader's
/// position: on all replicas the same at the same index, whatever was compacted. Reads everything.
pub fn state_hash(
    reader: &state::Reader<'_>,
    group: &GroupState,
    arc: Option<&ArcFilter>,
) -> Result<u64, ApplyError> {
    Ok(reader.state_hash(arc, group.clock)?)
}

/// What an entry is answered by a frozen group, on which it does nothing.
fn frozen(state: &mut GroupState, at: &Entry, command: &Command) -> Vec<Reply> {
    let stale = Outcome::StaleRoute { descriptor: state.descriptor.clone() };
    match command {
        Command::Requests(requests) => {
            requests.iter().map(|_| at.own_reply(stale.clone())).collect()
        }
        Command::Pin(_) => vec![at.own_reply(stale)],
        Command::Advance | Command::Describe(_) | Command::Settings(_) => Vec::new(),
        Command::Freeze(plan) => {
            vec![at.own_reply(Outcome::Reshaped(merge::freeze(state, at, plan)))]
        }
        Command::Announce(plan) => {
            vec![at.own_reply(Outcome::Reshaped(merge::announce(state, plan)))]
        }
        Command::Split(_) | Command::Absorb(_) | Command::EndMerge(_) | Command::Thaw(_) => {
            vec![at.own_reply(Outcome::Reshaped(Err(NotReshaped::Merging)))]
        }
    }
}

/// The entry under way.
struct Entry {
    stamp: u64,
    term: u64,
    index: u64,
}

impl Entry {
    fn own_reply(&self, outcome: Outcome) -> Reply {
        Reply { outcome, term: self.term, index: self.index, duplicate: false }
    }
}

fn apply_request(
    overlay: &mut Overlay,
    state: &mut GroupState,
    at: &Entry,
    request: &Request,
) -> Result<Reply, ApplyError> {
    let refused = |outcome| Ok(Reply { outcome, term: at.term, index: at.index, duplicate: false });
    let serves = |descriptor: &Descriptor| {
        descriptor.serves(request.keyspace, request.position, request.epoch)
    };
    if !state.descriptor.as_ref().is_some_and(serves) {
        return refused(Outcome::StaleRoute { descriptor: state.descriptor.clone() });
    }
    if let Some(why) = malformed(request) {
        return refused(Outcome::Invalid { why });
    }
    let above = state.clock.checked_add(1);
    let above = above.ok_or(ApplyError::ClockExhausted { index: at.index })?;
    let version = at.stamp.max(above);
    if range::is_ahead(request, version) {
        return refused(Outcome::FenceBeyondClock);
    }
    // Also the time by which results age: were it the group clock alone, a group too full to take a
    // write would never see it move on within the entry.
    let now_ms = physical_ms(at.stamp.max(state.clock));
    match state.dedup.admit(overlay, &request.id, now_ms)? {
        Admission::New => {}
        Admission::Known(bytes) => {
            let stored = StoredResult::decode(bytes)
                .map_err(|source| ApplyError::Record { record: "result", source })?;
            return reply(overlay, state, request, &stored, true);
        }
        Admission::WindowPassed => return refused(Outcome::RetryWindowPassed),
        Admission::BirthBeyondClock => return refused(Outcome::BirthBeyondClock),
        Admission::Overloaded => {
            return refused(Outcome::Overloaded { retry_after_ms: RETRY_AFTER_MS });
        }
    }
    state.clock = version;
    let verdict = match range::of(request) {
        Some(range) => {
            let descriptor = state.descriptor.as_ref();
            let descriptor = descriptor.expect("only a group with a descriptor serves");
            range::judge(overlay, descriptor, request, range, version)?
        }
        None => judge(overlay, request, version)?,
    };
    let stored = StoredResult { term: at.term, index: at.index, version, verdict };
    state.dedup.remember(overlay, &request.id, stored.encode())?;
    reply(overlay, state, request, &stored, false)
}

/// What is wrong with a request whatever the state: refused before its id counts for anything.
fn malformed(request: &Request) -> Option<&'static str> {
    if request.operations.is_empty() {
        Some(NO_OPERATIONS)
    } else if request.id.sequence == SEQUENCE_OF_MARK {
        Some(SEQUENCE_RESERVED)
    } else if request.id.lowest_unanswered > request.id.sequence {
        Some(ID_CONTRADICTS)
    } else {
        range::malformed(request)
    }
}

/// What a key becomes.
enum Write {
    Value { value: Bytes, expires_at: u64 },
    Tombstone,
}

/// Judges a request at its version and, if it stands, writes it.
fn judge(overlay: &mut Overlay, request: &Request, version: u64) -> Result<Verdict, ApplyError> {
    let keyspace = request.keyspace;
    let mut failed = Vec::new();
    for (at, operation) in (0u32..).zip(&request.operations) {
        let Some(condition) = &operation.condition else {
            continue;
        };
        let found = present(overlay, keyspace, &operation.key, version)?;
        if !holds(condition, found.as_ref()) {
            let met = |found: Versioned| Met {
                version: found.version,
                expires_at: found.expires_at_version,
            };
            failed.push((at, found.map(met)));
        }
    }
    let operations = request.operations.len() as u32;
    if !failed.is_empty() {
        return Ok(Verdict::ConditionFailed { operations, failed });
    }
    let mut writes: BTreeMap<&Bytes, Write> = BTreeMap::new();
    let mut counters = Vec::new();
    for (at, operation) in (0u32..).zip(&request.operations) {
        let write = match &operation.change {
            Change::Put { value, ttl_ms } => {
                Write::Value { value: value.clone(), expires_at: expiry(version, *ttl_ms) }
            }
            Change::Delete => Write::Tombstone,
            Change::Increment { by } => {
                let before = match writes.get(&operation.key) {
                    Some(Write::Value { value, .. }) => Some(value.clone()),
                    Some(Write::Tombstone) => None,
                    None => present(overlay, keyspace, &operation.key, version)?
                        .map(|found| found.value),
                };
                match add(before.as_deref(), *by) {
                    Ok(number) => {
                        counters.push((at, number));
                        Write::Value { value: number.to_string().into(), expires_at: 0 }
                    }
                    Err(invalid) => return Ok(Verdict::Invalid(invalid)),
                }
            }
            Change::Check => continue,
            Change::DeleteRange(_) => unreachable!("a delete-range is judged by itself"),
        };
        writes.insert(&operation.key, write);
    }
    for (key, write) in writes {
        match write {
            Write::Value { value, expires_at } => {
                overlay.put(keyspace, key, version, &value, expires_at);
            }
            Write::Tombstone => overlay.delete(keyspace, key, version),
        }
    }
    Ok(Verdict::Applied { operations, counters })
}

/// What stands at a key for a write of this version. A deleted or expired value is nothing at all,
/// its version included: one replica may have compacted it away, another not yet.
fn present(
    overlay: &Overlay,
    keyspace: u32,
    key: &[u8],
    version: u64,
) -> Result<Option<Versioned>, ApplyError> {
    let found = overlay.get_at(keyspace, key, version)?;
    Ok(found.filter(|found| !found.is_absent_at(version)))
}

fn holds(condition: &Condition, found: Option<&Versioned>) -> bool {
    match (condition, found) {
        _ if Mutant::IgnoresConditions.is_in() => true,
        (Condition::IfAbsent, found) => found.is_none(),
        (Condition::IfVersion(version), Some(found)) => found.version == *version,
        (Condition::IfValue(value), Some(found)) => found.value == *value,
        (Condition::IfVersion(_) | Condition::IfValue(_), None) => false,
    }
}

/// The version at which a value written at `version` is gone; 0: never. It always lies above
/// `version`.
fn expiry(version: u64, ttl_ms: u64) -> u64 {
    if ttl_ms == 0 {
        return 0;
    }
    physical_ms(version).saturating_add(ttl_ms).min(LAST_MS) << COUNTER_BITS
}

fn add(before: Option<&[u8]>, by: i64) -> Result<i64, Invalid> {
    let before = match before {
        None => 0,
        Some(text) => std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse::<i64>().ok())
            .ok_or(Invalid::CounterNotANumber)?,
    };
    before.checked_add(by).ok_or(Invalid::CounterOverflow)
}

/// What was decided of a delete-range under this id, as far as a state knows: what a retry gets. `None`
/// also of an id that is another request's.
pub fn decided_range(state: &dyn View, id: &RequestId) -> Result<Option<Reply>, ApplyError> {
    let Some(bytes) = state.get(&key::result(id.client, id.sequence, id.birth_ms))? else {
        return Ok(None);
    };
    let stored = StoredResult::decode(bytes)
        .map_err(|source| ApplyError::Record { record: "result", source })?;
    let lineage = match state.get(&key::meta(MetaName::LINEAGE))? {
        Some(bytes) => Lineage::get(&mut Reader::new(bytes))
            .map_err(|source| ApplyError::Record { record: "lineage", source })?,
        None => Lineage::default(),
    };
    let outcome = range_outcome(&stored);
    Ok(outcome.map(|outcome| told(&lineage, &stored, outcome, true)))
}

/// What a stored result says of a delete-range, if it is of one.
fn range_outcome(stored: &StoredResult) -> Option<Outcome> {
    match &stored.verdict {
        Verdict::RangeDeleted { deleted, next, arc } => Some(Outcome::RangeDeleted {
            version: stored.version,
            deleted: *deleted,
            next: next.clone(),
            arc: *arc,
        }),
        Verdict::RangeTooLarge { limit } => Some(Outcome::RangeTooLarge { limit: *limit }),
        _ => None,
    }
}

/// A result as its request's answer: the same way for the first time and for every retry.
fn reply(
    overlay: &Overlay,
    state: &GroupState,
    request: &Request,
    stored: &StoredResult,
    duplicate: bool,
) -> Result<Reply, ApplyError> {
    let outcome = match &stored.verdict {
        Verdict::Applied { operations, counters } => {
            let mut results = vec![OperationResult::default(); *operations as usize];
            for (at, number) in counters {
                results[*at as usize].counter = Some(*number);
            }
            Outcome::Applied { version: stored.version, results }
        }
        Verdict::ConditionFailed { operations, failed } => {
            let mut results = vec![OperationResult::default(); *operations as usize];
            // Below the threshold the value may be gone on one replica and not on another.
            let threshold = state.history.threshold(request.keyspace);
            let mut room = if stored.version >= threshold { CURRENT_BYTES_MAX } else { 0 };
            for (at, met) in failed {
                let result = &mut results[*at as usize];
                result.condition_failed = true;
                let Some(Met { version, expires_at }) = *met else { continue };
                let mut value = None;
                if room > 0
                    && let Some(operation) = request.operations.get(*at as usize)
                {
                    let found = present(overlay, request.keyspace, &operation.key, stored.version)?;
                    value = found.filter(|found| found.version == version).map(|found| found.value);
                }
                match value.as_ref().map_or(0, Bytes::len) {
                    len if len <= room => room -= len,
                    _ => (room, value) = (0, None),
                }
                result.current = Some(Current { version, expires_at, value });
            }
            Outcome::ConditionFailed { results }
        }
        Verdict::RangeDeleted { .. } | Verdict::RangeTooLarge { .. } => {
            range_outcome(stored).expect("it is of a delete-range")
        }
        Verdict::Invalid(invalid) => Outcome::Invalid { why: invalid.why() },
    };
    Ok(told(state.kin.lineage(), stored, outcome, duplicate))
}

/// A result with its place: in this group's log, also where it was decided in another's.
fn told(lineage: &Lineage, stored: &StoredResult, outcome: Outcome, duplicate: bool) -> Reply {
    let place = Position { term: stored.term, index: stored.index };
    let Position { term, index } = lineage.place_of(stored.version, place);
    Reply { outcome, term, index, duplicate }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiry_lies_above_its_version_and_never_wraps() {
        let version = (5 << COUNTER_BITS) + 9;
        assert_eq!(expiry(version, 0), 0);
        assert_eq!(expiry(version, 1), 6 << COUNTER_BITS);
        assert_eq!(expiry(version, u64::MAX), LAST_MS << COUNTER_BITS);
    }
}

//! Owns the memory of request ids: results, marks, the floor, and their bounds. Does not judge
//! writes (see `apply`).
//!
//! A request id is new, known, or past its window, and nothing else. *Known*: its result is stored.
//! *Past*: it lies below its client's mark, or was born at or before the floor. *New*: neither; and
//! then it was never applied here. That last sentence is the whole point, and it holds because a
//! result leaves only in one of two ways:
//!
//! - the client said that it needs no answer below a sequence: that *mark* is kept, and everything
//!   below it is refused from then on;
//! - it is evicted, oldest birth first: then the *floor* rises to its birth. A client's mark is
//!   evicted like a result born when the client's newest one was, so the floor takes over from it.
//!
//! Births, marks, floor and the time by which things age (the group clock, raised to the entry's
//! stamp) are all replicated, so every replica forgets the same at the same entry. The constants
//! below are part of that: replicas with different ones part from each other, so changing one takes
//! a new command format version.
//!
//! One index, `ResultAge`, holds both results and marks in the order of birth. A mark stands there
//! at the end of the minute of the client's newest birth, so that a busy client moves it once a
//! minute.

use bytes::{BufMut, Bytes, BytesMut};
use coracle_storage::state::{Key, Kind, Overlay, View, key};
use coracle_storage::{Error, Mutant};

use crate::command::RequestId;
use crate::wire::{Malformed, Reader};

/// How many results a group keeps: one minute of 3,300 writes a second from clients that never say
/// what they need no more (those that do keep hardly any). Beyond it the oldest go; when all are
/// younger than [`AGE_MS_MIN`], new writes are refused as overload.
pub const RESULTS_MAX: u64 = 200_000;
/// What those results may take: an ordinary one takes about 150 bytes, so the number is met first;
/// a thousand failed conditions take 13 KB. Beyond it: as beyond [`RESULTS_MAX`].
pub const RESULT_BYTES_MAX: u64 = 64 << 20;
/// How many clients' marks a group keeps; each is about as large as a result, and a program that
/// makes a client for every write leaves one each. Beyond it: as beyond [`RESULTS_MAX`], for new
/// clients.
pub const MARKS_MAX: u64 = 200_000;
/// Results, their bytes and marks that a group may bring along when it is taken in: all of them go into one
/// batch, over which reads of the other group wait. A quarter of what a group keeps, so that the other one
/// has room for them when it keeps no more than the rest.
pub const MERGE_MEMORY_MAX: Remembered = Remembered {
    results: RESULTS_MAX / 4,
    result_bytes: RESULT_BYTES_MAX / 4,
    marks: MARKS_MAX / 4,
};
/// Results and marks older than this are evicted, needed room or not: twenty times the longest
/// deadline of a write.
pub const AGE_MS_MAX: u64 = 600_000;
/// Results and marks younger than this are never evicted, so that a retry within it never fails for
/// want of memory: twice the longest deadline of a write.
pub const AGE_MS_MIN: u64 = 60_000;
/// How far ahead of the group clock a birth may lie; the bound on the clocks of all servers. Beyond
/// it an id is refused: stored, it would hold the floor's rise far into the future.
pub const BIRTH_AHEAD_MS_MAX: u64 = 500;

/// A sequence that no request may have: in the age index it stands for the client's mark.
pub const SEQUENCE_OF_MARK: u64 = u64::MAX;

/// Records that one search drops or evicts at most; a request makes a few searches. More than the
/// two records that it adds, so that the work always catches up, and few enough that no apply is
/// slow.
const WORK_MAX: usize = 64;
/// How far a mark rises before results below it are looked for: one seek for so many writes.
const DROP_STEP: u64 = 64;
/// How often, in births, the index is searched for what is too old. Records die young (below a
/// mark), and their places in the index stay costly to pass until compaction; so one search passes
/// one second of births, or a 64th of what lies behind, and the next begins where it ended.
const AGE_STEP_MS: u64 = 1_000;
const MINUTE_MS: u64 = 60_000;
/// What a result takes beside its own bytes: two keys of 25 bytes, the index's value, and the
/// store's overhead.
const RESULT_OVERHEAD_BYTES: u64 = 100;

const FORMAT_VERSION: u8 = 1;

/// The bounds as values, so that tests can meet them. Every group uses [`Bounds::DEFAULT`].
#[doc(hidden)]
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub results: u64,
    pub result_bytes: u64,
    pub marks: u64,
}

impl Bounds {
    pub const DEFAULT: Bounds =
        Bounds { results: RESULTS_MAX, result_bytes: RESULT_BYTES_MAX, marks: MARKS_MAX };
}

/// The counters of a group's memory: what stands beside the records themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dedup {
    /// Ids born at or before it, in milliseconds, are refused unless their result is stored.
    pub floor_ms: u64,
    /// Stored results.
    pub results: u64,
    /// What they take, by our reckoning.
    pub result_bytes: u64,
    /// Stored marks.
    pub marks: u64,
    /// Nothing in the age index lies before it; where the next search begins.
    oldest_ms: u64,
    bounds: Bounds,
}

/// How much a group remembers.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Remembered {
    /// Stored results.
    pub results: u64,
    /// What they take.
    pub result_bytes: u64,
    /// Stored marks.
    pub marks: u64,
}

impl Remembered {
    /// Whether it is little enough to come along in a merge.
    pub(crate) fn may_come_along(&self) -> bool {
        self.fits_in(&MERGE_MEMORY_MAX)
    }

    /// Whether there is room for that of a neighbour.
    pub(crate) fn has_room_for_another(&self) -> bool {
        self.fits_in(&Remembered {
            results: RESULTS_MAX - MERGE_MEMORY_MAX.results,
            result_bytes: RESULT_BYTES_MAX - MERGE_MEMORY_MAX.result_bytes,
            marks: MARKS_MAX - MERGE_MEMORY_MAX.marks,
        })
    }

    fn fits_in(&self, most: &Remembered) -> bool {
        self.results <= most.results
            && self.result_bytes <= most.result_bytes
            && self.marks <= most.marks
    }
}

/// What an id is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Never applied here. The caller applies it and calls [`Dedup::remember`], in the same batch.
    New,
    /// Applied before, with this result.
    Known(Bytes),
    /// Whether it was applied before is not known any more; it is not applied now.
    WindowPassed,
    /// Born in a future that no server's clock has reached.
    BirthBeyondClock,
    /// No room, and nothing old enough to make some.
    Overloaded,
}

/// What is known of a client.
///
/// Invariants: no result of the client with a sequence in `..dropped_below` was stored since the
/// mark was made and is still there; none was born after `newest_ms`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Mark {
    lowest_unanswered: u64,
    /// At most `lowest_unanswered`: results below were dropped.
    dropped_below: u64,
    /// The end of the minute of the newest birth: what the floor must reach when the mark goes, and
    /// its place in the age index.
    newest_ms: u64,
}

impl Default for Dedup {
    fn default() -> Dedup {
        Dedup {
            floor_ms: 0,
            results: 0,
            result_bytes: 0,
            marks: 0,
            oldest_ms: 0,
            bounds: Bounds::DEFAULT,
        }
    }
}

impl Dedup {
    /// Replaces the bounds, for tests. They are not stored.
    #[doc(hidden)]
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// How much it is.
    pub(crate) fn remembered(&self) -> Remembered {
        let Dedup { results, result_bytes, marks, .. } = *self;
        Remembered { results, result_bytes, marks }
    }

    /// Judges an id at `now_ms`, and makes room for its result if it is new. What the client says
    /// about its answered requests counts whatever becomes of this one.
    pub(crate) fn admit(
        &mut self,
        overlay: &mut Overlay,
        id: &RequestId,
        now_ms: u64,
    ) -> Result<Admission, Error> {
        let mark = self.raise_mark(overlay, id)?;
        if mark.is_some_and(|mark| id.sequence < mark.lowest_unanswered) {
            return Ok(Admission::WindowPassed);
        }
        if !Mutant::ForgetsRequestIds.is_in()
            && let Some(result) = overlay.get(&key::result(id.client, id.sequence, id.birth_ms))?
        {
            return Ok(Admission::Known(result));
        }
        if id.birth_ms > now_ms.saturating_add(BIRTH_AHEAD_MS_MAX) {
            return Ok(Admission::BirthBeyondClock);
        }
        self.evict_aged(overlay, now_ms)?;
        if self.is_full(mark.is_none()) {
            self.drop_answered(overlay, id.client)?;
        }
        if self.is_full(mark.is_none()) {
            self.evict_before(overlay, now_ms.saturating_sub(AGE_MS_MIN))?;
        }
        // After the eviction, which may have raised it.
        if id.birth_ms <= self.floor_ms {
            return Ok(Admission::WindowPassed);
        }
        if self.is_full(mark.is_none()) {
            return Ok(Admission::Overloaded);
        }
        Ok(Admission::New)
    }

    /// Stores the result of an id that was admitted as new.
    pub(crate) fn remember(
        &mut self,
        overlay: &mut Overlay,
        id: &RequestId,
        result: Bytes,
    ) -> Result<(), Error> {
        assert!(id.sequence != SEQUENCE_OF_MARK, "this sequence stands for a client's mark");
        let newest_ms = end_of_minute(id.birth_ms);
        let mut mark = match self.mark(overlay, id.client)? {
            Some(mark) => mark,
            None => {
                self.index(id.birth_ms);
                self.marks += 1;
                put_mark_age(overlay, newest_ms, id.client);
                let lowest_unanswered = id.lowest_unanswered;
                let mark = Mark { lowest_unanswered, dropped_below: lowest_unanswered, newest_ms };
                put_mark(overlay, id.client, &mark);
                mark
            }
        };
        if newest_ms > mark.newest_ms {
            overlay.delete_raw(key::result_age(mark.newest_ms, id.client, SEQUENCE_OF_MARK));
            put_mark_age(overlay, newest_ms, id.client);
            mark.newest_ms = newest_ms;
            put_mark(overlay, id.client, &mark);
        }
        self.put_result(overlay, (id.client, id.sequence, id.birth_ms), result);
        Ok(())
    }

    /// Whether a new result finds no room, with a mark of its own if `mark` is needed too.
    fn is_full(&self, mark: bool) -> bool {
        self.results >= self.bounds.results
            || self.result_bytes >= self.bounds.result_bytes
            || (mark && self.marks >= self.bounds.marks)
    }

    /// Takes note that the age index gets a record at `birth_ms` or later.
    fn index(&mut self, birth_ms: u64) {
        let empty = self.results == 0 && self.marks == 0;
        self.oldest_ms = if empty { birth_ms } else { self.oldest_ms.min(birth_ms) };
    }

    /// The client's mark, after what this id says about it. Only a stored result makes one: what is
    /// refused leaves nothing behind.
    fn raise_mark(&mut self, overlay: &mut Overlay, id: &RequestId) -> Result<Option<Mark>, Error> {
        let Some(mut mark) = self.mark(overlay, id.client)? else {
            return Ok(None);
        };
        if id.lowest_unanswered <= mark.lowest_unanswered {
            return Ok(Some(mark));
        }
        mark.lowest_unanswered = id.lowest_unanswered;
        if mark.lowest_unanswered - mark.dropped_below >= DROP_STEP {
            self.drop_below_mark(overlay, id.client, &mut mark)?;
        }
        put_mark(overlay, id.client, &mark);
        Ok(Some(mark))
    }

    /// Drops answered results of a client that needs room, however few.
    fn drop_answered(&mut self, overlay: &mut Overlay, client: u64) -> Result<(), Error> {
        let Some(mut mark) = self.mark(overlay, client)? else {
            return Ok(());
        };
        if mark.dropped_below < mark.lowest_unanswered {
            self.drop_below_mark(overlay, client, &mut mark)?;
            put_mark(overlay, client, &mark);
        }
        Ok(())
    }

    /// Drops results below the mark. The floor stays: the mark goes on refusing what they answered.
    fn drop_below_mark(
        &mut self,
        overlay: &mut Overlay,
        client: u64,
        mark: &mut Mark,
    ) -> Result<(), Error> {
        let range = key::result(client, mark.dropped_below, 0).into()
            ..key::result(client, mark.lowest_unanswered, 0).into();
        let found = overlay.range(range, WORK_MAX)?;
        let all = found.len() < WORK_MAX;
        mark.dropped_below = mark.lowest_unanswered;
        for (physical, result) in found {
            let Some(Key::Result { client, sequence, birth }) = Key::decode(&physical) else {
                return Err(damaged("a result's key"));
            };
            overlay.delete_raw(physical);
            overlay.delete_raw(key::result_age(birth, client, sequence));
            self.forget_result(RESULT_OVERHEAD_BYTES + result.len() as u64)?;
            if !all {
                // Others of this sequence, with another birth, may be left.
                mark.dropped_below = sequence;
            }
        }
        Ok(())
    }

    fn forget_result(&mut self, bytes: u64) -> Result<(), Error> {
        let left = self.results.checked_sub(1).zip(self.result_bytes.checked_sub(bytes));
        let (results, result_bytes) = left.ok_or_else(|| damaged("the count of results"))?;
        (self.results, self.result_bytes) = (results, result_bytes);
        Ok(())
    }

    /// Evicts what is older than [`AGE_MS_MAX`], a bounded stretch of the index at a time.
    fn evict_aged(&mut self, overlay: &mut Overlay, now_ms: u64) -> Result<(), Error> {
        let horizon = now_ms.saturating_sub(AGE_MS_MAX);
        let behind = horizon.saturating_sub(self.oldest_ms);
        if behind < AGE_STEP_MS || (self.results == 0 && self.marks == 0) {
            return Ok(());
        }
        self.evict_before(overlay, self.oldest_ms.saturating_add(AGE_STEP_MS.max(behind / 64)))
    }

    /// Evicts the oldest results and marks, up to [`WORK_MAX`], born before `end_ms`.
    fn evict_before(&mut self, overlay: &mut Overlay, end_ms: u64) -> Result<(), Error> {
        if end_ms <= self.oldest_ms {
            return Ok(());
        }
        let range =
            key::result_age(self.oldest_ms, 0, 0).into()..key::result_age(end_ms, 0, 0).into();
        let found = overlay.range(range, WORK_MAX)?;
        let all = found.len() < WORK_MAX;
        self.oldest_ms = end_ms;
        for (physical, age) in found {
            let Some(Key::ResultAge { birth, client, sequence }) = Key::decode(&physical) else {
                return Err(damaged("an age's key"));
            };
            overlay.delete_raw(physical);
            if sequence == SEQUENCE_OF_MARK {
                overlay.delete_raw(key::mark(client));
                self.marks = self.marks.checked_sub(1).ok_or_else(|| damaged("marks"))?;
                self.raise_floor(birth);
            } else {
                overlay.delete_raw(key::result(client, sequence, birth));
                self.forget_result(decode_age(age).map_err(|_| damaged("an age"))?)?;
                let mark = self.mark(overlay, client)?;
                if mark.is_none_or(|mark| sequence >= mark.lowest_unanswered) {
                    self.raise_floor(birth);
                }
            }
            if !all {
                self.oldest_ms = birth;
            }
        }
        Ok(())
    }

    /// Takes in what another group remembers: its results, the higher mark of each client, the higher
    /// floor. What both have counts once. What is then too much and old enough at `now_ms` goes.
    pub(crate) fn unite(
        &mut self,
        overlay: &mut Overlay,
        other: &Dedup,
        view: &dyn View,
        now_ms: u64,
    ) -> Result<(), Error> {
        let mut cursor = view.seek(Kind::Result.range(), false)?;
        while let Some((physical, result)) = cursor.next()? {
            let Some(Key::Result { client, sequence, birth }) = Key::decode(&physical) else {
                return Err(damaged("a result's key"));
            };
            if overlay.get(&physical)?.is_some() {
                continue;
            }
            self.put_result(overlay, (client, sequence, birth), result);
        }
        let mut cursor = view.seek(Kind::Mark.range(), false)?;
        while let Some((physical, bytes)) = cursor.next()? {
            let Some(Key::Mark { client }) = Key::decode(&physical) else {
                return Err(damaged("a mark's key"));
            };
            let theirs = decode_mark(bytes).map_err(|_| damaged("a mark"))?;
            let mark = match self.mark(overlay, client)? {
                None => {
                    self.index(theirs.newest_ms);
                    self.marks += 1;
                    theirs
                }
                Some(ours) => {
                    let old = key::result_age(ours.newest_ms, client, SEQUENCE_OF_MARK);
                    overlay.delete_raw(old);
                    Mark {
                        lowest_unanswered: ours.lowest_unanswered.max(theirs.lowest_unanswered),
                        // Below the lower one nothing is left of either.
                        dropped_below: ours.dropped_below.min(theirs.dropped_below),
                        newest_ms: ours.newest_ms.max(theirs.newest_ms),
                    }
                }
            };
            put_mark_age(overlay, mark.newest_ms, client);
            put_mark(overlay, client, &mark);
        }
        self.raise_floor(other.floor_ms);
        // Else each write would be refused that meets the bounds, until those before it had made room.
        let end_ms = now_ms.saturating_sub(AGE_MS_MIN);
        while self.is_full(true) && self.oldest_ms < end_ms {
            self.evict_before(overlay, end_ms)?;
        }
        Ok(())
    }

    /// Stores a result that is not there yet, with its place in the age index.
    fn put_result(
        &mut self,
        overlay: &mut Overlay,
        (client, sequence, birth_ms): (u64, u64, u64),
        result: Bytes,
    ) {
        let bytes = RESULT_OVERHEAD_BYTES + result.len() as u64;
        self.index(birth_ms);
        self.results += 1;
        self.result_bytes += bytes;
        let mut age = BytesMut::with_capacity(9);
        age.put_u8(FORMAT_VERSION);
        age.put_u64(bytes);
        overlay.put_raw(key::result_age(birth_ms, client, sequence), age.freeze());
        overlay.put_raw(key::result(client, sequence, birth_ms), result);
    }

    fn raise_floor(&mut self, birth_ms: u64) {
        self.floor_ms = self.floor_ms.max(birth_ms);
    }

    fn mark(&self, overlay: &Overlay, client: u64) -> Result<Option<Mark>, Error> {
        let Some(bytes) = overlay.get(&key::mark(client))? else {
            return Ok(None);
        };
        decode_mark(bytes).map(Some).map_err(|_| damaged("a mark"))
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u8(FORMAT_VERSION);
        out.put_u64(self.floor_ms);
        out.put_u64(self.results);
        out.put_u64(self.result_bytes);
        out.put_u64(self.marks);
        out.put_u64(self.oldest_ms);
    }

    pub(crate) fn get(reader: &mut Reader) -> Result<Dedup, Malformed> {
        format(reader)?;
        Ok(Dedup {
            floor_ms: reader.u64()?,
            results: reader.u64()?,
            result_bytes: reader.u64()?,
            marks: reader.u64()?,
            oldest_ms: reader.u64()?,
            bounds: Bounds::DEFAULT,
        })
    }
}

fn end_of_minute(birth_ms: u64) -> u64 {
    (birth_ms / MINUTE_MS * MINUTE_MS).saturating_add(MINUTE_MS - 1)
}

fn put_mark(overlay: &mut Overlay, client: u64, mark: &Mark) {
    let mut out = BytesMut::with_capacity(25);
    out.put_u8(FORMAT_VERSION);
    out.put_u64(mark.lowest_unanswered);
    out.put_u64(mark.dropped_below);
    out.put_u64(mark.newest_ms);
    overlay.put_raw(key::mark(client), out.freeze());
}

fn decode_mark(bytes: Bytes) -> Result<Mark, Malformed> {
    let mut reader = Reader::new(bytes);
    format(&mut reader)?;
    let mark = Mark {
        lowest_unanswered: reader.u64()?,
        dropped_below: reader.u64()?,
        newest_ms: reader.u64()?,
    };
    reader.end()?;
    Ok(mark)
}

fn put_mark_age(overlay: &mut Overlay, newest_ms: u64, client: u64) {
    let age = key::result_age(newest_ms, client, SEQUENCE_OF_MARK);
    overlay.put_raw(age, Bytes::from_static(&[FORMAT_VERSION]));
}

fn decode_age(bytes: Bytes) -> Result<u64, Malformed> {
    let mut reader = Reader::new(bytes);
    format(&mut reader)?;
    let result_bytes = reader.u64()?;
    reader.end()?;
    Ok(result_bytes)
}

fn format(reader: &mut Reader) -> Result<(), Malformed> {
    if reader.u8()? != FORMAT_VERSION {
        return Err(Malformed("a record of an unknown format version"));
    }
    Ok(())
}

fn damaged(what: &str) -> Error {
    Error::corruption("state".as_ref(), 0, format!("{what} does not hold"))
}

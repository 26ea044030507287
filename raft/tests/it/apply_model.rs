//! A model of apply that shares no code with it, and never forgets: it keeps every request that was
//! ever judged, so it knows what *must not* be applied again. When memory is given up is the code's
//! choice within the rules, so there the model takes the code's answer and checks that the rules
//! allow it; everything else it foretells to the byte.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use coracle_raft::apply::{Current, OperationResult, Outcome, Reply};
use coracle_raft::command::{Change, Command, Condition, DeleteRange, NO_FENCE, Request, Stamped};
use coracle_raft::dedup::Bounds;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::history::{Pin, Pinned, Settings};
use coracle_storage::state::Key;

use crate::apply_history::ARC;
use crate::apply_store::{Entry, Logged, Raw};

/// Small enough that every history meets them.
pub(crate) const BOUNDS: Bounds = Bounds { results: 12, result_bytes: 3_000, marks: 3 };
/// Those that the histories name, and one more.
pub(crate) const KEYSPACES: std::ops::Range<u32> = 0..5;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cell {
    pub(crate) version: u64,
    /// `None`: deleted.
    pub(crate) value: Option<Bytes>,
    /// In milliseconds; `None`: never.
    expires_ms: Option<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct Judged {
    term: u64,
    index: u64,
    pub(crate) version: u64,
    verdict: Verdict,
}

#[derive(Clone, Debug)]
enum Verdict {
    Applied(Vec<Option<i64>>),
    /// Per operation: whether it failed, and the cell that it met.
    Failed(Vec<Option<Option<Cell>>>),
    Invalid,
    RangeDeleted(u32, Bytes),
    RangeTooLarge(u32),
}

#[derive(Default)]
pub(crate) struct Model {
    pub(crate) clock: u64,
    pub(crate) ceiling: u64,
    /// By keyspace; it moves at the end of an entry, and never back.
    pub(crate) thresholds: BTreeMap<u32, u64>,
    /// By keyspace: revision, history in milliseconds.
    settings: BTreeMap<u32, (u64, u64)>,
    /// Every pin that was ever taken: keyspace, version, until.
    pins: Vec<(u32, u64, u64)>,
    epoch: u64,
    pub(crate) cells: BTreeMap<Bytes, Vec<Cell>>,
    /// Everything that was ever judged; a duplicate of anything else is a lie.
    pub(crate) judged: BTreeMap<(u64, u64, u64), Judged>,
    /// The highest of what each client ever said that it needs no more.
    lowest: BTreeMap<u64, u64>,
}

impl Model {
    /// Follows one position of the log. `before` are the state's records before it.
    pub(crate) fn follow(&mut self, entry: &Entry, replies: &[Reply], before: &Raw) {
        let (term, index, logged) = entry;
        let Logged::Command(bytes) = logged else {
            self.epoch += 1;
            assert!(replies.is_empty());
            return;
        };
        let stamped = Stamped::decode(bytes).expect("the writer's own bytes");
        match stamped.command {
            Command::Requests(requests) => {
                assert_eq!(replies.len(), requests.len(), "one reply per request");
                for (request, reply) in requests.iter().zip(replies) {
                    self.follow_request(stamped.stamp, (*term, *index), request, reply, before);
                }
                self.clock = self.clock.max(stamped.stamp);
            }
            Command::Advance => assert!(replies.is_empty()),
            // Only the first one counts.
            Command::Describe(descriptor) if self.epoch == 0 => self.epoch = descriptor.epoch,
            Command::Describe(_) => assert!(replies.is_empty()),
            Command::Settings(settings) => {
                assert!(replies.is_empty());
                for Settings { keyspace, history_ms, revision } in settings {
                    let known = self.settings.entry(keyspace).or_insert((0, 60_000));
                    if revision > known.0 {
                        *known = (revision, history_ms);
                    }
                    // One after the other, as if each were an entry without a stamp.
                    self.end_entry();
                }
                self.clock = self.clock.max(stamped.stamp);
            }
            Command::Pin(pin) => {
                self.clock = self.clock.max(stamped.stamp);
                let outcome = Outcome::Pinned(self.pin(&pin));
                let [reply] = replies else { panic!("one reply to a pin") };
                let wanted = Reply { outcome, term: *term, index: *index, duplicate: false };
                assert_eq!(*reply, wanted, "{pin:?}");
            }
            Command::Split(_) => unreachable!("the writer splits nothing: `apply_reshape` does"),
        }
        self.ceiling = self.ceiling.max(stamped.ceiling).max(self.clock);
        self.end_entry();
    }

    fn end_entry(&mut self) {
        for keyspace in KEYSPACES {
            let asked_ms = self.settings.get(&keyspace).map_or(60_000, |(_, history)| *history);
            let reach_ms = (self.clock >> 16).saturating_sub(asked_ms.max(5_000));
            let held = self
                .pins
                .iter()
                .filter(|(of, _, until_ms)| *of == keyspace && *until_ms > self.clock >> 16);
            let wanted = held.map(|(_, version, _)| *version).fold(reach_ms << 16, u64::min);
            let threshold = self.thresholds.entry(keyspace).or_default();
            *threshold = wanted.max(*threshold);
        }
    }

    fn pin(&mut self, pin: &Pin) -> Pinned {
        let (now_ms, oldest) = (self.clock >> 16, self.thresholds[&pin.keyspace]);
        if pin.version < oldest {
            return Pinned::Gone { oldest };
        }
        let too_far = |from_ms: u64| pin.until_ms > from_ms + 600_000;
        if pin.until_ms <= now_ms || too_far(now_ms) || too_far(pin.version >> 16) {
            return Pinned::OutOfRange;
        }
        self.pins.push((pin.keyspace, pin.version, pin.until_ms));
        let same = self.pins.iter().filter(|held| (held.0, held.1) == (pin.keyspace, pin.version));
        Pinned::Held { until_ms: same.map(|held| held.2).max().expect("this one") }
    }

    fn follow_request(
        &mut self,
        stamp: u64,
        at: (u64, u64),
        request: &Request,
        reply: &Reply,
        before: &Raw,
    ) {
        let id = request.id;
        let now_ms = stamp.max(self.clock) >> 16;
        let routed = request.keyspace == 1
            && (ARC.0..ARC.1).contains(&request.position)
            && (request.epoch == 0 || request.epoch == self.epoch);
        if !routed {
            let descriptor = Descriptor { shard: 1, arc: Some(ARC), epoch: self.epoch };
            assert_eq!(reply.outcome, Outcome::StaleRoute { descriptor: Some(descriptor) });
            return;
        }
        if let Change::DeleteRange(range) = &request.operations[0].change {
            let ahead = range.fence != NO_FENCE && range.fence >= stamp.max(self.clock + 1);
            assert_eq!(reply.outcome == Outcome::FenceBeyondClock, ahead, "{request:?}");
            if ahead {
                return;
            }
        }
        let lowest = self.lowest.get(&id.client).copied().unwrap_or_default();
        let lowest = lowest.max(id.lowest_unanswered);
        self.lowest.insert(id.client, lowest);
        let judged = self.judged.get(&(id.client, id.sequence, id.birth_ms)).cloned();
        let young = id.birth_ms >= now_ms.saturating_sub(60_000);
        check_mark(before, request, reply, now_ms);
        match &reply.outcome {
            Outcome::RetryWindowPassed => assert!(
                id.sequence < lowest || !young,
                "a young id above its mark is never past its window: {request:?}"
            ),
            _ if reply.duplicate => {
                let judged = judged.expect("a duplicate of what never was");
                assert_eq!(
                    nameless(reply),
                    self.reply(&judged, request, true),
                    "not the first answer"
                );
            }
            _ => {
                assert!(judged.is_none(), "judged a second time: {request:?} {reply:?}");
                let beyond = id.birth_ms > now_ms + 500;
                assert_eq!(reply.outcome == Outcome::BirthBeyondClock, beyond, "{request:?}");
                if let Outcome::Overloaded { .. } = reply.outcome {
                    assert!(self.may_be_full(now_ms), "overloaded with room left");
                } else if !beyond {
                    let judged = self.judge(stamp, at, request);
                    assert_eq!(nameless(reply), self.reply(&judged, request, false));
                    self.judged.insert((id.client, id.sequence, id.birth_ms), judged);
                }
            }
        }
    }

    /// Whether results, their bytes or marks that are too young to go may fill the bounds.
    fn may_be_full(&self, now_ms: u64) -> bool {
        let since = |age_ms| {
            let ids = self.judged.keys();
            ids.filter(move |(_, _, birth_ms)| birth_ms + age_ms >= now_ms)
        };
        // A mark is as young as the minute of its newest birth.
        let clients: BTreeSet<_> = since(120_000).map(|id| id.0).collect();
        // The largest results of these histories take a quarter of a kilobyte.
        since(60_000).count() as u64 >= BOUNDS.results.min(BOUNDS.result_bytes / 250)
            || clients.len() as u64 >= BOUNDS.marks
    }

    pub(crate) fn at(&self, key: &Bytes, version: u64) -> Option<Cell> {
        let cells = self.cells.get(key)?;
        let cell = cells.iter().rev().find(|cell| cell.version <= version)?;
        let expired = cell.expires_ms.is_some_and(|expires_ms| version >> 16 >= expires_ms);
        (cell.value.is_some() && !expired).then(|| cell.clone())
    }

    fn judge(&mut self, stamp: u64, (term, index): (u64, u64), request: &Request) -> Judged {
        let version = stamp.max(self.clock + 1);
        self.clock = version;
        let verdict = self.verdict(version, request);
        Judged { term, index, version, verdict }
    }

    fn delete_range(&mut self, version: u64, start: &Bytes, range: &DeleteRange) -> Verdict {
        let own = |key: &Bytes| {
            let position = range.owned.map(|owned| {
                let entity = owned.rule.entity(key);
                coracle_proto::ring::position(owned.hash_seed, 1, entity).0
            });
            position.is_none_or(|position| (ARC.0..ARC.1).contains(&position))
        };
        let inside = |key: &Bytes| key >= start && (range.end.is_empty() || *key < range.end);
        let mut live: Vec<_> =
            self.cells.keys().filter(|key| inside(key) && own(key)).cloned().collect();
        live.retain(|key| self.at(key, version).is_some_and(|cell| cell.version <= range.fence));
        let limit = range.limit as usize;
        if range.whole && live.len() > limit {
            return Verdict::RangeTooLarge(range.limit);
        }
        let next = match live.get(limit - 1).filter(|_| !range.whole) {
            Some(last) => [last, &b"\0"[..]].concat().into(),
            None => range.end.clone(),
        };
        live.truncate(limit);
        for key in &live {
            let cells = self.cells.get_mut(key).expect("a live key");
            cells.push(Cell { version, value: None, expires_ms: None });
        }
        Verdict::RangeDeleted(live.len() as u32, next)
    }

    fn verdict(&mut self, version: u64, request: &Request) -> Verdict {
        if let Change::DeleteRange(range) = &request.operations[0].change {
            return self.delete_range(version, &request.operations[0].key, range);
        }
        let met: Vec<_> = request
            .operations
            .iter()
            .map(|operation| {
                let cell = self.at(&operation.key, version);
                let holds = match (&operation.condition, &cell) {
                    (None, _) => true,
                    (Some(Condition::IfAbsent), cell) => cell.is_none(),
                    (Some(Condition::IfVersion(version)), Some(cell)) => cell.version == *version,
                    (Some(Condition::IfValue(value)), Some(cell)) => {
                        cell.value.as_ref() == Some(value)
                    }
                    (Some(_), None) => false,
                };
                (!holds).then_some(cell)
            })
            .collect();
        if met.iter().any(Option::is_some) {
            return Verdict::Failed(met);
        }
        let mut after = self.cells.clone();
        let mut counters = Vec::new();
        for operation in &request.operations {
            let cells = after.entry(operation.key.clone()).or_default();
            let mut counter = None;
            let (value, ttl_ms) = match &operation.change {
                Change::Check => {
                    counters.push(None);
                    continue;
                }
                Change::Put { value, ttl_ms } => (Some(value.clone()), *ttl_ms),
                Change::Delete => (None, 0),
                Change::DeleteRange(_) => unreachable!("alone in its request"),
                Change::Increment { by } => {
                    let live = cells.last().filter(|cell| {
                        cell.expires_ms.is_none_or(|expires_ms| version >> 16 < expires_ms)
                    });
                    let before = live.and_then(|cell| cell.value.clone());
                    let text = before.map_or("0".to_owned(), |value| {
                        String::from_utf8(value.to_vec()).expect("the histories write text")
                    });
                    let Some(sum) = text.parse::<i64>().ok().and_then(|n| n.checked_add(*by))
                    else {
                        return Verdict::Invalid;
                    };
                    counter = Some(sum);
                    (Some(Bytes::from(sum.to_string())), 0)
                }
            };
            counters.push(counter);
            let last_ms = (1 << 48) - 1;
            let expires_ms =
                (ttl_ms != 0).then(|| (version >> 16).saturating_add(ttl_ms).min(last_ms));
            cells.retain(|cell| cell.version < version);
            cells.push(Cell { version, value, expires_ms });
        }
        self.cells = after;
        Verdict::Applied(counters)
    }

    fn reply(&self, judged: &Judged, request: &Request, duplicate: bool) -> Reply {
        let outcome = match &judged.verdict {
            Verdict::Applied(counters) => Outcome::Applied {
                version: judged.version,
                results: counters
                    .iter()
                    .map(|counter| OperationResult {
                        counter: *counter,
                        ..OperationResult::default()
                    })
                    .collect(),
            },
            Verdict::Failed(met) => {
                assert_eq!(met.len(), request.operations.len());
                let reachable = judged.version >= self.thresholds[&request.keyspace];
                let results = met.iter().map(|met| OperationResult {
                    condition_failed: met.is_some(),
                    current: met.clone().flatten().map(|cell| Current {
                        version: cell.version,
                        expires_at: cell.expires_ms.map_or(0, |ms| ms << 16),
                        value: if reachable { cell.value } else { None },
                    }),
                    counter: None,
                });
                Outcome::ConditionFailed { results: results.collect() }
            }
            Verdict::Invalid => Outcome::Invalid { why: "" },
            Verdict::RangeDeleted(deleted, next) => Outcome::RangeDeleted {
                version: judged.version,
                deleted: *deleted,
                next: next.clone(),
                arc: Some(ARC),
            },
            Verdict::RangeTooLarge(limit) => Outcome::RangeTooLarge { limit: *limit },
        };
        Reply { outcome, term: judged.term, index: judged.index, duplicate }
    }
}

/// A request below its client's mark is refused. A mark that is old enough to be evicted by the
/// entry itself proves nothing.
fn check_mark(before: &Raw, request: &Request, reply: &Reply, now_ms: u64) {
    let Some(mark) = mark(before, request.id.client) else {
        return;
    };
    let below = request.id.sequence < mark.lowest && mark.newest_ms + 60_000 >= now_ms;
    assert!(
        !below || reply.outcome == Outcome::RetryWindowPassed,
        "let in below its client's mark: {request:?}"
    );
}

/// The reply without the words of a refusal.
fn nameless(reply: &Reply) -> Reply {
    match &reply.outcome {
        Outcome::Invalid { .. } => Reply { outcome: Outcome::Invalid { why: "" }, ..reply.clone() },
        _ => reply.clone(),
    }
}

pub(crate) struct Mark {
    pub(crate) lowest: u64,
    pub(crate) newest_ms: u64,
}

pub(crate) fn number(bytes: &Bytes, at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(crate) fn mark(raw: &Raw, client: u64) -> Option<Mark> {
    let bytes = raw.get(&Key::Mark { client }.encode())?;
    Some(Mark { lowest: number(bytes, 1), newest_ms: number(bytes, 17) })
}

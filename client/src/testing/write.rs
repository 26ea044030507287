//! Owns what a write does to a fake cluster: the memory of request ids, the judgement of conditions,
//! the change. The rules are those of the servers' state machine, in the same order.

use std::collections::BTreeMap;

use bytes::Bytes;
use coracle_proto::limits;
use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::shard_map::{Keyspace, KeyspaceId};
use coracle_proto::v1;
use coracle_proto::v1::condition;
use coracle_proto::v1::operation::Kind;
use coracle_proto::v1::pipeline_response::Result as Answer;
use tokio::time::Instant;

use super::model::{Held, Model, Place, Step, ms_of, version_at};
use super::range::Deleted;
use crate::topology::NodeId;

/// How long results are kept: as in the servers. Beyond: `RETRY_WINDOW_PASSED`.
const RESULT_AGE_MS: u64 = 600_000;

/// How many results a shard keeps: as in the servers. Beyond: `OVERLOADED`.
const RESULTS_MAX: usize = 200_000;

/// When to come back after that.
const RETRY_AFTER_MS: u64 = 1_000;

/// The last millisecond that a version can name.
const LAST_MS: u64 = u64::MAX >> 16;

/// A write, whichever of the three requests it came in.
pub(super) struct Write {
    keyspace: String,
    operations: Vec<v1::Operation>,
    id: Option<v1::RequestId>,
    route: Option<v1::Route>,
    answer: AnswerAs,
}

#[derive(Clone, Copy)]
enum AnswerAs {
    Put,
    Delete,
    Write,
}

/// What a shard remembers of the writes that it was sent.
#[derive(Clone, Default)]
pub(super) struct Memory {
    /// By client, sequence and birth.
    results: BTreeMap<(u64, u64, u64), Stored>,
    /// By client: below this sequence nothing is asked for any more.
    marks: BTreeMap<u64, u64>,
    /// Ids born at or before it are refused unless their result is stored.
    floor_ms: u64,
}

/// What a write did, as its retries are told too.
#[derive(Clone)]
pub(super) struct Stored {
    pub(super) step: Step,
    pub(super) version: u64,
    pub(super) verdict: Verdict,
}

#[derive(Clone)]
pub(super) enum Verdict {
    Applied(Vec<v1::OperationResult>),
    ConditionFailed(Vec<v1::OperationResult>),
    Invalid(&'static str),
    /// Of a delete-range.
    RangeDeleted(Deleted),
    /// Of an atomic delete-range over more keys than may be.
    RangeTooLarge,
}

impl Memory {
    /// What two shards remember, as one.
    pub(super) fn unite(&mut self, other: Memory) {
        self.results.extend(other.results);
        for (client, mark) in other.marks {
            let known = self.marks.entry(client).or_default();
            *known = mark.max(*known);
        }
        self.floor_ms = self.floor_ms.max(other.floor_ms);
    }
}

impl Write {
    /// From a put, its limits checked.
    pub(super) fn put(request: v1::PutRequest) -> Result<Write, Fault> {
        limits::check_put(&request)?;
        let put = v1::PutOperation { value: request.value, ttl_ms: request.ttl_ms };
        let (key, condition) = (request.key, request.condition);
        Ok(Write {
            keyspace: request.keyspace,
            operations: vec![v1::Operation { key, condition, kind: Some(Kind::Put(put)) }],
            id: request.request_id,
            route: request.route,
            answer: AnswerAs::Put,
        })
    }

    /// From a delete, its limits checked.
    pub(super) fn delete(request: v1::DeleteRequest) -> Result<Write, Fault> {
        limits::check_delete(&request)?;
        let kind = Some(Kind::Delete(v1::DeleteOperation {}));
        let (key, condition) = (request.key, request.condition);
        Ok(Write {
            keyspace: request.keyspace,
            operations: vec![v1::Operation { key, condition, kind }],
            id: request.request_id,
            route: request.route,
            answer: AnswerAs::Delete,
        })
    }

    /// From a batch, its limits checked.
    pub(super) fn batch(request: v1::WriteRequest) -> Result<Write, Fault> {
        limits::check_batch(&request.operations)?;
        Ok(Write {
            keyspace: request.keyspace,
            operations: request.operations,
            id: request.request_id,
            route: request.route,
            answer: AnswerAs::Write,
        })
    }
}

impl Model {
    /// Carries out a write that came to `asked`.
    pub(super) fn write(&mut self, asked: NodeId, write: &Write) -> Result<Answer, Fault> {
        let keyspace = self.keyspace(&write.keyspace)?;
        one_entity(keyspace, &write.operations)?;
        write.operations.iter().try_for_each(check_operation)?;
        let first = &write.operations[0].key;
        let place = self.place(&write.keyspace, first, write.route.as_ref())?;
        let node = self.leader_from(asked, place.shard)?;
        let stored = self.decide(place, write.id.as_ref(), |model, version| {
            model.judge(place.keyspace, &write.operations, version)
        })?;
        self.answer(place, node, write.answer, &stored)
    }

    /// What a write did: now, as `judge` says, or when it first came.
    pub(super) fn decide(
        &mut self,
        place: Place,
        id: Option<&v1::RequestId>,
        judge: impl FnOnce(&mut Model, u64) -> Verdict,
    ) -> Result<Stored, Fault> {
        let now_ms = self.now_ms();
        let group = self.groups.get_mut(&place.shard).expect("a place is of a shard");
        if let Some(id) = id {
            match group.memory.admit(id, now_ms) {
                Ok(None) => {}
                Ok(Some(stored)) => {
                    self.duplicates += 1;
                    return Ok(stored);
                }
                Err(fault) => {
                    let fault = fault.with(metadata::SHARD, place.shard);
                    return Err(fault.with(metadata::SERVER_TIME_MS, now_ms));
                }
            }
        }
        let version = version_at(now_ms).max(group.clock + 1);
        group.clock = version;
        let term = self.map.shard(place.shard).map_or(0, |shard| shard.leader_term);
        let step = group.step(Instant::now(), term, version);
        let verdict = judge(self, version);
        let stored = Stored { step, version, verdict };
        if let Some(id) = id {
            let group = self.groups.get_mut(&place.shard).expect("it was there before");
            group.memory.remember(id, stored.clone());
        }
        Ok(stored)
    }

    /// Judges all conditions against the state before the write, and if they hold, writes.
    fn judge(
        &mut self,
        keyspace: KeyspaceId,
        operations: &[v1::Operation],
        version: u64,
    ) -> Verdict {
        let present = |model: &Model, key: &Bytes| -> Option<Held> {
            let held = model.held(keyspace, key, version)?;
            (!held.is_absent_at(version)).then(|| held.clone())
        };
        let mut results = vec![v1::OperationResult::default(); operations.len()];
        for (operation, result) in operations.iter().zip(&mut results) {
            let current = present(self, &operation.key);
            if !holds(operation.condition.as_ref(), current.as_ref()) {
                result.condition_failed = true;
                result.current = current.map(|held| held.entry());
            }
        }
        if results.iter().any(|result| result.condition_failed) {
            leave_out(&mut results);
            return Verdict::ConditionFailed(results);
        }
        let mut writes: BTreeMap<Bytes, Held> = BTreeMap::new();
        for (operation, result) in operations.iter().zip(&mut results) {
            let held = match operation.kind.as_ref() {
                Some(Kind::Put(put)) => Held {
                    version,
                    value: Some(put.value.clone()),
                    expires_at: expiry(version, put.ttl_ms),
                },
                Some(Kind::Delete(_)) => Held { version, value: None, expires_at: 0 },
                Some(Kind::Increment(increment)) => {
                    let before = match writes.get(&operation.key) {
                        Some(held) => held.value.clone(),
                        None => present(self, &operation.key).and_then(|held| held.value),
                    };
                    match add(before.as_deref(), increment.by) {
                        Ok(counter) => {
                            result.counter = counter;
                            let value = Some(counter.to_string().into());
                            Held { version, value, expires_at: 0 }
                        }
                        Err(why) => return Verdict::Invalid(why),
                    }
                }
                Some(Kind::Check(_)) | None => continue,
            };
            writes.insert(operation.key.clone(), held);
        }
        self.put_all(keyspace, writes);
        Verdict::Applied(results)
    }

    fn answer(
        &self,
        place: Place,
        node: NodeId,
        answer: AnswerAs,
        stored: &Stored,
    ) -> Result<Answer, Fault> {
        let served = Some(self.served(place, stored.step, node));
        let (applied, version, results) = match &stored.verdict {
            Verdict::Applied(results) => (true, stored.version, results.clone()),
            Verdict::ConditionFailed(results) => (false, 0, results.clone()),
            Verdict::Invalid(why) => return Err(Fault::new(Reason::InvalidArgument, *why)),
            Verdict::RangeDeleted(_) | Verdict::RangeTooLarge => return Err(another_writes_id()),
        };
        let first = || results.first().and_then(|result| result.current.clone());
        Ok(match answer {
            AnswerAs::Put => {
                Answer::Put(v1::PutResponse { applied, version, current: first(), served })
            }
            AnswerAs::Delete => {
                Answer::Delete(v1::DeleteResponse { applied, version, current: first(), served })
            }
            AnswerAs::Write => {
                Answer::Write(v1::WriteResponse { applied, version, results, served })
            }
        })
    }
}

impl Memory {
    /// Nothing: the id is new. Else its first result, or why it cannot be served.
    fn admit(&mut self, id: &v1::RequestId, now_ms: u64) -> Result<Option<Stored>, Fault> {
        if id.lowest_unanswered > id.sequence {
            let message = "the request id's lowest unanswered sequence lies above its sequence";
            return Err(Fault::new(Reason::InvalidArgument, message));
        }
        let passed = || {
            let message = "the request id is too old to tell whether it was applied before";
            Err(Fault::new(Reason::RetryWindowPassed, message))
        };
        if let Some(mark) = self.marks.get_mut(&id.client) {
            *mark = id.lowest_unanswered.max(*mark);
            let mark = *mark;
            if id.sequence < mark {
                return passed();
            }
            let answered = (id.client, 0, 0)..(id.client, mark, 0);
            let answered: Vec<_> = self.results.range(answered).map(|(id, _)| *id).collect();
            answered.iter().for_each(|id| drop(self.results.remove(id)));
        }
        if let Some(stored) = self.results.get(&(id.client, id.sequence, id.birth)) {
            return Ok(Some(stored.clone()));
        }
        if id.birth > now_ms + limits::CLOCK_BOUND.as_millis() as u64 {
            let message = "the request id's birth lies ahead of the shard's clock";
            return Err(Fault::new(Reason::ClockOutOfBound, message));
        }
        self.forget_before(now_ms.saturating_sub(RESULT_AGE_MS));
        if id.birth <= self.floor_ms {
            return passed();
        }
        if self.results.len() >= RESULTS_MAX {
            let message = "the shard's memory of request ids is full of young ones";
            let fault = Fault::new(Reason::Overloaded, message);
            return Err(fault.with_retry_after(std::time::Duration::from_millis(RETRY_AFTER_MS)));
        }
        Ok(None)
    }

    fn remember(&mut self, id: &v1::RequestId, stored: Stored) {
        self.marks.entry(id.client).or_insert(id.lowest_unanswered);
        self.results.insert((id.client, id.sequence, id.birth), stored);
    }

    /// Forgets what is too old, and refuses from then on whatever was born no later.
    fn forget_before(&mut self, horizon_ms: u64) {
        let mut floor_ms = self.floor_ms;
        self.results.retain(|(_, _, birth), _| {
            let young = *birth >= horizon_ms;
            if !young {
                floor_ms = floor_ms.max(*birth);
            }
            young
        });
        self.floor_ms = floor_ms;
    }
}

/// The id was that of a delete-range, or of a write where that asks now.
pub(super) fn another_writes_id() -> Fault {
    let message = "the request id is that of another write, which was judged before";
    Fault::invalid("request_id", message)
}

/// What no state makes right.
fn check_operation(operation: &v1::Operation) -> Result<(), Fault> {
    use condition::Kind::IfAbsent;
    if operation.kind.is_none() {
        let message = "an operation of no kind, or of one that this version does not know";
        return Err(Fault::invalid("operations.kind", message));
    }
    match operation.condition.as_ref().map(|condition| &condition.kind) {
        Some(Some(IfAbsent(false))) => {
            Err(Fault::invalid("condition.if_absent", "if_absent is true or not there at all"))
        }
        Some(None) => {
            let message = "a condition of no kind, or of one that this version does not know";
            Err(Fault::invalid("condition.kind", message))
        }
        _ => Ok(()),
    }
}

/// The operations of an atomic batch are of one entity.
fn one_entity(keyspace: &Keyspace, operations: &[v1::Operation]) -> Result<(), Fault> {
    let Some(first) = operations.first() else { return Ok(()) };
    let entity = keyspace.rule.entity(&first.key);
    let other = operations.iter().find(|other| keyspace.rule.entity(&other.key) != entity);
    let Some(other) = other else { return Ok(()) };
    let message = format!(
        "the keys \"{}\" and \"{}\" are of different entities of keyspace {}",
        first.key.escape_ascii(),
        other.key.escape_ascii(),
        keyspace.name
    );
    Err(Fault::new(Reason::CrossEntity, message)
        .with_outcome(Outcome::NotApplied)
        .with(metadata::KEYSPACE, &keyspace.name)
        .with(metadata::FIELD, "operations"))
}

fn holds(condition: Option<&v1::Condition>, current: Option<&Held>) -> bool {
    match condition.and_then(|condition| condition.kind.as_ref()) {
        None => true,
        Some(condition::Kind::IfAbsent(_)) => current.is_none(),
        Some(condition::Kind::IfVersion(version)) => {
            current.is_some_and(|held| held.version == *version)
        }
        Some(condition::Kind::IfValue(value)) => {
            current.is_some_and(|held| held.value.as_ref() == Some(value))
        }
    }
}

/// Beyond the limit on their bytes, current values are left out, and that is said.
fn leave_out(results: &mut [v1::OperationResult]) {
    let mut room = limits::BATCH_CURRENT_BYTES_MAX;
    for result in results {
        let Some(current) = &mut result.current else { continue };
        match room.checked_sub(current.value.len()) {
            Some(left) => room = left,
            None => (current.value, result.value_left_out) = (Bytes::new(), true),
        }
    }
}

/// The version at which a value written at `version` is gone; 0 for never.
fn expiry(version: u64, ttl_ms: u64) -> u64 {
    match ttl_ms {
        0 => 0,
        ttl_ms => version_at(ms_of(version).saturating_add(ttl_ms).min(LAST_MS)),
    }
}

fn add(before: Option<&[u8]>, by: i64) -> Result<i64, &'static str> {
    let before = match before {
        None => 0,
        Some(text) => std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse::<i64>().ok())
            .ok_or("the value to increment is no decimal number of 64 bits")?,
    };
    before.checked_add(by).ok_or("the counter would overflow")
}

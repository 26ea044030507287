//! The fast judge: the order that the servers say is verified, not searched for. Owns the rules for
//! registers with conditions. Does not check what it believes, that a version is where it says: a
//! wrong order that nobody can observe passes.
//!
//! Every answer carries the version that it wrote or saw, and the entry of its shard's log. That is
//! a claim about the order of all operations on a key, and the claim must explain every answer:
//! versions rise with the log; each read returns the newest write up to the entry that it names;
//! each condition holds against the version right before; and no operation stands in the order
//! before one that had completed when it began. A write of unknown outcome takes the version under
//! which somebody saw its value; where nobody did, it may or may not have happened. The work is
//! sorting: O(n log n).
//!
//! A key changes hands when its shard is split or merged. Entries of two shards have no order that
//! answers tell, so they are not compared; versions are, and they rise all the same.

use std::collections::{BTreeMap, BTreeSet};

use super::Violation;
use crate::history::{Action, Answer, History, Operation, Outcome, Position, Seen};

const NEVER_WRITTEN: &str = "a read returns a value that was written";
const REFUSED_IS_SEEN: &str = "a write that was refused is never seen";
const APPLIED_ONCE: &str = "a write is applied once";
const RISES: &str = "versions rise with the log";
const REAL_TIME: &str = "no operation stands before one that had completed when it began";
const NEWEST: &str = "a read returns the newest write up to its place in the log";
const FUTURE: &str = "no read returns what was not yet written";
const CONDITION: &str = "a condition is judged against the version right before";
const SESSION: &str = "a session read is not behind what its client has seen";
const BOUND: &str = "a bounded read lacks nothing older than its bound";
const AT: &str = "a read at a version returns the newest write up to it";
const ABSENT: &str = "an absent key was deleted, or never written";

/// What a history of registers breaks; nothing, if all is well. Violations come by key.
pub fn check(history: &History) -> Vec<Violation> {
    let mut keys: BTreeMap<String, Vec<Operation>> = BTreeMap::new();
    for operation in history.operations() {
        keys.entry(operation.key.clone()).or_default().push(operation);
    }
    let mut found = Vec::new();
    for (key, operations) in keys {
        found.extend(Register::of(&key, &operations).check());
    }
    found.extend(check_sessions(&history.operations()));
    found
}

/// A client does one thing after the other: what it was told of a shard's log before a session read
/// must have been there.
fn check_sessions(operations: &[Operation]) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut seen: BTreeMap<(u32, u64), (u64, u64)> = BTreeMap::new();
    // By client and key, wherever the key was then.
    let mut versions: BTreeMap<(u32, &str), (u64, u64)> = BTreeMap::new();
    for operation in operations {
        let (at, version) = match &operation.outcome {
            Outcome::Ok(Answer::Read { at, seen } | Answer::Mismatch { at, seen }) => {
                (at, seen.as_ref().map(|seen| seen.version))
            }
            Outcome::Ok(Answer::Written { at, version }) => (at, Some(*version)),
            _ => continue,
        };
        if let Some(version) = version {
            let known = versions.entry((operation.client, &operation.key)).or_default();
            if operation.action == Action::SessionGet && version < known.0 {
                let why = format!("it saw version {version}, {} had been seen", known.0);
                let (key, calls) = (operation.key.clone(), vec![known.1, operation.call]);
                found.push(Violation { rule: SESSION, key, why, calls });
            }
            *known = (*known).max((version, operation.call));
        }
        let newest = seen.entry((operation.client, at.shard)).or_insert((0, operation.call));
        let (index, by) = *newest;
        if operation.action == Action::SessionGet && at.index < index {
            let why = format!(
                "it was read up to entry {} of shard {}, entry {index} had been seen",
                at.index, at.shard
            );
            let key = operation.key.clone();
            found.push(Violation { rule: SESSION, key, why, calls: vec![by, operation.call] });
        }
        *newest = (*newest).max((at.index, operation.call));
    }
    found
}

/// A write, as far as it is known.
#[derive(Clone, Debug)]
struct Write<'a> {
    operation: &'a Operation,
    /// Of an acknowledged write: what it was told. Of an unknown one: where it was seen.
    version: Option<u64>,
    /// Of an acknowledged write: its entry.
    exact: Option<Position>,
    /// By shard: its entry, or where it was only seen, the first by which it stood.
    stands: BTreeMap<u64, u64>,
}

impl Write<'_> {
    fn is_delete(&self) -> bool {
        self.operation.action.is_delete()
    }

    /// Somebody saw it there.
    fn seen_at(&mut self, at: Position) {
        if self.exact.is_none_or(|exact| exact.shard != at.shard) {
            let index = self.stands.entry(at.shard).or_insert(at.index);
            *index = at.index.min(*index);
        }
    }

    /// Where it stands in a shard's log, at the latest.
    fn stands_in(&self, shard: u64) -> u64 {
        self.stands.get(&shard).copied().unwrap_or(u64::MAX)
    }
}

/// An answer that shows the key's state at a place in the log.
struct Look<'a> {
    operation: &'a Operation,
    seen: Option<&'a Seen>,
    at: Position,
    /// All of the log up to here was there. A condition is judged in the middle of its entry: what
    /// else that entry holds came before it or after it.
    upto: u64,
}

impl<'a> Look<'a> {
    fn of(operation: &'a Operation) -> Option<Look<'a>> {
        if let Action::GetAt { .. } = operation.action {
            return None;
        }
        Look::at_any(operation)
    }

    /// Also one that shows the state at a version: its place in the log says nothing of that.
    fn at_any(operation: &'a Operation) -> Option<Look<'a>> {
        let (seen, at, upto) = match &operation.outcome {
            Outcome::Ok(Answer::Read { seen, at }) => (seen, at, at.index),
            Outcome::Ok(Answer::Mismatch { seen, at }) => (seen, at, at.index.saturating_sub(1)),
            _ => return None,
        };
        Some(Look { operation, seen: seen.as_ref(), at: *at, upto })
    }
}

/// Where in the order of versions a completed operation stands.
#[derive(Clone, Copy)]
struct Standing {
    least: u64,
    most: u64,
    is_write: bool,
}

struct Register<'a> {
    key: &'a str,
    operations: &'a [Operation],
    looks: Vec<Look<'a>>,
    /// By version.
    writes: Vec<Write<'a>>,
    /// By shard: the least index of each write and those behind it: rises, so that it can be
    /// searched.
    least_index: BTreeMap<u64, Vec<u64>>,
    /// When writes began of which nobody knows whether they happened: deletes leave no value to see.
    unknown_deletes: Vec<usize>,
    found: Vec<Violation>,
}

impl<'a> Register<'a> {
    fn of(key: &'a str, operations: &'a [Operation]) -> Register<'a> {
        let unknown_delete = |operation: &&Operation| {
            operation.action.is_delete() && operation.outcome == Outcome::Unknown
        };
        Register {
            key,
            operations,
            looks: operations.iter().filter_map(Look::of).collect(),
            writes: Vec::new(),
            least_index: BTreeMap::new(),
            unknown_deletes: operations.iter().filter(unknown_delete).map(|o| o.begin).collect(),
            found: Vec::new(),
        }
    }

    fn check(mut self) -> Vec<Violation> {
        self.writes = self.resolve();
        let shards: BTreeSet<u64> =
            self.writes.iter().flat_map(|write| write.stands.keys().copied()).collect();
        for shard in shards {
            let mut least = u64::MAX;
            let from_behind = self.writes.iter().rev().map(|write| {
                least = least.min(write.stands_in(shard));
                least
            });
            let mut rising: Vec<u64> = from_behind.collect();
            rising.reverse();
            self.least_index.insert(shard, rising);
        }
        self.check_rising();
        for look in std::mem::take(&mut self.looks) {
            match look.seen {
                Some(seen) => self.check_seen(&look, seen),
                None => self.check_absent(&look),
            }
        }
        self.check_reads_at_versions();
        self.check_conditions();
        self.check_real_time();
        self.check_bounds();
        self.found
    }

    /// Once a version was read at, no write gets it or a lower one: whatever is known by the end of the
    /// history was there.
    fn check_reads_at_versions(&mut self) {
        let mut problems = Vec::new();
        for operation in self.operations {
            let (Action::GetAt { version }, Some(look)) =
                (&operation.action, Look::at_any(operation))
            else {
                continue;
            };
            let upto = self.writes.partition_point(|write| write.version <= Some(*version));
            let newest = upto.checked_sub(1).map(|at| &self.writes[at]);
            let by = operation.call;
            match (look.seen, newest) {
                (Some(seen), _) if seen.version > *version => {
                    let why = format!("version {} was read at version {version}", seen.version);
                    problems.push((why, vec![by]));
                }
                (Some(seen), Some(newest)) if newest.version > Some(seen.version) => {
                    let why = format!(
                        "version {} was read at version {version}, where {:?} stood",
                        seen.version, newest.version
                    );
                    problems.push((why, vec![newest.operation.call, by]));
                }
                (None, Some(newest))
                    if !newest.is_delete() && !self.may_be_deleted(operation.end) =>
                {
                    let why =
                        format!("absent at version {version}, where {:?} stood", newest.version);
                    problems.push((why, vec![newest.operation.call, by]));
                }
                _ => {}
            }
        }
        for (why, calls) in problems {
            self.violation(AT, why, &calls);
        }
    }

    fn violation(&mut self, rule: &'static str, why: String, calls: &[u64]) {
        let (key, calls) = (self.key.to_owned(), calls.to_vec());
        self.found.push(Violation { rule, key, why, calls });
    }

    /// All writes of which a version is known, by version: from their own answers, or from those
    /// who saw their values.
    fn resolve(&mut self) -> Vec<Write<'a>> {
        let mut by_value: BTreeMap<&str, Write<'a>> = BTreeMap::new();
        let mut refused: BTreeMap<&str, u64> = BTreeMap::new();
        let mut writes = Vec::new();
        for operation in self.operations {
            let (version, exact) = match &operation.outcome {
                Outcome::Ok(Answer::Written { version, at }) => (Some(*version), Some(*at)),
                Outcome::Unknown => (None, None),
                Outcome::Ok(_) | Outcome::Fail => {
                    refused.extend(operation.action.value().map(|value| (value, operation.call)));
                    continue;
                }
            };
            let stands = exact.iter().map(|at| (at.shard, at.index)).collect();
            let write = Write { operation, version, exact, stands };
            match operation.action.value() {
                Some(value) => {
                    by_value.insert(value, write);
                }
                None if write.version.is_some() => writes.push(write),
                None => {}
            }
        }
        let mut problems = Vec::new();
        let at_versions = self
            .operations
            .iter()
            .filter(|operation| matches!(operation.action, Action::GetAt { .. }));
        let at_versions: Vec<Look<'_>> = at_versions.filter_map(Look::at_any).collect();
        for look in self.looks.iter().chain(&at_versions) {
            // A retry's answer may leave the value out; its version is checked all the same.
            let Some(seen) = look.seen.filter(|seen| !seen.value.is_empty()) else {
                continue;
            };
            let (by, value) = (look.operation, seen.value.as_str());
            let Some(write) = by_value.get_mut(value) else {
                problems.push(match refused.get(value) {
                    Some(call) => (REFUSED_IS_SEEN, format!("{value:?}"), vec![*call, by.call]),
                    None => (NEVER_WRITTEN, format!("{value:?}"), vec![by.call]),
                });
                continue;
            };
            let calls = vec![write.operation.call, by.call];
            if write.operation.begin > by.end {
                problems.push((FUTURE, format!("{value:?}"), calls.clone()));
            }
            let known = *write.version.get_or_insert(seen.version);
            if known != seen.version {
                let why = format!("{value:?} stands at versions {known} and {}", seen.version);
                problems.push((APPLIED_ONCE, why, calls));
            }
            write.seen_at(look.at);
        }
        for (rule, why, calls) in problems {
            self.violation(rule, why, &calls);
        }
        writes.extend(by_value.into_values().filter(|write| write.version.is_some()));
        writes.sort_by_key(|write| write.version);
        writes
    }

    fn check_rising(&mut self) {
        let mut problems = Vec::new();
        for pair in self.writes.windows(2) {
            let calls = [pair[0].operation.call, pair[1].operation.call];
            if pair[0].version == pair[1].version {
                problems.push((format!("version {:?} was given twice", pair[0].version), calls));
            }
        }
        let mut last: BTreeMap<u64, (u64, &Write<'_>)> = BTreeMap::new();
        for write in &self.writes {
            let Some(at) = write.exact else { continue };
            if let Some((index, before)) = last.insert(at.shard, (at.index, write))
                && index > at.index
            {
                let why = format!(
                    "version {:?} is in entry {index}, the later {:?} in entry {}",
                    before.version, write.version, at.index
                );
                problems.push((why, [before.operation.call, write.operation.call]));
            }
        }
        for (why, calls) in problems {
            self.violation(RISES, why, &calls);
        }
    }

    /// The newest write that certainly stands at or before what a look saw of its shard's log.
    fn newest_at(&self, look: &Look<'_>) -> Option<&Write<'a>> {
        let least_index = self.least_index.get(&look.at.shard)?;
        let behind = least_index.partition_point(|least| *least <= look.upto);
        // The last whose least is small enough is itself the least of what follows.
        behind.checked_sub(1).map(|at| &self.writes[at])
    }

    fn check_seen(&mut self, look: &Look<'_>, seen: &Seen) {
        let newer = self.newest_at(look);
        let newer = newer.filter(|write| write.version > Some(seen.version));
        if let Some(newer) = newer {
            let why = format!(
                "{:?} at version {} was read in entry {}, where version {:?} already stood (entry {})",
                seen.value,
                seen.version,
                look.upto,
                newer.version,
                newer.stands_in(look.at.shard)
            );
            let calls = [newer.operation.call, look.operation.call];
            self.violation(NEWEST, why, &calls);
        }
        let own = self.writes.binary_search_by_key(&Some(seen.version), |write| write.version);
        let own = own.ok().map(|at| &self.writes[at]);
        let exact = own.and_then(|own| Some((own, own.exact?)));
        if let Some((own, exact)) =
            exact.filter(|(_, at)| at.shard == look.at.shard && at.index > look.at.index)
        {
            let why = format!(
                "{:?} was written by entry {} and read up to entry {}",
                seen.value, exact.index, look.at.index
            );
            let calls = [own.operation.call, look.operation.call];
            self.violation(FUTURE, why, &calls);
        }
    }

    fn check_absent(&mut self, look: &Look<'_>) {
        let Some(newest) = self.newest_at(look).filter(|write| !write.is_delete()) else {
            return;
        };
        let is_in_midst = look.upto < look.at.index;
        let in_same_entry = |write: &Write<'_>| {
            write.is_delete() && write.stands_in(look.at.shard) == look.at.index
        };
        let may_be_deleted = self.may_be_deleted(look.operation.end)
            || self.deleted_elsewhere(look) > newest.version
            || (is_in_midst && self.writes.iter().any(in_same_entry));
        if may_be_deleted {
            return;
        }
        let why = format!(
            "absent in entry {}, but version {:?} was written in entry {} and nobody deleted it",
            look.at.index,
            newest.version,
            newest.stands_in(look.at.shard)
        );
        let calls = [newest.operation.call, look.operation.call];
        self.violation(ABSENT, why, &calls);
    }

    /// The newest delete that another shard's log has, and that may have come before a look.
    fn deleted_elsewhere(&self, look: &Look<'_>) -> Option<u64> {
        let elsewhere = |write: &&Write<'_>| {
            write.is_delete()
                && !write.stands.contains_key(&look.at.shard)
                && write.operation.begin < look.operation.end
        };
        self.writes.iter().rev().find(elsewhere).and_then(|write| write.version)
    }

    /// Whether a delete of unknown outcome began before this place.
    fn may_be_deleted(&self, before: usize) -> bool {
        self.unknown_deletes.iter().any(|begin| *begin < before)
    }

    fn check_conditions(&mut self) {
        let mut problems = Vec::new();
        for (at, write) in self.writes.iter().enumerate() {
            let before = at.checked_sub(1).map(|at| &self.writes[at]);
            let calls = |other: &Write<'_>| vec![other.operation.call, write.operation.call];
            match (&write.operation.action, before) {
                (Action::PutIfVersion { version, .. }, Some(before))
                    if before.version != Some(*version) =>
                {
                    let why = format!(
                        "version {:?} was to follow {version}, but follows {:?}",
                        write.version, before.version
                    );
                    problems.push((why, calls(before)));
                }
                (Action::PutIfVersion { version, .. }, None) => {
                    let why = format!("it was to follow {version}, but is the first write");
                    problems.push((why, vec![write.operation.call]));
                }
                (Action::PutIfAbsent { .. }, Some(before))
                    if !before.is_delete() && !self.may_be_deleted(write.operation.end) =>
                {
                    let why = format!("the key was there, at version {:?}", before.version);
                    problems.push((why, calls(before)));
                }
                _ => {}
            }
        }
        for operation in self.operations {
            let Outcome::Ok(Answer::Mismatch { seen, .. }) = &operation.outcome else {
                continue;
            };
            let held = match &operation.action {
                Action::PutIfVersion { version, .. } => {
                    seen.as_ref().is_some_and(|seen| seen.version == *version)
                }
                Action::PutIfAbsent { .. } => seen.is_none(),
                _ => true,
            };
            if held {
                let why = "it was refused although it held".to_owned();
                problems.push((why, vec![operation.call]));
            }
        }
        for (why, calls) in problems {
            self.violation(CONDITION, why, &calls);
        }
    }

    /// Between which versions each completed operation stands. For an absent key that is the newest
    /// write up to its entry (if that was not the delete, a later one was), up to what another shard
    /// may have deleted.
    fn standings(&self) -> BTreeMap<u64, Standing> {
        let mut standings = BTreeMap::new();
        for write in &self.writes {
            let wrote = |version| Standing { least: version, most: version, is_write: true };
            standings.extend(write.version.map(|version| (write.operation.call, wrote(version))));
        }
        for look in self.operations.iter().filter_map(Look::of) {
            let (least, most) = match look.seen {
                Some(seen) => (seen.version, seen.version),
                None => {
                    let least = self.newest_at(&look).and_then(|write| write.version).unwrap_or(0);
                    let changes_hands =
                        self.least_index.keys().any(|shard| *shard != look.at.shard);
                    let is_open = changes_hands && self.may_be_deleted(look.operation.end);
                    let elsewhere = self.deleted_elsewhere(&look).unwrap_or(0);
                    (least, if is_open { u64::MAX } else { least.max(elsewhere) })
                }
            };
            standings.insert(look.operation.call, Standing { least, most, is_write: false });
        }
        standings
    }

    fn check_real_time(&mut self) {
        // Begins and ends in their order; at one place there is only ever one of them.
        let mut places: BTreeSet<(usize, bool, usize)> = BTreeSet::new();
        for (at, operation) in self.operations.iter().enumerate() {
            places.insert((operation.begin, false, at));
            if operation.end != usize::MAX {
                places.insert((operation.end, true, at));
            }
        }
        let standings = self.standings();
        let mut completed: (u64, u64) = (0, 0);
        let mut problems = Vec::new();
        for (_, is_end, at) in places {
            let operation = &self.operations[at];
            let Some(&Standing { least, most, is_write }) = standings.get(&operation.call) else {
                continue;
            };
            if is_end {
                if matches!(operation.outcome, Outcome::Ok(_)) {
                    completed = completed.max((least, operation.call));
                }
                continue;
            }
            let (newest, by) = completed;
            // A session read may be behind others, not behind its own client (see above); a bounded
            // one as far as its bound allows (see below).
            if matches!(operation.action, Action::SessionGet | Action::BoundedGet { .. }) {
                continue;
            }
            if most < newest || (is_write && most == newest) {
                let verb = if is_write { "wrote" } else { "saw" };
                let why = format!("it {verb} version {most}, {newest} had been answered before");
                problems.push((why, vec![by, operation.call]));
            }
        }
        for (why, calls) in problems {
            self.violation(REAL_TIME, why, &calls);
        }
    }
}

impl Register<'_> {
    /// What was answered before a bounded read began, by more than its bound, is in it.
    fn check_bounds(&mut self) {
        let standings = self.standings();
        let mut answered: Vec<(u64, (u64, u64))> = Vec::new();
        for operation in self.operations {
            if let (Outcome::Ok(_), Some(standing)) =
                (&operation.outcome, standings.get(&operation.call))
            {
                answered.push((operation.end_us, (standing.least, operation.call)));
            }
        }
        answered.sort_unstable();
        // The highest version, and by whom, up to each moment.
        let mut newest = (0, 0);
        for (_, told) in &mut answered {
            newest = newest.max(*told);
            *told = newest;
        }
        let mut problems = Vec::new();
        for operation in self.operations {
            let (Action::BoundedGet { ms }, Outcome::Ok(_)) =
                (&operation.action, &operation.outcome)
            else {
                continue;
            };
            let since = operation.begin_us.saturating_sub(ms * 1_000);
            let before = answered.partition_point(|(end_us, _)| *end_us < since);
            let newest = before.checked_sub(1).map(|at| answered[at].1);
            let seen = standings.get(&operation.call).map_or(0, |standing| standing.most);
            if let Some((version, by)) = newest.filter(|(version, _)| *version > seen) {
                let why = format!(
                    "it saw version {seen}, {version} had been answered more than {ms} ms before"
                );
                problems.push((why, vec![by, operation.call]));
            }
        }
        for (why, calls) in problems {
            self.violation(BOUND, why, &calls);
        }
    }
}

//! The independent judge: searches for an order of the operations on a key that explains every answer
//! and agrees with real time, and believes nothing that the servers say of that order. Owns the search
//! and its bounds. Makes no counterexample small (see `shrink`).
//!
//! The history of a key is walked once. A *configuration* is one way in which the operations so far can
//! have happened: which of those still open have taken effect, and what the key holds. When an
//! operation is answered, every configuration must have let it take effect, with others that were open
//! before it if need be; those that cannot, go. If none is left, the history is not linearizable, and
//! that operation is where it shows. Nothing is gone back to, so memory is what is open at a time, not
//! the length of the history.
//!
//! Unknown outcomes stay open for ever, which is what makes the search dear. A write of which nobody saw
//! the value need not have happened: no answer differs without it. One that was seen took effect before
//! the first answer that shows it. Deletes leave no value; of those open for ever any may be taken for
//! any other, so a configuration counts how many it used, and fewer are always as good.
//!
//! Versions are used as names only: a condition on a version is one on the value that was seen or
//! written under it. Reads that promise less than linearizability (session, bounded, at a version) are
//! the other judge's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use super::Violation;
use crate::history::{Action, Answer, History, Operation, Outcome};

const LINEARIZABLE: &str = "some order of the operations explains every answer";
const DECIDED: &str = "the search comes to its end";

/// Configurations of one key at a time. Beyond: not decided, which is no pass.
const CONFIGURATIONS_MAX: usize = 1 << 18;
/// Operations on one key that are open at a time. Beyond: not decided.
const OPEN_MAX: usize = 64;

/// What a key holds: 0 is absent, else a number for each value.
type Value = u32;
const ABSENT: Value = 0;
/// The value under a version that nobody ever told: it may be any. No key holds it.
const UNHEARD: Value = Value::MAX;

/// What an operation does to the value, as far as its answer tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// The value was there, and stays.
    Saw(Value),
    /// The value is there then.
    Wrote(Value),
    /// The same, where `.0` was before.
    Replaced(Value, Value),
}

impl Step {
    fn apply(self, value: Value) -> Option<Value> {
        match self {
            Step::Saw(seen) => (value == seen).then_some(value),
            Step::Wrote(new) => Some(new),
            Step::Replaced(old, new) => (value == old).then_some(new),
        }
    }
}

/// One operation of a key, ready to be searched.
#[derive(Clone, Copy, Debug)]
struct Move {
    call: u64,
    begin: usize,
    /// The place in the history by which it has taken effect.
    end: usize,
    step: Step,
}

/// A key whose history has no explanation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Unexplained {
    /// The key.
    pub key: String,
    /// The operation whose answer leaves no explanation; `None` where the search was given up.
    pub call: Option<u64>,
}

impl fmt::Display for Unexplained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Violation::from(self.clone()).fmt(f)
    }
}

impl From<Unexplained> for Violation {
    fn from(found: Unexplained) -> Violation {
        let (rule, why) = match found.call {
            Some(call) => (LINEARIZABLE, format!("nothing explains the answer of call {call}")),
            None => (DECIDED, "too many operations of it are open at a time".to_owned()),
        };
        let calls = found.call.into_iter().collect();
        Violation { rule, key: found.key, why, calls }
    }
}

/// The keys of a history that have no explanation, in their order.
pub fn check(history: &History) -> Vec<Unexplained> {
    let mut keys: BTreeMap<String, Vec<Operation>> = BTreeMap::new();
    for operation in history.operations() {
        keys.entry(operation.key.clone()).or_default().push(operation);
    }
    keys.into_iter().filter_map(|(key, operations)| check_key(key, &operations)).collect()
}

/// The same for the operations of one key, in the order in which they began.
pub fn check_key(key: String, operations: &[Operation]) -> Option<Unexplained> {
    let (moves, open_deletes) = prepare(operations);
    let call = match search(&moves, &open_deletes) {
        Ok(()) => return None,
        Err(call) => call,
    };
    Some(Unexplained { key, call })
}

/// Numbers for values, and which value stood under which version.
#[derive(Default)]
struct Names<'a> {
    values: HashMap<&'a str, Value>,
    versions: HashMap<u64, Value>,
}

impl<'a> Names<'a> {
    fn of(operations: &'a [Operation]) -> Names<'a> {
        let mut names = Names::default();
        for operation in operations {
            let written = operation.action.value();
            let written = written.map(|value| names.value(value));
            match &operation.outcome {
                Outcome::Ok(Answer::Written { version, .. }) => {
                    names.versions.extend(written.map(|value| (*version, value)));
                }
                Outcome::Ok(Answer::Read { seen, .. } | Answer::Mismatch { seen, .. }) => {
                    if let Some(seen) = seen {
                        let value = names.value(&seen.value);
                        names.versions.insert(seen.version, value);
                    }
                }
                Outcome::Fail | Outcome::Unknown => {}
            }
        }
        names
    }

    fn value(&mut self, value: &'a str) -> Value {
        let next = self.values.len() as Value + 1;
        *self.values.entry(value).or_insert(next)
    }

    fn known(&self, value: &str) -> Value {
        self.values.get(value).copied().expect("every value of the key was named")
    }

    /// What a conditional write expects.
    fn expected(&self, action: &Action) -> Option<Value> {
        match action {
            Action::PutIfAbsent { .. } => Some(ABSENT),
            Action::PutIfVersion { version, .. } => {
                Some(self.versions.get(version).copied().unwrap_or(UNHEARD))
            }
            _ => None,
        }
    }

    /// What an operation did, if it happened; `None` for what is not this judge's.
    fn step(&self, operation: &Operation) -> Option<Step> {
        let action = &operation.action;
        let seen = |answer: &Answer| match answer {
            Answer::Read { seen, .. } | Answer::Mismatch { seen, .. } => {
                seen.as_ref().map_or(ABSENT, |seen| self.known(&seen.value))
            }
            Answer::Written { .. } => ABSENT,
        };
        match (&operation.outcome, action) {
            (_, Action::SessionGet | Action::BoundedGet { .. } | Action::GetAt { .. })
            | (Outcome::Fail, _)
            | (Outcome::Unknown, Action::Get | Action::ReplicaGet) => None,
            (Outcome::Ok(answer @ Answer::Mismatch { .. }), _) => {
                // What it saw is what it was judged by, and cannot be what it asked for.
                match (seen(answer), self.expected(action)) {
                    (seen, Some(expected)) if seen == expected => Some(Step::Saw(UNHEARD)),
                    (seen, _) => Some(Step::Saw(seen)),
                }
            }
            (Outcome::Ok(answer), Action::Get | Action::ReplicaGet) => {
                Some(Step::Saw(seen(answer)))
            }
            (_, Action::Delete | Action::DeleteRange) => Some(Step::Wrote(ABSENT)),
            (_, action) => {
                let new = self.known(action.value()?);
                Some(match self.expected(action) {
                    Some(UNHEARD) | None => Step::Wrote(new),
                    Some(expected) => Step::Replaced(expected, new),
                })
            }
        }
    }
}

/// Operations by their steps, those that need not have happened left out; and when the deletes began
/// that are open for ever.
fn prepare(operations: &[Operation]) -> (Vec<Move>, Vec<usize>) {
    let names = Names::of(operations);
    // By when somebody had been told of each value.
    let mut shown: HashMap<Value, usize> = HashMap::new();
    for operation in operations {
        if let Outcome::Ok(_) = operation.outcome
            && let Some(Step::Saw(value) | Step::Replaced(value, _)) = names.step(operation)
        {
            let first = shown.entry(value).or_insert(operation.end);
            *first = (*first).min(operation.end);
        }
    }
    // An unknown write that replaced a value shows it too, by when it was shown itself.
    loop {
        let mut more = false;
        for operation in operations.iter().filter(|one| one.outcome == Outcome::Unknown) {
            if let Some(Step::Replaced(old, new)) = names.step(operation)
                && let Some(&end) = shown.get(&new)
                && shown.get(&old).is_none_or(|known| *known > end)
            {
                shown.insert(old, end);
                more = true;
            }
        }
        if !more {
            break;
        }
    }
    let (mut moves, mut open_deletes) = (Vec::new(), Vec::new());
    for operation in operations {
        let Some(step) = names.step(operation) else { continue };
        let mut end = operation.end;
        if operation.outcome == Outcome::Unknown {
            end = match step {
                Step::Wrote(ABSENT) => {
                    open_deletes.push(operation.begin);
                    continue;
                }
                Step::Wrote(new) | Step::Replaced(_, new) => match shown.get(&new) {
                    // It takes effect before the answer that shows it; one that is shown before it
                    // began explains nothing.
                    Some(end) => (*end).max(operation.begin),
                    None => continue,
                },
                Step::Saw(_) => continue,
            };
        }
        moves.push(Move { call: operation.call, begin: operation.begin, end, step });
    }
    (moves, open_deletes)
}

/// A way in which all so far can have happened: which of the open ones took effect, what the key holds.
type Configuration = (u64, Value);

/// The configurations, each with the fewest deletes of unknown outcome that it needs.
type Configurations = HashMap<Configuration, usize>;

/// `Err` with the operation that leaves no configuration; with none where it was given up.
fn search(moves: &[Move], open_deletes: &[usize]) -> Result<(), Option<u64>> {
    // Begins before ends at one place.
    let mut events: BTreeSet<(usize, bool, usize)> = BTreeSet::new();
    for (at, one) in moves.iter().enumerate() {
        events.insert((one.begin, false, at));
        if one.end < usize::MAX {
            events.insert((one.end, true, at));
        }
    }
    let mut open: [Option<usize>; OPEN_MAX] = [None; OPEN_MAX];
    let mut all = Configurations::from([((0, ABSENT), 0)]);
    for (place, is_end, at) in events {
        let slot = |wanted| open.iter().position(|held| *held == wanted);
        if !is_end {
            let free = slot(None).ok_or(None)?;
            open[free] = Some(at);
            continue;
        }
        let slot = slot(Some(at)).expect("what ends was open");
        let deletes = open_deletes.partition_point(|begin| *begin < place);
        all = end(all, slot, moves, &open, deletes)?;
        if all.is_empty() {
            return Err(Some(moves[at].call));
        }
        open[slot] = None;
    }
    Ok(())
}

/// The configurations in which the operation of a slot took effect.
fn end(
    all: Configurations,
    slot: usize,
    moves: &[Move],
    open: &[Option<usize>; OPEN_MAX],
    deletes: usize,
) -> Result<Configurations, Option<u64>> {
    let own = 1_u64 << slot;
    let (mut ended, mut seen) = (Configurations::new(), Configurations::new());
    let mut left: Vec<(Configuration, usize)> = all.into_iter().collect();
    while let Some((configuration, used)) = left.pop() {
        if seen.get(&configuration).is_some_and(|known| *known <= used) {
            continue;
        }
        seen.insert(configuration, used);
        if seen.len() > CONFIGURATIONS_MAX {
            return Err(None);
        }
        let (done, value) = configuration;
        if done & own != 0 {
            let known = ended.entry((done & !own, value)).or_insert(used);
            *known = (*known).min(used);
            continue;
        }
        for (bit, at) in open.iter().enumerate() {
            let Some(at) = at.filter(|_| done & (1 << bit) == 0) else { continue };
            if let Some(value) = moves[at].step.apply(value) {
                left.push(((done | 1 << bit, value), used));
            }
        }
        if used < deletes && value != ABSENT {
            left.push(((done, ABSENT), used + 1));
        }
    }
    Ok(ended)
}

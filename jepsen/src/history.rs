//! Owns what a workload did and saw, as a list of events that can be written line by line. Does not
//! judge (see `checker`) and does not act (see `workload`).
//!
//! The order of the list is the order in which things happened: an operation that completed before
//! another began stands before it, also within one microsecond.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// What an event says of its operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It began.
    Invoke,
    /// It was answered.
    Ok,
    /// It surely did not happen.
    Fail,
    /// Whether it happened is not known, and it may still happen later.
    Info,
}

/// What an operation does.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Action {
    /// Reads the key, linearizably.
    Get,
    /// Reads the key, linearizably, from whichever replica comes next.
    ReplicaGet,
    /// Reads the key, not behind what its client has seen.
    SessionGet,
    /// Reads the key, lacking nothing that was acknowledged so long before.
    BoundedGet {
        /// The bound.
        ms: u64,
    },
    /// Reads the key as it was at a version.
    GetAt {
        /// The version.
        version: u64,
    },
    /// Writes a value that no other operation writes.
    Put {
        /// The value.
        value: String,
    },
    /// The same, only where the key is absent.
    PutIfAbsent {
        /// The value.
        value: String,
    },
    /// The same, only where the key stands at a version.
    PutIfVersion {
        /// The value.
        value: String,
        /// The version expected.
        version: u64,
    },
    /// Deletes the key, also an absent one.
    Delete,
    /// The same, as an atomic delete-range that only the key is in.
    DeleteRange,
}

impl Action {
    /// Whether the key is gone behind it.
    pub fn is_delete(&self) -> bool {
        matches!(self, Action::Delete | Action::DeleteRange)
    }

    /// What it writes; a delete and a read write no value.
    pub fn value(&self) -> Option<&str> {
        match self {
            Action::Put { value }
            | Action::PutIfAbsent { value }
            | Action::PutIfVersion { value, .. } => Some(value),
            Action::Get
            | Action::ReplicaGet
            | Action::SessionGet
            | Action::BoundedGet { .. }
            | Action::GetAt { .. }
            | Action::Delete
            | Action::DeleteRange => None,
        }
    }
}

/// Where an answer stands in the order of its shard's log.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// The shard.
    pub shard: u64,
    /// The term of the entry.
    pub term: u64,
    /// The entry that a write is in, or up to which was read.
    pub index: u64,
}

/// A value that was seen.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// The value.
    pub value: String,
    /// The version that came with it.
    pub version: u64,
}

/// What an operation was told.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// A read's; without a value the key was absent.
    Read {
        /// What was there.
        seen: Option<Seen>,
        /// Up to where was read.
        at: Position,
    },
    /// A write was applied.
    Written {
        /// Its version.
        version: u64,
        /// Its entry.
        at: Position,
    },
    /// A condition did not hold: nothing was written.
    Mismatch {
        /// What was there instead.
        seen: Option<Seen>,
        /// Where it was judged.
        at: Position,
    },
}

/// One line of a history.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Since the run began.
    pub time_us: u64,
    /// Who.
    pub client: u32,
    /// Which operation: the same number when it begins and when it ends.
    pub call: u64,
    /// What of it.
    pub kind: Kind,
    /// On which key.
    pub key: String,
    /// What it does.
    pub action: Action,
    /// With [`Kind::Ok`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub answer: Option<Answer>,
    /// With [`Kind::Fail`] and [`Kind::Info`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// How an operation ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Answered.
    Ok(Answer),
    /// Surely did not happen.
    Fail,
    /// Not known, or not ended.
    Unknown,
}

/// Begin and end of an operation together.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Operation {
    /// Its number.
    pub call: u64,
    /// Who.
    pub client: u32,
    /// On which key.
    pub key: String,
    /// What it does.
    pub action: Action,
    /// Its place in the list of events.
    pub begin: usize,
    /// The place of its end; beyond all places where the outcome is not known, because it may still
    /// happen.
    pub end: usize,
    /// When it began.
    pub begin_us: u64,
    /// When it ended, as far as it has.
    pub end_us: u64,
    /// How it ended.
    pub outcome: Outcome,
}

/// The events of a run, in their order.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct History {
    /// The events.
    pub events: Vec<Event>,
}

impl History {
    /// Every operation, in the order in which they began.
    pub fn operations(&self) -> Vec<Operation> {
        let mut operations: Vec<Operation> = Vec::new();
        let mut places: BTreeMap<u64, usize> = BTreeMap::new();
        for (at, event) in self.events.iter().enumerate() {
            if event.kind == Kind::Invoke {
                let before = places.insert(event.call, operations.len());
                assert!(before.is_none(), "call {} begins once", event.call);
                operations.push(Operation {
                    call: event.call,
                    client: event.client,
                    key: event.key.clone(),
                    action: event.action.clone(),
                    begin: at,
                    end: usize::MAX,
                    begin_us: event.time_us,
                    end_us: u64::MAX,
                    outcome: Outcome::Unknown,
                });
                continue;
            }
            let place = places.get(&event.call);
            let place =
                *place.unwrap_or_else(|| panic!("call {} ends, but never began", event.call));
            let operation = &mut operations[place];
            (operation.end, operation.outcome) = match (event.kind, &event.answer) {
                (Kind::Ok, Some(answer)) => {
                    operation.end_us = event.time_us;
                    (at, Outcome::Ok(answer.clone()))
                }
                (Kind::Fail, _) => (at, Outcome::Fail),
                _ => (usize::MAX, Outcome::Unknown),
            };
        }
        operations
    }

    /// Writes one JSON object a line.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        for event in &self.events {
            serde_json::to_writer(&mut *out, event)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    }

    /// Reads what [`History::write`] wrote.
    pub fn read(input: &mut dyn BufRead) -> io::Result<History> {
        let mut events = Vec::new();
        for line in input.lines() {
            events.push(serde_json::from_str(&line?)?);
        }
        Ok(History { events })
    }
}

/// Takes down a history while it happens. Clones write into the same one.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<History>>);

impl Recorder {
    /// An operation begins; returns its number.
    pub fn invoke(&self, time_us: u64, client: u32, key: &str, action: &Action) -> u64 {
        let mut history = self.0.lock();
        let call = history.events.len() as u64;
        history.events.push(Event {
            time_us,
            client,
            call,
            kind: Kind::Invoke,
            key: key.to_owned(),
            action: action.clone(),
            answer: None,
            error: None,
        });
        call
    }

    /// It was answered.
    pub fn ok(&self, time_us: u64, call: u64, answer: Answer) {
        self.end(time_us, call, Kind::Ok, Some(answer), None);
    }

    /// It failed; `may_have_happened` makes it unknown.
    pub fn failed(&self, time_us: u64, call: u64, may_have_happened: bool, error: String) {
        let kind = if may_have_happened { Kind::Info } else { Kind::Fail };
        self.end(time_us, call, kind, None, Some(error));
    }

    fn end(
        &self,
        time_us: u64,
        call: u64,
        kind: Kind,
        answer: Option<Answer>,
        error: Option<String>,
    ) {
        let mut history = self.0.lock();
        let begun = history.events[call as usize].clone();
        history.events.push(Event { time_us, kind, answer, error, ..begun });
    }

    /// The newest event.
    pub fn last(&self) -> Option<Event> {
        self.0.lock().events.last().cloned()
    }

    /// What was taken down so far.
    pub fn history(&self) -> History {
        self.0.lock().clone()
    }
}

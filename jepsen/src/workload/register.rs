//! Registers: clients read, write, compare-and-set and delete a few keys, through the smart client.
//! Owns what they do next and how they take down what they were told. Does not judge it.

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_client::{Cas, Client, Consistency, Entry, Error, Outcome, Served, Version};
use coracle_storage::fs::faulty::Dice;
use tokio::sync::watch;

use crate::history::{Action, Answer, Position, Recorder, Seen};
use crate::trace::Trace;

/// Bounds of bounded reads: below what a question takes, about a heartbeat, about a failover, longer.
const BOUNDS_MS: [u64; 4] = [5, 100, 700, 3_000];

/// How busy, and with what.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Keys, shared by all clients.
    pub keys: u64,
    /// Values are at least so long.
    pub value_bytes: usize,
    /// Between two operations of a client, at most.
    pub pause_ms_max: u64,
}

/// One client at work.
pub struct Worker {
    /// Its number in the history.
    pub number: u32,
    /// Its way to the cluster.
    pub client: Client,
    /// Where it takes down what it does.
    pub recorder: Recorder,
    /// The same, for people.
    pub trace: Trace,
    /// Its luck.
    pub dice: Dice,
    /// What it does.
    pub load: Load,
    written: u64,
    /// The version at which it last saw each key.
    versions: BTreeMap<String, u64>,
}

impl Worker {
    /// A client that has done nothing yet.
    pub fn new(
        number: u32,
        client: Client,
        recorder: Recorder,
        trace: Trace,
        dice: Dice,
        load: Load,
    ) -> Worker {
        let (written, versions) = (0, BTreeMap::new());
        Worker { number, client, recorder, trace, dice, load, written, versions }
    }

    /// One operation after the other, until told to stop.
    pub async fn run(mut self, stop: watch::Receiver<bool>) {
        while !*stop.borrow() {
            let key = self.draw_key();
            let action = self.draw_action(&key);
            self.perform(&key, action).await;
            let pause = self.dice.below(self.load.pause_ms_max + 1);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.client.close().await;
    }

    /// Reads every key once; false when one could not be read.
    pub async fn read_all(&mut self) -> bool {
        let mut all = true;
        for number in 0..self.load.keys {
            all &= self.perform(&key_name(number), Action::Get).await;
        }
        all
    }

    fn draw_key(&mut self) -> String {
        key_name(self.dice.below(self.load.keys))
    }

    fn draw_action(&mut self, key: &str) -> Action {
        match self.dice.below(24) {
            0..=3 => Action::Get,
            4..=6 => Action::ReplicaGet,
            7..=8 => Action::SessionGet,
            9..=10 => Action::BoundedGet { ms: BOUNDS_MS[self.dice.below(4) as usize] },
            11..=16 => Action::Put { value: self.fresh_value() },
            17..=18 => Action::PutIfAbsent { value: self.fresh_value() },
            19..=21 => match self.versions.get(key).copied() {
                Some(version) => Action::PutIfVersion { value: self.fresh_value(), version },
                None => Action::Get,
            },
            _ => Action::Delete,
        }
    }

    /// A value that nobody else ever writes.
    fn fresh_value(&mut self) -> String {
        self.written += 1;
        let mut value = format!("c{}-{}", self.number, self.written);
        while value.len() < self.load.value_bytes {
            value.push('.');
        }
        value
    }

    /// Performs one operation and takes it down; true when it was answered.
    pub async fn perform(&mut self, key: &str, action: Action) -> bool {
        let call = self.recorder.invoke(self.trace.now_us(), self.number, key, &action);
        let answer = self.ask(key, &action).await;
        let now = self.trace.now_us();
        let number = self.number;
        match answer {
            Ok(answer) => {
                self.remember(key, &answer);
                let told = brief(&answer);
                self.trace.event(format_args!("c{number} #{call} {} {key}: {told}", verb(&action)));
                self.recorder.ok(now, call, answer);
                true
            }
            Err(error) => {
                let unknown = error.outcome() != Outcome::NotApplied;
                let how = if unknown { "unknown" } else { "failed" };
                let verb = verb(&action);
                self.trace.event(format_args!("c{number} #{call} {verb} {key}: {how}: {error}"));
                self.recorder.failed(now, call, unknown, error.to_string());
                false
            }
        }
    }

    async fn ask(&self, key: &str, action: &Action) -> Result<Answer, Error> {
        let key = key.to_owned();
        let judged = |cas: Cas| match cas {
            Cas::Applied(written) => {
                Answer::Written { version: written.version.0, at: position(&written.served) }
            }
            Cas::Mismatch { current, served } => {
                Answer::Mismatch { seen: current.as_ref().map(seen), at: position(&served) }
            }
        };
        Ok(match action {
            Action::Get | Action::ReplicaGet | Action::SessionGet | Action::BoundedGet { .. } => {
                let get = self.client.get(key);
                let get = match action {
                    Action::ReplicaGet => get.from_any_replica(),
                    Action::SessionGet => get.consistency(Consistency::Session),
                    Action::BoundedGet { ms } => {
                        get.consistency(Consistency::Bounded(Duration::from_millis(*ms)))
                    }
                    _ => get,
                };
                let read = get.read().await?;
                let who = if read.served.leader { "the leader" } else { "another replica" };
                let staleness = read.served.staleness;
                self.trace.event(format_args!("{} by {who}: {staleness:?}", verb(action)));
                Answer::Read { seen: read.entry.as_ref().map(seen), at: position(&read.served) }
            }
            Action::Put { value } => {
                let written = self.client.put(key, value.clone()).await?;
                Answer::Written { version: written.version.0, at: position(&written.served) }
            }
            Action::Delete => {
                let written = self.client.delete(key).await?;
                Answer::Written { version: written.version.0, at: position(&written.served) }
            }
            Action::PutIfAbsent { value } => {
                judged(self.client.put(key, value.clone()).if_absent().await?)
            }
            Action::PutIfVersion { value, version } => {
                let put = self.client.put(key, value.clone());
                judged(put.if_version(Version(*version)).await?)
            }
        })
    }

    fn remember(&mut self, key: &str, answer: &Answer) {
        let version = match answer {
            Answer::Written { version, .. } => Some(*version),
            Answer::Read { seen, .. } | Answer::Mismatch { seen, .. } => {
                seen.as_ref().map(|seen| seen.version)
            }
        };
        match version {
            Some(version) => self.versions.insert(key.to_owned(), version),
            None => self.versions.remove(key),
        };
    }
}

/// The name of a workload's key.
pub fn key_name(number: u64) -> String {
    format!("k{number}")
}

fn verb(action: &Action) -> &'static str {
    match action {
        Action::Get => "get",
        Action::ReplicaGet => "replica-get",
        Action::SessionGet => "session-get",
        Action::BoundedGet { .. } => "bounded-get",
        Action::Put { .. } => "put",
        Action::PutIfAbsent { .. } => "put-if-absent",
        Action::PutIfVersion { .. } => "put-if-version",
        Action::Delete => "delete",
    }
}

fn brief(answer: &Answer) -> String {
    let shown = |seen: &Option<Seen>| match seen {
        Some(Seen { value, version }) => format!("{}@{version}", value.trim_end_matches('.')),
        None => "absent".to_owned(),
    };
    match answer {
        Answer::Read { seen, at } => format!("{} ({}/{})", shown(seen), at.shard, at.index),
        Answer::Written { version, at } => format!("@{version} ({}/{})", at.shard, at.index),
        Answer::Mismatch { seen, at } => format!("no: {} ({}/{})", shown(seen), at.shard, at.index),
    }
}

fn position(served: &Served) -> Position {
    Position { shard: served.shard.0, term: served.term, index: served.index }
}

fn seen(entry: &Entry) -> Seen {
    let value = String::from_utf8_lossy(&entry.value).into_owned();
    Seen { value, version: entry.version.0 }
}

//! Owns the client's own account of a load: for every key what was acknowledged last, what may have
//! been written, and what is under way. Judges what is read back. Asks nobody, and knows no clock but
//! the instants that it is given.
//!
//! **Why its verdict holds.** A key has one writer, which waits for each answer before it writes again,
//! so the acknowledged writes of a key have one order and the last one is what a later read must find.
//! A write whose outcome is unknown may take effect at any time after it was sent. Such a key is
//! *retired*: it is never written again, and from then on either of two values is right: the last one
//! that was acknowledged, or that of the unknown write. Everything else is a loss.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use coracle_client::NodeId;
use coracle_client::topology::ShardId;

/// Bytes of a value: a small record.
const VALUE_BYTES: usize = 128;

/// A key of the load.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct KeyId(pub u64);

/// A write under way.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Its key.
    pub id: KeyId,
    /// Counts the writes of its key, from 1.
    pub sequence: u64,
    /// The key's bytes.
    pub key: Bytes,
    /// The value's bytes.
    pub value: Bytes,
    number: u64,
}

/// What may be read of a key.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Expected {
    /// The last write that was acknowledged; 0 for none.
    pub acknowledged: u64,
    /// How many were.
    pub acknowledgements: u64,
    /// A write after it that may have been applied.
    pub unknown: Option<u64>,
}

/// What a read says about a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// The last acknowledged write is there (or the key was never written, and is absent).
    Kept,
    /// The unknown one after it is there.
    UnknownApplied,
    /// An acknowledged write is not there.
    Lost,
}

/// Where a shard's answers came from, and how many.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ShardSeen {
    /// The node that answered last.
    pub node: NodeId,
    /// Acknowledged writes.
    pub writes: u64,
}

/// A node was killed: what its shards did afterwards.
#[derive(Clone, Debug)]
pub struct Failover {
    /// The node.
    pub victim: NodeId,
    /// When.
    pub at: Instant,
    /// The shards that it led.
    pub led: BTreeSet<ShardId>,
    /// For each, from the kill to the first write that another node acknowledged.
    pub first_writes: BTreeMap<ShardId, Duration>,
}

/// See the head of this file. Shared by all writers.
pub struct Ledger {
    /// Tells this run's keys from those of others.
    run: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    keys: Vec<Expected>,
    next_sequence: HashMap<KeyId, u64>,
    /// Where a key's last answer came from.
    shard_of: HashMap<KeyId, ShardId>,
    shards: BTreeMap<ShardId, ShardSeen>,
    in_flight: BTreeMap<u64, KeyId>,
    attempts: u64,
    acknowledged: u64,
    failover: Option<Failover>,
}

impl Ledger {
    /// Empty. `run` must differ from every other run on the same cluster.
    pub fn new(run: impl Into<String>) -> Ledger {
        Ledger { run: run.into(), state: Mutex::default() }
    }

    /// A key that nobody has written, for one writer alone.
    pub fn new_key(&self) -> KeyId {
        let mut state = self.state();
        state.keys.push(Expected::default());
        KeyId(state.keys.len() as u64 - 1)
    }

    /// The key's bytes.
    pub fn key(&self, id: KeyId) -> Bytes {
        Bytes::from(format!("load/{}/{:06}", self.run, id.0))
    }

    /// The next write of a key begins now.
    pub fn begin(&self, id: KeyId) -> Attempt {
        let mut state = self.state();
        assert!(state.keys[id.0 as usize].unknown.is_none(), "a retired key is not written again");
        let sequence = state.next_sequence.entry(id).or_insert(0);
        *sequence += 1;
        let sequence = *sequence;
        state.attempts += 1;
        let number = state.attempts;
        state.in_flight.insert(number, id);
        Attempt { id, sequence, key: self.key(id), value: value(id, sequence), number }
    }

    /// It was acknowledged, by this node.
    pub fn acknowledged(&self, attempt: &Attempt, shard: ShardId, node: NodeId, at: Instant) {
        let mut state = self.state();
        state.in_flight.remove(&attempt.number);
        let key = &mut state.keys[attempt.id.0 as usize];
        key.acknowledged = attempt.sequence;
        key.acknowledgements += 1;
        state.acknowledged += 1;
        state.shard_of.insert(attempt.id, shard);
        let seen = state.shards.entry(shard).or_insert(ShardSeen { node, writes: 0 });
        seen.node = node;
        seen.writes += 1;
        if let Some(failover) = &mut state.failover {
            // An answer of the victim's may still have been on its way.
            if node != failover.victim && failover.led.contains(&shard) {
                let after = at.saturating_duration_since(failover.at);
                failover.first_writes.entry(shard).or_insert(after);
            }
        }
    }

    /// It was surely not applied, and never will be.
    pub fn refused(&self, attempt: &Attempt) {
        self.state().in_flight.remove(&attempt.number);
    }

    /// It may have been applied, or may still be. Retires the key.
    pub fn unknown(&self, attempt: &Attempt) {
        let mut state = self.state();
        state.in_flight.remove(&attempt.number);
        state.keys[attempt.id.0 as usize].unknown = Some(attempt.sequence);
    }

    /// What may be read of a key now.
    pub fn expected(&self, id: KeyId) -> Expected {
        self.state().keys[id.0 as usize]
    }

    /// Every key that was written, and what may be read of it.
    pub fn all(&self) -> Vec<(KeyId, Expected)> {
        let state = self.state();
        let keys =
            state.keys.iter().enumerate().map(|(id, expected)| (KeyId(id as u64), *expected));
        keys.filter(|(_, expected)| *expected != Expected::default()).collect()
    }

    /// Writes that were acknowledged.
    pub fn acknowledgements(&self) -> u64 {
        self.state().acknowledged
    }

    /// Each shard that took a write.
    pub fn shards(&self) -> BTreeMap<ShardId, ShardSeen> {
        self.state().shards.clone()
    }

    /// The writes under way whose key was last seen on one of these shards, by number.
    pub fn in_flight_on(&self, shards: &BTreeSet<ShardId>) -> BTreeSet<u64> {
        let state = self.state();
        let on = |id: &KeyId| state.shard_of.get(id).is_some_and(|shard| shards.contains(shard));
        state.in_flight.iter().filter(|(_, id)| on(id)).map(|(number, _)| *number).collect()
    }

    /// A node was killed: from now on the first writes of the shards that it led are noted.
    pub fn watch_failover(&self, victim: NodeId, led: BTreeSet<ShardId>, at: Instant) {
        let first_writes = BTreeMap::new();
        self.state().failover = Some(Failover { victim, at, led, first_writes });
    }

    /// What has been noted since.
    pub fn failover(&self) -> Option<Failover> {
        self.state().failover.clone()
    }

    /// Judges what was read of a key while nobody was writing it.
    pub fn judge(&self, id: KeyId, found: Option<&[u8]>) -> Verdict {
        judge(id, &self.expected(id), found)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A writer that panicked did so outside: every change above is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn judge(id: KeyId, expected: &Expected, found: Option<&[u8]>) -> Verdict {
    let is = |sequence: u64| match sequence {
        0 => found.is_none(),
        written => found.is_some_and(|found| found == value(id, written)),
    };
    if is(expected.acknowledged) {
        Verdict::Kept
    } else if expected.unknown.is_some_and(is) {
        Verdict::UnknownApplied
    } else {
        Verdict::Lost
    }
}

/// The value of one write: no other write has the same.
fn value(id: KeyId, sequence: u64) -> Bytes {
    let mut text = format!("{:06}:{sequence}:", id.0).into_bytes();
    text.resize(VALUE_BYTES.max(text.len()), b'.');
    Bytes::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(1);
    const NODE: NodeId = NodeId(1);

    fn acknowledge(ledger: &Ledger, id: KeyId) -> Attempt {
        let attempt = ledger.begin(id);
        ledger.acknowledged(&attempt, SHARD, NODE, Instant::now());
        attempt
    }

    #[test]
    fn only_the_last_acknowledged_write_is_right() {
        let ledger = Ledger::new("t");
        let id = ledger.new_key();
        assert_eq!(ledger.judge(id, None), Verdict::Kept);
        assert_eq!(ledger.judge(id, Some(b"x")), Verdict::Lost);
        let first = acknowledge(&ledger, id);
        let second = acknowledge(&ledger, id);
        assert_eq!(ledger.judge(id, Some(&second.value)), Verdict::Kept);
        for wrong in [None, Some(&first.value[..]), Some(&second.value[1..])] {
            assert_eq!(ledger.judge(id, wrong), Verdict::Lost);
        }
        assert_eq!(ledger.acknowledgements(), 2);
        assert_eq!(ledger.all().len(), 1);
    }

    #[test]
    fn a_refused_write_must_not_be_there() {
        let ledger = Ledger::new("t");
        let id = ledger.new_key();
        let refused = ledger.begin(id);
        ledger.refused(&refused);
        assert_eq!(ledger.judge(id, Some(&refused.value)), Verdict::Lost);
        let kept = acknowledge(&ledger, id);
        assert_eq!(ledger.judge(id, Some(&kept.value)), Verdict::Kept);
    }

    #[test]
    fn an_unknown_write_may_be_there_and_retires_the_key() {
        let ledger = Ledger::new("t");
        let id = ledger.new_key();
        let acknowledged = acknowledge(&ledger, id);
        let unknown = ledger.begin(id);
        ledger.unknown(&unknown);
        assert_eq!(ledger.judge(id, Some(&acknowledged.value)), Verdict::Kept);
        assert_eq!(ledger.judge(id, Some(&unknown.value)), Verdict::UnknownApplied);
        assert_eq!(ledger.judge(id, None), Verdict::Lost);
        let again = std::panic::catch_unwind(|| ledger.begin(id));
        assert!(again.is_err(), "a retired key was written again");
    }

    #[test]
    fn an_unknown_first_write_may_also_be_absent() {
        let ledger = Ledger::new("t");
        let id = ledger.new_key();
        let unknown = ledger.begin(id);
        ledger.unknown(&unknown);
        assert_eq!(ledger.judge(id, None), Verdict::Kept);
        assert_eq!(ledger.judge(id, Some(&unknown.value)), Verdict::UnknownApplied);
        assert_eq!(ledger.all().len(), 1);
    }

    #[test]
    fn writes_under_way_are_known_by_shard() {
        let ledger = Ledger::new("t");
        let (id, other) = (ledger.new_key(), ledger.new_key());
        acknowledge(&ledger, id);
        let (pending, _unseen) = (ledger.begin(id), ledger.begin(other));
        let shards = BTreeSet::from([SHARD]);
        let before = ledger.in_flight_on(&shards);
        assert_eq!(before.len(), 1);
        assert!(ledger.in_flight_on(&BTreeSet::from([ShardId(2)])).is_empty());
        ledger.refused(&pending);
        assert!(ledger.in_flight_on(&shards).is_empty());
    }

    #[test]
    fn a_failover_ends_with_another_nodes_answer() {
        let ledger = Ledger::new("t");
        let id = ledger.new_key();
        let killed = Instant::now();
        ledger.watch_failover(NODE, BTreeSet::from([SHARD]), killed);
        acknowledge(&ledger, id);
        assert!(ledger.failover().unwrap().first_writes.is_empty());
        for ms in [300, 400] {
            let attempt = ledger.begin(id);
            ledger.acknowledged(&attempt, SHARD, NodeId(2), killed + Duration::from_millis(ms));
        }
        let first = ledger.failover().unwrap().first_writes;
        assert_eq!(first, BTreeMap::from([(SHARD, Duration::from_millis(300))]));
    }
}

//! Everything of apply mixed, over random histories: what the model says of each reply, what must
//! hold of the records after each batch, and that replicas agree to the byte. Only this finds what
//! two rules do to each other.

use std::collections::BTreeMap;

use bytes::Bytes;
use coracle_raft::apply::{Outcome, Reply};
use coracle_raft::dedup::Dedup;
use coracle_raft::history::Pinned;
use coracle_storage::state::{Key, Kind};
use proptest::prelude::*;

use crate::apply_history::{Writer, steps};
use crate::apply_model::{BOUNDS, Cell, KEYSPACES, Model, mark, number};
use crate::apply_store::{Entry, Raw, Store};

/// What must hold of the records after every batch.
fn check_records(store: &Store, model: &Model, floor_before: u64) -> u64 {
    let raw = store.raw();
    let state = store.state();
    let dedup = &state.dedup;
    assert_eq!((state.clock, state.ceiling), (model.clock, model.ceiling));
    for (keyspace, threshold) in &model.thresholds {
        let found = state.history.threshold(*keyspace);
        assert_eq!(found, *threshold, "the threshold of keyspace {keyspace}");
    }
    assert!(dedup.floor_ms >= floor_before, "the floor never falls");

    // What makes it exactly once: no judged id is ever new again.
    for (client, sequence, birth) in model.judged.keys().copied() {
        let stored = raw.contains_key(&Key::Result { client, sequence, birth }.encode());
        let below = mark(&raw, client).is_some_and(|mark| sequence < mark.lowest);
        assert!(
            stored || below || birth <= dedup.floor_ms,
            "client {client} sequence {sequence} born {birth} was judged and is new again"
        );
    }
    check_counts(&raw, dedup);
    dedup.floor_ms
}

/// The counters are those of the records, every record has its place in the age index, and the
/// bounds hold.
fn check_counts(raw: &Raw, dedup: &Dedup) {
    let (mut results, mut bytes, mut marks, mut ages) = (0, 0, 0, 0);
    let oldest_ms = number(&raw[&Bytes::from_static(b"\x01\x06")], 33);
    for (key, value) in raw {
        match Key::decode(key).expect("every record is of a known kind") {
            Key::Result { client, sequence, birth } => {
                results += 1;
                let age = &raw[&Key::ResultAge { birth, client, sequence }.encode()];
                bytes += number(age, 1);
                assert!(birth >= oldest_ms, "the search for the oldest has passed it");
                assert!(value.len() as u64 <= number(age, 1));
            }
            Key::Mark { client } => {
                marks += 1;
                let birth = number(value, 17);
                assert!(birth >= oldest_ms, "the search for the oldest has passed it");
                assert!(
                    raw.contains_key(
                        &Key::ResultAge { birth, client, sequence: u64::MAX }.encode()
                    )
                );
            }
            Key::ResultAge { .. } => ages += 1,
            Key::Meta(_) | Key::Data { .. } => {}
        }
    }
    assert_eq!((dedup.results, dedup.result_bytes, dedup.marks), (results, bytes, marks));
    assert_eq!(ages, results + marks, "every age is that of a result or mark");
    assert!(results <= BOUNDS.results && marks <= BOUNDS.marks, "the bounds hold");
}

fn check_reads(store: &Store, model: &Model) {
    let mut versions: Vec<_> = model.judged.values().map(|judged| judged.version).collect();
    versions.push(model.clock + (1 << 16));
    for key in model.cells.keys() {
        for version in versions.iter().flat_map(|version| [version - 1, *version]) {
            let found = store.read(1, key, version);
            let wanted = model
                .at(key, version)
                .map(|cell| (cell.version, cell.value.expect("what is found is not deleted")));
            assert_eq!(found, wanted, "key {key:?} at version {version}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn histories_follow_the_model(steps in prop::collection::vec(steps(), 1..120)) {
        let mut store = Store::new(BOUNDS);
        let mut model = Model::default();
        let mut floor_ms = 0;
        for entry in Writer::log(&steps) {
            let before = store.raw();
            let replies = store.apply(std::slice::from_ref(&entry)).expect("a sound entry");
            model.follow(&entry, &replies, &before);
            floor_ms = check_records(&store, &model, floor_ms);
        }
        check_reads(&store, &model);
    }

    /// What a replica has compacted away, and when, shows in no reply and in nothing that is read.
    #[test]
    fn compaction_of_one_replica_leaves_no_trace(
        steps in prop::collection::vec(steps(), 1..120),
        compactions in prop::collection::vec(any::<prop::sample::Index>(), 1..12),
    ) {
        let log = Writer::log(&steps);
        let compactions: Vec<_> = compactions.iter().map(|at| at.index(log.len())).collect();
        let (mut keeps, mut compacts) = (Store::new(BOUNDS), Store::new(BOUNDS));
        for (at, entry) in log.iter().enumerate() {
            let wanted = keeps.apply(std::slice::from_ref(entry)).expect("a sound entry");
            let replies = compacts.apply(std::slice::from_ref(entry)).expect("a sound entry");
            prop_assert_eq!(replies, wanted);
            if compactions.contains(&at) {
                compacts.compact();
            }
        }
        prop_assert_eq!(compacts.hash(), keeps.hash());
        compacts.compact();
        prop_assert_eq!(compacts.crash().hash(), keeps.hash());
    }

    /// Cuts of the log into batches, snapshots and crashes leave no trace.
    #[test]
    fn replicas_agree_to_the_byte(
        steps in prop::collection::vec(steps(), 1..120),
        cuts in prop::collection::vec(1..8usize, 1..20),
        (snapshot, flushed, crash) in any::<[prop::sample::Index; 3]>().prop_map(<(_, _, _)>::from),
    ) {
        let log = Writer::log(&steps);
        let (snapshot, flushed) = (snapshot.index(log.len()), flushed.index(log.len()));
        let crash = flushed + crash.index(log.len() - flushed);
        let one_by_one = |store: &mut Store, log: &[Entry]| -> Vec<Vec<Reply>> {
            let apply = |entry| store.apply(std::slice::from_ref(entry)).expect("a sound entry");
            log.iter().map(apply).collect()
        };
        let mut first = Store::new(BOUNDS);
        let mut replies = one_by_one(&mut first, &log[..snapshot]);
        let at_snapshot = first.raw();
        replies.extend(one_by_one(&mut first, &log[snapshot..]));
        let wanted = first.raw();

        let mut batched = Store::new(BOUNDS);
        let mut batched_replies = Vec::new();
        let mut rest = &log[..];
        for size in cuts.iter().cycle() {
            let (batch, tail) = rest.split_at(rest.len().min(*size));
            batched_replies.extend(batched.apply(batch).expect("sound entries"));
            rest = tail;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(batched_replies, replies.concat());
        prop_assert_eq!(batched.raw(), wanted.clone());

        let mut later = Store::from_raw(&at_snapshot, BOUNDS);
        prop_assert_eq!(&one_by_one(&mut later, &log[snapshot..])[..], &replies[snapshot..]);
        prop_assert_eq!(later.raw(), wanted.clone());

        let mut crashed = Store::new(BOUNDS);
        one_by_one(&mut crashed, &log[..flushed]);
        crashed.flush();
        one_by_one(&mut crashed, &log[flushed..crash]);
        let mut crashed = crashed.crash();
        prop_assert_eq!(&one_by_one(&mut crashed, &log[flushed..])[..], &replies[flushed..]);
        prop_assert_eq!(crashed.raw(), wanted);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// What compaction drops by the thresholds that were flushed, nobody who may ask misses: not a
    /// reader at the threshold or above, and not a condition, a retry, a replay after a crash.
    #[test]
    fn compaction_changes_no_reply_and_no_read(
        steps in prop::collection::vec(steps(), 1..120),
        (flushed, crash) in any::<[prop::sample::Index; 2]>().prop_map(<(_, _)>::from),
    ) {
        let log = Writer::log(&steps);
        let flushed = flushed.index(log.len());
        let crash = flushed + crash.index(log.len() - flushed);
        let apply = |store: &mut Store, entry: &Entry| {
            store.apply(std::slice::from_ref(entry)).expect("a sound entry")
        };
        let mut plain = Store::new(BOUNDS);
        let mut model = Model::default();
        let mut replies = Vec::new();
        for entry in &log {
            let before = plain.raw();
            replies.push(apply(&mut plain, entry));
            model.follow(entry, replies.last().expect("just pushed"), &before);
        }

        let mut compacted = Store::new(BOUNDS);
        for (entry, wanted) in log[..crash].iter().zip(&replies) {
            prop_assert_eq!(&apply(&mut compacted, entry), wanted);
            if entry.1 as usize == flushed {
                compacted.flush_and_compact(KEYSPACES);
            }
        }
        let mut compacted = compacted.crash_to(flushed);
        for (entry, wanted) in log[flushed..].iter().zip(&replies[flushed..]) {
            prop_assert_eq!(&apply(&mut compacted, entry), wanted, "in a replay");
        }
        compacted.flush_and_compact(KEYSPACES);
        let threshold = compacted.state().history.threshold(1);
        let versions = model.judged.values().map(|judged| judged.version);
        let versions = versions.flat_map(|version| [version - 1, version]).chain([threshold]);
        for version in versions.filter(|version| *version >= threshold) {
            for key in model.cells.keys() {
                let read = |store: &Store| store.read(1, key, version);
                prop_assert_eq!(read(&compacted), read(&plain), "{:?} at {}", key, version);
            }
        }
        // And it does drop: of no key is more left than the threshold allows.
        let below = |cell: &Cell| cell.version <= threshold;
        let kept = model.cells.values().map(|cells| {
            cells.len() - cells.iter().filter(|cell| below(cell)).count().saturating_sub(1)
        });
        prop_assert!(compacted.count(Kind::Data) <= kept.sum::<usize>());
    }
}

/// The histories must come to what they are meant to test.
#[test]
fn histories_meet_every_outcome() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut met = BTreeMap::<&str, u32>::new();
    let mut evicted = 0;
    for _ in 0..100 {
        let steps = prop::collection::vec(steps(), 120).new_tree(&mut runner).expect("no filters");
        let mut store = Store::new(BOUNDS);
        for entry in Writer::log(&steps.current()) {
            for reply in store.apply(&[entry]).expect("a sound entry") {
                let name = match (&reply.outcome, reply.duplicate) {
                    (_, true) => "duplicate",
                    (Outcome::Applied { .. }, _) => "applied",
                    (Outcome::ConditionFailed { .. }, _) => "condition failed",
                    (Outcome::StaleRoute { .. }, _) => "stale route",
                    (Outcome::RetryWindowPassed, _) => "window passed",
                    (Outcome::BirthBeyondClock, _) => "birth beyond clock",
                    (Outcome::FenceBeyondClock, _) => "fence beyond clock",
                    (Outcome::Overloaded { .. }, _) => "overloaded",
                    (Outcome::Invalid { .. }, _) => "invalid",
                    (Outcome::RangeDeleted { deleted: 0, .. }, _) => "nothing in the range",
                    (Outcome::RangeDeleted { .. }, _) => "range deleted",
                    (Outcome::RangeTooLarge { .. }, _) => "range too large",
                    (Outcome::Pinned(Pinned::Held { .. }), _) => "pinned",
                    (Outcome::Pinned(Pinned::Gone { .. }), _) => "pinned too late",
                    (Outcome::Pinned(Pinned::OutOfRange), _) => "pinned out of range",
                    (Outcome::Pinned(Pinned::Full), _) => "pinned beyond the bound",
                    (Outcome::Reshaped(_), _) => unreachable!("the writer splits nothing"),
                };
                *met.entry(name).or_default() += 1;
            }
        }
        evicted += u32::from(store.state().dedup.floor_ms > 0);
    }
    // All but "pinned beyond the bound": `apply_past` has so many.
    assert_eq!(met.len(), 15, "{met:?}");
    assert!(met.values().all(|count| *count >= 10), "{met:?}");
    assert!(evicted >= 50, "the floor rose in {evicted} of 100 histories");
}

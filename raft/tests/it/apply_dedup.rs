//! The rules of exactly once, one by one: known, past and new ids, marks, the floor, and the bounds
//! on memory.

use bytes::Bytes;
use coracle_raft::apply::{Current, Outcome, Reply};
use coracle_raft::command::{Command, Condition, RequestId};
use coracle_raft::dedup::{AGE_MS_MAX, AGE_MS_MIN, BIRTH_AHEAD_MS_MAX, Bounds};
use coracle_raft::descriptor::Descriptor;
use coracle_storage::state::Kind;

use crate::apply_words::{
    Group, START_MS, applied_version, counter, increment, put, request, when,
};

const SMALL: Bounds = Bounds { results: 10, result_bytes: 1 << 20, marks: 10 };

/// Counts the write: what was applied twice shows.
fn count(group: &mut Group, id: RequestId) -> Reply {
    group.write(request(id, vec![increment("n", 1)]))
}

#[test]
fn a_retry_gets_the_first_answer_with_its_term_index_and_version() {
    let mut group = Group::new(Bounds::DEFAULT);
    let id = group.id(1, 1);
    let first = count(&mut group, id);
    assert_eq!((first.term, first.index, first.duplicate), (1, 2, false));
    count(&mut group, RequestId { sequence: 2, ..id });
    group.term = 4;
    group.now_ms += 1_000;
    let again = count(&mut group, id);
    assert_eq!(again, Reply { duplicate: true, ..first });
    assert_eq!(group.read("n").as_deref(), Some(b"2".as_slice()));
    // Also when both are in one entry.
    let twice = request(RequestId { sequence: 3, ..id }, vec![increment("n", 1)]);
    let replies = group.entry(Command::Requests(vec![twice.clone(), twice]));
    assert_eq!(replies[1], Reply { duplicate: true, ..replies[0].clone() });
    assert_eq!(counter(&replies[0]), Some(3));
}

#[test]
fn a_retry_of_a_failed_condition_gets_the_value_that_it_met_then() {
    let mut group = Group::new(Bounds::DEFAULT);
    let version = applied_version(&group.write(request(group.id(1, 1), vec![put("k", "old")])));
    let late = request(group.id(1, 2), vec![when(Condition::IfAbsent, put("k", "mine"))]);
    let first = group.write(late.clone());
    let Outcome::ConditionFailed { results } = &first.outcome else { panic!("{first:?}") };
    let met = Current { version, expires_at: 0, value: Some(Bytes::from_static(b"old")) };
    assert_eq!(results[0].current, Some(met));
    group.write(request(group.id(1, 3), vec![put("k", "new")]));
    assert_eq!(group.write(late.clone()), Reply { duplicate: true, ..first });
    // Beyond the history the version is left.
    group.now_ms += 61_000;
    group.write(request(group.id(1, 4), vec![put("k", "newest")]));
    let Outcome::ConditionFailed { results } = group.write(late).outcome else {
        panic!("the failure is forgotten")
    };
    assert_eq!(results[0].current, Some(Current { version, expires_at: 0, value: None }));
}

#[test]
fn client_sequence_and_birth_together_are_the_id() {
    let mut group = Group::new(Bounds::DEFAULT);
    let id = group.id(1, 1);
    count(&mut group, id);
    for other in [
        RequestId { client: 2, ..id },
        RequestId { sequence: 2, ..id },
        RequestId { birth_ms: id.birth_ms - 1, ..id },
    ] {
        assert!(!count(&mut group, other).duplicate);
    }
    assert_eq!(group.read("n").as_deref(), Some(b"4".as_slice()));
}

#[test]
fn below_the_mark_everything_is_refused_and_the_mark_only_rises() {
    let mut group = Group::new(Bounds::DEFAULT);
    let id = group.id(1, 1);
    count(&mut group, id);
    count(&mut group, RequestId { sequence: 9, lowest_unanswered: 5, ..id });
    for below in [id, RequestId { sequence: 4, ..id }] {
        assert_eq!(count(&mut group, below).outcome, Outcome::RetryWindowPassed);
    }
    // An older retry brings an older mark.
    let reply = count(&mut group, RequestId { sequence: 6, lowest_unanswered: 2, ..id });
    assert_eq!(counter(&reply), Some(3));
    assert_eq!(
        count(&mut group, RequestId { sequence: 4, ..id }).outcome,
        Outcome::RetryWindowPassed
    );
    // A retry of what is known raises it just as well.
    assert!(count(&mut group, RequestId { sequence: 9, lowest_unanswered: 7, ..id }).duplicate);
    assert_eq!(
        count(&mut group, RequestId { sequence: 6, ..id }).outcome,
        Outcome::RetryWindowPassed
    );
    assert_eq!(group.store.state().dedup.floor_ms, 0, "no mark raises the floor");
}

#[test]
fn births_beyond_the_bound_on_clocks_are_refused() {
    let mut group = Group::new(Bounds::DEFAULT);
    let id = group.id(1, 1);
    let bound = START_MS + BIRTH_AHEAD_MS_MAX;
    let beyond = RequestId { birth_ms: bound + 1, ..id };
    assert_eq!(count(&mut group, beyond).outcome, Outcome::BirthBeyondClock);
    applied_version(&count(&mut group, RequestId { birth_ms: bound, ..id }));
    // A leader whose clock is behind: the group clock counts.
    group.now_ms -= 400;
    let again = RequestId { birth_ms: bound, sequence: 2, ..id };
    applied_version(&count(&mut group, again));
}

#[test]
fn full_of_young_results_it_refuses_new_writes_until_they_have_aged() {
    let mut group = Group::new(SMALL);
    let first = group.id(1, 1);
    for sequence in 1..=10 {
        count(&mut group, RequestId { sequence, ..first });
    }
    let late = RequestId { sequence: 11, ..first };
    assert!(matches!(count(&mut group, late).outcome, Outcome::Overloaded { .. }));
    assert!(count(&mut group, first).duplicate, "a retry needs no room");
    group.now_ms += AGE_MS_MIN;
    assert!(matches!(count(&mut group, late).outcome, Outcome::Overloaded { .. }), "60 s: young");
    // One more millisecond.
    group.now_ms += 1;
    let late = RequestId { birth_ms: group.now_ms, ..late };
    applied_version(&count(&mut group, late));
    assert_eq!(group.store.state().dedup.floor_ms, first.birth_ms);
    assert_eq!(count(&mut group, first).outcome, Outcome::RetryWindowPassed);
    assert_eq!(group.read("n").as_deref(), Some(b"11".as_slice()));
    // Born at the floor, never seen: it can't be told apart from one that was.
    let unseen = RequestId { client: 7, ..first };
    assert_eq!(count(&mut group, unseen).outcome, Outcome::RetryWindowPassed);
    let younger = RequestId { client: 7, birth_ms: first.birth_ms + 1, ..first };
    applied_version(&count(&mut group, younger));
}

#[test]
fn the_clock_by_which_ids_age_never_steps_back() {
    let mut group = Group::new(SMALL);
    for sequence in 1..=10 {
        let id = group.id(1, sequence);
        count(&mut group, id);
    }
    // Refused, so without a version; but ids have aged to its entry's stamp, and stay so under a
    // leader whose clock is behind.
    group.now_ms += AGE_MS_MIN;
    let mut unborn = group.id(2, 1);
    unborn.birth_ms += BIRTH_AHEAD_MS_MAX + 1;
    assert_eq!(count(&mut group, unborn).outcome, Outcome::BirthBeyondClock);
    let clock = group.store.state().clock;
    assert_eq!(clock, group.now_ms << 16);
    group.now_ms -= 400;
    let behind = group.id(2, 1);
    assert!(matches!(count(&mut group, behind).outcome, Outcome::Overloaded { .. }));
    assert_eq!(group.store.state().clock, clock);
}

#[test]
fn bytes_are_bounded_like_numbers() {
    let mut group = Group::new(Bounds { result_bytes: 2_000, ..Bounds::DEFAULT });
    let mut sequence = 0;
    let overloaded = loop {
        sequence += 1;
        let id = group.id(1, sequence);
        match count(&mut group, id).outcome {
            Outcome::Applied { .. } => assert!(sequence < 30, "no bound is met"),
            other => break other,
        }
    };
    assert!(matches!(overloaded, Outcome::Overloaded { .. }), "{overloaded:?}");
    assert!(sequence > 5);
}

#[test]
fn what_a_client_needs_no_more_makes_room_at_once_and_leaves_the_floor() {
    let mut group = Group::new(SMALL);
    for sequence in 1..=10 {
        let id = group.id(1, sequence);
        count(&mut group, id);
    }
    let id = RequestId { lowest_unanswered: 11, ..group.id(1, 11) };
    applied_version(&count(&mut group, id));
    let dedup = group.store.state().dedup;
    assert_eq!((dedup.results, dedup.floor_ms), (1, 0));
}

#[test]
fn new_clients_find_no_room_among_young_marks_but_known_ones_do() {
    let mut group = Group::new(Bounds { marks: 3, ..Bounds::DEFAULT });
    for client in 1..=3 {
        let id = group.id(client, 1);
        count(&mut group, id);
    }
    let id = group.id(4, 1);
    assert!(matches!(count(&mut group, id).outcome, Outcome::Overloaded { .. }));
    let id = group.id(3, 2);
    applied_version(&count(&mut group, id));
    assert_eq!(group.store.count(Kind::Mark), 3);
    // Marks age by the minute.
    group.now_ms += 2 * AGE_MS_MIN + 1;
    let id = group.id(4, 1);
    applied_version(&count(&mut group, id));
}

#[test]
fn a_mark_that_goes_hands_over_to_the_floor() {
    let mut group = Group::new(Bounds { marks: 1, ..Bounds::DEFAULT });
    let id = group.id(1, 1);
    count(&mut group, id);
    // The result of sequence 1 is dropped for good: only the mark knows. What stays was born
    // before.
    for sequence in [100, 300] {
        let above = RequestId {
            sequence,
            lowest_unanswered: sequence,
            birth_ms: id.birth_ms - 1_000,
            ..id
        };
        count(&mut group, above);
    }
    assert_eq!(group.store.state().dedup.results, 1);
    group.now_ms += 3 * AGE_MS_MIN;
    let other = group.id(2, 1);
    applied_version(&count(&mut group, other));
    let state = group.store.state();
    assert!(state.dedup.floor_ms >= id.birth_ms, "the mark's births are below the floor");
    assert!(state.dedup.floor_ms < group.now_ms - AGE_MS_MIN, "young ids are not");
    assert_eq!(count(&mut group, id).outcome, Outcome::RetryWindowPassed);
}

#[test]
fn results_and_marks_leave_at_their_age_without_any_need_of_room() {
    let mut group = Group::new(Bounds::DEFAULT);
    for client in 1..=5 {
        let id = group.id(client, 1);
        count(&mut group, id);
    }
    group.now_ms += AGE_MS_MAX + 70_000;
    // Each write searches one stretch of the index.
    for sequence in 1..=300 {
        let id = group.id(9, sequence);
        count(&mut group, id);
    }
    let dedup = group.store.state().dedup;
    assert_eq!((dedup.results, dedup.marks), (300, 1));
    assert!(dedup.floor_ms >= START_MS && dedup.floor_ms < group.now_ms - AGE_MS_MAX);
}

#[test]
fn no_request_drops_or_evicts_more_than_a_bounded_number_and_still_it_catches_up() {
    let mut group = Group::new(Bounds::DEFAULT);
    let many = 1_000;
    let ids: Vec<_> = (0..many).map(|sequence| group.id(1, sequence)).collect();
    let writes = ids.iter().map(|id| request(*id, vec![increment("n", 1)]));
    group.entry(Command::Requests(writes.collect()));
    let mut before = group.store.count(Kind::Result);
    assert_eq!(before as u64, many);
    // The mark rises over all of them at once, then ever again by what makes it look.
    let mut sequence = many;
    while before > 10 {
        let id = RequestId { lowest_unanswered: sequence, ..group.id(1, sequence) };
        count(&mut group, id);
        let left = group.store.count(Kind::Result);
        assert!(left + 64 >= before, "one request dropped {} results", before - left);
        assert!(sequence < many + 200, "it never catches up: {left} are left");
        (before, sequence) = (left, sequence + 1);
    }

    // The same for age.
    let mut group = Group::new(Bounds::DEFAULT);
    let writes = ids.iter().map(|id| request(*id, vec![increment("n", 1)]));
    group.entry(Command::Requests(writes.collect()));
    group.now_ms += AGE_MS_MAX + 10_000;
    let mut before = group.store.count(Kind::Result);
    let mut sequence = 0;
    while before > 100 {
        let id = group.id(2, sequence);
        count(&mut group, id);
        let left = group.store.count(Kind::Result);
        assert!(left + 64 >= before, "one request evicted {} results", before - left);
        assert!(sequence < 300, "it never catches up: {left} are left");
        (before, sequence) = (left, sequence + 1);
    }
}

#[test]
fn golden_bytes_of_the_records() {
    let mut group = Group::fresh(Bounds::DEFAULT);
    group.now_ms = 0x1_0000;
    let descriptor = Descriptor { shard: 1, arc: Some((0, 0)), epoch: 1 };
    group.entry(Command::Describe(descriptor));
    let id = RequestId { client: 0xC1, sequence: 9, birth_ms: 0x1_0000, lowest_unanswered: 3 };
    count(&mut group, id);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let lines: Vec<_> = group
        .store
        .raw()
        .iter()
        .filter(|(key, _)| key[0] != Kind::Data as u8 && key[..] != b"\x01\x01"[..])
        .map(|(key, value)| format!("{} = {}", hex(key), hex(value)))
        .collect();
    let golden = [
        // Clock, ceiling, floor with the counters, descriptor.
        "0104 = 010000000100000000",
        "0105 = 010000000100fa0000",
        "0106 = 0100000000000000000000000000000001000000000000009200000000000000010000000000010000",
        "0107 = 01000000000000000100000000000000010100000000000000000000000000000000",
        // Result, its age, its client's mark in the age index, the mark.
        "0200000000000000c100000000000000090000000000010000 = \
         0100000000000000010000000000000002000000010000000001\
         0000000100000001000000000000000000000001",
        "03000000000001000000000000000000c10000000000000009 = 010000000000000092",
        "03000000000001d4bf00000000000000c1ffffffffffffffff = 01",
        "0400000000000000c1 = 0100000000000000030000000000000003000000000001d4bf",
    ];
    assert_eq!(lines, golden);
}

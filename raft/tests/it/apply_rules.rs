//! The rules of apply one by one: routing, versions, conditions, batches, counters, expiry. See
//! `apply_dedup` for retries and `apply_model` for all of it mixed.

use bytes::Bytes;
use coracle_raft::apply::{ApplyError, CURRENT_BYTES_MAX, Current, OperationResult, Outcome};
use coracle_raft::command::{Change, Command, Condition, RequestId, Stamped};
use coracle_raft::dedup::Bounds;
use coracle_raft::descriptor::Descriptor;

use crate::apply_store::{Logged, Store};
use crate::apply_words::{
    Group, applied_version, counter, increment, operation, put, put_for, request, when,
};

fn group() -> Group {
    Group::new(Bounds::DEFAULT)
}

#[test]
fn group_without_a_descriptor_serves_nothing_and_the_first_one_stays() {
    let mut group = Group::fresh(Bounds::DEFAULT);
    let write = request(group.id(1, 1), vec![put("k", "v")]);
    assert_eq!(group.write(write).outcome, Outcome::StaleRoute { descriptor: None });
    let first = Descriptor { shard: 1, arc: Some((10, 20)), epoch: 1 };
    group.entry(Command::Describe(first.clone()));
    group.entry(Command::Describe(Descriptor { shard: 2, arc: None, epoch: 9 }));
    assert_eq!(group.store.state().descriptor, Some(first));
}

#[test]
fn stale_route_leaves_nothing_and_the_same_id_may_come_again() {
    let mut group = Group::fresh(Bounds::DEFAULT);
    let narrow = Descriptor { shard: 1, arc: Some((0, 10)), epoch: 1 };
    group.entry(Command::Describe(narrow.clone()));
    // Every entry with requests moves clock, ceiling and history; nothing else may change.
    group.write(request(group.id(1, 0), vec![]));
    let before = group.store.raw();
    let id = group.id(1, 1);
    let mut outside = request(id, vec![put("k", "v")]);
    outside.position = 10;
    let mut late = request(id, vec![put("k", "v")]);
    late.epoch = 2;
    let mut system = request(id, vec![put("k", "v")]);
    system.keyspace = 0;
    for stale in [outside, late, system] {
        let reply = group.write(stale);
        let descriptor = Some(narrow.clone());
        assert_eq!(reply.outcome, Outcome::StaleRoute { descriptor });
    }
    assert_eq!(group.store.raw(), before, "a stale route stores nothing");
    let mut named = request(id, vec![put("k", "v")]);
    named.epoch = 1;
    assert!(!group.write(named).duplicate);
    assert_eq!(group.read("k").as_deref(), Some(b"v".as_slice()));
}

#[test]
fn membership_raises_the_epoch_so_that_what_was_planned_before_fails() {
    let mut group = group();
    let mut planned = request(group.id(1, 1), vec![put("k", "v")]);
    planned.epoch = 1;
    group.store.apply(&[(1, 50, Logged::Membership)]).expect("no command");
    assert!(matches!(
        group.write(planned.clone()).outcome,
        Outcome::StaleRoute { descriptor: Some(Descriptor { epoch: 2, .. }) }
    ));
    planned.epoch = 2;
    applied_version(&group.write(planned));
}

#[test]
fn versions_rise_with_the_log_whatever_the_stamps_say() {
    let mut group = group();
    let mut versions = Vec::new();
    for (sequence, step) in [(1, 0), (2, 5), (3, -400), (4, 0), (5, 1)] {
        group.now_ms = group.now_ms.saturating_add_signed(step);
        let writes = (0..2).map(|n| request(group.id(sequence, n), vec![put("k", "v")])).collect();
        let replies = group.entry(Command::Requests(writes));
        versions.extend(replies.iter().map(applied_version));
    }
    assert!(versions.is_sorted_by(|a, b| a < b), "{versions:?}");
    assert_eq!(versions[0], (group.now_ms + 394) << 16, "a stamp above the clock is the version");
    assert_eq!(versions[4], versions[3] + 1, "a stamp below the clock gives the next version");
    let state = group.store.state();
    assert_eq!(state.clock, versions[9]);
    assert!(state.ceiling >= state.clock);
}

#[test]
fn advance_raises_only_the_ceiling_and_nothing_lowers_it() {
    let mut group = group();
    group.write(request(group.id(1, 1), vec![put("k", "v")]));
    let before = group.store.state();
    group.now_ms += 100;
    assert!(group.entry(Command::Advance).is_empty());
    let after = group.store.state();
    assert_eq!(after.ceiling, (group.now_ms + 250) << 16);
    assert_eq!(after.clock, before.clock);
    group.now_ms -= 300;
    group.entry(Command::Advance);
    assert_eq!(group.store.state().ceiling, after.ceiling);
}

#[test]
fn no_version_that_is_used_lies_above_the_ceiling() {
    let mut group = group();
    let stamp = group.now_ms << 16;
    let writes = [1, 2].map(|sequence| request(group.id(1, sequence), vec![put("k", "v")]));
    let command = Command::Requests(writes.to_vec());
    let entry = Stamped { stamp, ceiling: stamp, command };
    // Without the ceiling of the entry that described the group.
    group.store = Store::new(Bounds::DEFAULT);
    let descriptor = Descriptor { shard: 1, arc: Some((0, 0)), epoch: 1 };
    let describe = Stamped { stamp, ceiling: 0, command: Command::Describe(descriptor) };
    let log = [describe, entry].map(|entry| (1, 1, Logged::Command(entry.encode())));
    group.store.apply(&log).expect("sound entries");
    let state = group.store.state();
    assert_eq!((state.clock, state.ceiling), (stamp + 1, stamp + 1));
}

#[test]
fn requests_of_one_entry_see_each_other() {
    let mut group = group();
    let writes = vec![
        request(group.id(1, 1), vec![increment("n", 2)]),
        request(group.id(1, 2), vec![increment("n", 3)]),
        request(group.id(2, 1), vec![when(Condition::IfAbsent, put("n", "x"))]),
        request(
            group.id(2, 2),
            vec![when(Condition::IfValue(Bytes::from_static(b"5")), put("n", "y"))],
        ),
    ];
    let replies = group.entry(Command::Requests(writes));
    assert_eq!((counter(&replies[0]), counter(&replies[1])), (Some(2), Some(5)));
    let (version, value) = (applied_version(&replies[1]), Some(Bytes::from_static(b"5")));
    let met = Current { version, expires_at: 0, value };
    let failed = OperationResult { condition_failed: true, current: Some(met), counter: None };
    assert_eq!(replies[2].outcome, Outcome::ConditionFailed { results: vec![failed] });
    applied_version(&replies[3]);
    assert_eq!(group.read("n").as_deref(), Some(b"y".as_slice()));
}

#[test]
fn a_failed_condition_undoes_the_whole_request_and_tells_what_it_met() {
    let mut group = group();
    let version = applied_version(&group.write(request(group.id(1, 1), vec![put("a", "1")])));
    let reply = group.write(request(
        group.id(1, 2),
        vec![
            put("b", "2"),
            when(Condition::IfVersion(version + 1), put("a", "3")),
            when(Condition::IfVersion(version), operation("a", Change::Check)),
            when(Condition::IfVersion(version), operation("none", Change::Delete)),
        ],
    ));
    let Outcome::ConditionFailed { results } = reply.outcome else { panic!("{reply:?}") };
    let met = Current { version, expires_at: 0, value: Some(Bytes::from_static(b"1")) };
    let failed = |current| OperationResult { condition_failed: true, current, counter: None };
    let fine = OperationResult::default();
    assert_eq!(results, vec![fine.clone(), failed(Some(met)), fine, failed(None)]);
    assert_eq!(group.read("b"), None);
    assert_eq!(group.read("a").as_deref(), Some(b"1".as_slice()));
}

#[test]
fn conditions_are_judged_before_the_batch_and_its_operations_build_on_each_other() {
    let mut group = group();
    let reply = group.write(request(
        group.id(1, 1),
        vec![
            put("k", "40"),
            when(Condition::IfAbsent, increment("k", 2)),
            put("gone", "x"),
            operation("gone", Change::Delete),
            increment("gone", 7),
            operation("none", Change::Check),
        ],
    ));
    let Outcome::Applied { results, .. } = &reply.outcome else { panic!("{reply:?}") };
    let counters: Vec<_> = results.iter().map(|result| result.counter).collect();
    assert_eq!(counters, [None, Some(42), None, None, Some(7), None]);
    assert_eq!(group.read("k").as_deref(), Some(b"42".as_slice()));
    assert_eq!(group.read("gone").as_deref(), Some(b"7".as_slice()));
    assert_eq!(group.read("none"), None);
}

#[test]
fn an_impossible_increment_undoes_the_whole_request_for_good() {
    let mut group = group();
    group
        .write(request(group.id(1, 1), vec![put("text", "x"), put("full", &i64::MAX.to_string())]));
    for (sequence, key) in [(2, "text"), (3, "full")] {
        let id = group.id(1, sequence);
        let bad = request(id, vec![put("other", "v"), increment(key, 1)]);
        let first = group.write(bad.clone());
        assert!(matches!(first.outcome, Outcome::Invalid { .. }), "{first:?}");
        assert_eq!(group.read("other"), None);
        // The reason goes; the answer stays.
        group.write(request(group.id(2, sequence), vec![put(key, "0")]));
        let again = group.write(bad);
        assert_eq!((again.outcome, again.duplicate), (first.outcome, true));
    }
    let full = group.write(request(group.id(1, 9), vec![increment("full", i64::MAX)]));
    assert_eq!(counter(&full), Some(i64::MAX));
}

#[test]
fn a_request_that_is_none_is_refused_and_not_kept() {
    let mut group = group();
    let before = group.store.state().dedup;
    let mut contradicts = group.id(1, 5);
    contradicts.lowest_unanswered = 6;
    let reserved = group.id(1, u64::MAX);
    for bad in [
        request(group.id(1, 1), vec![]),
        request(contradicts, vec![put("k", "v")]),
        request(reserved, vec![put("k", "v")]),
    ] {
        let reply = group.write(bad);
        assert!(matches!(reply.outcome, Outcome::Invalid { .. }), "{reply:?}");
    }
    assert_eq!(group.store.state().dedup, before);
    assert_eq!(group.read("k"), None);
}

#[test]
fn an_expired_key_is_absent_from_its_moment_for_reads_conditions_and_counters() {
    let mut group = group();
    let born = group.now_ms;
    let version = applied_version(
        &group.write(request(group.id(1, 1), vec![put_for("a", "1", 100), put_for("n", "5", 100)])),
    );
    let end = (born + 100) << 16;
    assert!(group.read_at("a", end - 1).is_some() && group.read_at("a", end).is_none());
    assert!(group.read_at("a", version).is_some());

    group.now_ms = born + 99;
    let early =
        group.write(request(group.id(1, 2), vec![when(Condition::IfAbsent, put("a", "2"))]));
    assert!(matches!(early.outcome, Outcome::ConditionFailed { .. }), "{early:?}");
    // The write's own version decides, not the leader's clock: a leader behind sees it expired too.
    group.now_ms = born + 100;
    group.write(request(group.id(1, 3), vec![put("clock", "ahead")]));
    group.now_ms = born + 50;
    let late = group.write(request(group.id(1, 4), vec![when(Condition::IfAbsent, put("a", "2"))]));
    applied_version(&late);
    let counted = group.write(request(group.id(1, 5), vec![increment("n", 1)]));
    assert_eq!(counter(&counted), Some(1), "an expired number counts as 0");
}

#[test]
fn an_increment_keeps_no_time_to_live() {
    let mut group = group();
    group.write(request(group.id(1, 1), vec![put_for("n", "5", 100)]));
    group.write(request(group.id(1, 2), vec![increment("n", 1)]));
    group.now_ms += 1_000;
    group.write(request(group.id(1, 3), vec![put("other", "v")]));
    assert_eq!(group.read("n").as_deref(), Some(b"6".as_slice()));
}

#[test]
fn values_in_failed_conditions_stop_where_the_reply_is_full() {
    let mut group = group();
    let large = "x".repeat(CURRENT_BYTES_MAX / 2);
    group.write(request(group.id(1, 1), vec![put("a", &large), put("b", &large), put("c", "v")]));
    let absent = |key| when(Condition::IfAbsent, operation(key, Change::Check));
    let write = request(group.id(1, 2), vec![absent("a"), absent("b"), absent("c")]);
    let reply = group.write(write);
    let Outcome::ConditionFailed { results } = reply.outcome else { panic!("no failure") };
    let told = |at: usize| results[at].current.as_ref().and_then(|current| current.value.as_ref());
    assert!(told(0).is_some() && told(1).is_some(), "two halves fit exactly");
    assert_eq!(told(2), None);
    assert!(results[2].current.is_some(), "the version is told all the same");
}

#[test]
fn an_unknown_command_stops_apply_and_changes_nothing() {
    let mut group = group();
    let before = group.store.raw();
    let good = Stamped { stamp: 1, ceiling: 2, command: Command::Advance }.encode();
    for (at, to) in [(0, 2), (1, 77)] {
        let mut bytes = good.to_vec();
        bytes[at] = to;
        let log = [(1, 9, Logged::Command(Bytes::from(bytes)))];
        let refused = group.store.apply(&log);
        assert!(matches!(refused, Err(ApplyError::Decode { index: 9, .. })), "{refused:?}");
        assert_eq!(group.store.raw(), before);
    }
}

#[test]
fn a_stamp_that_leaves_no_version_stops_apply() {
    let mut group = group();
    let entry = |group: &Group, sequence| {
        // Born then, too, else it would have been long ago.
        let id = RequestId { birth_ms: u64::MAX >> 16, ..group.id(1, sequence) };
        let command = Command::Requests(vec![request(id, vec![put("k", "v")])]);
        Logged::Command(Stamped { stamp: u64::MAX, ceiling: u64::MAX, command }.encode())
    };
    let log = [(1, 8, entry(&group, 1)), (1, 9, entry(&group, 2))];
    assert!(matches!(group.store.apply(&log), Err(ApplyError::ClockExhausted { index: 9 })));
}

//! How far back a group can be read: settings, pins and the threshold that follows from them, by the
//! rule. What they do to each other in long histories is `apply_histories`.

use coracle_raft::apply::{Outcome, Reply};
use coracle_raft::command::{Command, Condition};
use coracle_raft::dedup::Bounds;
use coracle_raft::history::{
    HISTORY_MS, HISTORY_MS_MIN, KEYSPACES_MAX, PIN_MS_MAX, PINS_MAX, Pin, Pinned, Settings,
};
use coracle_storage::state::{Key, MetaName};

use crate::apply_store::Store;
use crate::apply_words::{Group, KEYSPACE, START_MS, put, request, when};

fn group() -> Group {
    let mut group = Group::new(Bounds::DEFAULT);
    tick(&mut group);
    group
}

/// The clock of the group moves to its leader's.
fn tick(group: &mut Group) {
    assert!(group.entry(Command::Settings(Vec::new())).is_empty());
}

fn set(group: &mut Group, history_ms: u64, revision: u64) {
    let settings = Settings { keyspace: KEYSPACE, history_ms, revision };
    assert!(group.entry(Command::Settings(vec![settings])).is_empty());
}

fn pin(group: &mut Group, version: u64, until_ms: u64) -> Pinned {
    let mut replies = group.entry(Command::Pin(Pin { keyspace: KEYSPACE, version, until_ms }));
    match replies.pop() {
        Some(Reply { outcome: Outcome::Pinned(pinned), .. }) if replies.is_empty() => pinned,
        other => panic!("one reply to a pin, not {other:?}"),
    }
}

fn threshold_ms(group: &Group) -> u64 {
    let threshold = group.store.state().history.threshold(KEYSPACE);
    assert_eq!(threshold % (1 << 16), 0, "the first version of a millisecond");
    threshold >> 16
}

#[test]
fn threshold_follows_the_clock_and_never_falls() {
    let mut group = group();
    group.write(request(group.id(1, 1), vec![put("k", "v")]));
    assert_eq!(threshold_ms(&group), START_MS - HISTORY_MS);
    group.now_ms -= 10_000;
    group.write(request(group.id(1, 2), vec![put("k", "v")]));
    assert_eq!(threshold_ms(&group), START_MS - HISTORY_MS);
    group.now_ms += 11_000;
    group.write(request(group.id(1, 3), vec![put("k", "v")]));
    assert_eq!(threshold_ms(&group), START_MS + 1_000 - HISTORY_MS);
}

#[test]
fn shorter_history_counts_at_once_and_a_longer_one_from_there_on() {
    let mut group = group();
    set(&mut group, 10_000, 1);
    assert_eq!(threshold_ms(&group), START_MS - 10_000);
    set(&mut group, 3_600_000, 2);
    for passed_ms in [0, 1_000, 3_590_000, 3_591_000] {
        group.now_ms = START_MS + passed_ms;
        tick(&mut group);
        let wanted = (START_MS - 10_000).max(group.now_ms - 3_600_000);
        assert_eq!(threshold_ms(&group), wanted, "after {passed_ms} ms");
    }
    assert_eq!(group.store.state().history.threshold(9) >> 16, group.now_ms - HISTORY_MS);
}

#[test]
fn older_or_equal_revision_changes_nothing() {
    let mut group = group();
    set(&mut group, 10_000, 0);
    assert_eq!(threshold_ms(&group), START_MS - HISTORY_MS);
    set(&mut group, 10_000, 5);
    set(&mut group, 6_000, 5);
    set(&mut group, 6_000, 4);
    assert_eq!(threshold_ms(&group), START_MS - 10_000);
    assert_eq!(group.store.state().history.revision(KEYSPACE), 5);
    set(&mut group, 6_000, 6);
    assert_eq!(threshold_ms(&group), START_MS - 6_000);
}

#[test]
fn keyspace_without_history_keeps_what_requests_under_way_need() {
    let mut group = group();
    set(&mut group, 0, 1);
    assert_eq!(threshold_ms(&group), START_MS - HISTORY_MS_MIN);
}

#[test]
fn pin_holds_the_threshold_until_its_time_and_then_lets_it_go() {
    let mut group = group();
    let version = (START_MS - 1_000) << 16;
    let until_ms = START_MS + 100_000;
    assert_eq!(pin(&mut group, version, until_ms), Pinned::Held { until_ms });
    for (now_ms, wanted) in [
        (START_MS + 40_000, START_MS - 20_000),
        (START_MS + 80_000, START_MS - 1_000),
        (until_ms - 1, START_MS - 1_000),
        (until_ms, until_ms - HISTORY_MS),
    ] {
        group.now_ms = now_ms;
        tick(&mut group);
        assert_eq!(threshold_ms(&group), wanted, "at {now_ms}");
    }
    assert_eq!(group.store.state().history.threshold(2) >> 16, until_ms - HISTORY_MS);
}

#[test]
fn pin_of_one_version_is_shared_until_the_latest_time() {
    let mut group = group();
    let (version, late) = (START_MS << 16, START_MS + 200_000);
    assert_eq!(pin(&mut group, version, late), Pinned::Held { until_ms: late });
    let soon = START_MS + 100_000;
    assert_eq!(pin(&mut group, version, soon), Pinned::Held { until_ms: late });
    group.now_ms = late - 1;
    tick(&mut group);
    assert_eq!(threshold_ms(&group), START_MS);
    let later = late + 50_000;
    assert_eq!(pin(&mut group, version, later), Pinned::Held { until_ms: later });
    group.now_ms = later - 1;
    tick(&mut group);
    assert_eq!(threshold_ms(&group), START_MS);
}

#[test]
fn pin_of_what_may_be_gone_is_refused_with_the_oldest() {
    let mut group = group();
    let oldest = (START_MS - HISTORY_MS) << 16;
    let until_ms = START_MS + 10_000;
    assert_eq!(pin(&mut group, oldest - 1, until_ms), Pinned::Gone { oldest });
    assert_eq!(pin(&mut group, oldest, until_ms), Pinned::Held { until_ms });
}

#[test]
fn pin_that_reaches_too_far_or_nowhere_is_refused() {
    let mut group = group();
    let version = (START_MS - 20_000) << 16;
    let farthest = START_MS - 20_000 + PIN_MS_MAX;
    assert_eq!(pin(&mut group, version, farthest + 1), Pinned::OutOfRange);
    assert_eq!(pin(&mut group, version, START_MS), Pinned::OutOfRange);
    assert_eq!(pin(&mut group, version, farthest), Pinned::Held { until_ms: farthest });
    let ahead = (START_MS + 400_000) << 16;
    assert_eq!(pin(&mut group, ahead, START_MS + PIN_MS_MAX + 1), Pinned::OutOfRange);
}

#[test]
fn pins_are_bounded_and_make_room_when_they_run_out() {
    let mut group = group();
    let until_ms = START_MS + 10_000;
    for number in 0..PINS_MAX as u64 {
        let pinned = pin(&mut group, (START_MS << 16) + number, until_ms);
        assert_eq!(pinned, Pinned::Held { until_ms });
    }
    assert_eq!(pin(&mut group, (START_MS + 1) << 16, until_ms), Pinned::Full);
    let longer = until_ms + 1_000;
    assert_eq!(pin(&mut group, START_MS << 16, longer), Pinned::Held { until_ms: longer });
    group.now_ms = until_ms;
    tick(&mut group);
    let pinned = pin(&mut group, until_ms << 16, until_ms + 1_000);
    assert_eq!(pinned, Pinned::Held { until_ms: until_ms + 1_000 });
}

#[test]
fn keyspaces_are_bounded() {
    let mut group = group();
    let settings = |keyspace| Settings { keyspace, history_ms: 9_000, revision: 1 };
    group.entry(Command::Settings((0..KEYSPACES_MAX as u32 + 1).map(settings).collect()));
    let history = group.store.state().history;
    let last = KEYSPACES_MAX as u32;
    assert_eq!((history.revision(last - 1), history.revision(last)), (1, 0));
    group.entry(Command::Settings(vec![Settings { revision: 2, ..settings(0) }]));
    assert_eq!(group.store.state().history.revision(0), 2, "one that is there still changes");
}

/// With a short history the value that a condition met is gone before its result is: a retry is told
/// the same version, and no value.
#[test]
fn retry_is_told_no_value_from_beyond_the_history() {
    let mut group = group();
    set(&mut group, 0, 1);
    group.write(request(group.id(1, 1), vec![put("k", "first")]));
    let id = group.id(1, 2);
    let failing = request(id, vec![when(Condition::IfAbsent, put("k", "second"))]);
    let current = |reply: &Reply| match &reply.outcome {
        Outcome::ConditionFailed { results } => results[0].current.clone().expect("it is there"),
        other => panic!("the condition fails: {other:?}"),
    };
    let first = current(&group.write(failing.clone()));
    assert_eq!(first.value.as_deref(), Some(b"first".as_slice()));
    group.now_ms += HISTORY_MS_MIN;
    tick(&mut group);
    let retried = group.write(failing.clone());
    assert_eq!((current(&retried), retried.duplicate), (first.clone(), true));
    group.now_ms += 1;
    group.write(request(group.id(1, 3), vec![put("k", "third")]));
    group.store.flush_and_compact(0..2);
    let retried = current(&group.write(failing));
    assert_eq!((retried.version, retried.value), (first.version, None));
}

#[test]
fn golden_bytes_of_settings_and_pins() {
    let mut group = group();
    set(&mut group, 7_000, 2);
    pin(&mut group, START_MS << 16, START_MS + 5_000);
    let raw = group.store.raw();
    let hex = |name| {
        let bytes = &raw[&Key::Meta(name).encode()];
        bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let number = |number: u64| format!("{number:016x}");
    let floor = number((START_MS - HISTORY_MS) << 16);
    let keyspaces = "010000000100000001".to_owned() + &number(7_000) + &number(2) + &floor;
    assert_eq!(hex(MetaName::KEYSPACES), keyspaces);
    let pins = "010000000100000001".to_owned() + &number(START_MS << 16);
    assert_eq!(hex(MetaName::PINS), pins + &number(START_MS + 5_000));
}

#[test]
fn a_snapshot_carries_settings_and_pins() {
    let mut group = group();
    set(&mut group, 7_000, 2);
    pin(&mut group, START_MS << 16, START_MS + 5_000);
    let other = Store::from_raw(&group.store.raw(), Bounds::DEFAULT);
    assert_eq!(other.state(), group.store.state());
    assert_eq!(other.state().history.revision(KEYSPACE), 2);
}

//! The fast judge is shown histories that are known to be bad, one for each way in which a store can
//! break its promise, and good ones that look suspicious. Does not test workloads.

use coracle_jepsen::checker::witness;
use coracle_jepsen::history::{Action, Answer, History, Position, Recorder, Seen};

/// Takes down a history of one key in shorthand; entries and versions are numbers of the test's own.
#[derive(Default)]
struct Script {
    recorder: Recorder,
}

impl Script {
    fn begin(&self, action: Action) -> u64 {
        self.recorder.invoke(0, 1, "k", &action)
    }

    fn end(&self, call: u64, answer: Answer) {
        self.recorder.ok(0, call, answer);
    }

    fn lose_track(&self, call: u64) {
        self.recorder.failed(0, call, true, "no answer".to_owned());
    }

    fn refuse(&self, call: u64) {
        self.recorder.failed(0, call, false, "refused".to_owned());
    }

    fn put(&self, value: &str, version: u64, index: u64) {
        let call = self.begin(put(value));
        self.end(call, written(version, index));
    }

    fn delete(&self, version: u64, index: u64) {
        let call = self.begin(Action::Delete);
        self.end(call, written(version, index));
    }

    fn get(&self, seen: Option<(&str, u64)>, index: u64) {
        let call = self.begin(Action::Get);
        self.end(call, read(seen, index));
    }

    fn history(&self) -> History {
        self.recorder.history()
    }

    /// What is wrong with it: the rules, without repetition.
    fn rules(&self) -> Vec<&'static str> {
        let found = witness::check(&self.history());
        let mut rules: Vec<&str> = found.into_iter().map(|violation| violation.rule).collect();
        rules.dedup();
        rules
    }

    fn expect(&self, rule: &str) {
        let rules = self.rules();
        assert!(rules.iter().any(|found| found.contains(rule)), "{rule:?} is not among {rules:?}");
    }

    fn expect_none(&self) {
        assert_eq!(witness::check(&self.history()), [], "a good history");
    }
}

fn put(value: &str) -> Action {
    Action::Put { value: value.to_owned() }
}

fn at(index: u64) -> Position {
    Position { shard: 1, term: 1, index }
}

fn written(version: u64, index: u64) -> Answer {
    Answer::Written { version, at: at(index) }
}

fn seen(seen: Option<(&str, u64)>) -> Option<Seen> {
    seen.map(|(value, version)| Seen { value: value.to_owned(), version })
}

fn read(found: Option<(&str, u64)>, index: u64) -> Answer {
    Answer::Read { seen: seen(found), at: at(index) }
}

#[test]
fn a_plain_history_is_good() {
    let script = Script::default();
    script.get(None, 0);
    script.put("a", 10, 1);
    script.get(Some(("a", 10)), 1);
    script.put("b", 20, 2);
    script.get(Some(("b", 20)), 5);
    script.delete(30, 6);
    script.get(None, 6);
    script.expect_none();
}

#[test]
fn a_stale_read_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.put("b", 20, 2);
    script.get(Some(("a", 10)), 1);
    script.expect("no operation stands before one that had completed");
}

#[test]
fn a_read_that_is_older_than_an_earlier_read_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    let lost = script.begin(put("b"));
    script.get(Some(("b", 20)), 2);
    script.get(Some(("a", 10)), 1);
    script.lose_track(lost);
    script.expect("no operation stands before one that had completed");
}

#[test]
fn reads_of_concurrent_writes_may_differ_while_they_go_on() {
    let script = Script::default();
    script.put("a", 10, 1);
    let (writing, reading) = (script.begin(put("b")), script.begin(Action::Get));
    script.get(Some(("b", 20)), 2);
    script.end(reading, read(Some(("a", 10)), 1));
    script.end(writing, written(20, 2));
    script.expect_none();
}

#[test]
fn a_stale_read_within_its_own_entry_is_found() {
    let script = Script::default();
    let reading = script.begin(Action::Get);
    script.put("a", 10, 1);
    script.put("b", 20, 2);
    script.end(reading, read(Some(("a", 10)), 2));
    script.expect("the newest write up to its place");
}

#[test]
fn a_lost_update_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    let cas = |value: &str| Action::PutIfVersion { value: value.to_owned(), version: 10 };
    let (one, other) = (script.begin(cas("b")), script.begin(cas("c")));
    script.end(one, written(20, 2));
    script.end(other, written(30, 3));
    script.expect("the version right before");
}

#[test]
fn a_condition_that_held_and_was_refused_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    let call = script.begin(Action::PutIfVersion { value: "b".to_owned(), version: 10 });
    script.end(call, Answer::Mismatch { seen: seen(Some(("a", 10))), at: at(2) });
    script.expect("the version right before");
}

#[test]
fn two_creators_of_one_key_are_found() {
    let script = Script::default();
    let create = |value: &str| Action::PutIfAbsent { value: value.to_owned() };
    let (one, other) = (script.begin(create("a")), script.begin(create("b")));
    script.end(one, written(10, 1));
    script.end(other, written(20, 2));
    script.expect("the version right before");
}

#[test]
fn a_creator_after_a_delete_of_unknown_outcome_is_good() {
    let script = Script::default();
    script.put("a", 10, 1);
    let deleting = script.begin(Action::Delete);
    script.lose_track(deleting);
    let creating = script.begin(Action::PutIfAbsent { value: "b".to_owned() });
    script.end(creating, written(30, 3));
    script.expect_none();
}

#[test]
fn a_resurrected_delete_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.delete(20, 2);
    script.get(Some(("a", 10)), 3);
    script.expect("the newest write up to its place");
    script.expect("no operation stands before one that had completed");
}

#[test]
fn a_lost_write_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.get(None, 4);
    script.expect("an absent key was deleted, or never written");
}

#[test]
fn a_lost_write_is_found_when_the_log_was_lost_with_it() {
    let script = Script::default();
    script.put("a", 10, 3);
    script.get(None, 1);
    script.expect("no operation stands before one that had completed");
}

#[test]
fn an_absent_key_may_be_the_work_of_a_delete_of_unknown_outcome() {
    let script = Script::default();
    script.put("a", 10, 1);
    let deleting = script.begin(Action::Delete);
    script.get(None, 2);
    script.lose_track(deleting);
    script.expect_none();
}

#[test]
fn a_delete_that_began_later_explains_nothing() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.get(None, 2);
    let deleting = script.begin(Action::Delete);
    script.lose_track(deleting);
    script.expect("an absent key was deleted, or never written");
}

#[test]
fn a_write_that_is_applied_twice_is_found() {
    let script = Script::default();
    let lost = script.begin(put("a"));
    script.get(Some(("a", 10)), 1);
    script.put("b", 20, 2);
    script.get(Some(("a", 30)), 3);
    script.lose_track(lost);
    script.expect("a write is applied once");
}

#[test]
fn an_acknowledged_write_that_comes_again_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.put("b", 20, 2);
    script.get(Some(("a", 30)), 3);
    script.expect("a write is applied once");
}

#[test]
fn a_delete_that_is_applied_twice_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.delete(20, 2);
    script.put("b", 30, 3);
    script.get(None, 4);
    script.expect("an absent key was deleted, or never written");
}

#[test]
fn versions_that_do_not_rise_are_found() {
    let script = Script::default();
    script.put("a", 20, 1);
    script.put("b", 10, 2);
    script.expect("versions rise with the log");
    script.expect("no operation stands before one that had completed");
}

#[test]
fn a_version_that_is_given_twice_is_found() {
    let script = Script::default();
    let (one, other) = (script.begin(put("a")), script.begin(put("b")));
    script.end(one, written(10, 1));
    script.end(other, written(10, 1));
    script.expect("versions rise with the log");
}

#[test]
fn a_value_that_nobody_wrote_is_found() {
    let script = Script::default();
    script.get(Some(("ghost", 10)), 1);
    script.expect("a read returns a value that was written");
}

#[test]
fn a_refused_write_that_is_seen_is_found() {
    let script = Script::default();
    let refused = script.begin(put("a"));
    script.refuse(refused);
    script.get(Some(("a", 10)), 1);
    script.expect("a write that was refused is never seen");
}

#[test]
fn a_write_whose_condition_failed_and_that_is_seen_is_found() {
    let script = Script::default();
    script.put("a", 10, 1);
    let call = script.begin(Action::PutIfVersion { value: "b".to_owned(), version: 7 });
    script.end(call, Answer::Mismatch { seen: seen(Some(("a", 10))), at: at(2) });
    script.get(Some(("b", 20)), 2);
    script.expect("a write that was refused is never seen");
}

#[test]
fn a_read_before_the_write_is_found() {
    let script = Script::default();
    script.get(Some(("a", 10)), 1);
    script.put("a", 10, 1);
    script.expect("no read returns what was not yet written");
}

#[test]
fn a_read_of_an_entry_that_it_does_not_reach_is_found() {
    let script = Script::default();
    let reading = script.begin(Action::Get);
    script.put("a", 10, 5);
    script.end(reading, read(Some(("a", 10)), 4));
    script.expect("no read returns what was not yet written");
}

#[test]
fn an_unknown_write_may_stay_unseen() {
    let script = Script::default();
    script.put("a", 10, 1);
    let lost = script.begin(put("b"));
    script.lose_track(lost);
    script.get(Some(("a", 10)), 9);
    script.expect_none();
}

#[test]
fn an_unknown_write_may_be_applied_late() {
    let script = Script::default();
    let lost = script.begin(put("b"));
    script.lose_track(lost);
    script.put("a", 10, 1);
    script.get(Some(("a", 10)), 1);
    script.get(Some(("b", 20)), 4);
    script.expect_none();
}

#[test]
fn an_unknown_write_is_not_applied_before_it_began() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.put("c", 30, 3);
    let lost = script.begin(put("b"));
    let reading = script.begin(Action::Get);
    script.lose_track(lost);
    script.end(reading, read(Some(("b", 20)), 2));
    script.expect("no operation stands before one that had completed");
}

#[test]
fn a_condition_is_judged_in_the_middle_of_its_entry() {
    let script = Script::default();
    script.put("a", 10, 1);
    let cas = script.begin(Action::PutIfVersion { value: "c".to_owned(), version: 7 });
    let writing = script.begin(put("b"));
    script.end(writing, written(20, 2));
    script.end(cas, Answer::Mismatch { seen: seen(Some(("a", 10))), at: at(2) });
    script.expect_none();
}

#[test]
fn a_history_is_read_back_as_it_was_written() {
    let script = Script::default();
    script.put("a", 10, 1);
    let lost = script.begin(Action::Delete);
    script.lose_track(lost);
    script.get(None, 2);
    let mut lines = Vec::new();
    script.history().write(&mut lines).expect("memory takes everything");
    let text = String::from_utf8(lines.clone()).expect("JSON is text");
    assert_eq!(text.lines().count(), 6, "{text}");
    assert!(text.contains(r#""kind":"invoke""#) && text.contains(r#""do":"put""#), "{text}");
    assert_eq!(History::read(&mut &lines[..]).expect("it was just written"), script.history());
}

#[test]
fn a_session_read_may_be_behind_others_but_not_behind_its_own_client() {
    let script = Script::default();
    script.put("a", 10, 1);
    let other = |seen, index| {
        let call = script.recorder.invoke(0, 2, "k", &Action::SessionGet);
        script.end(call, read(seen, index));
    };
    script.put("b", 20, 2);
    other(Some(("a", 10)), 1);
    assert_eq!(script.rules(), Vec::<&str>::new(), "client 2 has not heard of b");
    other(Some(("b", 20)), 2);
    other(Some(("a", 10)), 1);
    script.expect("not behind what its client has seen");
}

#[test]
fn a_session_read_shows_the_newest_write_up_to_its_place() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.put("b", 20, 2);
    let call = script.begin(Action::SessionGet);
    script.end(call, read(Some(("a", 10)), 2));
    script.expect("newest write up to its place");
}

#[test]
fn a_bounded_read_may_be_behind_by_its_bound_and_no_more() {
    let script = Script::default();
    let at = |ms: u64, client, action: Action, answer: Answer| {
        let call = script.recorder.invoke(ms * 1_000, client, "k", &action);
        script.recorder.ok(ms * 1_000 + 500, call, answer);
    };
    at(10, 1, put("a"), written(10, 1));
    at(100, 1, put("b"), written(20, 2));
    let bounded = |ms| Action::BoundedGet { ms };
    at(150, 2, bounded(100), read(Some(("a", 10)), 1));
    at(190, 2, bounded(100), read(None, 0));
    at(200, 2, bounded(100), read(Some(("b", 20)), 2));
    let absent = script.rules();
    assert!(
        absent.iter().any(|rule| rule.contains("lacks nothing")),
        "a is 180 ms old: {absent:?}"
    );

    let script = Script::default();
    let at = |ms: u64, action: Action, answer: Answer| {
        let call = script.recorder.invoke(ms * 1_000, 1, "k", &action);
        script.recorder.ok(ms * 1_000 + 500, call, answer);
    };
    at(10, put("a"), written(10, 1));
    at(100, put("b"), written(20, 2));
    at(200, bounded(100), read(Some(("a", 10)), 1));
    assert_eq!(script.rules(), Vec::<&str>::new(), "b was acknowledged 99.5 ms before");
    at(201, bounded(100), read(Some(("a", 10)), 1));
    script.expect("lacks nothing older than its bound");
}

#[test]
fn a_bounded_read_sees_nothing_that_is_not_yet_written() {
    let script = Script::default();
    let call = script.begin(Action::BoundedGet { ms: 1_000 });
    script.end(call, read(Some(("a", 10)), 1));
    script.put("a", 10, 1);
    script.expect("not yet written");
}

#[test]
fn a_replicas_linearizable_read_is_judged_as_one() {
    let script = Script::default();
    script.put("a", 10, 1);
    script.put("b", 20, 2);
    let call = script.begin(Action::ReplicaGet);
    script.end(call, read(Some(("a", 10)), 1));
    script.expect("had completed when it began");
}

#[test]
fn read_at_a_version_that_returns_another_than_the_newest_up_to_it() {
    let script = |at: u64, seen: Option<(&str, u64)>| {
        let script = Script::default();
        script.put("a", 10, 1);
        script.put("b", 20, 2);
        script.delete(30, 3);
        script.put("c", 40, 4);
        let call = script.begin(Action::GetAt { version: at });
        script.end(call, read(seen, 4));
        script
    };
    for (at, seen) in [(10, Some(("a", 10))), (19, Some(("a", 10))), (9, None), (35, None)] {
        script(at, seen).expect_none();
    }
    for (at, seen) in [
        (20, Some(("a", 10))),
        (15, None),
        (15, Some(("b", 20))),
        (35, Some(("b", 20))),
        (40, None),
    ] {
        script(at, seen).expect("a read at a version");
    }
}

#[test]
fn write_that_appears_below_a_version_that_was_read_at() {
    let script = Script::default();
    script.put("a", 10, 1);
    let call = script.begin(Action::GetAt { version: 15 });
    script.end(call, read(Some(("a", 10)), 1));
    script.put("b", 14, 2);
    script.expect("a read at a version");
}

/// The same answer, by another shard.
fn by(shard: u64, answer: Answer) -> Answer {
    let moved = |at: Position| Position { shard, ..at };
    match answer {
        Answer::Read { seen, at } => Answer::Read { seen, at: moved(at) },
        Answer::Written { version, at } => Answer::Written { version, at: moved(at) },
        Answer::Mismatch { seen, at } => Answer::Mismatch { seen, at: moved(at) },
    }
}

impl Script {
    fn of_shard(&self, shard: u64, action: Action, answer: Answer) {
        let call = self.begin(action);
        self.end(call, by(shard, answer));
    }
}

#[test]
fn a_key_that_goes_to_a_younger_log_and_back_is_good() {
    let script = Script::default();
    script.put("a", 10, 50);
    script.of_shard(2, Action::Get, read(Some(("a", 10)), 1));
    script.of_shard(2, put("b"), written(20, 2));
    script.of_shard(2, Action::SessionGet, read(Some(("b", 20)), 2));
    script.of_shard(2, Action::Delete, written(30, 3));
    script.of_shard(3, Action::Get, read(None, 1));
    script.get(None, 60);
    script.put("c", 40, 61);
    script.get(Some(("c", 40)), 61);
    script.expect_none();
}

#[test]
fn a_write_that_is_lost_in_a_split_is_found() {
    let script = Script::default();
    script.put("a", 10, 50);
    script.put("b", 20, 51);
    script.of_shard(2, Action::Get, read(Some(("a", 10)), 1));
    script.expect("no operation stands before one that had completed");
    let script = Script::default();
    script.put("a", 10, 50);
    script.of_shard(2, Action::Get, read(None, 1));
    script.expect("no operation stands before one that had completed");
}

#[test]
fn a_delete_that_is_lost_in_a_merge_is_found() {
    let script = Script::default();
    script.put("a", 10, 50);
    script.of_shard(2, Action::Get, read(Some(("a", 10)), 1));
    script.of_shard(2, Action::Delete, written(30, 3));
    script.get(Some(("a", 10)), 60);
    script.expect("no operation stands before one that had completed");
}

#[test]
fn what_was_seen_in_a_young_log_is_not_forgotten_there() {
    let script = Script::default();
    script.put("a", 10, 50);
    script.put("b", 20, 51);
    let late = script.begin(Action::Get);
    script.of_shard(2, Action::Get, read(Some(("b", 20)), 1));
    script.end(late, by(2, read(Some(("a", 10)), 2)));
    script.expect("the newest write up to its place");
}

#[test]
fn a_session_that_goes_back_over_a_split_is_found() {
    let script = Script::default();
    script.put("a", 10, 50);
    script.put("b", 20, 51);
    script.of_shard(2, Action::SessionGet, read(Some(("a", 10)), 1));
    script.expect("a session read is not behind");
}

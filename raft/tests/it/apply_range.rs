//! Delete-ranges one by one: what they meet, where they end, what a retry gets. See `apply_model` for
//! them among everything else.

use bytes::Bytes;
use coracle_proto::entity::EntityRule;
use coracle_raft::apply::{Outcome, Reply};
use coracle_raft::command::{
    Change, Command, Condition, DeleteRange, NO_FENCE, Operation, Owned, Request,
};
use coracle_raft::dedup::Bounds;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::history::HISTORY_MS;
use coracle_storage::state::Kind;

use crate::apply_words::{Group, KEYSPACE, operation, put, put_for, request, when};

fn range(end: &str, limit: u32) -> DeleteRange {
    DeleteRange { end: end.to_owned().into(), limit, fence: NO_FENCE, whole: false, owned: None }
}

fn whole(end: &str, limit: u32) -> DeleteRange {
    DeleteRange { whole: true, ..range(end, limit) }
}

fn delete(start: &str, range: DeleteRange) -> Operation {
    operation(start, Change::DeleteRange(range))
}

/// A group with these keys.
fn filled(keys: &[&str]) -> Group {
    let mut group = Group::new(Bounds::DEFAULT);
    for (sequence, key) in (1..).zip(keys) {
        let write = request(group.id(9, sequence), vec![put(key, "v")]);
        group.write(write);
    }
    group
}

fn deleted(reply: &Reply) -> (u32, &[u8]) {
    match &reply.outcome {
        Outcome::RangeDeleted { deleted, next, .. } => (*deleted, next),
        other => panic!("not deleted: {other:?}"),
    }
}

fn left<'a>(group: &Group, keys: &[&'a str]) -> Vec<&'a str> {
    keys.iter().filter(|key| group.read(key).is_some()).copied().collect()
}

#[test]
fn step_deletes_up_to_its_limit_and_says_where_to_go_on() {
    let keys = ["a", "b", "c", "d", "e"];
    let mut group = filled(&keys);
    let step = request(group.id(1, 1), vec![delete("b", range("e", 2))]);
    assert_eq!(deleted(&group.write(step)), (2, &b"c\0"[..]));
    assert_eq!(left(&group, &keys), ["a", "d", "e"]);
    let step = request(group.id(1, 2), vec![delete("c\0", range("e", 2))]);
    assert_eq!(deleted(&group.write(step)), (1, &b"e"[..]));
    let step = request(group.id(1, 3), vec![delete("", range("", 9))]);
    let reply = group.write(step);
    assert_eq!(deleted(&reply), (2, &b""[..]));
    assert!(left(&group, &keys).is_empty());
    let Outcome::RangeDeleted { version, arc, .. } = reply.outcome else { unreachable!() };
    assert_eq!(arc, Some((0, 0)));
    assert_eq!(group.read_at("a", version - 1).as_deref(), Some(b"v".as_slice()));
    let empty = request(group.id(1, 4), vec![delete("e", range("b", 9))]);
    assert_eq!(deleted(&group.write(empty)), (0, &b"b"[..]));
}

#[test]
fn whole_range_goes_at_one_version_or_not_at_all() {
    let keys = ["a", "b", "c", "d"];
    let mut group = filled(&keys);
    let before = group.store.count(Kind::Data);
    let refused = request(group.id(1, 1), vec![delete("a", whole("d", 2))]);
    let reply = group.write(refused.clone());
    assert_eq!(reply.outcome, Outcome::RangeTooLarge { limit: 2 });
    assert_eq!(left(&group, &keys), keys);
    assert_eq!(group.store.count(Kind::Data), before, "no version was written");
    // Room that comes later changes nothing for the same write.
    let room = request(group.id(2, 1), vec![operation("b", Change::Delete)]);
    group.write(room);
    let again = group.write(refused);
    assert_eq!((again.outcome, again.duplicate), (reply.outcome, true));
    let fits = request(group.id(1, 2), vec![delete("a", whole("d", 2))]);
    assert_eq!(deleted(&group.write(fits)), (2, &b"d"[..]));
    assert_eq!(left(&group, &keys), ["d"]);
}

#[test]
fn retry_deletes_nothing_that_was_written_since() {
    let keys = ["a", "b", "c"];
    let mut group = filled(&keys);
    let step = request(group.id(1, 1), vec![delete("a", range("", 2))]);
    let first = group.write(step.clone());
    let newer = request(group.id(2, 1), vec![put("a", "newer")]);
    group.write(newer);
    // Another leader, with another end for the step; the first answer stands.
    let mut other = step;
    other.operations = vec![delete("a", range("b", 1))];
    let again = group.write(other);
    assert!(again.duplicate && !first.duplicate);
    assert_eq!(deleted(&again), deleted(&first));
    assert_eq!(left(&group, &keys), ["a", "c"]);
}

/// A step that was held up, under an id of its own, comes after another has done its work: the writes
/// that were acknowledged meanwhile are not its business.
#[test]
fn late_step_deletes_nothing_that_was_written_above_its_fence() {
    let keys = ["a", "b", "c"];
    let mut group = filled(&keys);
    let fence = group.store.state().clock;
    let step = |group: &Group, client| {
        let range = DeleteRange { fence, ..range("", 2) };
        request(group.id(client, 1), vec![delete("", range)])
    };
    // Written before the first step, and above the fence: not counted either.
    let between = request(group.id(3, 1), vec![put("a", "newer")]);
    group.write(between);
    let first = step(&group, 1);
    assert_eq!(deleted(&group.write(first)), (2, &b"c\0"[..]));
    assert_eq!(left(&group, &keys), ["a"]);
    let after = request(group.id(3, 2), vec![put("b", "newer"), put("d", "new")]);
    group.write(after);
    let late = step(&group, 2);
    assert_eq!(deleted(&group.write(late)), (0, &b""[..]));
    assert_eq!(left(&group, &["a", "b", "c", "d"]), ["a", "b", "d"]);
}

/// Else a write behind the step could get a version up to the fence, and a late step delete it.
#[test]
fn step_under_a_fence_that_the_clock_has_not_passed_does_nothing() {
    let mut group = filled(&["a"]);
    let next = (group.now_ms << 16).max(group.store.state().clock + 1);
    let step = |group: &Group, fence| {
        let range = DeleteRange { fence, ..range("", 2) };
        request(group.id(1, 1), vec![delete("", range)])
    };
    let ahead = step(&group, next);
    let reply = group.write(ahead);
    assert_eq!((reply.outcome, reply.duplicate), (Outcome::FenceBeyondClock, false));
    assert_eq!(left(&group, &["a"]), ["a"]);
    let below = step(&group, next - 1);
    let reply = group.write(below);
    assert_eq!(
        (deleted(&reply), reply.duplicate),
        ((1, &b""[..]), false),
        "the id counted for nothing"
    );
}

#[test]
fn what_is_deleted_or_expired_is_not_counted() {
    let mut group = filled(&["a", "b", "c"]);
    let gone = request(group.id(1, 1), vec![operation("a", Change::Delete)]);
    group.write(gone);
    let short = request(group.id(1, 2), vec![put_for("b", "v", 10)]);
    group.write(short);
    group.now_ms += 10;
    let step = request(group.id(1, 3), vec![delete("", whole("", 1))]);
    assert_eq!(deleted(&group.write(step)), (1, &b""[..]));
}

#[test]
fn earlier_writes_of_the_same_entry_are_seen_and_later_ones_stay() {
    let mut group = filled(&["a"]);
    let requests = vec![
        request(group.id(1, 1), vec![put("b", "1")]),
        request(group.id(2, 1), vec![delete("", range("", 9))]),
        request(group.id(1, 2), vec![put("b", "2")]),
    ];
    let replies = group.entry(Command::Requests(requests));
    assert_eq!(deleted(&replies[1]), (2, &b""[..]));
    assert_eq!(group.read("b").as_deref(), Some(b"2".as_slice()));
    assert_eq!(group.read("a"), None);
}

#[test]
fn keys_of_other_arcs_are_not_touched_and_not_counted() {
    let owned = Owned { rule: EntityRule::Whole, hash_seed: 3 };
    let keys = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let position = |key: &str| owned.position(KEYSPACE, key.as_bytes());
    let mut positions: Vec<_> = keys.iter().map(|key| position(key)).collect();
    positions.sort();
    // What the group held before a split: its keys are all still there.
    let mut group = Group::fresh(Bounds::DEFAULT);
    let arc = Some((0, positions[4]));
    group.entry(Command::Describe(Descriptor { shard: 1, arc, epoch: 1 }));
    for (sequence, key) in (1..).zip(keys) {
        let mut write = request(group.id(9, sequence), vec![put(key, "v")]);
        write.position = 0;
        group.write(write);
    }
    let (own, foreign): (Vec<_>, Vec<_>) =
        keys.into_iter().partition(|key| position(key) < positions[4]);
    assert_eq!((own.len(), foreign.len()), (4, 4));
    let step = |group: &Group, sequence, limit| Request {
        position: 0,
        ..request(
            group.id(1, sequence),
            vec![delete("", DeleteRange { owned: Some(owned), ..whole("", limit) })],
        )
    };
    let few = step(&group, 1, 3);
    assert_eq!(group.write(few).outcome, Outcome::RangeTooLarge { limit: 3 });
    let all = step(&group, 2, 4);
    let reply = group.write(all);
    assert_eq!(deleted(&reply), (4, &b""[..]));
    assert!(matches!(reply.outcome, Outcome::RangeDeleted { arc: told, .. } if told == arc));
    assert_eq!(left(&group, &keys), foreign);
}

#[test]
fn range_with_company_or_a_condition_or_no_limit_is_refused_and_keeps_nothing() {
    let mut group = filled(&["a"]);
    let company = vec![put("b", "v"), delete("a", range("", 1))];
    let condition = vec![when(Condition::IfAbsent, delete("x", range("", 1)))];
    let none = vec![delete("a", range("", 0))];
    for operations in [company, condition, none] {
        let write = request(group.id(1, 1), operations);
        assert!(matches!(group.write(write).outcome, Outcome::Invalid { .. }));
    }
    assert_eq!(left(&group, &["a", "b"]), ["a"]);
    // The id counted for nothing.
    let write = request(group.id(1, 1), vec![delete("a", range("", 1))]);
    assert!(!group.write(write).duplicate);
}

/// Of two replicas one has compacted: what it no longer holds must not show.
#[test]
fn dead_versions_decide_nothing() {
    let run = |compacted: bool| {
        let mut group = Group::new(Bounds::DEFAULT);
        for sequence in 1..=300 {
            let key = format!("k{:03}", sequence % 100);
            let write = request(group.id(9, sequence), vec![put(&key, "v")]);
            group.write(write);
        }
        for sequence in 0..90 {
            let key = format!("k{sequence:03}");
            let write = request(group.id(8, sequence + 1), vec![operation(&key, Change::Delete)]);
            group.write(write);
        }
        group.now_ms += 2 * HISTORY_MS;
        group.entry(Command::Requests(Vec::new()));
        let before = group.store.raw().len();
        if compacted {
            group.store.compact();
        }
        let step = request(group.id(1, 1), vec![delete("", range("", 3))]);
        let reply = group.write(step);
        (before - group.store.raw().len().min(before), reply)
    };
    let ((kept, first), (gone, second)) = (run(false), run(true));
    assert!(kept == 0 && gone > 300, "one of them has compacted: {kept}, {gone}");
    assert_eq!(first, second);
    assert_eq!(deleted(&first), (3, &b"k092\0"[..]));
    let bytes = |reply: &Reply| match &reply.outcome {
        Outcome::RangeDeleted { next, .. } => next.clone(),
        _ => Bytes::new(),
    };
    assert_eq!(bytes(&first), bytes(&second));
}

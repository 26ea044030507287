//! What a split does to the replicated state, by itself. Finds a condition that is not judged, a half that
//! begins without what the whole had, and a key that both halves take for their own, or neither.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use coracle_proto::entity::EntityRule;
use coracle_raft::apply::{
    Applied, BIRTH, Child, GroupState, Membership, NotReshaped, Outcome, Reshaped, apply,
};
use coracle_raft::command::{Change, Command, Operation, Planned, Request, SplitShard, Stamped};
use coracle_raft::dedup::Bounds;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::history::Pin;
use coracle_raft::rules::Rules;
use coracle_raft::types::Position;

use crate::apply_words::{Group, KEYSPACE, applied_version, put, request};

const AT: u64 = 1 << 63;
const MEMBERSHIP: Position = Position { term: 3, index: 9 };

fn rules() -> Rules {
    Rules { hash_seed: 7, keyspaces: BTreeMap::from([(KEYSPACE, EntityRule::Whole)]) }
}

fn plan() -> SplitShard {
    SplitShard {
        planned: Planned { epoch: 1, membership: MEMBERSHIP },
        at: AT,
        child: 2,
        replicas: BTreeMap::from([(11, 21), (12, 22)]),
        rules: rules(),
    }
}

fn members() -> Membership {
    Membership { at: MEMBERSHIP, joint: false, replicas: BTreeSet::from([11, 12]) }
}

/// Applies a split to a group with these members, without writing anything: its state then, and what
/// became of it.
fn split(
    group: &Group,
    members: Membership,
    plan: SplitShard,
) -> (GroupState, Result<Reshaped, NotReshaped>, Option<Child>) {
    let mut overlay = group.store.overlay();
    let mut state = group.store.state();
    state.membership = members;
    let stamp = group.now_ms << 16;
    let entry = Stamped { stamp, ceiling: stamp + 5, command: Command::Split(plan) }.encode();
    let applied = apply(&mut overlay, &mut state, group.term, group.index + 1, &entry);
    let Applied { replies, child } = applied.expect("a sound entry");
    let [reply] = &replies[..] else { panic!("one reply to a split") };
    let Outcome::Reshaped(reshaped) = reply.outcome.clone() else { panic!("{reply:?}") };
    (state, reshaped, child.map(|child| *child))
}

#[test]
fn a_split_happens_only_on_what_it_was_planned_on() {
    let group = Group::new(Bounds::DEFAULT);
    let before = group.store.state();
    let refused = |members: Membership, plan: SplitShard| {
        let (after, reshaped, child) = split(&group, members, plan);
        assert!(child.is_none());
        assert_eq!((&after.descriptor, after.clock), (&before.descriptor, before.clock));
        assert_eq!(after.arc_filter().is_none(), before.arc_filter().is_none(), "nothing learnt");
        reshaped.expect_err("it does not fit")
    };
    let with = |change: &dyn Fn(&mut SplitShard)| {
        let mut plan = plan();
        change(&mut plan);
        plan
    };
    let epoch = with(&|plan| plan.planned.epoch = 2);
    assert_eq!(refused(members(), epoch), NotReshaped::Epoch { epoch: 1 });
    let joint = Membership { joint: true, ..members() };
    assert_eq!(refused(joint, plan()), NotReshaped::Members);
    let later = Membership { at: Position { term: 3, index: 10 }, ..members() };
    assert_eq!(refused(later, plan()), NotReshaped::Members);
    let third = Membership { replicas: BTreeSet::from([11, 12, 13]), ..members() };
    assert_eq!(refused(third, plan()), NotReshaped::Replicas);
    let other = with(&|plan| plan.replicas = BTreeMap::from([(11, 21), (13, 22)]));
    assert_eq!(refused(members(), other), NotReshaped::Replicas);
    let twice = with(&|plan| plan.replicas = BTreeMap::from([(11, 21), (12, 21)]));
    assert_eq!(refused(members(), twice), NotReshaped::Replicas);
    let own = with(&|plan| plan.replicas = BTreeMap::from([(11, 12), (12, 22)]));
    assert_eq!(refused(members(), own), NotReshaped::Replicas);
    assert_eq!(refused(members(), with(&|plan| plan.at = 0)), NotReshaped::Position);
    assert_eq!(refused(members(), with(&|plan| plan.child = 1)), NotReshaped::Child);
    assert_eq!(refused(members(), with(&|plan| plan.child = 0)), NotReshaped::Child);
}

#[test]
fn a_position_outside_the_arc_splits_nothing() {
    let mut group = Group::fresh(Bounds::DEFAULT);
    group.entry(Command::Describe(Descriptor { shard: 1, arc: Some((10, 20)), epoch: 1 }));
    for (at, inside) in [(9, false), (10, false), (11, true), (19, true), (20, false), (21, false)]
    {
        let (_, reshaped, _) = split(&group, members(), SplitShard { at, ..plan() });
        assert_eq!(reshaped.is_ok(), inside, "{at}");
    }
    let mut meta = Group::fresh(Bounds::DEFAULT);
    meta.entry(Command::Describe(Descriptor { shard: 0, arc: None, epoch: 1 }));
    let (_, reshaped, _) = split(&meta, members(), plan());
    assert_eq!(reshaped, Err(NotReshaped::Position), "the cluster's records stay together");
}

#[test]
fn the_child_begins_with_all_that_the_parent_had() {
    let mut group = Group::new(Bounds::DEFAULT);
    let written = applied_version(&group.write(request(group.id(1, 1), vec![put("k", "v")])));
    let until_ms = group.now_ms + 300_000;
    group.entry(Command::Pin(Pin { keyspace: KEYSPACE, version: written, until_ms }));
    group.now_ms += 100_000;
    let before = group.store.state();
    let (parent, reshaped, child) = split(&group, members(), plan());
    let reshaped = reshaped.expect("as it was planned");
    let child = child.expect("a child").state;
    assert!(reshaped.version > before.clock.max(written));
    for half in [&parent, &child] {
        assert_eq!(half.clock, reshaped.version);
        assert!(half.ceiling >= before.ceiling.max(reshaped.version));
        assert_eq!(half.history.threshold(KEYSPACE), written, "the pin holds on both sides");
        assert_eq!(half.dedup, before.dedup);
        assert_eq!(half.descriptor.as_ref().map(|known| known.epoch), Some(2));
    }
    assert_eq!(parent.ceiling, child.ceiling);
    assert_eq!(parent.descriptor, Some(reshaped.descriptor));
    assert_eq!(child.descriptor, reshaped.child);
    let arc = |state: &GroupState| state.descriptor.as_ref().and_then(|known| known.arc);
    assert_eq!((arc(&parent), arc(&child)), (Some((0, AT)), Some((AT, 0))));
}

#[test]
fn every_position_is_of_one_half() {
    let group = Group::new(Bounds::DEFAULT);
    let (parent, _, child) = split(&group, members(), plan());
    let halves = [parent, child.expect("a child").state];
    let owns = |position| {
        let owns = |half: &GroupState| half.descriptor.as_ref().map(|d| d.owns(KEYSPACE, position));
        [owns(&halves[0]), owns(&halves[1])].map(|owns| owns.expect("described"))
    };
    assert_eq!([0, AT - 1].map(owns), [[true, false]; 2]);
    assert_eq!([AT, u64::MAX].map(owns), [[false, true]; 2]);
    let filters = [0, 1].map(|half: usize| halves[half].arc_filter().expect("they know the rules"));
    for n in 0..100 {
        let key = format!("k{n}");
        let position = rules().position(KEYSPACE, key.as_bytes()).expect("known");
        let kept = [0, 1].map(|half: usize| filters[half](KEYSPACE, key.as_bytes()));
        assert_eq!(kept, owns(position), "{key}");
        assert!([0, 1].iter().all(|half| filters[*half](KEYSPACE + 1, key.as_bytes())), "unknown");
    }
}

#[test]
fn results_that_came_along_are_told_with_a_place_in_the_childs_log() {
    let mut group = Group::new(Bounds::DEFAULT);
    group.index = 500;
    let operation = Operation {
        key: Bytes::from_static(b"n"),
        condition: None,
        change: Change::Increment { by: 1 },
    };
    let upper = |id| Request { position: AT, ..request(id, vec![operation.clone()]) };
    let (old, new) = (upper(group.id(1, 1)), upper(group.id(1, 2)));
    let first = group.write(old.clone());
    assert_eq!(first.index, 501);
    let (_, _, child) = split(&group, members(), plan());
    let mut child = child.expect("a child").state;
    let mut overlay = group.store.overlay();
    let mut write = |request: Request, index| {
        let stamp = (group.now_ms + 1) << 16;
        let command = Command::Requests(vec![request]);
        let entry = Stamped { stamp, ceiling: stamp, command }.encode();
        let applied = apply(&mut overlay, &mut child, 1, index, &entry).expect("a sound entry");
        applied.replies.into_iter().next().expect("one reply")
    };
    let again = write(old, 2);
    assert_eq!((again.duplicate, &again.outcome), (true, &first.outcome));
    assert_eq!((again.term, again.index), (BIRTH.term, BIRTH.index));
    let other = write(new.clone(), 3);
    assert_eq!((other.duplicate, other.index), (false, 3));
    let again = write(new, 4);
    assert_eq!((again.duplicate, again.index), (true, 3), "its own are where they are");
}

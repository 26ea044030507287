//! What splits and merges do to the replicated state, by themselves. Finds a condition that is not judged, a
//! half that begins without what the whole had, a key that both halves take for their own, or neither, and
//! a group that has lost something of one of the two that it was made of.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use coracle_proto::entity::EntityRule;
use coracle_raft::apply::{
    Applied, BIRTH, Child, GroupState, Membership, Neighbour, NotReshaped, Outcome, Reshaped, apply,
};
use coracle_raft::command::{
    AbsorbShard, AnnounceMerge, Change, Command, EndMerge, FreezeShard, Operation, Planned,
    Request, RequestId, SplitShard, Stamped,
};
use coracle_raft::dedup::{AGE_MS_MIN, Bounds};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::history::{Pin, Pinned, Settings};
use coracle_raft::rules::Rules;
use coracle_raft::types::Position;
use coracle_storage::state::Kind;

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
    let at = Position { term: group.term, index: group.index + 1 };
    let applied = apply(&mut overlay, &mut state, at, &entry, None);
    let Applied { replies, child, .. } = applied.expect("a sound entry");
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
        let at = Position { term: 1, index };
        let applied = apply(&mut overlay, &mut child, at, &entry, None).expect("a sound entry");
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

const PLANNED: Planned = Planned { epoch: 1, membership: Position { term: 0, index: 0 } };

/// Two neighbours that know nothing of each other's past; the right one is frozen by the last entry.
fn neighbours() -> (Group, Group) {
    let (mut left, mut right) = (Group::fresh(Bounds::DEFAULT), Group::fresh(Bounds::DEFAULT));
    left.entry(Command::Describe(Descriptor { shard: 1, arc: Some((0, AT)), epoch: 1 }));
    right.entry(Command::Describe(Descriptor { shard: 2, arc: Some((AT, 0)), epoch: 1 }));
    (left, right)
}

fn announce(group: &mut Group, absorbs: bool) {
    let replicas = BTreeSet::new();
    let plan = AnnounceMerge { planned: PLANNED, merge: 7, absorbs, replicas, rules: rules() };
    let replies = group.entry(Command::Announce(plan));
    assert!(matches!(replies[0].outcome, Outcome::Reshaped(Ok(_))), "{replies:?}");
}

/// Takes the right one in: what the left one's state is then, and what it was told.
fn absorb(left: &mut Group, right: &Group, plan: &AbsorbShard) -> (GroupState, Outcome) {
    let mut overlay = left.store.overlay();
    let mut state = left.store.state();
    let (stamp, at) = (left.now_ms << 16, Position { term: left.term, index: left.index + 1 });
    let command = Command::Absorb(plan.clone());
    let entry = Stamped { stamp, ceiling: stamp, command }.encode();
    let first = apply(&mut overlay, &mut state, at, &entry, None).expect("a sound entry");
    if let [refused] = &first.replies[..] {
        return (state, refused.outcome.clone());
    }
    assert_eq!(first.wants.as_deref(), Some(plan), "the keys first");
    assert_eq!(state, left.store.state(), "nothing was done yet");
    let (theirs, below) = (right.store.state(), right.store.overlay());
    let reader = below.reader().expect("a healthy disk");
    let neighbour = Neighbour { state: &theirs, view: reader.view() };
    let done = apply(&mut overlay, &mut state, at, &entry, Some(&neighbour));
    let outcome = done.expect("a sound entry").replies.remove(0).outcome;
    left.store.write(&mut state, overlay);
    left.index += 1;
    (state, outcome)
}

fn plan_to_absorb(right: &Group) -> AbsorbShard {
    AbsorbShard {
        planned: PLANNED,
        merge: 7,
        other: right.store.state().descriptor.expect("described"),
        frozen_at: right.index,
        replicas: BTreeMap::new(),
        rules: rules(),
    }
}

#[test]
fn who_takes_a_neighbour_in_is_what_both_were() {
    let (mut left, mut right) = neighbours();
    // The right one's clock is ahead, and further ahead is what it may have served.
    right.now_ms += 2_000;
    let upper = |id| Request { position: AT, ..request(id, vec![put("u", "v")]) };
    left.write(request(left.id(1, 4), vec![put("l", "v")]));
    let mut id = right.id(1, 9);
    id.lowest_unanswered = 6;
    let theirs = right.write(upper(id));
    right.write(upper(right.id(2, 1)));
    for group in [&mut left, &mut right] {
        let short = Settings { keyspace: KEYSPACE, history_ms: 0, revision: 1 };
        group.entry(Command::Settings(vec![short]));
    }
    // Five seconds are kept: the first of them is out of the right one's reach.
    let (low, high) = (left.now_ms - 4_000, left.now_ms - 1_000);
    for (first, ms) in [(true, low), (true, high), (false, high)] {
        let group = if first { &mut left } else { &mut right };
        let until_ms = group.now_ms + 100_000;
        let pin = Pin { keyspace: KEYSPACE, version: ms << 16, until_ms };
        let replies = group.entry(Command::Pin(pin));
        assert!(matches!(replies[0].outcome, Outcome::Pinned(Pinned::Held { .. })), "{replies:?}");
    }
    announce(&mut left, true);
    announce(&mut right, false);
    let frozen = right.entry(Command::Freeze(FreezeShard { planned: PLANNED, merge: 7 }));
    assert!(matches!(frozen[0].outcome, Outcome::Reshaped(Ok(_))), "{frozen:?}");
    let (ours, others) = (left.store.state(), right.store.state());
    // A frozen group changes no more.
    let late = right.write(upper(right.id(3, 1)));
    assert!(matches!(late.outcome, Outcome::StaleRoute { .. }));
    right.now_ms += 9_000;
    right.entry(Command::Advance);
    assert_eq!(right.store.state(), others);
    right.index -= 2;

    let plan = plan_to_absorb(&right);
    let (state, outcome) = absorb(&mut left, &right, &plan);
    let Outcome::Reshaped(Ok(reshaped)) = outcome else { panic!("{outcome:?}") };
    let wanted = Descriptor { shard: 1, arc: Some((0, 0)), epoch: 2 };
    assert_eq!((&reshaped.descriptor, state.descriptor.as_ref()), (&wanted, Some(&wanted)));
    assert!(reshaped.version > others.ceiling && reshaped.version > ours.clock);
    assert_eq!(state.dedup.results, ours.dedup.results + others.dedup.results);
    assert_eq!(state.dedup.marks, 2, "one client is known to both");
    let threshold = state.history.threshold(KEYSPACE);
    assert!(threshold >= others.history.threshold(KEYSPACE), "never below that of either");
    assert!(low << 16 < threshold && threshold <= high << 16);
    // A retry is known, and the higher mark holds.
    let again = left.write(upper(id));
    assert_eq!((again.duplicate, &again.outcome), (true, &theirs.outcome));
    assert_eq!(again.index, reshaped.place);
    let answered = left.write(request(left.id(1, 5), vec![put("l", "w")]));
    assert_eq!(answered.outcome, Outcome::RetryWindowPassed, "below the mark of the right one");
    left.now_ms += 60_000;
    left.entry(Command::Settings(Vec::new()));
    let held = left.store.state().history.threshold(KEYSPACE);
    assert_eq!(held, high << 16, "the pin of both holds, that of one alone is gone");
}

#[test]
fn only_a_neighbour_on_the_right_is_taken_in_for_the_merge_that_was_announced() {
    let (mut left, mut right) = neighbours();
    right.entry(Command::Freeze(FreezeShard { planned: PLANNED, merge: 7 }));
    let plan = plan_to_absorb(&right);
    let refused = |left: &mut Group, plan: &AbsorbShard| {
        let (state, outcome) = absorb(left, &right, plan);
        assert_eq!(state.descriptor.and_then(|known| known.arc), Some((0, AT)));
        let Outcome::Reshaped(Err(refused)) = outcome else { panic!("{outcome:?}") };
        refused
    };
    assert_eq!(refused(&mut left, &plan), NotReshaped::Merging, "it was not announced");
    announce(&mut left, true);
    let with = |change: &dyn Fn(&mut AbsorbShard)| {
        let mut plan = plan.clone();
        change(&mut plan);
        plan
    };
    let another = with(&|plan| plan.merge = 8);
    assert_eq!(refused(&mut left, &another), NotReshaped::Merging);
    let apart = with(&|plan| plan.other.arc = Some((AT + 1, 0)));
    assert_eq!(refused(&mut left, &apart), NotReshaped::Position);
    let more = with(&|plan| plan.replicas = BTreeMap::from([(11, 21)]));
    assert_eq!(refused(&mut left, &more), NotReshaped::Replicas);
    let late = with(&|plan| plan.planned.epoch = 2);
    assert_eq!(refused(&mut left, &late), NotReshaped::Epoch { epoch: 1 });
    let (_, outcome) = absorb(&mut left, &right, &plan);
    assert!(matches!(outcome, Outcome::Reshaped(Ok(_))), "{outcome:?}");
}

#[test]
fn a_merge_is_announced_only_with_exactly_the_members() {
    let (left, _) = neighbours();
    let announced = |replicas: &[u64]| {
        let (mut overlay, mut state) = (left.store.overlay(), left.store.state());
        state.membership = members();
        let planned = Planned { membership: MEMBERSHIP, ..PLANNED };
        let replicas = replicas.iter().copied().collect();
        let plan = AnnounceMerge { planned, merge: 7, absorbs: true, replicas, rules: rules() };
        let stamp = left.now_ms << 16;
        let entry = Stamped { stamp, ceiling: stamp, command: Command::Announce(plan) }.encode();
        let at = Position { term: left.term, index: left.index + 1 };
        let done = apply(&mut overlay, &mut state, at, &entry, None).expect("a sound entry");
        let Outcome::Reshaped(reshaped) = done.replies[0].outcome.clone() else {
            panic!("{:?}", done.replies)
        };
        assert_eq!(state.merge.merging.is_some(), reshaped.is_ok());
        reshaped.map(|reshaped| reshaped.descriptor.epoch)
    };
    for other in [&[][..], &[11], &[11, 13], &[11, 12, 13]] {
        assert_eq!(announced(other), Err(NotReshaped::Replicas), "{other:?}");
    }
    assert_eq!(announced(&[11, 12]), Ok(PLANNED.epoch));
}

/// One of each kind, and of those that end a merge one for each reason to refuse it. No wildcard: a new command
/// is to be thought about here.
fn all_commands(group: &Group) -> Vec<Command> {
    let now_ms = group.now_ms;
    let epoch = PLANNED.epoch;
    let announce = |merge, absorbs| {
        let replicas = BTreeSet::new();
        Command::Announce(AnnounceMerge {
            planned: PLANNED,
            merge,
            absorbs,
            replicas,
            rules: rules(),
        })
    };
    let freeze = |merge| Command::Freeze(FreezeShard { planned: PLANNED, merge });
    let mut all = vec![
        Command::Requests(vec![Request {
            position: AT,
            ..request(group.id(5, 1), vec![put("u", "late")])
        }]),
        Command::Advance,
        Command::Describe(Descriptor { shard: 9, arc: Some((0, 0)), epoch: 9 }),
        Command::Settings(vec![Settings { keyspace: KEYSPACE, history_ms: 1, revision: 99 }]),
        Command::Pin(Pin { keyspace: KEYSPACE, version: now_ms << 16, until_ms: now_ms + 100_000 }),
        Command::Split(SplitShard { planned: PLANNED, at: AT + 1, ..plan() }),
        Command::Absorb(plan_to_absorb(group)),
    ];
    for merge in [7, 8] {
        all.extend([announce(merge, true), announce(merge, false), freeze(merge)]);
        all.push(Command::EndMerge(EndMerge { merge, epoch }));
    }
    for (merge, epoch) in [(7, epoch - 1), (7, epoch + 1), (8, epoch)] {
        all.push(Command::Thaw(EndMerge { merge, epoch }));
    }
    let name = |command: &Command| match command {
        Command::Requests(_) => 0,
        Command::Advance => 1,
        Command::Describe(_) => 2,
        Command::Settings(_) => 3,
        Command::Pin(_) => 4,
        Command::Split(_) => 5,
        Command::Announce(_) => 6,
        Command::Freeze(_) => 7,
        Command::Thaw(_) => 8,
        Command::Absorb(_) => 9,
        Command::EndMerge(_) => 10,
    };
    assert_eq!(all.iter().map(name).collect::<BTreeSet<_>>(), (0..=10).collect());
    all
}

#[test]
fn a_frozen_group_changes_by_no_command_but_the_thaw_that_is_done() {
    for announced in [true, false] {
        let (_, mut right) = neighbours();
        let first = Request { position: AT, ..request(right.id(1, 1), vec![put("u", "v")]) };
        applied_version(&right.write(first));
        if announced {
            announce(&mut right, false);
        }
        right.entry(Command::Freeze(FreezeShard { planned: PLANNED, merge: 7 }));
        let (state, raw) = (right.store.state(), right.store.raw());
        assert!(state.merge.frozen.is_some());
        for command in all_commands(&right) {
            right.now_ms += 5_000;
            right.entry(command.clone());
            assert_eq!(right.store.state(), state, "{command:?}");
            assert_eq!(right.store.raw(), raw, "{command:?}");
        }
        right.now_ms += 5_000;
        right.entry(Command::Thaw(EndMerge { merge: 7, epoch: PLANNED.epoch }));
        let after = right.store.state();
        assert!(after.merge.frozen.is_none() && after.ceiling > state.ceiling);
    }
}

#[test]
fn what_both_remember_is_cut_to_the_bounds_when_they_become_one() {
    let bounds = Bounds { results: 100, result_bytes: 1 << 20, marks: 100 };
    let fill = |group: &mut Group, clients: std::ops::Range<u64>, position| {
        for client in clients {
            let write = request(group.id(client, 1), vec![put("k", "v")]);
            applied_version(&group.write(Request { position, ..write }));
        }
    };
    for (old, left_over) in [(90, 99), (20, 120)] {
        let (mut left, mut right) = (Group::fresh(bounds), Group::fresh(bounds));
        left.entry(Command::Describe(Descriptor { shard: 1, arc: Some((0, AT)), epoch: 1 }));
        right.entry(Command::Describe(Descriptor { shard: 2, arc: Some((AT, 0)), epoch: 1 }));
        // Those of the same birth go by the client's id, so that all replicas cut the same.
        fill(&mut left, 0..old, 5);
        for group in [&mut left, &mut right] {
            group.now_ms += 3 * AGE_MS_MIN;
        }
        fill(&mut left, old..90, 5);
        fill(&mut right, 1_000..1_050, AT);
        announce(&mut left, true);
        right.entry(Command::Freeze(FreezeShard { planned: PLANNED, merge: 7 }));
        let plan = plan_to_absorb(&right);
        let (state, outcome) = absorb(&mut left, &right, &plan);
        assert!(matches!(outcome, Outcome::Reshaped(Ok(_))), "{outcome:?}");
        // Evicted in steps; nothing that is young goes.
        let kept = state.dedup.results;
        assert!(kept <= left_over && kept + 64 > left_over, "{kept}");
        assert_eq!(state.dedup.marks, kept);
        assert_eq!(left.store.count(Kind::Result) as u64, kept);
        assert_eq!(left.store.count(Kind::ResultAge) as u64, 2 * kept);
        let late =
            request(RequestId { birth_ms: left.now_ms, ..left.id(5_000, 1) }, vec![put("k", "v")]);
        let reply = left.write(late);
        let refused = matches!(reply.outcome, Outcome::Overloaded { .. });
        assert_eq!(refused, left_over >= bounds.results, "{reply:?}");
        let retry = request(left.id(1_049, 1), vec![put("k", "v")]);
        assert!(left.write(retry).duplicate, "a young one is known for its time");
    }
}

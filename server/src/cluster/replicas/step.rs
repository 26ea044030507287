//! What happens next to one replica: a pure function of what is recorded of it and of what its group
//! says. Whoever leads the meta group next decides the same from the same.

/// What the records say of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    /// In the map, not yet to be read from.
    Joining,
    /// In the map.
    Present,
    /// In the map as a voter that goes, with nobody in its place.
    Going,
    /// Out of the map; to be ended.
    Leaving,
    /// Nothing.
    Unknown,
}

/// What a replica's group says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Membership {
    /// The group could not be asked.
    NotAsked,
    /// It is no member.
    Absent,
    /// A read replica.
    Learner {
        /// It holds nearly all that the leader holds.
        caught_up: bool,
    },
    /// It votes.
    Voter,
}

/// What becomes of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// It answers, or may answer again.
    Hoped,
    /// It has been silent for longer than a new replica waits.
    Silent,
    /// It will never answer again.
    Gone,
}

/// All that decides what happens to a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// By the records.
    pub(super) recorded: Recorded,
    /// By its group.
    pub(super) member: Membership,
    /// Its node.
    pub(super) home: Home,
    /// Its node has said, to this controller, that it has made it.
    pub(super) made: bool,
    /// Its node has said that it does not run there: damaged, or not there at all.
    pub(super) lost: bool,
    /// It has been joining for longer than one waits.
    pub(super) stuck: bool,
    /// By the records: it shall vote.
    pub(super) becomes_voter: bool,
}

/// What happens next to a replica. Each can be done again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    /// Nothing: it is as it should be, or something else must happen first.
    Wait,
    /// Its node makes it, without members.
    Make,
    /// Its group takes it in, as a read replica.
    Add,
    /// The map says that it can be read from.
    Settle,
    /// Its group lets it vote, in the place of the voter that it replaces.
    Promote,
    /// Its group lets it go: it votes, and nobody takes its place.
    Retire,
    /// The map loses it, and the records remember that it must go.
    Withdraw,
    /// Its group lets it go.
    Remove,
    /// Its node removes it for ever.
    Destroy,
    /// The records forget it.
    Forget,
}

/// Decides. A replica is made only as long as its group does not know it: one that the group knows and
/// that lost what it held must not come back empty under the same id. It is destroyed only when the
/// group knows it no more, and only then forgotten. What its node has lost is so replaced under a fresh
/// id: it goes, and the setting that it leaves unmet brings another.
pub(super) fn next(seen: Seen) -> Step {
    use Membership::{Absent, Learner, NotAsked, Voter};
    match (seen.recorded, seen.member) {
        (Recorded::Joining | Recorded::Present, Voter) => Step::Wait,
        (Recorded::Joining, _) if seen.home != Home::Hoped || seen.stuck => Step::Withdraw,
        (Recorded::Present, Learner { .. } | Absent) if seen.home == Home::Gone => Step::Withdraw,
        (_, NotAsked) => Step::Wait,
        (Recorded::Joining | Recorded::Present, Learner { .. }) if seen.lost => Step::Withdraw,
        (Recorded::Joining, Absent) if !seen.made => Step::Make,
        (Recorded::Joining | Recorded::Present, Absent) => Step::Add,
        (Recorded::Joining, Learner { caught_up: true }) if seen.becomes_voter => Step::Promote,
        (Recorded::Joining, Learner { caught_up: true }) => Step::Settle,
        (Recorded::Going, Voter) => Step::Retire,
        (Recorded::Leaving, Learner { .. }) => Step::Remove,
        (Recorded::Leaving, Absent) if seen.home == Home::Gone => Step::Forget,
        (Recorded::Leaving, Absent) => Step::Destroy,
        // A command that came late: no record knows it.
        (Recorded::Unknown, Learner { .. }) => Step::Withdraw,
        (Recorded::Unknown, Absent) => Step::Wait,
        (Recorded::Joining | Recorded::Present, Learner { .. }) => Step::Wait,
        // The map takes from its group who votes.
        (Recorded::Going, _) | (_, Voter) => Step::Wait,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A replica, its group and its node, which do what a step says, if they are there.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct World {
        recorded: u8,
        member: bool,
        on_node: bool,
        was_destroyed: bool,
    }

    const RECORDED: [Recorded; 4] =
        [Recorded::Joining, Recorded::Present, Recorded::Leaving, Recorded::Unknown];

    fn seen(world: World, made: bool, home: Home) -> Seen {
        let member = match world.member {
            true => Membership::Learner { caught_up: world.on_node },
            false => Membership::Absent,
        };
        let recorded = RECORDED[world.recorded as usize];
        Seen { recorded, member, home, made, lost: false, stuck: false, becomes_voter: false }
    }

    fn done(mut world: World, step: Step) -> World {
        match step {
            Step::Wait => {}
            Step::Make => world.on_node |= !world.was_destroyed,
            Step::Add => world.member = true,
            Step::Settle => world.recorded = 1,
            Step::Withdraw => world.recorded = 2,
            Step::Remove => world.member = false,
            Step::Destroy => (world.on_node, world.was_destroyed) = (false, true),
            Step::Forget => world.recorded = 3,
            Step::Promote | Step::Retire => unreachable!("a read replica stays one"),
        }
        world
    }

    fn run(mut world: World, forget_made_at: usize) -> (World, BTreeSet<Step>) {
        let mut made = false;
        let mut taken = BTreeSet::new();
        for round in 0..20 {
            // The next controller remembers nothing of what was made.
            made &= round != forget_made_at;
            let step = next(seen(world, made, Home::Hoped));
            taken.insert(step);
            made |= step == Step::Make;
            world = done(world, step);
            if step == Step::Destroy {
                world = done(world, Step::Forget);
            }
        }
        (world, taken)
    }

    #[test]
    fn a_joining_replica_settles_whenever_the_controller_changes() {
        for forget_made_at in 0..8 {
            for (member, on_node) in [(false, false), (false, true), (true, true)] {
                let world = World { recorded: 0, member, on_node, was_destroyed: false };
                let (end, _) = run(world, forget_made_at);
                let settled = World { recorded: 1, member: true, on_node: true, ..world };
                assert_eq!(end, settled, "from {world:?}");
            }
        }
    }

    #[test]
    fn what_leaves_is_gone_everywhere_in_the_end() {
        for (recorded, member, on_node) in [
            (2, true, true),
            (2, false, true),
            (2, false, false),
            (3, true, true),
            (3, true, false),
        ] {
            let world = World { recorded, member, on_node, was_destroyed: false };
            let (end, _) = run(world, 2);
            let gone = World { recorded: 3, member: false, on_node: false, was_destroyed: true };
            assert_eq!(end, gone, "from {world:?}");
        }
    }

    #[test]
    fn a_node_that_does_not_come_back_is_given_up_by_those_who_wait_for_it() {
        let world = World { recorded: 0, member: true, on_node: false, was_destroyed: false };
        assert_eq!(next(seen(world, false, Home::Hoped)), Step::Wait);
        assert_eq!(next(seen(world, false, Home::Silent)), Step::Withdraw);
        let present = World { recorded: 1, on_node: true, ..world };
        assert_eq!(next(seen(present, false, Home::Silent)), Step::Wait, "it may come back");
        assert_eq!(next(seen(present, false, Home::Gone)), Step::Withdraw);
        let leaving = World { recorded: 2, member: false, ..world };
        assert_eq!(
            next(seen(leaving, false, Home::Silent)),
            Step::Destroy,
            "asked until it answers"
        );
        assert_eq!(next(seen(leaving, false, Home::Gone)), Step::Forget);
    }

    #[test]
    fn what_its_node_has_lost_goes_and_so_does_what_never_comes() {
        let member = |caught_up| Membership::Learner { caught_up };
        let seen = |recorded, member, lost, stuck| {
            let (home, becomes_voter) = (Home::Hoped, false);
            next(Seen { recorded, member, home, made: true, lost, stuck, becomes_voter })
        };
        for recorded in [Recorded::Joining, Recorded::Present] {
            assert_eq!(seen(recorded, member(false), true, false), Step::Withdraw);
            assert_eq!(seen(recorded, Membership::Voter, true, true), Step::Wait);
            assert_eq!(seen(recorded, Membership::NotAsked, true, false), Step::Wait);
        }
        for membership in [member(false), Membership::Absent, Membership::NotAsked] {
            assert_eq!(seen(Recorded::Joining, membership, false, true), Step::Withdraw);
        }
        assert_eq!(seen(Recorded::Present, member(false), false, true), Step::Wait);
        assert_eq!(seen(Recorded::Leaving, member(false), true, true), Step::Remove);
        assert_eq!(seen(Recorded::Leaving, Membership::Absent, true, true), Step::Destroy);
    }

    #[test]
    fn one_that_shall_vote_is_promoted_when_it_has_caught_up_and_one_that_goes_is_retired() {
        let seen = |recorded, member, becomes_voter| {
            let (home, made, lost, stuck) = (Home::Hoped, true, false, false);
            next(Seen { recorded, member, home, made, lost, stuck, becomes_voter })
        };
        let learner = |caught_up| Membership::Learner { caught_up };
        assert_eq!(seen(Recorded::Joining, Membership::Absent, true), Step::Add);
        assert_eq!(seen(Recorded::Joining, learner(false), true), Step::Wait);
        assert_eq!(seen(Recorded::Joining, learner(true), true), Step::Promote);
        assert_eq!(seen(Recorded::Joining, learner(true), false), Step::Settle);
        for recorded in RECORDED {
            assert_eq!(seen(recorded, Membership::Voter, true), Step::Wait, "{recorded:?}");
        }
        assert_eq!(seen(Recorded::Going, Membership::Voter, false), Step::Retire);
        assert_eq!(seen(Recorded::Going, Membership::NotAsked, false), Step::Wait);
        assert_eq!(
            seen(Recorded::Going, Membership::Absent, false),
            Step::Wait,
            "the map will say"
        );
    }

    #[test]
    fn nothing_is_made_or_destroyed_while_the_group_knows_it_or_cannot_be_asked() {
        for recorded in RECORDED {
            for member in [
                Membership::NotAsked,
                Membership::Voter,
                Membership::Learner { caught_up: false },
                Membership::Learner { caught_up: true },
            ] {
                for home in [Home::Hoped, Home::Silent, Home::Gone] {
                    for made in [false, true] {
                        let (lost, stuck) = (false, false);
                        let becomes_voter = false;
                        let step =
                            next(Seen { recorded, member, home, made, lost, stuck, becomes_voter });
                        let touches = [Step::Make, Step::Destroy, Step::Forget, Step::Add];
                        assert!(!touches.contains(&step), "{step:?}: {recorded:?}, {member:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_step_is_taken_by_some_replica() {
        let mut taken = BTreeSet::new();
        for (recorded, member) in [(0, false), (2, true), (3, true)] {
            let world = World { recorded, member, on_node: false, was_destroyed: false };
            taken.append(&mut run(world, 99).1);
        }
        // `Forget` comes with `Destroy`, or of a node that is gone.
        let gone = World { recorded: 2, member: false, on_node: false, was_destroyed: false };
        taken.insert(next(seen(gone, false, Home::Gone)));
        let all = [
            Step::Wait,
            Step::Make,
            Step::Add,
            Step::Settle,
            Step::Withdraw,
            Step::Remove,
            Step::Destroy,
            Step::Forget,
        ];
        assert_eq!(taken, all.into_iter().collect());
    }
}

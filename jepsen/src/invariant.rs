//! What must hold in every run, beside what the checkers of histories say. One sentence, one file.
//! Owns the looks at the nodes while they run; each invariant owns what it remembers of them.

mod a_replica_stays;
mod applied_only_forward;
pub mod arcs_tile;
mod committed_is_final;
mod epochs_only_forward;
mod leaders_hold_what_is_committed;
mod learners_never_vote;
mod log_is_bounded;
mod maps_agree;
mod members_are_known_once;
mod nothing_stops_by_itself;
mod one_arc_per_epoch;
mod one_leader_is_known_per_term;
mod one_leader_per_term;
mod only_forward;
mod progress_is_in_order;
pub mod replicas_agree;
mod terms_rise_with_the_log;

use coracle_raft::descriptor::Descriptor;
use coracle_raft::leadership::GroupStatus;

use crate::cluster::sim::Cluster;
use a_replica_stays::AReplicaStays;
use applied_only_forward::AppliedOnlyForward;
use committed_is_final::CommittedIsFinal;
use epochs_only_forward::EpochsOnlyForward;
use leaders_hold_what_is_committed::LeadersHoldWhatIsCommitted;
use learners_never_vote::LearnersNeverVote;
use maps_agree::MapsAgree;
use members_are_known_once::MembersAreKnownOnce;
use nothing_stops_by_itself::NothingStopsByItself;
use one_arc_per_epoch::OneArcPerEpoch;
use one_leader_is_known_per_term::OneLeaderIsKnownPerTerm;
use one_leader_per_term::OneLeaderPerTerm;
use only_forward::OnlyForward;
use progress_is_in_order::ProgressIsInOrder;
use terms_rise_with_the_log::TermsRiseWithTheLog;

/// One replica, as it shows itself at a moment.
#[derive(Clone, Debug)]
pub struct Look {
    /// The machine it is on.
    pub node: usize,
    /// Its shard.
    pub shard: u64,
    /// Its own number.
    pub replica: u64,
    /// Which start of its machine it belongs to: with the replica, a name for its process.
    pub boot: u64,
    /// What it says.
    pub status: GroupStatus,
    /// What it holds, as of what it has applied.
    pub descriptor: Option<Descriptor>,
    /// The group's clock, as of the same.
    pub clock: u64,
    /// Whether its node has a reason to stop.
    pub node_stops: bool,
}

/// Something that must hold at every moment.
pub trait Invariant {
    /// The sentence.
    fn sentence(&self) -> &'static str;

    /// Looks at a replica, and says what is wrong.
    fn look(&mut self, look: &Look) -> Option<String>;
}

/// All of them, over one run.
pub struct Watch {
    invariants: Vec<Box<dyn Invariant>>,
    broken: Vec<String>,
    elections: OneLeaderPerTerm,
    maps: MapsAgree,
}

impl Default for Watch {
    fn default() -> Watch {
        Watch {
            invariants: vec![
                Box::<CommittedIsFinal>::default(),
                Box::<OnlyForward>::default(),
                Box::<LearnersNeverVote>::default(),
                Box::<AReplicaStays>::default(),
                Box::<AppliedOnlyForward>::default(),
                Box::<EpochsOnlyForward>::default(),
                Box::<LeadersHoldWhatIsCommitted>::default(),
                Box::<MembersAreKnownOnce>::default(),
                Box::<NothingStopsByItself>::default(),
                Box::<OneArcPerEpoch>::default(),
                Box::<OneLeaderIsKnownPerTerm>::default(),
                Box::<ProgressIsInOrder>::default(),
                Box::<TermsRiseWithTheLog>::default(),
            ],
            broken: Vec::new(),
            elections: OneLeaderPerTerm::default(),
            maps: MapsAgree::default(),
        }
    }
}

impl Watch {
    /// Looks at every replica of every node that runs.
    pub fn look(&mut self, cluster: &Cluster) {
        for node in 0..cluster.len() {
            let Some(running) = cluster.node(node) else { continue };
            let boot = cluster.boots(node);
            // One whose disk has just died may not have noticed yet.
            let node_stops = cluster.why_stopped(node).is_some() || cluster.files(node).crashed();
            if let Some(map) = running.map() {
                self.broken.extend(self.maps.look(node, boot, &map));
            }
            let Some(host) = running.host() else { continue };
            self.broken.extend(log_is_bounded::check(node, &host.log_stats()));
            for group in host.groups() {
                self.look_at(&Look {
                    node,
                    shard: group.shard().0,
                    replica: group.replica().0,
                    boot,
                    status: group.status(),
                    descriptor: group.descriptor(),
                    clock: group.clock(),
                    node_stops,
                });
            }
        }
    }

    fn look_at(&mut self, look: &Look) {
        let invariants = self.invariants.iter_mut().map(|invariant| &mut **invariant as _);
        let all: Vec<&mut dyn Invariant> = invariants.chain([&mut self.elections as _]).collect();
        for invariant in all {
            if let Some(why) = invariant.look(look) {
                let sentence = invariant.sentence();
                let broken = format!("{sentence}: shard {}: {why}", look.shard);
                // Most of it stays as it is, and is seen again at every look.
                if !self.broken.contains(&broken) {
                    self.broken.push(broken);
                }
            }
        }
    }

    /// What did not hold.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }

    /// Leaders so far, of all shards: how often somebody was elected.
    pub fn elections(&self) -> u64 {
        self.elections.leaders()
    }

    /// The machine on which a shard is led, as of the last look.
    pub fn leader(&self, shard: u64) -> Option<usize> {
        self.elections.leader(shard)
    }
}

#[cfg(test)]
mod tests {
    use coracle_raft::leadership::{Member, Standing};
    use coracle_raft::types::{NodeId, Position, Role};

    use super::*;

    fn at(term: u64, index: u64) -> Option<Position> {
        Some(Position { term, index })
    }

    /// A leader that is well, as the first replica of three.
    fn good() -> Look {
        let member = |node| {
            let node = NodeId(node);
            Member { node, role: Role::Voter, matched: None, heard: None }
        };
        Look {
            node: 0,
            shard: 1,
            replica: 11,
            boot: 1,
            status: GroupStatus {
                state: Standing::Leader,
                term: 3,
                leader_replica: Some(11),
                leader: Some(NodeId(1)),
                last_index: Some(12),
                committed: at(3, 11),
                applied: at(3, 10),
                purged: at(2, 5),
                members: [(11, member(1)), (12, member(2)), (13, member(3))].into(),
                joint: false,
                failed: None,
            },
            descriptor: Some(Descriptor { shard: 1, arc: Some((0, 0)), epoch: 4 }),
            clock: 100,
            node_stops: false,
        }
    }

    fn sentences(looks: &[Look]) -> Vec<String> {
        let mut watch = Watch::default();
        looks.iter().for_each(|look| watch.look_at(look));
        watch.broken
    }

    #[test]
    fn each_invariant_can_be_broken() {
        let change = |change: &dyn Fn(&mut Look)| {
            let mut look = good();
            change(&mut look);
            look
        };
        let cases: Vec<(&str, Look)> = vec![
            (
                "what is committed at an index is final",
                change(&|look| look.status.committed = at(2, 11)),
            ),
            (
                "the term in which a replica leads never goes back",
                change(&|look| look.status.term = 2),
            ),
            (
                "a read replica never campaigns or leads",
                change(&|look| look.status.members.get_mut(&11).expect("it").role = Role::Learner),
            ),
            ("in one term, one replica of a group leads", change(&|look| look.replica = 12)),
            ("a replica's number is never used for another", change(&|look| look.node = 2)),
            ("has applied only grows", change(&|look| look.status.applied = at(3, 9))),
            ("has applied only grows", change(&|look| look.clock = 99)),
            (
                "the epoch of a running replica never goes back",
                change(&|look| look.descriptor.as_mut().expect("it").epoch = 3),
            ),
            (
                "a leader holds all that was committed",
                change(&|look| (look.status.term, look.status.last_index) = (4, Some(10))),
            ),
            (
                "no two of them on one node",
                change(&|look| look.status.members.get_mut(&12).expect("it").node = NodeId(1)),
            ),
            (
                "no replica stops by itself",
                change(&|look| look.status.failed = Some("no".to_owned())),
            ),
            (
                "at one epoch, a shard is one arc",
                change(&|look| look.descriptor.as_mut().expect("it").arc = Some((0, 5))),
            ),
            (
                "all who know who leads a term know the same one",
                change(&|look| look.status.leader_replica = Some(12)),
            ),
            ("what is purged was applied", change(&|look| look.status.purged = at(3, 11))),
            ("the later one has no lower term", change(&|look| look.status.committed = at(2, 12))),
        ];
        assert_eq!(sentences(&[good(), good()]), [""; 0]);
        for (sentence, bad) in cases {
            let found = sentences(&[good(), bad]);
            assert!(found.iter().any(|one| one.contains(sentence)), "{sentence}: {found:?}");
        }
    }
}

//! What must hold in every run, beside what the checkers of histories say. One sentence, one file.
//! Owns the looks at the nodes while they run; each invariant owns what it remembers of them.

mod committed_is_final;
mod learners_never_vote;
mod one_leader_per_term;
mod only_forward;
pub mod replicas_agree;

use coracle_raft::group::Group;
use coracle_raft::leadership::GroupStatus;

use crate::cluster::sim::Cluster;
pub use committed_is_final::CommittedIsFinal;
pub use learners_never_vote::LearnersNeverVote;
pub use one_leader_per_term::OneLeaderPerTerm;
pub use only_forward::OnlyForward;

/// One replica, as it shows itself at a moment.
#[derive(Clone, Debug)]
pub struct Look {
    /// The machine it is on.
    pub node: usize,
    /// Its shard.
    pub shard: u64,
    /// Its own number.
    pub replica: u64,
    /// What it says.
    pub status: GroupStatus,
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
}

impl Default for Watch {
    fn default() -> Watch {
        Watch {
            invariants: vec![
                Box::<CommittedIsFinal>::default(),
                Box::<OnlyForward>::default(),
                Box::<LearnersNeverVote>::default(),
            ],
            broken: Vec::new(),
            elections: OneLeaderPerTerm::default(),
        }
    }
}

impl Watch {
    /// Looks at every replica of every node that runs.
    pub fn look(&mut self, cluster: &Cluster) {
        for node in 0..cluster.len() {
            let Some(host) = cluster.node(node).and_then(|node| node.host()) else {
                continue;
            };
            for group in host.groups() {
                self.look_at(&look(node, &group));
            }
        }
    }

    fn look_at(&mut self, look: &Look) {
        let invariants = self.invariants.iter_mut().map(|invariant| &mut **invariant as _);
        let all: Vec<&mut dyn Invariant> = invariants.chain([&mut self.elections as _]).collect();
        for invariant in all {
            if let Some(why) = invariant.look(look) {
                let sentence = invariant.sentence();
                self.broken.push(format!("{sentence}: shard {}: {why}", look.shard));
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

fn look(node: usize, group: &Group) -> Look {
    Look { node, shard: group.shard().0, replica: group.replica().0, status: group.status() }
}

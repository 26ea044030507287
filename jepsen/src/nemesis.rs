//! What goes wrong, and when. Owns the mix that a seed draws, the calendar of faults, and their end.
//! How each fault is done stands in a file of its own; what must hold meanwhile is not its business.

mod crashes;
mod links;
mod moves;
mod replicas;
mod reshapes;
mod times;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_storage::fs::faulty::Dice;
use tokio::time::Instant;

use crate::cluster::sim::Cluster;
use crate::invariant::Watch;
use crate::trace::Trace;

/// Which kinds of faults a run has. Not every run has all: some bugs show only where nothing else
/// happens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mix {
    /// Nodes crash and come back.
    pub crashes: bool,
    /// What was not synced is lost in crashes; else only the process dies.
    pub power_cuts: bool,
    /// A crash hits a node in the middle of an operation of its disk, or in its recovery.
    pub crash_points: bool,
    /// Links are cut, both ways or one way.
    pub partitions: bool,
    /// Connections are reset, and links are slow.
    pub flaky_links: bool,
    /// Wall clocks jump.
    pub clocks: bool,
    /// Disks hang for a while.
    pub stalls: bool,
    /// Read replicas come and go.
    pub replicas: bool,
    /// Voters move from node to node.
    pub moves: bool,
    /// Shards are split and merged.
    pub reshapes: bool,
}

impl Mix {
    /// Each kind with two chances out of three, but never none.
    pub fn draw(dice: &mut Dice) -> Mix {
        let mut has = || dice.below(3) != 0;
        let mut mix = Mix {
            crashes: has(),
            power_cuts: has(),
            crash_points: has(),
            partitions: has(),
            flaky_links: has(),
            clocks: has(),
            stalls: has(),
            replicas: has(),
            moves: has(),
            reshapes: has(),
        };
        mix.crashes |= !(mix.partitions || mix.flaky_links || mix.clocks || mix.stalls);
        mix
    }
}

/// The faults of one run.
pub struct Nemesis<'a> {
    cluster: &'a Cluster,
    watch: &'a RefCell<Watch>,
    trace: Trace,
    mix: Mix,
    /// Hosts of clients: they too can be cut off.
    clients: Vec<String>,
    dice: RefCell<Dice>,
    /// Faults applied, by kind.
    applied: RefCell<BTreeMap<&'static str, u64>>,
    /// Machines whose crash somebody is busy with.
    claimed: RefCell<BTreeSet<usize>>,
    /// Machines whose disk was made to hang.
    stalled: RefCell<BTreeSet<usize>>,
    /// What happened that no fault explains.
    unexplained: RefCell<Vec<String>>,
}

impl<'a> Nemesis<'a> {
    /// A nemesis that has done nothing yet.
    pub fn new(
        cluster: &'a Cluster,
        watch: &'a RefCell<Watch>,
        trace: Trace,
        mix: Mix,
        clients: Vec<String>,
        seed: u64,
    ) -> Nemesis<'a> {
        Nemesis {
            cluster,
            watch,
            trace,
            mix,
            clients,
            dice: RefCell::new(Dice::new(seed)),
            applied: RefCell::default(),
            claimed: RefCell::default(),
            stalled: RefCell::default(),
            unexplained: RefCell::default(),
        }
    }

    /// Does harm for so long. Kinds of faults go on beside each other, so they meet.
    pub async fn rage(&self, lasts: Duration) {
        let end = Instant::now() + lasts;
        tokio::join!(
            biased;
            self.crash_nodes(end),
            self.cut_links(end),
            self.shake_links(end),
            self.set_clocks(end),
            self.stall_disks(end),
            self.keep_alive(end),
            self.set_read_replicas(end),
            self.move_voters(end),
            self.reshape(end),
        );
    }

    /// Ends every fault, and brings everybody back.
    pub async fn relent(&self) {
        self.trace.event(format_args!("all faults end"));
        self.cluster.net.heal();
        for at in 0..self.cluster.len() {
            self.cluster.disk(at).stall(false);
            self.cluster.files(at).crash_at(u64::MAX);
            self.cluster.clock(at).set_right();
        }
        for at in 0..self.cluster.len() {
            let has_stopped = self.cluster.why_stopped(at).is_some();
            // One whose disk has died may not have noticed yet.
            let is_lost = has_stopped || self.cluster.files(at).crashed();
            if is_lost || self.cluster.node(at).is_none() {
                self.bury(at);
                self.revive(at, false).await;
            }
        }
    }

    /// Faults applied, by kind.
    pub fn applied(&self) -> BTreeMap<&'static str, u64> {
        self.applied.borrow().clone()
    }

    /// What happened that no fault explains.
    pub fn unexplained(&self) -> Vec<String> {
        self.unexplained.borrow().clone()
    }

    fn note(&self, kind: &'static str) {
        *self.applied.borrow_mut().entry(kind).or_default() += 1;
    }

    fn below(&self, bound: u64) -> u64 {
        self.dice.borrow_mut().below(bound)
    }

    fn one_in(&self, n: u64) -> bool {
        self.dice.borrow_mut().one_in(n)
    }

    fn any_node(&self) -> usize {
        self.below(self.cluster.len() as u64) as usize
    }

    /// A node that leads something; most of the harm that can be done is done to leaders.
    fn some_leader(&self) -> usize {
        let shard = self.below(8);
        self.watch.borrow().leader(shard).unwrap_or_else(|| self.any_node())
    }

    fn names(&self) -> Vec<String> {
        (0..self.cluster.len()).map(|at| self.cluster.name(at)).collect()
    }

    /// Waits for a while, but not beyond the end; false when the end has come.
    async fn pause(&self, least_ms: u64, most_ms: u64, end: Instant) -> bool {
        let ms = least_ms + self.below(most_ms - least_ms + 1);
        tokio::time::sleep_until(end.min(Instant::now() + Duration::from_millis(ms))).await;
        Instant::now() < end
    }
}

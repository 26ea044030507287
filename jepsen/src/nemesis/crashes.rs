//! Crashes: of one node, of a leader, of a minority, of all at once; of the process or of the power;
//! at a moment, or in the middle of the n-th operation of a disk. Owns how nodes go and come back.

use std::time::Duration;

use coracle_storage::fs::faulty::Loss;
use tokio::time::Instant;

use super::Nemesis;
use crate::cluster::sim::net::Down;

/// Leaderships are handed over within this, or the node stops without.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// A crash point that is not reached within this becomes a crash at a moment.
const POINT_WAIT: Duration = Duration::from_secs(1);

/// A recovery may itself be crashed; after so many tries it may not.
const BOOTS_MAX: u32 = 5;

impl Nemesis<'_> {
    /// Crashes nodes and brings them back, until the end.
    pub(super) async fn crash_nodes(&self, end: Instant) {
        if !self.mix.crashes {
            return;
        }
        while self.pause(500, 4_000, end).await {
            let victims = self.draw_victims();
            self.claimed.borrow_mut().extend(&victims);
            if let [at] = victims[..]
                && self.one_in(4)
            {
                self.note("orderly stop");
                self.cluster.stop(at, STOP_WITHIN).await;
            }
            if self.mix.crash_points && self.one_in(2) {
                self.reach_crash_point(&victims).await;
            }
            for at in &victims {
                self.kill(*at);
            }
            // Whoever is still down when the end comes is brought back by then.
            self.pause(0, 2_500, end).await;
            for at in victims {
                self.revive(at, self.mix.crash_points).await;
                self.claimed.borrow_mut().remove(&at);
            }
        }
    }

    fn draw_victims(&self) -> Vec<usize> {
        let nodes = self.cluster.len();
        let (kind, victims) = match self.below(8) {
            0..=1 => ("crash of one", vec![self.any_node()]),
            2..=4 => ("crash of a leader", vec![self.some_leader()]),
            5..=6 => ("crash of a minority", self.some_nodes((nodes - 1) / 2)),
            _ => ("crash of all", (0..nodes).collect()),
        };
        // One that the keeper is busy with is down already.
        let claimed = self.claimed.borrow().clone();
        let victims: Vec<usize> = victims.into_iter().filter(|at| !claimed.contains(at)).collect();
        if !victims.is_empty() {
            self.note(kind);
        }
        victims
    }

    fn some_nodes(&self, count: usize) -> Vec<usize> {
        let mut nodes: Vec<usize> = (0..self.cluster.len()).collect();
        while nodes.len() > count {
            nodes.remove(self.below(nodes.len() as u64) as usize);
        }
        nodes
    }

    /// Every victim's disk dies in the middle of one of its next operations.
    async fn reach_crash_point(&self, victims: &[usize]) {
        for at in victims {
            let files = self.cluster.files(*at);
            files.crash_at(files.ops() + 1 + self.below(12));
        }
        let deadline = Instant::now() + POINT_WAIT;
        let reached = || victims.iter().all(|at| self.cluster.files(*at).crashed());
        while !reached() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if reached() && !victims.is_empty() {
            self.note("crash point");
        }
    }

    fn draw_loss(&self) -> Loss {
        if !self.mix.power_cuts {
            return Loss::Nothing;
        }
        [Loss::All, Loss::Subset, Loss::Subset, Loss::Nothing][self.below(4) as usize]
    }

    /// Ends the node on a machine, in one way or another.
    fn kill(&self, at: usize) {
        let loss = self.draw_loss();
        // A machine that lost its power tells nobody; nor does one whose link went with it.
        let is_told = loss == Loss::Nothing && !self.one_in(3);
        self.cluster.crash(at, if is_told { Down::Process } else { Down::Power }, loss);
    }

    /// Ends a node that has stopped by itself, or is down already.
    pub(super) fn bury(&self, at: usize) {
        let loss = if self.cluster.files(at).crashed() { self.draw_loss() } else { Loss::Nothing };
        self.cluster.crash(at, Down::Process, loss);
    }

    /// Brings a machine back, whose recovery may be crashed as well.
    pub(super) async fn revive(&self, at: usize, may_crash_again: bool) {
        for boots in 1.. {
            let may_crash = may_crash_again && boots < BOOTS_MAX;
            if may_crash && self.one_in(3) {
                let files = self.cluster.files(at);
                files.crash_at(files.ops() + 1 + self.below(30));
            }
            let boot = self.cluster.boot(at);
            let booted = if may_crash && self.one_in(6) {
                let patience = Duration::from_millis(self.below(20));
                let booted = tokio::time::timeout(patience, boot).await;
                booted.unwrap_or_else(|_| Err("crashed while it was starting".to_owned()))
            } else {
                boot.await.map_err(|why| self.explain_boot(at, why))
            };
            let Err(why) = booted else { return };
            self.trace.event(format_args!("{why}"));
            self.note("crash in recovery");
            self.kill(at);
            if boots > 2 * BOOTS_MAX {
                self.unexplained.borrow_mut().push(format!("a node does not come back: {why}"));
                return;
            }
        }
    }

    fn explain_boot(&self, at: usize, why: String) -> String {
        if !self.cluster.files(at).crashed() {
            self.unexplained.borrow_mut().push(why.clone());
        }
        why
    }

    /// Brings back nodes that stopped by themselves, as whatever runs processes would.
    pub(super) async fn keep_alive(&self, end: Instant) {
        while Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(50)).await;
            for at in 0..self.cluster.len() {
                let Some(why) = self.cluster.why_stopped(at) else {
                    continue;
                };
                if !self.claimed.borrow_mut().insert(at) {
                    continue;
                }
                let stalled = self.stalled.borrow().contains(&at);
                if !self.cluster.files(at).crashed() && !stalled {
                    let name = self.cluster.name(at);
                    self.unexplained.borrow_mut().push(format!("{name} stopped: {why}"));
                }
                self.trace.event(format_args!("{} stopped: {why}", self.cluster.name(at)));
                self.note("stopped by itself");
                self.bury(at);
                self.revive(at, self.mix.crash_points).await;
                self.claimed.borrow_mut().remove(&at);
            }
        }
    }
}

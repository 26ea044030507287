//! Whether a plan is sound, and as good as it says: verified from the view, the settings and the plan.
//!
//! Shares nothing with what makes plans but the types, so that one mistake is not made twice. Carries the
//! steps out one by one, each as a cluster would have to; then judges where they lead. That nothing is
//! better is proved by `best`, as far as it is claimed.

mod best;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_proto::shard_map::{NodeId, ShardId};

use super::model::{
    Duty, Goal, Move, NodeView, Placed, Plan, Seat, Settings, ShardView, Spread, Stall, Step,
    Transfer, View,
};

/// What is wrong with a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// It is bound to another map.
    #[error("the plan is of another epoch")]
    Epoch,
    /// A step cannot be done when its turn comes.
    #[error("step {at} (shard {shard}): {why}")]
    Step {
        /// Its place, from 0.
        at: usize,
        /// Its shard.
        shard: ShardId,
        /// What is in its way.
        why: &'static str,
    },
    /// A shard ends where it should not.
    #[error("shard {shard}: {why}")]
    Shard {
        /// The shard.
        shard: ShardId,
        /// What is wrong there.
        why: &'static str,
    },
    /// A number of the plan about itself.
    #[error("the plan's {what} is wrong")]
    Sum {
        /// Which.
        what: &'static str,
    },
    /// There is a better placement, or the same one for fewer moves.
    #[error("{what} could be better")]
    NotBest {
        /// Of whom.
        what: &'static str,
    },
    /// What remains undone is not said, or said and not so.
    #[error("what is stalled is told wrong: {what}")]
    Stalls {
        /// Which.
        what: &'static str,
    },
}

/// A shard on its way.
#[derive(Clone)]
struct State<'a> {
    shard: &'a ShardView,
    voters: BTreeMap<NodeId, Option<Seat>>,
    leader: Option<NodeId>,
}

struct Checker<'a> {
    view: &'a View,
    settings: &'a Settings,
    plan: &'a Plan,
    nodes: BTreeMap<NodeId, &'a NodeView>,
}

/// Verifies a plan as [`super::plan()`] makes it.
pub fn check(view: &View, settings: &Settings, plan: &Plan) -> Result<(), Wrong> {
    let nodes = view.nodes.iter().map(|node| (node.id, node)).collect();
    let checker = Checker { view, settings, plan, nodes };
    if plan.epoch != view.epoch {
        return Err(Wrong::Epoch);
    }
    let states = checker.walk()?;
    checker.wanted(&states)?;
    checker.sums(&states)?;
    checker.ends(&states)?;
    checker.told(&states)?;
    best::prove(&checker, &states)
}

impl<'a> Checker<'a> {
    fn duty(&self, node: NodeId) -> Duty {
        self.nodes.get(&node).map_or(Duty::Lost, |node| node.duty)
    }

    /// Not a leader that no longer answers, or does not vote.
    fn leader(&self, shard: &ShardView) -> Option<NodeId> {
        let leader = shard.leader?;
        let votes = shard.voters.iter().any(|seat| seat.node == leader);
        let answers = matches!(self.duty(leader), Duty::Serves | Duty::Keeps | Duty::Leaves);
        (votes && answers).then_some(leader)
    }

    fn quorum_lost(&self, shard: &ShardView) -> bool {
        let alive = shard.voters.iter().filter(|seat| self.duty(seat.node) != Duty::Lost).count();
        !shard.voters.is_empty() && alive < shard.voters.len() / 2 + 1
    }

    /// Nodes where a replica of the shard may stand that is not pinned where it is.
    fn may(&self, shard: &ShardView) -> BTreeSet<NodeId> {
        let here = |node: NodeId| shard.voters.iter().any(|seat| seat.node == node);
        let nodes = self.nodes.values().filter(|node| node.duty == Duty::Serves);
        let free = nodes.filter(|node| !shard.learners.contains(&node.id) || here(node.id));
        free.map(|node| node.id).collect()
    }

    /// Carries the plan out.
    fn walk(&self) -> Result<BTreeMap<ShardId, State<'a>>, Wrong> {
        let mut states: BTreeMap<ShardId, State> = BTreeMap::new();
        for shard in &self.view.shards {
            let voters: BTreeMap<NodeId, Option<Seat>> =
                shard.voters.iter().map(|seat| (seat.node, Some(*seat))).collect();
            if voters.len() != shard.voters.len() {
                return Err(Wrong::Shard { shard: shard.id, why: "it begins twice on a node" });
            }
            states.insert(shard.id, State { shard, voters, leader: self.leader(shard) });
        }
        let disks = self.nodes.values().filter_map(|node| Some((node.id, node.disk?.used)));
        let mut used: BTreeMap<NodeId, u64> = disks.collect();
        for (at, step) in self.plan.steps.iter().enumerate() {
            let shard = match step {
                Step::Move(change) => change.shard,
                Step::Transfer(transfer) => transfer.shard,
            };
            let wrong = |why| Wrong::Step { at, shard, why };
            let state = states.get_mut(&shard).ok_or(wrong("there is no such shard"))?;
            if self.quorum_lost(state.shard) {
                return Err(wrong("it has lost its quorum"));
            }
            match step {
                Step::Move(change) => self.change(state, change, &mut used),
                Step::Transfer(transfer) => self.transfer(state, *transfer),
            }
            .map_err(wrong)?;
        }
        Ok(states)
    }

    fn change(
        &self,
        state: &mut State,
        change: &Move,
        used: &mut BTreeMap<NodeId, u64>,
    ) -> Result<(), &'static str> {
        let before = state.voters.len();
        if let Some(to) = change.to {
            if self.duty(to) != Duty::Serves {
                return Err("its target takes nothing");
            }
            if state.shard.learners.contains(&to) {
                return Err("its target holds a read replica");
            }
            if state.voters.insert(to, None).is_some() {
                return Err("its target votes already");
            }
            if let (Some(disk), Some(used)) = (self.nodes[&to].disk, used.get_mut(&to)) {
                *used = used.saturating_add(state.shard.bytes);
                if *used > self.settings.limit(disk) {
                    return Err("its target's disk is too full");
                }
            }
        }
        if change.bytes != change.to.map_or(0, |_| state.shard.bytes) {
            return Err("its bytes are not the shard's");
        }
        let Some(from) = change.from else {
            let nothing = change.to.is_none() || change.hand_over.is_some();
            return if nothing { Err("it does nothing") } else { Ok(()) };
        };
        if state.voters.remove(&from.node) != Some(Some(from)) {
            return Err("who goes does not vote");
        }
        if state.voters.len() < before.min(self.settings.voters()) {
            return Err("it leaves the shard with fewer replicas");
        }
        if let Some(used) = used.get_mut(&from.node) {
            *used = used.saturating_sub(state.shard.bytes);
        }
        match (state.leader == Some(from.node), change.hand_over) {
            (true, Some(to)) if !state.voters.contains_key(&to) => {
                Err("its new leader has no vote")
            }
            (true, Some(to)) if self.duty(to) != Duty::Serves => Err("its new leader may not lead"),
            (true, None) if state.voters.keys().any(|node| self.duty(*node) == Duty::Serves) => {
                Err("its leader goes without a next one")
            }
            (true, to) => {
                state.leader = to;
                Ok(())
            }
            (false, Some(_)) => Err("who goes does not lead"),
            (false, None) => Ok(()),
        }
    }

    fn transfer(&self, state: &mut State, transfer: Transfer) -> Result<(), &'static str> {
        if state.leader != Some(transfer.from) || transfer.from == transfer.to {
            return Err("who gives does not lead");
        }
        if !state.voters.contains_key(&transfer.to) {
            return Err("who takes does not vote");
        }
        if self.duty(transfer.to) != Duty::Serves {
            return Err("who takes may not lead");
        }
        state.leader = Some(transfer.to);
        Ok(())
    }

    /// What the plan says comes of it is what comes of it.
    fn wanted(&self, states: &BTreeMap<ShardId, State>) -> Result<(), Wrong> {
        if !self.plan.wanted.keys().eq(states.keys()) {
            return Err(Wrong::Sum { what: "list of shards" });
        }
        for (id, state) in states {
            let wrong = |why| Wrong::Shard { shard: *id, why };
            let Placed { voters, leader } = &self.plan.wanted[id];
            if !voters.iter().eq(state.voters.keys()) {
                return Err(wrong("its voters are not those that the steps lead to"));
            }
            let led = state.leader.is_none() || *leader == state.leader;
            if !led || leader.is_some_and(|leader| !state.voters.contains_key(&leader)) {
                return Err(wrong("its leader is not the one that the steps lead to"));
            }
        }
        Ok(())
    }

    fn sums(&self, states: &BTreeMap<ShardId, State>) -> Result<(), Wrong> {
        let (plan, settings) = (self.plan, self.settings);
        let (mut bytes, mut busy, mut copies) = (0_u64, Duration::ZERO, 0);
        for step in &plan.steps {
            let Step::Move(change) = step else { continue };
            let size = change.to.map_or(0, |_| states[&change.shard].shard.bytes);
            bytes = bytes.saturating_add(size);
            copies += usize::from(change.to.is_some());
            let seconds = size as f64 / settings.bytes_per_second.max(1) as f64;
            busy += settings.move_overhead + Duration::from_secs_f64(seconds);
        }
        if plan.bytes != bytes {
            return Err(Wrong::Sum { what: "number of bytes" });
        }
        let hands = settings.moves_at_a_time.max(1) as u32;
        let tolerance = Duration::from_millis(10);
        if plan.estimate + tolerance < busy / hands || plan.estimate > busy + tolerance {
            return Err(Wrong::Sum { what: "estimate of time" });
        }
        if plan.lower_bound + plan.for_bytes > copies {
            return Err(Wrong::Sum { what: "lower bound" });
        }
        let before = self.view.shards.iter().map(|shard| {
            (shard, shard.voters.iter().map(|seat| seat.node).collect::<Vec<_>>(), shard.leader)
        });
        let after = states.values().map(|state| {
            let leader = plan.wanted[&state.shard.id].leader;
            (state.shard, state.voters.keys().copied().collect::<Vec<_>>(), leader)
        });
        if self.spread(before) != plan.before || self.spread(after) != plan.after {
            return Err(Wrong::Sum { what: "spread" });
        }
        Ok(())
    }

    fn spread(
        &self,
        placed: impl Iterator<Item = (&'a ShardView, Vec<NodeId>, Option<NodeId>)>,
    ) -> Spread {
        let mut tables = [const { BTreeMap::<NodeId, u128>::new() }; 4];
        for (shard, voters, leader) in placed {
            for node in voters {
                *tables[0].entry(node).or_default() += 1;
                *tables[1].entry(node).or_default() += u128::from(shard.bytes);
            }
            if let Some(node) = leader {
                *tables[2].entry(node).or_default() += 1;
                *tables[3].entry(node).or_default() += u128::from(shard.load);
            }
        }
        let weight = |node: &NodeView| u128::from(node.weight.max(1));
        let serving: Vec<&NodeView> =
            self.view.nodes.iter().filter(|node| node.duty == Duty::Serves).collect();
        let weights: u128 = serving.iter().map(|node| weight(node)).sum();
        let [replicas, bytes, leaders, load] = tables.map(|table| {
            let all: u128 = table.values().sum();
            let of = |node: &&NodeView| {
                let had = table.get(&node.id).copied().unwrap_or(0);
                (had * weights * 1_000).checked_div(all * weight(node)).unwrap_or(1_000)
            };
            serving.iter().map(of).max().unwrap_or(1_000) as u64
        });
        Spread { replicas, bytes, leaders, load }
    }

    /// Every shard ends with as many replicas as can be, where they may be.
    fn ends(&self, states: &BTreeMap<ShardId, State>) -> Result<(), Wrong> {
        let full = self.plan.stalls.iter().any(|stall| matches!(stall, Stall::DisksFull { .. }));
        for (id, state) in states {
            let wrong = |why| Err(Wrong::Shard { shard: *id, why });
            let before = state.shard.voters.len();
            if self.quorum_lost(state.shard) {
                continue;
            }
            let count = |good: bool| {
                let good =
                    |node: NodeId| good == !matches!(self.duty(node), Duty::Leaves | Duty::Lost);
                state.voters.keys().filter(|node| good(**node)).count()
            };
            let (good, bad) = (count(true), count(false));
            let (wanted, _) = self.possible(state.shard);
            if good > self.settings.voters() {
                return wrong("it has more replicas than it should");
            }
            if good < wanted && !full {
                return wrong("it has fewer replicas than it could");
            }
            if bad > 0 && good + bad > self.settings.voters().min(before) {
                return wrong("it stands on a node that is to be empty");
            }
        }
        Ok(())
    }

    /// How many replicas a shard can have on nodes that may hold them, and how many of them are pinned.
    fn possible(&self, shard: &ShardView) -> (usize, usize) {
        let count = |duties: &[Duty]| {
            shard.voters.iter().filter(|seat| duties.contains(&self.duty(seat.node))).count()
        };
        let replicas = self.settings.voters();
        let spare = replicas.saturating_sub(count(&[Duty::Serves]));
        let pinned = count(&[Duty::Keeps, Duty::Absent]).min(spare);
        (replicas.min(pinned + self.may(shard).len()), pinned)
    }

    /// What is stalled is told, all of it and nothing else.
    fn told(&self, states: &BTreeMap<ShardId, State>) -> Result<(), Wrong> {
        let wrong = |what| Err(Wrong::Stalls { what });
        let alive = || states.values().filter(|state| !self.quorum_lost(state.shard));
        let few = |state: &&State| self.possible(state.shard).0 < self.settings.voters();
        let few = alive().filter(few).count();
        let (mut lost, mut told_few) = (BTreeSet::new(), 0);
        let mut holding: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut nobody = 0;
        for stall in &self.plan.stalls {
            match stall {
                Stall::QuorumLost { shard } => drop(lost.insert(*shard)),
                Stall::TooFewNodes { shards, .. } => told_few = *shards,
                Stall::NotEmptied { node, replicas } => drop(holding.insert(*node, *replicas)),
                Stall::NobodyLeads { shards } => nobody = *shards,
                // Who finds room depends on the way; that it is told is seen at the end of each shard.
                Stall::DisksFull { .. } => {}
            }
        }
        let dead = states.values().filter(|state| self.quorum_lost(state.shard));
        if !dead.map(|state| state.shard.id).eq(lost) {
            return wrong("shards without a quorum");
        }
        if few != told_few {
            return wrong("shards with too few nodes");
        }
        let voters = || states.values().flat_map(|state| state.voters.keys());
        for node in self.nodes.values().filter(|node| node.duty == Duty::Leaves) {
            let holds = voters().filter(|on| **on == node.id).count();
            if holding.remove(&node.id).unwrap_or(0) != holds {
                return wrong("nodes that are not emptied");
            }
        }
        let leads =
            |state: &&State| state.voters.keys().any(|node| self.duty(*node) == Duty::Serves);
        if !holding.is_empty() || nobody != alive().filter(|state| !leads(state)).count() {
            return wrong("shards that nobody can lead");
        }
        Ok(())
    }

    fn goal(&self) -> Goal {
        self.settings.goal
    }
}

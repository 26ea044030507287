//! Which voter of each shard leads.
//!
//! A leader stands on a node that serves, in a preferred zone where the shard has a voter there. Without
//! load to speak of, leaders are balanced by count, exactly and with the fewest transfers
//! ([`super::flow`]). With load they are balanced by load, and only while a node is further from its share
//! than the settings' slack: loads waver, and transfers for small gains would never end.
//! Owns the choice. Does not know about replicas that move: it is given who votes.

use std::collections::BTreeMap;

use coracle_proto::shard_map::{NodeId, ShardId};

use super::assignment::{Assignment, Item};
use super::flow::settle;
use super::model::{Duty, Goal, Settings, ShardView, Stall, View};
use super::replicas::{Nodes, quorum_lost};

/// A load of nothing counts as one such part of the mean load: idle shards are led somewhere too.
const IDLE_PART: u64 = 4;

/// Leaders of every shard that somebody can lead.
pub(super) struct Led {
    pub(super) leaders: BTreeMap<ShardId, NodeId>,
    pub(super) stalls: Vec<Stall>,
}

/// A shard, as far as leaders go.
struct Candidate {
    shard: ShardId,
    /// Nodes that may lead it, by place; as good by zone.
    may: Vec<usize>,
    /// Who leads now, when known; no matter where.
    now: Option<usize>,
    /// Its group cannot elect anybody, nor transfer.
    lost: bool,
    load: u64,
}

/// Chooses leaders for shards whose voters are given.
pub(super) fn choose(
    view: &View,
    voters: &BTreeMap<ShardId, Vec<NodeId>>,
    settings: &Settings,
) -> Led {
    let nodes = Nodes::of(view);
    let mut shards: Vec<&ShardView> = view.shards.iter().collect();
    shards.sort_by_key(|shard| shard.id);
    let candidates =
        shards.iter().map(|shard| candidate(shard, &voters[&shard.id], &nodes, settings));
    let candidates: Vec<Candidate> = candidates.collect();
    let load: u64 = candidates.iter().fold(0, |all, one| all.saturating_add(one.load));
    let chosen = match load > settings.load_gap.max(1) {
        true => Loads::new(&candidates, &nodes).balance(settings),
        false => by_count(&candidates, &nodes, settings.goal),
    };
    let mut led = Led { leaders: BTreeMap::new(), stalls: Vec::new() };
    for (candidate, leader) in candidates.iter().zip(chosen) {
        // Where nobody may lead, whoever leads goes on, if it still votes.
        let stays =
            candidate.now.filter(|now| voters[&candidate.shard].contains(&nodes.views[*now].id));
        if let Some(leader) = leader.or(stays) {
            led.leaders.insert(candidate.shard, nodes.views[leader].id);
        }
    }
    let nobody =
        candidates.iter().filter(|candidate| candidate.may.is_empty() && !candidate.lost).count();
    if nobody > 0 {
        led.stalls.push(Stall::NobodyLeads { shards: nobody });
    }
    led
}

/// Who leads a shard and can hand it over: not somebody who does not answer.
pub(super) fn known_leader(shard: &ShardView, nodes: &Nodes) -> Option<NodeId> {
    let leader = shard.leader.filter(|leader| shard.voters.iter().any(|seat| seat.node == *leader));
    leader.filter(|leader| !matches!(nodes.duty(*leader), Duty::Absent | Duty::Lost))
}

fn candidate(
    shard: &ShardView,
    voters: &[NodeId],
    nodes: &Nodes,
    settings: &Settings,
) -> Candidate {
    let lost = quorum_lost(shard, nodes);
    let serving = voters.iter().filter(|node| nodes.duty(**node) == Duty::Serves && !lost);
    let mut may: Vec<usize> = serving.filter_map(|node| nodes.place(*node)).collect();
    may.sort_unstable();
    let preferred = |place: &usize| settings.leader_zones.contains(&nodes.views[*place].zone);
    if may.iter().any(preferred) {
        may.retain(preferred);
    }
    let now = known_leader(shard, nodes).and_then(|leader| nodes.place(leader));
    Candidate { shard: shard.id, may, now, lost, load: shard.load }
}

fn by_count(candidates: &[Candidate], nodes: &Nodes, goal: Goal) -> Vec<Option<usize>> {
    let item = |candidate: &Candidate| Item {
        want: usize::from(!candidate.may.is_empty()),
        // Where nobody knows who leads, any is as good: there is nothing to transfer.
        home: match candidate.now {
            Some(now) => candidate.may.iter().copied().filter(|node| *node == now).collect(),
            None => candidate.may.clone(),
        },
        pinned: Vec::new(),
        may: (0..nodes.views.len()).map(|node| candidate.may.contains(&node)).collect(),
        bytes: 0,
        load: 0,
        on: Vec::new(),
    };
    let items = candidates.iter().map(item).collect();
    let mut assignment = Assignment::new(nodes.assignable(), items, goal, false);
    settle(&mut assignment);
    assignment.items.iter().map(|item| item.on.first().copied()).collect()
}

/// Leaders by load. Every shard counts as its load and a part of the mean, in units of a
/// [`IDLE_PART`]th.
struct Loads<'a> {
    candidates: &'a [Candidate],
    sizes: Vec<i128>,
    weights: Vec<i128>,
    /// Whether each node takes part.
    open: Vec<bool>,
    on: Vec<Option<usize>>,
    load: Vec<i128>,
}

/// Who leads which shard afterwards, and how the sum of load² ÷ weight changes.
struct Change {
    gain: i128,
    to: Vec<(usize, usize)>,
}

impl<'a> Loads<'a> {
    fn new(candidates: &'a [Candidate], nodes: &Nodes) -> Loads<'a> {
        let all: u128 = candidates.iter().map(|candidate| u128::from(candidate.load)).sum();
        let mean = (all / candidates.len().max(1) as u128) as i128 + 1;
        let size =
            |candidate: &Candidate| i128::from(candidate.load) * i128::from(IDLE_PART) + mean;
        let mut loads = Loads {
            candidates,
            sizes: candidates.iter().map(size).collect(),
            weights: nodes.views.iter().map(|node| i128::from(node.weight.max(1))).collect(),
            open: nodes.views.iter().map(|node| node.duty == Duty::Serves).collect(),
            on: candidates.iter().map(|one| one.now.filter(|now| one.may.contains(now))).collect(),
            load: vec![0; nodes.views.len()],
        };
        for (shard, node) in loads.led().collect::<Vec<_>>() {
            loads.load[node] += loads.sizes[shard];
        }
        // Those that must be handed over. Where nobody knows who leads there is nothing to transfer: it
        // is not balanced by, or the same question would have another answer tomorrow.
        loads.give(|candidate| candidate.now.is_some());
        loads
    }

    /// Gives shards without a leader one, the largest first, each to whom it leaves the least busy.
    fn give(&mut self, which: impl Fn(&Candidate) -> bool) {
        let mut free: Vec<usize> = (0..self.candidates.len()).collect();
        free.retain(|shard| self.on[*shard].is_none() && which(&self.candidates[*shard]));
        free.sort_by_key(|shard| (std::cmp::Reverse(self.sizes[*shard]), *shard));
        for shard in free {
            let size = self.sizes[shard];
            let busy = |node: &usize| (self.busy(*node, self.load[*node] + size), *node);
            let least = self.candidates[shard].may.iter().copied().min_by_key(busy);
            least.into_iter().for_each(|node| self.lead(shard, node));
        }
    }

    /// Load beside weight, as a number that can be compared.
    fn busy(&self, node: usize, load: i128) -> i128 {
        (load << 16) / self.weights[node]
    }

    fn balance(mut self, settings: &Settings) -> Vec<Option<usize>> {
        if settings.goal == Goal::Balance {
            let shares = self.shares();
            self.improve(&shares, settings);
            // What small steps do not reach, dealing anew may. Only if it is better: then the end is one
            // from which neither leads on, and tomorrow's answer to the same question is nothing to do.
            while !self.beyond(&shares, settings).is_empty() {
                let mut other = self.dealt(&shares, settings);
                other.improve(&shares, settings);
                if other.unevenness() >= self.unevenness() {
                    break;
                }
                self = other;
            }
        }
        self.give(|_| true);
        self.on
    }

    /// Nodes too far from their share, the busiest first.
    fn beyond(&self, shares: &[i128], settings: &Settings) -> Vec<usize> {
        let away = |node: &usize| self.load[*node] - shares[*node];
        let open = (0..self.open.len()).filter(|node| self.open[*node]);
        let beyond = open.filter(|node| {
            let slack = shares[*node] * i128::from(settings.load_slack) / 1_000;
            let gap = i128::from(settings.load_gap) * i128::from(IDLE_PART);
            away(node).abs() > slack.max(gap)
        });
        let mut beyond: Vec<usize> = beyond.collect();
        beyond.sort_by_key(|node| (std::cmp::Reverse(self.busy(*node, away(node))), *node));
        beyond
    }

    fn improve(&mut self, shares: &[i128], settings: &Settings) {
        loop {
            let beyond = self.beyond(shares, settings);
            let Some(change) = beyond.into_iter().find_map(|node| self.best(node, shares)) else {
                return;
            };
            change.to.into_iter().for_each(|(shard, node)| self.lead(shard, node));
        }
    }

    fn lead(&mut self, shard: usize, node: usize) {
        if let Some(from) = self.on[shard].replace(node) {
            self.load[from] -= self.sizes[shard];
        }
        self.load[node] += self.sizes[shard];
    }

    /// The same shards dealt anew, the largest first; who leads now goes on while it has not too much.
    fn dealt(&self, shares: &[i128], settings: &Settings) -> Loads<'a> {
        let mut dealt = Loads {
            candidates: self.candidates,
            sizes: self.sizes.clone(),
            weights: self.weights.clone(),
            open: self.open.clone(),
            on: vec![None; self.on.len()],
            load: vec![0; self.load.len()],
        };
        let mut order: Vec<(usize, usize)> = self.led().collect();
        order.sort_by_key(|(shard, _)| (std::cmp::Reverse(self.sizes[*shard]), *shard));
        for (shard, now) in order {
            let slack = shares[now] * i128::from(settings.load_slack) / 2_000;
            let size = self.sizes[shard];
            let stays = dealt.load[now] + size <= shares[now] + slack;
            let busy = |node: &usize| (dealt.busy(*node, dealt.load[*node] + size), *node);
            let least = self.candidates[shard].may.iter().copied().min_by_key(busy);
            dealt.lead(shard, if stays { now } else { least.unwrap_or(now) });
        }
        dealt
    }

    fn unevenness(&self) -> i128 {
        let node = |(load, weight): (&i128, &i128)| load * load / weight;
        self.load.iter().zip(&self.weights).map(node).sum()
    }

    fn shares(&self) -> Vec<i128> {
        let all: i128 = self.load.iter().sum();
        let open = || (0..self.open.len()).filter(|node| self.open[*node]);
        let weights: i128 = open().map(|node| self.weights[node]).sum::<i128>().max(1);
        self.weights.iter().map(|weight| all * weight / weights).collect()
    }

    /// The transfer, alone or with one that makes room for it where it goes, that brings a node nearest
    /// to its share. One alone often leads nowhere: each shard has few who may lead it.
    fn best(&self, node: usize, shares: &[i128]) -> Option<Change> {
        let over = self.load[node] > shares[node];
        let mut best: Option<Change> = None;
        let mut consider = |to: &[(usize, usize)]| {
            let gain = self.gain(to);
            if gain < best.as_ref().map_or(0, |best| best.gain) {
                best = Some(Change { gain, to: to.to_vec() });
            }
        };
        let mut by_leader: Vec<Vec<usize>> = vec![Vec::new(); self.load.len()];
        self.led().for_each(|(shard, on)| by_leader[on].push(shard));
        for (shard, from) in self.led() {
            let goes = self.candidates[shard].may.iter().copied().filter(|to| *to != from);
            for to in goes.filter(|to| if over { from == node } else { *to == node }) {
                consider(&[(shard, to)]);
                if over {
                    // Something that is led there goes on.
                    for next in &by_leader[to] {
                        let may = self.candidates[*next].may.iter();
                        let goes_on = may.filter(|goes_on| **goes_on != to);
                        goes_on.for_each(|goes_on| consider(&[(shard, to), (*next, *goes_on)]));
                    }
                } else {
                    // Whoever gives gets something itself.
                    let gets = self.candidates.iter().zip(&self.on).enumerate();
                    let gets = gets.filter(|(next, (candidate, on))| {
                        let leads = on.is_some_and(|on| on != from);
                        *next != shard && leads && candidate.may.contains(&from)
                    });
                    gets.for_each(|(next, _)| consider(&[(shard, to), (next, from)]));
                }
            }
        }
        best
    }

    fn led(&self) -> impl Iterator<Item = (usize, usize)> {
        self.on.iter().enumerate().filter_map(|(shard, on)| Some((shard, (*on)?)))
    }

    /// How the sum of load² ÷ weight changes.
    fn gain(&self, to: &[(usize, usize)]) -> i128 {
        let mut after: Vec<(usize, i128)> = Vec::with_capacity(2 * to.len());
        let mut change = |node: usize, by: i128| match after.iter_mut().find(|one| one.0 == node) {
            Some(one) => one.1 += by,
            None => after.push((node, by)),
        };
        for (shard, to) in to {
            self.on[*shard].into_iter().for_each(|from| change(from, -self.sizes[*shard]));
            change(*to, self.sizes[*shard]);
        }
        let cost = |node: usize, load: i128| load * load / self.weights[node];
        after
            .into_iter()
            .map(|(node, by)| cost(node, self.load[node] + by) - cost(node, self.load[node]))
            .sum()
    }
}

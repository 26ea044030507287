//! Small clusters, all of them: no placement that any search finds is better.

use std::collections::BTreeMap;

use super::super::model::{Goal, Plan};
use super::worlds::{node, shard, view};
use super::*;

/// How bad a placement is, in parts; the first that differs decides.
type Score = [u64; 5];

/// What the weights in these tests divide.
const MULTIPLE: u64 = 6_000;

/// The one objective, by which placements are compared here.
struct Judge<'a> {
    view: &'a View,
    settings: &'a Settings,
    /// The nodes that serve.
    serving: Vec<&'a NodeView>,
}

impl<'a> Judge<'a> {
    fn new(view: &'a View, settings: &'a Settings) -> Judge<'a> {
        let serving = view.nodes.iter().filter(|node| node.duty == Duty::Serves).collect();
        Judge { view, settings, serving }
    }

    /// Of one shard: replicas that it lacks, pairs in one zone, copies.
    fn shard(&self, shard: &ShardView, voters: &[NodeId]) -> [u64; 3] {
        let zone = |id: &NodeId| self.serving.iter().find(|node| node.id == *id).map(|n| &n.zone);
        let good: Vec<NodeId> = voters.iter().copied().filter(|id| zone(id).is_some()).collect();
        let same = |at: usize| good[..at].iter().filter(|id| zone(id) == zone(&good[at])).count();
        let zones: usize = (0..good.len()).map(same).sum();
        let new =
            good.iter().filter(|id| shard.voters.iter().all(|seat| seat.node != **id)).count();
        [(self.settings.replicas.saturating_sub(good.len())) as u64, zones as u64, new as u64]
    }

    /// Of counts per serving node: how many are outside of rounded shares; the sum of count² ÷ weight,
    /// times a multiple of all weights.
    fn balance(&self, counts: &[u64]) -> [u64; 2] {
        let weights: u64 = self.serving.iter().map(|node| u64::from(node.weight)).sum();
        let all: u64 = counts.iter().sum();
        let mut balance = [0, 0];
        for (node, count) in self.serving.iter().zip(counts) {
            let share = all * u64::from(node.weight);
            balance[0] += (share / weights).saturating_sub(*count);
            balance[0] += count.saturating_sub(share.div_ceil(weights));
            balance[1] += count * count * (MULTIPLE / u64::from(node.weight));
        }
        balance
    }

    fn put(&self, [lacking, zones, moves]: [u64; 3], [outside, squares]: [u64; 2]) -> Score {
        match self.settings.goal {
            Goal::Balance => [lacking, zones, outside, squares, moves],
            Goal::Repair => [lacking, moves, zones, outside, squares],
        }
    }

    fn count(&self, counts: &mut [u64], voters: &[NodeId]) {
        for (node, count) in self.serving.iter().zip(counts) {
            *count += u64::from(voters.contains(&node.id));
        }
    }

    fn plan(&self, plan: &Plan) -> Score {
        let (mut sum, mut counts) = ([0; 3], vec![0; self.serving.len()]);
        for shard in &self.view.shards {
            let voters = &plan.wanted[&shard.id].voters;
            sum = add(sum, self.shard(shard, voters));
            self.count(&mut counts, voters);
        }
        self.put(sum, self.balance(&counts))
    }

    /// The best score of any placement at all.
    fn least(&self) -> Score {
        let serving: Vec<NodeId> = self.serving.iter().map(|node| node.id).collect();
        let options = subsets(&serving, self.settings.replicas.min(serving.len()));
        let of = |shard: &ShardView| {
            options.iter().map(|voters| self.shard(shard, voters)).collect::<Vec<_>>()
        };
        let costs: Vec<Vec<[u64; 3]>> = self.view.shards.iter().map(of).collect();
        let mut known: BTreeMap<Vec<u64>, [u64; 2]> = BTreeMap::new();
        let mut best = [u64::MAX; 5];
        let mut placed = vec![0_usize; self.view.shards.len()];
        loop {
            let (mut sum, mut counts) = ([0; 3], vec![0; serving.len()]);
            for (at, option) in placed.iter().enumerate() {
                sum = add(sum, costs[at][*option]);
                self.count(&mut counts, &options[*option]);
            }
            let balance = match known.get(&counts) {
                Some(balance) => *balance,
                None => *known.entry(counts.clone()).or_insert(self.balance(&counts)),
            };
            best = best.min(self.put(sum, balance));
            if !next(&mut placed, options.len()) {
                return best;
            }
        }
    }

    /// Of leaders, chosen among the voters that a plan wants: outside, squares, transfers; by goal.
    fn leaders(&self, leaders: &[Option<NodeId>]) -> [u64; 3] {
        let mut counts = vec![0; self.serving.len()];
        leaders.iter().flatten().for_each(|leader| self.count(&mut counts, &[*leader]));
        let [outside, squares] = self.balance(&counts);
        let kept = self.view.shards.iter().zip(leaders).filter(|(shard, on)| shard.leader == **on);
        let transfers = (leaders.len() - kept.count()) as u64;
        match self.settings.goal {
            Goal::Balance => [outside, squares, transfers],
            Goal::Repair => [transfers, outside, squares],
        }
    }

    fn least_leaders(&self, plan: &Plan) -> [u64; 3] {
        let serves = |id: &&NodeId| self.serving.iter().any(|node| node.id == **id);
        let options = |shard: &ShardView| -> Vec<Option<NodeId>> {
            let voters = plan.wanted[&shard.id].voters.iter().filter(serves);
            let options: Vec<Option<NodeId>> = voters.copied().map(Some).collect();
            // Where nobody may lead, whoever leads goes on.
            if options.is_empty() { vec![shard.leader] } else { options }
        };
        let options: Vec<Vec<Option<NodeId>>> = self.view.shards.iter().map(options).collect();
        let most = options.iter().map(Vec::len).max().unwrap_or(1);
        let mut chosen = vec![0_usize; options.len()];
        let mut best = [u64::MAX; 3];
        loop {
            let leaders =
                options.iter().zip(&chosen).map(|(options, at)| options.get(*at).copied());
            if let Some(leaders) = leaders.collect::<Option<Vec<_>>>() {
                best = best.min(self.leaders(&leaders));
            }
            if !next(&mut chosen, most) {
                return best;
            }
        }
    }
}

fn add(a: [u64; 3], b: [u64; 3]) -> [u64; 3] {
    std::array::from_fn(|at| a[at] + b[at])
}

/// Counts on, each digit below `base`; false after the last.
fn next(digits: &mut [usize], base: usize) -> bool {
    let Some(at) = digits.iter().position(|digit| digit + 1 < base) else { return false };
    digits[at] += 1;
    digits[..at].fill(0);
    true
}

/// The score of where a plan leads; `None` where weights are odd, or shards keep more than they should.
pub(super) fn score(view: &View, settings: &Settings, plan: &Plan) -> Option<Score> {
    let odd = |node: &NodeView| {
        node.duty == Duty::Serves
            && (node.weight == 0 || !MULTIPLE.is_multiple_of(u64::from(node.weight)))
    };
    (!view.nodes.iter().any(odd)).then(|| Judge::new(view, settings).plan(plan))
}

/// Whether what a plan leads to is at least as good as what was, moves aside.
pub(super) fn is_no_worse(view: &View, settings: &Settings, plan: &Plan) -> bool {
    let mut still = plan.clone();
    for shard in &view.shards {
        let placed = still.wanted.get_mut(&shard.id).expect("a plan names every shard");
        placed.voters = shard.voters.iter().map(|seat| seat.node).collect();
    }
    let places = |plan: &Plan| score(view, settings, plan).map(|score| score[..4].to_vec());
    // Between different numbers of replicas shares differ; of pinned ones only a plan knows.
    let surplus = view.shards.iter().any(|shard| shard.voters.len() > settings.replicas);
    let pinned = |node: &NodeView| matches!(node.duty, Duty::Keeps | Duty::Absent);
    let other = settings.goal == Goal::Repair || surplus || view.nodes.iter().any(pinned);
    other || places(plan) <= places(&still)
}

/// All subsets of so many of the nodes.
fn subsets(nodes: &[NodeId], size: usize) -> Vec<Vec<NodeId>> {
    let all = (0..1_u32 << nodes.len()).filter(|set| set.count_ones() as usize == size);
    let pick = |set: u32| {
        let picked = nodes.iter().enumerate().filter(move |(at, _)| set >> at & 1 == 1);
        picked.map(|(_, node)| *node).collect()
    };
    all.map(pick).collect()
}

/// Every list of so many out of the options, in rising order: all there are but for their order.
fn lists<T: Clone>(options: &[T], length: usize) -> Vec<Vec<T>> {
    if length == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (at, first) in options.iter().enumerate() {
        for mut rest in lists(&options[at..], length - 1) {
            rest.insert(0, first.clone());
            all.push(rest);
        }
    }
    all
}

/// What a node can be: ordinary, twice as large, or to be emptied.
const KINDS: [(Duty, u16); 3] =
    [(Duty::Serves, WEIGHT_ONE), (Duty::Serves, 2 * WEIGHT_ONE), (Duty::Leaves, WEIGHT_ONE)];

/// All lists of nodes, up to the names of nodes and zones.
fn clusters(count: usize) -> Vec<Vec<NodeView>> {
    let kinds: Vec<(usize, usize)> =
        (0..count).flat_map(|zone| (0..KINDS.len()).map(move |kind| (zone, kind))).collect();
    let canonical = |nodes: &Vec<(usize, usize)>| {
        let zone = |zone: usize| -> Vec<usize> {
            nodes.iter().filter(|node| node.0 == zone).map(|node| node.1).collect()
        };
        let zones: Vec<Vec<usize>> = (0..count).map(zone).collect();
        zones.is_sorted_by(|a, b| a >= b)
    };
    let made = |nodes: Vec<(usize, usize)>| {
        let node = |((zone, kind), id): ((usize, usize), u64)| {
            let (duty, weight) = KINDS[kind];
            NodeView { duty, weight, ..node(id, &format!("z{zone}")) }
        };
        nodes.into_iter().zip(1..).map(node).collect()
    };
    lists(&kinds, count).into_iter().filter(canonical).map(made).collect()
}

/// All lists of shards on so many nodes, up to their order: each has what it should, or, where there are
/// few, up to that.
fn placements(nodes: usize, shards: usize, replicas: usize) -> Vec<Vec<Vec<NodeId>>> {
    let ids: Vec<NodeId> = (1..=nodes as u64).map(NodeId).collect();
    let full = replicas.min(nodes);
    let least = if shards <= 2 { 1 } else { full };
    let options: Vec<Vec<NodeId>> = (least..=full).flat_map(|size| subsets(&ids, size)).collect();
    lists(&options, shards)
}

fn compare(nodes: usize) -> usize {
    let mut compared = 0;
    for (replicas, shards) in (1..=nodes.min(3)).flat_map(|r| (1..=4).map(move |s| (r, s))) {
        let placements = placements(nodes, shards, replicas);
        for nodes in clusters(nodes) {
            for placement in &placements {
                let shards = placement.iter().zip(1..).map(|(voters, id)| {
                    shard(id, &voters.iter().map(|node| node.0).collect::<Vec<u64>>())
                });
                let view = view(nodes.clone(), shards.collect());
                for goal in [Goal::Balance, Goal::Repair] {
                    let settings = Settings { replicas, goal, ..Settings::default() };
                    let judge = Judge::new(&view, &settings);
                    let made = plan(&view, &settings);
                    if !judge.serving.is_empty() {
                        assert_eq!(judge.plan(&made), judge.least(), "{view:?} {made:?}");
                    }
                    let leaders: Vec<Option<NodeId>> =
                        view.shards.iter().map(|shard| made.wanted[&shard.id].leader).collect();
                    let (leaders, least) = (judge.leaders(&leaders), judge.least_leaders(&made));
                    assert!(judge.serving.is_empty() || leaders == least, "{view:?} {made:?}");
                    compared += 1;
                }
            }
        }
    }
    compared
}

#[test]
fn up_to_three_nodes_and_four_shards_nothing_is_better() {
    assert!((1..=3).map(compare).sum::<usize>() > 5_000);
}

#[test]
fn with_four_nodes_and_up_to_four_shards_nothing_is_better() {
    assert!(compare(4) > 50_000);
}

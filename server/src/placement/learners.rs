//! Where read replicas stand: a pure function of nodes, shards and settings.
//!
//! Owns the choice only: which learners stay, which go, and where new ones come. What stands stays
//! wherever a setting wants it; new ones go where the fewest are. Does not know how one is made.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use coracle_proto::shard_map::{NodeId, ReadReplicas, ReplicaId, ShardId};

/// Moves of new learners from one choice to a better one, of a plan: each makes the fullest node less
/// full, so that they end by themselves; bounded because a plan is made while requests wait.
const IMPROVEMENTS_MAX: usize = 4_096;

/// A node that holds, or may hold, read replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub node: NodeId,
    /// Its failure domain.
    pub zone: String,
    /// Whether new ones may come. Those that are there stay.
    pub takes: bool,
}

/// A shard, as far as read replicas go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Its id.
    pub shard: ShardId,
    /// The nodes that vote.
    pub voters: Vec<NodeId>,
    /// Its read replicas.
    pub learners: Vec<(ReplicaId, NodeId)>,
    /// Nodes where no new ones come for now.
    pub avoided: Vec<NodeId>,
}

/// What is to be done so that every setting holds, as far as nodes allow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LearnerPlan {
    /// New ones. The node may still hold one that goes: it must be gone first.
    pub add: Vec<(ShardId, NodeId)>,
    /// Those that no setting wants.
    pub remove: Vec<(ShardId, ReplicaId, NodeId)>,
    /// Settings that cannot be met.
    pub short: Vec<Short>,
}

/// A setting that cannot be met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Short {
    /// The setting.
    pub rule: ReadReplicas,
    /// Shards that get fewer.
    pub shards: usize,
    /// Whether any node is in the zone.
    pub zone_exists: bool,
}

/// A new learner, and where it may stand.
struct Item {
    shard: ShardId,
    allowed: Vec<NodeId>,
    /// Index of the setting that asks for it.
    rule: usize,
    on: Option<NodeId>,
}

/// Plans. The same input gives the same plan, and a plan that was carried out gives an empty one.
pub fn plan(holders: &[Holder], shards: &[Placed], rules: &[ReadReplicas]) -> LearnerPlan {
    let zones: BTreeMap<NodeId, &str> = holders.iter().map(|h| (h.node, h.zone.as_str())).collect();
    // Zones first: what they leave over may serve the setting that names none.
    let mut rules: Vec<&ReadReplicas> = rules.iter().filter(|rule| rule.learners > 0).collect();
    rules.sort_by(|a, b| (a.zone.is_empty(), &a.zone).cmp(&(b.zone.is_empty(), &b.zone)));
    let mut plan = LearnerPlan::default();
    let mut load: BTreeMap<NodeId, u64> = holders.iter().map(|h| (h.node, 0)).collect();
    let mut items = Vec::new();
    for placed in shards {
        let (kept, missing) = keep(placed, &zones, &rules);
        for (replica, node) in &placed.learners {
            match kept.contains(replica) {
                true => *load.entry(*node).or_default() += 1,
                false => plan.remove.push((placed.shard, *replica, *node)),
            }
        }
        let held = placed.learners.iter().filter(|(replica, _)| kept.contains(replica));
        let held: BTreeSet<NodeId> =
            held.map(|(_, node)| *node).chain(placed.voters.iter().copied()).collect();
        for (at, count) in missing {
            let allowed = holders.iter().filter(|holder| {
                let zone = &rules[at].zone;
                holder.takes
                    && (zone.is_empty() || *zone == holder.zone)
                    && !held.contains(&holder.node)
                    && !placed.avoided.contains(&holder.node)
            });
            let allowed: Vec<NodeId> = allowed.map(|holder| holder.node).collect();
            for _ in 0..count {
                let (shard, allowed) = (placed.shard, allowed.clone());
                items.push(Item { shard, allowed, rule: at, on: None });
            }
        }
    }
    spread(&mut items, &mut load);
    let mut lacking: BTreeMap<usize, BTreeSet<ShardId>> = BTreeMap::new();
    for item in &items {
        match item.on {
            Some(node) => plan.add.push((item.shard, node)),
            None => drop(lacking.entry(item.rule).or_default().insert(item.shard)),
        }
    }
    plan.add.sort_unstable();
    plan.short = lacking
        .into_iter()
        .map(|(at, shards)| Short {
            rule: rules[at].clone(),
            shards: shards.len(),
            zone_exists: holders
                .iter()
                .any(|h| rules[at].zone.is_empty() || h.zone == rules[at].zone),
        })
        .collect();
    plan
}

/// Which learners of a shard stay, and how many each setting lacks.
fn keep(
    placed: &Placed,
    zones: &BTreeMap<NodeId, &str>,
    rules: &[&ReadReplicas],
) -> (BTreeSet<ReplicaId>, Vec<(usize, u32)>) {
    let mut kept = BTreeSet::new();
    let mut missing = Vec::new();
    // The oldest first: the newest are those that may not have caught up.
    let learners: BTreeMap<ReplicaId, NodeId> = placed.learners.iter().copied().collect();
    for (at, rule) in rules.iter().enumerate() {
        let mut wanted = rule.learners;
        for (replica, node) in &learners {
            let there = zones.get(node);
            let fits = there.is_some_and(|zone| rule.zone.is_empty() || *zone == rule.zone);
            // One that votes here by now is no learner's place.
            let free = !kept.contains(replica) && !placed.voters.contains(node);
            if wanted > 0 && fits && free {
                kept.insert(*replica);
                wanted -= 1;
            }
        }
        if wanted > 0 {
            missing.push((at, wanted));
        }
    }
    (kept, missing)
}

/// Gives every item a node that it may stand on, no node two of one shard, and as even as can be.
fn spread(items: &mut [Item], load: &mut BTreeMap<NodeId, u64>) {
    // Whoever has the least choice chooses first.
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|at| (items[*at].allowed.len(), items[*at].shard, items[*at].rule));
    let mut taken: BTreeSet<(ShardId, NodeId)> = BTreeSet::new();
    for at in order {
        let item = &mut items[at];
        let free = item.allowed.iter().filter(|node| !taken.contains(&(item.shard, **node)));
        let Some(node) = free.min_by_key(|node| (load[*node], **node)).copied() else {
            continue;
        };
        item.on = Some(node);
        taken.insert((item.shard, node));
        *load.entry(node).or_default() += 1;
    }
    for _ in 0..IMPROVEMENTS_MAX {
        if !improve(items, &mut taken, load) {
            return;
        }
    }
}

/// Makes a node less full, along a chain of moves: each item goes to another node that it may stand on,
/// whose item goes on. False when none can be.
fn improve(
    items: &mut [Item],
    taken: &mut BTreeSet<(ShardId, NodeId)>,
    load: &mut BTreeMap<NodeId, u64>,
) -> bool {
    let mut sources: Vec<(u64, NodeId)> = load.iter().map(|(node, load)| (*load, *node)).collect();
    sources.sort_unstable_by(|a, b| b.cmp(a));
    let least = sources.last().map_or(0, |(load, _)| *load);
    let mut on: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
    for (at, item) in items.iter().enumerate() {
        if let Some(node) = item.on {
            on.entry(node).or_default().push(at);
        }
    }
    for (full, source) in sources {
        if full < least + 2 {
            return false;
        }
        // How each node was reached: which item would come to it, and from where.
        let mut reached: BTreeMap<NodeId, Option<(usize, NodeId)>> =
            BTreeMap::from([(source, None)]);
        let mut queue = VecDeque::from([source]);
        while let Some(from) = queue.pop_front() {
            if load[&from] + 2 <= full {
                let mut node = from;
                while let Some((at, before)) = reached[&node] {
                    items[at].on = Some(node);
                    taken.remove(&(items[at].shard, before));
                    taken.insert((items[at].shard, node));
                    node = before;
                }
                *load.entry(from).or_default() += 1;
                *load.entry(source).or_default() -= 1;
                return true;
            }
            for at in on.get(&from).into_iter().flatten() {
                let item = &items[*at];
                for to in &item.allowed {
                    if !reached.contains_key(to) && !taken.contains(&(item.shard, *to)) {
                        reached.insert(*to, Some((*at, from)));
                        queue.push_back(*to);
                    }
                }
            }
        }
    }
    false
}

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ReadReplicas { zone, learners } = &self.rule;
        let place = if zone.is_empty() { "any zone".to_owned() } else { format!("zone {zone}") };
        let shards = match self.shards {
            1 => "1 shard gets".to_owned(),
            many => format!("{many} shards get"),
        };
        write!(f, "{place}: {shards} fewer than {learners} read replicas")?;
        match self.zone_exists {
            true => {
                write!(f, ": the nodes there hold the shard already, or do not answer. Add nodes")
            }
            false => write!(f, ": no node is there"),
        }
    }
}

#[cfg(test)]
mod tests;

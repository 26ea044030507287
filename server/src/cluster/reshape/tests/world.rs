//! The records and the groups behind them: groups that heed an order as raft does, by epoch and merge, or not
//! at all. Owns no test.

use std::collections::{BTreeMap, BTreeSet};

use coracle_proto::shard_map::ShardMap;
use coracle_proto::{peer, v1};
use peer::ReshapeStep;
use v1::ReplicaRole;

use crate::cluster::operations::advance;
use crate::cluster::points::Point;
use crate::cluster::reshape::*;
use crate::records::operations::has_ended;
use crate::records::{Operations, Snapshot};

pub(super) const L: u64 = 1;
pub(super) const R: u64 = 2;
pub(super) const HALF: u64 = 1 << 63;

/// What a group is, the same on all its replicas.
#[derive(Debug, Clone, Default)]
pub(super) struct Group {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) epoch: u64,
    pub(super) merging: u64,
    pub(super) frozen_for: u64,
    pub(super) absorbed: u64,
    pub(super) replicas: Vec<v1::Replica>,
    pub(super) bytes: u64,
    /// The node that leads; 0 means that of the first replica.
    pub(super) led_by: u64,
    /// Replicas that do not follow.
    pub(super) behind: BTreeSet<u64>,
    /// Replicas that their nodes have lost.
    pub(super) broken: BTreeSet<u64>,
    /// Replicas that hold keys outside the arc.
    pub(super) untidy: BTreeSet<u64>,
    /// Replicas that have applied less than the others, and how much less.
    pub(super) lag: BTreeMap<u64, u64>,
}

impl Group {
    pub(super) fn leader(&self) -> u64 {
        let first = self.replicas.first().map_or(0, |replica| replica.node);
        if self.led_by == 0 { first } else { self.led_by }
    }

    /// The replica on a node.
    pub(super) fn on(&self, node: u64) -> u64 {
        let mut on = self.replicas.iter().filter(|replica| replica.node == node);
        on.next().expect("it has one there").id
    }

    /// What all of its replicas agree upon.
    pub(super) fn state(&self) -> (u64, u64, [u64; 4]) {
        (self.start, self.end, [self.epoch, self.merging, self.frozen_for, self.absorbed])
    }
}

/// The records, and the groups behind them.
pub(super) struct World {
    pub(super) snapshot: Snapshot,
    pub(super) groups: BTreeMap<u64, Group>,
    pub(super) now_ms: u64,
    pub(super) silent: BTreeSet<u64>,
    pub(super) lost: BTreeSet<u64>,
    /// Orders that were lost on the way, and may still arrive.
    pub(super) late: Vec<peer::Reshape>,
    /// Every this many orders are done and their answers lost, or lost.
    pub(super) trouble: usize,
    pub(super) orders: usize,
    pub(super) taken: BTreeSet<String>,
    /// The points that work came by.
    pub(super) points: BTreeSet<Point>,
    pub(super) refused_by: Option<u64>,
}

pub(super) fn replica(id: u64, node: u64, role: ReplicaRole) -> v1::Replica {
    v1::Replica { id, node, role: role.into(), ..Default::default() }
}

pub(super) fn world() -> World {
    let shard = |id: u64, start: u64, end: u64, nodes: [u64; 3]| v1::Shard {
        id,
        start,
        end,
        epoch: 5,
        replicas: nodes.map(|node| replica(id * 10 + node, node, ReplicaRole::Voter)).to_vec(),
        ..Default::default()
    };
    let node = |id: u64| v1::Node {
        id,
        address: format!("n{id}"),
        state: v1::NodeState::Active.into(),
        ..Default::default()
    };
    let map = v1::ShardMap {
        cluster_id: "c".to_owned(),
        epoch: 1,
        shards: vec![
            shard(0, 0, 0, [1, 2, 3]),
            shard(L, 0, HALF, [1, 2, 3]),
            shard(R, HALF, 0, [2, 3, 4]),
        ],
        nodes: (1..=5).map(node).collect(),
        ..Default::default()
    };
    let ids = peer::IdCounters { next_replica: 100, next_shard: 3, ..Default::default() };
    let (leaving, operations) = (Vec::new(), Operations::default());
    let mut world = World {
        snapshot: Snapshot { map, ids, leaving, operations, version: 1 },
        groups: BTreeMap::new(),
        now_ms: 1_000,
        silent: BTreeSet::new(),
        lost: BTreeSet::new(),
        late: Vec::new(),
        trouble: 0,
        orders: 0,
        taken: BTreeSet::new(),
        points: BTreeSet::new(),
        refused_by: None,
    };
    for shard in &world.snapshot.map.shards {
        let v1::Shard { start, end, epoch, .. } = *shard;
        let replicas = shard.replicas.clone();
        world.groups.insert(shard.id, Group { start, end, epoch, replicas, ..Group::default() });
    }
    world
}

impl World {
    pub(super) fn split(&mut self) -> u64 {
        let work = SplitWork { shard: L, at: HALF / 2, ..SplitWork::default() };
        begin_split(&mut self.snapshot, work, self.now_ms).expect("nothing stands against it")
    }

    pub(super) fn merge(&mut self) -> u64 {
        begin_merge(&mut self.snapshot, (L, R), 0, self.now_ms).expect("nothing stands against it")
    }

    pub(super) fn operation(&self, id: u64) -> v1::ClusterOperation {
        self.snapshot.operations.find(id).expect("it is remembered").clone()
    }

    pub(super) fn shard(&self, id: u64) -> Option<v1::Shard> {
        find(&self.snapshot, id).cloned()
    }

    /// What replicas of groups that run say, whose nodes are heard.
    pub(super) fn seen(&self) -> Seen {
        let mut replicas = BTreeMap::new();
        for (shard, group) in &self.groups {
            for replica in group.replicas.iter().filter(|it| !self.silent.contains(&it.node)) {
                let status = match group.broken.contains(&replica.id) {
                    true => v1::GroupStatus {
                        shard: *shard,
                        replica: replica.id,
                        role: "recovering".to_owned(),
                        ..Default::default()
                    },
                    false => told(*shard, group, replica),
                };
                replicas.insert(replica.id, status);
            }
        }
        Seen {
            replicas,
            silent: self.silent.clone(),
            lost: self.lost.clone(),
            refused_by: self.refused_by,
            now_ms: self.now_ms,
            hold_ms: 0,
        }
    }

    pub(super) fn group(&mut self, shard: u64) -> &mut Group {
        self.groups.get_mut(&shard).expect("it is there")
    }

    /// Steps until a merge is there.
    pub(super) fn until(&mut self, id: u64, step: v1::MergeStep) {
        for _ in 0..1_000 {
            if self.operation(id).merge.expect("a merge").step() == step {
                return;
            }
            self.step(id);
        }
        panic!("it does not come to {step:?}: {:?}", self.operation(id));
    }

    /// An order reaches a group.
    pub(super) fn obey(&mut self, order: &peer::Reshape) {
        let by = self.groups.get(&order.shard).map(Group::leader);
        self.refused_by = if self.heed(order) { None } else { by };
    }

    /// As `coracle_raft::apply` has it. False where it refuses.
    fn heed(&mut self, order: &peer::Reshape) -> bool {
        let others = self.groups.get(&order.other).cloned();
        let Some(group) = self.groups.get_mut(&order.shard) else { return false };
        let id = order.operation;
        let is_other = |merge: u64| merge != 0 && merge != id;
        match order.step() {
            // Done already.
            ReshapeStep::Prepare if group.merging == id => return true,
            ReshapeStep::Freeze if group.frozen_for == id => return true,
            _ if group.epoch != order.epoch || group.broken.contains(&group.on(group.leader())) => {
                return false;
            }
            ReshapeStep::Split => {
                if group.merging != 0 || order.replicas.len() != group.replicas.len() {
                    return false;
                }
                group.epoch += 1;
                let end = std::mem::replace(&mut group.end, order.at);
                let born = |pair: &peer::ReplicaPair| {
                    let parent = group.replicas.iter().find(|known| known.id == pair.replica);
                    v1::Replica { id: pair.other, ..*parent.expect("of this group") }
                };
                let replicas = order.replicas.iter().map(born).collect();
                let (start, epoch) = (order.at, group.epoch);
                let child = Group { start, end, epoch, replicas, ..Group::default() };
                self.groups.insert(order.other, child);
            }
            ReshapeStep::Prepare => {
                if group.merging != 0 || group.frozen_for != 0 {
                    return false;
                }
                group.merging = id;
            }
            ReshapeStep::Freeze => {
                if group.merging != id || group.frozen_for != 0 {
                    return false;
                }
                group.frozen_for = id;
            }
            ReshapeStep::Thaw | ReshapeStep::End => {
                if is_other(group.merging) || is_other(group.frozen_for) {
                    return false;
                }
                group.epoch += 1;
                (group.merging, group.frozen_for) = (0, 0);
            }
            ReshapeStep::Absorb => {
                let right = others.expect("it is there");
                if group.merging != id || right.broken.contains(&right.on(group.leader())) {
                    return false;
                }
                let nodes = |group: &Group| -> BTreeSet<u64> {
                    group.replicas.iter().map(|replica| replica.node).collect()
                };
                assert_eq!(right.frozen_for, id, "it still serves");
                assert_eq!((group.end, nodes(group)), (right.start, nodes(&right)));
                assert_eq!(order.replicas.len(), group.replicas.len());
                (group.end, group.absorbed) = (right.end, id);
                group.epoch = group.epoch.max(right.epoch) + 1;
            }
            _ => {}
        }
        true
    }

    /// Replicas move, and those that leave are gone, as `super::super::replicas` has it.
    pub(super) fn settle(&mut self) {
        let none = BTreeSet::new();
        advance(&mut self.snapshot, &none, self.now_ms);
        for shard in &mut self.snapshot.map.shards {
            let gone: Vec<u64> =
                shard.replicas.iter().map(|r| r.replaces).filter(|id| *id != 0).collect();
            let before = shard.replicas.len();
            shard.replicas.retain(|replica| !gone.contains(&replica.id) && !replica.goes);
            let group = self.groups.get_mut(&shard.id).expect("every shard has one");
            for replica in shard.replicas.iter_mut().filter(|replica| replica.becomes_voter) {
                *replica = self::replica(replica.id, replica.node, ReplicaRole::Voter);
                shard.epoch += 1;
            }
            if shard.replicas.len() != before || shard.epoch > group.epoch {
                group.epoch = group.epoch.max(shard.epoch);
            }
            group.replicas = shard.replicas.clone();
        }
        self.snapshot.leaving.clear();
        advance(&mut self.snapshot, &none, self.now_ms);
    }

    pub(super) fn check(&self) {
        ShardMap::from_proto(&self.snapshot.map).expect("arcs tile the ring at every step");
        for shard in &self.snapshot.map.shards {
            let group = &self.groups[&shard.id];
            assert!(shard.epoch <= group.epoch, "the map is ahead of s{}", shard.id);
            let same = (shard.start, shard.end) == (group.start, group.end);
            assert!(same || shard.epoch < group.epoch, "an arc of s{} for its epoch", shard.id);
        }
    }

    /// One step. The next controller knows nothing of it but what is recorded.
    pub(super) fn step(&mut self, id: u64) -> Next {
        let operation = self.operation(id);
        let next = next(&self.snapshot, &operation, &self.seen());
        let at = match (&operation.split, &operation.merge) {
            (Some(split), _) => format!("{:?}", split.step()),
            (_, Some(merge)) => format!("{:?}", merge.step()),
            _ => String::new(),
        };
        self.taken.insert(at);
        match &next {
            Next::Wait(_) | Next::Look => self.settle(),
            Next::HandOver { shard, from, to } => {
                let group = self.groups.get_mut(shard).expect("it is there");
                assert_eq!(group.leader(), *from);
                group.led_by = *to;
            }
            Next::Enter(entry) => {
                let on = On::of(&operation);
                assert!(enter(&mut self.snapshot, id, (on, entry), self.now_ms), "{entry:?}");
                self.points.extend(behind(entry));
                self.settle();
            }
            Next::Ask(order) => {
                self.orders += 1;
                let (before, after) = around(&operation, order.step());
                self.points.extend(before.into_iter().chain(after));
                match self.trouble != 0 && self.orders.is_multiple_of(self.trouble) {
                    true => self.late.push((**order).clone()),
                    false => self.obey(order),
                }
            }
        }
        self.now_ms += 7;
        self.check();
        next
    }

    pub(super) fn run(&mut self, id: u64) -> v1::ClusterOperation {
        for _ in 0..3_000 {
            if has_ended(self.operation(id).state()) {
                return self.operation(id);
            }
            self.step(id);
        }
        panic!("it does not end: {:?}", self.operation(id));
    }

    /// What was lost on the way comes now.
    pub(super) fn deliver(&mut self) {
        for order in std::mem::take(&mut self.late) {
            self.obey(&order);
            self.check();
        }
    }
}

/// What a replica that runs says.
fn told(shard: u64, group: &Group, replica: &v1::Replica) -> v1::GroupStatus {
    let follows = !group.behind.contains(&replica.id);
    let leads = group.leader() == replica.node;
    v1::GroupStatus {
        shard,
        replica: replica.id,
        role: if leads { "leader" } else { "follower" }.to_owned(),
        leader_node: group.leader(),
        epoch: if follows { group.epoch } else { 1 },
        applied_index: 10_000 - group.lag.get(&replica.id).copied().unwrap_or(0),
        start: group.start,
        end: group.end,
        merging: if follows { group.merging } else { 0 },
        frozen_for: if follows { group.frozen_for } else { 0 },
        frozen_at: 77,
        foreign_free: u64::from(!group.untidy.contains(&replica.id)),
        absorbed: if follows { group.absorbed } else { 0 },
        absorbed_durable: follows && group.absorbed != 0,
        state_bytes: group.bytes,
        ..Default::default()
    }
}

//! The work that is cut short at each point: what it is, who takes part in it, and how it may end. Pure,
//! but for the one call that begins it. Kills nobody (see `steps`).

use std::collections::BTreeMap;

use coracle_client::admin::{Admin, OperationState, SplitAt};
use coracle_client::topology::Shard;
use coracle_client::{ClusterMap, Error, NodeId, ShardId};
use coracle_server::cluster::Point;

use super::moves::{self, Placement};
use crate::cluster::process::Leads;

/// What is begun, for a point to be reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Work {
    /// A voter moves.
    Move,
    /// A move is cancelled when its new replica is a member.
    Cancel,
    /// Every shard gets a read replica, and loses it.
    ReadReplicas,
    /// The node of the replica that comes goes away for so long that it is given up.
    GiveUp,
    /// A group's only voter moves.
    OnlyVoter,
    /// A group's leader is killed in the middle of a change of voters.
    Half,
    /// A shard becomes two.
    Split,
    /// A split is cancelled before its group is told.
    CancelSplit,
    /// Two neighbours on the same nodes become one.
    Merge,
    /// Two neighbours become one whose replicas are on different nodes.
    Gather,
    /// A merge is cancelled once both groups know of it.
    CancelMerge,
}

/// Which work comes by a point: that which is cut short there.
pub(super) fn works_at(point: Point) -> &'static [Work] {
    match point {
        Point::Settle | Point::Settled => &[Work::ReadReplicas],
        Point::Withdraw | Point::Withdrawn => &[Work::GiveUp],
        Point::Remove | Point::Removed => &[Work::Cancel],
        Point::Retire | Point::Retired => &[Work::OnlyVoter],
        Point::Finish | Point::Finished => &[Work::Half],
        Point::SplitPlanned | Point::Split | Point::SplitDone | Point::SplitRecorded => {
            &[Work::Split]
        }
        Point::SplitCancel | Point::SplitCancelled | Point::SplitTakenBack => &[Work::CancelSplit],
        Point::GatherBegun => &[Work::Gather],
        Point::MergePlanned
        | Point::Announce
        | Point::Announced
        | Point::FreezePlanned
        | Point::Freeze
        | Point::Frozen
        | Point::AbsorbDecided
        | Point::Absorb
        | Point::Absorbed
        | Point::MergeRecorded
        | Point::MergeFlushed
        | Point::EndMerge
        | Point::MergeEnded => &[Work::Merge],
        Point::CancelDecided
        | Point::Thaw
        | Point::Thawed
        | Point::Release
        | Point::Released
        | Point::MergeTakenBack => &[Work::CancelMerge],
        Point::OperationRecorded | Point::OperationEnded => &[Work::Move, Work::Split, Work::Merge],
        Point::Destroy | Point::Destroyed | Point::Forgotten => &[Work::Move, Work::Merge],
        _ => &[Work::Move],
    }
}

impl Work {
    pub(super) fn is_merge(self) -> bool {
        matches!(self, Work::Merge | Work::Gather | Work::CancelMerge)
    }

    pub(super) fn is_split(self) -> bool {
        matches!(self, Work::Split | Work::CancelSplit)
    }

    /// When this is seen, the operation is cancelled.
    pub(super) fn cancelled_at(self) -> Option<Point> {
        match self {
            Work::Cancel => Some(Point::Added),
            Work::CancelSplit => Some(Point::SplitPlanned),
            Work::CancelMerge => Some(Point::Announced),
            _ => None,
        }
    }
}

/// Who takes part in a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cast {
    /// The shard that moves, is split, or stays.
    pub(super) shard: ShardId,
    /// Of a merge: the one that is taken in.
    pub(super) right: Option<ShardId>,
    /// Of a split: the first position of the new one.
    pub(super) at: u64,
    /// Of a move: from here.
    pub(super) from: NodeId,
    /// And to there.
    pub(super) to: NodeId,
    pub(super) controller: usize,
    /// The process that has what goes: the replica, the shard's leader, the right one's.
    pub(super) source: usize,
    /// The process to which it goes: the new replica's, another voter's, the left one's leader's.
    pub(super) target: usize,
}

impl Cast {
    /// Begins the work.
    pub(super) async fn ask(self, work: Work, admin: &Admin) -> Result<(), Error> {
        match self.right {
            Some(right) => admin.merge_shards(self.shard, right, false).await.map(drop),
            None if work.is_split() => {
                admin.split_shard(self.shard, SplitAt::Position(self.at), false).await.map(drop)
            }
            None => admin.move_replica(self.shard, self.from, self.to).await.map(drop),
        }
    }

    /// In words.
    pub(super) fn told(&self, work: Work) -> String {
        match self.right {
            Some(right) => format!("shard {right} into shard {}", self.shard),
            None if work.is_split() => format!("shard {} split", self.shard),
            None => format!("shard {} from n{} to n{}", self.shard, self.from, self.to),
        }
    }
}

/// From whom the cast of a round is chosen.
pub(super) struct Crew<'a> {
    /// By process: its node.
    pub(super) ids: &'a [NodeId],
    pub(super) leaders: &'a BTreeMap<ShardId, Leads>,
    /// The process that leads the meta group.
    pub(super) controller: usize,
    /// Another choice each time.
    pub(super) round: usize,
}

impl Crew<'_> {
    /// A shard, and a move of it on which the controller looks on, where there are enough nodes.
    pub(super) fn of_move(&self, map: &ClusterMap) -> Result<Cast, String> {
        let (shard, turn) = self.shard(map);
        let holds = |node: &NodeId| shard.replicas.iter().any(|replica| replica.node == *node);
        let pick = |wanted: bool| {
            let fit = (0..self.ids.len()).filter(|at| holds(&self.ids[*at]) == wanted).collect();
            self.rank(fit, turn).ok_or("nobody to move from or to")
        };
        let (source, target) = (pick(true)?, pick(false)?);
        let (from, to) = (self.ids[source], self.ids[target]);
        let controller = self.controller;
        Ok(Cast { shard: shard.id, right: None, at: 0, from, to, controller, source, target })
    }

    /// A shard to split; one of its voters that does not lead has the other half.
    pub(super) fn of_split(&self, map: &ClusterMap) -> Result<Cast, String> {
        let (shard, turn) = self.shard(map);
        let source = self.leader(shard.id)?;
        let holds = |node: &NodeId| shard.replicas.iter().any(|replica| replica.node == *node);
        let others = (0..self.ids.len()).filter(|at| *at != source && holds(&self.ids[*at]));
        let target = self.rank(others.collect(), turn).unwrap_or(source);
        let (from, to) = (self.ids[source], self.ids[target]);
        let at = moves::middle(shard.start, shard.end);
        let controller = self.controller;
        Ok(Cast { shard: shard.id, right: None, at, from, to, controller, source, target })
    }

    /// Two neighbours.
    pub(super) fn of_merge(&self, left: ShardId, right: ShardId) -> Result<Cast, String> {
        let (source, target) = (self.leader(right)?, self.leader(left)?);
        let (from, to) = (self.ids[source], self.ids[target]);
        let (right, controller) = (Some(right), self.controller);
        Ok(Cast { shard: left, right, at: 0, from, to, controller, source, target })
    }

    fn shard<'m>(&self, map: &'m ClusterMap) -> (&'m Shard, usize) {
        let shards: Vec<_> = map.shards.iter().filter(|shard| shard.id.0 != 0).collect();
        (shards[self.round % shards.len()], self.round / shards.len())
    }

    fn leader(&self, shard: ShardId) -> Result<usize, String> {
        let leads = self.leaders.get(&shard);
        leads.map(|leads| leads.at).ok_or_else(|| format!("nobody leads shard {shard}"))
    }

    /// Another one each time, the controller last.
    fn rank(&self, mut fit: Vec<usize>, turn: usize) -> Option<usize> {
        let count = fit.len().max(1);
        fit.rotate_left(turn % count);
        fit.sort_by_key(|at| *at == self.controller);
        fit.first().copied()
    }
}

/// Two neighbours whose voters are on the same nodes, others each time.
pub(super) fn pair_on_the_same_nodes(map: &ClusterMap, round: usize) -> Option<(ShardId, ShardId)> {
    let placement = moves::placement(map);
    let mut arcs: Vec<&Shard> = map.shards.iter().filter(|shard| shard.id.0 != 0).collect();
    arcs.sort_by_key(|shard| shard.start);
    let fits = |pair: &[&Shard]| placement[&pair[0].id] == placement[&pair[1].id];
    let pairs: Vec<_> = arcs.windows(2).filter(|pair| fits(pair)).collect();
    let pair = pairs.get(round % pairs.len().max(1))?;
    Some((pair[0].id, pair[1].id))
}

/// How work has ended, by its state and by where voters were and are; `None` for what must not be.
pub(super) fn ending(
    work: Work,
    cast: Cast,
    state: Option<OperationState>,
    then: &Placement,
    now: &Placement,
) -> Option<&'static str> {
    let wanted = wanted(work, cast, then, now);
    let is_done = wanted.as_ref() == Some(now);
    // What was gathered stays where it came to.
    let is_undone = match (work, cast.right) {
        (Work::Gather, Some(right)) => {
            let without = |placement: &Placement| {
                let others = placement.iter().filter(|(shard, _)| **shard != right);
                others.map(|(shard, voters)| (*shard, voters.clone())).collect::<Placement>()
            };
            now.contains_key(&right) && without(now) == without(then)
        }
        _ => now == then,
    };
    match state {
        Some(OperationState::Done) if is_done => Some("done"),
        Some(OperationState::Cancelled | OperationState::Failed) if is_undone => Some("undone"),
        // It could not be taken back any more when the cancel came.
        Some(OperationState::Cancelled) if is_done => Some("done after all"),
        None if work == Work::ReadReplicas && is_undone => Some("taken back"),
        _ => None,
    }
}

/// Where voters are once the work is done; `None` where `now` has not even the shards for it.
fn wanted(work: Work, cast: Cast, then: &Placement, now: &Placement) -> Option<Placement> {
    let mut wanted = then.clone();
    match cast.right {
        Some(right) => drop(wanted.remove(&right)?),
        None if work.is_split() => {
            let mut new = now.keys().filter(|shard| !then.contains_key(shard));
            let (child, None) = (*new.next()?, new.next()) else { return None };
            let voters = wanted.get(&cast.shard)?.clone();
            wanted.insert(child, voters);
        }
        None => {
            let voters = wanted.get_mut(&cast.shard)?;
            voters.remove(&cast.from);
            voters.insert(cast.to);
        }
    }
    Some(wanted)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn placement(shards: &[(u64, [u64; 3])]) -> Placement {
        let nodes = |ids: &[u64; 3]| ids.iter().map(|id| NodeId(*id)).collect::<BTreeSet<_>>();
        shards.iter().map(|(id, ids)| (ShardId(*id), nodes(ids))).collect()
    }

    fn cast(right: Option<u64>) -> Cast {
        let (from, to, right) = (NodeId(1), NodeId(4), right.map(ShardId));
        Cast { shard: ShardId(1), right, at: 7, from, to, controller: 0, source: 1, target: 2 }
    }

    #[test]
    fn every_point_is_come_by_and_every_work_is_cut_short() {
        let works: Vec<Work> =
            Point::ALL.into_iter().flat_map(|point| works_at(point).iter().copied()).collect();
        assert!(Point::ALL.into_iter().all(|point| !works_at(point).is_empty()));
        for work in [Work::Move, Work::Cancel, Work::ReadReplicas, Work::GiveUp, Work::OnlyVoter] {
            assert!(works.contains(&work), "{work:?}");
        }
        for work in [Work::Split, Work::CancelSplit, Work::Merge, Work::Gather, Work::CancelMerge] {
            assert!(works.contains(&work), "{work:?}");
        }
    }

    #[test]
    fn work_is_done_or_undone_and_nothing_between() {
        let (done, off) = (Some(OperationState::Done), Some(OperationState::Cancelled));
        let then = placement(&[(1, [1, 2, 3]), (2, [1, 2, 3])]);
        let moved = placement(&[(1, [4, 2, 3]), (2, [1, 2, 3])]);
        let split = placement(&[(1, [1, 2, 3]), (2, [1, 2, 3]), (3, [1, 2, 3])]);
        let strays = placement(&[(1, [1, 2, 3]), (2, [1, 2, 3]), (3, [1, 2, 4])]);
        let merged = placement(&[(1, [1, 2, 3])]);
        let (alone, pair) = (cast(None), cast(Some(2)));
        assert_eq!(ending(Work::Move, alone, done, &then, &moved), Some("done"));
        assert_eq!(ending(Work::Move, alone, done, &then, &then), None);
        assert_eq!(ending(Work::Cancel, alone, off, &then, &then), Some("undone"));
        assert_eq!(ending(Work::Cancel, alone, off, &then, &moved), Some("done after all"));
        assert_eq!(ending(Work::Split, alone, done, &then, &split), Some("done"));
        assert_eq!(ending(Work::Split, alone, done, &then, &strays), None, "it is elsewhere");
        assert_eq!(ending(Work::Split, alone, done, &then, &then), None);
        assert_eq!(ending(Work::CancelSplit, alone, off, &then, &then), Some("undone"));
        assert_eq!(ending(Work::Merge, pair, done, &then, &merged), Some("done"));
        assert_eq!(ending(Work::Merge, pair, done, &then, &then), None);
        assert_eq!(ending(Work::CancelMerge, pair, off, &then, &then), Some("undone"));
        let apart = placement(&[(1, [1, 2, 3]), (2, [1, 2, 4])]);
        assert_eq!(ending(Work::Gather, pair, off, &apart, &then), Some("undone"), "it came");
        assert_eq!(ending(Work::Gather, pair, done, &apart, &merged), Some("done"));
        assert_eq!(ending(Work::Move, alone, None, &then, &then), None, "of nothing recorded");
    }
}

//! Which points (`cluster::points`) lie around the steps of replicas, and behind what was recorded.
//!
//! Owns how they are told from what is done and from what has changed. Decides nothing, and waits
//! nowhere unless a test holds steps.

use coracle_proto::shard_map::NodeId;
use coracle_proto::{peer, v1};
use peer::MemberChange;
use v1::OperationState;

use super::enter::Change;
use super::step::Step;
use super::{Job, Outcome};
use crate::cluster::Cluster;
use crate::cluster::points::Point;
use crate::records::Operations;
use crate::records::operations::has_ended;

/// Right before and right after a step. What follows on a step that only changes the records is a
/// point of the records.
fn around(step: Step) -> (Option<Point>, Option<Point>) {
    match step {
        Step::Make => (Some(Point::Make), Some(Point::Made)),
        Step::Add => (Some(Point::Add), Some(Point::Added)),
        Step::Settle => (Some(Point::Settle), None),
        Step::Promote => (Some(Point::Promote), Some(Point::Promoted)),
        Step::Retire => (Some(Point::Retire), Some(Point::Retired)),
        Step::Withdraw => (Some(Point::Withdraw), None),
        Step::Remove => (Some(Point::Remove), Some(Point::Removed)),
        Step::Destroy => (Some(Point::Destroy), Some(Point::Destroyed)),
        // Of a node that is gone for good, `Forget` only changes the records.
        Step::Wait | Step::Forget => (None, None),
    }
}

impl Cluster {
    /// Takes a step, with the points around it.
    pub(super) async fn take_held(
        &self,
        step: Step,
        job: &Job,
        place: (u64, u64),
        group: &mut v1::GroupStatus,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        let (before, after) = around(step);
        self.holding.at(before, job.shard.id, place.0).await;
        let changes = outcome.changes.len();
        let epoch = group.epoch;
        self.take(step, job, place, group, outcome).await?;
        // A leader that handed over first, or a node that is silent: nothing was done yet.
        let did = match step {
            Step::Promote | Step::Retire => group.epoch > epoch,
            Step::Make => outcome.made.contains(&place.0),
            Step::Destroy => outcome.changes.len() > changes,
            _ => true,
        };
        self.holding.at(after.filter(|_| did), job.shard.id, place.0).await;
        Ok(())
    }

    /// Has a group end a change of voters that was left half done.
    pub(super) async fn finish_held(
        &self,
        ask: NodeId,
        shard: u64,
    ) -> Result<v1::GroupStatus, (String, Option<NodeId>)> {
        self.holding.at(Point::Finish, shard, 0).await;
        let change = MemberChange::Finish.into();
        let finish = peer::ChangeMembers { shard, change, ..Default::default() };
        let finished = self.ask_leader(ask, finish).await?;
        self.holding.at(Point::Finished, shard, 0).await;
        Ok(finished)
    }

    /// Behind changes that were recorded.
    pub(super) async fn hold_at_changes(&self, changes: &[Change]) {
        for change in changes {
            let (point, shard, replica) = match *change {
                Change::Settle { shard, replica } => (Point::Settled, shard, replica),
                Change::Epoch { shard, .. } => (Point::EpochRecorded, shard, 0),
                Change::Voters { shard, .. } => (Point::VotersRecorded, shard, 0),
                Change::Withdraw { shard, replica, .. } => (Point::Withdrawn, shard, replica),
                Change::Forget { replica } => (Point::Forgotten, 0, replica),
            };
            self.holding.at(point, shard, replica).await;
        }
    }

    /// Behind what was recorded of operations.
    pub(super) async fn hold_at_operations(&self, before: &Operations, now: &Operations) {
        for operation in &now.list {
            let known = before.find(operation.id);
            for step in &operation.moves {
                let was = known.into_iter().flat_map(|known| &known.moves);
                let was = was.clone().find(|known| {
                    known.shard == step.shard && known.from_replica == step.from_replica
                });
                let begun = step.state() == OperationState::Running
                    && was.is_none_or(|was| was.state() != OperationState::Running);
                let point = begun.then_some(Point::MoveBegun);
                self.holding.at(point, step.shard, step.to_replica).await;
            }
            let ended = has_ended(operation.state())
                && known.is_some_and(|known| !has_ended(known.state()));
            self.holding.at(ended.then_some(Point::OperationEnded), 0, 0).await;
        }
    }
}

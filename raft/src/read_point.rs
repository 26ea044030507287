//! Where a read's point in the log comes from: from openraft on the leader, by one question to the
//! leader everywhere else.
//!
//! Owns those questions, the order of their steps, and what a replica remembers of the answers. Does
//! not gather reads into batches and does not look at the state (see `reader`).
//!
//! **A point is fresh from the moment of its question on.** The leader answers only from a check of
//! its leadership that it made after it took the question, so everything that was acknowledged before
//! the question was sent lies at or below the index. The asking replica notes both: the moment, by its
//! own clock, and the index. Once it has applied so far, what it reads is never older than that
//! moment, and that stays true whatever happens to the leader afterwards. No clocks of two nodes are
//! ever compared.
//!
//! **A version is fixed with the index behind which nothing can have it.** The leader stamps above it
//! from then on, and so does every later one; what it has stamped up to it stands in its log already.
//! It has applied an entry of its own term by then, so nothing that it does not have can ever be
//! committed below.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::{Mutant, ReplicaId};
use openraft::LinearizerOption;
use openraft::errors::{LinearizableReadError, RaftError};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::clock::Circumstances;
use crate::error::GroupError;
use crate::leadership::{Leadership, Raft};
use crate::message::{Answer, Question, Refused};
use crate::observer::ReadWay;
use crate::proposer::Proposer;
use crate::transport::{Address, Lane, Transport};
use crate::types::{NodeId, ShardId, TypeConfig};

/// Versions that this replica may have its leader fix at a time, each with a question of its own.
/// Beyond it the answer is `Overloaded`.
const FIXES_ASKED_MAX: usize = 256;
/// How many leases a leader may take to fix a version: it may have to commit an entry for it.
const FIX_LEASES: u32 = 2;
/// Answers whose index is not yet applied here: a replica that lags behind while it is read. Beyond
/// it the newest replaces the one before it, so that neither the next to be reached nor the freshest
/// is lost.
const NOTES_MAX: usize = 64;
/// What a bound keeps in hand, as a part of it: clocks may run at rates that differ by so much.
const RATE_MARGIN: u32 = 100;
/// When to come back after `Overloaded`.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// A version that is fixed for reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fixed {
    /// No later write gets a version at or below it, under any leader.
    pub version: u64,
    /// Where everything with a version up to it stands in the log, or before.
    pub(crate) index: u64,
}

/// One group's read points. Clones share it.
#[derive(Clone)]
pub(crate) struct ReadPoints(Arc<Inner>);

struct Inner {
    shard: ShardId,
    raft: Raft,
    leadership: Leadership,
    proposer: Proposer,
    transport: Arc<dyn Transport>,
    environment: Arc<dyn Circumstances>,
    notes: Mutex<Notes>,
    fixes_asked: Semaphore,
}

impl ReadPoints {
    pub(crate) fn new(
        shard: ShardId,
        raft: Raft,
        leadership: Leadership,
        proposer: Proposer,
        transport: Arc<dyn Transport>,
        environment: Arc<dyn Circumstances>,
    ) -> Self {
        let (notes, fixes_asked) = (Mutex::default(), Semaphore::new(FIXES_ASKED_MAX));
        Self(Arc::new(Inner {
            shard,
            raft,
            leadership,
            proposer,
            transport,
            environment,
            notes,
            fixes_asked,
        }))
    }

    pub(crate) fn environment(&self) -> &dyn Circumstances {
        &*self.0.environment
    }

    /// Whether this replica takes itself for the leader: the way that is tried first, no promise.
    pub(crate) fn leads(&self) -> bool {
        self.0.leadership.leads().is_ok()
    }

    /// The leader's own point, by a check that is made now. On another replica: who leads.
    pub(crate) async fn confirmed(&self) -> Result<(u64, ReadWay), GroupError> {
        self.0.leadership.leads()?;
        if Mutant::SkipsReadIndex.is_in() {
            return Ok((0, ReadWay::Lease));
        }
        let (timing, asked) = (self.0.environment.timing(), Instant::now());
        let under_lease = LinearizerOption::new(Some(timing.read_lease()), false)
            .with_wait_timeout(Duration::ZERO);
        let (checked, way) = match self.0.raft.get_read_linearizer(under_lease).await {
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                let by_heartbeats = LinearizerOption::new(Some(timing.read_lease()), true)
                    .with_wait_timeout(timing.lease());
                (self.0.raft.get_read_linearizer(by_heartbeats).await, ReadWay::Quorum)
            }
            checked => (checked, ReadWay::Lease),
        };
        let index = checked.map_err(refusal)?.read_log_id().index();
        self.note(asked, index);
        Ok((index, way))
    }

    /// The leader's point, asked for now, within one lease. News of another leader are followed.
    pub(crate) async fn asked(&self) -> Result<u64, GroupError> {
        if Mutant::FollowersDoNotAsk.is_in() {
            return Ok(0);
        }
        let until = Instant::now() + self.0.environment.timing().lease();
        loop {
            let leader = self.0.leadership.other_leader();
            let leader = leader.ok_or(GroupError::NotLeader { leader: None })?;
            let asked = Instant::now();
            let left = until.saturating_duration_since(asked);
            if left.is_zero() {
                return Err(GroupError::NotLeader { leader: None });
            }
            let answer = tokio::select! {
                biased;
                answer = self.ask(leader, Question::ReadPoint, left) => answer?,
                () = self.leadership_leaves(leader) => continue,
            };
            return match answer {
                Answer::ReadPoint { index } => {
                    self.note(asked, index);
                    Ok(index)
                }
                other => Err(refused(other)),
            };
        }
    }

    /// Fixes a version on the leader: stamps lie above it from now on. Without one the newest: the
    /// caller has confirmed this leader after whoever wants it has asked, so that nothing can have
    /// been acknowledged elsewhere under a higher one.
    pub(crate) async fn fix(&self, version: Option<u64>) -> Result<Fixed, GroupError> {
        let term = self.0.leadership.leads()?;
        let version = self.0.proposer.fix(version).await?;
        // The leader's core takes messages in order: behind every entry that was stamped before.
        // Another leader may have cut this log meanwhile; entries that are gone here may come back
        // under a third. Only as the leader of one term throughout, this replica has cut nothing.
        let own = self.0.leadership.own();
        let last = self.0.raft.with_raft_state(move |state| {
            let vote = state.vote_ref();
            let by_own = vote.leader_id.term == term && vote.leader_id.voted_for == own;
            (vote.committed && by_own).then(|| state.log_ids.last().map_or(0, |id| id.index()))
        });
        let index = last.await.map_err(|_| GroupError::Stopped)?;
        let index = index.ok_or(GroupError::NotLeader { leader: None })?;
        Ok(Fixed { version, index })
    }

    /// Has the leader fix a version.
    pub(crate) async fn fix_asked(&self, version: Option<u64>) -> Result<Fixed, GroupError> {
        let leader = self.0.leadership.other_leader();
        let leader = leader.ok_or(GroupError::NotLeader { leader: None })?;
        let permit = self.0.fixes_asked.try_acquire();
        let _permit = permit.map_err(|_| GroupError::Overloaded { retry_after: RETRY_AFTER })?;
        let timeout = self.0.environment.timing().lease() * FIX_LEASES;
        let answer = tokio::select! {
            biased;
            answer = self.ask(leader, Question::Fix { version }, timeout) => answer?,
            () = self.leadership_leaves(leader) => {
                return Err(GroupError::NotLeader { leader: None });
            }
        };
        match answer {
            Answer::Fixed { version, index } => Ok(Fixed { version, index }),
            other => Err(refused(other)),
        }
    }

    async fn ask(
        &self,
        (replica, node): (u64, NodeId),
        question: Question,
        timeout: Duration,
    ) -> Result<Answer, GroupError> {
        let to = Address { node, shard: self.0.shard, replica: ReplicaId(replica) };
        let answer = self.0.transport.ask(to, Lane::Control, question.encode(), timeout).await;
        let answer = answer.ok().and_then(|bytes| Answer::decode(bytes).ok());
        // Whoever leads by now, it is not known here that it does.
        answer.ok_or(GroupError::NotLeader { leader: None })
    }

    /// Ends when another replica than this one is known to lead, or none.
    async fn leadership_leaves(&self, leader: (u64, NodeId)) {
        let mut leadership = self.0.leadership.clone();
        while leadership.other_leader() == Some(leader) {
            if !leadership.changed().await {
                // The replica has stopped: whoever waits is told so elsewhere.
                std::future::pending::<()>().await;
            }
        }
    }

    fn note(&self, asked: Instant, index: u64) {
        self.0.notes.lock().take_down(asked, index);
    }

    /// How old a state that holds everything up to `applied` may be.
    pub(crate) fn age(&self, applied: u64) -> Option<Age> {
        let fresh = self.0.notes.lock().fresh(applied)?;
        Some(Age(fresh.elapsed()))
    }
}

/// How old a state may be, by the clock of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Age(Duration);

impl Age {
    /// Whether it is within a bound, whatever the rates of the clocks that measure the two.
    pub(crate) fn is_within(self, bound: Duration) -> bool {
        self.told() <= bound || Mutant::IgnoresBounds.is_in()
    }

    /// As it is told: no clock within the margin has seen more time pass.
    pub(crate) fn told(self) -> Duration {
        self.0 + self.0 / RATE_MARGIN
    }
}

/// Moments, and what was acknowledged before each: not before `index` is applied does one count.
/// Rising in both.
#[derive(Debug, Default)]
struct Notes(VecDeque<(Instant, u64)>);

impl Notes {
    fn take_down(&mut self, asked: Instant, index: u64) {
        // What is known for a later moment by an index as low says more.
        let says_more = |note: &&(Instant, u64)| note.0 >= asked && note.1 <= index;
        if self.0.iter().any(|note| says_more(&note)) {
            return;
        }
        self.0.retain(|note| !(note.0 <= asked && note.1 >= index));
        if self.0.len() == NOTES_MAX {
            self.0.pop_back();
        }
        let place = self.0.partition_point(|note| note.0 <= asked);
        self.0.insert(place, (asked, index));
    }

    /// The latest moment before which everything acknowledged is applied; what lies before it is
    /// forgotten.
    fn fresh(&mut self, applied: u64) -> Option<Instant> {
        let reached = self.0.partition_point(|note| note.1 <= applied);
        self.0.drain(..reached.saturating_sub(1));
        self.0.front().filter(|note| note.1 <= applied).map(|note| note.0)
    }
}

/// As a peer is told.
pub(crate) fn refusal_of(error: &GroupError) -> Answer {
    Answer::Refused(match error {
        GroupError::NotLeader { leader } => Refused::NotLeader(*leader),
        GroupError::Overloaded { retry_after } => {
            Refused::Overloaded(retry_after.as_millis() as u64)
        }
        GroupError::ClockOutOfBound => Refused::ClockOutOfBound,
        // It asks elsewhere, or again.
        _ => Refused::NotLeader(None),
    })
}

fn refused(answer: Answer) -> GroupError {
    match answer {
        Answer::Refused(Refused::NotLeader(leader)) => GroupError::NotLeader { leader },
        Answer::Refused(Refused::Overloaded(ms)) => {
            GroupError::Overloaded { retry_after: Duration::from_millis(ms) }
        }
        Answer::Refused(Refused::ClockOutOfBound) => GroupError::ClockOutOfBound,
        // An answer to another question: it says nothing.
        _ => GroupError::NotLeader { leader: None },
    }
}

fn refusal(error: RaftError<TypeConfig, LinearizableReadError<TypeConfig>>) -> GroupError {
    match error {
        RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)) => {
            GroupError::NotLeader { leader: forward.leader_node.map(|place| place.node) }
        }
        RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) => {
            GroupError::NotLeader { leader: None }
        }
        RaftError::Fatal(_) => GroupError::Stopped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_applied_says_how_fresh_a_state_is() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut notes = Notes::default();
        assert_eq!(notes.fresh(u64::MAX), None);
        notes.take_down(at(10), 5);
        notes.take_down(at(30), 9);
        // Answered late, out of order.
        notes.take_down(at(20), 7);
        assert_eq!(notes.fresh(4), None);
        assert_eq!(notes.fresh(5), Some(at(10)));
        assert_eq!(notes.fresh(8), Some(at(20)));
        assert_eq!(notes.fresh(8), Some(at(20)), "still, until more is applied");
        notes.take_down(at(25), 9);
        assert_eq!(notes.0.len(), 2, "a later moment by the same index says more");
        assert_eq!(notes.fresh(9), Some(at(30)));
        notes.take_down(at(40), 9);
        assert_eq!(notes.fresh(9), Some(at(40)), "an idle group stays fresh");
        assert_eq!(notes.0.len(), 1);
    }

    #[test]
    fn a_replica_that_lags_keeps_the_next_note_and_the_newest() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut notes = Notes::default();
        (1..=1_000).for_each(|n| notes.take_down(at(n), n));
        assert_eq!(notes.0.len(), NOTES_MAX);
        assert_eq!(notes.fresh(1), Some(at(1)));
        assert_eq!(notes.fresh(999), Some(at(NOTES_MAX as u64 - 1)));
        assert_eq!(notes.fresh(1_000), Some(at(1_000)));
    }

    #[test]
    fn a_bound_keeps_a_margin_for_rates() {
        let bound = Duration::from_millis(100);
        assert!(Age(Duration::from_millis(99)).is_within(bound));
        assert!(!Age(Duration::from_micros(99_500)).is_within(bound));
        assert!(Age(Duration::from_millis(99)).told() > Duration::from_micros(99_900));
    }
}

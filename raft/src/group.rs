//! One group on this node: the handle through which everything else reads, writes and watches it.
//!
//! Owns the replica's tasks and the answers to its peers' questions. Which groups there are is the
//! host's business.

mod members;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use coracle_storage::{Error, ReplicaId};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::appends::Appends;
use crate::clock::Circumstances;
use crate::command::{Command, Request};
use crate::descriptor::Descriptor;
use crate::environment::Environment;
use crate::error::GroupError;
use crate::lag::Growth;
use crate::leadership::{GroupStatus, Leadership, Raft, Standing};
use crate::lease::{Embargo, Timing};
use crate::load::Load;
use crate::message::{Answer, Question};
use crate::network::Networks;
use crate::proposer::Proposer;
pub use crate::proposer::Written;
pub use crate::read_point::Fixed;
use crate::read_point::ReadPoints;
use crate::reader::Reads;
use crate::snapshot::{Snapshots, blocking};
use crate::state_machine::{ReadState, SharedState};
use crate::transport::{Answering, TransportError};
use crate::types::{NodeId, Place, ShardId, Vote};
pub use members::Members;

mod hand_over;
mod merge;
mod past;
mod purge;
mod split;
mod start;

pub use merge::{Absorbed, Frozen, MERGE_BYTES_MAX, MergePlan, MergeStatus, PrepareMerge};
pub use past::Reclaimed;
pub use split::{Split, SplitPlan, SplitPoints};
pub(crate) use start::Start;
use start::{config, start_core};

/// How often a store that is being closed is looked at.
const CLOSE_POLL: Duration = Duration::from_millis(2);

/// One replica, running.
pub struct Group {
    shard: ShardId,
    replica: ReplicaId,
    raft: Raft,
    state: SharedState,
    leadership: Leadership,
    proposer: Proposer,
    reads: Reads,
    snapshots: Arc<Snapshots>,
    timing: Timing,
    embargo: Embargo,
    appends: Appends,
    duties: Mutex<()>,
    /// One change of the members at a time.
    changing: tokio::sync::Mutex<()>,
    growth: Mutex<Growth>,
    load: Load,
    environment: Arc<Environment>,
    initial: Descriptor,
    stop: CancellationToken,
}

impl Group {
    pub(crate) async fn start(
        start: Start,
        environment: Arc<Environment>,
    ) -> Result<Arc<Self>, Error> {
        let timing = environment.timing;
        let stop = environment.stop.child_token();
        let embargo =
            if start.restarted { Embargo::after_restart(&timing) } else { Embargo::none() };
        let sessions = environment.next_number();
        let snapshots = Arc::new(Snapshots::new(
            environment.engines.fs(),
            environment.exec.clone(),
            environment.slots.clone(),
            &start.live,
            sessions,
        ));
        let networks = Networks {
            shard: start.shard,
            transport: environment.transport.clone(),
            snapshots: snapshots.clone(),
            sessions: Arc::new(AtomicU64::new(sessions)),
        };
        let config = config(&timing, !embargo.holds());
        let raft = start_core(&start, &environment, networks, config, &stop).await?;
        let leadership = Leadership::new(&raft);
        let (proposer, propose) = Proposer::new(
            raft.clone(),
            leadership.clone(),
            start.state.clone(),
            environment.clone(),
            stop.clone(),
        );
        let points = ReadPoints::new(
            start.shard,
            raft.clone(),
            leadership.clone(),
            proposer.clone(),
            environment.transport.clone(),
            environment.clone(),
        );
        let (reads, read) = Reads::new(points, start.state.clone(), stop.clone());
        let appends = Appends::new(raft.clone(), environment.exec.clone(), stop.clone());
        let group = Arc::new(Self {
            shard: start.shard,
            replica: start.replica,
            raft,
            state: start.state,
            leadership,
            proposer,
            reads,
            snapshots,
            timing,
            embargo,
            appends,
            duties: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            growth: Mutex::default(),
            load: Load::default(),
            environment: environment.clone(),
            initial: start.initial,
            stop,
        });
        environment.exec.spawn("propose", Box::pin(propose));
        environment.exec.spawn("read", Box::pin(read));
        let supervised = group.clone();
        environment.exec.spawn("group", Box::pin(async move { supervised.supervise().await }));
        Ok(group)
    }

    /// The shard that it replicates.
    pub fn shard(&self) -> ShardId {
        self.shard
    }

    /// The replica on this node.
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// What this replica knows of its group.
    pub fn status(&self) -> GroupStatus {
        self.leadership.status()
    }

    /// Whether this replica takes itself for the leader.
    pub fn leads(&self) -> bool {
        self.leadership.leads().is_ok()
    }

    /// Whether it gives no votes yet, and cannot be elected, because its node has just restarted.
    pub fn is_under_embargo(&self) -> bool {
        self.embargo.holds()
    }

    /// The arc and epoch as replicated; `None` until the group was described.
    pub fn descriptor(&self) -> Option<Descriptor> {
        self.state.descriptor()
    }

    /// The group's clock as of what is applied: the highest version given so far.
    pub fn clock(&self) -> u64 {
        self.state.clock_and_ceiling().clock
    }

    /// About how many bytes the state takes.
    pub fn state_bytes(&self) -> u64 {
        self.state.state_bytes()
    }

    /// See [`SharedState::check_store`].
    pub(crate) fn check_store(&self) {
        if let Err(error) = self.state.check_store() {
            tracing::error!(shard = %self.shard, %error, "the state store has failed");
        }
    }

    /// What a crash would have to replay into the state; 0 when everything is durable.
    pub(crate) fn unflushed_bytes(&self) -> u64 {
        self.state.unflushed_bytes()
    }

    /// Proposes a write and waits until it is applied. Exactly once: the reply to a duplicate is the
    /// first reply.
    pub async fn write(&self, request: Request, deadline: Instant) -> Result<Written, GroupError> {
        if let Some(arc) = self.descriptor().and_then(|descriptor| descriptor.arc) {
            self.load.write(arc, request.position);
        }
        self.proposer.write(request, deadline).await
    }

    /// Reads a state that holds everything acknowledged before the call. On any replica: one that
    /// does not lead asks the leader how far it must have applied, waits a moment for that, and reads
    /// what it has itself.
    pub async fn read<T: Send + 'static>(
        &self,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        self.reads.linearizable(deadline, look).await
    }

    /// Reads a state that lacks nothing that was acknowledged longer than `bound` ago, and says how
    /// old at most it was. On any replica: at once where an earlier answer of the leader vouches for
    /// the state; else as [`Group::read`], and [`GroupError::TooStale`] where that takes too long.
    pub async fn read_bounded<T: Send + 'static>(
        &self,
        bound: Duration,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<(T, Duration), GroupError> {
        self.reads.bounded(bound, deadline, look).await
    }

    /// Reads what this replica has, once it has applied `index`; 0 reads at once.
    pub async fn read_local<T: Send + 'static>(
        &self,
        index: u64,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        self.reads.local(index, deadline, look).await
    }

    /// Fixes a version for reads: no later write gets a version at or below it, under this leader or
    /// any other. Without one the newest: no write that was acknowledged before the call has a
    /// higher one. A state at that version is then read with [`Group::read_at`]. On any replica:
    /// one that does not lead has the leader do it.
    pub async fn fix_version(&self, version: Option<u64>) -> Result<Fixed, GroupError> {
        self.reads.fix(version).await
    }

    /// Reads a state in which no entry is missing that may hold a version up to a fixed one. Says
    /// nothing of later ones. On the replica that had it fixed.
    pub async fn read_at<T: Send + 'static>(
        &self,
        fixed: Fixed,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        self.reads.caught_up(fixed.index, deadline, look).await
    }

    /// Forms the group: exactly one of its first replicas does. Done already is no error.
    pub async fn initialize(&self, members: BTreeMap<u64, NodeId>) -> Result<(), GroupError> {
        let initialized = self.raft.is_initialized().await;
        if initialized.map_err(|_| GroupError::Stopped)? {
            return Ok(());
        }
        let members: BTreeMap<u64, Place> =
            members.into_iter().map(|(replica, node)| (replica, Place { node })).collect();
        let formed = self.raft.initialize(members).await;
        formed.map_err(|error| GroupError::Storage(format!("group {}: {error}", self.shard)))
    }

    /// Waits until anything in [`Group::status`] changes; false when the replica has stopped.
    pub fn watch(&self) -> impl Future<Output = bool> + Send + 'static {
        let mut leadership = self.leadership.clone();
        async move { leadership.changed().await }
    }

    /// Takes a peer's question. The call itself gives it its place; a receiver never waits for a
    /// group, so what finds no room is unreachable.
    pub(crate) fn answer(self: &Arc<Self>, from: NodeId, question: Bytes) -> Answering {
        let question = match Question::decode(question) {
            Ok(question) => question,
            Err(error) => return failed(error.to_string()),
        };
        match question {
            Question::Append { session, first, request } => {
                self.appends.take(from, session, first, request)
            }
            other => {
                let group = self.clone();
                Box::pin(async move {
                    let answer = group.answer_one(other).await;
                    answer.map(|answer| answer.encode()).map_err(TransportError::Unreachable)
                })
            }
        }
    }

    async fn answer_one(&self, question: Question) -> Result<Answer, String> {
        let why = |error: &dyn std::fmt::Display| error.to_string();
        match question {
            Question::Append { .. } => unreachable!("appends go through their session"),
            Question::Heartbeat(request) => {
                let (previous, last) = (request.prev_log_id, request.prev_log_id);
                let answer = self.raft.append_entries(request).await.map_err(|e| why(&e))?;
                Ok(Answer::Append(answer.into_stream_result(previous, last)))
            }
            Question::Vote { .. } if self.embargo.holds() => {
                Err("the node has just restarted and gives no vote yet".to_owned())
            }
            Question::Vote { pre: true, request } => {
                Ok(Answer::Vote(self.raft.pre_vote(request).await.map_err(|e| why(&e))?))
            }
            Question::Vote { pre: false, request } => {
                Ok(Answer::Vote(self.raft.vote(request).await.map_err(|e| why(&e))?))
            }
            Question::Transfer(request) => {
                if !self.may_campaign() {
                    return Ok(Answer::Transfer(false));
                }
                let taken = self.raft.handle_transfer_leader(request).await;
                Ok(Answer::Transfer(taken.map_err(|e| why(&e))?.is_ok()))
            }
            Question::SnapshotBegin { vote, transfer, meta, manifest } => {
                let begun = self.snapshots.begin(vote, transfer, meta, manifest).await;
                Ok(begun.map_or_else(Answer::SnapshotRefused, |()| Answer::SnapshotTaken))
            }
            Question::SnapshotChunk { transfer, file, chunk, data } => {
                let taken = self.snapshots.chunk(transfer, file, chunk, data).await;
                Ok(taken.map_or_else(Answer::SnapshotRefused, |()| Answer::SnapshotTaken))
            }
            Question::SnapshotEnd { vote, transfer } => self.install(vote, transfer).await,
            Question::MayLead => Ok(Answer::Transfer(self.may_campaign())),
            Question::ReadPoint => Ok(self.reads.point_for_peer().await),
            Question::Fix { version } => Ok(self.reads.fix_for_peer(version).await),
        }
    }

    async fn install(&self, vote: Vote, transfer: u64) -> Result<Answer, String> {
        let snapshot = match self.snapshots.end(transfer).await {
            Ok(snapshot) => snapshot,
            Err(why) => return Ok(Answer::SnapshotRefused(why)),
        };
        let installed = self.raft.install_full_snapshot(vote, snapshot).await;
        installed
            .map(|response| Answer::SnapshotInstalled(response.vote))
            .map_err(|error| error.to_string())
    }

    /// A peer's connections broke. If it led this group, campaign as soon as the lease has passed,
    /// staggered by rank so that the first usually wins. Pre-vote stays on: with it, a cut between
    /// only two nodes deposes no healthy leader.
    pub(crate) fn peer_lost(self: &Arc<Self>, node: NodeId) {
        let status = self.status();
        if status.leader != Some(node) {
            return;
        }
        let Some(rank) = crate::membership::campaign_rank(&status, self.replica) else {
            return;
        };
        let group = self.clone();
        let campaign = async move {
            let wait = group.timing.lease() + group.timing.heartbeat * rank / 2;
            tokio::time::sleep(wait).await;
            let now = group.status();
            let unchanged = now.leader == Some(node) && now.term == status.term;
            if unchanged {
                group.campaign().await;
            }
        };
        let stop = self.stop.clone();
        self.environment.exec.spawn(
            "campaign",
            Box::pin(async move {
                tokio::select! { () = stop.cancelled() => {}, () = campaign => {} }
            }),
        );
    }

    /// Campaigns now, unless it gives no votes yet.
    pub(crate) async fn campaign(&self) {
        if self.may_campaign() {
            // A stopped group needs no leader.
            let _ = self.raft.trigger().elect(true).await;
        }
    }

    fn may_campaign(&self) -> bool {
        !self.embargo.holds() && self.environment.healthy()
    }

    /// What this replica may do at the moment: looked at and set in one step, because those who call
    /// this may overtake each other. Returns whether the disk is well.
    fn set_duties(&self) -> bool {
        let _one = self.duties.lock();
        let healthy = self.environment.healthy();
        let config = self.raft.runtime_config();
        config.heartbeat(healthy);
        config.elect(healthy && !self.embargo.holds());
        healthy
    }

    /// Called when the node's disk stalls, and when it is well again.
    pub(crate) async fn follow_health(&self) {
        let healthy = self.set_duties();
        if !healthy && self.status().state == Standing::Leader {
            let (status, fresh) = (self.status(), self.timing.heartbeat * 10);
            // Nobody is asked first: this leader serves nothing any more in any case.
            let targets = crate::membership::transfer_targets(&status, self.replica, None, fresh);
            if let Some((target, _)) = targets.first().copied() {
                let _ = self.raft.trigger().transfer_leader(target).await;
            }
        }
    }

    /// Ends the replica's tasks, and what rewrites its store.
    pub(crate) async fn shutdown(&self) {
        self.stop.cancel();
        self.appends.clear();
        let state = self.state.clone();
        // Not done where the node stops: then nobody waits for it.
        let _ = blocking(&*self.environment.exec, move || state.end_compactions()).await;
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!(shard = %self.shard, %error, "the group's core had failed");
        }
    }

    /// After [`Group::shutdown`]: waits until nobody holds the replica's store, nor ever opens it
    /// again. Only then may its directory go.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        let state = self.state.clone();
        let closed = blocking(&*self.environment.exec, move || state.close()).await;
        closed.map_err(Error::invalid)?;
        // openraft's worker and the last reads let go of the store in their own time.
        let open = self.state.store_marker();
        while open.strong_count() > 0 {
            tokio::time::sleep(CLOSE_POLL).await;
        }
        Ok(())
    }

    /// Frees what an abandoned snapshot transfer holds.
    pub(crate) fn forget_idle_transfer(&self) {
        self.snapshots.forget_idle();
    }

    /// Counts leaderships, and says when the replica has stopped by itself: it does not come back
    /// before a restart, and its entries stay in the log.
    async fn follow(&self) {
        let mut leadership = self.leadership.clone();
        let mut led = None;
        loop {
            let status = leadership.status();
            if let Some(why) = status.failed.filter(|_| !self.stop.is_cancelled()) {
                tracing::error!(shard = %self.shard, why, "the replica has stopped by itself");
                return;
            }
            if status.state == Standing::Leader && led != Some(status.term) {
                led = Some(status.term);
                self.environment.observer.elected();
            }
            if !leadership.changed().await {
                return;
            }
        }
    }

    /// Ends the embargo, describes the group when this replica first leads it, and purges what nobody
    /// may be sent any more.
    async fn supervise(self: Arc<Self>) {
        let mut leadership = self.leadership.clone();
        let embargo = self.embargo.end();
        let lift = async {
            if let Some(end) = embargo {
                tokio::time::sleep_until(end).await;
                self.set_duties();
            }
        };
        let describe = async {
            while self.descriptor().is_none() {
                if self.status().state == Standing::Leader {
                    let described = self.proposer.own(Command::Describe(self.initial.clone()));
                    if described.await.is_ok() {
                        continue;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                } else if !leadership.changed().await {
                    return;
                }
            }
        };
        let all =
            async { tokio::join!(lift, describe, self.follow(), self.purge_what_came_before()) };
        tokio::select! { () = self.stop.cancelled() => {}, _ = all => {} }
    }
}

fn failed(why: String) -> Answering {
    Box::pin(std::future::ready(Err(TransportError::Unreachable(why))))
}

//! openraft's state machine over `apply` and one state store.
//!
//! Owns the order: entries are applied one batch at a time, each batch is written whole with the
//! position that it reaches, and only then visible to reads and answered. What an entry does is
//! `apply`'s business, what is durable is the store's.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use coracle_storage::exec::Exec;
use coracle_storage::fs::Fs;
use coracle_storage::state::{Engines, FilterState, OpenState, ReplicaState, checkpoint};
use coracle_storage::{Mutant, ReplicaId};
use futures_util::{FutureExt, Stream, StreamExt};
use openraft::storage::{ApplyResponder, EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::{BIRTH, Child};
use crate::birth::{Birth, Births, MergeStep, SplitStep};
use crate::command::AbsorbShard;
use crate::observer::{Observer, Stage};
use crate::snapshot::{CHECKPOINT_FRESH, CheckpointDir, SnapshotData, blocking};
use crate::types::{
    Entry, LogId, Membership, Replies, ShardId, SnapshotMeta, StoredMembership, TypeConfig, log_id,
};

type Responder = ApplyResponder<TypeConfig>;

/// Bytes of entries that one batch applies: bounds the memory of a batch and the time for which
/// reads wait for it.
const BATCH_BYTES_MAX: usize = 4 << 20;
/// Dead keys that one flush removes: a few milliseconds of work; the rest waits for the next one.
const SWEEP_KEYS_MAX: usize = 4_096;
mod shared;

pub use shared::ReadState;
use shared::{Busy, Current, Prepared, Wait};
pub(crate) use shared::{SharedState, applied_bytes};

/// One replica's state machine.
pub struct StateMachine {
    parts: Parts,
    fs: Arc<dyn Fs>,
    /// Numbers this replica's checkpoints.
    checkpoints: u64,
    /// Whoever sends it keeps it for a while (`Snapshots::kept`): else it would hold files that the
    /// store has long replaced.
    pub(crate) recent: Option<(Instant, SnapshotMeta, Weak<CheckpointDir>)>,
}

/// What a state machine is made of.
pub(crate) struct Parts {
    pub(crate) shared: SharedState,
    pub(crate) exec: Arc<dyn Exec>,
    pub(crate) engines: Arc<dyn Engines>,
    pub(crate) live: PathBuf,
    pub(crate) starting: Arc<Starting>,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) replica: ReplicaId,
    pub(crate) births: Arc<Births>,
    /// Ends with the group.
    pub(crate) stop: CancellationToken,
}

/// What a state machine and whoever starts it tell each other.
#[derive(Default)]
pub(crate) struct Starting {
    /// openraft has looked at what is there; before, nobody sends.
    ended: AtomicBool,
    /// An entry was met that waits for another group, and was not applied.
    put_off: AtomicBool,
}

impl Starting {
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn put_off(&self) {
        self.put_off.store(true, Ordering::Release);
    }

    pub(crate) fn has_put_off(&self) -> bool {
        self.put_off.load(Ordering::Acquire)
    }
}

impl StateMachine {
    pub(crate) fn new(parts: Parts) -> Self {
        Self { fs: parts.engines.fs(), parts, checkpoints: 0, recent: None }
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &SharedState {
        &self.parts.shared
    }

    fn meta(&self) -> SnapshotMeta {
        let current = self.parts.shared.0.current.read();
        SnapshotMeta {
            last_log_id: current.last_applied,
            last_membership: (*current.membership).clone(),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        blocking(&*self.parts.exec, job).await.map_err(io::Error::other)?
    }

    /// A checkpoint of the state as it is. Called between batches, so files and position agree.
    async fn checkpoint(&mut self) -> io::Result<(SnapshotMeta, Arc<CheckpointDir>)> {
        if Mutant::SnapshotBehindIndex.is_in()
            && let Some(dir) = self.recent.as_ref().and_then(|(_, _, dir)| dir.upgrade())
        {
            return Ok((self.meta(), dir));
        }
        if let Some((made, meta, dir)) = &self.recent
            && made.elapsed() < CHECKPOINT_FRESH
            && let Some(dir) = dir.upgrade()
        {
            return Ok((meta.clone(), dir));
        }
        self.recent = None;
        self.checkpoints += 1;
        let mut path = self.parts.live.as_os_str().to_os_string();
        path.push(format!(".checkpoint-{}", self.checkpoints));
        let path = PathBuf::from(path);
        let (store, fs, target) = (self.parts.shared.store()?, self.fs.clone(), path.clone());
        // What a failure leaves of it goes with the handle.
        let dir = Arc::new(CheckpointDir::new(self.fs.clone(), self.parts.exec.clone(), path));
        let meta = self.meta();
        self.run(move || {
            if fs.exists(&target) {
                fs.remove_dir_all(&target)?;
            }
            store.engine().checkpoint(&target).map_err(io::Error::other)
        })
        .await?;
        self.recent = Some((Instant::now(), meta.clone(), Arc::downgrade(&dir)));
        Ok((meta, dir))
    }

    /// Applies entries in order, and answers each as soon as it is.
    async fn apply_all(
        &mut self,
        entries: Vec<Entry>,
        mut responders: VecDeque<Option<Responder>>,
    ) -> io::Result<()> {
        let mut answer = |replies: Vec<Replies>| {
            for replies in replies {
                let responder = responders.pop_front().expect("one for each entry");
                if let Some(responder) = responder {
                    responder.send(replies);
                }
            }
        };
        let (entries, mut applied) = (Arc::new(entries), 0);
        while applied < entries.len() {
            let (shared, rest) = (self.parts.shared.clone(), entries.clone());
            let apply = move || shared.apply_batch(&rest[applied..]);
            let (replies, waiting) = self.run(apply).await?;
            applied += replies.len();
            answer(replies);
            if let Some(prepared) = waiting {
                let replies = self.reshape(prepared, &entries[applied]).await?;
                applied += replies.len();
                answer(replies);
            }
        }
        Ok(())
    }

    /// Sees to what the batch of an entry waits for, and writes it.
    async fn reshape(&mut self, mut prepared: Prepared, entry: &Entry) -> io::Result<Vec<Replies>> {
        match prepared.wait.take() {
            Some(Wait::Child(child)) => {
                let _busy = Busy::new(&self.parts.shared);
                self.split(prepared, *child).await
            }
            Some(Wait::Neighbour(plan)) => {
                drop(prepared);
                if !self.parts.starting.has_ended() {
                    self.parts.starting.put_off();
                    return Err(io::Error::other(
                        "what waits for a neighbour is not applied at start",
                    ));
                }
                let _busy = Busy::new(&self.parts.shared);
                self.absorb(&plan, entry.clone()).await
            }
            Some(Wait::Seal) | None => {
                let shared = self.parts.shared.clone();
                let replies = self.run(move || shared.commit(prepared)).await?;
                self.parts.births.reach(self.parts.replica, MergeStep::Frozen).await;
                let shared = self.parts.shared.clone();
                self.run(move || shared.seal()).await?;
                self.parts.births.reach(self.parts.replica, MergeStep::Sealed).await;
                Ok(replies)
            }
        }
    }

    /// Takes a frozen neighbour in. Its keys come first: until the batch that makes them this group's is
    /// durable, nothing here counts them as its own, so compaction is held back, and a crash takes all of
    /// it again from the neighbour, which stays until every replica has it.
    async fn absorb(&mut self, plan: &AbsorbShard, entry: Entry) -> io::Result<Vec<Replies>> {
        // Nobody is sent what is from before: who takes it would come to this entry by the log.
        self.recent = None;
        let (births, own) = (&self.parts.births, self.parts.replica);
        let other = plan.replicas.get(&own.0).copied().map(ReplicaId).ok_or_else(|| {
            io::Error::other("this replica is no member of the group that takes another in")
        })?;
        let sealed = tokio::select! {
            // The neighbour may never come: nobody else would end this.
            () = self.parts.stop.cancelled() => return Err(io::Error::other("the replica is stopped")),
            sealed = births.sealed(ShardId(plan.other.shard), other, plan.merge) => sealed,
        };
        let sealed = Arc::new(sealed.map_err(io::Error::other)?);
        births.reach(own, MergeStep::Found).await;
        if self.parts.shared.merge_status().foreign_free.is_none() {
            // An older key of the neighbour's arc, of before a split, would be found again.
            let shared = self.parts.shared.clone();
            if !self.run(move || shared.drop_foreign()).await? {
                return Err(io::Error::other("keys outside the arc could not be dropped"));
            }
        }
        births.reach(own, MergeStep::Tidied).await;
        let (shared, from, ingested) = (self.parts.shared.clone(), sealed.clone(), plan.clone());
        let ingest = move || {
            shared.hold_compaction(true)?;
            shared.ingest(&from, &ingested)
        };
        self.run(ingest).await?;
        births.reach(own, MergeStep::Ingested).await;
        let shared = self.parts.shared.clone();
        let replies = self.run(move || shared.absorb(&entry, &sealed)).await?;
        births.reach(own, MergeStep::Absorbed).await;
        let shared = self.parts.shared.clone();
        let flush = move || {
            shared.seal()?;
            shared.hold_compaction(false)
        };
        self.run(flush).await?;
        births.reach(own, MergeStep::Flushed).await;
        Ok(replies)
    }

    /// Writes the batch of a split, once the child of this replica is there.
    async fn split(&self, prepared: Prepared, child: Child) -> io::Result<Vec<Replies>> {
        let (births, own) = (self.parts.births.clone(), self.parts.replica);
        births.reach(own, SplitStep::Judged).await;
        // One that is not a member any more has no child: none of its peers knows of one.
        let start = match child.replicas.get(&own.0) {
            Some(replica) => {
                let descriptor = child.state.descriptor.clone().expect("a child is described");
                let birth = Birth {
                    descriptor,
                    replica: ReplicaId(*replica),
                    membership: child_membership(&prepared.membership, &child.replicas)?,
                    state: child.state,
                    of: own,
                    store: prepared.store.clone(),
                };
                births.bear(birth).await.map_err(io::Error::other)?
            }
            None => None,
        };
        let shared = self.parts.shared.clone();
        let replies = self.run(move || shared.commit(prepared)).await;
        if replies.is_ok() {
            births.reach(own, SplitStep::Applied).await;
        }
        // Also where the parent is going away, and could not write its batch: the child is there, durably.
        if let Some(start) = start {
            start();
        }
        replies
    }

    /// Closes the live store, which takes until the last read has let go of it.
    async fn close_store(&self) {
        let store = self.parts.shared.0.current.write().store.take();
        let Some(store) = store else { return };
        let open = store.engine().open_marker();
        // The node stops where this is not done: then nobody waits for it either.
        let _ = blocking(&*self.parts.exec, move || store.engine().end_compactions()).await;
        // Those who still hold it are looks and flushes, which end.
        while open.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = DurableBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let current = self.parts.shared.0.current.read();
        Ok((current.last_applied, (*current.membership).clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut entries = entries.fuse();
        while let Some(first) = entries.next().await {
            let (entry, responder) = first?;
            let mut bytes = entry_bytes(&entry);
            let (mut batch, mut responders) = (vec![entry], VecDeque::from([responder]));
            while bytes < BATCH_BYTES_MAX
                && let Some(Some(next)) = entries.next().now_or_never()
            {
                let (entry, responder) = next?;
                bytes += entry_bytes(&entry);
                batch.push(entry);
                responders.push_back(responder);
            }
            if Mutant::AppliesOutOfOrder.is_in()
                && let [first, second, ..] = &mut batch[..]
            {
                std::mem::swap(&mut first.payload, &mut second.payload);
            }
            let began = Instant::now();
            self.apply_all(batch, responders).await?;
            self.parts.observer.stage(Stage::Apply, began.elapsed());
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<DurableBuilder> {
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> DurableBuilder {
        // All is taken here, between batches; what is flushed later holds at least it.
        let filter = self.parts.shared.0.current.read().filter();
        let (shared, exec) = (self.parts.shared.clone(), self.parts.exec.clone());
        // Senders keep their own handle; this one would pin what compaction wants to drop, and be
        // sent again although the log is about to be purged beyond it.
        self.recent = None;
        DurableBuilder { meta: self.meta(), filter, store: shared.store(), exec }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let SnapshotData::Received(received) = &snapshot else {
            return Err(io::Error::other("only a received snapshot is installed"));
        };
        self.recent = None;
        self.close_store().await;
        let (engines, fs, live) =
            (self.parts.engines.clone(), self.fs.clone(), self.parts.live.clone());
        let (received, named) = (received.clone(), meta.last_log_id);
        let open = move || {
            checkpoint::swap_in(&*fs, &received.path, &live).map_err(io::Error::other)?;
            let store = ReplicaState::open(&*engines, &live, OpenState { create: false });
            let current = Current::load(store.map_err(io::Error::other)?)?;
            assert_eq!(
                current.last_applied, named,
                "a snapshot's files hold exactly the state of the position that it names"
            );
            Ok(current)
        };
        let shared = self.parts.shared.clone();
        self.run(move || shared.swap(open)).await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<openraft::alias::SnapshotOf<TypeConfig, SnapshotData>>, io::Error> {
        if self.meta().last_log_id.is_none() {
            return Ok(None);
        }
        if !self.parts.starting.has_ended() {
            // openraft asks at start, only for the position, and may purge up to it. It has just
            // applied committed entries again: only a flush makes them durable.
            let store = self.parts.shared.store()?;
            self.run(move || store.flush().map(drop).map_err(io::Error::other)).await?;
            let (meta, snapshot) = (self.meta(), SnapshotData::Durable);
            return Ok(Some(openraft::Snapshot { meta, snapshot }));
        }
        let (meta, snapshot) = match self.checkpoint().await {
            Ok((meta, dir)) => (meta, SnapshotData::Checkpoint(dir)),
            Err(error) => {
                // An error would end the group, for the sake of a follower. Without files nothing is
                // sent, and the follower's leader asks again.
                tracing::warn!(%error, live = %self.parts.live.display(), "a checkpoint was not made");
                (self.meta(), SnapshotData::Durable)
            }
        };
        Ok(Some(openraft::Snapshot { meta, snapshot }))
    }
}

/// The child's members: those of the parent, on the same nodes, under their own ids.
fn child_membership(
    parent: &StoredMembership,
    replicas: &BTreeMap<u64, u64>,
) -> io::Result<StoredMembership> {
    let membership = parent.membership();
    let child = |id: &u64| *replicas.get(id).expect("a split names a child for every member");
    let voters = membership.voter_ids().map(|id| child(&id)).collect();
    let nodes = membership.nodes().map(|(id, place)| (child(id), *place));
    let members = Membership::new(vec![voters], nodes.collect::<BTreeMap<_, _>>());
    Ok(StoredMembership::new(Some(log_id(BIRTH)), members.map_err(io::Error::other)?))
}

fn entry_bytes(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(proposal) => proposal.0.len(),
        _ => 64,
    }
}

/// Makes the state durable up to a position, so that the log may be purged to there, and lets
/// compaction drop what that state no longer needs.
pub struct DurableBuilder {
    meta: SnapshotMeta,
    filter: FilterState,
    /// Taken in the state machine's turn: a swap that comes later waits for it.
    store: io::Result<ReplicaState>,
    exec: Arc<dyn Exec>,
}

impl RaftSnapshotBuilder<TypeConfig> for DurableBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(
        &mut self,
    ) -> Result<openraft::alias::SnapshotOf<TypeConfig, SnapshotData>, io::Error> {
        let closed = || Err(io::Error::other("the snapshot was built before"));
        let store = std::mem::replace(&mut self.store, closed())?;
        let filter = self.filter.clone();
        let flushed = blocking(&*self.exec, move || flush(&store, filter));
        flushed.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        let (meta, snapshot) = (self.meta.clone(), SnapshotData::Durable);
        Ok(openraft::Snapshot { meta, snapshot })
    }
}

/// Makes the state durable, lets compaction go by `filter`, which was taken before, and removes what
/// it could not.
fn flush(store: &ReplicaState, filter: FilterState) -> Result<u64, coracle_storage::Error> {
    if !Mutant::PurgesBeyondFlush.is_in() {
        store.flush()?;
    }
    // Only what is durable may decide what is dropped: a crash that replays must judge every
    // condition as before.
    store.filter().set(filter);
    store.sweep(SWEEP_KEYS_MAX)
}

/// Where a replica's store stands in the data directory.
pub(crate) fn store_dir(shards: &Path, replica: u64) -> PathBuf {
    shards.join(format!("{replica:016x}"))
}

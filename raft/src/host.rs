//! All groups of a node: which there are, their common resources, and the node-wide duties.
//!
//! Owns creating, opening, stopping and destroying replicas, the disk's health, and the purging of
//! the shared log. Does not know why a replica is created: that is placement's business.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use coracle_storage::exec::Exec;
use coracle_storage::log::{Done, Log, LogStats};
use coracle_storage::state::{Engines, OpenState, ReplicaState};
use coracle_storage::{Error, ReplicaId};
use parking_lot::{Mutex, RwLock};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::birth::Failpoint;
use crate::clock::{Circumstances, Clock};
use crate::descriptor::Descriptor;
use crate::environment::Environment;
use crate::error::GroupError;
use crate::group::{Group, Reclaimed, Start};
use crate::health::{Disk, PROBE_INTERVAL, Probe};
use crate::leadership::Standing;
use crate::lease::Timing;
use crate::observer::Observer;
use crate::snapshot::blocking;
use crate::state_machine::{SharedState, store_dir};
use crate::transport::{Answering, Transport, TransportError};
use crate::turns::Turns;
use crate::types::{NodeId, ShardId};

mod birth;
mod log_budget;
mod opening;
mod removal;
mod tidy;

use log_budget::Fill;
pub use log_budget::LogBudget;
use opening::{home_bytes, never_took_part, write_home};
use removal::Destroying;

/// How often the shared log's size is looked at.
const COMPACT_INTERVAL: Duration = Duration::from_secs(1);
/// Between two flushes of one replica that free the log.
const FLUSH_PAUSE: Duration = Duration::from_secs(5);
/// A replica with unflushed state is flushed at least this often: a crash then replays no more than
/// this, and versions beyond the history are reclaimed soon after.
const FLUSH_INTERVAL: Duration = Duration::from_secs(300);
/// When to come back while another replica's store is being rewritten.
const RECLAIM_RETRY: Duration = Duration::from_secs(5);

/// What a node hands to its host.
pub struct Options {
    /// The directory that holds one store per replica.
    pub shards: PathBuf,
    /// Times of consensus, the same on all nodes.
    pub timing: Timing,
    /// The node's shared log.
    pub log: Log,
    /// What the shared log may take before the oldest unflushed replica is flushed.
    pub log_budget: LogBudget,
    /// Opens stores.
    pub engines: Arc<dyn Engines>,
    /// Where work runs.
    pub exec: Arc<dyn Exec>,
    /// Source of stamps.
    pub clock: Arc<dyn Clock>,
    /// The way to other nodes.
    pub transport: Arc<dyn Transport>,
    /// Hears where time goes.
    pub observer: Arc<dyn Observer>,
    /// Seeds the numbers of streams and transfers; different at every start of a node.
    pub incarnation: u64,
    /// Ends everything when cancelled.
    pub stop: CancellationToken,
    /// Called when the disk hangs for good.
    pub on_hang: Arc<dyn Fn() + Send + Sync>,
}

/// What is created and destroyed in turn. Whoever takes both turns takes the shard's first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Shard(ShardId),
    Replica(ReplicaId),
}

/// How a replica is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// It runs, or is about to.
    Runs,
    /// It is there and does not run: its log or its state is damaged, or it has stopped by itself.
    Damaged,
    /// It is not there: never made, or destroyed.
    Absent,
}

/// All groups of a node.
pub struct Host {
    environment: Arc<Environment>,
    shards: PathBuf,
    log_budget: LogBudget,
    groups: RwLock<BTreeMap<ShardId, Arc<Group>>>,
    /// One creation or destruction at a time, of one shard and of one replica: one that takes long
    /// holds up no other shard's.
    turns: Turns<Key>,
    destroying: Destroying,
    on_hang: Arc<dyn Fn() + Send + Sync>,
    /// Replicas that did not open, and why.
    failed: Mutex<Vec<(ReplicaId, String)>>,
    /// See [`Host::reclaim`].
    reclaiming: Arc<tokio::sync::Mutex<()>>,
}

impl Host {
    /// Bytes of snapshots that were sent to other nodes and taken there, since the node started.
    pub fn snapshot_bytes_sent(&self) -> u64 {
        self.environment.slots.sent_bytes.load(Ordering::Relaxed)
    }

    /// A host without groups, and its duties running.
    pub fn new(options: Options) -> Arc<Self> {
        let environment = Arc::new(Environment {
            timing: options.timing,
            log: options.log,
            engines: options.engines,
            exec: options.exec,
            clock: options.clock,
            transport: options.transport,
            observer: options.observer,
            slots: Arc::default(),
            stop: options.stop,
            healthy: AtomicBool::new(true),
            numbers: AtomicU64::new(options.incarnation << 16),
            births: Arc::default(),
        });
        let host = Arc::new(Self {
            environment,
            shards: options.shards,
            log_budget: options.log_budget,
            groups: RwLock::default(),
            turns: Turns::default(),
            destroying: Destroying::default(),
            on_hang: options.on_hang,
            failed: Mutex::default(),
            reclaiming: Arc::default(),
        });
        let nursery: Weak<Self> = Arc::downgrade(&host);
        host.environment.births.set_nursery(nursery);
        let exec = host.environment.exec.clone();
        exec.spawn("health", Box::pin(host.clone().watch_health()));
        exec.spawn("compact", Box::pin(host.clone().bound_log()));
        exec.spawn("tidy", Box::pin(host.clone().tidy()));
        exec.spawn("growth", Box::pin(host.clone().sample_growth()));
        host
    }

    /// Creates a replica on this node, or finds the one that is there. Durable when it returns. Goes
    /// on when the caller gives up waiting: half a creation would block the shard.
    pub async fn create(
        self: &Arc<Self>,
        replica: ReplicaId,
        initial: Descriptor,
    ) -> Result<Arc<Group>, Error> {
        let (answer, created) = oneshot::channel();
        let host = self.clone();
        let create = async move {
            let _ = answer.send(host.create_whole(replica, initial).await);
        };
        self.environment.exec.spawn("create", Box::pin(create));
        created.await.unwrap_or_else(|_| Err(Error::invalid("the node is stopping")))
    }

    async fn create_whole(
        &self,
        replica: ReplicaId,
        initial: Descriptor,
    ) -> Result<Arc<Group>, Error> {
        let shard = ShardId(initial.shard);
        let _shard = self.turns.take(Key::Shard(shard)).await;
        let _replica = self.turns.take(Key::Replica(replica)).await;
        if let Some(group) = self.group(shard) {
            if group.replica() == replica {
                return Ok(group);
            }
            return Err(Error::invalid(format!(
                "{shard} has replica {} on this node already",
                group.replica().0
            )));
        }
        if let Some(parent) = self.holder_of(&initial) {
            return Err(Error::invalid(format!(
                "{parent} still holds keys of {shard} on this node: it has to pass the split first, and brings \
                 this replica along"
            )));
        }
        // What did not open is not made anew: its log, or its state, is still here.
        if self.is_kept(replica) {
            let why = format!("replica {} of {shard} is here, and does not run", replica.0);
            return Err(Error::invalid(why));
        }
        match self.environment.log.state(replica) {
            Err(Error::UnknownReplica(_)) => {
                if self.environment.log.was_destroyed(replica)? {
                    let why = format!("replica {} of {shard} was destroyed here", replica.0);
                    return Err(Error::invalid(why));
                }
            }
            Err(error) => return Err(error),
            Ok(_) => {
                let why = format!("replica {} of {shard} is here, and does not run", replica.0);
                return Err(Error::invalid(why));
            }
        }
        let live = store_dir(&self.shards, replica.0);
        let (engines, dir, home) =
            (self.environment.engines.clone(), live.clone(), initial.clone());
        let made = blocking(&*self.environment.exec, move || {
            if !never_took_part(&*engines, &dir) {
                let why = format!("{}: the log has lost the replica of this state", dir.display());
                return Err(Error::invalid(why));
            }
            engines.destroy(&dir)?;
            let store = ReplicaState::open(&*engines, &dir, OpenState { create: true })?;
            write_home(&store, &home)?;
            SharedState::open(store).map_err(|error| Error::io(&dir, error))
        });
        let state = made.await.map_err(Error::invalid)??;
        // The store first: a crash in between leaves a directory that the log does not know.
        let (done, created) = oneshot::channel();
        self.environment.log.create(replica, told(done));
        ended(created.await)?;
        self.start(replica, live, state, initial, false).await
    }

    /// The group on this node, of another shard, that holds a part of an arc. An empty replica of a child
    /// beside a parent that has not passed the split would keep the parent from bringing the child
    /// along: what the parent then drops would be left to those who made it themselves.
    fn holder_of(&self, initial: &Descriptor) -> Option<ShardId> {
        let overlaps = |group: &&Arc<Group>| {
            group
                .descriptor()
                .is_some_and(|held| held.shard != initial.shard && held.overlaps(initial))
        };
        self.groups().iter().find(overlaps).map(|group| group.shard())
    }

    async fn start(
        &self,
        replica: ReplicaId,
        live: PathBuf,
        state: SharedState,
        initial: Descriptor,
        restarted: bool,
    ) -> Result<Arc<Group>, Error> {
        let shard = ShardId(initial.shard);
        if let Some(other) = self.group(shard) {
            let other = other.replica().0;
            return Err(Error::invalid(format!("replica {other} of {shard} runs already")));
        }
        let start = Start { shard, replica, live, state, initial, restarted };
        let group = Group::start(start, self.environment.clone()).await?;
        let stopping = {
            let mut groups = self.groups.write();
            let stopping = self.environment.stop.is_cancelled();
            if !stopping {
                let before = groups.insert(shard, group.clone());
                assert!(before.is_none(), "a node holds at most one replica of a shard");
            }
            stopping
        };
        if stopping {
            // Whoever stops the node's groups has passed: nobody else would stop this one.
            group.shutdown().await;
            return Err(Error::invalid("the node is stopping"));
        }
        Ok(group)
    }

    /// The group of a shard, where this node holds a replica.
    pub fn group(&self, shard: ShardId) -> Option<Arc<Group>> {
        self.groups.read().get(&shard).cloned()
    }

    /// Replicas that are on this node and do not run, and why.
    pub fn failed(&self) -> Vec<String> {
        let stopped = self.groups().into_iter().filter_map(|group| {
            Some(format!("replica {}: {}", group.replica().0, group.status().failed?))
        });
        let failed: Vec<String> = self.failed.lock().iter().map(|(_, why)| why.clone()).collect();
        failed.into_iter().chain(stopped).collect()
    }

    /// Has a test's hook told of every step of a split on this node.
    #[doc(hidden)]
    pub fn set_failpoint(&self, failpoint: Option<Failpoint>) {
        self.environment.births.set_failpoint(failpoint);
    }

    /// Whether a replica did not open, and is left for whoever has to look.
    fn is_kept(&self, replica: ReplicaId) -> bool {
        self.failed.lock().iter().any(|(failed, _)| *failed == replica)
    }

    /// How a replica of this node is, as far as the node knows.
    pub fn condition(&self, replica: ReplicaId) -> Condition {
        let running = self.groups().into_iter().find(|group| group.replica() == replica);
        match running {
            Some(group) if group.status().failed.is_some() => return Condition::Damaged,
            Some(_) => return Condition::Runs,
            None => {}
        }
        if self.is_kept(replica) {
            return Condition::Damaged;
        }
        match self.environment.log.state(replica) {
            Err(Error::UnknownReplica(_)) => Condition::Absent,
            Err(Error::Recovering { .. }) => Condition::Damaged,
            // It is being made, or removed, or the node ends.
            Ok(_) | Err(_) => Condition::Runs,
        }
    }

    /// Figures of the node's shared log.
    pub fn log_stats(&self) -> LogStats {
        self.environment.log.stats()
    }

    /// All groups, by shard.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.groups.read().values().cloned().collect()
    }

    /// Whether the log's disk finishes its syncs in time.
    pub fn healthy(&self) -> bool {
        self.environment.healthy()
    }

    /// Takes a question of a peer's replica. The call itself gives it its place in the order.
    pub fn answer(
        &self,
        from: NodeId,
        shard: ShardId,
        to_replica: ReplicaId,
        question: Bytes,
    ) -> Answering {
        match self.group(shard).filter(|group| group.replica() == to_replica) {
            Some(group) => group.answer(from, question),
            None => Box::pin(std::future::ready(Err(TransportError::Unreachable(format!(
                "replica {} of {shard} is not on this node",
                to_replica.0
            ))))),
        }
    }

    /// The connections to a node broke: the groups that it led may campaign sooner.
    pub fn peer_lost(&self, node: NodeId) {
        for group in self.groups() {
            group.peer_lost(node);
        }
    }

    /// Hands over every leadership that can be handed over before `deadline`; returns how many are
    /// left.
    pub async fn hand_over_all(&self, deadline: Instant) -> usize {
        let leading = |group: &Arc<Group>| group.status().state == Standing::Leader;
        let led: Vec<_> = self.groups().into_iter().filter(leading).collect();
        let handed = led.iter().map(|group| group.hand_over(None, deadline));
        let results = futures_util::future::join_all(handed).await;
        results.iter().filter(|result| result.is_err()).count()
    }

    /// See [`Group::reclaim`]. One at a time on a node, since each takes what the disk gives; another
    /// is refused meanwhile.
    pub async fn reclaim(&self, group: Arc<Group>) -> Result<Reclaimed, GroupError> {
        let Ok(turn) = self.reclaiming.clone().try_lock_owned() else {
            return Err(GroupError::Overloaded { retry_after: RECLAIM_RETRY });
        };
        let (answer, done) = oneshot::channel();
        let reclaim = async move {
            let reclaimed = group.reclaim().await;
            // Kept until here, whether anybody waits or not; whoever hears the answer may ask again.
            drop(turn);
            let _ = answer.send(reclaimed);
        };
        self.environment.exec.spawn("reclaim", Box::pin(reclaim));
        done.await.unwrap_or(Err(GroupError::Stopped))
    }

    /// Stops every group. Nothing is flushed: the log holds it all.
    pub async fn shutdown(&self) {
        let groups = std::mem::take(&mut *self.groups.write());
        for group in groups.values() {
            group.shutdown().await;
        }
    }

    async fn watch_health(self: Arc<Self>) {
        let mut probe = Probe::new(self.environment.log.clone());
        loop {
            tokio::select! {
                () = self.environment.stop.cancelled() => return,
                () = tokio::time::sleep(PROBE_INTERVAL) => {}
            }
            let disk = probe.tick();
            if disk == Disk::Hung {
                tracing::error!("the log's disk has not finished a sync for 20 s: stopping");
                (self.on_hang)();
                return;
            }
            let well = disk == Disk::Well;
            let changed = self.environment.healthy.swap(well, Ordering::AcqRel) != well;
            if changed {
                tracing::warn!(well, "the log's disk changed");
            }
            // While it stalls again and again: a leadership that could not be handed over at first
            // can be once the follower has caught up. Beside this task, which must see a hang.
            if changed || !well {
                let groups = self.groups();
                let set = async move {
                    for group in groups {
                        group.follow_health().await;
                    }
                };
                self.environment.exec.spawn("set healthy", Box::pin(set));
            }
        }
    }

    /// Lets every leader remember when its log reached which index: what lag is measured by.
    async fn sample_growth(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.environment.stop.cancelled() => return,
                () = tokio::time::sleep(self.environment.timing.heartbeat) => {}
            }
            for group in self.groups() {
                group.sample_growth();
            }
        }
    }

    /// Keeps the shared log within its budget: flushes the replica that holds its oldest unflushed
    /// entries, and lets the log free what is behind them. And flushes every replica now and then, so
    /// that compaction learns what has left the history. One that waits for another group is passed by.
    async fn bound_log(self: Arc<Self>) {
        // When, and which segment was the oldest that it kept then.
        let mut flushed: BTreeMap<ReplicaId, (Instant, u64)> = BTreeMap::new();
        loop {
            tokio::select! {
                () = self.environment.stop.cancelled() => return,
                () = tokio::time::sleep(COMPACT_INTERVAL) => {}
            }
            let groups = self.groups();
            for group in &groups {
                group.check_store();
                group.forget_idle_transfer();
                group.fade_load();
            }
            let kept = self.log_budget.kept(groups.len());
            // One at a time: what its purge frees is seen at the next look.
            for pin in self.environment.log.pinners() {
                let fill = self.log_budget.fill(&self.environment.log.stats());
                if fill == Fill::Within {
                    break;
                }
                let oldest = pin.replica;
                let lately = flushed.get(&oldest).filter(|(at, _)| at.elapsed() < FLUSH_PAUSE);
                match lately {
                    // It had nothing to give: what it keeps is all there is. The next one may have.
                    Some((_, segment)) if *segment == pin.oldest_segment => continue,
                    Some(_) => break,
                    None => {}
                }
                let Some(group) = groups.iter().find(|group| group.replica() == oldest) else {
                    tracing::error!(
                        replica = oldest.0,
                        "a replica that does not run holds the log"
                    );
                    flushed.insert(oldest, (Instant::now(), pin.oldest_segment));
                    continue;
                };
                if group.is_busy() {
                    continue;
                }
                flushed.insert(oldest, (Instant::now(), pin.oldest_segment));
                flush(group, if fill == Fill::FarOver { 0 } else { kept }).await;
                break;
            }
            // One a second, so that they do not all write at once.
            let due = |group: &&Arc<Group>| {
                let last = flushed.get(&group.replica());
                group.unflushed_bytes() > 0
                    && !group.is_busy()
                    && last.is_none_or(|(last, _)| last.elapsed() > FLUSH_INTERVAL)
            };
            if let Some(group) = groups.iter().find(due) {
                flushed.insert(group.replica(), (Instant::now(), 0));
                flush(group, kept).await;
            }
            flushed.retain(|_, (at, _)| at.elapsed() <= FLUSH_INTERVAL);
        }
    }
}

/// Tells whoever waits for the log.
fn told(done: oneshot::Sender<Result<(), Arc<Error>>>) -> Done {
    // Whoever gave up waiting wants to know no more.
    Box::new(move |result| drop(done.send(result)))
}

fn ended(result: Result<Result<(), Arc<Error>>, oneshot::error::RecvError>) -> Result<(), Error> {
    match result {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::invalid(error.to_string())),
        Err(_) => Err(Error::invalid("the log's writer has stopped")),
    }
}

async fn flush(group: &Group, keep: u64) {
    tracing::debug!(shard = %group.shard(), keep, "flushing the state, to free the log");
    if let Err(error) = group.compact(keep).await {
        tracing::warn!(shard = %group.shard(), %error, "a flush to free the log failed");
    }
}

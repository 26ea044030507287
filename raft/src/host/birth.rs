//! How the child of a split comes to be on this node: a checkpoint of its parent with other records, then a
//! name, then a place in the log.
//!
//! Owns these steps and their order (`SplitStep`). A crash before the log knows the child leaves a
//! directory that the next start removes, and the parent, whose own batch is not written yet, makes it
//! anew; from then on the child is there, and a split that is applied again leaves it alone. One that was
//! destroyed meanwhile is remembered by its id, and stays so.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_storage::state::{MetaName, OpenState, ReplicaState, key};
use coracle_storage::{Error, Mutant, ReplicaId};
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use super::opening::HOME;
use super::{Condition, Host, Key, ended, home_bytes, never_took_part, told};
use crate::apply::{BIRTH, GroupState};
use crate::birth::{Birth, Nursery, Sealed, SplitStep, Start};
use crate::descriptor::Descriptor;
use crate::entry::encode_stored_membership;
use crate::group::Group;
use crate::snapshot::blocking;
use crate::state_machine::{SharedState, applied_bytes, store_dir};
use crate::turns::Turn;
use crate::types::{ShardId, StoredMembership, id_bytes, log_id};

/// How long the parent's leader tries to have its child lead on the same node: the other replicas apply
/// the split a heartbeat later. Then the child's own timeouts decide.
const CAMPAIGN_MAX: Duration = Duration::from_secs(3);
/// Between two tries.
const CAMPAIGN_PAUSE: Duration = Duration::from_millis(25);

/// A child that is there and does not run yet. Holds its turns: nobody makes, opens or removes it
/// meanwhile.
struct Newborn {
    replica: ReplicaId,
    of: ReplicaId,
    descriptor: Descriptor,
    live: PathBuf,
    _turns: [Turn; 2],
}

impl Nursery for Host {
    fn bear(self: Arc<Self>, birth: Birth) -> BoxFuture<'static, Result<Option<Start>, Error>> {
        Box::pin(async move {
            let born = self.bear_once(birth).await?;
            Ok(born.map(|newborn| -> Start {
                let exec = self.environment.exec.clone();
                Box::new(move || {
                    exec.spawn("birth", Box::pin(async move { self.start_child(newborn).await }))
                })
            }))
        })
    }

    fn sealed(
        self: Arc<Self>,
        shard: ShardId,
        replica: ReplicaId,
        merge: u64,
    ) -> BoxFuture<'static, Result<Sealed, Error>> {
        Box::pin(async move { self.sealed_here(shard, replica, merge).await })
    }
}

/// How often a neighbour is looked at that is not frozen here yet.
const SEALED_POLL: Duration = Duration::from_millis(5);

impl Host {
    async fn sealed_here(
        &self,
        shard: ShardId,
        replica: ReplicaId,
        merge: u64,
    ) -> Result<Sealed, Error> {
        loop {
            let group = self.group(shard).filter(|group| group.replica() == replica);
            if let Some(sealed) = group.as_ref().and_then(|group| group.sealed(merge)) {
                return Ok(sealed);
            }
            // Being opened, or still applying what comes before the freeze: it does not take long. Not
            // there, or broken: this replica cannot go on, and is made anew elsewhere.
            if self.condition(replica) != Condition::Runs {
                let why = format!("replica {} of {shard}, to be taken in, is not here", replica.0);
                return Err(Error::invalid(why));
            }
            tokio::select! {
                () = self.environment.stop.cancelled() => {
                    return Err(Error::invalid("the node is stopping"));
                }
                () = tokio::time::sleep(SEALED_POLL) => {}
            }
        }
    }

    async fn bear_once(&self, birth: Birth) -> Result<Option<Newborn>, Error> {
        let Birth { descriptor, replica, of, .. } = &birth;
        let (replica, of, shard) = (*replica, *of, ShardId(descriptor.shard));
        let turns = [
            self.turns.take(Key::Shard(shard)).await,
            self.turns.take(Key::Replica(replica)).await,
        ];
        if let Some(running) = self.group(shard) {
            // A plan that names a shard for the second time would leave the arc to nobody.
            let start = |held: &Descriptor| held.arc.map(|(start, _)| start);
            let held = running.descriptor();
            if held.as_ref().is_some_and(|held| start(held) != start(descriptor)) {
                let why = format!("{shard}, which a split is to make, is here with {held:?}");
                return Err(Error::invalid(why));
            }
        }
        if self.group(shard).is_some() || self.is_or_was_here(replica)? {
            tracing::info!(%shard, replica = replica.0, "a split finds its child, or the trace of it");
            return Ok(None);
        }
        let (live, descriptor) = (store_dir(&self.shards, replica.0), descriptor.clone());
        self.make_store(birth, &live).await?;
        self.environment.births.reach(of, SplitStep::Renamed).await;
        let log = &self.environment.log;
        let (done, created) = oneshot::channel();
        log.create(replica, told(done));
        let (done, purged) = oneshot::channel();
        log.purge(replica, BIRTH.index, id_bytes(&log_id(BIRTH)), told(done));
        ended(created.await)?;
        ended(purged.await)?;
        self.environment.births.reach(of, SplitStep::Created).await;
        Ok(Some(Newborn { replica, of, descriptor, live, _turns: turns }))
    }

    /// Whether the log knows a replica, or remembers that it was destroyed, or has lost it, whose state is kept.
    fn is_or_was_here(&self, replica: ReplicaId) -> Result<bool, Error> {
        if self.is_kept(replica) {
            return Ok(true);
        }
        match self.environment.log.state(replica) {
            Err(Error::UnknownReplica(_)) => self.environment.log.was_destroyed(replica),
            Ok(_) | Err(Error::Recovering { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Makes the child's store in `live`: durable under its name when this returns. Two checkpoints: the
    /// first is the parent's state, and becomes the child's by being opened and written; the second is
    /// closed and whole, as a store must be that gets its name by a rename.
    async fn make_store(&self, birth: Birth, live: &Path) -> Result<(), Error> {
        let Birth { descriptor, state, membership, of, store, .. } = birth;
        let beside = |what: &str| {
            let mut path = live.as_os_str().to_os_string();
            path.push(what);
            PathBuf::from(path)
        };
        let (first, second, live) = (beside(".born-1"), beside(".born-2"), live.to_owned());
        let (engines, to, old) = (self.environment.engines.clone(), first.clone(), live.clone());
        let checkpoint = move || {
            // Of a birth that failed on the way.
            engines.destroy(&to)?;
            if !never_took_part(&*engines, &old) {
                let why = format!("{}: the log has lost the replica of this state", old.display());
                return Err(Error::invalid(why));
            }
            engines.destroy(&old)?;
            store.checkpoint(&to)
        };
        self.off_thread(checkpoint).await?;
        self.environment.births.reach(of, SplitStep::Checkpointed).await;
        let engines = self.environment.engines.clone();
        let (from, to) = (first, second.clone());
        let mut state = state;
        if Mutant::ChildClockGoesBack.is_in() {
            (state.clock, state.ceiling) = (0, 0);
        }
        let rewrite = move || {
            engines.destroy(&to)?;
            let child = ReplicaState::open(&*engines, &from, OpenState { create: false })?;
            write_records(&child, &descriptor, state, &membership)?;
            child.checkpoint(&to)?;
            drop(child);
            engines.destroy(&from)
        };
        self.off_thread(rewrite).await?;
        self.environment.births.reach(of, SplitStep::Rewritten).await;
        let engines = self.environment.engines.clone();
        let rename = move || {
            let fs = engines.fs();
            let parent = live.parent().ok_or_else(|| Error::invalid("a store has a parent"))?;
            let renamed = fs.rename(&second, &live).and_then(|()| fs.sync_dir(parent));
            renamed.map_err(|error| Error::io(&live, error))
        };
        self.off_thread(rename).await
    }

    async fn off_thread(
        &self,
        job: impl FnOnce() -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        blocking(&*self.environment.exec, job).await.map_err(Error::invalid)?
    }

    async fn start_child(self: Arc<Self>, newborn: Newborn) {
        let Newborn { replica, of, descriptor, live, _turns } = newborn;
        let shard = ShardId(descriptor.shard);
        let (engines, dir) = (self.environment.engines.clone(), live.clone());
        let opened = blocking(&*self.environment.exec, move || {
            let store = ReplicaState::open(&*engines, &dir, OpenState { create: false })?;
            SharedState::open(store).map_err(|error| Error::io(&dir, error))
        });
        let opened = opened.await.map_err(Error::invalid).and_then(|opened| opened);
        let started = match opened {
            Ok(state) => self.start(replica, live, state, descriptor, false).await,
            Err(error) => Err(error),
        };
        match started {
            Ok(child) => {
                self.environment.births.reach(of, SplitStep::Started).await;
                let parent = self.groups().into_iter().find(|group| group.replica() == of);
                let led_here = parent.is_some_and(|parent| parent.leads());
                if led_here {
                    lead_at_once(&child).await;
                }
            }
            Err(error) => self.does_not_run(replica, &format!("{shard}: {error}")),
        }
    }
}

/// Campaigns until somebody leads: all of the child's replicas are equal, and its clients are where the
/// parent's leader is.
async fn lead_at_once(child: &Arc<Group>) {
    let until = tokio::time::Instant::now() + CAMPAIGN_MAX;
    while child.status().leader.is_none() && tokio::time::Instant::now() < until {
        child.campaign().await;
        tokio::time::sleep(CAMPAIGN_PAUSE).await;
    }
}

/// What makes a checkpoint of the parent the child's.
fn write_records(
    store: &ReplicaState,
    descriptor: &Descriptor,
    mut state: GroupState,
    membership: &StoredMembership,
) -> Result<(), Error> {
    let mut overlay = store.overlay();
    overlay.delete_raw(key::meta(MetaName::FOREIGN_FREE));
    state.store_whole(&mut overlay);
    overlay.put_meta(MetaName::APPLIED, applied_bytes(&log_id(BIRTH)));
    overlay.put_meta(MetaName::MEMBERSHIP, encode_stored_membership(membership));
    let home: Bytes = home_bytes(descriptor);
    overlay.put_meta(HOME, home);
    store.write(overlay.into_batch())
}

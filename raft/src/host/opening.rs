//! What a node finds when it starts: which of its replicas run, which do not, and what is removed.
//!
//! Owns how a store says whose it is, and when a directory may go that the log knows nothing of. What is
//! applied on the way is the group's business.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use coracle_storage::log::Recovery;
use coracle_storage::state::{Engines, MetaName, OpenState, ReplicaState, checkpoint};
use coracle_storage::{Error, ReplicaId};

use super::Host;
use crate::apply::BIRTH;
use crate::descriptor::Descriptor;
use crate::snapshot::blocking;
use crate::state_machine::{SharedState, applied_bytes, store_dir};
use crate::types::log_id;
use crate::wire::Reader;

/// The local record of what a replica was created as.
pub(super) const HOME: MetaName = MetaName(0x80);

impl Host {
    /// Starts every replica that the data directory holds whole; none of them waits for another one, as one
    /// may that takes its neighbour in: the others serve meanwhile. What the log knows and the
    /// directory does not (or the reverse) is the trace of a creation or destruction that a crash
    /// cut short: it never took part in anything, and is removed. Once, before any replica is
    /// created or destroyed.
    pub async fn open_all(&self, recovery: &Recovery) -> Result<(), Error> {
        let (engines, shards) = (self.environment.engines.clone(), self.shards.clone());
        let settle = move || {
            let fs = engines.fs();
            let made = fs.create_dir_all(&shards).and_then(|()| match shards.parent() {
                // Else a power cut could take all stores with their directory's name.
                Some(parent) => fs.sync_dir(parent),
                None => Ok(()),
            });
            made.map_err(|error| Error::io(&shards, error))?;
            checkpoint::settle(&*fs, &shards)
        };
        let names = blocking(&*self.environment.exec, settle).await.map_err(Error::invalid)??;
        let damaged: Vec<ReplicaId> = recovery.recovering.iter().map(|d| d.replica).collect();
        // Then it may have lost replicas of which it says nothing.
        let may_have_lost = recovery.lossy || !damaged.is_empty();
        let mut whole = Vec::new();
        let mut missing: BTreeSet<ReplicaId> = recovery.replicas.iter().copied().collect();
        for name in names {
            let id = u64::from_str_radix(&name, 16).map(ReplicaId);
            let Ok(replica) = id else {
                tracing::warn!(name, "not a replica's directory: left alone");
                continue;
            };
            if damaged.contains(&replica) {
                continue;
            }
            if recovery.replicas.contains(&replica) {
                missing.remove(&replica);
                whole.push(replica);
            } else if recovery.destroyed.contains(&replica) {
                let (engines, dir) = (self.environment.engines.clone(), self.shards.join(&name));
                let removed = blocking(&*self.environment.exec, move || engines.destroy(&dir));
                removed.await.map_err(Error::invalid)??;
            } else if may_have_lost {
                self.does_not_run(replica, "its state is here, and the log has lost some replicas");
            } else {
                self.remove_unknown(replica, self.shards.join(&name)).await?;
            }
        }
        // Before any is opened: those that open may ask for one of these.
        for replica in missing {
            self.does_not_run(replica, "its log is here, its state is not");
        }
        // Now that what was cut short is gone: a parent makes its child anew as soon as it runs.
        let opened = whole.into_iter().map(|replica| async move {
            // The node serves its other replicas.
            if let Err(error) = self.open(replica).await {
                self.does_not_run(replica, &error.to_string());
            }
        });
        futures_util::future::join_all(opened).await;
        Ok(())
    }

    pub(super) fn does_not_run(&self, replica: ReplicaId, why: &str) {
        tracing::error!(replica = replica.0, why, "a replica does not run");
        self.failed.lock().push((replica, format!("replica {}: {why}", replica.0)));
    }

    /// A directory that the log does not know: its creation was cut short, and it is removed, unless
    /// something was applied to it, or that cannot be seen. Then the log has lost it: it does not run,
    /// and its state stays for whoever has to look. Only where the log is whole: what a replica has voted and
    /// acknowledged is in its state only once that was flushed.
    async fn remove_unknown(&self, replica: ReplicaId, dir: PathBuf) -> Result<(), Error> {
        let engines = self.environment.engines.clone();
        let removed = blocking(&*self.environment.exec, move || {
            let never_took_part = never_took_part(&*engines, &dir);
            if never_took_part {
                tracing::info!(dir = %dir.display(), "removing a replica whose creation was cut short");
                engines.destroy(&dir)?;
            }
            Ok::<bool, Error>(never_took_part)
        });
        if !removed.await.map_err(Error::invalid)?? {
            self.does_not_run(replica, "its state is here, the log has lost it");
        }
        Ok(())
    }

    async fn open(&self, replica: ReplicaId) -> Result<(), Error> {
        let live = store_dir(&self.shards, replica.0);
        let (engines, dir) = (self.environment.engines.clone(), live.clone());
        let opened = blocking(&*self.environment.exec, move || {
            let store = ReplicaState::open(&*engines, &dir, OpenState { create: false })?;
            let home = read_home(&store, &dir)?;
            let state = SharedState::open(store).map_err(|error| Error::io(&dir, error))?;
            Ok::<_, Error>((home, state))
        });
        let (initial, state) = opened.await.map_err(Error::invalid)??;
        let purged = self.environment.log.state(replica)?.purged.map(|(index, _)| index);
        let applied = state.applied().index;
        if purged.is_some_and(|purged| purged > applied) {
            return Err(Error::invalid(format!(
                "its state stands at {applied}, its log begins behind {purged:?}"
            )));
        }
        self.start(replica, live, state, initial, true).await.map(drop)
    }
}

/// Whether a directory is no store, or one to which nothing was ever applied by itself: a new one, or what a
/// split has made. What cannot be seen may hold something.
pub(super) fn never_took_part(engines: &dyn Engines, dir: &Path) -> bool {
    match ReplicaState::open(engines, dir, OpenState { create: false }) {
        Ok(store) => {
            let applied = store.applied_bytes();
            applied.is_none_or(|applied| applied == applied_bytes(&log_id(BIRTH)))
        }
        Err(Error::Io { source, .. }) => source.kind() == ErrorKind::NotFound,
        Err(_) => false,
    }
}

pub(super) fn write_home(store: &ReplicaState, initial: &Descriptor) -> Result<(), Error> {
    let mut overlay = store.overlay();
    overlay.put_meta(HOME, home_bytes(initial));
    store.write(overlay.into_batch())?;
    store.flush().map(drop)
}

pub(super) fn home_bytes(descriptor: &Descriptor) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(1);
    descriptor.put(&mut bytes);
    bytes.freeze()
}

fn read_home(store: &ReplicaState, dir: &Path) -> Result<Descriptor, Error> {
    let damaged = |why: &str| Error::corruption(dir, 0, why.to_owned());
    let bytes = store.meta(HOME)?;
    let mut bytes = bytes.ok_or_else(|| damaged("the store does not say what it belongs to"))?;
    if bytes.try_get_u8() != Ok(1) {
        return Err(damaged("the record of what the store belongs to has an unknown format"));
    }
    let mut reader = Reader::new(bytes);
    Descriptor::get(&mut reader).map_err(|error| damaged(&error.to_string()))
}

//! Owns the handle on one replica's state: typed access to an engine, what is durable, the sweep of
//! dead keys. Does not apply commands and does not decide when to flush.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::error::Error;
use crate::state::batch::Batch;
use crate::state::engine::{Engine, Engines, OpenState};
use crate::state::filter::{Filter, Verdict};
use crate::state::key::{self, MetaName};
use crate::state::overlay::Overlay;
use crate::state::read::{self, Reader, Versioned};
use crate::state::sample::{self, Sample};

/// The format of keys, values and `Meta` records that this program writes and knows.
const FORMAT: u32 = 1;

/// Versions of one key that a sweep deletes at a time; more are left for the next sweep.
const SWEEP_VERSIONS_MAX: usize = 10_000;

/// The state of one replica. Clones share it.
///
/// Invariants:
/// - what [`ReplicaState::applied_bytes`] returns is durable, together with everything applied up
///   to it;
/// - a batch is written whole or not at all, in the order of the calls.
#[derive(Clone)]
pub struct ReplicaState {
    engine: Arc<dyn Engine>,
    durable_applied: Arc<Mutex<Option<Bytes>>>,
}

impl ReplicaState {
    /// Opens the store in `dir`, and checks that its format is known. The filter drops nothing
    /// until it is set.
    pub fn open(
        engines: &dyn Engines,
        dir: &Path,
        options: OpenState,
    ) -> Result<ReplicaState, Error> {
        let engine = engines.open(dir, options)?;
        check_format(&*engine, dir)?;
        // What is there before the first write has survived: it is durable.
        let applied = engine.get(&key::meta(MetaName::APPLIED))?;
        Ok(ReplicaState { engine, durable_applied: Arc::new(Mutex::new(applied)) })
    }

    /// The engine below.
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// The newest version of a key at or below `version_max`, delete markers and expired values
    /// included: the caller judges. One seek, on the newest state.
    pub fn get_at(
        &self,
        keyspace: u32,
        user_key: &[u8],
        version_max: u64,
    ) -> Result<Option<Versioned>, Error> {
        let prefix = key::data_prefix(keyspace, user_key);
        let first = self.engine.first(&key::data_at(&prefix, version_max), &prefix)?;
        first.map(|(physical, stored)| read::versioned(&physical, &stored)).transpose()
    }

    /// Reads from one consistent view; keep it for one page.
    pub fn reader(&self) -> Result<Reader<'static>, Error> {
        Ok(Reader::new(self.engine.view()?))
    }

    /// A batch to build, and to read through.
    pub fn overlay(&self) -> Overlay {
        Overlay::new(self.engine.clone())
    }

    /// Writes atomically; readable when it returns, durable after the next flush.
    pub fn write(&self, batch: Batch) -> Result<(), Error> {
        self.engine.write(batch)
    }

    /// A `Meta` record of the newest state.
    pub fn meta(&self, name: MetaName) -> Result<Option<Bytes>, Error> {
        self.engine.get(&key::meta(name))
    }

    /// The `APPLIED` record that is durable: as read at open, or before the last flush began. The
    /// log may be purged up to it and not further.
    pub fn applied_bytes(&self) -> Option<Bytes> {
        self.durable_applied.lock().clone()
    }

    /// Makes everything written before durable; returns the `APPLIED` record that is durable from
    /// now on.
    pub fn flush(&self) -> Result<Option<Bytes>, Error> {
        // One flush at a time, else an older one could set the record back.
        let mut durable = self.durable_applied.lock();
        let applied = self.meta(MetaName::APPLIED)?;
        self.engine.flush()?;
        durable.clone_from(&applied);
        Ok(applied)
    }

    /// Makes a checkpoint of everything written before, in a new directory.
    pub fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.flush()?;
        self.engine.checkpoint(dir)
    }

    /// What compaction may drop; set it after a flush, with what the flush made durable.
    pub fn filter(&self) -> &Arc<Filter> {
        self.engine.filter()
    }

    /// See [`Engine::compact`].
    pub fn compact(&self, range: Option<Range<Vec<u8>>>) -> Result<(), Error> {
        self.engine.compact(range)
    }

    /// Looks at about `max` entries of user keys, spread over the store: what it holds, without reading all
    /// of it. What is not flushed may be left out.
    pub fn sample(&self, max: usize) -> Result<Vec<Sample>, Error> {
        sample::sample(&*self.engine, max)
    }

    /// The keyspaces of which the store holds anything, be it dead.
    pub fn keyspaces(&self) -> Result<BTreeSet<u32>, Error> {
        sample::keyspaces(&*self.engine)
    }

    /// Removes up to `keys_max` keys that compactions found dead but could not drop: each with all
    /// of its versions at or below the threshold, in one batch. Returns how many entries were
    /// removed. Runs beside apply: it touches only versions that no write makes any more.
    pub fn sweep(&self, keys_max: usize) -> Result<u64, Error> {
        let filter = self.filter();
        let prefixes = filter.take_dead(keys_max);
        if prefixes.is_empty() {
            return Ok(0);
        }
        let view = self.engine.view()?;
        let mut batch = Batch::new();
        for prefix in prefixes {
            // All versions of the key are seen here, which is what a complete pass asks for.
            let mut pass = filter.pass(true);
            let mut dropped = Vec::new();
            let mut cursor = view.seek(prefix.clone()..key::data_prefix_end(&prefix), false)?;
            while let Some((physical, stored)) = cursor.next()? {
                if pass.judge(&physical, &stored) == Verdict::Drop {
                    dropped.push(physical);
                }
            }
            // A key with too many is cut at the old end: what goes first is what nothing stands on.
            let excess = dropped.len().saturating_sub(SWEEP_VERSIONS_MAX);
            dropped.drain(..excess).for_each(drop);
            dropped.into_iter().for_each(|physical| batch.delete(physical));
        }
        let removed = batch.ops.len() as u64;
        self.engine.write(batch)?;
        Ok(removed)
    }
}

/// The `FORMAT` record names the format of all others. It is written into an empty store only.
fn check_format(engine: &dyn Engine, dir: &Path) -> Result<(), Error> {
    let file = || dir.to_path_buf();
    match engine.get(&key::meta(MetaName::FORMAT))? {
        Some(bytes) => match <[u8; 4]>::try_from(&bytes[..]).map(u32::from_be_bytes) {
            Ok(FORMAT) => Ok(()),
            Ok(found) => Err(Error::Format { file: file(), found, known: FORMAT }),
            Err(_) => {
                Err(Error::corruption(dir, 0, "the store's format record has a wrong length"))
            }
        },
        None => {
            let view = engine.view()?;
            if view.seek(vec![0]..vec![0xff], false)?.next()?.is_some() {
                return Err(Error::corruption(
                    dir,
                    0,
                    "the store holds records, but not which format they have",
                ));
            }
            let mut batch = Batch::new();
            batch.put(key::meta(MetaName::FORMAT), FORMAT.to_be_bytes().to_vec());
            engine.write(batch)?;
            engine.flush()
        }
    }
}

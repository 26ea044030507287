//! Owns what the apply tests apply to: a replica's state in an ordered-map store, and its raw
//! records. Does not judge anything.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use coracle_raft::apply::{ApplyError, GroupState, Reply, apply, state_hash};
use coracle_raft::dedup::Bounds;
use coracle_storage::fs::faulty::FaultyFs;
use coracle_storage::state::{
    Batch, Engine, Engines, FilterState, Kind, MapEngines, OpenState, Overlay,
};

const DIR: &str = "/state";

pub(crate) type Raw = BTreeMap<Bytes, Bytes>;

/// What stands at one position of the group's log.
#[derive(Clone, Debug)]
pub(crate) enum Logged {
    Command(Bytes),
    Membership,
}

/// Term, index, entry.
pub(crate) type Entry = (u64, u64, Logged);

pub(crate) struct Store {
    engines: MapEngines,
    /// The only keeper of what was not flushed.
    engine: Arc<dyn Engine>,
    bounds: Bounds,
}

impl Store {
    pub(crate) fn new(bounds: Bounds) -> Store {
        let engines = MapEngines::new(Arc::new(FaultyFs::new(0)));
        let engine = engines.open(Path::new(DIR), OpenState { create: true });
        Store { engine: engine.expect("an empty disk"), engines, bounds }
    }

    pub(crate) fn flush(&self) {
        self.engine.flush().expect("a healthy disk");
    }

    /// Drops all that compaction may, by what is flushed.
    pub(crate) fn compact(&self) {
        self.flush_and_compact(0..4);
    }

    /// Over all that can be read at the group clock.
    pub(crate) fn hash(&self) -> u64 {
        let overlay = self.overlay();
        let reader = overlay.reader().expect("a healthy disk");
        state_hash(&reader, &self.state(), None).expect("own records")
    }

    /// Makes all durable, and compacts by what the group says of these keyspaces.
    pub(crate) fn flush_and_compact(&self, keyspaces: std::ops::Range<u32>) {
        let state = self.state();
        self.flush();
        let threshold = |keyspace: u32| state.history.threshold(keyspace);
        self.engine.filter().set(FilterState {
            clock: state.clock,
            threshold: threshold(u32::MAX),
            thresholds: keyspaces.map(|keyspace| (keyspace, threshold(keyspace))).collect(),
            ..FilterState::default()
        });
        self.engine.compact(None).expect("a healthy disk");
    }

    /// Loses what was not flushed; `flushed` entries were.
    pub(crate) fn crash_to(self, flushed: usize) -> Store {
        if flushed == 0 { Store::new(self.bounds) } else { self.crash() }
    }

    /// Loses what was not flushed.
    pub(crate) fn crash(self) -> Store {
        drop(self.engine);
        let engine = self.engines.open(Path::new(DIR), OpenState { create: false });
        Store { engine: engine.expect("a healthy disk"), ..self }
    }

    /// Another replica's state, record by record: what a snapshot brings.
    pub(crate) fn from_raw(raw: &Raw, bounds: Bounds) -> Store {
        let store = Store::new(bounds);
        let mut batch = Batch::new();
        raw.iter().for_each(|(key, value)| batch.put(key.clone(), value.clone()));
        store.engine.write(batch).expect("a healthy disk");
        store
    }

    /// Every record there is.
    pub(crate) fn raw(&self) -> Raw {
        let view = self.engine.view().expect("a healthy disk");
        let mut cursor = view.seek(vec![0]..vec![0xff], false).expect("a healthy disk");
        let mut raw = Raw::new();
        while let Some((key, value)) = cursor.next().expect("a healthy disk") {
            raw.insert(key, value);
        }
        raw
    }

    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.raw().keys().filter(|key| key[0] == kind as u8).count()
    }

    pub(crate) fn overlay(&self) -> Overlay {
        Overlay::new(self.engine.clone())
    }

    pub(crate) fn state(&self) -> GroupState {
        let mut state = GroupState::load(&self.overlay()).expect("own records");
        state.dedup.set_bounds(self.bounds);
        state
    }

    /// What a reader at this version finds.
    pub(crate) fn read(&self, keyspace: u32, key: &[u8], version: u64) -> Option<(u64, Bytes)> {
        let found = self.overlay().get_at(keyspace, key, version).expect("own records")?;
        (!found.is_absent_at(version)).then_some((found.version, found.value))
    }

    /// Applies a stretch of the log as one batch; after an error nothing has changed.
    pub(crate) fn apply(&mut self, log: &[Entry]) -> Result<Vec<Reply>, ApplyError> {
        let mut overlay = self.overlay();
        let mut state = self.state();
        let mut replies = Vec::new();
        for (term, index, logged) in log {
            match logged {
                Logged::Command(entry) => {
                    let applied = apply(&mut overlay, &mut state, *term, *index, entry)?;
                    replies.extend(applied.replies);
                }
                Logged::Membership => state.apply_membership(),
            }
        }
        state.store(&mut overlay);
        self.engine.write(overlay.into_batch())?;
        Ok(replies)
    }
}

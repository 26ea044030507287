//! openraft's own suite for log storages and state machines, on ours.
//!
//! Covers what openraft relies on; crashes, order and isolation are the log's own tests.

use std::io;
use std::sync::Arc;

use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::{Fs, OpenMode, RealFs, read_file};
use coracle_storage::log::Log;
use coracle_storage::state::{Engines, MapEngines, OpenState, ReplicaState};
use coracle_storage::{LogOptions, ReplicaId};
use futures_util::Stream;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{OptionalSend, StorageError};
use tokio_util::sync::CancellationToken;

use crate::log_store::LogStore;
use crate::snapshot::{CheckpointDir, SnapshotData};
use crate::state_machine::{Parts, SharedState, Starting, StateMachine};
use crate::types::{LogId, SnapshotMeta, StoredMembership, TypeConfig};

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// Ours, but a built snapshot has files, and they are installed by copying: in production they
/// travel, and building one only makes the state durable.
struct Local {
    machine: StateMachine,
    live: std::path::PathBuf,
    exec: Arc<dyn Exec>,
}

struct Built(Option<Snapshot>);

impl RaftSnapshotBuilder<TypeConfig> for Built {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        self.0.take().ok_or_else(|| io::Error::other("built already"))
    }
}

impl RaftStateMachine<TypeConfig> for Local {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Built;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        self.machine.applied_state().await
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        self.machine.apply(entries).await
    }

    async fn get_snapshot_builder(&mut self) -> Built {
        // The suite wants the state as it is now; a sender is content with one of a moment ago.
        self.machine.recent = None;
        let current = self.machine.get_current_snapshot().await.expect("a checkpoint can be made");
        let nothing =
            || Snapshot { meta: SnapshotMeta::default(), snapshot: SnapshotData::Durable };
        Built(Some(current.unwrap_or_else(nothing)))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let SnapshotData::Checkpoint(from) = snapshot else {
            return Err(io::Error::other("a snapshot without files"));
        };
        let mut incoming = self.live.as_os_str().to_os_string();
        incoming.push(".incoming");
        let incoming = std::path::PathBuf::from(incoming);
        RealFs.create_dir_all(&incoming)?;
        for name in RealFs.read_dir(&from.path)? {
            let bytes = read_file(&RealFs, &from.path.join(&name))?;
            RealFs.open(&incoming.join(&name), OpenMode::CreateNew)?.write_at(&bytes, 0)?;
        }
        let received = CheckpointDir::new(Arc::new(RealFs), self.exec.clone(), incoming);
        self.machine.install_snapshot(meta, SnapshotData::Received(Arc::new(received))).await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        self.machine.get_current_snapshot().await
    }
}

struct Deaf;

impl crate::observer::Observer for Deaf {
    fn stage(&self, _: crate::observer::Stage, _: std::time::Duration) {}

    fn elected(&self) {}
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Local, tempfile::TempDir> for Builder {
    async fn build(
        &self,
    ) -> Result<(tempfile::TempDir, LogStore, Local), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let exec: Arc<dyn Exec> = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 4));
        let fs: Arc<dyn Fs> = Arc::new(RealFs);
        let options = LogOptions::test_min();
        let (log, _) = Log::open(fs.clone(), exec.clone(), &dir.path().join("log"), options)
            .expect("an empty log opens");
        let replica = ReplicaId(1);
        let (sender, created) = tokio::sync::oneshot::channel();
        log.create(
            replica,
            Box::new(move |result| {
                let _ = sender.send(result);
            }),
        );
        created.await.expect("answered").expect("created");
        let engines: Arc<dyn Engines> = Arc::new(MapEngines::new(fs));
        let live = dir.path().join("1");
        let store = ReplicaState::open(&*engines, &live, OpenState { create: true });
        let shared = SharedState::open(store.expect("a new store")).expect("an empty state");
        let starting = Arc::new(Starting::default());
        starting.end();
        let machine = StateMachine::new(Parts {
            shared,
            exec: exec.clone(),
            engines,
            live: live.clone(),
            starting,
            observer: Arc::new(Deaf),
            replica,
            births: Arc::default(),
            stop: CancellationToken::new(),
        });
        Ok((dir, LogStore::new(log, replica, exec.clone()), Local { machine, live, exec }))
    }
}

#[allow(clippy::disallowed_methods, reason = "a test's own runtime")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openraft_suite() {
    Suite::test_all(Builder).await.expect("our storage is one that openraft accepts");
}

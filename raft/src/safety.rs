//! What log, state machine and received snapshots hold, in whatever order openraft asks: each test
//! shows one way in which state could get behind its log, be replaced under somebody's hands, or
//! end a group that only had to wait.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::faulty::{FaultyFs, Loss, Op};
use coracle_storage::fs::{Fs, OpenMode, RealFs};
use coracle_storage::log::Log;
use coracle_storage::state::{
    Engines, Manifest, MapEngines, OpenState, ReplicaState, RocksEngines, StateOptions,
};
use coracle_storage::{LogOptions, ReplicaId};
use futures_util::stream;
use openraft::EntryPayload;
use openraft::storage::{IOFlushed, RaftLogStorage, RaftSnapshotBuilder, RaftStateMachine};
use openraft::type_config::TypeConfigExt;
use tokio_util::sync::CancellationToken;

use crate::log_store::LogStore;
use crate::observer::{Observer, Stage};
use crate::snapshot::{CheckpointDir, SnapshotData, SnapshotSlots, Snapshots};
use crate::state_machine::{Parts, SharedState, Starting, StateMachine};
use crate::types::{Entry, Position, Proposal, SnapshotMeta, TypeConfig, Vote, log_id};

struct Deaf;

impl Observer for Deaf {
    fn stage(&self, _: Stage, _: Duration) {}

    fn elected(&self) {}
}

fn exec() -> Arc<dyn Exec> {
    Arc::new(RealExec::new(tokio::runtime::Handle::current(), 4))
}

fn machine(engines: &Arc<dyn Engines>, live: &Path, is_serving: bool) -> StateMachine {
    let create = !engines.fs().exists(live);
    let store = ReplicaState::open(&**engines, live, OpenState { create });
    let shared = SharedState::open(store.expect("a store")).expect("a readable state");
    let starting = Arc::new(Starting::default());
    if is_serving {
        starting.end();
    }
    StateMachine::new(Parts {
        shared,
        exec: exec(),
        engines: engines.clone(),
        live: live.into(),
        starting,
        observer: Arc::new(Deaf),
        replica: ReplicaId(1),
        births: Arc::default(),
        stop: CancellationToken::new(),
    })
}

async fn apply(machine: &mut StateMachine, indexes: std::ops::RangeInclusive<u64>) {
    let entries = indexes.map(|index| {
        let entry =
            Entry { log_id: log_id(Position { term: 1, index }), payload: EntryPayload::Blank };
        Ok((entry, None))
    });
    let entries = entries.collect::<Vec<_>>();
    machine.apply(stream::iter(entries)).await.expect("a healthy disk");
}

async fn applied(machine: &mut StateMachine) -> Option<u64> {
    machine.applied_state().await.expect("readable").0.map(|id| id.index())
}

#[tokio::test]
async fn a_position_up_to_which_the_log_may_be_purged_survives_a_crash() {
    let live = Path::new("/shards/1");
    let mut fs = FaultyFs::new(1);
    let engines =
        |fs: &FaultyFs| Arc::new(MapEngines::new(Arc::new(fs.clone()))) as Arc<dyn Engines>;
    fs.create_dir_all(Path::new("/shards")).expect("a healthy disk");
    fs.sync_dir(Path::new("/")).expect("a healthy disk");
    {
        let mut running = machine(&engines(&fs), live, true);
        apply(&mut running, 1..=5).await;
        let mut builder = running.get_snapshot_builder().await;
        apply(&mut running, 6..=7).await;
        let built = builder.build_snapshot().await.expect("a healthy disk");
        assert_eq!(built.meta.last_log_id.map(|id| id.index()), Some(5));
    }
    fs = fs.crash(Loss::All);
    {
        // At start openraft applies committed entries again, then asks for its snapshot, and may
        // purge up to there.
        let mut starting = machine(&engines(&fs), live, false);
        assert!(applied(&mut starting).await >= Some(5), "what was built is there");
        apply(&mut starting, 8..=9).await;
        let current = starting.get_current_snapshot().await.expect("a healthy disk");
        let named = current.expect("something was applied").meta.last_log_id;
        assert_eq!(named.map(|id| id.index()), Some(9));
    }
    fs = fs.crash(Loss::All);
    assert_eq!(applied(&mut machine(&engines(&fs), live, false)).await, Some(9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_is_not_replaced_while_anybody_reads_or_flushes_it() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let engines = RocksEngines::on_disk(&StateOptions::test_min(), Arc::new(|_| {}));
    let engines: Arc<dyn Engines> = Arc::new(engines.expect("options that fit"));
    let (source, live) = (dir.path().join("1"), dir.path().join("2"));
    let mut leader = machine(&engines, &source, true);
    apply(&mut leader, 1..=9).await;
    let sent = leader.get_current_snapshot().await.expect("a healthy disk").expect("applied");
    let SnapshotData::Checkpoint(checkpoint) = &sent.snapshot else {
        panic!("a serving replica sends files");
    };
    let incoming = dir.path().join("2.incoming");
    RealFs.rename(&checkpoint.path, &incoming).expect("a healthy disk");
    let received = CheckpointDir::new(Arc::new(RealFs), exec(), incoming.clone());
    let received = SnapshotData::Received(Arc::new(received));

    let mut follower = machine(&engines, &live, true);
    apply(&mut follower, 1..=3).await;
    let look = follower.shared().read().expect("readable");
    let mut builder = follower.get_snapshot_builder().await;
    {
        let mut install = pin!(follower.install_snapshot(&sent.meta, received));
        let moment = Duration::from_millis(100);
        assert!(tokio::time::timeout(moment, &mut install).await.is_err(), "somebody reads");
        assert!(RealFs.exists(&incoming), "the swap has not begun");
        assert_eq!(look.position.index, 3);
        drop(look);
        assert!(tokio::time::timeout(moment, &mut install).await.is_err(), "a flush is to come");
        assert!(RealFs.exists(&incoming), "the swap has not begun");
        let built = builder.build_snapshot().await.expect("of the store that it was made for");
        assert_eq!(built.meta.last_log_id.map(|id| id.index()), Some(3));
        let installed = tokio::time::timeout(Duration::from_secs(30), install).await;
        installed.expect("nobody holds the store any more").expect("a healthy disk");
    }
    assert_eq!(applied(&mut follower).await, Some(9));
    assert_eq!(follower.shared().read().expect("readable").position.index, 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_finds_no_room_in_the_log_waits() {
    let fs = FaultyFs::new(1);
    let options = LogOptions::test_min();
    let room = options.queue_bytes;
    let (log, _) = Log::open(Arc::new(fs.clone()), exec(), Path::new("/log"), options)
        .expect("an empty log opens");
    let (sender, created) = tokio::sync::oneshot::channel();
    let done = move |result| drop(sender.send(result));
    log.create(ReplicaId(1), Box::new(done));
    created.await.expect("answered").expect("created");
    let stalled = Arc::new(AtomicBool::new(true));
    let stall = stalled.clone();
    fs.set_hook(Some(Arc::new(move |op, _| {
        while op == Op::Sync && stall.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    })));
    let mut store = LogStore::new(log.clone(), ReplicaId(1), exec());
    let (mut flushed, mut waited) = (Vec::new(), false);
    for index in 1..=3 * room / 10_000 {
        let payload = EntryPayload::Normal(Proposal(Bytes::from(vec![1; 10_000])));
        let entry = Entry { log_id: log_id(Position { term: 1, index }), payload };
        let (sender, receiver) = TypeConfig::oneshot();
        flushed.push(receiver);
        let mut append = pin!(store.append([entry], IOFlushed::signal(sender)));
        if waited {
            append.await.expect("taken");
        } else if tokio::time::timeout(Duration::from_secs(1), &mut append).await.is_err() {
            waited = true;
            assert!(log.stats().queue_bytes > room, "only beyond the bound");
            stalled.store(false, Ordering::SeqCst);
            append.await.expect("taken");
        }
    }
    assert!(waited, "a queue without end");
    for flushed in flushed {
        flushed.await.expect("answered").expect("no append is refused");
    }
    log.close();
}

/// A follower's side of transfers.
struct Receiver {
    fs: Arc<FaultyFs>,
    slots: Arc<SnapshotSlots>,
    snapshots: Snapshots,
    manifest: Manifest,
}

const CONTENT: &[u8] = b"the whole state";

impl Receiver {
    fn new() -> Self {
        let fs = Arc::new(FaultyFs::new(1));
        let source = PathBuf::from("/source");
        fs.create_dir_all(&source).expect("a healthy disk");
        fs.create_dir_all(Path::new("/shards")).expect("a healthy disk");
        let file = fs.open(&source.join("file"), OpenMode::CreateNew).expect("a healthy disk");
        file.write_at(CONTENT, 0).expect("a healthy disk");
        let manifest = Manifest::of(&*fs, &source).expect("readable");
        let slots: Arc<SnapshotSlots> = Arc::default();
        let snapshots =
            Snapshots::new(fs.clone(), exec(), slots.clone(), Path::new("/shards/1"), 0);
        Self { fs, slots, snapshots, manifest }
    }

    async fn begin(&self, term: u64, transfer: u64) -> Result<(), String> {
        let manifest = self.manifest.encode().into();
        let vote = Vote::new_committed(term, 7);
        self.snapshots.begin(vote, transfer, SnapshotMeta::default(), manifest).await
    }

    async fn chunk(&self, transfer: u64) -> Result<(), String> {
        self.snapshots.chunk(transfer, 0, 0, CONTENT.into()).await
    }

    async fn end(&self, transfer: u64) -> Result<Arc<CheckpointDir>, String> {
        match self.snapshots.end(transfer).await?.snapshot {
            SnapshotData::Received(dir) => Ok(dir),
            other => panic!("{other:?} was not received"),
        }
    }
}

#[tokio::test]
async fn transfers_do_not_touch_each_others_files() {
    let receiver = Receiver::new();
    receiver.begin(1, 1).await.expect("a free slot");
    receiver.chunk(1).await.expect("the chunk of the manifest");
    let waiting = receiver.end(1).await.expect("whole");
    // The next comes while the first waits for its install.
    receiver.begin(2, 2).await.expect("a newer leader");
    receiver.manifest.verify(&*receiver.fs, &waiting.path).expect("as it was received");
    // A leader that has been deposed does not push a newer one's aside; the newer one may.
    receiver.begin(1, 3).await.expect_err("an older leader");
    receiver.chunk(3).await.expect_err("it was not begun");
    receiver.begin(2, 4).await.expect("the same leader, again");
    receiver.chunk(2).await.expect_err("given up by its leader");
    receiver.end(4).await.expect_err("no chunk has come");
    receiver.begin(2, 5).await.expect("again");
    receiver.chunk(5).await.expect("the chunk of the manifest");
    let newest = receiver.end(5).await.expect("whole");
    assert_ne!(newest.path, waiting.path);
    receiver.manifest.verify(&*receiver.fs, &waiting.path).expect("as it was received");
    drop((newest, waiting));
    let until = tokio::time::Instant::now() + Duration::from_secs(20);
    while !receiver.fs.read_dir(Path::new("/shards")).expect("readable").is_empty() {
        assert!(tokio::time::Instant::now() < until, "whoever lets go of a directory removes it");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_transfer_of_which_nothing_is_heard_gives_its_slot_back() {
    let receiver = Receiver::new();
    let free = || receiver.slots.receive.available_permits();
    let all = free();
    receiver.begin(1, 1).await.expect("a free slot");
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(29)).await;
    receiver.snapshots.forget_idle();
    assert_eq!(free(), all - 1, "it may go on");
    tokio::time::advance(Duration::from_secs(2)).await;
    receiver.snapshots.forget_idle();
    assert_eq!(free(), all);
    receiver.chunk(1).await.expect_err("forgotten");
}

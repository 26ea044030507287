//! Owns what the tests of the log share: a log on a hostile disk, stepped by hand. Does not hold
//! tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use coracle_storage::fs::faulty::{FaultyFs, Loss};
use coracle_storage::log::testing::StepExec;
use coracle_storage::{Done, Error, Fs, Log, LogEntry, LogOptions, Recovery, ReplicaId};
use parking_lot::Mutex;

pub(crate) const DIR: &str = "log";
pub(crate) const A: ReplicaId = ReplicaId(1);
pub(crate) const B: ReplicaId = ReplicaId(2);
pub(crate) const C: ReplicaId = ReplicaId(3);

/// A node's log with its disk.
pub(crate) struct Rig {
    pub(crate) fs: FaultyFs,
    pub(crate) exec: Arc<StepExec>,
    pub(crate) log: Log,
    pub(crate) recovery: Recovery,
    pub(crate) options: LogOptions,
    pub(crate) fatal: Arc<AtomicUsize>,
}

/// The outcomes of operations, in the order in which they came.
#[derive(Clone, Default)]
pub(crate) struct Outcomes(Arc<Mutex<Vec<Named>>>);

type Named = (usize, Result<(), Arc<Error>>);

impl Outcomes {
    pub(crate) fn done(&self, name: usize) -> Done {
        let outcomes = self.0.clone();
        Box::new(move |outcome| outcomes.lock().push((name, outcome)))
    }

    pub(crate) fn take(&self) -> Vec<Named> {
        std::mem::take(&mut *self.0.lock())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    pub(crate) fn names(&self) -> Vec<usize> {
        self.take()
            .into_iter()
            .filter(|(_, outcome)| outcome.is_ok())
            .map(|(name, _)| name)
            .collect()
    }

    /// The one outcome, which must be an error.
    pub(crate) fn error(&self) -> Arc<Error> {
        let mut taken = self.take();
        assert_eq!(taken.len(), 1, "one outcome was expected: {taken:?}");
        taken.remove(0).1.expect_err("an error was expected")
    }
}

pub(crate) fn ignore() -> Done {
    Box::new(|_| {})
}

/// A `done` that must be called with Ok, if it is called.
pub(crate) fn well() -> Done {
    Box::new(|outcome| assert!(outcome.is_ok(), "{outcome:?}"))
}

pub(crate) fn entry(index: u64, len: usize) -> LogEntry {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&index.to_le_bytes());
    LogEntry { index, id, payload: Bytes::from(vec![index as u8; len]) }
}

pub(crate) fn entries(range: std::ops::Range<u64>, len: usize) -> Vec<LogEntry> {
    range.map(|index| entry(index, len)).collect()
}

pub(crate) fn segment(number: u64) -> PathBuf {
    Path::new(DIR).join(format!("{number:016}.log"))
}

impl Rig {
    pub(crate) fn new(options: LogOptions) -> Rig {
        Rig::on(FaultyFs::new(1), options).expect("an empty disk opens")
    }

    pub(crate) fn on(fs: FaultyFs, mut options: LogOptions) -> Result<Rig, Error> {
        let fatal = Arc::new(AtomicUsize::new(0));
        let counted = fatal.clone();
        options.on_fatal = Arc::new(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let exec = StepExec::new();
        let disk: Arc<dyn Fs> = Arc::new(fs.clone());
        let (log, recovery) = Log::open(disk, exec.clone(), Path::new(DIR), options.clone())?;
        exec.run();
        Ok(Rig { fs, exec, log, recovery, options, fatal })
    }

    /// Creates replicas, durably.
    pub(crate) fn with(self, replicas: &[ReplicaId]) -> Rig {
        for replica in replicas {
            self.log.create(*replica, well());
        }
        self.exec.run();
        self
    }

    /// The log after a crash.
    pub(crate) fn restart(self, loss: Loss) -> Rig {
        let Rig { fs, exec, log, options, .. } = self;
        drop((log, exec));
        Rig::on(fs.crash(loss), options).expect("the disk opens again")
    }

    /// Appends durably, one batch.
    pub(crate) fn append(&self, replica: ReplicaId, range: std::ops::Range<u64>, len: usize) {
        let outcomes = Outcomes::default();
        self.log.append(replica, entries(range, len), outcomes.done(0));
        self.exec.run();
        assert_eq!(outcomes.names(), [0], "the append was acknowledged");
    }

    pub(crate) fn vote(&self, replica: ReplicaId, vote: &'static [u8]) {
        let outcomes = Outcomes::default();
        self.log.save_vote(replica, Bytes::from_static(vote), outcomes.done(0));
        self.exec.run();
        assert_eq!(outcomes.names(), [0], "the vote was acknowledged");
    }

    pub(crate) fn purge(&self, replica: ReplicaId, index: u64) {
        let outcomes = Outcomes::default();
        self.log.purge(replica, index, entry(index, 0).id, outcomes.done(0));
        self.exec.run();
        assert_eq!(outcomes.names(), [0], "the purge was acknowledged");
    }

    pub(crate) fn probe(&self) {
        self.log.probe(well());
        self.exec.run();
    }

    pub(crate) fn read(&self, replica: ReplicaId) -> Result<Vec<LogEntry>, Error> {
        self.log.read(replica, 0..u64::MAX, usize::MAX)
    }

    pub(crate) fn vote_of(&self, replica: ReplicaId) -> Option<Bytes> {
        self.log.state(replica).expect("the replica is well").vote
    }
}

//! Owns what the state tests share: every engine behind one name. Does not hold tests of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_storage::fs::faulty::FaultyFs;
use coracle_storage::fs::{read_file, write_file_atomic};
use coracle_storage::state::{
    Engine, Engines, MapEngines, OpenState, ReplicaState, RocksEngines, StateOptions,
};
use coracle_storage::{Error, Fs};

/// An engine under test.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) enum Kind {
    RocksOnDisk,
    RocksInMemory,
    Map,
}

pub(crate) const ALL: [Kind; 3] = [Kind::RocksOnDisk, Kind::RocksInMemory, Kind::Map];

/// A factory with a directory for its stores.
pub(crate) struct Rig {
    pub(crate) engines: Arc<dyn Engines>,
    pub(crate) root: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Rig {
    pub(crate) fn new(kind: Kind) -> Rig {
        let options = StateOptions::test_min();
        let on_fatal = || Arc::new(|error: &Error| panic!("background error: {error}"));
        if kind == Kind::RocksOnDisk {
            let temporary = tempfile::tempdir().expect("a temporary directory");
            let engines = RocksEngines::on_disk(&options, on_fatal()).expect("options that fit");
            let root = temporary.path().to_path_buf();
            return Rig { engines: Arc::new(engines), root, _temporary: Some(temporary) };
        }
        let fs: Arc<dyn Fs> = Arc::new(FaultyFs::new(1));
        let root = PathBuf::from("/shards");
        fs.create_dir_all(&root).expect("a directory in memory");
        let engines: Arc<dyn Engines> = match kind {
            Kind::Map => Arc::new(MapEngines::new(fs)),
            _ => Arc::new(
                RocksEngines::in_memory(&options, fs, on_fatal()).expect("options that fit"),
            ),
        };
        Rig { engines, root, _temporary: None }
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn fs(&self) -> Arc<dyn Fs> {
        self.engines.fs()
    }

    pub(crate) fn open(&self, name: &str) -> Arc<dyn Engine> {
        self.engines.open(&self.dir(name), OpenState { create: true }).expect("a store that opens")
    }

    pub(crate) fn reopen(&self, name: &str) -> Arc<dyn Engine> {
        self.engines
            .open(&self.dir(name), OpenState { create: false })
            .expect("a store that opens again")
    }

    pub(crate) fn state(&self, name: &str) -> ReplicaState {
        ReplicaState::open(&*self.engines, &self.dir(name), OpenState { create: true })
            .expect("a state that opens")
    }
}

/// All entries of an engine, read through a view.
pub(crate) fn dump(engine: &dyn Engine) -> Vec<(Vec<u8>, Vec<u8>)> {
    let view = engine.view().expect("a view");
    let mut cursor = view.seek(vec![]..vec![0xff; 4], false).expect("a cursor");
    let mut entries = Vec::new();
    while let Some((key, value)) = cursor.next().expect("an entry that reads") {
        entries.push((key.to_vec(), value.to_vec()));
    }
    entries
}

/// Changes one byte of a file.
pub(crate) fn flip_byte(fs: &dyn Fs, path: &Path, at: usize) {
    let mut content = read_file(fs, path).expect("a file that reads");
    content[at] ^= 0x40;
    write_file_atomic(fs, path, &content).expect("a file that writes");
}

//! Owns RocksDB as a state store: opening, writing without its log, flushing, checkpoints,
//! compaction; on disk, or wholly in its memory environment. Does not read (see `rocks_view`) and
//! does not choose options (see `budget`).

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::compaction_filter::{CompactionFilter, Decision};
use rocksdb::compaction_filter_factory::{CompactionFilterContext, CompactionFilterFactory};
use rocksdb::{
    BottommostLevelCompaction, CompactOptions, DB, Env, FlushOptions, LiveFile, ReadOptions,
    WriteBatch, WriteOptions, properties,
};

use crate::error::Error;
use crate::fs::{Fs, RealFs};
use crate::options::OnFatal;
use crate::state::batch::{Batch, BatchOp};
use crate::state::budget::{Budget, PROTECTION_BYTES, StateOptions};
use crate::state::checkpoint;
use crate::state::engine::{self, Engine, Engines, OpenState, Stratum, View};
use crate::state::filter::{Filter, Pass, Verdict};
use crate::state::image::{self, Entries};
use crate::state::rocks_view::{self, OpenDb, RocksView, map_error};

/// Entries of an image are written in batches of about this size.
const LOAD_BATCH_BYTES: u64 = 1 << 20;

/// The factory of RocksDB stores: all that it opens share one budget.
pub struct RocksEngines {
    budget: Budget,
    place: Place,
    fs: Arc<dyn Fs>,
    on_fatal: OnFatal,
}

/// Where the databases' own files stand.
enum Place {
    Disk,
    /// In RocksDB's memory environment, which nothing else can read: checkpoints leave it as one
    /// image file. The set holds the directories that are databases there.
    Memory(Mutex<BTreeSet<PathBuf>>),
}

impl RocksEngines {
    /// Stores on disk. `on_fatal` is called once for a store whose write, flush or compaction
    /// failed: the node then ends.
    pub fn on_disk(options: &StateOptions, on_fatal: OnFatal) -> Result<RocksEngines, Error> {
        let env =
            Env::new().map_err(|error| map_error(Path::new("RocksDB environment"), &error))?;
        Self::on_env(options, env, on_fatal)
    }

    /// The same in an environment that a crash test hands in.
    #[doc(hidden)]
    pub fn on_env(
        options: &StateOptions,
        env: Env,
        on_fatal: OnFatal,
    ) -> Result<RocksEngines, Error> {
        Ok(RocksEngines {
            budget: Budget::new(options, env)?,
            place: Place::Disk,
            fs: Arc::new(RealFs),
            on_fatal,
        })
    }

    /// Stores that live and end with this factory. Checkpoints stand in `fs`, as one image file
    /// each.
    pub fn in_memory(
        options: &StateOptions,
        fs: Arc<dyn Fs>,
        on_fatal: OnFatal,
    ) -> Result<RocksEngines, Error> {
        let env = Env::mem_env()
            .map_err(|error| map_error(Path::new("RocksDB memory environment"), &error))?;
        Ok(RocksEngines {
            budget: Budget::new(options, env)?,
            place: Place::Memory(Mutex::default()),
            fs,
            on_fatal,
        })
    }

    /// Memory that the shared cache uses: blocks, indexes, filters, and what write buffers are
    /// charged.
    pub fn cache_bytes_used(&self) -> u64 {
        self.budget.cache_bytes_used()
    }

    /// Memory that all write buffers together use.
    pub fn write_buffer_bytes_used(&self) -> u64 {
        self.budget.write_buffer_bytes_used()
    }

    fn open_db(&self, dir: &Path, create: bool) -> Result<RocksEngine, Error> {
        let filter = Arc::new(Filter::default());
        let mut options = self.budget.options();
        options.create_if_missing(create);
        options.set_compaction_filter_factory(PassFactory(filter.clone()));
        let db = DB::open(&options, dir).map_err(|error| map_error(dir, &error))?;
        let mut write_options = WriteOptions::default();
        write_options.disable_wal(true);
        write_options.set_protection_bytes_per_key(PROTECTION_BYTES as usize);
        Ok(RocksEngine {
            db: Arc::new(OpenDb::new(db)),
            dir: dir.to_path_buf(),
            fs: self.fs.clone(),
            filter,
            failed: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            on_fatal: self.on_fatal.clone(),
            write_options,
            in_memory: matches!(self.place, Place::Memory(_)),
        })
    }

    fn open_on_disk(&self, dir: &Path, options: OpenState) -> Result<RocksEngine, Error> {
        let io = |error| Error::io(dir, error);
        if self.fs.exists(&dir.join("CURRENT")) {
            return self.open_db(dir, false);
        }
        if !options.create {
            return Err(engine::missing(dir));
        }
        self.fs.create_dir_all(dir).map_err(io)?;
        if let Some(parent) = dir.parent() {
            self.fs.sync_dir(parent).map_err(io)?;
        }
        self.open_db(dir, true)
    }

    fn open_in_memory(
        &self,
        known: &Mutex<BTreeSet<PathBuf>>,
        dir: &Path,
        options: OpenState,
    ) -> Result<RocksEngine, Error> {
        let io = |error| Error::io(dir, error);
        let image = image::read(&*self.fs, dir)?;
        let is_known = known.lock().contains(dir);
        if let Some(entries) = image {
            // A checkpoint was swapped in: it replaces what the directory held in memory.
            if is_known {
                DB::destroy(&self.budget.options(), dir).map_err(|error| map_error(dir, &error))?;
            }
            let engine = self.open_db(dir, true)?;
            engine.load(entries)?;
            known.lock().insert(dir.to_path_buf());
            self.fs.remove_file(&image::path(dir)).map_err(io)?;
            return Ok(engine);
        }
        if is_known {
            return self.open_db(dir, false);
        }
        if !options.create {
            return Err(engine::missing(dir));
        }
        // So that the directory is listed and can be swapped, as one on disk.
        self.fs.create_dir_all(dir).map_err(io)?;
        let engine = self.open_db(dir, true)?;
        known.lock().insert(dir.to_path_buf());
        Ok(engine)
    }
}

impl Engines for RocksEngines {
    fn open(&self, dir: &Path, options: OpenState) -> Result<Arc<dyn Engine>, Error> {
        let engine = match &self.place {
            Place::Disk => self.open_on_disk(dir, options)?,
            Place::Memory(known) => self.open_in_memory(known, dir, options)?,
        };
        Ok(Arc::new(engine))
    }

    fn destroy(&self, dir: &Path) -> Result<(), Error> {
        if let Place::Memory(known) = &self.place
            && known.lock().remove(dir)
        {
            DB::destroy(&self.budget.options(), dir).map_err(|error| map_error(dir, &error))?;
        }
        checkpoint::remove_dir(&*self.fs, dir)
    }

    fn fs(&self) -> Arc<dyn Fs> {
        self.fs.clone()
    }
}

struct RocksEngine {
    db: Arc<OpenDb>,
    dir: PathBuf,
    fs: Arc<dyn Fs>,
    filter: Arc<Filter>,
    /// Set by the first failed write or flush: from then on nothing is written, and nothing is said
    /// to be durable.
    failed: AtomicBool,
    /// Set by [`Engine::end_compactions`].
    closing: AtomicBool,
    on_fatal: OnFatal,
    write_options: WriteOptions,
    in_memory: bool,
}

impl RocksEngine {
    /// Refuses once something has failed, also in the background since the last call.
    fn check(&self) -> Result<(), Error> {
        let why = |what| format!("{}: {what}", self.dir.display());
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::Stopped { why: why("a write, flush or compaction failed before") });
        }
        if self.property(properties::BACKGROUND_ERRORS) > 0 {
            let what = "a flush or compaction failed in the background; its LOG says why";
            return Err(self.fail(Error::Engine { why: why(what) }));
        }
        Ok(())
    }

    /// Refuses once the store is about to be closed.
    fn check_not_closing(&self) -> Result<(), Error> {
        if self.closing.load(Ordering::Acquire) {
            let why = format!("{}: the store is about to be closed", self.dir.display());
            return Err(Error::Stopped { why });
        }
        Ok(())
    }

    /// Remembers a failure that leaves unknown what is durable, and reports the first one.
    fn fail(&self, error: Error) -> Error {
        if !self.failed.swap(true, Ordering::AcqRel) {
            (self.on_fatal)(&error);
        }
        error
    }

    fn map<T>(&self, result: Result<T, rocksdb::Error>) -> Result<T, Error> {
        result.map_err(|error| map_error(&self.dir, &error))
    }

    fn map_fatal<T>(&self, result: Result<T, rocksdb::Error>) -> Result<T, Error> {
        self.map(result).map_err(|error| self.fail(error))
    }

    fn load(&self, entries: Entries) -> Result<(), Error> {
        let mut batch = Batch::new();
        let mut bytes = 0;
        for (key, value) in entries {
            bytes += (key.len() + value.len()) as u64;
            batch.put(key, value);
            if bytes >= LOAD_BATCH_BYTES {
                self.write(std::mem::take(&mut batch))?;
                bytes = 0;
            }
        }
        self.write(batch)?;
        self.flush()
    }

    fn image(&self) -> Result<Entries, Error> {
        let view = RocksView::new(self.db.clone());
        let mut cursor = view.seek(Vec::new()..vec![0xff], false)?;
        let mut entries = Entries::new();
        while let Some((key, value)) = cursor.next()? {
            entries.insert(key, value);
        }
        Ok(entries)
    }

    fn property(&self, name: &properties::PropName) -> u64 {
        // A property that cannot be read is no reason to fail: these are estimates.
        self.db.property_int_value(name).ok().flatten().unwrap_or(0)
    }

    /// The names of the files that surely hold keys of the range: those of which the first or the
    /// last key lies in it.
    fn files(&self, range: Option<&Range<Vec<u8>>>) -> Result<BTreeSet<String>, Error> {
        let ends_in_range = |file: &LiveFile| {
            let Some(range) = range else {
                return true;
            };
            let within =
                |key: &Option<Vec<u8>>| key.as_ref().is_some_and(|key| range.contains(key));
            within(&file.start_key) || within(&file.end_key)
        };
        let files = self.map(self.db.live_files())?;
        Ok(files.into_iter().filter(ends_in_range).map(|file| file.name).collect())
    }
}

impl Engine for RocksEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        rocks_view::get(&self.db, key, &ReadOptions::default())
    }

    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error> {
        rocks_view::first(&self.db, ReadOptions::default(), from, prefix)
    }

    fn view(&self) -> Result<Box<dyn View>, Error> {
        Ok(Box::new(RocksView::new(self.db.clone())))
    }

    fn write(&self, batch: Batch) -> Result<(), Error> {
        // RocksDB itself refuses writes after a background error: no need to ask it before each.
        if self.failed.load(Ordering::Acquire) {
            return self.check();
        }
        let mut steps =
            WriteBatch::with_capacity_bytes(batch.bytes() as usize + 16 * batch.ops.len());
        for op in &batch.ops {
            match op {
                BatchOp::Put(key, value) => steps.put(key, value),
                BatchOp::Delete(key) => steps.delete(key),
                BatchOp::DeleteRange(from, to) if from < to => steps.delete_range(from, to),
                BatchOp::DeleteRange(..) => {}
            }
        }
        self.map_fatal(self.db.write_opt(&steps, &self.write_options))
    }

    fn flush(&self) -> Result<(), Error> {
        self.check()?;
        let mut options = FlushOptions::default();
        options.set_wait(true);
        // Rather a slowdown of writers than a flush that waits for them.
        options.set_allow_write_stall(true);
        self.map_fatal(self.db.flush_opt(&options))?;
        self.check()
    }

    fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        if self.fs.exists(dir) {
            return Err(engine::exists(dir));
        }
        if self.in_memory {
            return image::write_dir(&*self.fs, dir, &self.image()?);
        }
        // Without a write-ahead log only what is flushed can be linked.
        self.flush()?;
        let maker = self.map(Checkpoint::new(&*self.db))?;
        self.map(maker.create_checkpoint(dir))?;
        // RocksDB syncs the files and the new directory, not the name that it renamed it to.
        let parent =
            dir.parent().ok_or_else(|| Error::invalid("a checkpoint needs a parent directory"))?;
        self.fs.sync_dir(parent).map_err(|error| Error::io(parent, error))
    }

    fn compact(&self, range: Option<Range<Vec<u8>>>) -> Result<(), Error> {
        if range.as_ref().is_some_and(|range| range.is_empty()) {
            return Ok(());
        }
        self.check_not_closing()?;
        self.flush()?;
        let before = self.files(range.as_ref())?;
        let mut options = CompactOptions::default();
        // Exclusive: waits for compactions that still decide by an older filter state. Forced: also
        // rewrites the bottom level, and not only files that are older than the call (the cheaper
        // mode would trust those older filters).
        options.set_exclusive_manual_compaction(true);
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        let (start, end) = match &range {
            Some(range) => (Some(&range.start), Some(&range.end)),
            None => (None, None),
        };
        self.db.compact_range_opt(start, end, &options);
        self.check_not_closing()?;
        self.check()?;
        // The binding drops RocksDB's answer, so the effect is checked: no file is left that it had
        // to rewrite.
        match self.files(range.as_ref())?.intersection(&before).next() {
            None => Ok(()),
            Some(file) => Err(Error::Engine {
                why: format!("{}: compaction left {file} as it was", self.dir.display()),
            }),
        }
    }

    fn end_compactions(&self) {
        if !self.closing.swap(true, Ordering::AcqRel) {
            // Only those that were asked for: closing ends RocksDB's own by itself. They notice at
            // their next entry.
            self.db.disable_manual_compaction();
        }
    }

    fn strata(&self) -> Result<Vec<Stratum>, Error> {
        let part = |file: LiveFile| {
            let (first, last) = (file.start_key?.into(), file.end_key?.into());
            Some(Stratum { first, last, bytes: file.size as u64 })
        };
        Ok(self.map(self.db.live_files())?.into_iter().filter_map(part).collect())
    }

    fn approximate_bytes(&self) -> u64 {
        self.property(properties::LIVE_SST_FILES_SIZE) + self.unflushed_bytes()
    }

    fn unflushed_bytes(&self) -> u64 {
        let entries = self.property(properties::NUM_ENTRIES_ACTIVE_MEM_TABLE)
            + self.property(properties::NUM_ENTRIES_IMM_MEM_TABLES)
            + self.property(properties::NUM_DELETES_ACTIVE_MEM_TABLE)
            + self.property(properties::NUM_DELETES_IMM_MEM_TABLES);
        // An empty write buffer takes memory as well.
        if entries == 0 { 0 } else { self.property(properties::CUR_SIZE_ALL_MEM_TABLES).max(1) }
    }

    fn health(&self) -> Result<(), Error> {
        self.check()
    }

    fn filter(&self) -> &Arc<Filter> {
        &self.filter
    }

    fn open_marker(&self) -> Weak<()> {
        self.db.marker()
    }
}

const FILTER_NAME: &CStr = c"coracle.filter.1";

/// Gives every compaction a pass of its own.
struct PassFactory(Arc<Filter>);

impl CompactionFilterFactory for PassFactory {
    type Filter = RocksPass;

    fn create(&mut self, context: CompactionFilterContext) -> RocksPass {
        RocksPass(self.0.pass(context.is_full_compaction))
    }

    fn name(&self) -> &CStr {
        FILTER_NAME
    }
}

struct RocksPass(Pass);

impl CompactionFilter for RocksPass {
    fn filter(&mut self, _level: u32, key: &[u8], value: &[u8]) -> Decision {
        match self.0.judge(key, value) {
            Verdict::Keep => Decision::Keep,
            Verdict::Drop => Decision::Remove,
        }
    }

    fn name(&self) -> &CStr {
        FILTER_NAME
    }
}

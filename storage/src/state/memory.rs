//! Owns the map engine: the same contract as RocksDB in an ordered map, without threads, for
//! simulation. What was flushed stands as one image file in the `Fs` seam; dropping an engine loses
//! the rest, as a crash does. Does not scale: a flush writes everything.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::error::Error;
use crate::fs::Fs;
use crate::state::batch::{Batch, BatchOp};
use crate::state::engine::{self, Cursor, Engine, Engines, OpenState, View};
use crate::state::filter::{Filter, Verdict};
use crate::state::image::{self, Entries};

/// The factory of map engines.
pub struct MapEngines {
    fs: Arc<dyn Fs>,
    /// Who is open, so that a second handle on a directory is refused, as RocksDB refuses it.
    open: Mutex<BTreeMap<PathBuf, Weak<MapEngine>>>,
}

impl MapEngines {
    /// Stores that keep what is flushed in `fs`.
    pub fn new(fs: Arc<dyn Fs>) -> MapEngines {
        MapEngines { fs, open: Mutex::new(BTreeMap::new()) }
    }
}

impl Engines for MapEngines {
    fn open(&self, dir: &Path, options: OpenState) -> Result<Arc<dyn Engine>, Error> {
        let mut open = self.open.lock();
        open.retain(|_, engine| engine.strong_count() > 0);
        if open.contains_key(dir) {
            return Err(Error::invalid(format!(
                "{}: the state store is open already",
                dir.display()
            )));
        }
        let entries = match image::read(&*self.fs, dir)? {
            Some(entries) => entries,
            None if options.create => create(&*self.fs, dir)?,
            None => return Err(engine::missing(dir)),
        };
        let engine = Arc::new(MapEngine {
            fs: self.fs.clone(),
            dir: dir.to_path_buf(),
            filter: Arc::default(),
            inner: Mutex::new(Inner {
                entries: Arc::new(entries),
                unflushed_bytes: 0,
                failed: None,
                closing: false,
            }),
            open: Arc::default(),
        });
        open.insert(dir.to_path_buf(), Arc::downgrade(&engine));
        Ok(engine)
    }

    fn destroy(&self, dir: &Path) -> Result<(), Error> {
        assert!(
            self.open.lock().get(dir).is_none_or(|engine| engine.strong_count() == 0),
            "a store is closed before it is destroyed"
        );
        super::checkpoint::remove_dir(&*self.fs, dir)
    }

    fn fs(&self) -> Arc<dyn Fs> {
        self.fs.clone()
    }
}

fn create(fs: &dyn Fs, dir: &Path) -> Result<Entries, Error> {
    let io = |error| Error::io(dir, error);
    fs.create_dir_all(dir).map_err(io)?;
    image::write(fs, dir, &Entries::new())?;
    if let Some(parent) = dir.parent() {
        fs.sync_dir(parent).map_err(io)?;
    }
    Ok(Entries::new())
}

struct MapEngine {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    filter: Arc<Filter>,
    inner: Mutex<Inner>,
    /// Views are copies and touch no file, so the engine alone keeps the store open.
    open: Arc<()>,
}

struct Inner {
    /// Shared with the views: a write copies the map only while one of them lives.
    entries: Arc<Entries>,
    unflushed_bytes: u64,
    /// Why the store stopped: a failed flush leaves unknown what is durable.
    failed: Option<String>,
    /// Set by [`Engine::end_compactions`].
    closing: bool,
}

impl Inner {
    fn check(&self) -> Result<(), Error> {
        match &self.failed {
            None => Ok(()),
            Some(why) => Err(Error::Stopped { why: why.clone() }),
        }
    }
}

impl Engine for MapEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.inner.lock().entries.get(key).cloned())
    }

    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error> {
        Ok(first(&self.inner.lock().entries, from, prefix))
    }

    fn view(&self) -> Result<Box<dyn View>, Error> {
        Ok(Box::new(MapView(self.inner.lock().entries.clone())))
    }

    fn write(&self, batch: Batch) -> Result<(), Error> {
        let mut inner = self.inner.lock();
        inner.check()?;
        inner.unflushed_bytes += batch.bytes();
        let entries = Arc::make_mut(&mut inner.entries);
        for op in batch.ops {
            match op {
                BatchOp::Put(key, value) => {
                    entries.insert(key, value);
                }
                BatchOp::Delete(key) => {
                    entries.remove(&key);
                }
                BatchOp::DeleteRange(from, to) if from < to => {
                    let mut tail = entries.split_off(&from);
                    entries.append(&mut tail.split_off(&to));
                }
                BatchOp::DeleteRange(..) => {}
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        let mut inner = self.inner.lock();
        inner.check()?;
        if inner.unflushed_bytes == 0 {
            return Ok(());
        }
        if let Err(error) = image::write(&*self.fs, &self.dir, &inner.entries) {
            inner.failed = Some(error.to_string());
            return Err(error);
        }
        inner.unflushed_bytes = 0;
        Ok(())
    }

    fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        if self.fs.exists(dir) {
            return Err(engine::exists(dir));
        }
        self.flush()?;
        let entries = self.inner.lock().entries.clone();
        image::write_dir(&*self.fs, dir, &entries)
    }

    fn compact(&self, range: Option<Range<Vec<u8>>>) -> Result<(), Error> {
        self.flush()?;
        let mut inner = self.inner.lock();
        if inner.closing {
            let why = format!("{}: the store is about to be closed", self.dir.display());
            return Err(Error::Stopped { why });
        }
        // Only a pass over everything may drop dead versions: a range may begin between two
        // versions of a key.
        let mut pass = self.filter.pass(range.is_none());
        let in_range = |key: &Bytes| {
            range.as_ref().is_none_or(|range| *range.start <= key[..] && key[..] < *range.end)
        };
        let mut dropped = 0;
        Arc::make_mut(&mut inner.entries).retain(|key, value| {
            let keep = !in_range(key) || pass.judge(key, value) == Verdict::Keep;
            dropped += if keep { 0 } else { key.len() as u64 };
            keep
        });
        inner.unflushed_bytes += dropped;
        drop(inner);
        self.flush()
    }

    fn end_compactions(&self) {
        // One that is under way holds the lock: it is waited for, and short.
        self.inner.lock().closing = true;
    }

    fn approximate_bytes(&self) -> u64 {
        self.inner.lock().entries.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum()
    }

    fn unflushed_bytes(&self) -> u64 {
        self.inner.lock().unflushed_bytes
    }

    fn health(&self) -> Result<(), Error> {
        self.inner.lock().check()
    }

    fn filter(&self) -> &Arc<Filter> {
        &self.filter
    }

    fn open_marker(&self) -> Weak<()> {
        Arc::downgrade(&self.open)
    }
}

struct MapView(Arc<Entries>);

impl View for MapView {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.0.get(key).cloned())
    }

    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error> {
        Ok(first(&self.0, from, prefix))
    }

    fn seek(&self, range: Range<Vec<u8>>, reverse: bool) -> Result<Box<dyn Cursor + '_>, Error> {
        let from = Bound::Included(Bytes::from(range.start.clone()));
        let to = Bound::Excluded(Bytes::from(range.end.clone()));
        Ok(Box::new(MapCursor { entries: &self.0, range, from, to, reverse }))
    }
}

fn first(entries: &Entries, from: &[u8], prefix: &[u8]) -> Option<(Bytes, Bytes)> {
    let (key, value) =
        entries.range::<[u8], _>((Bound::Included(from), Bound::Unbounded)).next()?;
    key.starts_with(prefix).then(|| (key.clone(), value.clone()))
}

struct MapCursor<'a> {
    entries: &'a Entries,
    range: Range<Vec<u8>>,
    /// What is still to come lies between these two.
    from: Bound<Bytes>,
    to: Bound<Bytes>,
    reverse: bool,
}

impl Cursor for MapCursor<'_> {
    fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, Error> {
        if is_empty(&self.from, &self.to) {
            return Ok(None);
        }
        let mut rest = self.entries.range((self.from.clone(), self.to.clone()));
        let next = if self.reverse { rest.next_back() } else { rest.next() };
        let Some((key, value)) = next else {
            return Ok(None);
        };
        if self.reverse {
            self.to = Bound::Excluded(key.clone());
        } else {
            self.from = Bound::Excluded(key.clone());
        }
        Ok(Some((key.clone(), value.clone())))
    }

    fn seek_to(&mut self, key: &[u8]) -> Result<(), Error> {
        let (start, end) = (&self.range.start[..], &self.range.end[..]);
        self.from = Bound::Included(Bytes::copy_from_slice(start));
        self.to = Bound::Excluded(Bytes::copy_from_slice(end));
        if self.reverse && key < end {
            self.to = Bound::Included(Bytes::copy_from_slice(key));
        }
        if !self.reverse && key > start {
            self.from = Bound::Included(Bytes::copy_from_slice(key));
        }
        Ok(())
    }
}

/// Whether nothing can lie between two bounds; `BTreeMap::range` panics on such.
fn is_empty(from: &Bound<Bytes>, to: &Bound<Bytes>) -> bool {
    match (from, to) {
        (Bound::Included(from), Bound::Included(to)) => from > to,
        (
            Bound::Included(from) | Bound::Excluded(from),
            Bound::Excluded(to) | Bound::Included(to),
        ) => from >= to,
        _ => false,
    }
}

//! Owns reading a RocksDB database: seeks, views, cursors, and what its errors mean. Does not
//! write.

use std::future::{Future, poll_fn};
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::{DB, DBRawIterator, ErrorKind, ReadOptions};

use crate::error::Error;
use crate::state::engine::{Cursor, View};

/// The first entry at or behind `from` that begins with `prefix`: one seek, guarded by the bloom
/// filters.
pub(crate) fn first(
    db: &DB,
    mut options: ReadOptions,
    from: &[u8],
    prefix: &[u8],
) -> Result<Option<(Bytes, Bytes)>, Error> {
    assert!(from.starts_with(prefix), "the bloom filter of `prefix` says nothing about other keys");
    options.set_prefix_same_as_start(true);
    let mut iterator = db.raw_iterator_opt(options);
    iterator.seek(from);
    if let Some((key, value)) = iterator.item() {
        return Ok(key.starts_with(prefix).then(|| copy(key, value)));
    }
    iterator.status().map(|()| None).map_err(|error| map_error(db.path(), &error))
}

pub(crate) fn get(db: &DB, key: &[u8], options: &ReadOptions) -> Result<Option<Bytes>, Error> {
    match db.get_pinned_opt(key, options) {
        Ok(value) => Ok(value.map(|value| Bytes::copy_from_slice(&value))),
        Err(error) => Err(map_error(db.path(), &error)),
    }
}

fn copy(key: &[u8], value: &[u8]) -> (Bytes, Bytes) {
    (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value))
}

/// A database with a marker that goes only after it: the fields are dropped in this order.
pub(crate) struct OpenDb {
    db: DB,
    open: Arc<()>,
}

impl OpenDb {
    pub(crate) fn new(db: DB) -> OpenDb {
        OpenDb { db, open: Arc::new(()) }
    }

    /// See [`crate::state::Engine::open_marker`].
    pub(crate) fn marker(&self) -> Weak<()> {
        Arc::downgrade(&self.open)
    }
}

impl Deref for OpenDb {
    type Target = DB;

    fn deref(&self) -> &DB {
        &self.db
    }
}

/// A snapshot that owns its database.
///
/// The binding's snapshot borrows the database, and a struct cannot hold both. A future can: the
/// database and the snapshot that borrows it are locals of one `async` block, which answers a question
/// each time it is polled and is never finished. Dropping it releases the snapshot, then the database.
///
/// The block also keeps the iterator of its point reads: to make one costs as much as to seek with it,
/// and a view often serves dozens.
pub(crate) struct RocksView {
    holder: Mutex<Pin<Box<dyn Future<Output = ()> + Send>>>,
    desk: Arc<Mutex<Desk>>,
    /// For gets, which may share one set of options.
    options: ReadOptions,
    db: Arc<OpenDb>,
}

/// Where a question and its answer lie, between two polls of the holder.
#[derive(Default)]
struct Desk {
    /// Of a point read: the first key, and the prefix that it must have. Kept for their memory.
    from: Vec<u8>,
    prefix: usize,
    asks_first: bool,
    options: Option<ReadOptions>,
    first: Option<Result<Option<(Bytes, Bytes)>, rocksdb::Error>>,
}

impl RocksView {
    pub(crate) fn new(db: Arc<OpenDb>) -> RocksView {
        let desk: Arc<Mutex<Desk>> = Arc::default();
        let mut holder: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(hold(db.clone(), desk.clone()));
        let options = next_options(&mut holder, &desk);
        RocksView { holder: Mutex::new(holder), desk, options, db }
    }

    /// Read options bound to the snapshot. Whoever uses them borrows the view, so that the snapshot
    /// outlives them.
    fn options(&self) -> ReadOptions {
        next_options(&mut self.holder.lock(), &self.desk)
    }
}

async fn hold(db: Arc<OpenDb>, desk: Arc<Mutex<Desk>>) {
    let snapshot = db.snapshot();
    let mut points: Option<DBRawIterator<'_>> = None;
    loop {
        {
            let mut desk = desk.lock();
            let desk = &mut *desk;
            let snapshot_options = || {
                let mut options = ReadOptions::default();
                options.set_snapshot(&snapshot);
                options
            };
            if std::mem::take(&mut desk.asks_first) {
                let points = points.get_or_insert_with(|| {
                    let mut options = snapshot_options();
                    options.set_prefix_same_as_start(true);
                    db.raw_iterator_opt(options)
                });
                points.seek(&desk.from);
                let prefix = &desk.from[..desk.prefix];
                let found = match points.item() {
                    Some((key, value)) => Ok(key.starts_with(prefix).then(|| copy(key, value))),
                    None => points.status().map(|()| None),
                };
                desk.first = Some(found);
            } else {
                desk.options = Some(snapshot_options());
            }
        }
        let mut resumed = false;
        poll_fn(|_| {
            if std::mem::replace(&mut resumed, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

fn ask(holder: &mut Pin<Box<dyn Future<Output = ()> + Send>>) {
    let polled = holder.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending(), "the holder of a snapshot never finishes");
}

fn next_options(
    holder: &mut Pin<Box<dyn Future<Output = ()> + Send>>,
    desk: &Mutex<Desk>,
) -> ReadOptions {
    ask(holder);
    desk.lock().options.take().expect("the holder answers at every poll")
}

impl View for RocksView {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        get(&self.db, key, &self.options)
    }

    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error> {
        assert!(from.starts_with(prefix), "the bloom filter of `prefix` knows no other keys");
        let mut holder = self.holder.lock();
        {
            let mut desk = self.desk.lock();
            desk.from.clear();
            desk.from.extend_from_slice(from);
            (desk.prefix, desk.asks_first) = (prefix.len(), true);
        }
        ask(&mut holder);
        let found = self.desk.lock().first.take().expect("the holder answers at every poll");
        found.map_err(|error| map_error(self.db.path(), &error))
    }

    fn seek(&self, range: Range<Vec<u8>>, reverse: bool) -> Result<Box<dyn Cursor + '_>, Error> {
        if range.is_empty() {
            return Ok(Box::new(NoEntries));
        }
        let mut options = self.options();
        options.set_iterate_lower_bound(range.start);
        options.set_iterate_upper_bound(range.end);
        let mut iterator = self.db.raw_iterator_opt(options);
        if reverse {
            iterator.seek_to_last();
        } else {
            iterator.seek_to_first();
        }
        Ok(Box::new(RocksCursor { iterator, reverse, consumed: false, dir: self.db.path() }))
    }
}

/// Over an empty range, whose bounds RocksDB does not define.
struct NoEntries;

impl Cursor for NoEntries {
    fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, Error> {
        Ok(None)
    }

    fn seek_to(&mut self, _key: &[u8]) -> Result<(), Error> {
        Ok(())
    }
}

struct RocksCursor<'a> {
    iterator: DBRawIterator<'a>,
    reverse: bool,
    /// Whether the entry under the iterator was returned already.
    consumed: bool,
    dir: &'a Path,
}

impl Cursor for RocksCursor<'_> {
    fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, Error> {
        if self.consumed {
            if self.reverse {
                self.iterator.prev();
            } else {
                self.iterator.next();
            }
        }
        self.consumed = true;
        if let Some((key, value)) = self.iterator.item() {
            return Ok(Some(copy(key, value)));
        }
        self.iterator.status().map(|()| None).map_err(|error| map_error(self.dir, &error))
    }

    fn seek_to(&mut self, key: &[u8]) -> Result<(), Error> {
        if self.reverse {
            self.iterator.seek_for_prev(key);
        } else {
            self.iterator.seek(key);
        }
        self.consumed = false;
        Ok(())
    }
}

/// Names RocksDB's error by what the caller must do.
pub(crate) fn map_error(dir: &Path, error: &rocksdb::Error) -> Error {
    let why = error.as_ref();
    match error.kind() {
        ErrorKind::Corruption => Error::corruption(&named_file(dir, why), named_offset(why), why),
        // Also files that are gone come as this, "No such file or directory" among them.
        ErrorKind::IOError if why.contains("No space left") => {
            Error::Full { path: named_file(dir, why) }
        }
        ErrorKind::IOError => Error::io(&named_file(dir, why), io::Error::other(why.to_owned())),
        _ => Error::Engine { why: format!("{}: {why}", dir.display()) },
    }
}

/// The file that a message names, else the directory.
fn named_file(dir: &Path, why: &str) -> PathBuf {
    let separators =
        |c: char| c.is_whitespace() || matches!(c, ':' | ',' | ';' | '(' | ')' | '\'' | '"');
    let is_file = |word: &&str| {
        let name = word.rsplit('/').next().unwrap_or_default();
        name.ends_with(".sst")
            || name == "CURRENT"
            || name.starts_with("MANIFEST-")
            || name.starts_with("OPTIONS-")
    };
    match why.split(separators).find(is_file) {
        Some(word) if word.contains('/') && Path::new(word).starts_with(dir) => PathBuf::from(word),
        Some(word) => dir.join(word.rsplit('/').next().unwrap_or(word)),
        None => dir.to_path_buf(),
    }
}

fn named_offset(why: &str) -> u64 {
    let mut words = why.split_whitespace();
    words.find(|word| *word == "offset");
    words.next().and_then(|word| word.trim_end_matches(',').parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_offsets_are_found_in_messages() {
        let dir = Path::new("/data/shards/7");
        let why = "Corruption: block checksum mismatch: stored = 1, computed = 2, type = 4  in \
            /data/shards/7/000012.sst offset 4096 size 77";
        assert_eq!(named_file(dir, why), dir.join("000012.sst"));
        assert_eq!(named_offset(why), 4096);
        let why = "Corruption: Can't access /000009.sst: IO error: No such file or directory";
        assert_eq!(named_file(dir, why), dir.join("000009.sst"));
        assert_eq!(named_offset(why), 0);
        assert_eq!(named_file(dir, "Corruption: something else"), dir);
        assert_eq!(
            named_file(dir, "IO error: while reading /data/shards/7/MANIFEST-000005"),
            dir.join("MANIFEST-000005")
        );
    }
}

//! Owns the contract that every state store keeps. Does not know what keys and values mean.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Weak};

use bytes::Bytes;

use crate::error::Error;
use crate::fs::Fs;
use crate::state::batch::Batch;
use crate::state::filter::Filter;

/// One replica's store: ordered bytes, with one writer at a time and any number of readers.
///
/// Invariants:
/// - a batch is atomic, in memory and on disk;
/// - what is durable is a prefix of the batches in the order of their writes;
/// - dropping the last handle flushes nothing.
pub trait Engine: Send + Sync + 'static {
    /// The newest value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// The first entry at or behind `from` whose key begins with `prefix`, which is a data prefix
    /// ([`crate::state::key::data_prefix`]). One seek; a key that is not there seldom costs a read.
    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error>;

    /// A view that later writes do not change. It holds back the freeing of space: keep it for one
    /// page, not longer.
    fn view(&self) -> Result<Box<dyn View>, Error>;

    /// Writes atomically; readable when it returns, durable after the next [`Engine::flush`].
    fn write(&self, batch: Batch) -> Result<(), Error>;

    /// Everything written before is durable when it returns. After an error the store is no longer
    /// usable.
    fn flush(&self) -> Result<(), Error>;

    /// Makes a directory that [`Engines::open`] can open and that holds everything written before;
    /// durable when it returns. `dir` must not exist, its parent must. The files stand in
    /// [`Engines::fs`].
    fn checkpoint(&self, dir: &Path) -> Result<(), Error>;

    /// Runs every entry of `range` (all entries, without one) past the filter as it is now, after a
    /// flush. When it returns, no entry that the filter drops on sight (a key outside the arc) is
    /// left there. Only a compaction without a range is sure to notice that RocksDB left something
    /// out.
    fn compact(&self, range: Option<Range<Vec<u8>>>) -> Result<(), Error>;

    /// Ends a [`Engine::compact`] that is under way, and refuses later ones with
    /// [`Error::Stopped`]: the store is about to be closed, and nobody shall wait for all of it to
    /// be rewritten. Blocks for the moment that this takes.
    fn end_compactions(&self);

    /// The parts that the store consists of, where it consists of parts; they may overlap. What is not
    /// flushed is in none.
    fn strata(&self) -> Result<Vec<Stratum>, Error> {
        Ok(Vec::new())
    }

    /// What the store takes, on disk and in memory; an estimate.
    fn approximate_bytes(&self) -> u64;

    /// What a crash would lose; an estimate, but 0 only when everything is durable.
    fn unflushed_bytes(&self) -> u64;

    /// Whether the store is still usable. What fails in the background shows here, or at the next
    /// write or flush, so whoever owns an idle store asks now and then.
    fn health(&self) -> Result<(), Error>;

    /// What compaction may drop.
    fn filter(&self) -> &Arc<Filter>;

    /// Cannot be upgraded any more once the store is closed: its last handle and its last view are
    /// dropped, and nothing of it runs in the background. Only then may its directory be replaced.
    fn open_marker(&self) -> Weak<()>;
}

/// A part of a store.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct Stratum {
    /// Its first physical key.
    pub first: Bytes,
    /// Its last.
    pub last: Bytes,
    /// What it takes.
    pub bytes: u64,
}

/// A consistent view of a store.
pub trait View: Send {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// See [`Engine::first`].
    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error>;

    /// A cursor over the keys in `range`, which begins before its first (in reverse: behind its
    /// last) entry.
    fn seek(&self, range: Range<Vec<u8>>, reverse: bool) -> Result<Box<dyn Cursor + '_>, Error>;
}

/// A position in a view.
pub trait Cursor {
    /// The next entry in the cursor's direction; `None` at the end of the range.
    fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, Error>;

    /// Moves, in either direction, so that [`Cursor::next`] returns the first entry at or behind
    /// `key` (in reverse: the last at or before it), inside the range.
    fn seek_to(&mut self, key: &[u8]) -> Result<(), Error>;
}

/// How to open a store.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct OpenState {
    /// Whether a missing store is made. Without it, a missing store is [`Error::Io`] with
    /// `NotFound`: a store that should be there and is not must never come up empty.
    pub create: bool,
}

/// The node's factory of stores: knows the budget that they share.
pub trait Engines: Send + Sync + 'static {
    /// Opens the store in `dir`. One handle at a time for a directory.
    fn open(&self, dir: &Path, options: OpenState) -> Result<Arc<dyn Engine>, Error>;

    /// Removes a closed store with its directory; one that is not there is no error.
    fn destroy(&self, dir: &Path) -> Result<(), Error>;

    /// Where checkpoint directories stand, and where they are read, sent, received and swapped.
    fn fs(&self) -> Arc<dyn Fs>;
}

/// The answer when a store is missing and must not be made.
pub(crate) fn missing(dir: &Path) -> Error {
    let why = "there is no state store here, and none may be made";
    Error::io(dir, std::io::Error::new(std::io::ErrorKind::NotFound, why))
}

/// The answer when a checkpoint's directory exists.
pub(crate) fn exists(dir: &Path) -> Error {
    Error::invalid(format!(
        "{}: exists already; a checkpoint makes its own directory",
        dir.display()
    ))
}

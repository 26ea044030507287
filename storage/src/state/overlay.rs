//! Owns reading through a batch that is being built: what an entry has put so far is seen by the
//! rest of it. Does not write (the batch is handed back) and does not judge conditions.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::Arc;

use bytes::Bytes;

use crate::error::Error;
use crate::state::batch::Batch;
use crate::state::engine::{Cursor, Engine, View};
use crate::state::key::{self, MetaName};
use crate::state::read::{self, Reader, Versioned};
use crate::state::value;

/// Set keys, and with `None` removed ones.
type Pending = BTreeMap<Bytes, Option<Bytes>>;

/// A batch in the making, over the newest state of a store.
///
/// Only the one writer of the store uses it, so the store does not change below it.
pub struct Overlay {
    engine: Arc<dyn Engine>,
    pending: Pending,
    bytes: u64,
}

impl Overlay {
    /// An empty batch over a store.
    pub fn new(engine: Arc<dyn Engine>) -> Overlay {
        Overlay { engine, pending: Pending::new(), bytes: 0 }
    }

    /// The newest version of a key, delete markers and expired values included.
    pub fn get_newest(&self, keyspace: u32, user_key: &[u8]) -> Result<Option<Versioned>, Error> {
        self.get_at(keyspace, user_key, u64::MAX)
    }

    /// The newest version of a key at or below `version_max`, delete markers and expired values
    /// included.
    pub fn get_at(
        &self,
        keyspace: u32,
        user_key: &[u8],
        version_max: u64,
    ) -> Result<Option<Versioned>, Error> {
        let prefix = key::data_prefix(keyspace, user_key);
        let from = key::data_at(&prefix, version_max);
        let below = |from: &[u8]| self.engine.first(from, &prefix);
        let first = first(&self.pending, &from, &prefix, below)?;
        first.map(|(physical, stored)| read::versioned(&physical, &stored)).transpose()
    }

    /// Puts a version of a key. `expires_at_version` 0: it never expires.
    pub fn put(
        &mut self,
        keyspace: u32,
        user_key: &[u8],
        version: u64,
        bytes: &[u8],
        expires_at_version: u64,
    ) {
        self.put_raw(
            key::data(keyspace, user_key, version),
            value::encode(false, expires_at_version, bytes),
        );
    }

    /// Puts a delete marker as a version of a key.
    pub fn delete(&mut self, keyspace: u32, user_key: &[u8], version: u64) {
        self.put_raw(key::data(keyspace, user_key, version), value::encode(true, 0, b""));
    }

    /// The value of a physical key.
    pub fn get(&self, physical: &[u8]) -> Result<Option<Bytes>, Error> {
        match self.pending.get(physical) {
            Some(pending) => Ok(pending.clone()),
            None => self.engine.get(physical),
        }
    }

    /// Sets a physical key.
    pub fn put_raw(&mut self, physical: impl Into<Bytes>, value: impl Into<Bytes>) {
        let (physical, value) = (physical.into(), value.into());
        self.bytes += (physical.len() + value.len()) as u64;
        self.pending.insert(physical, Some(value));
    }

    /// Removes a physical key.
    pub fn delete_raw(&mut self, physical: impl Into<Bytes>) {
        let physical = physical.into();
        self.bytes += physical.len() as u64;
        self.pending.insert(physical, None);
    }

    /// A `Meta` record.
    pub fn meta(&self, name: MetaName) -> Result<Option<Bytes>, Error> {
        self.get(&key::meta(name))
    }

    /// Sets a `Meta` record.
    pub fn put_meta(&mut self, name: MetaName, value: impl Into<Bytes>) {
        self.put_raw(key::meta(name), value);
    }

    /// Up to `max` entries of a physical range, in order, as they will be once the batch is
    /// written.
    pub fn range(&self, range: Range<Vec<u8>>, max: usize) -> Result<Vec<(Bytes, Bytes)>, Error> {
        let view = self.view()?;
        let mut cursor = view.seek(range, false)?;
        let mut entries = Vec::new();
        while entries.len() < max
            && let Some(entry) = cursor.next()?
        {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// Reads and scans the state as it will be once the batch is written.
    pub fn reader(&self) -> Result<Reader<'_>, Error> {
        Ok(Reader::new(Box::new(self.view()?)))
    }

    /// Whether nothing was put or removed.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Bytes put so far; what was put twice counts twice.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The batch to write.
    pub fn into_batch(self) -> Batch {
        let mut batch = Batch { ops: Vec::with_capacity(self.pending.len()) };
        for (physical, value) in self.pending {
            match value {
                Some(value) => batch.put(physical, value),
                None => batch.delete(physical),
            }
        }
        batch
    }

    fn view(&self) -> Result<MergedView<'_>, Error> {
        Ok(MergedView { pending: &self.pending, below: self.engine.view()? })
    }
}

/// The first entry at or behind `from` with this prefix: pending over what lies `below`.
fn first(
    pending: &Pending,
    from: &[u8],
    prefix: &[u8],
    below: impl Fn(&[u8]) -> Result<Option<(Bytes, Bytes)>, Error>,
) -> Result<Option<(Bytes, Bytes)>, Error> {
    let in_prefix = (Bound::Included(from), Bound::Unbounded);
    let mut pending_here =
        pending.range::<[u8], _>(in_prefix).take_while(|(key, _)| key.starts_with(prefix));
    let put = pending_here.find_map(|(key, value)| Some((key.clone(), value.clone()?)));
    let mut stored = below(from)?;
    while let Some((key, _)) = &stored
        && pending.contains_key(key)
    {
        // Replaced or removed by the batch: what counts below begins right behind it.
        let mut behind = key.to_vec();
        behind.push(0);
        stored = below(&behind)?;
    }
    Ok(match (put, stored) {
        (Some(put), Some(stored)) if stored.0 < put.0 => Some(stored),
        (Some(put), _) => Some(put),
        (None, stored) => stored,
    })
}

struct MergedView<'a> {
    pending: &'a Pending,
    below: Box<dyn View>,
}

impl View for MergedView<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        match self.pending.get(key) {
            Some(pending) => Ok(pending.clone()),
            None => self.below.get(key),
        }
    }

    fn first(&self, from: &[u8], prefix: &[u8]) -> Result<Option<(Bytes, Bytes)>, Error> {
        first(self.pending, from, prefix, |from| self.below.first(from, prefix))
    }

    fn seek(&self, range: Range<Vec<u8>>, reverse: bool) -> Result<Box<dyn Cursor + '_>, Error> {
        let below = self.below.seek(range.clone(), reverse)?;
        Ok(Box::new(MergedCursor {
            pending: self.pending,
            next_pending: if reverse {
                Bound::Excluded(range.end.clone())
            } else {
                Bound::Included(range.start.clone())
            },
            range,
            reverse,
            below,
            ahead: None,
        }))
    }
}

struct MergedCursor<'a> {
    pending: &'a Pending,
    range: Range<Vec<u8>>,
    reverse: bool,
    /// The lower (in reverse: the upper) bound of the pending entries that are still to come.
    next_pending: Bound<Vec<u8>>,
    below: Box<dyn Cursor + 'a>,
    /// The next entry from below, when it was looked at but not returned.
    ahead: Option<(Bytes, Bytes)>,
}

impl<'a> MergedCursor<'a> {
    fn peek_pending(&self) -> Option<(&'a Bytes, &'a Option<Bytes>)> {
        let (start, end) =
            (Bound::Included(&self.range.start[..]), Bound::Excluded(&self.range.end[..]));
        let own = self.next_pending.as_ref().map(|key| &key[..]);
        let bounds = if self.reverse { (start, own) } else { (own, end) };
        if is_empty(bounds) {
            return None;
        }
        let mut rest = self.pending.range::<[u8], _>(bounds);
        if self.reverse { rest.next_back() } else { rest.next() }
    }
}

impl Cursor for MergedCursor<'_> {
    fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, Error> {
        loop {
            if self.ahead.is_none() {
                self.ahead = self.below.next()?;
            }
            let Some((key, value)) = self.peek_pending() else {
                return Ok(self.ahead.take());
            };
            let below_is_first = self
                .ahead
                .as_ref()
                .is_some_and(|(below, _)| if self.reverse { below > key } else { below < key });
            if below_is_first {
                return Ok(self.ahead.take());
            }
            if self.ahead.as_ref().is_some_and(|(below, _)| below == key) {
                self.ahead = None;
            }
            self.next_pending = Bound::Excluded(key.to_vec());
            if let Some(value) = value {
                return Ok(Some((key.clone(), value.clone())));
            }
        }
    }

    fn seek_to(&mut self, key: &[u8]) -> Result<(), Error> {
        self.ahead = None;
        self.below.seek_to(key)?;
        self.next_pending = if self.reverse {
            if key < &self.range.end[..] {
                Bound::Included(key.to_vec())
            } else {
                Bound::Excluded(self.range.end.clone())
            }
        } else {
            Bound::Included(key.max(&self.range.start[..]).to_vec())
        };
        Ok(())
    }
}

/// Whether nothing can lie between two bounds; `BTreeMap::range` panics on such.
fn is_empty(bounds: (Bound<&[u8]>, Bound<&[u8]>)) -> bool {
    match bounds {
        (Bound::Included(from), Bound::Included(to)) => from > to,
        (
            Bound::Included(from) | Bound::Excluded(from),
            Bound::Excluded(to) | Bound::Included(to),
        ) => from >= to,
        _ => false,
    }
}

//! Owns one page of one shard: what is asked for, which versions are shown, where the page ends. Does
//! not merge pages and does not choose the shard.
//!
//! A page ends at its bytes, its entries, the scan's limit, or after so many stored versions examined
//! that it would hold a thread for long: then it may be empty, and still goes on behind its token. No
//! iterator lives between pages.

use bytes::Bytes;
use coracle_proto::entity::{EntityRule, successor};
use coracle_proto::limits::{SCAN_PAGE_BYTES, SCAN_PAGE_ENTRIES};
use coracle_proto::reason::Fault;
use coracle_proto::ring;
use coracle_proto::shard_map::{Keyspace, ShardMap};
use coracle_proto::token::{ScanToken, TokenError};
use coracle_proto::v1;
use coracle_raft::clock::HybridTime;
use coracle_raft::descriptor::Descriptor;
use coracle_raft::group::Group;
use coracle_raft::state_machine::ReadState;
use coracle_raft::types::Position;
use coracle_storage::Error as StorageError;
use coracle_storage::state::value::Value;
use coracle_storage::state::{Cursor, View, key};
use tokio::time::Instant;

use crate::fault::Refusal;
use crate::router::read::{fix, still_there};

/// The smallest page that is worth a question.
pub(crate) const PAGE_BYTES_MIN: usize = 16 << 10;
/// Stored versions that one page examines: some tens of milliseconds of one thread, on a run of
/// deleted keys as on live ones. Beyond: the page ends.
const EXAMINED_MAX: usize = 32_768;
/// Their bytes: large values that were overwritten are read like others. Beyond: the page ends.
const EXAMINED_BYTES_MAX: usize = 16 << 20;
/// Versions of one key that are stepped over before the rest is passed by a seek, which costs about
/// so many steps.
const STEPS_BEFORE_SEEK: usize = 8;

/// What a page is asked for.
#[derive(Clone, Debug)]
pub(crate) struct PageSpec {
    keyspace: u32,
    rule: EntityRule,
    hash_seed: u64,
    /// Of the whole scan.
    range: Range,
    /// What is left of it behind the token.
    rest: Range,
    keys_only: bool,
    page_bytes: usize,
    /// Where the scan stands; its version is 0 while the leader may still choose.
    token: ScanToken,
}

/// The keys `start..end`; no `end` is no bound.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Range {
    start: Vec<u8>,
    end: Option<Vec<u8>>,
}

/// A page as it was read.
#[derive(Debug, Default)]
pub(crate) struct Page {
    entries: Vec<v1::KeyValue>,
    /// The last key that was decided, shown or not; empty when there was none.
    last: Bytes,
    /// Whether the range ended with it.
    done: bool,
    version: u64,
}

impl Range {
    fn of(request: &v1::ScanRequest) -> Range {
        let start = request.start.clone().max(request.prefix.clone()).to_vec();
        let end = (!request.end.is_empty()).then(|| request.end.to_vec());
        let behind = successor(&request.prefix).filter(|_| !request.prefix.is_empty());
        let end = match (end, behind) {
            (Some(end), Some(behind)) => Some(end.min(behind)),
            (end, behind) => end.or(behind),
        };
        Range { start, end }
    }

    /// What is left behind the last key.
    fn behind(&self, last: &[u8], reverse: bool) -> Range {
        if last.is_empty() {
            return self.clone();
        }
        if reverse {
            let end = self.end.as_deref().map_or(last, |end| end.min(last));
            return Range { start: self.start.clone(), end: Some(end.to_vec()) };
        }
        let mut next = last.to_vec();
        next.push(0);
        Range { start: self.start.clone().max(next), end: self.end.clone() }
    }

    fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }
}

impl PageSpec {
    /// From a request whose limits were checked.
    pub(crate) fn new(
        map: &ShardMap,
        keyspace: &Keyspace,
        request: &v1::ScanRequest,
    ) -> Result<PageSpec, Fault> {
        let range = Range::of(request);
        let token = if request.resume_token.is_empty() {
            let at_version = request.read.as_ref().map_or(0, |read| read.at_version);
            ScanToken::begin(request, keyspace.id, at_version)
        } else {
            let invalid = |error: TokenError| Fault::invalid("resume_token", error.to_string());
            let token = ScanToken::decode(&request.resume_token).map_err(invalid)?;
            token.check(request, keyspace.id).map_err(invalid)?;
            token
        };
        let asked = match request.page_bytes as usize {
            0 => SCAN_PAGE_BYTES,
            asked => asked,
        };
        Ok(PageSpec {
            keyspace: keyspace.id.0,
            rule: keyspace.rule,
            hash_seed: map.hash_seed(),
            rest: range.behind(&token.last_key, request.reverse),
            range,
            keys_only: request.keys_only,
            page_bytes: asked.clamp(PAGE_BYTES_MIN, SCAN_PAGE_BYTES),
            token,
        })
    }

    /// The entity of the whole scan, where it has only one: then one shard holds all of it.
    pub(crate) fn entity(&self, keyspace: &Keyspace) -> Option<Vec<u8>> {
        let end = self.range.end.as_deref().unwrap_or_default();
        keyspace.rule.entity_of_range(&self.range.start, end).map(<[u8]>::to_vec)
    }

    /// Where the scan stands.
    pub(crate) fn token(&self) -> &ScanToken {
        &self.token
    }

    /// Whether nothing can be left.
    pub(crate) fn is_over(&self) -> bool {
        self.rest.is_empty() || self.token.remaining == Some(0)
    }

    /// What reading a page was worth, in keys.
    pub(crate) fn keys(page: &Page) -> u64 {
        1 + page.entries.len() as u64
    }

    /// A page as its answer.
    pub(crate) fn response(&self, page: Page, served: v1::Served) -> v1::ScanResponse {
        let last = if page.last.is_empty() { self.token.last_key.clone() } else { page.last };
        let mut token = self.token.advance(last, page.entries.len() as u64);
        token.version = page.version;
        v1::ScanResponse {
            done: page.done || token.remaining == Some(0),
            entries: page.entries,
            version: page.version,
            resume_token: token.encode(),
            served: Some(served),
        }
    }

    fn entries_max(&self) -> usize {
        let remaining = self.token.remaining.and_then(|left| usize::try_from(left).ok());
        remaining.map_or(SCAN_PAGE_ENTRIES, |left| left.min(SCAN_PAGE_ENTRIES))
    }
}

/// Reads a page on a replica of the shard. `position`: of the scan's only entity, where it has one.
pub(crate) async fn read_page(
    group: &Group,
    spec: &PageSpec,
    epoch: u64,
    position: Option<u64>,
    deadline: Instant,
) -> Result<(Page, Position), Refusal> {
    let asked = spec.token.version;
    let fixed = fix(group, (asked > 0).then_some(asked), deadline).await?;
    let version = fixed.version;
    let wanted = spec.clone();
    let look = move |state: &ReadState| {
        let serves = |descriptor: &&Descriptor| match position {
            Some(position) => descriptor.owns(wanted.keyspace, position),
            None => descriptor.arc.is_some() && (epoch == 0 || epoch == descriptor.epoch),
        };
        let descriptor = state.descriptor.as_ref().filter(serves);
        let descriptor = descriptor.ok_or_else(|| Refusal::Stale(state.descriptor.clone()))?;
        let page = wanted.read(state.reader.view(), descriptor, version)?;
        Ok::<_, Refusal>((page, state.position, descriptor.arc))
    };
    let (page, at, arc) = group.read_at(fixed, deadline, look).await??;
    still_there(group, spec.keyspace, version, arc, deadline).await?;
    Ok((page, at))
}

/// Fixes a version on a shard, and says which arc it holds.
pub(crate) async fn fix_version(
    group: &Group,
    version: u64,
    epoch: u64,
    deadline: Instant,
) -> Result<(v1::FixVersionResponse, Position), Refusal> {
    // First: what changes hands later is found by the epoch that the pages name.
    let look = |state: &ReadState| (state.descriptor.clone(), state.position);
    let (descriptor, at) = group.read(deadline, look).await?;
    let known = descriptor.as_ref().filter(|known| epoch == 0 || epoch == known.epoch);
    let Some((known, (start, end))) = known.and_then(|known| Some((known, known.arc?))) else {
        return Err(Refusal::Stale(descriptor));
    };
    let epoch = known.epoch;
    let version = fix(group, (version > 0).then_some(version), deadline).await?.version;
    Ok((v1::FixVersionResponse { version, start, end, epoch, served: None }, at))
}

impl PageSpec {
    fn read(
        &self,
        view: &dyn View,
        descriptor: &Descriptor,
        version: u64,
    ) -> Result<Page, StorageError> {
        let mut page = Page { version, ..Page::default() };
        if self.is_over() {
            page.done = true;
            return Ok(page);
        }
        let range = key::data_range(self.keyspace, &self.rest.start, self.rest.end.as_deref());
        let cursor = view.seek(range, self.token.reverse)?;
        let reverse = self.token.reverse;
        let mut keys =
            Keys { view, cursor, reverse, version, ahead: None, examined: 0, examined_bytes: 0 };
        let mut bytes = 0;
        while page.entries.len() < self.entries_max() && !keys.spent() {
            let Some((user_key, newest)) = keys.next()? else {
                page.done = true;
                break;
            };
            let owned = |key: &[u8]| {
                let entity = self.rule.entity(key);
                let position = ring::position(self.hash_seed, self.keyspace, entity);
                descriptor.owns(self.keyspace, position.0)
            };
            if let Some((at, value)) = newest.filter(|_| owned(&user_key)) {
                let entry = self.shown(user_key.clone(), at, value);
                bytes += entry_bytes(&entry);
                if bytes > self.page_bytes && !page.entries.is_empty() {
                    break;
                }
                page.entries.push(entry);
            }
            page.last = user_key;
        }
        Ok(page)
    }

    fn shown(&self, key: Bytes, version: u64, value: Value) -> v1::KeyValue {
        let expires_at_ms = HybridTime(value.expires_at).ms();
        let value = if self.keys_only { Bytes::new() } else { value.bytes };
        v1::KeyValue { key, entry: Some(v1::Entry { value, version, expires_at_ms }) }
    }
}

/// Walks over the keys of a range, counting what it passes.
struct Keys<'a> {
    view: &'a dyn View,
    cursor: Box<dyn Cursor + 'a>,
    reverse: bool,
    version: u64,
    /// The entry that ended the key before it.
    ahead: Option<(Bytes, Bytes)>,
    examined: usize,
    examined_bytes: usize,
}

/// A key, with its version and value where it has one to show.
type Decided = (Bytes, Option<(u64, Value)>);

impl Keys<'_> {
    fn spent(&self) -> bool {
        self.examined >= EXAMINED_MAX || self.examined_bytes >= EXAMINED_BYTES_MAX
    }

    fn next(&mut self) -> Result<Option<Decided>, StorageError> {
        let Some(first) = self.step()? else {
            return Ok(None);
        };
        let (prefix, _) = split(&first.0)?;
        let mut chosen = None;
        let mut entry = first;
        for steps in 1.. {
            let (_, version) = split(&entry.0)?;
            // Forward the newest comes first, and the first that counts stays; in reverse the last.
            if version <= self.version && (self.reverse || chosen.is_none()) {
                chosen = Some((version, decode(&entry)?));
            }
            if steps > STEPS_BEFORE_SEEK {
                self.skip(&prefix, &mut chosen)?;
                break;
            }
            match self.step()? {
                Some(next) if next.0.starts_with(&prefix) => entry = next,
                other => {
                    self.ahead = other;
                    break;
                }
            }
        }
        let (_, user_key) = key::decode_prefix(&prefix).ok_or_else(|| damaged(&prefix))?;
        let shown = chosen.filter(|(_, value)| !value.is_absent_at(self.version));
        Ok(Some((user_key.into(), shown)))
    }

    /// Passes the rest of a key's versions, and finds the one that counts among them.
    fn skip(
        &mut self,
        prefix: &[u8],
        chosen: &mut Option<(u64, Value)>,
    ) -> Result<(), StorageError> {
        self.examined += 2 * STEPS_BEFORE_SEEK;
        if self.reverse || chosen.is_none() {
            let first = self.view.first(&key::data_at(prefix, self.version), prefix)?;
            *chosen = match first {
                Some(entry) => Some((split(&entry.0)?.1, decode(&entry)?)),
                None => None,
            };
        }
        if self.reverse {
            // The prefix itself is no entry, and stands before all of its versions.
            self.cursor.seek_to(prefix)
        } else {
            self.cursor.seek_to(&key::data_prefix_end(prefix))
        }
    }

    fn step(&mut self) -> Result<Option<(Bytes, Bytes)>, StorageError> {
        if let Some(entry) = self.ahead.take() {
            return Ok(Some(entry));
        }
        let entry = self.cursor.next()?;
        if let Some((key, value)) = &entry {
            self.examined += 1;
            self.examined_bytes += key.len() + value.len();
        }
        Ok(entry)
    }
}

fn split(physical: &Bytes) -> Result<(Bytes, u64), StorageError> {
    let (prefix, version) = key::split_data(physical).ok_or_else(|| damaged(physical))?;
    Ok((physical.slice_ref(prefix), version))
}

fn decode((physical, stored): &(Bytes, Bytes)) -> Result<Value, StorageError> {
    Value::decode(stored).map_err(|_| damaged(physical))
}

/// The file is not known here: the store's own checksums matched. Keys are never shown.
fn damaged(physical: &[u8]) -> StorageError {
    StorageError::Corruption {
        file: "state".into(),
        offset: 0,
        why: format!("a stored version of {} key bytes makes no sense", physical.len()),
    }
}

/// What an entry counts for.
pub(crate) fn entry_bytes(entry: &v1::KeyValue) -> usize {
    entry.key.len() + entry.entry.as_ref().map_or(0, |entry| entry.value.len())
}

//! Owns the pages of a fake cluster's scans: one version over all shards, in key order, resumed by
//! the same tokens as the servers'.

use std::ops::Bound;

use bytes::Bytes;
use coracle_proto::entity::successor;
use coracle_proto::limits;
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::shard_map::KeyspaceId;
use coracle_proto::token::ScanToken;
use coracle_proto::v1;

use super::model::{Model, Place};
use crate::topology::{NodeId, ShardId};

/// Servers make no smaller pages.
const PAGE_BYTES_MIN: usize = 16 << 10;

/// A scan on its way: every page reads the state at the token's version.
pub(super) struct Scanning {
    request: v1::ScanRequest,
    keyspace: KeyspaceId,
    pub(super) token: ScanToken,
    pub(super) done: bool,
}

impl Model {
    /// Takes a scan on that came to `asked`, and fixes its version on every shard concerned: no later
    /// write of them gets it, or a lower one.
    pub(super) fn begin_scan(
        &mut self,
        asked: NodeId,
        request: v1::ScanRequest,
    ) -> Result<Scanning, Fault> {
        self.check_made()?;
        limits::check_scan(&request)?;
        limits::check_read(request.read.as_ref())?;
        if request.only_shard.is_some_and(|route| route.shard != 0) {
            let message = "scans of one shard are between nodes: a fake cluster has none";
            return Err(Fault::new(Reason::Unsupported, message));
        }
        let keyspace = self.keyspace(&request.keyspace)?.clone();
        let at_version = request.read.as_ref().map_or(0, |read| read.at_version);
        let mut token = match request.resume_token.is_empty() {
            true => ScanToken::begin(&request, keyspace.id, at_version),
            false => {
                let token = ScanToken::decode(&request.resume_token)?;
                token.check(&request, keyspace.id)?;
                token
            }
        };
        let by_prefix = keyspace.rule.entity_of_prefix(&request.prefix);
        let range = || keyspace.rule.entity_of_range(&request.start, &request.end);
        let entity = by_prefix.or_else(range);
        let shards: Vec<ShardId> = match entity {
            Some(entity) => vec![self.map.locate_key(&keyspace, entity).id],
            None => self.map.shards().iter().map(|shard| shard.id).collect(),
        };
        let mut highest = self.stamp();
        for shard in &shards {
            // Whoever merges several shards asks their leaders, however it treats other requests.
            let merges = entity.is_none() && self.leader(*shard).is_some();
            let asked = self.leader(*shard).filter(|_| merges).unwrap_or(asked);
            self.leader_from(asked, *shard)?;
            highest = highest.max(self.groups[shard].clock);
        }
        if token.version == 0 {
            token.version = highest;
        }
        for shard in &shards {
            self.check_readable(Place { keyspace: keyspace.id, shard: *shard }, token.version)?;
            let group = self.groups.get_mut(shard).expect("it is of the map");
            group.clock = group.clock.max(token.version);
        }
        let done = token.remaining == Some(0);
        Ok(Scanning { request, keyspace: keyspace.id, token, done })
    }

    /// The next page. Reads nothing that came after the scan began.
    pub(super) fn next_page(&self, scanning: &mut Scanning) -> v1::ScanResponse {
        let Scanning { request, keyspace, token, .. } = &*scanning;
        let most = token.remaining.and_then(|left| usize::try_from(left).ok());
        let bytes_max = match request.page_bytes as usize {
            0 => limits::SCAN_PAGE_BYTES,
            asked => asked.clamp(PAGE_BYTES_MIN, limits::SCAN_PAGE_BYTES),
        };
        let (mut entries, mut bytes, mut more) = (Vec::new(), 0, false);
        let mut last = token.last_key.clone();
        let keys = self.keys_behind(request, *keyspace, &token.last_key);
        for (looked_at, key) in keys.enumerate() {
            // As on servers, a page ends also after so many keys that are not shown: it may be empty.
            if looked_at == self.page_entries || Some(entries.len()) == most {
                more = true;
                break;
            }
            let held = self.held(*keyspace, key, token.version);
            let Some(held) = held.filter(|held| !held.is_absent_at(token.version)) else {
                last = key.clone();
                continue;
            };
            let mut entry = held.entry();
            if request.keys_only {
                entry.value = Bytes::new();
            }
            bytes += key.len() + entry.value.len();
            if bytes > bytes_max && !entries.is_empty() {
                more = true;
                break;
            }
            last = key.clone();
            entries.push(v1::KeyValue { key: key.clone(), entry: Some(entry) });
        }
        let token = token.advance(last, entries.len() as u64);
        scanning.done = !more || token.remaining == Some(0);
        let page = v1::ScanResponse {
            done: scanning.done,
            entries,
            version: token.version,
            resume_token: token.encode(),
            served: None,
        };
        scanning.token = token;
        page
    }

    /// The keys that are left of a scan, in its order; also those that it does not show.
    fn keys_behind<'a>(
        &'a self,
        request: &v1::ScanRequest,
        keyspace: KeyspaceId,
        last: &Bytes,
    ) -> Box<dyn Iterator<Item = &'a Bytes> + 'a> {
        let mut start = Bound::Included(request.start.clone().max(request.prefix.clone()));
        let behind = successor(&request.prefix).filter(|_| !request.prefix.is_empty());
        let ends = [Some(request.end.clone()), behind.map(Bytes::from)];
        let mut end = ends.into_iter().flatten().filter(|end| !end.is_empty()).min();
        match (last.is_empty(), request.reverse) {
            (true, _) => {}
            (false, true) => end = Some(end.map_or(last.clone(), |end| end.min(last.clone()))),
            (false, false) => start = Bound::Excluded(last.clone()),
        }
        let first = match &start {
            Bound::Included(key) | Bound::Excluded(key) => key.clone(),
            Bound::Unbounded => Bytes::new(),
        };
        if end.as_ref().is_some_and(|end| *end <= first) {
            return Box::new(std::iter::empty());
        }
        let start = start.map(|key| (keyspace, key));
        let end = match end {
            Some(end) => Bound::Excluded((keyspace, end)),
            None => Bound::Excluded((KeyspaceId(keyspace.0 + 1), Bytes::new())),
        };
        let keys = self.keys.range((start, end)).map(|((_, key), _)| key);
        match request.reverse {
            true => Box::new(keys.rev()),
            false => Box::new(keys),
        }
    }
}

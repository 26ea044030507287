//! Owns what a fake cluster has seen: the requests as they came, and counts of what became of them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;

use crate::session::{Consistency, RequestId};
use crate::topology::NodeId;

/// Requests that are kept for the test to look at. Beyond: the oldest go.
const REQUESTS_MAX: usize = 100_000;

/// A request as a node saw it: one attempt of a call.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// The node that it came to.
    pub node: NodeId,
    /// `get`, `batch_get`, `put`, `delete`, `write`, `scan` or `delete_range`.
    pub method: &'static str,
    /// The keyspace's name.
    pub keyspace: String,
    /// The first key; of a scan or a delete-range, its start or prefix.
    pub key: Bytes,
    /// Of a write: the same on every attempt. A delete-range in steps has none.
    pub request_id: Option<RequestId>,
    /// Of a write: the client's lowest sequence that was unanswered.
    pub lowest_unanswered: u64,
    /// The shard's epoch as the client knew it; 0 where it did not say.
    pub shard_epoch: u64,
    /// Of a read or scan at a version: that one; else 0.
    pub at_version: u64,
    /// Of a read: how fresh the answer must be; `None` where it did not say.
    pub consistency: Option<Consistency>,
}

/// How often what happened, since the cluster was made.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Counts {
    /// Requests that came to any node, retries included.
    pub requests: u64,
    /// Those of them that were writes.
    pub writes: u64,
    /// Writes that had been decided before, and were answered with their first result.
    pub duplicates: u64,
    /// Hops from the node that was asked to the one that serves.
    pub forwards: u64,
    /// Requests that were refused because the test said so.
    pub refused: u64,
    /// Requests that were lost because the test said so.
    pub lost_requests: u64,
    /// Requests that were carried out without an answer because the test said so.
    pub lost_answers: u64,
}

/// What was seen.
#[derive(Default)]
pub(super) struct Log {
    requests: VecDeque<Request>,
    pub(super) counts: Counts,
    /// By node: requests under way, and the most there were.
    at_once: BTreeMap<NodeId, (usize, usize)>,
}

impl Log {
    pub(super) fn came(&mut self, node: NodeId, operation: &Operation) {
        let request = seen(node, operation);
        self.counts.requests += 1;
        self.counts.writes += u64::from(request.request_id.is_some());
        if self.requests.len() == REQUESTS_MAX {
            self.requests.pop_front();
        }
        self.requests.push_back(request);
        let (now, most) = self.at_once.entry(node).or_default();
        *now += 1;
        *most = (*most).max(*now);
    }

    pub(super) fn went(&mut self, node: NodeId) {
        self.at_once.entry(node).or_default().0 -= 1;
    }

    pub(super) fn most_at_once(&self, node: NodeId) -> usize {
        self.at_once.get(&node).map_or(0, |(_, most)| *most)
    }

    pub(super) fn take(&mut self) -> Vec<Request> {
        std::mem::take(&mut self.requests).into()
    }

    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }
}

fn seen(node: NodeId, operation: &Operation) -> Request {
    let none = (None, None);
    let (method, keyspace, key, (id, route)) = match operation {
        Operation::Get(get) => ("get", &get.keyspace, get.key.clone(), (None, get.route)),
        Operation::BatchGet(batch) => {
            let first = batch.keys.first().cloned().unwrap_or_default();
            ("batch_get", &batch.keyspace, first, none)
        }
        Operation::Put(put) => ("put", &put.keyspace, put.key.clone(), (put.request_id, put.route)),
        Operation::Delete(delete) => {
            let id = (delete.request_id, delete.route);
            ("delete", &delete.keyspace, delete.key.clone(), id)
        }
        Operation::Write(write) => {
            let first = write.operations.first().map(|first| first.key.clone());
            let id = (write.request_id, write.route);
            ("write", &write.keyspace, first.unwrap_or_default(), id)
        }
        Operation::Scan(scan) => {
            let first = scan.start.clone().max(scan.prefix.clone());
            ("scan", &scan.keyspace, first, none)
        }
        Operation::DeleteRange(range) => {
            let first = range.start.clone().max(range.prefix.clone());
            ("delete_range", &range.keyspace, first, (range.request_id, range.only_shard))
        }
        _ => return Request { node, method: "other", ..Request::of(String::new(), Bytes::new()) },
    };
    let read = match operation {
        Operation::Get(get) => get.read.as_ref(),
        Operation::BatchGet(batch) => batch.read.as_ref(),
        Operation::Scan(scan) => scan.read.as_ref(),
        _ => None,
    };
    Request {
        node,
        method,
        at_version: read.map_or(0, |read| read.at_version),
        consistency: read.and_then(consistency),
        request_id: id.as_ref().map(request_id),
        lowest_unanswered: id.map_or(0, |id| id.lowest_unanswered),
        shard_epoch: route.map_or(0, |route| route.shard_epoch),
        ..Request::of(keyspace.clone(), key)
    }
}

fn request_id(id: &v1::RequestId) -> RequestId {
    RequestId { client: id.client, sequence: id.sequence, birth: id.birth }
}

fn consistency(read: &v1::ReadOptions) -> Option<Consistency> {
    Some(match read.consistency() {
        v1::Consistency::Unspecified => return None,
        v1::Consistency::Linearizable => Consistency::Linearizable,
        v1::Consistency::Session => Consistency::Session,
        v1::Consistency::Bounded => {
            Consistency::Bounded(Duration::from_millis(read.max_staleness_ms))
        }
        v1::Consistency::Any => Consistency::Any,
    })
}

impl Request {
    fn of(keyspace: String, key: Bytes) -> Request {
        Request {
            node: NodeId(0),
            method: "",
            keyspace,
            key,
            request_id: None,
            lowest_unanswered: 0,
            shard_epoch: 0,
            at_version: 0,
            consistency: None,
        }
    }
}

//! Owns a fake cluster's delete-ranges: one step on one shard, exactly once under its request id, and
//! the rounds of steps of a stream, which the servers' own tokens go on with. The rules are those of
//! the servers, in the same order.

use std::ops::Bound;

use bytes::Bytes;
use coracle_proto::delete_range;
use coracle_proto::limits::{DELETE_RANGE_KEYS_MAX, DELETE_RANGE_STEP_KEYS};
use coracle_proto::reason::{Fault, Outcome, Reason, Retry, metadata};
use coracle_proto::ring::{Arc, Position};
use coracle_proto::shard_map::KeyspaceId;
use coracle_proto::token::DeleteToken;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_response::Result as Answer;

use super::model::{Held, Model, Place};
use super::write::{Stored, Verdict, another_writes_id};
use crate::topology::{NodeId, ShardId};

/// Arcs that a delete-range is under way in at a time: as in the servers.
const LANES_AT_A_TIME: usize = 16;

/// What one step did, as its retries are told too.
#[derive(Clone)]
pub(super) struct Deleted {
    keys: u64,
    /// Goes on from here; empty: the keyspace's end.
    next: Bytes,
    /// What of the ring it was about.
    arc: Arc,
}

/// A delete-range on its way.
pub(super) struct Deleting {
    asked: NodeId,
    /// Without its token.
    request: v1::DeleteRangeRequest,
    token: DeleteToken,
    deleted: u64,
    version: u64,
    served: Option<v1::Served>,
    may_have_deleted: bool,
    pub(super) done: bool,
}

/// What is asked of one shard.
struct Step {
    place: Place,
    /// What is left of the range.
    start: Bytes,
    end: Option<Bytes>,
    limit: usize,
    atomic: bool,
    /// Keys whose newest version lies above it stay.
    fence: u64,
    /// Where keys of several entities count, if the shard holds them.
    arc: Option<Arc>,
    /// `None` of an atomic one.
    lane: Option<DeleteToken>,
}

impl Model {
    /// Takes a delete-range on that came to `asked`. Nothing is deleted yet.
    pub(super) fn begin_delete_range(
        &mut self,
        asked: NodeId,
        request: v1::DeleteRangeRequest,
    ) -> Result<Deleting, Fault> {
        self.check_made()?;
        if !request.atomic && request.request_id.is_some() {
            let message = "the steps of a delete-range have ids of their own: leave it out";
            return Err(Fault::invalid("request_id", message));
        }
        let token = self.begun(&request)?;
        Ok(Deleting {
            asked,
            request: v1::DeleteRangeRequest { resume_token: Bytes::new(), ..request },
            token,
            deleted: 0,
            version: 0,
            served: None,
            may_have_deleted: false,
            done: false,
        })
    }

    /// Where a request stands: at its token, or before its first step.
    fn begun(&self, request: &v1::DeleteRangeRequest) -> Result<DeleteToken, Fault> {
        let keyspace = self.keyspace(&request.keyspace)?;
        let Some(asked) = delete_range::read(&self.map, keyspace, request)? else {
            return Ok(DeleteToken { rest: None, ..DeleteToken::begin(request, keyspace.id) });
        };
        asked.begun(keyspace, request, |route| self.arc_of_shard(route))
    }

    /// Fixes the version of a delete-range that is about to begin on every shard that it may step on:
    /// no later write of them gets it, or a lower one.
    fn fix_fence(&mut self, asked: NodeId, token: &DeleteToken) -> Result<u64, Fault> {
        let shards: Vec<ShardId> = match token.lanes.first() {
            Some(lane) => vec![self.map.locate(lane.arc.start()).id],
            None => self.map.shards().iter().map(|shard| shard.id).collect(),
        };
        let mut version = self.stamp();
        for shard in &shards {
            // Whoever asks several shards asks their leaders, however it treats other requests.
            let asked = self.leader(*shard).filter(|_| shards.len() > 1).unwrap_or(asked);
            self.leader_from(asked, *shard)?;
            version = version.max(self.groups[shard].clock);
        }
        for shard in &shards {
            let group = self.groups.get_mut(shard).expect("it is of the map");
            group.clock = group.clock.max(version);
        }
        Ok(version)
    }

    /// One round of steps, one on each arc under way, and the progress that it made.
    pub(super) fn next_progress(
        &mut self,
        deleting: &mut Deleting,
    ) -> Result<v1::DeleteRangeResponse, Fault> {
        if deleting.request.atomic && !deleting.token.is_done() {
            deleting.done = true;
            return self.delete_step(deleting.asked, &deleting.request);
        }
        if deleting.token.version == 0 && !deleting.token.is_done() {
            deleting.token.version = self.fix_fence(deleting.asked, &deleting.token)?;
            let first = deleting.progress(Vec::new());
            // Whoever asked has it before anything is deleted under it.
            deleting.done = true;
            return Ok(first);
        }
        while deleting.token.lanes.len() < LANES_AT_A_TIME
            && let Some(rest) = deleting.token.rest
        {
            let arc = self.map.locate(Position(rest)).arc;
            deleting.token.open_lane(arc.expect("a shard of the ring has an arc"));
        }
        let (mut steps, mut failed) = (Vec::new(), None);
        for lane in deleting.token.lanes.clone() {
            let at = lane.arc.start();
            let shard = self.map.locate(at).id;
            // Whoever steps through several shards asks their leaders, however it treats other requests.
            let only = delete_range::arc_of(at) == lane.arc;
            let asked = self.leader(shard).filter(|_| !only).unwrap_or(deleting.asked);
            let token = DeleteToken { lanes: vec![lane], rest: None, ..deleting.token.clone() };
            let request = v1::DeleteRangeRequest {
                resume_token: token.encode(),
                only_shard: None,
                ..deleting.request.clone()
            };
            match self.delete_step(asked, &request) {
                Ok(step) => steps.extend(deleting.take(at, step)?),
                Err(fault) if fault.retry() == Retry::Never => return Err(deleting.failed(fault)),
                Err(fault) => failed = Some(fault),
            }
        }
        match failed.filter(|_| steps.is_empty()) {
            Some(fault) => Err(deleting.failed(fault)),
            None => Ok(deleting.progress(steps)),
        }
    }

    /// Carries out an atomic delete-range, or a step of one, that came to `asked`.
    pub(super) fn delete_range(
        &mut self,
        asked: NodeId,
        request: &v1::DeleteRangeRequest,
    ) -> Result<Answer, Fault> {
        self.delete_step(asked, request).map(Answer::DeleteRange)
    }

    fn delete_step(
        &mut self,
        asked: NodeId,
        request: &v1::DeleteRangeRequest,
    ) -> Result<v1::DeleteRangeResponse, Fault> {
        let step = self.step_of(request)?;
        let node = self.leader_from(asked, step.place.shard)?;
        let id = request.request_id.as_ref();
        let stored = self.decide(step.place, id, |model, version| model.delete(&step, version))?;
        self.step_answer(&step, node, &stored)
    }

    /// What a request asks of which shard.
    fn step_of(&self, request: &v1::DeleteRangeRequest) -> Result<Step, Fault> {
        let keyspace = self.keyspace(&request.keyspace)?;
        let Some(asked) = delete_range::read(&self.map, keyspace, request)? else {
            return Err(Fault::invalid("end", "the range is empty: no key can be in it"));
        };
        let lane = asked.lane(request)?;
        let begins = lane.as_ref().map(|token| token.lanes[0].arc.start()).or(asked.position);
        let shard = self.map.locate(begins.expect("an atomic one is of an entity"));
        let route = request.only_shard.filter(|route| route.shard != 0);
        self.check_route(shard, route.as_ref())?;
        let from = lane.as_ref().map_or_else(Bytes::new, |token| token.lanes[0].from.clone());
        let limit = match request.step_keys as usize {
            _ if request.atomic => DELETE_RANGE_KEYS_MAX,
            0 => DELETE_RANGE_STEP_KEYS.min(self.shape.page_entries),
            asked => asked.min(DELETE_RANGE_KEYS_MAX).min(self.shape.page_entries),
        };
        Ok(Step {
            place: Place { keyspace: keyspace.id, shard: shard.id },
            start: from.max(asked.start),
            end: asked.end,
            limit,
            atomic: request.atomic,
            arc: shard.arc.filter(|_| asked.position.is_none()),
            fence: lane.as_ref().map_or(u64::MAX, |token| token.version),
            lane,
        })
    }

    /// Deletes what a step may, and says how far it has come.
    fn delete(&mut self, step: &Step, version: u64) -> Verdict {
        let keyspace = step.place.keyspace;
        // Whether there is one more decides over all of them, or nothing at all.
        let wanted = step.limit + usize::from(step.atomic);
        let keys = self.live(step, version, wanted);
        if step.atomic && keys.len() > step.limit {
            return Verdict::RangeTooLarge;
        }
        let next = match keys.last() {
            Some(last) if !step.atomic && keys.len() == step.limit => behind(last),
            _ => step.end.clone().unwrap_or_default(),
        };
        let count = keys.len() as u64;
        let marker = Held { version, value: None, expires_at: 0 };
        self.put_all(keyspace, keys.into_iter().map(|key| (key, marker.clone())));
        let arc = self.map.shard(step.place.shard).and_then(|shard| shard.arc);
        let arc = arc.expect("a shard of the ring has an arc");
        Verdict::RangeDeleted(Deleted { keys: count, next, arc })
    }

    /// The first keys that are there at a version.
    fn live(&self, step: &Step, version: u64, wanted: usize) -> Vec<Bytes> {
        if step.end.as_ref().is_some_and(|end| *end <= step.start) {
            return Vec::new();
        }
        let id = step.place.keyspace;
        let keyspace = self.map.keyspace_by_id(id).expect("keyspaces stay");
        let end = match &step.end {
            Some(end) => (id, end.clone()),
            None => (KeyspaceId(id.0 + 1), Bytes::new()),
        };
        let start = Bound::Included((id, step.start.clone()));
        let keys = self.keys.range((start, Bound::Excluded(end))).map(|((_, key), _)| key);
        let is_there = |key: &&Bytes| {
            let held = self.held(id, key, version);
            held.is_some_and(|held| held.version <= step.fence && !held.is_absent_at(version))
        };
        let is_owned = |key: &&Bytes| {
            step.arc.is_none_or(|arc| arc.contains(self.map.position_of(keyspace, key)))
        };
        keys.filter(is_there).filter(is_owned).take(wanted).cloned().collect()
    }

    fn step_answer(
        &self,
        step: &Step,
        node: NodeId,
        stored: &Stored,
    ) -> Result<v1::DeleteRangeResponse, Fault> {
        let deleted = match &stored.verdict {
            Verdict::RangeDeleted(deleted) => deleted,
            Verdict::RangeTooLarge => return Err(too_large(step.place.shard)),
            _ => return Err(another_writes_id()),
        };
        let mut left = step.lane.clone();
        if let Some(token) = &mut left {
            let next = &deleted.next;
            let is_over = next.is_empty() || step.end.as_ref().is_some_and(|end| next >= end);
            let begun = token.lanes[0].arc.start().0;
            if !token.settle(begun, deleted.arc, (!is_over).then(|| next.clone())) {
                let message = "a step has covered another arc than it was of";
                return Err(Fault::new(Reason::Internal, message));
            }
        }
        let served = Some(self.served(step.place, stored.step, node));
        Ok(v1::DeleteRangeResponse {
            deleted: deleted.keys,
            done: left.as_ref().is_none_or(DeleteToken::is_done),
            resume_token: left.map_or_else(Bytes::new, |left| left.encode()),
            version: stored.version,
            served,
            steps: served.into_iter().collect(),
        })
    }

    /// The arc of the shard that a route names, if it is right.
    fn arc_of_shard(&self, route: v1::Route) -> Result<Arc, Fault> {
        let shard = self.map.shard(ShardId(route.shard));
        let shard = shard.and_then(|shard| Some((shard, shard.arc?)));
        let Some((shard, arc)) = shard else {
            let message = "the route names a shard that holds no keys";
            return Err(Fault::new(Reason::StaleRoute, message));
        };
        self.check_route(shard, Some(&route))?;
        Ok(arc)
    }
}

impl Deleting {
    /// A step has come to its end: its lane goes on from there.
    fn take(
        &mut self,
        at: Position,
        step: v1::DeleteRangeResponse,
    ) -> Result<Option<v1::Served>, Fault> {
        let left = DeleteToken::decode(&step.resume_token)?;
        self.deleted += step.deleted;
        (self.version, self.served) = (step.version, step.served);
        self.may_have_deleted = true;
        self.token.replace(at.0, left.lanes);
        Ok(step.served)
    }

    fn progress(&mut self, steps: Vec<v1::Served>) -> v1::DeleteRangeResponse {
        self.done = self.token.is_done();
        // Nothing can be in the range: no version was fixed.
        let has_token = self.token.version > 0;
        v1::DeleteRangeResponse {
            deleted: self.deleted,
            resume_token: if has_token { self.token.encode() } else { Bytes::new() },
            done: self.done,
            version: self.version,
            served: self.served,
            steps,
        }
    }

    /// After a step, a failure no longer says that nothing was deleted.
    pub(super) fn failed(&self, fault: Fault) -> Fault {
        match self.may_have_deleted {
            true => fault.with_outcome(Outcome::Unknown),
            false => fault,
        }
    }
}

fn too_large(shard: ShardId) -> Fault {
    let limit = DELETE_RANGE_KEYS_MAX;
    let message = format!(
        "more than {limit} keys are in the range (DELETE_RANGE_KEYS_MAX): without atomic it is deleted in steps"
    );
    Fault::new(Reason::TooLarge, message)
        .with(metadata::LIMIT, "DELETE_RANGE_KEYS_MAX")
        .with(metadata::MAX, limit)
        .with(metadata::SHARD, shard)
}

/// The first key behind a key.
fn behind(key: &Bytes) -> Bytes {
    [key, &b"\0"[..]].concat().into()
}

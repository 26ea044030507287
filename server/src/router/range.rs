//! Owns one step of a delete-range on one shard: what is asked for, how much of it one entry may do,
//! what is left behind it. Does not choose the shard and does not go on (see `crate::delete`).
//!
//! Apply may count live keys alone, for the same on all replicas; the rest of its work is bounded
//! here. The leader first looks at its own state, as far as a step may go, and ends the step there. It
//! needs no fresh look: what is written meanwhile is met by apply, up to the limit of keys.

use bytes::Bytes;
use coracle_proto::entity;
use coracle_proto::limits::{
    DELETE_RANGE_EXAMINED_BYTES_MAX, DELETE_RANGE_EXAMINED_MAX, DELETE_RANGE_KEYS_MAX,
    DELETE_RANGE_STEP_KEYS,
};
use coracle_proto::reason::{Fault, Reason, metadata};
use coracle_proto::ring::{Arc, Position};
use coracle_proto::shard_map::{Keyspace, SYSTEM_KEYSPACE, ShardMap};
use coracle_proto::token::{DeleteToken, TokenError};
use coracle_proto::v1;
use coracle_raft::command::{self, Change, DeleteRange, Owned};
use coracle_raft::descriptor::Descriptor;
use coracle_raft::group::Group;
use coracle_raft::state_machine::ReadState;
use coracle_storage::Error as StorageError;
use coracle_storage::state::value::Value;
use coracle_storage::state::{View, key};
use tokio::time::Instant;

use crate::fault::Refusal;
use crate::router::answer::range_too_large;
use crate::router::plan::named_id;

/// Stored versions that a step passes: as many as a page of a scan does, on a run of deleted keys as
/// on live ones. Beyond: the step ends there.
const STEP_EXAMINED_MAX: usize = 32_768;
/// Their bytes, values included. Beyond: the step ends there.
const STEP_EXAMINED_BYTES_MAX: usize = 16 << 20;
/// Versions of one key that are stepped over before the rest is passed by a seek, which costs about
/// so many steps.
const STEPS_BEFORE_SEEK: usize = 8;

/// A delete-range within one entity, or a step of one.
#[derive(Clone, Debug)]
pub(crate) struct RangeSpec {
    id: command::RequestId,
    keyspace: u32,
    /// What is left of the range.
    start: Bytes,
    end: Option<Bytes>,
    limit: u32,
    atomic: bool,
    /// How keys are placed, where they are of several entities.
    owned: Option<Owned>,
    shape: Shape,
}

#[derive(Clone, Debug)]
enum Shape {
    /// Of this entity, at this position.
    Entity(u64),
    /// A step on the only lane of this token.
    Lane(DeleteToken),
    /// The first step on whatever arc the named shard holds; with a token of no lanes.
    Shard(DeleteToken),
}

/// Whether the range is of one entity; refuses what nobody may delete.
pub(crate) fn check(
    keyspace: &Keyspace,
    request: &v1::DeleteRangeRequest,
    entity: Option<&[u8]>,
) -> Result<(), Fault> {
    if keyspace.id == SYSTEM_KEYSPACE {
        let message = "the cluster's own records are deleted one by one";
        return Err(Fault::new(Reason::NotAllowed, message));
    }
    if request.atomic && entity.is_none() {
        let message = format!(
            "the range may hold several entities of keyspace {}: name a prefix of one, or delete it in steps, without atomic",
            keyspace.name
        );
        return Err(Fault::new(Reason::CrossEntity, message)
            .with(metadata::KEYSPACE, &keyspace.name)
            .with(metadata::FIELD, "atomic"));
    }
    if request.atomic && !request.resume_token.is_empty() {
        let message = "an atomic delete-range is done at once: it is never gone on with";
        return Err(Fault::invalid("resume_token", message));
    }
    Ok(())
}

/// The token of a request that brings one.
pub(crate) fn token(
    keyspace: &Keyspace,
    request: &v1::DeleteRangeRequest,
) -> Result<Option<DeleteToken>, Fault> {
    if request.resume_token.is_empty() {
        return Ok(None);
    }
    let invalid = |error: TokenError| Fault::invalid("resume_token", error.to_string());
    let token = DeleteToken::decode(&request.resume_token).map_err(invalid)?;
    token.check(request, keyspace.id).map_err(invalid)?;
    Ok(Some(token))
}

/// The arc of one position.
pub(crate) fn arc_of(position: u64) -> Arc {
    Arc::new(position, position.wrapping_add(1)).expect("the last position ends at 2^64")
}

impl RangeSpec {
    /// From a request whose limits were checked.
    pub(crate) fn new(
        map: &ShardMap,
        keyspace: &Keyspace,
        request: &v1::DeleteRangeRequest,
    ) -> Result<RangeSpec, Fault> {
        let bounds = entity::bounds(&request.start, &request.end, &request.prefix);
        let Some((start, end)) = bounds else {
            return Err(Fault::invalid("end", "the range is empty: no key can be in it"));
        };
        let entity = keyspace.rule.entity_of_range(&start, end.as_deref().unwrap_or_default());
        check(keyspace, request, entity)?;
        let position = entity.map(|entity| map.position_of(keyspace, entity).0);
        let shape = match (token(keyspace, request)?, position) {
            (_, Some(position)) if request.atomic => Shape::Entity(position),
            (Some(token), _) if token.lanes.len() == 1 && token.rest.is_none() => {
                Shape::Lane(token)
            }
            (Some(_), _) => {
                let message = "a step is of one arc: this token is of a delete-range over several";
                return Err(Fault::invalid("resume_token", message));
            }
            (None, Some(position)) => {
                Shape::Lane(DeleteToken::of_arc(request, keyspace.id, arc_of(position)))
            }
            (None, None) => Shape::Shard(DeleteToken::begin(request, keyspace.id)),
        };
        let start = match &shape {
            Shape::Lane(token) => token.lanes[0].from.clone().max(start.into()),
            Shape::Entity(_) | Shape::Shard(_) => start.into(),
        };
        let limit = match request.step_keys as usize {
            _ if request.atomic => DELETE_RANGE_KEYS_MAX,
            0 => DELETE_RANGE_STEP_KEYS,
            asked => asked.min(DELETE_RANGE_KEYS_MAX),
        };
        let owned = Owned { rule: keyspace.rule, hash_seed: map.hash_seed() };
        Ok(RangeSpec {
            id: named_id(request.request_id.as_ref())?,
            keyspace: keyspace.id.0,
            start,
            end: end.map(Bytes::from),
            limit: limit as u32,
            atomic: request.atomic,
            owned: position.is_none().then_some(owned),
            shape,
        })
    }

    /// Where the step begins on the ring; `None` where the shard itself is meant.
    pub(crate) fn position(&self) -> Option<u64> {
        match &self.shape {
            Shape::Entity(position) => Some(*position),
            Shape::Lane(token) => Some(token.lanes[0].arc.start().0),
            Shape::Shard(_) => None,
        }
    }

    /// What an applied step has left: `Some(None)` of one that is done at once, `None` when it has
    /// covered another arc than its own.
    pub(crate) fn left(&self, next: Bytes, arc: Option<(u64, u64)>) -> Option<Option<DeleteToken>> {
        let (start, end) = arc?;
        let arc = Arc::new(start, end)?;
        let mut token = match &self.shape {
            Shape::Entity(position) => return arc.contains(Position(*position)).then_some(None),
            Shape::Lane(token) => token.clone(),
            Shape::Shard(token) => {
                let mut token = token.clone();
                token.rest = Some(arc.start().0);
                token.open_lane(arc);
                token.rest = None;
                token
            }
        };
        let is_over = next.is_empty() || self.end.as_ref().is_some_and(|end| next >= *end);
        let begun = token.lanes[0].arc.start().0;
        token.settle(begun, arc, (!is_over).then_some(next)).then_some(Some(token))
    }

    fn examined_max(&self) -> (usize, usize) {
        match self.atomic {
            true => (DELETE_RANGE_EXAMINED_MAX, DELETE_RANGE_EXAMINED_BYTES_MAX),
            false => (STEP_EXAMINED_MAX, STEP_EXAMINED_BYTES_MAX),
        }
    }

    /// What is proposed, once the leader has looked.
    fn request(&self, position: u64, epoch: u64, end: Option<Bytes>) -> command::Request {
        let range = DeleteRange {
            end: end.unwrap_or_default(),
            limit: self.limit,
            whole: self.atomic,
            owned: self.owned,
        };
        let change = Change::DeleteRange(range);
        let operation = command::Operation { key: self.start.clone(), condition: None, change };
        let (id, keyspace) = (self.id, self.keyspace);
        command::Request { id, keyspace, position, epoch, operations: vec![operation] }
    }
}

/// Looks how far one entry may go, on the replica that is to propose it, and makes the request.
pub(crate) async fn step(
    group: &Group,
    spec: &RangeSpec,
    epoch: u64,
    deadline: Instant,
) -> Result<command::Request, Refusal> {
    let wanted = spec.clone();
    let look = move |state: &ReadState| {
        let held = state.descriptor.as_ref().and_then(|known| Some((known, known.arc?)));
        let (known, (first, _)) = held.ok_or_else(|| Refusal::Stale(state.descriptor.clone()))?;
        let position = wanted.position().unwrap_or(first);
        if !known.serves(wanted.keyspace, position, epoch) {
            return Err(Refusal::Stale(state.descriptor.clone()));
        }
        let looked = wanted.look(state.reader.view(), known, state.clock)?;
        Ok::<_, Refusal>((position, looked))
    };
    let (position, looked) = group.read_local(0, deadline, look).await??;
    let end = match looked {
        Looked::ToTheEnd => spec.end.clone(),
        Looked::UpTo(key) if !spec.atomic => Some(key),
        Looked::UpTo(_) => return Err(too_much_to_pass().into()),
    };
    Ok(spec.request(position, epoch, end))
}

/// Refused here and not by apply, which must not count what is dead. It says nothing of an earlier
/// attempt under the same id, as no refusal does.
fn too_much_to_pass() -> Fault {
    let message = format!(
        "the range holds too many or too large versions, deleted ones included, for an atomic delete-range ({DELETE_RANGE_EXAMINED_MAX} versions, DELETE_RANGE_EXAMINED_MAX; {DELETE_RANGE_EXAMINED_BYTES_MAX} bytes, DELETE_RANGE_EXAMINED_BYTES_MAX): without atomic it is deleted in steps"
    );
    range_too_large("DELETE_RANGE_EXAMINED_MAX", DELETE_RANGE_EXAMINED_MAX as u64, message)
}

/// How far a look went.
#[derive(Debug, PartialEq, Eq)]
enum Looked {
    /// All of the range was passed.
    ToTheEnd,
    /// What stands before this key was passed.
    UpTo(Bytes),
}

impl RangeSpec {
    fn look(
        &self,
        view: &dyn View,
        descriptor: &Descriptor,
        clock: u64,
    ) -> Result<Looked, StorageError> {
        let (examined_max, bytes_max) = self.examined_max();
        if self.end.as_ref().is_some_and(|end| *end <= self.start) {
            return Ok(Looked::ToTheEnd);
        }
        let range = key::data_range(self.keyspace, &self.start, self.end.as_deref());
        let mut cursor = view.seek(range, false)?;
        let (mut examined, mut bytes, mut live) = (0, 0, 0);
        let mut prefix = Bytes::new();
        let mut versions = 0;
        while let Some((physical, stored)) = cursor.next()? {
            examined += 1;
            bytes += physical.len() + stored.len();
            if !prefix.is_empty() && physical.starts_with(&prefix) {
                versions += 1;
                if versions == STEPS_BEFORE_SEEK {
                    examined += STEPS_BEFORE_SEEK;
                    cursor.seek_to(&key::data_prefix_end(&prefix))?;
                }
                continue;
            }
            let (of_key, _) = key::split_data(&physical).ok_or_else(|| damaged(&physical))?;
            prefix = physical.slice_ref(of_key);
            versions = 0;
            let (_, user_key) = key::decode_prefix(&prefix).ok_or_else(|| damaged(&prefix))?;
            // All or nothing is for apply to judge, which stops at the first key too many.
            let full = !self.atomic && live >= self.limit;
            // Never on its first key: a step goes on.
            if full || (examined > 1 && (examined > examined_max || bytes > bytes_max)) {
                return Ok(Looked::UpTo(user_key.into()));
            }
            let value = Value::decode(&stored).map_err(|_| damaged(&physical))?;
            live += u32::from(!value.is_absent_at(clock) && self.owns(descriptor, &user_key));
        }
        Ok(Looked::ToTheEnd)
    }

    fn owns(&self, descriptor: &Descriptor, key: &[u8]) -> bool {
        let owned =
            |owned: Owned| descriptor.owns(self.keyspace, owned.position(self.keyspace, key));
        self.owned.is_none_or(owned)
    }
}

/// The file is not known here: the store's own checksums matched. Keys are never shown.
fn damaged(physical: &[u8]) -> StorageError {
    StorageError::Corruption {
        file: "state".into(),
        offset: 0,
        why: format!("a stored version of {} key bytes makes no sense", physical.len()),
    }
}

//! Owns one step of a delete-range on one shard: what is asked for, how much of it one entry may do,
//! what is left behind it. Does not choose the shard and does not go on (see `crate::delete`).
//!
//! Apply may count live keys alone, for the same on all replicas; the rest of its work is bounded
//! here. The leader first looks at its own state, as far as a step may go, and ends the step there. It
//! needs no fresh look: what is written meanwhile is met by apply, and is no more than the group's queue
//! holds.

use bytes::Bytes;
use coracle_proto::delete_range;
use coracle_proto::limits::{
    DELETE_RANGE_EXAMINED_BYTES_MAX, DELETE_RANGE_EXAMINED_MAX, DELETE_RANGE_KEYS_MAX,
    DELETE_RANGE_STEP_KEYS,
};
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::ring::{Arc, Position};
use coracle_proto::shard_map::{Keyspace, ShardMap};
use coracle_proto::token::DeleteToken;
use coracle_proto::v1;
use coracle_raft::apply;
use coracle_raft::command::{self, Change, DeleteRange, NO_FENCE, Owned};
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
    /// Of one entity, at this position, at once.
    Entity(Position),
    /// A step on the only lane of this token.
    Lane(DeleteToken),
}

impl RangeSpec {
    /// From a request whose limits were checked.
    pub(crate) fn new(
        map: &ShardMap,
        keyspace: &Keyspace,
        request: &v1::DeleteRangeRequest,
    ) -> Result<RangeSpec, Fault> {
        let Some(asked) = delete_range::read(map, keyspace, request)? else {
            return Err(Fault::invalid("end", "the range is empty: no key can be in it"));
        };
        let shape = match (asked.lane(request)?, asked.position) {
            (Some(lane), _) => Shape::Lane(lane),
            (None, Some(position)) => Shape::Entity(position),
            (None, None) => unreachable!("an atomic one is of one entity"),
        };
        let start = match &shape {
            Shape::Lane(token) => token.lanes[0].from.clone().max(asked.start),
            Shape::Entity(_) => asked.start,
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
            end: asked.end,
            limit: limit as u32,
            atomic: request.atomic,
            owned: asked.position.is_none().then_some(owned),
            shape,
        })
    }

    /// Where the step begins on the ring.
    pub(crate) fn position(&self) -> Position {
        match &self.shape {
            Shape::Entity(position) => *position,
            Shape::Lane(token) => token.lanes[0].arc.start(),
        }
    }

    /// Keys whose newest version lies above it stay.
    fn fence(&self) -> u64 {
        match &self.shape {
            // It happens once, under the request's id, which its retries carry.
            Shape::Entity(_) => NO_FENCE,
            Shape::Lane(token) => token.version,
        }
    }

    /// What an applied step has left: `Some(None)` of one that is done at once, `None` when it has
    /// covered another arc than its own.
    pub(crate) fn left(&self, next: Bytes, arc: Option<(u64, u64)>) -> Option<Option<DeleteToken>> {
        let (start, end) = arc?;
        let arc = Arc::new(start, end)?;
        let mut token = match &self.shape {
            Shape::Entity(position) => return arc.contains(*position).then_some(None),
            Shape::Lane(token) => token.clone(),
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
    fn request(&self, epoch: u64, end: Option<Bytes>) -> command::Request {
        let range = DeleteRange {
            end: end.unwrap_or_default(),
            limit: self.limit,
            fence: self.fence(),
            whole: self.atomic,
            owned: self.owned,
        };
        let change = Change::DeleteRange(range);
        let operation = command::Operation { key: self.start.clone(), condition: None, change };
        let (id, keyspace, position) = (self.id, self.keyspace, self.position().0);
        command::Request { id, keyspace, position, epoch, operations: vec![operation] }
    }
}

/// What becomes of a delete-range, or a step of one, on the replica that leads.
pub(crate) enum Step {
    /// To be proposed.
    Propose(command::Request),
    /// Decided before: a retry, of what would be refused by now.
    Decided(apply::Reply),
}

/// Looks how far one entry may go, on the replica that is to propose it, and makes the request.
pub(crate) async fn step(
    group: &Group,
    spec: &RangeSpec,
    epoch: u64,
    deadline: Instant,
) -> Result<Step, Refusal> {
    let wanted = spec.clone();
    let look = move |state: &ReadState| {
        let known = state.descriptor.as_ref().filter(|known| {
            known.arc.is_some() && known.serves(wanted.keyspace, wanted.position().0, epoch)
        });
        let known = known.ok_or_else(|| Refusal::Stale(state.descriptor.clone()))?;
        Ok::<_, Refusal>(wanted.look(state.reader.view(), known, state.clock)?)
    };
    let end = match group.read_local(0, deadline, look).await?? {
        Looked::ToTheEnd => spec.end.clone(),
        Looked::UpTo(key) if !spec.atomic => Some(key),
        Looked::UpTo(_) => return decided(group, spec, deadline).await,
    };
    Ok(Step::Propose(spec.request(epoch, end)))
}

/// What was decided of an atomic delete-range that holds too much by now. A retry gets what it would
/// from apply; whoever asks for the first time, that it is too much.
async fn decided(group: &Group, spec: &RangeSpec, deadline: Instant) -> Result<Step, Refusal> {
    let id = spec.id;
    let look = move |state: &ReadState| apply::decided_range(state.reader.view(), &id);
    match group.read(deadline, look).await? {
        Ok(Some(reply)) => Ok(Step::Decided(reply)),
        Ok(None) => Err(too_much_to_pass().into()),
        Err(error) => {
            let message = format!("the memory of request ids cannot be read: {error}");
            Err(Fault::new(Reason::Internal, message).into())
        }
    }
}

/// Refused here and not by apply, which must not count what is dead. It says nothing of an earlier
/// attempt under the same id that is not applied yet, as no refusal does.
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
            let (of_key, version) = key::split_data(&physical).ok_or_else(|| damaged(&physical))?;
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
            let counts = version <= self.fence() && !value.is_absent_at(clock);
            live += u32::from(counts && self.owns(descriptor, &user_key));
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

//! Decides what an operation asks of which shard: limits, keyspace, entity, position, route. Pure: a
//! function of the operation and the map. Does not know who leads.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits;
use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::shard_map::{Keyspace, KeyspaceId, SYSTEM_KEYSPACE, ShardId, ShardMap};
use coracle_proto::token::{Need, SessionToken};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_raft::command::{self, Change, Condition};

use crate::admission::Origin;
use crate::fault;
use crate::router::page::PageSpec;
use crate::router::range::RangeSpec;

/// One operation, checked and located.
pub(crate) struct Plan {
    pub(crate) shard: ShardId,
    /// The epoch that the caller named; 0: none.
    pub(crate) epoch: u64,
    /// Where the keys stand; `None` where the shard itself is meant.
    pub(crate) position: Option<u64>,
    pub(crate) keyspace: KeyspaceId,
    pub(crate) task: Task,
}

/// What a shard is asked to do.
pub(crate) enum Task {
    /// One key.
    Get(Lookup),
    /// Several keys of the shard.
    BatchGet(Lookup),
    /// An atomic write.
    Write { request: command::Request, answer: WriteAnswer },
    /// A delete-range within one entity, or a step of one.
    DeleteRange(RangeSpec),
    /// A page of a scan.
    Page(PageSpec),
    /// A version to read at; 0: the leader's choice.
    Fix { version: u64 },
    /// A version to keep readable.
    Pin { version: u64, until_ms: u64 },
}

/// Which answer a write gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteAnswer {
    Put,
    Delete,
    Write,
}

/// Keys to read.
#[derive(Clone, Debug)]
pub(crate) struct Lookup {
    /// Each with its position.
    pub(crate) keys: Vec<(u64, Bytes)>,
    pub(crate) freshness: Freshness,
}

/// How fresh a read must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// Whatever the replica at hand has.
    Any,
    /// Whatever the replica at hand has once it has applied up to an index, which the session has
    /// seen. Expiry is judged no earlier than at a version that it has seen.
    ///
    /// What was seen of another shard may have been seen of these very keys, before or after they changed
    /// hands. A shard that the map has is no concern where this one is as the map has it: then it has gone
    /// through every change by which keys came to it. One that the map does not have (newer than the map,
    /// or merged into another) must be an ancestor of this one. Else the leader is asked.
    Session { index: u64, judged_from: u64, epoch: u64, strangers: Arc<[u64]> },
    /// Whatever the replica at hand has, if it lacks nothing that was acknowledged so long ago.
    Bounded { bound: Duration },
    /// The newest state. Expiry is judged no earlier than at this version.
    Newest { judged_from: u64 },
    /// The state at a version.
    At(u64),
}

impl Plan {
    /// True when any replica may answer: one that does not lead asks the leader how far it must
    /// have applied, or for a version, wherever what it has is not enough.
    pub(crate) fn any_replica(&self) -> bool {
        !matches!(self.task, Task::Write { .. } | Task::DeleteRange(_) | Task::Pin { .. })
    }

    /// True when it takes whatever the replica at hand has, and never waits.
    pub(crate) fn takes_anything(&self) -> bool {
        match &self.task {
            Task::Get(lookup) | Task::BatchGet(lookup) => lookup.freshness == Freshness::Any,
            _ => false,
        }
    }

    /// True when it reads keys by their positions. Then the arc that the view itself holds says whether
    /// the shard may answer: an epoch that only a change of the members has raised, on this side or on
    /// the caller's, refuses no read.
    pub(crate) fn reads_keys(&self) -> bool {
        let reads = matches!(self.task, Task::Get(_) | Task::BatchGet(_) | Task::Page(_));
        reads && self.position.is_some()
    }

    /// True when the caller named a shard whose map entry here does not hold the key: only the
    /// group's own word can tell which of the two is older.
    pub(crate) fn differs_from(&self, map: &ShardMap) -> bool {
        let located = match (self.keyspace, self.position) {
            (SYSTEM_KEYSPACE, _) => Some(map.meta().id),
            (_, Some(position)) => Some(map.locate(coracle_proto::ring::Position(position)).id),
            (_, None) => map.shard(self.shard).map(|shard| shard.id),
        };
        located != Some(self.shard)
    }
}

/// The keyspace of a request, open to its caller.
pub(crate) fn keyspace<'a>(
    map: &'a ShardMap,
    name: &str,
    origin: Origin,
) -> Result<&'a Keyspace, Fault> {
    let Some(keyspace) = map.keyspace(name) else {
        let fault = Fault::new(Reason::UnknownKeyspace, "there is no keyspace of this name");
        let known: String = name.chars().take(limits::KEYSPACE_NAME_MAX).collect();
        return Err(fault.with(metadata::KEYSPACE, known));
    };
    if keyspace.id == SYSTEM_KEYSPACE && origin == Origin::Client {
        let message = "the keyspace system is the cluster's own";
        return Err(Fault::new(Reason::NotAllowed, message));
    }
    Ok(keyspace)
}

/// Checks an operation and finds its shard. A batch of keys must be of one shard already.
pub(crate) fn plan(map: &ShardMap, operation: &Operation, origin: Origin) -> Result<Plan, Fault> {
    match operation {
        Operation::Get(request) => {
            limits::check_key(&request.key)?;
            let keyspace = keyspace(map, &request.keyspace, origin)?;
            let at = locate(map, keyspace, &request.key, request.route.as_ref());
            let freshness = freshness(request.read.as_ref(), at.shard, Some(map))?;
            let keys = vec![(at.position.unwrap_or(0), request.key.clone())];
            Ok(at.plan(Task::Get(Lookup { keys, freshness })))
        }
        Operation::BatchGet(request) => batch_get(map, request, origin),
        Operation::Put(request) => {
            limits::check_put(request)?;
            let change = Change::Put { value: request.value.clone(), ttl_ms: request.ttl_ms };
            let one = one(&request.key, request.condition.as_ref(), change)?;
            let write = Write {
                keyspace: keyspace(map, &request.keyspace, origin)?,
                operations: one,
                id: request.request_id.as_ref(),
                route: request.route.as_ref(),
            };
            write.plan(map, WriteAnswer::Put)
        }
        Operation::Delete(request) => {
            limits::check_delete(request)?;
            let write = Write {
                keyspace: keyspace(map, &request.keyspace, origin)?,
                operations: one(&request.key, request.condition.as_ref(), Change::Delete)?,
                id: request.request_id.as_ref(),
                route: request.route.as_ref(),
            };
            write.plan(map, WriteAnswer::Delete)
        }
        Operation::Write(request) => {
            limits::check_batch(&request.operations)?;
            let keyspace = keyspace(map, &request.keyspace, origin)?;
            one_entity(keyspace, &request.operations)?;
            let write = Write {
                keyspace,
                operations: request
                    .operations
                    .iter()
                    .map(operation_of)
                    .collect::<Result<_, _>>()?,
                id: request.request_id.as_ref(),
                route: request.route.as_ref(),
            };
            write.plan(map, WriteAnswer::Write)
        }
        Operation::Scan(request) => page(map, request, origin),
        Operation::FixVersion(request) => fix_version(request),
        Operation::DeleteRange(request) => delete_range(map, request, origin),
        Operation::PinVersion(request) => pin_version(map, request, origin),
    }
}

fn pin_version(
    map: &ShardMap,
    request: &v1::PinVersionRequest,
    origin: Origin,
) -> Result<Plan, Fault> {
    if origin == Origin::Client {
        let message = "nodes alone pin versions, for the scans that they serve: a scan's own is pinned \
                       when it takes long";
        return Err(Fault::new(Reason::NotAllowed, message));
    }
    let route = request.route.unwrap_or_default();
    if route.shard == 0 {
        return Err(Fault::invalid("route.shard", "a version is pinned on a named shard"));
    }
    let keyspace = keyspace(map, &request.keyspace, origin)?.id;
    let (shard, epoch) = (ShardId(route.shard), route.shard_epoch);
    let task = Task::Pin { version: request.version, until_ms: request.until_ms };
    Ok(Plan { shard, epoch, position: None, keyspace, task })
}

fn delete_range(
    map: &ShardMap,
    request: &v1::DeleteRangeRequest,
    origin: Origin,
) -> Result<Plan, Fault> {
    let keyspace = keyspace(map, &request.keyspace, origin)?;
    let spec = RangeSpec::new(map, keyspace, request)?;
    let position = spec.position();
    let route = request.only_shard.filter(|route| route.shard != 0);
    let shard = route.map_or_else(|| map.locate(position).id, |route| ShardId(route.shard));
    let epoch = route.map_or(0, |route| route.shard_epoch);
    let (position, keyspace) = (Some(position.0), keyspace.id);
    Ok(Plan { shard, epoch, position, keyspace, task: Task::DeleteRange(spec) })
}

fn fix_version(request: &v1::FixVersionRequest) -> Result<Plan, Fault> {
    let route = request.route.unwrap_or_default();
    if route.shard == 0 {
        return Err(Fault::invalid("route.shard", "a version is fixed on a named shard"));
    }
    let (shard, epoch) = (ShardId(route.shard), route.shard_epoch);
    let task = Task::Fix { version: request.version };
    // Only asked of shards of the ring.
    let keyspace = coracle_proto::shard_map::DEFAULT_KEYSPACE;
    Ok(Plan { shard, epoch, position: None, keyspace, task })
}

/// How fresh a read of a shard must be.
pub(crate) fn freshness(
    read: Option<&v1::ReadOptions>,
    shard: ShardId,
    map: Option<&ShardMap>,
) -> Result<Freshness, Fault> {
    limits::check_read(read)?;
    let Some(read) = read else {
        return Ok(Freshness::Newest { judged_from: 0 });
    };
    let Ok(consistency) = v1::Consistency::try_from(read.consistency) else {
        return Err(Fault::new(
            Reason::Unsupported,
            "a consistency that this version cannot serve",
        ));
    };
    if read.at_version > 0 {
        return Ok(Freshness::At(read.at_version));
    }
    Ok(match consistency {
        v1::Consistency::Any => Freshness::Any,
        v1::Consistency::Session => {
            let token = SessionToken::decode(&read.session)
                .map_err(|error| Fault::invalid("read.session", error.to_string()))?;
            let judged_from = token.version();
            match token.need(shard) {
                Need::Nothing => session(&token, shard, 0, map),
                // What was committed at an index is final, so the index says it all.
                Need::Applied(seen) => session(&token, shard, seen.index, map),
                Need::Linearizable => Freshness::Newest { judged_from },
            }
        }
        v1::Consistency::Bounded if read.max_staleness_ms > 0 => {
            Freshness::Bounded { bound: Duration::from_millis(read.max_staleness_ms) }
        }
        v1::Consistency::Unspecified | v1::Consistency::Linearizable | v1::Consistency::Bounded => {
            Freshness::Newest { judged_from: 0 }
        }
    })
}

/// What a session asks of a shard, by the map at hand. See [`Freshness::Session`].
fn session(token: &SessionToken, shard: ShardId, index: u64, map: Option<&ShardMap>) -> Freshness {
    let is_known = |other: ShardId| map.is_some_and(|map| map.shard(other).is_some());
    let strangers = token.seen().map(|(other, _)| other);
    let strangers = strangers.filter(|other| *other != shard && !is_known(*other));
    let strangers = strangers.map(|other| other.0).collect();
    let epoch = map.and_then(|map| map.shard(shard)).map_or(0, |shard| shard.epoch.0);
    Freshness::Session { index, judged_from: token.version(), epoch, strangers }
}

/// Says which shard and epoch the next hop shall serve: it must not choose another.
pub(crate) fn named(operation: &Operation, plan: &Plan) -> Operation {
    let route = Some(v1::Route { shard: plan.shard.0, shard_epoch: plan.epoch });
    let mut operation = operation.clone();
    match &mut operation {
        Operation::Get(request) => request.route = route,
        Operation::Put(request) => request.route = route,
        Operation::Delete(request) => request.route = route,
        Operation::Write(request) => request.route = route,
        Operation::Scan(request) => request.only_shard = route,
        Operation::FixVersion(request) => request.route = route,
        Operation::PinVersion(request) => request.route = route,
        Operation::DeleteRange(request) => request.only_shard = route,
        // Its keys are of one shard here; the next hop answers only those that it holds.
        Operation::BatchGet(_) => {}
    }
    operation
}

/// Whether the caller mends a stale route: it named one, or it splits its keys over shards itself.
pub(crate) fn route_named(operation: &Operation) -> bool {
    let route = match operation {
        Operation::Get(request) => &request.route,
        Operation::Put(request) => &request.route,
        Operation::Delete(request) => &request.route,
        Operation::Write(request) => &request.route,
        Operation::Scan(request) => &request.only_shard,
        Operation::FixVersion(request) => &request.route,
        Operation::DeleteRange(request) => &request.only_shard,
        Operation::PinVersion(request) => &request.route,
        Operation::BatchGet(_) => return true,
    };
    route.is_some_and(|route| route.shard != 0)
}

/// The request id of a write, to be filled in where there is none; `None` for a read.
pub(crate) fn request_id(operation: &mut Operation) -> Option<&mut Option<v1::RequestId>> {
    match operation {
        Operation::Put(request) => Some(&mut request.request_id),
        Operation::Delete(request) => Some(&mut request.request_id),
        Operation::Write(request) => Some(&mut request.request_id),
        Operation::DeleteRange(request) => Some(&mut request.request_id),
        _ => None,
    }
}

/// Where one key, or an entity, belongs.
struct At {
    shard: ShardId,
    epoch: u64,
    position: Option<u64>,
    keyspace: KeyspaceId,
}

impl At {
    fn plan(self, task: Task) -> Plan {
        let At { shard, epoch, position, keyspace } = self;
        Plan { shard, epoch, position, keyspace, task }
    }
}

fn locate(map: &ShardMap, keyspace: &Keyspace, key: &[u8], route: Option<&v1::Route>) -> At {
    let position = map.position_of(keyspace, key);
    let route = route.filter(|route| route.shard != 0);
    let shard = match route {
        Some(route) => ShardId(route.shard),
        None if keyspace.id == SYSTEM_KEYSPACE => map.meta().id,
        None => map.locate(position).id,
    };
    let epoch = route.map_or(0, |route| route.shard_epoch);
    At { shard, epoch, position: Some(position.0), keyspace: keyspace.id }
}

fn batch_get(map: &ShardMap, request: &v1::BatchGetRequest, origin: Origin) -> Result<Plan, Fault> {
    limits::check_batch_get(&request.keys)?;
    let keyspace = keyspace(map, &request.keyspace, origin)?;
    let first = request.keys.first();
    let first = first.ok_or_else(|| Fault::invalid("keys", "a batch of no keys has no shard"))?;
    let at = locate(map, keyspace, first, None);
    let freshness = freshness(request.read.as_ref(), at.shard, Some(map))?;
    let keys = request.keys.iter().map(|key| (map.position_of(keyspace, key).0, key.clone()));
    Ok(at.plan(Task::BatchGet(Lookup { keys: keys.collect(), freshness })))
}

fn page(map: &ShardMap, request: &v1::ScanRequest, origin: Origin) -> Result<Plan, Fault> {
    limits::check_scan(request)?;
    let keyspace = keyspace(map, &request.keyspace, origin)?;
    let spec = PageSpec::new(map, keyspace, request)?;
    let entity = spec.entity(keyspace);
    let route = request.only_shard.as_ref().filter(|route| route.shard != 0);
    let at = match (&entity, route) {
        (Some(entity), route) => locate(map, keyspace, entity, route),
        (None, _) if keyspace.id == SYSTEM_KEYSPACE => locate(map, keyspace, b"", None),
        (None, Some(route)) => {
            let (shard, epoch) = (ShardId(route.shard), route.shard_epoch);
            At { shard, epoch, position: None, keyspace: keyspace.id }
        }
        (None, None) => {
            let message = "a page is of one shard: name it, or a range within one entity";
            return Err(Fault::invalid("only_shard", message));
        }
    };
    Ok(at.plan(Task::Page(spec)))
}

/// A write before its place is known.
struct Write<'a> {
    keyspace: &'a Keyspace,
    operations: Vec<command::Operation>,
    id: Option<&'a v1::RequestId>,
    route: Option<&'a v1::Route>,
}

impl Write<'_> {
    fn plan(self, map: &ShardMap, answer: WriteAnswer) -> Result<Plan, Fault> {
        let id = named_id(self.id)?;
        let at = locate(map, self.keyspace, &self.operations[0].key, self.route);
        let request = command::Request {
            id,
            keyspace: self.keyspace.id.0,
            position: at.position.unwrap_or(0),
            epoch: at.epoch,
            operations: self.operations,
        };
        Ok(at.plan(Task::Write { request, answer }))
    }
}

/// The id of a write, which it was given where it came without one.
pub(crate) fn named_id(id: Option<&v1::RequestId>) -> Result<command::RequestId, Fault> {
    let id = id.ok_or_else(|| {
        Fault::new(Reason::Internal, "a write has no request id").with_outcome(Outcome::NotApplied)
    })?;
    Ok(command::RequestId {
        client: id.client,
        sequence: id.sequence,
        birth_ms: id.birth,
        lowest_unanswered: id.lowest_unanswered,
    })
}

fn one(
    key: &Bytes,
    condition: Option<&v1::Condition>,
    change: Change,
) -> Result<Vec<command::Operation>, Fault> {
    let condition = condition.map(condition_of).transpose()?;
    Ok(vec![command::Operation { key: key.clone(), condition, change }])
}

fn operation_of(operation: &v1::Operation) -> Result<command::Operation, Fault> {
    use v1::operation::Kind;
    let change = match &operation.kind {
        Some(Kind::Put(put)) => Change::Put { value: put.value.clone(), ttl_ms: put.ttl_ms },
        Some(Kind::Delete(_)) => Change::Delete,
        Some(Kind::Increment(increment)) => Change::Increment { by: increment.by },
        Some(Kind::Check(_)) => Change::Check,
        None => {
            let message = "an operation of no kind, or of one that this version does not know";
            return Err(Fault::invalid("operations.kind", message));
        }
    };
    let condition = operation.condition.as_ref().map(condition_of).transpose()?;
    Ok(command::Operation { key: operation.key.clone(), condition, change })
}

/// A condition that is not understood is never taken for none: the write would be unconditional.
fn condition_of(condition: &v1::Condition) -> Result<Condition, Fault> {
    use v1::condition::Kind;
    match &condition.kind {
        Some(Kind::IfAbsent(true)) => Ok(Condition::IfAbsent),
        Some(Kind::IfVersion(version)) => Ok(Condition::IfVersion(*version)),
        Some(Kind::IfValue(value)) => Ok(Condition::IfValue(value.clone())),
        Some(Kind::IfAbsent(false)) => {
            Err(Fault::invalid("condition.if_absent", "if_absent is true or not there at all"))
        }
        None => {
            let message = "a condition of no kind, or of one that this version does not know";
            Err(Fault::invalid("condition.kind", message))
        }
    }
}

/// The operations of an atomic batch are of one entity.
fn one_entity(keyspace: &Keyspace, operations: &[v1::Operation]) -> Result<(), Fault> {
    let Some(first) = operations.first() else {
        return Ok(());
    };
    let entity = keyspace.rule.entity(&first.key);
    let other = operations.iter().find(|other| keyspace.rule.entity(&other.key) != entity);
    let Some(other) = other else { return Ok(()) };
    let shown = |key: &[u8]| {
        let cut = &key[..key.len().min(64)];
        let more = if key.len() > cut.len() { "…" } else { "" };
        format!("\"{}{more}\"", cut.escape_ascii())
    };
    let message = format!(
        "the keys {} and {} are of different entities of keyspace {}",
        shown(&first.key),
        shown(&other.key),
        keyspace.name
    );
    Err(Fault::new(Reason::CrossEntity, message)
        .with(metadata::KEYSPACE, &keyspace.name)
        .with(metadata::FIELD, "operations"))
}

/// Refuses a route that is certainly older than what is known here: `known` is the epoch by the
/// group's own word, or by the map. A newer one is for the leader to judge, and so are reads of keys
/// (see [`Plan::reads_keys`]).
pub(crate) fn check_epoch(map: &ShardMap, plan: &Plan, known: Option<u64>) -> Result<(), Fault> {
    match known {
        _ if plan.reads_keys() => Ok(()),
        Some(known) if plan.epoch != 0 && plan.epoch < known => {
            Err(fault::stale_route(Some(map), plan.shard, None).with(metadata::EPOCH, known))
        }
        _ => Ok(()),
    }
}

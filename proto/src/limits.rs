//! Owns every limit that both ends of a socket know, each with its reason and what happens beyond
//! it, and the checks that client and server share. Does not own what only one end limits (queues,
//! memory budgets): those are settings of that end.

use std::time::Duration;

use bytes::Bytes;

use crate::v1;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

// --- keys and values ---------------------------------------------------------------------------

/// The empty key is refused: in a scan's bounds empty means "no bound", and a key that cannot be
/// named as a bound could not be resumed behind. Beyond: `INVALID_ARGUMENT`.
pub const KEY_BYTES_MIN: usize = 1;

/// A key is copied into every version of it, every block index and every resume token; beyond a
/// few hundred bytes it is data in the wrong place. Beyond: `TOO_LARGE`.
pub const KEY_BYTES_MAX: usize = 4 * KIB;

/// A value travels whole through log, memory and network, and holds up what stands behind it; at
/// 1 MiB that is a few milliseconds. Beyond: `TOO_LARGE`; cut it into keys of one entity.
pub const VALUE_BYTES_MAX: usize = MIB;

/// A hundred years: keeps every expiry within the 48 bits of milliseconds of a version.
/// Beyond: `TOO_LARGE`; 0 means for ever.
pub const TTL_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

// --- batches -----------------------------------------------------------------------------------

/// An empty batch has no entity and so no place to go. Beyond: `INVALID_ARGUMENT`.
pub const BATCH_OPERATIONS_MIN: usize = 1;

/// Apply judges a batch in one go, and no other write of the shard passes meanwhile; 1,000
/// operations are about a millisecond. Beyond: `TOO_LARGE`.
pub const BATCH_OPERATIONS_MAX: usize = 1_000;

/// Keys, values and compared values of a batch together. One batch is one part of one log entry,
/// which every voter must take before its heartbeat timeout. Beyond: `TOO_LARGE`.
pub const BATCH_BYTES_MAX: usize = 4 * MIB;

/// Current values that a batch answers with, together, when conditions failed: without it 1,000
/// small operations could ask for 1 GiB. Beyond: `value_left_out` in place of the value.
pub const BATCH_CURRENT_BYTES_MAX: usize = MIB;

/// Keys of one `BatchGet`: its parts wait for each other, and the slowest shard answers for all.
/// Beyond: `TOO_LARGE`.
pub const BATCH_GET_KEYS_MAX: usize = 1_000;

/// Values that one `BatchGet` answers with, together: the answer is one message in memory on both
/// ends. Beyond: `TOO_LARGE`; ask for fewer keys, or scan.
pub const BATCH_GET_BYTES_MAX: usize = 4 * MIB;

// --- scans -------------------------------------------------------------------------------------

/// Keys and values of a page: large enough to drown the cost of a page, small enough that a
/// pipeline beside it is not held up. Not an error: the page ends before it, except that a single
/// larger entry makes a page of its own.
pub const SCAN_PAGE_BYTES: usize = MIB;

/// Entries of a page: tiny entries cost far more memory than their bytes. Not an error: the page
/// ends there.
pub const SCAN_PAGE_ENTRIES: usize = 4_096;

// --- delete-ranges -----------------------------------------------------------------------------

/// Keys that one atomic delete-range, or one step of another, deletes: all of them are found and
/// marked in one apply, and no other write of the shard passes meanwhile; 10,000 are some tens of
/// milliseconds. Beyond: an atomic one is refused with `TOO_LARGE` and changes nothing, a step ends.
pub const DELETE_RANGE_KEYS_MAX: usize = 10_000;

/// Keys that one step deletes where the caller does not say: a few milliseconds of apply. Not an
/// error: the next step goes on.
pub const DELETE_RANGE_STEP_KEYS: usize = 1_000;

/// Stored versions, deleted ones included, that an atomic delete-range may have to pass: about a
/// tenth of a second of apply. The leader counts its own before it proposes. Beyond: `TOO_LARGE`;
/// without `atomic` the range is deleted in steps, or wait until compaction has passed.
pub const DELETE_RANGE_EXAMINED_MAX: usize = 131_072;

/// The bytes of those versions, values included, which are read to find the keys. Beyond: as beyond
/// [`DELETE_RANGE_EXAMINED_MAX`].
pub const DELETE_RANGE_EXAMINED_BYTES_MAX: usize = 64 * MIB;

/// Arcs that a delete-range is under way in, as its token names them: what a wide one steps through
/// at a time, four times over, for arcs that were split meanwhile. Beyond: neighbours go on as one,
/// from the lower of their keys.
pub const DELETE_RANGE_LANES_MAX: usize = 64;

// --- time --------------------------------------------------------------------------------------

/// The longest that the server works on a request: beyond it memory is held for a caller that has
/// long given up. Beyond, or without a deadline: cut to it, without an error (a scan's deadline holds
/// for each page).
pub const DEADLINE_MAX: Duration = Duration::from_secs(30);

/// How far a wall clock may be off: a leader's from the median of its peers', a request's birth
/// ahead of the leader's. Versions and expiries are wrong by at most this. Beyond:
/// `CLOCK_OUT_OF_BOUND`; the leader does not stamp, the request is not applied.
pub const CLOCK_BOUND: Duration = Duration::from_millis(500);

/// How long old versions stay readable when a keyspace does not say: as long as scans usually take.
pub const HISTORY_DEFAULT: Duration = Duration::from_secs(60);

/// A week. History multiplies the disk that overwritten keys take. Beyond: `TOO_LARGE`.
pub const HISTORY_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

// --- pipelines and messages --------------------------------------------------------------------

/// Unanswered operations on one pipeline: fills a fast link at any sane latency, and bounds what
/// one client can make a node hold. The client waits before it; beyond it the node reads no more of
/// the stream until it has answered.
pub const PIPELINE_IN_FLIGHT_MAX: usize = 1_024;

/// A pipeline's message that holds so many bytes takes no further operation or answer: what waits
/// together shares the cost of a message, but a large one would hold up the first behind the last.
pub const PIPELINE_FRAME_BYTES: usize = 256 * KIB;

/// Nodes that a request may pass after the one that it entered: more than one would let stale maps
/// send it in circles. Beyond: `NOT_LEADER` or `STALE_ROUTE` goes back to the caller.
pub const FORWARD_HOPS_MAX: usize = 1;

/// What the wire adds to one part of a message (an operation, an answer, an entry): tags, lengths,
/// version, expiry, `Served`.
const PART_OVERHEAD_BYTES: usize = 192;

/// What the wire adds to one message: route, request id, tokens, tags, and on a pipeline the
/// operations before the largest.
const MESSAGE_OVERHEAD_BYTES: usize = 64 * KIB + SESSION_TOKEN_BYTES_MAX + PIPELINE_FRAME_BYTES;

/// The largest encoded message, derived from the limits above, for both ends of every gRPC
/// connection (tonic's own limit of 4 MiB would refuse a full batch). Beyond: the connection's
/// codec refuses the message, `OUT_OF_RANGE`.
pub const MESSAGE_BYTES_MAX: usize = MESSAGE_OVERHEAD_BYTES
    + max_of(&[
        BATCH_BYTES_MAX + BATCH_OPERATIONS_MAX * PART_OVERHEAD_BYTES,
        BATCH_CURRENT_BYTES_MAX + BATCH_OPERATIONS_MAX * PART_OVERHEAD_BYTES,
        BATCH_GET_KEYS_MAX * (KEY_BYTES_MAX + PART_OVERHEAD_BYTES),
        BATCH_GET_BYTES_MAX + BATCH_GET_KEYS_MAX * PART_OVERHEAD_BYTES,
        SCAN_PAGE_BYTES + SCAN_PAGE_ENTRIES * PART_OVERHEAD_BYTES,
        VALUE_BYTES_MAX + KEY_BYTES_MAX,
        SHARD_MAP_BYTES_MAX,
    ]);

// --- the cluster -------------------------------------------------------------------------------

/// Bytes of a keyspace's name, `[a-z0-9_-]`. It stands in every request, in metric labels and on
/// command lines. Beyond: `TOO_LARGE`.
pub const KEYSPACE_NAME_MAX: usize = 64;

/// Keyspaces of a cluster: all of them travel with the shard map. Beyond: `TOO_LARGE`.
pub const KEYSPACES_MAX: usize = 1_000;

/// Shards of a cluster, the meta group not counted: dozens for each of a hundred nodes. Beyond: a
/// larger `init` is refused with `TOO_LARGE`, and the map is not split further.
pub const SHARDS_MAX: usize = 4_096;

/// Replicas of one shard, read replicas included: a leader sends every entry to each. Beyond: the
/// map is refused.
pub const REPLICAS_MAX: usize = 32;

/// Read replicas of one shard, of all zones together: a leader sends every entry to each, and a map of
/// [`SHARDS_MAX`] shards still fits into a message. Beyond: the setting is refused with `TOO_LARGE`.
pub const LEARNERS_MAX: u32 = 8;

/// Nodes of a cluster: each keeps three connections to every other. Beyond: the map is refused.
pub const NODES_MAX: usize = 1_000;

/// An encoded shard map: every shard with seven replicas, and a thousand nodes and keyspaces with
/// long names, fit in.
const SHARD_MAP_BYTES_MAX: usize = 4 * MIB;

// --- tokens and errors -------------------------------------------------------------------------

/// Shards that a session token tells apart; the same as can be. Beyond: the token says "read
/// linearizably" in place of a list, which is always right.
pub const SESSION_SHARDS_MAX: usize = SHARDS_MAX;

/// An encoded session token: 24 bytes a shard and a frame. Beyond: `TOO_LARGE`.
pub const SESSION_TOKEN_BYTES_MAX: usize = SESSION_SHARDS_MAX * 24 + 32;

/// An encoded resume token: a key and a frame. Beyond: `TOO_LARGE`.
pub const SCAN_TOKEN_BYTES_MAX: usize = KEY_BYTES_MAX + 64;

/// An encoded resume token of a delete-range: a key and an arc for each of its lanes, and a frame.
/// Beyond: `TOO_LARGE`.
pub const DELETE_TOKEN_BYTES_MAX: usize = DELETE_RANGE_LANES_MAX * (KEY_BYTES_MAX + 24) + 72;

/// An error's text for people. Errors travel in trailers, for which HTTP/2 peers commonly allow
/// 16 KiB, and the text stands in them three times. Beyond: cut.
pub const FAULT_MESSAGE_BYTES_MAX: usize = 512;

/// Facts of an error, names and values together; see [`FAULT_MESSAGE_BYTES_MAX`]. Beyond: the rest,
/// in the order of the names, is left out; the outcome never is.
pub const FAULT_METADATA_BYTES_MAX: usize = 2 * KIB;

const fn max_of(sizes: &[usize]) -> usize {
    let mut largest = 0;
    let mut i = 0;
    while i < sizes.len() {
        if sizes[i] > largest {
            largest = sizes[i];
        }
        i += 1;
    }
    largest
}

// --- checks ------------------------------------------------------------------------------------

/// Something lies beyond a limit. Says which, so that the caller can act without reading code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} has {got} {unit}, allowed are {min} to {max} ({limit})")]
pub struct LimitError {
    /// The constant of this module, by name.
    pub limit: &'static str,
    /// What was measured, as the request names it: `key`, `operations`.
    pub field: &'static str,
    /// In what it was measured: `bytes`, `keys`, `ms`.
    pub unit: &'static str,
    /// The least that is allowed.
    pub min: u64,
    /// The most that is allowed.
    pub max: u64,
    /// What it was.
    pub got: u64,
}

impl LimitError {
    /// False when there was too little instead.
    pub fn is_too_large(&self) -> bool {
        self.got > self.max
    }
}

/// A keyspace's name that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyspaceNameError {
    /// Empty or too long.
    #[error(transparent)]
    Length(#[from] LimitError),
    /// A byte outside `[a-z0-9_-]`.
    #[error(
        "keyspace name has {byte:#04x} at byte {at}; allowed are a-z, 0-9, _ and - (KEYSPACE_NAME)"
    )]
    Byte {
        /// Offset of the byte.
        at: usize,
        /// The byte.
        byte: u8,
    },
}

/// A key that is read or written.
pub fn check_key(key: &[u8]) -> Result<(), LimitError> {
    let limit = if key.is_empty() { "KEY_BYTES_MIN" } else { "KEY_BYTES_MAX" };
    check(limit, "key", "bytes", key.len(), KEY_BYTES_MIN, KEY_BYTES_MAX)
}

/// A bound or prefix of a scan: like a key, but may be empty.
pub fn check_bound(field: &'static str, bound: &[u8]) -> Result<(), LimitError> {
    check("KEY_BYTES_MAX", field, "bytes", bound.len(), 0, KEY_BYTES_MAX)
}

/// A value that is written. May be empty.
pub fn check_value(value: &[u8]) -> Result<(), LimitError> {
    check("VALUE_BYTES_MAX", "value", "bytes", value.len(), 0, VALUE_BYTES_MAX)
}

/// A time to live; 0 means for ever.
pub fn check_ttl(ttl_ms: u64) -> Result<(), LimitError> {
    check_ms("TTL_MAX", "ttl_ms", ttl_ms, TTL_MAX)
}

/// A keyspace's history; 0 means that only the newest version is readable.
pub fn check_history(history_ms: u64) -> Result<(), LimitError> {
    check_ms("HISTORY_MAX", "history_ms", history_ms, HISTORY_MAX)
}

/// A condition, absent or not: what it compares with is limited like a value.
pub fn check_condition(condition: Option<&v1::Condition>) -> Result<(), LimitError> {
    let bytes = compared_bytes(condition);
    check("VALUE_BYTES_MAX", "condition.if_value", "bytes", bytes, 0, VALUE_BYTES_MAX)
}

/// Everything that is limited in a put.
pub fn check_put(request: &v1::PutRequest) -> Result<(), LimitError> {
    check_key(&request.key)?;
    check_value(&request.value)?;
    check_ttl(request.ttl_ms)?;
    check_condition(request.condition.as_ref())
}

/// Everything that is limited in a delete.
pub fn check_delete(request: &v1::DeleteRequest) -> Result<(), LimitError> {
    check_key(&request.key)?;
    check_condition(request.condition.as_ref())
}

/// Everything that is limited in an atomic batch. That its keys are of one entity is not a limit:
/// see [`crate::entity`].
pub fn check_batch(operations: &[v1::Operation]) -> Result<(), LimitError> {
    let count = operations.len();
    let limit = if count == 0 { "BATCH_OPERATIONS_MIN" } else { "BATCH_OPERATIONS_MAX" };
    let (least, most) = (BATCH_OPERATIONS_MIN, BATCH_OPERATIONS_MAX);
    check(limit, "operations", "operations", count, least, most)?;
    // No overflow: at most 1,000 parts, each checked before it is added.
    let mut bytes = 0;
    for operation in operations {
        check_key(&operation.key)?;
        check_condition(operation.condition.as_ref())?;
        bytes += operation.key.len() + compared_bytes(operation.condition.as_ref());
        if let Some(v1::operation::Kind::Put(put)) = &operation.kind {
            check_value(&put.value)?;
            check_ttl(put.ttl_ms)?;
            bytes += put.value.len();
        }
    }
    check("BATCH_BYTES_MAX", "operations", "bytes", bytes, 0, BATCH_BYTES_MAX)
}

/// The keys of a `BatchGet`. None at all is allowed and answered with nothing.
pub fn check_batch_get(keys: &[Bytes]) -> Result<(), LimitError> {
    check("BATCH_GET_KEYS_MAX", "keys", "keys", keys.len(), 0, BATCH_GET_KEYS_MAX)?;
    keys.iter().try_for_each(|key| check_key(key))
}

/// What a `BatchGet` is about to answer with, values together.
pub fn check_batch_get_answer(bytes: usize) -> Result<(), LimitError> {
    check("BATCH_GET_BYTES_MAX", "values", "bytes", bytes, 0, BATCH_GET_BYTES_MAX)
}

/// Everything that is limited in a scan.
pub fn check_scan(request: &v1::ScanRequest) -> Result<(), LimitError> {
    check_bound("start", &request.start)?;
    check_bound("end", &request.end)?;
    check_bound("prefix", &request.prefix)?;
    let (token, most) = (request.resume_token.len(), SCAN_TOKEN_BYTES_MAX);
    check("SCAN_TOKEN_BYTES_MAX", "resume_token", "bytes", token, 0, most)
}

/// Everything that is limited in a delete-range, but the number of keys that it meets.
pub fn check_delete_range(request: &v1::DeleteRangeRequest) -> Result<(), LimitError> {
    check_bound("start", &request.start)?;
    check_bound("end", &request.end)?;
    check_bound("prefix", &request.prefix)?;
    let (token, most) = (request.resume_token.len(), DELETE_TOKEN_BYTES_MAX);
    check("DELETE_TOKEN_BYTES_MAX", "resume_token", "bytes", token, 0, most)
}

/// The options of a read, absent or not.
pub fn check_read(read: Option<&v1::ReadOptions>) -> Result<(), LimitError> {
    let token = read.map_or(0, |read| read.session.len());
    let most = SESSION_TOKEN_BYTES_MAX;
    check("SESSION_TOKEN_BYTES_MAX", "read.session", "bytes", token, 0, most)
}

/// A keyspace's name, written out: the empty name that requests use for `default` is not one.
pub fn check_keyspace_name(name: &str) -> Result<(), KeyspaceNameError> {
    let len = name.len();
    check("KEYSPACE_NAME_MAX", "keyspace", "bytes", len, 1, KEYSPACE_NAME_MAX)?;
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    match name.bytes().enumerate().find(|(_, byte)| !allowed(*byte)) {
        Some((at, byte)) => Err(KeyspaceNameError::Byte { at, byte }),
        None => Ok(()),
    }
}

/// How many shards `init` is asked to make; 0 stands for the default.
pub fn check_shards(shards: u32) -> Result<(), LimitError> {
    check("SHARDS_MAX", "shards", "shards", shards as usize, 0, SHARDS_MAX)
}

/// How many read replicas of each shard are asked for, in all zones together.
pub fn check_learners(learners: u64) -> Result<(), LimitError> {
    let got = usize::try_from(learners).unwrap_or(usize::MAX);
    check("LEARNERS_MAX", "learners", "read replicas", got, 0, LEARNERS_MAX as usize)
}

/// How long the server works on a request that asks for `asked` (`None`: it does not say).
pub fn deadline(asked: Option<Duration>) -> Duration {
    asked.map_or(DEADLINE_MAX, |asked| asked.min(DEADLINE_MAX))
}

fn compared_bytes(condition: Option<&v1::Condition>) -> usize {
    match condition.and_then(|condition| condition.kind.as_ref()) {
        Some(v1::condition::Kind::IfValue(value)) => value.len(),
        _ => 0,
    }
}

fn check_ms(
    limit: &'static str,
    field: &'static str,
    got: u64,
    max: Duration,
) -> Result<(), LimitError> {
    let max = max.as_millis() as u64;
    if got <= max {
        return Ok(());
    }
    Err(LimitError { limit, field, unit: "ms", min: 0, max, got })
}

fn check(
    limit: &'static str,
    field: &'static str,
    unit: &'static str,
    got: usize,
    min: usize,
    max: usize,
) -> Result<(), LimitError> {
    if (min..=max).contains(&got) {
        return Ok(());
    }
    let (min, max, got) = (min as u64, max as u64, got as u64);
    Err(LimitError { limit, field, unit, min, max, got })
}

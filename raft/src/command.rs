//! Owns what a group replicates and its bytes (FORMAT.md). Does not say what a command does (see
//! `apply`), nor how entries of Raft itself look (see `entry`).

use bytes::{BufMut, Bytes, BytesMut};

use crate::descriptor::Descriptor;
use crate::history::{Pin, Settings};
use crate::wire::{Malformed, Reader};

mod range;
mod reshape;

pub use range::{DeleteRange, NO_FENCE, Owned};
pub use reshape::{Planned, SplitShard};

/// The format that this program writes, and the only one that it reads. It is an entry's first
/// byte; 0 and 255 are taken there by Raft's own entries.
pub const FORMAT_VERSION: u8 = 1;

const KIND_REQUESTS: u8 = 1;
const KIND_ADVANCE: u8 = 2;
const KIND_DESCRIBE: u8 = 3;
const KIND_SETTINGS: u8 = 4;
const KIND_PIN: u8 = 5;
const KIND_SPLIT: u8 = 6;

const CONDITION_NONE: u8 = 0;
const CONDITION_IF_ABSENT: u8 = 1;
const CONDITION_IF_VERSION: u8 = 2;
const CONDITION_IF_VALUE: u8 = 3;

const CHANGE_PUT: u8 = 1;
const CHANGE_DELETE: u8 = 2;
const CHANGE_INCREMENT: u8 = 3;
const CHANGE_CHECK: u8 = 4;
const CHANGE_DELETE_RANGE: u8 = 5;

/// Version, kind, stamp, ceiling, and the number of requests.
const ENTRY_OVERHEAD_BYTES: usize = 1 + 1 + 8 + 8 + 4;
/// Request id, keyspace, position, epoch, and the number of operations.
const REQUEST_OVERHEAD_BYTES: usize = 4 * 8 + 4 + 8 + 8 + 4;
/// The length of the key, the kinds of condition and change.
const OPERATION_OVERHEAD_BYTES: usize = 4 + 1 + 1;

/// The name of a logical write; the same on every retry of it. Results are looked up by client,
/// sequence and birth together.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct RequestId {
    /// The client, once and never again.
    pub client: u64,
    /// The client's number for the write.
    pub sequence: u64,
    /// When the write began, in milliseconds: a time that a server handed out.
    pub birth_ms: u64,
    /// The client needs no answer to anything below; at most `sequence`. May rise between retries.
    pub lowest_unanswered: u64,
}

/// What must hold, at the write's own version, for the whole request to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The key does not exist (never did, was deleted, has expired).
    IfAbsent,
    /// The key exists at exactly this version.
    IfVersion(u64),
    /// The key exists with exactly this value.
    IfValue(Bytes),
}

/// What happens to the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The key gets this value.
    Put {
        /// The new value.
        value: Bytes,
        /// How long it lives from the write's version on; 0 is for ever.
        ttl_ms: u64,
    },
    /// The key is gone, whether it was there or not.
    Delete,
    /// The key's decimal number rises by this; an absent key counts as 0.
    Increment {
        /// May be negative.
        by: i64,
    },
    /// Nothing: only the condition counts.
    Check,
    /// The live keys from the operation's on are gone. A request of its own, without a condition.
    DeleteRange(DeleteRange),
}

/// One key of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The key.
    pub key: Bytes,
    /// Judged against the state before the request; if any of the request's fails, nothing happens.
    pub condition: Option<Condition>,
    /// Applied in the order of the request's operations.
    pub change: Change,
}

/// An atomic write inside one entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// The keyspace of all its keys.
    pub keyspace: u32,
    /// Where its entity stands on the ring; a constant of the keyspace's rule and the keys, so that
    /// apply needs no settings.
    pub position: u64,
    /// The shard epoch that it was routed by; 0: not named.
    pub epoch: u64,
    /// At least one.
    pub operations: Vec<Operation>,
}

/// What an entry asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Writes, in this order, each with a version of its own.
    Requests(Vec<Request>),
    /// Nothing but the entry's ceiling.
    Advance,
    /// The group's first descriptor. Without effect when there is one.
    Describe(Descriptor),
    /// Keyspaces' settings. The group clock moves to the stamp, also when there are none.
    Settings(Vec<Settings>),
    /// Keeps a version readable. The group clock moves to the stamp.
    Pin(Pin),
    /// Everything from a position on becomes a group of its own.
    Split(SplitShard),
}

/// A command with the leader's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamped {
    /// The leader's clock, as a version.
    pub stamp: u64,
    /// The leader may serve reads up to here without asking anew.
    pub ceiling: u64,
    /// What to do.
    pub command: Command,
}

/// Why bytes are not a command. Either way apply stops: a command that one replica skips and
/// another applies would part them for ever.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a newer program.
    #[error("command of format version {found}, newest known here is {FORMAT_VERSION}")]
    UnknownVersion {
        /// The entry's first byte.
        found: u8,
    },
    /// Written by a newer program that did not raise the format version, or damaged.
    #[error("unknown {what} {found}")]
    UnknownKind {
        /// Which code it is.
        what: &'static str,
        /// Its number.
        found: u8,
    },
    /// Not a command.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl Stamped {
    /// The entry's bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.command.size());
        out.put_u8(FORMAT_VERSION);
        out.put_u8(match &self.command {
            Command::Requests(_) => KIND_REQUESTS,
            Command::Advance => KIND_ADVANCE,
            Command::Describe(_) => KIND_DESCRIBE,
            Command::Settings(_) => KIND_SETTINGS,
            Command::Pin(_) => KIND_PIN,
            Command::Split(_) => KIND_SPLIT,
        });
        out.put_u64(self.stamp);
        out.put_u64(self.ceiling);
        match &self.command {
            Command::Requests(requests) => {
                put_len(&mut out, requests.len());
                requests.iter().for_each(|request| put_request(&mut out, request));
            }
            Command::Advance => {}
            Command::Describe(descriptor) => descriptor.put(&mut out),
            Command::Settings(settings) => {
                put_len(&mut out, settings.len());
                settings.iter().for_each(|settings| settings.put(&mut out));
            }
            Command::Pin(pin) => pin.put(&mut out),
            Command::Split(split) => split.put(&mut out),
        }
        out.freeze()
    }

    /// Reads an entry. Keys and values are slices of `bytes`; nothing is copied.
    pub fn decode(bytes: &Bytes) -> Result<Stamped, DecodeError> {
        let mut reader = Reader::new(bytes.clone());
        let version = reader.u8()?;
        if version != FORMAT_VERSION {
            return Err(DecodeError::UnknownVersion { found: version });
        }
        let kind = reader.u8()?;
        let (stamp, ceiling) = (reader.u64()?, reader.u64()?);
        let command = match kind {
            KIND_REQUESTS => {
                let count = reader.count(REQUEST_OVERHEAD_BYTES)?;
                let mut requests = Vec::with_capacity(count);
                for _ in 0..count {
                    requests.push(get_request(&mut reader)?);
                }
                Command::Requests(requests)
            }
            KIND_ADVANCE => Command::Advance,
            KIND_DESCRIBE => Command::Describe(Descriptor::get(&mut reader)?),
            KIND_SETTINGS => {
                let count = reader.count(Settings::BYTES)?;
                let mut settings = Vec::with_capacity(count);
                for _ in 0..count {
                    settings.push(Settings::get(&mut reader)?);
                }
                Command::Settings(settings)
            }
            KIND_PIN => Command::Pin(Pin::get(&mut reader)?),
            KIND_SPLIT => Command::Split(SplitShard::get(&mut reader)?),
            found => {
                return Err(DecodeError::UnknownKind { what: "command", found });
            }
        };
        reader.end()?;
        Ok(Stamped { stamp, ceiling, command })
    }
}

/// Whether an entry with these bytes is a batch of its own: everything before it is written first, and
/// what follows it is judged by what it has left.
pub(crate) fn stands_alone(entry: &[u8]) -> bool {
    matches!(entry, [FORMAT_VERSION, KIND_SPLIT, ..])
}

impl Command {
    /// How long the entry will be; for a descriptor at most.
    pub fn size(&self) -> usize {
        ENTRY_OVERHEAD_BYTES
            + match self {
                Command::Requests(requests) => requests.iter().map(Request::size).sum(),
                Command::Advance => 0,
                Command::Describe(_) => 64,
                Command::Settings(settings) => settings.len() * Settings::BYTES,
                Command::Pin(_) => Pin::BYTES,
                Command::Split(split) => split.size(),
            }
    }
}

impl Request {
    /// What the request adds to an entry, exactly: what the proposer sums up to fill one.
    pub fn size(&self) -> usize {
        REQUEST_OVERHEAD_BYTES + self.operations.iter().map(Operation::size).sum::<usize>()
    }

    /// What the request may cost, in bytes of an entry: its own, and those of what apply writes for
    /// it beyond them.
    pub fn weight(&self) -> usize {
        let beyond = |operation: &Operation| match &operation.change {
            Change::DeleteRange(range) => range.weight(),
            _ => 0,
        };
        self.size() + self.operations.iter().map(beyond).sum::<usize>()
    }
}

impl Operation {
    fn size(&self) -> usize {
        let condition = match &self.condition {
            None | Some(Condition::IfAbsent) => 0,
            Some(Condition::IfVersion(_)) => 8,
            Some(Condition::IfValue(value)) => 4 + value.len(),
        };
        let change = match &self.change {
            Change::Put { value, .. } => 8 + 4 + value.len(),
            Change::Increment { .. } => 8,
            Change::Delete | Change::Check => 0,
            Change::DeleteRange(range) => range.size(),
        };
        OPERATION_OVERHEAD_BYTES + self.key.len() + condition + change
    }
}

fn put_len(out: &mut BytesMut, len: usize) {
    out.put_u32(u32::try_from(len).expect("an entry is bounded far below 4 GiB"));
}

fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.put_slice(bytes);
}

fn put_request(out: &mut BytesMut, request: &Request) {
    out.put_u64(request.id.client);
    out.put_u64(request.id.sequence);
    out.put_u64(request.id.birth_ms);
    out.put_u64(request.id.lowest_unanswered);
    out.put_u32(request.keyspace);
    out.put_u64(request.position);
    out.put_u64(request.epoch);
    put_len(out, request.operations.len());
    request.operations.iter().for_each(|operation| put_operation(out, operation));
}

fn put_operation(out: &mut BytesMut, operation: &Operation) {
    put_bytes(out, &operation.key);
    match &operation.condition {
        None => out.put_u8(CONDITION_NONE),
        Some(Condition::IfAbsent) => out.put_u8(CONDITION_IF_ABSENT),
        Some(Condition::IfVersion(version)) => {
            out.put_u8(CONDITION_IF_VERSION);
            out.put_u64(*version);
        }
        Some(Condition::IfValue(value)) => {
            out.put_u8(CONDITION_IF_VALUE);
            put_bytes(out, value);
        }
    }
    match &operation.change {
        Change::Put { value, ttl_ms } => {
            out.put_u8(CHANGE_PUT);
            out.put_u64(*ttl_ms);
            put_bytes(out, value);
        }
        Change::Delete => out.put_u8(CHANGE_DELETE),
        Change::Increment { by } => {
            out.put_u8(CHANGE_INCREMENT);
            out.put_i64(*by);
        }
        Change::Check => out.put_u8(CHANGE_CHECK),
        Change::DeleteRange(range) => {
            out.put_u8(CHANGE_DELETE_RANGE);
            range.put(out);
        }
    }
}

fn get_request(reader: &mut Reader) -> Result<Request, DecodeError> {
    let id = RequestId {
        client: reader.u64()?,
        sequence: reader.u64()?,
        birth_ms: reader.u64()?,
        lowest_unanswered: reader.u64()?,
    };
    let keyspace = reader.u32()?;
    let (position, epoch) = (reader.u64()?, reader.u64()?);
    let count = reader.count(OPERATION_OVERHEAD_BYTES)?;
    let mut operations = Vec::with_capacity(count);
    for _ in 0..count {
        operations.push(get_operation(reader)?);
    }
    Ok(Request { id, keyspace, position, epoch, operations })
}

fn get_operation(reader: &mut Reader) -> Result<Operation, DecodeError> {
    let key = reader.bytes()?;
    let condition = match reader.u8()? {
        CONDITION_NONE => None,
        CONDITION_IF_ABSENT => Some(Condition::IfAbsent),
        CONDITION_IF_VERSION => Some(Condition::IfVersion(reader.u64()?)),
        CONDITION_IF_VALUE => Some(Condition::IfValue(reader.bytes()?)),
        found => {
            return Err(DecodeError::UnknownKind { what: "condition", found });
        }
    };
    let change = match reader.u8()? {
        CHANGE_PUT => {
            let ttl_ms = reader.u64()?;
            Change::Put { ttl_ms, value: reader.bytes()? }
        }
        CHANGE_DELETE => Change::Delete,
        // The same 64 bits, read as two's complement.
        CHANGE_INCREMENT => Change::Increment { by: reader.u64()? as i64 },
        CHANGE_CHECK => Change::Check,
        CHANGE_DELETE_RANGE => Change::DeleteRange(DeleteRange::get(reader)?),
        found => {
            return Err(DecodeError::UnknownKind { what: "change", found });
        }
    };
    Ok(Operation { key, condition, change })
}

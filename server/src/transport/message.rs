//! What travels in an envelope, on which connection, and how large it may be.
//!
//! Owns the packing of messages into envelopes. Does not queue (see `lane` and `outbox`).

use bytes::Bytes;
use coracle_proto::peer::cluster_command::Kind;
use coracle_proto::peer::{self, ClusterCommand, Envelope, Forward, GroupMessage};
use coracle_raft::transport::Address;
use prost::Message;

use super::frame::FRAME_BYTES_MAX;

/// Questions that one lane may have unanswered. openraft may have 64 appends of one group under way
/// and a node holds dozens of groups; beyond it the answer is `Unreachable` at once.
pub(crate) const IN_FLIGHT_MAX: usize = 4096;
/// An envelope is closed at this size, so that what comes next does not wait behind a long write.
const ENVELOPE_BYTES: usize = 1 << 20;
/// The largest body of a message: a frame, less room for gossip and field headers. Beyond it the
/// answer is `Unreachable` at once.
pub(crate) const MESSAGE_BYTES_MAX: usize = FRAME_BYTES_MAX - (1 << 20);
/// What a message takes beside its body, in the frame and in memory.
const MESSAGE_OVERHEAD_BYTES: usize = 64;
/// One of the four connections to a node.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Connection {
    /// Votes, heartbeats, gossip, cluster commands: small, never behind anything large.
    Control,
    /// Entries.
    Appends,
    /// Snapshots.
    Bulk,
    /// Requests of clients, one hop on.
    Forward,
}

impl Connection {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Control, Self::Appends, Self::Bulk, Self::Forward];

    /// Bytes queued and unanswered; beyond it the answer is `Unreachable` at once. Control: votes
    /// and heartbeats of thousands of groups. Appends: eight of the largest batches. Bulk: a few
    /// pieces of a snapshot, so that the sender feels the receiver's pace. Forward: four of the
    /// largest batches.
    pub(crate) const fn bytes_max(self) -> usize {
        match self {
            Self::Control => 4 << 20,
            Self::Appends => 32 << 20,
            Self::Bulk => 8 << 20,
            Self::Forward => 16 << 20,
        }
    }

    pub(crate) const fn wire(self) -> i32 {
        (match self {
            Self::Control => peer::Lane::Control,
            Self::Appends => peer::Lane::Appends,
            Self::Bulk => peer::Lane::Bulk,
            Self::Forward => peer::Lane::Forward,
        }) as i32
    }

    pub(crate) fn from_wire(lane: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|connection| connection.wire() == lane)
    }
}

/// One message in an envelope.
#[derive(Debug)]
pub(crate) enum Item {
    Group(GroupMessage),
    Forward(Forward),
    Command(ClusterCommand),
}

impl Item {
    pub(crate) fn bytes(&self) -> usize {
        let body = match self {
            Self::Group(message) => message.body.len() + message.unreachable.len(),
            Self::Forward(message) => message.body.len() + message.unreachable.len(),
            Self::Command(command) => command.encoded_len(),
        };
        body + MESSAGE_OVERHEAD_BYTES
    }
}

/// Fills one envelope from the front of a queue.
#[derive(Default)]
pub(crate) struct Packer {
    pub(crate) envelope: Envelope,
    bytes: usize,
}

impl Packer {
    /// A first message always fits; an envelope has room for one cluster command.
    pub(crate) fn fits(&self, item: &Item) -> bool {
        let full = self.bytes > 0 && self.bytes + item.bytes() > ENVELOPE_BYTES;
        let second_command = matches!(item, Item::Command(_)) && self.envelope.cluster.is_some();
        !full && !second_command
    }

    pub(crate) fn add(&mut self, item: Item) {
        self.bytes += item.bytes();
        match item {
            Item::Group(message) => self.envelope.messages.push(message),
            Item::Forward(message) => self.envelope.forwards.push(message),
            Item::Command(command) => self.envelope.cluster = Some(command),
        }
    }
}

/// What is asked of a node.
pub(crate) enum Question {
    Group {
        to: Address,
        body: Bytes,
        /// A heartbeat: may wait for others.
        lingers: bool,
    },
    Forward(Bytes),
    Command(Kind),
}

impl Question {
    pub(crate) fn into_item(self, call: u64) -> Item {
        match self {
            Self::Group { to, body, .. } => Item::Group(GroupMessage {
                call,
                shard: to.shard.0,
                to_replica: to.replica.0,
                body,
                ..Default::default()
            }),
            Self::Forward(body) => Item::Forward(Forward { call, body, ..Default::default() }),
            Self::Command(kind) => Item::Command(ClusterCommand { call, kind: Some(kind) }),
        }
    }
}

/// What a node answered.
#[derive(Debug)]
pub(crate) enum Reply {
    Bytes(Bytes),
    Command(Kind),
}

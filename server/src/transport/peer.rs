//! One known node: its four lanes, and when it was last heard.
//!
//! Owns nothing else. Does not know addresses (see `directory`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use coracle_proto::peer::KnownNode;
use coracle_raft::types::NodeId;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::lane::Lane;
use super::message::Connection;

/// What is known of the way to a node.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// The node, with its newest addresses.
    pub known: KnownNode,
    /// Connections that this node dialled and that stand.
    pub dialled: Vec<Connection>,
    /// Connections that the other node dialled and that stand.
    pub accepted: Vec<Connection>,
    /// Age of the last message, on the monotonic clock. None: not heard since this node started.
    pub silence: Option<Duration>,
}

pub(crate) struct Peer {
    pub(crate) node: NodeId,
    lanes: [Arc<Lane>; Connection::ALL.len()],
    /// Ends the tasks of the lanes: the node was forgotten, or the transport ends.
    pub(crate) ended: CancellationToken,
    /// Ends the connections that stand; the tasks go on and dial anew.
    standing: Mutex<CancellationToken>,
    born: Instant,
    /// Milliseconds after `born`, plus one; 0 is never.
    heard_ms: AtomicU64,
    /// Its loss was told, and it was not met again since.
    lost: AtomicBool,
}

impl Peer {
    pub(crate) fn new(node: NodeId, ended: CancellationToken) -> Self {
        Self {
            node,
            lanes: Connection::ALL.map(|connection| Arc::new(Lane::new(connection))),
            standing: Mutex::new(ended.child_token()),
            ended,
            born: Instant::now(),
            heard_ms: AtomicU64::new(0),
            lost: AtomicBool::new(false),
        }
    }

    pub(crate) fn lane(&self, connection: Connection) -> &Arc<Lane> {
        &self.lanes[connection as usize]
    }

    pub(crate) fn lanes(&self) -> &[Arc<Lane>] {
        &self.lanes
    }

    /// Cancelled when the connections that are dialled from now on shall end.
    pub(crate) fn standing(&self) -> CancellationToken {
        self.standing.lock().clone()
    }

    /// Ends the dialled connections and dials anew, at once: the node started again, or is cut off.
    pub(crate) fn redial(&self) {
        let old = std::mem::replace(&mut *self.standing.lock(), self.ended.child_token());
        old.cancel();
        self.hurry();
    }

    /// There is a sign that the node can be reached.
    pub(crate) fn hurry(&self) {
        for lane in &self.lanes {
            lane.hurry();
        }
    }

    pub(crate) fn note_heard(&self) {
        let ms = self.born.elapsed().as_millis();
        self.heard_ms.store(u64::try_from(ms).unwrap_or(u64::MAX - 1) + 1, Ordering::Relaxed);
    }

    pub(crate) fn silence(&self) -> Option<Duration> {
        let ms = self.heard_ms.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.born.elapsed().saturating_sub(Duration::from_millis(ms)))
    }

    pub(crate) fn note_met(&self) {
        self.lost.store(false, Ordering::Relaxed);
    }

    /// True once for each loss: the connections of a node that dies break one after the other.
    pub(crate) fn note_lost(&self) -> bool {
        !self.lost.swap(true, Ordering::Relaxed)
    }
}

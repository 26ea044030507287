//! Where the time of a write goes, and how reads are served: told to whoever keeps the node's metrics.

use std::time::Duration;

/// A part of an entry's way through its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A write waits until it becomes part of an entry.
    Queue,
    /// An entry is made and handed to openraft.
    Propose,
    /// An entry, from its proposal until it is applied on the leader: the log's sync, the
    /// followers', and apply.
    Replicate,
    /// A batch of entries goes into the state.
    Apply,
}

/// How the read point of a batch of reads was come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadWay {
    /// The leader, under its lease.
    Lease,
    /// The leader, by a round of heartbeats.
    Quorum,
    /// Another replica, by a question to the leader.
    Asked,
    /// Another replica, by an earlier question that was young enough for a bounded read.
    Known,
}

/// Hears what groups do. Called on the data path: must not block.
pub trait Observer: Send + Sync + 'static {
    /// A stage took so long.
    fn stage(&self, stage: Stage, took: Duration);

    /// A replica of this node became the leader of its group.
    fn elected(&self);

    /// So many reads were given a point in this way.
    fn read_points(&self, way: ReadWay, reads: usize) {
        let _ = (way, reads);
    }
}

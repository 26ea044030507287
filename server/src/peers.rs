//! What a node hears of the others, and says of itself: facts with every heartbeat.
//!
//! Owns the disks' and clocks' part of them. A leader refuses writes other than deletes while any
//! voter's disk is under its reserve: met before it is full, because a full disk can neither flush
//! nor compact its way out.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coracle_proto::limits::CLOCK_BOUND;
use coracle_proto::peer::{KnownNode, NodeFacts};
use coracle_proto::reason::{Fault, Reason, metadata};
use coracle_proto::shard_map::ShardId;
use coracle_raft::error::GroupError;
use coracle_raft::host::Host;
use coracle_raft::types::NodeId;
use coracle_storage::exec::Exec;
use coracle_storage::fs::{Fs, Space};
use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::clock::PeerClocks;
use crate::home::Home;
use crate::map::MapCache;
use crate::router::WriteGate;
use crate::transport::PeerEvents;

/// How long a look at the file system holds.
const SPACE_FRESH: Duration = Duration::from_secs(1);

/// See the module.
pub struct Neighbours {
    fs: Arc<dyn Fs>,
    exec: Arc<dyn Exec>,
    dir: PathBuf,
    reserve_bytes: u64,
    /// The clocks of all.
    pub clocks: Arc<PeerClocks>,
    map: Arc<MapCache>,
    home: Arc<Home>,
    host: OnceCell<Arc<Host>>,
    space: Mutex<Option<(Instant, Space)>>,
    full: Mutex<BTreeMap<NodeId, bool>>,
    on_superseded: Arc<dyn Fn(String) + Send + Sync>,
}

impl Neighbours {
    /// `on_superseded` ends the node: another process has its identity.
    pub fn new(
        (fs, exec): (Arc<dyn Fs>, Arc<dyn Exec>),
        reserve_bytes: u64,
        clocks: Arc<PeerClocks>,
        map: Arc<MapCache>,
        home: Arc<Home>,
        on_superseded: Arc<dyn Fn(String) + Send + Sync>,
    ) -> Arc<Self> {
        let dir = home.dir().to_owned();
        Arc::new(Self {
            fs,
            exec,
            dir,
            reserve_bytes,
            clocks,
            map,
            home,
            host: OnceCell::new(),
            space: Mutex::default(),
            full: Mutex::default(),
            on_superseded,
        })
    }

    /// The groups that campaign when a peer is lost.
    pub fn set_host(&self, host: Arc<Host>) {
        // Once per node; a second call would be the same host.
        let _ = self.host.set(host);
    }

    /// The data directory's file system, as of a moment ago.
    pub fn space(&self) -> Option<Space> {
        let mut space = self.space.lock();
        if let Some((at, known)) = *space
            && at.elapsed() < SPACE_FRESH
        {
            return Some(known);
        }
        let found = self.fs.space(&self.dir).ok()?;
        *space = Some((Instant::now(), found));
        Some(found)
    }

    /// Whether this node's disk is under its reserve.
    pub fn disk_full(&self) -> bool {
        self.space().is_some_and(|space| space.free_bytes < self.reserve_bytes)
    }
}

impl PeerEvents for Neighbours {
    fn lost(&self, node: NodeId) {
        // What it said of its disk is no longer so, and a majority may do without it.
        self.full.lock().remove(&node);
        if let Some(host) = self.host.get() {
            host.peer_lost(node);
        }
    }

    fn known(&self, node: &KnownNode) {
        let (home, node) = (self.home.clone(), node.clone());
        self.exec.blocking(Box::new(move || home.remember(&node)));
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts {
            wall_ms: self.clocks.now_ms(),
            disk_free_bytes: self.space().map_or(0, |space| space.free_bytes),
            disk_full: self.disk_full(),
            map_epoch: self.map.current().map_or(0, |map| map.epoch().0),
        }
    }

    fn heard_facts(&self, node: NodeId, facts: NodeFacts, _at: Instant) {
        self.clocks.record(node, facts.wall_ms, Duration::ZERO);
        self.full.lock().insert(node, facts.disk_full);
    }

    fn superseded(&self, by: &KnownNode) {
        (self.on_superseded)(format!(
            "another process runs as n{} (start {}, at {}): this data directory is a copy, or was copied",
            by.node, by.start_count, by.peer_address
        ));
    }
}

impl WriteGate for Neighbours {
    fn check(&self, shard: ShardId, only_deletes: bool) -> Result<(), Fault> {
        if only_deletes {
            return Ok(());
        }
        let own = self.home.own().map(|own| own.node);
        let full = self.full.lock();
        let is_full = |node: NodeId| match Some(node) == own {
            true => self.disk_full(),
            false => full.get(&node).copied().unwrap_or(false),
        };
        let map = self.map.current();
        let shard_entry = map.as_ref().and_then(|map| map.shard(shard));
        let Some(node) = shard_entry.and_then(|s| s.voters().map(|v| v.node).find(|n| is_full(*n)))
        else {
            return Ok(());
        };
        let message = format!(
            "the disk of n{node} is under its reserve: only deletes are taken for shard {shard}. Free space there, or add a node"
        );
        let fault = Fault::new(Reason::DiskFull, message);
        Err(fault.with(metadata::SHARD, shard).with(metadata::NODE, node))
    }
}

/// The stamps' clock: the node's, as long as it agrees with the others.
pub struct StampClock(pub Arc<PeerClocks>);

impl coracle_raft::clock::Clock for StampClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }

    fn check(&self) -> Result<(), GroupError> {
        self.0.check(CLOCK_BOUND).map_err(|out| {
            tracing::warn!(%out, "writes are refused");
            GroupError::ClockOutOfBound
        })
    }
}

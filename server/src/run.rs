//! A node on the real seams: the operating system's files, sockets, clock and threads.
//!
//! Owns their choice, and the end of the process when the node can't go on. Everything else is
//! `node`, which a simulation starts on seams of its own.

use std::fmt;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use coracle_storage::exec::{Exec, RealExec};
use coracle_storage::fs::faulty::FaultyFs;
use coracle_storage::fs::{Fs, RealFs};
use coracle_storage::state::{Engines, RocksEngines, StateOptions};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock::RealClock;
use crate::config::Config;
use crate::identity::Locking;
use crate::memory::Shares;
use crate::net::RealNet;
use crate::node::{Addresses, Node, Parts};

/// Blocking jobs at a time: reads of the state, applies, flushes. More would only queue at the disk.
const BLOCKING_MAX: usize = 32;
/// After a fatal error the process has so long to say so; then it ends, whatever hangs.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a node did not start.
#[derive(Debug)]
pub struct StartError(String);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for StartError {}

/// A node of this process.
pub struct RunningNode {
    node: Node,
    exec: Arc<RealExec>,
    fatal: watch::Receiver<Option<String>>,
    skip_drain: bool,
}

/// What this machine, or the container that the process runs in, has of memory; `None` where it does
/// not say.
pub fn machine_memory_bytes() -> Option<u64> {
    crate::config::memory_bytes(&RealFs)
}

/// Starts a node. Returns when it listens.
pub async fn run(config: Config) -> Result<RunningNode, StartError> {
    let (fatal_sender, fatal) = watch::channel(None);
    let on_fatal: Arc<dyn Fn(String) + Send + Sync> = Arc::new(move |why: String| {
        tracing::error!(why, "the node cannot go on and stops");
        fatal_sender.send_replace(Some(why));
        std::mem::forget(end_process_after(LAST_WORDS));
    });
    let exec = Arc::new(RealExec::new(tokio::runtime::Handle::current(), BLOCKING_MAX));
    let shares = Shares::of(config.storage.memory_budget);
    let memory = StateOptions { memory_bytes: shares.state_bytes, ..StateOptions::default() };
    let store_fatal = on_fatal.clone();
    let store_fatal = Arc::new(move |error: &coracle_storage::Error| {
        store_fatal(error.to_string());
    });
    #[allow(clippy::disallowed_methods, reason = "the one place where randomness enters a node")]
    let seed = rand::random();
    let (fs, engines): (Arc<dyn Fs>, _) = if config.test.in_memory {
        // The same code on a file system and a RocksDB environment that end with the process.
        let fs: Arc<dyn Fs> = Arc::new(FaultyFs::new(seed));
        (fs.clone(), RocksEngines::in_memory(&memory, fs, store_fatal))
    } else {
        (Arc::new(RealFs), RocksEngines::on_disk(&memory, store_fatal))
    };
    let engines: Arc<dyn Engines> =
        Arc::new(engines.map_err(|error| StartError(error.to_string()))?);
    let locking = if config.test.in_memory { Locking::None } else { Locking::Process };
    let skip_drain = config.test.skip_drain;
    let parts = Parts {
        config,
        net: Arc::new(RealNet),
        fs,
        engines,
        exec: exec.clone() as Arc<dyn Exec>,
        clock: Arc::new(RealClock),
        locking,
        seed,
        on_fatal,
    };
    let node = Node::start(parts).await.map_err(StartError)?;
    Ok(RunningNode { node, exec, fatal, skip_drain })
}

impl RunningNode {
    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        self.node.addresses()
    }

    /// See [`Node::ready`].
    pub async fn ready(&self) {
        self.node.ready().await;
    }

    /// Returns when the node has stopped by itself: its disk failed, or another process has its
    /// identity.
    pub async fn stopped(&self) {
        let mut fatal = self.fatal.clone();
        // The sender lives in the node's callbacks, and the node in self.
        let _ = fatal.wait_for(Option::is_some).await;
    }

    /// Gives all leaderships away, finishes requests under way, and stops; after `within` regardless.
    /// With `test.skip_drain` it does nothing of that: the process can only end.
    pub async fn drain_and_stop(&self, within: Duration) {
        // A disk that hangs keeps whoever waits for it.
        let _ends = end_process_after(within + LAST_WORDS);
        if self.skip_drain {
            return;
        }
        let left = self.node.drain_and_stop(Instant::now() + within).await;
        if left > 0 {
            tracing::warn!(left, "some leaderships were not taken over: their shards elect anew");
        }
        self.exec.shutdown().await;
    }
}

/// Ends the process unless what is returned is dropped before; also when the disk hangs and nothing that waits for it would ever return.
#[allow(clippy::disallowed_methods, reason = "the runtime may be what hangs")]
fn end_process_after(within: Duration) -> mpsc::Sender<()> {
    let (alive, dropped) = mpsc::channel();
    let ended = std::thread::Builder::new().name("last words".to_owned()).spawn(move || {
        if dropped.recv_timeout(within) == Err(mpsc::RecvTimeoutError::Timeout) {
            std::process::abort()
        }
    });
    if ended.is_err() {
        std::process::abort();
    }
    alive
}

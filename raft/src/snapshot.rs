//! Snapshots: a checkpoint of the state travels as files, and is verified whole before it is used.
//!
//! Owns sending and receiving, their slots and their bandwidth. The checkpoint itself, its manifest
//! and the swap of directories are `storage::state::checkpoint`'s; when one is taken is the state
//! machine's.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use coracle_storage::exec::Exec;
use coracle_storage::fs::{Fs, OpenMode, read_exact_at};
use coracle_storage::state::{Incoming, Manifest};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

use crate::message::{Answer, Question};
use crate::transport::{Address, Lane, Transport};
use crate::types::{SnapshotMeta, TypeConfig, Vote};

/// Chunks that a transfer has unanswered: keeps the wire busy, and with all send slots at work on one
/// peer stays within the bulk lane's 8 MiB: beyond it a chunk is refused, and the transfer ends.
const CHUNKS_IN_FLIGHT: usize = 3;
/// A chunk is one write; beyond it the transfer is given up and begins anew.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);
/// Verifying and swapping in a large shard takes its time.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);
/// A transfer of which nothing was heard for so long is forgotten, its slot freed.
const TRANSFER_IDLE_MAX: Duration = Duration::from_secs(30);
/// A checkpoint is sent again, rather than made anew, within so long: a follower that refuses one
/// asks ten times a second.
pub(crate) const CHECKPOINT_FRESH: Duration = Duration::from_secs(10);

/// What all groups of a node share: at most so many snapshots at a time, so that repairs leave the
/// disk and the network to the clients.
pub(crate) struct SnapshotSlots {
    pub(crate) send: Arc<Semaphore>,
    pub(crate) receive: Arc<Semaphore>,
    /// Bytes per second of one transfer.
    pub(crate) rate: u64,
    /// Bytes of chunks that were taken by their receivers, since the node started.
    pub(crate) sent_bytes: AtomicU64,
}

impl Default for SnapshotSlots {
    fn default() -> Self {
        Self {
            send: Arc::new(Semaphore::new(2)),
            receive: Arc::new(Semaphore::new(2)),
            rate: 64 << 20,
            sent_bytes: AtomicU64::new(0),
        }
    }
}

/// What a snapshot is made of, besides its position.
#[derive(Debug, Clone)]
pub(crate) enum SnapshotData {
    /// Nothing to send: says only that the state is durable up to there, so the log may be purged.
    Durable,
    /// A checkpoint on this node, removed with its last handle.
    Checkpoint(Arc<CheckpointDir>),
    /// Received, verified and synced; waits for its swap.
    Received(Arc<CheckpointDir>),
}

/// A directory that lives as long as somebody sends from it, receives into it, or waits to install
/// it; one that was swapped in is gone under this name.
pub(crate) struct CheckpointDir {
    pub(crate) fs: Arc<dyn Fs>,
    exec: Arc<dyn Exec>,
    pub(crate) path: PathBuf,
    /// Made by the first who sends it: reading a whole shard is not repeated for every attempt.
    manifest: OnceLock<Manifest>,
}

impl CheckpointDir {
    pub(crate) fn new(fs: Arc<dyn Fs>, exec: Arc<dyn Exec>, path: PathBuf) -> Self {
        Self { fs, exec, path, manifest: OnceLock::new() }
    }

    fn manifest(&self) -> Result<Manifest, coracle_storage::Error> {
        if let Some(manifest) = self.manifest.get() {
            return Ok(manifest.clone());
        }
        let manifest = Manifest::of(&*self.fs, &self.path)?;
        Ok(self.manifest.get_or_init(|| manifest).clone())
    }
}

impl std::fmt::Debug for CheckpointDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "checkpoint {}", self.path.display())
    }
}

impl Drop for CheckpointDir {
    fn drop(&mut self) {
        // Not here: whoever lets go may be an async thread. What a stop leaves, the next start
        // removes.
        let (fs, path) = (self.fs.clone(), std::mem::take(&mut self.path));
        self.exec.blocking(Box::new(move || {
            if fs.exists(&path)
                && let Err(error) = fs.remove_dir_all(&path)
            {
                tracing::warn!(%error, path = %path.display(), "a checkpoint was not removed");
            }
        }));
    }
}

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// One group's transfers.
pub(crate) struct Snapshots {
    fs: Arc<dyn Fs>,
    exec: Arc<dyn Exec>,
    slots: Arc<SnapshotSlots>,
    /// Received snapshots are put together beside it, each under a name of its own: one that waits
    /// for its install is not touched by the next.
    live: PathBuf,
    received: AtomicU64,
    transfers: AtomicU64,
    receiving: Mutex<Option<Receiving>>,
    /// What was sent last, and since when it is: it may be asked for again.
    kept: Mutex<Option<(Instant, Arc<CheckpointDir>)>>,
}

struct Receiving {
    vote: Vote,
    transfer: u64,
    meta: SnapshotMeta,
    incoming: Arc<Incoming>,
    dir: Arc<CheckpointDir>,
    heard: Instant,
    _slot: OwnedSemaphorePermit,
}

impl Snapshots {
    pub(crate) fn new(
        fs: Arc<dyn Fs>,
        exec: Arc<dyn Exec>,
        slots: Arc<SnapshotSlots>,
        live: &Path,
        first_transfer: u64,
    ) -> Self {
        Self {
            fs,
            exec,
            slots,
            live: live.to_owned(),
            received: AtomicU64::new(0),
            transfers: AtomicU64::new(first_transfer),
            receiving: Mutex::default(),
            kept: Mutex::default(),
        }
    }

    /// Sends a snapshot and waits until it is installed. The error says why it was not.
    pub(crate) async fn send(
        &self,
        transport: &dyn Transport,
        to: Address,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<Vote, String> {
        let SnapshotData::Checkpoint(checkpoint) = snapshot.snapshot else {
            return Err("the snapshot holds no files".to_owned());
        };
        *self.kept.lock() = Some((Instant::now(), checkpoint.clone()));
        let _slot = self.slots.send.try_acquire().map_err(|_| "all send slots are taken")?;
        let transfer = self.transfers.fetch_add(1, Ordering::Relaxed);
        let source = checkpoint.clone();
        let manifest = blocking(&*self.exec, move || source.manifest())
            .await?
            .map_err(|error| error.to_string())?;
        let begin = Question::SnapshotBegin {
            vote,
            transfer,
            meta: snapshot.meta,
            manifest: manifest.encode().into(),
        };
        match ask(transport, to, begin, CHUNK_TIMEOUT).await? {
            Answer::SnapshotTaken => {}
            Answer::SnapshotInstalled(vote) => return Ok(vote),
            other => return Err(refused(other)),
        }
        let started = Instant::now();
        let mut sent = 0_u64;
        let mut under_way = FuturesUnordered::new();
        for (file, entry) in manifest.files.iter().enumerate() {
            for chunk in 0..entry.chunk_crcs.len() {
                if under_way.len() == CHUNKS_IN_FLIGHT {
                    under_way.next().await.expect("some are under way")?;
                }
                let (offset, len) = entry.chunk(chunk).expect("a chunk that the manifest lists");
                // The bytes before this one decide when it may leave.
                let due = sent.saturating_mul(1_000_000) / self.slots.rate;
                tokio::time::sleep_until(started + Duration::from_micros(due)).await;
                sent += len as u64;
                let source = checkpoint.clone();
                let path = source.path.join(&entry.name);
                let read = move || read_chunk(&*source.fs, &path, offset, len);
                let (file, chunk) = (file as u32, chunk as u32);
                under_way.push(self.send_chunk(transport, to, (transfer, file, chunk), read));
            }
        }
        while let Some(result) = under_way.next().await {
            result?;
        }
        let end = Question::SnapshotEnd { vote, transfer };
        match ask(transport, to, end, INSTALL_TIMEOUT).await? {
            Answer::SnapshotInstalled(vote) => Ok(vote),
            other => Err(refused(other)),
        }
    }

    async fn send_chunk(
        &self,
        transport: &dyn Transport,
        to: Address,
        (transfer, file, chunk): (u64, u32, u32),
        read: impl FnOnce() -> std::io::Result<Bytes> + Send + 'static,
    ) -> Result<(), String> {
        let data = blocking(&*self.exec, read).await?.map_err(|error| error.to_string())?;
        let bytes = data.len() as u64;
        let question = Question::SnapshotChunk { transfer, file, chunk, data };
        match ask(transport, to, question, CHUNK_TIMEOUT).await? {
            Answer::SnapshotTaken => {
                self.slots.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            other => Err(refused(other)),
        }
    }

    /// Begins to receive. A transfer under way gives way to one of the same or a newer leader, which
    /// sends one at a time: it has given the older one up.
    pub(crate) async fn begin(
        &self,
        vote: Vote,
        transfer: u64,
        meta: SnapshotMeta,
        manifest: Bytes,
    ) -> Result<(), String> {
        let slot = {
            let mut receiving = self.receiving.lock();
            if receiving.as_ref().is_some_and(|other| {
                !matches!(
                    vote.partial_cmp(&other.vote),
                    Some(std::cmp::Ordering::Greater | std::cmp::Ordering::Equal)
                )
            }) {
                return Err("another snapshot is being received".to_owned());
            }
            *receiving = None;
            self.slots.receive.clone().try_acquire_owned()
        };
        let slot = slot.map_err(|_| "all receive slots are taken")?;
        let mut path = self.live.as_os_str().to_os_string();
        path.push(format!(".incoming-{}", self.received.fetch_add(1, Ordering::Relaxed)));
        let dir = Arc::new(CheckpointDir::new(self.fs.clone(), self.exec.clone(), path.into()));
        let (fs, into) = (self.fs.clone(), dir.clone());
        let incoming = blocking(&*self.exec, move || {
            let manifest = Manifest::decode(&into.path, &manifest)?;
            Incoming::begin(fs, &into.path, manifest)
        });
        let incoming = incoming.await?.map_err(|error| error.to_string())?;
        *self.receiving.lock() = Some(Receiving {
            vote,
            transfer,
            meta,
            incoming: Arc::new(incoming),
            dir,
            heard: Instant::now(),
            _slot: slot,
        });
        Ok(())
    }

    /// Takes one chunk, in any order.
    pub(crate) async fn chunk(
        &self,
        transfer: u64,
        file: u32,
        chunk: u32,
        data: Bytes,
    ) -> Result<(), String> {
        let incoming = {
            let mut receiving = self.receiving.lock();
            let receiving = receiving.as_mut().filter(|receiving| receiving.transfer == transfer);
            let receiving = receiving.ok_or("this transfer is not known here")?;
            receiving.heard = Instant::now();
            receiving.incoming.clone()
        };
        let written =
            blocking(&*self.exec, move || incoming.write(file as usize, chunk as usize, &data));
        written.await?.map_err(|error| error.to_string())
    }

    /// Verifies what was received: the snapshot to install.
    pub(crate) async fn end(&self, transfer: u64) -> Result<Snapshot, String> {
        let receiving = {
            let mut receiving = self.receiving.lock();
            if receiving.as_ref().is_none_or(|receiving| receiving.transfer != transfer) {
                return Err("this transfer is not known here".to_owned());
            }
            receiving.take().expect("it was there under the same lock")
        };
        let Receiving { meta, incoming, dir, .. } = receiving;
        let incoming = Arc::into_inner(incoming).ok_or("chunks are still being written")?;
        let finished = blocking(&*self.exec, move || incoming.finish()).await?;
        finished.map_err(|error| error.to_string())?;
        Ok(Snapshot { meta, snapshot: SnapshotData::Received(dir) })
    }

    /// Gives up a transfer of which nothing was heard for too long, and frees its slot; and lets go
    /// of a checkpoint that nobody has asked for lately.
    pub(crate) fn forget_idle(&self) {
        let mut kept = self.kept.lock();
        if kept.as_ref().is_some_and(|(sent, _)| sent.elapsed() >= CHECKPOINT_FRESH) {
            *kept = None;
        }
        drop(kept);
        let mut receiving = self.receiving.lock();
        if receiving.as_ref().is_some_and(|other| other.heard.elapsed() >= TRANSFER_IDLE_MAX) {
            *receiving = None;
        }
    }
}

async fn ask(
    transport: &dyn Transport,
    to: Address,
    question: Question,
    timeout: Duration,
) -> Result<Answer, String> {
    let answer = transport.ask(to, Lane::Bulk, question.encode(), timeout).await;
    Answer::decode(answer.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
}

fn refused(answer: Answer) -> String {
    match answer {
        Answer::SnapshotRefused(why) => why,
        other => format!("an unexpected answer: {other:?}"),
    }
}

fn read_chunk(fs: &dyn Fs, path: &Path, offset: u64, len: usize) -> std::io::Result<Bytes> {
    let mut data = vec![0; len];
    read_exact_at(&*fs.open(path, OpenMode::Read)?, &mut data, offset)?;
    Ok(data.into())
}

/// Runs `job` off the async threads and waits for what it returns.
pub(crate) async fn blocking<T: Send + 'static>(
    exec: &dyn Exec,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (answer, receiver) = oneshot::channel();
    exec.blocking(Box::new(move || {
        let _ = answer.send(job());
    }));
    receiver.await.map_err(|_| "the node is stopping".to_owned())
}

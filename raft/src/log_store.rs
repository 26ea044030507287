//! openraft's log traits over the node's shared log.
//!
//! Owns the translation: log ids, votes and payloads as bytes, completions as openraft's callbacks.
//! What is durable when is `storage::log`'s business.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use coracle_storage::exec::Exec;
use coracle_storage::log::{Done, Log, LogEntry};
use coracle_storage::{Error, ReplicaId};
use futures_util::{Stream, StreamExt, stream};
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use tokio::sync::oneshot;

use crate::entry::{decode_payload, encode_payload, get_log_id, get_vote, put_log_id, put_vote};
use crate::snapshot::blocking;
use crate::types::{Entry, LogId, TypeConfig, Vote, id_bytes, id_from_bytes};
use crate::wire::{Malformed, Reader};

/// Bytes of entries that one message to a follower, or one step of apply, takes at a time: large
/// enough that a sync and a round trip carry many entries, small enough that those in flight to
/// one follower leave room for other groups. One larger entry still goes alone.
pub(crate) const READ_BYTES_MAX: usize = 1 << 20;

/// How often an append that found no room in the log's queue looks again: a disk that has fallen so
/// far behind writes for longer than this.
const ROOM_POLL: Duration = Duration::from_millis(2);

/// One replica's part of the shared log.
#[derive(Clone)]
pub(crate) struct LogStore {
    log: Log,
    replica: ReplicaId,
    exec: Arc<dyn Exec>,
    /// Whether it tells what was committed.
    tells_committed: bool,
}

impl LogStore {
    pub(crate) fn new(log: Log, replica: ReplicaId, exec: Arc<dyn Exec>) -> Self {
        Self { log, replica, exec, tells_committed: true }
    }

    /// The same, but it does not tell what was committed: a hint that openraft can do without.
    pub(crate) fn forgetting_what_is_committed(self) -> Self {
        Self { tells_committed: false, ..self }
    }

    /// What has left the log's cache is read off the async threads: a disk that hangs must not take
    /// them with it, because they watch it.
    async fn read(&self, range: std::ops::Range<u64>, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let (first, replica) = (range.start, self.replica);
        let held = self.log.read_held(replica, range.clone(), bytes_max);
        let entries = match held.map_err(io::Error::other)? {
            Some(entries) => entries,
            None => {
                let log = self.log.clone();
                let read = blocking(&*self.exec, move || log.read(replica, range, bytes_max));
                read.await.map_err(io::Error::other)?.map_err(io::Error::other)?
            }
        };
        // Purged meanwhile: openraft takes what comes first for what it asked for.
        if let Some(entry) = entries.first().filter(|entry| entry.index != first) {
            let why = format!("the log begins at {}, {first} was asked for", entry.index);
            return Err(io::Error::other(why));
        }
        entries.into_iter().map(entry_from_log).collect()
    }

    /// The range's bounds as numbers, cut to what the log holds.
    fn bounds(&self, range: &impl RangeBounds<u64>) -> io::Result<std::ops::Range<u64>> {
        let state = self.log.state(self.replica).map_err(io::Error::other)?;
        let end_of_log = state.last.map_or(0, |(index, _)| index + 1);
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start + 1,
            Bound::Unbounded => state.first_index,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => end + 1,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => end_of_log,
        };
        Ok(start.max(state.first_index)..end.min(end_of_log))
    }
}

fn entry_from_log(entry: LogEntry) -> io::Result<Entry> {
    decode_payload(id_from_bytes(&entry.id), entry.payload).map_err(malformed)
}

fn malformed(error: Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A completion that wakes the caller.
fn awaited() -> (Done, oneshot::Receiver<Result<(), Arc<Error>>>) {
    let (sender, receiver) = oneshot::channel();
    let done: Done = Box::new(move |result| {
        // A caller that is gone (its group stopped) no longer needs the answer.
        let _ = sender.send(result);
    });
    (done, receiver)
}

async fn durable(receiver: oneshot::Receiver<Result<(), Arc<Error>>>) -> io::Result<()> {
    match receiver.await {
        Ok(result) => result.map_err(io::Error::other),
        Err(_) => Err(io::Error::other("the log's writer has stopped")),
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + openraft::OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + openraft::OptionalSend,
    {
        // Why not the default, which reads the whole range at once: after a long absence the range
        // is the whole log, and memory is a budget.
        let store = self.clone();
        // A log that has stopped says so: an empty stream would count as everything applied.
        let (start, failed) = match self.bounds(&range) {
            Ok(range) => (Some(range), None),
            Err(error) => (None, Some(Err(error))),
        };
        let entries = stream::unfold(start, move |range| {
            let store = store.clone();
            async move {
                let range = range.filter(|range| !range.is_empty())?;
                match store.read(range.clone(), READ_BYTES_MAX).await {
                    Ok(entries) => {
                        assert!(
                            !entries.is_empty(),
                            "a range that exists reads at least one entry"
                        );
                        let next = range.start + entries.len() as u64;
                        let items = entries.into_iter().map(Ok).collect::<Vec<_>>();
                        Some((items, Some(next..range.end)))
                    }
                    Err(error) => Some((vec![Err(error)], None)),
                }
            }
        })
        .flat_map(stream::iter);
        stream::iter(failed).chain(entries).fuse().boxed()
    }

    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + openraft::OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let range = self.bounds(&range)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        self.read(range, usize::MAX).await
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        let range = self.bounds(&(start..end))?;
        if range.start != start || range.is_empty() {
            // Purged or cut off since it was asked for: this replica leads no more, and openraft is
            // about to hear of it. Nothing is sent meanwhile.
            return Ok(Vec::new());
        }
        self.read(range, READ_BYTES_MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        let state = self.log.state(self.replica).map_err(io::Error::other)?;
        let Some(bytes) = state.vote else {
            return Ok(None);
        };
        let mut reader = Reader::new(bytes);
        let vote = get_vote(&mut reader).map_err(malformed)?;
        reader.end().map_err(malformed)?;
        Ok(Some(vote))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.log.state(self.replica).map_err(io::Error::other)?;
        let last_purged_log_id = state.purged.map(|(_, id)| id_from_bytes(&id));
        let last_log_id = state.last.map(|(_, id)| id_from_bytes(&id)).or(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let mut bytes = BytesMut::new();
        put_vote(&mut bytes, vote);
        let (done, receiver) = awaited();
        self.log.save_vote(self.replica, bytes.freeze(), done);
        durable(receiver).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        let mut bytes = BytesMut::new();
        put_log_id(&mut bytes, &committed);
        self.log.save_committed(self.replica, bytes.freeze());
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let state = self.log.state(self.replica).map_err(io::Error::other)?;
        let Some(bytes) = state.committed.filter(|_| self.tells_committed) else {
            return Ok(None);
        };
        let mut reader = Reader::new(bytes);
        let committed = get_log_id(&mut reader).map_err(malformed)?;
        reader.end().map_err(malformed)?;
        Ok(committed)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + openraft::OptionalSend,
        I::IntoIter: openraft::OptionalSend,
    {
        // A refused append would end the group for good; one that waits holds up only its group,
        // which cannot go on without its log anyway.
        while !self.log.has_room() {
            tokio::time::sleep(ROOM_POLL).await;
        }
        let entries = entries.into_iter().map(|entry| LogEntry {
            index: entry.index(),
            id: id_bytes(&entry.log_id),
            payload: encode_payload(&entry),
        });
        let done: Done = Box::new(move |result| {
            callback.io_completed(result.map_err(io::Error::other));
        });
        self.log.append(self.replica, entries.collect(), done);
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let (done, receiver) = awaited();
        self.log.truncate_after(self.replica, last.map(|id| id.index()), done);
        durable(receiver).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        // Not awaited: the record only has to be durable before the space is freed, and the log
        // frees by its own durable state. Awaiting would hold up the group's core for a sync.
        let done: Done = Box::new(|result| {
            if let Err(error) = result {
                tracing::error!(%error, "a purge was not recorded");
            }
        });
        self.log.purge(self.replica, upto.index(), id_bytes(&upto), done);
        Ok(())
    }
}

//! Owns the one writer: group commit, the turn from one segment to the next, stopping. Does not
//! decide what to free (see `freeing`).
//!
//! # Group commit
//!
//! Callers change the index and queue an operation, both under one lock, so the order of the queue
//! is the order in which anybody saw the changes. The writer takes everything that waits, puts it
//! into one batch, writes it with one call, syncs once, and only then answers, in order. While it
//! syncs, the next batch gathers: the slower the disk, the larger the batches, and the cost of a
//! sync is shared by all replicas.
//!
//! There is never more than one batch under way, so a batch's mere existence says that everything
//! before it was synced; it also says so in words (its durable-end mark). The last batch has no
//! batch behind it: until the next one, or the next probe, damage to it cannot be told from a torn
//! write. That is the stated limit.
//!
//! A failed write or sync leaves the disk in a state that nobody knows (the kernel may drop the
//! pages and report the next sync as good). So it is never tried again: the log stops, and the
//! process is to end. Only one failure is not final: no room for a new segment. Nothing was
//! promised or written then, so the batch goes back to the queue until a later wake finds room.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use tokio::time::Instant;

use super::freeing;
use super::index::{Damage, Place, Ticket, Written};
use super::queue::{Change, Done, Filled, Op, Rewrite, Shared, State, Taken};
use super::record::{self, BLOCK, BatchHead, Draft, HEADER_LEN, Kind, Origin, ReplicaId, align};
use super::segment::{Segment, SegmentHeader, segment_path};
use crate::error::Error;
use crate::mutant::Mutant;
use crate::options::Sabotage;

/// The writer's own state: nobody else sees it.
pub(crate) struct Writer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) active: Segment,
    /// Where the next batch starts in the active segment.
    pub(crate) offset: u64,
    pub(crate) next_batch: u64,
    /// Header checksum of the last record.
    pub(crate) chain: u32,
    /// The last batch, when there was nothing in it: where it stands, and its bytes.
    pub(crate) last_empty: Option<(u64, Vec<u8>)>,
}

/// How a turn ended.
enum Turn {
    /// Something was written; more may wait.
    Done,
    /// Nothing waits.
    Idle,
    /// No room for a new segment.
    Full,
    /// The log was closed, or has stopped.
    Ended,
}

/// What a batch has put on disk.
#[derive(Default)]
struct Wrote {
    records: Vec<Written>,
    /// The room that it took.
    bytes: u64,
}

/// A record on its way into a batch.
struct Piece<'a> {
    draft: Draft<'a>,
    ticket: Ticket,
}

impl Writer {
    /// Writes batches until nothing waits. False when there will never be anything again.
    pub(crate) fn step(&mut self) -> bool {
        let _guard = StopOnPanic(self.shared.clone());
        loop {
            match self.turn() {
                Turn::Done => {}
                Turn::Idle | Turn::Full => return true,
                Turn::Ended => return false,
            }
        }
    }

    fn turn(&mut self) -> Turn {
        let mut taken = {
            let mut state = self.shared.state.lock();
            if state.stopped.is_some() {
                return Turn::Ended;
            }
            match state.take(self.shared.options.batch_bytes) {
                Some(taken) => taken,
                None if state.closing => {
                    state.stopped = Some("it was closed".to_owned());
                    return Turn::Ended;
                }
                None => return Turn::Idle,
            }
        };
        let unreadable = self.read_rewrites(&mut taken);
        match self.write(&mut taken) {
            Ok(written) => {
                self.finish(taken, written, unreadable);
                Turn::Done
            }
            Err(error @ Error::Full { .. }) => {
                let mut state = self.shared.state.lock();
                if state.closing {
                    drop(state);
                    self.stop(taken, error);
                    return Turn::Ended;
                }
                if !state.full {
                    tracing::error!(%error, "no room for a new log segment: the log waits");
                }
                state.full = true;
                state.put_back(taken);
                Turn::Full
            }
            Err(error) => {
                self.stop(taken, error);
                Turn::Ended
            }
        }
    }

    /// The batch with which `open` ends: it marks everything before it as durable. Not to be
    /// answered, and its failure is `open`'s.
    pub(crate) fn mark(&mut self) -> Result<(), Error> {
        let taken = self.shared.state.lock().take(u64::MAX);
        let mut taken = taken.expect("open has queued a probe");
        let written = self.write(&mut taken)?;
        self.finish(taken, written, Vec::new());
        Ok(())
    }

    /// Fetches what copies forward still need. Records that cannot be read are left out and
    /// returned.
    fn read_rewrites(&self, taken: &mut Taken) -> Vec<(ReplicaId, Error)> {
        let mut unreadable = Vec::new();
        for op in &mut taken.ops {
            let Change::Rewrite(rewrites) = &mut op.change else {
                continue;
            };
            for rewrite in rewrites.iter_mut().filter(|rewrite| rewrite.body.is_none()) {
                match self.read(rewrite.from) {
                    Ok(body) => rewrite.body = Some(body.into()),
                    Err(error) => unreadable.push((rewrite.replica, error)),
                }
            }
        }
        unreadable
    }

    fn read(&self, place: Place) -> Result<Vec<u8>, Error> {
        let segment = {
            let state = self.shared.state.lock();
            let filled = state.segments.get(&place.segment);
            filled.expect("a segment stays until its copies are durable").segment.clone()
        };
        segment.read_body(place.body_offset(), place.body_len, place.body_crc)
    }

    /// Writes and syncs one batch. `Error::Full` means that nothing was touched.
    fn write(&mut self, taken: &mut Taken) -> Result<Wrote, Error> {
        let sabotage = self.shared.options.sabotage;
        let pieces = pieces(taken, sabotage);
        let probes = taken.ops.iter().any(|op| matches!(op.change, Change::Probe));
        if pieces.is_empty() && !probes {
            return Ok(Wrote::default());
        }
        if pieces.is_empty() && !taken.announces && self.last_empty.is_some() {
            self.write_last_again()?;
            return Ok(Wrote::default());
        }
        let replicas: BTreeSet<ReplicaId> =
            pieces.iter().map(|piece| piece.draft.replica).collect();
        let body_bytes = |piece: &Piece<'_>| piece.draft.body.0.len() + piece.draft.body.1.len();
        let records_len: usize = pieces.iter().map(|piece| HEADER_LEN + body_bytes(piece)).sum();
        let len = BatchHead::record_len(replicas.len()) + records_len;
        if self.offset + align(len as u64) > self.active.capacity {
            self.next_segment(len as u64)?;
        }
        let head = BatchHead {
            number: self.next_batch,
            len: u32::try_from(len).expect("the options bound a batch far below 4 GiB"),
            records: pieces.len() as u32,
            durable_segment: self.active.number,
            durable_offset: self.offset,
            log_start: taken.log_start,
            chain: self.chain,
            replicas: replicas.into_iter().collect(),
        };
        let (bytes, written, chain) = self.encode(&head, &pieces);
        let is_empty = pieces.is_empty();
        drop(pieces);
        self.write_at(&bytes, self.offset)?;
        if sabotage == Some(Sabotage::AckBeforeSync) || Mutant::AcknowledgesBeforeSync.is_in() {
            answer(dones(&mut taken.ops), &Ok(()));
        }
        self.sync()?;
        self.last_empty = is_empty.then_some((self.offset, bytes));
        let bytes = align(len as u64);
        self.offset += bytes;
        self.next_batch += 1;
        self.chain = chain;
        Ok(Wrote { records: written, bytes })
    }

    fn encode(&self, head: &BatchHead, pieces: &[Piece<'_>]) -> (Vec<u8>, Vec<Written>, u32) {
        let mut bytes = Vec::with_capacity(head.len as usize);
        let mut origin =
            Origin { salt: self.active.salt, segment: self.active.number, offset: self.offset };
        let body = head.encode();
        let draft = Draft {
            kind: Kind::Batch,
            rewritten: false,
            replica: ReplicaId(0),
            index: head.number,
            body: (&body, &[]),
        };
        let mut chain = record::encode(&mut bytes, origin, 0, draft).header_crc;
        let mut written = Vec::with_capacity(pieces.len());
        for piece in pieces {
            origin.offset = self.offset + bytes.len() as u64;
            let header = record::encode(&mut bytes, origin, chain, piece.draft);
            chain = header.header_crc;
            written.push(Written {
                replica: piece.draft.replica,
                kind: piece.draft.kind,
                index: piece.draft.index,
                ticket: piece.ticket,
                place: Place::new(origin.segment, origin.offset, &header),
            });
        }
        assert_eq!(bytes.len(), head.len as usize, "a batch is as long as its head says");
        (bytes, written, chain)
    }

    /// A probe on an idle log: the last batch says nothing but that everything before it is
    /// durable, so the same bytes go to the same place. An idle node's log does not grow.
    fn write_last_again(&mut self) -> Result<(), Error> {
        let (offset, bytes) = self.last_empty.as_ref().expect("the caller has looked");
        self.write_at(bytes, *offset)?;
        self.sync()
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        // The room was reserved: even a full disk is a broken promise of the file system here.
        self.active.file.write_at(bytes, offset).map_err(|source| self.io(source))
    }

    fn sync(&self) -> Result<(), Error> {
        let begun = Instant::now();
        self.active.file.sync().map_err(|source| self.io(source))?;
        let took = begun.elapsed();
        self.shared.state.lock().last_sync = took;
        (self.shared.options.on_sync)(took);
        Ok(())
    }

    fn io(&self, source: io::Error) -> Error {
        Error::Io { path: self.active.path.to_path_buf(), source }
    }

    /// Goes on in a new segment with room for a batch of `len` bytes.
    pub(crate) fn next_segment(&mut self, len: u64) -> Result<(), Error> {
        let shared = &self.shared;
        let header = SegmentHeader {
            number: self.active.number + 1,
            salt: shared.options.salt,
            first_batch: self.next_batch,
            chain: self.chain,
            durable_segment: self.active.number,
            durable_offset: self.offset,
        };
        let capacity = align(shared.options.segment_bytes).max(BLOCK + align(len));
        let segment = Segment::create(&*shared.fs, &shared.dir, header, capacity)
            .map_err(|error| Error::io(&segment_path(&shared.dir, header.number), error))?;
        let mut state = shared.state.lock();
        state.full = false;
        if let Some(filled) = state.segments.get_mut(&self.active.number) {
            filled.used = self.offset;
        }
        let filled = Filled { segment: segment.clone(), used: BLOCK };
        state.segments.insert(segment.number, filled);
        drop(state);
        self.active = segment;
        self.offset = BLOCK;
        self.last_empty = None;
        Ok(())
    }

    /// The batch is durable: the index learns the places, callers their outcome, files that are not
    /// needed any more go.
    fn finish(&mut self, mut taken: Taken, wrote: Wrote, unreadable: Vec<(ReplicaId, Error)>) {
        let shared = self.shared.clone();
        let freed = {
            let mut state = shared.state.lock();
            state.durable = taken.ops.last().expect("a batch has operations").ticket;
            if taken.announces {
                state.log_start_durable = taken.log_start;
            }
            let batch = self.next_batch - 1;
            for written in &wrote.records {
                state.index.placed(written, batch);
            }
            state.index.evict();
            if let Some(filled) = state.segments.get_mut(&self.active.number) {
                filled.used = self.offset;
            }
            for (replica, error) in unreadable {
                mark_damaged(&mut state, replica, &error);
            }
            freeing::account(&mut state, &taken.ops, wrote.bytes, &shared.options);
            freeing::advance(&mut state, &shared.options)
        };
        answer(dones(&mut taken.ops), &Ok(()));
        self.remove(&freed);
    }

    fn remove(&self, freed: &[Segment]) {
        if freed.is_empty() {
            return;
        }
        let shared = &self.shared;
        let mut removed = freed.iter().try_for_each(|segment| shared.fs.remove_file(&segment.path));
        if removed.is_ok() {
            removed = shared.fs.sync_dir(&shared.dir);
        }
        if let Err(error) = removed {
            // Nothing is lost by it: the next open removes what is before the log's start.
            tracing::warn!(%error, "a freed log segment could not be removed");
        }
    }

    /// The end: everybody who waits gets the error, and the node hears of it once.
    fn stop(&self, mut taken: Taken, error: Error) {
        let waiting = {
            let mut state = self.shared.state.lock();
            state.stopped = Some(error.to_string());
            state.queue_bytes = 0;
            std::mem::take(&mut state.queue)
        };
        (self.shared.options.on_fatal)(&error);
        let error = Err(Arc::new(error));
        answer(dones(&mut taken.ops), &error);
        answer(dones(&mut Vec::from(waiting)), &error);
    }
}

/// Held during a step.
struct StopOnPanic(Arc<Shared>);

impl Drop for StopOnPanic {
    /// A broken invariant has unwound the writer: nobody would ever be answered again. What was
    /// being written is unknown; the callbacks of its batch are gone.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let error = Error::Stopped { why: "the log's writer has panicked".to_owned() };
        let waiting = {
            let mut state = self.0.state.lock();
            state.stopped = Some("the log's writer has panicked".to_owned());
            std::mem::take(&mut state.queue)
        };
        (self.0.options.on_fatal)(&error);
        answer(dones(&mut Vec::from(waiting)), &Err(Arc::new(error)));
    }
}

/// A replica's record turned out to be unreadable while the log runs: it is recovering from now on.
pub(crate) fn mark_damaged(state: &mut State, replica: ReplicaId, error: &Error) {
    let healthy = state.index.replicas.get(&replica).is_some_and(|known| known.damage.is_none());
    if healthy {
        tracing::error!(%replica, %error, "a replica has lost log data and is recovering");
        set_damaged(state, Damage::of(replica, error));
    }
}

/// Makes a replica recovering, in memory and in the queue.
pub(crate) fn set_damaged(state: &mut State, damage: Damage) {
    let ticket = state.next_ticket();
    state.push_own(damage.replica, Change::Damaged(damage.encode()), ticket);
    state.index.set_damage(damage, ticket);
}

/// Takes the callbacks out, in order.
fn dones(ops: &mut [Op]) -> Vec<Done> {
    ops.iter_mut().filter_map(|op| op.done.take()).collect()
}

fn answer(dones: Vec<Done>, outcome: &Result<(), Arc<Error>>) {
    for done in dones {
        done(outcome.clone());
    }
}

/// The records of a batch, in order.
fn pieces(taken: &Taken, sabotage: Option<Sabotage>) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    for op in &taken.ops {
        let draft =
            |kind, index, body| Draft { kind, rewritten: false, replica: op.replica, index, body };
        let mut add = |draft| pieces.push(Piece { draft, ticket: op.ticket });
        match &op.change {
            Change::Create => add(draft(Kind::Create, 0, (&[], &[]))),
            Change::Destroy => add(draft(Kind::Destroy, 0, (&[], &[]))),
            Change::Forget => add(draft(Kind::Forget, 0, (&[], &[]))),
            Change::Append(entries) => {
                for entry in entries {
                    add(draft(Kind::Entry, entry.index, (&entry.id, &entry.payload)));
                }
            }
            Change::Vote(_)
                if sabotage == Some(Sabotage::LostVote) || Mutant::ForgetsVotes.is_in() => {}
            Change::Vote(vote) => add(draft(Kind::Vote, 0, (vote, &[]))),
            Change::Truncate(_)
                if sabotage == Some(Sabotage::ForgottenTruncate)
                    || Mutant::ForgetsTruncations.is_in() => {}
            Change::Truncate(from) => add(draft(Kind::Truncate, *from, (&[], &[]))),
            Change::Purge(index, id) => add(draft(Kind::Purge, *index, (id, &[]))),
            Change::Damaged(why) => add(draft(Kind::Damaged, 0, (why, &[]))),
            Change::Rewrite(rewrites) => pieces.extend(rewrites.iter().filter_map(rewritten)),
            Change::Barrier | Change::Probe => {}
        }
    }
    for (replica, committed, ticket) in &taken.committed {
        let draft = Draft {
            kind: Kind::Committed,
            rewritten: false,
            replica: *replica,
            index: 0,
            body: (committed, &[]),
        };
        pieces.push(Piece { draft, ticket: *ticket });
    }
    pieces
}

fn rewritten(rewrite: &Rewrite) -> Option<Piece<'_>> {
    let body = rewrite.body.as_ref()?;
    let draft = Draft {
        kind: rewrite.kind,
        rewritten: true,
        replica: rewrite.replica,
        index: rewrite.index,
        body: (body, &[]),
    };
    Some(Piece { draft, ticket: rewrite.ticket })
}

//! Owns the choice of what to free and what to copy forward. Does not touch files.
//!
//! A segment is free when no live record stands in it or in one before it. Segments go oldest
//! first: the truncations and purges in a segment speak only of records in it or before it, so they
//! need no copies.
//!
//! What the index shows may not be durable yet. So a free segment takes three steps: it is free
//! once everything queued at that moment is durable; then a batch says so (its `log_start`), so
//! that a segment which is missing can be told from one that was freed; when that batch is durable,
//! the file is removed.
//!
//! Copying forward goes through the queue like any other operation. It shows what was live when it
//! was queued, stands behind everything queued before, and never truncates on replay, so it cannot
//! bring back what a later operation removed. The old copy is freed by the rule above, after the
//! new one is durable.
//!
//! Copying is paid by writing: callers' batches earn the bytes that copies may cost. So the log
//! writes at most twice what callers write, and an idle log copies nothing, whatever the sizes of
//! segments and records are.

use bytes::{BufMut, Bytes, BytesMut};

use super::index::{Damage, Place, Replica, Slot, Stored};
use super::queue::{Change, Op, Rewrite, State};
use super::record::{Kind, ReplicaId};
use super::segment::Segment;
use crate::options::LogOptions;

/// Copying everything forward must give back clearly more than it takes, else a log that is simply
/// full of live data would copy itself for ever: at most a quarter of the log may be live.
const LIVE_SHARE: u64 = 4;

/// One turn after each batch: moves `log_start` and queues copies. Returns the segments to remove.
pub(crate) fn advance(state: &mut State, options: &LogOptions) -> Vec<Segment> {
    if let Some((planned, ticket)) = state.log_start_planned
        && ticket <= state.durable
    {
        state.log_start = state.log_start.max(planned);
        state.log_start_planned = None;
    }
    if state.rewriting.is_some_and(|ticket| ticket <= state.durable) {
        state.rewriting = None;
    }
    let newest = *state.segments.keys().next_back().expect("there is always an active segment");
    let needed = state.index.live.oldest().map_or(newest, |oldest| oldest.min(newest));
    if needed > state.log_start && state.log_start_planned.is_none() {
        if state.durable == state.ticket {
            state.log_start = needed;
        } else {
            state.log_start_planned = Some((needed, state.ticket));
        }
    }
    queue_rewrite(state, options, newest);
    if state.log_start > state.log_start_durable && state.queue.is_empty() {
        // Nobody else makes a batch that could say it.
        let ticket = state.next_ticket();
        state.push_own(ReplicaId(0), Change::Probe, ticket);
    }
    let kept = state.segments.split_off(&state.log_start_durable);
    let freed = std::mem::replace(&mut state.segments, kept);
    freed.into_values().map(|filled| filled.segment).collect()
}

/// Books a batch of `batch_bytes`: callers' bytes earn, copies cost.
pub(crate) fn account(state: &mut State, ops: &[Op], batch_bytes: u64, options: &LogOptions) {
    let copied: u64 = ops
        .iter()
        .filter_map(|op| match &op.change {
            Change::Rewrite(rewrites) => Some(rewrites),
            _ => None,
        })
        .flatten()
        .map(|rewrite| rewrite.from.record_len())
        .sum();
    let by_callers = ops.iter().any(|op| op.done.is_some());
    let cost = if by_callers { copied } else { batch_bytes };
    let earned = batch_bytes - cost.min(batch_bytes);
    let max = options.log_bytes_target as i64;
    state.copy_credit = (state.copy_credit + earned as i64 - cost as i64).min(max);
}

fn queue_rewrite(state: &mut State, options: &LogOptions, newest: u64) {
    if state.rewriting.is_some() || state.full || state.copy_credit <= 0 {
        return;
    }
    let Some(oldest) = state.index.live.oldest().filter(|&oldest| oldest < newest) else {
        return;
    };
    let log_bytes = state.bytes_on_disk();
    let nearly_free = state.index.live.bytes_in(oldest) <= options.rewrite_small_bytes;
    let too_long = log_bytes > options.log_bytes_target
        && state.index.live.total().saturating_mul(LIVE_SHARE) <= log_bytes;
    if !nearly_free && !too_long {
        return;
    }
    let rewrites = collect(state, oldest, options.rewrite_step_bytes);
    assert!(!rewrites.is_empty(), "a segment with live bytes has live records");
    let ticket = state.next_ticket();
    state.rewriting = Some(ticket);
    state.push_own(ReplicaId(0), Change::Rewrite(rewrites), ticket);
}

/// Live records of a segment, up to a number of bytes, but at least one.
fn collect(state: &State, segment: u64, bytes_max: u64) -> Vec<Rewrite> {
    let mut picked = Picked { rewrites: Vec::new(), segment, bytes: 0, bytes_max };
    for (&id, stored) in &state.index.destroyed {
        picked.stored(id, Kind::Destroy, 0, stored, |()| Bytes::new());
    }
    for (&id, replica) in &state.index.replicas {
        picked.replica(id, replica);
    }
    picked.rewrites
}

struct Picked {
    rewrites: Vec<Rewrite>,
    segment: u64,
    bytes: u64,
    bytes_max: u64,
}

impl Picked {
    fn replica(&mut self, id: ReplicaId, replica: &Replica) {
        self.stored(id, Kind::Create, replica.created.value, &replica.created, |_| Bytes::new());
        if let Some(vote) = &replica.vote {
            self.stored(id, Kind::Vote, 0, vote, Bytes::clone);
        }
        if let Some(committed) = &replica.committed {
            self.stored(id, Kind::Committed, 0, committed, Bytes::clone);
        }
        if let Some(purged) = &replica.purged {
            let copy = |purged: &(u64, [u8; 16])| Bytes::copy_from_slice(&purged.1);
            self.stored(id, Kind::Purge, purged.value.0, purged, copy);
        }
        if let Some(damage) = &replica.damage {
            let copy = |damage: &Damage| Bytes::from(damage.encode());
            self.stored(id, Kind::Damaged, 0, damage, copy);
        }
        if replica.entries_live.bytes_in(self.segment) == 0 {
            return;
        }
        for (at, slot) in replica.entries.iter().enumerate() {
            if self.is_full() {
                return;
            }
            if let Some(place) = slot.place.filter(|place| place.segment == self.segment) {
                let (index, ticket) = (replica.first + at as u64, slot.ticket);
                self.pick(id, Kind::Entry, index, ticket, place, entry_body(slot));
            }
        }
    }

    fn stored<T>(
        &mut self,
        id: ReplicaId,
        kind: Kind,
        index: u64,
        stored: &Stored<T>,
        body: impl FnOnce(&T) -> Bytes,
    ) {
        if let Some(place) = stored.place.filter(|place| place.segment == self.segment) {
            self.pick(id, kind, index, stored.ticket, place, Some(body(&stored.value)));
        }
    }

    fn pick(
        &mut self,
        replica: ReplicaId,
        kind: Kind,
        index: u64,
        ticket: u64,
        from: Place,
        body: Option<Bytes>,
    ) {
        if !self.is_full() {
            self.bytes += u64::from(from.body_len);
            self.rewrites.push(Rewrite { replica, kind, index, ticket, from, body });
        }
    }

    fn is_full(&self) -> bool {
        !self.rewrites.is_empty() && self.bytes >= self.bytes_max
    }
}

/// The body of an entry's record, when its payload is in memory.
fn entry_body(slot: &Slot) -> Option<Bytes> {
    let payload = slot.payload.as_ref()?;
    let mut body = BytesMut::with_capacity(16 + payload.len());
    body.put_slice(&slot.id);
    body.put_slice(payload);
    Some(body.freeze())
}

//! Owns reading keys of one group: at which version they are judged, and whether the view that was
//! read may answer at all. Does not choose the group.
//!
//! A read of the newest state needs a version only where something may have expired: an entry with an
//! expiry is gone from that version on, and no replica may find it again after one found it gone. So
//! the leader fixes a version V, also for a replica that does not lead. An entry that V does not reach
//! was there when it was read. One that V reaches may have been overwritten between the read and V; the
//! read is made again, at V.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits;
use coracle_proto::reason::Fault;
use coracle_raft::clock::HybridTime;
use coracle_raft::error::GroupError;
use coracle_raft::group::{Fixed, Group};
use coracle_raft::leadership::Standing;
use coracle_raft::state_machine::ReadState;
use coracle_raft::types::Position;
use coracle_storage::Mutant;
use coracle_storage::state::Versioned;
use tokio::time::Instant;

use crate::fault::Refusal;
use crate::router::plan::{Freshness, Lookup};

/// How long a replica that does not lead may take to reach what a session has seen, before the leader
/// is asked: a few heartbeats, by which it hears what is committed.
const CATCH_UP_MAX: Duration = Duration::from_millis(250);

/// What was found, and where in the group's order.
pub(crate) struct Found {
    /// In the order of the keys; `None` where the key is absent.
    pub(crate) entries: Vec<Option<Versioned>>,
    pub(crate) at: Position,
    /// What the group held in the view.
    pub(crate) arc: Option<(u64, u64)>,
    /// The group clock in the view.
    pub(crate) clock: u64,
    /// Of a read in a session: the version at which expiry was judged.
    pub(crate) judged_at: u64,
    /// How old at most what was read is; `None` where nothing but the group clock tells.
    pub(crate) age: Option<Duration>,
}

/// What is asked of a view.
#[derive(Clone)]
struct Question {
    keyspace: u32,
    keys: Arc<Vec<(u64, Bytes)>>,
}

/// Before a look that was overtaken is made again: what overtook it is done within moments.
const OVERTAKEN_PAUSE: Duration = Duration::from_millis(2);

/// Reads keys of a group as fresh as is asked for. A look that took longer than the keyspace's history
/// lasts may have missed what compaction dropped meanwhile, and is made again.
pub(crate) async fn look_up(
    group: &Group,
    keyspace: u32,
    lookup: &Lookup,
    now_ms: u64,
    deadline: Instant,
) -> Result<Found, Refusal> {
    loop {
        match look_up_once(group, keyspace, lookup, now_ms, deadline).await {
            Err(Refusal::Overtaken) if Instant::now() < deadline => {
                tokio::time::sleep(OVERTAKEN_PAUSE).await;
            }
            result => return result,
        }
    }
}

async fn look_up_once(
    group: &Group,
    keyspace: u32,
    lookup: &Lookup,
    now_ms: u64,
    deadline: Instant,
) -> Result<Found, Refusal> {
    let question = Question { keyspace, keys: Arc::new(lookup.keys.clone()) };
    match lookup.freshness.clone() {
        Freshness::Newest { judged_from } => newest(group, question, judged_from, deadline).await,
        other => Box::pin(look_up_otherwise(group, question, other, now_ms, deadline)).await,
    }
}

/// Reads that need not be the newest, or must be older. Boxed: see [`Router::execute`].
///
/// [`Router::execute`]: crate::router::Router::execute
async fn look_up_otherwise(
    group: &Group,
    question: Question,
    freshness: Freshness,
    now_ms: u64,
    deadline: Instant,
) -> Result<Found, Refusal> {
    match freshness {
        Freshness::Any => {
            let look = move |state: &ReadState| question.look(state, u64::MAX);
            let mut found = group.read_local(0, deadline, look).await??;
            let judged_at = found.clock.max(HybridTime::at_ms(now_ms).0);
            found.judge(judged_at);
            Ok(found)
        }
        Freshness::Session { index, judged_from, epoch, strangers } => {
            let leads = group.status().state == Standing::Leader;
            let until = if leads { deadline } else { deadline.min(Instant::now() + CATCH_UP_MAX) };
            let local = question.clone();
            let look = move |state: &ReadState| {
                vouches(state, epoch, &strangers).then(|| local.look(state, u64::MAX)).transpose()
            };
            let index = if Mutant::ForgetsSessions.is_in() { 0 } else { index };
            let found = group.read_local(index, until, look).await??;
            let judged = found
                .and_then(|mut found| found.judge_surely(judged_from, now_ms).then_some(found));
            match judged {
                Some(found) => Ok(found),
                None => newest(group, question, judged_from, deadline).await,
            }
        }
        Freshness::Bounded { bound } => {
            let local = question.clone();
            let look = move |state: &ReadState| local.look(state, u64::MAX);
            let (found, age) = group.read_bounded(bound, deadline, look).await?;
            let mut found = found?;
            found.age = Some(age);
            match found.judge_surely(0, now_ms) {
                true => Ok(found),
                false => newest(group, question, 0, deadline).await,
            }
        }
        Freshness::At(version) => {
            let mut found = question.read_at(group, Some(version), deadline).await?;
            found.judge(version);
            found.judged_at = version;
            still_there(group, question.keyspace, version, found.arc, deadline).await?;
            Ok(found)
        }
        Freshness::Newest { judged_from } => newest(group, question, judged_from, deadline).await,
    }
}

/// The newest state. See the module.
async fn newest(
    group: &Group,
    question: Question,
    judged_from: u64,
    deadline: Instant,
) -> Result<Found, Refusal> {
    let newest = question.clone();
    let look = move |state: &ReadState| newest.look(state, u64::MAX);
    let mut found = group.read(deadline, look).await??;
    found.age = Some(Duration::ZERO);
    match found.first_expiry_after(0) {
        None => {
            found.judge(0);
            Ok(found)
        }
        Some(expiry) => {
            Box::pin(newest_judged(group, question, found, expiry, judged_from, deadline)).await
        }
    }
}

/// Judges what was found, of which something expires at a version.
async fn newest_judged(
    group: &Group,
    question: Question,
    mut found: Found,
    expiry: u64,
    judged_from: u64,
    deadline: Instant,
) -> Result<Found, Refusal> {
    let mut fixed = fix(group, None, deadline).await?;
    if fixed.version < judged_from {
        fixed = fix(group, Some(judged_from), deadline).await?;
    }
    if fixed.version >= expiry {
        found = question.look_at(group, fixed, deadline).await?;
        match still_there(group, question.keyspace, fixed.version, found.arc, deadline).await {
            Err(Refusal::Gone { .. }) => return Err(Refusal::Overtaken),
            checked => checked?,
        }
    }
    found.judge(fixed.version);
    found.judged_at = fixed.version;
    Ok(found)
}

/// Fixes a version, within the deadline.
pub(crate) async fn fix(
    group: &Group,
    version: Option<u64>,
    deadline: Instant,
) -> Result<Fixed, GroupError> {
    let fixed = tokio::time::timeout_at(deadline, group.fix_version(version)).await;
    fixed.unwrap_or(Err(GroupError::Expired))
}

/// Whether a view holds what a session has seen of other shards. See [`Freshness::Session`].
fn vouches(state: &ReadState, epoch: u64, strangers: &[u64]) -> bool {
    let known = state.descriptor.as_ref();
    known.is_none_or(|known| known.epoch >= epoch)
        && strangers.iter().all(|shard| state.descends_from(*shard))
}

/// Checks, after a read at a version, that nothing of it was gone by then: what is reclaimed goes by
/// the state as it is, not by the view. `arc`: what the view held; what has gone to a child since may be
/// dropped.
pub(crate) async fn still_there(
    group: &Group,
    keyspace: u32,
    version: u64,
    arc: Option<(u64, u64)>,
    deadline: Instant,
) -> Result<(), Refusal> {
    let look = move |state: &ReadState| (state.threshold(keyspace), state.descriptor.clone());
    let (oldest, descriptor) = group.read_local(0, deadline, look).await?;
    if descriptor.as_ref().is_none_or(|descriptor| descriptor.arc != arc) {
        return Err(Refusal::Stale(descriptor));
    }
    if version < oldest && !Mutant::ServesWhatIsGone.is_in() {
        return Err(Refusal::Gone { oldest });
    }
    Ok(())
}

impl Question {
    async fn read_at(
        &self,
        group: &Group,
        version: Option<u64>,
        deadline: Instant,
    ) -> Result<Found, Refusal> {
        let fixed = fix(group, version, deadline).await?;
        self.look_at(group, fixed, deadline).await
    }

    async fn look_at(
        &self,
        group: &Group,
        fixed: Fixed,
        deadline: Instant,
    ) -> Result<Found, Refusal> {
        let question = self.clone();
        let look = move |state: &ReadState| question.look(state, fixed.version);
        let mut found: Found = group.read_at(fixed, deadline, look).await??;
        found.age = Some(Duration::ZERO);
        Ok(found)
    }

    fn look(&self, state: &ReadState, version: u64) -> Result<Found, Refusal> {
        let mut entries = Vec::with_capacity(self.keys.len());
        let mut bytes = 0;
        for (position, key) in self.keys.iter() {
            // Whatever epoch was named: the view holds the key, or another shard does.
            let owns = |descriptor: &coracle_raft::descriptor::Descriptor| {
                descriptor.owns(self.keyspace, *position)
            };
            if !state.descriptor.as_ref().is_some_and(owns) {
                return Err(Refusal::Stale(state.descriptor.clone()));
            }
            let found = state.reader.get_at(self.keyspace, key, version)?;
            bytes += found.as_ref().map_or(0, |found| found.value.len());
            limits::check_batch_get_answer(bytes).map_err(Fault::from)?;
            entries.push(found);
        }
        if !state.is_whole(self.keyspace) {
            return Err(Refusal::Overtaken);
        }
        let arc = state.descriptor.as_ref().and_then(|descriptor| descriptor.arc);
        let (at, clock) = (state.position, state.clock);
        Ok(Found { entries, at, arc, clock, judged_at: 0, age: None })
    }
}

impl Found {
    /// The first version after `past` at which something that was found expires.
    fn first_expiry_after(&self, past: u64) -> Option<u64> {
        let expiries = self.entries.iter().flatten().filter(|found| !found.tombstone);
        expiries.map(|found| found.expires_at_version).filter(|expiry| *expiry > past).min()
    }

    /// Judges expiry without asking anybody, where nothing that was found is in doubt; else leaves
    /// it, and says so. What the group's clock, or the reader, has reached is past for everybody;
    /// what lies farther ahead than any leader's stamps can be is not: this clock and the leader's may
    /// each be a bound off the median, and a leader follows a reader one more ahead of its own.
    /// `now_ms` is 0 for a clock that strays.
    fn judge_surely(&mut self, judged_from: u64, now_ms: u64) -> bool {
        let past = self.clock.max(judged_from);
        let surely_past = HybridTime::at_ms(now_ms).0.saturating_add(3 * HybridTime::BOUND);
        let expiry = self.first_expiry_after(past);
        if expiry.is_some_and(|expiry| expiry <= surely_past || now_ms == 0) {
            // Only the leader can say whether it is gone, and make that hold for everybody.
            return false;
        }
        self.judge(past);
        self.judged_at = past;
        true
    }

    /// Drops what is deleted, or expired at the version.
    fn judge(&mut self, version: u64) {
        for entry in &mut self.entries {
            entry.take_if(|found| found.is_absent_at(version));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(expires_at_version: u64, tombstone: bool) -> Option<Versioned> {
        Some(Versioned { version: 1, value: Bytes::new(), expires_at_version, tombstone })
    }

    fn found(entries: Vec<Option<Versioned>>) -> Found {
        let at = Position::default();
        Found { entries, at, arc: None, clock: 0, judged_at: 0, age: None }
    }

    #[test]
    fn only_what_can_expire_asks_for_a_version() {
        let first = |entries, past| found(entries).first_expiry_after(past);
        assert_eq!(first(vec![None, entry(0, false), entry(9, true)], 0), None);
        assert_eq!(first(vec![entry(9, false), entry(7, false)], 0), Some(7));
        assert_eq!(first(vec![entry(9, false), entry(7, false)], 7), Some(9));
    }

    #[test]
    fn what_is_in_doubt_is_left_to_the_leader() {
        let at = |ms| HybridTime::at_ms(ms).0;
        let judged = |expires_at, clock, judged_from, now_ms| {
            let mut found = Found { clock, ..found(vec![entry(expires_at, false)]) };
            let surely = found.judge_surely(judged_from, now_ms);
            surely.then(|| found.entries[0].is_some())
        };
        assert_eq!(judged(at(5_000), at(5_000), 0, 4_000), Some(false), "the group has passed it");
        assert_eq!(judged(at(5_000), at(1_000), at(6_000), 4_000), Some(false), "the reader has");
        assert_eq!(judged(at(5_000), at(1_000), 0, 3_499), Some(true), "no clock can have");
        assert_eq!(judged(at(5_000), at(1_000), 0, 3_500), None);
        assert_eq!(judged(at(5_000), at(1_000), 0, 9_000), None);
        assert_eq!(judged(at(5_000), at(1_000), 0, 0), None, "this clock strays");
        assert_eq!(judged(0, at(1_000), 0, 0), Some(true), "it never expires");
    }

    #[test]
    fn entry_is_gone_from_its_expiry_on() {
        let judged = |version| {
            let mut found = found(vec![entry(0, true), entry(0, false), entry(7, false)]);
            found.judge(version);
            found.entries.iter().map(Option::is_some).collect::<Vec<_>>()
        };
        assert_eq!(judged(6), [false, true, true]);
        assert_eq!(judged(7), [false, true, false]);
    }
}

//! Owns what compaction may drop: superseded versions, dead keys, keys outside the arc. Does not
//! compact, does not know hashing (the arc is a predicate that is handed in), and decides by
//! nothing but the state that it was given.
//!
//! # Why nothing comes back
//!
//! A key's versions are separate entries of the store, newest first, and one compaction sees only
//! some of the store's files: of a key's versions any subset. RocksDB moves entries down
//! independently, so an *older* version may well lie in a file that this compaction does not see,
//! even above the newer one. From that follow the rules, where T is the history threshold of the
//! keyspace (the lowest version that anybody may still read at):
//!
//! 1. A version above T stays.
//! 2. Of the versions at or below T that one compaction sees, the newest stays, unless rule 4 drops
//!    it. The older ones go: whoever reads at or above T finds the newer one, which stays behind in
//!    the same atomic step.
//! 3. So a *dead* version (a delete marker, or a value expired at T) stays as well, when it is the
//!    newest that is seen: an older put may exist elsewhere, and would be found again. It is noted
//!    for [`crate::state::ReplicaState::sweep`], which reads all versions of that key and deletes
//!    the dead one together with all older ones, in one batch.
//! 4. Only a *complete* compaction (all files of the store, in one pass) drops a dead version
//!    itself, with all older versions, in its one atomic step. An older version that is not yet in
//!    any file cannot exist: versions rise with the log, batches reach files in the order of their
//!    writes, and an ingest of older versions runs under [`FilterState::paused`] until it is
//!    flushed. This needs one pass over all keys: no sub-compactions.
//!
//! By induction over these steps the following holds always: *a version is removed only while a
//! newer one at or below T stays, or together with or after all older versions of its key.* So a
//! reader at any version ≥ T finds what it found.
//!
//! RocksDB shows a filter only live puts, and where its verdict removes an entry, leaves its own
//! delete marker unless no older entry of the same physical key can exist; so a physical key that
//! was written twice (a replay) is no hole. A filter ignores RocksDB's snapshots: a reader below T
//! may miss entries. Readers check their version against the threshold again *after* reading, or
//! hold a pin.
//!
//! # Why only flushed state
//!
//! After a crash the log replays from what was flushed, and must judge every condition as before. A
//! write that is replayed gets a version above the flushed group clock. T is never above the
//! flushed clock, so what is dead at T is absent for every replayed condition as well. With an
//! unflushed clock this fails: a write replayed *below* an expiry would find its key gone. The
//! owner therefore calls [`Filter::set`] with what a flush has made durable, no more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::mutant::Mutant;
use crate::state::{key, value};

/// Whether a user key of a keyspace lies in the replica's arc. Must not panic.
pub type ArcFilter = Arc<dyn Fn(u32, &[u8]) -> bool + Send + Sync>;

/// Bytes of noted dead keys. Beyond it, further ones are not noted: a later compaction meets them
/// again.
const DEAD_BYTES_MAX: usize = 4 << 20;

/// What the filter decides by. All of it must be flushed, replicated state.
#[derive(Clone, Default)]
pub struct FilterState {
    /// Nothing is dropped: while versions older than flushed ones are being ingested, until they
    /// are flushed.
    pub paused: bool,
    /// The group clock.
    pub clock: u64,
    /// The last entry that all this holds: of two states with one clock the later one is newer.
    pub index: u64,
    /// The history threshold of keyspaces that are not in `thresholds`: versions below it are not
    /// read any more.
    pub threshold: u64,
    /// History thresholds by keyspace.
    pub thresholds: BTreeMap<u32, u64>,
    /// The arc; without one, every key counts as inside.
    pub arc: Option<ArcFilter>,
    /// The arc's ends, where there is one: whoever has read a view of another arc can tell by it that keys of
    /// the view may have been dropped.
    pub extent: Option<(u64, u64)>,
}

impl FilterState {
    /// The lowest version that may still be read at in a keyspace: versions superseded there may
    /// go.
    pub fn threshold(&self, keyspace: u32) -> u64 {
        if Mutant::DropsHistory.is_in() {
            return self.clock;
        }
        self.thresholds.get(&keyspace).copied().unwrap_or(self.threshold).min(self.clock)
    }
}

impl fmt::Debug for FilterState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilterState")
            .field("paused", &self.paused)
            .field("clock", &self.clock)
            .field("index", &self.index)
            .field("threshold", &self.threshold)
            .field("thresholds", &self.thresholds)
            .field("extent", &self.extent)
            .finish()
    }
}

/// The state that a store's compactions decide by, shared with its owner, and the dead keys that
/// they could not drop.
///
/// A fresh filter drops nothing.
#[derive(Default)]
pub struct Filter {
    now: RwLock<Now>,
    dead: Mutex<Dead>,
    dropped: AtomicU64,
}

/// Under one lock: between the end of a hold and a look at the state before it, nobody decides by the latter.
#[derive(Default)]
struct Now {
    state: Arc<FilterState>,
    /// Holds, whatever state is set, until it is ended.
    held: bool,
}

#[derive(Default)]
struct Dead {
    prefixes: BTreeSet<Vec<u8>>,
    bytes: usize,
}

impl Filter {
    /// Replaces the state, for compactions that begin from now on. Only with what a flush has made
    /// durable. Of two flushes that overlap the newer one's stays: readers judge by the state that
    /// stands what compactions may have dropped until then. The clock alone does not tell the newer
    /// one: entries that change settings or pins need not move it.
    pub fn set(&self, state: FilterState) {
        let current = &mut self.now.write().state;
        if (state.clock, state.index) >= (current.clock, current.index) {
            *current = Arc::new(state);
        }
    }

    /// Has passes that begin from now on drop nothing, whatever [`Filter::set`] says: keys are being ingested
    /// that the state as it stands does not count as the group's own.
    pub fn hold(&self, holds: bool) {
        self.now.write().held = holds;
    }

    /// What a pass that began now would decide by: paused while it is held.
    pub fn state(&self) -> Arc<FilterState> {
        let now = self.now.read();
        match now.held {
            true => Arc::new(FilterState { paused: true, ..FilterState::clone(&now.state) }),
            false => now.state.clone(),
        }
    }

    /// Versions dropped since the store was opened.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Dead keys noted for the sweep.
    pub fn dead_keys(&self) -> usize {
        self.dead.lock().prefixes.len()
    }

    /// Takes up to `max` noted dead keys, as data prefixes.
    pub(crate) fn take_dead(&self, max: usize) -> Vec<Vec<u8>> {
        let mut dead = self.dead.lock();
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(prefix) = dead.prefixes.pop_first()
        {
            dead.bytes -= prefix.len();
            taken.push(prefix);
        }
        taken
    }

    fn note_dead(&self, prefix: &[u8]) {
        let mut dead = self.dead.lock();
        if dead.bytes + prefix.len() <= DEAD_BYTES_MAX && dead.prefixes.insert(prefix.to_vec()) {
            dead.bytes += prefix.len();
        }
    }

    /// Begins one pass over entries in key order. `complete`: the pass sees every version of every
    /// key that it sees.
    pub(crate) fn pass(self: &Arc<Self>, complete: bool) -> Pass {
        Pass {
            state: self.state(),
            filter: self.clone(),
            complete,
            prefix: Vec::new(),
            threshold: 0,
            met: Met::Nothing,
        }
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filter").field("state", &self.state()).finish_non_exhaustive()
    }
}

/// What to do with an entry.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) enum Verdict {
    Keep,
    Drop,
}

/// One walk over entries in key order: the decision, free of any engine.
pub(crate) struct Pass {
    state: Arc<FilterState>,
    filter: Arc<Filter>,
    complete: bool,
    /// The data prefix of the key whose versions are being met.
    prefix: Vec<u8>,
    threshold: u64,
    met: Met,
}

/// What the pass has met of the current key.
#[derive(Copy, Clone, Eq, PartialEq)]
enum Met {
    /// No version at or below the threshold yet.
    Nothing,
    /// The newest one at or below it: kept, or dropped with all that follow.
    Newest,
    /// The key is outside the arc.
    Foreign,
}

impl Pass {
    /// Judges the next entry.
    pub(crate) fn judge(&mut self, entry_key: &[u8], stored: &[u8]) -> Verdict {
        let verdict = self.decide(entry_key, stored);
        if verdict == Verdict::Drop {
            self.filter.dropped.fetch_add(1, Ordering::Relaxed);
        }
        verdict
    }

    fn decide(&mut self, entry_key: &[u8], stored: &[u8]) -> Verdict {
        if self.state.paused {
            return Verdict::Keep;
        }
        let Some((prefix, version)) = key::split_data(entry_key) else {
            return Verdict::Keep;
        };
        if self.prefix != prefix {
            self.begin_key(prefix);
        }
        if self.met == Met::Foreign {
            return Verdict::Drop;
        }
        if version > self.threshold {
            return Verdict::Keep;
        }
        if self.met == Met::Newest {
            return Verdict::Drop;
        }
        // What cannot be read is kept, and hides nothing: the reader that meets it reports the
        // damage.
        let Ok((tombstone, expires_at)) = value::decode_header(stored) else {
            return Verdict::Keep;
        };
        self.met = Met::Newest;
        if !value::is_absent_at(tombstone, expires_at, self.threshold) {
            return Verdict::Keep;
        }
        if self.complete {
            return Verdict::Drop;
        }
        self.filter.note_dead(&self.prefix);
        Verdict::Keep
    }

    fn begin_key(&mut self, prefix: &[u8]) {
        self.prefix.clear();
        self.prefix.extend_from_slice(prefix);
        self.met = Met::Nothing;
        self.threshold = 0;
        let Some((keyspace, user_key)) = key::decode_prefix(prefix) else {
            return;
        };
        self.threshold = self.state.threshold(keyspace);
        if self.state.arc.as_ref().is_some_and(|inside| !inside(keyspace, &user_key)) {
            self.met = Met::Foreign;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A store as a stack of sorted runs, compacted in any combination: the least that an engine
    /// promises.
    type Run = BTreeMap<Vec<u8>, Vec<u8>>;

    #[derive(Clone, Debug)]
    enum Step {
        Put {
            key: u8,
            expires_in: u64,
        },
        Delete {
            key: u8,
        },
        /// Makes all that was written since the last one a run.
        Flush,
        /// Merges the runs whose bits are set; raises the threshold to this much below the clock
        /// before.
        Compact {
            runs: u16,
            history: u64,
        },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0u8..3, 0u64..6).prop_map(|(key, expires_in)| Step::Put { key, expires_in }),
            2 => (0u8..3).prop_map(|key| Step::Delete { key }),
            2 => Just(Step::Flush),
            3 => (any::<u16>(), 0u64..6)
                .prop_map(|(runs, history)| Step::Compact { runs, history }),
        ];
        prop::collection::vec(step, 1..60)
    }

    fn read_at(runs: &[&Run], user_key: u8, version: u64) -> Option<Vec<u8>> {
        let prefix = key::data_prefix(1, &[user_key]);
        let range = key::data_at(&prefix, version)..key::data_prefix_end(&prefix);
        let newest = runs.iter().filter_map(|run| run.range(range.clone()).next()).min()?;
        let stored = value::Value::decode(&newest.1.clone().into()).expect("written by this test");
        (!stored.is_absent_at(version)).then(|| stored.bytes.to_vec())
    }

    /// Runs the steps; an error names the read that changed. `lie`: passes claim to be complete
    /// when they are not.
    fn run(steps: &[Step], lie: bool) -> Result<(), String> {
        let filter = Arc::new(Filter::default());
        let (mut everything, mut memtable, mut runs) = (Run::new(), Run::new(), Vec::<Run>::new());
        let (mut clock, mut flushed_clock, mut threshold) = (10, 0, 0);
        for step in steps {
            match step {
                Step::Put { key, expires_in } => {
                    clock += 1;
                    let expires_at = if *expires_in == 0 { 0 } else { clock + expires_in };
                    let stored = value::encode(false, expires_at, &[clock as u8]).to_vec();
                    memtable.insert(key::data(1, &[*key], clock).to_vec(), stored.clone());
                    everything.insert(key::data(1, &[*key], clock).to_vec(), stored);
                }
                Step::Delete { key } => {
                    clock += 1;
                    let stored = value::encode(true, 0, b"").to_vec();
                    memtable.insert(key::data(1, &[*key], clock).to_vec(), stored.clone());
                    everything.insert(key::data(1, &[*key], clock).to_vec(), stored);
                }
                Step::Flush => {
                    runs.push(std::mem::take(&mut memtable));
                    flushed_clock = clock;
                }
                Step::Compact { runs: chosen, history } => {
                    threshold = threshold.max(flushed_clock.saturating_sub(*history));
                    filter.set(FilterState {
                        clock: flushed_clock,
                        threshold,
                        ..FilterState::default()
                    });
                    let mut merged = Run::new();
                    let (mut index, before) = (0, runs.len());
                    runs.retain(|run| {
                        index += 1;
                        let take = chosen & (1 << (index % 16)) != 0;
                        if take {
                            merged.extend(run.clone());
                        }
                        !take
                    });
                    let complete = runs.is_empty() && before > 0;
                    let mut pass = filter.pass(complete || lie);
                    merged.retain(|key, stored| pass.judge(key, stored) == Verdict::Keep);
                    runs.push(merged);
                }
            }
            let mut seen: Vec<&Run> = runs.iter().collect();
            seen.push(&memtable);
            for version in threshold..=clock + 6 {
                for key in 0..3 {
                    let (got, wanted) =
                        (read_at(&seen, key, version), read_at(&[&everything], key, version));
                    if got != wanted {
                        return Err(format!("key {key} at {version}: {got:?}, was {wanted:?}"));
                    }
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn no_compaction_changes_a_read(steps in steps()) {
            prop_assert_eq!(run(&steps, false), Ok(()));
        }
    }

    #[test]
    fn the_model_sees_a_resurrection() {
        let steps = [
            Step::Put { key: 0, expires_in: 0 },
            Step::Flush,
            Step::Delete { key: 0 },
            Step::Flush,
            Step::Compact { runs: 1 << 2, history: 0 },
        ];
        assert_eq!(run(&steps, false), Ok(()));
        assert!(
            run(&steps, true).is_err(),
            "a partial pass that drops a delete marker must be noticed"
        );
    }

    fn judge(filter: &Arc<Filter>, complete: bool, entries: &[(u8, u64, bool)]) -> Vec<Verdict> {
        let mut pass = filter.pass(complete);
        entries
            .iter()
            .map(|&(key, version, tombstone)| {
                pass.judge(&key::data(1, &[key], version), &value::encode(tombstone, 0, b""))
            })
            .collect()
    }

    #[test]
    fn the_clock_holds_the_threshold_down() {
        let mut state = FilterState { clock: 50, threshold: 90, ..FilterState::default() };
        assert_eq!(state.threshold(1), 50);
        state.clock = 100;
        assert_eq!(state.threshold(1), 90);
        state.thresholds.insert(1, 95);
        assert_eq!((state.threshold(1), state.threshold(2)), (95, 90));
    }

    #[test]
    fn of_two_flushes_that_overlap_the_newer_one_stays() {
        let filter = Filter::default();
        let state = |clock, index, threshold| FilterState {
            clock,
            index,
            threshold,
            ..FilterState::default()
        };
        let then = |clock, index, threshold| {
            filter.set(state(clock, index, threshold));
            filter.state().threshold
        };
        assert_eq!(then(50, 7, 20), 20);
        assert_eq!(then(50, 6, 10), 20, "an older flush of the same clock ended later");
        assert_eq!(then(49, 5, 9), 20);
        assert_eq!(then(50, 8, 30), 30);
        assert_eq!(then(51, 9, 40), 40);
    }

    #[test]
    fn verdicts_by_rule() {
        use Verdict::{Drop, Keep};
        let filter = Arc::new(Filter::default());
        let entries = [(1, 9, false), (1, 5, true), (1, 4, false), (2, 3, false), (2, 2, false)];
        assert_eq!(judge(&filter, true, &entries), [Keep; 5], "a fresh filter drops nothing");

        let mut state = FilterState { clock: 9, threshold: 6, ..FilterState::default() };
        filter.set(state.clone());
        assert_eq!(judge(&filter, false, &entries), [Keep, Keep, Drop, Keep, Drop]);
        assert_eq!(filter.take_dead(9), [key::data_prefix(1, &[1])]);
        assert_eq!(judge(&filter, true, &entries), [Keep, Drop, Drop, Keep, Drop]);
        assert_eq!(filter.dead_keys(), 0);

        state.arc = Some(Arc::new(|_, key| key != [1]));
        filter.set(state.clone());
        assert_eq!(judge(&filter, false, &entries), [Drop, Drop, Drop, Keep, Drop]);

        filter.hold(true);
        filter.set(state.clone());
        assert_eq!(judge(&filter, true, &entries), [Keep; 5], "one that is held drops nothing");
        assert!(filter.state().paused, "whoever asks is told what passes go by");
        filter.hold(false);
        assert!(!filter.state().paused);
        assert_eq!(judge(&filter, false, &entries), [Drop, Drop, Drop, Keep, Drop]);

        state.paused = true;
        filter.set(state);
        assert_eq!(judge(&filter, true, &entries), [Keep; 5], "a paused filter drops nothing");
    }

    #[test]
    fn what_is_not_data_or_not_readable_stays() {
        let filter = Arc::new(Filter::default());
        filter.set(FilterState { clock: 9, threshold: 9, ..FilterState::default() });
        let mut pass = filter.pass(true);
        assert_eq!(pass.judge(&key::mark(1), b""), Verdict::Keep);
        assert_eq!(pass.judge(&key::data(1, b"k", 8), b"damaged"), Verdict::Keep);
        assert_eq!(
            pass.judge(&key::data(1, b"k", 7), &value::encode(false, 0, b"v")),
            Verdict::Keep
        );
    }

    #[test]
    fn noted_dead_keys_are_bounded() {
        let filter = Filter::default();
        for number in 0..(DEAD_BYTES_MAX as u32 / 1000 + 50) {
            let mut prefix = vec![0; 1000];
            prefix[..4].copy_from_slice(&number.to_be_bytes());
            filter.note_dead(&prefix);
        }
        assert_eq!(filter.dead_keys(), DEAD_BYTES_MAX / 1000);
        let taken = filter.take_dead(usize::MAX);
        assert_eq!((taken.len(), filter.dead.lock().bytes), (DEAD_BYTES_MAX / 1000, 0));
    }
}

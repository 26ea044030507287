//! What compaction and sweep may drop, on every engine, against the model that forgets nothing.

use std::ops::Range;
use std::sync::Arc;

use coracle_storage::state::{ArcFilter, FilterState, KeyRange, ReplicaState, key};
use proptest::prelude::*;

use crate::state_model::{Model, Write, add, puts, scan, writes};
use crate::state_rig::{ALL, Kind, Rig, dump};

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<Write>),
    Flush,
    /// Raises the threshold to this much below the flushed clock, and holds a pin there or not.
    Forget {
        history: u64,
        pin: bool,
    },
    CompactAll,
    /// From a version of the hot key on, or up to it, so that its versions are parted.
    CompactPart {
        version: u64,
        newer: bool,
    },
    Sweep,
    Crash,
}

fn filter_steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => writes(12).prop_map(Step::Write),
        3 => Just(Step::Flush),
        3 => (0u64..12, prop::bool::weighted(0.2))
            .prop_map(|(history, pin)| Step::Forget { history, pin }),
        1 => Just(Step::CompactAll),
        4 => (0u64..60, any::<bool>())
            .prop_map(|(version, newer)| Step::CompactPart { version, newer }),
        2 => Just(Step::Sweep),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..30)
}

/// A state beside the model, and what of both is flushed.
struct Run {
    rig: Rig,
    state: Option<ReplicaState>,
    model: Model,
    clock: u64,
    flushed: (Model, u64),
    filter: FilterState,
}

impl Run {
    fn new(kind: Kind) -> Run {
        let rig = Rig::new(kind);
        let state = Some(rig.state("1"));
        let flushed = (Model::default(), 1);
        Run {
            rig,
            state,
            model: Model::default(),
            clock: 1,
            flushed,
            filter: FilterState::default(),
        }
    }

    fn state(&self) -> &ReplicaState {
        self.state.as_ref().expect("open between two steps")
    }

    fn flush(&mut self) {
        self.state().flush().expect("a flush");
        self.flushed = (self.model.clone(), self.clock);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write(writes) => {
                let mut overlay = self.state().overlay();
                add(&mut overlay, &mut self.model, &mut self.clock, writes);
                self.state().write(overlay.into_batch()).expect("a write");
            }
            Step::Flush => self.flush(),
            Step::Forget { history, pin } => {
                let pinned = self.filter.threshold(0);
                self.filter.clock = self.flushed.1;
                let wanted = self.flushed.1.saturating_sub(*history).max(pinned);
                if !*pin {
                    self.filter.threshold = self.filter.threshold.max(wanted);
                }
                self.filter.thresholds.insert(0, self.filter.threshold);
                self.state().filter().set(self.filter.clone());
            }
            Step::CompactAll => self.compact(None),
            Step::CompactPart { version, newer } => {
                let data = key::Kind::Data.range();
                let at = key::data(0, b"hot", *version).to_vec();
                self.compact(Some(if *newer { data.start..at } else { at..data.end }));
            }
            Step::Sweep => {
                self.state().sweep(usize::MAX).expect("a sweep");
            }
            Step::Crash => {
                self.state = None;
                self.state = Some(self.rig.state("1"));
                (self.model, self.clock) = self.flushed.clone();
                self.state().filter().set(self.filter.clone());
            }
        }
    }

    fn compact(&mut self, range: Option<Range<Vec<u8>>>) {
        self.flush();
        self.state().compact(range).expect("a compaction");
    }

    /// Nothing that compaction or sweep does changes a read at or above the threshold.
    fn check(&self, after: &Step) {
        let reader = self.state().reader().expect("a reader");
        let threshold = self.filter.threshold(0);
        for version in [threshold, threshold + 3, self.clock, self.clock + 9] {
            for keyspace in 0..2 {
                let wanted = self.model.scan(keyspace, &KeyRange::all(), false, version);
                let got = scan(&reader, keyspace, &KeyRange::all(), false, version);
                assert_eq!(got, wanted, "{after:?}, at {version}");
            }
        }
    }
}

fn run_filter(kind: Kind, steps: &[Step]) {
    let mut run = Run::new(kind);
    for step in steps {
        run.step(step);
        run.check(step);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(40) })]
    #[test]
    fn rocks_compactions_change_no_read(steps in filter_steps()) {
        run_filter(Kind::RocksOnDisk, &steps);
        run_filter(Kind::RocksInMemory, &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn map_compactions_change_no_read(steps in filter_steps()) {
        run_filter(Kind::Map, &steps);
    }
}

fn data_entries(state: &ReplicaState) -> Vec<(Vec<u8>, u64)> {
    let entries = dump(&**state.engine());
    let data = entries.iter().filter_map(|(physical, _)| match key::Key::decode(physical)? {
        key::Key::Data { key, version, .. } => Some((key, version)),
        _ => None,
    });
    data.collect()
}

#[test]
fn compaction_reclaims_and_a_partial_one_resurrects_nothing() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let state = rig.state("1");
        puts(&state, &[("dead", 1, Some("old")), ("live", 2, Some("old"))]);
        puts(&state, &[("dead", 3, None), ("live", 4, Some("new"))]);
        state.filter().set(FilterState { clock: 9, threshold: 9, ..FilterState::default() });
        // Only the delete marker is in the range: its older put is not, and must stay hidden.
        let marker = key::data(1, b"dead", 3).to_vec();
        state.compact(Some(marker.clone()..[&marker[..], &[0]].concat())).expect("a compaction");
        assert_eq!(
            state.get_at(1, b"dead", 9).expect("a read").map(|found| found.tombstone),
            Some(true),
            "{kind:?}"
        );
        state.compact(None).expect("a compaction");
        state.sweep(100).expect("a sweep");
        assert_eq!(
            data_entries(&state),
            [(b"live".to_vec(), 4)],
            "{kind:?}: all that is dead is reclaimed"
        );
        assert!(state.filter().dropped() >= 3, "{kind:?}");
    }
}

#[test]
fn a_sweep_removes_a_dead_key_whole_and_leaves_newer_versions() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let state = rig.state("1");
        puts(
            &state,
            &[("k", 1, Some("a")), ("k", 2, Some("b")), ("k", 3, None), ("k", 7, Some("new"))],
        );
        state.filter().set(FilterState { clock: 9, threshold: 5, ..FilterState::default() });
        let from = key::data(1, b"k", u64::MAX).to_vec();
        // A range is never complete: the marker is noted, not dropped.
        state.compact(Some(from.clone()..key::Kind::Data.range().end)).expect("a compaction");
        assert_eq!(data_entries(&state), [(b"k".to_vec(), 7), (b"k".to_vec(), 3)], "{kind:?}");
        assert_eq!(state.filter().dead_keys(), 1, "{kind:?}");
        assert_eq!(state.sweep(100).expect("a sweep"), 1, "{kind:?}");
        assert_eq!(data_entries(&state), [(b"k".to_vec(), 7)], "{kind:?}");
        assert_eq!(state.sweep(100).expect("a sweep of nothing"), 0);
    }
}

#[test]
fn foreign_keys_are_gone_after_a_compaction_and_never_counted() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let state = rig.state("1");
        let keys: Vec<String> = (0..200).map(|number| format!("{number:03}")).collect();
        for chunk in keys.chunks(50) {
            let chunk: Vec<_> = chunk.iter().map(|key| (&key[..], 5, Some("v"))).collect();
            puts(&state, &chunk);
        }
        let inside: ArcFilter = Arc::new(|_, key| key < &b"100"[..]);
        let hash = |arc| state.reader().expect("a reader").state_hash(arc, 9).expect("a hash");
        let (with_foreign, without) = (hash(None), hash(Some(&inside)));
        assert_ne!(with_foreign, without);
        state.filter().set(FilterState {
            clock: 5,
            arc: Some(inside.clone()),
            ..FilterState::default()
        });
        state.compact(None).expect("a compaction");
        assert_eq!(data_entries(&state).len(), 100, "{kind:?}");
        assert_eq!(hash(None), without, "{kind:?}: the hash does not see what was compacted");
        assert_eq!(hash(Some(&inside)), without, "{kind:?}");
    }
}

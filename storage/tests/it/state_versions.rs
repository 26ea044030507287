//! Reads at versions, scans, overlays, the filter on real engines: each against a model that forgets nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_storage::Error;
use coracle_storage::state::{
    ArcFilter, Batch, FilterState, Found, KeyRange, MetaName, OpenState, Overlay, Reader,
    ReplicaState, Versioned, key,
};
use proptest::prelude::*;

use crate::state_rig::{ALL, Kind, Rig, dump};

/// Every version ever written: value and expiry, or a delete marker.
#[derive(Clone, Default)]
struct Model(BTreeMap<(u32, Vec<u8>), BTreeMap<u64, Option<(Vec<u8>, u64)>>>);

impl Model {
    fn at(&self, keyspace: u32, user_key: &[u8], version: u64) -> Option<Versioned> {
        let versions = self.0.get(&(keyspace, user_key.to_vec()))?;
        let (version, stored) = versions.range(..=version).next_back()?;
        let (value, expires_at_version) = stored.clone().unwrap_or_default();
        let (version, tombstone) = (*version, stored.is_none());
        Some(Versioned {
            version,
            value: value.into(),
            expires_at_version,
            tombstone,
        })
    }

    fn visible(&self, keyspace: u32, user_key: &[u8], version: u64) -> Option<Versioned> {
        self.at(keyspace, user_key, version)
            .filter(|found| !found.is_absent_at(version))
    }

    fn scan(&self, keyspace: u32, range: &KeyRange, reverse: bool, version: u64) -> Vec<Found> {
        let inside = |user_key: &Vec<u8>| {
            *user_key >= range.start && range.end.as_ref().is_none_or(|end| user_key < end)
        };
        let keys = self
            .0
            .keys()
            .filter(|(of, user_key)| *of == keyspace && inside(user_key));
        let mut found: Vec<Found> = keys
            .filter_map(|(_, user_key)| {
                let found = self.visible(keyspace, user_key, version)?;
                Some(Found {
                    key: user_key.clone().into(),
                    version: found.version,
                    value: found.value,
                    expires_at_version: found.expires_at_version,
                })
            })
            .collect();
        if reverse {
            found.reverse();
        }
        found
    }
}

#[derive(Clone, Debug)]
struct Write {
    keyspace: u32,
    key: Vec<u8>,
    /// `None`: a delete marker.
    expires_in: Option<u64>,
}

fn user_key() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xff)], 0..3)
}

fn writes(max: usize) -> impl Strategy<Value = Vec<Write>> {
    let key = prop_oneof![user_key(), Just(b"hot".to_vec())];
    let expires_in =
        prop_oneof![3 => Just(Some(0)), 1 => (1u64..9).prop_map(Some), 2 => Just(None)];
    let write = (0u32..2, key, expires_in).prop_map(|(keyspace, key, expires_in)| Write {
        keyspace,
        key,
        expires_in,
    });
    prop::collection::vec(write, 0..max)
}

/// One version for each write, as apply gives them.
fn add(overlay: &mut Overlay, model: &mut Model, clock: &mut u64, writes: &[Write]) {
    for write in writes {
        *clock += 1;
        let versions = model
            .0
            .entry((write.keyspace, write.key.clone()))
            .or_default();
        match write.expires_in {
            Some(expires_in) => {
                let value = clock.to_be_bytes().to_vec();
                let expires_at = if expires_in == 0 {
                    0
                } else {
                    *clock + expires_in
                };
                overlay.put(write.keyspace, &write.key, *clock, &value, expires_at);
                versions.insert(*clock, Some((value, expires_at)));
            }
            None => {
                overlay.delete(write.keyspace, &write.key, *clock);
                versions.insert(*clock, None);
            }
        }
    }
}

fn scan(
    reader: &Reader<'_>,
    keyspace: u32,
    range: &KeyRange,
    reverse: bool,
    version: u64,
) -> Vec<Found> {
    let scan = reader
        .scan(keyspace, range.clone(), reverse, version)
        .expect("a scan");
    scan.collect::<Result<_, _>>().expect("entries that read")
}

fn check_reader(
    reader: &Reader<'_>,
    model: &Model,
    range: &KeyRange,
    versions: impl Iterator<Item = u64>,
) {
    for version in versions {
        for (keyspace, user_key) in model.0.keys() {
            let got = reader.get_at(*keyspace, user_key, version).expect("a read");
            assert_eq!(
                got,
                model.at(*keyspace, user_key, version),
                "{user_key:?} at {version}"
            );
        }
        for keyspace in 0..3 {
            for reverse in [false, true] {
                for range in [range, &KeyRange::all()] {
                    let got = scan(reader, keyspace, range, reverse, version);
                    let wanted = model.scan(keyspace, range, reverse, version);
                    assert_eq!(got, wanted, "{range:?} at {version}, reverse: {reverse}");
                }
            }
        }
    }
}

fn run_reads(kind: Kind, stored: &[Write], pending: &[Write], range: &KeyRange) {
    let rig = Rig::new(kind);
    let state = rig.state("1");
    let (mut model, mut clock) = (Model::default(), 0);
    for (part, writes) in stored.chunks(20).enumerate() {
        let mut overlay = state.overlay();
        add(&mut overlay, &mut model, &mut clock, writes);
        state.write(overlay.into_batch()).expect("a write");
        if part % 2 == 0 {
            state.flush().expect("a flush");
        }
    }
    let every = (clock / 6).max(1) as usize;
    check_reader(
        &state.reader().expect("a reader"),
        &model,
        range,
        (0..=clock + 2).step_by(every),
    );

    // What the overlay shows before the batch is written is what the store shows after.
    let before = model.clone();
    let mut overlay = state.overlay();
    overlay.put_meta(MetaName::CLOCK, clock.to_be_bytes().to_vec());
    for client in 0..3 {
        overlay.put_raw(key::mark(client), b"mark".to_vec());
    }
    overlay.delete_raw(key::mark(1));
    add(&mut overlay, &mut model, &mut clock, pending);
    check_reader(
        &overlay.reader().expect("a reader"),
        &model,
        range,
        [clock / 2, clock, clock + 4].into_iter(),
    );
    for (keyspace, user_key) in model.0.keys() {
        let newest = overlay.get_newest(*keyspace, user_key).expect("a read");
        assert_eq!(newest, model.at(*keyspace, user_key, u64::MAX));
        assert_eq!(
            state.get_at(*keyspace, user_key, u64::MAX).expect("a read"),
            before.at(*keyspace, user_key, u64::MAX)
        );
    }
    let everything = overlay
        .range(vec![0]..vec![0xff], usize::MAX)
        .expect("a range");
    let first_two = overlay.range(vec![0]..vec![0xff], 2).expect("a range");
    assert_eq!(first_two, everything[..2]);
    state.write(overlay.into_batch()).expect("a write");
    let everything: Vec<_> = everything
        .iter()
        .map(|(key, value)| (key.to_vec(), value.to_vec()))
        .collect();
    assert_eq!(dump(&**state.engine()), everything);
    check_reader(
        &state.reader().expect("a reader"),
        &model,
        range,
        std::iter::once(clock),
    );
}

fn key_range() -> impl Strategy<Value = KeyRange> {
    (user_key(), prop::option::of(user_key())).prop_map(|(start, end)| KeyRange { start, end })
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(12) })]
    #[test]
    fn rocks_reads_what_was_written(stored in writes(150), pending in writes(30), range in key_range()) {
        run_reads(Kind::RocksOnDisk, &stored, &pending, &range);
        run_reads(Kind::RocksInMemory, &stored, &pending, &range);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn map_reads_what_was_written(stored in writes(150), pending in writes(30), range in key_range()) {
        run_reads(Kind::Map, &stored, &pending, &range);
    }
}

/// Pending removals hide what is stored, in both directions and under seeks.
#[test]
fn an_overlay_hides_what_it_removed() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let state = rig.state("1");
        let mut overlay = state.overlay();
        for version in 1..=20 {
            overlay.put(1, b"a", version, b"v", 0);
            overlay.put(1, b"c", version, b"v", 0);
        }
        state.write(overlay.into_batch()).expect("a write");
        let mut overlay = state.overlay();
        for version in 15..=20 {
            overlay.delete_raw(key::data(1, b"a", version));
        }
        overlay.put(1, b"b", 21, b"v", 0);
        assert_eq!(
            overlay
                .get_newest(1, b"a")
                .expect("a read")
                .map(|found| found.version),
            Some(14),
            "{kind:?}"
        );
        assert_eq!(
            overlay
                .get_at(1, b"a", 17)
                .expect("a read")
                .map(|found| found.version),
            Some(14),
            "{kind:?}"
        );
        for reverse in [false, true] {
            let reader = overlay.reader().expect("a reader");
            let mut found = scan(&reader, 1, &KeyRange::all(), reverse, 30);
            if reverse {
                found.reverse();
            }
            let found: Vec<_> = found
                .iter()
                .map(|found| (&found.key[..], found.version))
                .collect();
            assert_eq!(
                found,
                [(&b"a"[..], 14), (b"b", 21), (b"c", 20)],
                "{kind:?}, reverse: {reverse}"
            );
        }
    }
}

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
        3 => (0u64..12, prop::bool::weighted(0.2)).prop_map(|(history, pin)| Step::Forget { history, pin }),
        1 => Just(Step::CompactAll),
        4 => (0u64..60, any::<bool>())
            .prop_map(|(version, newer)| Step::CompactPart { version, newer }),
        2 => Just(Step::Sweep),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..30)
}

/// Nothing that compaction or sweep does changes a read at or above the threshold.
fn run_filter(kind: Kind, steps: &[Step]) -> u64 {
    let rig = Rig::new(kind);
    let mut state = rig.state("1");
    let (mut model, mut clock) = (Model::default(), 1);
    let (mut flushed, mut threshold) = ((model.clone(), clock), 0);
    let mut filter = FilterState::default();
    let mut dropped = 0;
    for step in steps {
        match step {
            Step::Write(writes) => {
                let mut overlay = state.overlay();
                add(&mut overlay, &mut model, &mut clock, writes);
                state.write(overlay.into_batch()).expect("a write");
            }
            Step::Flush => {
                state.flush().expect("a flush");
                flushed = (model.clone(), clock);
            }
            Step::Forget { history, pin } => {
                let wanted = flushed.1.saturating_sub(*history).max(filter.threshold);
                filter.clock = flushed.1;
                filter.pins = if *pin {
                    vec![filter.threshold(0)]
                } else {
                    vec![]
                };
                filter.threshold = wanted;
                state.filter().set(filter.clone());
                threshold = filter.threshold(0);
            }
            Step::CompactAll | Step::CompactPart { .. } => {
                let data = key::Kind::Data.range();
                let at = |version| key::data(0, b"hot", version).to_vec();
                let range = match step {
                    Step::CompactPart {
                        version,
                        newer: true,
                    } => Some(data.start..at(*version)),
                    Step::CompactPart {
                        version,
                        newer: false,
                    } => Some(at(*version)..data.end),
                    _ => None,
                };
                state.flush().expect("a flush");
                flushed = (model.clone(), clock);
                state.compact(range).expect("a compaction");
            }
            Step::Sweep => {
                state.sweep(usize::MAX).expect("a sweep");
            }
            Step::Crash => {
                dropped += state.filter().dropped();
                drop(state);
                state = rig.state("1");
                (model, clock) = flushed.clone();
                state.filter().set(filter.clone());
            }
        }
        let reader = state.reader().expect("a reader");
        for version in [threshold, threshold + 3, clock, clock + 9] {
            for keyspace in 0..2 {
                let wanted = model.scan(keyspace, &KeyRange::all(), false, version);
                assert_eq!(
                    scan(&reader, keyspace, &KeyRange::all(), false, version),
                    wanted,
                    "{step:?}, at {version}"
                );
            }
        }
    }
    dropped + state.filter().dropped()
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

fn puts(state: &ReplicaState, puts: &[(&str, u64, Option<&str>)]) {
    let mut overlay = state.overlay();
    for (user_key, version, value) in puts {
        match value {
            Some(value) => overlay.put(1, user_key.as_bytes(), *version, value.as_bytes(), 0),
            None => overlay.delete(1, user_key.as_bytes(), *version),
        }
    }
    state.write(overlay.into_batch()).expect("a write");
    state.flush().expect("a flush");
}

fn data_entries(state: &ReplicaState) -> Vec<(Vec<u8>, u64)> {
    let entries = dump(&**state.engine());
    let data = entries
        .iter()
        .filter_map(|(physical, _)| match key::Key::decode(physical)? {
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
        puts(
            &state,
            &[("dead", 1, Some("old")), ("live", 2, Some("old"))],
        );
        puts(&state, &[("dead", 3, None), ("live", 4, Some("new"))]);
        state.filter().set(FilterState {
            clock: 9,
            threshold: 9,
            ..FilterState::default()
        });
        // Only the delete marker is in the range: its older put is not, and must stay hidden.
        let marker = key::data(1, b"dead", 3).to_vec();
        state
            .compact(Some(marker.clone()..[&marker[..], &[0]].concat()))
            .expect("a compaction");
        assert_eq!(
            state
                .get_at(1, b"dead", 9)
                .expect("a read")
                .map(|found| found.tombstone),
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
            &[
                ("k", 1, Some("a")),
                ("k", 2, Some("b")),
                ("k", 3, None),
                ("k", 7, Some("new")),
            ],
        );
        state.filter().set(FilterState {
            clock: 9,
            threshold: 5,
            ..FilterState::default()
        });
        let from = key::data(1, b"k", u64::MAX).to_vec();
        // A range is never complete: the marker is noted, not dropped.
        state
            .compact(Some(from.clone()..key::Kind::Data.range().end))
            .expect("a compaction");
        assert_eq!(
            data_entries(&state),
            [(b"k".to_vec(), 7), (b"k".to_vec(), 3)],
            "{kind:?}"
        );
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
        let hash = |arc| {
            state
                .reader()
                .expect("a reader")
                .state_hash(arc, 9)
                .expect("a hash")
        };
        let (with_foreign, without) = (hash(None), hash(Some(&inside)));
        assert_ne!(with_foreign, without);
        state.filter().set(FilterState {
            clock: 5,
            arc: Some(inside.clone()),
            ..FilterState::default()
        });
        state.compact(None).expect("a compaction");
        assert_eq!(data_entries(&state).len(), 100, "{kind:?}");
        assert_eq!(
            hash(None),
            without,
            "{kind:?}: the hash does not see what was compacted"
        );
        assert_eq!(hash(Some(&inside)), without, "{kind:?}");
    }
}

#[test]
fn equal_state_hashes_equal_on_every_engine() {
    let hashes = ALL.map(|kind| {
        let rig = Rig::new(kind);
        let state = rig.state("1");
        puts(
            &state,
            &[("a", 1, Some("x")), ("b", 2, Some("y")), ("b", 3, None)],
        );
        let mut batch = Batch::new();
        batch.put(key::result(1, 2, 3), &b"result"[..]);
        batch.put(key::mark(1), &b"mark"[..]);
        state.write(batch).expect("a write");
        let hash = |version| {
            state
                .reader()
                .expect("a reader")
                .state_hash(None, version)
                .expect("a hash")
        };
        assert_ne!(hash(2), hash(3), "{kind:?}: the delete is seen");
        let before = hash(3);
        state.filter().set(FilterState {
            clock: 3,
            threshold: 3,
            ..FilterState::default()
        });
        state.flush().expect("a flush");
        state.compact(None).expect("a compaction");
        assert_eq!(hash(3), before, "{kind:?}: compaction is not seen");
        before
    });
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
    // Fixed: replicas of different releases compare these.
    assert_eq!(hashes[0], 0x2830_4b9a_e42f_ab23);
}

#[test]
fn the_applied_record_is_the_durable_one() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let state = rig.state("1");
        let apply = |applied: &str| {
            let mut overlay = state.overlay();
            overlay.put_meta(MetaName::APPLIED, applied.as_bytes().to_vec());
            state.write(overlay.into_batch()).expect("a write");
        };
        assert_eq!(state.applied_bytes(), None, "{kind:?}");
        apply("1");
        assert_eq!(state.applied_bytes(), None, "{kind:?}: not flushed");
        assert_eq!(
            state.flush().expect("a flush").as_deref(),
            Some(&b"1"[..]),
            "{kind:?}"
        );
        apply("2");
        assert_eq!(
            state.applied_bytes().as_deref(),
            Some(&b"1"[..]),
            "{kind:?}"
        );
        assert_eq!(
            state.meta(MetaName::APPLIED).expect("a read").as_deref(),
            Some(&b"2"[..]),
            "{kind:?}"
        );
        drop(state);
        let state = rig.state("1");
        assert_eq!(
            state.applied_bytes().as_deref(),
            Some(&b"1"[..]),
            "{kind:?}: as after a crash"
        );
    }
}

#[test]
fn an_unknown_format_is_refused() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let open = || ReplicaState::open(&*rig.engines, &rig.dir("1"), OpenState { create: true });
        let write = |value: Option<&[u8]>| {
            let state = rig.open("1");
            let mut batch = Batch::new();
            batch.put(key::mark(1), &b"mark"[..]);
            match value {
                Some(value) => batch.put(key::meta(MetaName::FORMAT), value.to_vec()),
                None => batch.delete(key::meta(MetaName::FORMAT)),
            }
            state.write(batch).expect("a write");
            state.flush().expect("a flush");
        };
        write(Some(&[0, 0, 0, 2]));
        assert!(
            matches!(
                open(),
                Err(Error::Format {
                    found: 2,
                    known: 1,
                    ..
                })
            ),
            "{kind:?}"
        );
        write(Some(b"x"));
        assert!(matches!(open(), Err(Error::Corruption { .. })), "{kind:?}");
        write(None);
        assert!(
            matches!(open(), Err(Error::Corruption { .. })),
            "{kind:?}: records of no format"
        );
        write(Some(&[0, 0, 0, 1]));
        assert!(open().is_ok(), "{kind:?}");
    }
}

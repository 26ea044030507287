//! The conformance suite of the state engines: one contract, checked against an ordered map on
//! every engine.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_storage::fs::faulty::{FaultyFs, Loss};
use coracle_storage::state::{
    Batch, BatchOp, Engine, Engines, MapEngines, OpenState, RocksEngines, StateOptions, View, key,
};
use coracle_storage::{Error, Fs, RealFs};
use proptest::prelude::*;

use crate::state_rig::{ALL, Kind, Rig, dump, flip_byte};

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<Op>),
    Flush,
    /// Drops every handle and opens again, without a flush.
    Crash,
    TakeView,
    Scan {
        range: Range<Vec<u8>>,
        reverse: bool,
        seeks: Vec<Vec<u8>>,
    },
    First {
        key: u8,
        from: u64,
    },
    Compact,
}

#[derive(Clone, Debug)]
enum Op {
    Put(Vec<u8>, u8),
    Delete(Vec<u8>),
    DeleteRange(Vec<u8>, Vec<u8>),
}

/// Few keys, so that steps meet: raw ones, and data keys, which the bloom filter knows by their
/// prefix.
fn raw_key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(1u8..5, 1..4),
        (0u8..4, 0u64..4).prop_map(|(key, version)| key::data(1, &[key], version).to_vec()),
        (0u64..4).prop_map(|client| key::mark(client).to_vec()),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let op = prop_oneof![
        6 => (raw_key(), any::<u8>()).prop_map(|(key, value)| Op::Put(key, value)),
        3 => raw_key().prop_map(Op::Delete),
        1 => (raw_key(), raw_key()).prop_map(|(from, to)| Op::DeleteRange(from, to)),
    ];
    let scan = (raw_key(), raw_key(), any::<bool>(), prop::collection::vec(raw_key(), 0..4))
        .prop_map(|(from, to, reverse, seeks)| Step::Scan { range: from..to, reverse, seeks });
    let step = prop_oneof![
        6 => prop::collection::vec(op, 0..6).prop_map(Step::Write),
        2 => Just(Step::Flush),
        1 => Just(Step::Crash),
        1 => Just(Step::TakeView),
        6 => scan,
        4 => (0u8..5, 0u64..5).prop_map(|(key, from)| Step::First { key, from }),
        1 => Just(Step::Compact),
    ];
    prop::collection::vec(step, 1..40)
}

fn batch_of(ops: &[Op]) -> Batch {
    let mut batch = Batch::new();
    for op in ops {
        match op {
            Op::Put(key, value) => batch.put(key.clone(), vec![*value]),
            Op::Delete(key) => batch.delete(key.clone()),
            Op::DeleteRange(from, to) => batch.delete_range(from.clone(), to.clone()),
        }
    }
    batch
}

fn apply(model: &mut Model, batch: &Batch) {
    for op in &batch.ops {
        match op {
            BatchOp::Put(key, value) => {
                model.insert(key.to_vec(), value.to_vec());
            }
            BatchOp::Delete(key) => {
                model.remove(&key[..]);
            }
            BatchOp::DeleteRange(from, to) => {
                model.retain(|key, _| key[..] < from[..] || key[..] >= to[..])
            }
        }
    }
}

fn in_range<'a>(model: &'a Model, range: &Range<Vec<u8>>) -> Vec<(&'a Vec<u8>, &'a Vec<u8>)> {
    model.iter().filter(|(key, _)| range.contains::<Vec<u8>>(key)).collect()
}

fn check_scan(
    view: &dyn View,
    model: &Model,
    range: &Range<Vec<u8>>,
    reverse: bool,
    seeks: &[Vec<u8>],
) {
    let mut wanted = in_range(model, range);
    if reverse {
        wanted.reverse();
    }
    let mut cursor = view.seek(range.clone(), reverse).expect("a cursor");
    for (key, value) in &wanted {
        let (got_key, got_value) = cursor.next().expect("a read").expect("an entry more");
        assert_eq!((&got_key[..], &got_value[..]), (&key[..], &value[..]));
    }
    assert_eq!(cursor.next().expect("a read"), None);
    assert_eq!(cursor.next().expect("a read"), None, "the end stays the end");
    for seek in seeks {
        cursor.seek_to(seek).expect("a seek");
        let behind = |key: &Vec<u8>| if reverse { key <= seek } else { key >= seek };
        for (key, _) in wanted.iter().filter(|(key, _)| behind(key)).take(2) {
            let (got, _) = cursor.next().expect("a read").expect("an entry behind the seek");
            assert_eq!(&got[..], &key[..], "after a seek to {seek:?}");
        }
    }
}

fn wanted_first(model: &Model, key: u8, from: u64) -> Option<Vec<u8>> {
    let prefix = key::data_prefix(1, &[key]);
    let range = key::data_at(&prefix, from)..key::data_prefix_end(&prefix);
    in_range(model, &range).first().map(|(key, _)| (*key).clone())
}

fn check_first(view: &dyn View, model: &Model, key: u8, from: u64) {
    let prefix = key::data_prefix(1, &[key]);
    let first = view.first(&key::data_at(&prefix, from), &prefix).expect("a read");
    assert_eq!(first.map(|(key, _)| key.to_vec()), wanted_first(model, key, from));
}

fn check_all(view: &dyn View, model: &Model) {
    check_scan(view, model, &(vec![]..vec![0xff]), false, &[]);
    for (key, value) in model {
        assert_eq!(view.get(key).expect("a read").as_deref(), Some(&value[..]));
    }
}

fn run(kind: Kind, steps: &[Step]) {
    let rig = Rig::new(kind);
    let mut engine = rig.open("1");
    let (mut model, mut flushed) = (Model::new(), Model::new());
    let mut view: Option<(Box<dyn View>, Model)> = None;
    for step in steps {
        match step {
            Step::Write(ops) => {
                let batch = batch_of(ops);
                apply(&mut model, &batch);
                engine.write(batch).expect("a write");
            }
            Step::Flush => {
                engine.flush().expect("a flush");
                assert_eq!(engine.unflushed_bytes(), 0);
                flushed = model.clone();
            }
            Step::Crash => {
                drop(view.take());
                drop(engine);
                engine = rig.reopen("1");
                model = flushed.clone();
                check_all(&*engine.view().expect("a view"), &model);
            }
            Step::TakeView => view = Some((engine.view().expect("a view"), model.clone())),
            Step::Scan { range, reverse, seeks } => {
                check_scan(&*engine.view().expect("a view"), &model, range, *reverse, seeks);
                if let Some((view, model)) = &view {
                    check_scan(&**view, model, range, *reverse, seeks);
                }
            }
            Step::First { key, from } => {
                check_first(&*engine.view().expect("a view"), &model, *key, *from);
                if let Some((view, model)) = &view {
                    check_first(&**view, model, *key, *from);
                }
                let prefix = key::data_prefix(1, &[*key]);
                let newest = engine.first(&key::data_at(&prefix, *from), &prefix).expect("a read");
                assert_eq!(newest.map(|(key, _)| key.to_vec()), wanted_first(&model, *key, *from));
            }
            Step::Compact => {
                engine.compact(None).expect("a compaction");
                flushed = model.clone();
            }
        }
    }
    check_all(&*engine.view().expect("a view"), &model);
    if let Some((view, model)) = &view {
        check_all(&**view, model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(24) })]
    #[test]
    fn rocks_on_disk_keeps_the_contract(steps in steps()) {
        run(Kind::RocksOnDisk, &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(24) })]
    #[test]
    fn rocks_in_memory_keeps_the_contract(steps in steps()) {
        run(Kind::RocksInMemory, &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn map_keeps_the_contract(steps in steps()) {
        run(Kind::Map, &steps);
    }
}

fn put(engine: &dyn Engine, key: &str, value: &str) {
    let mut batch = Batch::new();
    batch.put(key.as_bytes().to_vec(), value.as_bytes().to_vec());
    engine.write(batch).expect("a write");
}

#[test]
fn closing_flushes_nothing() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        put(&*engine, "a", "flushed");
        engine.flush().expect("a flush");
        put(&*engine, "b", "not flushed");
        assert!(engine.unflushed_bytes() > 0, "{kind:?}");
        drop(engine);
        let engine = rig.reopen("1");
        assert_eq!(engine.get(b"a").expect("a read").as_deref(), Some(&b"flushed"[..]), "{kind:?}");
        assert_eq!(engine.get(b"b").expect("a read"), None, "{kind:?}: closing must not flush");
    }
}

#[test]
fn a_view_outlives_its_engine_handle() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        put(&*engine, "a", "1");
        let view = engine.view().expect("a view");
        put(&*engine, "a", "2");
        drop(engine);
        assert_eq!(view.get(b"a").expect("a read").as_deref(), Some(&b"1"[..]), "{kind:?}");
    }
}

#[test]
fn a_missing_store_never_comes_up_empty() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let dir = rig.dir("1");
        let open = |create| rig.engines.open(&dir, OpenState { create });
        let is_missing = |opened: Result<Arc<dyn Engine>, Error>| match opened {
            Err(Error::Io { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
            _ => false,
        };
        assert!(is_missing(open(false)), "{kind:?}");
        let engine = open(true).expect("a new store");
        assert!(open(true).is_err(), "{kind:?}: one handle at a time");
        drop(engine);
        drop(open(true).expect("an existing store"));
        rig.engines.destroy(&dir).expect("a removal");
        rig.engines.destroy(&dir).expect("a removal of nothing");
        assert!(is_missing(open(false)), "{kind:?}: destroyed");
        assert!(!rig.fs().exists(&dir), "{kind:?}");
        let engine = open(true).expect("a new store");
        assert_eq!(dump(&*engine), [], "{kind:?}");
    }
}

#[test]
fn stores_of_one_factory_do_not_meet() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let (one, two) = (rig.open("1"), rig.open("2"));
        put(&*one, "a", "1");
        put(&*two, "a", "2");
        one.flush().expect("a flush");
        drop((one, two));
        assert_eq!(dump(&*rig.reopen("1")), [(b"a".to_vec(), b"1".to_vec())], "{kind:?}");
        assert_eq!(dump(&*rig.reopen("2")), [], "{kind:?}");
    }
}

#[test]
fn a_batch_is_larger_than_a_write_buffer_and_still_whole() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        // Write buffers of the smallest options hold 512 KiB: they are flushed in the background,
        // at some batch.
        let value = vec![7u8; 64 << 10];
        for round in 0u8..24 {
            let mut batch = Batch::new();
            for part in 0u8..3 {
                batch.put(vec![part + 1, 1], [&[round][..], &value].concat());
            }
            engine.write(batch).expect("a write");
        }
        drop(engine);
        let survived = dump(&*rig.reopen("1"));
        let rounds: Vec<u8> = survived.iter().map(|(_, value)| value[0]).collect();
        assert!(rounds.is_empty() || rounds.len() == 3, "{kind:?}: {rounds:?}");
        assert!(rounds.windows(2).all(|pair| pair[0] == pair[1]), "{kind:?}: {rounds:?}");
    }
}

#[test]
fn a_flipped_byte_in_a_table_is_corruption_with_its_file() {
    let rig = Rig::new(Kind::RocksOnDisk);
    let engine = rig.open("1");
    put(&*engine, "key", &"value".repeat(100));
    engine.flush().expect("a flush");
    drop(engine);
    let names = rig.fs().read_dir(&rig.dir("1")).expect("a listing");
    let tables: Vec<_> = names
        .iter()
        .filter(|name| name.ends_with(".sst"))
        .map(|name| rig.dir("1").join(name))
        .collect();
    assert_eq!(tables.len(), 1);
    flip_byte(&*rig.fs(), &tables[0], 10);
    let read = rig
        .engines
        .open(&rig.dir("1"), OpenState { create: false })
        .and_then(|engine| engine.get(b"key"));
    match read {
        Err(Error::Corruption { file, .. }) => assert_eq!(file, tables[0]),
        other => panic!("expected a corruption, got {other:?}"),
    }
}

/// The only file spans the range, and has no key in it: RocksDB leaves it alone, and nothing was
/// left out.
#[test]
fn a_compaction_of_a_range_without_keys_is_no_error() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        put(&*engine, "a", "1");
        put(&*engine, "z", "1");
        engine.compact(None).expect("a compaction of everything");
        engine.compact(Some(b"b".to_vec()..b"c".to_vec())).expect("a compaction of nothing");
        engine.compact(Some(b"c".to_vec()..b"b".to_vec())).expect("a compaction of no range");
        assert_eq!(dump(&*engine).len(), 2, "{kind:?}");
    }
}

/// A store that is rewritten at 64 KiB a second: whoever closes it does not wait for a minute.
#[test]
#[allow(clippy::disallowed_methods, reason = "a thread of the test's own")]
fn a_compaction_under_way_is_ended() {
    let temporary = tempfile::tempdir().expect("a temporary directory");
    let on_fatal = Arc::new(|error: &Error| panic!("background error: {error}"));
    let options = StateOptions { write_bytes_per_second: 64 << 10, ..StateOptions::test_min() };
    let quick = RocksEngines::on_disk(&StateOptions::test_min(), on_fatal.clone());
    let slow = RocksEngines::on_disk(&options, on_fatal).expect("options that fit");
    let dir = temporary.path().join("1");
    let engine = quick.expect("options that fit").open(&dir, OpenState { create: true });
    let engine = engine.expect("a new store");
    let mut batch = Batch::new();
    for number in 0..1_024_u32 {
        // Nothing that a compression finds anything in.
        let mut seed = u64::from(number) + 1;
        let byte = |_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as u8
        };
        let value: Vec<u8> = (0..4_096).map(byte).collect();
        batch.put(key::data(1, &number.to_be_bytes(), 1).to_vec(), value);
    }
    engine.write(batch).expect("a write");
    engine.flush().expect("a flush");
    drop(engine);
    let engine = slow.open(&dir, OpenState { create: false }).expect("it is there");
    let before = dump(&*engine);
    let (ended, end) = std::sync::mpsc::channel();
    let compacted = engine.clone();
    let worker = std::thread::spawn(move || {
        let _ = ended.send(compacted.compact(None));
    });
    let early = end.recv_timeout(std::time::Duration::from_millis(500));
    assert!(early.is_err(), "4 MiB at 64 KiB a second were rewritten at once: {early:?}");
    engine.end_compactions();
    let result = end.recv_timeout(std::time::Duration::from_secs(20)).expect("it ends");
    assert!(matches!(result, Err(Error::Stopped { .. })), "{result:?}");
    worker.join().expect("no panic");
    engine.health().expect("nothing has failed");
    assert_eq!(dump(&*engine), before);
}

#[test]
fn a_store_about_to_be_closed_is_not_compacted() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        put(&*engine, "a", "1");
        engine.compact(None).expect("a compaction");
        engine.end_compactions();
        engine.end_compactions();
        let refused = engine.compact(None);
        assert!(matches!(refused, Err(Error::Stopped { .. })), "{kind:?}: {refused:?}");
        put(&*engine, "b", "1");
        engine.flush().expect("only compactions end");
        engine.health().expect("nothing has failed");
    }
}

#[test]
fn a_failed_flush_stops_the_store_and_is_told_once() {
    let temporary = tempfile::tempdir().expect("a temporary directory");
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    let on_fatal = Arc::new(move |_: &Error| {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let engines =
        RocksEngines::on_disk(&StateOptions::test_min(), on_fatal).expect("options that fit");
    let dir = temporary.path().join("1");
    let engine = engines.open(&dir, OpenState { create: true }).expect("a new store");
    put(&*engine, "k", "v");
    engine.health().expect("a healthy store");
    // The directory is gone from under it: no table file can be made.
    RealFs.remove_dir_all(&dir).expect("a removal");
    assert!(matches!(engine.flush(), Err(Error::Io { .. })));
    let mut batch = Batch::new();
    batch.put(&b"k"[..], &b"v2"[..]);
    for refused in [engine.write(batch), engine.flush(), engine.health(), engine.compact(None)] {
        assert!(matches!(refused, Err(Error::Stopped { .. })), "{refused:?}");
    }
    assert_eq!(told.load(Ordering::SeqCst), 1);
}

/// Writes and flushes on a map engine until the disk crashes at its `crash_at`-th operation; what
/// opens afterwards must be what some flush wrote, and no older than the last one that was
/// acknowledged.
fn crash_map_at(crash_at: u64, loss: Loss) -> bool {
    let disk = FaultyFs::new(crash_at);
    let shards = std::path::Path::new("/shards");
    disk.create_dir_all(shards).expect("a directory");
    disk.sync_dir(std::path::Path::new("/")).expect("a sync");
    let dir = shards.join("1");
    disk.crash_at(disk.ops() + crash_at);
    let engines = MapEngines::new(Arc::new(disk.clone()));
    let mut acknowledged = None;
    if let Ok(engine) = engines.open(&dir, OpenState { create: true }) {
        for round in 0u8..4 {
            let mut batch = Batch::new();
            batch.put(&b"round"[..], vec![round]);
            engine.write(batch).expect("a write into memory");
            if engine.flush().is_err() {
                assert!(
                    matches!(engine.flush(), Err(Error::Stopped { .. })),
                    "a failed flush is not retried"
                );
                break;
            }
            acknowledged = Some(round);
        }
    }
    let crashed = disk.crashed();
    let engines = MapEngines::new(Arc::new(disk.crash(loss)));
    let found = match engines.open(&dir, OpenState { create: false }) {
        Ok(engine) => engine.get(b"round").expect("a read").map(|round| round[0]),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => panic!("crash at {crash_at}, {loss:?}: {error}"),
    };
    assert!(found >= acknowledged, "crash at {crash_at}, {loss:?}: {found:?} < {acknowledged:?}");
    crashed
}

#[test]
fn map_survives_a_crash_at_every_operation() {
    for loss in [Loss::All, Loss::Subset, Loss::Nothing] {
        let crashes = (1..).take_while(|crash_at| crash_map_at(*crash_at, loss)).count();
        assert!(crashes > 10, "the run must be long enough to crash in, not {crashes} operations");
    }
}

#[test]
fn a_flipped_bit_in_an_image_is_corruption_with_its_file() {
    let disk = FaultyFs::new(1);
    let dir = std::path::Path::new("/1");
    let engines = MapEngines::new(Arc::new(disk.clone()));
    let engine = engines.open(dir, OpenState { create: true }).expect("a new store");
    put(&*engine, "key", "value");
    engine.flush().expect("a flush");
    drop(engine);
    disk.flip_bit(&dir.join("state.image"), 30, 3);
    match engines.open(dir, OpenState { create: false }).err() {
        Some(Error::Corruption { file, .. }) => assert_eq!(file, dir.join("state.image")),
        other => panic!("expected a corruption, got {other:?}"),
    }
}

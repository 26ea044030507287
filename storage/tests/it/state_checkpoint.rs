//! Checkpoints on every engine: their content, their manifest, the way to another node, the swap
//! and its crashes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_storage::fs::faulty::{FaultyFs, Loss};
use coracle_storage::fs::{read_file, write_file_atomic};
use coracle_storage::state::{Batch, Engines};
use coracle_storage::state::{CHUNK_BYTES, Engine, Incoming, Manifest, checkpoint};
use coracle_storage::{Error, Fs};

use crate::state_rig::{ALL, Rig, dump};

fn put(engine: &dyn Engine, key: &str, value: &[u8]) {
    let mut batch = Batch::new();
    batch.put(key.as_bytes().to_vec(), value.to_vec());
    engine.write(batch).expect("a write");
}

/// Bytes that do not compress, so that a file has several chunks.
fn noise(bytes: usize) -> Vec<u8> {
    let mut dice = coracle_storage::fs::faulty::Dice::new(7);
    (0..bytes).map(|_| dice.roll() as u8).collect()
}

#[test]
fn a_checkpoint_holds_what_was_written_before_it() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        put(&*engine, "flushed", b"1");
        engine.flush().expect("a flush");
        put(&*engine, "unflushed", b"2");
        let dir = rig.dir("2");
        engine.checkpoint(&dir).expect("a checkpoint");
        put(&*engine, "later", b"3");
        assert!(matches!(engine.checkpoint(&dir), Err(Error::Invalid { .. })), "{kind:?}: exists");
        drop(engine);
        let wanted = [(b"flushed".to_vec(), b"1".to_vec()), (b"unflushed".to_vec(), b"2".to_vec())];
        assert_eq!(dump(&*rig.reopen("2")), wanted, "{kind:?}");
        // Once more: what was loaded is durable as well.
        assert_eq!(dump(&*rig.reopen("2")), wanted, "{kind:?}");
    }
}

#[test]
fn a_checkpoint_is_independent_of_its_origin() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        put(&*engine, "k", b"1");
        engine.checkpoint(&rig.dir("2")).expect("a checkpoint");
        drop(engine);
        rig.engines.destroy(&rig.dir("1")).expect("a removal");
        let copy = rig.reopen("2");
        put(&*copy, "k", b"2");
        copy.compact(None).expect("a compaction");
        assert_eq!(dump(&*copy), [(b"k".to_vec(), b"2".to_vec())], "{kind:?}");
    }
}

fn replace(fs: &dyn Fs, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let before = read_file(fs, path).expect("a file that reads");
    let mut content = before.clone();
    change(&mut content);
    write_file_atomic(fs, path, &content).expect("a file that writes");
    before
}

#[test]
fn a_manifest_notices_every_kind_of_damage() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let fs = rig.fs();
        let engine = rig.open("1");
        put(&*engine, "k", &noise(3 * CHUNK_BYTES as usize / 2));
        let dir = rig.dir("1.sent");
        engine.checkpoint(&dir).expect("a checkpoint");
        let manifest = Manifest::of(&*fs, &dir).expect("a manifest");
        assert!(manifest.bytes() > CHUNK_BYTES, "{kind:?}: more than one chunk");
        assert_eq!(
            Manifest::decode(Path::new("m"), &manifest.encode()).expect("our own bytes"),
            manifest
        );
        manifest.verify(&*fs, &dir).expect("the directory as it was listed");

        let damaged = |at: &Path| match manifest.verify(&*fs, &dir) {
            Err(Error::Corruption { file, offset, .. }) => {
                assert_eq!(file, at, "{kind:?}");
                offset
            }
            other => panic!("{kind:?}: {} is damaged, got {other:?}", at.display()),
        };
        for entry in &manifest.files {
            let path = dir.join(&entry.name);
            if entry.bytes > 0 {
                let last = entry.bytes as usize - 1;
                for at in [0, last / 2, last] {
                    let before = replace(&*fs, &path, |content| content[at] ^= 1);
                    assert_eq!(damaged(&path), at as u64 / CHUNK_BYTES * CHUNK_BYTES, "{kind:?}");
                    replace(&*fs, &path, |content| *content = before);
                }
                let before = replace(&*fs, &path, |content| content.truncate(last));
                assert_eq!(damaged(&path), last as u64, "{kind:?}: cut");
                replace(&*fs, &path, |content| *content = before);
            }
            let before = replace(&*fs, &path, |content| content.push(0));
            damaged(&path);
            fs.remove_file(&path).expect("a removal");
            damaged(&path);
            write_file_atomic(&*fs, &path, &before).expect("a file that writes");
        }
        let extra = dir.join("extra");
        write_file_atomic(&*fs, &extra, b"").expect("a file that writes");
        damaged(&extra);
        fs.remove_file(&extra).expect("a removal");
        manifest.verify(&*fs, &dir).expect("the directory, mended");
    }
}

/// Receives a checkpoint chunk by chunk, last first, and swaps it in over an older store.
#[test]
fn a_checkpoint_travels_and_replaces_a_store() {
    for kind in ALL {
        let (from, to) = (Rig::new(kind), Rig::new(kind));
        let engine = from.open("1");
        put(&*engine, "k", &noise(CHUNK_BYTES as usize + 10));
        let wanted = dump(&*engine);
        engine.checkpoint(&from.dir("1.sent")).expect("a checkpoint");
        let manifest = Manifest::of(&*from.fs(), &from.dir("1.sent")).expect("a manifest");

        let old = to.open("9");
        put(&*old, "old", b"old");
        old.flush().expect("a flush");
        drop(old);
        let dir = to.dir("9.incoming");
        to.fs().create_dir_all(&dir).expect("left by an earlier attempt");
        let incoming = Incoming::begin(to.fs(), &dir, manifest.clone()).expect("a beginning");
        for (index, file) in manifest.files.iter().enumerate().rev() {
            let content = read_file(&*from.fs(), &from.dir("1.sent").join(&file.name))
                .expect("a file that reads");
            for chunk in (0..file.chunk_crcs.len()).rev() {
                let (offset, len) = file.chunk(chunk).expect("a chunk of the manifest");
                let mut data = content[offset as usize..][..len].to_vec();
                data[len / 2] ^= 1;
                assert!(matches!(
                    incoming.write(index, chunk, &data),
                    Err(Error::Corruption { .. })
                ));
                data[len / 2] ^= 1;
                assert!(matches!(
                    incoming.write(index, chunk, &data[1..]),
                    Err(Error::Corruption { .. })
                ));
                incoming.write(index, chunk, &data).expect("a chunk that matches");
            }
            assert!(incoming.write(index, file.chunk_crcs.len(), b"").is_err());
        }
        assert_eq!(incoming.finish().expect("a whole checkpoint"), manifest);
        checkpoint::swap_in(&*to.fs(), &dir, &to.dir("9")).expect("a swap");
        assert_eq!(dump(&*to.reopen("9")), wanted, "{kind:?}");
        assert_eq!(
            to.fs().read_dir(&to.root).expect("a listing"),
            ["9"],
            "{kind:?}: nothing is left over"
        );
    }
}

#[test]
fn an_unfinished_checkpoint_is_refused() {
    for kind in ALL {
        let rig = Rig::new(kind);
        let engine = rig.open("1");
        put(&*engine, "k", b"v");
        engine.checkpoint(&rig.dir("1.sent")).expect("a checkpoint");
        let manifest = Manifest::of(&*rig.fs(), &rig.dir("1.sent")).expect("a manifest");
        let incoming =
            Incoming::begin(rig.fs(), &rig.dir("2.incoming"), manifest).expect("a beginning");
        assert!(
            matches!(incoming.finish(), Err(Error::Corruption { .. })),
            "{kind:?}: chunks are missing"
        );
    }
}

const LIVE: &str = "/shards/7";

fn write_dir(fs: &dyn Fs, dir: &Path, content: &[u8]) {
    fs.create_dir_all(dir).expect("a directory");
    write_file_atomic(fs, &dir.join("a"), content).expect("a file");
    write_file_atomic(fs, &dir.join("b"), content).expect("a file");
}

fn content(fs: &dyn Fs, dir: &Path) -> Vec<Vec<u8>> {
    ["a", "b"].map(|name| read_file(fs, &dir.join(name)).expect("a file of the store")).to_vec()
}

/// A disk with a live store (or none) and one to swap in; all of it durable.
fn disk_before_a_swap(seed: u64, with_live: bool) -> (FaultyFs, PathBuf) {
    let disk = FaultyFs::new(seed);
    let incoming = PathBuf::from("/shards/7.incoming");
    if with_live {
        write_dir(&disk, Path::new(LIVE), b"old");
    }
    write_dir(&disk, &incoming, b"new");
    disk.sync_dir(Path::new("/shards")).expect("a sync");
    disk.sync_dir(Path::new("/")).expect("a sync");
    (disk, incoming)
}

fn crash_swap_at(crash_at: u64, loss: Loss, with_live: bool) -> bool {
    let (disk, incoming) = disk_before_a_swap(crash_at, with_live);
    disk.crash_at(disk.ops() + crash_at);
    let swapped = checkpoint::swap_in(&disk, &incoming, Path::new(LIVE));
    let crashed = disk.crashed();
    assert!(crashed || swapped.is_ok());
    let disk = disk.crash(loss);
    let live = checkpoint::settle(&disk, Path::new("/shards")).expect("a start");
    let names = disk.read_dir(Path::new("/shards")).expect("a listing");
    assert_eq!(names, live, "crash at {crash_at}, {loss:?}: nothing is left over");
    let (old, new) = (vec![b"old".to_vec(); 2], vec![b"new".to_vec(); 2]);
    match (swapped.is_ok(), with_live, live.is_empty()) {
        (true, _, _) => {
            assert_eq!(content(&disk, Path::new(LIVE)), new, "an acknowledged swap stays")
        }
        (false, false, true) => {}
        (false, _, _) => {
            let content = content(&disk, Path::new(LIVE));
            assert!(
                content == new || (with_live && content == old),
                "crash at {crash_at}, {loss:?}: {content:?}"
            );
        }
    }
    crashed
}

#[test]
fn a_swap_survives_a_crash_at_every_operation() {
    for with_live in [true, false] {
        for loss in [Loss::All, Loss::Subset, Loss::Nothing] {
            let crashes =
                (1..).take_while(|crash_at| crash_swap_at(*crash_at, loss, with_live)).count();
            assert!(
                crashes >= 5,
                "the swap must be long enough to crash in, not {crashes} operations"
            );
        }
    }
}

/// The start itself may crash, at every operation, and the next one goes on.
#[test]
fn a_start_that_finishes_a_swap_may_crash_as_well() {
    for first in 1..12 {
        for second in 1..12 {
            let (disk, incoming) = disk_before_a_swap(first, true);
            disk.crash_at(disk.ops() + first);
            let swapped = checkpoint::swap_in(&disk, &incoming, Path::new(LIVE));
            let disk = disk.crash(Loss::Subset);
            disk.crash_at(disk.ops() + second);
            // Fails where it crashes; the next start goes on.
            drop(checkpoint::settle(&disk, Path::new("/shards")));
            let disk = disk.crash(Loss::Subset);
            assert_eq!(checkpoint::settle(&disk, Path::new("/shards")).expect("a start"), ["7"]);
            let content = content(&disk, Path::new(LIVE));
            assert!(content[0] == content[1], "never a mixture");
            assert!(swapped.is_err() || content[0] == b"new");
        }
    }
}

#[test]
fn a_start_clears_what_was_being_made() {
    let disk = FaultyFs::new(1);
    for name in ["7", "7.incoming", "7.sent.tmp", "8.removed", "9.ready"] {
        write_dir(&disk, &Path::new("/shards").join(name), b"x");
    }
    assert_eq!(checkpoint::settle(&disk, Path::new("/shards")).expect("a start"), ["7", "9"]);
    assert_eq!(disk.read_dir(Path::new("/shards")).expect("a listing"), ["7", "9"]);
}

#[test]
fn a_swap_needs_its_names() {
    let (disk, incoming) = disk_before_a_swap(1, true);
    let refused = |incoming: &Path, live: &str| {
        matches!(checkpoint::swap_in(&disk, incoming, Path::new(live)), Err(Error::Invalid { .. }))
    };
    assert!(refused(&incoming, "/shards/7.x"), "a live name has no dot");
    assert!(refused(&incoming, "/elsewhere/7"), "beside the live one");
    assert!(refused(Path::new("/shards/8.incoming"), LIVE), "not there");
}

#[test]
fn memory_engines_report_what_they_use() {
    let options = coracle_storage::state::StateOptions::test_min();
    let fs: Arc<dyn Fs> = Arc::new(FaultyFs::new(1));
    fs.create_dir_all(Path::new("/shards")).expect("a directory");
    let engines = coracle_storage::state::RocksEngines::in_memory(&options, fs, Arc::new(|_| {}))
        .expect("options");
    let engine = engines
        .open(Path::new("/shards/1"), coracle_storage::state::OpenState { create: true })
        .expect("a store");
    let before = engine.approximate_bytes();
    put(&*engine, "k", &noise(100_000));
    assert!(engine.unflushed_bytes() >= 100_000);
    assert!(engine.approximate_bytes() >= before + 100_000);
    assert!(engines.memory().write_buffer_bytes >= 100_000);
    engine.flush().expect("a flush");
    assert!(engine.approximate_bytes() >= before + 90_000, "in a file now");
    assert!(engines.memory().cache_bytes <= options.memory_bytes);
}

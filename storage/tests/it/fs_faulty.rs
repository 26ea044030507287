//! The hostile twin of the file system is hostile in the ways it promises. Does not test its users.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_storage::fs::faulty::{FaultyFs, Loss};
use coracle_storage::fs::{create_dir_durable, read_file, write_file_atomic};
use coracle_storage::{File, Fs, OpenMode};

fn path(name: &str) -> &Path {
    Path::new(name)
}

/// A durable file of zeros.
fn file(fs: &FaultyFs, name: &str, len: u64) -> Arc<dyn File> {
    let file = fs.open(path(name), OpenMode::CreateNew).expect("created");
    file.allocate(len).expect("room");
    file.sync().expect("a sync");
    fs.sync_dir(path("")).expect("a sync");
    file
}

fn content(fs: &FaultyFs, name: &str) -> Vec<u8> {
    read_file(fs, path(name)).expect("readable")
}

#[test]
fn only_what_was_synced_survives_a_crash() {
    let fs = FaultyFs::new(1);
    let f = file(&fs, "f", 4);
    f.write_at(b"ab", 0).expect("a write");
    f.sync().expect("a sync");
    f.write_at(b"cd", 2).expect("a write");
    assert_eq!(content(&fs, "f"), b"abcd");
    let killed = fs.crash(Loss::Nothing);
    assert_eq!(content(&killed, "f"), b"abcd", "a killed process leaves the page cache");
    let lost = killed.crash(Loss::All);
    assert_eq!(content(&lost, "f"), b"ab\0\0", "which was never durable");
    assert_eq!(f.sync().expect_err("the old machine is gone").kind(), ErrorKind::Other);
}

#[test]
fn a_torn_write_keeps_some_sectors_whole() {
    let mut seen = [false; 3];
    for seed in 0..60 {
        let fs = FaultyFs::new(seed);
        let f = file(&fs, "f", 4096);
        f.write_at(&[7; 2048], 1024).expect("a write");
        let after = content(&fs.crash(Loss::Subset), "f");
        assert!(after[..1024].iter().chain(&after[3072..]).all(|&byte| byte == 0));
        let sectors: Vec<u8> = after[1024..3072]
            .chunks(512)
            .map(|sector| {
                assert!(sector.iter().all(|byte| byte == &sector[0]), "a sector is never torn");
                sector[0]
            })
            .collect();
        let kept = sectors.iter().filter(|&&byte| byte == 7).count();
        seen[match kept {
            0 => 0,
            4 => 1,
            _ => 2,
        }] = true;
    }
    assert_eq!(seen, [true; 3], "lost, kept and torn all happen");
}

#[test]
fn names_need_the_sync_of_their_directory() {
    let fs = FaultyFs::new(1);
    create_dir_durable(&fs, path("a/b")).expect("created");
    let f = fs.open(path("a/b/new"), OpenMode::CreateNew).expect("created");
    f.write_at(b"x", 0).expect("a write");
    f.sync().expect("a sync");
    assert!(fs.exists(path("a/b/new")));
    let lost = fs.crash(Loss::All);
    assert!(lost.exists(path("a/b")), "a durable directory");
    assert!(!lost.exists(path("a/b/new")), "its bytes were synced, its name was not");

    write_file_atomic(&lost, path("a/b/file"), b"one").expect("written");
    let f = lost.open(path("a/b/other"), OpenMode::CreateNew).expect("created");
    f.write_at(b"two", 0).expect("a write");
    f.sync().expect("a sync");
    lost.rename(path("a/b/other"), path("a/b/file")).expect("renamed");
    assert_eq!(read_file(&lost, path("a/b/file")).expect("readable"), b"two");
    lost.remove_dir_all(path("a")).expect("removed");
    assert!(!lost.exists(path("a/b/file")));
    let lost = lost.crash(Loss::All);
    assert_eq!(read_file(&lost, path("a/b/file")).expect("readable"), b"one");
    assert_eq!(lost.read_dir(path("a/b")).expect("there"), ["file"]);
}

#[test]
fn what_is_under_way_in_a_directory_never_appears_in_a_later_one_of_its_name() {
    let mut kept = 0;
    for seed in 0..64 {
        let fs = FaultyFs::new(seed);
        for dir in ["/old", "/new"] {
            fs.create_dir_all(path(dir)).expect("a directory");
            write_file_atomic(&fs, &path(dir).join("f"), dir.as_bytes()).expect("a healthy disk");
        }
        fs.sync_dir(path("/")).expect("a sync");
        // Not synced: it may survive, where it was written.
        fs.open(path("/old/late"), OpenMode::CreateNew).expect("created");
        fs.rename(path("/old"), path("/gone")).expect("a rename");
        fs.sync_dir(path("/")).expect("a sync");
        fs.rename(path("/new"), path("/old")).expect("a rename");
        fs.sync_dir(path("/")).expect("a sync");
        let after = fs.crash(Loss::Subset);
        assert_eq!(after.read_dir(path("/old")).expect("readable"), ["f"]);
        assert_eq!(content(&after, "/old/f"), b"/new");
        kept += after.read_dir(path("/gone")).expect("readable").len() - 1;
    }
    assert!(kept > 10, "{kept}");
}

#[test]
fn a_crash_at_any_operation_leaves_an_atomic_write_old_or_new() {
    let mut seen = [0; 2];
    for seed in 0..100 {
        for at in 1..=8 {
            let fs = FaultyFs::new(seed);
            write_file_atomic(&fs, path("f"), b"old").expect("written");
            fs.crash_at(fs.ops() + at);
            let written = write_file_atomic(&fs, path("f"), b"new");
            assert_eq!(written.is_err(), fs.crashed());
            let loss = if seed % 2 == 0 { Loss::Subset } else { Loss::All };
            let after = fs.crash(loss);
            let new = content(&after, "f") == b"new";
            assert!(new || content(&after, "f") == b"old");
            assert!(new || written.is_err(), "durable when it returns");
            seen[usize::from(new)] += 1;
            write_file_atomic(&after, path("f"), b"again")
                .expect("what a crash left is no hindrance");
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[test]
fn links_and_renames_keep_to_the_rules() {
    let fs = FaultyFs::new(1);
    fs.create_dir_all(path("d/e")).expect("created");
    let f = file(&fs, "f", 0);
    fs.hard_link(path("f"), path("d/g")).expect("linked");
    f.write_at(b"x", 0).expect("a write");
    assert_eq!(content(&fs, "d/g"), b"x");
    assert_eq!(fs.used_bytes(), 1, "one file under two names");
    let again = fs.hard_link(path("f"), path("d/g")).expect_err("taken");
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
    fs.rename(path("d"), path("h")).expect("renamed");
    assert_eq!(fs.read_dir(path("h")).expect("there"), ["e", "g"]);
    assert_eq!(content(&fs, "h/g"), b"x");
    fs.remove_file(path("f")).expect("removed");
    assert_eq!(content(&fs, "h/g"), b"x");
    f.write_at(b"y", 0).expect("a handle outlives the name");
    assert_eq!(content(&fs, "h/g"), b"y");
    for (name, kind) in [("f", ErrorKind::NotFound), ("h", ErrorKind::IsADirectory)] {
        assert_eq!(fs.open(path(name), OpenMode::Read).map(|_| ()).expect_err(name).kind(), kind);
    }
    let missing = fs.open(path("no/f"), OpenMode::CreateNew).map(|_| ()).expect_err("no directory");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let read_only = fs.open(path("h/g"), OpenMode::Read).expect("there");
    assert_eq!(
        read_only.write_at(b"z", 0).expect_err("read only").kind(),
        ErrorKind::PermissionDenied
    );
}

#[test]
fn a_full_disk_refuses_growth_and_reserved_room_is_kept() {
    let fs = FaultyFs::new(1);
    fs.set_capacity(8192);
    let f = file(&fs, "f", 4096);
    let g = file(&fs, "g", 0);
    assert_eq!(fs.space(path("")).expect("known").free_bytes, 4096);
    g.write_at(&[1; 4096], 0).expect("the rest of the room");
    assert_eq!(g.write_at(&[1], 4096).expect_err("full").kind(), ErrorKind::StorageFull);
    assert_eq!(f.allocate(4097).expect_err("full").kind(), ErrorKind::StorageFull);
    f.write_at(&[2; 4096], 0).expect("its room was reserved");
    fs.remove_file(path("g")).expect("removed");
    f.allocate(8192).expect("room again");
}

#[test]
fn failures_on_order_come_when_ordered() {
    let fs = FaultyFs::new(1);
    let f = file(&fs, "f", 8);
    fs.fail_write(2);
    f.write_at(b"1", 0).expect("the first");
    f.write_at(b"2", 1).expect_err("the second");
    f.write_at(b"3", 2).expect("the third");
    assert_eq!(content(&fs, "f"), b"1\x003\0\0\0\0\0");
    fs.fail_sync(1);
    f.sync().expect_err("ordered");
    f.sync().expect("looks well again");
    assert_eq!(content(&fs.crash(Loss::All), "f"), [0; 8], "but the bytes never got there");

    let fs = FaultyFs::new(1);
    let f = file(&fs, "f", 8);
    fs.lie_about_sync(true);
    f.write_at(b"1", 0).expect("a write");
    f.sync().expect("a lie");
    assert_eq!(content(&fs.crash(Loss::All), "f"), [0; 8]);

    let fs = FaultyFs::new(1);
    let f = file(&fs, "f", 8);
    fs.fail_reads(path("f"), 2..4);
    let mut buf = [0; 2];
    f.read_at(&mut buf, 0).expect("before the range");
    f.read_at(&mut buf, 3).expect_err("in the range");
    f.read_at(&mut buf, 4).expect("behind the range");
    fs.heal_reads();
    fs.flip_bit(path("f"), 3, 1);
    assert_eq!(content(&fs.crash(Loss::All), "f"), [0, 0, 0, 2, 0, 0, 0, 0]);
}

#[test]
fn a_hook_sees_every_operation_before_it_happens() {
    let fs = FaultyFs::new(1);
    let f = file(&fs, "f", 8);
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    fs.set_hook(Some(Arc::new(move |_, _| {
        counted.fetch_add(1, Ordering::SeqCst);
    })));
    f.write_at(b"1", 0).expect("a write");
    f.sync().expect("a sync");
    f.read_at(&mut [0], 0).expect("a read");
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    fs.set_hook(None);
    f.sync().expect("a sync");
    assert_eq!(calls.load(Ordering::SeqCst), 3);
}

#[test]
fn a_seed_means_the_same_for_ever() {
    let survivors = |seed| {
        let fs = FaultyFs::new(seed);
        let f = file(&fs, "f", 16 * 512);
        f.write_at(&[1; 16 * 512], 0).expect("a write");
        let after = content(&fs.crash(Loss::Subset), "f");
        after.chunks(512).fold(0_u16, |bits, sector| bits << 1 | u16::from(sector[0]))
    };
    assert_eq!([1, 2, 3, 4, 5, 6].map(survivors), [1, 2, 3, 4, 5, 6].map(survivors));
}

//! The real side of the file seam, and that both sides answer alike. Does not crash anything.

use std::io::ErrorKind;
use std::path::Path;

use coracle_storage::fs::faulty::FaultyFs;
use coracle_storage::fs::{create_dir_durable, read_file, write_file_atomic};
use coracle_storage::{Fs, OpenMode, RealFs};

/// One script for both sides.
fn conforms(fs: &dyn Fs, root: &Path) {
    let dir = root.join("a").join("b");
    create_dir_durable(fs, &dir).expect("created");
    create_dir_durable(fs, &dir).expect("there already");
    let name = dir.join("f");
    let kind = |outcome: std::io::Result<()>| outcome.expect_err("refused").kind();
    assert_eq!(kind(fs.open(&name, OpenMode::Read).map(|_| ())), ErrorKind::NotFound);
    assert_eq!(kind(fs.open(&name, OpenMode::ReadWrite).map(|_| ())), ErrorKind::NotFound);
    let file = fs.open(&name, OpenMode::CreateNew).expect("created");
    assert_eq!(kind(fs.open(&name, OpenMode::CreateNew).map(|_| ())), ErrorKind::AlreadyExists);
    assert!(file.is_empty().expect("known"));
    file.write_at(b"hello", 3).expect("a write");
    file.sync().expect("a sync");
    assert_eq!(read_file(fs, &name).expect("readable"), b"\0\0\0hello");
    let mut buf = [9; 4];
    assert_eq!(file.read_at(&mut buf, 6).expect("readable"), 2);
    assert_eq!(&buf, b"lo\x09\x09");
    assert_eq!(file.read_at(&mut buf, 8).expect("readable"), 0);
    file.allocate(6).expect("never shrinks");
    assert_eq!(file.len().expect("known"), 8);
    file.allocate(10).expect("room");
    assert_eq!(file.len().expect("known"), 10);
    file.set_len(4).expect("cut");
    file.set_len(6).expect("extended");
    assert_eq!(read_file(fs, &name).expect("readable"), b"\0\0\0h\0\0");
    write_file_atomic(fs, &name, b"new").expect("replaced");
    write_file_atomic(fs, &dir.join("g"), b"other").expect("written");
    assert_eq!(read_file(fs, &name).expect("readable"), b"new");
    assert_eq!(fs.read_dir(&dir).expect("there"), ["f", "g"]);
    fs.hard_link(&name, &dir.join("h")).expect("linked");
    fs.remove_file(&name).expect("removed");
    assert_eq!(kind(fs.remove_file(&name)), ErrorKind::NotFound);
    assert_eq!(read_file(fs, &dir.join("h")).expect("readable"), b"new");
    fs.rename(&dir, &root.join("c")).expect("renamed");
    assert!(!fs.exists(&dir));
    fs.sync_dir(root).expect("a sync");
    assert_eq!(fs.read_dir(&root.join("c")).expect("there"), ["g", "h"]);
    let space = fs.space(root).expect("known");
    assert!(0 < space.free_bytes && space.free_bytes <= space.total_bytes);
    fs.remove_dir_all(&root.join("c")).expect("removed");
    assert!(!fs.exists(&root.join("c").join("g")));
    assert_eq!(kind(fs.read_dir(&root.join("c")).map(|_| ())), ErrorKind::NotFound);
}

#[test]
fn both_sides_answer_alike() {
    let dir = tempfile::tempdir().expect("a directory");
    conforms(&RealFs, dir.path());
    conforms(&FaultyFs::new(1), Path::new(""));
}

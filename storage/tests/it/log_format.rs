//! The bytes of the log, pinned. `log_v1.hex` was made from FORMAT.md alone, not by this crate's
//! code; it holds every kind of record. Does not test damage.

use bytes::Bytes;
use coracle_storage::fs::faulty::FaultyFs;
use coracle_storage::fs::{read_exact_at, read_file};
use coracle_storage::{Fs, LogEntry, LogOptions, OpenMode, ReplicaId};

use crate::log_rig::{A, B, C, DIR, Rig, entry, segment, well};

const D: ReplicaId = ReplicaId(4);
const PINNED: &str = include_str!("log_v1.hex");

fn options() -> LogOptions {
    LogOptions { salt: 0x1122_3344_5566_7788, ..LogOptions::test_min() }
}

/// The parts of the file that are not zero, with their places.
fn pinned() -> Vec<(u64, Vec<u8>)> {
    let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
    for line in PINNED.lines() {
        if let Some(offset) = line.strip_prefix('@') {
            parts.push((offset.parse().expect("a number"), Vec::new()));
            continue;
        }
        let (_, bytes) = parts.last_mut().expect("a place comes first");
        for pair in line.as_bytes().chunks(2) {
            let digits = std::str::from_utf8(pair).expect("ASCII");
            bytes.push(u8::from_str_radix(digits, 16).expect("hexadecimal"));
        }
    }
    parts
}

fn text_entry(index: u64, text: &'static str) -> LogEntry {
    LogEntry { payload: Bytes::from_static(text.as_bytes()), ..entry(index, 0) }
}

#[test]
fn the_writer_writes_the_pinned_bytes() {
    let rig = Rig::new(options());
    for replica in [A, B, C, D] {
        rig.log.create(replica, well());
    }
    rig.log.save_vote(A, Bytes::from_static(b"vote"), well());
    rig.log.append(A, vec![text_entry(5, "five"), text_entry(6, "six")], well());
    rig.log.truncate_after(A, Some(5), well());
    rig.log.purge(B, 9, entry(9, 0).id, well());
    rig.log.destroy(C, well());
    rig.log.forget(C, well());
    rig.log.destroy(D, well());
    rig.log.save_committed(A, Bytes::from_static(b"hint"));
    rig.exec.run();
    let written = read_file(&rig.fs, &segment(1)).expect("readable");
    let mut expected = vec![0; written.len()];
    // The last part holds what only a damaged or a long log writes.
    for (offset, bytes) in &pinned()[..3] {
        expected[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
    }
    assert!(written == expected, "the format has changed: that needs a new version");
}

#[test]
fn the_pinned_bytes_open_for_ever() {
    let fs = FaultyFs::new(1);
    fs.create_dir_all(DIR.as_ref()).expect("created");
    let file = fs.open(&segment(1), OpenMode::CreateNew).expect("created");
    file.allocate(32 << 10).expect("room");
    for (offset, bytes) in pinned() {
        file.write_at(&bytes, offset).expect("written");
    }
    // Another salt than the file's: the file's own counts.
    let rig = Rig::on(fs, LogOptions::test_min()).expect("opens");
    assert_eq!(rig.recovery.replicas, [A]);
    assert_eq!(rig.recovery.destroyed, [D]);
    assert_eq!(rig.recovery.torn_bytes, 0);
    let [damage] = rig.recovery.recovering.as_slice() else { panic!("{:?}", rig.recovery) };
    assert_eq!((damage.replica, damage.offset), (B, 77));
    assert_eq!((damage.file.to_str(), damage.why.as_str()), (Some("log/some file"), "some reason"));
    let state = rig.log.state(A).expect("whole");
    assert_eq!(state.vote.as_deref(), Some(b"vote".as_slice()));
    assert_eq!(state.committed.as_deref(), Some(b"hint".as_slice()));
    assert_eq!(rig.read(A).expect("whole"), [text_entry(5, "five")]);
    // It goes on where the file ends.
    rig.append(A, 6..7, 10);
    let mut mark = [0; 1];
    read_exact_at(&*rig.fs.open(&segment(1), OpenMode::Read).expect("there"), &mut mark, 20480)
        .expect("readable");
    assert_ne!(mark, [0], "batch 4 marked the end at 16384, batch 5 stands behind it");
}

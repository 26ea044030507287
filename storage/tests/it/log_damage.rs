//! Damage to what was durable: who recovers, what is said, and that wrong data is never shown. Does
//! not test crashes (see `log_crash`).

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use coracle_storage::fs::faulty::Loss;
use coracle_storage::fs::read_file;
use coracle_storage::{Error, Fs, LogEntry, LogOptions, OpenMode, ReplicaId};

use crate::log_rig::{A, B, C, Outcomes, Rig, entries, segment, well};

const D: ReplicaId = ReplicaId(4);
const BLOCK: u64 = 4096;
/// Blocks: 0 header, 1 the mark of the open, 2 the creates; from here on what a test appends.
const FIRST: u64 = 3 * BLOCK;
const RECORD_HEADER: u64 = 32;

type Shown = BTreeMap<ReplicaId, (Option<Bytes>, Vec<LogEntry>)>;

fn shown(rig: &Rig, replicas: &[ReplicaId]) -> Shown {
    let read = |id| rig.read(id).expect("a whole replica reads");
    replicas.iter().map(|&id| (id, (rig.vote_of(id), read(id)))).collect()
}

fn recovering(rig: &Rig) -> Vec<ReplicaId> {
    rig.recovery.recovering.iter().map(|damage| damage.replica).collect()
}

/// Three replicas, several batches, everything marked.
fn filled() -> Rig {
    let options = LogOptions { segment_bytes: 64 << 10, ..LogOptions::test_min() };
    let rig = Rig::new(options).with(&[A, B, C]);
    rig.append(A, 1..3, 50);
    rig.log.append(A, entries(3..5, 60), well());
    rig.log.append(B, entries(1..3, 70), well());
    rig.log.save_vote(C, Bytes::from_static(b"vote of C"), well());
    rig.exec.run();
    rig.append(C, 7..9, 80);
    rig.vote(A, b"vote of A");
    rig.purge(B, 1);
    rig.probe();
    rig
}

/// Bytes of the first batch head that lists `replicas` replicas.
fn batch_head(replicas: u64) -> u64 {
    RECORD_HEADER + 48 + 8 * replicas
}

#[test]
fn a_flipped_bit_anywhere_is_never_shown_and_is_named() {
    let rig = filled();
    let whole = shown(&rig, &[A, B, C]);
    let content = read_file(&rig.fs, &segment(1)).expect("readable");
    let used = content.iter().rposition(|&byte| byte != 0).expect("not empty") as u64;
    let mut hurt = 0;
    // A bit of every byte that was written, and of some between.
    for offset in 0..used + 1000 {
        let in_use = content.get(offset as usize).is_some_and(|&byte| byte != 0);
        if !in_use && offset % 61 != 0 {
            continue;
        }
        let fs = rig.fs.fork();
        fs.flip_bit(&segment(1), offset, (offset % 8) as u8);
        let after = match Rig::on(fs, rig.options.clone()) {
            Ok(after) => after,
            Err(error) => panic!("byte {offset}: {error}"),
        };
        for (id, state) in shown(&after, &after.recovery.replicas) {
            assert_eq!(state, whole[&id], "byte {offset}: replica {id} shows something else");
        }
        let mut all = recovering(&after);
        hurt += usize::from(!all.is_empty());
        for damage in &after.recovery.recovering {
            assert_eq!(damage.file, segment(1), "byte {offset}");
            assert!(
                damage.offset <= offset && offset < damage.offset + BLOCK,
                "byte {offset}: {damage:?}"
            );
        }
        all.extend(&after.recovery.replicas);
        all.sort_unstable();
        assert_eq!(all, [A, B, C], "byte {offset}: every replica is whole or recovering");
    }
    assert!(hurt > 500, "only {hurt} flips hurt anybody");
}

#[test]
fn damage_in_a_body_costs_only_its_replica() {
    let rig = filled();
    // Block 4 holds: the head naming three replicas, two entries of A, then B's.
    let record = FIRST + BLOCK + batch_head(3) + 2 * (RECORD_HEADER + 16 + 60);
    rig.fs.flip_bit(&segment(1), record + RECORD_HEADER + 16 + 69 + RECORD_HEADER + 16, 3);
    let rig = rig.restart(Loss::All);
    assert_eq!(recovering(&rig), [B]);
    assert!(!rig.recovery.lossy, "it can be told whose it was");
    assert_eq!(rig.recovery.replicas, [A, C]);
    let damage = &rig.recovery.recovering[0];
    let second = record + RECORD_HEADER + 16 + 70;
    assert_eq!((damage.file.as_path(), damage.offset), (segment(1).as_path(), second));
    assert!(damage.why.contains("entry 2"), "{}", damage.why);
    let refused = rig.read(B).expect_err("a recovering replica serves nothing");
    assert!(matches!(refused, Error::Recovering { replica: B, .. }), "{refused}");
    let text = refused.to_string();
    assert!(text.contains("0000000000000001.log") && text.contains("fresh id"), "{text}");
    let outcomes = Outcomes::default();
    rig.log.save_vote(B, Bytes::new(), outcomes.done(0));
    assert!(matches!(*outcomes.error(), Error::Recovering { .. }));
    rig.append(A, 5..6, 10);
    // It is not forgotten, whatever else happens; only `destroy` ends it.
    let before = rig.recovery.recovering.clone();
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.recovery.recovering, before);
    rig.log.destroy(B, well());
    rig.log.create(D, well());
    rig.exec.run();
    rig.append(D, 1..2, 10);
    let rig = rig.restart(Loss::All);
    assert_eq!(recovering(&rig), []);
    assert_eq!(rig.recovery.replicas, [A, C, D]);
    assert_eq!(rig.recovery.destroyed, [B]);
}

#[test]
fn damage_in_a_records_header_costs_the_replicas_that_the_batch_lists() {
    let rig = filled();
    rig.fs.flip_bit(&segment(1), FIRST + batch_head(1) + 8, 0);
    let rig = rig.restart(Loss::All);
    assert_eq!(recovering(&rig), [A], "only A had records in that batch");
    assert!(rig.recovery.lossy, "others may have been named there");
    assert_eq!(rig.recovery.replicas, [B, C]);
}

#[test]
fn damage_in_a_batch_head_costs_all_but_later_replicas() {
    let rig = filled();
    rig.log.create(D, well());
    rig.exec.run();
    rig.append(D, 1..2, 10);
    rig.probe();
    rig.fs.flip_bit(&segment(1), FIRST + BLOCK + 5, 0);
    let rig = rig.restart(Loss::All);
    assert_eq!(recovering(&rig), [A, B, C]);
    assert_eq!(rig.recovery.replicas, [D]);
    assert_eq!(rig.read(D).expect("whole"), entries(1..2, 10));
    assert_eq!(rig.recovery.recovering[0].offset, FIRST + BLOCK);
    // The next start finds the same damage, and nobody else suffers.
    let rig = rig.with(&[ReplicaId(5)]).restart(Loss::All);
    assert_eq!(recovering(&rig), [A, B, C]);
    assert_eq!(rig.recovery.replicas, [D, ReplicaId(5)]);
}

#[test]
fn damage_to_what_was_overtaken_harms_nobody() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    rig.append(A, 1..2, 100);
    rig.vote(A, b"old vote");
    rig.append(A, 2..3, 100);
    rig.vote(A, b"new vote");
    rig.purge(A, 1);
    rig.probe();
    rig.fs.flip_bit(&segment(1), FIRST + batch_head(1) + RECORD_HEADER + 50, 0);
    rig.fs.flip_bit(&segment(1), FIRST + BLOCK + batch_head(1) + RECORD_HEADER + 2, 0);
    let rig = rig.restart(Loss::All);
    assert_eq!(recovering(&rig), []);
    assert_eq!(rig.vote_of(A).as_deref(), Some(b"new vote".as_slice()));
    assert_eq!(rig.read(A).expect("whole"), entries(2..3, 100));
}

#[test]
fn the_unmarked_last_batch_is_the_limit() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    rig.append(A, 1..2, 100);
    rig.append(A, 2..3, 100);
    let flip = FIRST + BLOCK + batch_head(1) + RECORD_HEADER + 20;
    let fs = rig.fs.fork();
    fs.flip_bit(&segment(1), flip, 0);
    let after = Rig::on(fs, rig.options.clone()).expect("opens");
    assert_eq!(recovering(&after), [], "it cannot be told from a torn write");
    assert!(after.recovery.torn_bytes > 0);
    assert_eq!(after.read(A).expect("whole"), entries(1..2, 100));
    rig.probe();
    rig.fs.flip_bit(&segment(1), flip, 0);
    let after = rig.restart(Loss::All);
    assert_eq!(recovering(&after), [A], "once marked, it is loss");
}

#[test]
fn a_disk_that_lied_about_a_sync_is_found_out() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A, B]);
    rig.append(A, 1..2, 100);
    rig.fs.lie_about_sync(true);
    rig.append(B, 1..2, 100);
    let fs = rig.fs.fork();
    let lost = Rig::on(fs.crash(Loss::All), rig.options.clone()).expect("opens");
    assert_eq!(recovering(&lost), [], "a lie about the last batch cannot be known");
    // The last write alone reaches the disk: the one before it is missing.
    let fs = rig.fs.fork();
    let before = fs.crash(Loss::All);
    rig.append(A, 2..3, 100);
    let content = read_file(&rig.fs, &segment(1)).expect("readable");
    let last = (FIRST + 2 * BLOCK) as usize;
    let file = before.open(&segment(1), OpenMode::ReadWrite).expect("there");
    file.write_at(&content[last..last + BLOCK as usize], last as u64).expect("a write");
    file.sync().expect("a sync");
    let rig = Rig::on(before, rig.options.clone()).expect("opens");
    assert_eq!(recovering(&rig), [A, B]);
    assert_eq!(rig.recovery.recovering[0].offset, FIRST + BLOCK);
}

/// A log of several segments, none of which can be freed.
fn long() -> Rig {
    let options =
        LogOptions { rewrite_small_bytes: 0, log_bytes_target: 1 << 30, ..LogOptions::test_min() };
    let rig = Rig::new(options).with(&[A, B]);
    for index in 1..40 {
        rig.append(A, index..index + 1, 2000);
    }
    rig.vote(B, b"vote of B");
    rig.probe();
    assert!(rig.log.stats().segments >= 5, "{:?}", rig.log.stats());
    rig
}

#[test]
fn a_missing_segment_costs_all() {
    for missing in [1, 2, 3] {
        let rig = long();
        rig.fs.remove_file(&segment(missing)).expect("there");
        rig.fs.sync_dir(Path::new("log")).expect("a sync");
        let rig = rig.restart(Loss::All);
        assert_eq!(recovering(&rig), [A, B], "segment {missing}");
        assert_eq!(rig.recovery.recovering[0].file, segment(missing));
        assert!(rig.recovery.recovering[0].why.contains("missing"));
    }
}

#[test]
fn a_damaged_segment_header_costs_all_unless_the_batches_go_on() {
    for (damaged, flip) in [(1, 20), (2, 3), (3, 66)] {
        let rig = long();
        rig.fs.flip_bit(&segment(damaged), flip, 1);
        let fs = rig.fs.fork();
        let rig = rig.restart(Loss::All);
        assert_eq!(recovering(&rig), [], "segment {damaged}: every batch is there");
        assert_eq!(rig.read(A).expect("whole"), entries(1..40, 2000));
        let rig = rig.restart(Loss::All);
        assert_eq!(recovering(&rig), [], "segment {damaged}: nor is anything lost later");

        fs.flip_bit(&segment(damaged), BLOCK + 40, 1);
        let rig = Rig::on(fs, rig.options.clone()).expect("opens");
        let all: &[ReplicaId] = if damaged == 1 { &[] } else { &[A, B] };
        assert_eq!(recovering(&rig), all, "the first batch of the first segment holds nothing");
        for damage in &rig.recovery.recovering {
            assert_eq!((damage.file.as_path(), damage.offset), (segment(damaged).as_path(), 0));
        }
    }
}

#[test]
fn a_segment_that_was_cut_short_costs_all() {
    let rig = long();
    let file = rig.fs.open(&segment(2), OpenMode::ReadWrite).expect("there");
    file.set_len(3 * BLOCK).expect("cut");
    file.sync().expect("a sync");
    let rig = rig.restart(Loss::All);
    assert_eq!(recovering(&rig), [A, B]);
    let damage = &rig.recovery.recovering[0];
    assert_eq!((damage.file.as_path(), damage.offset), (segment(2).as_path(), 3 * BLOCK));
}

#[test]
fn damage_that_a_read_meets_stops_the_replica_and_is_remembered() {
    let options = LogOptions { cache_bytes: 0, ..LogOptions::test_min() };
    let rig = Rig::new(options).with(&[A, B]);
    rig.append(A, 1..3, 100);
    rig.append(B, 1..3, 100);
    rig.fs.flip_bit(&segment(1), FIRST + batch_head(1) + RECORD_HEADER + 60, 0);
    let error = rig.read(A).expect_err("damaged");
    assert!(matches!(error, Error::Corruption { .. }), "{error}");
    assert!(matches!(rig.log.state(A), Err(Error::Recovering { .. })));
    assert_eq!(rig.read(B).expect("another replica"), entries(1..3, 100));
    rig.exec.run();
    // Even if the bit flips back: what was once wrong is not trusted again.
    rig.fs.flip_bit(&segment(1), FIRST + batch_head(1) + RECORD_HEADER + 60, 0);
    let rig = rig.restart(Loss::All);
    assert_eq!(recovering(&rig), [A]);
    assert_eq!(rig.recovery.replicas, [B]);
}

#[test]
fn a_read_error_at_open_is_not_taken_for_a_torn_tail() {
    let rig = filled();
    let whole = shown(&rig, &[A, B, C]);
    let fs = rig.fs.fork().crash(Loss::All);
    fs.fail_reads(&segment(1), FIRST + 2 * BLOCK..u64::MAX);
    let refused = Rig::on(fs.clone(), rig.options.clone()).map(|_| ()).expect_err("cannot be read");
    assert!(matches!(refused, Error::Io { .. }), "{refused}");
    fs.heal_reads();
    let rig = Rig::on(fs, rig.options.clone()).expect("opens");
    assert_eq!(shown(&rig, &[A, B, C]), whole);
}

#[test]
fn a_log_of_a_newer_program_is_refused_untouched() {
    let rig = filled();
    let file = rig.fs.open(&segment(1), OpenMode::ReadWrite).expect("there");
    let mut header = vec![0; 68];
    assert_eq!(file.read_at(&mut header, 0).expect("readable"), 68);
    header[8] = 9;
    let crc = crc32fast::hash(&header[..64]);
    header[64..].copy_from_slice(&crc.to_le_bytes());
    file.write_at(&header, 0).expect("a write");
    file.sync().expect("a sync");
    let fs = rig.fs.crash(Loss::All);
    let ops = fs.ops();
    let refused = Rig::on(fs.clone(), rig.options.clone()).map(|_| ()).expect_err("too new");
    assert!(matches!(refused, Error::Format { found: 9, known: 1, .. }), "{refused}");
    assert!(refused.to_string().contains("newer release"), "{refused}");
    assert!(fs.ops() <= ops + 1, "nothing is written but the sync of the directory's name");
}

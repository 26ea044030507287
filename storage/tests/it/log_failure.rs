//! What the log does when the disk refuses: stop for good, or wait for room. Does not test damage.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use coracle_storage::fs::faulty::{Loss, Op};
use coracle_storage::{Error, LogOptions};

use crate::log_rig::{A, B, Outcomes, Rig, entries, well};

#[test]
fn a_failed_write_or_sync_stops_the_log_for_good_and_says_so_once() {
    for fails in ["write", "sync"] {
        let rig = Rig::new(LogOptions::test_min()).with(&[A, B]);
        rig.append(A, 1..2, 10);
        let outcomes = Outcomes::default();
        rig.log.append(A, entries(2..3, 6000), outcomes.done(1));
        rig.log.append(B, entries(1..2, 6000), outcomes.done(2));
        match fails {
            "write" => rig.fs.fail_write(1),
            _ => rig.fs.fail_sync(1),
        }
        rig.exec.run();
        let taken = outcomes.take();
        let names: Vec<usize> = taken.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, [1, 2], "the batch and what waited behind it, in order");
        for (_, outcome) in taken {
            assert!(matches!(*outcome.expect_err("failed"), Error::Io { .. }));
        }
        assert_eq!(rig.fatal.load(Ordering::SeqCst), 1);
        let ops = rig.fs.ops();
        rig.log.save_vote(B, Bytes::new(), outcomes.done(3));
        assert!(matches!(*outcomes.error(), Error::Stopped { .. }));
        rig.log.probe(outcomes.done(4));
        assert!(matches!(*outcomes.error(), Error::Stopped { .. }));
        assert!(matches!(rig.log.state(A), Err(Error::Stopped { .. })));
        assert!(matches!(rig.read(A), Err(Error::Stopped { .. })));
        rig.exec.run();
        assert_eq!(rig.fs.ops(), ops, "nothing is tried again after a failed {fails}");
        assert_eq!(rig.fatal.load(Ordering::SeqCst), 1);
        let rig = rig.restart(Loss::All);
        assert_eq!(rig.read(A).expect("whole"), entries(1..2, 10));
    }
}

/// After a failed sync the kernel shows the bytes and takes them for clean. A restart that saw
/// them, and only synced, would act on what the next power cut takes away.
#[test]
fn what_a_restart_shows_survives_a_power_cut_even_after_a_failed_sync() {
    for failed_sync in [false, true] {
        let rig = Rig::new(LogOptions::test_min()).with(&[A]);
        rig.log.save_vote(A, Bytes::from_static(b"seen"), Box::new(|_| {}));
        if failed_sync {
            rig.fs.fail_sync(1);
        } else {
            // Killed between the write and its sync.
            rig.fs.crash_at(rig.fs.ops() + 2);
        }
        rig.exec.run();
        let rig = rig.restart(Loss::Nothing);
        assert_eq!(rig.vote_of(A).as_deref(), Some(b"seen".as_slice()));
        let rig = rig.restart(Loss::All);
        assert_eq!(
            rig.vote_of(A).as_deref(),
            Some(b"seen".as_slice()),
            "failed sync: {failed_sync}"
        );
    }
}

#[test]
fn without_room_for_a_segment_the_log_waits_and_goes_on_by_itself() {
    let rig = Rig::new(LogOptions { queue_bytes: 64 << 10, ..LogOptions::test_min() }).with(&[A]);
    rig.fs.set_capacity(rig.fs.used_bytes());
    let outcomes = Outcomes::default();
    let mut index = 1;
    while !rig.log.stats().full {
        rig.log.append(A, entries(index..index + 1, 3000), outcomes.done(index as usize));
        rig.exec.run();
        index += 1;
        assert!(index < 20, "the segment must fill up");
    }
    let waiting = index - 1;
    assert_eq!(outcomes.names(), (1..waiting as usize).collect::<Vec<_>>(), "the last one waits");
    assert_eq!(rig.fatal.load(Ordering::SeqCst), 0, "a full disk is not a broken disk");
    assert_eq!(rig.read(A).expect("reads go on").len() as u64, waiting);
    // More is taken until the queue is full; then the refusal says why.
    while outcomes.is_empty() {
        rig.log.append(A, entries(index..index + 1, 3000), outcomes.done(index as usize));
        rig.exec.run();
        index += 1;
        assert!(index < 400, "the queue must fill up");
    }
    assert!(matches!(*outcomes.error(), Error::Full { .. }));
    let refused = index - 1;
    rig.log.probe(outcomes.done(0));
    rig.exec.run();
    assert!(outcomes.is_empty(), "a probe does not pass what waits");
    rig.fs.set_capacity(1 << 30);
    rig.log.probe(well());
    rig.exec.run();
    let mut expected: Vec<usize> = (waiting as usize..refused as usize).collect();
    expected.push(0);
    assert_eq!(outcomes.names(), expected);
    assert!(!rig.log.stats().full);
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.read(A).expect("whole"), entries(1..refused, 3000));
}

#[test]
fn closing_a_log_that_waits_for_room_ends_it() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    rig.fs.set_capacity(rig.fs.used_bytes());
    let outcomes = Outcomes::default();
    rig.log.append(A, entries(1..10, 4000), outcomes.done(0));
    rig.exec.run();
    assert!(rig.log.stats().full);
    rig.log.close();
    rig.exec.run();
    assert!(matches!(*outcomes.error(), Error::Full { .. }));
}

#[test]
fn a_failed_write_while_opening_is_the_opens_error_and_leaves_everything() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    rig.append(A, 1..4, 100);
    let fs = rig.fs.crash(Loss::All);
    for n in 1..4 {
        fs.fail_write(n);
        let opened = Rig::on(fs.clone(), rig.options.clone());
        if let Err(error) = opened {
            assert!(matches!(error, Error::Io { .. }), "{error}");
        }
        fs.fail_sync(n);
        let opened = Rig::on(fs.clone(), rig.options.clone());
        if let Err(error) = opened {
            assert!(matches!(error, Error::Io { .. }), "{error}");
        }
    }
    let rig = Rig::on(fs.crash(Loss::All), rig.options.clone()).expect("opens");
    assert_eq!(rig.read(A).expect("whole"), entries(1..4, 100));
}

#[test]
fn a_writer_that_panics_leaves_nobody_waiting() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    let outcomes = Outcomes::default();
    rig.log.append(A, entries(1..3, 6000), outcomes.done(1));
    rig.log.append(A, entries(3..4, 6000), outcomes.done(2));
    rig.fs.set_hook(Some(Arc::new(|op, _| assert_ne!(op, Op::Write, "a broken invariant"))));
    let run = std::panic::AssertUnwindSafe(|| rig.exec.run());
    std::panic::catch_unwind(run).expect_err("the panic goes on");
    assert_eq!(rig.fatal.load(Ordering::SeqCst), 1);
    assert!(matches!(*outcomes.error(), Error::Stopped { .. }), "what waited behind the batch");
    assert!(matches!(rig.log.state(A), Err(Error::Stopped { .. })));
}

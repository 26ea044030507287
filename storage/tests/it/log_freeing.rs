//! Freeing of segments and copying forward. Does not test damage or crashes (the crash histories
//! free as well).

use bytes::Bytes;
use coracle_storage::LogOptions;
use coracle_storage::fs::faulty::Loss;

use crate::log_rig::{A, B, C, Rig, entries, entry, well};

/// Appends and purges a lot for one replica.
fn busy(rig: &Rig, from: u64, count: u64) {
    for index in from..from + count {
        rig.log.append(B, entries(index..index + 1, 1500), well());
        rig.exec.run();
        if index % 4 == 0 {
            rig.purge(B, index - 1);
        }
    }
}

#[test]
fn an_idle_replica_holds_nothing_up_and_loses_nothing() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A, B, C]);
    rig.append(A, 1..4, 20);
    rig.vote(A, b"vote of A");
    rig.purge(A, 1);
    rig.log.save_committed(A, Bytes::from_static(b"hint of A"));
    rig.append(C, 9..11, 30);
    rig.log.destroy(C, well());
    rig.exec.run();
    let mut rig = rig;
    let mut highest = 0;
    for round in 0..5 {
        busy(&rig, 1 + round * 100, 100);
        let stats = rig.log.stats();
        highest = highest.max(stats.segments);
        assert!(stats.oldest_segment > round * 5, "{stats:?}");
        rig = rig.restart(if round % 2 == 0 { Loss::All } else { Loss::Nothing });
        let state = rig.log.state(A).expect("whole");
        assert_eq!(state.vote.as_deref(), Some(b"vote of A".as_slice()));
        assert_eq!(state.committed.as_deref(), Some(b"hint of A".as_slice()));
        assert_eq!(state.purged, Some((1, entry(1, 0).id)));
        assert_eq!(rig.read(A).expect("whole"), entries(2..4, 20));
        assert_eq!(rig.recovery.destroyed, [C]);
        assert_eq!(rig.recovery.recovering, []);
    }
    assert!(highest <= 6, "{highest} segments of 32 KiB for a few live bytes");
}

#[test]
fn a_lagging_replica_is_named_and_its_log_goes_when_it_purges() {
    // Too much is live for copying to pay: nothing can be freed.
    let rig = Rig::new(LogOptions::test_min()).with(&[A, B]);
    for index in 1..80 {
        rig.append(A, index..index + 1, 3000);
    }
    let full = rig.log.stats();
    assert_eq!(full.oldest_segment, 1);
    assert!(full.bytes_on_disk > rig.options.log_bytes_target, "{full:?}");
    busy(&rig, 1, 8);
    let pinners = |rig: &Rig| rig.log.pinners().iter().map(|pin| pin.replica).collect::<Vec<_>>();
    assert_eq!(pinners(&rig), [A, B]);
    assert_eq!(rig.log.stats().pins[0].replica, A);
    rig.purge(A, 79);
    rig.probe();
    let freed = rig.log.stats();
    assert!(freed.bytes_on_disk < full.bytes_on_disk / 4, "{freed:?}");
    assert_ne!(pinners(&rig).first(), Some(&A));
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.recovery.recovering, []);
    assert_eq!(rig.log.state(A).expect("whole").last, Some((79, entry(79, 0).id)));
}

#[test]
fn live_entries_at_the_start_of_a_long_dead_log_are_copied_forward() {
    let rig =
        Rig::new(LogOptions { rewrite_small_bytes: 0, ..LogOptions::test_min() }).with(&[A, B]);
    // More than is copied in one step.
    for index in 1..7 {
        rig.append(A, index..index + 1, 3500);
    }
    busy(&rig, 1, 120);
    let stats = rig.log.stats();
    assert!(stats.oldest_segment > 5, "{stats:?}");
    assert!(stats.bytes_on_disk <= rig.options.log_bytes_target + (64 << 10), "{stats:?}");
    assert_eq!(rig.read(A).expect("whole"), entries(1..7, 3500));
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.recovery.recovering, []);
    assert_eq!(rig.read(A).expect("whole"), entries(1..7, 3500));
    // A copy never brings back what a later truncation removed.
    rig.log.truncate_after(A, Some(2), well());
    rig.exec.run();
    busy(&rig, 121, 60);
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.read(A).expect("whole"), entries(1..3, 3500));
}

#[test]
fn the_log_writes_at_most_twice_what_callers_write() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A, B]);
    rig.append(A, 1..3, 100);
    let before = rig.log.stats();
    busy(&rig, 1, 200);
    let after = rig.log.stats();
    // 200 appends and 50 purges of one block each: 250 blocks by callers.
    let written =
        (after.oldest_segment + after.segments as u64 - before.oldest_segment) * (32 << 10);
    assert!(written <= 2 * 250 * 4096 + (64 << 10), "{written}");
}

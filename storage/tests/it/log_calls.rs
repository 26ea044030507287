//! The calls of the log: what they promise, refuse and bound. Does not crash anything (see
//! `log_crash`).

use std::sync::Arc;

use bytes::Bytes;
use coracle_storage::fs::faulty::{FaultyFs, Loss};
use coracle_storage::log::testing::StepExec;
use coracle_storage::{Error, Log, LogOptions, RealExec, RealFs, ReplicaId};

use crate::log_rig::{A, B, C, DIR, Outcomes, Rig, entries, entry, ignore, segment, well};

#[test]
fn entries_are_readable_at_once_and_answered_in_order_after_one_sync() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A, B]);
    let outcomes = Outcomes::default();
    rig.log.append(A, entries(1..4, 10), outcomes.done(0));
    rig.log.save_vote(B, Bytes::from_static(b"vote"), outcomes.done(1));
    rig.log.append(B, entries(5..6, 10), outcomes.done(2));
    rig.log.truncate_after(A, Some(2), outcomes.done(3));
    assert_eq!(rig.read(A).expect("readable"), entries(1..3, 10));
    assert_eq!(rig.vote_of(B).as_deref(), Some(b"vote".as_slice()));
    assert_eq!(outcomes.take().len(), 0, "nothing is answered before it is durable");
    let before = rig.fs.ops();
    rig.exec.run();
    assert_eq!(rig.fs.ops() - before, 2, "one write, one sync");
    assert_eq!(outcomes.names(), [0, 1, 2, 3]);
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.read(A).expect("readable"), entries(1..3, 10));
    assert_eq!(rig.read(B).expect("readable"), entries(5..6, 10));
    assert_eq!(rig.recovery.replicas, [A, B]);
}

#[test]
fn state_ids_and_ranges() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    let state = rig.log.state(A).expect("known");
    assert_eq!((state.last, state.purged, state.first_index, state.bytes), (None, None, 0, 0));
    rig.append(A, 3..9, 100);
    rig.purge(A, 4);
    let state = rig.log.state(A).expect("known");
    assert_eq!(state.last, Some((8, entry(8, 0).id)));
    assert_eq!(state.purged, Some((4, entry(4, 0).id)));
    assert_eq!((state.first_index, state.bytes), (5, 400));
    let id_at = |index| rig.log.id_at(A, index).expect("known");
    assert_eq!(id_at(3), None);
    assert_eq!(id_at(4), Some(entry(4, 0).id));
    assert_eq!(id_at(8), Some(entry(8, 0).id));
    assert_eq!(id_at(9), None);
    let read = |range, bytes_max| rig.log.read(A, range, bytes_max).expect("readable");
    assert_eq!(read(0..100, usize::MAX), entries(5..9, 100));
    assert_eq!(read(6..8, usize::MAX), entries(6..8, 100));
    assert_eq!(read(6..8, 0), entries(6..7, 100), "at least one");
    assert_eq!(read(5..9, 250), entries(5..7, 100));
    assert_eq!(read(9..12, usize::MAX), []);
    assert_eq!(read(0..5, usize::MAX), []);
    // A snapshot came: the purge goes beyond the last entry.
    rig.purge(A, 20);
    let state = rig.log.state(A).expect("known");
    assert_eq!((state.last, state.first_index), (Some((20, entry(20, 0).id)), 21));
    let outcomes = Outcomes::default();
    rig.log.append(A, entries(22..23, 1), outcomes.done(0));
    assert!(matches!(*outcomes.error(), Error::Invalid { .. }));
    rig.append(A, 21..22, 1);
}

#[test]
fn wrong_calls_are_refused_and_change_nothing() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A, B]);
    rig.append(A, 1..3, 10);
    rig.log.destroy(B, well());
    rig.exec.run();
    let outcomes = Outcomes::default();
    let invalid = |what: &str| {
        let error = outcomes.error();
        assert!(matches!(*error, Error::Invalid { .. }), "{what}: {error}");
    };
    rig.log.create(A, outcomes.done(0));
    invalid("create of one that exists");
    rig.log.create(B, outcomes.done(0));
    invalid("create of one that was destroyed");
    rig.log.forget(A, outcomes.done(0));
    invalid("forget of one that lives");
    rig.log.append(A, entries(4..5, 1), outcomes.done(0));
    invalid("a gap");
    rig.log.append(A, vec![entry(3, 1), entry(3, 1)], outcomes.done(0));
    invalid("an index twice");
    rig.log.append(A, entries(2..3, 1), outcomes.done(0));
    invalid("over an entry that exists");
    rig.log.append(A, entries(3..4, 17 << 10), outcomes.done(0));
    invalid("an entry that is too large");
    rig.log.append(A, entries(u64::MAX - 1..u64::MAX, 1), outcomes.done(0));
    invalid("far away");
    for (what, call) in [
        ("destroy", Box::new(|done| rig.log.destroy(C, done)) as Box<dyn Fn(_)>),
        ("append", Box::new(|done| rig.log.append(C, entries(1..2, 1), done))),
        ("vote", Box::new(|done| rig.log.save_vote(C, Bytes::new(), done))),
        ("truncate", Box::new(|done| rig.log.truncate_after(C, None, done))),
        ("purge", Box::new(|done| rig.log.purge(C, 1, [0; 16], done))),
        ("append to a destroyed one", Box::new(|done| rig.log.append(B, vec![], done))),
    ] {
        call(outcomes.done(0));
        assert!(matches!(*outcomes.error(), Error::UnknownReplica(_)), "{what}");
    }
    assert!(matches!(rig.log.state(C), Err(Error::UnknownReplica(C))));
    assert_eq!(rig.read(A).expect("readable"), entries(1..3, 10));
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.read(A).expect("readable"), entries(1..3, 10));
    assert_eq!(
        (rig.recovery.replicas.as_slice(), rig.recovery.destroyed.as_slice()),
        ([A].as_slice(), [B].as_slice())
    );
}

#[test]
fn what_changes_nothing_is_still_answered_in_its_turn() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    rig.append(A, 1..5, 1);
    rig.purge(A, 2);
    let outcomes = Outcomes::default();
    rig.log.append(A, entries(5..6, 1), outcomes.done(0));
    rig.log.append(A, vec![], outcomes.done(1));
    rig.log.truncate_after(A, Some(9), outcomes.done(2));
    rig.log.purge(A, 1, [9; 16], outcomes.done(3));
    assert!(outcomes.take().is_empty());
    rig.exec.run();
    assert_eq!(outcomes.names(), [0, 1, 2, 3]);
    assert_eq!(rig.log.state(A).expect("known").purged, Some((2, entry(2, 0).id)));
}

#[test]
fn a_destroyed_replica_is_remembered_until_it_is_forgotten() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A, B]);
    rig.append(A, 1..5, 100);
    rig.log.destroy(A, well());
    rig.exec.run();
    let rig = rig.restart(Loss::All);
    assert_eq!((rig.recovery.replicas.clone(), rig.recovery.destroyed.clone()), (vec![B], vec![A]));
    rig.log.forget(A, well());
    rig.exec.run();
    let rig = rig.restart(Loss::All);
    assert_eq!((rig.recovery.replicas.clone(), rig.recovery.destroyed.clone()), (vec![B], vec![]));
}

#[test]
fn beyond_the_queue_there_is_no_room_then_appends_are_refused_and_control_later() {
    let options = LogOptions { queue_bytes: 20 << 10, ..LogOptions::test_min() };
    let rig = Rig::new(options).with(&[A]);
    let outcomes = Outcomes::default();
    let mut index = 1;
    let mut room_for = 0;
    while outcomes.is_empty() {
        room_for += u64::from(rig.log.has_room());
        rig.log.append(A, entries(index..index + 1, 1000), outcomes.done(index as usize));
        index += 1;
    }
    let refused = index - 1;
    assert!(matches!(*outcomes.error(), Error::Overloaded { .. }));
    assert!((15..=20).contains(&room_for), "{room_for}");
    assert!((280..=330).contains(&refused), "{refused}");
    assert_eq!(rig.log.state(A).expect("known").last.map(|(last, _)| last), Some(refused - 1));
    rig.log.save_vote(A, Bytes::from_static(b"vote"), outcomes.done(0));
    assert!(outcomes.is_empty(), "a vote still finds room");
    let mut votes = 1;
    while outcomes.is_empty() {
        rig.log.save_vote(A, Bytes::from(vec![0; 1000]), outcomes.done(0));
        votes += 1;
        assert!(votes < 1_000, "votes are bounded too");
    }
    assert!(matches!(*outcomes.error(), Error::Overloaded { .. }));
    rig.exec.run();
    assert_eq!(outcomes.names().len() as u64, refused - 1 + votes - 1);
    assert!(rig.log.has_room(), "once it is written");
    rig.append(A, refused..refused + 1, 1000);
}

#[test]
fn a_batch_is_bounded_and_a_larger_operation_gets_a_larger_segment() {
    let options =
        LogOptions { batch_bytes: 8 << 10, entry_bytes: 100 << 10, ..LogOptions::test_min() };
    let rig = Rig::new(options).with(&[A]);
    rig.append(A, 1..2, 90 << 10);
    let outcomes = Outcomes::default();
    for index in 2..10 {
        rig.log.append(A, entries(index..index + 1, 4000), outcomes.done(index as usize));
    }
    let before = rig.fs.ops();
    rig.exec.run();
    assert_eq!(outcomes.names(), (2..10).collect::<Vec<_>>());
    assert!(rig.fs.ops() - before >= 8, "several batches");
    let rig = rig.restart(Loss::All);
    let mut expected = entries(1..2, 90 << 10);
    expected.extend(entries(2..10, 4000));
    assert_eq!(rig.read(A).expect("readable"), expected);
}

#[test]
fn what_leaves_the_cache_is_read_back_from_disk() {
    let options =
        LogOptions { cache_bytes: 3000, log_bytes_target: 1 << 30, ..LogOptions::test_min() };
    let rig = Rig::new(options).with(&[A, B]);
    for index in 1..21 {
        rig.append(A, index..index + 1, 500);
        rig.append(B, index..index + 1, 100);
    }
    let stats = rig.log.stats();
    assert!(stats.cache_bytes <= 3000, "{stats:?}");
    assert!(stats.segments > 3, "{stats:?}");
    assert_eq!(rig.read(A).expect("readable"), entries(1..21, 500));
    assert_eq!(rig.read(B).expect("readable"), entries(1..21, 100));
    rig.fs.fail_reads(&segment(1), 0..u64::MAX);
    assert!(matches!(rig.read(A), Err(Error::Io { .. })), "entry 1 is on disk only");
    let newest = rig.log.read(A, 20..21, usize::MAX).expect("still in memory");
    assert_eq!(newest, entries(20..21, 500));
    rig.fs.heal_reads();
    assert_eq!(rig.read(A).expect("a read error is not damage"), entries(1..21, 500));
}

#[test]
fn what_is_not_written_stays_in_memory_beyond_the_cache() {
    let options = LogOptions { cache_bytes: 0, ..LogOptions::test_min() };
    let rig = Rig::new(options).with(&[A]);
    rig.log.append(A, entries(1..9, 1000), well());
    assert_eq!(rig.log.stats().cache_bytes, 8000);
    assert_eq!(rig.read(A).expect("readable"), entries(1..9, 1000));
    rig.exec.run();
    assert_eq!(rig.log.stats().cache_bytes, 0);
    assert_eq!(rig.read(A).expect("readable"), entries(1..9, 1000));
}

#[test]
fn a_probe_marks_the_last_batch_and_does_not_grow_an_idle_log() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    rig.append(A, 1..2, 10);
    rig.probe();
    let live = rig.log.stats().live_bytes;
    for _ in 0..100 {
        let before = rig.fs.ops();
        rig.probe();
        assert_eq!(rig.fs.ops() - before, 2, "a write and a sync");
    }
    assert_eq!(rig.log.stats().live_bytes, live);
    rig.append(A, 2..3, 10);
    let rig = rig.restart(Loss::All);
    assert_eq!(rig.read(A).expect("readable"), entries(1..3, 10));
}

#[test]
fn closing_finishes_what_is_queued_and_refuses_the_rest() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    let outcomes = Outcomes::default();
    rig.log.append(A, entries(1..2, 10), outcomes.done(1));
    rig.log.close();
    rig.log.append(A, entries(2..3, 10), outcomes.done(2));
    assert!(matches!(*outcomes.error(), Error::Stopped { .. }));
    rig.exec.run();
    assert_eq!(outcomes.names(), [1]);
    assert!(matches!(rig.log.state(A), Err(Error::Stopped { .. })));
    assert_eq!(rig.fatal.load(std::sync::atomic::Ordering::SeqCst), 0, "closing is not a failure");
}

#[test]
fn settings_that_cannot_work_are_refused() {
    for options in [
        LogOptions { segment_bytes: 4096, ..LogOptions::test_min() },
        LogOptions { queue_bytes: 8 << 10, ..LogOptions::test_min() },
        LogOptions { batch_bytes: 2 << 30, ..LogOptions::test_min() },
    ] {
        let fs = Arc::new(FaultyFs::new(1));
        let opened = Log::open(fs, StepExec::new(), DIR.as_ref(), options);
        assert!(matches!(opened, Err(Error::Invalid { .. })));
    }
}

const THREADS: u64 = 4;
const APPENDS: u64 = 40;

/// What one thread does with a replica of its own.
fn work(log: &Log, replica: ReplicaId) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let done = || {
        let sender = sender.clone();
        Box::new(move |outcome| sender.send(outcome).expect("the test listens"))
    };
    log.create(replica, done());
    for index in 1..=APPENDS {
        log.append(replica, entries(index..index + 1, 300), done());
        let seen = log.read(replica, index..index + 1, usize::MAX).expect("readable");
        assert_eq!(seen, entries(index..index + 1, 300));
        if index % 10 == 0 {
            log.save_vote(replica, Bytes::from(index.to_le_bytes().to_vec()), done());
        }
    }
    for _ in 0..1 + APPENDS + APPENDS / 10 {
        receiver.recv().expect("every operation is answered").expect("and went well");
    }
    check_work(log, replica);
}

fn check_work(log: &Log, replica: ReplicaId) {
    let seen = log.read(replica, 0..u64::MAX, usize::MAX).expect("readable");
    assert_eq!(seen, entries(1..APPENDS + 1, 300));
    let vote = log.state(replica).expect("known").vote;
    assert_eq!(vote.as_deref(), Some(APPENDS.to_le_bytes().as_slice()));
}

#[test]
#[allow(clippy::disallowed_methods, reason = "this test is about real threads")]
fn many_threads_on_real_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build();
    let runtime = runtime.expect("a runtime");
    let path = dir.path().join("node").join("log");
    let open = || {
        let exec = Arc::new(RealExec::new(runtime.handle().clone(), 1));
        let options = LogOptions { cache_bytes: 4000, ..LogOptions::test_min() };
        let opened = Log::open(Arc::new(RealFs), exec.clone(), &path, options);
        let (log, recovery) = opened.expect("the log opens");
        (log, recovery, exec)
    };
    let (log, _, exec) = open();
    std::thread::scope(|scope| {
        for thread in 1..=THREADS {
            let log = log.clone();
            scope.spawn(move || work(&log, ReplicaId(thread)));
        }
    });
    log.close();
    drop(log);
    runtime.block_on(exec.shutdown());
    let (log, recovery, exec) = open();
    assert_eq!(recovery.recovering, []);
    for thread in 1..=THREADS {
        check_work(&log, ReplicaId(thread));
    }
    drop(log);
    runtime.block_on(exec.shutdown());
}

#[test]
fn a_dropped_log_lets_go_of_its_worker() {
    let rig = Rig::new(LogOptions::test_min()).with(&[A]);
    let weak = Arc::downgrade(&rig.exec);
    rig.log.append(A, entries(1..2, 10), ignore());
    let Rig { log, exec, fs, options, .. } = rig;
    drop(log);
    exec.run();
    drop(exec);
    assert!(weak.upgrade().is_none());
    let rig = Rig::on(fs.crash(Loss::All), options).expect("opens");
    assert_eq!(
        rig.read(A).expect("readable"),
        entries(1..2, 10),
        "what was queued was still written"
    );
}

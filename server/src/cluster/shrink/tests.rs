//! What is merged by itself, and what is left as it is.

use coracle_proto::peer;

use super::*;
use crate::records::Operations;

const SHARDS: u64 = 5;

/// Five small and idle shards on one node, of which four were asked for.
fn world() -> (Snapshot, Knowledge, Instant) {
    let part = 1_u64 << 61;
    let shard = |id: u64| v1::Shard {
        id,
        start: id.saturating_sub(1) * part,
        end: if id == 0 || id == SHARDS { 0 } else { id * part },
        ..Default::default()
    };
    let node = v1::Node { id: 1, state: v1::NodeState::Active.into(), ..Default::default() };
    let map = v1::ShardMap {
        shards: (0..=SHARDS).map(shard).collect(),
        nodes: vec![node],
        ..Default::default()
    };
    let begun = Instant::now();
    let known = Knowledge {
        bytes: (0..=SHARDS).map(|shard| (shard, shard << 20)).collect(),
        loads: (0..=SHARDS).map(|shard| ((shard, 1), 10)).collect(),
        reported: [(1, begun)].into(),
        nodes: Some((vec![1], begun)),
        ..Knowledge::default()
    };
    let operations = Operations { shards_asked: SHARDS - 1, ..Operations::default() };
    let (leaving, ids) = (Vec::new(), peer::IdCounters::default());
    let snapshot = Snapshot { map, ids, leaving, operations, version: 1 };
    (snapshot, known, begun + Duration::from_secs(60))
}

/// Looks once a minute; after how many it found something.
fn found(
    shrinking: &mut Shrinking,
    (snapshot, known): (&Snapshot, &Knowledge),
    from: Instant,
    minutes: u64,
) -> Option<(u64, Pair)> {
    (0..minutes).find_map(|minute| {
        let at = from + Duration::from_secs(60 * minute);
        let next = shrinking.next(snapshot, known, (at, 60_000 * minute));
        next.map(|pair| (minute, pair))
    })
}

#[test]
fn the_smallest_neighbours_are_merged_when_they_were_idle_for_an_hour() {
    let (snapshot, mut known, now) = world();
    let mut shrinking = Shrinking::default();
    assert_eq!(found(&mut shrinking, (&snapshot, &known), now, 600), Some((60, (1, 2))));
    let later = now + Duration::from_secs(61 * 60);
    known.loads.insert((1, 1), 600);
    assert_eq!(found(&mut shrinking, (&snapshot, &known), later, 2), Some((0, (2, 3))));
    known.loads.insert((1, 1), 10);
    let once_more = later + Duration::from_secs(120);
    for shard in 3..=SHARDS {
        known.bytes.insert(shard, 1 << 30);
    }
    let next = found(&mut shrinking, (&snapshot, &known), once_more, 600);
    assert_eq!(next, Some((60, (1, 2))), "it has to last");
}

#[test]
fn what_is_large_busy_asked_for_or_turned_off_is_left_alone() {
    let look = |change: &dyn Fn(&mut Snapshot, &mut Knowledge)| {
        let (mut snapshot, mut known, now) = world();
        change(&mut snapshot, &mut known);
        found(&mut Shrinking::default(), (&snapshot, &known), now, 600).map(|(_, pair)| pair)
    };
    assert_eq!(look(&|_, _| ()), Some((1, 2)));
    assert_eq!(look(&|snapshot, _| snapshot.operations.shards_asked = SHARDS), None);
    assert_eq!(look(&|snapshot, _| snapshot.operations.shards_asked = 0), None, "nobody knows");
    assert_eq!(look(&|snapshot, _| snapshot.operations.manual = true), None);
    assert_eq!(look(&|snapshot, _| snapshot.operations.split_bytes = 4 << 20), None);
    assert_eq!(look(&|snapshot, _| snapshot.operations.split_load = 40), None);
    let large = |_: &mut Snapshot, known: &mut Knowledge| {
        known.bytes.values_mut().for_each(|bytes| *bytes += MERGE_BYTES_MAX / 2);
    };
    assert_eq!(look(&large), None, "no group takes in so much");
    let unknown = |_: &mut Snapshot, known: &mut Knowledge| {
        known.bytes.remove(&2);
    };
    assert_eq!(look(&unknown), None, "not before every size is known");
    let work = |snapshot: &mut Snapshot, _: &mut Knowledge| {
        let state = v1::OperationState::Running.into();
        snapshot.operations.list.push(v1::ClusterOperation { state, ..Default::default() });
    };
    assert_eq!(look(&work), None, "one thing after the other");
}

#[test]
fn what_could_not_be_merged_is_left_alone_for_a_while() {
    let (snapshot, known, now) = world();
    let mut shrinking = Shrinking::default();
    assert_eq!(found(&mut shrinking, (&snapshot, &known), now, 61), Some((60, (1, 2))));
    let then = now + Duration::from_secs(60 * 60);
    shrinking.refused((1, 2), then);
    let next = then + Duration::from_secs(60);
    assert_eq!(found(&mut shrinking, (&snapshot, &known), next, 1), Some((0, (2, 3))));
    let hour = then + Duration::from_secs(3_600);
    assert_eq!(found(&mut shrinking, (&snapshot, &known), hour, 1), Some((0, (1, 2))));
}

#[test]
fn what_was_begun_and_did_not_end_well_is_begun_again_later_and_later_whoever_leads() {
    const HOUR_MS: u64 = 3_600_000;
    for state in [v1::OperationState::Failed, v1::OperationState::Cancelled] {
        let (mut snapshot, known, begun) = world();
        let mut now_ms = 1_000_000;
        // A controller that has just begun to lead, and has seen all of them idle for an hour.
        let next = |snapshot: &Snapshot, now_ms: u64| {
            let mut shrinking = Shrinking::default();
            shrinking.next(snapshot, &known, (begun, now_ms));
            shrinking.next(snapshot, &known, (begun + QUIET_FOR, now_ms))
        };
        for wait in [1, 2, 4, 8, 16, 24, 24].map(|hours| hours * HOUR_MS) {
            assert_eq!(next(&snapshot, now_ms), Some((1, 2)));
            begin(&mut snapshot, (1, 2), now_ms).expect("nothing is against it");
            assert_eq!(next(&snapshot, now_ms), None, "it is under way");
            let operation = snapshot.operations.list.last_mut().expect("it has begun");
            (operation.state, operation.ended_ms) = (state.into(), now_ms);
            assert_eq!(
                next(&snapshot, now_ms + wait - 1),
                Some((2, 3)),
                "others are none the worse"
            );
            assert!(begin(&mut snapshot.clone(), (1, 2), now_ms + wait - 1).is_err());
            now_ms += wait;
        }
        // One that somebody asked for tells nothing of those.
        snapshot
            .operations
            .list
            .last_mut()
            .expect("it is there")
            .merge
            .as_mut()
            .expect("it is")
            .automatic = false;
        snapshot.operations.list.drain(..6);
        assert_eq!(may_begin(&snapshot.operations, (1, 2), 0), Some(0));
    }
}

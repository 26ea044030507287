//! What is split by itself, and where.

use coracle_proto::shard_map::ShardMap;

use super::*;
use crate::cluster::testing;

const SHARDS: u64 = 8;

/// Eight shards of equal arcs on three nodes; n1 leads the first three.
fn world() -> (Snapshot, Knowledge, Instant) {
    let part = 1_u64 << 61;
    let shard = |id: u64| v1::Shard {
        start: id.saturating_sub(1) * part,
        end: if id == 0 { 0 } else { id.wrapping_mul(part) },
        ..testing::shard(id)
    };
    let snapshot = testing::records((0..=SHARDS).map(shard), 3);
    ShardMap::from_proto(&snapshot.map).expect("a map");
    let begun = Instant::now();
    let known = Knowledge {
        bytes: (0..=SHARDS).map(|shard| (shard, 1 << 20)).collect(),
        leaders: (0..=SHARDS).map(|shard| (shard, 1 + shard.saturating_sub(1) / 3)).collect(),
        loads: (0..=SHARDS).map(|shard| ((shard, 1), 10)).collect(),
        reported: (1..=3).map(|node| (node, begun)).collect(),
        nodes: Some((vec![1, 2, 3], begun)),
        ..Knowledge::default()
    };
    (snapshot, known, begun + Duration::from_secs(60))
}

/// Looks for so many seconds.
fn found(
    growing: &mut Growing,
    (snapshot, known): (&Snapshot, &Knowledge),
    from: Instant,
    seconds: u64,
) -> Option<(u64, (u64, SplitBy))> {
    (0..seconds).find_map(|second| {
        let next = growing.next(snapshot, known, from + Duration::from_secs(second));
        next.map(|(shard, by)| (second, (shard.id, by)))
    })
}

#[test]
fn what_is_busy_for_a_minute_is_split_by_load() {
    let (snapshot, mut known, now) = world();
    let mut growing = Growing::default();
    assert_eq!(found(&mut growing, (&snapshot, &known), now, 300), None);
    known.loads.insert((2, 1), 5_000);
    let hot = now + Duration::from_secs(300);
    let next = found(&mut growing, (&snapshot, &known), hot, 300);
    assert_eq!(next, Some((60, (2, SplitBy::Load))));
    // It has to last.
    let again = hot + Duration::from_secs(100);
    assert_eq!(found(&mut growing, (&snapshot, &known), again, 40), None);
    known.loads.insert((2, 1), 10);
    assert_eq!(found(&mut growing, (&snapshot, &known), again + Duration::from_secs(42), 10), None);
    known.loads.insert((2, 1), 5_000);
    let once_more = again + Duration::from_secs(60);
    assert_eq!(found(&mut growing, (&snapshot, &known), once_more, 59), None);
}

#[test]
fn what_is_little_even_or_turned_off_is_left_alone() {
    let look = |change: &dyn Fn(&mut Snapshot, &mut Knowledge)| {
        let (mut snapshot, mut known, now) = world();
        known.loads.insert((2, 1), 5_000);
        change(&mut snapshot, &mut known);
        found(&mut Growing::default(), (&snapshot, &known), now, 200).map(|(_, what)| what)
    };
    assert_eq!(look(&|_, _| ()), Some((2, SplitBy::Load)));
    assert_eq!(look(&|_, known| known.loads.extend([((2, 1), 1_999)])), None, "it is little");
    assert_eq!(
        look(&|snapshot, known| {
            known.loads.extend([((2, 1), 1_999)]);
            snapshot.operations.split_load = 100;
        }),
        Some((2, SplitBy::Load)),
        "it may be set"
    );
    let same = |_: &mut Snapshot, known: &mut Knowledge| {
        known.loads.extend((1..=SHARDS).map(|shard| ((shard, 1), 5_000)));
    };
    assert_eq!(look(&same), None, "all have as much to do");
    assert_eq!(look(&|snapshot, _| snapshot.operations.manual = true), None);
    let one = |snapshot: &mut Snapshot, _: &mut Knowledge| snapshot.map.nodes.truncate(1);
    assert_eq!(look(&one), None, "there is nowhere to go");
    let work = |snapshot: &mut Snapshot, _: &mut Knowledge| {
        let state = v1::OperationState::Running.into();
        snapshot.operations.list.push(v1::ClusterOperation { state, ..Default::default() });
    };
    assert_eq!(look(&work), None, "one thing after the other");
    let large = |_: &mut Snapshot, known: &mut Knowledge| {
        known.loads.clear();
        known.bytes.insert(5, 64 << 30);
    };
    assert_eq!(look(&large), Some((5, SplitBy::Size)));
    let meta = |_: &mut Snapshot, known: &mut Knowledge| {
        known.loads = [((0, 1), 9_000)].into();
        known.bytes.insert(0, 64 << 30);
    };
    assert_eq!(look(&meta), None, "the meta group has no arc");
}

#[test]
fn what_could_not_be_split_is_said_and_left_alone_for_a_while() {
    let (snapshot, mut known, now) = world();
    known.bytes.insert(5, 64 << 30);
    let mut growing = Growing::default();
    assert_eq!(found(&mut growing, (&snapshot, &known), now, 1), Some((0, (5, SplitBy::Size))));
    growing.refused(5, "one entity".to_owned(), now);
    assert_eq!(growing.reasons(), [(5, "one entity".to_owned())].into());
    assert_eq!(found(&mut growing, (&snapshot, &known), now, 299), None);
    let later = now + Duration::from_secs(300);
    assert_eq!(found(&mut growing, (&snapshot, &known), later, 9), Some((0, (5, SplitBy::Size))));
    assert!(growing.reasons().is_empty());
}

fn buckets(loads: &[u64]) -> Vec<peer::LoadBucket> {
    let bucket = |(start, load): (u64, &u64)| peer::LoadBucket {
        start: 100 + start * 10,
        reads: load / 2,
        writes: load - load / 2,
    };
    (0..).zip(loads).map(bucket).collect()
}

#[test]
fn a_split_by_load_has_as_much_on_each_side_and_one_entity_is_not_split() {
    let shard = v1::Shard { id: 4, start: 100, end: 140, ..Default::default() };
    let at = |loads: &[u64]| {
        let points = peer::SplitPoints { load: buckets(loads), ..Default::default() };
        position(&shard, &points, SplitBy::Load)
    };
    assert_eq!(at(&[10, 10, 10, 10]), Ok(120));
    assert_eq!(at(&[40, 5, 5, 10]), Ok(110));
    assert_eq!(at(&[5, 5, 10, 40]), Ok(130));
    assert!(at(&[0, 0, 0, 0]).is_err_and(|why| why.contains("nothing to do")));
    let hot = at(&[1, 97, 1, 1]);
    assert!(hot.is_err_and(|why| why.contains("97 %") && why.contains("entity")));
    assert_eq!(at(&[20, 75, 3, 2]), Ok(110), "the neighbours get rid of it at least");
    let by_size = |by_size| {
        let points = peer::SplitPoints { by_size, ..Default::default() };
        position(&shard, &points, SplitBy::Size)
    };
    assert_eq!(by_size(Some(117)), Ok(117));
    assert!(by_size(None).is_err() && by_size(Some(100)).is_err() && by_size(Some(140)).is_err());
}

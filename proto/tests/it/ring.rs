//! The ring: the hash is the published one, and arcs add up.

use coracle_proto::ring::{Arc, Position, TilingError, check_tiling, equal_arcs, position};
use proptest::prelude::*;

#[test]
fn positions_are_the_published_ones() {
    let readme = include_str!("../../README.md");
    let rows = readme.lines().filter(|line| line.starts_with("| `") && line.ends_with("` |"));
    let mut checked = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let [_, seed, keyspace, hex, times, expected, _] = cells[..] else {
            continue;
        };
        let entity: Vec<u8> = (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        let entity = entity.repeat(times.parse().unwrap());
        let found = position(seed.parse().unwrap(), keyspace.parse().unwrap(), &entity);
        assert_eq!(found.to_string(), expected, "{row}");
        checked += 1;
    }
    assert_eq!(checked, 13, "vectors in README.md");
}

#[test]
fn equal_arcs_are_equal_and_tile() {
    for n in [1, 2, 3, 5, 16, 7_919] {
        let arcs = equal_arcs(n);
        assert_eq!(arcs.len(), n as usize);
        assert_eq!(check_tiling(arcs.iter().copied()), Ok(()));
        let shortest = arcs.iter().map(|arc| arc.length()).min().unwrap();
        let longest = arcs.iter().map(|arc| arc.length()).max().unwrap();
        assert!(longest - shortest <= 1, "{n}: {shortest} to {longest}");
    }
    assert_eq!(equal_arcs(1), [Arc::RING]);
    assert_eq!(equal_arcs(16)[15].start(), Position(0xf000_0000_0000_0000));
}

#[test]
fn the_ends_of_the_ring() {
    assert_eq!(Arc::RING.length(), 1 << 64);
    assert_eq!(Arc::RING.last(), Position(u64::MAX));
    assert!(Arc::RING.contains(Position(0)) && Arc::RING.contains(Position(u64::MAX)));
    let last = Arc::new(u64::MAX, 0).unwrap();
    assert_eq!((last.length(), last.middle()), (1, None));
    assert!(last.contains(Position(u64::MAX)) && !last.contains(Position(0)));
    assert_eq!(Arc::new(5, 5), None);
    assert_eq!(Arc::new(6, 5), None);
    assert_eq!(Arc::RING.middle(), Some(Position(1 << 63)));
    assert_eq!(Arc::RING.split(Position(0)), None);
    assert_eq!(Arc::RING.to_string(), "[0000000000000000, 2^64)");
}

#[test]
fn tilings_that_are_not() {
    let arc = |start, end| Arc::new(start, end).unwrap();
    let gap = |at| Err(TilingError::Gap(Position(at)));
    let overlap = |at| Err(TilingError::Overlap(Position(at)));
    assert_eq!(check_tiling([]), gap(0));
    assert_eq!(check_tiling([arc(1, 0)]), gap(0));
    assert_eq!(check_tiling([arc(0, 9)]), gap(9));
    assert_eq!(check_tiling([arc(0, 9), arc(10, 0)]), gap(9));
    assert_eq!(check_tiling([arc(0, 9), arc(8, 0)]), overlap(8));
    assert_eq!(check_tiling([arc(0, 9), arc(0, 9), arc(9, 0)]), overlap(0));
    assert_eq!(check_tiling([Arc::RING, arc(u64::MAX, 0)]), overlap(u64::MAX));
}

proptest! {
    #[test]
    fn splitting_loses_nothing(start: u64, end: u64, at: u64, probe: u64) {
        let Some(arc) = Arc::new(start, end) else { return Ok(()) };
        prop_assert_eq!(
            arc.contains(Position(probe)),
            probe >= start && (end == 0 || probe < end)
        );
        let middle = arc.middle();
        for at in [Some(Position(at)), middle].into_iter().flatten() {
            let Some((left, right)) = arc.split(at) else {
                prop_assert!(!arc.contains(at) || at == arc.start());
                continue;
            };
            prop_assert_eq!(left.length() + right.length(), arc.length());
            let probe = Position(probe);
            prop_assert_eq!(left.contains(probe) ^ right.contains(probe), arc.contains(probe));
            prop_assert!(left.last() < at && right.start() == at);
        }
        if let Some((left, right)) = middle.and_then(|middle| arc.split(middle)) {
            prop_assert!(right.length() - left.length() <= 1);
        }
    }

    #[test]
    fn any_cuts_tile(mut cuts in prop::collection::btree_set(1_u64.., 0..20)) {
        cuts.insert(0);
        let starts: Vec<u64> = cuts.into_iter().collect();
        let ends = starts.iter().skip(1).copied().chain([0]);
        let arcs: Vec<Arc> =
            starts.iter().zip(ends).map(|(start, end)| Arc::new(*start, end).unwrap()).collect();
        prop_assert_eq!(check_tiling(arcs.iter().copied()), Ok(()));
        for missing in 0..arcs.len() {
            let mut arcs = arcs.clone();
            arcs.remove(missing);
            prop_assert!(check_tiling(arcs).is_err());
        }
    }
}

//! Merges the shards' streams into one, in key order. Pure: says which lanes it needs more of, and
//! gives a key out only when no lane can still bring one before it.
//!
//! A lane may look far and find nothing, on a run of deleted keys: each page says how far it has looked,
//! and up to where all lanes have looked everything is known (the frontier).
//!
//! Memory: each lane holds at most the rest of one page and one page behind it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use coracle_proto::v1;

use crate::router::entry_bytes;

/// What an entry takes in memory beside its key and value: with small entries, most of it.
pub(crate) const ENTRY_OVERHEAD_BYTES: usize = 128;

/// Lanes of one direction, each in that order.
///
/// Invariants:
/// - `heads` has exactly the first key of every lane that holds one;
/// - `starved` has the lanes that hold none though more is to come, by how far each has looked;
/// - `unseen` counts those of them that have brought nothing yet.
pub(crate) struct Merge {
    reverse: bool,
    lanes: Vec<Lane>,
    heads: BTreeMap<Bytes, usize>,
    starved: BTreeSet<(Bytes, usize)>,
    unseen: usize,
    /// The key given out last.
    last: Option<Bytes>,
}

struct Lane {
    entries: VecDeque<v1::KeyValue>,
    bytes: usize,
    more: bool,
    /// The last key that was decided there, shown or not; empty before the first page.
    looked: Bytes,
}

/// A lane has brought a key twice, out of order, or one that another lane has, or has gone no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfOrder;

impl Merge {
    /// Lanes that have brought nothing yet.
    pub(crate) fn new(lanes: usize, reverse: bool) -> Merge {
        let lane = || Lane { entries: VecDeque::new(), bytes: 0, more: true, looked: Bytes::new() };
        Merge {
            reverse,
            lanes: (0..lanes).map(|_| lane()).collect(),
            heads: BTreeMap::new(),
            starved: (0..lanes).map(|at| (Bytes::new(), at)).collect(),
            unseen: lanes,
            last: None,
        }
    }

    /// Takes a lane's next page in; `more` when it is not the last. Then `looked` says how far it went:
    /// at least to its last entry.
    pub(crate) fn bring(
        &mut self,
        lane: usize,
        entries: Vec<v1::KeyValue>,
        more: bool,
        looked: Bytes,
    ) -> Result<(), OutOfOrder> {
        let into = &self.lanes[lane];
        assert!(into.more, "a lane that has ended brings nothing");
        if more {
            let entries_beyond =
                entries.last().is_some_and(|last| self.is_behind(&last.key, &looked));
            let further = match into.looked.is_empty() {
                true => !looked.is_empty(),
                false => self.is_behind(&looked, &into.looked),
            };
            if entries_beyond || !further {
                return Err(OutOfOrder);
            }
        }
        let into = &mut self.lanes[lane];
        let empty = into.entries.is_empty();
        into.bytes += entries.iter().map(entry_bytes).sum::<usize>();
        into.entries.extend(entries);
        into.more = more;
        let before = std::mem::replace(&mut into.looked, looked);
        if empty {
            self.unseen -= usize::from(before.is_empty());
            self.starved.remove(&(before, lane));
            self.show_head(lane)?;
        }
        Ok(())
    }

    /// The next key of all; `None` when a lane must bring more first, or all have ended.
    pub(crate) fn next(&mut self) -> Result<Option<v1::KeyValue>, OutOfOrder> {
        let head = if self.reverse { self.heads.last_entry() } else { self.heads.first_entry() };
        let Some(head) = head.map(|head| head.key().clone()) else {
            return Ok(None);
        };
        let known = self.frontier().is_some_and(|frontier| !self.is_behind(&head, frontier));
        if self.starved() && !known {
            return Ok(None);
        }
        let lane = self.heads.remove(&head).expect("it was found above");
        if self.last.as_ref().is_some_and(|last| !self.is_behind(&head, last)) {
            return Err(OutOfOrder);
        }
        self.last = Some(head);
        let from = &mut self.lanes[lane];
        let entry = from.entries.pop_front().expect("a lane with a head holds it");
        from.bytes -= entry_bytes(&entry);
        self.show_head(lane)?;
        Ok(Some(entry))
    }

    /// Whether a lane must bring more before all that is held can be given out.
    pub(crate) fn starved(&self) -> bool {
        !self.starved.is_empty()
    }

    /// Up to this key, in the direction of the lanes, none of them brings anything any more: what is not
    /// held does not exist. `None` when a lane has not looked at all, or none is starved.
    pub(crate) fn frontier(&self) -> Option<&Bytes> {
        let least = if self.reverse { self.starved.last() } else { self.starved.first() };
        least.filter(|_| self.unseen == 0).map(|(looked, _)| looked)
    }

    fn is_behind(&self, key: &Bytes, other: &Bytes) -> bool {
        if self.reverse { key < other } else { key > other }
    }

    /// The lanes with more to come that hold less than `low` bytes: those that would starve next are
    /// fed together with those that do.
    pub(crate) fn hungry(&self, low: usize) -> Vec<usize> {
        let hungry = |lane: &Lane| lane.more && (lane.entries.is_empty() || lane.bytes < low);
        let lanes = self.lanes.iter().enumerate();
        lanes.filter(|(_, lane)| hungry(lane)).map(|(at, _)| at).collect()
    }

    /// Memory that all lanes hold.
    pub(crate) fn held_bytes(&self) -> usize {
        let held = |lane: &Lane| lane.bytes + lane.entries.len() * ENTRY_OVERHEAD_BYTES;
        self.lanes.iter().map(held).sum()
    }

    fn show_head(&mut self, lane: usize) -> Result<(), OutOfOrder> {
        let Lane { entries, more, looked, .. } = &self.lanes[lane];
        match entries.front() {
            Some(first) => match self.heads.insert(first.key.clone(), lane) {
                None => Ok(()),
                Some(_) => Err(OutOfOrder),
            },
            None => {
                if *more {
                    self.starved.insert((looked.clone(), lane));
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(keys: &[&'static str]) -> Vec<v1::KeyValue> {
        keys.iter()
            .map(|key| v1::KeyValue { key: Bytes::from_static(key.as_bytes()), entry: None })
            .collect()
    }

    /// A lane that has looked no further than at its last entry.
    fn bring(merge: &mut Merge, lane: usize, keys: &[&'static str], more: bool) {
        let looked = keys.last().copied().unwrap_or_default();
        merge.bring(lane, page(keys), more, looked.into()).unwrap();
    }

    fn out(merge: &mut Merge) -> Vec<String> {
        let mut keys = Vec::new();
        while let Some(entry) = merge.next().unwrap() {
            keys.push(String::from_utf8_lossy(&entry.key).into_owned());
        }
        keys
    }

    #[test]
    fn lanes_come_out_in_order_and_wait_for_each_other() {
        let mut merge = Merge::new(3, false);
        bring(&mut merge, 0, &["b", "d"], true);
        bring(&mut merge, 1, &["a", "c", "e"], false);
        assert!(merge.starved() && out(&mut merge).is_empty(), "the third may bring anything");
        bring(&mut merge, 2, &[], false);
        assert_eq!(out(&mut merge), ["a", "b", "c", "d"]);
        assert!(merge.starved(), "the first may bring something before e");
        assert_eq!(merge.hungry(usize::MAX), [0]);
        bring(&mut merge, 0, &["f"], false);
        assert_eq!(out(&mut merge), ["e", "f"]);
        assert!(!merge.starved() && merge.held_bytes() == 0);
    }

    #[test]
    fn empty_page_that_is_not_the_last_keeps_its_lane_starved() {
        let mut merge = Merge::new(2, false);
        bring(&mut merge, 0, &["b"], false);
        merge.bring(1, page(&[]), true, "a".into()).unwrap();
        assert!(merge.starved() && out(&mut merge).is_empty());
        bring(&mut merge, 1, &["aa"], false);
        assert_eq!(out(&mut merge), ["aa", "b"]);
    }

    #[test]
    fn reverse_gives_the_last_first() {
        let mut merge = Merge::new(2, true);
        bring(&mut merge, 0, &["d", "b"], false);
        bring(&mut merge, 1, &["c"], false);
        assert_eq!(out(&mut merge), ["d", "c", "b"]);
    }

    #[test]
    fn key_twice_and_order_broken_are_found() {
        let mut merge = Merge::new(2, false);
        bring(&mut merge, 0, &["a"], false);
        assert_eq!(merge.bring(1, page(&["a"]), false, "a".into()), Err(OutOfOrder));
        let mut merge = Merge::new(1, false);
        bring(&mut merge, 0, &["b", "a"], false);
        merge.next().unwrap();
        assert!(merge.next().is_err());
    }

    #[test]
    fn what_all_lanes_have_looked_at_comes_out_though_one_has_found_nothing() {
        for reverse in [false, true] {
            let turned = |keys: [&'static str; 5]| {
                let mut keys = keys;
                if reverse {
                    keys.reverse();
                }
                keys
            };
            let [a, b, c, d, e] = turned(["a", "b", "c", "d", "e"]);
            let mut merge = Merge::new(3, reverse);
            bring(&mut merge, 0, &[a, c, e], false);
            assert_eq!(merge.frontier(), None);
            merge.bring(1, page(&[]), true, c.into()).unwrap();
            assert!(merge.frontier().is_none() && out(&mut merge).is_empty());
            merge.bring(2, page(&[b]), true, d.into()).unwrap();
            assert_eq!(out(&mut merge), [a, b, c], "all of them have looked so far");
            assert_eq!(merge.frontier(), Some(&Bytes::from(c)), "the least of what two have seen");
            merge.bring(1, page(&[]), true, e.into()).unwrap();
            assert!(out(&mut merge).is_empty());
            assert_eq!(merge.frontier(), Some(&Bytes::from(d)));
            merge.bring(2, page(&[]), false, Bytes::new()).unwrap();
            assert_eq!(out(&mut merge), [e]);
            merge.bring(1, page(&[]), false, Bytes::new()).unwrap();
            assert!(!merge.starved() && merge.frontier().is_none());
        }
    }

    /// One page as a scan makes it: after so many feeds it ends. The keys, where it stands, and
    /// whether it is the last.
    fn one_page(
        merge: &mut Merge,
        rest: &mut [VecDeque<(Bytes, bool)>],
        mut feeds: usize,
        mut random: impl FnMut(usize) -> usize,
    ) -> (Vec<Bytes>, Option<Bytes>, bool) {
        let mut found: Vec<Bytes> = Vec::new();
        let drained = loop {
            if found.len() == 5 {
                break false;
            } else if let Some(entry) = merge.next().unwrap() {
                found.push(entry.key);
            } else if !merge.starved() || feeds == 0 {
                break true;
            } else {
                feeds -= 1;
                for lane in merge.hungry(2) {
                    let from = &mut rest[lane];
                    let passed: Vec<_> = from.drain(..from.len().min(1 + random(6))).collect();
                    let looked = passed.last().map(|(key, _)| key.clone()).unwrap_or_default();
                    let shown = passed.into_iter().filter(|(_, shown)| *shown);
                    let entries = shown.map(|(key, _)| v1::KeyValue { key, entry: None }).collect();
                    merge.bring(lane, entries, !from.is_empty(), looked).unwrap();
                }
            }
        };
        let looked = merge.frontier().filter(|_| drained).cloned();
        let stands = looked.or_else(|| found.last().cloned());
        (found, stands, drained && !merge.starved())
    }

    #[test]
    fn whatever_the_pages_every_key_comes_once_in_order_also_over_resumptions() {
        let mut state = 7u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        for round in 0..300 {
            let reverse = round % 2 == 1;
            let mut lanes = [const { Vec::new() }; 3];
            let mut expected = Vec::new();
            for number in 0..60 {
                let number = if reverse { 59 - number } else { number };
                let (key, shown) = (Bytes::from(format!("{number:02}")), random(4) == 0);
                expected.extend(shown.then(|| key.clone()));
                lanes[random(3)].push((key, shown));
            }
            let (mut found, mut stands, mut over) = (Vec::new(), None::<Bytes>, false);
            while !over {
                // A new scan goes on behind the last page.
                let is_left = |key: &Bytes| {
                    let from = stands.as_ref();
                    from.is_none_or(|from| if reverse { key < from } else { key > from })
                };
                let left = |lane: &Vec<(Bytes, bool)>| {
                    lane.iter().filter(|(key, _)| is_left(key)).cloned().collect()
                };
                let mut rest: Vec<VecDeque<_>> = lanes.iter().map(left).collect();
                let mut merge = Merge::new(3, reverse);
                for _ in 0..=random(3) {
                    let feeds = 1 + random(3);
                    let page = one_page(&mut merge, &mut rest, feeds, &mut random);
                    found.extend(page.0);
                    assert!(page.2 || page.1.is_some(), "every page goes further");
                    (stands, over) = (page.1.or(stands), page.2);
                    if over {
                        break;
                    }
                }
            }
            assert_eq!(found, expected, "round {round}");
        }
    }

    #[test]
    fn lane_that_goes_no_further_or_brings_what_it_has_not_looked_at_is_found() {
        for (reverse, before, behind) in [(false, "a", "b"), (true, "b", "a")] {
            let mut merge = Merge::new(1, reverse);
            assert_eq!(merge.bring(0, page(&[]), true, Bytes::new()), Err(OutOfOrder));
            assert_eq!(merge.bring(0, page(&[behind]), true, before.into()), Err(OutOfOrder));
            merge.bring(0, page(&[]), true, before.into()).unwrap();
            assert_eq!(merge.bring(0, page(&[]), true, before.into()), Err(OutOfOrder));
            merge.bring(0, page(&[]), true, behind.into()).unwrap();
        }
    }

    #[test]
    fn only_lanes_below_the_mark_are_fed() {
        let mut merge = Merge::new(3, false);
        bring(&mut merge, 0, &["a", "b", "c"], true);
        bring(&mut merge, 1, &["d"], true);
        bring(&mut merge, 2, &["e"], false);
        assert_eq!(merge.hungry(2), [1]);
        assert_eq!(merge.hungry(9), [0, 1]);
        assert_eq!(merge.held_bytes(), 5 * (1 + ENTRY_OVERHEAD_BYTES));
    }
}

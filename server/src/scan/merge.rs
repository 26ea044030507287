//! Merges the shards' streams into one, in key order. Pure: says which lanes it needs more of, and
//! gives a key out only when no lane can still bring one before it.
//!
//! Memory: each lane holds at most the rest of one page and one page behind it.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use coracle_proto::v1;

use crate::router::entry_bytes;

/// What an entry takes in memory beside its key and value: with small entries, most of it.
pub(crate) const ENTRY_OVERHEAD_BYTES: usize = 128;

/// Lanes of one direction, each in that order.
///
/// Invariants:
/// - `heads` has exactly the first key of every lane that holds one;
/// - `starved` counts the lanes that hold none, though more is to come.
pub(crate) struct Merge {
    reverse: bool,
    lanes: Vec<Lane>,
    heads: BTreeMap<Bytes, usize>,
    starved: usize,
    /// The key given out last.
    last: Option<Bytes>,
}

struct Lane {
    entries: VecDeque<v1::KeyValue>,
    bytes: usize,
    more: bool,
}

/// A lane has brought a key twice, out of order, or one that another lane has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfOrder;

impl Merge {
    /// Lanes that have brought nothing yet.
    pub(crate) fn new(lanes: usize, reverse: bool) -> Merge {
        let lane = || Lane { entries: VecDeque::new(), bytes: 0, more: true };
        Merge {
            reverse,
            lanes: (0..lanes).map(|_| lane()).collect(),
            heads: BTreeMap::new(),
            starved: lanes,
            last: None,
        }
    }

    /// Takes a lane's next page in; `more` when it is not the last.
    pub(crate) fn bring(
        &mut self,
        lane: usize,
        entries: Vec<v1::KeyValue>,
        more: bool,
    ) -> Result<(), OutOfOrder> {
        let into = &mut self.lanes[lane];
        assert!(into.more, "a lane that has ended brings nothing");
        let empty = into.entries.is_empty();
        into.bytes += entries.iter().map(entry_bytes).sum::<usize>();
        into.entries.extend(entries);
        into.more = more;
        if empty {
            self.starved -= 1;
            self.show_head(lane)?;
        }
        Ok(())
    }

    /// The next key of all; `None` when a lane must bring more first, or all have ended.
    pub(crate) fn next(&mut self) -> Result<Option<v1::KeyValue>, OutOfOrder> {
        if self.starved > 0 {
            return Ok(None);
        }
        let head = if self.reverse { self.heads.pop_last() } else { self.heads.pop_first() };
        let Some((key, lane)) = head else {
            return Ok(None);
        };
        let in_order = self
            .last
            .as_ref()
            .is_none_or(|last| if self.reverse { key < *last } else { key > *last });
        if !in_order {
            return Err(OutOfOrder);
        }
        self.last = Some(key);
        let from = &mut self.lanes[lane];
        let entry = from.entries.pop_front().expect("a lane with a head holds it");
        from.bytes -= entry_bytes(&entry);
        self.show_head(lane)?;
        Ok(Some(entry))
    }

    /// Whether a lane must bring more before the next key is known.
    pub(crate) fn starved(&self) -> bool {
        self.starved > 0
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
        let Lane { entries, more, .. } = &self.lanes[lane];
        match entries.front() {
            Some(first) => match self.heads.insert(first.key.clone(), lane) {
                None => Ok(()),
                Some(_) => Err(OutOfOrder),
            },
            None => {
                self.starved += usize::from(*more);
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
        merge.bring(0, page(&["b", "d"]), true).unwrap();
        merge.bring(1, page(&["a", "c", "e"]), false).unwrap();
        assert!(merge.starved() && out(&mut merge).is_empty(), "the third may bring anything");
        merge.bring(2, page(&[]), false).unwrap();
        assert_eq!(out(&mut merge), ["a", "b", "c", "d"]);
        assert!(merge.starved(), "the first may bring something before e");
        assert_eq!(merge.hungry(usize::MAX), [0]);
        merge.bring(0, page(&["f"]), false).unwrap();
        assert_eq!(out(&mut merge), ["e", "f"]);
        assert!(!merge.starved() && merge.held_bytes() == 0);
    }

    #[test]
    fn empty_page_that_is_not_the_last_keeps_its_lane_starved() {
        let mut merge = Merge::new(2, false);
        merge.bring(0, page(&["b"]), false).unwrap();
        merge.bring(1, page(&[]), true).unwrap();
        assert!(merge.starved() && out(&mut merge).is_empty());
        merge.bring(1, page(&["a"]), false).unwrap();
        assert_eq!(out(&mut merge), ["a", "b"]);
    }

    #[test]
    fn reverse_gives_the_last_first() {
        let mut merge = Merge::new(2, true);
        merge.bring(0, page(&["d", "b"]), false).unwrap();
        merge.bring(1, page(&["c"]), false).unwrap();
        assert_eq!(out(&mut merge), ["d", "c", "b"]);
    }

    #[test]
    fn key_twice_and_order_broken_are_found() {
        let mut merge = Merge::new(2, false);
        merge.bring(0, page(&["a"]), false).unwrap();
        assert_eq!(merge.bring(1, page(&["a"]), false), Err(OutOfOrder));
        let mut merge = Merge::new(1, false);
        merge.bring(0, page(&["b", "a"]), false).unwrap();
        merge.next().unwrap();
        assert!(merge.next().is_err());
    }

    #[test]
    fn only_lanes_below_the_mark_are_fed() {
        let mut merge = Merge::new(3, false);
        merge.bring(0, page(&["a", "b", "c"]), true).unwrap();
        merge.bring(1, page(&["d"]), true).unwrap();
        merge.bring(2, page(&["e"]), false).unwrap();
        assert_eq!(merge.hungry(2), [1]);
        assert_eq!(merge.hungry(9), [0, 1]);
        assert_eq!(merge.held_bytes(), 5 * (1 + ENTRY_OVERHEAD_BYTES));
    }
}

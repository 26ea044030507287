//! Owns the check that answers are right while they are measured: every value says of which key it is,
//! and of some keys the sequence of its writes. Knows no system.
//!
//! Of every 64th key one caller is the only writer, so that its writes have an order: a read that begins
//! after one of them was acknowledged must find it or a later one. That is linearizability of a register
//! with one writer, for the price of two atomics on every 64th operation.

use std::sync::atomic::{AtomicU64, Ordering};

/// Of so many keys one is watched.
const EVERY: u64 = 64;

/// Length of what stands in front of a value.
pub const HEAD_BYTES: usize = 16;

/// Nothing can be said any more: it is not known which write came last.
const LOST: u64 = u64::MAX;

/// What one system was told, and may answer.
#[derive(Debug)]
pub struct Witness {
    keys: u64,
    watched: Vec<Watched>,
}

#[derive(Debug, Default)]
struct Watched {
    issued: AtomicU64,
    acknowledged: AtomicU64,
}

/// A write that was begun.
#[derive(Debug)]
pub struct Write {
    /// The key to write.
    pub number: u64,
    sequence: u64,
}

impl Write {
    /// What stands in front of the value.
    pub fn head(&self) -> [u8; HEAD_BYTES] {
        head(self.number, self.sequence)
    }
}

/// What stands in front of a value that was loaded.
pub fn loaded(number: u64) -> [u8; HEAD_BYTES] {
    head(number, 0)
}

fn head(number: u64, sequence: u64) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(&number.to_be_bytes());
    head[8..].copy_from_slice(&sequence.to_be_bytes());
    head
}

impl Witness {
    /// For a system with so many keys loaded.
    pub fn new(keys: u64) -> Witness {
        let watched = (0..keys / EVERY).map(|_| Watched::default()).collect();
        Witness { keys, watched }
    }

    fn of(&self, number: u64) -> Option<&Watched> {
        (number % EVERY == EVERY - 1).then(|| self.watched.get((number / EVERY) as usize)).flatten()
    }

    /// Begins a caller's write of a key, or of a watched key nearby that is this caller's.
    pub fn begin(&self, number: u64, caller: usize, callers: usize) -> Write {
        if self.of(number).is_none() {
            return Write { number, sequence: 0 };
        }
        let (place, callers) = (number / EVERY, callers as u64);
        let own = place - place % callers + caller as u64;
        match self.watched.get(own as usize) {
            Some(watched) => Write {
                number: own * EVERY + EVERY - 1,
                sequence: watched.issued.fetch_add(1, Ordering::SeqCst) + 1,
            },
            // The caller has no place among the last keys.
            None => Write { number: number - 1, sequence: 0 },
        }
    }

    /// A write was acknowledged, or not.
    pub fn end(&self, write: &Write, acknowledged: bool) {
        if write.sequence == 0 {
            return;
        }
        let Some(watched) = self.of(write.number) else { return };
        if watched.acknowledged.load(Ordering::SeqCst) != LOST {
            // One whose outcome is open may come after the next: then nothing is known of the key.
            let now = if acknowledged { write.sequence } else { LOST };
            watched.acknowledged.store(now, Ordering::SeqCst);
        }
    }

    /// What a read that begins now must find at least.
    pub fn floor(&self, number: u64) -> u64 {
        self.of(number).map_or(0, |watched| watched.acknowledged.load(Ordering::SeqCst))
    }

    /// Whether a read may have found this; what is wrong, otherwise.
    pub fn judge(&self, number: u64, floor: u64, found: Option<&[u8]>) -> Result<(), &'static str> {
        let Some(value) = found else {
            // One that is being inserted may not be there yet.
            return if number < self.keys { Err("wrong: a key is gone") } else { Ok(()) };
        };
        let Some(of) = value.first_chunk() else { return Ok(()) };
        if u64::from_be_bytes(*of) != number {
            return Err("wrong: the value of another key");
        }
        let (Some(watched), Some(sequence)) = (self.of(number), value.get(8..16)) else {
            return Ok(());
        };
        let sequence = sequence.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        if floor != LOST && sequence < floor {
            return Err("wrong: an acknowledged write is not there");
        }
        if sequence > watched.issued.load(Ordering::SeqCst) {
            return Err("wrong: a write that nobody made");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_foreign_and_invented_values_are_seen() {
        let witness = Witness::new(1_000);
        let judge = |number, floor, head: [u8; 16]| witness.judge(number, floor, Some(&head));
        assert_eq!(judge(5, 0, loaded(5)), Ok(()));
        assert!(judge(5, 0, loaded(6)).is_err_and(|wrong| wrong.contains("another key")));
        assert!(witness.judge(5, 0, None).is_err_and(|wrong| wrong.contains("gone")));
        assert_eq!(witness.judge(1_000, 0, None), Ok(()), "it may not have been added yet");

        let before = witness.floor(63);
        let first = witness.begin(63, 0, 4);
        assert_eq!(first.number, 63);
        assert_eq!(judge(63, before, first.head()), Ok(()), "under way it may be seen or not");
        assert_eq!(judge(63, before, loaded(63)), Ok(()));
        witness.end(&first, true);
        let floor = witness.floor(63);
        assert_eq!(judge(63, floor, first.head()), Ok(()));
        assert!(judge(63, floor, loaded(63)).is_err_and(|wrong| wrong.contains("acknowledged")));
        assert!(judge(63, floor, head(63, 2)).is_err_and(|wrong| wrong.contains("nobody")));

        let open = witness.begin(63, 0, 4);
        witness.end(&open, false);
        witness.end(&witness.begin(63, 0, 4), true);
        assert_eq!(judge(63, witness.floor(63), loaded(63)), Ok(()), "its order is not known");
    }

    #[test]
    fn a_watched_key_has_one_writer() {
        let witness = Witness::new(64 * 10);
        for number in 0..640 {
            let writers: Vec<usize> = (0..4)
                .filter(|caller| witness.begin(number, *caller, 4).number == number)
                .collect();
            match number % 64 {
                63 => assert!(writers.len() <= 1, "{number}: {writers:?}"),
                _ => assert_eq!(writers.len(), 4),
            }
        }
        // Short values say nothing, and are not found wrong.
        assert_eq!(witness.judge(63, 9, Some(b"short")), Ok(()));
    }
}

//! Owns what the callers do: which operation, on which key, with which value. Pure but for the seed;
//! when they do it is `schedule`'s and `load`'s.

use bytes::Bytes;
use coracle_proto::limits::VALUE_BYTES_MAX;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use crate::failure::Failure;

/// Values are cut from a block that is longer by this, at any place: no two need be equal, and none
/// costs more than a reference.
const VALUE_VARIETY: usize = 64 << 10;

/// What an operation is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Writes a key.
    Put,
    /// Reads a key, linearizably.
    Get,
}

/// What a load does.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Of a hundred operations so many are reads: 0 to 100.
    pub reads_percent: u32,
    /// How many keys there are, all equally likely.
    pub keys: u64,
    value_bytes: usize,
    block: Bytes,
    seed: u64,
}

/// One caller's choices. Two callers choose independently of each other.
#[derive(Debug)]
pub struct Choices {
    workload: Workload,
    random: StdRng,
}

impl Workload {
    /// A workload in which everything follows from the seed.
    pub fn new(
        reads_percent: u32,
        keys: u64,
        value_bytes: usize,
        seed: u64,
    ) -> Result<Workload, Failure> {
        if reads_percent > 100 || keys == 0 {
            return Err(Failure::new("there must be 0 to 100 percent of reads, and a key"));
        }
        if value_bytes > VALUE_BYTES_MAX {
            let text = format!("a value has at most {VALUE_BYTES_MAX} bytes, not {value_bytes}");
            return Err(Failure::new(text));
        }
        // Random, so that compression does not make the disk look faster than it is.
        let mut block = vec![0; value_bytes + VALUE_VARIETY];
        StdRng::seed_from_u64(seed).fill_bytes(&mut block);
        Ok(Workload { reads_percent, keys, value_bytes, block: block.into(), seed })
    }

    /// The key of a number below [`Workload::keys`].
    pub fn key(&self, number: u64) -> Bytes {
        format!("bench/{number:010}").into()
    }

    /// The choices of a caller.
    pub fn choices(&self, caller: usize) -> Choices {
        let random = StdRng::seed_from_u64(self.seed ^ (caller as u64 + 1).rotate_left(32));
        Choices { workload: self.clone(), random }
    }
}

impl Choices {
    /// What to do next.
    pub fn next_kind(&mut self) -> Kind {
        match self.random.random_range(0..100) < self.workload.reads_percent {
            true => Kind::Get,
            false => Kind::Put,
        }
    }

    /// Some key.
    pub fn key(&mut self) -> Bytes {
        let number = self.random.random_range(0..self.workload.keys);
        self.workload.key(number)
    }

    /// Some value.
    pub fn value(&mut self) -> Bytes {
        let from = self.random.random_range(0..=VALUE_VARIETY);
        self.workload.block.slice(from..from + self.workload.value_bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn choices_follow_from_the_seed_and_the_caller() {
        let workload = |seed| Workload::new(30, 50, 100, seed).unwrap();
        let take = |seed, caller| {
            let mut choices = workload(seed).choices(caller);
            let one = |_| (choices.next_kind() == Kind::Get, choices.key(), choices.value());
            (0..1_000).map(one).collect::<Vec<_>>()
        };
        assert_eq!(take(1, 7), take(1, 7));
        assert_ne!(take(1, 7), take(1, 8));
        assert_ne!(take(1, 7), take(2, 7));
        let taken = take(1, 7);
        let reads = taken.iter().filter(|(is_read, ..)| *is_read).count();
        assert!((250..350).contains(&reads), "{reads}");
        let keys: BTreeSet<&Bytes> = taken.iter().map(|(_, key, _)| key).collect();
        assert_eq!(keys.len(), 50);
        assert!(taken.iter().all(|(.., value)| value.len() == 100));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(Workload::new(101, 1, 1, 0).is_err());
        assert!(Workload::new(0, 0, 1, 0).is_err());
        assert!(Workload::new(0, 1, VALUE_BYTES_MAX + 1, 0).is_err());
        let only = |reads| Workload::new(reads, 1, 0, 0).unwrap().choices(0).next_kind();
        assert_eq!((only(0), only(100)), (Kind::Put, Kind::Get));
    }
}

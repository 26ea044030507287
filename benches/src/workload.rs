//! Owns what the callers do: which operation, on which key, with which value. Pure but for the seed and
//! for the count of keys that a load has added; when they do it is `schedule`'s and `load`'s.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use coracle_proto::limits::VALUE_BYTES_MAX;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use crate::failure::Failure;

/// Values are filled from a block that is longer by this, from any place: hardly two are equal.
const VALUE_VARIETY: usize = 64 << 10;

/// Keys of a short scan: 1 to so many, as YCSB has it.
const SCAN_KEYS_MAX: u64 = 100;

/// YCSB's skew: of a million keys the first gets 7 % of the operations.
const ZIPFIAN: f64 = 0.99;

/// What an operation is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub enum Kind {
    /// Reads a key, linearizably.
    Get,
    /// Writes a key that is there.
    Put,
    /// Writes a new key.
    Insert,
    /// Reads 1 to 100 keys from one on.
    Scan,
    /// Reads a key, then writes it.
    Modify,
}

impl Kind {
    /// All of them, in the order of [`Mix`].
    pub const ALL: [Kind; 5] = [Kind::Get, Kind::Put, Kind::Insert, Kind::Scan, Kind::Modify];

    /// As in tables.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Get => "get",
            Kind::Put => "put",
            Kind::Insert => "insert",
            Kind::Scan => "scan",
            Kind::Modify => "read-modify-write",
        }
    }
}

/// Of a hundred operations so many of each kind, in the order of [`Kind::ALL`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mix(pub [u32; 5]);

impl Mix {
    /// Reads and writes only.
    pub fn reads(percent: u32) -> Mix {
        Mix([percent, 100_u32.saturating_sub(percent), 0, 0, 0])
    }
}

/// How keys are chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Distribution {
    /// All equally likely.
    Uniform,
    /// A few are hot (0.99), spread over all.
    Zipfian,
    /// The newest are hot.
    Latest,
}

/// One of YCSB's core workloads, `a` to `f`.
pub fn ycsb(letter: char) -> Option<(Mix, Distribution)> {
    Some(match letter.to_ascii_lowercase() {
        'a' => (Mix([50, 50, 0, 0, 0]), Distribution::Zipfian),
        'b' => (Mix([95, 5, 0, 0, 0]), Distribution::Zipfian),
        'c' => (Mix([100, 0, 0, 0, 0]), Distribution::Zipfian),
        'd' => (Mix([95, 0, 5, 0, 0]), Distribution::Latest),
        'e' => (Mix([0, 0, 5, 95, 0]), Distribution::Zipfian),
        'f' => (Mix([50, 0, 0, 0, 50]), Distribution::Zipfian),
        _ => return None,
    })
}

/// What a load does. Clones share the count of keys that were added.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What is done.
    pub mix: Mix,
    /// On which keys.
    pub distribution: Distribution,
    /// How many keys there are before it begins.
    pub keys: u64,
    value_bytes: usize,
    block: Bytes,
    seed: u64,
    zipfian: Option<Arc<Zipfian>>,
    /// Where the next new key goes: shared by all loads on one set of keys.
    added: Arc<AtomicU64>,
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
        mix: Mix,
        distribution: Distribution,
        keys: u64,
        value_bytes: usize,
        seed: u64,
    ) -> Result<Workload, Failure> {
        if mix.0.iter().sum::<u32>() != 100 || keys == 0 {
            return Err(Failure::new(
                "the shares must be 100 percent together, and there is a key",
            ));
        }
        if value_bytes > VALUE_BYTES_MAX {
            let text = format!("a value has at most {VALUE_BYTES_MAX} bytes, not {value_bytes}");
            return Err(Failure::new(text));
        }
        // Random, so that compression does not make the disk look faster than it is.
        let mut block = vec![0; value_bytes + VALUE_VARIETY];
        StdRng::seed_from_u64(seed).fill_bytes(&mut block);
        let added = Arc::new(AtomicU64::new(0));
        let zipfian = zipfian_of(distribution, keys);
        Ok(Workload {
            mix,
            distribution,
            keys,
            value_bytes,
            block: block.into(),
            seed,
            zipfian,
            added,
        })
    }

    /// The same keys and values under another load.
    pub fn doing(&self, mix: Mix, distribution: Distribution) -> Workload {
        let zipfian = match (&self.zipfian, distribution) {
            (Some(known), Distribution::Zipfian | Distribution::Latest) => Some(known.clone()),
            _ => zipfian_of(distribution, self.keys),
        };
        Workload { mix, distribution, zipfian, ..self.clone() }
    }

    /// The same, with new keys counted there.
    pub fn adding_to(&self, added: Arc<AtomicU64>) -> Workload {
        Workload { added, ..self.clone() }
    }

    /// The key of a number, 16 bytes; in the order of the numbers.
    pub fn key(&self, number: u64) -> Bytes {
        key(number)
    }

    /// Length of a value.
    pub fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    /// The choices of a caller.
    pub fn choices(&self, caller: usize) -> Choices {
        let random = StdRng::seed_from_u64(self.seed ^ (caller as u64 + 1).rotate_left(32));
        Choices { workload: self.clone(), random }
    }
}

fn zipfian_of(distribution: Distribution, keys: u64) -> Option<Arc<Zipfian>> {
    (distribution != Distribution::Uniform).then(|| Arc::new(Zipfian::new(keys)))
}

/// The key of a number.
pub fn key(number: u64) -> Bytes {
    let mut key = *b"key/000000000000";
    let mut left = number;
    for digit in key[4..].iter_mut().rev() {
        *digit = b'0' + (left % 10) as u8;
        left /= 10;
    }
    Bytes::copy_from_slice(&key)
}

impl Choices {
    /// What to do next.
    pub fn next_kind(&mut self) -> Kind {
        let mut left = self.random.random_range(0..100);
        for (kind, share) in Kind::ALL.into_iter().zip(self.workload.mix.0) {
            if left < share {
                return kind;
            }
            left -= share;
        }
        unreachable!("the shares are a hundred together")
    }

    /// The number of some key that is there.
    pub fn number(&mut self) -> u64 {
        let keys = self.workload.keys;
        let Some(zipfian) = &self.workload.zipfian else {
            return self.random.random_range(0..keys);
        };
        let rank = zipfian.rank(self.random.random::<f64>());
        match self.workload.distribution {
            Distribution::Latest => {
                let all = keys + self.workload.added.load(Ordering::Relaxed);
                all.saturating_sub(1 + rank)
            }
            // Which keys are hot has nothing to do with their order.
            _ => scatter(rank) % keys,
        }
    }

    /// The number of a new key.
    pub fn new_number(&mut self) -> u64 {
        self.workload.keys + self.workload.added.fetch_add(1, Ordering::Relaxed)
    }

    /// How many keys the next scan reads.
    pub fn scan_keys(&mut self) -> u64 {
        self.random.random_range(1..=SCAN_KEYS_MAX)
    }

    /// Some value that begins with `head`, as far as it is long enough.
    pub fn value(&mut self, head: &[u8]) -> Bytes {
        let (bytes, from) =
            (self.workload.value_bytes, self.random.random_range(0..=VALUE_VARIETY));
        let filling = &self.workload.block[from..from + bytes];
        if bytes < head.len() {
            return Bytes::copy_from_slice(&head[..bytes]);
        }
        let mut value = Vec::with_capacity(bytes);
        value.extend_from_slice(head);
        value.extend_from_slice(&filling[head.len()..]);
        value.into()
    }
}

/// Ranks 0, 1, … with falling probability, by Gray's method, as YCSB draws them.
#[derive(Debug)]
struct Zipfian {
    items: f64,
    alpha: f64,
    zeta: f64,
    eta: f64,
}

impl Zipfian {
    fn new(items: u64) -> Zipfian {
        let zeta_of = |count: u64| (1..=count).map(|n| (n as f64).powf(-ZIPFIAN)).sum::<f64>();
        let (zeta, items) = (zeta_of(items), items as f64);
        let eta = (1.0 - (2.0 / items).powf(1.0 - ZIPFIAN)) / (1.0 - zeta_of(2) / zeta);
        Zipfian { items, alpha: 1.0 / (1.0 - ZIPFIAN), zeta, eta }
    }

    /// The rank that a number in `[0, 1)` stands for.
    fn rank(&self, uniform: f64) -> u64 {
        let scaled = uniform * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5_f64.powf(ZIPFIAN) {
            return 1.min(self.items as u64 - 1);
        }
        let rank = self.items * (self.eta * uniform - self.eta + 1.0).powf(self.alpha);
        (rank as u64).min(self.items as u64 - 1)
    }
}

/// A permutation of the 64-bit numbers without any order to be seen (splitmix64's last steps).
fn scatter(number: u64) -> u64 {
    let mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn uniform(reads: u32, keys: u64, value: usize, seed: u64) -> Workload {
        Workload::new(Mix::reads(reads), Distribution::Uniform, keys, value, seed).unwrap()
    }

    #[test]
    fn choices_follow_from_the_seed_and_the_caller() {
        let take = |seed, caller| {
            let mut choices = uniform(30, 50, 100, seed).choices(caller);
            let one = |_| (choices.next_kind(), choices.number(), choices.value(b"head"));
            (0..1_000).map(one).collect::<Vec<_>>()
        };
        assert_eq!(take(1, 7), take(1, 7));
        assert_ne!(take(1, 7), take(1, 8));
        assert_ne!(take(1, 7), take(2, 7));
        let taken = take(1, 7);
        let reads = taken.iter().filter(|(kind, ..)| *kind == Kind::Get).count();
        assert!((250..350).contains(&reads), "{reads}");
        let keys: BTreeSet<u64> = taken.iter().map(|(_, key, _)| *key).collect();
        assert_eq!(keys.len(), 50);
        assert!(taken.iter().all(|(.., value)| value.len() == 100 && value.starts_with(b"head")));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let new = |mix, keys, value| Workload::new(mix, Distribution::Uniform, keys, value, 0);
        assert!(new(Mix::reads(101), 1, 1).is_err());
        assert!(new(Mix::reads(0), 0, 1).is_err());
        assert!(new(Mix::reads(0), 1, VALUE_BYTES_MAX + 1).is_err());
        let only = |reads| uniform(reads, 1, 0, 0).choices(0).next_kind();
        assert_eq!((only(0), only(100)), (Kind::Put, Kind::Get));
        assert_eq!(uniform(0, 1, 3, 0).choices(0).value(b"longer"), "lon");
    }

    #[test]
    fn keys_are_in_the_order_of_their_numbers() {
        assert_eq!(key(0), "key/000000000000");
        assert_eq!(key(123_456_789_012), "key/123456789012");
        assert!(key(99) < key(100) && key(100).len() == 16);
    }

    #[test]
    fn zipfian_is_as_skewed_as_it_says() {
        let keys = 1_000_000;
        let (mix, _) = ycsb('c').unwrap();
        let workload = Workload::new(mix, Distribution::Zipfian, keys, 8, 1).unwrap();
        let mut choices = workload.choices(0);
        let mut counts: BTreeMap<u64, u32> = BTreeMap::new();
        let draws = 200_000;
        (0..draws).for_each(|_| *counts.entry(choices.number()).or_default() += 1);
        let mut by_count: Vec<u32> = counts.values().copied().collect();
        by_count.sort_unstable_by(|a, b| b.cmp(a));
        let share = |count: u32| f64::from(count) / f64::from(draws);
        // 1 / zeta(1 M, 0.99) = 6.5 %, the second half of it, and a third of all within 100 keys.
        assert!((share(by_count[0]) - 0.065).abs() < 0.005, "{}", by_count[0]);
        assert!((share(by_count[1]) - 0.033).abs() < 0.004, "{}", by_count[1]);
        let hundred: u32 = by_count[..100].iter().sum();
        assert!((0.30..0.40).contains(&share(hundred)), "{hundred}");
        let hottest = counts.iter().max_by_key(|(_, count)| **count).unwrap();
        assert!(*hottest.0 > 100, "hot keys lie anywhere");
    }

    #[test]
    fn the_newest_keys_are_hot_and_new_ones_follow() {
        let (mix, distribution) = ycsb('d').unwrap();
        let workload = Workload::new(mix, distribution, 10_000, 8, 1).unwrap();
        let mut choices = workload.choices(0);
        assert_eq!((choices.new_number(), choices.new_number()), (10_000, 10_001));
        let other = workload.doing(Mix::reads(0), Distribution::Uniform);
        assert_eq!(other.choices(1).new_number(), 10_002, "loads on one set of keys share it");
        let newest = (0..1_000).filter(|_| choices.number() > 9_900).count();
        assert!(newest > 400, "{newest}");
        assert!((0..1_000).all(|_| choices.number() <= 10_002));
    }

    #[test]
    fn all_of_ycsb_is_there() {
        for letter in 'a'..='f' {
            let (mix, distribution) = ycsb(letter).unwrap();
            Workload::new(mix, distribution, 10, 8, 1).unwrap();
        }
        assert_eq!(ycsb('g'), None);
    }
}

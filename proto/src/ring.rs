//! Owns the ring: positions, arcs, and the hash that places an entity. Does not know shards (see
//! [`crate::shard_map`]).

use std::fmt;

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// A point on the ring `0 ..= u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Where an entity lives: XXH3-64 with the cluster's seed over the keyspace id (4 bytes, big-endian)
/// followed by the entity. Frozen, with test vectors in the crate's README, so that a client in any
/// language finds the same place. Not a keyed hash: who knows the seed can aim at one shard.
pub fn position(seed: u64, keyspace_id: u32, entity: &[u8]) -> Position {
    /// XXH3 leaves its short forms at 240 bytes; up to there one call over a copy on the stack
    /// beats its streaming state, which is four times as large.
    const SHORT: usize = 240;
    let prefix = keyspace_id.to_be_bytes();
    let len = prefix.len() + entity.len();
    if len <= SHORT {
        let mut bytes = [0; SHORT];
        bytes[..prefix.len()].copy_from_slice(&prefix);
        bytes[prefix.len()..len].copy_from_slice(entity);
        return Position(xxh3_64_with_seed(&bytes[..len], seed));
    }
    let mut hash = Xxh3::with_seed(seed);
    hash.update(&prefix);
    hash.update(entity);
    Position(hash.digest())
}

/// A non-empty stretch `[start, end)` of the ring. It does not wrap.
///
/// Invariants:
/// - `end = 0` means 2⁶⁴;
/// - `start < end`, read so. The whole ring is `[0, 0)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arc {
    start: u64,
    end: u64,
}

impl Arc {
    /// The whole ring.
    pub const RING: Arc = Arc { start: 0, end: 0 };

    /// `None` unless `start < end`, where `end = 0` means 2⁶⁴.
    pub fn new(start: u64, end: u64) -> Option<Arc> {
        (end == 0 || start < end).then_some(Arc { start, end })
    }

    /// The first position.
    pub fn start(self) -> Position {
        Position(self.start)
    }

    /// One past the last position; 0 means 2⁶⁴.
    pub fn end(self) -> u64 {
        self.end
    }

    /// The last position.
    pub fn last(self) -> Position {
        Position(self.end.wrapping_sub(1))
    }

    /// Whether the position lies in the arc.
    pub fn contains(self, position: Position) -> bool {
        (self.start..=self.end.wrapping_sub(1)).contains(&position.0)
    }

    /// Positions in the arc, 1 to 2⁶⁴.
    pub fn length(self) -> u128 {
        u128::from(self.end.wrapping_sub(1) - self.start) + 1
    }

    /// Cuts the arc in two, the second beginning at `at`. `None` when one of them would be empty.
    pub fn split(self, at: Position) -> Option<(Arc, Arc)> {
        let inside = self.contains(at) && at.0 != self.start;
        inside.then_some((Arc { start: self.start, end: at.0 }, Arc { start: at.0, end: self.end }))
    }

    /// Where a split in halves cuts. `None` for an arc of one position.
    pub fn middle(self) -> Option<Position> {
        let half = (self.length() / 2) as u64;
        (half > 0).then(|| Position(self.start + half))
    }
}

impl fmt::Display for Arc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.end {
            0 => write!(f, "[{:016x}, 2^64)", self.start),
            end => write!(f, "[{:016x}, {end:016x})", self.start),
        }
    }
}

/// Cuts the ring into `n` arcs whose lengths differ by at most one position, in ring order.
///
/// # Panics
/// When `n` is 0.
pub fn equal_arcs(n: u32) -> Vec<Arc> {
    assert!(n > 0, "a ring of no arcs tiles nothing");
    let n = u128::from(n);
    // The last cut is 2^64, which wraps to the 0 that means it.
    let cut = |i: u128| ((i << 64) / n) as u64;
    (0..n).map(|i| Arc { start: cut(i), end: cut(i + 1) }).collect()
}

/// The arcs do not tile the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TilingError {
    /// Nothing covers this position.
    #[error("no arc covers position {0}")]
    Gap(Position),
    /// At least two arcs cover this position.
    #[error("two arcs cover position {0}")]
    Overlap(Position),
}

/// The arcs, given in ring order, tile the ring exactly: every position lies in one and only one.
pub fn check_tiling(arcs: impl IntoIterator<Item = Arc>) -> Result<(), TilingError> {
    let mut covered: Option<Arc> = None;
    for arc in arcs {
        let next = match covered {
            None => 0,
            // Reached 2^64 already.
            Some(Arc { end: 0, .. }) => return Err(TilingError::Overlap(arc.start())),
            Some(before) => before.end,
        };
        if arc.start > next {
            return Err(TilingError::Gap(Position(next)));
        }
        if arc.start < next {
            return Err(TilingError::Overlap(arc.start()));
        }
        covered = Some(arc);
    }
    match covered {
        Some(Arc { end: 0, .. }) => Ok(()),
        last => Err(TilingError::Gap(Position(last.map_or(0, |arc| arc.end)))),
    }
}

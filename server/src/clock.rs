//! Owns wall time: the seam for it, and how far this node's clock lies from those of its peers. Does
//! not set clocks, and measures no durations (the runtime's clock does).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_raft::types::NodeId;
use parking_lot::Mutex;
use tokio::time::Instant;

/// The seam for wall time. The simulation's may jump, drift and stand still.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since 1970.
    fn now_ms(&self) -> u64;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealClock;

impl Clock for RealClock {
    fn now_ms(&self) -> u64 {
        #[allow(clippy::disallowed_methods, reason = "this is the seam")]
        let now = std::time::SystemTime::now();
        // Before 1970 means that it was never set: 0 is then as far out of bound as can be.
        now.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    }
}

/// Samples kept of each peer. Of several the one that travelled fastest tells the time best; eight are
/// what NTP keeps.
const SAMPLES_MAX: usize = 8;

/// How long a sample counts. Longer than peers are silent between heartbeats by orders; short enough
/// that a peer that is gone does not vote on the time for long, and that drift since then (50 ppm)
/// stays far below a millisecond.
const SAMPLE_AGE_MAX: Duration = Duration::from_secs(10);

/// What the wall clocks of the peers say, and so how far this node's clock is off.
///
/// A sample is a peer's wall time at an instant of the runtime's clock. It ages by that clock alone,
/// so a jump of this node's wall clock shows at once, before any peer has spoken again.
///
/// The judge is the median of all clocks that are known, this node's own included: while most are
/// right, a wrong clock finds itself wrong and does not talk the others out of theirs. Two nodes
/// cannot know which of them is wrong: the median lies half way, and both refuse when they are twice
/// the bound apart. A node that hears nobody trusts itself.
pub struct PeerClocks {
    clock: Arc<dyn Clock>,
    peers: Mutex<BTreeMap<NodeId, Vec<Sample>>>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// When it was taken.
    at: Instant,
    /// What the peer's clock showed then, as near as can be told.
    wall_ms: u64,
    /// The most by which that may be wrong.
    error: Duration,
}

/// This node's clock is too far from the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this node's clock is {} ms {} the median of the cluster's clocks, allowed are {} ms: \
     check that NTP runs on this machine",
    offset_ms.unsigned_abs(), if *offset_ms < 0 { "behind" } else { "ahead of" }, bound.as_millis()
)]
pub struct OutOfBound {
    /// Positive: ahead.
    pub offset_ms: i64,
    /// What is allowed, either way.
    pub bound: Duration,
}

impl PeerClocks {
    /// Knows no peer yet.
    pub fn new(clock: Arc<dyn Clock>) -> PeerClocks {
        PeerClocks { clock, peers: Mutex::new(BTreeMap::new()) }
    }

    /// This node's wall time.
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// A peer's clock showed `wall_ms` when it sent what arrived just now. `round_trip` is the time
    /// that a message there and back takes, as far as it is known (0 where it is not): half of it
    /// went by since.
    pub fn record(&self, peer: NodeId, wall_ms: u64, round_trip: Duration) {
        self.record_at(Instant::now(), peer, wall_ms, round_trip);
    }

    fn record_at(&self, at: Instant, peer: NodeId, wall_ms: u64, round_trip: Duration) {
        let one_way = round_trip / 2;
        let sample = Sample {
            at,
            wall_ms: wall_ms.saturating_add(one_way.as_millis() as u64),
            error: one_way,
        };
        let mut peers = self.peers.lock();
        let samples = peers.entry(peer).or_default();
        if samples.len() == SAMPLES_MAX {
            samples.remove(0);
        }
        samples.push(sample);
    }

    /// The peer is no longer a member of the cluster.
    pub fn forget(&self, peer: NodeId) {
        self.peers.lock().remove(&peer);
    }

    /// How far each peer's clock is ahead of this node's, in milliseconds. Peers that have not been
    /// heard lately are left out.
    pub fn offsets(&self) -> Vec<(NodeId, i64)> {
        self.offsets_at(Instant::now())
    }

    fn offsets_at(&self, now: Instant) -> Vec<(NodeId, i64)> {
        let own = self.clock.now_ms();
        let peers = self.peers.lock();
        let offset = |samples: &[Sample]| {
            let fresh = samples.iter().filter(|sample| sample.age(now) <= SAMPLE_AGE_MAX);
            // The later one of equals: it has drifted less.
            let best = fresh.rev().min_by_key(|sample| sample.error)?;
            let wall_ms = best.wall_ms.saturating_add(best.age(now).as_millis() as u64);
            Some(difference(wall_ms, own))
        };
        peers.iter().filter_map(|(peer, samples)| Some((*peer, offset(samples)?))).collect()
    }

    /// How far this node's clock is ahead of the median of all clocks, in milliseconds.
    pub fn offset_ms(&self) -> i64 {
        self.offset_ms_at(Instant::now())
    }

    fn offset_ms_at(&self, now: Instant) -> i64 {
        let mut offsets: Vec<i64> =
            self.offsets_at(now).into_iter().map(|(_, offset)| offset).collect();
        offsets.push(0);
        median(&mut offsets).saturating_neg()
    }

    /// Refuses while this node's clock is further than `bound` from the median of all clocks.
    pub fn check(&self, bound: Duration) -> Result<(), OutOfBound> {
        within(self.offset_ms(), bound)
    }
}

fn within(offset_ms: i64, bound: Duration) -> Result<(), OutOfBound> {
    match u128::from(offset_ms.unsigned_abs()) > bound.as_millis() {
        true => Err(OutOfBound { offset_ms, bound }),
        false => Ok(()),
    }
}

impl std::fmt::Debug for PeerClocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerClocks").field("peers", &self.peers).finish_non_exhaustive()
    }
}

impl Sample {
    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.at)
    }
}

fn difference(left: u64, right: u64) -> i64 {
    let difference = i128::from(left) - i128::from(right);
    difference.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

/// The middle one; of an even number, half way between the middle two.
fn median(values: &mut [i64]) -> i64 {
    assert!(!values.is_empty(), "the node's own clock is always there");
    values.sort_unstable();
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    (i128::midpoint(i128::from(low), i128::from(high))) as i64
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const BOUND: Duration = Duration::from_millis(500);
    const START: u64 = 1_700_000_000_000;

    /// A wall clock that the test moves.
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now_ms(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
    }

    fn clocks() -> (Arc<Hand>, PeerClocks) {
        let hand = Arc::new(Hand(AtomicU64::new(START)));
        let clock: Arc<dyn Clock> = hand.clone();
        (hand, PeerClocks::new(clock))
    }

    #[test]
    fn medians() {
        for (values, wanted) in [
            (vec![7], 7),
            (vec![0, 800], 400),
            (vec![9, 0, 1], 1),
            (vec![-3, 10, 0, 4], 2),
            (vec![i64::MAX, i64::MAX], i64::MAX),
        ] {
            assert_eq!(median(&mut values.clone()), wanted, "{values:?}");
        }
    }

    #[test]
    fn alone_a_node_trusts_itself() {
        let (_, clocks) = clocks();
        assert_eq!(clocks.check(BOUND), Ok(()));
    }

    #[test]
    fn one_wrong_peer_of_two_changes_nothing() {
        let (_, clocks) = clocks();
        let now = Instant::now();
        clocks.record_at(now, NodeId(2), START + 60_000, Duration::ZERO);
        clocks.record_at(now, NodeId(3), START + 1, Duration::ZERO);
        assert_eq!(clocks.offset_ms_at(now), -1);
    }

    #[test]
    fn the_wrong_one_finds_itself_wrong_also_after_a_jump_of_its_own() {
        let (hand, clocks) = clocks();
        let now = Instant::now();
        for peer in [2, 3] {
            clocks.record_at(now, NodeId(peer), START + 20, Duration::from_millis(2));
        }
        assert_eq!(within(clocks.offset_ms_at(now), BOUND), Ok(()));
        hand.0.fetch_add(3_000, Ordering::SeqCst);
        let error = within(clocks.offset_ms_at(now), BOUND).expect_err("three seconds ahead");
        assert_eq!(
            error.to_string(),
            "this node's clock is 2979 ms ahead of the median of the cluster's clocks, allowed are \
             500 ms: check that NTP runs on this machine"
        );
        hand.0.fetch_sub(6_000, Ordering::SeqCst);
        let error = within(clocks.offset_ms_at(now), BOUND).expect_err("three seconds behind");
        assert!(error.to_string().contains("3021 ms behind the median"), "{error}");
    }

    #[test]
    fn the_bound_itself_is_allowed() {
        assert_eq!(within(500, BOUND), Ok(()));
        assert_eq!(within(-500, BOUND), Ok(()));
        assert!(within(501, BOUND).is_err());
        assert!(within(i64::MIN, BOUND).is_err());
    }

    #[test]
    fn samples_age_by_the_runtimes_clock_and_then_end() {
        let (hand, clocks) = clocks();
        let start = Instant::now();
        clocks.record_at(start, NodeId(2), START + 2_000, Duration::ZERO);
        hand.0.fetch_add(4_000, Ordering::SeqCst);
        let later = start + Duration::from_secs(4);
        assert_eq!(clocks.offsets_at(later), [(NodeId(2), 2_000)]);
        assert_eq!(clocks.offset_ms_at(later), -1_000, "half way between two");
        let late = start + SAMPLE_AGE_MAX + Duration::from_millis(1);
        assert!(clocks.offsets_at(late).is_empty(), "older than it counts");
        assert_eq!(clocks.offset_ms_at(late), 0);
    }

    #[test]
    fn the_fastest_message_tells_the_time_and_old_ones_make_room() {
        let (_, clocks) = clocks();
        let now = Instant::now();
        clocks.record_at(now, NodeId(2), START + 5, Duration::ZERO);
        clocks.record_at(now, NodeId(2), START + 300, Duration::from_millis(900));
        assert_eq!(clocks.offsets_at(now), [(NodeId(2), 5)]);
        for _ in 0..SAMPLES_MAX {
            clocks.record_at(now, NodeId(2), START + 300, Duration::from_millis(100));
        }
        assert_eq!(clocks.offsets_at(now), [(NodeId(2), 350)]);
        clocks.forget(NodeId(2));
        assert!(clocks.offsets_at(now).is_empty());
    }
}

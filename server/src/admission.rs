//! Owns what a node takes on: requests and bytes in flight, open scans, and each request's deadline.
//! Does not queue: beyond a limit the answer is `OVERLOADED` at once, and the caller's back-off is the
//! queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use coracle_proto::limits::{self, SCAN_PAGE_BYTES};
use coracle_proto::reason::{Fault, Reason};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

/// When to come back after `OVERLOADED`: longer than most requests take, shorter than any timeout.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// tonic drops a request at its `grpc-timeout` and says `CANCELLED`, which tells nothing of a write.
/// So ours ends earlier by this, or by a tenth of the timeout where that is less.
const ANSWER_MARGIN: Duration = Duration::from_millis(20);
/// Scans that a node has open for clients at a time, whether they are read or not: each has a task and a
/// stream. Beyond: `OVERLOADED`.
const SCANS_OPEN_MAX: usize = 256;
/// What an open scan pins when its reader has stopped: a page in the connection's buffer, and one
/// behind it. All of them together may pin half of the byte budget; a node with a small budget
/// therefore has fewer open.
const SCAN_PINNED_BYTES: u64 = 2 * SCAN_PAGE_BYTES as u64;
/// The header of callers that follow leaders by themselves, and of tests.
pub const NO_FORWARD: &str = "coracle-no-forward";

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A caller of the public services.
    Client,
    /// Another node that has taken the request on; it is not passed on again.
    Peer,
    /// This node itself: the cluster's own records are open to it.
    Node,
}

/// How a request is worked on.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// When the caller stops waiting, or the node gives up.
    pub deadline: Instant,
    /// When the caller stops waiting, where it has said so: a scan may take many deadlines.
    pub ends: Option<Instant>,
    /// Who asks.
    pub origin: Origin,
    /// Whether the request may go on to the node that leads the shard.
    pub may_forward: bool,
}

impl Call {
    /// A client's request, from its metadata.
    pub fn from_metadata(metadata: &MetadataMap) -> Result<Call, Fault> {
        let asked = match metadata.get("grpc-timeout") {
            Some(text) => Some(text.to_str().ok().and_then(parse_timeout).ok_or_else(|| {
                Fault::invalid("grpc-timeout", "grpc-timeout is not digits and one of HMSmun")
            })?),
            None => None,
        };
        let asked = asked.map(|asked| asked - (asked / 10).min(ANSWER_MARGIN));
        Ok(Call { may_forward: metadata.get(NO_FORWARD).is_none(), ..Call::client(asked) })
    }

    /// A client's request that may take so long, or as long as any may.
    pub fn client(asked: Option<Duration>) -> Call {
        let now = Instant::now();
        // Beyond what can be added nobody waits.
        let ends = asked.and_then(|asked| now.checked_add(asked));
        let deadline = now + limits::deadline(asked);
        Call { deadline, ends, origin: Origin::Client, may_forward: true }
    }

    /// The same for the next page of a scan: each has a deadline of its own.
    pub fn next_page(self) -> Call {
        let capped = Instant::now() + limits::DEADLINE_MAX;
        Call { deadline: self.ends.map_or(capped, |ends| ends.min(capped)), ..self }
    }

    /// One operation of a client's pipeline; 0 is as long as any may take.
    pub fn pipelined(self, timeout_ms: u64) -> Call {
        let asked = (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms));
        let Call { origin, may_forward, .. } = self;
        Call { origin, may_forward, ..Call::client(asked) }
    }

    /// What another node has passed on.
    pub fn forwarded(timeout_ms: u64) -> Call {
        Call {
            origin: Origin::Peer,
            may_forward: false,
            ..Call::client(None).pipelined(timeout_ms)
        }
    }

    /// The node's own request.
    pub fn own(timeout: Duration) -> Call {
        Call { origin: Origin::Node, ..Call::client(Some(timeout)) }
    }

    /// How long the caller still waits.
    pub fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// `grpc-timeout`: at most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3_600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Counts what the node works on.
///
/// Invariant: the counters are the sums over all permits, charges and seats that are alive.
pub struct Admission {
    requests_max: usize,
    bytes_max: u64,
    scans_max: usize,
    requests: AtomicUsize,
    bytes: AtomicU64,
    scans: AtomicUsize,
    draining: CancellationToken,
    starting: AtomicBool,
}

impl Admission {
    /// Limits of a node (`limits.requests_in_flight`, `limits.request_bytes_in_flight`), and the
    /// signal from which on it takes nothing new.
    pub fn new(requests_max: usize, bytes_max: u64, draining: CancellationToken) -> Arc<Admission> {
        let affordable = usize::try_from(bytes_max / 2 / SCAN_PINNED_BYTES).unwrap_or(usize::MAX);
        Arc::new(Admission {
            requests_max,
            bytes_max,
            scans_max: affordable.clamp(1, SCANS_OPEN_MAX),
            requests: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            scans: AtomicUsize::new(0),
            draining,
            starting: AtomicBool::new(false),
        })
    }

    /// Whether the node has just started again, and its replicas have not all caught up: whoever can
    /// ask another node should.
    pub fn is_starting(&self) -> bool {
        self.starting.load(Ordering::Acquire)
    }

    /// The node says so of itself.
    pub fn set_starting(&self, starting: bool) {
        self.starting.store(starting, Ordering::Release);
    }

    /// Takes a request of so many bytes on, until the permit is dropped. A draining node takes what
    /// other nodes pass on: until its shards have new leaders, nobody else can serve it.
    pub fn admit(self: &Arc<Self>, bytes: u64, origin: Origin) -> Result<Permit, Fault> {
        if origin == Origin::Client && self.draining.is_cancelled() {
            return Err(Fault::new(Reason::Draining, "this node is shutting down"));
        }
        if self.requests.fetch_add(1, Ordering::AcqRel) >= self.requests_max {
            self.requests.fetch_sub(1, Ordering::AcqRel);
            return Err(overloaded("limits.requests_in_flight"));
        }
        let mut permit = Permit { charge: self.hold(0) };
        permit.charge(bytes)?;
        Ok(permit)
    }

    /// Takes a place among the open scans, until the seat is dropped. A node that has just started takes
    /// none of a client: another serves it at once.
    pub fn open_scan(self: &Arc<Self>, origin: Origin) -> Result<Seat, Fault> {
        if origin == Origin::Client && self.is_starting() {
            let message = "this node has just started, and has not caught up yet: ask another";
            return Err(Fault::new(Reason::TooStale, message));
        }
        if self.scans.fetch_add(1, Ordering::AcqRel) >= self.scans_max {
            self.scans.fetch_sub(1, Ordering::AcqRel);
            return Err(overloaded(&format!("{} open scans", self.scans_max)));
        }
        Ok(Seat { admission: self.clone() })
    }

    /// Counts bytes that are held already, whatever the limit: what they go over it, new requests do
    /// not get.
    pub fn hold(self: &Arc<Self>, bytes: u64) -> Charge {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        Charge { admission: self.clone(), bytes }
    }

    /// Requests and bytes being worked on.
    pub fn in_flight(&self) -> (usize, u64) {
        (self.requests.load(Ordering::Acquire), self.bytes.load(Ordering::Acquire))
    }

    /// Scans that are open.
    pub fn scans_open(&self) -> usize {
        self.scans.load(Ordering::Acquire)
    }

    /// How many may be.
    pub fn scans_max(&self) -> usize {
        self.scans_max
    }

    /// Cancelled when the node begins to shut down: streams end then.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }
}

/// Bytes that are held; dropping it gives them back.
pub struct Charge {
    admission: Arc<Admission>,
    bytes: u64,
}

impl Charge {
    /// So many bytes are held from now on; fewer than before always may be.
    pub fn set(&mut self, bytes: u64) -> Result<(), Fault> {
        let Some(more) = bytes.checked_sub(self.bytes) else {
            self.admission.bytes.fetch_sub(self.bytes - bytes, Ordering::AcqRel);
            self.bytes = bytes;
            return Ok(());
        };
        let max = self.admission.bytes_max;
        let add = |held: u64| held.checked_add(more).filter(|sum| more == 0 || *sum <= max);
        let charged = self.admission.bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
        charged.map_err(|_| overloaded("limits.request_bytes_in_flight"))?;
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.admission.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// One request being worked on; dropping it makes room.
pub struct Permit {
    charge: Charge,
}

impl Permit {
    /// Adds bytes to the request: what its answer holds.
    pub fn charge(&mut self, bytes: u64) -> Result<(), Fault> {
        self.charge.set(self.charge.bytes.saturating_add(bytes))
    }

    /// Ends the request; its answer, of so many bytes, is held until it is taken.
    pub fn end(self, answer_bytes: u64) -> Charge {
        self.charge.admission.hold(answer_bytes)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.charge.admission.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A place among the open scans.
pub struct Seat {
    admission: Arc<Admission>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.admission.scans.fetch_sub(1, Ordering::AcqRel);
    }
}

fn overloaded(limit: &str) -> Fault {
    let message = format!("this node is at its limit ({limit})");
    Fault::new(Reason::Overloaded, message).with_retry_after(RETRY_AFTER)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tokio::test expands to Runtime::block_on")]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_parsed_as_grpc_says() {
        let cases = [
            ("1H", Some(3_600_000_000)),
            ("2M", Some(120_000_000)),
            ("3S", Some(3_000_000)),
            ("99999999m", Some(99_999_999_000)),
            ("5u", Some(5)),
            ("7000n", Some(7)),
            ("100000000m", None),
            ("m", None),
            ("", None),
            ("1", None),
            ("-1m", None),
            ("+1m", None),
            ("1ms", None),
            ("1µ", None),
        ];
        for (text, micros) in cases {
            assert_eq!(parse_timeout(text), micros.map(Duration::from_micros), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn deadline_is_capped_and_ends_before_tonics() {
        let call = |timeout: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", timeout.parse().unwrap());
            Call::from_metadata(&metadata)
        };
        assert_eq!(call("1S").unwrap().left(), Duration::from_millis(980));
        assert_eq!(call("100m").unwrap().left(), Duration::from_millis(90));
        let long = call("1H").unwrap();
        assert_eq!(long.left(), limits::DEADLINE_MAX);
        tokio::time::advance(Duration::from_secs(3_590)).await;
        assert_eq!(long.next_page().left(), Duration::from_secs(10) - ANSWER_MARGIN);
        assert_eq!(call("soon").unwrap_err().reason, Reason::InvalidArgument);
        let none = Call::from_metadata(&MetadataMap::new()).unwrap();
        assert_eq!((none.left(), none.may_forward), (limits::DEADLINE_MAX, true));
        let mut metadata = MetadataMap::new();
        metadata.insert(NO_FORWARD, "1".parse().unwrap());
        assert!(!Call::from_metadata(&metadata).unwrap().may_forward);
        assert_eq!(Call::forwarded(7).left(), Duration::from_millis(7));
    }

    #[test]
    fn limits_hold_and_permits_give_back() {
        let draining = CancellationToken::new();
        let admission = Admission::new(2, 100, draining.clone());
        let mut first = admission.admit(60, Origin::Client).unwrap();
        let refused = admission.admit(41, Origin::Client).err().unwrap();
        assert_eq!((refused.reason, refused.retry_after_ms), (Reason::Overloaded, 100));
        assert_eq!(admission.in_flight(), (1, 60));
        let second = admission.admit(40, Origin::Client).unwrap();
        assert!(admission.admit(0, Origin::Client).is_err(), "two are in flight");
        drop(second);
        assert!(first.charge(41).is_err());
        first.charge(40).unwrap();
        assert_eq!(admission.in_flight(), (1, 100));
        drop(first);
        assert_eq!(admission.in_flight(), (0, 0));
        let answer = admission.admit(30, Origin::Client).unwrap().end(7);
        assert_eq!(admission.in_flight(), (0, 7));
        let mut held = admission.hold(200);
        assert_eq!(admission.in_flight(), (0, 207), "what is there is counted, whatever the limit");
        assert!(admission.admit(0, Origin::Client).is_ok() && held.set(201).is_err());
        held.set(90).unwrap();
        assert!(held.set(94).is_err() && held.set(93).is_ok());
        drop((held, answer));
        assert_eq!(admission.in_flight(), (0, 0));
        draining.cancel();
        assert_eq!(admission.admit(0, Origin::Client).err().unwrap().reason, Reason::Draining);
        assert!(admission.admit(0, Origin::Peer).is_ok());
    }

    #[test]
    fn open_scans_are_bounded_by_number_and_by_the_byte_budget() {
        let open = |bytes_max| {
            let admission = Admission::new(9, bytes_max, CancellationToken::new());
            let seats: Vec<_> =
                std::iter::from_fn(|| admission.open_scan(Origin::Client).ok()).collect();
            assert_eq!(admission.scans_open(), seats.len());
            let refused = admission.open_scan(Origin::Client).err().unwrap();
            assert_eq!(refused.reason, Reason::Overloaded);
            let opened = seats.len();
            drop(seats);
            assert_eq!(admission.scans_open(), 0);
            opened
        };
        assert_eq!(open(u64::MAX), SCANS_OPEN_MAX);
        assert_eq!(open(64 << 20), 16);
        assert_eq!(open(0), 1);
    }
}

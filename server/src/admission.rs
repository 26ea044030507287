//! Owns what a node takes on: requests and bytes in flight, and each request's deadline. Does not
//! queue: beyond a limit the answer is `OVERLOADED` at once, and the caller's back-off is the queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use coracle_proto::limits;
use coracle_proto::reason::{Fault, Reason};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

/// When to come back after `OVERLOADED`: longer than most requests take, shorter than any timeout.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// tonic drops a request at its `grpc-timeout` and says `CANCELLED`, which tells nothing of a write.
/// So ours ends earlier by this, or by a tenth of the timeout where that is less.
const ANSWER_MARGIN: Duration = Duration::from_millis(20);
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
/// Invariant: the counters are the sums over all permits that are alive.
pub struct Admission {
    requests_max: usize,
    bytes_max: u64,
    requests: AtomicUsize,
    bytes: AtomicU64,
    draining: CancellationToken,
}

impl Admission {
    /// Limits of a node (`limits.requests_in_flight`, `limits.request_bytes_in_flight`), and the
    /// signal from which on it takes nothing new.
    pub fn new(requests_max: usize, bytes_max: u64, draining: CancellationToken) -> Arc<Admission> {
        let (requests, bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
        Arc::new(Admission { requests_max, bytes_max, requests, bytes, draining })
    }

    /// Takes a request of so many bytes on, until the permit is dropped. A draining node takes what
    /// other nodes pass on: until its shards have new leaders, nobody else can serve it.
    pub fn admit(self: &Arc<Self>, bytes: u64, origin: Origin) -> Result<Permit, Fault> {
        if origin == Origin::Client && self.draining.is_cancelled() {
            return Err(Fault::new(Reason::Draining, "this node is shutting down"));
        }
        if self.requests.fetch_add(1, Ordering::AcqRel) >= self.requests_max {
            self.requests.fetch_sub(1, Ordering::AcqRel);
            return Err(overloaded("requests_in_flight"));
        }
        let mut permit = Permit { admission: self.clone(), bytes: 0 };
        permit.charge(bytes)?;
        Ok(permit)
    }

    /// Requests and bytes being worked on.
    pub fn in_flight(&self) -> (usize, u64) {
        (self.requests.load(Ordering::Acquire), self.bytes.load(Ordering::Acquire))
    }

    /// Cancelled when the node begins to shut down: streams end then.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }
}

/// One request being worked on; dropping it makes room.
pub struct Permit {
    admission: Arc<Admission>,
    bytes: u64,
}

impl Permit {
    /// Adds bytes to the request: what its answer holds, what a scan reads ahead.
    pub fn charge(&mut self, bytes: u64) -> Result<(), Fault> {
        let max = self.admission.bytes_max;
        let add = |held: u64| held.checked_add(bytes).filter(|sum| *sum <= max);
        let charged = self.admission.bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
        charged.map_err(|_| overloaded("request_bytes_in_flight"))?;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.admission.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

fn overloaded(limit: &str) -> Fault {
    let message = format!("this node is at its limit (limits.{limit})");
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
        draining.cancel();
        assert_eq!(admission.admit(0, Origin::Client).err().unwrap().reason, Reason::Draining);
        assert!(admission.admit(0, Origin::Peer).is_ok());
    }
}

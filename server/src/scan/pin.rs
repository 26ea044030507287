//! Owns keeping a scan's version readable for as long as the scan goes on: when to pin it, for how
//! long, on which shards. Does not read, and does not know pages.
//!
//! A scan pins nothing before its version is half as old as its keyspace's history: most are over by
//! then. From there on it pins for a minute, and again when half a minute is left, so that nothing
//! remains of a scan that nobody goes on with. Ten minutes after the version no pin is given any more,
//! and the scan ends with `VERSION_GONE` once the history has passed it.

use std::sync::Arc;

use coracle_proto::reason::{Fault, Reason};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_raft::clock::HybridTime;
use coracle_raft::history::{HISTORY_MS_MIN, PIN_MS_MAX};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::admission::Call;
use crate::router::{Router, mismatched};
use crate::scan::pages::{NewPins, Pins};
use crate::versions::ASKED_AT_A_TIME;

/// How long a pin is asked for.
const PIN_MS: u64 = 60_000;
/// With so much left of it, it is asked for again: many times what asking takes.
const RENEW_MS: u64 = 30_000;
/// Below the limit on how far ahead of a shard's clock a pin may end: this node's clock may be ahead
/// of it by as much as clocks may differ.
const MARGIN_MS: u64 = 1_000;
/// When to ask again after shards that could not pin.
const AGAIN_MS: u64 = 1_000;

/// What a scan over several shards holds of its version.
#[derive(Debug, Default)]
struct Hold {
    /// Until when every shard has it pinned; 0: not at all.
    until_ms: u64,
    /// Nothing is asked before.
    not_before_ms: u64,
}

impl Hold {
    /// Whether it is time to pin the version. `now_ms` is the node's wall clock, `history_ms` what the
    /// keyspace's settings say at the moment.
    fn is_due(&self, version: u64, history_ms: u64, now_ms: u64) -> bool {
        let born_ms = HybridTime(version).ms();
        let half_ms = history_ms.max(HISTORY_MS_MIN) / 2;
        now_ms >= self.not_before_ms
            && now_ms >= born_ms.saturating_add(half_ms)
            && now_ms.saturating_add(RENEW_MS) >= self.until_ms
            && self.until_ms < last_ms(version)
    }

    /// Pins a version of a keyspace on shards, if it is time to. The scan is over when this says
    /// `VERSION_GONE`, and lays out its lanes anew (with a new hold) on `STALE_ROUTE`. Where a shard
    /// cannot pin at the moment, the scan goes on, and this asks again soon.
    async fn keep_on(
        &mut self,
        router: &Arc<Router>,
        shards: &[v1::Route],
        keyspace: &str,
        version: u64,
        call: &Call,
    ) -> Result<(), Fault> {
        let map = router.current_map()?;
        let history_ms = map.keyspace(keyspace).map_or(0, |keyspace| keyspace.history_ms);
        let now_ms = router.now_ms();
        if !self.is_due(version, history_ms, now_ms) {
            return Ok(());
        }
        let until_ms = now_ms.saturating_add(PIN_MS).min(last_ms(version));
        if until_ms <= now_ms {
            return Ok(());
        }
        let pin = |route: v1::Route| {
            let keyspace = keyspace.to_owned();
            let route = Some(route);
            let question = v1::PinVersionRequest { route, keyspace, version, until_ms };
            async move {
                match router.execute(Operation::PinVersion(question), call).await? {
                    Answer::PinVersion(pinned) => Ok(pinned.until_ms),
                    _ => Err(mismatched()),
                }
            }
        };
        let asked = stream::iter(shards.iter().copied().map(pin)).buffer_unordered(ASKED_AT_A_TIME);
        let held =
            asked.try_fold(u64::MAX, |least, until_ms| async move { Ok(least.min(until_ms)) });
        match held.await {
            Ok(least) => self.until_ms = least,
            Err(fault) if matches!(fault.reason, Reason::VersionGone | Reason::StaleRoute) => {
                return Err(fault);
            }
            Err(fault) => {
                tracing::debug!(%fault, "a version that a scan reads at could not be pinned");
                self.not_before_ms = now_ms + AGAIN_MS;
            }
        }
        Ok(())
    }
}

/// Pins for scans, each with a hold of its own.
pub fn pins() -> NewPins {
    Arc::new(|| Box::new(Hold::default()))
}

impl Pins for Hold {
    fn keep<'a>(
        &'a mut self,
        router: &'a Arc<Router>,
        shards: &'a [v1::Route],
        keyspace: &'a str,
        version: u64,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(), Fault>> {
        Box::pin(self.keep_on(router, shards, keyspace, version, call))
    }
}

/// The last millisecond until which a version may be pinned.
fn last_ms(version: u64) -> u64 {
    HybridTime(version).ms().saturating_add(PIN_MS_MAX - MARGIN_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BORN_MS: u64 = 1_000_000;

    fn due_from(hold: &Hold, history_ms: u64) -> Option<u64> {
        let version = HybridTime::at_ms(BORN_MS).0;
        (0..800_000).find(|age_ms| hold.is_due(version, history_ms, BORN_MS + age_ms))
    }

    #[test]
    fn version_is_pinned_at_half_of_its_history() {
        let hold = Hold::default();
        assert_eq!(due_from(&hold, 60_000), Some(30_000));
        assert_eq!(due_from(&hold, 0), Some(HISTORY_MS_MIN / 2));
    }

    #[test]
    fn pin_is_renewed_before_it_ends_and_not_beyond_the_last() {
        let mut hold = Hold { until_ms: BORN_MS + 100_000, ..Hold::default() };
        assert_eq!(due_from(&hold, 60_000), Some(100_000 - RENEW_MS));
        hold.not_before_ms = BORN_MS + 90_000;
        assert_eq!(due_from(&hold, 60_000), Some(90_000));
        hold.until_ms = BORN_MS + PIN_MS_MAX - MARGIN_MS;
        assert_eq!(due_from(&hold, 60_000), None);
    }
}

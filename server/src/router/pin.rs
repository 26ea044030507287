//! Owns pinning a version on one group: whether it is the group that is meant, and what its answer
//! becomes. Does not choose the group, and does not know who asks.

use std::time::Duration;

use coracle_proto::reason::{Fault, Reason};
use coracle_raft::error::GroupError;
use coracle_raft::group::Group;
use coracle_raft::history::{PIN_MS_MAX, PINS_MAX, Pin, Pinned};
use tokio::time::Instant;

use crate::fault::Refusal;

/// When to come back to a group that holds all the pins that it may: they run out by the second.
const FULL_RETRY: Duration = Duration::from_secs(1);

/// Pins a version on the shard's leader. Returns until when it is held.
pub(crate) async fn pin_version(
    group: &Group,
    pin: Pin,
    epoch: u64,
    deadline: Instant,
) -> Result<u64, Refusal> {
    let descriptor = group.descriptor();
    let meant = descriptor.as_ref().filter(|known| epoch == 0 || epoch == known.epoch);
    if meant.is_none_or(|known| known.arc.is_none()) {
        return Err(Refusal::Stale(descriptor));
    }
    let pinned = tokio::time::timeout_at(deadline, group.pin(pin)).await;
    match pinned.unwrap_or(Err(GroupError::Expired)) {
        Ok(Pinned::Held { until_ms }) => Ok(until_ms),
        Ok(Pinned::Gone { oldest }) => Err(Refusal::Gone { oldest }),
        Ok(Pinned::Full) => {
            let message = format!("the shard holds {PINS_MAX} pinned versions, as many as it may");
            let fault = Fault::new(Reason::Overloaded, message);
            Err(fault.with_retry_after(FULL_RETRY).into())
        }
        Ok(Pinned::OutOfRange) => {
            let message = format!(
                "a pin ends in the future, at most {PIN_MS_MAX} ms from now and from its version"
            );
            Err(Fault::invalid("until_ms", message).into())
        }
        // Asked for again it is the same pin.
        Err(GroupError::Unknown(_)) => Err(GroupError::TooStale.into()),
        Err(error) => Err(error.into()),
    }
}

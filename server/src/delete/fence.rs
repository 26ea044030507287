//! Owns the version up to which a delete-range deletes: one for all of its shards, fixed on each before
//! the first step. Does not delete.
//!
//! Every shard's leader is asked for a version that holds all that was acknowledged before; the highest
//! is the call's, and is then fixed on the others as well. So what was acknowledged before the call lies
//! at or below it, and what is written once it is told lies above, on every shard.

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::reason::{Fault, Reason};
use coracle_proto::ring;
use coracle_proto::token::DeleteToken;
use coracle_proto::v1;

use crate::admission::Call;
use crate::fault;
use crate::router::{Router, mismatched};
use crate::versions::{self, Fixed};

/// How often the shards are asked anew when they have changed meanwhile. Beyond: the last fault.
const ASKED_MAX: u32 = 8;
/// Before they are asked again: a split takes about so long to come to the map.
const PAUSE: Duration = Duration::from_millis(50);

/// The version under which a delete-range that is about to begin goes through what its token names.
pub(super) async fn fix(
    router: &Arc<Router>,
    token: &DeleteToken,
    call: &Call,
) -> Result<u64, Fault> {
    for asked in 1.. {
        match fixed(router, token, call).await {
            Err(fault) if fault.reason == Reason::StaleRoute && asked < ASKED_MAX => {
                if call.left() <= PAUSE * asked {
                    return Err(fault);
                }
                router.refresh(call.deadline).await;
                tokio::time::sleep(PAUSE * (asked - 1)).await;
            }
            result => return result,
        }
    }
    unreachable!("the last question returns")
}

async fn fixed(router: &Arc<Router>, token: &DeleteToken, call: &Call) -> Result<u64, Fault> {
    let newest = match token.lanes.first() {
        None => versions::fix_on_ring(router, 0, call).await?,
        Some(lane) => vec![fix_on_arc(router, lane.arc, call).await?],
    };
    let version = newest.iter().map(|(_, fixed)| fixed.version).max();
    let version = version.filter(|version| *version > 0).ok_or_else(mismatched)?;
    // At the epochs that the first answers named: no shard is left out.
    let behind = newest.iter().filter(|(_, fixed)| fixed.version < version);
    let route = |(shard, fixed): &Fixed| v1::Route { shard: *shard, shard_epoch: fixed.epoch };
    versions::fix(router, behind.map(route).collect(), version, call).await?;
    Ok(version)
}

/// Asks the shard that holds an arc, all of it.
async fn fix_on_arc(router: &Arc<Router>, arc: ring::Arc, call: &Call) -> Result<Fixed, Fault> {
    let map = router.current_map()?;
    let shard = map.locate(arc.start()).id;
    let route = v1::Route { shard: shard.0, shard_epoch: 0 };
    let fixed = versions::fix(router, vec![route], 0, call).await?.pop();
    let holds = |(_, fixed): &Fixed| {
        let held = ring::Arc::new(fixed.start, fixed.end);
        held.is_some_and(|held| held.contains(arc.start()) && held.contains(arc.last()))
    };
    fixed.filter(holds).ok_or_else(|| fault::stale_route(Some(&map), shard, None))
}

//! Owns fixing one version on several shards: the questions, and whether the answers are of the whole
//! ring. Does not choose the version, and does not try again when shards have changed.

use std::sync::Arc;

use coracle_proto::reason::Fault;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::{ring, shard_map};
use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::admission::Call;
use crate::fault;
use crate::router::{Router, mismatched};

/// Shards that are asked at a time.
pub(crate) const ASKED_AT_A_TIME: usize = 32;

/// What a shard has fixed: its id, and its answer.
pub(crate) type Fixed = (u64, v1::FixVersionResponse);

/// Asks shards for a version, or (0) for the lowest that each may have. In ring order.
pub(crate) async fn fix(
    router: &Arc<Router>,
    shards: Vec<v1::Route>,
    version: u64,
    call: &Call,
) -> Result<Vec<Fixed>, Fault> {
    let ask = |route: v1::Route| async move {
        let question = v1::FixVersionRequest { route: Some(route), version };
        match router.execute(Operation::FixVersion(question), call).await? {
            Answer::FixVersion(fixed) => Ok((route.shard, fixed)),
            _ => Err(mismatched()),
        }
    };
    let asked = stream::iter(shards.into_iter().map(ask)).buffer_unordered(ASKED_AT_A_TIME);
    let mut fixed: Vec<Fixed> = asked.try_collect().await?;
    fixed.sort_by_key(|(_, fixed)| fixed.start);
    Ok(fixed)
}

/// Asks every shard of the ring. `STALE_ROUTE` when the arcs that they name do not tile it.
pub(crate) async fn fix_on_ring(
    router: &Arc<Router>,
    version: u64,
    call: &Call,
) -> Result<Vec<Fixed>, Fault> {
    let map = router.current_map()?;
    let route = |shard: &shard_map::Shard| v1::Route { shard: shard.id.0, shard_epoch: 0 };
    let fixed = fix(router, map.shards().iter().map(route).collect(), version, call).await?;
    let arcs: Option<Vec<_>> =
        fixed.iter().map(|(_, fixed)| ring::Arc::new(fixed.start, fixed.end)).collect();
    let tiled = arcs.is_some_and(|arcs| ring::check_tiling(arcs).is_ok());
    if !tiled {
        let first = map.shards().first().map_or(map.meta().id, |shard| shard.id);
        return Err(fault::stale_route(Some(&map), first, None));
    }
    Ok(fixed)
}

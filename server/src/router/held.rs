//! Owns the shard that holds a key before the map says so: the groups of this node know of a split or a
//! merge from the moment at which they apply it, the map a little later. Does not serve.
//!
//! Only where the map at hand is as old as the route: a caller whose map is older is told, and looks
//! again.

use coracle_proto::shard_map::{ShardId, ShardMap};
use coracle_proto::v1::pipeline_request::Operation;
use coracle_raft::group::Group;
use coracle_raft::leadership::Standing;

use crate::admission::Call;
use crate::router::Router;
use crate::router::plan::{self, Freshness, Plan, Task};

/// A shard that holds a key, by the word of its group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Held {
    shard: ShardId,
    epoch: u64,
}

impl Router {
    /// Another shard than the one that refused, which holds the operation's key: its replica is here.
    pub(super) fn held(&self, operation: &Operation, call: &Call) -> Option<Held> {
        let map = self.parts.map.current()?;
        let plan = plan::plan(&map, operation, call.origin).ok()?;
        let position = plan.position.filter(|_| plan.has_one_key() && !plan.differs_from(&map))?;
        let groups = self.parts.host.groups();
        let holds = |group: &std::sync::Arc<Group>| {
            let serves = group.shard() != plan.shard && group.status().state != Standing::Stopped;
            let descriptor = group.descriptor().filter(|_| serves)?;
            let owns = descriptor.owns(plan.keyspace.0, position);
            owns.then(|| Held { shard: group.shard(), epoch: descriptor.epoch })
        };
        let held = furthest(groups.iter().filter_map(holds))?;
        is_news(&map, held.shard, position).then_some(held)
    }
}

/// Of those whose groups believe that they hold a key: a frozen one, or one that lags behind a split, has
/// not come as far as the one that serves it.
fn furthest(held: impl Iterator<Item = Held>) -> Option<Held> {
    held.max_by_key(|held| held.epoch)
}

/// Whether the map does not have the shard there.
fn is_news(map: &ShardMap, shard: ShardId, position: u64) -> bool {
    map.locate(coracle_proto::ring::Position(position)).id != shard
}

impl Plan {
    fn has_one_key(&self) -> bool {
        matches!(self.task, Task::Get(_) | Task::Write { .. })
    }

    /// The same, of the shard that holds the key.
    pub(super) fn of_held(self, held: Option<Held>) -> Plan {
        let Some(Held { shard, epoch }) = held else { return self };
        let mut plan = Plan { shard, epoch, ..self };
        match &mut plan.task {
            Task::Write { request, .. } => request.epoch = epoch,
            // What the session has seen is told by the log of the other shard.
            Task::Get(lookup) => {
                if let Freshness::Session { judged_from, .. } = lookup.freshness {
                    lookup.freshness = Freshness::Newest { judged_from };
                }
            }
            _ => {}
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_that_had_the_key_the_furthest_is_asked() {
        let held = |shard, epoch| Held { shard: ShardId(shard), epoch };
        // s2 is frozen and not removed yet, s1 has taken it in, s3 lags behind them.
        let all = [held(3, 2), held(1, 9), held(2, 8)];
        assert_eq!(furthest(all.into_iter()), Some(held(1, 9)));
        assert_eq!(furthest([held(1, 4), held(17, 5)].into_iter()), Some(held(17, 5)), "a child");
        assert_eq!(furthest(std::iter::empty()), None);
    }
}

//! Owns the node's copy of the shard map: what requests are routed by, also without quorum. Does not
//! fetch it (see [`MapSource`]) and decides nothing: every group checks arc and epoch again.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use coracle_proto::shard_map::{NodeId, ShardId, ShardMap, ShardMapError};
use coracle_proto::v1;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Where a newer map comes from.
pub trait MapSource: Send + Sync + 'static {
    /// Looks for a newer map and puts what it finds into the cache. Ends also without success: the
    /// caller looks at the cache again and goes by what it holds.
    fn refresh(&self) -> BoxFuture<'static, ()>;
}

/// The cached map and those who follow it.
///
/// Invariants:
/// - the epoch never falls, and neither does the term of a shard's leader;
/// - readers never wait: a change is made beside the map that they hold.
#[derive(Default)]
pub struct MapCache {
    /// `None` before init.
    map: ArcSwapOption<ShardMap>,
    /// One change at a time, each on top of the one before.
    changing: Mutex<()>,
    changes: watch::Sender<u64>,
}

impl MapCache {
    /// An empty cache.
    pub fn new() -> Arc<MapCache> {
        Arc::default()
    }

    /// The newest map that this node has seen; `None` before init.
    pub fn current(&self) -> Option<Arc<ShardMap>> {
        self.map.load_full()
    }

    /// Takes a map in: a higher epoch replaces what is here, and of each shard the leader with the
    /// higher term stands. True when anything changed.
    pub fn update(&self, map: ShardMap) -> Result<bool, ShardMapError> {
        let _changing = self.changing.lock();
        let Some(current) = self.map.load_full() else {
            self.put(map);
            return Ok(true);
        };
        let mut merged = ShardMap::clone(&current);
        let changed = merged.merge(map)?;
        if changed {
            self.put(merged);
        }
        Ok(changed)
    }

    /// [`MapCache::update`] with a map as it travels, checked first.
    pub fn update_from_proto(&self, map: &v1::ShardMap) -> Result<(), ShardMapError> {
        self.update(ShardMap::from_proto(map)?).map(drop)
    }

    /// Takes a leader hint from a group's own status or from gossip. True when it was news.
    pub fn observe_leader(&self, shard: ShardId, term: u64, node: NodeId) -> bool {
        // Nearly all hints are old news: found without the lock and without a copy.
        let stands = |map: &ShardMap| {
            map.shard(shard).is_none_or(|known| {
                known.leader_term > term || (known.leader_term == term && known.leader.is_some())
            })
        };
        if self.map.load().as_ref().is_none_or(|map| stands(map)) {
            return false;
        }
        let _changing = self.changing.lock();
        let Some(current) = self.map.load_full() else {
            return false;
        };
        let mut hinted = ShardMap::clone(&current);
        let news = hinted.learn_leader(shard, node, term);
        if news {
            self.put(hinted);
        }
        news
    }

    /// Counts changes, leader hints among them. Changes that come faster than they are looked at
    /// melt into one.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn put(&self, map: ShardMap) {
        self.map.store(Some(Arc::new(map)));
        self.changes.send_modify(|changes| *changes += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(epoch: u64, leader: u64, term: u64) -> ShardMap {
        let shard = |id, start, end| v1::Shard {
            id,
            start,
            end,
            epoch: 1,
            replicas: [1, 2]
                .map(|n| v1::Replica { id: id * 10 + n, node: n, role: 1, ..Default::default() })
                .to_vec(),
            leader_node: leader,
            leader_term: term,
            ..Default::default()
        };
        ShardMap::from_proto(&v1::ShardMap {
            cluster_id: "c".into(),
            epoch,
            shards: vec![shard(0, 0, 0), shard(1, 0, 9), shard(2, 9, 0)],
            ..Default::default()
        })
        .expect("a valid map")
    }

    #[test]
    fn higher_epoch_replaces_and_lower_is_dropped() {
        let cache = MapCache::new();
        assert!(cache.current().is_none());
        assert_eq!(cache.update(map(2, 0, 0)), Ok(true));
        assert_eq!(cache.update(map(1, 0, 0)), Ok(false));
        assert_eq!(cache.update(map(2, 0, 0)), Ok(false));
        assert_eq!(cache.update(map(3, 0, 0)), Ok(true));
        assert_eq!(cache.current().map(|map| map.epoch().0), Some(3));
    }

    #[test]
    fn leader_of_the_higher_term_stands_over_every_map() {
        let cache = MapCache::new();
        assert!(!cache.observe_leader(ShardId(1), 5, NodeId(2)), "there is no map to hint on");
        cache.update(map(2, 1, 3)).unwrap();
        let watch = cache.watch();
        assert!(!cache.observe_leader(ShardId(1), 3, NodeId(2)), "one leader a term");
        assert!(!watch.has_changed().unwrap());
        assert!(cache.observe_leader(ShardId(1), 5, NodeId(2)));
        assert!(watch.has_changed().unwrap());
        assert!(!cache.observe_leader(ShardId(1), 6, NodeId(9)), "it holds no replica");
        assert_eq!(cache.update(map(9, 1, 4)), Ok(true));
        let shard = cache.current().unwrap().shard(ShardId(1)).unwrap().clone();
        assert_eq!((shard.leader, shard.leader_term), (Some(NodeId(2)), 5));
    }

    #[test]
    fn map_of_another_cluster_is_refused() {
        let cache = MapCache::new();
        cache.update(map(2, 0, 0)).unwrap();
        let mut foreign = map(9, 0, 0).to_proto();
        foreign.cluster_id = "d".into();
        assert!(cache.update(ShardMap::from_proto(&foreign).unwrap()).is_err());
        assert_eq!(cache.current().unwrap().epoch().0, 2);
    }
}

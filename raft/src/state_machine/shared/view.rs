//! A consistent look at a replica's state, as reads have it.
//!
//! Owns what a view can say of itself: what it holds, since when, and whether compaction has taken something
//! from under it. Does not decide who may read it.

use std::sync::Arc;

use coracle_storage::state::{Filter, Reader};

use super::SharedState;
use crate::descriptor::Descriptor;
use crate::error::GroupError;
use crate::history::History;
use crate::kin::Lineage;
use crate::types::{Position, StoredMembership, position};

/// A consistent look at a replica's state.
pub struct ReadState {
    /// Keys and versions.
    pub reader: Reader<'static>,
    /// Which arc this very view holds; `None` before the group was described, and while it is frozen: then it
    /// serves nothing.
    pub descriptor: Option<Descriptor>,
    /// The same, frozen or not.
    pub(crate) held: Option<Descriptor>,
    /// Up to which entry.
    pub position: Position,
    /// The group clock: the highest version that is in it.
    pub clock: u64,
    history: History,
    lineage: Arc<Lineage>,
    filter: Arc<Filter>,
    /// Who belongs to the group, by this very view.
    pub(crate) membership: Arc<StoredMembership>,
}

impl ReadState {
    /// The lowest version that may be read in a keyspace: what was superseded below may be gone.
    pub fn threshold(&self, keyspace: u32) -> u64 {
        self.history.threshold(keyspace)
    }

    /// Whether all that another shard ever held of this one's keys is in this view: it was split off from
    /// that shard, or has taken it in.
    pub fn descends_from(&self, shard: u64) -> bool {
        self.lineage.descends_from(shard)
    }

    /// Whether the view still shows all that it did when it was taken. A compaction goes by what is
    /// flushed meanwhile, not by views: of a keyspace with a short history it may drop what was the
    /// newest version here. To be asked after the newest state was looked at; a look at a fixed
    /// version compares that with the threshold instead. And once a split is flushed, what went to the
    /// child is dropped, also from under a view of before.
    pub fn is_whole(&self, keyspace: u32) -> bool {
        let filter = self.filter.state();
        let arc = self.descriptor.as_ref().and_then(|descriptor| descriptor.arc);
        // While it is paused it drops nothing, and its extent may be that of before a merge.
        let has_its_keys = filter.paused
            || filter.arc.is_none()
            || match (filter.extent, arc) {
                (Some(kept), Some(arc)) => covers(kept, arc),
                (kept, arc) => kept == arc,
            };
        filter.threshold(keyspace) <= self.clock && has_its_keys
    }
}

/// Whether all of an arc is in another one. What was kept when a split was flushed is more than what is
/// left after the next one.
fn covers(kept: (u64, u64), arc: (u64, u64)) -> bool {
    let last = |(_, end): (u64, u64)| end.wrapping_sub(1);
    kept.0 <= arc.0 && last(arc) <= last(kept)
}

impl SharedState {
    /// A view of the state together with the descriptor that holds for it.
    pub(crate) fn read(&self) -> Result<ReadState, GroupError> {
        let current = self.0.current.read();
        let store = current.store.as_ref().ok_or(GroupError::TooStale)?;
        let reader = store.reader().map_err(|error| GroupError::Storage(error.to_string()))?;
        Ok(ReadState {
            reader,
            descriptor: current.group.descriptor.clone().filter(|_| !current.group.is_frozen()),
            held: current.group.descriptor.clone(),
            position: current.last_applied.as_ref().map(position).unwrap_or_default(),
            clock: current.group.clock,
            history: current.group.history.clone(),
            lineage: current.group.kin.lineage().clone(),
            filter: store.filter().clone(),
            membership: current.membership.clone(),
        })
    }
}

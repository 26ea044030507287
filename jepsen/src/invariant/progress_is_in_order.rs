//! What is purged was applied, what is applied is committed, and what is committed is in the log. Owns no
//! memory.

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct ProgressIsInOrder;

impl Invariant for ProgressIsInOrder {
    fn sentence(&self) -> &'static str {
        "what is purged was applied, what is applied is committed, what is committed is in the log"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let status = &look.status;
        let index = |position: Option<coracle_raft::types::Position>| position.map(|at| at.index);
        let (purged, applied) = (index(status.purged), index(status.applied));
        let committed = index(status.committed);
        let in_order = purged <= applied && applied <= committed && committed <= status.last_index;
        (!in_order).then(|| {
            let last = status.last_index;
            format!(
                "n{} has purged {purged:?}, applied {applied:?}, committed {committed:?} of {last:?}",
                look.node + 1
            )
        })
    }
}

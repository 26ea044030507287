//! Owns the request ids of writes that came without one: this node is then their client. Does not
//! judge ids (see `coracle_raft::dedup`).

use std::collections::BTreeSet;
use std::sync::Arc;

use coracle_proto::v1;
use coracle_raft::clock::Clock;
use parking_lot::Mutex;

/// Makes request ids.
///
/// Invariant: a mark that goes out with an id never lies above a sequence that is still unanswered.
pub struct RequestIds {
    client: u64,
    clock: Arc<dyn Clock>,
    open: Mutex<Open>,
}

struct Open {
    next: u64,
    unanswered: BTreeSet<u64>,
}

/// An id on loan to one logical write, retries included; dropped when the write is answered.
pub(crate) struct Issued {
    ids: Arc<RequestIds>,
    pub(crate) id: v1::RequestId,
}

impl RequestIds {
    /// `client` is drawn at random at every start of the node: the sequence begins anew then.
    pub fn new(client: u64, clock: Arc<dyn Clock>) -> Arc<RequestIds> {
        let open = Mutex::new(Open { next: 1, unanswered: BTreeSet::new() });
        Arc::new(RequestIds { client, clock, open })
    }

    pub(crate) fn issue(self: &Arc<Self>) -> Issued {
        let mut open = self.open.lock();
        let sequence = open.next;
        open.next += 1;
        open.unanswered.insert(sequence);
        let lowest = open.unanswered.first().copied();
        let lowest_unanswered = lowest.expect("at least the one that was just added");
        let birth = self.clock.now_ms();
        let id = v1::RequestId { client: self.client, sequence, birth, lowest_unanswered };
        Issued { ids: self.clone(), id }
    }
}

impl Drop for Issued {
    fn drop(&mut self) {
        self.ids.open.lock().unanswered.remove(&self.id.sequence);
    }
}

#[cfg(test)]
mod tests {
    use coracle_raft::error::GroupError;

    use super::*;

    struct At(u64);

    impl Clock for At {
        fn now_ms(&self) -> u64 {
            self.0
        }

        fn check(&self) -> Result<(), GroupError> {
            Ok(())
        }
    }

    #[test]
    fn mark_stays_below_everything_unanswered() {
        let ids = RequestIds::new(7, Arc::new(At(42)));
        let (first, second) = (ids.issue(), ids.issue());
        assert_eq!((first.id.sequence, first.id.lowest_unanswered), (1, 1));
        assert_eq!((second.id.sequence, second.id.lowest_unanswered), (2, 1));
        assert_eq!((second.id.client, second.id.birth), (7, 42));
        drop(first);
        assert_eq!(ids.issue().id.lowest_unanswered, 2);
        drop(second);
        assert_eq!(ids.issue().id.lowest_unanswered, 4);
    }
}

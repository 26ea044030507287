//! Owns what a delete-range does: which keys it meets, where it ends, what is kept of it. Does not
//! choose the range or the limits (the leader does, before it proposes).
//!
//! # What may decide, and what may not
//!
//! Every replica must come to the same keys, also one that has compacted more than another, or that
//! applies again after a crash. Deleted and superseded versions are still there on one and gone on
//! the other. So nothing here may count them: what ends a walk is the range's end, or the number of
//! keys that are *live* at the request's version, not newer than its fence, and within the arc. Those
//! are the same everywhere.
//!
//! What remains is the work: a walk passes whatever dead versions lie in the range, and no bound on
//! them can stand here. The leader keeps it small instead. It looks at its own state before it
//! proposes, and sets the end of the step to where it had passed as many versions as a step may; the
//! entry then says that end to all. A replica that compacts later than the leader passes more, and
//! is slower by that, never different. What is written between the look and the apply is passed, and
//! counted by nothing where it lies above the fence: it is what the proposer's queue holds at most.
//!
//! Where a step has ended is part of its result: another leader, to which a retry comes, might have
//! set another end.
//!
//! # The fence
//!
//! A step names a version, and leaves alone what was written above it. It only happens at a version
//! of its own above that: from then on the group gives no version up to the fence any more. So behind
//! a step no key that it has passed is as old as its fence, ever: the same step, sent again or held
//! up somewhere for however long, under whatever id, deletes nothing that was written since.

use bytes::Bytes;
use coracle_storage::state::{KeyRange, Overlay};

use super::ApplyError;
use super::result::Verdict;
use crate::command::{Change, DeleteRange, NO_FENCE, Request};
use crate::descriptor::Descriptor;

const NOT_ALONE: &str = "a delete-range is a request of its own, without a condition";
const NO_LIMIT: &str = "a delete-range of no keys at most";

/// The delete-range that a sound request is, if it is one.
pub(super) fn of(request: &Request) -> Option<&DeleteRange> {
    request.operations.iter().find_map(|operation| match &operation.change {
        Change::DeleteRange(range) => Some(range),
        _ => None,
    })
}

/// What is wrong with a delete-range whatever the state.
pub(super) fn malformed(request: &Request) -> Option<&'static str> {
    let range = of(request)?;
    let alone = request.operations.len() == 1 && request.operations[0].condition.is_none();
    if !alone {
        Some(NOT_ALONE)
    } else if range.limit == 0 {
        Some(NO_LIMIT)
    } else {
        None
    }
}

/// Whether a delete-range names a fence that the version which it would get does not lie above. Never
/// of one that was applied before: the group clock has passed its fence.
pub(super) fn is_ahead(request: &Request, version: u64) -> bool {
    of(request).is_some_and(|range| range.fence != NO_FENCE && range.fence >= version)
}

/// Judges a delete-range at its version and, if it stands, writes its delete markers.
pub(super) fn judge(
    overlay: &mut Overlay,
    descriptor: &Descriptor,
    request: &Request,
    range: &DeleteRange,
    version: u64,
) -> Result<Verdict, ApplyError> {
    let limit = range.limit as usize;
    // Whether there is one more decides over all of them, or nothing at all.
    let wanted = limit.saturating_add(usize::from(range.whole));
    let keys = live(overlay, descriptor, request, range, version, wanted)?;
    if range.whole && keys.len() > limit {
        return Ok(Verdict::RangeTooLarge { limit: range.limit });
    }
    let next = match keys.last() {
        Some(last) if !range.whole && keys.len() == limit => behind(last),
        _ => range.end.clone(),
    };
    for key in &keys {
        overlay.delete(request.keyspace, key, version);
    }
    Ok(Verdict::RangeDeleted { deleted: keys.len() as u32, next, arc: descriptor.arc })
}

/// The first keys of the range that are live at the version, not newer than the fence, and the group's
/// own.
fn live(
    overlay: &Overlay,
    descriptor: &Descriptor,
    request: &Request,
    range: &DeleteRange,
    version: u64,
    wanted: usize,
) -> Result<Vec<Bytes>, ApplyError> {
    let start = &request.operations[0].key;
    let mut keys = Vec::new();
    if !range.end.is_empty() && range.end <= *start {
        return Ok(keys);
    }
    let end = (!range.end.is_empty()).then(|| range.end.to_vec());
    let reader = overlay.reader()?;
    let keyspace = request.keyspace;
    let found = reader.scan(keyspace, KeyRange { start: start.to_vec(), end }, false, version)?;
    for found in found {
        let found = found?;
        if found.version > range.fence {
            continue;
        }
        let key = found.key;
        let owned = |owned: &crate::command::Owned| {
            descriptor.owns(keyspace, owned.position(keyspace, &key))
        };
        if range.owned.as_ref().is_none_or(owned) {
            keys.push(key);
            if keys.len() == wanted {
                break;
            }
        }
    }
    Ok(keys)
}

/// The first key behind a key.
fn behind(key: &Bytes) -> Bytes {
    let mut behind = Vec::with_capacity(key.len() + 1);
    behind.extend_from_slice(key);
    behind.push(0);
    behind.into()
}

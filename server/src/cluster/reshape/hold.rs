//! Which points (`cluster::points`) lie around the orders of splits and merges, and behind what was recorded.
//!
//! Owns how they are told. Decides nothing. Handing leadership over changes nothing that a merge goes by: it is
//! no step.

use coracle_proto::{peer, v1};
use peer::ReshapeStep;

use super::Entry;
use crate::cluster::points::Point;

/// Right before and right after an order is heeded.
pub(in crate::cluster) fn around(
    operation: &v1::ClusterOperation,
    step: ReshapeStep,
) -> (Option<Point>, Option<Point>) {
    let merge = operation.merge.as_ref();
    let (before, after) = match step {
        ReshapeStep::Split => (Point::Split, Point::SplitDone),
        ReshapeStep::Thaw if merge.is_none() => (Point::SplitCancel, Point::SplitCancelled),
        ReshapeStep::Prepare => (Point::Announce, Point::Announced),
        ReshapeStep::Freeze => (Point::Freeze, Point::Frozen),
        ReshapeStep::Absorb => (Point::Absorb, Point::Absorbed),
        ReshapeStep::Thaw => (Point::Thaw, Point::Thawed),
        ReshapeStep::End if merge.is_some_and(|it| it.step() == v1::MergeStep::Cancel) => {
            (Point::Release, Point::Released)
        }
        ReshapeStep::End => (Point::EndMerge, Point::MergeEnded),
        // A question.
        ReshapeStep::Unspecified | ReshapeStep::Points => return (None, None),
    };
    (Some(before), Some(after))
}

/// Right behind an entry.
pub(in crate::cluster) fn behind(entry: &Entry) -> Option<Point> {
    Some(match entry {
        Entry::PlanSplit => Point::SplitPlanned,
        Entry::Split { .. } => Point::SplitRecorded,
        Entry::SplitAgain { .. } => Point::SplitTakenBack,
        Entry::Gather { .. } => Point::GatherBegun,
        Entry::Prepare => Point::MergePlanned,
        Entry::Freeze { .. } => Point::FreezePlanned,
        Entry::Absorb { .. } => Point::AbsorbDecided,
        Entry::Taken { .. } => Point::MergeRecorded,
        Entry::Flushed => Point::MergeFlushed,
        Entry::Cancel { .. } => Point::CancelDecided,
        Entry::Back { .. } => Point::MergeTakenBack,
        // It ends with it; or nothing but a wish is recorded.
        Entry::Ended { .. } | Entry::End { .. } | Entry::GiveUp { .. } => return None,
    })
}

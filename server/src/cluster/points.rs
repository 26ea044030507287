//! The points at which work on the cluster can be cut short: between any two of its steps.
//!
//! Owns their list, and the wait at each of them that tests ask for (`test.hold_steps`): a harness sees
//! in the log which one was reached, and ends whichever process it likes while nothing else happens.
//! Decides nothing.

use std::time::Duration;

/// A moment between two steps. What was done by then is durable, what follows has not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Point {
    /// An operation is recorded, nothing of it has begun.
    OperationRecorded,
    /// A move is in the map: who comes, and whom it replaces.
    MoveBegun,
    /// A node is about to be told to make a replica.
    Make,
    /// It was made, and nobody remembers that.
    Made,
    /// A group is about to be told to take a replica in.
    Add,
    /// It was taken in; the map does not have the group's epoch.
    Added,
    /// The map has the epoch that a group has come to.
    EpochRecorded,
    /// The map is about to say that a read replica can be read from.
    Settle,
    /// It says so.
    Settled,
    /// A group is about to let a replica vote, in the place of another.
    Promote,
    /// It votes; the map does not say so.
    Promoted,
    /// A group is about to let a voter go in whose place nobody comes.
    Retire,
    /// It votes no more; the map does not say so.
    Retired,
    /// The map says who votes, and the records who is to be removed.
    VotersRecorded,
    /// A replica is about to be taken out of the map, because it is given up or too many.
    Withdraw,
    /// It is out of the map, and its group knows it still.
    Withdrawn,
    /// A group is about to let go a replica that does not vote.
    Remove,
    /// It is no member any more.
    Removed,
    /// A node is about to be told to remove a replica.
    Destroy,
    /// It is removed, and the records do not say so.
    Destroyed,
    /// The records have forgotten it.
    Forgotten,
    /// A change of voters that was left half done is about to be ended.
    Finish,
    /// It is ended.
    Finished,
    /// The child of a split has its ids; its group knows nothing.
    SplitPlanned,
    /// A group is about to be told to split.
    Split,
    /// It has split; the map does not say so.
    SplitDone,
    /// The map has both.
    SplitRecorded,
    /// A split is cancelled: its group is about to be told, so that no order of before is heeded.
    SplitCancel,
    /// It knows.
    SplitCancelled,
    /// The records say that the split is not under way: it ends, or is planned anew.
    SplitTakenBack,
    /// Replicas of the right one of a merge are to move to the left one's nodes.
    GatherBegun,
    /// A merge is recorded with the epochs of both; no group knows of it.
    MergePlanned,
    /// One of the two groups is about to be told.
    Announce,
    /// It knows.
    Announced,
    /// The time within which the right one is to be frozen runs; its group was not told.
    FreezePlanned,
    /// It is about to be told.
    Freeze,
    /// It is frozen.
    Frozen,
    /// The records say that it is taken in.
    AbsorbDecided,
    /// The left one is about to be told.
    Absorb,
    /// It has taken it in; the map has both still.
    Absorbed,
    /// The map has one.
    MergeRecorded,
    /// Every replica holds all of it, and the records say which ones go.
    MergeFlushed,
    /// The left one is about to be told that the merge is over.
    EndMerge,
    /// It knows; the records do not say so.
    MergeEnded,
    /// The records say that a merge is cancelled.
    CancelDecided,
    /// The right one is about to be told that it goes on.
    Thaw,
    /// It serves.
    Thawed,
    /// The left one is about to be told that nothing comes.
    Release,
    /// It knows.
    Released,
    /// The records say that the merge is not under way: it ends, or is tried again.
    MergeTakenBack,
    /// An operation is recorded as ended.
    OperationEnded,
}

impl Point {
    /// Every point, in the order in which work comes by.
    pub const ALL: [Point; 51] = [
        Point::OperationRecorded,
        Point::MoveBegun,
        Point::Make,
        Point::Made,
        Point::Add,
        Point::Added,
        Point::EpochRecorded,
        Point::Settle,
        Point::Settled,
        Point::Promote,
        Point::Promoted,
        Point::Retire,
        Point::Retired,
        Point::VotersRecorded,
        Point::Withdraw,
        Point::Withdrawn,
        Point::Remove,
        Point::Removed,
        Point::Destroy,
        Point::Destroyed,
        Point::Forgotten,
        Point::Finish,
        Point::Finished,
        Point::SplitPlanned,
        Point::Split,
        Point::SplitDone,
        Point::SplitRecorded,
        Point::SplitCancel,
        Point::SplitCancelled,
        Point::SplitTakenBack,
        Point::GatherBegun,
        Point::MergePlanned,
        Point::Announce,
        Point::Announced,
        Point::FreezePlanned,
        Point::Freeze,
        Point::Frozen,
        Point::AbsorbDecided,
        Point::Absorb,
        Point::Absorbed,
        Point::MergeRecorded,
        Point::MergeFlushed,
        Point::EndMerge,
        Point::MergeEnded,
        Point::CancelDecided,
        Point::Thaw,
        Point::Thawed,
        Point::Release,
        Point::Released,
        Point::MergeTakenBack,
        Point::OperationEnded,
    ];

    /// As it is called in logs: `VotersRecorded` is `voters-recorded`.
    pub fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_ascii_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(letter.to_ascii_lowercase());
        }
        name
    }
}

/// Waits at every point for so long; zero: it is not even looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holding(pub Duration);

impl Holding {
    /// Tells that a point was reached, and waits. `shard` and `replica` are 0 where it is about none.
    pub(super) async fn at(self, point: impl Into<Option<Point>>, shard: u64, replica: u64) {
        let Some(point) = point.into().filter(|_| !self.0.is_zero()) else {
            return;
        };
        tracing::warn!(point = point.name(), shard, replica, "held between two steps");
        tokio::time::sleep(self.0).await;
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tokio::test expands to Runtime::block_on")]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_point_is_listed_once_in_the_order_of_their_declaration() {
        assert!(Point::ALL.is_sorted_by(|a, b| a < b));
        // The last one: whoever adds one behind it adds it to the list.
        assert_eq!(Point::ALL.len(), Point::OperationEnded as usize + 1);
        let names: BTreeSet<String> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        assert_eq!(Point::VotersRecorded.name(), "voters-recorded");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_waits_unless_it_was_asked_for() {
        let began = tokio::time::Instant::now();
        Holding::default().at(Point::Make, 1, 2).await;
        Holding(Duration::from_secs(1)).at(None, 1, 2).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        Holding(Duration::from_secs(1)).at(Point::Make, 1, 2).await;
        assert_eq!(began.elapsed(), Duration::from_secs(1));
    }
}

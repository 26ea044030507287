//! Owns what names a place in a group's log. Does not know what stands there.

/// Where an entry stands in a group's log.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The leader's term.
    pub term: u64,
    /// 0 is the first entry (the membership that the group began with).
    pub index: u64,
}

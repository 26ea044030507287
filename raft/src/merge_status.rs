//! Owns how far a merge is on one replica, as whoever carries it out sees it. Holds no code.

/// That a group serves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// For which merge.
    pub merge: u64,
    /// The index of the freeze in R's log. It is durable here.
    pub index: u64,
}

/// What a group has taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absorbed {
    /// By which merge.
    pub merge: u64,
    /// Whether this replica holds all of it durably: R's replica on its node is needed no more.
    pub flushed: bool,
}

/// How far a merge is on one replica. Everything that it says survives a crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeStatus {
    /// The merge under way, by [`crate::group::Group::prepare_merge`].
    pub merging: Option<u64>,
    /// Of R.
    pub frozen: Option<Frozen>,
    /// The epoch at which this replica was found to hold no key outside its arc, where that is still so.
    pub foreign_free: Option<u64>,
    /// Of L: the last merge that took something in.
    pub absorbed: Option<Absorbed>,
}

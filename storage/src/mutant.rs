//! Defects on purpose: the fault harness puts one in and has to find it. Owns the list, and which of them is
//! in.
//!
//! Here, because every crate above has some. A release build has none: there the question is constant. Nothing
//! but the harness chooses one, for its whole process.

use std::sync::atomic::{AtomicU8, Ordering};

/// 0: none.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

macro_rules! mutants {
    ($($(#[doc = $what:literal])+ $mutant:ident = $name:literal,)+) => {
        /// A defect.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Mutant {
            /// Not a defect, and never in.
            None = 0,
            $($(#[doc = $what])+ $mutant,)+
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &'static [Mutant] = &[$(Mutant::$mutant,)+];

            /// As it is called on command lines.
            pub fn name(self) -> &'static str {
                match self {
                    Mutant::None => "none",
                    $(Mutant::$mutant => $name,)+
                }
            }

            /// What it does, in a sentence.
            pub fn what(self) -> &'static str {
                match self {
                    Mutant::None => "",
                    $(Mutant::$mutant => concat!($($what,)+).trim_ascii(),)+
                }
            }
        }
    };
}

mutants! {
    /// The log answers before its sync.
    AcknowledgesBeforeSync = "acknowledges-before-sync",
    /// Votes are acknowledged and not written.
    ForgetsVotes = "forgets-votes",
    /// What a new leader has cut off the log comes back after a restart.
    ForgetsTruncations = "forgets-truncations",
    /// The log may be purged up to a state that no flush has made durable.
    PurgesBeyondFlush = "purges-beyond-flush",
    /// Compaction drops versions that the history still has to show.
    DropsHistory = "drops-history",
    /// A leader reads without checking that it still is one.
    SkipsReadIndex = "skips-read-index",
    /// A leader trusts its lease twenty times as long as its followers keep it.
    LeaseTooLong = "lease-too-long",
    /// A replica that restarts votes at once, whomever it has answered just before.
    NoEmbargo = "no-embargo",
    /// A follower reads what it has, without asking the leader how far that must be.
    FollowersDoNotAsk = "followers-do-not-ask",
    /// Reads in a session do not wait for what the session has seen.
    ForgetsSessions = "forgets-sessions",
    /// A bounded read is as old as it happens to be.
    IgnoresBounds = "ignores-bounds",
    /// A version that was fixed for a read does not hold later stamps back.
    FixesNothing = "fixes-nothing",
    /// A new leader does not heed up to where the one before it may have had versions read.
    IgnoresCeilings = "ignores-ceilings",
    /// A read at a version whose history is gone is answered with what is left.
    ServesWhatIsGone = "serves-what-is-gone",
    /// Results of earlier attempts are not looked for: a retry is applied again.
    ForgetsRequestIds = "forgets-request-ids",
    /// Each attempt of a call is another request.
    RetriesUnderNewIds = "retries-under-new-ids",
    /// A write that was proposed and not heard of counts as not applied.
    UnknownIsNotApplied = "unknown-is-not-applied",
    /// Conditions always hold.
    IgnoresConditions = "ignores-conditions",
    /// The requests of an entry get each other's answers.
    SwapsAnswers = "swaps-answers",
    /// Entries that a replica applies together are applied in the wrong order.
    AppliesOutOfOrder = "applies-out-of-order",
    /// A snapshot's files are older than the index that it names.
    SnapshotBehindIndex = "snapshot-behind-index",
    /// A shard serves keys that it gave away in a split.
    ServesForeignKeys = "serves-foreign-keys",
    /// The child of a split begins with a clock of its own, behind its parent's.
    ChildClockGoesBack = "child-clock-goes-back",
    /// A neighbour is taken in without its keys.
    TakesNothingIn = "takes-nothing-in",
}

impl Mutant {
    /// Whether it is in.
    #[inline]
    pub fn is_in(self) -> bool {
        cfg!(debug_assertions) && CHOSEN.load(Ordering::Relaxed) == self as u8
    }

    /// Puts it in, for the rest of the process. False in a release build, which has none.
    pub fn choose(self) -> bool {
        CHOSEN.store(self as u8, Ordering::Relaxed);
        cfg!(debug_assertions)
    }

    /// The one that is called so.
    pub fn named(name: &str) -> Option<Mutant> {
        Self::ALL.iter().copied().find(|mutant| mutant.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Mutant;

    #[test]
    fn each_has_a_name_of_its_own_and_none_is_in() {
        let names: BTreeSet<&str> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
        assert_eq!(names.len(), Mutant::ALL.len());
        for mutant in Mutant::ALL.iter().copied() {
            assert_eq!(Mutant::named(mutant.name()), Some(mutant));
            assert!(!mutant.is_in() && !mutant.what().is_empty(), "{mutant:?}");
        }
        assert!(!Mutant::None.what().contains('.'));
    }
}

//! The judges of histories. Owns what they return; each judge has a file of its own.

pub mod scans;
pub mod witness;
pub mod search;
pub mod shrink;

use std::fmt;

/// A rule that a history breaks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Violation {
    /// The rule, as a sentence.
    pub rule: &'static str,
    /// The key on which.
    pub key: String,
    /// What was found.
    pub why: String,
    /// The operations that show it.
    pub calls: Vec<u64>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: key {}, calls {:?}: {}", self.rule, self.key, self.calls, self.why)
    }
}

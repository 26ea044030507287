//! No replica stops by itself while its node goes on: a broken assertion ends a group. Owns no memory.

use super::{Invariant, Look};

/// See the module.
#[derive(Default)]
pub(super) struct NothingStopsByItself;

impl Invariant for NothingStopsByItself {
    fn sentence(&self) -> &'static str {
        "no replica stops by itself"
    }

    fn look(&mut self, look: &Look) -> Option<String> {
        let why = look.status.failed.as_ref().filter(|_| !look.node_stops)?;
        Some(format!("replica {} on n{}: {why}", look.replica, look.node + 1))
    }
}

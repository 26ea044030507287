//! Owns the failure of a run: what was tried and why it did not work. Failed operations of a load are
//! no failure of the run (see `tally`).

use std::fmt;

/// Why a run gave no figures.
#[derive(Clone, Debug)]
pub struct Failure(String);

impl Failure {
    /// Says what is wrong.
    pub fn new(text: impl Into<String>) -> Failure {
        Failure(text.into())
    }

    /// For `map_err`: what was tried, in front of why it failed.
    pub fn of<E: fmt::Display>(what: impl fmt::Display) -> impl FnOnce(E) -> Failure {
        move |error| Failure(format!("{what}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

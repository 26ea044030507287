//! The one integration test binary of this crate. Owns the list of its modules; each module says
//! for itself what only it can find.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod deploy;
mod e2e;
mod help;
mod lone;
mod pictures;
mod upgrade;
mod workspace;

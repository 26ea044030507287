//! The one integration test binary of this crate. Owns the list of its modules; each module says
//! for itself what only it can find.

mod e2e;
mod help;
mod lone;
mod workspace;

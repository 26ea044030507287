//! Names the client's integration tests: the whole client against a cluster in memory, on a paused
//! clock.

mod calls;
mod conformance;
mod deletes;
mod examples;
mod faults;
mod nearest;
mod operations;
mod others;
mod scans;
mod start;

//! Names the client's integration tests: the whole client against a cluster in memory, on a paused
//! clock.

mod calls;
mod conformance;
mod faults;
mod others;
mod scans;
mod start;

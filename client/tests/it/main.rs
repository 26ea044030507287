//! Names the client's integration tests: the whole client against scripted nodes, on a paused clock.

mod calls;
mod fake;
mod deletes;
mod faults;
mod others;
mod scans;
mod services;

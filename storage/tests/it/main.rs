//! Owns the list of the integration tests' modules. Does not hold tests of its own.

mod log_crash;
mod state_checkpoint;
mod state_engine;
mod state_rig;
mod state_versions;

//! Owns the list of the integration tests' modules. Does not hold tests of its own.

mod fs_faulty;
mod fs_real;
mod log_calls;
mod log_crash;
mod log_damage;
mod log_failure;
mod log_format;
mod log_freeing;
mod log_rig;
mod state_checkpoint;
mod state_engine;
mod state_filter;
mod state_model;
#[cfg(fault_env)]
mod state_power;
mod state_rig;
mod state_versions;

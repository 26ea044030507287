//! Names the rooms of a replicated group, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

mod wire;
mod position;
pub mod runtime;
pub mod descriptor;
pub mod rules;
pub mod history;
pub mod command;
pub mod dedup;
mod kin;
pub mod apply;
pub mod types;
pub mod error;
pub mod observer;
mod entry;
mod message;
pub mod transport;
mod snapshot;
mod log_store;
pub mod birth;
pub mod state_machine;
mod network;
pub mod leadership;
pub mod lag;
pub mod load;
pub mod lease;
pub mod clock;
pub mod health;
mod environment;
mod turns;
mod membership;
mod proposer;
mod appends;
mod read_point;
mod looks;
pub mod reader;
pub mod group;
pub mod host;

#[cfg(test)]
mod conformance;
#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "these run on a runtime and threads of their own")]
mod safety;

pub use wire::Malformed;

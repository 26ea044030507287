#![doc = include_str!("../README.md")]

pub mod apply;
pub mod clock;
pub mod command;
pub mod dedup;
pub mod descriptor;
mod entry;
pub mod error;
pub mod group;
pub mod health;
pub mod host;
pub mod leadership;
pub mod lease;
mod log_store;
mod membership;
mod message;
mod network;
pub mod observer;
mod proposer;
pub mod reader;
pub mod runtime;
mod snapshot;
pub mod state_machine;
pub mod transport;
pub mod types;
mod wire;

#[cfg(test)]
mod conformance;

pub use wire::Malformed;

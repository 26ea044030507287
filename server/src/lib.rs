//! Names the rooms of a node, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod config;
pub mod metrics;
pub mod clock;
pub mod identity;
pub mod net;
pub mod transport;
pub mod http;
pub mod map;
pub mod admission;
mod memory;
pub mod load;
pub mod placement;
pub mod records;
pub mod cluster;
pub mod home;
pub mod fault;
pub mod router;
mod versions;
pub mod scan;
pub mod delete;
pub mod peers;
pub mod service;
pub mod node;
pub mod run;

pub use run::{RunningNode, StartError, machine_memory_bytes, run};

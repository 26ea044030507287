//! Names the rooms of a node, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod admission;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod fault;
pub mod home;
pub mod http;
pub mod identity;
pub mod map;
pub mod metrics;
pub mod net;
pub mod node;
pub mod peers;
pub mod placement;
pub mod records;
pub mod router;
pub mod run;
pub mod scan;
pub mod service;
pub mod transport;

pub use run::{RunningNode, StartError, machine_memory_bytes, run};

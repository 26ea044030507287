//! Names the rooms of the fault harness, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod history;
pub mod trace;
pub mod checker;
pub mod timeline;
pub mod replay;
pub mod cluster;
pub mod workload;
pub mod invariant;
pub mod nemesis;
pub mod simulation;
pub mod sweep;
pub mod measure;
pub mod command;

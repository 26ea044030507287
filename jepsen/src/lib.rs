//! Names the rooms of the fault harness, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod checker;
pub mod cluster;
pub mod command;
pub mod history;
pub mod invariant;
pub mod measure;
pub mod nemesis;
pub mod simulation;
pub mod sweep;
pub mod trace;
pub mod workload;

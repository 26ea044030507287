//! Names the rooms of the benchmarks, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod cluster;
pub mod compare;
pub mod failure;
pub mod limit;
pub mod load;
pub mod metrics;
pub mod report;
pub mod schedule;
pub mod tally;
pub mod workload;

//! Names the rooms of the benchmarks, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod failure;
pub mod metrics;
pub mod cluster;
pub mod schedule;
pub mod tally;
pub mod report;
pub mod workload;
pub mod limit;
pub mod load;
pub mod compare;

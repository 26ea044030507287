//! Names the rooms of the benchmarks, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod failure;
pub mod metrics;
pub mod process;
pub mod cluster;
pub mod schedule;
pub mod tally;
pub mod report;
pub mod chart;
pub mod workload;
pub mod witness;
pub mod peer;
pub mod port;
pub mod load;
pub mod limit;
pub mod stages;
pub mod micro;
pub mod rig;
pub mod results;
pub mod suite;
pub mod grow;
pub mod aims;
pub mod page;
pub mod baseline;

//! What clients do while things go wrong. Owns nothing itself; each workload has a file of its own.

pub mod register;

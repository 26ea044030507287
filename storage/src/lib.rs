//! Owns the storage crate's rooms and the names that other crates use. Does not hold code of its
//! own.
#![doc = include_str!("../README.md")]

pub mod exec;
pub mod fs;
mod replica;
pub mod error;
pub mod options;
pub mod mutant;
pub mod log;
pub mod state;

pub use error::Error;
pub use exec::{Exec, Job, RealExec, Task, Wake};
pub use fs::{File, Fs, OpenMode, RealFs, Space};
pub use log::{Damage, Done, Log, LogEntry, LogStats, Pin, Recovery, ReplicaId, ReplicaLogState};
pub use mutant::Mutant;
pub use options::LogOptions;

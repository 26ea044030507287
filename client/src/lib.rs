//! Names the rooms of the client, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod topology;
pub mod net;
mod session;
mod error;
mod retry;
mod budget;
mod near;
mod hedge;
mod stats;
mod route;
mod connection;
mod pipeline;
mod follow;
mod driver;
pub mod admin;
pub mod answer;
pub mod request;
mod resume;
pub mod scan;
pub mod range;
mod client;
pub mod testing;

pub use admin::Admin;
pub use answer::{
    BatchOutcome, Cas, Counter, Entry, KeyValue, OperationOutcome, Read, Served, Version, Written,
};
pub use client::{Builder, Client, Keyspace};
pub use error::{Error, ErrorKind, Outcome};
pub use pipeline::WhenFull;
pub use range::{DeleteProgress, DeletedRange};
pub use request::Operation;
pub use scan::{Page, Pages, ScanStream};
pub use session::{Consistency, RequestId, SessionMark};
pub use stats::Stats;
pub use topology::{ClusterMap, EntityRule, NodeId, ShardId};

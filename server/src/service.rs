//! Names the public services of a node. Holds no code.

pub mod admin;
pub mod cluster;
pub mod health;
pub mod kv;
pub mod pipeline;
pub mod unsent;

//! Names the rooms of the command line, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod args;
pub mod failure;
pub mod encoding;
pub mod output;
pub mod notify;
mod flood;
pub mod server;
pub mod context;
pub mod state;
pub mod data;
pub mod import;
pub mod export;
pub mod delete_range;
pub mod admin;
pub mod demo;

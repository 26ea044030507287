//! Names the rooms of the command line, in the order in which they use each other. Holds no code.
#![doc = include_str!("../README.md")]

pub mod admin;
pub mod args;
pub mod context;
pub mod data;
pub mod demo;
pub mod encoding;
pub mod export;
pub mod failure;
pub mod import;
pub mod output;
pub mod server;

//! The contract's tests. Each module tests the file of `src` that bears its name; `generated`
//! holds the checked-in code to the `.proto` files, and those to the past.

mod entity;
mod generated;
mod limits;
mod reason;
mod ring;
mod shard_map;
mod token;

//! The crate's integration tests, one binary. Each module says what only it can find.

mod apply_command;
mod apply_dedup;
mod apply_histories;
mod apply_history;
mod apply_model;
mod apply_range;
mod apply_past;
mod apply_reshape;
mod apply_rules;
mod apply_store;
mod apply_words;
mod cluster;
mod cluster_past;
mod members;
mod transfers;
mod reads;
mod reclaim;
mod voters;
mod removal;
mod ring_rig;
mod split;
mod merge;
mod split_rocks;

//! The crate's integration tests, one binary. Each module says what only it can find.

mod apply_command;
mod apply_dedup;
mod apply_histories;
mod apply_history;
mod apply_model;
mod apply_rules;
mod apply_store;
mod apply_words;
mod cluster;
mod reads;

//! Owns the state of one shard replica: one ordered store per replica, what its bytes mean, how it
//! is flushed, checkpointed, compacted and swapped. Does not know shards, Raft, hashing or what a
//! request does.
//!
//! **Durability.** A store is written without a write-ahead log of its own: the node's shared Raft
//! log is the only one. A [`Batch`] is atomic, and durable only after [`Engine::flush`]; after a
//! crash the store is as after some earlier batch, no batch in part. So whoever applies the log
//! puts the applied position into the same batch as the data, reads it back at open
//! ([`ReplicaState::applied_bytes`]) and replays from there.
//!
//! **Two engines, one contract.** [`RocksEngines`] (on disk or wholly in memory) serves real nodes,
//! [`MapEngines`] (an ordered map, deterministic, all files through the [`crate::Fs`] seam) serves
//! simulation. One conformance suite runs on all of them.
//!
//! Not here: who may read or write what (the apply function), when to flush (the host that bounds
//! the log), how checkpoint files travel (the snapshot code above).

pub mod batch;
pub mod key;
pub mod value;

pub mod filter;

pub mod checkpoint;

pub mod engine;

mod image;
mod memory;

pub mod budget;
mod rocks_view;

mod rocks;

mod read;

mod overlay;

mod sample;

mod db;

pub use batch::{Batch, BatchOp};
pub use budget::StateOptions;
pub use checkpoint::{CHUNK_BYTES, FileEntry, Incoming, Manifest};
pub use db::ReplicaState;
pub use engine::{Cursor, Engine, Engines, OpenState, Stratum, View};
pub use filter::{ArcFilter, Filter, FilterState};
pub use key::{Key, Kind, MetaName};
pub use memory::MapEngines;
pub use overlay::Overlay;
pub use read::{Found, KeyRange, Reader, Scan, Versioned};
pub use rocks::RocksEngines;
pub use sample::Sample;

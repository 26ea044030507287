//! What the parts below a node allow on this machine, measured alone: no cluster can be faster for
//! longer than they are. Names its rooms; holds no code.

pub mod alone;
pub mod disk;
pub mod echo;
pub mod rocksdb;

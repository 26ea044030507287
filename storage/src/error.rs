//! Owns the crate's error enum, named by what the caller must do. Does not map errors to gRPC (see
//! `server`).

use std::io;
use std::path::{Path, PathBuf};

use crate::replica::ReplicaId;

/// What went wrong in storage. Broken invariants are not here: they panic.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bytes on disk are not what was written. Give the replica up and rebuild it from its group.
    #[error("{}: damaged at byte {offset}: {why}", file.display())]
    Corruption {
        /// The damaged file.
        file: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What does not hold.
        why: String,
    },
    /// The file was written by a version that this program does not know. Start a newer program.
    #[error(
        "{}: format version {found} is not known here (newest known: {known}); \
         start it with the newer release that wrote it", file.display()
    )]
    Format {
        /// The file in question.
        file: PathBuf,
        /// The version that it carries.
        found: u32,
        /// The newest version that this program reads.
        known: u32,
    },
    /// The replica has no `create` record, or was destroyed. Create it first.
    #[error("replica {0} is unknown to this node's log")]
    UnknownReplica(ReplicaId),
    /// The replica lost acknowledged data. Only `destroy` is left for it: rebuild it under a fresh
    /// id.
    #[error("replica {replica} is recovering: {why}; rebuild it from its group under a fresh id")]
    Recovering {
        /// The replica that may not serve.
        replica: ReplicaId,
        /// File, offset and reason of the damage.
        why: String,
    },
    /// The caller broke a rule of the call (a gap, a limit, a name). Nothing was changed.
    #[error("{why}")]
    Invalid {
        /// The rule that was broken.
        why: String,
    },
    /// Too much waits already. Nothing was changed; try again later.
    #[error("overloaded: {why}")]
    Overloaded {
        /// The bound that was met.
        why: String,
    },
    /// No room on the disk.
    #[error("{}: no space left on the device", path.display())]
    Full {
        /// The file or directory that could not grow.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// The state store refused (RocksDB's own words). The replica stops.
    #[error("state store: {why}")]
    Engine {
        /// Its answer.
        why: String,
    },
    /// Storage was closed, or stopped after a failed write. Whether the operation took effect is
    /// unknown.
    #[error("storage is stopped: {why}")]
    Stopped {
        /// What stopped it.
        why: String,
    },
}

impl Error {
    /// Wraps an answer of the operating system; a full disk gets its own variant.
    pub fn io(path: &Path, source: io::Error) -> Error {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full { path },
            _ => Error::Io { path, source },
        }
    }

    /// Damage in a file, with its place.
    pub fn corruption(file: &Path, offset: u64, why: impl Into<String>) -> Error {
        Error::Corruption { file: file.to_path_buf(), offset, why: why.into() }
    }

    /// A broken rule of a call.
    pub fn invalid(why: impl Into<String>) -> Error {
        Error::Invalid { why: why.into() }
    }
}

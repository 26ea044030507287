//! Owns who this node is, on its disk: `IDENTITY`, the known nodes in `PEERS`, and that one process at
//! a time uses the directory. Does not own what else lies in the directory, nor decide whom to ask for
//! an identity.

mod file;
mod peers;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_raft::types::NodeId;
use coracle_storage::fs::{read_file, write_file_atomic};
use coracle_storage::{Fs, OpenMode};
use rand::{Rng, RngExt};

pub use peers::{Peer, Peers};

use file::{Fields, Reader};

const IDENTITY: &str = "IDENTITY";
const LOCK: &str = "LOCK";

/// The newest format that this program reads, and the one that it writes.
pub const FORMAT: u32 = 1;

/// What may lie in a directory that is not a node's yet: what an interrupted start leaves, the plan of
/// an init or the number of a join that were begun here (they come before the identity), and what
/// `mkfs` puts into a mount point.
const HARMLESS: [&str; 10] = [
    LOCK,
    PROBE,
    "IDENTITY.new",
    "PEERS",
    "PEERS.new",
    "INIT",
    "INIT.new",
    "JOIN",
    "JOIN.new",
    "lost+found",
];

/// Written and removed to see whether the directory takes files at all.
const PROBE: &str = "PROBE";

/// What only a node that has an identity makes.
const GROWN: [&str; 4] = ["log", "shards", "MAP", "SALT"];

/// Names one cluster among all: 128 random bits, written as a UUID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(String);

impl ClusterId {
    /// A new one.
    pub fn generate(rng: &mut impl Rng) -> ClusterId {
        let mut bits: u128 = rng.random();
        // Version 4 and the usual variant, so that tools take it for what it looks like.
        bits = bits & !(0xf << 76) | 0x4 << 76;
        bits = bits & !(0x3 << 62) | 0x2 << 62;
        let hex = format!("{bits:032x}");
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        ClusterId(parts.join("-"))
    }

    /// Reads one; `None` when it is none.
    pub fn parse(text: &str) -> Option<ClusterId> {
        let dash = |at: usize| matches!(at, 8 | 13 | 18 | 23);
        let fits = |(at, byte): (usize, u8)| match dash(at) {
            true => byte == b'-',
            false => byte.is_ascii_digit() || matches!(byte, b'a'..=b'f'),
        };
        let whole = text.len() == 36 && text.bytes().enumerate().all(fits);
        whole.then(|| ClusterId(text.to_owned()))
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a node does not start on a directory. Each says how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something else lies there.
    #[error(
        "{} is not a data directory of Coracle: it holds {found}, and no IDENTITY; \
         name an empty or new directory with --data-dir", dir.display()
    )]
    NotOurs {
        /// The directory.
        dir: PathBuf,
        /// Some of what lies there.
        found: String,
    },
    /// There is data, but nothing says whose.
    #[error(
        "{} holds {found} but no IDENTITY: the node that it belonged to cannot be told. \
         Bring IDENTITY back from where the directory was copied from, or start this node empty in a \
         new directory: its cluster rebuilds its replicas", dir.display()
    )]
    Beheaded {
        /// The directory.
        dir: PathBuf,
        /// What lies there.
        found: String,
    },
    /// The bytes are not what was written.
    #[error(
        "{} is damaged: {why}. Start this node empty in a new directory: its cluster rebuilds its \
         replicas{aside}", file.display(),
        aside = if file.ends_with("PEERS") { "; or remove PEERS, which is learnt anew from --join" } else { "" }
    )]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What does not hold.
        why: String,
    },
    /// A newer program wrote it.
    #[error(
        "{} has format {found}, this program reads up to {FORMAT}: start the newer release that \
         wrote it", file.display()
    )]
    Format {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The directory is of another cluster.
    #[error(
        "{} belongs to cluster {found}, not to {wanted}: --data-dir or --join is wrong. A node \
         never changes its cluster; to join this one, start it in an empty directory", dir.display()
    )]
    OtherCluster {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        found: ClusterId,
        /// Whose it should be.
        wanted: ClusterId,
    },
    /// The directory is of another node.
    #[error(
        "{} belongs to node n{}, not to n{wanted}: --data-dir is wrong, or the directory was copied. \
         A copy must never run; start n{wanted} in its own directory",
        dir.display(), found.0, wanted = wanted.0
    )]
    OtherNode {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        found: NodeId,
        /// Whose it should be.
        wanted: NodeId,
    },
    /// Another process runs on it.
    #[error(
        "{} is in use by {}: stop it first, or give this node a directory of its own \
         with --data-dir", dir.display(),
        holder.as_deref().map_or("another process".to_owned(), |pid| format!("process {pid}"))
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// The other's process id, where it left it.
        holder: Option<String>,
    },
    /// No room.
    #[error("{}: the disk is full: make room (a node needs some even to start)", path.display())]
    Full {
        /// What could not be written.
        path: PathBuf,
    },
    /// No right to write.
    #[error(
        "{} cannot be written ({source}): give the directory to the user that runs the node \
         (chown), or remount it writable", path.display()
    )]
    ReadOnly {
        /// What could not be written.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Anything else that the system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    fn io(path: &Path, source: io::Error) -> Error {
        use io::ErrorKind;
        let path = path.to_owned();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::Full { path },
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                Error::ReadOnly { path, source }
            }
            _ => Error::Io { path, source },
        }
    }
}

/// Whether the directory is locked against other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// With the system's file lock, which ends with the process however that ends.
    Process,
    /// Not at all: the simulation's files are seen by one node only.
    None,
}

/// What a directory is.
#[derive(Debug)]
pub enum Opened {
    /// Nobody's yet.
    Fresh(Fresh),
    /// A node's, which has just begun another start.
    Existing(Identity),
}

/// A directory that takes files, is locked, and waits for an identity.
#[derive(Debug)]
pub struct Fresh {
    home: Home,
}

/// Who this node is. Holds the directory's lock.
///
/// Invariant: the start count on disk, synced, is at least [`Identity::start_count`]; so no two runs
/// of a node ever show the same one, and its peers can tell a copied or rolled-back directory.
#[derive(Debug)]
pub struct Identity {
    home: Home,
    cluster_id: ClusterId,
    node_id: NodeId,
    hash_seed: u64,
    start_count: u64,
}

/// The directory and what keeps others out of it.
struct Home {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    /// Unlocked when it is dropped.
    _lock: Option<std::fs::File>,
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dir.fmt(f)
    }
}

impl Identity {
    /// Opens a node's directory, and makes it where there is none. An existing node's start counter
    /// is raised and synced before anything else is done with it.
    pub fn open(fs: Arc<dyn Fs>, dir: &Path, locking: Locking) -> Result<Opened, Error> {
        make_dir(&*fs, dir).map_err(|error| Error::io(dir, error))?;
        let names = fs.read_dir(dir).map_err(|error| Error::io(dir, error))?;
        // Before the first file is put there: somebody else's directory stays as it was.
        let existing = names.iter().any(|name| name == IDENTITY);
        if !existing {
            refuse_foreign(dir, &names)?;
        }
        let lock = match locking {
            Locking::Process => Some(lock(dir)?),
            Locking::None => None,
        };
        let home = Home { fs, dir: dir.to_owned(), _lock: lock };
        // Looked at again under the lock: another process may just have given it an identity.
        if !home.fs.exists(&dir.join(IDENTITY)) {
            home.probe()?;
            return Ok(Opened::Fresh(Fresh { home }));
        }
        let mut identity = Identity::read(home)?;
        identity.start_count += 1;
        identity.write()?;
        Ok(Opened::Existing(identity))
    }

    fn read(home: Home) -> Result<Identity, Error> {
        let path = home.dir.join(IDENTITY);
        let bytes = read_file(&*home.fs, &path).map_err(|error| Error::io(&path, error))?;
        let mut reader = Reader::new(&path, &bytes)?;
        let cluster = reader.take("cluster")?;
        let identity = Identity {
            cluster_id: ClusterId::parse(cluster)
                .ok_or_else(|| reader.damaged(format!("{cluster:?} is no cluster id")))?,
            node_id: NodeId(reader.take_number("node")?),
            hash_seed: reader.take_number("hash_seed")?,
            start_count: reader.take_number("start_count")?,
            home,
        };
        reader.end()?;
        Ok(identity)
    }

    fn write(&self) -> Result<(), Error> {
        let mut fields = Fields::new(
            "Who this node is. Written by the node at every start; never copy or edit it.",
        );
        fields.put("cluster", &self.cluster_id);
        fields.put("node", self.node_id.0);
        fields.put("hash_seed", self.hash_seed);
        fields.put("start_count", self.start_count);
        let path = self.home.dir.join(IDENTITY);
        write_file_atomic(&*self.home.fs, &path, &fields.finish())
            .map_err(|error| Error::io(&path, error))
    }

    /// The cluster.
    pub fn cluster_id(&self) -> &ClusterId {
        &self.cluster_id
    }

    /// The node.
    pub fn node_id(&self) -> NodeId {
        self.node_id
    }

    /// Seed of the position hash, the same on all nodes of a cluster.
    pub fn hash_seed(&self) -> u64 {
        self.hash_seed
    }

    /// Which start of this node this is, from 1.
    pub fn start_count(&self) -> u64 {
        self.start_count
    }

    /// The data directory.
    pub fn dir(&self) -> &Path {
        &self.home.dir
    }

    /// Refuses to be a node that the caller does not mean; `None` means any.
    pub fn expect(&self, cluster: Option<&ClusterId>, node: Option<NodeId>) -> Result<(), Error> {
        let dir = &self.home.dir;
        if let Some(wanted) = cluster.filter(|wanted| **wanted != self.cluster_id) {
            let (found, wanted) = (self.cluster_id.clone(), wanted.clone());
            return Err(Error::OtherCluster { dir: dir.clone(), found, wanted });
        }
        if let Some(wanted) = node.filter(|wanted| *wanted != self.node_id) {
            return Err(Error::OtherNode { dir: dir.clone(), found: self.node_id, wanted });
        }
        Ok(())
    }
}

impl Fresh {
    /// Gives the directory to a node, durably: when it returns, every later start is that node's.
    pub fn adopt(
        self,
        cluster_id: ClusterId,
        node_id: NodeId,
        hash_seed: u64,
    ) -> Result<Identity, Error> {
        assert!(node_id.0 != 0, "node 0 stands for a node without identity");
        let identity = Identity { home: self.home, cluster_id, node_id, hash_seed, start_count: 1 };
        identity.write()?;
        Ok(identity)
    }
}

impl Home {
    /// A node that cannot keep an identity had better know before it asks for one.
    fn probe(&self) -> Result<(), Error> {
        let path = self.dir.join(PROBE);
        let attempt = || {
            if self.fs.exists(&path) {
                self.fs.remove_file(&path)?;
            }
            let file = self.fs.open(&path, OpenMode::CreateNew)?;
            file.write_at(&[0; 4096], 0)?;
            file.sync()?;
            self.fs.remove_file(&path)?;
            self.fs.sync_dir(&self.dir)
        };
        attempt().map_err(|error| Error::io(&self.dir, error))
    }
}

/// Makes the directory with those above it, durably: a synced IDENTITY is worth nothing in a directory
/// whose own name a power cut takes away.
fn make_dir(fs: &dyn Fs, dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> =
        dir.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !fs.exists(dir)).collect();
    fs.create_dir_all(dir)?;
    for made in missing {
        let parent = made.parent().filter(|parent| !parent.as_os_str().is_empty());
        fs.sync_dir(parent.unwrap_or(Path::new(".")))?;
    }
    Ok(())
}

fn refuse_foreign(dir: &Path, names: &[String]) -> Result<(), Error> {
    let foreign: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| !HARMLESS.contains(name)).collect();
    let dir = dir.to_owned();
    if foreign.is_empty() {
        return Ok(());
    }
    let found = match foreign.len() {
        0..=3 => foreign.join(", "),
        more => format!("{} and {} more", foreign[..3].join(", "), more - 3),
    };
    match foreign.iter().all(|name| GROWN.contains(name)) {
        true => Err(Error::Beheaded { dir, found }),
        false => Err(Error::NotOurs { dir, found }),
    }
}

/// Takes the lock, and leaves the process id for whoever comes next.
#[allow(clippy::disallowed_methods, reason = "the lock is the system's; the simulation takes none")]
fn lock(dir: &Path) -> Result<std::fs::File, Error> {
    let path = dir.join(LOCK);
    let open =
        std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = open.map_err(|error| Error::io(&path, error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only for the message: whatever cannot be read is left out.
            let read = io::Read::read_to_string(&mut io::Read::take(&mut file, 32), &mut holder);
            let holder = read.ok().map(|_| holder.trim().to_owned());
            let holder =
                holder.filter(|pid| !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()));
            return Err(Error::InUse { dir: dir.to_owned(), holder });
        }
        Err(std::fs::TryLockError::Error(error)) => return Err(Error::io(&path, error)),
    }
    let note = format!("{}\n", std::process::id());
    file.set_len(0)
        .and_then(|()| std::os::unix::fs::FileExt::write_all_at(&file, note.as_bytes(), 0))
        .map_err(|error| Error::io(&path, error))?;
    Ok(file)
}

//! Owns the hostile twin of the file seam: files in memory that know what a crash would leave of
//! them, and faults on order. Does not touch the real file system; what one file holds is in
//! `content`, what a directory holds in `names`.

mod content;
mod dice;
mod names;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use self::content::Inode;
use self::names::{Copies, NameChange, Names, Node, apply_change};
use super::{File, Fs, OpenMode, Space};

pub use self::dice::Dice;

/// What a crash leaves of what was not synced.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Loss {
    /// All of it is gone.
    All,
    /// Each write is kept, lost, or torn at 512-byte sectors; of each directory's changes a first
    /// part is kept.
    Subset,
    /// All of it is kept: the process was killed, the machine went on. It still is not durable, so
    /// a crash of the machine after this one may take it.
    Nothing,
}

/// An operation, as a hook sees it.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Op {
    /// A read of a file.
    Read,
    /// A write, a change of length, a reservation.
    Write,
    /// A sync of a file or a directory.
    Sync,
    /// A create, rename, link or remove.
    Name,
}

/// Called before each operation, outside all locks: it may block, which is a stall.
pub type Hook = Arc<dyn Fn(Op, &Path) + Send + Sync>;

/// Files in memory with the faults of a disk. Cheap to clone; clones are the same disk.
///
/// Two views are kept of everything: what running programs see, and what is durable. A sync copies
/// from the first to the second; [`FaultyFs::crash`] makes a new disk from the second, plus
/// whatever [`Loss`] leaves of the difference. Handles opened before the crash keep to the old
/// disk. Without faults it serves as a file system in memory.
#[derive(Clone)]
pub struct FaultyFs(Arc<Mutex<Disk>>);

struct Disk {
    dice: Dice,
    names: Names,
    durable_names: Names,
    /// In order, each with the directory whose sync makes it durable.
    changes: Vec<(PathBuf, NameChange)>,
    capacity: u64,
    ops: u64,
    crash_at: Option<u64>,
    crashed: bool,
    lie_about_sync: bool,
    fail_write_in: Option<u64>,
    fail_sync_in: Option<u64>,
    fail_reads: Vec<(PathBuf, Range<u64>)>,
    hook: Option<Hook>,
}

struct FaultyFile {
    disk: FaultyFs,
    path: PathBuf,
    inode: Arc<Mutex<Inode>>,
    writable: bool,
}

/// Room of a disk that nobody has filled: 1 TiB.
const CAPACITY_DEFAULT: u64 = 1 << 40;

/// The faults.
impl FaultyFs {
    /// An empty disk without faults. The seed decides what [`Loss::Subset`] keeps.
    pub fn new(seed: u64) -> FaultyFs {
        let root: Names = [(PathBuf::from("/"), Node::Dir), (PathBuf::new(), Node::Dir)].into();
        FaultyFs(Arc::new(Mutex::new(Disk {
            dice: Dice::new(seed),
            durable_names: root.clone(),
            names: root,
            changes: Vec::new(),
            capacity: CAPACITY_DEFAULT,
            ops: 0,
            crash_at: None,
            crashed: false,
            lie_about_sync: false,
            fail_write_in: None,
            fail_sync_in: None,
            fail_reads: Vec::new(),
            hook: None,
        })))
    }

    /// The disk as a restart finds it. This one is dead from now on: every call on it fails.
    pub fn crash(&self, loss: Loss) -> FaultyFs {
        let mut disk = self.0.lock();
        disk.crashed = true;
        let after = FaultyFs::new(disk.dice.roll());
        let mut after_disk = after.0.lock();
        after_disk.capacity = disk.capacity;
        if loss == Loss::Nothing {
            // The files themselves can be shared: nothing on the dead disk changes them any more.
            // What was not durable still is not.
            after_disk.names = disk.names.clone();
            after_disk.durable_names = disk.durable_names.clone();
            after_disk.changes = disk.changes.clone();
        } else {
            let disk = &mut *disk;
            let changes = std::mem::take(&mut disk.changes);
            let left = names::after_crash(&disk.durable_names, changes, loss, &mut disk.dice);
            let mut crash = |inode: &Inode| inode.after_crash(loss, &mut disk.dice);
            let names = Copies::default().names(&left, &mut crash);
            after_disk.durable_names = names.clone();
            after_disk.names = names;
        }
        drop(after_disk);
        after
    }

    /// A second disk with the same content, seen and durable, without the faults on order.
    pub fn fork(&self) -> FaultyFs {
        let mut disk = self.0.lock();
        let fork = FaultyFs::new(disk.dice.roll());
        let mut copies = Copies::default();
        let mut copy = |inode: &Inode| inode.clone();
        let names = copies.names(&disk.names, &mut copy);
        let durable_names = copies.names(&disk.durable_names, &mut copy);
        let changes = disk.changes.iter().map(|(dir, change)| {
            let change = match change {
                NameChange::Put(name, node) => {
                    NameChange::Put(name.clone(), copies.node(node, &mut copy))
                }
                other => other.clone(),
            };
            (dir.clone(), change)
        });
        let changes = changes.collect();
        let mut fork_disk = fork.0.lock();
        fork_disk.capacity = disk.capacity;
        fork_disk.names = names;
        fork_disk.durable_names = durable_names;
        fork_disk.changes = changes;
        drop(fork_disk);
        fork
    }

    /// Operations so far that change something (writes, syncs, names).
    pub fn ops(&self) -> u64 {
        self.0.lock().ops
    }

    /// The operation with this number (the first is 1) fails in the middle, and everything after it
    /// fails: the machine is gone. Take what it left with [`FaultyFs::crash`].
    pub fn crash_at(&self, op: u64) {
        self.0.lock().crash_at = Some(op);
    }

    /// Whether the machine is gone.
    pub fn crashed(&self) -> bool {
        self.0.lock().crashed
    }

    /// Syncs answer at once and make nothing durable.
    pub fn lie_about_sync(&self, lie: bool) {
        self.0.lock().lie_about_sync = lie;
    }

    /// The `n`-th write from now on fails, n ≥ 1. Nothing of it is written.
    pub fn fail_write(&self, n: u64) {
        self.0.lock().fail_write_in = Some(n);
    }

    /// The `n`-th sync from now on fails, n ≥ 1. As on Linux, what it should have made durable
    /// stays visible and counts as clean: a later sync that answers well does not make it durable
    /// either.
    pub fn fail_sync(&self, n: u64) {
        self.0.lock().fail_sync_in = Some(n);
    }

    /// Reads that touch this range of this file fail, until [`FaultyFs::heal_reads`].
    pub fn fail_reads(&self, path: &Path, range: Range<u64>) {
        self.0.lock().fail_reads.push((path.to_path_buf(), range));
    }

    /// Ends all read errors.
    pub fn heal_reads(&self) {
        self.0.lock().fail_reads.clear();
    }

    /// The disk has room for this many bytes in all; what would need more fails with `StorageFull`.
    pub fn set_capacity(&self, bytes: u64) {
        self.0.lock().capacity = bytes;
    }

    /// Calls `hook` before each operation.
    pub fn set_hook(&self, hook: Option<Hook>) {
        self.0.lock().hook = hook;
    }

    /// Flips one bit, in what is seen and in what is durable.
    pub fn flip_bit(&self, path: &Path, offset: u64, bit: u8) {
        let inode = self.0.lock().inode(path).expect("a test flips bits in files that exist");
        inode.lock().flip_bit(offset, bit);
    }

    /// Bytes taken by all files.
    pub fn used_bytes(&self) -> u64 {
        self.0.lock().used_bytes()
    }
}

impl Disk {
    fn inode(&self, path: &Path) -> io::Result<Arc<Mutex<Inode>>> {
        match self.names.get(path) {
            Some(Node::File(inode)) => Ok(inode.clone()),
            Some(Node::Dir) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(not_found(path)),
        }
    }

    fn used_bytes(&self) -> u64 {
        let mut seen: Vec<*const Mutex<Inode>> = Vec::new();
        let mut used = 0;
        for node in self.names.values() {
            if let Node::File(inode) = node
                && !seen.contains(&Arc::as_ptr(inode))
            {
                seen.push(Arc::as_ptr(inode));
                used += inode.lock().len();
            }
        }
        used
    }

    /// Counts an operation that changes something; true when the machine dies in the middle of it.
    fn count(&mut self) -> io::Result<bool> {
        self.alive()?;
        self.ops += 1;
        if self.crash_at.is_some_and(|at| self.ops >= at) {
            self.crashed = true;
            return Ok(true);
        }
        Ok(false)
    }

    fn alive(&self) -> io::Result<()> {
        if self.crashed { Err(gone()) } else { Ok(()) }
    }

    fn change(&mut self, dir: &Path, change: NameChange) -> io::Result<()> {
        let dies = self.count()?;
        apply_change(&mut self.names, &change);
        self.changes.push((dir.to_path_buf(), change));
        if dies { Err(gone()) } else { Ok(()) }
    }

    fn need_dir(&self, path: &Path) -> io::Result<PathBuf> {
        let parent = path.parent().unwrap_or(Path::new(""));
        match self.names.get(parent) {
            Some(Node::Dir) => Ok(parent.to_path_buf()),
            _ => Err(not_found(parent)),
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the machine is gone (injected crash)")
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

fn injected(what: &str) -> io::Error {
    io::Error::other(format!("{what} (injected)"))
}

/// Counts down to an ordered failure; true when it is due.
fn due(countdown: &mut Option<u64>) -> bool {
    match countdown {
        Some(1) => {
            *countdown = None;
            true
        }
        Some(n) => {
            *n -= 1;
            false
        }
        None => false,
    }
}

impl FaultyFs {
    fn hook(&self, op: Op, path: &Path) {
        let hook = self.0.lock().hook.clone();
        if let Some(hook) = hook {
            hook(op, path);
        }
    }
}

impl Fs for FaultyFs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        self.hook(if mode == OpenMode::CreateNew { Op::Name } else { Op::Read }, path);
        let mut disk = self.0.lock();
        disk.alive()?;
        let inode = if mode == OpenMode::CreateNew {
            let dir = disk.need_dir(path)?;
            if disk.names.contains_key(path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let inode = Arc::new(Mutex::new(Inode::default()));
            disk.change(&dir, NameChange::Put(path.to_path_buf(), Node::File(inode.clone())))?;
            inode
        } else {
            disk.inode(path)?
        };
        drop(disk);
        let writable = mode != OpenMode::Read;
        Ok(Arc::new(FaultyFile { disk: self.clone(), path: path.to_path_buf(), inode, writable }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.hook(Op::Name, path);
        let mut disk = self.0.lock();
        disk.alive()?;
        let mut missing: Vec<&Path> =
            path.ancestors().take_while(|dir| !disk.names.contains_key(*dir)).collect();
        missing.reverse();
        for dir in missing {
            let parent = dir.parent().unwrap_or(Path::new("")).to_path_buf();
            disk.change(&parent, NameChange::Put(dir.to_path_buf(), Node::Dir))?;
        }
        match disk.names.get(path) {
            Some(Node::Dir) => Ok(()),
            _ => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.hook(Op::Name, path);
        let mut disk = self.0.lock();
        disk.alive()?;
        disk.inode(path)?;
        let dir = disk.need_dir(path)?;
        disk.change(&dir, NameChange::Remove(path.to_path_buf()))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.hook(Op::Name, path);
        let mut disk = self.0.lock();
        disk.alive()?;
        if !matches!(disk.names.get(path), Some(Node::Dir)) {
            return Err(not_found(path));
        }
        let dir = disk.need_dir(path)?;
        // What was under way in it goes with it, and not into a later directory of its name.
        disk.changes.retain(|(dir, _)| !dir.starts_with(path));
        disk.change(&dir, NameChange::Remove(path.to_path_buf()))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.hook(Op::Name, from);
        let mut disk = self.0.lock();
        disk.alive()?;
        let Some(node) = disk.names.get(from).cloned() else {
            return Err(not_found(from));
        };
        let replaces_dir = matches!(disk.names.get(to), Some(Node::Dir));
        let occupied = disk.names.keys().any(|name| name != to && name.starts_with(to));
        match (node, replaces_dir) {
            (Node::File(_), true) => return Err(io::ErrorKind::IsADirectory.into()),
            (Node::Dir, true) if occupied => return Err(io::ErrorKind::DirectoryNotEmpty.into()),
            (Node::Dir, false) if disk.names.contains_key(to) => {
                return Err(io::ErrorKind::NotADirectory.into());
            }
            _ => {}
        }
        let dir = disk.need_dir(to)?;
        for (dir, change) in disk.changes.iter_mut().filter(|(dir, _)| dir.starts_with(from)) {
            *dir = names::moved(dir, from, to);
            change.move_into(from, to);
        }
        disk.change(&dir, NameChange::Rename(from.to_path_buf(), to.to_path_buf()))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.hook(Op::Name, to);
        let mut disk = self.0.lock();
        disk.alive()?;
        let inode = disk.inode(from)?;
        if disk.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let dir = disk.need_dir(to)?;
        disk.change(&dir, NameChange::Put(to.to_path_buf(), Node::File(inode)))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.hook(Op::Sync, path);
        let mut disk = self.0.lock();
        if disk.count()? {
            return Err(gone());
        }
        if !matches!(disk.names.get(path), Some(Node::Dir)) {
            return Err(not_found(path));
        }
        if due(&mut disk.fail_sync_in) {
            return Err(injected("sync of a directory failed"));
        }
        if disk.lie_about_sync {
            return Ok(());
        }
        let disk = &mut *disk;
        disk.changes.retain(|(dir, change)| {
            if dir == path {
                apply_change(&mut disk.durable_names, change);
            }
            dir != path
        });
        Ok(())
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        self.hook(Op::Read, path);
        let disk = self.0.lock();
        disk.alive()?;
        if !matches!(disk.names.get(path), Some(Node::Dir)) {
            return Err(not_found(path));
        }
        let children = disk.names.keys().filter(|name| name.parent() == Some(path));
        let mut names: Vec<String> = children
            .filter_map(|name| name.file_name().map(|name| name.to_string_lossy().into_owned()))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> bool {
        self.0.lock().names.contains_key(path)
    }

    fn space(&self, _path: &Path) -> io::Result<Space> {
        let disk = self.0.lock();
        disk.alive()?;
        let used = disk.used_bytes();
        Ok(Space { free_bytes: disk.capacity.saturating_sub(used), total_bytes: disk.capacity })
    }
}

impl FaultyFile {
    /// Everything that changes the file: counted, refused, or done and remembered as not durable.
    fn write(&self, grows_to: u64, change: impl FnOnce(&mut Inode)) -> io::Result<()> {
        self.disk.hook(Op::Write, &self.path);
        let mut disk = self.disk.0.lock();
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let dies = disk.count()?;
        if due(&mut disk.fail_write_in) {
            return Err(injected("write failed"));
        }
        let more = grows_to.saturating_sub(self.inode.lock().len());
        if more > 0 && disk.used_bytes() + more > disk.capacity {
            return Err(io::ErrorKind::StorageFull.into());
        }
        change(&mut self.inode.lock());
        if dies { Err(gone()) } else { Ok(()) }
    }
}

impl File for FaultyFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.hook(Op::Read, &self.path);
        let disk = self.disk.0.lock();
        disk.alive()?;
        let end = offset + buf.len() as u64;
        let broken = |(path, range): &(PathBuf, Range<u64>)| {
            *path == self.path && range.start < end && offset < range.end
        };
        if disk.fail_reads.iter().any(broken) {
            return Err(injected("read failed"));
        }
        Ok(self.inode.lock().read(buf, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.write(offset + data.len() as u64, |inode| inode.write(offset, data))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.hook(Op::Sync, &self.path);
        let mut disk = self.disk.0.lock();
        if disk.count()? {
            return Err(gone());
        }
        if due(&mut disk.fail_sync_in) {
            self.inode.lock().forget_pending();
            return Err(injected("sync failed"));
        }
        if !disk.lie_about_sync {
            self.inode.lock().sync();
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.0.lock().alive()?;
        Ok(self.inode.lock().len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.write(len, |inode| inode.set_len(len))
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.write(len, |inode| {
            let len = len.max(inode.len());
            inode.set_len(len);
        })
    }
}

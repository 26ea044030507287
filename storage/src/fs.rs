//! Owns the file seam, its real side and what is built on both. Does not know what the files mean.

pub mod faulty;

use std::fs as real;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// How a file is opened.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// A file that must not exist yet, for reading and writing.
    CreateNew,
}

/// Room on the file system of a path.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Space {
    /// What an unprivileged process may still use.
    pub free_bytes: u64,
    /// The whole file system.
    pub total_bytes: u64,
}

/// The directories and files that are ours. Nothing is durable before a sync: a file's bytes and
/// length after [`File::sync`], its name (a create, rename, link or remove) after [`Fs::sync_dir`]
/// of its directory.
pub trait Fs: Send + Sync + 'static {
    /// Opens or creates a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>>;
    /// Creates a directory and the missing ones above it.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Removes a file's name.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with all that is in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Moves a file or a directory; replaces a file that has the name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file a second name.
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, sorted.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Whether a file or directory has this name.
    fn exists(&self, path: &Path) -> bool;
    /// Room on the file system.
    fn space(&self, path: &Path) -> io::Result<Space>;
}

/// An open file. All calls name their offset, so one handle serves many threads.
pub trait File: Send + Sync {
    /// Reads up to `buf.len()` bytes; fewer only at the end of the file or as the system likes.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `data`, growing the file where needed. Not durable before a sync.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// All bytes written before, and the length, are durable when it returns.
    fn sync(&self) -> io::Result<()>;
    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file holds no byte.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends (with zeros) to `len`.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Extends to at least `len` (with zeros) and reserves the room on disk, so that later writes
    /// into it do not meet a full disk.
    fn allocate(&self, len: u64) -> io::Result<()>;
}

/// Reads until `buf` is full; the end of the file before that is `UnexpectedEof`.
pub fn read_exact_at(file: &dyn File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let read = read_full_at(file, buf, offset)?;
    if read < buf.len() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends too early"));
    }
    Ok(())
}

/// Reads until `buf` is full or the file ends; returns how many bytes.
pub fn read_full_at(file: &dyn File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buf.len() {
        match file.read_at(&mut buf[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// The whole content of a file.
pub fn read_file(fs: &dyn Fs, path: &Path) -> io::Result<Vec<u8>> {
    let file = fs.open(path, OpenMode::Read)?;
    let mut content = vec![0; file.len()? as usize];
    read_exact_at(&*file, &mut content, 0)?;
    Ok(content)
}

/// Creates a directory, and the missing ones above it, so that their names are durable when it
/// returns. A directory that is there already has its own name synced again: who made it may have
/// died before that.
pub fn create_dir_durable(fs: &dyn Fs, path: &Path) -> io::Result<()> {
    let missing = path.ancestors().take_while(|dir| !fs.exists(dir)).count();
    fs.create_dir_all(path)?;
    for dir in path.ancestors().take(missing.max(1)) {
        match dir.parent() {
            None => {}
            // The parent of a plain name: the current directory.
            Some(parent) if parent.as_os_str().is_empty() && !fs.exists(parent) => {
                fs.sync_dir(Path::new("."))?;
            }
            Some(parent) => fs.sync_dir(parent)?,
        }
    }
    Ok(())
}

/// Replaces a file as one step: after a crash the name holds either the old bytes or the new ones,
/// whole. Durable when it returns.
pub fn write_file_atomic(fs: &dyn Fs, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name");
    let dir = path.parent().ok_or_else(no_name)?;
    let mut temporary_name = path.file_name().ok_or_else(no_name)?.to_os_string();
    temporary_name.push(".new");
    let temporary = dir.join(temporary_name);
    if fs.exists(&temporary) {
        // Left behind by a crash before the rename: it was never the file.
        fs.remove_file(&temporary)?;
    }
    let file = fs.open(&temporary, OpenMode::CreateNew)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    fs.rename(&temporary, path)?;
    fs.sync_dir(dir)
}

/// The operating system's files.
#[derive(Copy, Clone, Debug, Default)]
pub struct RealFs;

struct RealFile(real::File);

#[allow(clippy::disallowed_methods, reason = "this is the seam")]
impl Fs for RealFs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut options = real::OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => {}
            OpenMode::ReadWrite => {
                options.write(true);
            }
            OpenMode::CreateNew => {
                options.write(true).create_new(true);
            }
        }
        Ok(Arc::new(RealFile(options.open(path)?)))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        real::create_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        real::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        real::remove_dir_all(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        real::rename(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        real::hard_link(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        real::File::open(path)?.sync_all()
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in real::read_dir(path)? {
            let name = entry?.file_name();
            names.push(name.into_string().map_err(|name| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("not one of our names: {name:?}"),
                )
            })?);
        }
        names.sort_unstable();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(Space {
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }
}

impl File for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(&self.0, buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        // fdatasync: it covers the length too, and leaves out only the timestamps.
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            // File systems without it (some network and overlay ones): the length alone must do.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                if self.0.metadata()?.len() < len {
                    self.0.set_len(len)?;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

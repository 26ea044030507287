//! Owns checkpoint directories: their manifest, receiving one, verifying it, swapping it in, and
//! clearing away what a crash left half done. Does not make checkpoints (engines do) and does not
//! move bytes between nodes.
//!
//! # Names beside a live directory `<name>`
//!
//! | name | what it is | after a crash |
//! |---|---|---|
//! | `<name>` | the live store | kept |
//! | `<name>.ready` | whole, verified, synced: it replaces the live one | the swap is finished |
//! | `<name>.<anything else>` | being made, received, sent or removed | removed |
//!
//! A live name therefore has no dot. The rename to `.ready`, once synced, is the moment of
//! decision: before it a crash leaves the old store, after it the new one, and never a mixture of
//! both.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;
use crate::fs::{self, File, Fs, OpenMode};

/// Bytes that one checksum covers, and that travel as one piece: large enough that the checksums of
/// a shard stay small, small enough that a damaged piece costs little to repeat. The last chunk of
/// a file is shorter.
pub const CHUNK_BYTES: u64 = 1 << 20;

const MAGIC: &[u8; 8] = b"coracleM";
/// The newest format that this program reads, and the one that it writes.
const FORMAT: u32 = 1;
/// Files in a manifest, and bytes of a name. Beyond it the manifest is refused: it came from the
/// network.
const FILES_MAX: u32 = 1 << 20;
const NAME_BYTES_MAX: usize = 255;

/// One file of a checkpoint.
#[derive(Clone, Eq, PartialEq, Debug)]
pub struct FileEntry {
    /// The name in the directory.
    pub name: String,
    /// The length.
    pub bytes: u64,
    /// CRC32 of each [`CHUNK_BYTES`]; none for an empty file.
    pub chunk_crcs: Vec<u32>,
}

impl FileEntry {
    /// Where a chunk begins, and its length; `None` behind the last.
    pub fn chunk(&self, chunk: usize) -> Option<(u64, usize)> {
        let offset = CHUNK_BYTES * chunk as u64;
        (chunk < self.chunk_crcs.len())
            .then(|| (offset, (self.bytes - offset).min(CHUNK_BYTES) as usize))
    }
}

/// What a checkpoint consists of: every file with its length and checksums.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct Manifest {
    /// The files, ordered by name.
    pub files: Vec<FileEntry>,
}

impl Manifest {
    /// Lists a directory and reads all of it once.
    pub fn of(fs: &dyn Fs, dir: &Path) -> Result<Manifest, Error> {
        let mut names = fs.read_dir(dir).map_err(|error| Error::io(dir, error))?;
        names.sort_unstable();
        let files = names.into_iter().map(|name| {
            let path = dir.join(&name);
            let (bytes, chunk_crcs) =
                checksums(fs, &path).map_err(|error| Error::io(&path, error))?;
            Ok(FileEntry { name, bytes, chunk_crcs })
        });
        Ok(Manifest { files: files.collect::<Result<_, Error>>()? })
    }

    /// Length of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Checks a directory: exactly these files, with exactly these bytes. Errors name file and
    /// offset.
    pub fn verify(&self, fs: &dyn Fs, dir: &Path) -> Result<(), Error> {
        let names = fs.read_dir(dir).map_err(|error| Error::io(dir, error))?;
        let here: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let listed: BTreeSet<&str> = self.files.iter().map(|file| &*file.name).collect();
        if let Some(name) = here.symmetric_difference(&listed).next() {
            let why = if listed.contains(name) {
                "the file is missing"
            } else {
                "the file is not in the manifest"
            };
            return Err(Error::corruption(&dir.join(name), 0, why));
        }
        for file in &self.files {
            let path = dir.join(&file.name);
            let (bytes, crcs) = checksums(fs, &path).map_err(|error| Error::io(&path, error))?;
            if bytes != file.bytes {
                let why = format!("the file has {bytes} bytes, the manifest says {}", file.bytes);
                return Err(Error::corruption(&path, bytes.min(file.bytes), why));
            }
            if let Some(chunk) =
                crcs.iter().zip(&file.chunk_crcs).position(|(here, listed)| here != listed)
            {
                let offset = CHUNK_BYTES * chunk as u64;
                return Err(Error::corruption(
                    &path,
                    offset,
                    "the chunk's checksum does not match the manifest",
                ));
            }
        }
        Ok(())
    }

    /// The manifest as bytes: magic, format, number of files, each file, CRC32 of all before.
    /// Little endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&(self.files.len() as u32).to_le_bytes());
        for file in &self.files {
            bytes.extend_from_slice(&(file.name.len() as u16).to_le_bytes());
            bytes.extend_from_slice(file.name.as_bytes());
            bytes.extend_from_slice(&file.bytes.to_le_bytes());
            for crc in &file.chunk_crcs {
                bytes.extend_from_slice(&crc.to_le_bytes());
            }
        }
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Reads what [`Manifest::encode`] wrote. Refuses names that could lead out of the directory.
    /// `origin` stands in the errors.
    pub fn decode(origin: &Path, bytes: &[u8]) -> Result<Manifest, Error> {
        let mut reader = Reader { origin, bytes, at: 0 };
        let crc_at = bytes.len().checked_sub(4).ok_or_else(|| reader.damaged("it is too short"))?;
        if bytes[crc_at..] != crc32fast::hash(&bytes[..crc_at]).to_le_bytes() {
            return Err(Error::corruption(
                origin,
                crc_at as u64,
                "the manifest's checksum does not match",
            ));
        }
        reader.bytes = &bytes[..crc_at];
        if reader.array::<8>()? != *MAGIC {
            return Err(reader.damaged("it is not a manifest"));
        }
        let format = u32::from_le_bytes(reader.array()?);
        if format != FORMAT {
            return Err(Error::Format { file: origin.to_path_buf(), found: format, known: FORMAT });
        }
        let count = u32::from_le_bytes(reader.array()?);
        if count > FILES_MAX {
            return Err(reader.damaged("it lists too many files"));
        }
        let mut manifest = Manifest::default();
        for _ in 0..count {
            let file = reader.file()?;
            if manifest.files.last().is_some_and(|last| last.name >= file.name) {
                return Err(reader.damaged("its files are not in order"));
            }
            manifest.files.push(file);
        }
        if reader.at != crc_at {
            return Err(reader.damaged("bytes follow the last file"));
        }
        Ok(manifest)
    }
}

struct Reader<'a> {
    origin: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn damaged(&self, why: &str) -> Error {
        Error::corruption(self.origin, self.at as u64, format!("manifest: {why}"))
    }

    fn slice(&mut self, len: usize) -> Result<&[u8], Error> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| self.damaged("it is too short"))?;
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        Ok(self.slice(N)?.try_into().expect("the slice has this length"))
    }

    fn file(&mut self) -> Result<FileEntry, Error> {
        let name_len = usize::from(u16::from_le_bytes(self.array()?));
        let name = String::from_utf8(self.slice(name_len)?.to_vec());
        let name = name.ok().filter(|name| is_plain_name(name));
        let name = name.ok_or_else(|| self.damaged("a file has an impossible name"))?;
        let bytes = u64::from_le_bytes(self.array()?);
        let chunks = bytes.div_ceil(CHUNK_BYTES);
        if chunks > (self.bytes.len() - self.at) as u64 / 4 {
            return Err(self.damaged("it is too short for the checksums of a file"));
        }
        let crcs = (0..chunks).map(|_| Ok(u32::from_le_bytes(self.array()?)));
        Ok(FileEntry { name, bytes, chunk_crcs: crcs.collect::<Result<_, Error>>()? })
    }
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', '\0'])
}

fn checksums(fs: &dyn Fs, path: &Path) -> io::Result<(u64, Vec<u32>)> {
    let file = fs.open(path, OpenMode::Read)?;
    let bytes = file.len()?;
    let mut crcs = Vec::with_capacity(bytes.div_ceil(CHUNK_BYTES) as usize);
    let mut chunk = vec![0; bytes.min(CHUNK_BYTES) as usize];
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(CHUNK_BYTES) as usize;
        fs::read_exact_at(&*file, &mut chunk[..len], at)?;
        crcs.push(crc32fast::hash(&chunk[..len]));
        at += len as u64;
    }
    Ok((bytes, crcs))
}

/// A checkpoint on its way in: takes chunks in any order, each checked before it is written.
pub struct Incoming {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    manifest: Manifest,
    files: Vec<Arc<dyn File>>,
}

impl Incoming {
    /// Begins anew in `dir`; what stood there is removed.
    pub fn begin(fs: Arc<dyn Fs>, dir: &Path, manifest: Manifest) -> Result<Incoming, Error> {
        remove_dir(&*fs, dir)?;
        fs.create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
        let files = manifest.files.iter().map(|file| {
            let path = dir.join(&file.name);
            let made = fs.open(&path, OpenMode::CreateNew).and_then(|made| {
                if file.bytes > 0 {
                    made.allocate(file.bytes)?;
                }
                Ok(made)
            });
            made.map_err(|error| Error::io(&path, error))
        });
        let files = files.collect::<Result<_, _>>()?;
        Ok(Incoming { fs, dir: dir.to_path_buf(), manifest, files })
    }

    /// What is being received.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Writes one chunk of the file at this place in the manifest. A wrong chunk is
    /// [`Error::Corruption`] and changes nothing: ask for it again.
    pub fn write(&self, file: usize, chunk: usize, data: &[u8]) -> Result<(), Error> {
        let entry = self
            .manifest
            .files
            .get(file)
            .ok_or_else(|| Error::invalid("no such file in the manifest"))?;
        let path = self.dir.join(&entry.name);
        let (offset, len) =
            entry.chunk(chunk).ok_or_else(|| Error::invalid("no such chunk in the manifest"))?;
        if data.len() != len || crc32fast::hash(data) != entry.chunk_crcs[chunk] {
            return Err(Error::corruption(
                &path,
                offset,
                "a received chunk does not match the manifest",
            ));
        }
        self.files[file].write_at(data, offset).map_err(|error| Error::io(&path, error))
    }

    /// Syncs everything and verifies the whole directory, read back. It may be swapped in when this
    /// returns `Ok`.
    pub fn finish(self) -> Result<Manifest, Error> {
        for (entry, file) in self.manifest.files.iter().zip(&self.files) {
            file.sync().map_err(|error| Error::io(&self.dir.join(&entry.name), error))?;
        }
        self.fs.sync_dir(&self.dir).map_err(|error| Error::io(&self.dir, error))?;
        self.manifest.verify(&*self.fs, &self.dir)?;
        Ok(self.manifest)
    }
}

/// Replaces the store in `live` (closed, or not there) by the verified and synced directory
/// `incoming` beside it. Durable when it returns; a crash before that leaves either store, whole,
/// after [`settle`].
pub fn swap_in(fs: &dyn Fs, incoming: &Path, live: &Path) -> Result<(), Error> {
    let (parent, name) = split(live)?;
    if incoming.parent() != Some(parent) || !fs.exists(incoming) {
        return Err(Error::invalid(format!(
            "{}: not a directory beside the live one",
            incoming.display()
        )));
    }
    let ready = parent.join(format!("{name}.ready"));
    // A swap that was decided before stays decided: it is superseded only after it was finished.
    settle_one(fs, parent, &name)?;
    let step = || {
        fs.sync_dir(incoming)?;
        fs.rename(incoming, &ready)?;
        fs.sync_dir(parent)
    };
    step().map_err(|error| Error::io(incoming, error))?;
    settle_one(fs, parent, &name)
}

/// Finishes or undoes what a crash left in the directory that holds all stores, and returns the
/// live names. Called once at start, before a store is opened.
pub fn settle(fs: &dyn Fs, parent: &Path) -> Result<Vec<String>, Error> {
    let io = |error| Error::io(parent, error);
    let mut live = BTreeSet::new();
    for name in fs.read_dir(parent).map_err(io)? {
        match name.split_once('.') {
            None => {
                live.insert(name);
            }
            Some((of, "ready")) => {
                live.insert(of.to_owned());
            }
            Some(_) => fs.remove_dir_all(&parent.join(&name)).map_err(io)?,
        }
    }
    for name in &live {
        settle_one(fs, parent, name)?;
    }
    fs.sync_dir(parent).map_err(io)?;
    Ok(live.into_iter().collect())
}

fn settle_one(fs: &dyn Fs, parent: &Path, name: &str) -> Result<(), Error> {
    let (live, ready) = (parent.join(name), parent.join(format!("{name}.ready")));
    if !fs.exists(&ready) {
        return Ok(());
    }
    // The decision is durable, so the live store may go at once: a crash from here on comes back to
    // this place.
    remove_dir(fs, &live)?;
    fs.rename(&ready, &live)
        .and_then(|()| fs.sync_dir(parent))
        .map_err(|error| Error::io(&live, error))
}

/// Removes a store's directory; one that is not there is no error. It first loses its name, so that
/// a crash in the middle leaves no store with half of its files.
pub(crate) fn remove_dir(fs: &dyn Fs, dir: &Path) -> Result<(), Error> {
    if !fs.exists(dir) {
        return Ok(());
    }
    let parent = dir.parent().ok_or_else(|| Error::invalid("a store has a parent directory"))?;
    let mut removed = dir.as_os_str().to_os_string();
    removed.push(".removed");
    let removed = PathBuf::from(removed);
    let step = || {
        if fs.exists(&removed) {
            fs.remove_dir_all(&removed)?;
        }
        fs.rename(dir, &removed)?;
        fs.sync_dir(parent)?;
        fs.remove_dir_all(&removed)
    };
    step().map_err(|error| Error::io(dir, error))
}

fn split(live: &Path) -> Result<(&Path, String), Error> {
    let name = live.file_name().and_then(|name| name.to_str()).filter(|name| !name.contains('.'));
    match (live.parent(), name) {
        (Some(parent), Some(name)) => Ok((parent, name.to_owned())),
        _ => Err(Error::invalid(format!("{}: not the name of a live store", live.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        Manifest {
            files: vec![
                FileEntry { name: "A".into(), bytes: 0, chunk_crcs: vec![] },
                FileEntry { name: "B".into(), bytes: CHUNK_BYTES + 1, chunk_crcs: vec![1, 2] },
            ],
        }
    }

    #[test]
    fn golden_bytes() {
        let mut golden = b"coracleM\x01\0\0\0\x02\0\0\0\
            \x01\0A\0\0\0\0\0\0\0\0\
            \x01\0B\x01\0\x10\0\0\0\0\0\x01\0\0\0\x02\0\0\0"
            .to_vec();
        golden.extend_from_slice(&crc32fast::hash(&golden).to_le_bytes());
        assert_eq!(sample().encode(), golden);
        assert_eq!(Manifest::decode(Path::new("m"), &golden).expect("our own bytes"), sample());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = sample().encode();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::decode(Path::new("m"), &flipped).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Manifest::decode(Path::new("m"), &bytes[..len]).is_err(), "length {len}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", &"n".repeat(256)] {
            let file = FileEntry { name: name.into(), bytes: 0, chunk_crcs: vec![] };
            let bytes = Manifest { files: vec![file] }.encode();
            assert!(Manifest::decode(Path::new("m"), &bytes).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_length_that_needs_more_checksums_than_there_are_bytes_is_refused() {
        let file = FileEntry { name: "A".into(), bytes: u64::MAX, chunk_crcs: vec![1] };
        assert!(
            Manifest::decode(Path::new("m"), &Manifest { files: vec![file] }.encode()).is_err()
        );
    }

    #[test]
    fn chunks_tile_a_file() {
        let file = &sample().files[1];
        assert_eq!(file.chunk(0), Some((0, CHUNK_BYTES as usize)));
        assert_eq!(file.chunk(1), Some((CHUNK_BYTES, 1)));
        assert_eq!(file.chunk(2), None);
    }
}

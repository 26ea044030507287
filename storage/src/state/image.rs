//! Owns the image file: a whole store as one file, for engines that keep no files of their own.
//! Called by the map engine at every flush, and by RocksDB in memory at a checkpoint. Does not
//! decide when.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::error::Error;
use crate::fs::{self, Fs};

/// The image's name in its directory.
pub(crate) const FILE: &str = "state.image";
const MAGIC: &[u8; 8] = b"coracleS";
/// The newest format that this program reads, and the one that it writes.
const FORMAT: u32 = 1;
/// Magic, format, number of entries.
const HEADER_BYTES: usize = 20;
const CRC_BYTES: usize = 4;

/// All entries of a store, in order.
pub(crate) type Entries = BTreeMap<Bytes, Bytes>;

/// Where the image of a directory stands.
pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Replaces the image in `dir`; durable when it returns.
pub(crate) fn write(fs: &dyn Fs, dir: &Path, entries: &Entries) -> Result<(), Error> {
    let path = path(dir);
    fs::write_file_atomic(fs, &path, &encode(entries)).map_err(|error| Error::io(&path, error))
}

/// Reads the image in `dir`; `None` when there is none.
pub(crate) fn read(fs: &dyn Fs, dir: &Path) -> Result<Option<Entries>, Error> {
    let path = path(dir);
    if !fs.exists(&path) {
        return Ok(None);
    }
    let content = fs::read_file(fs, &path).map_err(|error| Error::io(&path, error))?;
    decode(&path, content.into()).map(Some)
}

/// Writes the image of `entries` as a new directory: made under a temporary name, synced, then
/// renamed.
pub(crate) fn write_dir(fs: &dyn Fs, dir: &Path, entries: &Entries) -> Result<(), Error> {
    let mut temporary = dir.as_os_str().to_os_string();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let parent =
        dir.parent().ok_or_else(|| Error::invalid("a checkpoint needs a parent directory"))?;
    let steps = || {
        if fs.exists(&temporary) {
            fs.remove_dir_all(&temporary)?;
        }
        fs.create_dir_all(&temporary)?;
        fs::write_file_atomic(fs, &path(&temporary), &encode(entries))?;
        fs.rename(&temporary, dir)?;
        fs.sync_dir(parent)
    };
    steps().map_err(|error| Error::io(dir, error))
}

fn encode(entries: &Entries) -> Vec<u8> {
    let bytes: usize = entries.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
    let mut image = Vec::with_capacity(HEADER_BYTES + bytes + CRC_BYTES);
    image.extend_from_slice(MAGIC);
    image.extend_from_slice(&FORMAT.to_le_bytes());
    image.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        for part in [key, value] {
            let len =
                u32::try_from(part.len()).expect("limits keep keys and values far below 4 GiB");
            image.extend_from_slice(&len.to_le_bytes());
            image.extend_from_slice(part);
        }
    }
    image.extend_from_slice(&crc32fast::hash(&image).to_le_bytes());
    image
}

fn decode(file: &Path, image: Bytes) -> Result<Entries, Error> {
    let damaged = |offset: usize, why: &str| Error::corruption(file, offset as u64, why);
    if image.len() < HEADER_BYTES + CRC_BYTES {
        return Err(damaged(0, "the image is shorter than its header"));
    }
    if &image[..8] != MAGIC {
        return Err(damaged(0, "not a state image"));
    }
    let body = image.slice(..image.len() - CRC_BYTES);
    if image[body.len()..] != crc32fast::hash(&body).to_le_bytes() {
        return Err(damaged(body.len(), "the image's checksum does not match"));
    }
    let (format, rest) = take_u32(&body, 8).ok_or_else(|| damaged(8, "no format"))?;
    if format != FORMAT {
        return Err(Error::Format { file: file.to_path_buf(), found: format, known: FORMAT });
    }
    let count = body
        .get(rest..HEADER_BYTES)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes);
    let mut entries = Entries::new();
    let mut at = HEADER_BYTES;
    while at < body.len() {
        let (key, key_end) = take_part(&body, at).ok_or_else(|| damaged(at, "an entry is cut"))?;
        let (value, end) =
            take_part(&body, key_end).ok_or_else(|| damaged(at, "an entry is cut"))?;
        if entries.last_key_value().is_some_and(|(last, _)| *last >= key) {
            return Err(damaged(at, "the entries are not in order"));
        }
        entries.insert(key, value);
        at = end;
    }
    if count != Some(entries.len() as u64) {
        return Err(damaged(12, "the number of entries does not match"));
    }
    Ok(entries)
}

fn take_u32(bytes: &[u8], at: usize) -> Option<(u32, usize)> {
    let number = bytes.get(at..)?.first_chunk()?;
    Some((u32::from_le_bytes(*number), at + 4))
}

fn take_part(bytes: &Bytes, at: usize) -> Option<(Bytes, usize)> {
    let (len, begin) = take_u32(bytes, at)?;
    let end = begin.checked_add(len as usize)?;
    (end <= bytes.len()).then(|| (bytes.slice(begin..end), end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> (Entries, Vec<u8>) {
        let entries = [(Bytes::from_static(b"k"), Bytes::from_static(b"vv"))].into();
        let mut image = b"coracleS\x01\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0k\x02\0\0\0vv".to_vec();
        image.extend_from_slice(&crc32fast::hash(&image).to_le_bytes());
        (entries, image)
    }

    #[test]
    fn golden_bytes() {
        let (entries, image) = golden();
        assert_eq!(encode(&entries), image);
        assert_eq!(decode(Path::new("i"), image.into()).expect("our own image"), entries);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let (_, image) = golden();
        for bit in 0..image.len() * 8 {
            let mut flipped = image.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(Path::new("i"), flipped.into()).is_err(), "bit {bit}");
        }
        for len in 0..image.len() {
            assert!(decode(Path::new("i"), image[..len].to_vec().into()).is_err(), "length {len}");
        }
    }
}

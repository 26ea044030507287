//! Owns the form of the directory's small files: `key = value` lines that people can read, and a
//! checksum as the last. Does not know what the values mean.
//!
//! ```text
//! # What the file is.
//! format = 1
//! cluster = 0b6b2a3e-…
//! crc = 9ae0daaf
//! ```
//!
//! The first line, `format` and the last line stay as they are in every later format, so that every
//! release can tell damage from a file that is newer than itself. The checksum is the CRC32 (IEEE) of
//! all bytes before its line, in eight hexadecimal digits.

use std::fmt::{Display, Write};
use std::path::{Path, PathBuf};

use super::{Error, FORMAT};

/// Writes one.
pub(super) struct Fields(String);

impl Fields {
    pub(super) fn new(about: &str) -> Fields {
        Fields(format!("# {about}\nformat = {FORMAT}\n"))
    }

    pub(super) fn put(&mut self, key: &str, value: impl Display) {
        let value = value.to_string();
        assert!(!value.contains('\n'), "a value is one line: {key}");
        let _ = writeln!(self.0, "{key} = {value}");
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        let crc = crc32fast::hash(self.0.as_bytes());
        let _ = writeln!(self.0, "crc = {crc:08x}");
        self.0.into_bytes()
    }
}

/// Reads one: its fields in their order, all of them, nothing else.
pub(super) struct Reader<'a> {
    path: PathBuf,
    fields: std::iter::Peekable<std::vec::IntoIter<(&'a str, &'a str)>>,
}

impl<'a> Reader<'a> {
    /// Checks the checksum, then the format.
    pub(super) fn new(path: &Path, bytes: &'a [u8]) -> Result<Reader<'a>, Error> {
        let damaged =
            |why: &str| Err(Error::Damaged { file: path.to_owned(), why: why.to_owned() });
        let Ok(text) = str::from_utf8(bytes) else {
            return damaged("it is not text");
        };
        let body_len = text.trim_end_matches('\n').rfind('\n').map_or(0, |at| at + 1);
        let (body, last) = text.split_at(body_len);
        // Exactly as it is written: a byte more or less is damage, too.
        if last != format!("crc = {:08x}\n", crc32fast::hash(body.as_bytes())) {
            return damaged("its checksum does not match");
        }
        let mut fields = Vec::new();
        for line in body.lines().filter(|line| !line.starts_with('#')) {
            match line.split_once(" = ") {
                Some(field) => fields.push(field),
                None => return damaged(&format!("{line:?} is no \"key = value\"")),
            }
        }
        let mut reader = Reader { path: path.to_owned(), fields: fields.into_iter().peekable() };
        let found = reader.take_number("format")?;
        if found != u64::from(FORMAT) {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            return Err(Error::Format { file: reader.path, found });
        }
        Ok(reader)
    }

    pub(super) fn take(&mut self, key: &str) -> Result<&'a str, Error> {
        match self.next_if(key) {
            Some(value) => Ok(value),
            None => Err(self.damaged(format!("{key} is missing"))),
        }
    }

    pub(super) fn next_if(&mut self, key: &str) -> Option<&'a str> {
        self.fields.next_if(|(name, _)| *name == key).map(|(_, value)| value)
    }

    pub(super) fn take_number(&mut self, key: &str) -> Result<u64, Error> {
        let value = self.take(key)?;
        value.parse().map_err(|_| self.damaged(format!("{key} is {value:?}, not a number")))
    }

    pub(super) fn end(mut self) -> Result<(), Error> {
        match self.fields.next() {
            Some((key, _)) => Err(self.damaged(format!("{key} does not belong there"))),
            None => Ok(()),
        }
    }

    pub(super) fn damaged(&self, why: String) -> Error {
        Error::Damaged { file: self.path.clone(), why }
    }
}

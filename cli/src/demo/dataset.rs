//! Owns the tour's data: a real set that any Debian machine has, one record per package. Finds it, reads
//! it, and compares it with what a cluster gives back. Writes nothing to the cluster (see `import`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use bytes::Bytes;
use coracle_client::Keyspace;
use futures_util::TryStreamExt;
use tokio::process::Command;

use crate::args::RecordFormat;
use crate::failure::Failure;
use crate::import::record::{Position, Records};

/// Names another file of control records.
const OVERRIDE: &str = "CORACLE_TOUR_DATA";

/// What the package manager keeps about installed packages.
const STATUS: &str = "/var/lib/dpkg/status";

/// Records that a tour takes at most: with more of them it would take minutes on a small machine.
pub const RECORDS_MAX: usize = 20_000;

/// Records that make a tour worth its name.
pub const RECORDS_MIN: usize = 1_000;

/// Bad matches that are named one by one.
const NAMED_MAX: usize = 5;

/// A set of records.
#[derive(Debug)]
pub struct Dataset {
    /// The file that is imported.
    pub file: PathBuf,
    /// Where it came from.
    pub origin: String,
    /// What it says, by key; of records with one key the last.
    pub records: BTreeMap<Bytes, Bytes>,
    /// Records, those with the same key included.
    pub count: usize,
}

/// What a cluster gave back.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Compared {
    /// Records that are there, byte for byte.
    pub equal: u64,
    /// Some that are not, and how.
    pub wrong: Vec<String>,
    /// How many are not.
    pub wrong_count: u64,
}

impl Dataset {
    /// The data of this machine; `dir` takes a copy where they come from a command.
    pub async fn find(dir: &Path) -> Result<Dataset, Failure> {
        if let Some(path) = std::env::var_os(OVERRIDE).map(PathBuf::from) {
            return Dataset::read(&path, format!("{} ({OVERRIDE})", path.display()));
        }
        if let Some(file) = dumpavail(dir).await {
            let dataset = Dataset::read(&file, "apt-cache dumpavail".to_owned())?;
            if dataset.records.len() >= RECORDS_MIN {
                return Ok(dataset);
            }
        }
        Dataset::read(Path::new(STATUS), STATUS.to_owned()).map_err(|failure| {
            failure.next(format!("name a file of Debian control records with {OVERRIDE}"))
        })
    }

    fn read(file: &Path, origin: String) -> Result<Dataset, Failure> {
        let unreadable = |error: std::io::Error| Failure::io("read", file, &error);
        let reader = BufReader::with_capacity(256 << 10, File::open(file).map_err(unreadable)?);
        let steps = Records::new(reader, RecordFormat::Packages, Position::default());
        let mut records = BTreeMap::new();
        let mut count = 0;
        // Those that cannot be read are passed over, here as in the import, and only good ones count.
        for step in steps {
            if let Ok(record) = step.map_err(unreadable)?.record {
                records.insert(record.key, record.value);
                count += 1;
                if count == RECORDS_MAX {
                    break;
                }
            }
        }
        Ok(Dataset { file: file.to_owned(), origin, records, count })
    }

    /// Reads all of it back and compares it byte for byte.
    pub async fn compare(&self, keyspace: &Keyspace) -> Result<Compared, Failure> {
        let mut compared = Compared::default();
        let mut missing = self.records.clone();
        let mut found = keyspace.scan(..).stream();
        let failed = |error| Failure::call("read the records back", &error);
        while let Some(pair) = found.try_next().await.map_err(failed)? {
            // What else is in the keyspace comes from an earlier tour on the same data.
            if let Some(value) = missing.remove(&pair.key) {
                match value == pair.value {
                    true => compared.equal += 1,
                    false => compared.wrong(&pair.key, "differs"),
                }
            }
        }
        for key in missing.keys() {
            compared.wrong(key, "is missing");
        }
        Ok(compared)
    }
}

impl Compared {
    fn wrong(&mut self, key: &[u8], how: &str) {
        self.wrong_count += 1;
        if self.wrong.len() < NAMED_MAX {
            self.wrong.push(format!("{} {how}", String::from_utf8_lossy(key)));
        }
    }
}

/// The package lists of this machine, written to a file; `None` where there are none.
async fn dumpavail(dir: &Path) -> Option<PathBuf> {
    let mut command = Command::new("apt-cache");
    command.arg("dumpavail").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let dumped = command.output().await.ok().filter(|output| output.status.success())?;
    let file = dir.join("packages.txt");
    fs::write(&file, dumped.stdout).ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_records_with_one_key_the_later_holds() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("packages");
        let record = |name: &str, text: &str| {
            format!("Package: {name}\nVersion: 1\nArchitecture: all\nDescription: {text}\n\n")
        };
        let bad = "Package: bad\n\n";
        let text = [&record("a", "old"), bad, &record("b", "b"), &record("a", "new")].concat();
        fs::write(&file, text).unwrap();
        let dataset = Dataset::read(&file, "test".to_owned()).unwrap();
        assert_eq!((dataset.count, dataset.records.len()), (3, 2));
        assert!(dataset.records[&b"a/1/all"[..]].ends_with(b"Description: new\n"));
    }
}

//! The systems beside which this one is measured: as Debian ships them, on this machine, under the same
//! load. Names its rooms, and finds their programs; starts nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::Failure;

pub mod etcd;
pub mod etcd_api;
pub mod redis;

/// Where Debian puts servers' programs, beside what `PATH` names.
const PLACES: [&str; 4] = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"];

/// The program of a peer.
pub fn find(program: &str) -> Result<PathBuf, Failure> {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(PLACES).map(Path::new);
    let found = places.map(|place| place.join(program)).find(|file| file.is_file());
    found.ok_or_else(|| Failure::new(format!("{program} is not there: run ./x bench setup")))
}

/// What a program says of its version, in one line.
pub fn version(program: &Path) -> String {
    let said = Command::new(program).arg("--version").output();
    let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned());
    let line = said.as_deref().ok().and_then(|said| said.lines().next()).unwrap_or("unknown");
    line.to_owned()
}

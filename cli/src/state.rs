//! Owns small files that a command keeps for its next run (how far an import has come, what a session
//! has seen): read, and replaced at once. Does not know what is in them.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::Failure;

/// Reads the state; `None` when there is none yet.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Failure> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::io("read", path, &error)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        Failure::failed(format!("{} is no state of this command: {error}", path.display()))
            .next("name another file, or remove it to begin anew")
    })
}

/// Replaces the state. After a crash there is the old one or the new one, never a half.
pub fn save<T: Serialize>(path: &Path, state: &T) -> Result<(), Failure> {
    let text = serde_json::to_vec_pretty(state)
        .map_err(|error| Failure::failed(format!("cannot write {}: {error}", path.display())))?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let written = || -> std::io::Result<()> {
        let mut file = File::create(&beside)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    written().map_err(|error| Failure::io("write", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_and_rubbish_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        assert_eq!(load::<Vec<u64>>(&path).unwrap(), None);
        save(&path, &vec![1_u64]).unwrap();
        save(&path, &vec![2_u64]).unwrap();
        assert_eq!(load(&path).unwrap(), Some(vec![2_u64]));
        fs::write(&path, "[").unwrap();
        assert!(load::<Vec<u64>>(&path).unwrap_err().what.contains("state"));
    }
}

//! The files of the checkout. Owns reading them and the crates' names; does not judge them.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that hold nothing of ours: version control, what builds and demos leave behind. The
/// folders are walked and not asked from git, so that the rules hold in an unpacked archive too, and
/// in a checkout that belongs to another user.
const SKIPPED: &[&str] = &[".git", "target", "demo-data", "__pycache__", ".venv"];

/// One file. Fixtures make theirs with [`File::new`].
pub(super) struct File {
    /// From the root of the checkout, with `/`.
    pub(super) path: String,
    /// Size on disk.
    pub(super) bytes: u64,
    /// Empty when the file is not UTF-8.
    pub(super) text: String,
}

impl File {
    pub(super) fn new(path: &str, text: &str) -> File {
        File { path: path.to_owned(), bytes: text.len() as u64, text: text.to_owned() }
    }

    pub(super) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Written by the code generator, which knows nothing of our rules.
    pub(super) fn is_generated(&self) -> bool {
        self.path.contains("/src/generated/")
    }
}

/// The root of the checkout.
pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate is a folder of the workspace")
        .to_owned()
}

/// Every file of the checkout, in the order of its path.
pub(super) fn files() -> Vec<File> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries {
            let entry = entry.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind =
                entry.file_type().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
                folders.push(path);
            } else if kind.is_file() {
                found.extend(read(&root, &path));
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// `None` for a file that went away since its folder was listed (an editor's, a running build's).
fn read(root: &Path, path: &Path) -> Option<File> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => panic!("{}: {error}", path.display()),
    };
    let relative = path.strip_prefix(root).expect("the walk started at the root");
    Some(File {
        path: relative.to_string_lossy().into_owned(),
        bytes: bytes.len() as u64,
        text: String::from_utf8(bytes).unwrap_or_default(),
    })
}

/// The file of that path.
pub(super) fn find<'a>(files: &'a [File], path: &str) -> Option<&'a File> {
    files.iter().find(|file| file.path == path)
}

/// The folders of the crates: those that have a manifest beside the root's.
pub(super) fn crates(files: &[File]) -> Vec<&str> {
    files
        .iter()
        .filter_map(|file| file.path.strip_suffix("/Cargo.toml"))
        .filter(|folder| !folder.contains('/'))
        .collect()
}

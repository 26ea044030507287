//! Owns the names of the hostile twin: directories, changes that are not durable, what a crash
//! leaves of them. Does not know what files hold.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::content::Inode;
use super::{Dice, Loss};

/// What a name stands for.
#[derive(Clone)]
pub(super) enum Node {
    Dir,
    File(Arc<Mutex<Inode>>),
}

pub(super) type Names = BTreeMap<PathBuf, Node>;

/// A change of names that its directory's sync has not made durable.
#[derive(Clone)]
pub(super) enum NameChange {
    Put(PathBuf, Node),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

impl NameChange {
    /// The same change, once the directory that it is in goes by another name: a change belongs to
    /// its directory, and not to whatever takes the old name later.
    pub(super) fn move_into(&mut self, from: &Path, to: &Path) {
        match self {
            NameChange::Put(path, _) | NameChange::Remove(path) => *path = moved(path, from, to),
            NameChange::Rename(old, new) => {
                (*old, *new) = (moved(old, from, to), moved(new, from, to));
            }
        }
    }
}

/// Where `path`, at or below `from`, stands once that is called `to`.
pub(super) fn moved(path: &Path, from: &Path, to: &Path) -> PathBuf {
    match path.strip_prefix(from) {
        Ok(rest) if rest.as_os_str().is_empty() => to.to_path_buf(),
        Ok(rest) => to.join(rest),
        Err(_) => path.to_path_buf(),
    }
}

/// Makes second copies of files, so that two names of one file stay two names of one file.
#[derive(Default)]
pub(super) struct Copies(Vec<Copied>);

struct Copied {
    old: Arc<Mutex<Inode>>,
    new: Arc<Mutex<Inode>>,
}

impl Copies {
    pub(super) fn names(&mut self, names: &Names, copy: &mut impl FnMut(&Inode) -> Inode) -> Names {
        names.iter().map(|(name, node)| (name.clone(), self.node(node, copy))).collect()
    }

    pub(super) fn node(&mut self, node: &Node, copy: &mut impl FnMut(&Inode) -> Inode) -> Node {
        let Node::File(old) = node else {
            return Node::Dir;
        };
        let known = self.0.iter().find(|copied| Arc::ptr_eq(&copied.old, old));
        let new = known.map(|copied| copied.new.clone()).unwrap_or_else(|| {
            let new = Arc::new(Mutex::new(copy(&old.lock())));
            self.0.push(Copied { old: old.clone(), new: new.clone() });
            new
        });
        Node::File(new)
    }
}

/// The names that a crash of the machine leaves.
pub(super) fn after_crash(
    durable: &Names,
    changes: Vec<(PathBuf, NameChange)>,
    loss: Loss,
    dice: &mut Dice,
) -> Names {
    let mut names = durable.clone();
    let mut cut_off: Vec<PathBuf> = Vec::new();
    for (dir, change) in changes {
        // Directories are journalled: what survives of one is a first part, never a later change
        // without the earlier.
        let survives = loss == Loss::Subset && !cut_off.contains(&dir) && !dice.one_in(3);
        if survives {
            apply_change(&mut names, &change);
        } else {
            cut_off.push(dir);
        }
    }
    // A name whose directory did not survive cannot be reached any more.
    let is_dir = |path: &Path| matches!(names.get(path), Some(Node::Dir));
    let lost: Vec<PathBuf> =
        names.keys().filter(|name| !name.ancestors().skip(1).all(is_dir)).cloned().collect();
    names.retain(|name, _| !lost.contains(name));
    names
}

/// Makes a change visible in one of the two views.
pub(super) fn apply_change(names: &mut Names, change: &NameChange) {
    match change {
        NameChange::Put(path, node) => {
            names.insert(path.clone(), node.clone());
        }
        NameChange::Remove(path) => names.retain(|name, _| !name.starts_with(path)),
        NameChange::Rename(from, to) => {
            let movers: Vec<PathBuf> =
                names.keys().filter(|name| name.starts_with(from)).cloned().collect();
            if !movers.is_empty() {
                names.retain(|name, _| !name.starts_with(to));
            }
            for name in movers {
                let node = names.remove(&name).expect("taken from the keys just now");
                names.insert(moved(&name, from, to), node);
            }
        }
    }
}

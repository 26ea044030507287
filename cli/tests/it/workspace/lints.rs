//! The bans in the `clippy.toml` files. Clippy enforces them; a crate's own `clippy.toml`
//! *replaces* the root's, so what the root bans must be repeated in it. Owns the rules that this
//! is done, that every ban gives its reason, and that no seam loses its ban.

use std::collections::BTreeSet;

use toml::{Table, Value};

use super::tree::{self, File};
use super::{expect_none, expect_one};

/// The crates whose nodes must run in a simulation: everything from outside comes in by a seam.
const SIMULATED: &[&str] = &["raft", "storage", "server"];

/// One call of each kind that would go around a seam. The files hold many more.
const SEAMS: &[&str] = &[
    "std::time::Instant::now",
    "std::time::SystemTime::now",
    "std::thread::spawn",
    "std::thread::sleep",
    "tokio::spawn",
    "tokio::task::spawn_blocking",
    "tokio::net::TcpStream::connect",
    "tokio::net::TcpListener::bind",
    "std::net::TcpStream::connect",
    "std::net::TcpListener::bind",
    "rand::rng",
    "rand::random",
    "std::fs::File::open",
    "std::fs::write",
    "tokio::fs::write",
    "std::process::exit",
];

#[test]
fn crates_repeat_the_bans_of_the_root() {
    expect_none(
        "a crate's clippy.toml replaces the root's: copy what is missing",
        &not_repeated(&tree::files()),
    );
}

#[test]
fn every_seam_is_guarded() {
    expect_none(
        "in raft, storage and server, clocks, randomness, sockets, files and spawning go through \
         the seams, and clippy.toml bans the direct calls",
        &unguarded(&tree::files()),
    );
}

#[test]
fn every_ban_gives_its_reason() {
    expect_none(
        "a ban without a reason tells nobody what to do instead",
        &without_reason(&tree::files()),
    );
}

#[test]
fn the_rules_can_fail() {
    let ban =
        |path: &str| format!("disallowed-methods = [{{ path = \"{path}\", reason = \"r\" }}]");
    let root = || File::new("clippy.toml", &ban("a::b"));
    expect_one(&not_repeated(&[root(), File::new("raft/clippy.toml", "")]), "a::b");
    expect_one(
        &not_repeated(&[File::new("clippy.toml", "a = 1"), File::new("raft/clippy.toml", "a = 2")]),
        "raft/clippy.toml: a",
    );
    assert!(not_repeated(&[root(), File::new("raft/clippy.toml", &ban("a::b"))]).is_empty());

    let missing = unguarded(&[]);
    assert_eq!(missing.len(), SEAMS.len() * SIMULATED.len());

    let bare = "disallowed-types = [\"a::B\"]";
    expect_one(&without_reason(&[File::new("clippy.toml", bare)]), "a::B");
    assert!(without_reason(&[root()]).is_empty());
}

fn not_repeated(files: &[File]) -> Vec<String> {
    let root = tree::find(files, "clippy.toml").map(settings).unwrap_or_default();
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with("/clippy.toml")) {
        let own = settings(file);
        for (key, value) in &root {
            if !value.is_array() && own.get(key) != Some(value) {
                problems.push(format!("{}: {key}", file.path));
            }
            let missing = &bans(&root, key) - &bans(&own, key);
            for path in missing {
                problems.push(format!("{}: {key}: {path}", file.path));
            }
        }
    }
    problems
}

fn unguarded(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for folder in SIMULATED {
        let path = format!("{folder}/clippy.toml");
        let own = tree::find(files, &path).map(settings).unwrap_or_default();
        let banned = bans(&own, "disallowed-methods");
        for seam in SEAMS.iter().filter(|seam| !banned.contains(**seam)) {
            problems.push(format!("{path} does not ban {seam}"));
        }
    }
    problems
}

fn without_reason(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with("clippy.toml")) {
        for entry in settings(file).values().filter_map(Value::as_array).flatten() {
            let reason = entry.get("reason").and_then(Value::as_str).unwrap_or("");
            if reason.is_empty() {
                problems.push(format!("{}: {entry}", file.path));
            }
        }
    }
    problems
}

fn settings(file: &File) -> Table {
    let parsed = file.text.parse::<Table>();
    parsed.unwrap_or_else(|error| panic!("{}: {error}", file.path))
}

/// The paths in one list of bans.
fn bans(settings: &Table, key: &str) -> BTreeSet<String> {
    let entries = settings.get(key).and_then(Value::as_array);
    let paths = entries.into_iter().flatten().filter_map(|entry| {
        let path = entry.get("path").unwrap_or(entry);
        path.as_str().map(str::to_owned)
    });
    paths.collect()
}

//! What holds for every source file: header, size, nothing left over. Owns the list of files that
//! are allowed to be long. How long a function may be stands in clippy.toml.

use super::tree::{self, File};
use super::{expect_none, expect_one};

/// Beyond this a file owns more than one thing. 400 is what to aim for.
const LINES_MAX: usize = 650;

/// Files that may be longer: path, lines at most, reason. Entries and numbers only go down.
const LONG: &[(&str, usize, &str)] = &[];

/// A repository is read and cloned by people; bulk belongs elsewhere.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Names that say nothing about what lives in a file, and so collect everything.
const VAGUE: &[&str] = &["util.rs", "utils.rs", "common.rs", "helper.rs", "helpers.rs", "misc.rs"];

#[test]
fn every_file_says_what_it_owns() {
    expect_none(
        "a .rs file begins with a `//!` header: what it owns, what it does not do",
        &headless(&tree::files()),
    );
}

#[test]
fn files_stay_short() {
    expect_none(
        "a file owns one thing: cut it by role or mechanism, or give it a reasoned entry in LONG",
        &long(&tree::files(), LONG),
    );
}

#[test]
fn no_file_is_bulk() {
    expect_none("no file is larger than 1 MiB", &bulk(&tree::files()));
}

#[test]
fn nothing_is_left_over() {
    expect_none(
        "no stubs, debug prints, notes to self or ignored tests: finish it or leave it out",
        &leftovers(&tree::files()),
    );
}

#[test]
fn names_say_what_is_inside() {
    expect_none("a file is named after what it owns", &vague(&tree::files()));
}

#[test]
fn one_integration_binary_per_crate() {
    expect_none(
        "integration tests are modules of tests/it/main.rs: each further binary links RocksDB again",
        &extra_binaries(&tree::files()),
    );
}

#[test]
fn the_rules_can_fail() {
    let one = |path: &str, text: &str| [File::new(path, text)];
    expect_one(&headless(&one("a/src/b.rs", "use c;\n")), "a/src/b.rs");
    assert!(headless(&one("a/src/generated/b.rs", "use c;")).is_empty());
    assert!(headless(&one("a/src/lib.rs", "#![doc = include_str!(\"../README.md\")]")).is_empty());

    let long_text = "//! a\n".repeat(LINES_MAX + 1);
    expect_one(&long(&one("a/src/b.rs", &long_text), &[]), "651");
    let entry = [("a/src/b.rs", LINES_MAX + 1, "a reason")];
    assert!(long(&one("a/src/b.rs", &long_text), &entry).is_empty());
    let grown = format!("{long_text}//! b\n");
    expect_one(&long(&one("a/src/b.rs", &grown), &entry), "652");
    expect_one(&long(&one("a/src/b.rs", "//! a"), &entry), "LONG");
    expect_one(&long(&[], &entry), "LONG");

    let mut huge = File::new("docs/a.bin", "");
    huge.bytes = FILE_BYTES_MAX + 1;
    expect_one(&bulk(&[huge]), "docs/a.bin");

    for word in LEFTOVERS {
        let text = format!("a\nb {word} c");
        expect_one(&leftovers(&one("a/src/b.rs", &text)), "a/src/b.rs:2");
        assert!(leftovers(&one("a/b.md", &text)).is_empty());
    }
    assert!(leftovers(&one("a/b.rs", concat!("my", "dbg", "!()"))).is_empty());

    expect_one(&vague(&one("a/src/util.rs", "")), "a/src/util.rs");
    let manifest = || File::new("a/Cargo.toml", "");
    expect_one(&extra_binaries(&[manifest(), File::new("a/tests/b.rs", "")]), "a/tests/b.rs");
    expect_one(
        &extra_binaries(&[manifest(), File::new("a/tests/b/main.rs", "")]),
        "a/tests/b/main.rs",
    );
    assert!(extra_binaries(&[manifest(), File::new("a/tests/it/main.rs", "")]).is_empty());
}

/// A crate's header may be its README, so that both show one text.
const HEADERS: &[&str] = &["//!", "#![doc = include_str!("];

fn headless(files: &[File]) -> Vec<String> {
    files
        .iter()
        .filter(|file| file.is_rust() && !file.is_generated())
        .filter(|file| !HEADERS.iter().any(|header| file.text.starts_with(header)))
        .map(|file| format!("{} has no header", file.path))
        .collect()
}

fn long(files: &[File], allowed: &[(&str, usize, &str)]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && !file.is_generated()) {
        let lines = file.text.lines().count();
        let most = allowed
            .iter()
            .find(|(path, ..)| *path == file.path)
            .map_or(LINES_MAX, |(_, most, _)| *most);
        if lines > most {
            problems.push(format!("{} has {lines} lines, at most {most}", file.path));
        }
    }
    for (path, _, reason) in allowed {
        let lines = tree::find(files, path).map_or(0, |file| file.text.lines().count());
        if lines <= LINES_MAX {
            problems.push(format!("{path} no longer needs its entry in LONG"));
        }
        if reason.is_empty() {
            problems.push(format!("{path} is in LONG without a reason"));
        }
    }
    problems
}

fn bulk(files: &[File]) -> Vec<String> {
    files
        .iter()
        .filter(|file| file.bytes > FILE_BYTES_MAX)
        .map(|file| format!("{} has {} bytes", file.path, file.bytes))
        .collect()
}

/// In pieces, so that this file does not break its own rule.
const LEFTOVERS: &[&str] = &[
    concat!("to", "do!"),
    concat!("unimplement", "ed!"),
    concat!("db", "g!"),
    concat!("FIX", "ME"),
    concat!("TO", "DO"),
    concat!("#[ign", "ore"),
];

fn leftovers(files: &[File]) -> Vec<String> {
    let code = [".rs", ".proto", ".toml", ".py", ".sh", ".yml", "/run"];
    let mut problems = Vec::new();
    for file in files {
        if file.path != "x" && !code.iter().any(|end| file.path.ends_with(end)) {
            continue;
        }
        for (number, line) in file.text.lines().enumerate() {
            for word in LEFTOVERS.iter().filter(|word| has_word(line, word)) {
                problems.push(format!("{}:{}: {word}", file.path, number + 1));
            }
        }
    }
    problems
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| !line[..at].ends_with(super::rust::is_name))
}

fn vague(files: &[File]) -> Vec<String> {
    files
        .iter()
        .filter(|file| {
            let name = file.path.rsplit('/').next().unwrap_or(&file.path);
            VAGUE.contains(&name)
        })
        .map(|file| format!("{} says nothing about what it owns", file.path))
        .collect()
}

fn extra_binaries(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for folder in tree::crates(files) {
        let tests = format!("{folder}/tests/");
        for file in files.iter().filter(|file| file.is_rust()) {
            let Some(inside) = file.path.strip_prefix(&tests) else {
                continue;
            };
            let binary = !inside.contains('/')
                || inside.matches('/').count() == 1 && inside.ends_with("/main.rs");
            if binary && inside != "it/main.rs" {
                problems.push(format!("{} is a test binary of its own", file.path));
            }
        }
    }
    problems
}

//! Documents that keep up with the code: every path, item and link that they name exists, and the
//! first ones to be read stay short. Owns those rules; what documents say is reviewed by people.

use std::collections::BTreeSet;

use super::tree::{self, File};
use super::{expect_none, expect_one};

/// Documents whose names of files and items are checked.
const MAPS: &[&str] =
    &["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/splits-and-merges.md"];

/// Document → words at most. Longer ones are not read.
const WORDS_MAX: &[(&str, usize)] = &[("README.md", 400), ("ARCHITECTURE.md", 3_500)];

/// A code span with one of these endings means a file, also without a folder before it.
const ENDINGS: &[&str] = &[".rs", ".proto", ".md"];

#[test]
fn paths_and_items_in_documents_exist() {
    let files = tree::files();
    let mut problems: Vec<String> = MAPS
        .iter()
        .filter(|path| tree::find(&files, path).is_none())
        .map(|path| format!("{path} is missing"))
        .collect();
    problems.extend(stale(&files));
    expect_none("what README, ARCHITECTURE and CONTRIBUTING name in back-ticks exists", &problems);
}

#[test]
fn links_between_documents_lead_somewhere() {
    expect_none("a relative link names a file of the checkout", &dead_links(&tree::files()));
}

#[test]
fn the_first_documents_stay_short() {
    expect_none("shorten it, or move a part to docs/", &wordy(&tree::files()));
}

#[test]
fn the_rules_can_fail() {
    let case = |text: &str| {
        stale(&[
            File::new("README.md", text),
            File::new("raft/Cargo.toml", ""),
            File::new("raft/src/apply.rs", "pub fn judge() {}"),
            File::new("raft/src/lib.rs", "mod apply;"),
            File::new("proto/proto/a.proto", ""),
        ])
    };
    for (wrong, what) in [
        ("see `raft/src/gone.rs`", "gone"),
        ("see `gone.rs`", "gone"),
        ("see `raft/gone`", "gone"),
        ("see `raft/src/{apply,gone}.rs`", "gone"),
        ("see `raft/src/*.proto`", "*"),
        ("see `raft::gone`", "gone"),
        ("see `raft::apply::gone()`", "gone"),
        ("see `coracle_raft::gone`", "gone"),
    ] {
        expect_one(&case(wrong), what);
    }
    for right in [
        "see `raft/src/apply.rs`, `apply.rs:1`, `src/apply.rs`, `raft/`, `raft/src/{apply,lib}.rs`",
        "see `proto/*.proto`, `raft::apply::judge()`, `coracle_raft::apply`, `std::fs`",
        "run `coracle put a/b`, `/etc/coracle/a.toml`, `$HOME/x.md`, `https://example.org/a.md`",
        "```\nraft/src/gone.rs `gone.rs`\n```",
        "`GET /metrics`, `a/b`, `and/or`, `127.0.0.1:80`",
    ] {
        assert!(case(right).is_empty(), "{right}: {:?}", case(right));
    }

    let linked = |text: &str| {
        dead_links(&[File::new("docs/a.md", text), File::new("docs/b.md", ""), File::new("x", "")])
    };
    expect_one(&linked("[c](c.md)"), "c.md");
    expect_one(&linked("[c](../y)"), "../y");
    let good =
        "[b](b.md) [b](b.md#part) [x](../x) [a](#a) [w](https://w.org) [d](../docs) `[c](d)`";
    assert!(linked(good).is_empty(), "{:?}", linked(good));

    expect_one(&wordy(&[File::new("README.md", &"word ".repeat(401))]), "401");
    assert!(wordy(&[File::new("README.md", &"word ".repeat(400))]).is_empty());
}

fn stale(files: &[File]) -> Vec<String> {
    let crates = tree::crates(files);
    let places = places(files);
    let mut problems = Vec::new();
    for document in files.iter().filter(|file| MAPS.contains(&file.path.as_str())) {
        for (number, line) in prose(&document.text) {
            for span in spans(line) {
                let missing =
                    missing_path(&places, span).or_else(|| missing_item(files, &crates, span));
                if let Some(missing) = missing {
                    problems.push(format!("{}:{number}: {missing} in `{span}`", document.path));
                }
            }
        }
    }
    problems
}

/// Lines outside of fenced blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(number, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        (!fence && !fenced).then_some((number + 1, line))
    })
}

/// What stands between back-ticks.
fn spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Every file and folder of the checkout.
fn places(files: &[File]) -> BTreeSet<&str> {
    let mut places = BTreeSet::new();
    for file in files {
        places.insert(file.path.as_str());
        places.extend(file.path.match_indices('/').map(|(at, _)| &file.path[..at]));
    }
    places
}

/// The first path in this span that looks like one of ours and does not exist. A path may begin
/// at any folder (`src/apply.rs`), as documents of one crate do.
fn missing_path(places: &BTreeSet<&str>, span: &str) -> Option<String> {
    let fits = |char: char| char.is_ascii_alphanumeric() || "._-/{},*:".contains(char);
    if !span.chars().all(fits) || span.contains("::") || span.starts_with('/') {
        return None;
    }
    // `apply.rs:12` is a place in a file.
    let path =
        span.split(':').next().unwrap_or(span).trim_start_matches("./").trim_end_matches('/');
    let top = path.split('/').next().unwrap_or(path);
    let ours = path.contains('/') && places.contains(top);
    if !ours && !ENDINGS.iter().any(|ending| path.ends_with(ending)) {
        return None;
    }
    braces(path).into_iter().find(|path| {
        !places.iter().any(|place| {
            let same_depth = place.rsplit('/').take(path.matches('/').count() + 1);
            same_depth.zip(path.rsplit('/')).all(|(name, pattern)| matches(name, pattern))
                && place.matches('/').count() >= path.matches('/').count()
        })
    })
}

/// `a/{b,c}.rs` → `a/b.rs`, `a/c.rs`.
fn braces(path: &str) -> Vec<String> {
    let Some((before, rest)) = path.split_once('{') else {
        return vec![path.to_owned()];
    };
    let Some((inside, after)) = rest.split_once('}') else {
        return vec![path.to_owned()];
    };
    inside.split(',').flat_map(|choice| braces(&format!("{before}{choice}{after}"))).collect()
}

/// One path segment against a pattern with at most one `*`.
fn matches(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        Some((before, after)) => {
            name.len() >= before.len() + after.len()
                && name.starts_with(before)
                && name.ends_with(after)
        }
        None => name == pattern,
    }
}

/// The first segment of `raft::apply::judge()` that no source of that crate contains as a word.
fn missing_item(files: &[File], crates: &[&str], span: &str) -> Option<String> {
    let mut segments = span.split("::");
    let top = segments.next()?;
    let folder = top.strip_prefix("coracle_").unwrap_or(top);
    if !crates.contains(&folder) {
        return None;
    }
    let sources = format!("{folder}/src/");
    let known = |word: &str| {
        files.iter().filter(|file| file.path.starts_with(&sources)).any(|file| {
            let stem = file.path[sources.len()..].trim_end_matches(".rs");
            stem.split('/').any(|part| part == word)
                || file.text.split(|char| !super::rust::is_name(char)).any(|part| part == word)
        })
    };
    segments
        .map(super::rust::name)
        .find(|segment| !segment.is_empty() && !known(segment))
        .map(str::to_owned)
}

fn dead_links(files: &[File]) -> Vec<String> {
    let places = places(files);
    let mut problems = Vec::new();
    for document in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (number, line) in prose(&document.text) {
            let text: String = line.split('`').step_by(2).collect();
            for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let path = target.split('#').next().unwrap_or(target);
                if path.is_empty() || path.contains("://") || path.starts_with("mailto:") {
                    continue;
                }
                if !places.contains(resolve(&document.path, path).as_str()) {
                    problems.push(format!("{}:{number}: {target}", document.path));
                }
            }
        }
    }
    problems
}

/// `target` as seen from `document`.
fn resolve(document: &str, target: &str) -> String {
    let mut segments: Vec<&str> = document.split('/').collect();
    segments.pop();
    for segment in target.trim_end_matches('/').split('/') {
        match segment {
            ".." => drop(segments.pop()),
            "." => {}
            _ => segments.push(segment),
        }
    }
    segments.join("/")
}

fn wordy(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for (path, most) in WORDS_MAX {
        let words = tree::find(files, path).map_or(0, |file| file.text.split_whitespace().count());
        if words > *most {
            problems.push(format!("{path} has {words} words, at most {most}"));
        }
    }
    problems
}

//! Limits explain themselves: every constant of `proto::limits` says why it has this value and
//! what happens beyond it. Owns that rule; the limits are `proto`'s.

use super::tree::{self, File};
use super::{expect_none, expect_one};

const LIMITS: &str = "proto/src/limits.rs";

#[test]
fn every_limit_gives_its_reason() {
    expect_none(
        "every limit has a doc comment: value, why this value, what happens beyond it",
        &bare_limits(&tree::files()),
    );
}

#[test]
fn the_rule_can_fail() {
    expect_one(&bare_limits(&[]), "missing");
    let limits = |text: &str| bare_limits(&[File::new(LIMITS, text)]);
    expect_one(&limits("//! a\n"), "no limit");
    expect_one(&limits("//! a\npub const B: u64 = 1;\n"), "B");
    expect_one(&limits("/// a\npub const A: u64 = 1;\npub const B: u64 = 1;\n"), "B");
    assert!(limits("/// a\n#[doc(alias = \"b\")]\npub const A: u64 = 1;\n").is_empty());
}

fn bare_limits(files: &[File]) -> Vec<String> {
    let Some(file) = tree::find(files, LIMITS) else {
        return vec![format!("{LIMITS} is missing")];
    };
    let lines: Vec<&str> = file.text.lines().map(str::trim).collect();
    let mut problems = Vec::new();
    let mut limits = 0;
    for (number, line) in lines.iter().enumerate() {
        let Some(rest) = line.strip_prefix("pub const ") else {
            continue;
        };
        limits += 1;
        let above = lines[..number].iter().rev().find(|line| !line.starts_with("#["));
        if !above.is_some_and(|line| line.starts_with("///")) {
            let name = super::rust::name(rest.strip_prefix("fn ").unwrap_or(rest));
            problems.push(format!("{LIMITS}:{}: {name}", number + 1));
        }
    }
    if limits == 0 {
        problems.push(format!("{LIMITS} has no limit; has the form of its constants changed?"));
    }
    problems
}

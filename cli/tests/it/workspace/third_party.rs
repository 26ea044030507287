//! `THIRD-PARTY-LICENSES.md`: what others wrote, and under which terms we pass it on. Owns its
//! text; `./x fix` writes it anew. Whether a licence is allowed is judged in `licences.rs`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;

use super::graph::{PLATFORMS, PREFIX, cargo};
use super::tree;

const PATH: &str = "THIRD-PARTY-LICENSES.md";

const HEAD: &str = "\
# Third-party licences

<!-- Generated from Cargo.lock: `./x fix` writes this file, a test compares it. -->

Coracle itself is under MIT or Apache-2.0, as you choose (`LICENSE-MIT`, `LICENSE-APACHE`). These
are the packages of others for Linux on x86-64 and arm64. Every package brings the full text of its
licence in its sources, on crates.io under its name and version.

Two of them bring C and C++ sources that are compiled in: `rust-librocksdb-sys` RocksDB, which we
take under Apache-2.0 (it is also offered under GPL-2.0), with parts of LevelDB under BSD-3-Clause;
`lz4-sys` the LZ4 library, under BSD-2-Clause.
";

#[test]
fn third_party_licences_are_current() {
    let program = listed(&["-p", "coracle-cli", "-e", "normal,no-proc-macro"]);
    let all = listed(&["--workspace", "-e", "normal,build,dev"]);
    let wanted = page(&program, &all);
    let path = tree::root().join(PATH);
    if std::env::var_os("CORACLE_REGENERATE").is_some_and(|value| value == "1") {
        fs::write(&path, &wanted).expect("the checkout can be written to");
        return;
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    if let Some(difference) = difference(&wanted, &found) {
        panic!("{PATH} is not what Cargo.lock gives; `./x fix` writes it anew\n\n{difference}");
    }
}

#[test]
fn the_rule_can_fail() {
    let line = |name: &str| (name.to_owned(), "1.0.0".to_owned(), "MIT".to_owned());
    let one = page(&[line("a")].into(), &[line("a"), line("b")].into());
    assert_eq!(difference(&one, &one), None);
    let two = page(&[line("a")].into(), &[line("a"), line("c")].into());
    assert_eq!(
        difference(&two, &one).as_deref(),
        Some("  missing: | c | 1.0.0 | MIT |\n  too much: | b | 1.0.0 | MIT |\n")
    );
    assert!(difference(&one, &one.replace("Coracle itself", "Coracle")).is_some());
    assert_eq!(
        parse("a v1.0.0|MIT\ncoracle-b v0.1.0 (/home/c)|MIT\nd v2.0.0 (proc-macro)|\n"),
        [
            ("a".to_owned(), "1.0.0".to_owned(), "MIT".to_owned()),
            ("d".to_owned(), "2.0.0".to_owned(), "not given".to_owned()),
        ]
        .into()
    );
}

/// Name, version, licence.
type Lines = BTreeSet<(String, String, String)>;

/// `cargo tree` and not `cargo metadata`: the latter also lists options that are off.
fn listed(selection: &[&str]) -> Lines {
    let mut arguments = vec!["tree", "--prefix", "none", "--no-dedupe", "--format", "{p}|{l}"];
    arguments.extend(selection);
    for platform in PLATFORMS {
        arguments.extend(["--target", platform]);
    }
    parse(&cargo(&arguments))
}

fn parse(tree: &str) -> Lines {
    let mut lines = Lines::new();
    for line in tree.lines() {
        let Some((package, licence)) = line.rsplit_once('|') else {
            continue;
        };
        let mut words = package.split(' ');
        let (Some(name), Some(version)) = (words.next(), words.next()) else {
            continue;
        };
        if name.starts_with(PREFIX) {
            continue;
        }
        let licence = if licence.is_empty() { "not given" } else { licence };
        let version = version.trim_start_matches('v');
        lines.insert((name.to_owned(), version.to_owned(), licence.to_owned()));
    }
    lines
}

fn page(program: &Lines, all: &Lines) -> String {
    let mut page = HEAD.to_owned();
    let others: Lines = all.difference(program).cloned().collect();
    table(&mut page, "In the program `coracle`", program);
    table(&mut page, "Only in the build, the tests and the tools", &others);
    page
}

fn table(page: &mut String, title: &str, lines: &Lines) {
    let mut write = |text: String| page.write_str(&text).expect("a string takes any text");
    write(format!("\n## {title}\n\n| package | version | licence |\n|---|---|---|\n"));
    for (name, version, licence) in lines {
        write(format!("| {name} | {version} | {licence} |\n"));
    }
}

fn difference(wanted: &str, found: &str) -> Option<String> {
    if wanted == found {
        return None;
    }
    let wanted: BTreeSet<&str> = wanted.lines().collect();
    let found: BTreeSet<&str> = found.lines().collect();
    let mut shown = String::new();
    for (what, lines) in [("missing", &wanted - &found), ("too much", &found - &wanted)] {
        for line in lines.iter().take(20) {
            writeln!(shown, "  {what}: {line}").expect("a string takes any text");
        }
    }
    if shown.is_empty() {
        shown.push_str("  the same lines in another order\n");
    }
    Some(shown)
}

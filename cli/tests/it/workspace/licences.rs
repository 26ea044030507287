//! What we may build on: licences of every package in the resolved graph, packages that are
//! banned, packages that may be there only once. Owns those lists. Does not look for security
//! advisories: that needs a database from the network.

use std::collections::BTreeMap;

use super::graph::{self, Package};
use super::{expect_none, expect_one};

/// Permissive, and compatible with both of our licences.
const ALLOWED: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// Package, and why it must not come in.
const BANNED: &[(&str, &str)] = &[
    ("openssl", "a system library; TLS is rustls"),
    ("openssl-sys", "a system library; TLS is rustls"),
    ("native-tls", "picks the system's TLS; ours is rustls"),
    ("ring", "one provider of cryptography: aws-lc-rs; two panic at the first handshake"),
    ("rocksdb", "the old binding; ours is the maintained fork, rust-rocksdb"),
    ("librocksdb-sys", "a second RocksDB in one program"),
    ("async-std", "a second async runtime"),
    ("fs2", "no longer maintained"),
];

/// Two versions of these in one program do not fit together, or double its size.
const ONCE: &[&str] = &[
    "openraft",
    "prost",
    "prost-types",
    "rust-librocksdb-sys",
    "rust-rocksdb",
    "tokio",
    "tonic",
    "tonic-prost",
];

/// Native libraries that packages may declare, and what they bring. Of these only RocksDB, LZ4
/// and the runtime-loaded libclang are built; the others are options of RocksDB that are off.
const NATIVE: &[(&str, &str)] = &[
    ("rocksdb", "a replica's state"),
    ("lz4", "RocksDB's compression"),
    ("clang", "reads RocksDB's header while its binding is built"),
    ("bzip2", "off; named by RocksDB's binding"),
    ("z", "off; named by RocksDB's binding"),
    ("prettyplease02", "no library; keeps the formatter of generated code single"),
];

#[test]
fn every_licence_is_allowed() {
    expect_none(
        "every package is under a licence that we allow; one more is a decision for its owner",
        &not_allowed(&graph::packages()),
    );
}

#[test]
fn nothing_banned_comes_in() {
    expect_none("these packages must stay out", &banned(&graph::packages()));
}

#[test]
fn some_packages_are_there_only_once() {
    expect_none("one version only", &doubled(&graph::packages()));
}

#[test]
fn native_code_is_listed() {
    expect_none(
        "a native library costs every builder a compiler and every user an update: list it with \
         its reason, and in THIRD-PARTY-LICENSES.md",
        &unlisted_native(&graph::packages()),
    );
}

#[test]
fn the_rules_can_fail() {
    let licensed = |licence: Option<&str>| {
        let mut package = Package::new("a", "1.0.0");
        package.licence = licence.map(str::to_owned);
        not_allowed(&[package])
    };
    expect_one(&licensed(None), "none");
    expect_one(&licensed(Some("GPL-3.0")), "GPL-3.0");
    expect_one(&licensed(Some("MIT OR (")), "can't be read");
    assert!(licensed(Some("GPL-3.0 OR MIT")).is_empty());

    expect_one(&banned(&[Package::new("openssl", "1.0.0")]), "openssl");
    expect_one(&banned(&[Package::new("ring", "1.0.0")]), "ring");
    expect_one(
        &doubled(&[Package::new("prost", "1.0.0"), Package::new("prost", "2.0.0")]),
        "prost",
    );
    assert!(doubled(&[Package::new("syn", "1.0.0"), Package::new("syn", "2.0.0")]).is_empty());
    let mut native = Package::new("a-sys", "1.0.0");
    native.links = Some("a".to_owned());
    expect_one(&unlisted_native(&[native]), "a-sys");
}

#[test]
fn expressions_are_judged_as_spdx_says() {
    for (expression, good) in [
        ("MIT", true),
        ("MIT/Apache-2.0", true),
        ("GPL-2.0 / MIT", true),
        ("GPL-2.0 OR LGPL-3.0", false),
        ("MIT AND GPL-2.0", false),
        ("(GPL-2.0 OR MIT) AND Unicode-3.0", true),
        ("GPL-2.0 AND ISC OR MIT", true),
        ("MIT OR ISC AND GPL-2.0", true),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("MIT WITH something", false),
    ] {
        assert_eq!(allowed(expression), Ok(good), "{expression}");
    }
    for broken in ["", "MIT OR", "(MIT", "MIT)", "MIT ISC", "AND MIT"] {
        assert!(allowed(broken).is_err(), "{broken}");
    }
}

fn not_allowed(packages: &[Package]) -> Vec<String> {
    let mut problems = Vec::new();
    for package in packages {
        let Package { name, version, .. } = package;
        match package.licence.as_deref().map(|text| (text, allowed(text))) {
            Some((_, Ok(true))) => {}
            Some((text, Ok(false))) => problems.push(format!("{name} {version}: {text}")),
            Some((text, Err(()))) => {
                problems.push(format!("{name} {version}: {text:?} can't be read"));
            }
            None => problems.push(format!("{name} {version}: none given")),
        }
    }
    problems
}

fn banned(packages: &[Package]) -> Vec<String> {
    let mut problems = Vec::new();
    for package in packages {
        for (_, reason) in BANNED.iter().filter(|(name, _)| *name == package.name) {
            problems.push(format!("{} {}: {reason}", package.name, package.version));
        }
    }
    problems
}

fn doubled(packages: &[Package]) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages.iter().filter(|package| ONCE.contains(&package.name.as_str())) {
        versions.entry(&package.name).or_default().push(&package.version);
    }
    versions.retain(|_, versions| versions.len() > 1);
    versions.iter().map(|(name, versions)| format!("{name}: {}", versions.join(", "))).collect()
}

fn unlisted_native(packages: &[Package]) -> Vec<String> {
    let mut problems = Vec::new();
    for package in packages {
        let Some(library) = &package.links else {
            continue;
        };
        if !NATIVE.iter().any(|(known, _)| known == library) {
            problems.push(format!("{} links {library}", package.name));
        }
    }
    problems
}

/// Whether the SPDX expression can be met with licences that we allow. `AND` binds tighter than
/// `OR`; the old `/` means `OR`.
fn allowed(expression: &str) -> Result<bool, ()> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut tokens: Vec<&str> = spaced.split_whitespace().rev().collect();
    let good = either(&mut tokens)?;
    if tokens.is_empty() { Ok(good) } else { Err(()) }
}

fn either(tokens: &mut Vec<&str>) -> Result<bool, ()> {
    let mut good = both(tokens)?;
    while tokens.pop_if(|token| *token == "OR").is_some() {
        good |= both(tokens)?;
    }
    Ok(good)
}

fn both(tokens: &mut Vec<&str>) -> Result<bool, ()> {
    let mut good = one(tokens)?;
    while tokens.pop_if(|token| *token == "AND").is_some() {
        good &= one(tokens)?;
    }
    Ok(good)
}

fn one(tokens: &mut Vec<&str>) -> Result<bool, ()> {
    match tokens.pop() {
        Some("(") => {
            let good = either(tokens)?;
            (tokens.pop() == Some(")")).then_some(good).ok_or(())
        }
        None | Some(")" | "OR" | "AND" | "WITH") => Err(()),
        Some(licence) => {
            let mut licence = licence.to_owned();
            if tokens.pop_if(|token| *token == "WITH").is_some() {
                licence = format!("{licence} WITH {}", tokens.pop().ok_or(())?);
            }
            Ok(ALLOWED.contains(&licence.as_str()))
        }
    }
}

//! The rules of this workspace, as tests: what a reviewer would otherwise have to remember.
//!
//! Owns the checks over the sources, the documents and the dependency graph as a whole. Does not
//! check what rustfmt, clippy or rustdoc already see (`./x verify`), nor what a program does.
//!
//! A rule is a plain function over the files (or over the dependency graph) that returns what is
//! wrong. Beside every rule stands a small fixture that breaks it: a rule that can't fail is no
//! rule.

mod documents;
mod edges;
mod graph;
mod licences;
mod limits;
mod lints;
mod manifests;
mod order;
mod rust;
mod sources;
mod third_party;
mod tree;

/// Fails with the rule, what breaks it, and how to mend it.
#[track_caller]
fn expect_none(rule: &str, problems: &[String]) {
    assert!(problems.is_empty(), "{rule}\n\n  {}\n", problems.join("\n  "));
}

/// For fixtures: the rule reports exactly one problem, and names `what`.
#[track_caller]
fn expect_one(problems: &[String], what: &str) {
    assert!(
        problems.len() == 1 && problems[0].contains(what),
        "the rule should report one problem about {what:?}, not {problems:?}"
    );
}

//! Reading order inside a crate: `lib.rs` lists its modules from the top down, and a module uses
//! only what is listed above it. So every crate reads from the first file to the last, and no two
//! modules need each other. Owns that rule for the modules of `lib.rs`; the order inside a module
//! with files of its own is left to its `mod.rs`.

use std::collections::BTreeMap;

use super::expect_none;
use super::rust::{code, group, is_name, leaves, name, without_tests};
use super::tree::{self, File};

#[test]
fn modules_use_only_what_is_listed_above_them() {
    expect_none(
        "lib.rs lists modules from the top down, and a module uses only those above it: move the \
         item to where it is needed first, or hand it in",
        &upward_uses(&tree::files()),
    );
}

#[test]
fn the_rule_sees_an_upward_use() {
    let case = |text: &str| {
        upward_uses(&[
            File::new("a/Cargo.toml", ""),
            File::new(
                "a/src/lib.rs",
                "mod low;\npub mod middle;\npub(crate) mod high;\npub use high::{High, deep::Deep as Alias};\n",
            ),
            File::new("a/src/middle/part.rs", text),
        ])
    };
    for wrong in [
        "use crate::high;",
        "fn f() -> crate::high::High {}",
        "use crate::{low, high::High};",
        "use crate::{low::{A, B}, Alias};",
        "use crate::High;",
    ] {
        super::expect_one(&case(wrong), "high");
    }
    for right in [
        "use crate::low::Low; use crate::middle::other;",
        "// crate::high\nconst A: &str = \"crate::high\";",
        "#[cfg(test)]\nmod tests { use crate::high; }",
        "macro_rules! m { () => { $crate::high } }",
        "use other_crate::high;",
    ] {
        assert!(case(right).is_empty(), "{right}: {:?}", case(right));
    }
}

#[test]
fn the_rule_sees_super_at_the_top() {
    let problems = upward_uses(&[
        File::new("a/Cargo.toml", ""),
        File::new("a/src/lib.rs", "mod low; mod high;"),
        File::new("a/src/low.rs", "use super::high::High;"),
        File::new("a/src/high.rs", "use super::low::Low;"),
    ]);
    super::expect_one(&problems, "a/src/low.rs");
}

fn upward_uses(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for folder in tree::crates(files) {
        let Some(lib) = tree::find(files, &format!("{folder}/src/lib.rs")) else {
            continue;
        };
        let root = Root::read(&lib.text);
        let sources = format!("{folder}/src/");
        for file in files.iter().filter(|file| file.is_rust()) {
            let Some(inside) = file.path.strip_prefix(&sources) else {
                continue;
            };
            let Some(module) = root.rank(name(inside)) else {
                continue;
            };
            for used in root.upward(module, inside, &file.text) {
                problems.push(format!(
                    "{} (module {}) uses {used}, which {} lists below it",
                    file.path, root.modules[module], lib.path
                ));
            }
        }
    }
    problems
}

/// What `lib.rs` says: its modules in order, and which of them its re-exports come from.
struct Root {
    modules: Vec<String>,
    exports: BTreeMap<String, String>,
}

impl Root {
    fn read(lib: &str) -> Root {
        let code = without_tests(&code(lib));
        let modules: Vec<String> = words_after(&code, "mod ")
            .map(|rest| name(rest).to_owned())
            .filter(|module| !module.is_empty())
            .collect();
        let exports = words_after(&code, "use ")
            .flat_map(|rest| leaves(rest.split(';').next().unwrap_or("")))
            .map(|(path, name)| (first(&path).to_owned(), name))
            .filter(|(module, _)| modules.contains(module))
            .map(|(module, name)| (name, module))
            .collect();
        Root { modules, exports }
    }

    fn rank(&self, module: &str) -> Option<usize> {
        self.modules.iter().position(|known| known == module)
    }

    /// The modules below `module` that this text of it names, each once.
    fn upward(&self, module: usize, inside: &str, text: &str) -> Vec<String> {
        let code = without_tests(&code(text));
        let mut starts = vec!["crate::"];
        // In a module's own file `super` is the crate; deeper down it is the module.
        if !inside.contains('/') || inside.matches('/').count() == 1 && inside.ends_with("/mod.rs")
        {
            starts.push("super::");
        }
        let mut found: Vec<String> = starts
            .into_iter()
            .flat_map(|start| words_after(&code, start))
            .flat_map(|rest| match rest.chars().next() {
                Some('{') => leaves(group(rest)),
                _ => leaves(name(rest)),
            })
            .filter_map(|(path, _)| self.module_of(first(&path)))
            .filter(|used| self.rank(used) > Some(module))
            .collect();
        found.sort();
        found.dedup();
        found
    }

    fn module_of(&self, name: &str) -> Option<String> {
        match self.exports.get(name) {
            Some(module) => Some(module.clone()),
            None => self.rank(name).map(|_| name.to_owned()),
        }
    }
}

/// The first segment that names something.
fn first(path: &str) -> &str {
    path.split("::")
        .map(str::trim)
        .find(|segment| *segment != "self" && *segment != "crate")
        .unwrap_or("")
}

/// What follows each `word` that is not the end of a longer one.
fn words_after<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = &'a str> {
    code.match_indices(word).filter_map(move |(at, _)| {
        let before = code[..at].chars().next_back().unwrap_or(' ');
        let whole = !is_name(before) && before != '$' && before != ':';
        whole.then(|| &code[at + word.len()..])
    })
}

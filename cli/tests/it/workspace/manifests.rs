//! What holds for every `Cargo.toml`: dependencies are chosen once, with a reason, in the root's;
//! the crates take them and the lints from there. Owns those rules; licences and edges are
//! `licences.rs` and `edges.rs`.

use toml::{Table, Value};

use super::tree::{self, File};
use super::{expect_none, expect_one};

#[test]
fn every_dependency_gives_its_reason() {
    expect_none(
        "every dependency of the workspace has a line of its own above it that says why we have it",
        &without_reason(&tree::files()),
    );
}

#[test]
fn crates_take_dependencies_and_lints_from_the_root() {
    expect_none(
        "a crate writes `name.workspace = true` for dependencies and `[lints] workspace = true`",
        &own_choices(&tree::files()),
    );
}

#[test]
fn the_rules_can_fail() {
    let root = |text: &str| without_reason(&[File::new("Cargo.toml", text)]);
    expect_one(&root(""), "no dependency");
    expect_one(&root("[workspace.dependencies]\n# Why.\na = \"1\"\nb = \"1\"\n"), "b");
    expect_one(&root("[workspace.dependencies]\n# Why.\n\na = \"1\"\n"), "a");
    let good = "[workspace.dependencies]\ncoracle-a = { path = \"a\" }\n# Why.\nb = [\n  \"1\",\n]\n\n[other]\nc = 1\n";
    assert!(root(good).is_empty(), "{:?}", root(good));

    let member = |text: &str| own_choices(&[File::new("a/Cargo.toml", text)]);
    let lints = "[lints]\nworkspace = true\n";
    expect_one(&member("[package]\nname = \"a\"\n"), "lints");
    expect_one(&member(&format!("{lints}[dependencies]\nb = \"1\"\n")), "b");
    expect_one(&member(&format!("{lints}[dev-dependencies]\nb = {{ version = \"1\" }}\n")), "b");
    expect_one(&member(&format!("{lints}[target.'cfg(unix)'.dependencies]\nb = \"1\"\n")), "b");
    expect_one(&member("[lints\n"), "TOML");
    assert!(member(&format!("{lints}[dependencies]\nb.workspace = true\n")).is_empty());
}

fn without_reason(files: &[File]) -> Vec<String> {
    let text = tree::find(files, "Cargo.toml").map_or("", |file| &file.text);
    let mut problems = Vec::new();
    let (mut inside, mut above, mut seen) = (false, "", 0);
    for (number, line) in text.lines().enumerate() {
        if line.starts_with('[') {
            inside = line.trim() == "[workspace.dependencies]";
        } else if inside && line.starts_with(|char: char| char.is_ascii_alphanumeric()) {
            seen += 1;
            let name = line.split(['=', ' ', '.']).next().unwrap_or(line);
            if !name.starts_with("coracle-") && !above.starts_with('#') {
                problems.push(format!("Cargo.toml:{}: {name}", number + 1));
            }
        }
        above = line;
    }
    if seen == 0 {
        problems.push("Cargo.toml: no dependency found".to_owned());
    }
    problems
}

fn own_choices(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for folder in tree::crates(files) {
        let path = format!("{folder}/Cargo.toml");
        let manifest = tree::find(files, &path).expect("a crate's folder is known by its manifest");
        let Ok(manifest) = manifest.text.parse::<Table>() else {
            problems.push(format!("{path} is not TOML"));
            continue;
        };
        if !from_workspace(manifest.get("lints")) {
            problems.push(format!("{path} does not take the lints of the workspace"));
        }
        let targets = manifest.get("target").and_then(Value::as_table);
        let tables = targets.into_iter().flat_map(Table::values);
        let tables = tables.filter_map(Value::as_table).chain([&manifest]);
        for table in tables {
            for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
                let Some(dependencies) = table.get(kind).and_then(Value::as_table) else {
                    continue;
                };
                for (name, value) in dependencies {
                    if !from_workspace(Some(value)) {
                        problems.push(format!("{path}: {kind}: {name}"));
                    }
                }
            }
        }
    }
    problems
}

fn from_workspace(value: Option<&Value>) -> bool {
    let inherited = value.and_then(|value| value.get("workspace"));
    inherited.and_then(Value::as_bool) == Some(true)
}

//! The dependency graph as cargo resolved it. Owns asking cargo; does not judge the answer.

use std::process::Command;

use serde_json::Value;

use super::tree;

/// Our packages are `coracle-<folder>`.
pub(super) const PREFIX: &str = "coracle-";

/// Where the programs run; what only other platforms need is not looked at.
pub(super) const PLATFORMS: &[&str] = &["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];

/// What a package needs another one for.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(super) enum Kind {
    Normal,
    Dev,
    Build,
}

/// One version of one package. Fixtures make theirs with [`Package::new`].
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    /// The SPDX expression of its manifest.
    pub(super) licence: Option<String>,
    /// What its manifest asks for, by the packages' own names.
    pub(super) dependencies: Vec<(String, Kind)>,
    /// It runs a program of its own when it is built.
    pub(super) build_script: bool,
    /// The native library that it declares to link.
    pub(super) links: Option<String>,
}

impl Package {
    pub(super) fn new(name: &str, version: &str) -> Package {
        Package {
            name: name.to_owned(),
            version: version.to_owned(),
            licence: Some("MIT".to_owned()),
            dependencies: Vec::new(),
            build_script: false,
            links: None,
        }
    }

    /// For fixtures: the same package with one more dependency.
    pub(super) fn needs(mut self, name: &str, kind: Kind) -> Package {
        self.dependencies.push((name.to_owned(), kind));
        self
    }

    /// The folder of one of our crates; `None` for a package of others.
    pub(super) fn folder(&self) -> Option<&str> {
        self.name.strip_prefix(PREFIX)
    }

    fn read(value: &Value) -> Package {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let targets = value["targets"].as_array().into_iter().flatten();
        let mut kinds = targets.flat_map(|target| target["kind"].as_array().into_iter().flatten());
        let dependencies = value["dependencies"].as_array().into_iter().flatten();
        Package {
            name: text("name").expect("a package has a name"),
            version: text("version").expect("a package has a version"),
            licence: text("license"),
            dependencies: dependencies
                .map(|dependency| {
                    let name = dependency["name"].as_str().expect("a dependency has a name");
                    let kind = match dependency["kind"].as_str() {
                        Some("dev") => Kind::Dev,
                        Some("build") => Kind::Build,
                        _ => Kind::Normal,
                    };
                    (name.to_owned(), kind)
                })
                .collect(),
            build_script: kinds.any(|kind| kind == "custom-build"),
            links: text("links"),
        }
    }
}

/// Every package of the resolved graph, ours included.
pub(super) fn packages() -> Vec<Package> {
    let mut arguments = vec!["metadata", "--format-version", "1"];
    for platform in PLATFORMS {
        arguments.extend(["--filter-platform", platform]);
    }
    let metadata: Value =
        serde_json::from_str(&cargo(&arguments)).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array();
    packages.expect("metadata lists packages").iter().map(Package::read).collect()
}

/// What cargo prints, without the network and without touching `Cargo.lock`.
pub(super) fn cargo(arguments: &[&str]) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(arguments)
        .args(["--offline", "--locked"])
        .current_dir(tree::root())
        .output()
        .expect("cargo runs these tests, so it can be started");
    assert!(
        output.status.success(),
        "cargo {} failed (has `cargo fetch --locked`, or `./x setup`, been run?):\n{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("cargo prints UTF-8")
}

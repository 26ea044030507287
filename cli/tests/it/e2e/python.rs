//! The Python example, run as its README says. Only this sees the protos and the service through
//! somebody else's gRPC. Owns the packages that it needs, which are kept per user.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use super::Bench;
use crate::lone::text;

/// How long the example may take; it takes two seconds where nothing else runs.
const EXAMPLE_DEADLINE: Duration = Duration::from_secs(120);

/// Keys that one run of the example leaves behind under `python/`.
const KEYS: usize = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_generated_client_uses_any_node_for_any_key() {
    let python = python();
    let mut bench = Bench::start(3).await;
    let out = example(&python, &bench).await;
    let said =
        |line: &str| assert!(out.lines().any(|said| said.starts_with(line)), "{line}: {out}");
    for reason in ["TOO_LARGE", "INVALID_ARGUMENT", "CROSS_ENTITY", "UNKNOWN_KEYSPACE"] {
        said(&format!("error {reason}: "));
    }
    said(&format!("ok: {KEYS} keys through 3 nodes"));
    // What it says that it wrote, seen by another client.
    let scan = ["scan", "--prefix", "python/", "--keys-only"];
    assert_eq!(bench.expect(&scan, 0).await.0.lines().count(), KEYS);

    // It retries elsewhere, under the same request ids.
    bench.cluster.kill(1);
    bench.cluster.reap(1).await;
    example(&python, &bench).await;
    assert_eq!(bench.expect(&scan, 0).await.0.lines().count(), 2 * KEYS);
    bench.stop().await;
}

/// Runs the example to its end against all nodes; returns what it printed.
async fn example(python: &Path, bench: &Bench) -> String {
    let mut command = tokio::process::Command::from(clean(python));
    command.arg(example_dir().join("example.py")).kill_on_drop(true);
    command.args(bench.endpoints().split(','));
    let output = tokio::time::timeout(EXAMPLE_DEADLINE, command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("not done within {EXAMPLE_DEADLINE:?}"));
    succeeded("run the example", output.unwrap())
}

fn example_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/python")
}

/// A Python that has the example's packages. They are installed once per user, for each set of
/// packages and each Python.
fn python() -> PathBuf {
    let requirements = example_dir().join("requirements.txt");
    let mut hash = clean(Path::new("python3"));
    hash.args(["-c", HASH]).arg(&requirements);
    let hash = succeeded("hash the requirements", run(hash));
    let dir = cache().join(format!("python-{}", hash.trim()));
    fs::create_dir_all(cache()).unwrap();
    let lock = File::create(dir.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let python = dir.join("bin/python");
    // Written last: what an interrupted installation left behind is made anew.
    let complete = dir.join("complete");
    if !complete.exists() {
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        let mut venv = clean(Path::new("python3"));
        venv.args(["-m", "venv"]).arg(&dir);
        succeeded("make a virtual environment (Debian: apt install python3-venv)", run(venv));
        let mut pip = clean(&python);
        // Wheels only: building gRPC takes longer than all other tests together.
        pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--only-binary=:all:", "-r"]);
        pip.arg(&requirements);
        succeeded("install packages from PyPI (is it within reach?)", run(pip));
        File::create(complete).unwrap();
    }
    python
}

/// Prints the name of what is to be installed for what.
const HASH: &str = "import hashlib, sys; \
    what = open(sys.argv[1], 'rb').read() + (sys.version + sys.executable).encode(); \
    print(hashlib.sha256(what).hexdigest()[:16])";

/// As `./x` has it.
fn cache() -> PathBuf {
    let dir = |name: &str| std::env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let user = || {
        dir("XDG_CACHE_HOME")
            .unwrap_or_else(|| dir("HOME").expect("a user has a home").join(".cache"))
    };
    dir("CORACLE_CACHE").unwrap_or_else(|| user().join("coracle"))
}

/// A Python that sees no packages but its own, and leaves nothing in the checkout.
fn clean(python: &Path) -> Command {
    let mut command = Command::new(python);
    command.env_remove("PYTHONPATH").env_remove("PYTHONHOME").env("PYTHONDONTWRITEBYTECODE", "1");
    command.stdin(Stdio::null());
    command
}

fn run(mut command: Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?} cannot be run: {error}"))
}

#[track_caller]
fn succeeded(what: &str, output: Output) -> String {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "cannot {what}: {}\n{out}\n{err}", output.status);
    out
}

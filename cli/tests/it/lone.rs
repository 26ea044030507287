//! The program without a cluster: exit codes, what goes to which stream, contexts, settings, files that
//! make no sense. Only this sees the real command line and the real exit codes.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// The program, with a home of its own and nothing of the user's environment.
pub(crate) fn coracle(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coracle"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CORACLE_") {
            command.env_remove(name);
        }
    }
    command.env("HOME", home).env_remove("XDG_CONFIG_HOME").args(args);
    command.stdin(Stdio::null());
    command
}

#[track_caller]
fn run(home: &TempDir, args: &[&str], code: i32) -> Output {
    let output = coracle(home.path(), args).output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{args:?}\nstdout: {out}\nstderr: {err}");
    output
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn home() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// An address where nobody listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn help_and_version_are_data_and_mistakes_are_not() {
    let home = home();
    assert!(text(&run(&home, &["--help"], 0).stdout).contains("Key-value:"));
    let version = text(&run(&home, &["--version"], 0).stdout);
    assert_eq!(version, format!("coracle {}\n", env!("CARGO_PKG_VERSION")));
    let mistake = run(&home, &["gett", "a"], 2);
    assert!(mistake.stdout.is_empty());
    assert!(text(&mistake.stderr).contains("'get'"), "{}", text(&mistake.stderr));
    run(&home, &["put", "a"], 2);
    run(&home, &["put", "a", "b", "--if-absent", "--if-version", "1"], 2);
    run(&home, &["put", "a", "b", "--ttl", "5"], 2);
    run(&home, &["get", "zz", "--encoding", "hex", "--endpoints", &nobody()], 5);
}

#[test]
fn a_cluster_that_is_not_there_is_exit_code_5_and_says_what_next() {
    let home = home();
    let endpoint = nobody();
    let output = run(&home, &["get", "a", "--endpoints", &endpoint, "--timeout", "500ms"], 5);
    let stderr = text(&output.stderr);
    assert!(output.stdout.is_empty());
    assert!(stderr.contains(&endpoint) && stderr.contains("next:"), "{stderr}");
    assert!(!stderr.contains("Error {"), "a Debug dump: {stderr}");
}

#[test]
fn contexts_are_kept_in_a_private_file() {
    let home = home();
    run(&home, &["context", "add", "a", "h1:7400,h2:7400", "-k", "orders"], 0);
    run(&home, &["context", "add", "b", "h3:7400"], 0);
    run(&home, &["context", "use", "b"], 0);
    let file = home.path().join(".config/coracle/contexts.toml");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let list = text(&run(&home, &["context", "ls"], 0).stdout);
    let expected = "CURRENT  NAME  NODES            KEYSPACE\n         \
        a     h1:7400,h2:7400  orders\n*        b     h3:7400          default\n";
    assert_eq!(list, expected);
    let json = text(&run(&home, &["context", "ls", "-o", "json"], 0).stdout);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["apiVersion"], "coracle.cli/v1");
    assert_eq!(json["kind"], "ContextList");
    assert_eq!(json["items"][0]["endpoints"][1], "h2:7400");

    run(&home, &["context", "use", "-"], 0);
    let shown = text(&run(&home, &["context", "show"], 0).stdout);
    assert!(shown.contains("context a") && shown.contains("current context"), "{shown}");
    run(&home, &["context", "use", "c"], 2);
    run(&home, &["get", "a", "--context", "c"], 2);
    run(&home, &["context", "rm", "a"], 0);
    run(&home, &["context", "rm", "a"], 2);
}

#[test]
fn settings_are_checked_together() {
    let home = home();
    let file = home.path().join("coracle.toml");
    fs::write(&file, "[raft]\nheartbeat = \"100ms\"\n[storage]\nmemory_budget = 64\n").unwrap();
    let path = file.display().to_string();
    let args = ["config", "check", &path, "--listen", "0.0.0.0:7400"];
    let stderr = text(&run(&home, &args, 1).stderr);
    for wanted in ["heartbeat_interval", "memory_budget", "INSECURE", "coracle.toml:2"] {
        assert!(stderr.contains(wanted), "{wanted} in {stderr}");
    }
    // The server itself refuses the same in the same words, and leaves nothing behind.
    let data = home.path().join("data");
    let data_dir = data.display().to_string();
    let args = ["server", "--config", &path, "--listen", "0.0.0.0:7400", "--data-dir", &data_dir];
    let stderr = text(&run(&home, &args, 1).stderr);
    assert!(stderr.contains("INSECURE") && !data.exists(), "{stderr}");

    fs::write(&file, "[raft]\nheartbeat_interval = \"50ms\"\n").unwrap();
    run(&home, &["config", "check", &path], 0);
    let args = ["config", "show", "--config", &path, "--diff-default", "--origin"];
    let shown = text(&run(&home, &args, 0).stdout);
    assert!(shown.contains("50ms") && shown.contains("coracle.toml:2"), "{shown}");
    let explained = text(&run(&home, &["config", "explain", "raft.heartbeat_interval"], 0).stdout);
    assert!(explained.contains("CORACLE__RAFT__HEARTBEAT_INTERVAL"), "{explained}");
    run(&home, &["config", "explain", "raft.heartbeet_interval"], 2);
    let sample = text(&run(&home, &["config", "sample"], 0).stdout);
    assert!(sample.contains("[raft]"), "{sample}");
}

#[test]
fn a_set_that_is_none_is_reported_with_the_rest() {
    let home = home();
    let args = ["config", "check", "--set", "raft", "--set", "raft.nothing=1"];
    let stderr = text(&run(&home, &args, 1).stderr);
    assert!(stderr.contains("2 problems") && stderr.contains("raft.nothing"), "{stderr}");
}

#[test]
fn scripts_and_pages_are_made() {
    let home = home();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = text(&run(&home, &["completion", shell], 0).stdout);
        assert!(script.contains("transfer-leader"), "{shell}");
    }
    assert!(text(&run(&home, &["man"], 0).stdout).contains(".TH coracle"));
    let dir = home.path().join("man");
    run(&home, &["man", &dir.display().to_string()], 0);
    assert!(dir.join("coracle-put.1").exists());
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let home = home();
    let mut child = coracle(home.path(), &["completion", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

#[test]
fn values_that_cannot_be_read_write_nothing() {
    let home = home();
    let missing = run(&home, &["put", "a", "@/no/such/file"], 1);
    assert!(text(&missing.stderr).contains("/no/such/file"));
    let mut child = coracle(home.path(), &["put", "a", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let block = vec![0; 1 << 20];
    // It stops reading at its bound, and then the pipe breaks.
    while stdin.write_all(&block).is_ok() {}
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no value"), "{}", text(&output.stderr));
}

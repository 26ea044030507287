//! A node's directory as the first release wrote it, and the newest program on it: everything is there,
//! it serves and writes, and what it leaves is of the formats that it found. So the first release can
//! go back on it, as long as nobody has raised the cluster's active version.
//!
//! The directory is checked in, `golden/first-release.txt`, one file a line. As long as there is no
//! release, `CORACLE_REGENERATE=1 cargo test -p coracle-cli upgrade` writes it anew; after it, never.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};

use crate::lone::{coracle, text};

/// A start on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of the log. The rest of a segment is zero, and not kept.
const SEGMENT: &str = "--set=storage.log_segment_bytes=1MiB";
const MEMORY: &str = "--set=storage.memory_budget=64MiB";

/// What RocksDB says to people, and locks.
const NOT_KEPT: [&str; 3] = ["LOG", "LOCK", "OPTIONS-"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/first-release.txt")
}

/// Every file of a directory, by its path in it.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut found, mut dirs) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            found.insert(name, fs::read(&path).unwrap());
        }
    }
    found
}

fn pack(dir: &Path) -> String {
    let mut packed = String::new();
    for (name, bytes) in files(dir) {
        let last = name.rsplit('/').next().unwrap_or_default();
        if NOT_KEPT.iter().any(|not_kept| last.starts_with(not_kept)) {
            continue;
        }
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
        writeln!(packed, "{name} {} {}", bytes.len(), STANDARD.encode(&bytes[..end])).unwrap();
    }
    packed
}

fn unpack(packed: &str, dir: &Path) {
    for line in packed.lines() {
        let mut words = line.split(' ');
        let (name, length) = (words.next().unwrap(), words.next().unwrap());
        let mut bytes = STANDARD.decode(words.next().unwrap()).unwrap();
        bytes.resize(length.parse().unwrap(), 0);
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// The formats that files of a directory say they are of, kind by kind.
fn formats(dir: &Path) -> BTreeMap<String, String> {
    let mut formats = BTreeMap::new();
    for (name, bytes) in files(dir) {
        if name.starts_with("log/") && name.ends_with(".log") {
            assert_eq!(&bytes[..8], b"coraclog", "{name}");
            let version = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
            let known = formats.insert("log".to_owned(), version.to_string());
            assert!(known.is_none_or(|known| known == version.to_string()), "{name}: {version}");
        }
        if ["IDENTITY", "PEERS", "MAP", "SALT"].contains(&&*name) {
            // Text or not: what says the format stands before everything else.
            let head = &bytes[..bytes.len().min(16)];
            let first = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
            formats.insert(name, format!("{:?}", String::from_utf8_lossy(first)));
        }
    }
    formats
}

/// A node on a directory. Dropping it kills it.
struct Node {
    child: Child,
    home: PathBuf,
    endpoint: String,
    told: UnixDatagram,
}

impl Node {
    fn start(home: &Path, dir: &Path) -> Node {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let endpoint = free();
        let name = home.join(format!("notify-{}", endpoint.replace(':', "-")));
        let told = UnixDatagram::bind(&name).unwrap();
        told.set_read_timeout(Some(PATIENCE)).unwrap();
        let data = format!("--data-dir={}", dir.display());
        let listen = format!("--listen={endpoint}");
        let rest = ["--peer-listen=127.0.0.1:0", "--http-listen=127.0.0.1:0", SEGMENT, MEMORY];
        let mut server = coracle(home, &["server", &data, &listen]);
        server.args(rest).env("NOTIFY_SOCKET", &name);
        let child = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let node = Node { child, home: home.to_owned(), endpoint, told };
        node.hears("READY=1");
        node
    }

    fn hears(&self, what: &str) {
        let mut buffer = [0; 512];
        let bytes = self.told.recv(&mut buffer).expect("the node tells its service manager");
        assert!(buffer[..bytes].starts_with(what.as_bytes()), "{:?}", &buffer[..bytes]);
    }

    /// Runs a command until it ends with 0; what it printed.
    #[track_caller]
    fn run(&self, args: &[&str]) -> String {
        let mut args = args.to_vec();
        args.extend(["--endpoints", &self.endpoint]);
        let output = coracle(&self.home, &args).output().unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{args:?}\nstdout: {out}\nstderr: {err}");
        out
    }

    fn stop(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        self.hears("STOPPING=1");
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the node does not end");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the first release was asked to keep: values, an entity rule, one that is gone.
fn fill(node: &Node) {
    node.run(&["init", "--nodes", "1", "--shards", "2"]);
    node.run(&["keyspace", "create", "orders", "--entity", "delimiter:/"]);
    for number in 0..20 {
        node.run(&["put", &format!("key-{number}"), &format!("value-{number}")]);
    }
    node.run(&["put", "o1/a", "first", "-k", "orders"]);
    node.run(&["put", "o1/b", "second", "-k", "orders"]);
    node.run(&["put", "gone", "soon"]);
    node.run(&["delete", "gone"]);
}

#[test]
fn the_newest_program_takes_over_what_the_first_release_left_and_leaves_it_to_it() {
    let home = tempfile::tempdir().unwrap();
    if std::env::var_os("CORACLE_REGENERATE").is_some_and(|value| value == "1") {
        let dir = home.path().join("first");
        let node = Node::start(home.path(), &dir);
        fill(&node);
        node.stop();
        fs::write(golden(), pack(&dir)).unwrap();
    }
    let dir = home.path().join("data");
    let packed = fs::read_to_string(golden()).unwrap();
    unpack(&packed, &dir);
    let first = formats(&dir);
    assert!(first.contains_key("log") && first.contains_key("IDENTITY"), "{first:?}");
    // Forward, and back: whoever reads these formats reads what was written meanwhile.
    for turn in 0..3 {
        let node = Node::start(home.path(), &dir);
        for number in 0..20 {
            let found = node.run(&["get", &format!("key-{number}")]);
            assert_eq!(found.trim_end(), format!("value-{number}"));
        }
        assert_eq!(node.run(&["get", "o1/b", "-k", "orders"]).trim_end(), "second");
        let all = node.run(&["scan", "--no-headers", "-k", "default"]);
        assert!(!all.contains("gone"), "{all}");
        assert_eq!(all.lines().count(), 20 + turn, "{all}");
        let added = format!("new-{turn}");
        node.run(&["put", &added, "written by the newest"]);
        assert_eq!(node.run(&["get", &added]).trim_end(), "written by the newest");
        node.stop();
        assert_eq!(formats(&dir), first, "the formats of the first release, in turn {turn}");
    }
}

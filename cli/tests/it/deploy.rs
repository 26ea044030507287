//! What `deploy/` hands to service managers, held against the program: units and images name commands,
//! files and times that the program must know. And the program tells a service manager how it is.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use coracle_cli::args::{Cli, Command};
use coracle_cli::server::DRAIN_DEADLINE;
use rustix::process::{Pid, Signal, kill_process};

use crate::lone::coracle;

/// A start on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// The unit's settings by section; one that is set twice is a mistake.
fn unit() -> BTreeMap<(String, String), String> {
    let text = std::fs::read_to_string(deploy("coracle.service")).unwrap();
    let (mut section, mut settings) = (String::new(), BTreeMap::new());
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name.to_owned();
            continue;
        }
        let (name, value) = line.split_once('=').unwrap_or_else(|| panic!("{line}"));
        let name = (section.clone(), name.to_owned());
        assert!(settings.insert(name, value.to_owned()).is_none(), "twice: {line}");
    }
    settings
}

#[test]
fn the_unit_starts_a_server_that_drains_before_it_is_killed() {
    let unit = unit();
    let get = |name: &str| {
        let value = unit.get(&("Service".to_owned(), name.to_owned()));
        value.unwrap_or_else(|| panic!("{name} is not set")).clone()
    };
    assert_eq!((get("Type"), get("NotifyAccess")), ("notify".to_owned(), "main".to_owned()));
    assert_eq!(get("KillSignal"), "SIGTERM");
    let stop: u64 = get("TimeoutStopSec").parse().unwrap();
    // The process has a few seconds of its own to end.
    assert!(stop >= DRAIN_DEADLINE.as_secs() + 5, "{stop} s is shorter than a drain");
    assert_eq!(get("User"), "coracle");
    let start = get("ExecStart");
    let parsed = Cli::try_parse_from(start.split_whitespace()).unwrap();
    let Command::Server(server) = parsed.command else { panic!("{start}") };
    let config = server.settings.config.unwrap();
    let dir = get("ConfigurationDirectory");
    assert_eq!(config.parent(), Some(Path::new("/etc").join(dir).as_path()));
    // Nothing else of the file system can be written to.
    let text = std::fs::read_to_string(deploy("coracle.toml")).unwrap();
    let data = format!("data_dir = \"/var/lib/{}\"", get("StateDirectory"));
    assert!(text.contains(&data), "{text}");
    assert_eq!(unit[&("Install".to_owned(), "WantedBy".to_owned())], "multi-user.target");
}

#[test]
fn the_settings_beside_the_unit_are_settings() {
    let home = tempfile::tempdir().unwrap();
    let file = deploy("coracle.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    // With every line that is only suggested.
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(setting) if !setting.starts_with(' ') => setting,
        _ => line,
    });
    let whole = home.path().join("whole.toml");
    std::fs::write(&whole, lines.collect::<Vec<_>>().join("\n")).unwrap();
    for file in [file, whole] {
        let checked = coracle(home.path(), &["config", "check", file.to_str().unwrap()]).output();
        let checked = checked.unwrap();
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        assert!(checked.status.success(), "{}: {said}", file.display());
    }
}

#[test]
fn the_image_runs_the_program_as_nobody_special() {
    let text = std::fs::read_to_string(deploy("Dockerfile")).unwrap();
    let text = text.replace("\\\n", "");
    let line = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
        lines.next_back().unwrap_or_else(|| panic!("no {name}")).trim().to_owned()
    };
    assert_eq!(text.lines().filter(|line| line.starts_with("FROM ")).count(), 2, "two stages");
    assert!(!line("USER").starts_with('0') && line("USER") != "root");
    assert_eq!(line("STOPSIGNAL"), "SIGTERM");
    let words = |text: &str| -> Vec<String> { serde_json::from_str(text).unwrap() };
    let mut command = words(&line("ENTRYPOINT"));
    command.extend(words(&line("CMD")));
    let parsed = Cli::try_parse_from(&command).unwrap();
    assert!(matches!(parsed.command, Command::Server(_)), "{command:?}");
    // The settings of its environment are known ones, and fit to each other.
    let home = tempfile::tempdir().unwrap();
    let asked = ["--insecure", "--advertise", "n1:7400", "--peer-advertise", "n1:7500"];
    let mut show = coracle(home.path(), &["config", "show"]);
    show.args(asked);
    for setting in line("ENV").split_whitespace() {
        let (name, value) = setting.split_once('=').unwrap();
        show.env(name, value);
    }
    let shown = show.output().unwrap();
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    assert!(String::from_utf8_lossy(&shown.stdout).contains("0.0.0.0:7600"));
    assert!(text.contains("/dev/tcp/127.0.0.1/7600") && text.contains("GET /livez"));
}

/// A process that is killed when a test ends before it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_service_manager_hears_when_the_node_is_up_and_when_it_ends() {
    let home = tempfile::tempdir().unwrap();
    let name = home.path().join("notify");
    let socket = UnixDatagram::bind(&name).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let heard = || {
        let mut buffer = [0; 512];
        let bytes = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..bytes].to_vec()).unwrap()
    };
    let data = format!("--data-dir={}", home.path().join("data").display());
    let anywhere =
        ["--listen=127.0.0.1:0", "--peer-listen=127.0.0.1:0", "--http-listen=127.0.0.1:0"];
    let mut server = coracle(home.path(), &["server", &data]);
    server.args(anywhere).env("NOTIFY_SOCKET", &name);
    let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut server = Killed(server);
    let ready = heard();
    assert!(ready.starts_with("READY=1\nSTATUS=listens for clients at 127.0.0.1:"), "{ready}");
    let pid = Pid::from_raw(i32::try_from(server.0.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let stopping = heard();
    assert!(stopping.starts_with("STOPPING=1\n"), "{stopping}");
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Some(status) = server.0.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the node does not end");
}

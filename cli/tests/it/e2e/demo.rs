//! The demo as a person has it: a second terminal needs no flags, Ctrl-C leaves nothing behind, and nodes
//! do not outlive a demo that was killed.

use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::{ALONE, run, until};
use crate::lone::{coracle, text};

/// A demo on its way.
struct Demo {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// Everything that it said so far.
    said: String,
}

impl Demo {
    fn start(home: &Path) -> Demo {
        let mut command = Command::from(coracle(home, &["demo", "--nodes", "3", "--load", "200"]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Demo { child, lines, said: String::new() }
    }

    /// Reads until a line with this text; returns it.
    async fn says(&mut self, wanted: &str) -> String {
        let read = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                self.said.push_str(&format!("{line}\n"));
                if line.contains(wanted) {
                    return Some(line);
                }
            }
            None
        };
        let found = tokio::time::timeout(Duration::from_secs(90), read).await;
        let found = found.ok().flatten();
        found.unwrap_or_else(|| panic!("{wanted:?} was not said:\n{}", self.said))
    }

    async fn type_line(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    async fn ends(&mut self) -> Option<i32> {
        let ended = tokio::time::timeout(Duration::from_secs(10), self.child.wait()).await;
        ended.expect("a demo ends within seconds").unwrap().code()
    }

    /// Where its first node listens.
    async fn ready(&mut self) -> String {
        let line = self.says("n1  zone a").await;
        let address = line.split_whitespace().find(|word| word.starts_with("127.0.0.1:"));
        let address = address.unwrap().to_owned();
        self.says("Second terminal").await;
        address
    }
}

fn contexts(home: &Path) -> String {
    std::fs::read_to_string(home.join(".config/coracle/contexts.toml")).unwrap_or_default()
}

async fn silent(address: &str) {
    let nobody = async || TcpStream::connect(address).is_err();
    until("nobody listens any more", Duration::from_secs(10), nobody).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_terminal_needs_no_flags_and_nothing_stays() {
    let _alone = ALONE.lock().await;
    let home = tempfile::tempdir().unwrap();
    let mut demo = Demo::start(home.path());
    let address = demo.ready().await;
    for args in [["put", "hello", "world"].as_slice(), &["status"]] {
        let output = run(home.path(), args, b"").await;
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    }
    assert_eq!(run(home.path(), &["get", "hello"], b"").await.stdout, b"world");
    demo.type_line(":kill n2").await;
    demo.says("killed n2").await;
    demo.type_line("r").await;
    demo.says("n2 is back").await;
    demo.type_line("x").await;
    demo.says("Known are").await;
    demo.signal(Signal::INT);
    demo.says("the data are gone").await;
    assert_eq!(demo.ends().await, Some(130));
    assert!(!contexts(home.path()).contains("demo"), "{}", contexts(home.path()));
    silent(&address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quitting_checks_what_was_acknowledged() {
    let _alone = ALONE.lock().await;
    let home = tempfile::tempdir().unwrap();
    let mut demo = Demo::start(home.path());
    demo.ready().await;
    demo.type_line("s").await;
    demo.says("Fault tolerance").await;
    demo.type_line("q").await;
    let line = demo.says("acknowledged writes checked").await;
    assert!(line.ends_with(", 0 lost"), "{line}");
    assert_eq!(demo.ends().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_do_not_outlive_a_demo_that_was_killed() {
    let _alone = ALONE.lock().await;
    let home = tempfile::tempdir().unwrap();
    let mut demo = Demo::start(home.path());
    let address = demo.ready().await;
    demo.signal(Signal::KILL);
    demo.ends().await;
    silent(&address).await;
}

//! A client that scans everything, as a process of its own: what it holds in memory is the scan's, and
//! nothing else's. Owns both ends: the process, and who starts it. Does not judge.
//!
//! The process says `ready`, waits for a line, scans, writes what it sees, says `end` or `error`, and
//! waits for the end of its input, so that whoever started it can look at its memory.

use std::io::{BufWriter, Write};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use coracle_client::Client;
use futures_util::TryStreamExt;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::Instant;

use super::memory;
use super::scan_load::{fingerprint, key, number};
use crate::checker::scans::{Scanned, Shown};

/// A page may take so long: longer than several failovers.
const PAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// How a reader behaves.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    /// Nodes to begin with.
    pub seeds: String,
    /// Entries a second; 0 is as fast as they come.
    pub per_second: u64,
    /// Stops once after so many entries; 0 is never.
    pub stop_after: u64,
    /// For so long.
    pub stop_for: Duration,
}

/// The process: scans once, and tells what it sees.
pub async fn read(manners: &Manners) -> Result<(), String> {
    let told = |error: &dyn std::fmt::Display| error.to_string();
    let client = Client::connect(&manners.seeds).await.map_err(|error| told(&error))?;
    // Connected and warm: what comes on top from now on is the scan's.
    client.get(key(0)).await.map_err(|error| told(&error))?;
    let mut out = BufWriter::new(std::io::stdout());
    let mut say = |line: &str| writeln!(out, "{line}").and_then(|()| out.flush());
    say("ready").map_err(|error| told(&error))?;
    a_line().await?;
    match scan(&client, manners).await {
        Ok(()) => say("end"),
        Err(why) => say(&format!("error {why}")),
    }
    .map_err(|error| told(&error))?;
    a_line().await
}

/// Waits for a line, or the end, of the input.
async fn a_line() -> Result<(), String> {
    let read = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()));
    let read = read.await.map_err(|error| error.to_string())?;
    read.map(drop).map_err(|error| error.to_string())
}

async fn scan(client: &Client, manners: &Manners) -> Result<(), String> {
    let mut out = BufWriter::new(std::io::stdout());
    let mut pages = client.scan(..).timeout(PAGE_TIMEOUT).pages();
    let (began, mut seen, mut stops) = (Instant::now(), 0_u64, manners.stop_after > 0);
    while let Some(page) = pages.try_next().await.map_err(|error| error.to_string())? {
        let failed = |error: std::io::Error| error.to_string();
        writeln!(out, "version {}", page.version).map_err(failed)?;
        for entry in page.entries {
            let key = String::from_utf8_lossy(&entry.key);
            let value = fingerprint(&entry.value);
            writeln!(out, "{key} {} {value}", entry.version).map_err(failed)?;
            seen += 1;
        }
        out.flush().map_err(failed)?;
        if stops && seen >= manners.stop_after {
            stops = false;
            tokio::time::sleep(manners.stop_for).await;
        }
        if manners.per_second > 0 {
            let due = Duration::from_secs_f64(seen as f64 / manners.per_second as f64);
            tokio::time::sleep_until(began + due).await;
        }
    }
    Ok(())
}

/// A reader that is ready to begin.
pub struct Reader {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    idle_bytes: u64,
}

/// What a reader has told.
pub struct Told {
    /// What it saw.
    pub scan: Scanned,
    /// Keys that are none of ours.
    pub foreign: Vec<String>,
    /// Why it ended before the end.
    pub error: Option<String>,
    /// Memory above what it had when it was ready.
    pub grown_bytes: u64,
}

impl Reader {
    /// Starts the process; returns when it is connected.
    pub async fn start(manners: &Manners) -> Result<Reader, String> {
        let failed = |error: std::io::Error| format!("the reader's process: {error}");
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(program)
            .arg("scan-reader")
            .arg(format!("--seeds={}", manners.seeds))
            .arg(format!("--per-second={}", manners.per_second))
            .arg(format!("--stop-after={}", manners.stop_after))
            .arg(format!("--stop-ms={}", manners.stop_for.as_millis()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or("the reader has no output")?;
        let mut lines = BufReader::new(output).lines();
        let ready = lines.next_line().await.map_err(failed)?;
        if ready.as_deref() != Some("ready") {
            return Err(format!("the reader did not begin: {ready:?}"));
        }
        let idle_bytes = child.id().and_then(memory::resident).unwrap_or(0);
        Ok(Reader { child, input, lines, idle_bytes })
    }

    /// Lets it scan, and takes down what it sees; `seen` is counted up meanwhile.
    pub async fn read(mut self, began_us: u64, seen: Arc<AtomicUsize>) -> Result<Told, String> {
        let failed = |error: std::io::Error| format!("the reader's process: {error}");
        let mut input = self.input.take().ok_or("the reader has no input")?;
        input.write_all(b"go\n").await.map_err(failed)?;
        let mut scan = Scanned { began_us, ..Scanned::default() };
        let mut told = (Vec::new(), None);
        loop {
            let line = self.lines.next_line().await.map_err(failed)?;
            let line = line.ok_or("the reader ended without a word")?;
            if line == "end" {
                break;
            }
            if let Some(why) = line.strip_prefix("error ") {
                told.1 = Some(why.to_owned());
                break;
            }
            match line.strip_prefix("version ") {
                Some(version) => {
                    let version = version.parse().map_err(|_| format!("the reader said {line}"))?;
                    if scan.version != 0 && scan.version != version {
                        told.1 = Some(format!("versions {} and {version}", scan.version));
                    }
                    scan.version = version;
                }
                None => match shown(&line) {
                    Some(entry) => scan.entries.push(entry),
                    None => told.0.push(line),
                },
            }
            seen.store(scan.entries.len(), Ordering::Relaxed);
        }
        let most = self.child.id().and_then(memory::resident_max).unwrap_or(u64::MAX);
        drop(input);
        let _ = self.child.wait().await;
        let grown_bytes = most.saturating_sub(self.idle_bytes);
        Ok(Told { scan, foreign: told.0, error: told.1, grown_bytes })
    }
}

fn shown(line: &str) -> Option<Shown> {
    let mut words = line.split(' ');
    let key = number(words.next()?.as_bytes())?;
    let (version, value) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some(Shown { key, version, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_they_are_written() {
        let line = format!("{} 17 18446744073709551615", key(42));
        assert_eq!(shown(&line), Some(Shown { key: 42, version: 17, value: u64::MAX }));
        assert_eq!(shown("somebody else's 1 2"), None);
    }
}

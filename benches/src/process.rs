//! Owns processes on this machine that a measurement starts: their end with ours, their logs, free
//! ports, and a share of a core where they are held to one.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::process::{Child, Command};

use crate::failure::Failure;
use crate::metrics::processor_time;

/// How long a start may take, on a slow machine with slow disks.
pub const START_DEADLINE: Duration = Duration::from_secs(60);

/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(50);

/// Below what the kernel gives to outgoing connections: one of those could take a port between its
/// choice and its use.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// Tries before giving up: most ports of the range are free on any sane machine.
const PORT_TRIES_MAX: usize = 1_000;

/// A process; dropping it kills it.
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts a program that writes its output to a file. It is killed with this process, however
    /// that ends, where `setpriv` is there to ask for it.
    pub fn start(program: &Path, args: &[String], log: PathBuf) -> Result<Process, Failure> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::create(&log).map_err(Failure::of(format!("write {}", log.display())))?;
        let copy = file.try_clone().map_err(Failure::of("write a log"))?;
        let setpriv = Path::new("/usr/bin/setpriv");
        let mut command = match setpriv.exists() {
            true => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL"]).arg(program);
                command
            }
            false => Command::new(program),
        };
        command.args(args).stdin(Stdio::null()).stdout(file).stderr(copy).kill_on_drop(true);
        // What is set for a server of the user's own is not meant for this one.
        for (variable, _) in std::env::vars_os() {
            let variable = variable.to_string_lossy().into_owned();
            if variable.starts_with("CORACLE_") || variable.starts_with("ETCD_") {
                command.env_remove(variable);
            }
        }
        let child = command.spawn();
        let child = child.map_err(Failure::of(format!("start {}", program.display())))?;
        Ok(Process { child, name, log })
    }

    /// Waits until it `answers`; fails with the end of its log when it ends before or takes too long.
    pub async fn wait_for<F: Future<Output = bool>>(
        &mut self,
        deadline: Instant,
        mut answers: impl FnMut() -> F,
    ) -> Result<(), Failure> {
        loop {
            if answers().await {
                return Ok(());
            }
            let ended = self.child.try_wait().map_err(Failure::of("look after a process"))?;
            if ended.is_some() || Instant::now() >= deadline {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().rev().take(10).collect();
                let lines: Vec<&str> = lines.into_iter().rev().collect();
                let (name, end) = (&self.name, lines.join("\n"));
                return Err(Failure::new(format!(
                    "{name} does not start; its log ends with:\n{end}"
                )));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Its number; `None` once it has ended.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Processor time that it has used so far.
    pub fn processor_time(&self) -> Duration {
        self.id().map(|id| processor_time(Some(id))).unwrap_or_default()
    }

    /// Memory that it holds, in bytes: resident, without what it only maps from files.
    pub fn memory_bytes(&self) -> u64 {
        let of = |id| fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let status = self.id().map(of).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) << 10
    }

    /// Kills it and waits for its end.
    pub async fn stop(&mut self) {
        // It fails only where the process has ended already.
        let _ = self.child.kill().await;
    }
}

/// Addresses at which nobody listens.
pub fn free_ports(ip: IpAddr, count: usize) -> Result<Vec<SocketAddr>, Failure> {
    let mut random = rand::rng();
    let mut held: Vec<TcpListener> = Vec::new();
    for _ in 0..PORT_TRIES_MAX {
        if held.len() == count {
            break;
        }
        // A port that is held here is taken for the next try, so none is chosen twice.
        held.extend(TcpListener::bind((ip, random.random_range(PORTS))));
    }
    let ports = held.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>();
    let ports = ports.map_err(Failure::of("choose ports"))?;
    match ports.len() == count {
        true => Ok(ports),
        false => Err(Failure::new(format!("no {count} free ports in {PORTS:?} on {ip}"))),
    }
}

const ROOT_V1: &str = "/sys/fs/cgroup/cpu";
const ROOT_V2: &str = "/sys/fs/cgroup";

/// In microseconds. Short, so that a process that has used its share waits for milliseconds, and not
/// as long as a heartbeat may take.
const PERIOD_US: u64 = 10_000;

/// Processes held to a share of the processor together, by the kernel's control groups of version 1
/// or 2, as root. Dropping it gives them back all there is.
pub struct Quota {
    group: PathBuf,
    root: &'static Path,
}

impl Quota {
    /// Holds all of them together to so many cores.
    pub fn hold(pids: &[u32], cores: f64) -> Result<Quota, Failure> {
        let is_v2 = Path::new(ROOT_V2).join("cgroup.controllers").exists();
        let root = Path::new(if is_v2 { ROOT_V2 } else { ROOT_V1 });
        if is_v2 {
            write(&root.join("cgroup.subtree_control"), "+cpu")?;
        }
        let group = root.join(format!("coracle-bench-{}", std::process::id()));
        fs::create_dir(&group).map_err(Failure::of(format!("make {}", group.display())))?;
        let quota = Quota { group: group.clone(), root };
        let quota_us = (PERIOD_US as f64 * cores) as u64;
        if is_v2 {
            write(&group.join("cpu.max"), &format!("{quota_us} {PERIOD_US}"))?;
        } else {
            write(&group.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
            write(&group.join("cpu.cfs_quota_us"), &quota_us.to_string())?;
        }
        for pid in pids {
            write(&group.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(quota)
    }
}

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    fs::write(file, text).map_err(|error| {
        let file = file.display();
        Failure::new(format!("{file}: {error} (control groups are written by root only)"))
    })
}

impl Drop for Quota {
    fn drop(&mut self) {
        let pids = fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            // It may have ended meanwhile.
            let _ = fs::write(self.root.join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.group);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn ports_are_distinct() {
        let mut ports = free_ports(Ipv4Addr::LOCALHOST.into(), 30).unwrap();
        ports.sort();
        ports.dedup();
        assert_eq!(ports.len(), 30);
    }

    #[tokio::test]
    async fn a_program_that_ends_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let args = ["-c".to_owned(), "echo it broke; exit 1".to_owned()];
        let mut process =
            Process::start(Path::new("/bin/sh"), &args, dir.path().join("log")).unwrap();
        let deadline = Instant::now() + START_DEADLINE;
        let failed = process.wait_for(deadline, || async { false }).await.unwrap_err();
        assert!(failed.to_string().contains("it broke"), "{failed}");
    }
}

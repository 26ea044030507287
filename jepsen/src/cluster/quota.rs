//! Holds processes to a share of a core, by the kernel's control groups, of version 1 or 2. Owns the
//! groups that it makes. Needs root.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT_V1: &str = "/sys/fs/cgroup/cpu";
const ROOT_V2: &str = "/sys/fs/cgroup";

/// In microseconds. Short, so that a process that has used its share waits for milliseconds, and not as
/// long as a heartbeat may take.
const PERIOD_US: u64 = 10_000;

/// One group per process. Dropping it gives the processes back all there is.
pub struct Quota {
    groups: Vec<PathBuf>,
    root: &'static Path,
}

impl Quota {
    /// Holds each process to this share of a core.
    pub fn hold(pids: &[u32], share: f64) -> Result<Quota, String> {
        let is_v2 = Path::new(ROOT_V2).join("cgroup.controllers").exists();
        let root = Path::new(if is_v2 { ROOT_V2 } else { ROOT_V1 });
        let mut quota = Quota { groups: Vec::new(), root };
        let quota_us = (PERIOD_US as f64 * share) as u64;
        if is_v2 {
            write(&root.join("cgroup.subtree_control"), "+cpu")?;
        }
        for pid in pids {
            let group = root.join(format!("coracle-jepsen-{pid}"));
            fs::create_dir(&group).map_err(|error| format!("{}: {error}", group.display()))?;
            quota.groups.push(group.clone());
            if is_v2 {
                write(&group.join("cpu.max"), &format!("{quota_us} {PERIOD_US}"))?;
            } else {
                write(&group.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                write(&group.join("cpu.cfs_quota_us"), &quota_us.to_string())?;
            }
            write(&group.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(quota)
    }
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    fs::write(file, text).map_err(|error| {
        format!("{}: {error} (control groups are written by root only)", file.display())
    })
}

impl Drop for Quota {
    fn drop(&mut self) {
        for group in &self.groups {
            let pids = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            for pid in pids.lines() {
                // It may have ended meanwhile.
                let _ = fs::write(self.root.join("cgroup.procs"), pid);
            }
            let _ = fs::remove_dir(group);
        }
    }
}

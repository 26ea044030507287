//! How much memory processes have, as the kernel counts it. Owns the looking.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinHandle;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// Resident memory of a process in bytes; `None` when it has ended.
pub fn resident(pid: u32) -> Option<u64> {
    field(pid, "VmRSS:")
}

/// The most that was resident since the process began.
pub fn resident_max(pid: u32) -> Option<u64> {
    field(pid, "VmHWM:")
}

fn field(pid: u32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    kib(&status, name).map(|kib| kib * 1024)
}

fn kib(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Looks at processes again and again, by a name that outlives a restart. Ends when it is dropped.
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    pids: BTreeMap<usize, u32>,
    most: BTreeMap<usize, u64>,
}

impl Watch {
    /// Begins to look at whom [`Watch::set`] names.
    pub fn start() -> Watch {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let of_task = seen.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                of_task.lock().look();
            }
        });
        Watch { seen, task }
    }

    /// Whose memory it is from now on; `None` while there is no process.
    pub fn set(&self, name: usize, pid: Option<u32>) {
        let mut seen = self.seen.lock();
        match pid {
            Some(pid) => seen.pids.insert(name, pid),
            None => seen.pids.remove(&name),
        };
    }

    /// The most that each had since the last call.
    pub fn take(&self) -> BTreeMap<usize, u64> {
        let mut seen = self.seen.lock();
        seen.look();
        std::mem::take(&mut seen.most)
    }
}

impl Seen {
    fn look(&mut self) {
        for (name, pid) in &self.pids {
            let most = self.most.entry(*name).or_default();
            *most = resident(*pid).unwrap_or(0).max(*most);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_words_are_read() {
        let status = "Name:\tcoracle\nVmHWM:\t   20480 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!((kib(status, "VmRSS:"), kib(status, "VmHWM:")), (Some(1_024), Some(20_480)));
        assert_eq!(kib(status, "VmSwap:"), None);
        assert!(resident(std::process::id()).is_some_and(|bytes| bytes > 0));
    }
}

//! Owns finding out how much memory the process may use (the machine's, or its control group's where
//! that is less), and how much it does. Does not decide what to do with it.

use std::path::Path;

use coracle_storage::{Fs, OpenMode};

/// Longest of the kernel's files that is looked at; the interesting lines stand at the start.
const FILE_BYTES_MAX: usize = 16 << 10;

/// The memory that this process may use, in bytes. `None` where the system does not tell. `fs` must be
/// the real one: it reads `/proc` and `/sys`.
pub fn memory_bytes(fs: &dyn Fs) -> Option<u64> {
    let read = |path: &str| read(fs, Path::new(path));
    let machine = read("/proc/meminfo").and_then(|text| kilobytes(&text, "MemTotal:"));
    let groups = read("/proc/self/cgroup").map(|text| group_limits(&text)).unwrap_or_default();
    let limits = groups.iter().filter_map(|path| read(path)).filter_map(|text| limit_bytes(&text));
    machine.into_iter().chain(limits).min()
}

/// The memory of this process that is resident, in bytes. `None` where the system does not tell. `fs`
/// must be the real one: it reads `/proc`.
pub fn resident_bytes(fs: &dyn Fs) -> Option<u64> {
    kilobytes(&read(fs, Path::new("/proc/self/status"))?, "VmRSS:")
}

/// The kernel's files say that they are empty: read until they end instead.
fn read(fs: &dyn Fs, path: &Path) -> Option<String> {
    let file = fs.open(path, OpenMode::Read).ok()?;
    let mut content = vec![0; FILE_BYTES_MAX];
    let read = coracle_storage::fs::read_full_at(&*file, &mut content, 0).ok()?;
    content.truncate(read);
    String::from_utf8(content).ok()
}

/// `MemTotal:       16384256 kB`.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The files that may hold a limit: of the process's own group and of every group above it, version 2
/// (`0::/a/b`) and version 1 (`4:memory:/a/b`). Inside a container the group's path is often that of
/// the host, so that only the topmost file exists.
fn group_limits(cgroup: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            names if names.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mut path = path.trim_end_matches('/');
        loop {
            files.push(format!("{root}{path}/{file}"));
            match path.rfind('/') {
                Some(at) => path = &path[..at],
                None => break,
            }
        }
    }
    files
}

/// A number of bytes; `max`, or version 1's huge number, means none (the machine's memory is less).
fn limit_bytes(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_tells_its_memory() {
        let meminfo = "MemTotal:       16384256 kB\nMemFree:         1024 kB\n";
        assert_eq!(kilobytes(meminfo, "MemTotal:"), Some(16_384_256 * 1024));
        assert_eq!(kilobytes("nothing", "MemTotal:"), None);
    }

    #[test]
    fn every_group_above_may_limit() {
        assert_eq!(
            group_limits("0::/a/b\n"),
            [
                "/sys/fs/cgroup/a/b/memory.max",
                "/sys/fs/cgroup/a/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            group_limits("5:cpu:/x\n4:pids,memory:/\n"),
            ["/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert_eq!(limit_bytes("536870912\n"), Some(536_870_912));
        assert_eq!(limit_bytes("max\n"), None);
    }

    #[test]
    fn this_machine_has_memory() {
        let bytes = memory_bytes(&coracle_storage::RealFs).expect("Linux tells its memory");
        assert!(bytes > 16 << 20, "{bytes}");
        let resident = resident_bytes(&coracle_storage::RealFs).expect("Linux tells it too");
        assert!((1 << 20..bytes).contains(&resident), "{resident}");
    }
}

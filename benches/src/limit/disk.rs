//! Owns the disk's limit: blocks written one after the other into a reserved file, as the Raft log
//! does it, and each synced before the next. Goes through the log's own file seam.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_storage::fs::{File, Fs, OpenMode, RealFs};

use crate::failure::Failure;
use crate::tally::Tally;

/// A segment's length: then the writer begins again at the front.
const FILE_BYTES: u64 = 64 << 20;

/// Writes blocks of `block_bytes` for so long, by so many writers with a file each in `dir`. The
/// tally is of all of them together.
pub fn run(
    dir: &Path,
    writers: usize,
    block_bytes: usize,
    window: Duration,
) -> Result<Tally, Failure> {
    if writers == 0 || block_bytes == 0 || block_bytes as u64 > FILE_BYTES {
        let text = format!("there must be a writer, and blocks of 1 to {FILE_BYTES} bytes");
        return Err(Failure::new(text));
    }
    let dir = tempfile::Builder::new().prefix("coracle-bench-").tempdir_in(dir);
    let dir = dir.map_err(Failure::of("make a directory"))?;
    let files = (0..writers).map(|writer| prepare(dir.path().join(format!("writer{writer}"))));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let threads: Vec<_> = files
        .into_iter()
        .map(|file| std::thread::spawn(move || write(&*file, block_bytes, window)))
        .collect();
    let mut tally = Tally::default();
    for thread in threads {
        let written = thread.join().map_err(|_| Failure::new("a writer panicked"))?;
        for latency in written.map_err(Failure::of("write and sync"))? {
            tally.note(latency, None);
        }
    }
    Ok(tally)
}

fn prepare(path: PathBuf) -> Result<Arc<dyn File>, Failure> {
    let made = || {
        let file = RealFs.open(&path, OpenMode::CreateNew)?;
        file.allocate(FILE_BYTES)?;
        file.sync()?;
        Ok::<_, std::io::Error>(file)
    };
    made().map_err(Failure::of(format!("make {}", path.display())))
}

fn write(file: &dyn File, block_bytes: usize, window: Duration) -> std::io::Result<Vec<Duration>> {
    let block = vec![0x5a; block_bytes];
    let end = Instant::now() + window;
    let (mut latencies, mut offset) = (Vec::new(), 0);
    loop {
        let began = Instant::now();
        if began >= end {
            return Ok(latencies);
        }
        if offset + block_bytes as u64 > FILE_BYTES {
            offset = 0;
        }
        file.write_at(&block, offset)?;
        file.sync()?;
        offset += block_bytes as u64;
        latencies.push(began.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_writer_syncs_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let window = Duration::from_millis(50);
        let tally = run(dir.path(), 2, 4_096, window).unwrap();
        assert!(tally.ok >= 2 && tally.errors.is_empty(), "{tally:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(run(dir.path(), 0, 4_096, window).is_err());
        assert!(run(&dir.path().join("gone"), 1, 4_096, window).is_err());
    }
}

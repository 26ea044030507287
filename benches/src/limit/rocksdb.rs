//! Owns the limit of one replica's state store: batches of versions, as `apply` writes them, into a
//! store with a node's options and without a write-ahead log. One writer, since a replica has one.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_storage::state::{Batch, Engines, OpenState, RocksEngines, StateOptions, key};

use crate::failure::Failure;
use crate::tally::Tally;
use crate::workload::Workload;

/// What was measured.
#[derive(Clone, Debug)]
pub struct Written {
    /// Of the batches.
    pub batches: Tally,
    /// Puts in all of them, per second that the store was at work.
    pub puts_per_second: f64,
    /// The flush behind them, which makes the rest durable.
    pub flush: Duration,
}

/// Writes batches of so many puts for so long, to a store in `dir`.
pub fn run(
    dir: &Path,
    workload: &Workload,
    batch_puts: usize,
    window: Duration,
) -> Result<Written, Failure> {
    if batch_puts == 0 {
        return Err(Failure::new("a batch has a put at least"));
    }
    let dir = tempfile::Builder::new().prefix("coracle-bench-").tempdir_in(dir);
    let dir = dir.map_err(Failure::of("make a directory"))?;
    let on_fatal =
        Arc::new(|error: &coracle_storage::Error| eprintln!("the store failed: {error}"));
    let engines = RocksEngines::on_disk(&StateOptions::default(), on_fatal);
    let engines = engines.map_err(Failure::of("prepare RocksDB"))?;
    let store = engines.open(&dir.path().join("state"), OpenState { create: true });
    let store = store.map_err(Failure::of("open a store"))?;
    let (mut choices, mut batches) = (workload.choices(0), Tally::default());
    let began = Instant::now();
    let (mut version, mut busy) = (0, Duration::ZERO);
    loop {
        let mut batch = Batch::new();
        for _ in 0..batch_puts {
            version += 1_u64;
            let (number, head) = (choices.number(), version.to_be_bytes());
            batch.put(key::data(1, &workload.key(number), version), choices.value(&head));
        }
        // Only the store's part counts, not the making of what it is given.
        let handed_over = Instant::now();
        if handed_over.duration_since(began) >= window {
            break;
        }
        store.write(batch).map_err(Failure::of("write a batch"))?;
        let took = handed_over.elapsed();
        batches.note(took, None);
        busy += took;
    }
    let puts_per_second = (batches.ok * batch_puts as u64) as f64 / busy.as_secs_f64().max(1e-9);
    let flushing = Instant::now();
    store.flush().map_err(Failure::of("flush"))?;
    Ok(Written { batches, puts_per_second, flush: flushing.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Distribution, Mix};

    #[test]
    fn batches_are_written_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let workload = Workload::new(Mix::reads(0), Distribution::Uniform, 1_000, 100, 1).unwrap();
        let window = Duration::from_millis(50);
        let written = run(dir.path(), &workload, 10, window).unwrap();
        assert!(written.batches.ok > 1 && written.puts_per_second > 10.0, "{written:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(run(dir.path(), &workload, 0, window).is_err());
    }
}

//! Owns what RocksDB does alone, used as its own users would: a plain database with a write-ahead log,
//! the same keys and values, nothing of ours around it.

use std::path::Path;
use std::sync::Arc;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use rocksdb::{BlockBasedOptions, Cache, DB, Options, ReadOptions, WriteBatch, WriteOptions};
use tempfile::TempDir;

use crate::failure::Failure;
use crate::tally::Tally;
use crate::witness;
use crate::workload::{Workload, key};

/// As much as a node of a measured cluster has.
const CACHE_BYTES: usize = 1 << 30;

/// Keys of one batch while it is loaded.
const LOAD_BATCH: u64 = 1_000;

/// A database with every key written once. Dropping it removes it.
pub struct Alone {
    db: Arc<DB>,
    workload: Workload,
    _dir: TempDir,
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(CACHE_BYTES));
    table.set_bloom_filter(10.0, false);
    table.set_format_version(6);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(32 << 20);
    options
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

impl Alone {
    /// A database with the keys of a workload.
    pub fn load(dir: &Path, workload: &Workload) -> Result<Alone, Failure> {
        let dir = tempfile::Builder::new().prefix("coracle-bench-rocksdb-").tempdir_in(dir);
        let dir = dir.map_err(Failure::of("make a directory"))?;
        let db = DB::open(&options(), dir.path()).map_err(Failure::of("open RocksDB"))?;
        let mut choices = workload.choices(0);
        let mut number = 0;
        while number < workload.keys {
            let mut batch = WriteBatch::default();
            for number in number..(number + LOAD_BATCH).min(workload.keys) {
                batch.put(key(number), choices.value(&witness::loaded(number)));
            }
            db.write(&batch).map_err(Failure::of("load RocksDB"))?;
            number += LOAD_BATCH;
        }
        db.flush().map_err(Failure::of("flush RocksDB"))?;
        db.compact_range(None::<&[u8]>, None::<&[u8]>);
        let alone = Alone { db: Arc::new(db), workload: workload.clone(), _dir: dir };
        // Into the cache, as what it is compared with has it.
        alone.scan()?;
        Ok(alone)
    }

    /// Reads keys from so many threads; the rate is that of all of them.
    pub fn gets(&self, threads: usize, window: Duration) -> Result<f64, Failure> {
        rate(threads, window, |thread| {
            let (db, mut choices) = (self.db.clone(), self.workload.choices(thread));
            move || {
                let found = db.get_pinned(key(choices.number())).map_err(Failure::of("read"))?;
                match found {
                    Some(value) => {
                        std::hint::black_box(&*value);
                        Ok(1)
                    }
                    None => Err(Failure::new("RocksDB has lost a key")),
                }
            }
        })
    }

    /// Writes batches of so many puts from so many threads, each batch with a sync.
    pub fn puts(&self, threads: usize, batch: usize, window: Duration) -> Result<f64, Failure> {
        rate(threads, window, |thread| writer(self.db.clone(), &self.workload, thread, batch))
    }

    /// Walks over everything, by one iterator: bytes of keys and values a second.
    pub fn scan(&self) -> Result<f64, Failure> {
        let began = Instant::now();
        let mut bytes = 0;
        let mut iterator = self.db.raw_iterator_opt(ReadOptions::default());
        iterator.seek_to_first();
        while let Some((key, value)) = iterator.item() {
            bytes += key.len() + std::hint::black_box(value).len();
            iterator.next();
        }
        iterator.status().map_err(Failure::of("scan"))?;
        Ok(bytes as f64 / began.elapsed().as_secs_f64())
    }
}

/// Three databases, each written by one thread in batches of so many puts with one sync each: what
/// three replicas would do that had nothing else to do. Puts a second that all three have.
pub fn three(
    dir: &Path,
    workload: &Workload,
    batch: usize,
    window: Duration,
) -> Result<f64, Failure> {
    let dir = tempfile::Builder::new().prefix("coracle-bench-rocksdb-").tempdir_in(dir);
    let dir = dir.map_err(Failure::of("make a directory"))?;
    let open = |at: usize| DB::open(&options(), dir.path().join(at.to_string())).map(Arc::new);
    let dbs = (0..3).map(open).collect::<Result<Vec<_>, _>>();
    let dbs = dbs.map_err(Failure::of("open RocksDB"))?;
    let all = rate(3, window, |thread| writer(dbs[thread].clone(), workload, thread, batch))?;
    Ok(all / 3.0)
}

fn writer(
    db: Arc<DB>,
    workload: &Workload,
    thread: usize,
    puts: usize,
) -> impl FnMut() -> Result<u64, Failure> + use<> {
    let (mut choices, options) = (workload.choices(thread), synced());
    move || {
        let mut batch = WriteBatch::default();
        for _ in 0..puts {
            let number = choices.number();
            batch.put(key(number), choices.value(&witness::loaded(number)));
        }
        db.write_opt(&batch, &options).map_err(Failure::of("write"))?;
        Ok(puts as u64)
    }
}

/// Lets threads do the same for so long; what they count, per second, together.
fn rate<F: FnMut() -> Result<u64, Failure> + Send>(
    threads: usize,
    window: Duration,
    make: impl Fn(usize) -> F,
) -> Result<f64, Failure> {
    let ready = Barrier::new(threads);
    let one = |mut step: F| {
        ready.wait();
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < window {
            done += step()?;
        }
        Ok::<f64, Failure>(done as f64 / began.elapsed().as_secs_f64())
    };
    let rates = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..threads).map(make).map(|step| scope.spawn(move || one(step))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err(Failure::new("a thread panicked")))
        };
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    rates.into_iter().sum()
}

/// Synced writes, one at a time, from one thread: what a put costs that shares its sync with none.
pub fn singly(alone: &Alone, window: Duration) -> Result<Tally, Failure> {
    let mut write = writer(alone.db.clone(), &alone.workload, 0, 1);
    let (began, mut tally) = (Instant::now(), Tally::default());
    while began.elapsed() < window {
        let one = Instant::now();
        write()?;
        tally.note(one.elapsed(), None);
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Distribution, Mix};

    #[test]
    fn everything_is_measured_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let workload = Workload::new(Mix::reads(0), Distribution::Uniform, 2_500, 64, 1).unwrap();
        let window = Duration::from_millis(20);
        let alone = Alone::load(dir.path(), &workload).unwrap();
        assert!(alone.gets(2, window).unwrap() > 0.0);
        assert!(alone.puts(2, 10, window).unwrap() > 0.0);
        assert!(alone.scan().unwrap() > 0.0);
        assert!(singly(&alone, window).unwrap().ok > 0);
        drop(alone);
        assert!(three(dir.path(), &workload, 10, window).unwrap() > 0.0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

//! Owns what all databases of a node share: one block cache, one budget for write buffers, one rate
//! limiter, the background threads, and every RocksDB option with its reason. Does not open
//! databases.

use rocksdb::{
    BlockBasedOptions, Cache, DBCompactionStyle, DBCompressionType, Env, LogLevel, Options,
    SliceTransform, WriteBufferManager,
};

use crate::error::Error;
use crate::state::key::{self, Kind};

const MIB: u64 = 1 << 20;

/// The settings of a node's state stores. What each database gets follows from these.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct StateOptions {
    /// Memory for blocks, indexes, filters and write buffers of all databases together. Beyond it
    /// blocks are evicted and write buffers flushed; nothing stalls for it.
    pub memory_bytes: u64,
    /// Threads for flushes and compactions of all databases together. RocksDB keeps them per
    /// process.
    pub background_threads: u32,
    /// What flushes and compactions of all databases together write a second, so that they leave
    /// the disk's time to the log's syncs; 0: no limit.
    pub write_bytes_per_second: u64,
    /// Open files of one database. Beyond it files are closed and opened again.
    pub open_files_max: u32,
}

impl Default for StateOptions {
    fn default() -> StateOptions {
        StateOptions {
            memory_bytes: 512 * MIB,
            background_threads: 4,
            write_bytes_per_second: 256 * MIB,
            open_files_max: 128,
        }
    }
}

impl StateOptions {
    /// The smallest that works: for tests that want flushes and compactions to happen.
    pub fn test_min() -> StateOptions {
        StateOptions {
            memory_bytes: MEMORY_BYTES_MIN,
            background_threads: 2,
            write_bytes_per_second: 0,
            open_files_max: 32,
        }
    }

    /// All write buffers together: a quarter. They are charged to the cache, so that the whole
    /// stays within the budget.
    pub fn write_buffers_bytes(&self) -> u64 {
        self.memory_bytes / 4
    }

    /// One write buffer: an eighth of them, since a node has dozens of databases of which a few are
    /// busy. At most 32 MiB: beyond, a flush takes long and files get no better.
    pub fn write_buffer_bytes(&self) -> u64 {
        (self.write_buffers_bytes() / 8).clamp(MIB / 2, 32 * MIB)
    }

    fn check(&self) -> Result<(), Error> {
        if self.memory_bytes < MEMORY_BYTES_MIN {
            let why =
                format!("state memory of {} bytes is below {MEMORY_BYTES_MIN}", self.memory_bytes);
            return Err(Error::invalid(why));
        }
        if self.background_threads < 2 {
            return Err(Error::invalid(
                "state stores need two background threads: one flushes, one compacts",
            ));
        }
        Ok(())
    }
}

/// Below this, the fixed costs of open databases alone are more.
const MEMORY_BYTES_MIN: u64 = 16 * MIB;

/// Bits of bloom filter per key: about 1 % of the seeks for absent keys read a block.
const BLOOM_BITS: f64 = 10.0;
/// Larger than RocksDB's 4 KiB: fewer index entries to cache, better compression, one read on any
/// disk.
const BLOCK_BYTES: usize = 16 << 10;
/// Files of one level-style database: small enough that one compaction step is short.
const FILE_BYTES: u64 = 32 * MIB;
/// Files in level 0 at which a compaction starts, writes slow down, and writes stop. The host
/// flushes replicas to free the log, which makes small files: the distance is wide.
const LEVEL_ZERO_FILES: [i32; 3] = [4, 24, 48];
/// RocksDB's own diagnostic log, per database.
const INFO_LOG_BYTES: usize = 1 << 20;
const INFO_LOGS: usize = 2;
/// Checksums of keys and values from the batch to the file: damage in memory is noticed, not
/// written.
pub(crate) const PROTECTION_BYTES: u32 = 8;

/// The shared parts, and the options that every database begins from.
pub(crate) struct Budget {
    options: Options,
    cache: Cache,
    write_buffers: WriteBufferManager,
}

impl Budget {
    pub(crate) fn new(settings: &StateOptions, mut env: Env) -> Result<Budget, Error> {
        settings.check()?;
        let cache = Cache::new_lru_cache(settings.memory_bytes as usize);
        // Without stalls: what bounds unflushed state is the host, which flushes whoever holds the
        // oldest log. A stall here would hold up apply, and with it every reader behind it.
        let write_buffers = WriteBufferManager::new_write_buffer_manager_with_cache(
            settings.write_buffers_bytes() as usize,
            false,
            cache.clone(),
        );
        let flushers = (settings.background_threads / 4).max(1);
        env.set_high_priority_background_threads(flushers as i32);
        env.set_low_priority_background_threads((settings.background_threads - flushers) as i32);

        let mut options = Options::default();
        options.set_env(&env);
        options.set_write_buffer_manager(&write_buffers);
        if settings.write_bytes_per_second > 0 {
            // Copies of the options share the limiter. 100 ms refills and a fairness of 10 are
            // RocksDB's own.
            options.set_ratelimiter(settings.write_bytes_per_second as i64, 100_000, 10);
        }
        options.set_max_background_jobs(settings.background_threads as i32);
        options.set_max_open_files(settings.open_files_max as i32);
        options.set_write_buffer_size(settings.write_buffer_bytes() as usize);
        set_integrity(&mut options);
        set_shape(&mut options);
        options.set_block_based_table_factory(&table(&cache));
        options.set_prefix_extractor(SliceTransform::create(
            "coracle.prefix.1",
            prefix,
            Some(has_prefix),
        ));
        Ok(Budget { options, cache, write_buffers })
    }

    /// A copy to complete for one database; the shared parts stay shared.
    pub(crate) fn options(&self) -> Options {
        self.options.clone()
    }

    pub(crate) fn cache_bytes_used(&self) -> u64 {
        self.cache.get_usage() as u64
    }

    pub(crate) fn write_buffer_bytes_used(&self) -> u64 {
        self.write_buffers.get_usage() as u64
    }
}

fn set_integrity(options: &mut Options) {
    options.set_paranoid_checks(true);
    options.set_memtable_protection_bytes_per_key(PROTECTION_BYTES);
    // Closing flushes nothing. Otherwise every crash test would pass in vain, and a store whose
    // replica is being thrown away would be written once more.
    options.set_avoid_flush_during_shutdown(true);
    // A failed flush is never retried: what the first attempt left on disk is unknown.
    options.set_max_bgerror_resume_count(0);
    // No write-ahead log is written; these only keep its unsafe habits out should one ever appear.
    options.set_recycle_log_file_num(0);
    options.set_wal_bytes_per_sync(0);
    options.set_log_level(LogLevel::Info);
    options.set_max_log_file_size(INFO_LOG_BYTES);
    options.set_keep_log_file_num(INFO_LOGS);
}

fn set_shape(options: &mut Options) {
    options.set_compaction_style(DBCompactionStyle::Level);
    options.set_level_compaction_dynamic_level_bytes(true);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_target_file_size_base(FILE_BYTES);
    options.set_max_bytes_for_level_base(4 * FILE_BYTES);
    let [compact, slow, stop] = LEVEL_ZERO_FILES;
    options.set_level_zero_file_num_compaction_trigger(compact);
    options.set_level_zero_slowdown_writes_trigger(slow);
    options.set_level_zero_stop_writes_trigger(stop);
    options.set_max_write_buffer_number(4);
    // The filter's proof needs one pass over all keys of a compaction (see `filter`).
    options.set_max_subcompactions(1);
    options.set_bytes_per_sync(MIB);
    // Only `first` asks for prefix seeks; every other iterator sees all keys.
    options.set_prefix_seek_opt_in_only(true);
    options.set_memtable_prefix_bloom_ratio(0.05);
}

fn table(cache: &Cache) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_block_size(BLOCK_BYTES);
    table.set_bloom_filter(BLOOM_BITS, false);
    table.set_whole_key_filtering(false);
    // Indexes and filters count against the budget as well.
    table.set_cache_index_and_filter_blocks(true);
    table.set_cache_index_and_filter_blocks_with_high_priority(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table
}

/// What the bloom filter holds: of a data key everything before the version, so that one seek finds
/// the newest version; results, marks and `Meta` records whole. Prefixes of prefixes are
/// themselves, and prefixes are in key order.
fn prefix(physical: &[u8]) -> &[u8] {
    match key::data_prefix_len(physical) {
        Some(len) => &physical[..len],
        None => physical,
    }
}

fn has_prefix(physical: &[u8]) -> bool {
    const WHOLE: [u8; 3] = [Kind::Meta as u8, Kind::Result as u8, Kind::Mark as u8];
    physical.first().is_some_and(|kind| WHOLE.contains(kind))
        || key::data_prefix_len(physical).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fit_the_budget() {
        for memory_bytes in [MEMORY_BYTES_MIN, 100 * MIB, 64 << 30] {
            let options = StateOptions { memory_bytes, ..StateOptions::default() };
            assert!(options.check().is_ok());
            assert!(options.write_buffer_bytes() <= options.write_buffers_bytes());
            assert!(options.write_buffers_bytes() < options.memory_bytes);
        }
        assert!(StateOptions { memory_bytes: MIB, ..StateOptions::default() }.check().is_err());
        assert!(StateOptions { background_threads: 1, ..StateOptions::default() }.check().is_err());
    }

    #[test]
    fn prefix_of_a_prefix_is_itself() {
        let data = key::data(3, b"a\0b", 9);
        for physical in [&data[..], &key::mark(1), &key::result(1, 2, 3)] {
            assert!(has_prefix(physical));
            assert!(has_prefix(prefix(physical)));
            assert_eq!(prefix(prefix(physical)), prefix(physical));
        }
        assert_eq!(prefix(&data), key::data_prefix(3, b"a\0b"));
        assert!(!has_prefix(&key::result_age(1, 2, 3)));
        assert!(!has_prefix(b"\x10\0\0"));
    }
}

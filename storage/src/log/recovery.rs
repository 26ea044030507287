//! Owns the opening of a log: read, cut the torn tail, name what is lost, mark what is left as
//! durable. Does not judge bytes (see `scan`).
//!
//! What recovery reads may stand in the page cache only: the process was killed before its last
//! sync, or that sync failed. Nobody may act on it before it is durable, for a vote that is seen
//! and then lost could be given twice. So the last batch is written again, byte for byte (a sync
//! alone would skip pages that the kernel takes for clean), the torn bytes behind it are zeroed,
//! all is synced, and a batch of its own marks it. Only then does `open` return.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::index::{Damage, Index};
use super::queue::{Change, Filled, Shared, State};
use super::record::{BLOCK, ReplicaId, align};
use super::replay::Replay;
use super::scan::{Content, Loss, Scan};
use super::segment::{HeaderRead, Segment, SegmentHeader, segment_number, segment_path};
use super::writer::{Writer, set_damaged};
use crate::error::Error;
use crate::fs::{Fs, OpenMode, create_dir_durable};
use crate::options::LogOptions;

/// What opening a log found.
#[derive(Clone, Eq, PartialEq, Debug, Default)]
pub struct Recovery {
    /// The replicas that are whole.
    pub replicas: Vec<ReplicaId>,
    /// The replicas that have lost acknowledged data, now or at an earlier start: to be rebuilt
    /// from their group under a fresh id, and destroyed here. A replica of which every record is
    /// lost is in no list: compare with the directories that hold the replicas' states.
    pub recovering: Vec<Damage>,
    /// Whether a part of the log could not be read, whoever it told of.
    pub lossy: bool,
    /// The replicas that were destroyed and not yet forgotten.
    pub destroyed: Vec<ReplicaId>,
    /// Bytes behind the last durable batch that a crash had left, and that were cut.
    pub torn_bytes: u64,
}

/// What was read, before anything is written.
struct Found {
    segments: Vec<Filled>,
    index: Index,
    damages: Vec<Damage>,
    /// The last segment is not to be written on: there is damage.
    leave: bool,
    lossy: bool,
    log_start: u64,
    next_batch: u64,
    chain: u32,
    /// The last segment's content and the bytes to write again, with their place.
    tail: Option<Tail>,
    /// Segments before the log's start: freed, but the crash came before they were removed.
    freed: Vec<u64>,
}

struct Tail {
    again: Vec<(u64, Vec<u8>)>,
    torn_bytes: u64,
}

/// Opens or creates the log in `dir`, and returns its writer.
pub(crate) fn open(
    fs: Arc<dyn Fs>,
    dir: &Path,
    options: LogOptions,
) -> Result<(Writer, Recovery), Error> {
    let at_dir = |error| Error::io(dir, error);
    create_dir_durable(&*fs, dir).map_err(at_dir)?;
    let mut found = read(&*fs, dir, &options)?;
    let mut recovery = Recovery {
        replicas: found.index.replicas.keys().copied().collect(),
        destroyed: found.index.destroyed.keys().copied().collect(),
        recovering: found.damages.clone(),
        lossy: found.lossy,
        torn_bytes: found.tail.as_ref().map_or(0, |tail| tail.torn_bytes),
    };
    recovery.replicas.retain(|id| found.damages.iter().all(|damage| damage.replica != *id));
    for damage in &found.damages {
        tracing::error!(
            replica = %damage.replica,
            file = %damage.file.display(),
            offset = damage.offset,
            why = damage.why,
            "a replica has lost acknowledged log data: rebuild it under a fresh id"
        );
    }
    let freed = std::mem::take(&mut found.freed);
    let mut writer = if found.segments.is_empty() {
        create(fs.clone(), dir, options, found)?
    } else {
        harden(&*fs, dir, &found)?;
        resume(fs.clone(), dir, options, found)?
    };
    writer.mark()?;
    // Only now: the batch before last may still have named an older start.
    for &number in &freed {
        fs.remove_file(&segment_path(dir, number)).map_err(at_dir)?;
    }
    if !freed.is_empty() {
        fs.sync_dir(dir).map_err(at_dir)?;
    }
    Ok((writer, recovery))
}

fn read(fs: &dyn Fs, dir: &Path, options: &LogOptions) -> Result<Found, Error> {
    let names = fs.read_dir(dir).map_err(|error| Error::io(dir, error))?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
    numbers.sort_unstable();
    if let Some(&last) = numbers.last()
        && content(fs, dir, last, options)?.is_torn_creation()
    {
        // No batch was ever written into it, so nobody was promised anything that stands in it.
        numbers.pop();
        let path = segment_path(dir, last);
        fs.remove_file(&path).map_err(|error| Error::io(&path, error))?;
    }
    let log_start = find_log_start(fs, dir, &numbers, options)?;
    let freed: Vec<u64> = numbers.extract_if(.., |number| *number < log_start).collect();

    let mut replay = Replay::default();
    let mut scan = Scan::new(&mut replay, dir);
    if numbers.first().is_some_and(|&first| first > log_start) {
        scan.missing(log_start);
    }
    let mut segments: Vec<Filled> = Vec::new();
    let mut tail = None;
    for (at, &number) in numbers.iter().enumerate() {
        let content = content(fs, dir, number, options)?;
        scan.segment(&content, at.checked_sub(1).map(|before| numbers[before]))?;
        if at + 1 == numbers.len() {
            scan.finish();
            tail = Some(find_tail(&content, &scan)?);
        }
        segments.push(Filled { segment: content.segment, used: scan.end });
    }
    let losses: Vec<Loss> = std::mem::take(&mut scan.losses);
    let lossy = !losses.is_empty();
    let leave = scan.unsound || lossy;
    let (next_batch, chain) = (scan.next_batch.unwrap_or(1), scan.chain.unwrap_or(0));
    let (index, damages) = replay.finish(dir, &losses, options.cache_bytes);
    Ok(Found { segments, index, damages, leave, lossy, log_start, next_batch, chain, tail, freed })
}

fn content(fs: &dyn Fs, dir: &Path, number: u64, options: &LogOptions) -> Result<Content, Error> {
    let path = segment_path(dir, number);
    let opened = fs.open(&path, OpenMode::ReadWrite).and_then(|file| Ok((file.len()?, file)));
    let (capacity, file) = opened.map_err(|error| Error::io(&path, error))?;
    let mut content =
        Content::read(Segment { number, salt: options.salt, path: path.into(), file, capacity })?;
    if let HeaderRead::Good(header) = &content.header {
        content.segment.salt = header.salt;
    }
    Ok(content)
}

/// The oldest segment that is needed, by the newest batch that can be read.
fn find_log_start(
    fs: &dyn Fs,
    dir: &Path,
    numbers: &[u64],
    options: &LogOptions,
) -> Result<u64, Error> {
    for &number in numbers.iter().rev() {
        if let Some(log_start) = content(fs, dir, number, options)?.log_start()? {
            return Ok(log_start);
        }
    }
    Ok(1)
}

/// What has to be written again, and what is cut, in the last segment.
fn find_tail(content: &Content, scan: &Scan<'_>) -> Result<Tail, Error> {
    let end = scan.end;
    if let Some((offset, error)) = &content.unreadable
        && *offset >= end
    {
        // It may be an acknowledged batch: a read error must not pass for a torn write.
        let source = io::Error::new(error.kind(), format!("reading at byte {offset}: {error}"));
        return Err(Error::io(&content.segment.path, source));
    }
    let mut again = Vec::new();
    if matches!(content.header, HeaderRead::Good(_)) {
        again.push((0, content.bytes[..BLOCK as usize].to_vec()));
    }
    let last = scan.last.as_ref().filter(|last| last.segment == content.segment.number);
    if let Some(last) = last {
        let range = last.offset as usize..(last.offset + last.len) as usize;
        again.push((last.offset, content.bytes[range].to_vec()));
    }
    // Zero whole blocks, but only those that hold something: most of the room was never written.
    let mut torn_bytes = 0;
    for start in (end as usize..content.bytes.len()).step_by(BLOCK as usize) {
        let block = &content.bytes[start..content.bytes.len().min(start + BLOCK as usize)];
        if let Some(last) = block.iter().rposition(|&byte| byte != 0) {
            torn_bytes = (start + last + 1) as u64 - end;
            again.push((start as u64, vec![0; block.len()]));
        }
    }
    Ok(Tail { again, torn_bytes })
}

/// Makes what was read durable, and the torn tail gone.
fn harden(fs: &dyn Fs, dir: &Path, found: &Found) -> Result<(), Error> {
    let last = &found.segments.last().expect("the caller has looked").segment;
    let tail = found.tail.as_ref().expect("a last segment has a tail");
    let rewrite = || {
        for (offset, bytes) in &tail.again {
            last.file.write_at(bytes, *offset)?;
        }
        last.file.sync()?;
        fs.sync_dir(dir)
    };
    rewrite().map_err(|error| Error::io(&last.path, error))
}

fn create(fs: Arc<dyn Fs>, dir: &Path, options: LogOptions, found: Found) -> Result<Writer, Error> {
    let header = SegmentHeader {
        number: found.log_start,
        salt: options.salt,
        first_batch: found.next_batch,
        chain: found.chain,
        durable_segment: 0,
        durable_offset: 0,
    };
    let capacity = align(options.segment_bytes);
    let segment = Segment::create(&*fs, dir, header, capacity)
        .map_err(|error| Error::io(&segment_path(dir, header.number), error))?;
    let filled = Filled { segment, used: BLOCK };
    resume(fs, dir, options, Found { segments: vec![filled], ..found })
}

/// The writer at the end of what was found, with the first batch queued.
fn resume(fs: Arc<dyn Fs>, dir: &Path, options: LogOptions, found: Found) -> Result<Writer, Error> {
    let Found { segments, index, damages, leave, log_start, next_batch, chain, .. } = found;
    let last = segments.last().expect("there is a segment by now");
    let (active, offset) = (last.segment.clone(), last.used);
    let state = State::new(index, segments, log_start);
    let dir = dir.to_path_buf();
    let shared = Arc::new(Shared { fs, dir, options, state: parking_lot::Mutex::new(state) });
    {
        let mut state = shared.state.lock();
        for damage in damages {
            let known = state.index.replicas.get(&damage.replica);
            if known.is_some_and(|replica| replica.damage.is_none()) {
                set_damaged(&mut state, damage);
            }
        }
        let ticket = state.next_ticket();
        state.push_own(ReplicaId(0), Change::Probe, ticket);
    }
    let mut writer = Writer { shared, active, offset, next_batch, chain, last_empty: None };
    if leave {
        // Nothing new goes into a file that was damaged.
        writer.next_segment(0)?;
    }
    Ok(writer)
}

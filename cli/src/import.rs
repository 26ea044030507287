//! Owns imports: records of a file written to a keyspace, many at a time, in order where the order
//! matters, resumable. Reading records is `record`, the remembered place is `state`.
//!
//! A place in the file is passed only when everything before it is acknowledged, so that a resumed
//! import misses nothing; it may write some records a second time, which changes nothing.

pub mod record;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use coracle_client::{ErrorKind, Keyspace, Outcome};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::args::{Global, Import, RecordFormat};
use crate::context::{Environment, resolve};
use crate::data::keyspace_name;
use crate::failure::{Exit, Failure};
use crate::output::{Output, count};
use crate::state;

use record::{Lifetime, Position, Record, Records, Step};

/// How often the state is written: what a resumed import does again at most.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// How long a record is tried: through a failover and a rolling restart, but not for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two tries, beyond the client's own: the cluster is not well.
const PAUSE: Duration = Duration::from_millis(250);

/// Values that may be unanswered, together: large values wait for each other.
const BYTES_IN_FLIGHT_MAX: usize = 16 << 20;

/// Bad records that are reported one by one; beyond it they are only counted.
const REPORTED_MAX: u64 = 20;

/// Records that the reading thread is ahead.
const READ_AHEAD: usize = 256;

/// How an import is done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The file; `-` is standard input.
    pub file: PathBuf,
    /// How records stand in it.
    pub format: RecordFormat,
    /// Where the place is remembered.
    pub resume: Option<PathBuf>,
    /// Goes on behind bad records.
    pub skip_bad: bool,
    /// At most this many records, those of earlier runs included.
    pub limit: Option<u64>,
    /// Records that may be unanswered.
    pub concurrency: usize,
}

/// How far an import is.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progressed {
    /// The file, as it was named.
    pub file: String,
    /// The keyspace.
    pub keyspace: String,
    /// The form's name.
    pub format: String,
    /// Everything before it is acknowledged.
    pub position: Position,
    /// Records written.
    pub records: u64,
    /// Bad records passed over.
    pub skipped: u64,
    /// Nothing is left.
    pub done: bool,
}

#[derive(Serialize)]
struct Summary {
    records: u64,
    skipped: u64,
    seconds: f64,
}

/// `coracle import`.
pub async fn run(import: Import, global: &Global, output: &Output) -> Result<(), Failure> {
    let target = resolve(global, &Environment::read())?;
    let client = target.client(global).await?;
    let keyspace = client.keyspace(keyspace_name(&target, import.keyspace.as_deref()));
    let plan = Plan {
        format: import.format.unwrap_or_else(|| format_of(&import.file)),
        file: import.file,
        resume: import.resume,
        skip_bad: import.skip_bad,
        limit: import.limit,
        concurrency: import.concurrency.into(),
    };
    let started = Instant::now();
    let done = import_all(&plan, &keyspace, output).await?;
    let seconds = started.elapsed().as_secs_f64();
    let summary = Summary { records: done.records, skipped: done.skipped, seconds };
    output.item("Import", &summary, || {
        let skipped = match done.skipped {
            0 => String::new(),
            bad => format!(", {} bad ones passed over", count(bad)),
        };
        format!("{} records in keyspace {}{skipped}", count(done.records), keyspace.name())
    })
}

/// By the file's name.
pub fn format_of(file: &Path) -> RecordFormat {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("tsv") => RecordFormat::Tsv,
        _ => RecordFormat::Ndjson,
    }
}

/// Writes all records that the state does not say are written. Returns when all are acknowledged.
pub async fn import_all(
    plan: &Plan,
    keyspace: &Keyspace,
    output: &Output,
) -> Result<Progressed, Failure> {
    let begun = begin(plan, keyspace.name())?;
    if begun.done {
        return Ok(begun);
    }
    let steps = read_ahead(plan, begun.position)?;
    let mut run = Run {
        plan,
        keyspace,
        output,
        done: begun,
        failed: false,
        flight: Flight::default(),
        saved: Instant::now(),
        started: Instant::now(),
        progress: output.progress(),
    };
    let mut result = run.all(steps).await;
    if let Err(failure) = &mut result {
        let next = match &plan.resume {
            Some(state) => format!("the same command again goes on, from {}", state.display()),
            None => "with --resume STATE an import goes on where it stopped".to_owned(),
        };
        failure.next.get_or_insert(next);
    } else {
        run.done.done = plan.limit.is_none_or(|limit| run.done.records < limit);
    }
    // Also after a failure: what is acknowledged need not be done again.
    run.save()?;
    result.map(|()| run.done)
}

/// What an earlier run has done, checked against what is asked now.
fn begin(plan: &Plan, keyspace: &str) -> Result<Progressed, Failure> {
    let fresh = Progressed {
        file: plan.file.display().to_string(),
        keyspace: keyspace.to_owned(),
        format: format!("{:?}", plan.format).to_lowercase(),
        ..Progressed::default()
    };
    let Some(path) = &plan.resume else {
        return Ok(fresh);
    };
    let Some(state) = state::load::<Progressed>(path)? else {
        return Ok(fresh);
    };
    for (what, then, now) in [
        ("file", &state.file, &fresh.file),
        ("keyspace", &state.keyspace, &fresh.keyspace),
        ("format", &state.format, &fresh.format),
    ] {
        if then != now {
            let text = format!("{} is of an import with {what} {then}, not {now}", path.display());
            return Err(Failure::usage(text).next("name another state file for another import"));
        }
    }
    Ok(state)
}

/// Reads on a thread of its own: a pipe may stay silent for long.
fn read_ahead(plan: &Plan, from: Position) -> Result<mpsc::Receiver<io::Result<Step>>, Failure> {
    let (tx, rx) = mpsc::channel(READ_AHEAD);
    let records = Records::new(open(&plan.file, from.offset)?, plan.format, from);
    let read = move || {
        for step in records {
            let failed = step.is_err();
            if tx.blocking_send(step).is_err() || failed {
                return;
            }
        }
    };
    // Detached: it may hang in a read of standard input, which nothing can end.
    std::thread::Builder::new()
        .name("import-read".to_owned())
        .spawn(read)
        .map_err(|error| Failure::failed(format!("cannot start a thread: {error}")))?;
    Ok(rx)
}

fn open(path: &Path, offset: u64) -> Result<Box<dyn BufRead + Send>, Failure> {
    let unreadable = |error: io::Error| Failure::io("read", path, &error);
    let too_short = || {
        Failure::failed(format!("{} is shorter than what was imported of it", path.display()))
            .next("it is another file now: remove the state to begin anew")
    };
    if path == Path::new("-") {
        let mut stdin = BufReader::new(io::stdin());
        let passed =
            io::copy(&mut stdin.by_ref().take(offset), &mut io::sink()).map_err(unreadable)?;
        return if passed == offset { Ok(Box::new(stdin)) } else { Err(too_short()) };
    }
    let mut file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.is_file() && metadata.len() < offset {
        return Err(too_short());
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).map_err(unreadable)?;
    }
    Ok(Box::new(BufReader::with_capacity(256 << 10, file)))
}

/// Records that are being written, in the order of the file.
#[derive(Default)]
struct Flight {
    answers: FuturesOrdered<BoxFuture<'static, Answered>>,
    keys: HashSet<Bytes>,
    bytes: usize,
}

/// A record's end.
struct Answered {
    /// `None`: a bad one, which was passed over.
    key: Option<Bytes>,
    bytes: usize,
    end: Position,
    result: Result<(), Failure>,
}

struct Run<'a> {
    plan: &'a Plan,
    keyspace: &'a Keyspace,
    output: &'a Output,
    done: Progressed,
    /// A record was not written: what stands behind it is written again by the next run.
    failed: bool,
    flight: Flight,
    saved: Instant,
    started: Instant,
    progress: crate::output::Progress,
}

impl Run<'_> {
    async fn all(&mut self, mut steps: mpsc::Receiver<io::Result<Step>>) -> Result<(), Failure> {
        let mut taken = self.done.records;
        let mut open = self.plan.limit.is_none_or(|limit| taken < limit);
        loop {
            let may_take = open
                && self.flight.answers.len() < self.plan.concurrency
                && self.flight.bytes < BYTES_IN_FLIGHT_MAX;
            tokio::select! {
                answered = self.flight.answers.next(), if !self.flight.answers.is_empty() => {
                    self.passed(answered.expect("it is not empty"))?;
                }
                step = steps.recv(), if may_take => {
                    let step = match step {
                        Some(step) => {
                            step.map_err(|error| Failure::io("read", &self.plan.file, &error))
                        }
                        None => { open = false; continue }
                    };
                    let took = match step {
                        Ok(step) => self.take(step).await,
                        Err(failure) => Err(failure),
                    };
                    match took {
                        Ok(more) => taken += more,
                        // What was sent before it is waited for: it counts.
                        Err(failure) => { self.drain().await?; return Err(failure) }
                    }
                    open = self.plan.limit.is_none_or(|limit| taken < limit);
                }
                else => return Ok(()),
            }
        }
    }

    /// Begins to write a record. Returns how many were begun.
    async fn take(&mut self, step: Step) -> Result<u64, Failure> {
        let record = match step.record {
            Ok(record) => record,
            Err(why) => {
                self.bad(step.line, &why)?;
                let end = step.end;
                let passed = Answered { key: None, bytes: 0, end, result: Ok(()) };
                self.flight.answers.push_back(Box::pin(std::future::ready(passed)));
                return Ok(0);
            }
        };
        // Two records of one key must not race: the later one of the file wins.
        while self.flight.keys.contains(&record.key) {
            let answered = self.flight.answers.next().await;
            self.passed(answered.expect("a key in flight has its answer there"))?;
        }
        self.flight.keys.insert(record.key.clone());
        let bytes = record.key.len() + record.value.len();
        self.flight.bytes += bytes;
        let (keyspace, line, end) = (self.keyspace.clone(), step.line, step.end);
        self.flight.answers.push_back(Box::pin(async move {
            let key = Some(record.key.clone());
            Answered { key, bytes, end, result: put(&keyspace, record, line).await }
        }));
        Ok(1)
    }

    fn passed(&mut self, answered: Answered) -> Result<(), Failure> {
        self.flight.bytes -= answered.bytes;
        if let Some(key) = &answered.key {
            self.flight.keys.remove(key);
        }
        if self.failed {
            return Ok(());
        }
        self.done.skipped += u64::from(answered.key.is_none());
        self.failed = answered.result.is_err();
        answered.result?;
        self.done.records += u64::from(answered.key.is_some());
        self.done.position = answered.end;
        let (done, started) = (&self.done, self.started);
        self.progress.update(|| {
            let rate = done.records as f64 / started.elapsed().as_secs_f64().max(0.001);
            format!("{} records, {} per second", count(done.records), count(rate as u64))
        });
        if self.saved.elapsed() >= SAVE_INTERVAL {
            self.save()?;
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), Failure> {
        while let Some(answered) = self.flight.answers.next().await {
            self.passed(answered)?;
        }
        Ok(())
    }

    fn bad(&mut self, line: u64, why: &str) -> Result<(), Failure> {
        let text = format!("{}:{line}: {why}", self.plan.file.display());
        if !self.plan.skip_bad {
            let failure = Failure::failed(format!("bad record at {text}"));
            return Err(failure.next("correct the line, or pass over such lines with --skip-bad"));
        }
        self.progress.clear();
        match self.done.skipped {
            ..REPORTED_MAX => self.output.note(&format!("passed over {text}")),
            REPORTED_MAX => self.output.note("further bad records are only counted"),
            _ => {}
        }
        Ok(())
    }

    fn save(&mut self) -> Result<(), Failure> {
        self.saved = Instant::now();
        match &self.plan.resume {
            Some(path) => state::save(path, &self.done),
            None => Ok(()),
        }
    }
}

/// Writes one record. That an attempt may have been applied does not matter: the next one writes the
/// same.
async fn put(keyspace: &Keyspace, record: Record, line: u64) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now_ms = now_ms();
        let ttl = match record.lifetime {
            Lifetime::Forever => None,
            Lifetime::For(ttl) => Some(ttl),
            // Expired since it was exported: it is not there to be read any more.
            Lifetime::UntilMs(ms) if ms <= now_ms => return Ok(()),
            Lifetime::UntilMs(ms) => Some(Duration::from_millis(ms - now_ms)),
        };
        let mut call = keyspace.put(record.key.clone(), record.value.clone());
        if let Some(ttl) = ttl {
            call = call.ttl(ttl);
        }
        let Err(error) = call.await else {
            return Ok(());
        };
        let passes = matches!(
            error.kind(),
            ErrorKind::Unavailable | ErrorKind::Overloaded | ErrorKind::TimedOut
        ) || error.outcome() == Outcome::Unknown;
        if !passes || Instant::now() >= deadline {
            let mut failure = Failure::call(format!("write the record of line {line}"), &error);
            if failure.exit == Exit::Usage {
                // The command line is right, the file is not.
                failure.exit = Exit::Failed;
            }
            return Err(failure);
        }
        tokio::time::sleep(error.retry_after().unwrap_or(PAUSE)).await;
    }
}

fn now_ms() -> u64 {
    // A clock before 1970 expires nothing.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(file: &str, resume: &Path) -> Plan {
        Plan {
            file: file.into(),
            format: RecordFormat::Tsv,
            resume: Some(resume.to_owned()),
            skip_bad: false,
            limit: None,
            concurrency: 1,
        }
    }

    #[test]
    fn a_state_of_another_import_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let begun = begin(&plan("a.tsv", &path), "default").unwrap();
        assert_eq!(begun.position, Position::default());
        let position = Position { offset: 8, lines: 2 };
        state::save(&path, &Progressed { position, records: 2, ..begun }).unwrap();
        assert_eq!(begin(&plan("a.tsv", &path), "default").unwrap().position, position);
        for (file, keyspace) in [("b.tsv", "default"), ("a.tsv", "other")] {
            let failure = begin(&plan(file, &path), keyspace).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{failure:?}");
        }
    }

    #[test]
    fn a_file_that_shrank_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tsv");
        std::fs::write(&path, "a\t1\nb\t2\n").unwrap();
        let mut rest = String::new();
        open(&path, 4).unwrap().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "b\t2\n");
        let Err(failure) = open(&path, 9) else { panic!("9 bytes of 8") };
        assert!(failure.what.contains("shorter"), "{failure:?}");
    }

    #[test]
    fn the_name_says_the_format() {
        assert_eq!(format_of(Path::new("a.tsv")), RecordFormat::Tsv);
        assert_eq!(format_of(Path::new("-")), RecordFormat::Ndjson);
    }
}

//! Owns exports: all keys with a prefix, at one version, to a file or a pipe, resumable. How a record is
//! written is `import::record`, the remembered place `state`.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use coracle_client::Page;
use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};

use crate::args::{Encoding, Export, Global, RecordFormat};
use crate::context::{Environment, resolve};
use crate::data::{decode, keyspace_name};
use crate::encoding;
use crate::failure::Failure;
use crate::import::{format_of, record};
use crate::output::{Output, Progress, bytes, count};
use crate::state;

/// How often the file is made durable and the place remembered.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// How far an export is.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Progressed {
    file: String,
    keyspace: String,
    format: String,
    /// As hex: it may be any bytes.
    prefix: String,
    /// As hex; empty at the beginning.
    resume_token: String,
    /// Bytes of the file that belong to it. What stands behind them was written after the last save.
    bytes: u64,
    records: u64,
    /// The one version of everything in the file; a text, as everywhere in JSON.
    version: String,
    done: bool,
}

#[derive(Serialize)]
struct Summary {
    records: u64,
    bytes: u64,
    version: String,
}

/// Where records go.
enum Sink<'a> {
    File(BufWriter<File>, PathBuf),
    Stdout(&'a Output),
}

impl Sink<'_> {
    fn write(&mut self, text: &str) -> Result<(), Failure> {
        match self {
            Sink::File(file, path) => {
                file.write_all(text.as_bytes()).map_err(|error| Failure::io("write", path, &error))
            }
            Sink::Stdout(output) => output.data(text.as_bytes()),
        }
    }

    /// Durable, where it is a file.
    fn sync(&mut self) -> Result<(), Failure> {
        match self {
            Sink::File(file, path) => {
                let synced = file.flush().and_then(|()| file.get_ref().sync_data());
                synced.map_err(|error| Failure::io("write", path, &error))
            }
            Sink::Stdout(output) => output.flush(),
        }
    }
}

/// `coracle export`.
pub async fn run(export: Export, global: &Global, output: &Output) -> Result<(), Failure> {
    let format = export.format.unwrap_or_else(|| format_of(&export.file));
    if format == RecordFormat::Packages {
        return Err(Failure::usage("packages can only be imported; export as ndjson or tsv"));
    }
    let is_stdout = export.file == Path::new("-");
    if is_stdout && export.resume.is_some() {
        return Err(Failure::usage(
            "--resume needs a FILE: what left by a pipe cannot be gone on with",
        ));
    }
    let prefix = decode(&export.addressing, "--prefix", &export.prefix)?;
    let target = resolve(global, &Environment::read())?;
    let name = keyspace_name(&target, export.addressing.keyspace.as_deref());
    let begun = begin(&export, format, &name, &prefix)?;
    if begun.done {
        return summary(&begun, output, is_stdout);
    }
    let token = encoding::decode(Encoding::Hex, &begun.resume_token).map_err(Failure::failed)?;
    let client = target.client(global).await?;
    let sink = match is_stdout {
        true => Sink::Stdout(output),
        false => Sink::File(open(&export.file, begun.bytes)?, export.file.clone()),
    };
    let scan = client.keyspace(name).scan(..).prefix(prefix).resume(token);
    let progress = output.progress();
    let state = export.resume;
    let mut run = Run { format, sink, done: begun, state, saved: Instant::now(), progress };
    let mut pages = scan.pages();
    loop {
        let page = pages.try_next().await.map_err(|error| {
            let failure = Failure::call("export", &error);
            match (error.reason(), &run.state) {
                (Some("VERSION_GONE"), Some(state)) => failure.next(format!(
                    "the version that it began with is no longer kept: remove {} to begin anew",
                    state.display()
                )),
                (_, Some(_)) => failure.next("the same command again goes on"),
                (_, None) => failure,
            }
        })?;
        match page {
            Some(page) => run.page(page)?,
            None => break,
        }
    }
    run.done.done = true;
    run.save()?;
    drop(run.progress);
    summary(&run.done, output, is_stdout)
}

fn begin(
    export: &Export,
    format: RecordFormat,
    keyspace: &str,
    prefix: &Bytes,
) -> Result<Progressed, Failure> {
    let hex = encoding::encode(Encoding::Hex, prefix);
    let fresh = Progressed {
        file: export.file.display().to_string(),
        keyspace: keyspace.to_owned(),
        format: format!("{format:?}").to_lowercase(),
        prefix: String::from_utf8_lossy(&hex).into_owned(),
        ..Progressed::default()
    };
    let Some(path) = &export.resume else {
        return Ok(fresh);
    };
    let Some(then) = state::load::<Progressed>(path)? else {
        return Ok(fresh);
    };
    let same = Progressed {
        resume_token: then.resume_token.clone(),
        bytes: then.bytes,
        records: then.records,
        version: then.version.clone(),
        done: then.done,
        ..fresh
    };
    if same != then {
        let text = format!(
            "{} is of an export of keyspace {} to {} as {}",
            path.display(),
            then.keyspace,
            then.file,
            then.format
        );
        return Err(Failure::usage(text).next("name another state file for another export"));
    }
    Ok(then)
}

/// The file, cut to what the state knows of it.
fn open(path: &Path, bytes: u64) -> Result<BufWriter<File>, Failure> {
    let failed = |error: std::io::Error| Failure::io("write", path, &error);
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(false).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    // Pipes and devices have no length, and take what comes.
    if metadata.is_file() {
        if metadata.len() < bytes {
            let text = format!("{} is shorter than what was exported to it", path.display());
            return Err(Failure::failed(text).next("remove the state to begin anew"));
        }
        file.set_len(bytes).map_err(failed)?;
        file.seek(SeekFrom::Start(bytes)).map_err(failed)?;
    }
    Ok(BufWriter::with_capacity(256 << 10, file))
}

struct Run<'a> {
    format: RecordFormat,
    sink: Sink<'a>,
    done: Progressed,
    state: Option<PathBuf>,
    saved: Instant,
    progress: Progress,
}

impl Run<'_> {
    fn page(&mut self, page: Page) -> Result<(), Failure> {
        for pair in &page.entries {
            let text = record::write(self.format, &pair.key, &pair.value, pair.expires_at_ms);
            self.sink.write(&text)?;
            self.done.bytes += text.len() as u64;
        }
        self.done.records += page.entries.len() as u64;
        self.done.version = page.version.to_string();
        let token = encoding::encode(Encoding::Hex, &page.resume_token);
        self.done.resume_token = String::from_utf8_lossy(&token).into_owned();
        let done = &self.done;
        self.progress.update(|| format!("{} records, {}", count(done.records), bytes(done.bytes)));
        if self.saved.elapsed() >= SAVE_INTERVAL {
            self.save()?;
        }
        Ok(())
    }

    /// First the records, then that they are there.
    fn save(&mut self) -> Result<(), Failure> {
        self.sink.sync()?;
        self.saved = Instant::now();
        match &self.state {
            Some(path) => state::save(path, &self.done),
            None => Ok(()),
        }
    }
}

fn summary(done: &Progressed, output: &Output, is_stdout: bool) -> Result<(), Failure> {
    let text = || {
        let (records, size) = (count(done.records), bytes(done.bytes));
        format!("{records} records, {size}, at version {}", done.version)
    };
    if is_stdout {
        output.note(&text());
        return Ok(());
    }
    let Progressed { records, bytes, version, .. } = done.clone();
    output.item("Export", &Summary { records, bytes, version }, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_after_the_last_save_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all.tsv");
        std::fs::write(&path, "a\t1\nb\t").unwrap();
        let mut file = open(&path, 4).unwrap();
        file.write_all(b"c\t3\n").unwrap();
        file.flush().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a\t1\nc\t3\n");
        assert!(open(&path, 9).unwrap_err().what.contains("shorter"));
        drop(open(&path, 0).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}

//! Owns the deletion of ranges: asking first, the progress, the remembered place. The steps over the
//! shards are the service's.

use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use coracle_client::{DeleteProgress, Error, Keyspace};
use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};

use crate::args::{DeleteRange, Encoding, Global};
use crate::context::{Environment, resolve};
use crate::data::{decode, keyspace_name};
use crate::encoding;
use crate::failure::Failure;
use crate::output::{Output, count};
use crate::state;

/// How often the place is remembered: what a resumed command goes over again at most.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// How far a delete-range is.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Progressed {
    keyspace: String,
    /// As hex, like the other bounds: they may be any bytes.
    prefix: String,
    start: String,
    end: Option<String>,
    /// As hex; empty at the beginning.
    resume_token: String,
    deleted: u64,
    /// Of the last step; a text, as everywhere in JSON.
    version: String,
    done: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    keyspace: String,
    deleted: u64,
    version: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DryRun {
    keyspace: String,
    would_delete: u64,
    version: String,
}

/// The keys that are meant.
struct Range {
    keyspace: Keyspace,
    prefix: Bytes,
    start: Bytes,
    end: Option<Bytes>,
}

/// `coracle delete-range`.
pub async fn run(delete: DeleteRange, global: &Global, output: &Output) -> Result<(), Failure> {
    let bytes = |what, text: &str| decode(&delete.addressing, what, text);
    let prefix = bytes("--prefix", &delete.prefix)?;
    let start = bytes("--start", &delete.start)?;
    let end = delete.end.as_deref().map(|end| bytes("--end", end)).transpose()?;
    let target = resolve(global, &Environment::read())?;
    let name = keyspace_name(&target, delete.addressing.keyspace.as_deref());
    let is_everything = prefix.is_empty() && start.is_empty() && end.is_none();
    if is_everything && !delete.yes && !delete.dry_run {
        ask(&name, output).await?;
    }
    let begun = begin(&delete, &name, &prefix, &start, end.as_ref())?;
    if begun.done {
        return summary(begun, output);
    }
    let client = target.client(global).await?;
    let range = Range { keyspace: client.keyspace(name), prefix, start, end };
    if delete.dry_run {
        return range.count(output).await;
    }
    let mut progress = output.progress();
    let mut run = Run { before: begun.deleted, done: begun, state: delete.resume, saved: None };
    let mut rounds = range.call(&run.done, delete.atomic)?.stream();
    loop {
        match rounds.try_next().await {
            Ok(Some(round)) => run.round(round)?,
            Ok(None) => break,
            Err(error) => {
                run.save()?;
                return Err(run.failure(&error, delete.atomic));
            }
        }
        let deleted = run.done.deleted;
        progress.update(|| format!("{} keys deleted", count(deleted)));
    }
    run.save()?;
    drop(progress);
    summary(run.done, output)
}

/// A person says the keyspace's name; a script says `--yes`.
async fn ask(keyspace: &str, output: &Output) -> Result<(), Failure> {
    let what = format!("this deletes every key of keyspace {keyspace}");
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(
            Failure::usage(what).next("say --yes, or name a range: --prefix, --start, --end")
        );
    }
    output.note(&format!("{what}. Type its name to go on:"));
    // Beside, so that Ctrl-C is heard meanwhile.
    let line = || io::stdin().lock().lines().next().transpose();
    let answer = tokio::task::spawn_blocking(line).await;
    let answer = answer.map_err(|error| Failure::failed(format!("cannot ask: {error}")))?;
    let answer = answer.map_err(|error| Failure::io("read", "standard input", &error))?;
    match answer.is_some_and(|answer| answer.trim() == keyspace) {
        true => Ok(()),
        false => Err(Failure::usage("nothing was deleted: that is not the keyspace's name")),
    }
}

impl Range {
    fn call(
        &self,
        begun: &Progressed,
        atomic: bool,
    ) -> Result<coracle_client::range::DeleteRange, Failure> {
        let start = self.start.clone();
        let call = match &self.end {
            Some(end) => self.keyspace.delete_range(start..end.clone()),
            None => self.keyspace.delete_range(start..),
        };
        let call = call.prefix(self.prefix.clone());
        if atomic {
            return Ok(call.atomic());
        }
        let token = encoding::decode(Encoding::Hex, &begun.resume_token);
        Ok(call.resume(token.map_err(Failure::failed)?))
    }

    /// How many keys there are, by a scan at one version.
    async fn count(&self, output: &Output) -> Result<(), Failure> {
        let start = self.start.clone();
        let scan = match &self.end {
            Some(end) => self.keyspace.scan(start..end.clone()),
            None => self.keyspace.scan(start..),
        };
        let mut pages = scan.prefix(self.prefix.clone()).keys_only().pages();
        let (mut would_delete, mut version) = (0, String::new());
        let mut progress = output.progress();
        loop {
            let page = pages.try_next().await;
            let Some(page) = page.map_err(|error| Failure::call("count the keys", &error))? else {
                break;
            };
            would_delete += page.entries.len() as u64;
            version = page.version.to_string();
            progress.update(|| format!("{} keys", count(would_delete)));
        }
        drop(progress);
        let keyspace = self.keyspace.name().to_owned();
        let text = format!("would delete {} keys of keyspace {keyspace}", count(would_delete));
        output.item("DeleteRangeDryRun", &DryRun { keyspace, would_delete, version }, || text)
    }
}

fn begin(
    delete: &DeleteRange,
    keyspace: &str,
    prefix: &Bytes,
    start: &Bytes,
    end: Option<&Bytes>,
) -> Result<Progressed, Failure> {
    let hex = |bytes: &Bytes| {
        String::from_utf8_lossy(&encoding::encode(Encoding::Hex, bytes)).into_owned()
    };
    let fresh = Progressed {
        keyspace: keyspace.to_owned(),
        prefix: hex(prefix),
        start: hex(start),
        end: end.map(hex),
        ..Progressed::default()
    };
    let Some(path) = &delete.resume else {
        return Ok(fresh);
    };
    let Some(then) = state::load::<Progressed>(path)? else {
        return Ok(fresh);
    };
    let same = Progressed {
        resume_token: then.resume_token.clone(),
        deleted: then.deleted,
        version: then.version.clone(),
        done: then.done,
        ..fresh
    };
    if same != then {
        let text =
            format!("{} is of another delete-range, of keyspace {}", path.display(), then.keyspace);
        return Err(Failure::usage(text).next("name another state file for another range"));
    }
    Ok(then)
}

struct Run {
    /// Deleted by earlier commands.
    before: u64,
    done: Progressed,
    state: Option<PathBuf>,
    saved: Option<Instant>,
}

impl Run {
    fn round(&mut self, round: DeleteProgress) -> Result<(), Failure> {
        let token = encoding::encode(Encoding::Hex, &round.resume_token);
        self.done.resume_token = String::from_utf8_lossy(&token).into_owned();
        self.done.deleted = self.before + round.deleted;
        self.done.version = round.version.to_string();
        self.done.done = round.done;
        if self.saved.is_none_or(|saved| saved.elapsed() >= SAVE_INTERVAL) {
            self.save()?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<(), Failure> {
        self.saved = Some(Instant::now());
        match &self.state {
            Some(path) => state::save(path, &self.done),
            None => Ok(()),
        }
    }

    fn failure(&self, error: &Error, atomic: bool) -> Failure {
        let failure = Failure::call("delete the range", error);
        match (error.limit(), &self.state) {
            (Some(limit), _) if atomic && limit.starts_with("DELETE_RANGE") => {
                failure.next("without --atomic it is deleted in steps")
            }
            (_, Some(_)) => failure.next("the same command again goes on"),
            (_, None) if self.done.deleted > 0 => {
                let deleted = count(self.done.deleted);
                failure.next(format!(
                    "{deleted} keys are deleted; the same command again does the rest"
                ))
            }
            (_, None) => failure,
        }
    }
}

fn summary(done: Progressed, output: &Output) -> Result<(), Failure> {
    let Progressed { keyspace, deleted, version, .. } = done;
    let text = format!("{} keys of keyspace {keyspace} deleted", count(deleted));
    output.item("DeletedRange", &Summary { keyspace, deleted, version }, || text)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn args(more: &[&str]) -> DeleteRange {
        let line = [&["coracle", "delete-range"], more].concat();
        match Cli::try_parse_from(line).unwrap().command {
            Command::DeleteRange(delete) => delete,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_state_of_another_range_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let delete = args(&["--resume", path.to_str().unwrap()]);
        let begun = |prefix: &'static str, end: Option<&'static str>| {
            let (prefix, end) = (Bytes::from_static(prefix.as_bytes()), end.map(Bytes::from));
            begin(&delete, "default", &prefix, &Bytes::new(), end.as_ref())
        };
        let fresh = begun("a", None).unwrap();
        assert_eq!((fresh.deleted, fresh.resume_token.as_str()), (0, ""));
        let then = Progressed { deleted: 7, resume_token: "ff".to_owned(), ..fresh };
        state::save(&path, &then).unwrap();
        assert_eq!(begun("a", None).unwrap(), then);
        for other in [begun("b", None), begun("a", Some("")), begun("a", Some("z"))] {
            assert!(other.unwrap_err().what.contains("another delete-range"));
        }
    }

    #[test]
    fn an_atomic_one_is_never_gone_on_with() {
        for more in [["--atomic", "--resume", "x"], ["--dry-run", "--resume", "x"]] {
            let line = [&["coracle", "delete-range"], &more[..]].concat();
            assert!(Cli::try_parse_from(line).is_err());
        }
        assert!(args(&["--atomic", "--dry-run", "--yes"]).atomic);
    }
}

//! Owns the flags of the commands that touch data: keys, values, ranges, files of records.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{Encoding, parse_duration};

/// Which keyspace, and how keys and values are written.
#[derive(Clone, Debug, Args)]
pub struct Addressing {
    /// The keyspace (default: the context's, else `default`)
    #[arg(short, long, value_name = "NAME")]
    pub keyspace: Option<String>,
    /// How keys and values are written, here and in the result
    #[arg(long, value_name = "HOW")]
    pub encoding: Option<Encoding>,
}

/// How fresh a read is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Freshness {
    /// Everything that was acknowledged to anybody before.
    Linearizable,
    /// Everything that the session file has seen; any replica serves.
    Session,
    /// Nothing older than --max-staleness; any replica that is fresh enough serves.
    Bounded,
    /// Whatever some replica has.
    Any,
}

/// What commands that follow each other have seen.
#[derive(Clone, Debug, Args)]
pub struct SessionFile {
    /// Keeps what was seen, for the next command with this file: its session reads are not behind
    #[arg(long = "session-file", value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// See [`super::Command::Put`].
#[derive(Debug, Args)]
pub struct Put {
    /// The key
    pub key: String,
    /// The value; - reads standard input, @FILE a file (\x40 is an @ with --encoding escape)
    #[arg(allow_hyphen_values = true)]
    pub value: String,
    /// Where, and how it is written.
    #[command(flatten)]
    pub addressing: Addressing,
    /// Expires after this long: 30s, 12h, 7d
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub ttl: Option<Duration>,
    /// Only when the key is absent
    #[arg(long, group = "condition")]
    pub if_absent: bool,
    /// Only when the key's version is this one
    #[arg(long, value_name = "VERSION", group = "condition")]
    pub if_version: Option<u64>,
    /// Only when the key's value is this one
    #[arg(long, value_name = "VALUE", group = "condition", allow_hyphen_values = true)]
    pub if_value: Option<String>,
    /// What was seen.
    #[command(flatten)]
    pub session: SessionFile,
}

/// See [`super::Command::Get`].
#[derive(Debug, Args)]
pub struct Get {
    /// The key
    pub key: String,
    /// Where, and how it is written.
    #[command(flatten)]
    pub addressing: Addressing,
    /// How fresh the answer must be (default: linearizable; with --session-file, session)
    #[arg(long, value_name = "HOW")]
    pub consistency: Option<Freshness>,
    /// With --consistency bounded: the answer lacks nothing that was acknowledged so long ago: 100ms
    #[arg(long, value_name = "TIME", value_parser = parse_duration, required_if_eq("consistency", "bounded"))]
    pub max_staleness: Option<Duration>,
    /// What was seen.
    #[command(flatten)]
    pub session: SessionFile,
}

/// See [`super::Command::Delete`].
#[derive(Debug, Args)]
pub struct Delete {
    /// The key
    pub key: String,
    /// Where, and how it is written.
    #[command(flatten)]
    pub addressing: Addressing,
    /// Only when the key's version is this one
    #[arg(long, value_name = "VERSION", group = "condition")]
    pub if_version: Option<u64>,
    /// Only when the key's value is this one
    #[arg(long, value_name = "VALUE", group = "condition", allow_hyphen_values = true)]
    pub if_value: Option<String>,
    /// What was seen.
    #[command(flatten)]
    pub session: SessionFile,
}

/// See [`super::Command::Scan`].
#[derive(Debug, Args)]
pub struct Scan {
    /// Only keys that begin with this
    #[arg(long, default_value = "", hide_default_value = true)]
    pub prefix: String,
    /// The first key
    #[arg(long, default_value = "", hide_default_value = true)]
    pub start: String,
    /// The first key behind the range
    #[arg(long)]
    pub end: Option<String>,
    /// At most this many keys
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// From the last key to the first
    #[arg(long)]
    pub reverse: bool,
    /// Without the values
    #[arg(long)]
    pub keys_only: bool,
    /// Where, and how it is written.
    #[command(flatten)]
    pub addressing: Addressing,
}

/// How records stand in a file.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum RecordFormat {
    /// {"key":"a","value":"b"} on a line; {"base64":"…"} in place of a text
    #[default]
    Ndjson,
    /// key, tab, value on a line; \t, \n, \\ and \x00 as escapes
    Tsv,
    /// Debian control records: the key is package/version/architecture (only import)
    Packages,
}

/// See [`super::Command::Import`].
#[derive(Debug, Args)]
pub struct Import {
    /// The file; - is standard input
    pub file: PathBuf,
    /// How records stand in it (default: by the file's name, else ndjson)
    #[arg(long)]
    pub format: Option<RecordFormat>,
    /// The keyspace (default: the context's, else `default`)
    #[arg(short, long, value_name = "NAME")]
    pub keyspace: Option<String>,
    /// Remember here how far it is, and go on from there
    #[arg(long, value_name = "STATE")]
    pub resume: Option<PathBuf>,
    /// Go on behind records that cannot be read
    #[arg(long)]
    pub skip_bad: bool,
    /// At most this many records
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// Records that may be unanswered
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: u16,
}

/// See [`super::Command::Export`].
#[derive(Debug, Args)]
pub struct Export {
    /// The file; - is standard output
    #[arg(default_value = "-")]
    pub file: PathBuf,
    /// Only keys that begin with this
    #[arg(long, default_value = "", hide_default_value = true)]
    pub prefix: String,
    /// How records stand in it (default: by the file's name, else ndjson)
    #[arg(long)]
    pub format: Option<RecordFormat>,
    /// Remember here how far it is, and go on from there
    #[arg(long, value_name = "STATE")]
    pub resume: Option<PathBuf>,
    /// Where, and how the prefix is written.
    #[command(flatten)]
    pub addressing: Addressing,
}

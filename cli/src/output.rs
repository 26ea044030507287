//! The only place that prints. Owns what goes to standard output and what to standard error, tables
//! and JSON, progress, and whether anything may be coloured or redrawn. Does not know commands.
//!
//! Data go to standard output, everything else to standard error: a pipe sees nothing but data.

mod human;
mod progress;
mod table;

use std::io::{self, BufWriter, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::args::{Format, Global, When};
use crate::failure::Failure;

pub use human::{bytes, count, duration, latency};
pub use progress::Progress;
pub use table::{Column, render};

/// Version of what `-o json` prints. Additive only: fields come, none goes.
const API_VERSION: &str = "coracle.cli/v1";

/// Columns where nobody knows better.
const WIDTH_DEFAULT: usize = 80;

/// Where a command's results go. One for the whole process.
pub struct Output {
    format: Format,
    headers: bool,
    verbose: bool,
    colour: bool,
    stdout_terminal: bool,
    stderr_terminal: bool,
    stdout: Mutex<BufWriter<io::Stdout>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a, T> {
    api_version: &'static str,
    kind: &'a str,
    #[serde(flatten)]
    content: T,
}

#[derive(Serialize)]
struct Items<'a, T> {
    items: &'a [T],
}

impl Output {
    /// As the command line asks for it.
    pub fn new(global: &Global) -> Output {
        let stderr_terminal = io::stderr().is_terminal() && !is_dumb();
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Output {
            format: global.output,
            headers: !global.no_headers,
            verbose: global.verbose,
            colour: match global.color {
                When::Always => true,
                When::Never => false,
                When::Auto => stderr_terminal && !no_color,
            },
            stdout_terminal: io::stdout().is_terminal(),
            stderr_terminal,
            stdout: Mutex::new(BufWriter::with_capacity(64 << 10, io::stdout())),
        }
    }

    /// What `-o` says.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether machines read the result.
    pub fn is_json(&self) -> bool {
        matches!(self.format, Format::Json | Format::Jsonl)
    }

    /// Whether a person reads standard output.
    pub fn is_terminal(&self) -> bool {
        self.stdout_terminal
    }

    /// How many columns a picture may take: the terminal's, or as many as every one has.
    pub fn width(&self) -> usize {
        let size = self.stdout_terminal.then(|| rustix::termios::tcgetwinsize(io::stdout()));
        let columns = size.and_then(Result::ok).map_or(0, |size| usize::from(size.ws_col));
        if columns == 0 { WIDTH_DEFAULT } else { columns }
    }

    /// Bytes of standard output, as they are.
    pub fn data(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = self.stdout();
        let written = stdout.write_all(bytes);
        checked(written.and_then(|()| if self.stdout_terminal { stdout.flush() } else { Ok(()) }))
    }

    /// A line of standard output.
    pub fn line(&self, text: &str) -> Result<(), Failure> {
        self.data(format!("{text}\n").as_bytes())
    }

    /// Everything printed so far leaves the process.
    pub fn flush(&self) -> Result<(), Failure> {
        checked(self.stdout().flush())
    }

    /// One result: a document for machines, the given text for people.
    pub fn item<T: Serialize>(
        &self,
        kind: &str,
        item: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Json | Format::Jsonl => self.document(kind, item),
            Format::Table | Format::Wide => self.line(&text()),
        }
    }

    /// A list: a document or lines for machines, a table for people.
    pub fn list<T: Serialize>(
        &self,
        kind: &str,
        columns: &[Column<T>],
        items: &[T],
    ) -> Result<(), Failure> {
        match self.format {
            Format::Json => self.document(kind, &Items { items }),
            Format::Jsonl => items.iter().try_for_each(|item| self.json_line(item)),
            Format::Table | Format::Wide => {
                let wide = self.format == Format::Wide;
                self.data(render(columns, items, wide, self.headers).as_bytes())
            }
        }
    }

    /// One value on a line of its own.
    pub fn json_line<T: Serialize>(&self, item: &T) -> Result<(), Failure> {
        self.line(&json(item)?)
    }

    /// The part before the items of a list that comes item by item; only for `-o json`.
    pub fn list_begin(&self, kind: &str) -> Result<(), Failure> {
        let (version, kind) = (json(&API_VERSION)?, json(&kind)?);
        self.data(format!("{{\"apiVersion\":{version},\"kind\":{kind},\"items\":[").as_bytes())
    }

    /// An item of such a list.
    pub fn list_item<T: Serialize>(&self, is_first: bool, item: &T) -> Result<(), Failure> {
        let separator = if is_first { "" } else { "," };
        self.data(format!("{separator}\n{}", json(item)?).as_bytes())
    }

    /// The part behind them.
    pub fn list_end(&self) -> Result<(), Failure> {
        self.data(b"\n]}\n")
    }

    /// A remark, on standard error.
    pub fn note(&self, text: &str) {
        // Nobody can be told that standard error is gone.
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    /// Says why the command failed, on standard error.
    pub fn failure(&self, failure: &Failure) {
        if failure.what.is_empty() {
            return;
        }
        let head = self.paint("coracle:", "1;31");
        self.note(&format!("{head} {}", failure.what));
        if let Some(details) = failure.details.as_ref().filter(|_| self.verbose) {
            self.note(&format!("  details: {details}"));
        }
        if let Some(next) = &failure.next {
            self.note(&format!("  next: {next}"));
        }
    }

    /// The command line was not understood, or help was asked for: clap's own words.
    pub fn usage(error: &clap::Error) {
        // The same: there is nobody left to tell.
        let _ = error.print();
    }

    /// Shows on standard error how far a long piece of work is.
    pub fn progress(&self) -> Progress {
        Progress::new(self.stderr_terminal)
    }

    /// Text in a colour (an SGR parameter), where colours are wanted.
    pub fn paint(&self, text: &str, sgr: &str) -> String {
        match self.colour {
            true => format!("\x1b[{sgr}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    fn document<T: Serialize>(&self, kind: &str, content: &T) -> Result<(), Failure> {
        self.json_line(&Document { api_version: API_VERSION, kind, content })
    }

    fn stdout(&self) -> MutexGuard<'_, BufWriter<io::Stdout>> {
        // A panic while printing leaves at most half a line.
        self.stdout.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

fn json<T: Serialize + ?Sized>(item: &T) -> Result<String, Failure> {
    serde_json::to_string(item)
        .map_err(|error| Failure::failed(format!("cannot write the result as JSON: {error}")))
}

fn checked(written: io::Result<()>) -> Result<(), Failure> {
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::pipe_closed(),
        _ => Failure::failed(format!("cannot write to standard output: {error}")),
    })
}

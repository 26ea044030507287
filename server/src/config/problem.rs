//! Owns what is said about a bad setting: what is wrong, where it came from, what is allowed, how to
//! mend it. Does not find the problems.

use std::fmt;

/// What kind of mistake it is. Printed, and stable: scripts and searches hold on to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The file is not TOML.
    Syntax,
    /// There is no such key or section.
    UnknownKey,
    /// A number where a text stands, and the like.
    Type,
    /// A duration or size without its unit.
    Unit,
    /// Of the right type, but not understood.
    Form,
    /// Too small or too large.
    Range,
    /// Raft's times do not fit to each other.
    RaftTiming,
    /// Two listeners on one port.
    PortsClash,
    /// It would listen beyond this machine without protection.
    Insecure,
    /// Others could not dial what the node says of itself.
    Advertise,
    /// The budgets take more memory than there is to take.
    Memory,
    /// The log's sizes do not fit to each other.
    LogSizes,
}

impl Code {
    /// As printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::Syntax => "SYNTAX",
            Code::UnknownKey => "UNKNOWN_KEY",
            Code::Type => "TYPE",
            Code::Unit => "UNIT",
            Code::Form => "FORM",
            Code::Range => "RANGE",
            Code::RaftTiming => "RAFT_TIMING",
            Code::PortsClash => "PORTS_CLASH",
            Code::Insecure => "INSECURE",
            Code::Advertise => "ADVERTISE",
            Code::Memory => "MEMORY",
            Code::LogSizes => "LOG_SIZES",
        }
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything; computed from the machine where the default is a share of it.
    Default,
    /// The file.
    File {
        /// Its path as it was given.
        path: String,
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
    },
    /// An environment variable.
    Env {
        /// Its name.
        name: String,
    },
    /// What a command was asked about.
    Argument,
    /// The command line.
    Flag {
        /// As it was written: `--data-dir`, `--set raft.heartbeat_interval`.
        flag: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line, column } => write!(f, "{path}:{line}:{column}"),
            Origin::Env { name } => write!(f, "environment variable {name}"),
            Origin::Argument => f.write_str("argument"),
            Origin::Flag { flag } => write!(f, "flag {flag}"),
        }
    }
}

/// The line of the file that a problem is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// The whole line.
    pub line: String,
    /// Characters before the part that is meant.
    pub before: usize,
    /// Characters of that part, within the line.
    pub len: usize,
}

/// One thing that is wrong with the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The kind of mistake.
    pub code: Code,
    /// What is wrong, beginning with the key where there is one.
    pub what: String,
    /// Where the value came from.
    pub origin: Origin,
    /// The file's line.
    pub excerpt: Option<Excerpt>,
    /// What is allowed instead. Empty when that says nothing.
    pub allowed: String,
    /// How to mend it.
    pub mend: String,
}

impl fmt::Display for Problem {
    /// Several lines, the last without its end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}\n  --> {}", self.code.as_str(), self.what, self.origin)?;
        if let (Some(excerpt), Origin::File { line, .. }) = (&self.excerpt, &self.origin) {
            let margin = " ".repeat(line.to_string().len());
            let (before, marks) = (" ".repeat(excerpt.before), "^".repeat(excerpt.len.max(1)));
            // Tabs would move the marks away from what they mark.
            let text = excerpt.line.replace('\t', " ");
            write!(f, "\n {margin} |\n {line} | {text}\n {margin} | {before}{marks}")?;
        }
        if !self.allowed.is_empty() {
            write!(f, "\n  allowed: {}", self.allowed)?;
        }
        write!(f, "\n  mend:    {}", self.mend)
    }
}

impl std::error::Error for Problem {}

/// What is wrong with a value, before it is known where the value stands.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) code: Code,
    pub(super) what: String,
    pub(super) mend: String,
}

impl Fault {
    pub(super) fn new(code: Code, what: impl Into<String>, mend: impl Into<String>) -> Fault {
        Fault { code, what: what.into(), mend: mend.into() }
    }
}

//! Owns the kinds of settings: how each is written, what it allows, how it is shown. Does not know
//! which settings there are, nor where a value came from.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::problem::{Code, Fault};

/// A place that others can dial: a name or an IP address, and a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// Reads `name:7400`, `10.0.0.1:7400` or `[::1]:7400`. The error says what is wrong, in words.
    pub fn parse(text: &str) -> Result<Address, String> {
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err("it has no port".to_owned());
        };
        let port = match port.parse::<u16>() {
            Ok(port) if port > 0 => port,
            _ => return Err(format!("{port:?} is not a port from 1 to 65535")),
        };
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let named = |host: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
            !host.is_empty() && host.len() <= 253 && host.bytes().all(allowed)
        };
        let host = match bracketed {
            Some(inside) if inside.parse::<std::net::Ipv6Addr>().is_ok() => inside,
            None if named(host) => host,
            None if host.contains(':') => {
                return Err("an IPv6 address stands in brackets: [::1]:7400".to_owned());
            }
            _ => return Err(format!("{host:?} is neither a host name nor an IP address")),
        };
        Ok(Address { host: host.to_owned(), port })
    }

    /// The name or the IP address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, never 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The IP address, when it is one and no name.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        Address { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// How a setting is written and what it allows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// A directory.
    Directory,
    /// A short name that travels in labels and on command lines.
    Name,
    /// Directives `level` or `target=level`, separated by commas.
    LogFilter,
    /// One of these words.
    Choice(&'static [&'static str]),
    Bool,
    Count(u64, u64),
    Bytes(u64, u64),
    Span(Duration, Duration),
    /// An IP address and a port to bind; port 0 takes a free one.
    Listen,
    /// A place to dial.
    Address,
    Addresses,
}

/// A setting's value, checked against its kind.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Bool(bool),
    Count(u64),
    Bytes(u64),
    Span(Duration),
    Listen(SocketAddr),
    Address(Address),
    Addresses(Vec<Address>),
    /// Left to be derived at run time.
    Unset,
}

/// A value as somebody wrote it.
#[derive(Clone, Debug)]
pub(super) enum Raw<'a> {
    /// A variable's or a flag's: its kind is not to be seen from how it is written.
    Word(&'a str),
    /// The file's: typed.
    Text(&'a str),
    Number(String),
    Bool(bool),
    List(Vec<Raw<'a>>),
    /// Something that no setting is: a date, a table.
    Other(&'static str),
}

impl fmt::Display for Raw<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Raw::Word(text) | Raw::Text(text) => write!(f, "{text:?}"),
            Raw::Number(number) => f.write_str(number),
            Raw::Bool(bool) => write!(f, "{bool}"),
            Raw::List(_) => f.write_str("a list"),
            Raw::Other(what) => f.write_str(what),
        }
    }
}

const SIZE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

const TIME_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// The longest name of a zone: it stands in every answer about nodes and in metric labels.
const NAME_BYTES_MAX: usize = 64;

impl Kind {
    /// Reads a value, or says what is wrong with it.
    pub(super) fn read(&self, raw: &Raw<'_>) -> Result<Value, Fault> {
        match (self, raw) {
            (Kind::Bool, Raw::Bool(bool)) => Ok(Value::Bool(*bool)),
            (Kind::Bool, Raw::Word("true")) => Ok(Value::Bool(true)),
            (Kind::Bool, Raw::Word("false")) => Ok(Value::Bool(false)),
            (Kind::Count(min, max), Raw::Number(text)) => count(text, raw, *min, *max),
            (Kind::Count(min, max), Raw::Word(text)) => count(text, raw, *min, *max),
            (Kind::Bytes(min, max), Raw::Text(text) | Raw::Word(text)) => {
                let bytes = measure(text, &SIZE_UNITS, SIZE_EXAMPLE)?;
                within(bytes, *min, *max, show_bytes).map(Value::Bytes)
            }
            (Kind::Span(min, max), Raw::Text(text) | Raw::Word(text)) => {
                let ms = measure(text, &TIME_UNITS, TIME_EXAMPLE)?;
                let (min, max) = (min.as_millis() as u64, max.as_millis() as u64);
                let ms = within(ms, min, max, show_ms)?;
                Ok(Value::Span(Duration::from_millis(ms)))
            }
            (Kind::Bytes(..), Raw::Number(number)) => Err(no_unit(number, SIZE_EXAMPLE)),
            (Kind::Span(..), Raw::Number(number)) => Err(no_unit(number, TIME_EXAMPLE)),
            (Kind::Addresses, Raw::List(items)) => addresses(items.iter().map(|item| match item {
                Raw::Text(text) => Ok(*text),
                other => Err(other),
            })),
            (Kind::Addresses, Raw::Word(text)) => {
                let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
                addresses(parts.map(Ok))
            }
            (_, Raw::Text(text) | Raw::Word(text)) => self.read_text(text),
            _ => Err(self.wrong_type(raw)),
        }
    }

    fn read_text(&self, text: &str) -> Result<Value, Fault> {
        let text_value = || Value::Text(text.to_owned());
        match self {
            Kind::Directory if text.trim().is_empty() => Err(Fault::new(
                Code::Form,
                "is empty",
                "name a directory, or leave the key out for the default",
            )),
            Kind::Directory => Ok(text_value()),
            Kind::Name if is_name(text) => Ok(text_value()),
            Kind::Name => Err(Fault::new(
                Code::Form,
                format!("{text:?} is not a name"),
                "use letters, digits, '.', '_' and '-', for example \"eu-1a\"",
            )),
            Kind::LogFilter => log_filter(text).map(|()| text_value()),
            Kind::Choice(words) if words.contains(&text) => Ok(text_value()),
            Kind::Choice(words) => {
                let mend = match super::suggest::nearest(text, words.iter().copied()) {
                    Some(word) => format!("did you mean {word:?}?"),
                    None => format!("write one of {}", quoted(words)),
                };
                Err(Fault::new(Code::Form, format!("{text:?} is not known"), mend))
            }
            Kind::Listen => match text.parse::<SocketAddr>() {
                Ok(address) => Ok(Value::Listen(address)),
                Err(_) => Err(listen_fault(text)),
            },
            Kind::Address => address(text).map(Value::Address),
            Kind::Bool | Kind::Count(..) | Kind::Bytes(..) | Kind::Span(..) | Kind::Addresses => {
                Err(self.wrong_type(&Raw::Text(text)))
            }
        }
    }

    fn wrong_type(&self, raw: &Raw<'_>) -> Fault {
        let form = match self {
            Kind::Bool => "write true or false",
            Kind::Count(..) => "write a whole number without quotes",
            Kind::Bytes(..) => SIZE_EXAMPLE,
            Kind::Span(..) => TIME_EXAMPLE,
            Kind::Addresses => "write a list of \"host:port\", for example [\"n1:7500\"]",
            _ => "write a text in quotes",
        };
        Fault::new(Code::Type, format!("{raw} is not {}", self.noun()), form)
    }

    /// What it is, with its article.
    pub(super) fn noun(&self) -> &'static str {
        match self {
            Kind::Directory => "a directory",
            Kind::Name => "a name",
            Kind::LogFilter => "a log filter",
            Kind::Choice(_) => "one of its words",
            Kind::Bool => "true or false",
            Kind::Count(..) => "a number",
            Kind::Bytes(..) => "a size",
            Kind::Span(..) => "a duration",
            Kind::Listen => "an IP address and a port",
            Kind::Address => "an address",
            Kind::Addresses => "a list of addresses",
        }
    }

    /// What it allows, in words.
    pub(super) fn allowed(&self) -> String {
        match self {
            Kind::Directory => {
                "a directory, relative ones from where the node is started".to_owned()
            }
            Kind::Name => {
                format!("1 to {NAME_BYTES_MAX} bytes of letters, digits, '.', '_' and '-'")
            }
            Kind::LogFilter => {
                "directives \"level\" or \"target=level\", separated by commas; levels are off, \
                 error, warn, info, debug, trace"
                    .to_owned()
            }
            Kind::Choice(words) => quoted(words),
            Kind::Bool => "true or false".to_owned(),
            Kind::Count(min, max) => format!("a whole number from {min} to {max}"),
            Kind::Bytes(min, max) => {
                format!("a size from {} to {}", show_bytes(*min), show_bytes(*max))
            }
            Kind::Span(min, max) => {
                let ms = |span: &Duration| show_ms(span.as_millis() as u64);
                format!("a duration from {} to {}", ms(min), ms(max))
            }
            Kind::Listen => "\"ip:port\"; port 0 takes any free one".to_owned(),
            Kind::Address => "\"host:port\" as other machines dial it".to_owned(),
            Kind::Addresses => "a list of \"host:port\"".to_owned(),
        }
    }
}

const SIZE_EXAMPLE: &str =
    "write a whole number and B, KiB, MiB, GiB or TiB, for example \"64MiB\"";
const TIME_EXAMPLE: &str = "write a whole number and ms, s, m or h, for example \"80ms\"";

impl fmt::Display for Value {
    /// As in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // toml's own writer, for what needs escaping.
            Value::Text(text) => write!(f, "{}", toml::Value::from(text.as_str())),
            Value::Bool(bool) => write!(f, "{bool}"),
            Value::Count(count) => write!(f, "{count}"),
            Value::Bytes(bytes) => write!(f, "\"{}\"", show_bytes(*bytes)),
            Value::Span(span) => write!(f, "\"{}\"", show_ms(span.as_millis() as u64)),
            Value::Listen(address) => write!(f, "\"{address}\""),
            Value::Address(address) => write!(f, "\"{address}\""),
            Value::Addresses(list) => {
                let list: Vec<String> = list.iter().map(|item| format!("\"{item}\"")).collect();
                write!(f, "[{}]", list.join(", "))
            }
            Value::Unset => Ok(()),
        }
    }
}

/// `67108864` → `64MiB`: the largest unit that is exact.
pub(super) fn show_bytes(bytes: u64) -> String {
    show(bytes, &SIZE_UNITS, "B")
}

/// `90000` → `90s`: the largest unit that is exact.
pub(super) fn show_ms(ms: u64) -> String {
    show(ms, &TIME_UNITS, "ms")
}

fn show(amount: u64, units: &[(&str, u64)], zero: &str) -> String {
    let exact = units.iter().find(|(_, unit)| amount >= *unit && amount.is_multiple_of(*unit));
    match exact {
        Some((name, unit)) => format!("{}{name}", amount / unit),
        None => format!("{amount}{zero}"),
    }
}

/// A whole number with one of these units.
fn measure(text: &str, units: &[(&str, u64)], example: &str) -> Result<u64, Fault> {
    let text = text.trim();
    let end = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = (&text[..end], text[end..].trim_start());
    if !number.is_empty() && unit.is_empty() {
        return Err(no_unit(number, example));
    }
    let form = |mend: String| Fault::new(Code::Form, format!("{text:?} is not understood"), mend);
    if number.is_empty() {
        return Err(form(example.to_owned()));
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        // "64MB", "64mib", "150MS": say what was likely meant.
        let start = |name: &str| name.bytes().next().map(|byte| byte.to_ascii_lowercase());
        let meant = units
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))
            .or_else(|| units.iter().find(|(name, _)| start(name) == start(unit)));
        return Err(form(match meant {
            Some((name, _)) => format!("did you mean \"{number}{name}\"?"),
            None => example.to_owned(),
        }));
    };
    let amount = number.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor));
    amount.ok_or_else(|| Fault::new(Code::Range, format!("{text:?} is too large"), example))
}

fn no_unit(number: &str, example: &str) -> Fault {
    Fault::new(Code::Unit, format!("{number} has no unit"), example)
}

fn count(text: &str, raw: &Raw<'_>, min: u64, max: u64) -> Result<Value, Fault> {
    let digits: String = text.chars().filter(|char| *char != '_').collect();
    match digits.parse::<u64>() {
        Ok(count) => within(count, min, max, |count| count.to_string()).map(Value::Count),
        Err(_) => Err(Fault::new(
            Code::Type,
            format!("{raw} is not a whole number"),
            "write a whole number without quotes",
        )),
    }
}

fn within(got: u64, min: u64, max: u64, show: impl Fn(u64) -> String) -> Result<u64, Fault> {
    if (min..=max).contains(&got) {
        return Ok(got);
    }
    let (side, bound) = if got < min { ("small", min) } else { ("large", max) };
    Err(Fault::new(
        Code::Range,
        format!("{} is too {side}", show(got)),
        format!("write {}, or leave the key out for the default", show(bound)),
    ))
}

fn address(text: &str) -> Result<Address, Fault> {
    Address::parse(text).map_err(|why| {
        Fault::new(
            Code::Form,
            format!("{text:?} is not an address: {why}"),
            "write \"host:port\", for example \"n1.example.org:7500\"",
        )
    })
}

fn addresses<'r, 'a: 'r>(
    items: impl Iterator<Item = Result<&'a str, &'r Raw<'a>>>,
) -> Result<Value, Fault> {
    let read = |item: Result<&str, &Raw<'_>>| match item {
        Ok(text) => address(text),
        Err(other) => Err(Kind::Addresses.wrong_type(other)),
    };
    items.map(read).collect::<Result<Vec<Address>, Fault>>().map(Value::Addresses)
}

fn listen_fault(text: &str) -> Fault {
    let what = format!("{text:?} is not an IP address and a port");
    let mend = match text.rsplit_once(':') {
        Some(("", port)) => format!("write \"127.0.0.1:{port}\", or \"0.0.0.0:{port}\" for all"),
        Some(("localhost", port)) => format!("write \"127.0.0.1:{port}\""),
        _ => "write the address of an interface of this machine, for example \"127.0.0.1:7400\""
            .to_owned(),
    };
    Fault::new(Code::Form, what, mend)
}

fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed)
}

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The subscriber reads a lone word that is no level as a target at full detail; here it is far more
/// likely a level with a typing error.
fn log_filter(text: &str) -> Result<(), Fault> {
    for directive in text.split(',').map(str::trim) {
        let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level);
        if LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            continue;
        }
        let mend = match super::suggest::nearest(level, LEVELS.iter().copied()) {
            Some(meant) => format!("did you mean {meant:?}?"),
            None if directive.contains('=') => format!("write one of {}", quoted(&LEVELS)),
            None => format!("write a level, or \"{directive}=debug\""),
        };
        return Err(Fault::new(Code::Form, format!("{level:?} is not a log level"), mend));
    }
    Ok(())
}

fn quoted(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
    words.join(", ")
}

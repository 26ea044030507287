//! Owns records in files: where one ends and the next begins, and what each says. Three forms: NDJSON,
//! TSV, Debian control records. Reads bytes in order, sends nothing.

use std::io::{self, BufRead};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::args::RecordFormat;
use crate::encoding::{Text, escape, unescape};

/// The longest record: a value of 1 MiB whose every byte is written `\u0000`, and a key. A longer one
/// is bad, and is skipped without being held in memory.
pub const RECORD_BYTES_MAX: usize = 8 << 20;

/// A key and its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// The key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
    /// How long it lives.
    pub lifetime: Lifetime,
}

/// How long a record lives.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Lifetime {
    /// For ever.
    #[default]
    Forever,
    /// From when it is written.
    For(Duration),
    /// Until then, in milliseconds since 1970.
    UntilMs(u64),
}

/// One record of the file, read or not.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    /// Its first line, from 1.
    pub line: u64,
    /// Where the next one begins.
    pub end: Position,
    /// What it says, or why that cannot be read.
    pub record: Result<Record, String>,
}

/// A place between two records.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Bytes before it.
    pub offset: u64,
    /// Lines before it.
    pub lines: u64,
}

/// The records of a file, in order. Empty lines are passed over.
pub struct Records<R> {
    reader: R,
    format: RecordFormat,
    position: Position,
    line: Vec<u8>,
}

/// A line that was read.
enum Line {
    /// It stands in the buffer, without its end.
    Whole,
    /// It was too long to be held.
    TooLong,
    /// There is none.
    End,
}

impl<R: BufRead> Records<R> {
    /// `reader` stands at `position`.
    pub fn new(reader: R, format: RecordFormat, position: Position) -> Records<R> {
        Records { reader, format, position, line: Vec::new() }
    }

    /// Reads the next line into the buffer.
    fn read_line(&mut self) -> io::Result<Line> {
        self.line.clear();
        let mut any = false;
        let mut too_long = false;
        loop {
            let available = self.reader.fill_buf()?;
            if available.is_empty() {
                break;
            }
            any = true;
            let end = available.iter().position(|byte| *byte == b'\n');
            let used = end.map_or(available.len(), |at| at + 1);
            let text = &available[..end.unwrap_or(used)];
            match self.line.len() + text.len() <= RECORD_BYTES_MAX {
                true => self.line.extend_from_slice(text),
                false => too_long = true,
            }
            self.reader.consume(used);
            self.position.offset += used as u64;
            if end.is_some() {
                break;
            }
        }
        if !any {
            return Ok(Line::End);
        }
        self.position.lines += 1;
        if self.line.last() == Some(&b'\r') {
            self.line.pop();
        }
        Ok(if too_long { Line::TooLong } else { Line::Whole })
    }

    fn next_line_record(&mut self) -> io::Result<Option<Step>> {
        loop {
            let line = self.position.lines + 1;
            let record = match self.read_line()? {
                Line::End => return Ok(None),
                Line::TooLong => Err(too_long()),
                Line::Whole if self.line.iter().all(u8::is_ascii_whitespace) => continue,
                Line::Whole => match self.format {
                    RecordFormat::Tsv => tsv(&self.line),
                    _ => ndjson(&self.line),
                },
            };
            return Ok(Some(Step { line, end: self.position, record }));
        }
    }

    /// A control record goes to the next empty line.
    fn next_package(&mut self) -> io::Result<Option<Step>> {
        let mut text = Vec::new();
        let mut first = None;
        let mut is_too_long = false;
        loop {
            let line = self.position.lines + 1;
            match self.read_line()? {
                Line::End if first.is_none() => return Ok(None),
                Line::End => break,
                Line::Whole if self.line.iter().all(u8::is_ascii_whitespace) => {
                    if first.is_some() {
                        break;
                    }
                    continue;
                }
                Line::Whole if text.len() + self.line.len() < RECORD_BYTES_MAX => {
                    text.extend_from_slice(&self.line);
                    text.push(b'\n');
                }
                Line::Whole | Line::TooLong => is_too_long = true,
            }
            first.get_or_insert(line);
        }
        let record = if is_too_long { Err(too_long()) } else { package(text) };
        Ok(first.map(|line| Step { line, end: self.position, record }))
    }
}

impl<R: BufRead> Iterator for Records<R> {
    type Item = io::Result<Step>;

    fn next(&mut self) -> Option<io::Result<Step>> {
        match self.format {
            RecordFormat::Packages => self.next_package(),
            _ => self.next_line_record(),
        }
        .transpose()
    }
}

fn too_long() -> String {
    format!("the record is longer than {} MiB", RECORD_BYTES_MAX >> 20)
}

/// A key or value in JSON: a text, or one of the two objects.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Plain(String),
    Object(Text),
}

impl Written {
    fn into_bytes(self) -> Result<Bytes, String> {
        match self {
            Written::Plain(text) => Ok(Bytes::from(text)),
            Written::Object(text) => text.into_bytes().map(Bytes::from),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NdjsonLine {
    key: serde_json::Value,
    value: serde_json::Value,
    ttl_ms: Option<u64>,
    expires_at_ms: Option<u64>,
}

fn ndjson(line: &[u8]) -> Result<Record, String> {
    let parsed: NdjsonLine =
        serde_json::from_slice(line).map_err(|error| format!("not a record: {error}"))?;
    let bytes = |name: &str, value: serde_json::Value| -> Result<Bytes, String> {
        // The untagged enum's own message names neither the field nor what is allowed.
        let written: Written = serde_json::from_value(value).map_err(|_| {
            format!("{name} must be a string, {{\"utf8\":\"…\"}} or {{\"base64\":\"…\"}}")
        })?;
        written.into_bytes().map_err(|error| format!("{name}: {error}"))
    };
    let lifetime = match (parsed.ttl_ms, parsed.expires_at_ms) {
        (None, None) => Lifetime::Forever,
        (Some(0), None) => return Err("ttl_ms is 0: leave it out to keep for ever".to_owned()),
        (Some(ms), None) => Lifetime::For(Duration::from_millis(ms)),
        (None, Some(ms)) => Lifetime::UntilMs(ms),
        (Some(_), Some(_)) => return Err("ttl_ms and expires_at_ms exclude each other".to_owned()),
    };
    Ok(Record { key: bytes("key", parsed.key)?, value: bytes("value", parsed.value)?, lifetime })
}

fn tsv(line: &[u8]) -> Result<Record, String> {
    let mut columns = line.split(|byte| *byte == b'\t');
    let (key, value, expires) = (columns.next(), columns.next(), columns.next());
    let (Some(key), Some(value), None) = (key, value, columns.next()) else {
        return Err("a record is key, tab, value, and maybe tab, expires_at_ms".to_owned());
    };
    let lifetime = match expires {
        None => Lifetime::Forever,
        Some(text) => {
            let ms = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
            Lifetime::UntilMs(ms.ok_or("the third column is not a time in milliseconds")?)
        }
    };
    let bytes = |name: &str, text: &[u8]| {
        unescape(text).map(Bytes::from).map_err(|error| format!("{name}: {error}"))
    };
    Ok(Record { key: bytes("key", key)?, value: bytes("value", value)?, lifetime })
}

fn package(text: Vec<u8>) -> Result<Record, String> {
    let field = |name: &str| -> Result<String, String> {
        let line = text.split(|byte| *byte == b'\n').find_map(|line| {
            let (field, value) = line.split_at(line.iter().position(|byte| *byte == b':')?);
            // Lines that continue a field begin with a space and so never have its name.
            field.eq_ignore_ascii_case(name.as_bytes()).then(|| value[1..].trim_ascii())
        });
        let value = line.filter(|value| !value.is_empty());
        let value = value.and_then(|value| std::str::from_utf8(value).ok());
        value.map(str::to_owned).ok_or_else(|| format!("the record has no field {name}"))
    };
    let key = format!("{}/{}/{}", field("Package")?, field("Version")?, field("Architecture")?);
    Ok(Record { key: Bytes::from(key), value: Bytes::from(text), lifetime: Lifetime::Forever })
}

/// A record as it stands in a file, with the end of its line. What [`Records`] reads back.
pub fn write(format: RecordFormat, key: &[u8], value: &[u8], expires_at_ms: Option<u64>) -> String {
    #[derive(Serialize)]
    struct Line {
        key: Text,
        value: Text,
        #[serde(skip_serializing_if = "Option::is_none")]
        expires_at_ms: Option<u64>,
    }
    match format {
        RecordFormat::Tsv => {
            let expires = expires_at_ms.map(|ms| format!("\t{ms}")).unwrap_or_default();
            format!("{}\t{}{expires}\n", escape(key), escape(value))
        }
        RecordFormat::Ndjson | RecordFormat::Packages => {
            let line = Line { key: Text::of(key), value: Text::of(value), expires_at_ms };
            let json = serde_json::to_string(&line).expect("texts and a number are always JSON");
            format!("{json}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(format: RecordFormat, text: &[u8]) -> Vec<Step> {
        // A buffer of three bytes: every boundary falls everywhere.
        let reader = io::BufReader::with_capacity(3, text);
        Records::new(reader, format, Position::default()).map(Result::unwrap).collect()
    }

    fn record(key: &[u8], value: &[u8]) -> Record {
        let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        Record { key, value, lifetime: Lifetime::Forever }
    }

    #[test]
    fn ndjson_in_all_its_forms() {
        let text = b"{\"key\":\"a\",\"value\":\"b\\n\"}\r\n\n\
            {\"key\":{\"utf8\":\"\xc3\xa4\"},\"value\":{\"base64\":\"/wA=\"}}\n\
            {\"key\":\"t\",\"value\":\"\",\"ttl_ms\":5}";
        let steps = read(RecordFormat::Ndjson, text);
        assert_eq!(steps[0].record, Ok(record(b"a", b"b\n")));
        assert_eq!(steps[1].record, Ok(record("ä".as_bytes(), b"\xff\0")));
        let third = steps[2].record.as_ref().unwrap();
        assert_eq!(third.lifetime, Lifetime::For(Duration::from_millis(5)));
        assert_eq!(steps.iter().map(|step| step.line).collect::<Vec<_>>(), [1, 3, 4]);
        assert_eq!(steps[2].end, Position { offset: text.len() as u64, lines: 4 });
    }

    #[test]
    fn bad_lines_say_why_and_the_next_is_read() {
        for (line, why) in [
            ("{", "not a record"),
            ("{\"key\":\"a\"}", "value"),
            ("{\"key\":1,\"value\":\"b\"}", "key must be"),
            ("{\"key\":\"a\",\"value\":{\"base64\":\"!\"}}", "value: "),
            ("{\"key\":\"a\",\"value\":\"b\",\"ttl\":1}", "ttl"),
            ("{\"key\":\"a\",\"value\":\"b\",\"ttl_ms\":0}", "ttl_ms"),
            ("{\"key\":\"a\",\"value\":\"b\",\"ttl_ms\":1,\"expires_at_ms\":1}", "exclude"),
        ] {
            let steps = read(
                RecordFormat::Ndjson,
                format!("{line}\n{{\"key\":\"a\",\"value\":\"b\"}}\n").as_bytes(),
            );
            let error = steps[0].record.as_ref().unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
            assert_eq!((steps.len(), &steps[1].record), (2, &Ok(record(b"a", b"b"))));
        }
        for (line, why) in
            [("a", "tab"), ("a\tb\tc", "third"), ("a\tb\t1\t2", "tab"), ("\\q\tb", "key: ")]
        {
            let steps = read(RecordFormat::Tsv, line.as_bytes());
            let error = steps[0].record.as_ref().unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn a_record_that_is_too_long_is_passed_over() {
        let mut text = vec![b'x'; RECORD_BYTES_MAX + 1];
        text.extend(b"\na\tb\n");
        let reader = io::BufReader::new(&text[..]);
        let steps: Vec<Step> = Records::new(reader, RecordFormat::Tsv, Position::default())
            .map(Result::unwrap)
            .collect();
        assert!(steps[0].record.as_ref().unwrap_err().contains("longer"));
        assert_eq!(steps[1].record, Ok(record(b"a", b"b")));
    }

    #[test]
    fn packages_are_control_records() {
        let text = b"\nPackage: bash\nVersion: 5.2-1\nArchitecture: amd64\nDescription: shell\n \
            Package: no\n\n\nPackage: x\nVersion: 1\n\nPackage: y\nVersion: 2\nArchitecture: all";
        let steps = read(RecordFormat::Packages, text);
        assert_eq!(steps.len(), 3);
        let bash = steps[0].record.as_ref().unwrap();
        assert_eq!(bash.key, "bash/5.2-1/amd64");
        assert_eq!(
            bash.value,
            "Package: bash\nVersion: 5.2-1\nArchitecture: amd64\nDescription: shell\n Package: no\n"
        );
        assert_eq!(steps[1].record, Err("the record has no field Architecture".to_owned()));
        assert_eq!(steps[1].line, 9);
        assert_eq!(steps[2].record.as_ref().unwrap().key, "y/2/all");
        assert_eq!(steps[2].end.offset, text.len() as u64);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let all: Vec<u8> = (0..=255).collect();
        for format in [RecordFormat::Ndjson, RecordFormat::Tsv] {
            let mut text = write(format, &all, b"", None);
            text.push_str(&write(format, "ä\t".as_bytes(), &all, Some(7)));
            let steps = read(format, text.as_bytes());
            assert_eq!(steps[0].record, Ok(record(&all, b"")));
            let expected =
                Record { lifetime: Lifetime::UntilMs(7), ..record("ä\t".as_bytes(), &all) };
            assert_eq!(steps[1].record, Ok(expected));
        }
    }

    #[test]
    fn reading_goes_on_from_any_end() {
        let text = b"a\t1\n\nb\t2\nc\t3\n";
        let whole = read(RecordFormat::Tsv, text);
        for (at, step) in whole.iter().enumerate() {
            let rest = &text[step.end.offset as usize..];
            let again: Vec<Step> =
                Records::new(rest, RecordFormat::Tsv, step.end).map(Result::unwrap).collect();
            assert_eq!(again, whole[at + 1..]);
        }
    }
}

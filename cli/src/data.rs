//! Owns the data commands: put, get, delete, scan. Does not know files of records (see `import` and
//! `export`).

use std::io::Read;
use std::path::Path;

use bytes::Bytes;
use coracle_client::{
    Cas, Client, Consistency, Entry, KeyValue, Keyspace, SessionMark, Version, Written,
};
use futures_util::TryStreamExt;
use serde::Serialize;

use crate::args::{Addressing, Delete, Encoding, Format, Freshness, Get, Global, Put, Scan};
use crate::context::{Environment, Target, resolve};
use crate::encoding::{self, Text};
use crate::failure::{Exit, Failure};
use crate::output::{Output, bytes};
use crate::state;

/// The longest value that is read from a file or a pipe: far beyond what a server takes, so that the
/// server's limit is what people hear of, and not the whole of an endless pipe.
const VALUE_BYTES_MAX: u64 = 64 << 20;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EntryView {
    key: Text,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Text>,
    /// A text: it is beyond what JavaScript and jq hold exactly.
    version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at_ms: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WrittenView {
    key: Text,
    version: String,
    shard: u64,
    node: u64,
    term: u64,
    index: u64,
}

/// Where a command's keys live, and the session that it goes on with.
struct Place<'a> {
    client: Client,
    keyspace: Keyspace,
    addressing: &'a Addressing,
    session: Option<&'a Path>,
}

impl<'a> Place<'a> {
    async fn new(
        global: &Global,
        addressing: &'a Addressing,
        session: Option<&'a Path>,
    ) -> Result<Place<'a>, Failure> {
        let target = resolve(global, &Environment::read())?;
        // Before anything is asked: a file that is no session's changes nothing.
        let mark = session.map(state::load::<Text>).transpose()?.flatten();
        let client = target.client(global).await?;
        if let (Some(mark), Some(path)) = (mark, session) {
            let mark = mark.into_bytes().map(SessionMark::from_bytes);
            let taken = mark.and_then(|mark| client.take_in(&mark).map_err(|e| e.to_string()));
            taken.map_err(|error| {
                Failure::failed(format!("{} is no session's: {error}", path.display()))
                    .next("name another file, or remove it to begin anew")
            })?;
        }
        let keyspace = client.keyspace(keyspace_name(&target, addressing.keyspace.as_deref()));
        Ok(Place { client, keyspace, addressing, session })
    }

    /// Keeps what was seen, for the next command.
    fn keep_session(&self) -> Result<(), Failure> {
        let Some(path) = self.session else { return Ok(()) };
        state::save(path, &Text::of(self.client.session_mark().as_bytes()))
    }

    fn bytes(&self, what: &str, text: &str) -> Result<Bytes, Failure> {
        decode(self.addressing, what, text)
    }

    /// A key in a message.
    fn quoted(&self, key: &[u8]) -> String {
        format!("\"{}\"", encoding::escape(key))
    }
}

/// The keyspace that a command means: the flag's, the context's, `default`.
pub fn keyspace_name(target: &Target, flag: Option<&str>) -> String {
    flag.or(target.keyspace.as_deref()).unwrap_or("default").to_owned()
}

/// The bytes that an argument means.
pub fn decode(addressing: &Addressing, what: &str, text: &str) -> Result<Bytes, Failure> {
    let encoding = addressing.encoding.unwrap_or(Encoding::Utf8);
    let bytes = encoding::decode(encoding, text);
    bytes.map(Bytes::from).map_err(|error| Failure::usage(format!("{what}: {error}")))
}

/// `coracle put`.
pub async fn put(put: Put, global: &Global, output: &Output) -> Result<(), Failure> {
    // Before anything is asked: a value that cannot be read writes nothing.
    let value = value(&put)?;
    let place = Place::new(global, &put.addressing, put.session.file.as_deref()).await?;
    let key = place.bytes("KEY", &put.key)?;
    let mut call = place.keyspace.put(key.clone(), value);
    if let Some(ttl) = put.ttl {
        call = call.ttl(ttl);
    }
    let outcome = if put.if_absent {
        call.if_absent().await
    } else if let Some(version) = put.if_version {
        call.if_version(Version(version)).await
    } else if let Some(value) = &put.if_value {
        call.if_value(place.bytes("--if-value", value)?).await
    } else {
        call.await.map(Cas::Applied)
    };
    place.keep_session()?;
    let what = format!("write {}", place.quoted(&key));
    report(&what, &key, outcome, "written", output)
}

/// `coracle delete`.
pub async fn delete(delete: Delete, global: &Global, output: &Output) -> Result<(), Failure> {
    let place = Place::new(global, &delete.addressing, delete.session.file.as_deref()).await?;
    let key = place.bytes("KEY", &delete.key)?;
    let call = place.keyspace.delete(key.clone());
    let outcome = if let Some(version) = delete.if_version {
        call.if_version(Version(version)).await
    } else if let Some(value) = &delete.if_value {
        call.if_value(place.bytes("--if-value", value)?).await
    } else {
        call.await.map(Cas::Applied)
    };
    place.keep_session()?;
    let what = format!("delete {}", place.quoted(&key));
    report(&what, &key, outcome, "deleted", output)
}

fn consistency(get: &Get) -> Result<Consistency, Failure> {
    Ok(match (get.consistency, get.max_staleness, &get.session.file) {
        (Some(Freshness::Bounded), Some(bound), _) => Consistency::Bounded(bound),
        (Some(Freshness::Bounded), None, _) => {
            return Err(Failure::usage("--consistency bounded needs --max-staleness"));
        }
        (_, Some(_), _) => {
            return Err(Failure::usage("--max-staleness goes with --consistency bounded"));
        }
        (Some(Freshness::Session), None, _) | (None, None, Some(_)) => Consistency::Session,
        (Some(Freshness::Any), None, _) => Consistency::Any,
        (Some(Freshness::Linearizable), None, _) | (None, None, None) => Consistency::Linearizable,
    })
}

/// `coracle get`.
pub async fn get(get: Get, global: &Global, output: &Output) -> Result<(), Failure> {
    let consistency = consistency(&get)?;
    let place = Place::new(global, &get.addressing, get.session.file.as_deref()).await?;
    let key = place.bytes("KEY", &get.key)?;
    let entry = place.keyspace.get(key.clone()).consistency(consistency).await;
    place.keep_session()?;
    let entry =
        entry.map_err(|error| Failure::call(format!("read {}", place.quoted(&key)), &error))?;
    let Some(entry) = entry else {
        let keyspace = place.keyspace.name();
        let what = format!("no key {} in keyspace {keyspace}", place.quoted(&key));
        return Err(Failure::new(Exit::NotFound, what));
    };
    let Entry { value, version, expires_at_ms } = entry;
    if output.is_json() {
        let view = view(KeyValue { key, value, version, expires_at_ms }, false);
        return output.item("Entry", &view, String::new);
    }
    match get.addressing.encoding {
        // A person must not get control characters; a pipe must get exactly the value.
        None if output.is_terminal() => output.line(&encoding::escape(&value)),
        None => output.data(&value),
        Some(encoding) => {
            output.data(&encoding::encode(encoding, &value))?;
            output.data(b"\n")
        }
    }
}

/// `coracle scan`.
pub async fn scan(scan: Scan, global: &Global, output: &Output) -> Result<(), Failure> {
    let place = Place::new(global, &scan.addressing, None).await?;
    let prefix = place.bytes("--prefix", &scan.prefix)?;
    let start = place.bytes("--start", &scan.start)?;
    let end = scan.end.as_deref().map(|end| place.bytes("--end", end)).transpose()?;
    let mut call = match end {
        Some(end) => place.keyspace.scan(start..end),
        None => place.keyspace.scan(start..),
    };
    call = call.prefix(prefix);
    if let Some(limit) = scan.limit {
        call = call.limit(limit);
    }
    if scan.reverse {
        call = call.reverse();
    }
    if scan.keys_only {
        call = call.keys_only();
    }
    let encoding = scan.addressing.encoding.unwrap_or(Encoding::Escape);
    let mut pages = call.pages();
    let mut rows = Rows { keys_only: scan.keys_only, encoding, is_first: true, output };
    rows.begin()?;
    while let Some(page) = pages.try_next().await.map_err(|error| Failure::call("scan", &error))? {
        for pair in page.entries {
            rows.row(pair)?;
        }
        output.flush()?;
    }
    rows.end()
}

/// A scan's rows: they are printed as they come, so columns cannot be aligned.
struct Rows<'a> {
    keys_only: bool,
    encoding: Encoding,
    is_first: bool,
    output: &'a Output,
}

impl Rows<'_> {
    fn begin(&self) -> Result<(), Failure> {
        match self.output.format() {
            Format::Json => self.output.list_begin("EntryList"),
            _ => Ok(()),
        }
    }

    fn row(&mut self, pair: KeyValue) -> Result<(), Failure> {
        let is_first = std::mem::take(&mut self.is_first);
        match self.output.format() {
            Format::Json => self.output.list_item(is_first, &view(pair, self.keys_only)),
            Format::Jsonl => self.output.json_line(&view(pair, self.keys_only)),
            Format::Table | Format::Wide => {
                let mut line = encoding::encode(self.encoding, &pair.key);
                if !self.keys_only {
                    line.push(b'\t');
                    line.extend(encoding::encode(self.encoding, &pair.value));
                }
                if self.output.format() == Format::Wide {
                    line.extend(format!("\t{}", pair.version).into_bytes());
                }
                line.push(b'\n');
                self.output.data(&line)
            }
        }
    }

    fn end(&self) -> Result<(), Failure> {
        match self.output.format() {
            Format::Json => self.output.list_end(),
            _ => Ok(()),
        }
    }
}

/// The value that `put` was given: itself, a file, or standard input.
fn value(put: &Put) -> Result<Bytes, Failure> {
    let read = |name: &str, reader: &mut dyn Read| {
        let mut value = Vec::new();
        let mut reader = reader.take(VALUE_BYTES_MAX + 1);
        reader.read_to_end(&mut value).map_err(|error| Failure::io("read", name, &error))?;
        if value.len() as u64 > VALUE_BYTES_MAX {
            let limit = bytes(VALUE_BYTES_MAX);
            return Err(Failure::usage(format!("{name} has more than {limit}: it is no value")));
        }
        Ok(Bytes::from(value))
    };
    if put.value == "-" {
        return read("standard input", &mut std::io::stdin().lock());
    }
    if let Some(path) = put.value.strip_prefix('@') {
        let mut file =
            std::fs::File::open(path).map_err(|error| Failure::io("read", path, &error))?;
        return read(path, &mut file);
    }
    decode(&put.addressing, "VALUE", &put.value)
}

fn report(
    what: &str,
    key: &Bytes,
    outcome: Result<Cas, coracle_client::Error>,
    done: &str,
    output: &Output,
) -> Result<(), Failure> {
    match outcome.map_err(|error| Failure::call(what, &error))? {
        Cas::Applied(Written { version, served }) => {
            let view = WrittenView {
                key: Text::of(key),
                version: version.to_string(),
                shard: served.shard.0,
                node: served.node.0,
                term: served.term,
                index: served.index,
            };
            output.item("Written", &view, || {
                format!("{} {done}, version {version}", encoding::escape(key))
            })
        }
        Cas::Mismatch { current, .. } => {
            let current = match current {
                Some(entry) => format!("its version is {}", entry.version),
                None => "it is absent".to_owned(),
            };
            let text = format!("did not {what}: the condition does not hold, {current}");
            Err(Failure::new(Exit::Precondition, text)
                .next("coracle get KEY -o json shows the key"))
        }
    }
}

fn view(pair: KeyValue, keys_only: bool) -> EntryView {
    EntryView {
        key: Text::of(&pair.key),
        value: (!keys_only).then(|| Text::of(&pair.value)),
        version: pair.version.to_string(),
        expires_at_ms: pair.expires_at_ms,
    }
}

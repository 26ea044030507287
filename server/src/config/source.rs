//! Owns the sources of settings and how they are laid over each other: flag over environment over file
//! over default. Strict: every source may only name what the table of keys has. Does not judge
//! settings against each other.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::key::{self, KEYS, Key, SECTIONS};
use super::problem::{Code, Excerpt, Fault, Origin, Problem};
use super::suggest;
use super::value::{Raw, Value};

/// Environment variables that begin with it are settings; a wrong one is a mistake.
const ENV_PREFIX: &str = "CORACLE__";

/// Everything that settings come from. Handed in whole: nothing here reads a file or the environment.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file, where there is one.
    pub file: Option<SourceFile>,
    /// The environment. Variables that do not begin with `CORACLE__` are not looked at.
    pub env: BTreeMap<String, String>,
    /// `--set key=value`, in their order: of two for one key the later one holds.
    pub set: Vec<(String, String)>,
    /// Flags that have a name of their own. They beat `--set`.
    pub flags: Vec<Flag>,
    /// Memory that the process may use; see [`super::memory_bytes`]. `None`: not known.
    pub memory_bytes: Option<u64>,
}

/// A configuration file.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// As problems shall name it.
    pub path: String,
    /// Its whole text.
    pub text: String,
}

/// A flag that stands for a key.
#[derive(Clone, Debug)]
pub struct Flag {
    /// As it was typed: `--data-dir`.
    pub flag: &'static str,
    /// The key that it sets: `node.data_dir`.
    pub key: &'static str,
    /// Its value. Lists are separated by commas.
    pub value: String,
}

/// A value and where it came from.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) value: Value,
    pub(super) origin: Origin,
}

/// The settings while they are being read.
pub(super) struct Layers {
    found: BTreeMap<&'static str, Found>,
    /// Keys that somebody set to something unreadable: rules about them would only confuse.
    spoiled: BTreeSet<&'static str>,
    pub(super) problems: Vec<Problem>,
}

impl Layers {
    /// Reads all sources, from the weakest to the strongest.
    pub(super) fn read(sources: &Sources) -> Layers {
        let mut layers =
            Layers { found: BTreeMap::new(), spoiled: BTreeSet::new(), problems: Vec::new() };
        for key in KEYS {
            let value = key.default(sources.memory_bytes);
            layers.found.insert(key.name, Found { value, origin: Origin::Default });
        }
        if let Some(file) = &sources.file {
            layers.read_file(file);
        }
        layers.read_env(&sources.env);
        for (name, value) in &sources.set {
            let origin = Origin::Flag { flag: format!("--set {name}") };
            match key::find(name) {
                Some(key) => layers.put(key, &Raw::Word(value), origin, None),
                None => layers.problems.push(unknown_key(name, origin, None)),
            }
        }
        for flag in &sources.flags {
            let key = key::find(flag.key).expect("a flag of the program names a key of the table");
            let origin = Origin::Flag { flag: flag.flag.to_owned() };
            layers.put(key, &Raw::Word(&flag.value), origin, None);
        }
        layers
    }

    /// What holds for this key, unless it was set to something unreadable.
    pub(super) fn sound(&self, name: &str) -> Option<&Found> {
        (!self.spoiled.contains(name)).then(|| &self.found[name])
    }

    /// All values by key.
    pub(super) fn into_found(self) -> BTreeMap<&'static str, Found> {
        self.found
    }

    fn put(&mut self, key: &Key, raw: &Raw<'_>, origin: Origin, excerpt: Option<Excerpt>) {
        match key.kind.read(raw) {
            Ok(value) => {
                self.found.insert(key.name, Found { value, origin });
            }
            Err(Fault { code, what, mend }) => {
                self.spoiled.insert(key.name);
                let what = format!("{}: {what}", key.name);
                let allowed = key.kind.allowed();
                self.problems.push(Problem { code, what, origin, excerpt, allowed, mend });
            }
        }
    }

    fn read_env(&mut self, env: &BTreeMap<String, String>) {
        for (name, value) in env.range(ENV_PREFIX.to_owned()..) {
            if !name.starts_with(ENV_PREFIX) {
                break;
            }
            let origin = Origin::Env { name: name.clone() };
            match KEYS.iter().find(|key| key.env_name() == *name) {
                Some(key) => self.put(key, &Raw::Word(value), origin, None),
                None => self.problems.push(unknown_variable(name, origin)),
            }
        }
    }

    fn read_file(&mut self, file: &SourceFile) {
        let (document, errors) = DeTable::parse_recoverable(&file.text);
        if !errors.is_empty() {
            // What the parser made of the rest is a guess: only its own errors are reported.
            self.problems.extend(errors.iter().map(|error| {
                let place = Place::of(file, error.span().unwrap_or(0..0));
                Problem {
                    code: Code::Syntax,
                    what: error.message().replace('\n', " "),
                    origin: place.origin,
                    excerpt: Some(place.excerpt),
                    allowed: String::new(),
                    mend: "correct the line; `coracle config init` prints a whole file".to_owned(),
                }
            }));
            return;
        }
        let mut sections: Vec<_> = document.get_ref().iter().collect();
        // As in the file, so that problems come in its order.
        sections.sort_by_key(|(name, _)| name.span().start);
        for (name, section) in sections {
            self.read_section(file, name, section.get_ref());
        }
    }

    fn read_section(
        &mut self,
        file: &SourceFile,
        name: &Spanned<impl AsRef<str>>,
        section: &DeValue<'_>,
    ) {
        let place = Place::of(file, name.span());
        let name = name.get_ref().as_ref();
        let known = SECTIONS.iter().any(|(section, _)| *section == name);
        match section {
            DeValue::Table(keys) if known => {
                let mut keys: Vec<_> = keys.iter().collect();
                keys.sort_by_key(|(key, _)| key.span().start);
                for (key, value) in keys {
                    self.read_key(file, name, key, value);
                }
            }
            _ if known => self.problems.push(Problem {
                code: Code::Type,
                what: format!("{name} is a section, not a key"),
                origin: place.origin,
                excerpt: Some(place.excerpt),
                allowed: String::new(),
                mend: format!("write [{name}] on a line of its own, and its keys below"),
            }),
            DeValue::Table(_) => self.problems.push(unknown_section(name, place)),
            _ => self.problems.push(unknown_key(name, place.origin, Some(place.excerpt))),
        }
    }

    fn read_key(
        &mut self,
        file: &SourceFile,
        section: &str,
        name: &Spanned<impl AsRef<str>>,
        value: &Spanned<DeValue<'_>>,
    ) {
        let full = format!("{section}.{}", name.get_ref().as_ref());
        let Some(key) = key::find(&full) else {
            let place = Place::of(file, name.span());
            self.problems.push(unknown_key(&full, place.origin, Some(place.excerpt)));
            return;
        };
        let place = Place::of(file, value.span());
        self.put(key, &raw(value.get_ref()), place.origin, Some(place.excerpt));
    }
}

fn raw<'a>(value: &'a DeValue<'_>) -> Raw<'a> {
    match value {
        DeValue::String(text) => Raw::Text(text),
        DeValue::Integer(number) => Raw::Number(number.to_string()),
        DeValue::Float(number) => Raw::Number(number.to_string()),
        DeValue::Boolean(bool) => Raw::Bool(*bool),
        DeValue::Array(items) => Raw::List(items.iter().map(|item| raw(item.get_ref())).collect()),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}

/// A place in the file.
struct Place {
    origin: Origin,
    excerpt: Excerpt,
}

impl Place {
    fn of(file: &SourceFile, span: Range<usize>) -> Place {
        let text = file.text.as_str();
        let mut start = span.start.min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let line = text[line_start..line_end].trim_end_matches('\r');
        let before = text[line_start..start].chars().count();
        let marked = text.get(start..span.end.min(line_end)).map_or(0, |part| part.chars().count());
        Place {
            origin: Origin::File {
                path: file.path.clone(),
                line: text[..start].matches('\n').count() + 1,
                column: before + 1,
            },
            excerpt: Excerpt { line: line.to_owned(), before, len: marked },
        }
    }
}

/// A key that the table does not have.
pub(super) fn unknown_key(name: &str, origin: Origin, excerpt: Option<Excerpt>) -> Problem {
    let mend = match suggest::nearest_key(name, KEYS.iter().map(|key| key.name)) {
        Some(key) => format!("did you mean {key}?"),
        None => "remove it; `coracle config init` prints every key".to_owned(),
    };
    let allowed = match name.split_once('.') {
        Some((section, _)) => {
            let keys: Vec<&str> =
                KEYS.iter().filter(|key| key.section() == section).map(Key::last_name).collect();
            if keys.is_empty() {
                String::new()
            } else {
                format!("in {section}: {}", keys.join(", "))
            }
        }
        None => String::new(),
    };
    let what = format!("there is no setting {name:?}");
    Problem { code: Code::UnknownKey, what, origin, excerpt, allowed, mend }
}

fn unknown_section(name: &str, place: Place) -> Problem {
    let names: Vec<&str> = SECTIONS.iter().map(|(name, _)| *name).collect();
    let mend = match suggest::nearest(name, names.iter().copied()) {
        Some(section) => format!("did you mean [{section}]?"),
        None => "remove it; `coracle config init` prints every section".to_owned(),
    };
    Problem {
        code: Code::UnknownKey,
        what: format!("there is no section {name:?}"),
        origin: place.origin,
        excerpt: Some(place.excerpt),
        allowed: names.join(", "),
        mend,
    }
}

fn unknown_variable(name: &str, origin: Origin) -> Problem {
    let key = name[ENV_PREFIX.len()..].replace("__", ".").to_ascii_lowercase();
    let mend = match suggest::nearest_key(&key, KEYS.iter().map(|key| key.name)) {
        Some(meant) => {
            let meant = key::find(meant).expect("suggestions come from the table");
            format!("did you mean {}?", meant.env_name())
        }
        None => "unset it; `coracle config init` prints every key".to_owned(),
    };
    Problem {
        code: Code::UnknownKey,
        what: format!("{name} names no setting"),
        origin,
        excerpt: None,
        allowed: format!("{ENV_PREFIX}<SECTION>__<KEY> in capitals"),
        mend,
    }
}

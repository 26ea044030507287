//! Owns how settings are told to people: the sample file, `config show`, `config explain`. Does not
//! read settings.

use std::fmt::Write;

use super::key::{KEYS, Key, Preset, SECTIONS};
use super::source::Found;
use super::value::Value;

/// Columns of the sample file's comments.
const COLUMNS: usize = 100;

/// A file with every key, its doc and its default, all commented out.
pub(super) fn sample() -> String {
    let mut out = String::from(
        "# Coracle: every setting with its default. Generated from the program's own table:\n\
         #   coracle config init\n\
         # Flags win over environment variables (CORACLE__RAFT__HEARTBEAT_INTERVAL=80ms), those over\n\
         # this file, this file over the defaults. Unknown keys are errors.\n\
         #   coracle config check FILE      coracle config show --origin      coracle config explain KEY\n",
    );
    for (section, about) in SECTIONS {
        let _ = write!(out, "\n# {about}\n[{section}]\n");
        for key in KEYS.iter().filter(|key| key.section() == *section) {
            out.push('\n');
            comment(&mut out, key.doc);
            comment(&mut out, &format!("Allowed: {}.", key.kind.allowed()));
            match key.preset {
                Preset::Fixed(_) => {}
                _ => comment(&mut out, &format!("Default: {}.", key.default_words())),
            }
            let _ = writeln!(out, "#{} = {}", key.last_name(), example(key));
        }
    }
    out
}

/// The default, or what could stand there when it is derived.
fn example(key: &Key) -> String {
    match (&key.preset, key.default(None)) {
        // As on a machine with 16 GiB.
        (Preset::MemoryShare { .. }, _) => key.default(Some(16 << 30)).to_string(),
        (_, Value::Unset) if key.name.ends_with("peer") => "\"n1.example.org:7500\"".to_owned(),
        (_, Value::Unset) => "\"n1.example.org:7400\"".to_owned(),
        (_, value) => value.to_string(),
    }
}

fn comment(out: &mut String, text: &str) {
    for line in wrap(text, COLUMNS - 2) {
        let _ = writeln!(out, "# {line}");
    }
}

fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// The settings as a file that could be loaded again. `origin` says behind each where it came from;
/// `diff_default` leaves out what is as it would be anyway.
pub(super) fn show<'a>(
    found: impl Fn(&str) -> &'a Found,
    memory_bytes: Option<u64>,
    origin: bool,
    diff_default: bool,
) -> String {
    let mut sections: Vec<String> = Vec::new();
    for (section, _) in SECTIONS {
        let keys = KEYS.iter().filter(|key| key.section() == *section);
        let lines: Vec<(String, String)> = keys
            .map(|key| (key, found(key.name)))
            .filter(|(key, found)| !diff_default || found.value != key.default(memory_bytes))
            .map(|(key, found)| (line(key, found), found.origin.to_string()))
            .collect();
        if lines.is_empty() {
            continue;
        }
        let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0);
        let mut text = format!("[{section}]\n");
        for (line, from) in &lines {
            let _ = match origin {
                true => writeln!(text, "{line:width$}  # {from}"),
                false => writeln!(text, "{line}"),
            };
        }
        sections.push(text);
    }
    sections.join("\n")
}

fn line(key: &Key, found: &Found) -> String {
    match found.value {
        Value::Unset => format!("#{} = ({})", key.last_name(), key.default_words()),
        ref value => format!("{} = {value}", key.last_name()),
    }
}

/// All about one key.
pub(super) fn explain(key: &Key) -> String {
    let mut out = format!("{}\n\n", key.name);
    for line in wrap(key.doc, COLUMNS - 2) {
        let _ = writeln!(out, "  {line}");
    }
    let set = example(key);
    let word = set.trim_matches(|char| "\"[]".contains(char));
    let _ = write!(
        out,
        "\n  is       {}\n  allowed  {}\n  default  {}\n\
         \n  in the file          [{}]\n                       {} = {set}\
         \n  in the environment   {}={word}\n  on the command line  --set {}={word}\n",
        key.kind.noun(),
        key.kind.allowed(),
        key.default_words(),
        key.section(),
        key.last_name(),
        key.env_name(),
        key.name,
    );
    out
}

//! Just enough of Rust's surface to read names out of it. Owns blanking of comments, literals and
//! test modules; is no parser, and errs on the side of seeing less.

/// The text with comments and the insides of literals blanked; lines stay where they are.
pub(super) fn code(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_or_comment(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
            continue;
        }
        for char in &chars[at..end] {
            out.push(if *char == '\n' { '\n' } else { ' ' });
        }
        at = end;
    }
    out
}

/// Where the comment or literal that starts at `at` ends; `at` when none does.
fn literal_or_comment(chars: &[char], at: usize) -> usize {
    let next = |offset: usize| chars.get(at + offset).copied().unwrap_or('\0');
    let after_name = at > 0 && is_name(chars[at - 1]);
    match chars[at] {
        '/' if next(1) == '/' => until(chars, at, "\n"),
        '/' if next(1) == '*' => block_comment(chars, at),
        '"' => string(chars, at),
        'r' if !after_name && (next(1) == '"' || next(1) == '#') => raw_string(chars, at),
        'b' if !after_name && next(1) == 'r' => match raw_string(chars, at + 1) {
            end if end == at + 1 => at,
            end => end,
        },
        // A character, not a lifetime: '\n' or 'x'.
        '\'' if next(1) == '\\' => until(chars, at + 3, "'") + 1,
        '\'' if next(2) == '\'' => at + 3,
        _ => at,
    }
    .min(chars.len())
}

fn until(chars: &[char], from: usize, needle: &str) -> usize {
    let needle: Vec<char> = needle.chars().collect();
    (from..chars.len()).find(|&at| chars[at..].starts_with(&needle)).unwrap_or(chars.len())
}

fn block_comment(chars: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at < chars.len() {
        if chars[at..].starts_with(&['/', '*']) {
            depth += 1;
            at += 2;
        } else if chars[at..].starts_with(&['*', '/']) {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

fn string(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// `start` when it is a raw name (`r#type`) and no string.
fn raw_string(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    if chars.get(start + 1 + hashes) != Some(&'"') {
        return start;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    until(chars, start + 2 + hashes, &end) + end.len()
}

pub(super) fn is_name(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// The name at the front of `text`; empty when there is none.
pub(super) fn name(text: &str) -> &str {
    let end = text.find(|char| !is_name(char)).unwrap_or(text.len());
    &text[..end]
}

/// `code` without the items under `#[cfg(test)]`. Tests may use what they like.
pub(super) fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        rest = &rest[at + MARK.len()..];
        let item = rest.find(['{', ';']).map_or(rest.len(), |end| {
            if rest.as_bytes()[end] == b';' { end + 1 } else { end + group(&rest[end..]).len() }
        });
        rest = &rest[item..];
    }
    out.push_str(rest);
    out
}

/// From the brace at the front of `code` to the one that closes it.
pub(super) fn group(code: &str) -> &str {
    let mut depth = 0;
    for (at, char) in code.char_indices() {
        match char {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &code[..at + char.len_utf8()];
        }
    }
    code
}

/// The leaves of a `use` tree: full path and the name that it gets here.
/// `a::{b, c::D as E}` → `a::b` as `b`, `a::c::D` as `E`.
pub(super) fn leaves(tree: &str) -> Vec<(String, String)> {
    let tree = tree.trim();
    if let Some(open) = tree.find('{') {
        let prefix = &tree[..open];
        let inside = group(&tree[open..]);
        let inside =
            inside.strip_prefix('{').and_then(|inside| inside.strip_suffix('}')).unwrap_or("");
        return split(inside)
            .into_iter()
            .flat_map(leaves)
            .map(|(path, name)| (format!("{}{path}", prefix.trim()), name))
            .collect();
    }
    if tree.is_empty() {
        return Vec::new();
    }
    let (path, renamed) = match tree.split_once(" as ") {
        Some((path, name)) => (path.trim(), Some(name.trim())),
        None => (tree, None),
    };
    let last = path.rsplit("::").next().unwrap_or(path).trim();
    vec![(path.to_owned(), renamed.unwrap_or(last).to_owned())]
}

/// At the commas outside of braces.
fn split(list: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, char) in list.char_indices() {
        match char {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    parts
}

#[test]
fn comments_and_literals_are_blanked() {
    let text =
        "a // b\n/* c /* d */ e */ f \"g \\\" h\" 'i' '\\'' &'j k r#\"l\"m\"# br\"n\" r#type";
    let names: Vec<String> = code(text).split_whitespace().map(str::to_owned).collect();
    assert_eq!(names, ["a", "f", "&'j", "k", "r#type"]);
    assert_eq!(code(text).lines().count(), 2, "lines stay where they are");
}

#[test]
fn test_items_are_cut() {
    let text = "a\n#[cfg(test)]\nmod tests { fn b() {} }\nc\n#[cfg(test)]\nuse d;\ne";
    assert_eq!(without_tests(text).split_whitespace().collect::<String>(), "ace");
}

#[test]
fn use_trees_are_taken_apart() {
    let leaves = leaves("a::{b, c::{D as E, self}, f::G}");
    let shown: Vec<String> = leaves.iter().map(|(p, n)| format!("{p}={n}")).collect();
    assert_eq!(shown, ["a::b=b", "a::c::D=E", "a::c::self=self", "a::f::G=G"]);
}

//! The help texts and `docs/cli.md`, against what the program says. Only this finds that a command was
//! added, renamed or lost without anybody meaning it, and that the reference page has drifted.
//!
//! `CORACLE_REGENERATE=1 cargo test -p coracle-cli help` writes both anew.

use std::fs;
use std::path::{Path, PathBuf};

use coracle_cli::args::command;

/// Everything behind this line of the page is generated.
const MARK: &str = "<!-- From here on generated from the program: CORACLE_REGENERATE=1 cargo test -p coracle-cli help -->\n";

/// The same on every terminal.
const COLUMNS: usize = 100;

#[test]
fn the_first_help_is_as_agreed() {
    let help = command().term_width(COLUMNS).render_help().to_string();
    same(&root().join("cli/tests/it/golden/help.txt"), "", &help);
}

#[test]
fn the_reference_page_says_what_the_program_says() {
    let page = root().join("docs/cli.md");
    let text = fs::read_to_string(&page).unwrap();
    let (by_hand, _) = text.split_once(MARK).expect("the page has its mark");
    let mut reference = String::from("\n## Reference\n");
    let mut commands = command().term_width(COLUMNS);
    commands.build();
    sections(&mut commands, &mut reference);
    same(&page, &format!("{by_hand}{MARK}"), &reference);
}

#[test]
fn every_leaf_command_says_what_it_does() {
    fn check(command: &clap::Command, path: &str) {
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let path = format!("{path} {}", sub.get_name());
            assert!(sub.get_about().is_some(), "{path} has no help");
            for arg in sub.get_arguments().filter(|arg| !arg.is_hide_set()) {
                assert!(arg.get_help().is_some(), "{path}: {} has no help", arg.get_id());
            }
            check(sub, &path);
        }
    }
    check(&command(), "coracle");
}

fn sections(command: &mut clap::Command, out: &mut String) {
    for sub in command.get_subcommands_mut() {
        if sub.get_name() == "help" {
            continue;
        }
        if sub.has_subcommands() {
            sections(sub, out);
            continue;
        }
        let name = sub.get_bin_name().unwrap_or(sub.get_name()).to_owned();
        let help = sub.render_help().to_string();
        // What holds for every command stands at the top of the page.
        let (help, global, behind) = match help.split_once("\nGlobal options:\n") {
            None => (help.as_str(), "", ""),
            Some((before, rest)) => match rest.split_once("\n\n") {
                Some((global, behind)) => (before, global, behind),
                None => (before, rest, ""),
            },
        };
        assert!(name.starts_with("coracle"), "{name}: {global}");
        let text = format!("{}\n\n{}", help.trim_end(), behind.trim());
        out.push_str(&format!("\n### {name}\n\n```text\n{}\n```\n", text.trim()));
    }
}

/// Compares, or writes when asked to.
#[track_caller]
pub(crate) fn same(path: &Path, before: &str, now: &str) {
    let now = format!("{before}{}", trimmed(now));
    if std::env::var_os("CORACLE_REGENERATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        return fs::write(path, now).unwrap();
    }
    let then = fs::read_to_string(path).unwrap_or_default();
    let differs = then.lines().zip(now.lines()).position(|(then, now)| then != now);
    let line = differs.unwrap_or(then.lines().count().min(now.lines().count()));
    let at = |text: &str| text.lines().nth(line).unwrap_or("nothing").to_owned();
    assert!(
        then == now,
        "{}:{}: {:?} has become {:?}; CORACLE_REGENERATE=1 writes it anew",
        path.display(),
        line + 1,
        at(&then),
        at(&now),
    );
}

/// clap leaves spaces at the ends of lines.
fn trimmed(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

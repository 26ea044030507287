//! How settings are told to people: the sample file, `config show`, `config explain`.

use std::path::Path;

use coracle_server::config::{Config, SourceFile, Sources, split_set};

use crate::generated::expect_generated;

fn load(text: &str) -> Config {
    let file = SourceFile { path: "a.toml".to_owned(), text: text.to_owned() };
    let sources = Sources { file: Some(file), ..Sources::default() };
    Config::load(&sources).expect("the file is right")
}

#[test]
fn the_generated_sample_is_the_one_in_docs() {
    expect_generated(Path::new("docs/coracle.toml"), &Config::sample());
}

#[test]
fn the_sample_says_nothing_until_it_is_edited() {
    assert_eq!(load(&Config::sample()).show(false, true), "");
}

/// Every commented key, switched on, is read, and is the default (but for what depends on the machine).
#[test]
fn every_key_of_the_sample_can_be_switched_on() {
    let mut keys = 0;
    let text: String = Config::sample()
        .lines()
        .map(|line| match line.strip_prefix('#').filter(|rest| !rest.starts_with([' ', '#'])) {
            Some(key) if !key.is_empty() => {
                keys += 1;
                format!("{key}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    assert_eq!(keys, Config::keys().count());
    assert_eq!(
        load(&text).show(false, true),
        "[listen]\nadvertise_client = \"n1.example.org:7400\"\nadvertise_peer = \"n1.example.org:7500\"\n\
         \n[storage]\nmemory_budget = \"6553MiB\"\n\n[limits]\nrequest_bytes_in_flight = \"1638MiB\"\n"
    );
}

#[test]
fn what_is_shown_can_be_loaded_again() {
    let config = load(
        "[node]\nzone = \"a\"\ndata_dir = 'C:\\odd \"name\"'\n[cluster]\njoin = [\"n1:7500\"]\n\
         [raft]\nelection_timeout_max = \"90s\"\n[storage]\ndisk_reserve_bytes = \"1025MiB\"\n",
    );
    for origin in [false, true] {
        let shown = config.show(origin, false);
        assert_eq!(load(&shown).show(false, false), config.show(false, false), "{shown}");
    }
}

#[test]
fn show_tells_origins_and_leaves_out_defaults() {
    let file = SourceFile {
        path: "a.toml".to_owned(),
        text: "[node]\nzone = \"default\"\n[raft]\nelection_timeout_max = \"1s\"\n".to_owned(),
    };
    let env = [("CORACLE__RAFT__HEARTBEAT_INTERVAL".to_owned(), "120ms".to_owned())];
    let sources = Sources { file: Some(file), env: env.into(), ..Sources::default() };
    let config = Config::load(&sources).expect("right");
    assert_eq!(
        config.show(true, true),
        "[raft]\n\
         heartbeat_interval = \"120ms\"  # environment variable CORACLE__RAFT__HEARTBEAT_INTERVAL\n\
         election_timeout_max = \"1s\"   # a.toml:4:24\n"
    );
}

#[test]
fn explain_tells_all_about_a_key() {
    assert_eq!(
        Config::explain("raft.heartbeat_interval").expect("a key"),
        "raft.heartbeat_interval\n\
         \n\
        \x20 How often a leader shows that it lives. Raise it, and the election timeouts with it, where\n\
        \x20 messages between nodes take longer than 20 ms.\n\
         \n\
        \x20 is       a duration\n\
        \x20 allowed  a duration from 10ms to 10s\n\
        \x20 default  \"100ms\"\n\
         \n\
        \x20 in the file          [raft]\n\
        \x20                      heartbeat_interval = \"100ms\"\n\
        \x20 in the environment   CORACLE__RAFT__HEARTBEAT_INTERVAL=100ms\n\
        \x20 on the command line  --set raft.heartbeat_interval=100ms\n"
    );
    for key in Config::keys() {
        assert!(Config::explain(key).expect("a key").contains(key));
    }
    let problem = Config::explain("raft.hartbeat_interval").expect_err("no key");
    assert_eq!(problem.mend, "did you mean raft.heartbeat_interval?");
}

#[test]
fn set_is_taken_apart_at_the_first_sign() {
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(split_set("a.b=c=d"), Ok(pair("a.b", "c=d")));
    assert_eq!(split_set("a.b = c"), Ok(pair("a.b", "c")));
    assert!(split_set("a.b").expect_err("no sign").mend.contains("--set"));
}

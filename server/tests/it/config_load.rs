//! How settings are laid over each other and what is said about bad ones. The messages are golden: they
//! are what people see.

use std::time::Duration;

use coracle_server::config::{Code, Config, Flag, Origin, Problem, SourceFile, Sources};

const GIB: u64 = 1 << 30;

fn file(text: &str) -> Sources {
    let file = SourceFile { path: "coracle.toml".to_owned(), text: text.to_owned() };
    Sources { file: Some(file), ..Sources::default() }
}

fn env(name: &str, value: &str) -> Sources {
    Sources { env: [(name.to_owned(), value.to_owned())].into(), ..Sources::default() }
}

fn set(pairs: &[(&str, &str)]) -> Sources {
    let set = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    Sources { set: set.collect(), ..Sources::default() }
}

fn load(sources: &Sources) -> Config {
    match Config::load(sources) {
        Ok(config) => config,
        Err(problems) => panic!("{}", text(&problems)),
    }
}

fn problems(sources: &Sources) -> Vec<Problem> {
    let problems = Config::load(sources).expect_err("the settings are wrong");
    assert!(!problems.is_empty());
    problems
}

fn codes(sources: &Sources) -> Vec<Code> {
    problems(sources).iter().map(|problem| problem.code).collect()
}

fn text(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("{problem}\n")).collect()
}

#[test]
fn without_any_source_the_defaults_hold() {
    let config = load(&Sources::default());
    assert_eq!(config.raft.heartbeat_interval, Duration::from_millis(100));
    assert_eq!(config.raft.election_timeout_min, Duration::from_millis(250));
    assert_eq!(config.raft.election_timeout_max, Duration::from_millis(500));
    assert_eq!(config.listen.client.to_string(), "127.0.0.1:7400");
    assert_eq!(config.node.data_dir.to_str(), Some("coracle-data"));
    assert!(config.cluster.join.is_empty() && config.listen.advertise_peer.is_none());
    assert!(!config.test.fault_injection && !config.test.in_memory && !config.listen.insecure);
    assert_eq!(config.observability.slow_request, Some(Duration::from_millis(250)));
    for key in Config::keys() {
        assert_eq!(config.origin(key), Some(&Origin::Default), "{key}");
    }
}

/// A default has one home; where another crate has it too, the two agree.
#[test]
fn the_logs_defaults_are_storages() {
    let (config, log) = (load(&Sources::default()), coracle_storage::LogOptions::default());
    assert_eq!(config.storage.log_segment_bytes, log.segment_bytes);
    assert_eq!(config.storage.log_bytes_target, log.log_bytes_target);
}

#[test]
fn budgets_follow_the_memory_of_the_machine() {
    let with = |memory_bytes| load(&Sources { memory_bytes, ..Sources::default() });
    assert_eq!(with(Some(10 * GIB)).storage.memory_budget, 4 * GIB);
    assert_eq!(with(Some(10 * GIB)).limits.request_bytes_in_flight, GIB);
    assert_eq!(with(None).storage.memory_budget, GIB / 2);
    assert_eq!(with(Some(128 << 20)).storage.memory_budget, 64 << 20, "never less");
}

#[test]
fn flags_beat_set_beats_env_beats_file_beats_default() {
    let mut sources = file("[node]\nzone = \"file\"\n");
    let zone = |sources: &Sources| {
        let config = load(sources);
        (config.node.zone.clone(), config.origin("node.zone").expect("a key").to_string())
    };
    let pair = |value: &str, origin: &str| (value.to_owned(), origin.to_owned());
    assert_eq!(zone(&sources), pair("file", "coracle.toml:2:8"));
    sources.env.insert("CORACLE__NODE__ZONE".to_owned(), "env".to_owned());
    assert_eq!(zone(&sources), pair("env", "environment variable CORACLE__NODE__ZONE"));
    sources.set = vec![("node.zone".into(), "one".into()), ("node.zone".into(), "two".into())];
    assert_eq!(zone(&sources), pair("two", "flag --set node.zone"));
    sources.flags.push(Flag { flag: "--zone", key: "node.zone", value: "flag".to_owned() });
    assert_eq!(zone(&sources), pair("flag", "flag --zone"));
}

#[test]
fn every_kind_of_value_is_read_from_file_and_from_words() {
    let from_file = load(&file(
        "[cluster]\njoin = [\"n1:7500\", \"[::1]:7501\"]\n[listen]\ninsecure = true\n\
         [limits]\nconnections = 10_000\n[storage]\ndisk_reserve_bytes = \"2GiB\"\n\
         [raft]\nelection_timeout_max = \"1s\"\n[observability]\nlog_format = \"json\"\n\
         slow_request = \"0ms\"\nlog_filter = \"info,coracle_raft=debug\"",
    ));
    let from_words = load(&set(&[
        ("cluster.join", "n1:7500, [::1]:7501"),
        ("listen.insecure", "true"),
        ("limits.connections", "10000"),
        ("storage.disk_reserve_bytes", "2048 MiB"),
        ("raft.election_timeout_max", "1000ms"),
        ("observability.log_format", "json"),
        ("observability.slow_request", "0s"),
        ("observability.log_filter", "info,coracle_raft=debug"),
    ]));
    assert_eq!(from_file.show(false, false), from_words.show(false, false));
    let joined: Vec<String> = from_file.cluster.join.iter().map(ToString::to_string).collect();
    assert_eq!(joined, ["n1:7500", "[::1]:7501"]);
    assert_eq!(from_file.cluster.join[1].host(), "::1");
    assert_eq!(from_file.storage.disk_reserve_bytes, 2 * GIB);
    assert_eq!(from_file.observability.slow_request, None);
    assert_eq!(from_file.limits.connections, 10_000);
}

#[test]
fn a_bare_number_is_no_duration() {
    assert_eq!(
        text(&problems(&file("[raft]\nheartbeat_interval = 150\n"))),
        "error[UNIT]: raft.heartbeat_interval: 150 has no unit\n\
        \x20 --> coracle.toml:2:22\n\
        \x20  |\n\
        \x202 | heartbeat_interval = 150\n\
        \x20  |                      ^^^\n\
        \x20 allowed: a duration from 10ms to 10s\n\
        \x20 mend:    write a whole number and ms, s, m or h, for example \"80ms\"\n"
    );
    assert_eq!(codes(&env("CORACLE__STORAGE__LOG_SEGMENT_BYTES", "1048576")), [Code::Unit]);
    assert_eq!(codes(&set(&[("observability.slow_request", "0")])), [Code::Unit]);
}

#[test]
fn an_unknown_key_is_refused_with_a_suggestion() {
    assert_eq!(
        text(&problems(&file("[raft]\n# slow network\nheartbeat = \"150ms\"\n"))),
        "error[UNKNOWN_KEY]: there is no setting \"raft.heartbeat\"\n\
        \x20 --> coracle.toml:3:1\n\
        \x20  |\n\
        \x203 | heartbeat = \"150ms\"\n\
        \x20  | ^^^^^^^^^\n\
        \x20 allowed: in raft: heartbeat_interval, election_timeout_min, election_timeout_max\n\
        \x20 mend:    did you mean raft.heartbeat_interval?\n"
    );
    assert_eq!(
        text(&problems(&env("CORACLE__RAFT__HEARTBEAT_INTERVALL", "150ms"))),
        "error[UNKNOWN_KEY]: CORACLE__RAFT__HEARTBEAT_INTERVALL names no setting\n\
        \x20 --> environment variable CORACLE__RAFT__HEARTBEAT_INTERVALL\n\
        \x20 allowed: CORACLE__<SECTION>__<KEY> in capitals\n\
        \x20 mend:    did you mean CORACLE__RAFT__HEARTBEAT_INTERVAL?\n"
    );
    let mend = |sources: &Sources| problems(sources)[0].mend.clone();
    assert_eq!(mend(&file("[storge]\n")), "did you mean [storage]?");
    assert_eq!(mend(&set(&[("server.zone", "a")])), "did you mean node.zone?");
    assert_eq!(mend(&file("zone = \"a\"")), "did you mean node.zone?");
    assert_eq!(mend(&env("CORACLE__node__zone", "a")), "did you mean CORACLE__NODE__ZONE?");
}

#[test]
fn variables_of_others_are_not_looked_at() {
    let mut sources = env("CORACLE_CONTEXT", "prod");
    sources.env.insert("CORACLE__".to_owned() + "X", String::new());
    assert_eq!(codes(&sources), [Code::UnknownKey]);
    sources.env.remove("CORACLE__X");
    sources.env.insert("CORACLEX__RAFT".to_owned(), String::new());
    load(&sources);
}

#[test]
fn a_file_that_is_not_toml_is_reported_by_place() {
    let found = problems(&file("[raft]\nheartbeat_interval = \n[node]\nzone = \"a\"\n"));
    assert_eq!(found[0].code, Code::Syntax);
    assert!(found[0].to_string().contains("coracle.toml:2:"), "{}", found[0]);
    assert_eq!(codes(&file("[node]\nzone = \"a\"\nzone = \"b\"\n")), [Code::Syntax], "twice");
    assert_eq!(codes(&file("raft = 3\n")), [Code::Type], "a section is no value");
}

/// Somebody who mends one thing at a time should not have to start the node five times.
#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let mut sources = file(
        "[node]\nzone = \"a b\"\n[raft]\nheartbeat_interval = \"1s\"\nelection_timeout_min = true\n",
    );
    sources.env.insert("CORACLE__LISTEN__CLIENT".to_owned(), "localhost:7400".to_owned());
    sources.set.push(("limits.connections".to_owned(), "3".to_owned()));
    let found = problems(&sources);
    let found: Vec<(Code, String)> =
        found.into_iter().map(|problem| (problem.code, problem.origin.to_string())).collect();
    let wanted = [
        (Code::Form, "coracle.toml:2:8"),
        (Code::Type, "coracle.toml:5:24"),
        (Code::Form, "environment variable CORACLE__LISTEN__CLIENT"),
        (Code::Range, "flag --set limits.connections"),
        // Only the rule about values that could be read.
        (Code::RaftTiming, "coracle.toml:4:22"),
    ];
    assert_eq!(found, wanted.map(|(code, origin)| (code, origin.to_owned())));
}

/// Key, value, code, a part of the mend.
const NOT_MEANT: &[(&str, &str, Code, &str)] = &[
    ("storage.memory_budget", "64MB", Code::Form, "did you mean \"64MiB\"?"),
    ("storage.memory_budget", "1.5GiB", Code::Form, "write a whole number"),
    ("storage.memory_budget", "99999999999TiB", Code::Range, "write a whole number"),
    ("storage.disk_reserve_bytes", "1B", Code::Range, "write 64MiB"),
    ("raft.heartbeat_interval", "150MS", Code::Form, "did you mean \"150ms\"?"),
    ("raft.heartbeat_interval", "", Code::Form, "for example \"80ms\""),
    ("raft.heartbeat_interval", "1h", Code::Range, "write 10s"),
    ("listen.client", ":7400", Code::Form, "write \"127.0.0.1:7400\""),
    ("listen.client", "n1.example.org:7400", Code::Form, "of an interface of this machine"),
    ("listen.advertise_peer", "n1", Code::Form, "write \"host:port\""),
    ("listen.advertise_peer", "::1:7500", Code::Form, "write \"host:port\""),
    ("cluster.join", "n1:7500,n2", Code::Form, "write \"host:port\""),
    ("cluster.join", "n1:0", Code::Form, "write \"host:port\""),
    ("listen.insecure", "yes", Code::Type, "write true or false"),
    ("limits.connections", "-1", Code::Type, "write a whole number"),
    ("observability.log_format", "jsn", Code::Form, "did you mean \"json\"?"),
    ("observability.log_filter", "inof", Code::Form, "did you mean \"info\"?"),
    ("observability.log_filter", "coracle_raft", Code::Form, "\"coracle_raft=debug\""),
    ("node.data_dir", " ", Code::Form, "name a directory"),
    ("node.zone", "", Code::Form, "for example \"eu-1a\""),
];

#[test]
fn values_that_cannot_be_meant_are_refused_with_the_mend() {
    for &(key, value, code, mend) in NOT_MEANT {
        let found = problems(&set(&[(key, value)]));
        assert_eq!(found.len(), 1, "{key}={value}: {}", text(&found));
        let said = found[0].to_string();
        assert_eq!(found[0].code, code, "{said}");
        assert!(found[0].mend.contains(mend), "{said}");
        assert!(found[0].what.starts_with(key) && !found[0].allowed.is_empty(), "{said}");
    }
    let mixed = file("[cluster]\njoin = [\"n1:7500\", 7]\n");
    assert_eq!(codes(&mixed), [Code::Type]);
}

#[test]
fn rafts_times_fit_to_each_other() {
    let found = problems(&set(&[("raft.heartbeat_interval", "120ms")]));
    assert_eq!(
        text(&found),
        "error[RAFT_TIMING]: raft.election_timeout_max (500ms) is less than 5 times \
         raft.heartbeat_interval (120ms)\n\
        \x20 --> flag --set raft.heartbeat_interval\n\
        \x20 allowed: a leader's lease must outlast several heartbeats\n\
        \x20 mend:    raise raft.election_timeout_max to \"600ms\", or lower \
         raft.heartbeat_interval to \"100ms\"\n"
    );
    let at_min = [("raft.election_timeout_min", "199ms")];
    assert_eq!(codes(&set(&at_min)), [Code::RaftTiming]);
    let no_spread = [("raft.election_timeout_min", "500ms")];
    assert_eq!(codes(&set(&no_spread)), [Code::RaftTiming]);
    load(&set(&[
        ("raft.heartbeat_interval", "200ms"),
        ("raft.election_timeout_min", "400ms"),
        ("raft.election_timeout_max", "1s"),
    ]));
}

#[test]
fn listeners_have_ports_of_their_own() {
    let found = problems(&set(&[("listen.http", "127.0.0.1:7400")]));
    assert_eq!(
        text(&found),
        "error[PORTS_CLASH]: listen.client (127.0.0.1:7400) and listen.http (127.0.0.1:7400) take \
         the same port\n\
        \x20 --> flag --set listen.http\n\
        \x20 allowed: each listener has a port of its own\n\
        \x20 mend:    give listen.http another port, or port 0 for any free one\n"
    );
    // All interfaces include the one.
    let all = [("listen.http", "0.0.0.0:7400"), ("listen.insecure", "true")];
    assert_eq!(codes(&set(&all)), [Code::PortsClash]);
    load(&set(&[("listen.client", "127.0.0.1:0"), ("listen.peer", "127.0.0.1:0")]));
    load(&set(&[("listen.client", "127.0.0.2:7500")]));
}

#[test]
fn beyond_loopback_only_when_it_is_said_to_be_insecure() {
    let outside = [("listen.client", "10.0.0.1:7400"), ("listen.http", "[fe80::1]:7600")];
    assert_eq!(codes(&set(&outside)), [Code::Insecure, Code::Insecure]);
    let found = problems(&set(&outside[..1]));
    assert_eq!(
        text(&found),
        "error[INSECURE]: listen.client (10.0.0.1:7400) is reachable from other machines, without \
         encryption\n\
        \x20 --> flag --set listen.client\n\
        \x20 allowed: loopback addresses (127.0.0.1, [::1]) as long as listen.insecure is false\n\
        \x20 mend:    listen on 127.0.0.1, or start with --insecure where the whole network is \
         trusted\n"
    );
    let mut sources = set(&outside);
    sources.flags.push(Flag { flag: "--insecure", key: "listen.insecure", value: "true".into() });
    load(&sources);
    load(&set(&[("listen.client", "[::1]:7400"), ("listen.peer", "127.9.9.9:7500")]));
}

#[test]
fn what_is_advertised_can_be_dialled() {
    let all = ("listen.peer", "0.0.0.0:7500");
    let insecure = ("listen.insecure", "true");
    assert_eq!(codes(&set(&[all, insecure])), [Code::Advertise]);
    let nobody = ("listen.advertise_peer", "0.0.0.0:7500");
    assert_eq!(codes(&set(&[nobody])), [Code::Advertise]);
    assert_eq!(codes(&set(&[("listen.advertise_client", "[::]:7400")])), [Code::Advertise]);
    let config = load(&set(&[all, insecure, ("listen.advertise_peer", "n1.example.org:17500")]));
    let bound = "0.0.0.0:7500".parse().expect("an address");
    assert_eq!(config.listen.peer_address(bound).to_string(), "n1.example.org:17500");
    let free = "127.0.0.1:40123".parse().expect("an address");
    assert_eq!(config.listen.client_address(free).to_string(), "127.0.0.1:40123");
}

#[test]
fn budgets_leave_room_in_memory_and_log() {
    let mut sources = set(&[("storage.memory_budget", "3GiB")]);
    sources.memory_bytes = Some(4 * GIB);
    let found = problems(&sources);
    assert_eq!(found[0].code, Code::Memory);
    assert!(found[0].mend.contains("lower storage.memory_budget to \"245"), "{}", found[0]);
    sources.memory_bytes = None;
    load(&sources);
    assert_eq!(codes(&set(&[("storage.log_segment_bytes", "512MiB")])), [Code::LogSizes]);
}

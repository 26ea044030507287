//! Owns the rules between settings. A rule is left out when one of its settings could not be read.

use std::net::SocketAddr;
use std::time::Duration;

use super::key::percent_of;
use super::problem::{Code, Origin, Problem};
use super::source::{Found, Layers};
use super::value::{Value, show_bytes, show_ms};

/// The lease of a leader is the longest election timeout, and must outlast some lost heartbeats: with
/// fewer than five, one slow disk write deposes a healthy leader.
const HEARTBEATS_PER_LEASE: u32 = 5;

/// Waiting less than two heartbeats would take a late one for a dead leader.
const HEARTBEATS_PER_ELECTION: u32 = 2;

/// What budgets may take of the memory. The rest is for the log's cache, messages on their way, and
/// the page cache that RocksDB leans on.
const MEMORY_PERCENT_MAX: u64 = 70;

/// With fewer segments, the oldest can hardly be freed before the next is begun.
const SEGMENTS_MIN: u64 = 4;

const LISTENERS: [&str; 3] = ["listen.client", "listen.peer", "listen.http"];

/// Everything that does not fit together.
pub(super) fn check(layers: &Layers, memory_bytes: Option<u64>) -> Vec<Problem> {
    let mut problems = Vec::new();
    problems.extend(lease(layers));
    problems.extend(election(layers));
    problems.extend(election_spread(layers));
    problems.extend(ports(layers));
    for name in LISTENERS {
        problems.extend(insecure(layers, name));
    }
    problems.extend(advertise(layers, "listen.advertise_client", "listen.client"));
    problems.extend(advertise(layers, "listen.advertise_peer", "listen.peer"));
    problems.extend(memory(layers, memory_bytes));
    problems.extend(segments(layers));
    problems
}

/// The first of these that somebody set; a default is never what has to be mended first.
fn blamed(found: &[&Found]) -> Origin {
    let set = found.iter().find(|found| found.origin != Origin::Default);
    set.map_or(Origin::Default, |found| found.origin.clone())
}

fn problem(code: Code, what: String, of: &[&Found], allowed: &str, mend: String) -> Problem {
    Problem { code, what, origin: blamed(of), excerpt: None, allowed: allowed.to_owned(), mend }
}

fn span<'a>(layers: &'a Layers, name: &str) -> Option<(&'a Found, Duration)> {
    let found = layers.sound(name)?;
    match found.value {
        Value::Span(span) => Some((found, span)),
        _ => None,
    }
}

fn bytes<'a>(layers: &'a Layers, name: &str) -> Option<(&'a Found, u64)> {
    let found = layers.sound(name)?;
    match found.value {
        Value::Bytes(bytes) => Some((found, bytes)),
        _ => None,
    }
}

fn socket<'a>(layers: &'a Layers, name: &str) -> Option<(&'a Found, SocketAddr)> {
    let found = layers.sound(name)?;
    match found.value {
        Value::Listen(address) => Some((found, address)),
        _ => None,
    }
}

fn show_span(span: Duration) -> String {
    show_ms(span.as_millis() as u64)
}

fn lease(layers: &Layers) -> Option<Problem> {
    let (heartbeat_found, heartbeat) = span(layers, "raft.heartbeat_interval")?;
    let (max_found, max) = span(layers, "raft.election_timeout_max")?;
    let least = heartbeat * HEARTBEATS_PER_LEASE;
    (max < least).then(|| {
        problem(
            Code::RaftTiming,
            format!(
                "raft.election_timeout_max ({}) is less than {HEARTBEATS_PER_LEASE} times \
                 raft.heartbeat_interval ({})",
                show_span(max),
                show_span(heartbeat)
            ),
            &[max_found, heartbeat_found],
            "a leader's lease must outlast several heartbeats",
            format!(
                "raise raft.election_timeout_max to \"{}\", or lower raft.heartbeat_interval to \
                 \"{}\"",
                show_span(least),
                show_span(max / HEARTBEATS_PER_LEASE)
            ),
        )
    })
}

fn election(layers: &Layers) -> Option<Problem> {
    let (heartbeat_found, heartbeat) = span(layers, "raft.heartbeat_interval")?;
    let (min_found, min) = span(layers, "raft.election_timeout_min")?;
    let least = heartbeat * HEARTBEATS_PER_ELECTION;
    (min < least).then(|| {
        problem(
            Code::RaftTiming,
            format!(
                "raft.election_timeout_min ({}) is less than {HEARTBEATS_PER_ELECTION} times \
                 raft.heartbeat_interval ({})",
                show_span(min),
                show_span(heartbeat)
            ),
            &[min_found, heartbeat_found],
            "one late heartbeat must not start an election",
            format!(
                "raise raft.election_timeout_min to \"{}\", or lower raft.heartbeat_interval to \
                 \"{}\"",
                show_span(least),
                show_span(min / HEARTBEATS_PER_ELECTION)
            ),
        )
    })
}

fn election_spread(layers: &Layers) -> Option<Problem> {
    let (min_found, min) = span(layers, "raft.election_timeout_min")?;
    let (max_found, max) = span(layers, "raft.election_timeout_max")?;
    (min >= max).then(|| {
        problem(
            Code::RaftTiming,
            format!(
                "raft.election_timeout_min ({}) is not less than raft.election_timeout_max ({})",
                show_span(min),
                show_span(max)
            ),
            &[min_found, max_found],
            "candidates wait a random time between the two, so that one of them is first",
            format!("raise raft.election_timeout_max to \"{}\"", show_span(min * 2)),
        )
    })
}

fn ports(layers: &Layers) -> Vec<Problem> {
    let bound: Vec<(&str, &Found, SocketAddr)> = LISTENERS
        .iter()
        .filter_map(|name| socket(layers, name).map(|(found, address)| (*name, found, address)))
        .filter(|(.., address)| address.port() != 0)
        .collect();
    let mut problems = Vec::new();
    for (at, (name, found, address)) in bound.iter().enumerate() {
        for (other_name, other_found, other) in &bound[at + 1..] {
            let (ip, other_ip) = (address.ip(), other.ip());
            let overlap = ip == other_ip || ip.is_unspecified() || other_ip.is_unspecified();
            if address.port() == other.port() && overlap {
                problems.push(problem(
                    Code::PortsClash,
                    format!("{name} ({address}) and {other_name} ({other}) take the same port"),
                    &[other_found, found],
                    "each listener has a port of its own",
                    format!("give {other_name} another port, or port 0 for any free one"),
                ));
            }
        }
    }
    problems
}

fn insecure(layers: &Layers, name: &str) -> Option<Problem> {
    let allowed = layers.sound("listen.insecure")?;
    let (found, address) = socket(layers, name)?;
    (!address.ip().is_loopback() && allowed.value != Value::Bool(true)).then(|| {
        problem(
            Code::Insecure,
            format!("{name} ({address}) is reachable from other machines, without encryption"),
            &[found],
            "loopback addresses (127.0.0.1, [::1]) as long as listen.insecure is false",
            "listen on 127.0.0.1, or start with --insecure where the whole network is trusted"
                .to_owned(),
        )
    })
}

/// Unset, it is the listener's address, which must then be one that can be dialled.
fn advertise(layers: &Layers, name: &str, listener: &str) -> Option<Problem> {
    let advertised = layers.sound(name)?;
    let (listened, address) = socket(layers, listener)?;
    let example = format!("\"n1.example.org:{}\"", address.port().max(1));
    let (what, origin) = match &advertised.value {
        Value::Address(told) if told.ip().is_some_and(|ip| ip.is_unspecified()) => {
            (format!("{name} ({told}) is no address that anybody can dial"), advertised)
        }
        Value::Address(_) => return None,
        _ if address.ip().is_unspecified() => (
            format!("{listener} ({address}) listens on all interfaces, and {name} is not set"),
            listened,
        ),
        _ => return None,
    };
    Some(problem(
        Code::Advertise,
        what,
        &[origin],
        "an address of this machine as the others see it",
        format!("set {name} to this machine's name or address, for example {example}"),
    ))
}

fn memory(layers: &Layers, memory_bytes: Option<u64>) -> Option<Problem> {
    let (budget_found, budget) = bytes(layers, "storage.memory_budget")?;
    let (requests_found, requests) = bytes(layers, "limits.request_bytes_in_flight")?;
    let memory = memory_bytes?;
    let most = percent_of(memory, MEMORY_PERCENT_MAX);
    (budget.saturating_add(requests) > most).then(|| {
        problem(
            Code::Memory,
            format!(
                "storage.memory_budget ({}) and limits.request_bytes_in_flight ({}) are more than \
                 {MEMORY_PERCENT_MAX} % of the {}MiB that this process may use",
                show_bytes(budget),
                show_bytes(requests),
                memory >> 20
            ),
            &[budget_found, requests_found],
            &format!("together at most {}MiB here", most >> 20),
            match most.checked_sub(requests).map(|left| left >> 20) {
                Some(left) if left >= 64 => {
                    format!("lower storage.memory_budget to \"{left}MiB\", or give it more memory")
                }
                _ => "lower both, or give the machine or container more memory".to_owned(),
            },
        )
    })
}

fn segments(layers: &Layers) -> Option<Problem> {
    let (segment_found, segment) = bytes(layers, "storage.log_segment_bytes")?;
    let (target_found, target) = bytes(layers, "storage.log_bytes_target")?;
    let least = segment * SEGMENTS_MIN;
    (target < least).then(|| {
        problem(
            Code::LogSizes,
            format!(
                "storage.log_bytes_target ({}) is less than {SEGMENTS_MIN} times \
                 storage.log_segment_bytes ({})",
                show_bytes(target),
                show_bytes(segment)
            ),
            &[target_found, segment_found],
            "space is freed by whole segments",
            format!("raise storage.log_bytes_target to \"{}\"", show_bytes(least)),
        )
    })
}

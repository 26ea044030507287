//! Owns the list of what a cluster promises to its clients, as checks that run against any of them:
//! the fake one in memory and real ones of processes and disks. What passes on both is what a
//! service may rely on in its unit tests.
//!
//! Every check works on keys of its own and may run on a cluster that holds other data. It panics
//! with what it found. Nothing here breaks nodes: that is up to each kind of cluster.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::TryStreamExt;

use crate::admin::NewKeyspace;
use crate::answer::{Cas, Entry, KeyValue, Version};
use crate::client::{Client, Keyspace};
use crate::error::{Error, ErrorKind, Outcome};
use crate::request::Operation;
use crate::session::{Consistency, SessionMark};
use crate::topology::EntityRule;

mod past;

/// The keyspace that the checks use, besides `default`: its entities end at `/`.
pub const KEYSPACE: &str = "conformance";

/// Runs all checks, one after the other, and names each to `started` before it begins.
///
/// # Panics
/// When the cluster does not keep a promise.
pub async fn run(kv: &Client, mut started: impl FnMut(&str)) {
    let new = NewKeyspace::new(KEYSPACE);
    let new = NewKeyspace { entity_rule: EntityRule::Delimiter(b'/'), ..new };
    ok(kv.admin().create_keyspace(new).await);
    started("versions rise with every write of a key");
    versions_rise(kv).await;
    started("a condition decides, and what it met is told");
    conditions_decide(kv).await;
    started("a batch happens as a whole or not at all");
    batches_are_atomic(kv).await;
    started("a batch of two entities is refused, and names both keys");
    entities_are_not_crossed(kv).await;
    started("counters count in decimal and refuse what is none");
    counters_count(kv).await;
    started("increments from many tasks add up");
    increments_add_up(kv).await;
    started("what has expired is gone for reads, conditions and scans");
    what_expired_is_gone(kv).await;
    started("many keys come in the caller's order");
    order_is_the_callers(kv).await;
    started("a scan shows a range in key order, in both directions");
    scans_show_ranges(kv).await;
    started("a scan shows one version, whatever is written meanwhile");
    scans_show_one_version(kv).await;
    started("a scan goes on behind its resume token");
    scans_resume(kv).await;
    started("a range is deleted in steps, and no key beyond it");
    past::ranges_go_in_steps(kv).await;
    started("a range of one entity is deleted at once or not at all");
    past::ranges_go_at_once(kv).await;
    started("a range of too many keys is not deleted at once");
    past::too_much_at_once_is_refused(kv).await;
    started("a read at a version finds what was there");
    past::the_past_is_read(kv).await;
    started("a scan at a version shows what was there");
    past::the_past_is_scanned(kv).await;
    started("a keyspace's history is set, and what is gone stays gone");
    past::history_is_set(kv).await;
    started("a session reads its own writes, and hands them over");
    sessions_hold(kv).await;
    started("what lies beyond a limit is refused and not applied");
    limits_hold(kv).await;
    started("a keyspace is apart from the others, and has one rule");
    keyspaces_are_apart(kv).await;
}

#[track_caller]
fn ok<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| panic!("the cluster does not serve: {error}"))
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, kind: ErrorKind) -> Error {
    let error = result.expect_err("it is refused");
    assert_eq!((error.kind(), error.outcome()), (kind, Outcome::NotApplied), "{error}");
    error
}

#[track_caller]
fn mismatch(cas: Cas) -> Option<Entry> {
    match cas {
        Cas::Mismatch { current, .. } => current,
        Cas::Applied(written) => panic!("the condition held: {written:?}"),
    }
}

async fn value(kv: &Keyspace, key: &str) -> Option<Bytes> {
    ok(kv.get(key.to_owned()).await).map(|entry| entry.value)
}

/// A keyspace by its name, `default` too.
fn default(kv: &Client) -> Keyspace {
    kv.keyspace("default")
}

/// Another number on each run.
fn stamp() -> u128 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos())
}

async fn versions_rise(kv: &Client) {
    let kv = default(kv);
    let mut last = Version(0);
    for round in 0..20u32 {
        let written = match round % 4 {
            3 => ok(kv.delete("conformance-version").await),
            _ => ok(kv.put("conformance-version", round.to_string()).await),
        };
        assert!(written.version > last, "{} after {last}", written.version);
        last = written.version;
        let read = ok(kv.get("conformance-version").read().await);
        let expected = (round % 4 != 3).then_some(last);
        assert_eq!(read.entry.map(|entry| entry.version), expected, "round {round}");
        assert!(read.served.index >= written.served.index, "a read is not behind the write");
    }
    let again = ok(kv.delete("conformance-version").await);
    assert!(again.version > last, "deleting what is absent is a write too");
}

async fn conditions_decide(kv: &Client) {
    let kv = default(kv);
    let key = "conformance-condition";
    ok(kv.delete(key).await);
    let first = match ok(kv.put(key, "a").if_absent().await) {
        Cas::Applied(written) => written.version,
        Cas::Mismatch { current, .. } => panic!("the key was deleted, found {current:?}"),
    };
    let current = mismatch(ok(kv.put(key, "b").if_absent().await)).expect("it is there");
    assert_eq!((&current.value[..], current.version), (&b"a"[..], first));
    assert!(!ok(kv.put(key, "b").if_version(Version(first.0 + 1)).await).is_applied());
    assert!(!ok(kv.put(key, "b").if_value("x").await).is_applied());
    assert!(!ok(kv.delete(key).if_value("x").await).is_applied());
    assert!(!ok(kv.delete(key).if_version(Version(first.0 - 1)).await).is_applied());
    let unchanged = ok(kv.get(key).await).expect("nothing has changed it");
    assert_eq!((&unchanged.value[..], unchanged.version), (&b"a"[..], first));
    assert!(ok(kv.put(key, "b").if_version(first).await).is_applied());
    assert!(!ok(kv.put(key, "c").if_version(first).await).is_applied(), "only once");
    assert!(ok(kv.put(key, "c").if_value("b").await).is_applied());
    assert!(ok(kv.delete(key).if_value("c").await).is_applied());
    assert_eq!(mismatch(ok(kv.put(key, "d").if_version(first).await)), None, "nothing is there");
    assert_eq!(mismatch(ok(kv.put(key, "d").if_value("c").await)), None);
}

async fn batches_are_atomic(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    for key in ["b/1", "b/2", "b/3", "b/n"] {
        ok(kv.delete(key).await);
    }
    let done = ok(kv
        .batch([
            Operation::put("b/1", "one").if_absent(),
            Operation::put("b/2", "two"),
            Operation::increment("b/n", 5),
            Operation::increment("b/n", -2),
            Operation::check("b/3").if_absent(),
        ])
        .await);
    let version = done.applied.expect("all conditions hold");
    assert_eq!(done.results.len(), 5);
    assert_eq!((done.results[2].counter, done.results[3].counter), (5, 3));
    for key in ["b/1", "b/2", "b/n"] {
        let entry = ok(kv.get(key).await).expect("it was written");
        assert_eq!(entry.version, version, "{key}: one version for all");
    }
    assert_eq!(value(&kv, "b/n").await.as_deref(), Some(&b"3"[..]), "the last one stays");
    let failed = ok(kv
        .batch([
            Operation::put("b/2", "changed"),
            Operation::delete("b/1").if_value("other"),
            Operation::put("b/3", "new"),
            Operation::check("b/3").if_value("x"),
        ])
        .await);
    assert_eq!(failed.applied, None);
    let told: Vec<_> = failed.results.iter().map(|result| result.condition_failed).collect();
    assert_eq!(told, [false, true, false, true], "each that failed is told");
    let current = failed.results[1].current.as_ref().expect("what it met");
    assert_eq!((&current.value[..], current.version), (&b"one"[..], version));
    assert_eq!(failed.results[3].current, None, "nothing was there");
    assert_eq!(value(&kv, "b/2").await.as_deref(), Some(&b"two"[..]), "nothing has changed");
    assert_eq!(value(&kv, "b/3").await, None);
}

async fn entities_are_not_crossed(kv: &Client) {
    let crossing = || [Operation::put("e1/a", "1"), Operation::put("e2/b", "1")];
    for kv in [kv.keyspace(KEYSPACE), default(kv)] {
        let error = refused(kv.batch(crossing()).await, ErrorKind::CrossEntity);
        assert_eq!(error.reason(), Some("CROSS_ENTITY"));
        let text = error.to_string();
        assert!(text.contains("e1/a") && text.contains("e2/b"), "both keys are named: {text}");
        assert_eq!(value(&kv, "e1/a").await, None, "nothing was written");
    }
}

async fn counters_count(kv: &Client) {
    let kv = default(kv);
    let key = "conformance-counter";
    ok(kv.delete(key).await);
    assert_eq!(ok(kv.increment(key, 7).await).value, 7, "absent counts as 0");
    assert_eq!(ok(kv.increment(key, -10).await).value, -3);
    assert_eq!(value(&kv, key).await.as_deref(), Some(&b"-3"[..]), "kept as decimal text");
    ok(kv.put(key, "40").await);
    assert_eq!(ok(kv.increment(key, 2).await).value, 42);
    ok(kv.put(key, i64::MAX.to_string()).await);
    refused(kv.increment(key, 1).await, ErrorKind::InvalidArgument);
    ok(kv.put(key, "many").await);
    refused(kv.increment(key, 1).await, ErrorKind::InvalidArgument);
    assert_eq!(value(&kv, key).await.as_deref(), Some(&b"many"[..]), "it stays as it was");
}

async fn increments_add_up(kv: &Client) {
    let kv = default(kv);
    let key = "conformance-sum";
    ok(kv.delete(key).await);
    let add = |_| async { ok(kv.increment(key, 1).await).value };
    let mut seen = futures_util::future::join_all((0..100).map(add)).await;
    seen.sort_unstable();
    assert_eq!(seen, (1..=100).collect::<Vec<i64>>(), "each sees a sum of its own");
    assert_eq!(value(&kv, key).await.as_deref(), Some(&b"100"[..]));
}

async fn what_expired_is_gone(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    let ttl = Duration::from_millis(1_200);
    for key in ["t/short", "t/long", "t/kept"] {
        ok(kv.delete(key).await);
    }
    ok(kv.put("t/short", "x").ttl(ttl).await);
    ok(kv.put("t/long", "x").ttl(Duration::from_secs(3_600)).await);
    ok(kv.put("t/kept", "x").ttl(ttl).await);
    ok(kv.put("t/kept", "y").await);
    let entry = ok(kv.get("t/short").await).expect("it has not expired");
    let version_ms = entry.version.0 >> 16;
    assert_eq!(entry.expires_at_ms, Some(version_ms + 1_200), "counted from the version");
    assert_eq!(ok(kv.get("t/kept").await).expect("there").expires_at_ms, None);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while ok(kv.get("t/short").await).is_some() {
        assert!(tokio::time::Instant::now() < deadline, "it never expires");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    match ok(kv.put("t/long", "y").if_absent().await) {
        Cas::Mismatch { current: Some(current), .. } => {
            let version_ms = current.version.0 >> 16;
            assert_eq!(current.expires_at_ms, Some(version_ms + 3_600_000), "as a read tells it");
        }
        other => panic!("it is there: {other:?}"),
    }
    let keys = keys(&kv.scan(..).prefix("t/").stream().try_collect::<Vec<_>>().await);
    assert_eq!(keys, ["t/kept", "t/long"]);
    let session = kv.with_consistency(Consistency::Session);
    assert_eq!(value(&session, "t/short").await, None, "gone for sessions too");
    let again = ok(kv.put("t/short", "z").if_absent().await);
    assert!(again.is_applied(), "for a condition it is absent");
    assert_eq!(ok(kv.increment("t/n", 1).await).value, 1);
    ok(kv.delete("t/n").await);
}

async fn order_is_the_callers(kv: &Client) {
    let kv = default(kv);
    for number in 0..10 {
        ok(kv.put(format!("conformance-many-{number}"), number.to_string()).await);
    }
    let wanted = [9, 3, 3, 11, 0];
    let got = ok(kv.multi_get(wanted.map(|number| format!("conformance-many-{number}"))).await);
    let got: Vec<_> = got.into_iter().map(|entry| entry.map(|entry| entry.value)).collect();
    let expected = [Some("9"), Some("3"), Some("3"), None, Some("0")];
    assert_eq!(got, expected.map(|value| value.map(Bytes::from)));
}

#[track_caller]
fn keys(pairs: &Result<Vec<KeyValue>, Error>) -> Vec<String> {
    let pairs = pairs.as_ref().unwrap_or_else(|error| panic!("the scan failed: {error}"));
    pairs.iter().map(|pair| String::from_utf8_lossy(&pair.key).into_owned()).collect()
}

async fn scans_show_ranges(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    // Of several entities, and so of several shards.
    let all: Vec<String> = (0..30).map(|number| format!("s{number:02}/k")).collect();
    for key in &all {
        ok(kv.put(key.clone(), key.clone()).await);
    }
    let scanned = async |scan: crate::scan::Scan| keys(&scan.stream().try_collect().await);
    let range = || kv.scan("s00/k".."s99");
    assert_eq!(scanned(range()).await, all);
    let reverse: Vec<String> = all.iter().rev().cloned().collect();
    assert_eq!(scanned(range().reverse()).await, reverse);
    assert_eq!(scanned(range().reverse().limit(3)).await, reverse[..3]);
    assert_eq!(scanned(range().limit(7)).await, all[..7]);
    assert_eq!(scanned(kv.scan("s05/k".."s08/k")).await, all[5..8], "the end is not in it");
    assert_eq!(scanned(kv.scan(..).prefix("s1")).await, all[10..20]);
    assert_eq!(scanned(kv.scan("s07/".."s08").prefix("s07/")).await, all[7..8], "one entity");
    assert!(scanned(kv.scan("s08".."s05")).await.is_empty());
    let pairs: Vec<KeyValue> = ok(range().keys_only().stream().try_collect().await);
    assert!(pairs.iter().all(|pair| pair.value.is_empty() && pair.version > Version(0)));
}

async fn scans_show_one_version(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    // Of several entities, and large enough for several pages.
    let key = |number: u32| format!("v{number}/k");
    let padding = "x".repeat(300 << 10);
    for number in 0..10 {
        ok(kv.put(key(number), format!("before{padding}")).await);
    }
    let mut pages = kv.scan("v".."w").pages();
    let first = ok(pages.try_next().await).expect("a page");
    let mut shown = first.entries;
    assert!(shown.len() < 10, "a page holds 1 MiB at most");
    for number in 0..10 {
        let written = ok(kv.put(key(number), "after").await);
        assert!(written.version > first.version, "a version that was read at is not written at");
    }
    ok(kv.put("v99/k", "after").await);
    while let Some(page) = ok(pages.try_next().await) {
        assert_eq!(page.version, first.version, "one version throughout");
        shown.extend(page.entries);
    }
    assert_eq!(shown.len(), 10, "what came later is not in it");
    assert!(shown.iter().all(|pair| pair.value.starts_with(b"before")), "nor what it changed");
    let now: Vec<KeyValue> = ok(kv.scan("v".."w").stream().try_collect().await);
    assert_eq!(now.len(), 11, "a new scan sees the new state");
    assert!(now.iter().all(|pair| pair.value == "after"));
    ok(kv.delete("v99/k").await);
}

async fn scans_resume(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    // Large enough for several pages.
    let big = Bytes::from(vec![b'x'; 400 << 10]);
    let all: Vec<String> = (0..8).map(|number| format!("r/{number}")).collect();
    for key in &all {
        ok(kv.put(key.clone(), big.clone()).await);
    }
    let scan = || kv.scan(..).prefix("r/");
    let (mut found, mut token, mut version) = (Vec::new(), Bytes::new(), None);
    loop {
        let mut pages = scan().resume(token.clone()).pages();
        let Some(page) = ok(pages.try_next().await) else { break };
        found.extend(keys(&Ok(page.entries.clone())));
        assert_eq!(*version.get_or_insert(page.version), page.version, "one version throughout");
        token = page.resume_token;
        // Behind the token: it must not appear in what is left, nor what was there be missing.
        ok(kv.put("r/0", "changed").await);
        ok(kv.put("r/9", "new").await);
        if found.len() >= all.len() {
            break;
        }
    }
    assert_eq!(found, all, "nothing is missing and nothing comes twice");
    let other = kv.scan(..).prefix("s").resume(token).pages().try_next().await;
    refused(other.map(|_| ()), ErrorKind::InvalidArgument);
    for key in all.iter().map(String::as_str).chain(["r/9"]) {
        ok(kv.delete(key.to_owned()).await);
    }
}

async fn sessions_hold(kv: &Client) {
    let session = kv.with_consistency(Consistency::Session);
    let stamp = stamp();
    for round in 0..50u32 {
        let key = format!("conformance-session-{}", round % 7);
        let value = format!("{stamp}-{round}");
        ok(session.put(key.clone(), value.clone()).await);
        let read = ok(session.get(key.clone()).read().await);
        let entry = read.entry.expect("its own write is there");
        assert_eq!(entry.value, value, "served by {:?}", read.served);
        let mark = SessionMark::from_bytes(session.session_mark().as_bytes().clone());
        ok(session.take_in(&mark));
        let many = ok(session.multi_get([key]).await);
        assert_eq!(many[0].as_ref().map(|entry| &entry.value[..]), Some(value.as_bytes()));
    }
    let damaged = session.take_in(&SessionMark::from_bytes("no mark"));
    refused(damaged, ErrorKind::InvalidArgument);
}

async fn limits_hold(kv: &Client) {
    let kv = default(kv);
    refused(kv.put("", "v").await, ErrorKind::InvalidArgument);
    refused(kv.put(vec![b'k'; 4_097], "v").await, ErrorKind::TooLarge);
    refused(kv.put("conformance-limit", vec![0; (1 << 20) + 1]).await, ErrorKind::TooLarge);
    refused(kv.batch([]).await, ErrorKind::InvalidArgument);
    let longest = vec![b'k'; 4_096];
    let largest = Bytes::from(vec![7; 1 << 20]);
    ok(kv.put(longest.clone(), largest.clone()).await);
    let entry = ok(kv.get(longest.clone()).await).expect("the largest that may be");
    assert_eq!(entry.value, largest);
    ok(kv.delete(longest).await);
    ok(kv.put("conformance-limit", "").await);
    let empty = ok(kv.get("conformance-limit").await).expect("an empty value is a value");
    assert!(empty.value.is_empty());
}

async fn keyspaces_are_apart(kv: &Client) {
    let other = kv.keyspace(KEYSPACE);
    ok(default(kv).put("conformance-apart", "here").await);
    ok(other.delete("conformance-apart").await);
    assert_eq!(value(&default(kv), "conformance-apart").await.as_deref(), Some(&b"here"[..]));
    assert_eq!(value(&other, "conformance-apart").await, None);
    let same =
        NewKeyspace { entity_rule: EntityRule::Delimiter(b'/'), ..NewKeyspace::new(KEYSPACE) };
    ok(kv.admin().create_keyspace(same).await);
    let differs = kv.admin().create_keyspace(NewKeyspace::new(KEYSPACE)).await;
    refused(differs, ErrorKind::Conflict);
    refused(kv.keyspace("conformance-none").get("k").await, ErrorKind::NotFound);
    refused(kv.keyspace("system").put("k", "v").await, ErrorKind::NotFound);
}

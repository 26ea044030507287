//! Owns the checks of what is deleted by ranges and of what can be read of the past. See the module
//! above.

use std::time::Duration;

use coracle_proto::limits::HISTORY_MAX;
use futures_util::TryStreamExt;
use tokio::time::{Instant, sleep};

use super::{KEYSPACE, default, keys, ok, refused, stamp, value};
use crate::admin::NewKeyspace;
use crate::answer::Version;
use crate::client::{Client, Keyspace};
use crate::error::{Error, ErrorKind};
use crate::request::Operation;
use crate::session::Consistency;

/// The keyspace whose history changes.
const HISTORY_KEYSPACE: &str = "conformance-history";

/// How long the shards may take to follow, and what every keyspace keeps to be gone.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(60);

async fn found(kv: &Keyspace, prefix: &str, at: Option<Version>) -> Vec<String> {
    let scan = kv.scan(..).prefix(prefix.to_owned());
    let scan = match at {
        Some(version) => scan.at(version),
        None => scan,
    };
    keys(&scan.stream().try_collect().await)
}

pub(super) async fn ranges_go_in_steps(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    // Of several entities, and so of several shards.
    let all: Vec<String> = (0..40).map(|number| format!("d{number:02}/k")).collect();
    let fill = async || {
        for key in &all {
            ok(kv.put(key.clone(), "x").await);
        }
    };
    let left: Vec<String> = all[..5].iter().chain(&all[35..]).cloned().collect();
    let range = || kv.delete_range("d05/k".."d35").step_keys(1);
    fill().await;
    let mut steps = range().stream();
    let (mut told, mut rounds) = (0, 0);
    loop {
        let progress = ok(steps.try_next().await).expect("the end is told");
        assert!(progress.deleted >= told, "{} after {told}", progress.deleted);
        (told, rounds) = (progress.deleted, rounds + 1);
        if progress.done {
            break;
        }
        assert!(!progress.resume_token.is_empty(), "it could be gone on with");
    }
    assert!(ok(steps.try_next().await).is_none(), "nothing comes behind the end");
    assert!(rounds > 1, "30 keys in steps of one");
    assert_eq!(told, 30, "each key once");
    assert_eq!(found(&kv, "d", None).await, left, "nothing beyond the range");
    assert_eq!(ok(range().await).deleted, 0, "what is gone is not deleted again");

    fill().await;
    let mut steps = range().stream();
    let first = ok(steps.try_next().await).expect("a progress");
    assert!(first.deleted == 0 && !first.done, "nothing goes before it was told: {first:?}");
    let early = first.resume_token;
    ok(kv.put("d34/k", "newer").await);
    let second = ok(steps.try_next().await).expect("a progress");
    assert!((1..29).contains(&second.deleted) && !second.done, "{second:?}");
    drop(steps);
    let token = second.resume_token;
    let rest = ok(range().resume(token.clone()).await);
    assert!(second.deleted + rest.deleted <= 29, "{} and {}", second.deleted, rest.deleted);
    let and_newer: Vec<String> = all[..5].iter().chain(&all[34..]).cloned().collect();
    assert_eq!(found(&kv, "d", None).await, and_newer, "the rest, and nothing newer or beyond");
    ok(kv.put("d20/k", "newer").await);
    assert_eq!(ok(range().resume(early).await).deleted, 0, "late as it is");
    ok(kv.delete("d20/k").await);
    ok(kv.delete("d34/k").await);
    let other = kv.delete_range("d05/k".."d36").resume(token).await;
    refused(other, ErrorKind::InvalidArgument);

    assert_eq!(ok(kv.delete_range("d05".."d01").await).deleted, 0, "an empty range");
    assert_eq!(found(&kv, "d", None).await, left);
    assert_eq!(ok(kv.delete_range(..).prefix("d0").await).deleted, 5);
    assert_eq!(found(&kv, "d", None).await, left[5..]);
    ok(kv.delete_range(..).prefix("d").await);
}

pub(super) async fn ranges_go_at_once(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    let puts = (0..6).map(|number| Operation::put(format!("x/{number}"), "x"));
    let before = ok(kv.batch(puts).await).applied.expect("no condition");
    ok(kv.put("y/1", "x").await);
    let crossing = kv.delete_range("x/".."y/2").atomic().await;
    refused(crossing, ErrorKind::CrossEntity);
    let resumed = kv.delete_range(..).prefix("x/").atomic().resume("a token").await;
    refused(resumed, ErrorKind::InvalidArgument);
    assert_eq!(found(&kv, "x/", None).await.len(), 6, "nothing has changed");

    let done = ok(kv.delete_range("x/1".."x/4").atomic().await);
    assert_eq!(done.deleted, 3);
    assert!(done.version > before, "it is a write");
    assert_eq!(found(&kv, "x/", None).await, ["x/0", "x/4", "x/5"]);
    let just_before = Version(done.version.0 - 1);
    assert_eq!(found(&kv, "x/", Some(just_before)).await.len(), 6, "all at one version");
    assert_eq!(found(&kv, "x/", Some(done.version)).await.len(), 3);
    let again = ok(kv.delete_range("x/1".."x/4").atomic().await);
    assert_eq!(again.deleted, 0);
    assert!(again.version > done.version, "deleting nothing is a write too");
    assert_eq!(ok(kv.delete_range("x/4".."x/1").atomic().await).deleted, 0, "an empty range");
    assert_eq!(ok(kv.delete_range(..).prefix("x/").atomic().await).deleted, 3);
    assert_eq!(value(&kv, "y/1").await.as_deref(), Some(&b"x"[..]), "nothing beyond it");
}

pub(super) async fn too_much_at_once_is_refused(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    // Of this run alone: what another has deleted there would count.
    let entity = format!("z{}/", stamp());
    for part in 0..11 {
        let keys = part * 1_000..10_001.min((part + 1) * 1_000);
        let puts = keys.map(|number| Operation::put(format!("{entity}{number:05}"), ""));
        ok(kv.batch(puts).await);
    }
    let all = || kv.delete_range(..).prefix(entity.clone()).atomic();
    let error = refused(all().await, ErrorKind::TooLarge);
    assert_eq!(error.limit(), Some("DELETE_RANGE_KEYS_MAX"), "{error}");
    assert_eq!(found(&kv, &entity, None).await.len(), 10_001, "all or nothing");
    ok(kv.delete(format!("{entity}00000")).await);
    assert_eq!(ok(all().await).deleted, 10_000, "so many are not too many");
    assert!(found(&kv, &entity, None).await.is_empty());
}

pub(super) async fn the_past_is_read(kv: &Client) {
    let kv = default(kv);
    let key = "conformance-past";
    ok(kv.delete(key).await);
    let first = ok(kv.put(key, "a").await).version;
    let second = ok(kv.put(key, "b").await).version;
    let third = ok(kv.delete(key).await).version;
    ok(kv.put(key, "c").await);
    let expected = [
        (first, Some("a")),
        (Version(second.0 - 1), Some("a")),
        (second, Some("b")),
        (third, None),
    ];
    for kv in [kv.clone(), kv.with_consistency(Consistency::Any)] {
        for (version, value) in expected {
            let entry = ok(kv.get(key).at(version).await);
            let text = entry.as_ref().map(|entry| String::from_utf8_lossy(&entry.value));
            assert_eq!(text.as_deref(), value, "at {version}");
            assert!(entry.as_ref().is_none_or(|entry| entry.version <= version));
            let many = ok(kv.multi_get([key, key]).at(version).await);
            assert_eq!(many, [entry.clone(), entry], "at {version}");
        }
    }
    let at_all = refused(kv.get(key).at(Version(0)).await, ErrorKind::InvalidArgument);
    assert_eq!(at_all.attempts(), 0, "there is no version 0");
    refused(kv.get(key).at(Version(1)).await, ErrorKind::VersionGone);
    refused(kv.multi_get([key]).at(Version(1)).await, ErrorKind::VersionGone);
    let scanned = kv.scan(..).prefix(key).at(Version(1)).stream().try_next().await;
    refused(scanned, ErrorKind::VersionGone);
}

pub(super) async fn the_past_is_scanned(kv: &Client) {
    let kv = kv.keyspace(KEYSPACE);
    ok(kv.delete_range(..).prefix("p/").atomic().await);
    let puts = |keys: [&'static str; 3], value: &'static str| {
        kv.batch(keys.map(|key| Operation::put(key, value)))
    };
    let first = ok(puts(["p/1", "p/2", "p/3"], "old").await).applied.expect("no condition");
    let second = ok(puts(["p/2", "p/3", "p/4"], "new").await).applied.expect("no condition");
    let third = ok(kv.delete("p/1").await).version;
    for (version, expected) in [
        (first, vec!["p/1=old", "p/2=old", "p/3=old"]),
        (second, vec!["p/1=old", "p/2=new", "p/3=new", "p/4=new"]),
        (third, vec!["p/2=new", "p/3=new", "p/4=new"]),
    ] {
        let pairs: Vec<_> = ok(kv.scan(..).prefix("p/").at(version).stream().try_collect().await);
        let text = |part: &[u8]| String::from_utf8_lossy(part).into_owned();
        let shown = pairs.iter().map(|pair| format!("{}={}", text(&pair.key), text(&pair.value)));
        assert_eq!(shown.collect::<Vec<_>>(), expected, "at {version}");
        let mut pages = kv.scan(..).prefix("p/").at(version).pages();
        let page = ok(pages.try_next().await).expect("a page");
        assert_eq!(page.version, version, "it says so");
    }
    ok(kv.delete_range(..).prefix("p/").atomic().await);
}

pub(super) async fn history_is_set(kv: &Client) {
    let admin = kv.admin();
    let made = ok(admin.create_keyspace(NewKeyspace::new(HISTORY_KEYSPACE)).await);
    let shown = async || {
        let keyspaces = ok(admin.keyspaces().await);
        keyspaces.into_iter().find(|known| known.name == HISTORY_KEYSPACE).expect("it was made")
    };
    let none = Duration::ZERO;
    let tried = ok(admin.set_history(HISTORY_KEYSPACE, none, true).await);
    assert_eq!((tried.history, shown().await.history), (none, made.history), "only tried");
    let past = kv.keyspace(HISTORY_KEYSPACE);
    let old = ok(past.put("k", "old").await).version;
    ok(past.put("k", "new").await);
    let entry = ok(past.get("k").at(old).await).expect("within its history");
    assert_eq!(&entry.value[..], b"old");

    let set = ok(admin.set_history(HISTORY_KEYSPACE, none, false).await);
    assert_eq!((set.id, set.history, shown().await.history), (made.id, none, none));
    let again = ok(admin.set_history(HISTORY_KEYSPACE, none, false).await);
    assert_eq!(again.history, none, "what is so already is no error");
    let deadline = Instant::now() + FOLLOWED_WITHIN;
    let gone = |read: Result<_, Error>| match read {
        Ok(_) => false,
        Err(error) if error.kind() == ErrorKind::VersionGone => true,
        Err(error) => panic!("neither there nor gone: {error}"),
    };
    while !gone(past.get("k").at(old).await) {
        assert!(Instant::now() < deadline, "the old version stays for ever");
        sleep(Duration::from_millis(100)).await;
        // The shard's clock moves on with what it does.
        ok(past.put("k", "new").await);
    }
    assert_eq!(value(&past, "k").await.as_deref(), Some(&b"new"[..]), "the newest is always there");

    let back = ok(admin.set_history(HISTORY_KEYSPACE, made.history, false).await);
    assert_eq!((back.history, shown().await.history), (made.history, made.history));
    refused(past.get("k").at(old).await, ErrorKind::VersionGone);
    refused(admin.set_history("conformance-none", none, false).await, ErrorKind::NotFound);
    let longer = HISTORY_MAX + Duration::from_millis(1);
    refused(admin.set_history(HISTORY_KEYSPACE, longer, false).await, ErrorKind::TooLarge);
    assert_eq!(shown().await.history, made.history, "a refusal changes nothing");
}

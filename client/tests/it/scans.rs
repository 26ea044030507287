//! Scans: order, limits, and going on behind the last page when a node fails.

use std::time::Duration;

use coracle_client::NodeId;
use coracle_client::testing::{Act, FakeCluster, Refusal};
use coracle_client::topology::NodeState;
use coracle_client::{Client, ErrorKind, Version};
use futures_util::TryStreamExt;
use tokio::time::Instant;

use crate::start::{refuse, start};

async fn filled(count: u32) -> (FakeCluster, Client) {
    let cluster = start(3, 4);
    let kv = cluster.client().await;
    for n in 0..count {
        kv.put(format!("k{n:02}"), format!("{n}")).await.expect("a put");
    }
    (cluster, kv)
}

async fn keys(stream: coracle_client::ScanStream) -> Vec<String> {
    let pairs: Vec<_> = stream.try_collect().await.expect("a scan");
    pairs.into_iter().map(|pair| String::from_utf8_lossy(&pair.key).into_owned()).collect()
}

fn expected(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|n| format!("k{n:02}")).collect()
}

#[tokio::test(start_paused = true)]
async fn ranges_prefixes_limits_and_directions() {
    let (_cluster, kv) = filled(30).await;
    assert_eq!(keys(kv.scan(..).stream()).await, expected(0..30));
    assert_eq!(keys(kv.scan("k05".."k08").stream()).await, expected(5..8));
    assert_eq!(keys(kv.scan("k27"..).stream()).await, expected(27..30));
    assert_eq!(keys(kv.scan(.."k02").stream()).await, expected(0..2));
    assert_eq!(keys(kv.scan(..).prefix("k1").stream()).await, expected(10..20));
    assert_eq!(keys(kv.scan(..).limit(5).stream()).await, expected(0..5));
    assert_eq!(keys(kv.scan(..).reverse().limit(3).stream()).await, expected([29, 28, 27]));
}

#[tokio::test(start_paused = true)]
async fn an_empty_range_is_empty_and_not_everything() {
    let (_cluster, kv) = filled(3).await;
    assert!(keys(kv.scan("k00".."").stream()).await.is_empty());
    assert!(keys(kv.scan(.."").stream()).await.is_empty());
    assert!(keys(kv.scan("k02".."k01").stream()).await.is_empty());
    assert!(keys(kv.scan(..).limit(0).stream()).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_broken_scan_goes_on_with_nothing_missing_and_nothing_twice() {
    let (cluster, kv) = filled(30).await;
    for node in 1..=3 {
        cluster.script(
            NodeId(node),
            [Act::CutAfterPages(1), Act::CutAfterPages(2), Act::CutAfterPages(0)],
        );
    }
    let started = Instant::now();
    assert_eq!(keys(kv.scan(..).stream()).await, expected(0..30));
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    for node in 1..=3 {
        cluster.script(NodeId(node), [Act::CutAfterPages(1), Act::CutAfterPages(1)]);
    }
    let reverse = kv.scan(..).reverse().limit(13).stream();
    assert_eq!(keys(reverse).await, expected((17..30).rev()), "the limit holds over all parts");
}

#[tokio::test(start_paused = true)]
async fn a_silent_node_is_left_for_another() {
    let (cluster, kv) = filled(4).await;
    for node in 1..=3 {
        cluster.script(NodeId(node), [Act::LoseRequest]);
    }
    assert_eq!(keys(kv.scan(..).stream()).await.len(), 4, "the second round answers");
    for node in 1..=3 {
        cluster.script(NodeId(node), vec![Act::LoseRequest; 20]);
    }
    let started = Instant::now();
    let error = kv.scan(..).pages().try_next().await.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(started.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn two_silent_nodes_leave_time_for_the_third() {
    let (cluster, _) = filled(4).await;
    for turn in 0..20 {
        for node in 1..=2 {
            cluster.script(NodeId(node), [Act::LoseRequest]);
        }
        // A client that has not learnt yet who is silent.
        let kv = cluster.client().await;
        let found = kv.scan(..).timeout(Duration::from_secs(2)).stream();
        let found: Result<Vec<_>, _> = found.try_collect().await;
        assert_eq!(found.map(|found| found.len()).map_err(|e| e.to_string()), Ok(4), "{turn}");
        for node in 1..=3 {
            cluster.script(NodeId(node), []);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_has_left_is_asked_for_nothing_though_it_is_a_seed() {
    let cluster = start(4, 4);
    let kv = cluster.client().await;
    kv.put("k00", "0").await.expect("a put");
    cluster.set_node_state(NodeId(4), NodeState::Decommissioned);
    let kv = cluster.client().await;
    // Long enough that what failed once counts as well again.
    cluster.take_requests();
    for _ in 0..40 {
        assert_eq!(keys(kv.scan(..).stream()).await, expected(0..1));
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    let asked = cluster.take_requests();
    assert_eq!(asked.len(), 40);
    assert!(asked.iter().all(|request| request.node != NodeId(4)), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_go_on_is_said() {
    let (cluster, kv) = filled(4).await;
    for node in 1..=3 {
        cluster.script(NodeId(node), [refuse("VERSION_GONE")]);
    }
    let mut stream = kv.scan(..).stream();
    let error = stream.try_next().await.expect_err("the version is gone");
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::VersionGone, 1));
    assert!(stream.try_next().await.expect("it has ended").is_none());
    let long = kv.scan(..).prefix(vec![b'x'; 5_000]).stream().try_next().await;
    assert_eq!(long.expect_err("too long").kind(), ErrorKind::TooLarge);
}

#[tokio::test(start_paused = true)]
async fn empty_pages_are_passed_and_can_be_resumed_from() {
    for reverse in [false, true] {
        let (cluster, kv) = filled(30).await;
        for n in (3..12).chain(15..28) {
            kv.delete(format!("k{n:02}")).await.expect("a delete");
        }
        let scan = || if reverse { kv.scan(..).reverse() } else { kv.scan(..) };
        let mut left: Vec<u32> = (0..3).chain(12..15).chain(28..30).collect();
        if reverse {
            left.reverse();
        }
        assert_eq!(keys(scan().stream()).await, expected(left.clone()));
        let (mut found, mut empty, mut token) = (Vec::new(), 0, None);
        loop {
            // Every page by a scan of its own.
            let scan = token.take().into_iter().fold(scan(), |scan, token| scan.resume(token));
            let page = scan.pages().try_next().await.expect("a page").expect("not the end");
            empty += usize::from(page.entries.is_empty());
            found.extend(page.entries.into_iter().map(|pair| pair.key));
            if page.is_last {
                break;
            }
            token = Some(page.resume_token);
        }
        assert!(empty >= 5, "{empty} empty pages");
        assert_eq!(found, expected(left.clone()));
        for node in 1..=3 {
            cluster.script(NodeId(node), vec![Act::CutAfterPages(1); 4]);
        }
        assert_eq!(keys(scan().stream()).await, expected(left), "over streams that break");
    }
}

#[tokio::test(start_paused = true)]
async fn there_is_no_version_0() {
    let (_cluster, kv) = filled(2).await;
    let mut scan = kv.scan(..).at(Version(0)).stream();
    assert_eq!(scan.try_next().await.expect_err("none").kind(), ErrorKind::InvalidArgument);
    let get = kv.get("k00").at(Version(0)).await;
    assert_eq!(get.expect_err("none").kind(), ErrorKind::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn pages_can_be_resumed_by_another_client() {
    let (cluster, kv) = filled(10).await;
    let mut pages = kv.scan(..).pages();
    let (mut first, mut version) = (Vec::new(), None);
    let mut token = Default::default();
    for _ in 0..2 {
        let page = pages.try_next().await.expect("a page").expect("not the end");
        assert_eq!(page.version, *version.get_or_insert(page.version));
        first.extend(page.entries);
        token = page.resume_token;
    }
    drop(pages);
    assert_eq!(first.len(), 4);
    let other = cluster.client_builder().seed(80).connect().await.expect("a client");
    assert_eq!(keys(other.scan(..).resume(token).stream()).await, expected(4..10));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_was_away_goes_on_where_it_stood_within_its_page() {
    let (cluster, kv) = filled(30).await;
    let mut stream = kv.scan(..).stream();
    let mut found = Vec::new();
    for away in 0..3 {
        // Pages have two entries: one is taken, and the other waits here.
        for _ in 0..5 {
            found.push(stream.try_next().await.expect("an entry").expect("not the end"));
        }
        tokio::time::sleep(Duration::from_secs(90)).await;
        (1..=3).for_each(|node| cluster.cut(NodeId(node)));
        let busy = Refusal::overloaded(Duration::from_millis(100));
        let busy = Act::RefuseAfterPages(away, busy);
        (1..=3).for_each(|node| cluster.script(NodeId(node), [busy.clone()]));
    }
    found.extend(stream.try_collect::<Vec<_>>().await.expect("the rest"));
    let found = found.into_iter().map(|pair| String::from_utf8_lossy(&pair.key).into_owned());
    assert_eq!(found.collect::<Vec<_>>(), expected(0..30));
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_gone_midway_is_said_behind_what_was_read() {
    let (cluster, kv) = filled(30).await;
    for node in 1..=3 {
        let gone = Act::RefuseAfterPages(2, Refusal::new("VERSION_GONE"));
        cluster.script(NodeId(node), [gone]);
    }
    let mut stream = kv.scan(..).stream();
    for number in 0..4 {
        let pair = stream.try_next().await.expect("an entry").expect("not the end");
        assert_eq!(pair.key, format!("k{number:02}"));
    }
    let error = stream.try_next().await.expect_err("the version is gone");
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::VersionGone, false));
    assert!(stream.try_next().await.expect("it has ended").is_none());
}

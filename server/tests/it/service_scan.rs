//! Scans over four shards on two nodes: order, bounds, one version, resuming, long runs of deleted keys,
//! readers that stop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_server::admission::Call;
use coracle_server::router::Router;
use coracle_server::scan::{self, IDLE_MAX, NewPins, PAGE_TIME, Pages, Pins, Scan};
use coracle_storage::exec::RealExec;
use futures_util::future::{BoxFuture, ready};
use parking_lot::Mutex;

use crate::service_nodes::{Node, Nodes, key_on, pass, put, shard_of, until};

/// All pages of a scan.
async fn pages(node: &Node, request: v1::ScanRequest) -> Result<Vec<v1::ScanResponse>, Fault> {
    let mut scan = Scan::begin(node.router.clone(), request, Call::client(None)).await?;
    let mut pages = Vec::new();
    while let Some(page) = scan.next_page().await? {
        pages.push(page);
    }
    Ok(pages)
}

fn keys(pages: &[v1::ScanResponse]) -> Vec<Bytes> {
    pages.iter().flat_map(|page| &page.entries).map(|entry| entry.key.clone()).collect()
}

/// Keys of `default` over all shards, each with its value.
async fn fill(node: &Node, count: usize) -> BTreeMap<Bytes, Bytes> {
    let mut all = BTreeMap::new();
    let value = "v".repeat(200);
    for number in 0..count {
        let key = format!("k{number:04}");
        node.put(put(&key, &format!("{value}{number}"))).await.unwrap();
        all.insert(key.into(), format!("{value}{number}").into());
    }
    all
}

fn scan() -> v1::ScanRequest {
    v1::ScanRequest { page_bytes: 16 << 10, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_all_shards_come_in_order_whole_and_within_bounds() {
    let nodes = Nodes::start().await;
    let all = fill(&nodes.one, 400).await;
    let found = pages(&nodes.two, scan()).await.unwrap();
    assert!(found.len() > 3, "{} pages", found.len());
    assert_eq!(keys(&found), all.keys().cloned().collect::<Vec<_>>());
    assert!(
        found.iter().flat_map(|page| &page.entries).all(|found| {
            found.entry.as_ref().is_some_and(|entry| entry.value == all[&found.key])
        })
    );
    assert!(found.iter().all(|page| page.version == found[0].version && page.version > 0));
    let done: Vec<_> = found.iter().map(|page| page.done).collect();
    assert!(done.iter().rev().skip(1).all(|done| !done) && done.last() == Some(&true));

    let cases = [
        (
            v1::ScanRequest { start: "k0100".into(), end: "k0200".into(), ..scan() },
            "k0100",
            "k0200",
        ),
        (v1::ScanRequest { prefix: "k01".into(), ..scan() }, "k01", "k02"),
        (v1::ScanRequest { prefix: "k01".into(), start: "k0150".into(), ..scan() }, "k0150", "k02"),
        (v1::ScanRequest { prefix: "k01".into(), end: "k0110".into(), ..scan() }, "k01", "k0110"),
        (v1::ScanRequest { start: "k2".into(), end: "k1".into(), ..scan() }, "k2", "k2"),
        (v1::ScanRequest { keys_only: true, ..scan() }, "", "z"),
    ];
    for (request, from, to) in cases {
        let expected: Vec<_> =
            all.keys().filter(|key| *key >= from && *key < to).cloned().collect();
        let limited: Vec<_> = expected.iter().take(25).cloned().collect();
        let keys_only = request.keys_only;
        let reversed: Vec<_> = expected.iter().rev().cloned().collect();
        let found = pages(&nodes.one, request.clone()).await.unwrap();
        assert_eq!(keys(&found), expected, "{request:?}");
        let mut entries = found.iter().flat_map(|page| &page.entries);
        assert!(entries.all(|found| {
            found.entry.as_ref().is_some_and(|entry| entry.value.is_empty() == keys_only)
        }));
        let backwards = v1::ScanRequest { reverse: true, ..request.clone() };
        assert_eq!(keys(&pages(&nodes.one, backwards).await.unwrap()), reversed, "{request:?}");
        let limit = v1::ScanRequest { limit: 25, ..request.clone() };
        assert_eq!(keys(&pages(&nodes.two, limit).await.unwrap()), limited, "{request:?}");
    }
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scan_resumes_anywhere_at_its_version_with_nothing_missing_or_twice() {
    let nodes = Nodes::start().await;
    let all = fill(&nodes.one, 200).await;
    for reverse in [false, true] {
        let request = v1::ScanRequest { reverse, limit: 150, ..scan() };
        let mut found = Vec::new();
        let mut token = Bytes::new();
        for turn in 0.. {
            assert!(turn < 1_000, "the scan comes to its end");
            let node = if turn % 2 == 0 { &nodes.one } else { &nodes.two };
            let resumed = v1::ScanRequest { resume_token: token, ..request.clone() };
            let call = Call::client(None);
            let mut scan = Scan::begin(node.router.clone(), resumed, call).await.unwrap();
            let Some(page) = scan.next_page().await.unwrap() else {
                break;
            };
            token = page.resume_token.clone();
            let done = page.done;
            found.push(page);
            // Whoever scans must not see what is written meanwhile.
            let late = format!("k0{turn:03}x");
            nodes.one.put(put(&late, "late")).await.unwrap();
            nodes.two.put(put("k0100", "changed")).await.unwrap();
            if done {
                break;
            }
        }
        let mut expected: Vec<_> = all.keys().cloned().collect();
        if reverse {
            // Written during the first scan, before the second.
            let late: Vec<_> = keys(&pages(&nodes.one, scan()).await.unwrap());
            expected = late.into_iter().rev().collect();
            let seen = keys(&found);
            let of_first: Vec<_> = seen.iter().filter(|key| all.contains_key(*key)).collect();
            assert!(of_first.is_sorted_by(|a, b| a > b));
            assert_eq!(seen.len(), 150);
            assert!(seen.iter().all(|key| expected.contains(key)));
        } else {
            assert_eq!(keys(&found), expected[..150]);
        }
        assert!(found.iter().all(|page| page.version == found[0].version));
    }
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scan_holds_every_write_acknowledged_before_it() {
    let nodes = Nodes::start().await;
    for round in 0..20 {
        for shard in 1..=4 {
            let node = if round % 2 == 0 { &nodes.one } else { &nodes.two };
            node.put(put(&key_on(shard), &round.to_string())).await.unwrap();
        }
        let found = pages(&nodes.two, scan()).await.unwrap();
        let values = found.iter().flat_map(|page| &page.entries);
        let values: Vec<_> =
            values.map(|found| found.entry.as_ref().unwrap().value.clone()).collect();
        assert_eq!(values, vec![Bytes::from(round.to_string()); 4]);
    }
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn range_of_one_entity_is_one_shards_and_a_long_deleted_run_is_passed_in_pages() {
    let nodes = Nodes::start().await;
    let row = |number: usize| Bytes::from(format!("r/{number:06}"));
    let value = || v1::operation::Kind::Put(v1::PutOperation { value: "v".into(), ttl_ms: 0 });
    let gone = || v1::operation::Kind::Delete(v1::DeleteOperation {});
    for number in (0..36_000).step_by(1_000) {
        write_rows(&nodes.one, number, gone).await;
    }
    write_rows(&nodes.one, 36_000, value).await;
    nodes.one.put(v1::PutRequest { keyspace: "rows".into(), ..put("s/1", "other") }).await.unwrap();

    let rows = v1::ScanRequest { keyspace: "rows".into(), prefix: "r/".into(), ..scan() };
    let found = pages(&nodes.two, rows.clone()).await.unwrap();
    assert!(found[0].entries.is_empty() && !found[0].done, "the run of deleted keys ends a page");
    let expected: Vec<_> = (36_000..37_000).map(row).collect();
    assert_eq!(keys(&found), expected);
    let shard = shard_of("rows", "r/");
    assert!(found.iter().all(|page| page.served.is_some_and(|served| served.shard == shard)));
    assert!(found.iter().all(|page| page.version == found[0].version));

    let backwards = v1::ScanRequest { reverse: true, limit: 3, ..rows };
    let found = pages(&nodes.one, backwards).await.unwrap();
    assert_eq!(keys(&found), expected.iter().rev().take(3).cloned().collect::<Vec<_>>());
    let every = v1::ScanRequest { keyspace: "rows".into(), ..scan() };
    let found = keys(&pages(&nodes.one, every).await.unwrap());
    assert_eq!((found.len(), found.last()), (1_001, Some(&Bytes::from("s/1"))));
    nodes.stop().await;
}

/// Puts or deletes a thousand rows of the entity `r` at once.
async fn write_rows(node: &Node, first: usize, kind: fn() -> v1::operation::Kind) {
    let operations = (first..first + 1_000).map(|number| v1::Operation {
        key: format!("r/{number:06}").into(),
        condition: None,
        kind: Some(kind()),
    });
    let operations = operations.collect();
    let write = v1::WriteRequest { keyspace: "rows".into(), operations, ..Default::default() };
    node.ask(Operation::Write(write)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn long_deleted_run_is_passed_in_pages_of_bounded_time_each_resumed_elsewhere() {
    let nodes = Nodes::start().await;
    // Three pages of one shard and more, with nothing to show.
    for first in (0..100_000).step_by(1_000) {
        let gone = || v1::operation::Kind::Delete(v1::DeleteOperation {});
        write_rows(&nodes.one, first, gone).await;
    }
    let around = ["a", "b", "c", "d", "q", "s", "t", "u", "v"].map(|row| format!("{row}/1"));
    for key in &around {
        nodes.one.put(v1::PutRequest { keyspace: "rows".into(), ..put(key, "v") }).await.unwrap();
    }
    let mut expected: Vec<_> = around.iter().map(|key| Bytes::from(key.clone())).collect();
    // A page of the gap takes longer than a scan's page may.
    nodes.wires.page_delay_ms.store(2 * PAGE_TIME.as_millis() as u64, Ordering::SeqCst);
    let away = if shard_of("rows", "r/") <= 2 { &nodes.two } else { &nodes.one };
    for reverse in [false, true] {
        let request = v1::ScanRequest { keyspace: "rows".into(), reverse, ..scan() };
        let (mut found, mut token) = (Vec::new(), Bytes::new());
        loop {
            let resumed = v1::ScanRequest { resume_token: token.clone(), ..request.clone() };
            let call = Call::client(None);
            let mut scan = Scan::begin(away.router.clone(), resumed, call).await.unwrap();
            let page = scan.next_page().await.unwrap().unwrap();
            assert_ne!(page.resume_token, token, "every page goes further");
            token = page.resume_token.clone();
            let done = page.done;
            found.push(page);
            if done {
                break;
            }
        }
        assert!(found.len() >= 4, "{} pages", found.len());
        assert!(found.iter().any(|page| page.entries.is_empty() && !page.done));
        assert_eq!(keys(&found), expected);
        assert!(found.iter().all(|page| page.version == found[0].version));
        let whole = pages(away, request).await.unwrap();
        assert_eq!(keys(&whole), expected, "on one stream");
        expected.reverse();
    }
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn page_names_its_shard_and_fixed_versions_tell_the_arc() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, 40).await;
    let route = |shard, shard_epoch| Some(v1::Route { shard, shard_epoch });
    let one = v1::ScanRequest { only_shard: route(3, 1), ..scan() };
    let found = keys(&pages(&nodes.one, one.clone()).await.unwrap());
    assert!(!found.is_empty());
    assert!(found.iter().all(|key| shard_of("", std::str::from_utf8(key).unwrap()) == 3));
    let stale = v1::ScanRequest { only_shard: route(3, 9), ..one };
    assert_eq!(pages(&nodes.one, stale).await.unwrap_err().reason, Reason::StaleRoute);
    let nowhere = nodes.one.ask(Operation::Scan(scan())).await.unwrap_err();
    assert_eq!(nowhere.reason, Reason::InvalidArgument);

    let fix = |version| {
        let question = v1::FixVersionRequest { route: route(2, 0), version };
        nodes.two.ask(Operation::FixVersion(question))
    };
    let Answer::FixVersion(first) = fix(0).await.unwrap() else { panic!("a version") };
    assert_eq!((first.start, first.end, first.epoch), (1 << 62, 2 << 62, 1));
    let key = key_on(2);
    let written = nodes.one.put(put(&key, "later")).await.unwrap();
    assert!(written.version > first.version, "no later write gets a version that was fixed");
    let far = fix(first.version + (3_600_000 << 16)).await.unwrap_err();
    assert_eq!(far.reason, Reason::ClockOutOfBound);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_of_another_scan_is_refused() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, 200).await;
    let found = pages(&nodes.one, scan()).await.unwrap();
    let token = found[0].resume_token.clone();
    for other in [
        v1::ScanRequest { prefix: "k".into(), ..scan() },
        v1::ScanRequest { reverse: true, ..scan() },
        v1::ScanRequest { keyspace: "rows".into(), ..scan() },
    ] {
        let other = v1::ScanRequest { resume_token: token.clone(), ..other };
        assert_eq!(pages(&nodes.one, other).await.unwrap_err().reason, Reason::InvalidArgument);
    }
    let damaged = v1::ScanRequest { resume_token: token.slice(1..), ..scan() };
    assert_eq!(pages(&nodes.one, damaged).await.unwrap_err().reason, Reason::InvalidArgument);
    let last = found.last().unwrap().resume_token.clone();
    let over = v1::ScanRequest { resume_token: last, ..scan() };
    assert!(keys(&pages(&nodes.one, over).await.unwrap()).is_empty());
    nodes.stop().await;
}

/// A scan as a client's stream reads it.
async fn open(
    node: &Node,
    exec: &RealExec,
    request: v1::ScanRequest,
    pins: Option<NewPins>,
) -> Result<Pages, Fault> {
    let scan = Scan::begin(node.router.clone(), request, Call::client(None)).await?;
    Ok(scan::open(scan, exec, pins))
}

fn exec() -> RealExec {
    RealExec::new(tokio::runtime::Handle::current(), 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn reader_that_stops_holds_nothing_and_then_gets_exactly_the_rest() {
    let (nodes, exec) = (Nodes::start().await, exec());
    let all = fill(&nodes.one, 400).await;
    let admission = nodes.two.router.admission().clone();
    for reverse in [false, true] {
        let request = v1::ScanRequest { reverse, ..scan() };
        let mut reader = open(&nodes.two, &exec, request, None).await.unwrap();
        let mut found = vec![reader.next().await.unwrap().unwrap()];
        let (requests, ahead) = admission.in_flight();
        assert_eq!((requests, admission.scans_open()), (0, 1), "no request between two pages");
        assert!(ahead > 64 << 10, "{ahead} bytes were read ahead");
        until(|| admission.in_flight() == (0, 0)).await;
        // The next pages are read anew: at the version of the first.
        nodes.one.put(put("k0200x", "late")).await.unwrap();
        nodes.one.put(put("k0300", "changed")).await.unwrap();
        while let Some(page) = reader.next().await.unwrap() {
            found.push(page);
            if found.len() == 3 {
                until(|| admission.in_flight() == (0, 0)).await;
            }
        }
        let mut expected: Vec<_> = all.keys().cloned().collect();
        if reverse {
            expected.insert(201, "k0200x".into());
            expected.reverse();
        }
        assert!(found.len() > 4, "{} pages", found.len());
        assert_eq!(keys(&found), expected);
        assert!(found.iter().all(|page| page.version == found[0].version));
        until(|| admission.scans_open() == 0).await;
        assert_eq!(admission.in_flight(), (0, 0));
    }
    nodes.stop().await;
}

#[tokio::test]
async fn scan_that_nobody_reads_gives_its_place_up_and_goes_on_by_its_token() {
    let (nodes, exec) = (Nodes::start().await, exec());
    let all = fill(&nodes.one, 400).await;
    let admission = nodes.two.router.admission().clone();
    let mut reader = open(&nodes.two, &exec, scan(), Some(scan::pins())).await.unwrap();
    let mut found = vec![reader.next().await.unwrap().unwrap()];
    for away in [Duration::from_secs(90), IDLE_MAX - Duration::from_secs(5)] {
        pass(away).await;
        found.push(reader.next().await.unwrap().unwrap());
        assert_eq!(admission.scans_open(), 1, "a reader may be away for {away:?}");
    }
    pass(IDLE_MAX).await;
    until(|| admission.scans_open() == 0).await;
    assert_eq!(admission.in_flight(), (0, 0));
    let left_alone = reader.next().await.unwrap_err();
    assert_eq!((left_alone.reason, left_alone.outcome), (Reason::Overloaded, Outcome::NotApplied));
    assert!(left_alone.message.contains("resume token"), "{left_alone}");
    assert!(reader.next().await.unwrap().is_none(), "it has ended");
    let resume_token = found.last().unwrap().resume_token.clone();
    let rest = pages(&nodes.one, v1::ScanRequest { resume_token, ..scan() }).await.unwrap();
    found.extend(rest);
    assert_eq!(keys(&found), all.into_keys().collect::<Vec<_>>());
    assert!(found.iter().all(|page| page.version == found[0].version));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn open_scans_are_bounded_and_a_reader_that_goes_makes_room() {
    let (nodes, exec) = (Nodes::start().await, exec());
    fill(&nodes.one, 40).await;
    let admission = nodes.one.router.admission().clone();
    let mut readers = Vec::new();
    for _ in 0..admission.scans_max() {
        let mut reader = open(&nodes.one, &exec, scan(), None).await.unwrap();
        readers.push(async move { reader.next().await.map(|page| (reader, page)) });
    }
    let beyond = open(&nodes.one, &exec, scan(), None).await.err().unwrap();
    assert_eq!((beyond.reason, beyond.retry_after_ms), (Reason::Overloaded, 100));
    assert!(beyond.message.contains("open scans"), "{beyond}");
    drop(readers.pop());
    until(|| admission.scans_open() < admission.scans_max()).await;
    let found = open(&nodes.one, &exec, scan(), None).await.unwrap().next().await.unwrap();
    assert_eq!(keys(&found.into_iter().collect::<Vec<_>>()).len(), 40);
    drop(readers);
    until(|| admission.scans_open() == 0).await;
    nodes.draining_is_told_to_readers(&exec).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_has_just_started_sends_scans_elsewhere_at_once() {
    let (nodes, exec) = (Nodes::start().await, exec());
    fill(&nodes.one, 4).await;
    let admission = nodes.one.router.admission();
    admission.set_starting(true);
    let refused = open(&nodes.one, &exec, scan(), None).await.err().unwrap();
    assert_eq!((refused.reason, refused.retry_after_ms), (Reason::TooStale, 0));
    // Pages that another node asks for are of a shard that it believes to be here.
    assert_eq!(admission.scans_open(), 0);
    admission.set_starting(false);
    let found = open(&nodes.one, &exec, scan(), None).await.unwrap().next().await.unwrap();
    assert_eq!(keys(&found.into_iter().collect::<Vec<_>>()).len(), 4);
    nodes.stop().await;
}

impl Nodes {
    async fn draining_is_told_to_readers(self, exec: &RealExec) {
        fill(&self.one, 400).await;
        let mut reader = open(&self.one, exec, scan(), None).await.unwrap();
        reader.next().await.unwrap().unwrap();
        self.one.draining.cancel();
        assert_eq!(reader.next().await.unwrap_err().reason, Reason::Draining);
        assert!(reader.next().await.unwrap().is_none(), "it has ended");
        self.stop().await;
    }
}

/// Writes down what is kept. The first time, the shards are others by then.
#[derive(Default)]
struct Noted {
    made: usize,
    kept: Vec<(Vec<u64>, String, u64)>,
}

struct PinsNoted(Arc<Mutex<Noted>>);

impl Pins for PinsNoted {
    fn keep<'a>(
        &'a mut self,
        _: &'a Arc<Router>,
        shards: &'a [v1::Route],
        keyspace: &'a str,
        version: u64,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<(), Fault>> {
        let shards = shards.iter().map(|route| route.shard).collect();
        let mut noted = self.0.lock();
        noted.kept.push((shards, keyspace.to_owned(), version));
        let stale = Err(Fault::new(Reason::StaleRoute, "a split"));
        Box::pin(ready(if noted.kept.len() == 1 { stale } else { Ok(()) }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn version_is_kept_on_all_shards_though_nobody_reads_until_the_reader_goes() {
    let (nodes, exec) = (Nodes::start().await, exec());
    fill(&nodes.one, 200).await;
    let noted = Arc::new(Mutex::new(Noted::default()));
    let of_pins = noted.clone();
    let new: NewPins = Arc::new(move || {
        of_pins.lock().made += 1;
        Box::new(PinsNoted(of_pins.clone()))
    });
    let mut reader = open(&nodes.one, &exec, scan(), Some(new.clone())).await.unwrap();
    let first = reader.next().await.unwrap().unwrap();
    let asked = nodes.one.source.asked.load(Ordering::SeqCst);
    until(|| noted.lock().kept.len() == 3).await;
    let kept = (vec![1, 2, 3, 4], String::new(), first.version);
    assert!(noted.lock().kept.iter().all(|it| *it == kept), "{:?}", noted.lock().kept);
    assert_eq!(noted.lock().made, 2, "begun anew when the shards have changed");
    assert!(nodes.one.source.asked.load(Ordering::SeqCst) > asked, "by a newer map");
    let mine = Arc::strong_count(&new);
    drop(reader);
    until(|| Arc::strong_count(&new) < mine).await;
    // One entity's scan has one shard's pages, and never pins.
    let row = v1::ScanRequest { keyspace: "rows".into(), prefix: "r/".into(), ..scan() };
    let mine = Arc::strong_count(&new);
    let mut reader = open(&nodes.one, &exec, row, Some(new.clone())).await.unwrap();
    until(|| Arc::strong_count(&new) == mine).await;
    assert!(reader.next().await.unwrap().unwrap().done);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn version_is_kept_while_the_first_page_is_on_its_way() {
    let (nodes, exec) = (Nodes::start().await, exec());
    fill(&nodes.one, 40).await;
    let noted = Arc::new(Mutex::new(Noted::default()));
    let of_pins = noted.clone();
    let new: NewPins = Arc::new(move || Box::new(PinsNoted(of_pins.clone())));
    // The shards of node two fix their versions at once, and give no page.
    nodes.wires.page_delay_ms.store(60_000, Ordering::SeqCst);
    let mut reader = open(&nodes.one, &exec, scan(), Some(new)).await.unwrap();
    let mut first = Box::pin(reader.next());
    tokio::select! {
        page = &mut first => panic!("no page is made: {page:?}"),
        () = until(|| noted.lock().kept.len() > 1) => {}
    }
    nodes.wires.page_delay_ms.store(0, Ordering::SeqCst);
    let page = first.await.unwrap().unwrap();
    assert_eq!(noted.lock().kept[0].2, page.version);
    nodes.stop().await;
}

/// The pins of the server, counted.
struct CountedPins(Box<dyn Pins>, Arc<AtomicUsize>);

impl Pins for CountedPins {
    fn keep<'a>(
        &'a mut self,
        router: &'a Arc<Router>,
        shards: &'a [v1::Route],
        keyspace: &'a str,
        version: u64,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(), Fault>> {
        let kept = self.0.keep(router, shards, keyspace, version, call);
        let count = self.1.clone();
        Box::pin(async move {
            let result = kept.await;
            count.fetch_add(1, Ordering::SeqCst);
            result
        })
    }
}

/// Lets the clock go beyond half of the history and then beyond all of it, with writes on every shard,
/// and with time for the scan to pin its version in between, while nobody reads.
async fn let_history_pass(nodes: &Nodes, looked: Option<&AtomicUsize>) {
    for _ in 0..2 {
        nodes.clock.advance(Duration::from_secs(40));
        if let Some(looked) = looked {
            let before = looked.load(Ordering::SeqCst);
            // One look may have begun before.
            until(|| looked.load(Ordering::SeqCst) >= before + 2).await;
        }
        for shard in 1..=4 {
            nodes.one.put(put(&key_on(shard), "later")).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scan_over_several_shards_outlives_the_history() {
    let (nodes, exec) = (Nodes::start().await, exec());
    // More than the scan reads ahead at once.
    let value = "v".repeat(20 << 10);
    let mut all = Vec::new();
    for number in 0..400 {
        let key = format!("k{number:04}");
        nodes.one.put(put(&key, &value)).await.unwrap();
        all.push(Bytes::from(key));
    }
    let request = v1::ScanRequest { prefix: Bytes::from_static(b"k0"), ..scan() };
    let looked = Arc::new(AtomicUsize::new(0));
    let (new, counted) = (scan::pins(), looked.clone());
    let pins: NewPins = Arc::new(move || Box::new(CountedPins(new(), counted.clone())));
    let mut held = open(&nodes.two, &exec, request.clone(), Some(pins)).await.unwrap();
    let mut pages = vec![held.next().await.unwrap().unwrap()];
    let_history_pass(&nodes, Some(&looked)).await;
    while let Some(page) = held.next().await.unwrap() {
        pages.push(page);
    }
    assert_eq!(keys(&pages), all);
    assert!(pages.iter().all(|page| page.version == pages[0].version));
    // Held by nothing but the pins: they run out, and nobody goes on with it any more.
    nodes.clock.advance(Duration::from_secs(120));
    for shard in 1..=4 {
        nodes.one.put(put(&key_on(shard), "last")).await.unwrap();
    }
    let read = Some(v1::ReadOptions { at_version: pages[0].version, ..Default::default() });
    let gone = self::pages(&nodes.one, v1::ScanRequest { read, ..request.clone() }).await;
    assert_eq!(gone.unwrap_err().reason, Reason::VersionGone);
    // Without pins the same scan loses its version on the way.
    let mut loose = open(&nodes.two, &exec, request, None).await.unwrap();
    loose.next().await.unwrap().unwrap();
    let_history_pass(&nodes, None).await;
    let gone = loop {
        match loose.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it was read to its end"),
            Err(fault) => break fault,
        }
    };
    assert_eq!(gone.reason, Reason::VersionGone);
    nodes.stop().await;
}

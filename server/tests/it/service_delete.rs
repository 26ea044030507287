//! Delete-ranges over four shards on two nodes: what goes and what stays, limits, one entity at once,
//! steps that go on by their token, answers that are lost, coordinators that come late.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits::{DELETE_RANGE_EXAMINED_BYTES_MAX, DELETE_RANGE_KEYS_MAX};
use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::token::DeleteToken;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::{entity, v1};
use coracle_server::admission::Call;
use coracle_server::delete::{self, DeleteRange};
use coracle_server::scan::Scan;
use coracle_storage::exec::RealExec;
use tokio::time::Instant;

use crate::service_nodes::{Node, Nodes, key_on, put, shard_map, shard_of, until};

fn range(start: &str, end: &str) -> v1::DeleteRangeRequest {
    let (start, end) = (start.to_owned().into(), end.to_owned().into());
    v1::DeleteRangeRequest { start, end, ..Default::default() }
}

fn within(entity: &str) -> v1::DeleteRangeRequest {
    let (keyspace, prefix) = ("rows".to_owned(), entity.to_owned().into());
    v1::DeleteRangeRequest { keyspace, prefix, atomic: true, ..Default::default() }
}

async fn begin(node: &Node, request: &v1::DeleteRangeRequest) -> Result<DeleteRange, Fault> {
    let call = Call::client(Some(Duration::from_secs(20)));
    DeleteRange::begin(node.router.clone(), request.clone(), call).await
}

/// The same request with the token under which it deletes.
async fn begun(
    node: &Node,
    request: v1::DeleteRangeRequest,
) -> Result<v1::DeleteRangeRequest, Fault> {
    let mut call = begin(node, &request).await?;
    let first = call.next_round().await?.expect("a first answer");
    assert_eq!((first.deleted, first.done, first.version), (0, false, 0));
    assert_eq!(call.next_round().await?, None, "it deletes nothing before it was told of");
    Ok(v1::DeleteRangeRequest { resume_token: first.resume_token, ..request })
}

/// All progress of a delete-range behind its first answer.
async fn rounds(
    node: &Node,
    request: v1::DeleteRangeRequest,
) -> Result<Vec<v1::DeleteRangeResponse>, Fault> {
    let is_empty = entity::bounds(&request.start, &request.end, &request.prefix).is_none();
    let at_once = request.atomic || is_empty || !request.resume_token.is_empty();
    let request = if at_once { request } else { begun(node, request).await? };
    let mut delete = begin(node, &request).await?;
    let mut rounds = Vec::new();
    while let Some(round) = delete.next_round().await? {
        rounds.push(round);
    }
    Ok(rounds)
}

async fn last(
    node: &Node,
    request: v1::DeleteRangeRequest,
) -> Result<v1::DeleteRangeResponse, Fault> {
    Ok(rounds(node, request).await?.pop().expect("it says when it is done"))
}

/// One step, or an atomic one, as a pipeline carries it.
async fn step(
    node: &Node,
    request: v1::DeleteRangeRequest,
) -> Result<v1::DeleteRangeResponse, Fault> {
    match node.ask(Operation::DeleteRange(request)).await? {
        Answer::DeleteRange(answer) => Ok(answer),
        other => panic!("{other:?}"),
    }
}

async fn keys(node: &Node, keyspace: &str) -> Vec<Bytes> {
    let request = v1::ScanRequest { keyspace: keyspace.to_owned(), ..Default::default() };
    let mut scan = Scan::begin(node.router.clone(), request, Call::client(None)).await.unwrap();
    let mut keys = Vec::new();
    while let Some(page) = scan.next_page().await.unwrap() {
        keys.extend(page.entries.into_iter().map(|entry| entry.key));
    }
    keys
}

async fn fill(node: &Node, keyspace: &str, keys: impl IntoIterator<Item = String>) {
    for key in keys {
        let request = v1::PutRequest { keyspace: keyspace.to_owned(), ..put(&key, "v") };
        node.put(request).await.unwrap();
    }
}

fn numbered(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|number| format!("k{number:04}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_there_is_gone_on_all_shards_and_nothing_else() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "", numbered(200)).await;
    fill(&nodes.one, "rows", ["k0100".to_owned()]).await;
    let cases = [
        (range("k0020", "k0040"), 20, 180),
        (v1::DeleteRangeRequest { prefix: "k015".into(), ..range("k0155", "") }, 5, 175),
        (v1::DeleteRangeRequest { prefix: "k0".into(), ..range("", "k0010") }, 10, 165),
        (range("k1", "k0"), 0, 165),
        (range("x", ""), 0, 165),
        (range("", ""), 165, 0),
    ];
    for (request, deleted, left) in cases {
        let request = v1::DeleteRangeRequest { step_keys: 7, ..request };
        let told = rounds(&nodes.two, request.clone()).await.unwrap();
        assert_eq!(told.last().unwrap().deleted, deleted, "{request:?}");
        assert!(told.is_sorted_by_key(|round| round.deleted));
        let done: Vec<_> = told.iter().map(|round| round.done).collect();
        assert!(done.iter().rev().skip(1).all(|done| !done) && done.last() == Some(&true));
        assert_eq!(keys(&nodes.one, "").await.len(), left, "{request:?}");
    }
    assert_eq!(keys(&nodes.one, "rows").await, ["k0100"]);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_entity_goes_at_one_version_or_not_at_all() {
    let nodes = Nodes::start().await;
    let rows = (0..30).map(|number| format!("a/{number:02}"));
    fill(&nodes.one, "rows", rows.chain(["b/1".to_owned(), "a".to_owned()])).await;
    let part = v1::DeleteRangeRequest { start: "a/10".into(), end: "a/20".into(), ..within("a/") };
    let done = rounds(&nodes.two, part).await.unwrap();
    assert_eq!((done.len(), done[0].deleted, done[0].done), (1, 10, true));
    assert!(done[0].version > 0 && done[0].served.is_some_and(|served| served.index > 0));
    assert_eq!(step(&nodes.one, within("a/")).await.unwrap().deleted, 20);
    assert_eq!(keys(&nodes.one, "rows").await, ["a", "b/1"]);

    let several = v1::DeleteRangeRequest { prefix: Bytes::new(), ..within("a/") };
    let goes_on = v1::DeleteRangeRequest { resume_token: "x".into(), ..within("b/") };
    let system = v1::DeleteRangeRequest { keyspace: "system".into(), ..within("") };
    let refusals = [
        (several, Reason::CrossEntity),
        (goes_on, Reason::InvalidArgument),
        (system, Reason::NotAllowed),
        (v1::DeleteRangeRequest { keyspace: "none".into(), ..within("") }, Reason::UnknownKeyspace),
    ];
    for (request, reason) in refusals {
        for fault in [
            step(&nodes.one, request.clone()).await.unwrap_err(),
            rounds(&nodes.one, request.clone()).await.unwrap_err(),
        ] {
            assert_eq!((fault.reason, fault.outcome), (reason, Outcome::NotApplied), "{fault}");
        }
    }
    let id = Some(v1::RequestId { client: 1, sequence: 1, birth: 1, lowest_unanswered: 1 });
    let wide = v1::DeleteRangeRequest { request_id: id, ..range("", "") };
    let fault = rounds(&nodes.one, wide).await.unwrap_err();
    assert_eq!(fault.text(metadata::FIELD), Some("request_id"));
    assert_eq!(keys(&nodes.one, "rows").await, ["a", "b/1"]);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_keys_of_one_entity_are_refused_by_the_limits_name_and_go_in_steps() {
    let nodes = Nodes::start().await;
    let most = DELETE_RANGE_KEYS_MAX;
    let puts: Vec<_> = (0..=most).map(|number| format!("a/{number:05}")).collect();
    for chunk in puts.chunks(1_000) {
        let operation = |key: &String| v1::Operation {
            key: key.clone().into(),
            condition: None,
            kind: Some(v1::operation::Kind::Put(v1::PutOperation::default())),
        };
        let operations = chunk.iter().map(operation).collect();
        let keyspace = "rows".to_owned();
        let write = v1::WriteRequest { keyspace, operations, ..Default::default() };
        nodes.one.ask(Operation::Write(write)).await.unwrap();
    }
    let fault = step(&nodes.one, within("a/")).await.unwrap_err();
    assert_eq!((fault.reason, fault.outcome), (Reason::TooLarge, Outcome::NotApplied), "{fault}");
    assert_eq!(fault.text(metadata::LIMIT), Some("DELETE_RANGE_KEYS_MAX"));
    assert_eq!(keys(&nodes.one, "rows").await.len(), most + 1);
    let first = v1::DeleteRangeRequest { end: "a/00001".into(), ..within("a/") };
    assert_eq!(step(&nodes.one, first).await.unwrap().deleted, 1);
    assert_eq!(step(&nodes.one, within("a/")).await.unwrap().deleted, most as u64);
    assert!(keys(&nodes.one, "rows").await.is_empty());
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_goes_on_at_any_node_with_nothing_left_out() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "", numbered(120)).await;
    let request = v1::DeleteRangeRequest { step_keys: 3, ..range("k0010", "") };
    let (mut token, mut deleted) =
        (begun(&nodes.two, request.clone()).await.unwrap().resume_token, 0);
    // Above the version of the token, as all that is written from now on: a key to come.
    nodes.two.put(put("k0119", "newer")).await.unwrap();
    for turn in 0.. {
        assert!(turn < 100, "it comes to its end");
        let node = if turn % 2 == 0 { &nodes.one } else { &nodes.two };
        let resumed = v1::DeleteRangeRequest { resume_token: token, ..request.clone() };
        let call = Call::client(None);
        let mut delete = DeleteRange::begin(node.router.clone(), resumed, call).await.unwrap();
        let round = delete.next_round().await.unwrap().unwrap();
        deleted += round.deleted;
        token = round.resume_token;
        // And one behind its back.
        nodes.one.put(put("k0010", "newer")).await.unwrap();
        if round.done {
            break;
        }
    }
    assert_eq!(deleted, 109);
    let left = keys(&nodes.one, "").await;
    assert_eq!((left.len(), &left[10][..], &left[11][..]), (12, &b"k0010"[..], &b"k0119"[..]));

    // A node that shuts down leaves the rest to another.
    let call = Call::client(None);
    let begun = DeleteRange::begin(nodes.one.router.clone(), request.clone(), call).await;
    nodes.one.draining.cancel();
    let fault = begun.unwrap().next_round().await.unwrap_err();
    assert_eq!((fault.reason, fault.outcome), (Reason::Draining, Outcome::NotApplied));

    let other = v1::DeleteRangeRequest { resume_token: token, ..range("k0011", "") };
    let fault = rounds(&nodes.two, other).await.unwrap_err();
    assert_eq!(fault.text(metadata::FIELD), Some("resume_token"));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shard_alone_and_step_by_step() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "", numbered(60)).await;
    let on = |shard| numbered(60).filter(|key| shard_of("", key) == shard).count() as u64;
    let only_shard = Some(v1::Route { shard: 3, shard_epoch: 1 });
    let third = v1::DeleteRangeRequest { only_shard, step_keys: 2, ..range("", "") };
    let done = last(&nodes.one, third).await.unwrap();
    assert_eq!(done.deleted, on(3));
    assert_eq!(keys(&nodes.one, "").await.len() as u64, 60 - on(3));

    let only_shard = Some(v1::Route { shard: 1, shard_epoch: 0 });
    let first = v1::DeleteRangeRequest { only_shard, step_keys: 5, ..range("", "") };
    let mut first = begun(&nodes.one, first).await.unwrap();
    let token = first.resume_token.clone();
    let mut sizes = Vec::new();
    loop {
        let answer = step(&nodes.two, first.clone()).await.unwrap();
        sizes.push(answer.deleted);
        first.resume_token = answer.resume_token;
        if answer.done {
            break;
        }
    }
    assert_eq!(sizes.iter().sum::<u64>(), on(1));
    assert!(sizes.iter().all(|size| *size <= 5) && sizes.len() as u64 > on(1) / 5, "{sizes:?}");
    let nowhere = step(&nodes.one, range("", "")).await.unwrap_err();
    assert_eq!(nowhere.text(metadata::FIELD), Some("resume_token"), "a step has a version");
    let old = Some(v1::Route { shard: 2, shard_epoch: 7 });
    let stale = v1::DeleteRangeRequest { only_shard: old, ..range("", "") };
    assert_eq!(rounds(&nodes.one, stale.clone()).await.unwrap_err().reason, Reason::StaleRoute);
    let stale = v1::DeleteRangeRequest { resume_token: token, ..stale };
    assert_eq!(step(&nodes.one, stale).await.unwrap_err().reason, Reason::StaleRoute);
    assert_eq!(keys(&nodes.one, "").await.len() as u64, 60 - on(3) - on(1));
    nodes.stop().await;
}

/// The answer of a step is lost, and before the retry somebody writes one of its keys anew.
#[tokio::test(flavor = "multi_thread")]
async fn retried_step_deletes_nothing_that_was_written_since() {
    let nodes = Nodes::start().await;
    let key = key_on(3);
    nodes.two.put(put(&key, "old")).await.unwrap();
    let only_shard = Some(v1::Route { shard: 3, shard_epoch: 0 });
    let request = v1::DeleteRangeRequest { only_shard, ..range("", "") };
    let request = begun(&nodes.one, request).await.unwrap();
    nodes.wires.lose.store(1, Ordering::SeqCst);
    // Node one passes it on to node two, and tries again by itself.
    let router = nodes.one.router.clone();
    let deleting = tokio::spawn(async move {
        let mut delete = DeleteRange::begin(router, request, Call::client(None)).await?;
        delete.next_round().await
    });
    until(|| nodes.wires.lose.load(Ordering::SeqCst) == 0).await;
    nodes.two.put(put(&key, "newer")).await.unwrap();
    let round = deleting.await.unwrap().unwrap().unwrap();
    assert_eq!(round.deleted, 1, "the first answer, as the retry gets it");
    assert!(nodes.wires.forwards.load(Ordering::SeqCst) >= 2, "it was sent again");

    // By hand, whatever the timing: the same id, and a key that came in between.
    let id = v1::RequestId {
        client: 77,
        sequence: 1,
        birth: nodes.one.router.now_ms(),
        lowest_unanswered: 1,
    };
    let again = v1::DeleteRangeRequest { request_id: Some(id), ..within("r/") };
    fill(&nodes.one, "rows", ["r/1".to_owned(), "r/2".to_owned()]).await;
    let first = step(&nodes.one, again.clone()).await.unwrap();
    fill(&nodes.one, "rows", ["r/1".to_owned()]).await;
    let second = step(&nodes.two, again).await.unwrap();
    assert_eq!((first.deleted, second.deleted, first.version), (2, 2, second.version));
    assert_eq!(keys(&nodes.one, "rows").await, ["r/1"]);
    let taken = v1::PutRequest { keyspace: "rows".into(), request_id: Some(id), ..put("r/1", "w") };
    let fault = nodes.one.put(taken).await.unwrap_err();
    assert_eq!(fault.text(metadata::FIELD), Some("request_id"), "{fault}");
    nodes.stop().await;
}

/// While one node is out of reach its shards wait; the others go on, and the token knows which.
#[tokio::test(flavor = "multi_thread")]
async fn shards_out_of_reach_are_left_to_whoever_goes_on() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "", numbered(80)).await;
    let here = numbered(80).filter(|key| shard_of("", key) <= 2).count() as u64;
    let request = v1::DeleteRangeRequest { step_keys: 10, ..range("", "") };
    let request = begun(&nodes.one, request).await.unwrap();
    nodes.wires.cut.store(true, Ordering::SeqCst);
    let call = Call::client(Some(Duration::from_secs(6)));
    let mut delete =
        DeleteRange::begin(nodes.one.router.clone(), request.clone(), call).await.unwrap();
    let mut told = Vec::new();
    let fault = loop {
        match delete.next_round().await {
            Ok(round) => told.push(round.expect("it is not done")),
            Err(fault) => break fault,
        }
    };
    assert_eq!(fault.outcome, Outcome::Unknown, "some of it was deleted: {fault}");
    let reached = told.last().unwrap();
    assert_eq!((reached.deleted, reached.done), (here, false));
    let token = DeleteToken::decode(&reached.resume_token).unwrap();
    assert!(token.lanes.len() == 2 && token.rest.is_none(), "{token:?}");
    nodes.wires.cut.store(false, Ordering::SeqCst);
    let rest = v1::DeleteRangeRequest { resume_token: reached.resume_token.clone(), ..request };
    assert_eq!(last(&nodes.two, rest).await.unwrap().deleted, 80 - here);
    assert!(keys(&nodes.one, "").await.is_empty());
    nodes.stop().await;
}

/// Long runs of deleted keys end a step before they hold up the shard, and are passed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn long_runs_of_deleted_keys_are_passed_in_several_steps() {
    let nodes = Nodes::start().await;
    for chunk in 0..36 {
        let operation = |number: u32| v1::Operation {
            key: format!("a/{:05}", chunk * 1_000 + number).into(),
            condition: None,
            kind: Some(v1::operation::Kind::Delete(v1::DeleteOperation {})),
        };
        let operations = (0..1_000).map(operation).collect();
        let keyspace = "rows".to_owned();
        let write = v1::WriteRequest { keyspace, operations, ..Default::default() };
        nodes.one.ask(Operation::Write(write)).await.unwrap();
    }
    fill(&nodes.one, "rows", ["a/x".to_owned()]).await;
    let request = v1::DeleteRangeRequest { atomic: false, ..within("a/") };
    let told = rounds(&nodes.two, request).await.unwrap();
    let deleted: Vec<_> = told.iter().map(|round| round.deleted).collect();
    assert_eq!(deleted, [0, 1]);
    assert!(keys(&nodes.one, "rows").await.is_empty());
    nodes.stop().await;
}

/// The map says that two shards are one; the group's own word counts.
#[tokio::test(flavor = "multi_thread")]
async fn arc_that_the_map_has_wrong_is_gone_through_all_the_same() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "", numbered(80)).await;
    // A later map, in which shard 1 has taken over the arc of shard 2 (which a merge would do).
    let mut wrong = shard_map(2);
    wrong.shards[1].end = wrong.shards[2].end;
    wrong.shards.remove(2);
    let map = coracle_proto::shard_map::ShardMap::from_proto(&wrong).unwrap();
    let keyspace = map.keyspace("").unwrap();
    let both = DeleteToken::of_arc(&range("", ""), keyspace.id, map.shards()[0].arc.unwrap());
    let fixed = begun(&nodes.one, range("", "")).await.unwrap();
    let version = DeleteToken::decode(&fixed.resume_token).unwrap().version;
    let both = DeleteToken { version, ..both };
    let request = v1::DeleteRangeRequest { resume_token: both.encode(), ..range("", "") };
    let told = rounds(&nodes.two, request).await.unwrap();
    assert!(told.len() >= 2, "the first round has covered shard 1 alone");
    let left = keys(&nodes.one, "").await;
    let expected = numbered(80).filter(|key| shard_of("", key) > 2).count();
    assert_eq!(left.len(), expected);
    nodes.stop().await;
}

/// One coordinator is given up for dead; another finishes, and somebody writes: an acknowledged write.
#[tokio::test(flavor = "multi_thread")]
async fn coordinator_that_comes_late_deletes_nothing_that_was_written_since() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "", numbered(40)).await;
    let request = begun(&nodes.one, range("", "")).await.unwrap();
    let mut given_up = begin(&nodes.one, &request).await.unwrap();
    // Without a token it has not even a version yet.
    let mut never_heard_of = begin(&nodes.one, &range("", "")).await.unwrap();
    assert_eq!(last(&nodes.two, request.clone()).await.unwrap().deleted, 40);
    fill(&nodes.two, "", numbered(20)).await;

    while let Some(round) = given_up.next_round().await.unwrap() {
        assert_eq!(round.deleted, 0);
    }
    assert_eq!(keys(&nodes.two, "").await.len(), 20, "what was acknowledged stays");
    let told = never_heard_of.next_round().await.unwrap().unwrap();
    assert_eq!((told.deleted, told.done), (0, false));
    assert_eq!(never_heard_of.next_round().await.unwrap(), None);
    assert_eq!(keys(&nodes.two, "").await.len(), 20, "it waits for somebody to go on");
    // A token made up, with a version that no clock has reached, is no way around it.
    let mut token = DeleteToken::decode(&request.resume_token).unwrap();
    token.version = u64::MAX - 1;
    let made_up = v1::DeleteRangeRequest { resume_token: token.encode(), ..request };
    let call = Call::client(Some(Duration::from_secs(2)));
    let mut made_up = DeleteRange::begin(nodes.one.router.clone(), made_up, call).await.unwrap();
    let fault = made_up.next_round().await.unwrap_err();
    assert_eq!((fault.reason, fault.outcome), (Reason::ClockOutOfBound, Outcome::NotApplied));
    assert_eq!(keys(&nodes.two, "").await.len(), 20);
    nodes.stop().await;
}

/// One shard's clock is ahead of the others' by what readers have fixed on it.
#[tokio::test(flavor = "multi_thread")]
async fn version_is_fixed_on_all_shards_before_anybody_is_told_of_it() {
    let nodes = Nodes::start().await;
    let ahead = (nodes.one.router.now_ms() + 450) << 16;
    let route = Some(v1::Route { shard: 1, shard_epoch: 0 });
    let fix = v1::FixVersionRequest { route, version: ahead };
    nodes.one.ask(Operation::FixVersion(fix)).await.unwrap();
    let request = begun(&nodes.two, range("", "")).await.unwrap();
    for shard in 1..=4 {
        let written = nodes.one.put(put(&key_on(shard), "newer")).await.unwrap();
        assert!(written.version > ahead, "shard {shard}");
    }
    assert_eq!(last(&nodes.one, request).await.unwrap().deleted, 0);
    assert_eq!(keys(&nodes.two, "").await.len(), 4);
    nodes.stop().await;
}

/// The range has come to hold more than an atomic delete-range may pass; the first answer stands.
#[tokio::test(flavor = "multi_thread")]
async fn retried_atomic_one_gets_its_first_answer_whatever_the_range_holds_by_now() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "rows", ["a/1".to_owned(), "a/2".to_owned()]).await;
    let id = |sequence| v1::RequestId {
        client: 77,
        sequence,
        birth: nodes.one.router.now_ms(),
        lowest_unanswered: 1,
    };
    let first = v1::DeleteRangeRequest { request_id: Some(id(1)), ..within("a/") };
    let done = step(&nodes.one, first.clone()).await.unwrap();
    let value: Bytes = vec![b'v'; 900_000].into();
    for number in 0..=DELETE_RANGE_EXAMINED_BYTES_MAX / value.len() {
        let key = format!("a/{number:03}").into();
        let write = v1::PutRequest {
            keyspace: "rows".into(),
            key,
            value: value.clone(),
            ..Default::default()
        };
        nodes.one.put(write).await.unwrap();
    }
    let again = step(&nodes.two, first).await.unwrap();
    assert_eq!(
        (again.deleted, again.version, again.served.map(|served| served.index)),
        (2, done.version, done.served.map(|served| served.index))
    );
    let another = v1::DeleteRangeRequest { request_id: Some(id(2)), ..within("a/") };
    let fault = step(&nodes.two, another).await.unwrap_err();
    assert_eq!(fault.text(metadata::LIMIT), Some("DELETE_RANGE_EXAMINED_MAX"), "{fault}");
    nodes.stop().await;
}

/// A reader that stops holds no place among the requests, and no request id.
#[tokio::test(flavor = "multi_thread")]
async fn stream_that_nobody_reads_holds_nothing() {
    let nodes = Nodes::start().await;
    fill(&nodes.one, "", numbered(40)).await;
    let request = v1::DeleteRangeRequest { step_keys: 1, ..range("", "") };
    let request = begun(&nodes.one, request).await.unwrap();
    let exec = RealExec::new(tokio::runtime::Handle::current(), 1);
    let call = Call::client(Some(Duration::from_secs(2)));
    let deleting = DeleteRange::begin(nodes.one.router.clone(), request, call).await.unwrap();
    let mut stream = delete::open(deleting, &exec);
    // The steps on the other node stay open: their outcome is not known here.
    nodes.wires.cut.store(true, Ordering::SeqCst);
    let round = stream.next().await.unwrap().unwrap();
    assert_eq!((round.deleted, round.done), (2, false));
    let key = key_on(3);
    nodes.wires.cut.store(false, Ordering::SeqCst);
    until(|| nodes.one.router.admission().in_flight().0 == 0).await;
    let mark = async || {
        nodes.one.put(put(&key, "v")).await.unwrap();
        nodes.wires.last_mark.load(Ordering::SeqCst)
    };
    let (held, deadline) = (mark().await, Instant::now() + Duration::from_secs(20));
    while mark().await == held {
        assert!(Instant::now() < deadline, "the ids of open steps come back");
    }
    let rest = v1::DeleteRangeRequest { resume_token: round.resume_token, ..range("", "") };
    assert_eq!(last(&nodes.two, rest).await.unwrap().deleted, 38);
    // Its own deadline has passed meanwhile: it says so, and then no more.
    let fault = stream.next().await.unwrap_err();
    assert_eq!((fault.reason, fault.outcome), (Reason::DeadlineNotApplied, Outcome::Unknown));
    assert_eq!(stream.next().await.unwrap(), None);
    exec.shutdown().await;
    nodes.stop().await;
}

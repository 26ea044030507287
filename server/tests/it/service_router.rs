//! Where requests go and what comes back: local, one hop on, lost on the way, refused.

use std::sync::atomic::Ordering;
use std::time::Duration;

use coracle_proto::reason::{Outcome, Reason, metadata};
use coracle_proto::shard_map::ShardId;
use coracle_proto::token::{Seen, SessionToken};
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_server::admission::{Call, Origin};
use prost::Message;

use crate::service_nodes::{Nodes, get, key_on, put, shard_map, shard_of, until};

fn increment(key: &str, id: Option<v1::RequestId>) -> Operation {
    let by = v1::IncrementOperation { by: 1 };
    let kind = Some(v1::operation::Kind::Increment(by));
    let operation = v1::Operation { key: key.to_owned().into(), condition: None, kind };
    let operations = vec![operation];
    Operation::Write(v1::WriteRequest { operations, request_id: id, ..Default::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_serves_any_key() {
    let nodes = Nodes::start().await;
    for shard in 1..=4 {
        let key = key_on(shard);
        let holder = if shard <= 2 { 1 } else { 2 };
        let written = nodes.one.put(put(&key, "v")).await.unwrap();
        let served = written.served.unwrap();
        assert!(written.applied && served.leader);
        assert_eq!((served.shard, served.node), (shard, holder));
        for node in [&nodes.one, &nodes.two] {
            let found = node.get(get(&key)).await.unwrap();
            let entry = found.entry.unwrap();
            assert_eq!((&entry.value[..], entry.version), (&b"v"[..], written.version));
            let at = found.served.unwrap();
            assert_eq!((at.shard, at.node), (shard, holder));
            assert!((at.term, at.index) >= (served.term, served.index), "{at:?} {served:?}");
        }
        assert_eq!(nodes.two.value("absent").await, None);
    }
    assert!(nodes.one.metrics.forwarded_requests.get() >= 4);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_answer_is_asked_for_again_and_the_write_applied_once() {
    let nodes = Nodes::start().await;
    let key = key_on(3);
    for expected in 1..=3 {
        nodes.wires.lose.store(2, Ordering::SeqCst);
        let Answer::Write(written) = nodes.one.ask(increment(&key, None)).await.unwrap() else {
            panic!("a write's answer")
        };
        assert_eq!(written.results[0].counter, expected);
    }
    assert_eq!(nodes.two.value(&key).await.as_deref(), Some("3"));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_retry_gets_the_first_result_at_any_node() {
    let nodes = Nodes::start().await;
    let key = key_on(2);
    let birth = nodes.one.router.now_ms();
    let id = v1::RequestId { client: 5, sequence: 9, birth, lowest_unanswered: 9 };
    let first = nodes.one.ask(increment(&key, Some(id))).await.unwrap();
    let Answer::Write(first) = first else { panic!("a write's answer") };
    let Answer::Write(again) = nodes.two.ask(increment(&key, Some(id))).await.unwrap() else {
        panic!("a write's answer")
    };
    assert_eq!((again.version, &again.results), (first.version, &first.results));
    assert_eq!(nodes.one.value(&key).await.as_deref(), Some("1"));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_leaves_a_write_unknown_and_says_nothing_of_a_read() {
    let nodes = Nodes::start().await;
    let key = key_on(4);
    nodes.wires.cut.store(true, Ordering::SeqCst);
    let call = Call::client(Some(Duration::from_millis(400)));
    let write = nodes.one.router.execute(increment(&key, None), &call).await.unwrap_err();
    assert_eq!(write.outcome, Outcome::Unknown, "{write}");
    let call = Call::client(Some(Duration::from_millis(400)));
    let read = nodes.one.router.execute(Operation::Get(get(&key)), &call).await.unwrap_err();
    assert_eq!(read.code_name(), "Unavailable", "{read}");
    nodes.stop().await;
}

trait CodeName {
    fn code_name(&self) -> String;
}

impl CodeName for coracle_proto::reason::Fault {
    fn code_name(&self) -> String {
        format!("{:?}", self.reason.code())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_passed_on_twice_or_against_the_callers_will() {
    let nodes = Nodes::start().await;
    let key = key_on(3);
    let call = Call { may_forward: false, ..Call::client(None) };
    let fault = nodes.one.router.execute(Operation::Get(get(&key)), &call).await.unwrap_err();
    assert_eq!((fault.reason, fault.number(metadata::SHARD)), (Reason::NotLeader, Some(3)));
    let request = v1::PipelineRequest {
        id: 1,
        timeout_ms: 1_000,
        operation: Some(Operation::Get(get(&key))),
    };
    let body = request.encode_to_vec().into();
    let from = nodes.two.router.node();
    let answer = nodes.one.router.serve_forwarded(from, body).await.unwrap();
    let answer = v1::PipelineResponse::decode(answer).unwrap();
    let Some(Answer::Error(error)) = answer.result else { panic!("{answer:?}") };
    assert_eq!((answer.id, error.reason.as_str()), (1, "NOT_LEADER"));
    assert_eq!(nodes.wires.forwards.load(Ordering::SeqCst), 0);

    // The leader's hint, once the map has it.
    nodes.one.map.observe_leader(coracle_proto::shard_map::ShardId(3), 1, nodes.two.router.node());
    let fault = nodes.one.router.execute(Operation::Get(get(&key)), &call).await.unwrap_err();
    assert_eq!(fault.text(metadata::LEADER_ADDR), Some("node-2:7400"));
    assert_eq!(fault.number(metadata::LEADER_NODE), Some(2));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_routes_are_refused_and_true_ones_served() {
    let nodes = Nodes::start().await;
    let key = key_on(1);
    let routed = |shard, shard_epoch| {
        let route = Some(v1::Route { shard, shard_epoch });
        nodes.one.get(v1::GetRequest { route, ..get(&key) })
    };
    routed(1, 0).await.unwrap();
    routed(1, 1).await.unwrap();
    // A change of the members that the map here does not show yet: the arc is the same.
    routed(1, 2).await.unwrap();
    for (shard, epoch) in [(2, 1), (3, 1), (9, 1)] {
        let fault = routed(shard, epoch).await.unwrap_err();
        assert_eq!(fault.reason, Reason::StaleRoute, "{shard} {epoch}: {fault}");
        assert_eq!(fault.number(metadata::MAP_EPOCH), Some(1));
    }
    assert!(nodes.one.source.asked.load(Ordering::SeqCst) > 0, "it looks for a newer map first");

    let route = Some(v1::Route { shard: 1, shard_epoch: 7 });
    let written = nodes.one.put(v1::PutRequest { route, ..put(&key, "v") }).await.unwrap_err();
    assert_eq!((written.reason, written.outcome), (Reason::StaleRoute, Outcome::NotApplied));
    assert_eq!(nodes.one.value(&key).await, None);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_members_refuses_no_read() {
    let nodes = Nodes::start().await;
    let route = |key: &str| Some(v1::Route { shard: shard_of("", key), shard_epoch: 1 });
    let keys = [key_on(1), key_on(3)];
    for key in &keys {
        nodes.one.put(put(key, "v")).await.unwrap();
    }
    // Each group takes a learner in; no map says so yet.
    assert_eq!((nodes.one.add_learner(1).await, nodes.two.add_learner(3).await), (2, 2));
    for (key, consistency) in keys.iter().flat_map(|key| {
        use v1::Consistency::{Any, Linearizable, Session};
        [Any, Linearizable, Session].map(|consistency| (key, consistency))
    }) {
        let read = v1::ReadOptions { consistency: consistency.into(), ..Default::default() };
        let asked = v1::GetRequest { route: route(key), read: Some(read), ..get(key) };
        let answer = nodes.one.get(asked).await;
        let answer = answer.unwrap_or_else(|fault| panic!("{key} {consistency:?}: {fault}"));
        assert_eq!(&answer.entry.unwrap().value[..], b"v");
    }
    // A write was planned on what is no more so: its caller looks again.
    let written = v1::PutRequest { route: route(&keys[0]), ..put(&keys[0], "w") };
    let fault = nodes.one.put(written).await.unwrap_err();
    assert_eq!((fault.reason, fault.outcome), (Reason::StaleRoute, Outcome::NotApplied));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_are_told_why() {
    let nodes = Nodes::start().await;
    let refused = async |operation| {
        let fault = nodes.one.ask(operation).await.unwrap_err();
        assert_eq!(fault.outcome, Outcome::NotApplied, "{fault}");
        fault
    };
    let in_keyspace =
        |keyspace: &str| v1::PutRequest { keyspace: keyspace.into(), ..put("k", "v") };
    let empty = refused(Operation::Get(get(""))).await;
    assert_eq!(empty.text(metadata::FIELD), Some("key"));
    let large = put("k", &"v".repeat((1 << 20) + 1));
    assert_eq!(refused(Operation::Put(large)).await.reason, Reason::TooLarge);
    let system = refused(Operation::Put(in_keyspace("system"))).await;
    assert_eq!(system.reason, Reason::NotAllowed);
    let unknown = refused(Operation::Put(in_keyspace("later"))).await;
    assert_eq!(unknown.reason, Reason::UnknownKeyspace);

    let increments = ["a/1", "a/2", "b/1"].map(|key| {
        let Operation::Write(write) = increment(key, None) else { unreachable!() };
        write.operations.into_iter().next().unwrap()
    });
    let write = v1::WriteRequest {
        keyspace: "rows".into(),
        operations: increments.to_vec(),
        ..Default::default()
    };
    let crossing = refused(Operation::Write(write.clone())).await;
    assert_eq!(crossing.reason, Reason::CrossEntity);
    assert!(crossing.message.contains("a/1") && crossing.message.contains("b/1"), "{crossing}");
    let one_entity = v1::WriteRequest { operations: increments[..2].to_vec(), ..write };
    nodes.one.ask(Operation::Write(one_entity)).await.unwrap();

    let condition = Some(v1::Condition { kind: None });
    let newer = v1::PutRequest { condition, ..put("k", "v") };
    assert_eq!(refused(Operation::Put(newer)).await.reason, Reason::InvalidArgument);
    assert_eq!(nodes.one.value("k").await, None, "a condition of a newer version is not none");
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keyspace_of_a_newer_map_is_looked_for() {
    let nodes = Nodes::start().await;
    let mut newer = shard_map(2);
    let rows = newer.keyspaces[2].clone();
    newer.keyspaces.push(v1::Keyspace { id: 3, name: "later".into(), ..rows });
    *nodes.one.source.newer.lock() = Some(newer.clone());
    *nodes.two.source.newer.lock() = Some(newer);
    for shard in 1..=4 {
        let request = v1::PutRequest { keyspace: "later".into(), ..put(&key_on(shard), "v") };
        assert!(nodes.one.put(request).await.unwrap().applied);
    }
    let keys = (1..=4).map(|shard| key_on(shard).into()).collect();
    let request = v1::BatchGetRequest { keyspace: "later".into(), keys, read: None };
    let Answer::BatchGet(found) = nodes.two.ask(Operation::BatchGet(request)).await.unwrap() else {
        panic!("a batch's answer")
    };
    assert!(found.items.iter().all(|item| item.entry.is_some()));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_is_answered_in_the_callers_order() {
    let nodes = Nodes::start().await;
    for shard in 1..=4 {
        let key = key_on(shard);
        nodes.one.put(put(&key, &key)).await.unwrap();
    }
    let order = [3, 1, 4, 2, 1].map(key_on);
    let mut keys: Vec<_> = order.iter().map(|key| key.clone().into()).collect();
    keys.insert(2, "absent".into());
    let request = v1::BatchGetRequest { keys, ..Default::default() };
    let answer = nodes.two.ask(Operation::BatchGet(request)).await.unwrap();
    let Answer::BatchGet(found) = answer else { panic!("a batch's answer") };
    let value = |item: &v1::BatchGetItem| {
        item.entry.as_ref().map(|entry| String::from_utf8_lossy(&entry.value).into_owned())
    };
    let values: Vec<_> = found.items.iter().map(value).collect();
    let mut expected: Vec<_> = order.into_iter().map(Some).collect();
    expected.insert(2, None);
    assert_eq!(values, expected);
    assert!(found.items.iter().all(|item| item.served.is_some()));

    let none = v1::BatchGetRequest::default();
    let answer = nodes.one.ask(Operation::BatchGet(none)).await.unwrap();
    assert!(matches!(answer, Answer::BatchGet(found) if found.items.is_empty()));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_condition_is_an_answer_with_the_current_state() {
    let nodes = Nodes::start().await;
    let first = nodes.one.put(put("k", "old")).await.unwrap();
    let if_absent = Some(v1::Condition { kind: Some(v1::condition::Kind::IfAbsent(true)) });
    let condition = if_absent.clone();
    let second = nodes.two.put(v1::PutRequest { condition, ..put("k", "new") }).await.unwrap();
    let current = second.current.unwrap();
    assert!(!second.applied && second.version == 0);
    assert_eq!((&current.value[..], current.version), (&b"old"[..], first.version));
    let delete = v1::DeleteRequest { key: "k".into(), condition: if_absent, ..Default::default() };
    let Answer::Delete(third) = nodes.two.ask(Operation::Delete(delete)).await.unwrap() else {
        panic!("a delete's answer")
    };
    assert!(!third.applied && third.current.is_some());
    assert_eq!(nodes.one.value("k").await.as_deref(), Some("old"));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_is_there_until_its_time_to_live_is_over_and_never_again() {
    let nodes = Nodes::start().await;
    let written = nodes.one.put(v1::PutRequest { ttl_ms: 60_000, ..put("k", "v") }).await.unwrap();
    let entry = nodes.one.get(get("k")).await.unwrap().entry.unwrap();
    assert_eq!(entry.expires_at_ms, (written.version >> 16) + 60_000);
    nodes.clock.advance(Duration::from_secs(61));
    assert_eq!(nodes.one.value("k").await, None);
    let read = v1::ReadOptions { at_version: written.version, ..Default::default() };
    let then = nodes.two.get(v1::GetRequest { read: Some(read), ..get("k") }).await;
    assert!(then.unwrap().entry.is_some(), "it was there then, and no write has moved the clock");
    nodes.one.put(put("k", "again")).await.unwrap();
    assert_eq!(nodes.two.value("k").await.as_deref(), Some("again"));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn older_versions_are_read_until_the_history_ends() {
    let nodes = Nodes::start().await;
    let old = nodes.one.put(put("k", "old")).await.unwrap();
    nodes.one.put(put("k", "new")).await.unwrap();
    let read = |at_version| {
        let read = Some(v1::ReadOptions { at_version, ..Default::default() });
        nodes.two.get(v1::GetRequest { read, ..get("k") })
    };
    assert_eq!(&read(old.version).await.unwrap().entry.unwrap().value[..], b"old");
    assert!(read(old.version - 1).await.unwrap().entry.is_none());
    let ahead = old.version + (60_000 << 16);
    assert_eq!(read(ahead).await.unwrap_err().reason, Reason::ClockOutOfBound);
    nodes.clock.advance(Duration::from_secs(120));
    nodes.one.put(put("k", "newest")).await.unwrap();
    let gone = read(old.version).await.unwrap_err();
    assert_eq!(gone.reason, Reason::VersionGone);
    assert!(gone.number(metadata::OLDEST_VERSION) > Some(old.version));
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_version_is_read_beyond_the_history_until_its_pin_runs_out() {
    let nodes = Nodes::start().await;
    let key = key_on(3);
    let old = nodes.one.put(put(&key, "old")).await.unwrap().version;
    let born_ms = old >> 16;
    let pin = |shard: u64, version: u64, until_ms: u64| {
        let route = Some(v1::Route { shard, shard_epoch: 1 });
        let keyspace = String::new();
        // Shard 3 is led by the other node.
        let request = v1::PinVersionRequest { route, keyspace, version, until_ms };
        let call = Call::own(Duration::from_secs(20));
        let router = nodes.one.router.clone();
        async move { router.execute(Operation::PinVersion(request), &call).await }
    };
    let read = |at_version| {
        let read = Some(v1::ReadOptions { at_version, ..Default::default() });
        nodes.one.get(v1::GetRequest { read, ..get(&key) })
    };
    let until_ms = born_ms + 200_000;
    match pin(3, old, until_ms).await.unwrap() {
        Answer::PinVersion(pinned) => assert_eq!(pinned.until_ms, until_ms),
        other => panic!("{other:?}"),
    }
    let route = Some(v1::Route { shard: 3, shard_epoch: 1 });
    let asked = v1::PinVersionRequest { route, version: old, until_ms, ..Default::default() };
    let refused = nodes.one.ask(Operation::PinVersion(asked)).await.unwrap_err();
    assert_eq!(refused.reason, Reason::NotAllowed, "a client's own request");
    let far = pin(3, old, born_ms + 700_000).await.unwrap_err();
    assert_eq!(far.reason, Reason::InvalidArgument);
    nodes.clock.advance(Duration::from_secs(120));
    nodes.one.put(put(&key, "new")).await.unwrap();
    assert_eq!(&read(old).await.unwrap().entry.unwrap().value[..], b"old");
    let gone = pin(3, old - 1, until_ms).await.unwrap_err();
    assert_eq!(
        (gone.reason, gone.number(metadata::OLDEST_VERSION)),
        (Reason::VersionGone, Some(old))
    );
    nodes.clock.advance(Duration::from_secs(120));
    nodes.one.put(put(&key, "newest")).await.unwrap();
    let gone = read(old).await.unwrap_err();
    let oldest = gone.number(metadata::OLDEST_VERSION).unwrap();
    assert_eq!(gone.reason, Reason::VersionGone);
    assert!(gone.message.contains(&oldest.to_string()), "{gone}");
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_takes_only_deletes() {
    let nodes = Nodes::start().await;
    let key = key_on(3);
    nodes.one.put(put(&key, "v")).await.unwrap();
    nodes.two.gate.0.store(true, Ordering::SeqCst);
    let fault = nodes.one.put(put(&key, "w")).await.unwrap_err();
    assert_eq!((fault.reason, fault.outcome), (Reason::DiskFull, Outcome::NotApplied));
    assert_eq!(nodes.one.value(&key).await.as_deref(), Some("v"));
    let delete = v1::DeleteRequest { key: key.clone().into(), ..Default::default() };
    nodes.one.ask(Operation::Delete(delete)).await.unwrap();
    assert_eq!(nodes.one.value(&key).await, None);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_consistency_is_served_here_and_says_how_stale_it_may_be() {
    let nodes = Nodes::start().await;
    let key = key_on(1);
    nodes.one.put(put(&key, "v")).await.unwrap();
    let read = v1::ReadOptions { consistency: v1::Consistency::Any.into(), ..Default::default() };
    let any = v1::GetRequest { read: Some(read), ..get(&key) };
    let found = nodes.one.get(any).await.unwrap();
    let served = found.served.unwrap();
    assert!(found.entry.is_some() && served.leader);
    assert!((500..10_000).contains(&served.staleness_ms), "{served:?}");
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn session_reads_wait_for_what_the_session_has_seen() {
    let nodes = Nodes::start().await;
    let key = key_on(1);
    let put = nodes.one.put(put(&key, "v")).await.unwrap().served.unwrap();
    let in_session = |index, version| {
        let mut token = SessionToken::default();
        token.observe(ShardId(put.shard), Seen { term: put.term, index }, version);
        let (consistency, session) = (v1::Consistency::Session.into(), token.encode());
        let read = v1::ReadOptions { consistency, session, ..Default::default() };
        v1::GetRequest { read: Some(read), ..get(&key) }
    };
    let found = nodes.one.get(in_session(put.index, 7 << 60)).await.unwrap();
    let served = found.served.unwrap();
    assert!(found.entry.is_some() && served.index >= put.index);
    assert_eq!(served.judged_at, 7 << 60, "no earlier than the session has seen");
    let short = Call::client(Some(Duration::from_millis(300)));
    let ahead = Operation::Get(in_session(put.index + 1_000, 0));
    let fault = nodes.one.router.execute(ahead, &short).await.unwrap_err();
    assert_eq!(fault.reason, Reason::TooStale, "{fault}");
    let damaged = v1::ReadOptions {
        consistency: v1::Consistency::Session.into(),
        session: "not a token".into(),
        ..Default::default()
    };
    let damaged = v1::GetRequest { read: Some(damaged), ..get(&key) };
    assert_eq!(nodes.one.get(damaged).await.unwrap_err().reason, Reason::InvalidArgument);
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_limits_and_while_draining_nothing_is_taken_on() {
    let nodes = Nodes::start().await;
    let ask = || {
        let operation = Some(Operation::Get(get("k")));
        let router = nodes.one.router.clone();
        async move { router.admitted(0, operation, &Call::client(None)).await.map(|_| ()) }
    };
    ask().await.unwrap();
    let permit = nodes.one.router.admission().admit(64 << 20, Origin::Client).unwrap();
    let mut first = nodes.one.router.admission().admit(0, Origin::Client).unwrap();
    assert_eq!(first.charge(1).unwrap_err().reason, Reason::Overloaded);
    drop((permit, first));
    ask().await.unwrap();
    nodes.one.draining.cancel();
    assert_eq!(ask().await.unwrap_err().reason, Reason::Draining);
    let written = nodes.two.put(put(&key_on(1), "v")).await.unwrap();
    assert_eq!(written.served.map(|served| served.node), Some(1), "it still leads");
    until(|| nodes.one.router.admission().in_flight() == (0, 0)).await;
    nodes.stop().await;
}

//! Limits: each holds at its edge, names itself beyond it, and whatever is within them fits into a
//! message.

use bytes::Bytes;
use coracle_proto::limits::{self, *};
use coracle_proto::v1;
use prost::Message;

fn put(key: usize, value: usize) -> v1::Operation {
    let put = v1::PutOperation { value: vec![7; value].into(), ttl_ms: u64::from(u32::MAX) };
    v1::Operation {
        key: vec![b'k'; key].into(),
        condition: None,
        kind: Some(v1::operation::Kind::Put(put)),
    }
}

fn if_value(bytes: usize) -> v1::Condition {
    let value = Bytes::from(vec![1; bytes]);
    v1::Condition { kind: Some(v1::condition::Kind::IfValue(value)) }
}

fn limit<T: std::fmt::Debug>(result: Result<T, LimitError>) -> &'static str {
    result.expect_err("beyond the limit").limit
}

#[test]
fn keys_and_values() {
    assert_eq!(limit(check_key(b"")), "KEY_BYTES_MIN");
    assert_eq!(check_key(b"k"), Ok(()));
    assert_eq!(check_key(&[0xff; KEY_BYTES_MAX]), Ok(()));
    let error = check_key(&[0; KEY_BYTES_MAX + 1]).unwrap_err();
    assert_eq!((error.limit, error.max, error.got), ("KEY_BYTES_MAX", 4096, 4097));
    assert_eq!(error.to_string(), "key has 4097 bytes, allowed are 1 to 4096 (KEY_BYTES_MAX)");
    assert_eq!(check_value(b""), Ok(()));
    assert_eq!(check_value(&vec![0; VALUE_BYTES_MAX]), Ok(()));
    assert_eq!(limit(check_value(&vec![0; VALUE_BYTES_MAX + 1])), "VALUE_BYTES_MAX");
    assert_eq!(check_bound("start", b""), Ok(()));
    assert_eq!(limit(check_bound("start", &[0; KEY_BYTES_MAX + 1])), "KEY_BYTES_MAX");
}

#[test]
fn times() {
    let ttl = TTL_MAX.as_millis() as u64;
    assert_eq!(check_ttl(ttl), Ok(()));
    assert_eq!(limit(check_ttl(ttl + 1)), "TTL_MAX");
    assert_eq!(limit(check_ttl(u64::MAX)), "TTL_MAX");
    let history = HISTORY_MAX.as_millis() as u64;
    assert_eq!(check_history(history), Ok(()));
    assert_eq!(limit(check_history(history + 1)), "HISTORY_MAX");
    // The year 2200 and the longest time to live still fit the 48 bits of a version.
    assert!(ttl + 7_258_118_400_000 < 1 << 48);
    assert_eq!(deadline(None), DEADLINE_MAX);
    assert_eq!(deadline(Some(DEADLINE_MAX * 2)), DEADLINE_MAX);
    assert_eq!(deadline(Some(DEADLINE_MAX / 3)), DEADLINE_MAX / 3);
}

#[test]
fn single_writes() {
    let mut request = v1::PutRequest { key: "k".into(), ..Default::default() };
    assert_eq!(check_put(&request), Ok(()));
    request.ttl_ms = u64::MAX;
    assert_eq!(limit(check_put(&request)), "TTL_MAX");
    request.ttl_ms = 0;
    request.condition = Some(if_value(VALUE_BYTES_MAX + 1));
    assert_eq!(limit(check_put(&request)), "VALUE_BYTES_MAX");
    let condition = request.condition.take();
    let delete = v1::DeleteRequest { key: "k".into(), condition, ..Default::default() };
    assert_eq!(limit(check_delete(&delete)), "VALUE_BYTES_MAX");
    assert_eq!(limit(check_delete(&v1::DeleteRequest::default())), "KEY_BYTES_MIN");
}

#[test]
fn batches() {
    assert_eq!(limit(check_batch(&[])), "BATCH_OPERATIONS_MIN");
    let mut operations = vec![put(1, 1); BATCH_OPERATIONS_MAX];
    assert_eq!(check_batch(&operations), Ok(()));
    operations.push(put(1, 1));
    assert_eq!(limit(check_batch(&operations)), "BATCH_OPERATIONS_MAX");

    let quarter = put(1, VALUE_BYTES_MAX - 1);
    assert_eq!(check_batch(&vec![quarter.clone(); 4]), Ok(()));
    let over = [vec![quarter; 4], vec![put(1, 0)]].concat();
    assert_eq!(limit(check_batch(&over)), "BATCH_BYTES_MAX");

    let compared = v1::Operation {
        key: "k".into(),
        condition: Some(if_value(VALUE_BYTES_MAX)),
        kind: Some(v1::operation::Kind::Check(v1::CheckOperation {})),
    };
    assert_eq!(check_batch(&vec![compared.clone(); 3]), Ok(()));
    assert_eq!(limit(check_batch(&vec![compared; 4])), "BATCH_BYTES_MAX");
    assert_eq!(limit(check_batch(&[put(0, 0)])), "KEY_BYTES_MIN");
    assert_eq!(limit(check_batch(&[put(1, VALUE_BYTES_MAX + 1)])), "VALUE_BYTES_MAX");
}

#[test]
fn reads() {
    let key = Bytes::from_static(b"k");
    assert_eq!(check_batch_get(&[]), Ok(()));
    assert_eq!(check_batch_get(&vec![key.clone(); BATCH_GET_KEYS_MAX]), Ok(()));
    assert_eq!(limit(check_batch_get(&vec![key; BATCH_GET_KEYS_MAX + 1])), "BATCH_GET_KEYS_MAX");
    assert_eq!(limit(check_batch_get(&[Bytes::new()])), "KEY_BYTES_MIN");
    assert_eq!(limit(check_batch_get_answer(BATCH_GET_BYTES_MAX + 1)), "BATCH_GET_BYTES_MAX");

    let long = Bytes::from(vec![0; KEY_BYTES_MAX + 1]);
    let scan = |change: fn(&mut v1::ScanRequest, Bytes), bytes: &Bytes| {
        let mut request = v1::ScanRequest::default();
        change(&mut request, bytes.clone());
        check_scan(&request)
    };
    assert_eq!(check_scan(&v1::ScanRequest::default()), Ok(()));
    assert_eq!(scan(|scan, bytes| scan.start = bytes, &long).unwrap_err().field, "start");
    assert_eq!(scan(|scan, bytes| scan.end = bytes, &long).unwrap_err().field, "end");
    assert_eq!(scan(|scan, bytes| scan.prefix = bytes, &long).unwrap_err().field, "prefix");
    let token = Bytes::from(vec![0; SCAN_TOKEN_BYTES_MAX + 1]);
    let error = scan(|scan, bytes| scan.resume_token = bytes, &token);
    assert_eq!(limit(error), "SCAN_TOKEN_BYTES_MAX");

    let session = Bytes::from(vec![0; SESSION_TOKEN_BYTES_MAX + 1]);
    let read = v1::ReadOptions { session, ..Default::default() };
    assert_eq!(check_read(None), Ok(()));
    assert_eq!(limit(check_read(Some(&read))), "SESSION_TOKEN_BYTES_MAX");
}

#[test]
fn names() {
    for name in ["a", "default", "orders_2-eu", &"x".repeat(KEYSPACE_NAME_MAX)] {
        assert_eq!(check_keyspace_name(name), Ok(()), "{name}");
    }
    let byte = |at, byte| Err(KeyspaceNameError::Byte { at, byte });
    assert_eq!(check_keyspace_name("aB"), byte(1, b'B'));
    assert_eq!(check_keyspace_name("a b"), byte(1, b' '));
    assert_eq!(check_keyspace_name("é"), byte(0, 0xc3));
    assert_eq!(check_keyspace_name("a\0"), byte(1, 0));
    for name in [String::new(), "x".repeat(KEYSPACE_NAME_MAX + 1)] {
        let error = check_keyspace_name(&name).unwrap_err();
        assert!(matches!(error, KeyspaceNameError::Length(_)), "{error}");
    }
    assert_eq!(limit(limits::check_shards(SHARDS_MAX as u32 + 1)), "SHARDS_MAX");
}

/// As long as a number gets on the wire.
const MOST: u64 = u64::MAX;

fn assert_fits(name: &str, message: &impl Message) {
    let len = message.encoded_len();
    assert!(len <= MESSAGE_BYTES_MAX, "{name}: {len} of {MESSAGE_BYTES_MAX}");
}

/// On a pipeline, behind as much as a message takes before it takes no more.
fn assert_ask_fits(name: &str, operation: v1::pipeline_request::Operation) {
    let key = vec![0; PIPELINE_FRAME_BYTES].into();
    let before = v1::GetRequest { key, ..Default::default() };
    let before = Some(v1::pipeline_request::Operation::Get(before));
    let request = |operation| v1::PipelineRequest { id: MOST, timeout_ms: MOST, operation };
    let requests = vec![request(before), request(Some(operation))];
    assert_fits(name, &v1::PipelineRequests { requests });
}

/// See [`assert_ask_fits`].
fn assert_answer_fits(name: &str, result: v1::pipeline_response::Result) {
    let value = vec![0; PIPELINE_FRAME_BYTES].into();
    let entry = Some(v1::Entry { value, ..Default::default() });
    let before = v1::GetResponse { entry, served: served() };
    let before = v1::pipeline_response::Result::Get(before);
    let response = |result| v1::PipelineResponse { id: MOST, result: Some(result) };
    let responses = vec![response(before), response(result)];
    assert_fits(name, &v1::PipelineResponses { responses });
}

fn served() -> Option<v1::Served> {
    Some(v1::Served {
        shard: MOST,
        term: MOST,
        index: MOST,
        node: MOST,
        leader: true,
        staleness_ms: MOST,
        server_time_ms: MOST,
        judged_at: MOST,
    })
}

fn entry(bytes: usize) -> Option<v1::Entry> {
    Some(v1::Entry { value: vec![1; bytes].into(), version: MOST, expires_at_ms: MOST })
}

#[test]
fn the_largest_write_fits_into_a_message() {
    let share = BATCH_BYTES_MAX / BATCH_OPERATIONS_MAX / 3;
    let mut operations = vec![put(share, share); BATCH_OPERATIONS_MAX];
    for operation in &mut operations {
        operation.condition = Some(if_value(share));
    }
    check_batch(&operations).unwrap();
    let write = v1::WriteRequest {
        keyspace: "k".repeat(KEYSPACE_NAME_MAX),
        operations,
        request_id: Some(v1::RequestId {
            client: MOST,
            sequence: MOST,
            birth: MOST,
            lowest_unanswered: MOST,
        }),
        route: Some(v1::Route { shard: MOST, shard_epoch: MOST }),
    };
    let result = v1::OperationResult {
        condition_failed: true,
        current: entry(BATCH_CURRENT_BYTES_MAX / BATCH_OPERATIONS_MAX),
        counter: i64::MIN,
        value_left_out: true,
    };
    let written = v1::WriteResponse {
        applied: true,
        version: MOST,
        results: vec![result; BATCH_OPERATIONS_MAX],
        served: served(),
    };
    assert_ask_fits("write", v1::pipeline_request::Operation::Write(write));
    assert_answer_fits("written", v1::pipeline_response::Result::Write(written));
}

#[test]
fn the_largest_read_fits_into_a_message() {
    let read = v1::ReadOptions {
        consistency: v1::Consistency::Any.into(),
        session: vec![0; SESSION_TOKEN_BYTES_MAX].into(),
        max_staleness_ms: MOST,
        at_version: MOST,
    };
    let get = v1::BatchGetRequest {
        keyspace: "k".repeat(KEYSPACE_NAME_MAX),
        keys: vec![Bytes::from(vec![1; KEY_BYTES_MAX]); BATCH_GET_KEYS_MAX],
        read: Some(read),
    };
    let item = v1::BatchGetItem {
        entry: entry(BATCH_GET_BYTES_MAX / BATCH_GET_KEYS_MAX),
        served: served(),
    };
    let got = v1::BatchGetResponse { items: vec![item; BATCH_GET_KEYS_MAX] };
    assert_ask_fits("batch get", v1::pipeline_request::Operation::BatchGet(get));
    assert_answer_fits("batch got", v1::pipeline_response::Result::BatchGet(got));

    let page = |entries: usize, key: usize, value: usize| v1::ScanResponse {
        entries: vec![v1::KeyValue { key: vec![0; key].into(), entry: entry(value) }; entries],
        version: MOST,
        resume_token: vec![0; SCAN_TOKEN_BYTES_MAX].into(),
        done: true,
        served: served(),
    };
    let share = SCAN_PAGE_BYTES / SCAN_PAGE_ENTRIES / 2;
    assert_fits("page", &page(SCAN_PAGE_ENTRIES, share, share));
    assert_fits("one large entry", &page(1, KEY_BYTES_MAX, VALUE_BYTES_MAX));
}

#[test]
fn the_largest_map_fits_into_a_message() {
    let replica = v1::Replica {
        id: MOST,
        node: MOST,
        role: 2,
        joining: true,
        becomes_voter: true,
        replaces: MOST,
        goes: true,
    };
    let shard = v1::Shard {
        id: MOST,
        start: MOST,
        end: MOST,
        epoch: MOST,
        replicas: vec![replica; 3 + LEARNERS_MAX as usize],
        leader_node: MOST,
        leader_term: MOST,
        forming: true,
    };
    let address = "a".repeat(100);
    let node = v1::Node {
        id: MOST,
        address: address.clone(),
        peer_address: address.clone(),
        zone: address.clone(),
        state: 1,
        version: address.clone(),
        http_address: address,
        join_nonce: MOST,
        weight: u32::MAX,
    };
    let keyspace = v1::Keyspace {
        id: u32::MAX,
        name: "k".repeat(KEYSPACE_NAME_MAX),
        entity_rule: Some(coracle_proto::entity::EntityRule::Prefix(4096).into()),
        history_ms: MOST,
        revision: MOST,
    };
    let rule = v1::ReadReplicas { zone: "z".repeat(100), learners: u32::MAX };
    let map = v1::ShardMap {
        cluster_id: "c".repeat(64),
        hash_seed: MOST,
        epoch: MOST,
        shards: vec![shard; SHARDS_MAX + 1],
        nodes: vec![node; NODES_MAX],
        keyspaces: vec![keyspace; KEYSPACES_MAX + 2],
        server_time_ms: MOST,
        read_replicas: vec![rule; LEARNERS_MAX as usize],
        replicas: u32::MAX,
    };
    assert_fits("map", &v1::WatchMapResponse { map: Some(map) });
}

//! Pipelines whose callers do not take their answers, or ask for too much at once: what they hold counts,
//! is bounded, and is given back.

use coracle_proto::limits::{DEADLINE_MAX, MESSAGE_BYTES_MAX, PIPELINE_IN_FLIGHT_MAX};
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::v1;
use coracle_proto::v1::kv_service_client::KvServiceClient;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use futures_util::stream::{self, BoxStream, StreamExt};
use tonic::transport::Channel;

use crate::service_kv::serve;
use crate::service_nodes::{Nodes, get, key_on, pass, put, until};

const ALL: u64 = PIPELINE_IN_FLIGHT_MAX as u64;

/// Operations with the ids from `first`.
fn together(first: u64, operations: impl Iterator<Item = Operation>) -> v1::PipelineRequests {
    let request =
        |(id, operation)| v1::PipelineRequest { id, timeout_ms: 5_000, operation: Some(operation) };
    v1::PipelineRequests { requests: (first..).zip(operations).map(request).collect() }
}

/// So many reads of a key whose value has so many bytes.
async fn reads(
    nodes: &Nodes,
    count: usize,
    value: usize,
) -> impl Iterator<Item = Operation> + use<> {
    let key = key_on(1);
    nodes.one.put(put(&key, &"v".repeat(value))).await.unwrap();
    std::iter::repeat_n(Operation::Get(get(&key)), count)
}

async fn client(nodes: &Nodes) -> KvServiceClient<Channel> {
    let (channel, _) = serve(nodes).await;
    KvServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// With and without an end of what is asked.
fn asked(
    messages: Vec<v1::PipelineRequests>,
    ends: bool,
) -> BoxStream<'static, v1::PipelineRequests> {
    let messages = stream::iter(messages);
    if ends { messages.boxed() } else { messages.chain(stream::pending()).boxed() }
}

#[tokio::test]
async fn caller_that_takes_nothing_loses_its_stream_and_what_waits_for_it_is_given_back() {
    for ends in [true, false] {
        let nodes = Nodes::start().await;
        let mut kv = client(&nodes).await;
        let (count, value) = (120, 100 << 10);
        let messages = vec![together(1, reads(&nodes, count, value).await)];
        let mut answers = kv.pipeline(asked(messages, ends)).await.unwrap().into_inner();
        let mut taken = answers.message().await.unwrap().unwrap().responses.len();
        let admission = nodes.one.router.admission().clone();
        let served = format!("method=\"Get\",code=\"OK\",reason=\"\"}} {count}");
        until(|| nodes.one.metrics.render().contains(&served)).await;
        until(|| admission.in_flight().0 == 0).await;
        let held = admission.in_flight().1;
        assert!(held > (count as u64 - 20) * value as u64, "{held} bytes wait for their caller");
        // Its watch may have begun before the last answer was taken.
        for _ in 0..3 {
            pass(DEADLINE_MAX).await;
        }
        // Beside what is in the connection's buffer nothing is left.
        until(|| admission.in_flight().1 < held / 4).await;
        let told = loop {
            match answers.message().await {
                Ok(Some(some)) => taken += some.responses.len(),
                Ok(None) => panic!("it ended well"),
                Err(status) => break Fault::from_status(&status),
            }
        };
        assert_eq!(told.reason, Reason::OutcomeUnknown, "{told}");
        assert!(taken < count, "all {count} were taken");
        until(|| admission.in_flight() == (0, 0)).await;
        nodes.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_that_wait_for_their_turn_count() {
    let nodes = Nodes::start().await;
    let mut kv = client(&nodes).await;
    let written = "w".repeat(3 << 10);
    let write = Operation::Put(put(&key_on(2), &written));
    let messages = vec![
        together(0, reads(&nodes, PIPELINE_IN_FLIGHT_MAX, 1 << 10).await),
        together(ALL, std::iter::repeat_n(write, PIPELINE_IN_FLIGHT_MAX)),
    ];
    let mut answers = kv.pipeline(asked(messages, true)).await.unwrap().into_inner();
    let mut ids: Vec<u64> = Vec::new();
    let admission = nodes.one.router.admission().clone();
    // Not taken: all answers to the reads; most of the writes have to wait for them.
    let answered = ALL * (2 << 10);
    until(|| admission.in_flight().0 == 0 && admission.in_flight().1 > answered).await;
    while let Some(together) = answers.message().await.unwrap() {
        assert!(
            together
                .responses
                .iter()
                .all(|answer| { matches!(answer.result, Some(Answer::Get(_) | Answer::Put(_))) })
        );
        ids.extend(together.responses.iter().map(|answer| answer.id));
    }
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..2 * ALL));
    until(|| admission.in_flight() == (0, 0)).await;
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_beyond_the_nodes_bytes_are_refused_before_their_turn() {
    let nodes = Nodes::start().await;
    let mut kv = client(&nodes).await;
    let write = Operation::Put(put(&key_on(2), &"w".repeat(3 << 10)));
    let first = together(0, reads(&nodes, PIPELINE_IN_FLIGHT_MAX, 1 << 10).await);
    let second = together(ALL, std::iter::repeat_n(write, PIPELINE_IN_FLIGHT_MAX));
    let admission = nodes.one.router.admission().clone();
    let (go, gone) = tokio::sync::oneshot::channel();
    let then = stream::once(async move {
        gone.await.expect("it is told");
        second
    });
    let mut answers = kv.pipeline(stream::iter([first]).chain(then)).await.unwrap().into_inner();
    let counted = |what: &str, count| {
        let line = format!("{what}\"}} {count}");
        nodes.one.metrics.render().contains(&line)
    };
    until(|| counted("method=\"Get\",code=\"OK\",reason=\"", ALL)).await;
    let full = admission.hold(64 << 20);
    go.send(()).expect("it waits");
    let refused = "method=\"Put\",code=\"RESOURCE_EXHAUSTED\",reason=\"OVERLOADED";
    until(|| counted(refused, ALL)).await;
    drop(full);
    let (mut found, mut overloaded) = (0, 0);
    while let Some(together) = answers.message().await.unwrap() {
        for answer in together.responses {
            match answer.result {
                Some(Answer::Get(_)) => found += 1,
                Some(Answer::Error(error)) if error.reason == "OVERLOADED" => overloaded += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!((found, overloaded), (ALL, ALL));
    until(|| admission.in_flight() == (0, 0)).await;
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn message_of_too_many_operations_ends_the_stream_behind_the_answers_to_others() {
    let nodes = Nodes::start().await;
    let mut kv = client(&nodes).await;
    let few = together(0, reads(&nodes, 3, 1).await);
    let many = together(3, reads(&nodes, PIPELINE_IN_FLIGHT_MAX + 1, 1).await);
    let after = together(9_999, reads(&nodes, 1, 1).await);
    let messages = vec![few, many, after];
    let mut answers = kv.pipeline(asked(messages, true)).await.unwrap().into_inner();
    let mut taken = 0;
    let told = loop {
        match answers.message().await {
            Ok(Some(together)) => taken += together.responses.len(),
            Ok(None) => panic!("it ended well"),
            Err(status) => break Fault::from_status(&status),
        }
    };
    assert_eq!((taken, told.reason), (3, Reason::InvalidArgument), "{told}");
    nodes.stop().await;
}

//! Tests of asking: order, bounds, timeouts, coalescing, and what a break does.

use std::time::Duration;

use bytes::Bytes;
use coracle_proto::peer::Envelope;
use coracle_raft::transport::{Lane, TransportError};
use coracle_raft::types::NodeId;
use coracle_server::transport::Connection;
use futures_util::future::join_all;
use prost::Message;
use tokio::time::Instant;

use crate::transport_net::MemoryNet;
use crate::transport_node::{LONG, Node, cluster, known, settings, unreachable, until};

#[tokio::test(start_paused = true)]
async fn questions_of_one_lane_arrive_in_the_order_of_asking() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    nodes[1].notes.questions.lock().clear();
    for lane in [Lane::Control, Lane::Heartbeat, Lane::Appends, Lane::Bulk] {
        let bodies: Vec<_> = (0..500).map(|i| format!("{lane:?} {i}")).collect();
        let mut answers: Vec<_> =
            bodies.iter().map(|body| nodes[0].ask(2, lane, body, LONG)).collect();
        // The order is that of `ask`, not that of awaiting.
        answers.reverse();
        for (answer, body) in join_all(answers).await.into_iter().zip(bodies.iter().rev()) {
            assert_eq!(answer.expect("answered"), body.as_bytes());
        }
        let asked = std::mem::take(&mut *nodes[1].notes.questions.lock());
        assert!(asked.iter().all(|(from, _)| *from == NodeId(1)));
        assert!(asked.iter().map(|(_, body)| body).eq(bodies.iter().map(|body| body.as_bytes())));
    }
}

#[tokio::test(start_paused = true)]
async fn answers_come_in_any_order_and_nobody_waits_for_another() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let first = nodes[0].ask(2, Lane::Appends, "hold 1", LONG);
    let second = nodes[0].ask(2, Lane::Appends, "hold 2", LONG);
    assert_eq!(nodes[0].ask(2, Lane::Appends, "third", LONG).await.expect("answered"), "third");
    assert_eq!(nodes[1].notes.held(), 2);
    nodes[1].notes.release_last();
    assert_eq!(second.await.expect("answered"), "hold 2");
    nodes[1].notes.release_last();
    assert_eq!(first.await.expect("answered"), "hold 1");
}

#[tokio::test(start_paused = true)]
async fn no_answer_is_awaited_longer_than_its_timeout() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let timeout = Duration::from_millis(250);
    let begun = Instant::now();
    let answer = nodes[0].ask(2, Lane::Appends, "never", timeout).await;
    assert_eq!(answer, Err(TransportError::Timeout(timeout)));
    assert!((timeout..timeout * 2).contains(&begun.elapsed()));
    let why = unreachable(nodes[0].ask(2, Lane::Appends, "refuse", LONG).await);
    assert_eq!(why, "no such group");
    let why = unreachable(nodes[0].ask(9, Lane::Appends, "whoever", LONG).await);
    assert_eq!(why, "node 9 is not known here");
}

#[tokio::test(start_paused = true)]
async fn a_break_fails_everything_at_once_and_is_told_once() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    assert!(nodes[0].notes.lost.lock().is_empty());
    let answers: Vec<_> = [Lane::Control, Lane::Appends, Lane::Bulk]
        .map(|lane| nodes[0].ask(2, lane, "never", LONG))
        .into_iter()
        .collect();
    until("all three were heard", || nodes[1].notes.asked().ends_with(&["never".into()])).await;
    let begun = Instant::now();
    net.break_connections("n2:1");
    for answer in join_all(answers).await {
        assert!(unreachable(answer).contains("broke"));
    }
    assert!(begun.elapsed() < Duration::from_millis(100));
    assert_eq!(*nodes[0].notes.lost.lock(), [NodeId(2)]);
    assert_eq!(*nodes[1].notes.lost.lock(), [NodeId(1)]);
    nodes[0].reach(2).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "redialled at once");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_died_is_unreachable_at_once_and_found_when_it_is_back() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    nodes[1].stop().await;
    until("the loss is told", || *nodes[0].notes.lost.lock() == [NodeId(2)]).await;
    let begun = Instant::now();
    let why = unreachable(nodes[0].ask(2, Lane::Appends, "hello", LONG).await);
    assert!(begun.elapsed().is_zero(), "waited to hear: {why}");
    // By now the pauses between attempts are long; that the node greets ends them.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let begun = Instant::now();
    let _back = Node::start(&net, settings(known(2, 2), &[known(1, 1)])).await;
    nodes[0].reach(2).await;
    assert!(begun.elapsed() < Duration::from_millis(40), "{:?}", begun.elapsed());
    assert_eq!(nodes[0].notes.known.lock().last(), Some(&known(2, 2)));
}

#[tokio::test(start_paused = true)]
async fn a_greeting_ends_the_pause_between_attempts() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    net.ways("n1", "n2:1", |way| way.refused = true);
    net.break_connections("n2:1");
    tokio::time::sleep(Duration::from_secs(10)).await;
    unreachable(nodes[0].ask(2, Lane::Appends, "hello", LONG).await);
    net.ways("n1", "n2:1", |way| way.refused = false);
    let begun = Instant::now();
    // The second node dials anew, and so it greets.
    net.break_connections("n1:1");
    nodes[0].reach(2).await;
    assert!(begun.elapsed() < Duration::from_millis(60), "{:?}", begun.elapsed());
}

/// No reset comes from a cut cable: only silence.
#[tokio::test(start_paused = true)]
async fn a_silent_peer_times_out_and_its_connections_are_given_up() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    net.ways("n1", "n2:1", |way| way.silent = true);
    net.ways("n2", "n1:1", |way| way.silent = true);
    let timeout = Duration::from_millis(300);
    let answer = nodes[0].ask(2, Lane::Control, "anybody there?", timeout).await;
    assert_eq!(answer, Err(TransportError::Timeout(timeout)));
    let waits = nodes[0].ask(2, Lane::Appends, "still?", LONG);
    let begun = Instant::now();
    assert!(unreachable(waits.await).contains("nothing was heard"));
    assert!(begun.elapsed() < Duration::from_secs(4));
    assert_eq!(*nodes[0].notes.lost.lock(), [NodeId(2)]);

    net.ways("n1", "n2:1", |way| way.silent = false);
    net.ways("n2", "n1:1", |way| way.silent = false);
    let healed = Instant::now();
    nodes[0].reach(2).await;
    assert!(healed.elapsed() < Duration::from_millis(1100), "{:?}", healed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_stays() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(nodes.iter().all(|node| node.notes.lost.lock().is_empty()));
    let status = &nodes[0].transport.status()[0];
    assert_eq!(status.known, known(2, 1));
    assert_eq!(status.dialled, [Connection::Control, Connection::Appends]);
    assert_eq!(status.accepted, [Connection::Control, Connection::Appends]);
    assert!(status.silence.expect("heard") <= Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_is_bounded_in_bytes_for_each_lane() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let body = format!("never {}", "x".repeat(1 << 20));
    let (mut waiting, mut asked) = (Vec::new(), 0);
    let why = loop {
        let mut answer = nodes[0].ask(2, Lane::Bulk, &body, LONG);
        match futures_util::poll!(&mut answer) {
            std::task::Poll::Pending => waiting.push(answer),
            std::task::Poll::Ready(answer) => break unreachable(answer),
        }
        asked += 1;
        assert!(asked < 100, "no bound");
    };
    assert!(why.contains("under way"), "{why}");
    assert_eq!(waiting.len(), 7, "of a MiB and a little each, under 8 MiB");
    assert_eq!(
        nodes[0].ask(2, Lane::Appends, "other lane", LONG).await.expect("room"),
        "other lane"
    );

    // Who does not wait any more gives the room back, sent or not.
    waiting.truncate(6);
    let held = nodes[0].ask(2, Lane::Bulk, &body, LONG);
    drop(waiting);
    drop(held);
    for _ in 0..3 {
        let fits = nodes[0].ask(2, Lane::Bulk, &"y".repeat(7 << 20), LONG).await;
        assert_eq!(fits.expect("room").len(), 7 << 20);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_is_bounded_in_number() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let waiting: Vec<_> =
        (0..4096).map(|_| nodes[0].ask(2, Lane::Control, "never", LONG)).collect();
    until("all were heard", || nodes[1].notes.questions.lock().len() >= 4096).await;
    let why = unreachable(nodes[0].ask(2, Lane::Control, "one more", LONG).await);
    assert!(why.contains("4096 questions"), "{why}");
    drop(waiting);
    // Here they are withdrawn; there they are still being answered, and more are refused.
    let why = unreachable(nodes[0].ask(2, Lane::Control, "one more", LONG).await);
    assert!(why.contains("being answered"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn a_message_that_no_frame_holds_is_refused_and_the_largest_one_is_not() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let why = unreachable(nodes[0].ask(2, Lane::Appends, &"x".repeat(16 << 20), LONG).await);
    assert!(why.contains("is over"), "{why}");
    let large = "x".repeat((15 << 20) - 64);
    assert_eq!(nodes[0].ask(2, Lane::Appends, &large, LONG).await.expect("fits"), large.as_bytes());
}

#[tokio::test(start_paused = true)]
async fn heartbeats_of_many_groups_leave_in_one_envelope_with_facts() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    net.ways("n1", "n2:1", |way| way.frames.clear());
    nodes[1].notes.facts.lock().clear();
    let begun = Instant::now();
    let mut answers = Vec::new();
    for group in 0..40 {
        answers.push(nodes[0].ask(2, Lane::Heartbeat, &format!("beat {group}"), LONG));
        if group % 20 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    assert!(join_all(answers).await.iter().all(|answer| answer.is_ok()));
    assert!(begun.elapsed() <= Duration::from_millis(8), "{:?}", begun.elapsed());
    for forth in [true, false] {
        let frames = net.way("n1", "n2:1", forth, |way| way.frames.clone());
        assert_eq!(frames.len(), 1, "forth: {forth}");
        let envelope = Envelope::decode(&frames[0][..]).expect("an envelope");
        assert_eq!(envelope.messages.len(), 40);
        assert!(envelope.messages.iter().all(|message| message.answer != forth));
    }
    assert_eq!(*nodes[1].notes.facts.lock(), [(NodeId(1), 1)], "with the heartbeats");
    assert_eq!(*nodes[0].notes.facts.lock(), [(NodeId(2), 2)], "with their answers");
}

#[tokio::test(start_paused = true)]
async fn a_vote_does_not_linger_and_takes_the_heartbeats_along() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let begun = Instant::now();
    let beat = nodes[0].ask(2, Lane::Heartbeat, "beat", LONG);
    let vote = nodes[0].ask(2, Lane::Control, "vote", LONG);
    vote.await.expect("answered");
    beat.await.expect("answered");
    assert!(begun.elapsed() < Duration::from_millis(1));
}

/// A slow link fills with what waits, not with one write for each question.
#[tokio::test(start_paused = true)]
async fn what_waits_leaves_together_and_large_messages_do_not_pile_into_one_frame() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    net.ways("n1", "n2:1", |way| way.frames.clear());
    let small: Vec<_> =
        (0..1000).map(|i| nodes[0].ask(2, Lane::Appends, &format!("{i}"), LONG)).collect();
    let body = "x".repeat(600 << 10);
    let large: Vec<_> = (0..4).map(|_| nodes[0].ask(2, Lane::Appends, &body, LONG)).collect();
    assert!(join_all(small.into_iter().chain(large)).await.iter().all(|answer| answer.is_ok()));
    let frames = net.way("n1", "n2:1", true, |way| way.frames.clone());
    let sizes: Vec<_> = frames.iter().map(Vec::len).collect();
    assert_eq!(frames.len(), 4, "{sizes:?}");
    assert!(sizes.iter().all(|bytes| *bytes <= 1 << 20), "{sizes:?}");
}

#[tokio::test(start_paused = true)]
async fn forwards_have_a_connection_of_their_own() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let forward = |body: &'static str| {
        nodes[0].transport.forward(NodeId(2), Bytes::from_static(body.as_bytes()), LONG)
    };
    assert_eq!(forward("get x").await.expect("answered"), "1:get x");
    assert_eq!(unreachable(forward("refuse").await), "not taken");
    assert!(nodes[0].transport.status()[0].dialled.contains(&Connection::Forward));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_transport_fails_what_waits_and_joins_its_tasks() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let waits = nodes[0].ask(2, Lane::Appends, "never", LONG);
    until("it was heard", || nodes[1].notes.asked().contains(&"never".into())).await;
    nodes[0].stop().await;
    assert!(unreachable(waits.await).contains("has ended"));
    assert!(unreachable(nodes[0].ask(2, Lane::Appends, "more", LONG).await).contains("has ended"));
    assert!(nodes[0].notes.lost.lock().is_empty(), "it left by itself");
}

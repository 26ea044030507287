//! Tests of the first frame, and of bytes that are not what they should be.

use std::time::Duration;

use coracle_proto::peer::{Envelope, GroupMessage, Hello, KnownNode, Lane as WireLane};
use coracle_raft::transport::Lane;
use coracle_raft::types::NodeId;
use coracle_server::net::Stream;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::transport_net::MemoryNet;
use crate::transport_node::{LONG, Node, cluster, known, settings, unreachable, until};

fn hello(from: KnownNode, to_node: u64) -> Hello {
    Hello {
        protocol: 1,
        cluster_id: "c".into(),
        from: Some(from),
        to_node,
        lane: WireLane::Control as i32,
        ..Default::default()
    }
}

fn frame(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut frame = u32::try_from(body.len()).expect("small").to_be_bytes().to_vec();
    frame.extend(crc32fast::hash(&body).to_be_bytes());
    frame.extend(body);
    frame
}

/// A connection from outside, that says what it likes.
async fn connect(net: &MemoryNet) -> Box<dyn Stream> {
    net.host("outside").connect("n1:1").await.expect("n1 listens")
}

async fn read_hello(stream: &mut Box<dyn Stream>) -> Hello {
    let length = stream.read_u32().await.expect("an answer");
    stream.read_u32().await.expect("its checksum");
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body).await.expect("its body");
    Hello::decode(&body[..]).expect("a Hello")
}

async fn greet(net: &MemoryNet, hello: &Hello) -> (Box<dyn Stream>, Hello) {
    let mut stream = connect(net).await;
    stream.write_all(&frame(hello)).await.expect("n1 reads");
    let answer = read_hello(&mut stream).await;
    (stream, answer)
}

async fn is_closed(mut stream: Box<dyn Stream>) -> bool {
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(1), stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn a_node_of_another_cluster_is_refused_with_the_reason() {
    let net = MemoryNet::default();
    let here = Node::start(&net, settings(known(1, 1), &[])).await;
    let mut other = settings(known(2, 1), &[known(1, 1)]);
    other.cluster_id = "d".into();
    let other = Node::start(&net, other).await;
    let mut why = String::new();
    until("n2 hears why", || {
        let mut answer = other.ask(1, Lane::Control, "hello", LONG);
        if let std::task::Poll::Ready(Err(error)) = poll(&mut answer) {
            why = error.to_string();
        }
        why.contains("refused")
    })
    .await;
    assert!(why.contains("this is a node of cluster c, not d"), "{why}");
    assert!(here.transport.peers().is_empty() && here.notes.asked().is_empty());

    let (stream, answer) =
        greet(&net, &Hello { cluster_id: "d".into(), ..hello(known(2, 1), 1) }).await;
    assert!(answer.refused.contains("cluster c, not d") && answer.known.is_empty());
    assert!(is_closed(stream).await);
}

fn poll<T>(future: &mut (impl Future<Output = T> + Unpin)) -> std::task::Poll<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::Pin::new(future).poll(&mut context)
}

#[tokio::test(start_paused = true)]
async fn a_rolled_back_or_copied_directory_is_refused() {
    let net = MemoryNet::default();
    let here = Node::start(&net, settings(known(1, 1), &[known(2, 5)])).await;
    for (start_count, incarnation, refused) in
        [(4, 1, "rolled back"), (5, 1, "was copied"), (5, known(2, 5).incarnation, ""), (6, 1, "")]
    {
        let from = KnownNode { start_count, incarnation, ..known(2, 5) };
        let (_stream, answer) = greet(&net, &hello(from, 1)).await;
        assert!(answer.refused.contains(refused), "{}", answer.refused);
        assert_eq!(answer.refused.is_empty(), refused.is_empty());
    }
    assert_eq!(here.transport.peers()[0].start_count, 6);

    // The refused one learns who took its place.
    let copy = Node::start(&net, settings(known(2, 5), &[known(1, 1)])).await;
    until("the copy hears of the other", || !copy.notes.superseded.lock().is_empty()).await;
    assert_eq!(copy.notes.superseded.lock()[0].start_count, 6);
}

#[tokio::test(start_paused = true)]
async fn a_node_is_not_taken_for_another_that_had_its_address() {
    let net = MemoryNet::default();
    let here = Node::start(&net, settings(known(1, 1), &[])).await;
    let (_stream, answer) = greet(&net, &hello(known(2, 1), 3)).await;
    assert_eq!(answer.refused, "this is node 1, not 3");
    // Refused, but of this cluster: what it says of itself is good.
    assert_eq!(here.transport.peers(), [known(2, 1)]);
}

/// The older connection may still hold questions: none may come after one of the newer connection.
#[tokio::test(start_paused = true)]
async fn a_newer_connection_takes_the_place_of_the_older_one() {
    let net = MemoryNet::default();
    let here = Node::start(&net, settings(known(1, 1), &[])).await;
    let (mut older, _) = greet(&net, &hello(known(2, 1), 1)).await;
    let question = |body: &'static str| {
        let message = GroupMessage { call: 1, body: body.into(), ..Default::default() };
        frame(&Envelope { messages: vec![message], ..Default::default() })
    };
    older.write_all(&question("older")).await.expect("open");
    until("the older one is heard", || here.notes.asked() == ["older"]).await;
    let (mut newer, answer) = greet(&net, &hello(known(2, 1), 1)).await;
    assert!(answer.refused.is_empty());
    // Whether it is noticed at once or not: it is not heard any more.
    let _ = older.write_all(&question("too late")).await;
    newer.write_all(&question("newer")).await.expect("open");
    until("the newer one is heard", || here.notes.asked().contains(&"newer".into())).await;
    assert!(is_closed(older).await);
    assert_eq!(here.notes.asked(), ["older", "newer"]);
}

#[tokio::test(start_paused = true)]
async fn damage_on_the_way_closes_the_connection_and_is_never_heard() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    for forth in [true, false] {
        nodes[0].reach(2).await;
        nodes[1].notes.questions.lock().clear();
        net.way("n1", "n2:1", forth, |way| way.damage = true);
        let why = unreachable(nodes[0].ask(2, Lane::Appends, "entry", LONG).await);
        assert!(why.contains("broke"), "{why}");
        assert_eq!(nodes[1].notes.asked().len(), usize::from(!forth), "forth: {forth}");
    }
    nodes[0].reach(2).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_may_not_ask_groups() {
    let net = MemoryNet::default();
    let here = Node::start(&net, settings(known(1, 1), &[])).await;
    let stranger = KnownNode { node: 0, ..known(2, 1) };
    let unborn = Hello { cluster_id: String::new(), ..hello(stranger, 0) };
    for guest in [unborn, hello(known(2, 1), 0)] {
        let (mut stream, answer) = greet(&net, &guest).await;
        assert!(answer.refused.is_empty());
        let message = GroupMessage { call: 1, body: "vote".into(), ..Default::default() };
        let envelope = Envelope { messages: vec![message], ..Default::default() };
        stream.write_all(&frame(&envelope)).await.expect("open");
        assert!(is_closed(stream).await);
    }
    assert!(here.notes.asked().is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_takes_no_answers_is_not_read() {
    let net = MemoryNet::default();
    let here = Node::start(&net, settings(known(1, 1), &[])).await;
    let (mut stream, _) = greet(&net, &hello(known(2, 1), 1)).await;
    let message = GroupMessage { call: 1, body: vec![b'x'; 1 << 20].into(), ..Default::default() };
    let question = frame(&Envelope { messages: vec![message], ..Default::default() });
    let send = async {
        for _ in 0..100 {
            stream.write_all(&question).await.expect("open");
        }
    };
    let sent = tokio::time::timeout(Duration::from_secs(1), send).await;
    assert!(sent.is_err(), "all were taken");
    assert!((32..40).contains(&here.notes.asked().len()), "{}", here.notes.asked().len());
}

#[tokio::test(start_paused = true)]
async fn whoever_says_nothing_is_sent_away() {
    let net = MemoryNet::default();
    let _here = Node::start(&net, settings(known(1, 1), &[])).await;
    let mut silent = connect(&net).await;
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(3), silent.read_to_end(&mut rest)).await;
    assert!(closed.is_ok() && rest.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_frame_over_the_limit_is_refused() {
    let net = MemoryNet::default();
    let here = Node::start(&net, settings(known(1, 1), &[])).await;
    let mut before = connect(&net).await;
    before.write_all(&[0, 0x10, 0, 1, 0, 0, 0, 0]).await.expect("open");
    assert!(is_closed(before).await, "1 MiB and a byte, before the Hello");
    let (mut after, _) = greet(&net, &hello(known(2, 1), 1)).await;
    after.write_all(&[1, 0, 0, 1, 0, 0, 0, 0]).await.expect("open");
    assert!(is_closed(after).await, "16 MiB and a byte");
    until("the connection is gone", || here.transport.status()[0].accepted.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn garbage_never_harms() {
    let net = MemoryNet::default();
    let nodes = cluster(&net, 2).await;
    let mut rng = StdRng::seed_from_u64(11);
    for round in 0..300 {
        let mut garbage = vec![0; rng.random_range(0..200)];
        rng.fill_bytes(&mut garbage);
        let mut stream = if round % 3 == 0 {
            connect(&net).await
        } else {
            greet(&net, &hello(known(3, 1), 1)).await.0
        };
        if round % 2 == 0 {
            // A right frame around wrong bytes gets as far as the decoder.
            let mut framed = u32::try_from(garbage.len()).expect("small").to_be_bytes().to_vec();
            framed.extend(crc32fast::hash(&garbage).to_be_bytes());
            framed.extend(garbage);
            garbage = framed;
        }
        // It may be closed in the middle.
        let _ = stream.write_all(&garbage).await;
    }
    assert_eq!(nodes[0].ask(2, Lane::Appends, "well?", LONG).await.expect("well"), "well?");
    assert!(!nodes[0].notes.lost.lock().contains(&NodeId(2)));
}

//! The HTTP listener over real sockets: what it answers, and that it ends when it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_server::http::{Check, Probe, serve};
use coracle_server::net::{Net, RealNet};
use coracle_storage::RealExec;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Node {
    dead: AtomicBool,
    full: AtomicBool,
}

impl Probe for Node {
    fn live(&self) -> Result<(), String> {
        match self.dead.load(Ordering::SeqCst) {
            true => Err("the log has not synced for 31 s".to_owned()),
            false => Ok(()),
        }
    }

    fn ready(&self) -> Vec<Check> {
        let full = self.full.load(Ordering::SeqCst);
        let disk = if full { "below its reserve" } else { "12 GiB free" };
        vec![
            Check { name: "joined", ok: true, detail: "as n1".to_owned() },
            Check { name: "disk", ok: !full, detail: disk.to_owned() },
        ]
    }

    fn metrics(&self) -> String {
        "# EOF\n".to_owned()
    }
}

struct Server {
    address: String,
    node: Arc<Node>,
    stop: CancellationToken,
    exec: Arc<RealExec>,
    done: tokio::task::JoinHandle<()>,
}

async fn server() -> Server {
    let listener = RealNet.listen("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_address();
    let (node, stop) = (Arc::new(Node::default()), CancellationToken::new());
    let exec = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 1));
    let done = tokio::spawn(serve(listener, node.clone(), exec.clone(), stop.clone()));
    Server { address, node, stop, exec, done }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).await.expect("it listens")
    }

    /// The whole answer, on a connection of its own.
    async fn ask(&self, method: &str, path: &str) -> String {
        let mut stream = self.connect().await;
        let request = format!("{method} {path} HTTP/1.1\r\nHost: n1\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut answer = String::new();
        timeout(SOON, stream.read_to_string(&mut answer)).await.expect("in time").expect("text");
        answer
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(SOON, self.done).await.expect("in time").expect("no panic");
        timeout(SOON, self.exec.shutdown()).await.expect("in time");
    }
}

fn parts(answer: &str) -> (&str, &str) {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.split_once("\r\n").expect("a status line").0, body)
}

#[tokio::test]
async fn health_and_metrics_are_answered() {
    let server = server().await;
    let metrics = server.ask("GET", "/metrics").await;
    assert!(
        metrics.to_ascii_lowercase().contains(
            "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"
        )
    );
    assert_eq!(parts(&metrics), ("HTTP/1.1 200 OK", "# EOF\n"));
    for (path, status, body) in [
        ("/livez", "HTTP/1.1 200 OK", "live\n"),
        ("/readyz", "HTTP/1.1 200 OK", "ready\n"),
        ("/readyz?verbose", "HTTP/1.1 200 OK", "[+] joined: as n1\n[+] disk: 12 GiB free\nready\n"),
        ("/", "HTTP/1.1 404 Not Found", "here are /metrics, /livez and /readyz?verbose\n"),
    ] {
        assert_eq!(parts(&server.ask("GET", path).await), (status, body), "{path}");
    }
    assert_eq!(parts(&server.ask("HEAD", "/livez").await), ("HTTP/1.1 200 OK", ""));
    let post = server.ask("POST", "/livez").await;
    assert_eq!(parts(&post).0, "HTTP/1.1 405 Method Not Allowed");
    server.end().await;
}

#[tokio::test]
async fn what_fails_is_said() {
    let server = server().await;
    server.node.dead.store(true, Ordering::SeqCst);
    server.node.full.store(true, Ordering::SeqCst);
    let unavailable = "HTTP/1.1 503 Service Unavailable";
    for (path, body) in [
        ("/livez", "not live: the log has not synced for 31 s\n"),
        ("/readyz", "[-] disk: below its reserve\nnot ready\n"),
        ("/readyz?verbose=1", "[+] joined: as n1\n[-] disk: below its reserve\nnot ready\n"),
    ] {
        assert_eq!(parts(&server.ask("GET", path).await), (unavailable, body), "{path}");
    }
    server.end().await;
}

/// Connections that send nothing, garbage, or half a request hold up nobody, and go with the node.
#[tokio::test]
async fn odd_connections_hold_up_nobody() {
    let server = server().await;
    let mut idle = server.connect().await;
    let mut half = server.connect().await;
    half.write_all(b"GET /livez HT").await.expect("it reads");
    let mut garbage = server.connect().await;
    garbage.write_all(&[0xff; 64]).await.expect("it reads");
    let mut rest = Vec::new();
    timeout(SOON, garbage.read_to_end(&mut rest)).await.expect("closed").expect("an end");
    assert_eq!(parts(&server.ask("GET", "/livez").await).1, "live\n");
    let address = server.address.clone();
    server.end().await;
    for stream in [&mut idle, &mut half] {
        let mut rest = Vec::new();
        // An end or a reset: either way it is over.
        let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.expect("closed with the node");
    }
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

//! A node that is started with the addresses of a running cluster joins it: it serves every key, keeps
//! its id over a restart, and makes no cluster of its own.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use coracle_cli::demo::ports::Ports;
use coracle_cli::demo::process::{NodePlan, NodeProcess};

use super::{Bench, run, until};
use crate::lone::text;

const JOINS: Duration = Duration::from_secs(30);

fn free() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("it is bound")
}

impl Bench {
    /// A node that is not there yet, and knows the address of one that is.
    pub(super) fn newcomer(&mut self, data_dir: &Path) -> NodeProcess {
        let other = self.cluster.process(1).plan().clone();
        NodeProcess::new(NodePlan {
            data_dir: data_dir.to_owned(),
            ports: Ports { client: free(), peer: free(), http: free() },
            // One address is enough: it tells of the others.
            join: vec![other.ports.peer.to_string()],
            ..other
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_a_running_cluster() {
    let mut bench = Bench::start(3).await;
    bench.expect(&["put", "early", "1"], 0).await;
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut node = bench.newcomer(&dir.path().join("n4"));
    let endpoint = node.plan().ports.client.to_string();
    for round in 0..2 {
        node.start().unwrap_or_else(|failure| panic!("{failure:?}"));
        until("it is listed, once", JOINS, async || {
            let (nodes, _) = bench.expect(&["node", "ls"], 0).await;
            let listed = nodes.lines().filter(|line| line.starts_with("n4 ")).count();
            assert!(!nodes.contains("n5"), "{nodes}");
            listed == 1
        })
        .await;
        let key = format!("through-{round}");
        let at_it = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
            let (home, endpoint) = (bench.home.path().to_owned(), endpoint.clone());
            async move {
                let mut all: Vec<&str> = args.iter().map(String::as_str).collect();
                all.extend(["--endpoints", &endpoint]);
                run(&home, &all, b"").await
            }
        };
        until("it serves", JOINS, async || at_it(&["put", &key, "x"]).await.status.success()).await;
        assert_eq!(at_it(&["get", "early"]).await.stdout, b"1");
        assert_eq!(bench.expect(&["get", &key], 0).await.0, "x");
        let init = at_it(&["init"]).await;
        assert_eq!(init.status.code(), Some(8), "{}", text(&init.stderr));
        let ended = node.stop(JOINS).await;
        assert!(ended.is_some_and(|status| status.success()), "{ended:?}: {}", node.log_tail());
    }
    bench.stop().await;
}

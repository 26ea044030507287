//! Real server processes of this program, real sockets, real disks, SIGKILL. Owns how the tests get a
//! cluster of them. Only these tests see the kernel, real time and the program as a whole.

mod bad_input;
mod commands;
mod contract;
mod demo;
mod faults;
mod join;
mod kill_all;
mod moves;
mod python;
mod ranges;
mod read_replicas;
mod replicas;
mod reshape;
mod session;
mod stop;

use std::future::Future;
use std::ops::Range;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use coracle_cli::demo::cluster::{Cluster, ClusterPlan, Node};
use coracle_cli::demo::ledger::Ledger;
use coracle_cli::demo::load::{Load, verify};
use coracle_client::Client;
use tokio::sync::{Mutex, MutexGuard};

use crate::lone::{coracle, text};

/// One cluster at a time: several would take each other's processor and time out.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Nodes of a test, and the right to run.
struct Bench {
    cluster: Cluster,
    home: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Bench {
    /// A cluster that stands.
    async fn start(nodes: usize) -> Bench {
        let mut bench = Bench::prepare(nodes, &[]).await;
        bench.cluster.start(|_, _| {}).await.unwrap_or_else(|failure| panic!("{failure:?}"));
        bench
    }

    /// A cluster that has not been started.
    async fn prepare(nodes: usize, settings: &[&str]) -> Bench {
        let alone = ALONE.lock().await;
        let cluster = Cluster::prepare(&plan(nodes, None, settings));
        let cluster = cluster.unwrap_or_else(|failure| panic!("{failure:?}"));
        Bench { cluster, home: tempfile::tempdir().unwrap(), _alone: alone }
    }

    fn endpoints(&self) -> String {
        let addresses: Vec<String> = self.cluster.nodes().iter().map(Node::address).collect();
        addresses.join(",")
    }

    /// Runs a command against the cluster; `input` is its standard input.
    async fn run_with(&self, args: &[&str], input: &[u8]) -> Output {
        let endpoints = self.endpoints();
        let mut args = args.to_vec();
        args.extend(["--endpoints", &endpoints]);
        run(self.home.path(), &args, input).await
    }

    /// Runs a command and expects its exit code; returns standard output and standard error.
    #[track_caller]
    fn expect(&self, args: &[&str], code: i32) -> impl Future<Output = (String, String)> {
        let place = std::panic::Location::caller();
        async move {
            let output = self.run_with(args, b"").await;
            let (out, err) = (text(&output.stdout), text(&output.stderr));
            let found = output.status.code();
            assert_eq!(found, Some(code), "{place}: {args:?}\nstdout: {out}\nstderr: {err}");
            (out, err)
        }
    }

    /// The place of the node that leads the meta group.
    async fn meta_leader(&self) -> usize {
        loop {
            let statuses = self.cluster.statuses().await;
            let leads = |status: &Option<coracle_client::admin::NodeStatus>| {
                let groups = status.iter().flat_map(|status| &status.groups);
                groups.into_iter().any(|group| group.shard.0 == 0 && group.role == "leader")
            };
            if let Some(at) = statuses.iter().position(leads) {
                return at;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stop(self) {
        self.cluster.stop().await;
    }
}

/// Ends a load, and finds that nothing that it was told is lost.
async fn nothing_is_lost(load: Load, client: &Client, ledger: &Arc<Ledger>) {
    let window = load.take_window();
    load.finish().await;
    println!("{} answered, {} failed: {:?}", window.ok, window.failed, window.last_failure);
    assert_eq!(window.lost, 0);
    let verified = verify(client, "default", ledger).await;
    let verified = verified.unwrap_or_else(|failure| panic!("{failure:?}"));
    assert_eq!(verified.lost, Vec::<String>::new());
}

/// Ports of their own for each cluster: one that was chosen and not yet taken is nobody else's.
fn ports() -> Range<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const EACH: u16 = 200;
    let first = 10_000 + NEXT.fetch_add(1, Ordering::Relaxed) * EACH;
    first..first + EACH
}

fn plan(nodes: usize, data_dir: Option<&Path>, settings: &[&str]) -> ClusterPlan {
    ClusterPlan {
        program: env!("CARGO_BIN_EXE_coracle").into(),
        nodes,
        zones: vec!["a".to_owned(), "b".to_owned(), "c".to_owned()],
        data_dir: data_dir.map(Path::to_owned),
        in_memory: false,
        settings: settings.iter().map(|text| (*text).to_owned()).collect(),
        ports: Some(ports()),
    }
}

/// Runs the program to its end.
async fn run(home: &Path, args: &[&str], input: &[u8]) -> Output {
    use tokio::io::AsyncWriteExt;
    let mut command = tokio::process::Command::from(coracle(home, args));
    command.stdin(std::process::Stdio::piped()).kill_on_drop(true);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let write = async {
        // A command that does not read its input may have ended before it was written.
        let _ = stdin.write_all(input).await;
        drop(stdin);
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), async {
        tokio::join!(write, child.wait_with_output()).1
    });
    ended.await.unwrap_or_else(|_| panic!("{args:?} has not ended within a minute")).unwrap()
}

/// Polls until `done`, or fails.
async fn until(what: &str, limit: Duration, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !done().await {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

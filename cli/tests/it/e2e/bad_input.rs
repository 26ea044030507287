//! What makes no sense is refused with the limit and the mend, changes nothing, and the process lives on
//! (or does not start). Only here do such inputs pass through the whole program.

use std::net::TcpListener;
use std::time::Duration;

use coracle_cli::demo::ports;
use coracle_cli::demo::process::{NodePlan, NodeProcess};

use super::{Bench, plan, until};

/// How long a server may take to refuse.
const REFUSAL: Duration = Duration::from_secs(30);

/// A lone node that is not started yet.
fn node(dir: &std::path::Path) -> NodePlan {
    let plan = plan(1, None, &[]);
    let range = plan.ports.expect("tests choose their ports");
    let ports = ports::free(1, range, &mut rand::rng()).unwrap()[0];
    NodePlan {
        program: plan.program,
        data_dir: dir.to_owned(),
        ports,
        zone: "a".to_owned(),
        join: Vec::new(),
        settings: vec!["storage.disk_reserve_bytes=64MiB".to_owned()],
    }
}

/// Starts it, and expects that it refuses, in these words.
async fn refuses(plan: NodePlan, words: &[&str]) {
    let mut process = NodeProcess::new(plan);
    process.start().unwrap_or_else(|failure| panic!("{failure:?}"));
    let status = process.wait(REFUSAL).await;
    let log = process.log_tail();
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} in:\n{log}");
    }
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_keys_and_values_are_refused_and_nothing_changes() {
    let bench = Bench::start(1).await;
    bench.expect(&["put", "kept", "1"], 0).await;
    let long_key = "k".repeat(4_097);
    let (_, err) = bench.expect(&["put", &long_key, "v"], 2).await;
    assert!(err.contains("KEY_BYTES_MAX") && err.contains("4096"), "{err}");
    let (_, err) = bench.expect(&["put", "", "v"], 2).await;
    assert!(err.contains("KEY_BYTES"), "{err}");
    let big = vec![b'v'; (1 << 20) + 1];
    let refused = bench.run_with(&["put", "kept", "-"], &big).await;
    let err = crate::lone::text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{err}");
    assert!(err.contains("VALUE_BYTES_MAX"), "{err}");
    let whole = bench.run_with(&["put", "whole", "-"], &big[..1 << 20]).await;
    assert!(whole.status.success(), "{whole:?}");

    let (_, err) = bench.expect(&["put", "kept", "2", "-k", "nowhere"], 1).await;
    assert!(err.contains("nowhere") && err.contains("keyspace create"), "{err}");
    bench.expect(&["put", "kept", "2", "-k", "system"], 1).await;
    bench.expect(&["keyspace", "create", "Not A Name"], 2).await;
    bench.expect(&["put", "kept", "2", "--ttl", "999999d"], 2).await;
    bench.expect(&["scan", "--start", &long_key], 2).await;
    for read in [&["scan", "--at", "0"][..], &["get", "kept", "--at", "0"]] {
        let (_, err) = bench.expect(read, 2).await;
        assert!(err.contains("--at"), "there is no version 0: {err}");
    }
    bench.expect(&["get", "kept", "--timeout", "0s"], 2).await;
    assert_eq!(bench.expect(&["get", "kept"], 0).await.0, "1");
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for which in 0..3 {
        let plan = node(&dir.path().join(format!("data{which}")));
        let address = [plan.ports.client, plan.ports.peer, plan.ports.http][which];
        let _held = TcpListener::bind(address).unwrap();
        refuses(plan, &[&address.to_string(), "in use"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("letter.txt"), "dear").unwrap();
    refuses(node(&foreign), &["not a data directory", "letter.txt", "--data-dir"]).await;
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 1, "nothing was left behind");

    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let under_a_file = file.join("data");
    let mut plan = node(&dir.path().join("log"));
    // The log of the process stands beside its directory, so that one must be possible.
    plan.settings.push(format!("node.data_dir={}", under_a_file.display()));
    let mut process = tokio::process::Command::new(&plan.program);
    let args = plan.args().into_iter().filter(|arg| !arg.starts_with("--data-dir"));
    let ended = process.args(args).kill_on_drop(true).output();
    let ended = tokio::time::timeout(REFUSAL, ended).await.unwrap().unwrap();
    let err = crate::lone::text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{err}");
    assert!(err.contains(&under_a_file.display().to_string()), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_in_use_is_refused() {
    let mut bench = Bench::start(1).await;
    let data_dir = bench.cluster.process(0).plan().data_dir.clone();
    // Beside it, so that the log of the second process is another file.
    let alias = bench.home.path().join("alias");
    std::os::unix::fs::symlink(&data_dir, &alias).unwrap();
    refuses(node(&alias), &["is in use by process"]).await;
    bench.expect(&["put", "alive", "1"], 0).await;
    bench.stop().await;
}

/// A node never changes its cluster: it says which one it met, and goes on in its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_is_kept_out_and_told_so() {
    let mut bench = Bench::start(1).await;
    let other_dir = bench.home.path().join("other");
    let other = plan(1, Some(&other_dir), &[]);
    let mut other = coracle_cli::demo::cluster::Cluster::prepare(&other).unwrap();
    other.start(|_, _| {}).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    other.stop().await;

    let here = bench.cluster.client().admin().map().await.unwrap();
    let mut stray = node(&other_dir.join("node1"));
    stray.join = vec![bench.cluster.process(0).plan().ports.peer.to_string()];
    stray.settings.push("observability.log_filter=warn,openraft=off".to_owned());
    let address = stray.ports.client.to_string();
    let mut stray = NodeProcess::new(stray);
    stray.start().unwrap_or_else(|failure| panic!("{failure:?}"));
    let told = format!("this is a node of cluster {}", here.cluster_id);
    until("the stray node says whom it met", REFUSAL, async || stray.log_tail().contains(&told))
        .await;
    until("the stray node serves its own cluster", REFUSAL, async || {
        bench.cluster.client().admin().map_of(&address).await.is_ok()
    })
    .await;
    let there = bench.cluster.client().admin().map_of(&address).await.unwrap();
    assert_ne!(there.cluster_id, here.cluster_id);
    let after = bench.cluster.client().admin().map().await.unwrap();
    // Not the whole map: its leaders are hints, which may come later.
    assert_eq!((&after.cluster_id, &after.nodes), (&here.cluster_id, &here.nodes));
    bench.expect(&["put", "alive", "1"], 0).await;
    stray.stop(Duration::from_secs(40)).await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_writes_and_recovers() {
    let mut bench = Bench::start(1).await;
    bench.expect(&["put", "kept", "1"], 0).await;
    bench.cluster.process(0).stop(Duration::from_secs(40)).await;
    // As good as full: no disk has so much room as shall be kept free.
    bench.cluster.set(0, "storage.disk_reserve_bytes=15TiB");
    bench.cluster.restart(&[0]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    let (_, err) = bench.expect(&["put", "kept", "2"], 9).await;
    assert!(err.contains("DISK_FULL"), "{err}");
    assert_eq!(bench.expect(&["get", "kept"], 0).await.0, "1");
    bench.expect(&["delete", "kept"], 0).await;
    bench.cluster.process(0).stop(Duration::from_secs(40)).await;
    bench.cluster.set(0, "storage.disk_reserve_bytes=64MiB");
    bench.cluster.restart(&[0]).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    bench.expect(&["put", "kept", "2"], 0).await;
    bench.stop().await;
}

//! How nodes end and come back: SIGTERM, the end of the parent, new addresses. Only this sees signals.

use std::time::Duration;

use super::{Bench, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_hands_leaders_over_and_ends_with_0() {
    let mut bench = Bench::start(3).await;
    bench.expect(&["put", "before", "1"], 0).await;
    for at in 0..3 {
        let status = bench.cluster.process(at).stop(Duration::from_secs(40)).await;
        let tail = bench.cluster.process(at).log_tail();
        assert!(status.is_some_and(|status| status.success()), "{status:?}: {tail}");
        bench.expect(&["put", "during", &at.to_string()], 0).await;
        let restarted = bench.cluster.restart(&[at]).await;
        restarted.unwrap_or_else(|failure| panic!("{failure:?}"));
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let caught_up = bench.cluster.wait_caught_up(at, deadline).await;
        caught_up.unwrap_or_else(|failure| panic!("{failure:?}"));
    }
    assert_eq!(bench.expect(&["get", "before"], 0).await.0, "1");
    assert_eq!(bench.expect(&["get", "during"], 0).await.0, "2");
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_cluster_comes_back_at_new_addresses() {
    let dir = tempfile::tempdir().unwrap();
    let home = tempfile::tempdir().unwrap();
    let _alone = super::ALONE.lock().await;
    for (round, args) in
        [["put", "key", "value"].as_slice(), &["get", "key"]].into_iter().enumerate()
    {
        // Ports are chosen anew each time.
        let plan = super::plan(3, Some(dir.path()), &[]);
        let mut cluster = coracle_cli::demo::cluster::Cluster::prepare(&plan).unwrap();
        let started = cluster.start(|_, _| {}).await;
        started.unwrap_or_else(|failure| panic!("round {round}: {failure:?}"));
        let endpoint = cluster.nodes()[0].address();
        let output = run(home.path(), &[args, &["--endpoints", &endpoint]].concat(), b"").await;
        assert!(output.status.success(), "{output:?}");
        if round == 1 {
            assert_eq!(output.stdout, b"value");
        }
        cluster.stop().await;
    }
}

//! What every cluster promises to its clients, asked of real processes: the same list, and the same
//! examples, that the client library's cluster in memory is held to. So the one may stand for the other
//! in the tests of services.

use coracle_client::Client;
use coracle_client::testing::conformance;

use super::Bench;

#[allow(dead_code, reason = "its main is for people")]
#[path = "../../../../client/examples/counter.rs"]
mod counter;
#[allow(dead_code, reason = "its main is for people")]
#[path = "../../../../client/examples/lock.rs"]
mod lock;
#[allow(dead_code, reason = "its main is for people")]
#[path = "../../../../client/examples/paging.rs"]
mod paging;
#[allow(dead_code, reason = "its main is for people")]
#[path = "../../../../client/examples/session.rs"]
mod session;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_processes_keep_what_the_fake_cluster_keeps() {
    let bench = Bench::start(3).await;
    conformance::run(bench.cluster.client(), |check| println!("{check}")).await;
    let other = Client::connect(&bench.endpoints()).await.expect("a healthy cluster");
    let kv = bench.cluster.client();
    counter::run(kv).await.expect("it runs");
    lock::run(kv, async |pause| tokio::time::sleep(pause).await).await.expect("it runs");
    session::run(kv, &other).await.expect("it runs");
    paging::run(kv, &other).await.expect("it runs");
    bench.stop().await;
}

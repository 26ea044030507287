//! The examples, run against a cluster in memory. They are what users copy: they must compile, and do
//! what they say.

use std::time::Duration;

use coracle_client::NodeId;
use coracle_client::testing::FakeCluster;

#[allow(dead_code, reason = "its main is for a real cluster")]
#[path = "../../examples/counter.rs"]
mod counter;
#[allow(dead_code, reason = "its main is for a real cluster")]
#[path = "../../examples/lock.rs"]
mod lock;
#[allow(dead_code, reason = "its main is for a real cluster")]
#[path = "../../examples/paging.rs"]
mod paging;
#[allow(dead_code, reason = "its main is for a real cluster")]
#[path = "../../examples/session.rs"]
mod session;

#[tokio::test(start_paused = true)]
async fn lock_fences_off_a_paused_holder() {
    let fake = FakeCluster::start();
    lock::run(&fake.client().await, async |pause| fake.advance(pause)).await.expect("it runs");
}

#[tokio::test(start_paused = true)]
async fn counter_is_exact_though_answers_are_lost_and_leaders_move() {
    let fake = FakeCluster::start();
    let kv = fake.client().await;
    fake.delay(Duration::from_millis(1));
    let trouble = async {
        for round in 0..30 {
            tokio::time::sleep(Duration::from_millis(3)).await;
            fake.lose_answers(3);
            let to = NodeId(1 + round % 3);
            fake.shards().into_iter().for_each(|shard| fake.move_leader(shard, to));
        }
    };
    let (done, ()) = tokio::join!(counter::run(&kv), trouble);
    done.expect("it runs");
    let counts = fake.counts();
    assert!(counts.lost_answers > 0 && counts.duplicates > 0, "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn session_is_handed_over_between_processes() {
    let fake = FakeCluster::start();
    // Without the mark, these would show what was before.
    for node in fake.nodes() {
        fake.hold_back(node, Duration::from_millis(100));
    }
    session::run(&fake.client().await, &fake.client().await).await.expect("it runs");
}

#[tokio::test(start_paused = true)]
async fn paging_shows_one_state_on_all_pages() {
    let fake = FakeCluster::start();
    paging::run(&fake.client().await, &fake.client().await).await.expect("it runs");
}

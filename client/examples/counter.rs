//! Counting without losing or doubling anything: many tasks increment one counter, answers get lost,
//! leaders move, and the sum is exact.
//!
//! Every write carries a request id that is the same on all its attempts, and the cluster applies it
//! once. So the client retries increments like anything else. Only when the deadline has passed
//! without an answer is the outcome unknown, and the error says so; then the counter is no longer
//! known to be exact, and a service must not just call again.
//!
//! ```sh
//! cargo run -p coracle-client --example counter                      # in memory
//! cargo run -p coracle-client --example counter -- 127.0.0.1:7401    # a cluster
//! ```

use std::time::Duration;

use coracle_client::testing::FakeCluster;
use coracle_client::{Client, Error, Outcome};

const TASKS: u64 = 16;
const INCREMENTS: u64 = 50;

/// Increments as often, and counts what is known to have been applied.
async fn count(kv: Client, key: String) -> Result<u64, Error> {
    let mut applied = 0;
    for _ in 0..INCREMENTS {
        // Long enough for any failover.
        match kv.increment(key.clone(), 1).timeout(Duration::from_secs(20)).await {
            Ok(_) => applied += 1,
            Err(error) if error.outcome() == Outcome::NotApplied && error.is_retryable() => {
                println!("counter: not applied, and not counted: {error}");
            }
            // Unknown: whoever counts on exactness has to look into it.
            Err(error) => return Err(error),
        }
    }
    Ok(applied)
}

/// Runs the example.
pub(crate) async fn run(kv: &Client) -> Result<(), Error> {
    let key = "example-visits";
    kv.delete(key).await?;
    let tasks: Vec<_> =
        (0..TASKS).map(|_| tokio::spawn(count(kv.clone(), key.to_owned()))).collect();
    let mut applied = 0;
    for task in tasks {
        applied += task.await.expect("no task panics")?;
    }
    let entry = kv.get(key).await?.expect("it was counted");
    assert_eq!(entry.value, applied.to_string(), "nothing is lost and nothing counts twice");
    println!("counter: {applied} increments, and the counter says {applied}");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let fake = FakeCluster::start();
    let client = async || match std::env::args().nth(1) {
        Some(seeds) => Client::connect(&seeds).await,
        None => Ok(fake.client().await),
    };
    run(&client().await?).await
}

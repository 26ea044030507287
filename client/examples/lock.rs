//! A lock that others can rely on: with a time to live, so that a holder that dies does not keep it,
//! and with fencing, so that a holder that was only slow cannot do harm.
//!
//! The lock is a key that is written `if_absent` with a time to live. The version of that write is the
//! *fencing token*: versions of a key only rise, so of two holders the later one has the higher token.
//! What the lock protects keeps the highest token that it has seen, and refuses lower ones. Here that
//! is a key of the same entity, so lock and data are checked in one atomic batch.
//!
//! ```sh
//! cargo run -p coracle-client --example lock                      # in memory
//! cargo run -p coracle-client --example lock -- 127.0.0.1:7401    # a cluster
//! ```

use std::time::Duration;

use coracle_client::admin::NewKeyspace;
use coracle_client::testing::FakeCluster;
use coracle_client::{Cas, Client, EntityRule, Error, Keyspace, Operation, Version};

/// How long a holder may be silent before others may take the lock.
const TTL: Duration = Duration::from_millis(1_500);

/// A lock that is held, as far as its holder knows.
pub(crate) struct Held {
    name: String,
    /// The version of the write that took it.
    pub(crate) token: Version,
}

/// Takes the lock if it is free.
pub(crate) async fn take(
    locks: &Keyspace,
    name: &str,
    holder: &str,
) -> Result<Option<Held>, Error> {
    let key = format!("{name}/lock");
    match locks.put(key, holder.to_owned()).ttl(TTL).if_absent().await? {
        Cas::Applied(written) => Ok(Some(Held { name: name.to_owned(), token: written.version })),
        Cas::Mismatch { .. } => Ok(None),
    }
}

/// Writes what the lock protects, but only while the lock is still the one that was taken: it may have
/// expired, and been taken by another, without the holder noticing.
pub(crate) async fn write(locks: &Keyspace, held: &Held, value: &str) -> Result<bool, Error> {
    let fence = Operation::check(format!("{}/lock", held.name)).if_version(held.token);
    let write = Operation::put(format!("{}/data", held.name), value.to_owned());
    Ok(locks.batch([fence, write]).await?.applied.is_some())
}

/// Gives the lock back, unless another has it by now.
pub(crate) async fn release(locks: &Keyspace, held: Held) -> Result<bool, Error> {
    let key = format!("{}/lock", held.name);
    Ok(locks.delete(key).if_version(held.token).await?.is_applied())
}

/// Runs the example; `pause` lets so much time pass.
pub(crate) async fn run(kv: &Client, pause: impl AsyncFn(Duration)) -> Result<(), Error> {
    let rule = EntityRule::Delimiter(b'/');
    let new = NewKeyspace { entity_rule: rule, ..NewKeyspace::new("example-locks") };
    kv.admin().create_keyspace(new).await?;
    let locks = kv.keyspace("example-locks");
    for key in ["report/lock", "report/data"] {
        locks.delete(key).await?;
    }

    let ada = take(&locks, "report", "ada").await?.expect("the lock is free");
    assert!(take(&locks, "report", "grace").await?.is_none(), "it is held");
    assert!(write(&locks, &ada, "by ada").await?, "the holder may write");

    // Ada's process is paused: by its garbage collector, its scheduler, its network.
    pause(TTL * 2).await;
    let grace = take(&locks, "report", "grace").await?.expect("the lock has expired");
    assert!(grace.token > ada.token, "the later holder has the higher token");
    assert!(write(&locks, &grace, "by grace").await?);

    // Ada goes on where it was, and knows nothing of it.
    assert!(!write(&locks, &ada, "by ada, too late").await?, "it is fenced off");
    assert!(!release(&locks, ada).await?, "nor can it give away what is not its own");
    let data = locks.get("report/data").await?.expect("it was written");
    assert_eq!(data.value, "by grace");
    assert!(release(&locks, grace).await?);
    println!("lock: a paused holder was fenced off");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let fake = FakeCluster::start();
    let client = async || match std::env::args().nth(1) {
        Some(seeds) => Client::connect(&seeds).await,
        None => Ok(fake.client().await),
    };
    let kv = client().await?;
    run(&kv, async |pause| tokio::time::sleep(pause).await).await
}

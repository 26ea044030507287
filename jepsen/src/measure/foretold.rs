//! What a plan of the balancer says, held against what happens: the bytes that are sent, that a plan of
//! an older map is refused, that an undo leads back. Owns the cluster's contents and the verdict.

use std::path::PathBuf;
use std::time::Duration;

use coracle_client::admin::{Control, NewKeyspace, OperationState, Plan as Moves};
use coracle_client::{Client, ErrorKind};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::time::Instant;

use super::block_on;
use super::moves::{self, PATIENCE};
use super::reclaim_keys::noise;
use crate::cluster::process::{Cluster, Setup};

/// A short log: a new replica finds that it needs a snapshot.
const SETTINGS: &[&str] = &["storage.log_segment_bytes=1MiB", "storage.log_bytes_target=4MiB"];
/// Writes under way.
const IN_FLIGHT: usize = 32;
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(200);
/// Leaders tell what their state takes when they are looked at, every ten seconds.
const LOOKED_AT: Duration = Duration::from_secs(12);

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many shards.
    pub shards: u32,
    /// How much is written, in bytes, in values of...
    pub bytes: u64,
    /// ...so many.
    pub value_bytes: usize,
    /// The bytes that are sent may differ from those that were planned by so many percent.
    pub off_max: f64,
    /// What values are drawn from.
    pub seed: u64,
}

/// Runs, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    let cluster = Cluster::start_as(Setup {
        program: plan.program.clone(),
        nodes: 3,
        shards: plan.shards,
        settings: SETTINGS.iter().map(ToString::to_string).collect(),
        ..Setup::default()
    });
    let mut cluster = cluster.await?;
    let client = cluster.client().clone();
    moves::by_hand(&client).await?;
    fill(&client, plan).await?;
    purged(&cluster, &client, plan.seed).await?;
    println!("writes are paused from here on");
    cluster.add().await?;
    tokio::time::sleep(LOOKED_AT).await;
    let mut held = stale(&client).await?;
    let before = moves::placement(&moves::settle(&client).await?);
    let foretold = moves::planned(&client).await?;
    tell(&foretold);
    let sent = sent_by(&cluster, &foretold).await?;
    held &= compare("the plan", foretold.bytes, sent, plan.off_max);
    held &= refused(&client, &foretold, "the plan that was carried out").await?;
    let map = moves::settle(&client).await?;
    let went = moves::placement(&map) != before;
    held &= told(went, "replicas are elsewhere than before");
    let sent_before = moves::counted(&cluster, SENT).await?;
    let undone = client.admin().control(None, Control::Undo).await;
    let undone = undone.map_err(|error| format!("undo: {error}"))?;
    let ended = moves::follow(&client, undone.id).await?;
    let (_, back) = ended.bytes();
    let sent = moves::counted(&cluster, SENT).await?.saturating_sub(sent_before);
    held &= told(ended.state == OperationState::Done, "undo comes to its end");
    let map = moves::settle(&client).await?;
    held &= told(moves::placement(&map) == before, "undo leads back to the placement of before");
    held &= compare("the undo", back, sent, plan.off_max);
    let left = moves::left_over(&cluster, PATIENCE / 5).await?;
    left.iter().for_each(|line| println!("  {line}"));
    held &= told(left.is_empty(), "nothing is left over on any node");
    println!("{}", if held { "PASS" } else { "FAIL" });
    Ok(held)
}

/// What nodes have sent of replicas' states.
const SENT: &str = "coracle_snapshot_sent_bytes_total";

fn told(holds: bool, what: &str) -> bool {
    println!("{:>5}: {what}", if holds { "ok" } else { "WRONG" });
    holds
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

async fn fill(client: &Client, plan: &Plan) -> Result<(), String> {
    let (began, count) = (Instant::now(), plan.bytes / plan.value_bytes as u64);
    let puts = (0..count).map(|number| {
        let value = noise(plan.seed ^ number << 16, plan.value_bytes);
        client.put(format!("p{number:09}"), value).timeout(WRITE_TIMEOUT).into_future()
    });
    let done = stream::iter(puts).buffer_unordered(IN_FLIGHT).try_for_each(|_| async { Ok(()) });
    done.await.map_err(|error| format!("fill: {error}"))?;
    println!("{count} keys, {:.1} MiB in {:.1} s", mib(plan.bytes), began.elapsed().as_secs_f64());
    Ok(())
}

/// Writes until no log of a shard reaches back to its first entry: a new replica takes a snapshot.
async fn purged(cluster: &Cluster, client: &Client, seed: u64) -> Result<(), String> {
    let began = Instant::now();
    let mut round = 0;
    loop {
        let mut whole = 0;
        for at in 0..cluster.len() {
            let groups = cluster.status(at).await?.groups;
            let holds = groups.iter().filter(|group| group.shard.0 != 0 && group.first_index <= 1);
            whole += holds.count();
        }
        if whole == 0 {
            return Ok(());
        }
        if began.elapsed() >= PATIENCE {
            return Err(format!("the logs of {whole} replicas reach back to their beginning"));
        }
        let puts = (0..64).map(|number| {
            let value = noise(seed ^ round << 8 ^ number, 8 << 10);
            client.put(format!("f{number}"), value).timeout(WRITE_TIMEOUT).into_future()
        });
        let done = stream::iter(puts).buffer_unordered(IN_FLIGHT).try_collect::<Vec<_>>().await;
        done.map_err(|error| format!("push the log: {error}"))?;
        round += 1;
        tokio::time::sleep(POLL).await;
    }
}

fn tell(plan: &Moves) {
    for node in &plan.nodes {
        println!(
            "    n{}: {} replicas, {:.1} MiB; then {} replicas, {:.1} MiB",
            node.node,
            node.replicas_before,
            mib(node.bytes_before),
            node.replicas_after,
            mib(node.bytes_after)
        );
    }
}

/// Carries a plan out. The bytes that nodes sent for it.
async fn sent_by(cluster: &Cluster, plan: &Moves) -> Result<u64, String> {
    let client = cluster.client();
    let before = moves::counted(cluster, SENT).await?;
    let begun = client.admin().start_rebalance(plan).await;
    let begun = begun.map_err(|error| format!("apply: {error}"))?;
    moves::done(client, begun.id).await?;
    Ok(moves::counted(cluster, SENT).await?.saturating_sub(before))
}

fn compare(what: &str, foretold: u64, sent: u64, off_max: f64) -> bool {
    let off = (sent as f64 / foretold.max(1) as f64 - 1.0) * 100.0;
    let line = format!(
        "{what} foretold {:.2} MiB, and {:.2} MiB were sent: {off:+.1} %, at most {off_max} %",
        mib(foretold),
        mib(sent)
    );
    told(off.abs() <= off_max, &line)
}

/// A plan is made, the map changes, the plan is applied.
async fn stale(client: &Client) -> Result<bool, String> {
    let plan = moves::planned(client).await?;
    let made = client.admin().create_keyspace(NewKeyspace::new("later")).await;
    made.map_err(|error| format!("a keyspace: {error}"))?;
    refused(client, &plan, "a plan of an older map").await
}

async fn refused(client: &Client, plan: &Moves, what: &str) -> Result<bool, String> {
    let before = client.admin().operations().await.map_err(|error| error.to_string())?;
    let applied = client.admin().start_rebalance(plan).await;
    let after = client.admin().operations().await.map_err(|error| error.to_string())?;
    let nothing = before.operations.len() == after.operations.len();
    Ok(match applied {
        Err(error) if error.kind() == ErrorKind::Conflict && nothing => {
            told(true, &format!("{what} is refused: {error}"))
        }
        Err(error) => told(false, &format!("{what} is refused otherwise than it should: {error}")),
        Ok(begun) => told(false, &format!("{what} is carried out: operation {}", begun.id)),
    })
}

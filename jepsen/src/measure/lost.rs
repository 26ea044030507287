//! A node that is lost for good, with its disk: what it held comes back by itself, on the others. Owns
//! the loss, the look at the progress, and the verdict.

use std::path::PathBuf;
use std::time::Duration;

use coracle_client::admin::{BalancingChange, OperationKind};
use coracle_client::{ClusterMap, NodeId};
use tokio::time::Instant;

use super::attempts::Attempts;
use super::block_on;
use super::mixed::{Mixed, Shape};
use super::moves::{self, MapWatch};
use crate::cluster::process::{Cluster, Setup};

const POLL: Duration = Duration::from_millis(100);
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(2);
/// Load before the loss.
const WARM_UP: Duration = Duration::from_secs(5);

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// How many nodes.
    pub nodes: usize,
    /// How many shards.
    pub shards: u32,
    /// How long a node may be silent before it counts as lost.
    pub grace: Duration,
    /// Behind the grace, everything is as before within this.
    pub within: Duration,
    /// The load that goes on meanwhile.
    pub shape: Shape,
}

/// Runs, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    let attempts = Attempts::listen()?;
    let cluster = Cluster::start_as(Setup {
        program: plan.program.clone(),
        nodes: plan.nodes,
        shards: plan.shards,
        ..Setup::default()
    });
    let mut cluster = cluster.await?;
    let client = cluster.client().clone();
    let change = BalancingChange { down_after: Some(plan.grace), ..BalancingChange::default() };
    moves::balancing(&client, change).await?;
    let load = Mixed::start(&client, plan.shape, attempts).await?;
    let watch = MapWatch::start(&cluster)?;
    load.enter("before");
    tokio::time::sleep(WARM_UP).await;
    // The one that has most to do: it leads the meta group.
    let leaders = cluster.leaders().await;
    let victim = leaders.iter().find(|(shard, _)| shard.0 == 0).ok_or("nobody leads")?.1.at;
    let node = cluster.status(victim).await?.node.id;
    let map = client.admin().map().await.map_err(|error| error.to_string())?;
    let held = voters_on(&map, node);
    println!("n{node} is lost with its disk: it held {held} replicas and led the meta group");
    load.enter("lost");
    cluster.lose(victim)?;
    let began = Instant::now();
    let took = restored(&cluster, node, plan, began).await;
    load.enter("after");
    if let Ok(took) = took {
        let behind = took.saturating_sub(plan.grace).as_secs_f64();
        println!(
            "every shard has its {} voters again after {:.1} s, {behind:.1} s behind the grace",
            map.voters_wanted,
            took.as_secs_f64()
        );
        tokio::time::sleep(WARM_UP).await;
    }
    let (phases, lost) = load.stop().await?;
    for phase in &phases {
        println!("{}", phase.line());
        phase.told().take(3).for_each(|line| println!("  {line}"));
    }
    let settled = moves::settle(&client).await.map(drop);
    let well = watch.judge(&cluster).await?;
    let wrong: usize = phases.iter().map(|phase| phase.wrong.len()).sum();
    println!("{} acknowledged writes lost, {wrong} wrong answers", lost.len());
    lost.iter().take(10).for_each(|line| println!("  {line}"));
    took?;
    settled?;
    let held = lost.is_empty() && wrong == 0 && well;
    println!("{}", if held { "PASS" } else { "FAIL" });
    Ok(held)
}

fn voters_on(map: &ClusterMap, node: NodeId) -> usize {
    let replicas = map.shards.iter().flat_map(|shard| &shard.replicas);
    replicas.filter(|replica| replica.voter && replica.node == node).count()
}

/// Shards that have fewer voters on the nodes that are left than they shall have.
fn short(map: &ClusterMap, lost: NodeId) -> usize {
    let voters = |replicas: &[coracle_client::topology::Replica]| {
        replicas.iter().filter(|replica| replica.voter && replica.node != lost).count()
    };
    map.shards.iter().filter(|shard| voters(&shard.replicas) < map.voters_wanted).count()
}

/// Waits until nothing is left of the node in the map, and every shard is whole; tells the progress.
async fn restored(
    cluster: &Cluster,
    node: NodeId,
    plan: &Plan,
    began: Instant,
) -> Result<Duration, String> {
    let admin = cluster.client().admin();
    let mut told = began;
    loop {
        let map = admin.map().await;
        let operations = admin.operations().await;
        if let Ok(map) = &map
            && short(map, node) == 0
            && voters_on(map, node) == 0
        {
            return Ok(began.elapsed());
        }
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            let left = map.as_ref().map_or(0, |map| short(map, node));
            let repairs = operations.iter().flat_map(|all| &all.operations);
            let repair = repairs.into_iter().find(|known| known.kind == OperationKind::Repair);
            let repair = repair.map_or("no repair yet".to_owned(), moves::line);
            let at = began.elapsed().as_secs_f64();
            println!("{at:>5.0} s: {left} shards lack a voter; {repair}");
        }
        if began.elapsed() >= plan.grace + plan.within {
            return Err(format!("n{node} is not replaced in time"));
        }
        tokio::time::sleep(POLL).await;
    }
}

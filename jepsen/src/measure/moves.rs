//! What all measurements of moving replicas share: operations that are watched to their end, the map's
//! invariants, what is left over on nodes. Owns these looks. Begins nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use coracle_client::admin::{
    BalancingChange, ClusterOperation, OperationId, OperationState, Plan, PlanOptions, SplitAt,
};
use coracle_client::topology::Shard;
use coracle_client::{Client, ClusterMap, ErrorKind, NodeId, ShardId};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cluster::process::{Cluster, http_get};

/// Between two looks at an operation, or at what is waited for.
const POLL: Duration = Duration::from_millis(100);
/// Between two lines about an operation that goes on.
const PROGRESS: Duration = Duration::from_secs(5);
/// What goes on by itself must have come to its end by then.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// For so long a map has to stay as it is: longer than a step is held between its record and the nodes.
const STAYS: Duration = Duration::from_secs(1);
/// A replica has caught up when it lacks no more than this.
const NEAR_ENTRIES: u64 = 500;
/// Between two looks at the map's invariants.
const MAP_POLL: Duration = Duration::from_millis(50);

/// Where the voters of each shard stand.
pub type Placement = BTreeMap<ShardId, BTreeSet<NodeId>>;

/// Of a map.
pub fn placement(map: &ClusterMap) -> Placement {
    let voters = |shard: &Shard| {
        let voters = shard.replicas.iter().filter(|replica| replica.voter);
        voters.map(|replica| replica.node).collect()
    };
    map.shards.iter().map(|shard| (shard.id, voters(shard))).collect()
}

/// What must hold of every map: the arcs tile the ring, a shard has no two replicas on a node, no
/// replica id is there twice. What does not, in words.
pub fn faults(map: &ClusterMap) -> Vec<String> {
    let mut faults = Vec::new();
    let mut arcs: Vec<(u64, u64)> =
        map.shards.iter().filter(|s| s.id.0 != 0).map(|s| (s.start, s.end)).collect();
    arcs.sort_unstable();
    let whole = arcs.len() == 1 && arcs[0].0 == arcs[0].1;
    for (at, (start, end)) in arcs.iter().enumerate() {
        let next = arcs.get(at + 1).map_or(arcs[0].0, |next| next.0);
        if *end != next && !whole {
            faults.push(format!("the arc from {start:016x} ends at {end:016x}, next {next:016x}"));
        }
    }
    let mut ids = BTreeSet::new();
    for shard in &map.shards {
        let nodes: BTreeSet<NodeId> = shard.replicas.iter().map(|replica| replica.node).collect();
        if nodes.len() < shard.replicas.len() {
            faults.push(format!("shard {} has two replicas on a node", shard.id));
        }
        if shard.replicas.iter().any(|replica| !ids.insert(replica.id)) {
            faults.push(format!("a replica of shard {} is there twice", shard.id));
        }
    }
    faults
}

/// Looks at the map of every node all the time.
pub struct MapWatch {
    stop: watch::Sender<bool>,
    watching: JoinHandle<(u64, BTreeSet<String>)>,
}

impl MapWatch {
    /// Begins, with a client of its own: what it asks is no part of any load.
    pub fn start(cluster: &Cluster) -> Result<MapWatch, String> {
        let builder = Client::builder().seeds(cluster.addresses()).name("coracle-jepsen-map");
        let client = builder.connect_lazy().map_err(|error| error.to_string())?;
        let (stop, stopped) = watch::channel(false);
        let watching = tokio::spawn(async move {
            let (mut looks, mut found) = (0, BTreeSet::new());
            while !*stopped.borrow() {
                tokio::time::sleep(MAP_POLL).await;
                for node in client.admin().cached_map().nodes {
                    let Ok(map) = client.admin().map_of(&node.address).await else { continue };
                    looks += 1;
                    found.extend(faults(&map));
                }
            }
            (looks, found)
        });
        Ok(MapWatch { stop, watching })
    }

    /// Ends it when all is over, and looks at what nodes still hold: tells what is wrong, and whether
    /// nothing is.
    pub async fn judge(self, cluster: &Cluster) -> Result<bool, String> {
        let (looks, faults) = self.stop().await?;
        let left = left_over(cluster, PATIENCE / 5).await?;
        println!(
            "{looks} maps looked at, {} not as they must be; {} left over",
            faults.len(),
            left.len()
        );
        faults.iter().chain(&left).for_each(|line| println!("  {line}"));
        Ok(faults.is_empty() && left.is_empty())
    }

    /// Ends it: how many maps were looked at, and what was wrong with them.
    pub async fn stop(self) -> Result<(u64, BTreeSet<String>), String> {
        self.stop.send_replace(true);
        self.watching.await.map_err(|error| error.to_string())
    }
}

/// From now on nothing moves or is split but what is asked for.
pub async fn by_hand(client: &Client) -> Result<(), String> {
    balancing(client, BalancingChange { automatic: Some(false), ..BalancingChange::default() })
        .await
}

/// Sets how the cluster balances itself.
pub async fn balancing(client: &Client, change: BalancingChange) -> Result<(), String> {
    let set = client.admin().set_balancing(change).await;
    set.map(drop).map_err(|error| format!("set the balancing: {error}"))
}

/// A plan that moves something, as soon as there is one.
pub async fn planned(client: &Client) -> Result<Plan, String> {
    let began = Instant::now();
    loop {
        let plan = client.admin().plan_rebalance(&PlanOptions::default()).await;
        let plan = plan.map_err(|error| format!("plan: {error}"))?;
        if !plan.moves.is_empty() {
            println!("        {}", plan_line(&plan));
            return Ok(plan);
        }
        if began.elapsed() >= PATIENCE / 5 {
            return Err(format!("there is nothing to move: {:?}", plan.stalled));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn plan_line(plan: &Plan) -> String {
    format!(
        "plan of epoch {}: {} moves (at least {}), {} leaders, {:.1} MiB, about {:?}",
        plan.epoch,
        plan.moves.len(),
        plan.moves_min,
        plan.transfers.len(),
        plan.bytes as f64 / f64::from(1 << 20),
        plan.estimate
    )
}

/// By shard: its arc.
pub type Arcs = BTreeMap<ShardId, (u64, u64)>;

/// Of the shards as they are now.
pub async fn arcs(client: &Client) -> Result<Arcs, String> {
    let map = client.admin().map().await.map_err(|error| error.to_string())?;
    let shards = map.shards.iter().filter(|shard| shard.id.0 != 0);
    Ok(shards.map(|shard| (shard.id, (shard.start, shard.end))).collect())
}

/// Splits a shard.
pub async fn split(client: &Client, shard: ShardId, at: SplitAt) -> Result<(), String> {
    let admin = client.admin();
    let begun = asked(|| admin.split_shard(shard, at, false)).await;
    let begun = begun.map_err(|error| format!("split shard {shard}: {error}"))?;
    let operation = begun.operation.ok_or("a split: no operation")?;
    done(client, operation.id).await
}

/// Splits a shard in the middle of its arc: with positions by hash, about in the middle of its keys.
pub async fn halve(client: &Client, shard: ShardId) -> Result<(), String> {
    let arcs = arcs(client).await?;
    let (start, end) = *arcs.get(&shard).ok_or_else(|| format!("shard {shard} is gone"))?;
    split(client, shard, SplitAt::Position(middle(start, end))).await
}

/// The position in the middle of an arc.
pub fn middle(start: u64, end: u64) -> u64 {
    // An end of 0 is 2^64, and an arc may be the whole ring.
    start.wrapping_add(end.wrapping_sub(start).wrapping_sub(1) / 2 + 1)
}

/// Merges two neighbours.
pub async fn merge(client: &Client, left: ShardId, right: ShardId) -> Result<(), String> {
    let admin = client.admin();
    let begun = asked(|| admin.merge_shards(left, right, false)).await;
    let begun = begun.map_err(|error| format!("merge shard {right} into shard {left}: {error}"))?;
    let operation = begun.operation.ok_or("a merge: no operation")?;
    done(client, operation.id).await
}

/// Asks again for as long as the map changes meanwhile.
async fn asked<T, A: Future<Output = Result<T, coracle_client::Error>>>(
    ask: impl Fn() -> A,
) -> Result<T, coracle_client::Error> {
    let began = Instant::now();
    loop {
        match ask().await {
            Err(error) if error.kind() == ErrorKind::Conflict && began.elapsed() < PATIENCE / 5 => {
                tokio::time::sleep(POLL).await;
            }
            answered => return answered,
        }
    }
}

/// Follows an operation, which must come to its end as it was meant to.
pub async fn done(client: &Client, id: OperationId) -> Result<(), String> {
    let ended = follow(client, id).await?;
    if ended.state == OperationState::Done { Ok(()) } else { Err(line(&ended)) }
}

/// Looks at an operation until it has ended, and tells how far it is.
pub async fn follow(client: &Client, id: OperationId) -> Result<ClusterOperation, String> {
    let (began, mut told) = (Instant::now(), Instant::now());
    loop {
        let last = match client.admin().operation(id).await {
            Ok(Some(operation)) if operation.has_ended() => {
                let took = began.elapsed().as_secs_f64();
                println!("        {} {took:.1} s", line(&operation));
                return Ok(operation);
            }
            Ok(Some(operation)) => line(&operation),
            Ok(None) => return Err(format!("operation {id} is not known")),
            Err(error) => format!("operation {id}: {error}"),
        };
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            println!("        {last}");
        }
        if began.elapsed() >= PATIENCE {
            return Err(format!("operation {id} does not end: {last}"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// An operation in one line.
pub fn line(operation: &ClusterOperation) -> String {
    let (done, all) = operation.bytes();
    let (moved, mib) = (operation.moves_done, |bytes: u64| bytes as f64 / f64::from(1 << 20));
    let mut line = format!(
        "operation {}: {}, {}, {moved}/{} moves, {:.1}/{:.1} MiB",
        operation.id,
        operation.kind,
        operation.state,
        operation.moves_all,
        mib(done),
        mib(all)
    );
    let steps = operation.moves.iter().map(|step| &step.message);
    for message in steps.chain([&operation.message]).filter(|message| !message.is_empty()).take(3) {
        line.push_str(&format!("; {message}"));
    }
    line
}

/// The map, where all nodes that answer have the same one: it comes to them one after the other.
async fn agreed(client: &Client) -> Result<ClusterMap, String> {
    let mut newest: Option<ClusterMap> = None;
    for node in client.admin().cached_map().nodes {
        let Ok(map) = client.admin().map_of(&node.address).await else { continue };
        match &newest {
            Some(known) if known.epoch != map.epoch => {
                return Err(format!("nodes know epochs {} and {}", known.epoch, map.epoch));
            }
            _ => newest = Some(map),
        }
    }
    newest.ok_or_else(|| "no node answers".to_owned())
}

/// Waits until nothing is under way, and nothing comes or goes in a map that stays as it is: what was
/// recorded reaches the nodes a little later, and later still where steps are held.
pub async fn settle(client: &Client) -> Result<ClusterMap, String> {
    let (began, mut since) = (Instant::now(), None);
    loop {
        // In this order: what has ended stands in the maps that are read afterwards.
        let operations = client.admin().operations().await.map_err(|error| error.to_string());
        let why = match (operations, agreed(client).await) {
            (Ok(operations), Ok(map)) => {
                let mut replicas = map.shards.iter().flat_map(|shard| &shard.replicas);
                let moves = replicas.any(|replica| replica.joining || replica.goes);
                let active = operations.operations.iter().find(|known| !known.has_ended());
                match (moves, active) {
                    (false, None) => {
                        let (epoch, at) = *since.get_or_insert((map.epoch, Instant::now()));
                        match epoch == map.epoch {
                            true if at.elapsed() >= STAYS => return Ok(map),
                            true => {}
                            false => since = None,
                        }
                        "the map has just changed".to_owned()
                    }
                    (_, Some(operation)) => line(operation),
                    (true, None) => "a replica comes or goes".to_owned(),
                }
            }
            (Err(why), _) | (_, Err(why)) => why,
        };
        if began.elapsed() >= PATIENCE {
            return Err(format!("the cluster does not settle: {why}"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until a node that was started again is as good as before: it is ready, and its replicas lack
/// next to nothing of what their leaders have.
pub async fn caught_up(cluster: &mut Cluster, at: usize) -> Result<(), String> {
    cluster.wait_back(at).await?;
    cluster.wait_ready(at).await?;
    let (began, node) = (Instant::now(), cluster.status(at).await?.node.id);
    loop {
        let mut near = 0;
        let mut far = 0;
        for other in (0..cluster.len()).filter(|other| cluster.is_running(*other)) {
            let groups = cluster.status(other).await.map(|status| status.groups);
            let members = groups.unwrap_or_default().into_iter().flat_map(|group| group.members);
            for member in members.filter(|member| member.node == node) {
                let is_near = member.lag_entries <= NEAR_ENTRIES && member.matched_index > 0;
                *(if is_near { &mut near } else { &mut far }) += 1;
            }
        }
        let own = cluster.status(at).await?.groups.len();
        if far == 0 && near >= own {
            return Ok(());
        }
        if began.elapsed() >= PATIENCE {
            return Err(format!("n{}: {near} replicas are up to date, {far} not", at + 1));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What nodes hold that the map does not know, or lack that it knows; waits until there is nothing of
/// it, and returns what is left after `patience`.
pub async fn left_over(cluster: &Cluster, patience: Duration) -> Result<Vec<String>, String> {
    let began = Instant::now();
    loop {
        let found = strays(cluster).await?;
        if found.is_empty() || began.elapsed() >= patience {
            return Ok(found);
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn strays(cluster: &Cluster) -> Result<Vec<String>, String> {
    let map = cluster.client().admin().map().await.map_err(|error| error.to_string())?;
    let mut found = Vec::new();
    for at in (0..cluster.len()).filter(|at| cluster.is_running(*at)) {
        let status = cluster.status(at).await?;
        let own = status.node.id;
        let mut wanted = BTreeSet::new();
        for shard in &map.shards {
            let here = shard.replicas.iter().filter(|replica| replica.node == own);
            wanted.extend(here.map(|replica| (shard.id, replica.id)));
        }
        let has: BTreeSet<_> =
            status.groups.iter().map(|group| (group.shard, group.replica)).collect();
        for (shard, replica) in has.difference(&wanted) {
            found.push(format!("n{own} runs replica {replica} of shard {shard}: an orphan"));
        }
        for (shard, replica) in wanted.difference(&has) {
            found.push(format!("n{own} does not run replica {replica} of shard {shard}"));
        }
        let names: BTreeSet<String> =
            wanted.iter().map(|(_, replica)| format!("{:016x}", replica.0)).collect();
        let dir = cluster.dir(at).join("shards");
        let entries = fs::read_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        for entry in entries {
            let name = entry.map_err(|error| error.to_string())?.file_name();
            let name = name.to_string_lossy();
            if !names.contains(name.as_ref()) {
                found.push(format!("n{own} has the directory shards/{name}: an orphan"));
            }
        }
    }
    Ok(found)
}

/// The sum of a counter over all nodes that run, as their metrics say.
pub async fn counted(cluster: &Cluster, metric: &str) -> Result<u64, String> {
    let mut sum = 0.0;
    for at in (0..cluster.len()).filter(|at| cluster.is_running(*at)) {
        let text = http_get(cluster.http(at), "/metrics").await?;
        let values = text.lines().filter_map(|line| line.strip_prefix(metric));
        sum += values.filter_map(|value| value.trim().parse::<f64>().ok()).sum::<f64>();
    }
    Ok(sum as u64)
}

#[cfg(test)]
mod tests {
    use coracle_client::topology::{Replica, ReplicaId};

    use super::*;

    fn map(arcs: &[(u64, u64)]) -> ClusterMap {
        let replica = |id| Replica {
            id: ReplicaId(id),
            node: NodeId(id % 10),
            voter: true,
            joining: false,
            becomes_voter: false,
            replaces: None,
            goes: false,
        };
        let shards = arcs.iter().zip(1..).map(|((start, end), id)| Shard {
            id: ShardId(id),
            start: *start,
            end: *end,
            epoch: 1,
            replicas: (1..=3).map(|node| replica(id * 10 + node)).collect(),
            leader: None,
            leader_term: 0,
        });
        ClusterMap { shards: shards.collect(), ..ClusterMap::default() }
    }

    #[test]
    fn the_middle_of_an_arc_is_inside_it() {
        assert_eq!(middle(0, 0), 1 << 63, "the whole ring");
        assert_eq!(middle(10, 12), 11);
        assert_eq!(middle(u64::MAX - 1, 0), u64::MAX);
    }

    #[test]
    fn maps_that_cannot_be_are_seen() {
        assert_eq!(faults(&map(&[(0, 7), (7, 9), (9, 0)])), Vec::<String>::new());
        assert_eq!(faults(&map(&[(5, 9), (9, 5)])), Vec::<String>::new(), "around the end");
        assert_eq!(faults(&map(&[(0, 0)])), Vec::<String>::new(), "one shard has all");
        assert_eq!(faults(&map(&[(0, 7), (8, 0)])).len(), 1, "a gap");
        assert_eq!(faults(&map(&[(0, 8), (7, 0)])).len(), 1, "an overlap");
        let mut twice = map(&[(0, 7), (7, 0)]);
        twice.shards[0].replicas[1].node = twice.shards[0].replicas[0].node;
        twice.shards[1].replicas[0].id = twice.shards[1].replicas[1].id;
        assert_eq!(faults(&twice).len(), 2);
    }
}

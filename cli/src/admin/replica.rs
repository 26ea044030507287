//! `coracle replica`: where replicas are and how far, and how many read replicas there shall be.

use std::time::{Duration, Instant};

use coracle_client::admin::{MemberStatus, ReplicaChange, ReplicaPlace, Replicas};
use coracle_client::{Client, NodeId, ShardId};
use serde::Serialize;

use crate::args::{Global, Replica};
use crate::failure::{Exit, Failure};
use crate::output::{Column, Output};

use super::{Picture, client, health};

/// Between two looks while waiting.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// A replica, for machines.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaView {
    shard: u64,
    replica: u64,
    node: u64,
    zone: String,
    /// voter, learner, or joining: a learner that will vote.
    role: &'static str,
    /// leader, following, joining, missing, damaged, down.
    state: &'static str,
    /// What its leader says it lacks; absent where no leader says anything.
    lag_entries: Option<u64>,
    lag_ms: Option<u64>,
}

/// Replicas as a table.
pub const COLUMNS: &[Column<ReplicaView>] = &[
    Column::text("SHARD", |replica| match replica.shard {
        0 => "0 meta".to_owned(),
        shard => shard.to_string(),
    }),
    Column::number("REPLICA", |replica| replica.replica.to_string()),
    Column::text("NODE", |replica| format!("n{}", replica.node)),
    Column::text("ZONE", |replica| or_dash(replica.zone.clone())),
    Column::text("ROLE", |replica| replica.role.to_owned()),
    Column::text("STATE", |replica| replica.state.to_owned()),
    Column::number("LAG", |replica| or_dash(text(replica.lag_entries))),
    Column::number("LAG MS", |replica| or_dash(text(replica.lag_ms))),
];

fn text(number: Option<u64>) -> String {
    number.map(|number| number.to_string()).unwrap_or_default()
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SetView {
    zone: String,
    learners: u32,
    dry_run: bool,
    made: Vec<ChangeView>,
    removed: Vec<ChangeView>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct ChangeView {
    shard: u64,
    node: u64,
    replica: Option<u64>,
}

/// Runs it.
pub async fn run(command: Replica, global: &Global, output: &Output) -> Result<(), Failure> {
    let (_, client) = client(global).await?;
    match command {
        Replica::Ls { shard } => list(&client, shard, output).await,
        Replica::Set { learners, zone, dry_run, wait } => {
            let asked = (&*zone, learners, dry_run);
            if !wait {
                return set(&client, asked, output).await;
            }
            let until = global.timeout.map(|timeout| Instant::now() + timeout);
            // Somebody may be elected just now: whoever waits for the replicas waits for that too.
            while let Err(failure) = set(&client, asked, output).await {
                if !passes(&failure) || until.is_some_and(|until| Instant::now() >= until) {
                    return Err(failure);
                }
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
            wait_for(&client, &zone, learners, until, output).await
        }
    }
}

async fn list(client: &Client, shard: Option<ShardId>, output: &Output) -> Result<(), Failure> {
    let (picture, replicas) = look(client).await?;
    if let Some(shard) = shard.filter(|shard| picture.map.shard(*shard).is_none()) {
        return Err(Failure::usage(format!("there is no shard {shard}"))
            .next("coracle shard ls shows which there are"));
    }
    let places = replicas.places.iter().filter(|place| shard.is_none_or(|id| place.shard == id));
    let views: Vec<ReplicaView> = places.map(|place| view(place, &picture)).collect();
    output.list("ReplicaList", COLUMNS, &views)
}

/// The cluster, and its replicas by the map.
pub async fn look(client: &Client) -> Result<(Picture, Replicas), Failure> {
    let picture = Picture::take(client).await?;
    let replicas = client.admin().replicas().await;
    let replicas = replicas.map_err(|error| Failure::call("read the shard map", &error))?;
    Ok((picture, replicas))
}

/// How a replica is.
pub fn view(place: &ReplicaPlace, picture: &Picture) -> ReplicaView {
    let shard = picture.map.shard(place.shard);
    let leader = shard.and_then(|shard| health::leader(shard, &picture.nodes));
    let group = |node: NodeId| {
        picture.nodes.get(&node)?.groups.iter().find(|group| group.shard == place.shard)
    };
    let members = leader.and_then(group).map(|group| group.members.as_slice()).unwrap_or_default();
    let member: Option<&MemberStatus> =
        members.iter().find(|member| member.replica == place.replica);
    let own = group(place.node).filter(|group| group.replica == place.replica);
    let (is_there, role) = (own.is_some(), own.map_or("", |group| group.role.as_str()));
    ReplicaView {
        shard: place.shard.0,
        replica: place.replica.0,
        node: place.node.0,
        zone: picture.map.node(place.node).map(|node| node.zone.clone()).unwrap_or_default(),
        role: match (place.voter, place.becomes_voter) {
            (true, _) => "voter",
            (false, true) => "joining",
            (false, false) => "learner",
        },
        state: match () {
            () if !picture.nodes.contains_key(&place.node) => "down",
            () if role == "recovering" || role == "stopped" => "damaged",
            () if place.joining => "joining",
            () if !is_there => "missing",
            () if leader == Some(place.node) => "leader",
            () => "following",
        },
        lag_entries: member.map(|member| member.lag_entries),
        lag_ms: member.map(|member| member.lag.as_millis() as u64),
    }
}

/// Whether it may go well a moment later.
fn passes(failure: &Failure) -> bool {
    matches!(failure.exit, Exit::Unreachable | Exit::Overloaded)
}

async fn set(
    client: &Client,
    (zone, learners, dry_run): (&str, u32, bool),
    output: &Output,
) -> Result<(), Failure> {
    let set = client.admin().set_read_replicas(zone, learners, dry_run).await;
    let set = set.map_err(|error| Failure::call("set the read replicas", &error))?;
    for warning in &set.warnings {
        output.note(&format!("warning: {warning}"));
    }
    let change = |change: &ReplicaChange| ChangeView {
        shard: change.shard.0,
        node: change.node.0,
        replica: change.replica.map(|replica| replica.0),
    };
    let view = SetView {
        zone: zone.to_owned(),
        learners,
        dry_run,
        made: set.made.iter().map(change).collect(),
        removed: set.removed.iter().map(change).collect(),
        warnings: set.warnings,
    };
    output.item("ReadReplicas", &view, || {
        let place = if zone.is_empty() { "any zone".to_owned() } else { format!("zone {zone}") };
        let (made, removed) = (view.made.len(), view.removed.len());
        let will = if dry_run { "would be" } else { "will be" };
        let mut lines = vec![format!(
            "{learners} read replicas per shard in {place}: {made} {will} made, {removed} removed"
        )];
        let name = |sign: char, change: &ChangeView| {
            format!("{sign} shard {} on n{}", change.shard, change.node)
        };
        if dry_run {
            lines.extend(view.made.iter().map(|change| name('+', change)));
            lines.extend(view.removed.iter().map(|change| name('-', change)));
        } else if made + removed > 0 {
            lines.push("Next: coracle replica ls".to_owned());
        }
        lines.join("\n")
    })
}

/// Waits until every replica is made and can be read from, and every other one has left its node.
async fn wait_for(
    client: &Client,
    zone: &str,
    learners: u32,
    until: Option<Instant>,
    output: &Output,
) -> Result<(), Failure> {
    let mut progress = output.progress();
    loop {
        let left = match still_to_do(client, zone, learners).await {
            Ok(left) if left.is_empty() => return Ok(()),
            Ok(left) => left,
            // Somebody is elected meanwhile, or a node restarts.
            Err(failure) if passes(&failure) => failure.what,
            Err(failure) => return Err(failure),
        };
        if until.is_some_and(|until| Instant::now() >= until) {
            let what = format!("the read replicas are not all there: {left}");
            return Err(Failure::new(Exit::Unhealthy, what)
                .next("the cluster goes on by itself; coracle replica ls shows how far it is"));
        }
        progress.update(|| format!("read replicas: {left}"));
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn still_to_do(client: &Client, zone: &str, learners: u32) -> Result<String, Failure> {
    let planned = client.admin().set_read_replicas(zone, learners, true).await;
    let planned = planned.map_err(|error| Failure::call("look at the read replicas", &error))?;
    let (picture, replicas) = look(client).await?;
    // Those that will vote come with an operation, not with this setting.
    let joining = replicas.places.iter().filter(|place| place.joining && !place.becomes_voter);
    let groups = picture.nodes.values().flat_map(|status| &status.groups);
    let leaving =
        groups.filter(|group| !replicas.places.iter().any(|place| place.replica == group.replica));
    let counts = [
        (planned.made.len(), "to be made"),
        (joining.count(), "joining"),
        (planned.removed.len() + leaving.count(), "to be removed"),
    ];
    let parts = counts.iter().filter(|(count, _)| *count > 0);
    let parts: Vec<String> = parts.map(|(count, what)| format!("{count} {what}")).collect();
    Ok(parts.join(", "))
}

//! `coracle shard`.

use coracle_client::{NodeId, ShardId};
use serde::Serialize;

use crate::args::{Global, Shard};
use crate::failure::Failure;
use crate::output::{Column, Output, bytes};

use super::{Picture, client, health};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ShardView {
    id: u64,
    /// First position of its arc, as 16 hex digits.
    start: String,
    /// One past the last; 0 is the ring's end.
    end: String,
    epoch: u64,
    leader: Option<u64>,
    term: u64,
    voters: Vec<u64>,
    learners: Vec<u64>,
    /// Voters that answer.
    live: usize,
    state_bytes: u64,
    applied_index: u64,
    /// Entries between the first replica and the last.
    lag: u64,
    #[serde(skip)]
    is_meta: bool,
}

const COLUMNS: &[Column<ShardView>] = &[
    Column::text("SHARD", |shard| match shard.is_meta {
        true => format!("{} meta", shard.id),
        false => shard.id.to_string(),
    }),
    Column::text("FROM", |shard| if shard.is_meta { "-".to_owned() } else { shard.start.clone() }),
    Column::text("LEADER", |shard| {
        shard.leader.map_or_else(|| "none".to_owned(), |node| format!("n{node}"))
    }),
    Column::text("VOTERS", |shard| names(&shard.voters)),
    Column::number("LIVE", |shard| format!("{}/{}", shard.live, shard.voters.len())),
    Column::number("TERM", |shard| shard.term.to_string()),
    Column::number("APPLIED", |shard| shard.applied_index.to_string()),
    Column::number("LAG", |shard| shard.lag.to_string()),
    Column::number("DATA", |shard| bytes(shard.state_bytes)),
    Column::text("TO", |shard: &ShardView| shard.end.clone()).wide(),
    Column::number("EPOCH", |shard: &ShardView| shard.epoch.to_string()).wide(),
    Column::text("LEARNERS", |shard: &ShardView| names(&shard.learners)).wide(),
];

fn names(nodes: &[u64]) -> String {
    let names: Vec<String> = nodes.iter().map(|node| format!("n{node}")).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(" ") }
}

#[derive(Serialize)]
struct TransferView {
    shard: u64,
    leader: u64,
}

/// Runs it.
pub async fn run(command: Shard, global: &Global, output: &Output) -> Result<(), Failure> {
    match command {
        Shard::Ls => {
            let picture = Picture::of(global).await?;
            output.list("ShardList", COLUMNS, &views(&picture))
        }
        Shard::TransferLeader { shard, to } => transfer(shard, to, global, output).await,
        Shard::Compact { shard } => compact(shard, global, output).await,
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CompactView {
    shard: u64,
    node: u64,
    bytes_before: u64,
    bytes_after: u64,
}

const COMPACT_COLUMNS: &[Column<CompactView>] = &[
    Column::text("SHARD", |done| done.shard.to_string()),
    Column::text("NODE", |done| format!("n{}", done.node)),
    Column::number("BEFORE", |done| bytes(done.bytes_before)),
    Column::number("AFTER", |done| bytes(done.bytes_after)),
];

/// One replica after the other, the leader's first: the others follow its clock.
async fn compact(shard: ShardId, global: &Global, output: &Output) -> Result<(), Failure> {
    let picture = Picture::of(global).await?;
    let unknown = || Failure::failed(format!("no shard {shard}")).next("coracle shard ls");
    let known = picture.map.shard(shard).ok_or_else(unknown)?;
    let leader = health::leader(known, &picture.nodes);
    let mut nodes: Vec<NodeId> = known.replicas.iter().map(|replica| replica.node).collect();
    nodes.sort_by_key(|node| (Some(*node) != leader, *node));
    let (_, client) = client(global).await?;
    let mut views = Vec::new();
    for node in nodes {
        let what = format!("compact shard {shard} on n{node}");
        let address = picture.map.node(node).map(|node| node.address.as_str());
        let done = client.admin().compact_shard(address.unwrap_or_default(), shard).await;
        let done = done.map_err(|error| Failure::call(what, &error))?;
        views.push(CompactView {
            shard: shard.0,
            node: node.0,
            bytes_before: done.bytes_before,
            bytes_after: done.bytes_after,
        });
    }
    output.list("CompactionList", COMPACT_COLUMNS, &views)
}

async fn transfer(
    shard: ShardId,
    to: Option<NodeId>,
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let (_, client) = client(global).await?;
    let what = format!("hand over the leadership of shard {shard}");
    let leader = client.admin().transfer_leader(shard, to).await;
    let leader = leader.map_err(|error| Failure::call(what, &error))?;
    let view = TransferView { shard: shard.0, leader: leader.0 };
    output.item("LeaderTransfer", &view, || format!("n{leader} leads shard {shard} now"))
}

fn views(picture: &Picture) -> Vec<ShardView> {
    let view = |shard: &coracle_client::topology::Shard| {
        let (mut voters, mut learners) = (Vec::new(), Vec::new());
        for replica in &shard.replicas {
            if replica.voter { &mut voters } else { &mut learners }.push(replica.node.0);
        }
        let groups: Vec<_> = shard
            .replicas
            .iter()
            .filter_map(|replica| picture.nodes.get(&replica.node))
            .filter_map(|status| status.groups.iter().find(|group| group.shard == shard.id))
            .collect();
        let applied = groups.iter().map(|group| group.applied_index);
        let (least, most) = (applied.clone().min().unwrap_or(0), applied.max().unwrap_or(0));
        let is_live = |node: &&u64| picture.nodes.contains_key(&NodeId(**node));
        ShardView {
            id: shard.id.0,
            start: format!("{:016x}", shard.start),
            end: format!("{:016x}", shard.end),
            epoch: shard.epoch,
            leader: health::leader(shard, &picture.nodes).map(|node| node.0),
            term: groups.iter().map(|group| group.term).max().unwrap_or(shard.leader_term),
            live: voters.iter().filter(is_live).count(),
            voters,
            learners,
            state_bytes: groups.iter().map(|group| group.state_bytes).max().unwrap_or(0),
            applied_index: most,
            lag: most - least,
            is_meta: shard.id == ShardId(0),
        }
    };
    picture.map.shards.iter().map(view).collect()
}

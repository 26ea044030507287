//! `coracle shard`.

use coracle_client::topology::Replica;
use coracle_client::{NodeId, ShardId};
use serde::Serialize;

use crate::args::{Global, Shard};
use crate::failure::Failure;
use crate::output::{Column, Output, bytes, render};

use super::ring::{Ring, draw};
use super::{Picture, client, health, operation, rebalance, replica, reshape};

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
    /// Nodes that get a voter.
    joining: Vec<u64>,
    /// Nodes whose voter goes then.
    leaving: Vec<u64>,
    /// Between two sets of voters, by the leader's word.
    joint: bool,
    /// Voters that answer.
    live: usize,
    state_bytes: u64,
    /// Keys read a second, on all its replicas together.
    reads_per_second: u64,
    /// Keys written a second.
    writes_per_second: u64,
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
    Column::text("VOTERS", |shard| {
        let voters = shard.voters.iter().map(|node| match shard.leaving.contains(node) {
            true => format!("n{node}-"),
            false => format!("n{node}"),
        });
        let joining = shard.joining.iter().map(|node| format!("n{node}+"));
        let names: Vec<String> = voters.chain(joining).collect();
        if names.is_empty() { "-".to_owned() } else { names.join(" ") }
    }),
    Column::number("LIVE", |shard| format!("{}/{}", shard.live, shard.voters.len())),
    Column::number("TERM", |shard| shard.term.to_string()),
    Column::number("APPLIED", |shard| shard.applied_index.to_string()),
    Column::number("LAG", |shard| shard.lag.to_string()),
    Column::number("DATA", |shard| bytes(shard.state_bytes)),
    Column::text("TO", |shard: &ShardView| shard.end.clone()).wide(),
    Column::number("EPOCH", |shard: &ShardView| shard.epoch.to_string()).wide(),
    Column::text("LEARNERS", |shard: &ShardView| names(&shard.learners)).wide(),
    Column::number("READS/S", |shard: &ShardView| shard.reads_per_second.to_string()).wide(),
    Column::number("WRITES/S", |shard: &ShardView| shard.writes_per_second.to_string()).wide(),
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
        Shard::Show { shard } => show(shard, global, output).await,
        Shard::Ring { width } => ring(width, global, output).await,
        Shard::Move { shard, from, to, wait } => {
            let (_, client) = client(global).await?;
            let begun = client.admin().move_replica(shard, from, to).await;
            let what = format!("move shard {shard} from n{from} to n{to}");
            let begun = begun.map_err(|error| operation::begin_failure(what, &error))?;
            rebalance::follow(&client, begun, wait, global, output).await
        }
        Shard::Split { shard, at, key, keyspace, by, dry_run, wait } => {
            let key = key.map(|key| (key, keyspace));
            let asked = reshape::Split { shard, at, key, by, dry_run, wait };
            reshape::split(asked, global, output).await
        }
        Shard::Merge { left, right, dry_run, wait } => {
            reshape::merge((left, right), (dry_run, wait), global, output).await
        }
        Shard::TransferLeader { shard, to } => transfer(shard, to, global, output).await,
        Shard::Compact { shard } => compact(shard, global, output).await,
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ShowView {
    #[serde(flatten)]
    shard: ShardView,
    replicas: Vec<replica::ReplicaView>,
}

async fn show(shard: ShardId, global: &Global, output: &Output) -> Result<(), Failure> {
    let (_, client) = client(global).await?;
    let (picture, replicas) = replica::look(&client).await?;
    let known = views(&picture).into_iter().find(|view| view.id == shard.0);
    let unknown = || Failure::failed(format!("no shard {shard}")).next("coracle shard ls");
    let known = known.ok_or_else(unknown)?;
    let here = replicas.places.iter().filter(|place| place.shard == shard);
    let replicas = here.map(|place| replica::view(place, &picture)).collect();
    let view = ShowView { shard: known, replicas };
    output.item("Shard", &view, || {
        let ShardView { id, start, end, epoch, term, state_bytes, joint, .. } = &view.shard;
        let leader = view.shard.leader.map_or_else(|| "none".to_owned(), |node| format!("n{node}"));
        let arc = match view.shard.is_meta {
            true => "the meta group, no arc".to_owned(),
            false => format!("{start} up to {end}"),
        };
        let joint = if *joint { ", between two sets of voters" } else { "" };
        format!(
            "shard {id}: {arc}\nleader {leader}, term {term}, epoch {epoch}, {}{joint}\n\n{}",
            bytes(*state_bytes),
            render(replica::COLUMNS, &view.replicas, false, true).trim_end()
        )
    })
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RingView {
    map_epoch: u64,
    shards: Vec<ShardView>,
}

async fn ring(width: Option<usize>, global: &Global, output: &Output) -> Result<(), Failure> {
    let picture = Picture::of(global).await?;
    let view = RingView { map_epoch: picture.map.epoch, shards: views(&picture) };
    output.item("ShardRing", &view, || {
        let (leaders, answering) = (picture.leaders(), picture.nodes.keys().copied().collect());
        let ring = Ring { map: &picture.map, leaders: &leaders, answering: &answering };
        draw(&ring, width.unwrap_or_else(|| output.width()))
    })
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
        let (mut joining, mut leaving) = (Vec::new(), Vec::new());
        for replica in &shard.replicas {
            match (replica.voter, replica.becomes_voter) {
                (true, _) => &mut voters,
                (false, true) => &mut joining,
                (false, false) => &mut learners,
            }
            .push(replica.node.0);
            let is_replaced = |other: &Replica| other.replaces == Some(replica.id);
            if replica.goes || shard.replicas.iter().any(is_replaced) {
                leaving.push(replica.node.0);
            }
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
            joining,
            leaving,
            joint: groups.iter().any(|group| group.role == "leader" && group.joint),
            state_bytes: groups.iter().map(|group| group.state_bytes).max().unwrap_or(0),
            reads_per_second: groups.iter().map(|group| group.reads_per_second).sum(),
            writes_per_second: groups.iter().map(|group| group.writes_per_second).sum(),
            applied_index: most,
            lag: most - least,
            is_meta: shard.id == ShardId(0),
        }
    };
    picture.map.shards.iter().map(view).collect()
}

#[cfg(test)]
mod tests {
    use coracle_client::topology::ReplicaId;

    use super::super::health::tests::{map, statuses};
    use super::*;

    #[test]
    fn voters_that_come_and_go_are_marked() {
        let mut map = map();
        let voter = map.shards[0].replicas[2];
        map.shards[0].replicas.push(Replica {
            id: ReplicaId(4),
            node: NodeId(4),
            voter: false,
            joining: true,
            becomes_voter: true,
            replaces: Some(voter.id),
            goes: false,
        });
        map.shards[0].replicas[1].goes = true;
        let learner = Replica { voter: false, id: ReplicaId(5), node: NodeId(5), ..voter };
        map.shards[0].replicas.push(learner);
        let nodes = statuses(&map, &[1, 2, 3, 4, 5], 1);
        let views = views(&Picture { map, nodes });
        let table = render(&COLUMNS[..5], &views, false, false);
        assert_eq!(table, "1  0000000000000000  n1  n1 n2- n3- n4+  3/3\n");
        assert_eq!((&views[0].joining, &views[0].learners), (&vec![4], &vec![5]));
    }
}

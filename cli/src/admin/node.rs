//! `coracle node`.

use coracle_client::topology::NodeState;
use serde::Serialize;

use crate::args::{Global, Node};
use crate::failure::Failure;
use crate::output::{Column, Output, bytes, duration};

use super::Picture;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeView {
    id: u64,
    state: String,
    zone: String,
    address: String,
    peer_address: String,
    http_address: String,
    version: String,
    /// The rest only of nodes that answer.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    answer: Option<Answer>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    leaders: usize,
    replicas: usize,
    state_bytes: u64,
    log_bytes: u64,
    disk_free_bytes: u64,
    disk_total_bytes: u64,
    uptime_ms: u64,
    starts: u64,
    peers_connected: usize,
    peers: usize,
}

const COLUMNS: &[Column<NodeView>] = &[
    Column::text("ID", |node| format!("n{}", node.id)),
    Column::text("STATE", |node| node.state.clone()),
    Column::text("ZONE", |node| node.zone.clone()),
    Column::text("ADDR", |node| node.address.clone()),
    Column::text("VERSION", |node| node.version.clone()),
    Column::number("LEADERS", |node| said(node, |answer| answer.leaders.to_string())),
    Column::number("REPLICAS", |node| said(node, |answer| answer.replicas.to_string())),
    Column::number("DATA", |node| said(node, |answer| bytes(answer.state_bytes))),
    Column::number("UPTIME", |node| {
        said(node, |answer| duration(std::time::Duration::from_millis(answer.uptime_ms)))
    }),
    Column::number("LOG", |node: &NodeView| said(node, |answer| bytes(answer.log_bytes))).wide(),
    Column::number("DISK-FREE", |node: &NodeView| {
        said(node, |answer| bytes(answer.disk_free_bytes))
    })
    .wide(),
    Column::number("STARTS", |node: &NodeView| said(node, |answer| answer.starts.to_string()))
        .wide(),
    Column::number("PEERS", |node| {
        said(node, |answer| format!("{}/{}", answer.peers_connected, answer.peers))
    })
    .wide(),
    Column::text("PEER-ADDR", |node: &NodeView| node.peer_address.clone()).wide(),
    Column::text("HTTP-ADDR", |node: &NodeView| node.http_address.clone()).wide(),
];

fn said(node: &NodeView, cell: impl FnOnce(&Answer) -> String) -> String {
    node.answer.as_ref().map_or_else(|| "-".to_owned(), cell)
}

/// Runs it.
pub async fn run(command: Node, global: &Global, output: &Output) -> Result<(), Failure> {
    let Node::Ls = command;
    let picture = Picture::of(global).await?;
    output.list("NodeList", COLUMNS, &views(&picture))
}

fn views(picture: &Picture) -> Vec<NodeView> {
    let view = |node: &coracle_client::topology::Node| {
        let status = picture.nodes.get(&node.id);
        let state = match status {
            None => NodeState::Down,
            Some(status) if status.draining => NodeState::Draining,
            Some(_) => node.state,
        };
        NodeView {
            id: node.id.0,
            state: state.to_string(),
            zone: node.zone.clone(),
            address: node.address.clone(),
            peer_address: node.peer_address.clone(),
            http_address: node.http_address.clone(),
            version: node.version.clone(),
            answer: status.map(|status| Answer {
                leaders: status.groups.iter().filter(|group| group.role == "leader").count(),
                replicas: status.groups.len(),
                state_bytes: status.groups.iter().map(|group| group.state_bytes).sum(),
                log_bytes: status.log_bytes,
                disk_free_bytes: status.disk_free_bytes,
                disk_total_bytes: status.disk_total_bytes,
                uptime_ms: status.uptime.as_millis() as u64,
                starts: status.start_count,
                peers_connected: status.peers.iter().filter(|peer| peer.connected).count(),
                peers: status.peers.len(),
            }),
        }
    };
    let mut views: Vec<NodeView> = picture.map.nodes.iter().map(view).collect();
    views.sort_by_key(|node| node.id);
    views
}

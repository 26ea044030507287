//! `coracle node`; what has nodes leave is in `leave`.

use coracle_client::topology::NodeState;
use serde::Serialize;

use crate::args::{Global, Node};
use crate::failure::Failure;
use crate::output::{Column, Output, bytes, duration};

use super::{Picture, leave};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeView {
    id: u64,
    /// One word: of a node that does not answer `down`, unless it has left for good.
    state: String,
    /// What the cluster has recorded of it.
    recorded_state: String,
    answers: bool,
    zone: String,
    address: String,
    peer_address: String,
    http_address: String,
    version: String,
    /// Its share of replicas beside others.
    weight: f64,
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
    Column::text("STATE", |node| match node.state == "down" && node.recorded_state != "active" {
        true => format!("{}, down", node.recorded_state),
        false => node.state.clone(),
    }),
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
    Column::number("WEIGHT", |node: &NodeView| node.weight.to_string()).wide(),
    Column::text("PEER-ADDR", |node: &NodeView| node.peer_address.clone()).wide(),
    Column::text("HTTP-ADDR", |node: &NodeView| node.http_address.clone()).wide(),
];

fn said(node: &NodeView, cell: impl FnOnce(&Answer) -> String) -> String {
    node.answer.as_ref().map_or_else(|| "-".to_owned(), cell)
}

/// Runs it.
pub async fn run(command: Node, global: &Global, output: &Output) -> Result<(), Failure> {
    if !matches!(command, Node::Ls) {
        return leave::run(command, global, output).await;
    }
    let picture = Picture::of(global).await?;
    output.list("NodeList", COLUMNS, &views(&picture))
}

fn views(picture: &Picture) -> Vec<NodeView> {
    let view = |node: &coracle_client::topology::Node| {
        let status = picture.nodes.get(&node.id);
        let state = match status {
            None if !node.state.has_left() => NodeState::Down,
            _ => picture.state(node),
        };
        NodeView {
            id: node.id.0,
            state: state.to_string(),
            recorded_state: node.state.to_string(),
            answers: status.is_some(),
            zone: node.zone.clone(),
            address: node.address.clone(),
            peer_address: node.peer_address.clone(),
            http_address: node.http_address.clone(),
            version: node.version.clone(),
            weight: f64::from(node.weight) / 1_000.0,
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

#[cfg(test)]
mod tests {
    use super::super::health::tests::{map, statuses};
    use super::*;
    use crate::output::render;

    #[test]
    fn a_state_stands_beside_that_nobody_answers() {
        let mut map = map();
        let states = [
            NodeState::Active,
            NodeState::Draining,
            NodeState::Decommissioning,
            NodeState::Decommissioned,
            NodeState::Gone,
        ];
        for (node, state) in map.nodes.iter_mut().zip(states) {
            node.state = state;
        }
        let table = |answering: &[u64]| {
            let picture = Picture { map: map.clone(), nodes: statuses(&map, answering, 1) };
            let views = views(&picture);
            let rows = render(&COLUMNS[..2], &views, false, false);
            let words: Vec<String> = views.into_iter().map(|view| view.state).collect();
            (rows, words.join(" "))
        };
        let (rows, words) = table(&[1, 2, 3, 4]);
        assert_eq!(
            rows,
            "n1  active\nn2  draining\nn3  decommissioning\nn4  decommissioned\nn5  gone\n"
        );
        assert_eq!(words, "active draining decommissioning decommissioned gone");
        // Who has left is not down: nobody waits for it.
        let (rows, words) = table(&[]);
        let expected = "n1  down\nn2  draining, down\nn3  decommissioning, down\nn4  decommissioned\nn5  gone\n";
        assert_eq!(rows, expected);
        assert_eq!(words, "down down down decommissioned gone");
    }

    #[test]
    fn a_node_that_stops_drains_whatever_is_recorded() {
        let map = map();
        let mut nodes = statuses(&map, &[1, 2], 1);
        nodes.values_mut().for_each(|status| status.draining = true);
        let views = views(&Picture { map, nodes });
        assert_eq!(
            (views[0].state.as_str(), views[0].recorded_state.as_str()),
            ("draining", "active")
        );
    }
}

//! Owns plans of the balancer as files and as text: what `rebalance plan -o json` prints is what
//! `rebalance apply` reads. Asks nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use coracle_client::admin::{Plan, PlannedMove, PlannedNode, PlannedTransfer};
use coracle_client::{NodeId, ShardId};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::output::{Column, bytes, duration, render};

use super::operation::plural;

/// The kind of a plan's document.
pub const KIND: &str = "RebalancePlan";

/// More moves than these are told by pairs of nodes; all of them with `-o wide`.
const MOVES_SHOWN: usize = 12;

/// A plan, for machines.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanView {
    cluster_id: String,
    epoch: u64,
    moves: Vec<MoveView>,
    transfers: Vec<TransferView>,
    nodes: Vec<NodeView>,
    /// No plan to the same end needs fewer moves.
    moves_min: u32,
    bytes: u64,
    estimate_ms: u64,
    stalled: Vec<String>,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MoveView {
    shard: u64,
    /// Absent where a voter is lacking.
    from_node: Option<u64>,
    /// Absent where there is a voter too many.
    to_node: Option<u64>,
    bytes: u64,
}

/// A leadership that moves, for machines.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TransferView {
    shard: u64,
    from_node: Option<u64>,
    to_node: Option<u64>,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeView {
    node: u64,
    replicas_before: u32,
    replicas_after: u32,
    leaders_before: u32,
    leaders_after: u32,
    bytes_before: u64,
    bytes_after: u64,
    /// Keys a second, of the shards that it leads.
    #[serde(default)]
    load_before: u64,
    #[serde(default)]
    load_after: u64,
}

/// The envelope of every document, as it is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    kind: String,
    #[serde(flatten)]
    content: serde_json::Map<String, serde_json::Value>,
}

const NODE_COLUMNS: &[Column<PlannedNode>] = &[
    Column::text("NODE", |node| format!("n{}", node.node)),
    Column::number("REPLICAS", |node| {
        change(node.replicas_before, node.replicas_after, u32::to_string)
    }),
    Column::number("LEADERS", |node| {
        change(node.leaders_before, node.leaders_after, u32::to_string)
    }),
    Column::number("DATA", |node| change(node.bytes_before, node.bytes_after, |size| bytes(*size))),
    Column::number("KEYS/S", |node| change(node.load_before, node.load_after, u64::to_string)),
];

fn change<T: PartialEq>(before: T, after: T, text: impl Fn(&T) -> String) -> String {
    match before == after {
        true => text(&before),
        false => format!("{} → {}", text(&before), text(&after)),
    }
}

impl PlanView {
    /// Of a plan.
    pub fn of(plan: &Plan) -> PlanView {
        let id = |node: Option<NodeId>| node.map(|node| node.0);
        let step = |step: &PlannedMove| MoveView {
            shard: step.shard.0,
            from_node: id(step.from),
            to_node: id(step.to),
            bytes: step.bytes,
        };
        let node = |node: &PlannedNode| NodeView {
            node: node.node.0,
            replicas_before: node.replicas_before,
            replicas_after: node.replicas_after,
            leaders_before: node.leaders_before,
            leaders_after: node.leaders_after,
            bytes_before: node.bytes_before,
            bytes_after: node.bytes_after,
            load_before: node.load_before,
            load_after: node.load_after,
        };
        PlanView {
            cluster_id: plan.cluster_id.clone(),
            epoch: plan.epoch,
            moves: plan.moves.iter().map(step).collect(),
            transfers: plan.transfers.iter().map(TransferView::of).collect(),
            nodes: plan.nodes.iter().map(node).collect(),
            moves_min: plan.moves_min,
            bytes: plan.bytes,
            estimate_ms: plan.estimate.as_millis() as u64,
            stalled: plan.stalled.clone(),
        }
    }

    /// From what was printed.
    pub fn read(text: &[u8]) -> Result<PlanView, Failure> {
        let wrong = |why: String| {
            Failure::usage(format!("this is no plan: {why}"))
                .next("coracle rebalance plan -o json >plan.json makes one")
        };
        let read = serde_json::from_slice::<Document>(text);
        let document = read.map_err(|error| wrong(error.to_string()))?;
        if document.kind != KIND {
            return Err(wrong(format!("it is a {}", document.kind)));
        }
        let content = serde_json::Value::Object(document.content);
        serde_json::from_value(content).map_err(|error| wrong(error.to_string()))
    }

    /// The plan.
    pub fn plan(self) -> Plan {
        let id = |node: Option<u64>| node.map(NodeId);
        let step = |step: MoveView| PlannedMove {
            shard: ShardId(step.shard),
            from: id(step.from_node),
            to: id(step.to_node),
            bytes: step.bytes,
        };
        let transfer = |transfer: TransferView| PlannedTransfer {
            shard: ShardId(transfer.shard),
            from: id(transfer.from_node),
            to: id(transfer.to_node),
        };
        let node = |node: NodeView| PlannedNode {
            node: NodeId(node.node),
            replicas_before: node.replicas_before,
            replicas_after: node.replicas_after,
            leaders_before: node.leaders_before,
            leaders_after: node.leaders_after,
            bytes_before: node.bytes_before,
            bytes_after: node.bytes_after,
            load_before: node.load_before,
            load_after: node.load_after,
        };
        Plan {
            cluster_id: self.cluster_id,
            epoch: self.epoch,
            moves: self.moves.into_iter().map(step).collect(),
            transfers: self.transfers.into_iter().map(transfer).collect(),
            nodes: self.nodes.into_iter().map(node).collect(),
            moves_min: self.moves_min,
            bytes: self.bytes,
            estimate: Duration::from_millis(self.estimate_ms),
            stalled: self.stalled,
        }
    }
}

impl TransferView {
    /// Of a transfer.
    pub fn of(transfer: &PlannedTransfer) -> TransferView {
        TransferView {
            shard: transfer.shard.0,
            from_node: transfer.from.map(|node| node.0),
            to_node: transfer.to.map(|node| node.0),
        }
    }
}

/// A plan for people.
pub fn text(plan: &Plan, wide: bool) -> String {
    let mut lines = vec![heading(plan)];
    if wide || plan.moves.len() <= MOVES_SHOWN {
        lines.extend(plan.moves.iter().map(one_move));
    } else {
        lines.extend(pairs(plan));
    }
    let transfers = plan.transfers.iter().take(if wide { usize::MAX } else { MOVES_SHOWN });
    lines.extend(transfers.map(|transfer| {
        let way = way(transfer.from, transfer.to);
        format!("  shard {:<5} {way}  leadership", transfer.shard.0)
    }));
    let more = plan.transfers.len().saturating_sub(MOVES_SHOWN);
    if !wide && more > 0 {
        lines.push(format!("  and {more} more leaderships: -o wide"));
    }
    if !plan.is_empty() && !plan.nodes.is_empty() {
        lines.push(String::new());
        lines.push(render(NODE_COLUMNS, &plan.nodes, wide, true).trim_end().to_owned());
    }
    lines.extend(plan.stalled.iter().map(|why| format!("! stalled: {why}")));
    lines.join("\n")
}

fn heading(plan: &Plan) -> String {
    let epoch = plan.epoch;
    if plan.is_empty() {
        return match plan.stalled.is_empty() {
            true => format!("Nothing to move: replicas are as they should be (map epoch {epoch})"),
            false => format!("Nothing can be moved (map epoch {epoch})"),
        };
    }
    let moves = plural(plan.moves.len(), "replica move", "replica moves");
    let min = match plan.moves.len() as u32 > plan.moves_min {
        true => format!(" (at least {} are needed)", plan.moves_min),
        false => String::new(),
    };
    let leaders = plural(plan.transfers.len(), "leader move", "leader moves");
    let (size, time) = (bytes(plan.bytes), duration(plan.estimate));
    let spread = match (spread(plan, |it| it.replicas_before), spread(plan, |it| it.replicas_after))
    {
        (Some(before), Some(after)) => format!("; spread {before} % → {after} %"),
        _ => String::new(),
    };
    format!("Plan for map epoch {epoch}: {moves}{min}, {leaders}, {size}, about {time}{spread}")
}

fn one_move(step: &PlannedMove) -> String {
    format!("  shard {:<5} {}  {}", step.shard.0, way(step.from, step.to), bytes(step.bytes))
}

fn way(from: Option<NodeId>, to: Option<NodeId>) -> String {
    match (from, to) {
        (Some(from), Some(to)) => format!("n{from} → n{to}"),
        (None, Some(to)) => format!("new on n{to}"),
        (Some(from), None) => format!("off n{from}"),
        (None, None) => "nowhere".to_owned(),
    }
}

/// How many replicas go from which node to which.
fn pairs(plan: &Plan) -> Vec<String> {
    let mut pairs: BTreeMap<(Option<NodeId>, Option<NodeId>), (usize, u64)> = BTreeMap::new();
    for step in &plan.moves {
        let pair = pairs.entry((step.from, step.to)).or_default();
        *pair = (pair.0 + 1, pair.1 + step.bytes);
    }
    let mut lines = Vec::new();
    for ((from, to), (count, size)) in pairs {
        let replicas = plural(count, "replica", "replicas");
        lines.push(format!("  {}  {replicas}  {}", way(from, to), bytes(size)));
    }
    lines.push("  each of them: -o wide".to_owned());
    lines
}

/// How far the fullest node is from the emptiest, in percent of the mean.
fn spread(plan: &Plan, count: impl Fn(&PlannedNode) -> u32) -> Option<u64> {
    let counts: Vec<u64> = plan.nodes.iter().map(|node| u64::from(count(node))).collect();
    let (least, most) = (*counts.iter().min()?, *counts.iter().max()?);
    let all: u64 = counts.iter().sum();
    (all > 0).then(|| (100 * (most - least) * counts.len() as u64).div_ceil(all))
}

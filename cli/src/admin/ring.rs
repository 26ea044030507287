//! Owns the picture of the ring: the arcs clockwise from the top, each in the letter of the node that
//! leads it, and beneath them who holds what and what moves. A plain function of what is known, as
//! wide as it is told to be; plain text, so that it can be pasted anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::f64::consts::TAU;

use coracle_client::topology::{Replica, Shard};
use coracle_client::{ClusterMap, NodeId, ShardId};

/// Narrower than this there is no ring, only the table.
const RING_WIDTH_MIN: usize = 56;

/// What is said of a node or a move takes so much. Narrower terminals fold the lines.
const WIDTH_MIN: usize = 48;

/// A wider ring says no more.
const RING_WIDTH_MAX: usize = 72;

/// A character is about twice as high as it is wide.
const ASPECT: f64 = 0.45;

/// The letters of nodes, in the order of their ids. Beyond: `*`.
const LETTERS: &[u8] = b"123456789abcdefghijklmnopqrstuvwxyz";

/// What the picture is of.
pub struct Ring<'a> {
    /// The map.
    pub map: &'a ClusterMap,
    /// Who leads which shard, where anybody does.
    pub leaders: &'a BTreeMap<ShardId, NodeId>,
    /// The nodes that answer.
    pub answering: &'a BTreeSet<NodeId>,
}

/// The picture, `width` columns wide (but 48 at least); no end of line behind the last.
pub fn draw(ring: &Ring<'_>, width: usize) -> String {
    let width = width.max(WIDTH_MIN);
    let mut lines = Vec::new();
    if width >= RING_WIDTH_MIN && !arcs(ring.map).is_empty() {
        lines.extend(circle(ring, width.min(RING_WIDTH_MAX)));
        lines.push(String::new());
    }
    lines.extend(legend(ring, width));
    lines.push(String::new());
    lines.extend(table(ring, width));
    let moves = moves(ring.map);
    if !moves.is_empty() {
        lines.push(String::new());
        lines.extend(moves);
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

/// The shards that have arcs, in ring order.
fn arcs(map: &ClusterMap) -> Vec<&Shard> {
    let mut arcs: Vec<&Shard> = map.shards.iter().filter(|shard| shard.id != ShardId(0)).collect();
    arcs.sort_by_key(|shard| shard.start);
    arcs
}

/// Positions of the ring go up to 2^64.
fn share(position: u64) -> f64 {
    position as f64 / (u64::MAX as f64 + 1.0)
}

fn letter(map: &ClusterMap, node: NodeId) -> char {
    let mut ids: Vec<NodeId> = map.nodes.iter().map(|node| node.id).collect();
    ids.sort_unstable();
    let at = ids.iter().position(|id| *id == node);
    at.and_then(|at| LETTERS.get(at)).map_or('*', |letter| char::from(*letter))
}

struct Canvas {
    cells: Vec<Vec<char>>,
}

impl Canvas {
    fn put(&mut self, column: i64, row: i64, char: char) {
        let cell = usize::try_from(row).ok().and_then(|row| self.cells.get_mut(row));
        let cell = usize::try_from(column).ok().and_then(|column| cell?.get_mut(column));
        if let Some(cell) = cell {
            *cell = char;
        }
    }

    /// Writes a text where it touches nothing, or not at all.
    fn write(&mut self, column: i64, row: i64, text: &str) {
        let (Ok(row), Ok(column)) = (usize::try_from(row), usize::try_from(column)) else {
            return;
        };
        let length = text.chars().count();
        let around = column.saturating_sub(1)..column + length + 1;
        let Some(cells) = self.cells.get_mut(row) else {
            return;
        };
        let is_free = |at: usize| cells.get(at).is_none_or(|cell| *cell == ' ');
        if column + length > cells.len() || !around.clone().all(is_free) {
            return;
        }
        cells[column..column + length].iter_mut().zip(text.chars()).for_each(|(cell, char)| {
            *cell = char;
        });
    }
}

fn circle(ring: &Ring<'_>, width: usize) -> Vec<String> {
    let arcs = arcs(ring.map);
    let labels = arcs.iter().map(|shard| shard.id.to_string().len()).max().unwrap_or(1) + 2;
    // Room for a number on both sides.
    let across = (width.saturating_sub(2 * labels + 1) / 2) as f64;
    let up = (across * ASPECT).round();
    let (middle, centre) = (across + labels as f64, up + 1.0);
    let rows = 2 * (centre as usize) + 1;
    let mut canvas = Canvas { cells: vec![vec![' '; width]; rows] };
    let place = |turn: f64, by: f64| {
        let (sin, cos) = (turn * TAU).sin_cos();
        let column = middle + (across + 2.0 * by) * sin;
        let row = centre - (up + by) * cos;
        (column.round() as i64, row.round() as i64)
    };
    // More steps than cells: none is left out.
    let steps = 16 * width;
    for step in 0..steps {
        let turn = step as f64 / steps as f64;
        let at = arcs.partition_point(|shard| share(shard.start) <= turn).max(1) - 1;
        let leader = ring.leaders.get(&arcs[at].id);
        let (column, row) = place(turn, 0.0);
        canvas.put(column, row, leader.map_or('?', |node| letter(ring.map, *node)));
    }
    for shard in &arcs {
        let (column, row) = place(share(shard.start), 0.0);
        canvas.put(column, row, '+');
    }
    for (at, shard) in arcs.iter().enumerate() {
        let end = arcs.get(at + 1).map_or(1.0, |next| share(next.start));
        let turn = (share(shard.start) + end) / 2.0;
        let (column, row) = place(turn, 1.0);
        let text = shard.id.to_string();
        // A number on the left ends at its place, one on the right begins there.
        let length = text.len() as f64;
        let column = column as f64 - length * (1.0 - (turn * TAU).sin()) / 2.0 + 0.5;
        canvas.write(column.floor() as i64, row, &text);
    }
    let moving = moves(ring.map).len();
    let words = [
        format!("{} shards", arcs.len()),
        format!("map epoch {}", ring.map.epoch),
        match moving {
            0 => "nothing moves".to_owned(),
            1 => "1 replica moves".to_owned(),
            many => format!("{many} replicas move"),
        },
    ];
    for (line, text) in words.iter().enumerate() {
        let column = middle - text.len() as f64 / 2.0 + 0.5;
        canvas.write(column as i64, centre as i64 - 1 + line as i64, text);
    }
    canvas.cells.iter().map(|cells| cells.iter().collect()).collect()
}

/// Which letter is which node, and how it is.
fn legend(ring: &Ring<'_>, width: usize) -> Vec<String> {
    let mut nodes: Vec<_> = ring.map.nodes.iter().collect();
    nodes.sort_by_key(|node| node.id);
    let text = |node: &&coracle_client::topology::Node| {
        let led = ring.leaders.iter().filter(|(shard, _)| **shard != ShardId(0));
        let led = led.filter(|(_, leader)| **leader == node.id).count();
        let zone = match node.zone.as_str() {
            "" => String::new(),
            zone => format!(" zone {zone}"),
        };
        let state = match (ring.answering.contains(&node.id), node.state) {
            (true, coracle_client::topology::NodeState::Active) => String::new(),
            (true, state) => format!(", {state}"),
            (false, state) if state.has_left() => format!(", {state}"),
            (false, _) => ", does not answer".to_owned(),
        };
        format!("{} n{}{zone} leads {led}{state}", letter(ring.map, node.id), node.id)
    };
    flow(&nodes.iter().map(text).collect::<Vec<_>>(), width)
}

/// Several texts in a line, as many as fit.
fn flow(texts: &[String], width: usize) -> Vec<String> {
    let column = texts.iter().map(|text| text.chars().count()).max().unwrap_or(0) + 3;
    let in_a_line = (width / column).max(1);
    let line = |texts: &[String]| texts.iter().map(|text| format!("{text:<column$}")).collect();
    texts.chunks(in_a_line).map(line).collect()
}

/// Who holds what: a column for every node where they fit, else names.
fn table(ring: &Ring<'_>, width: usize) -> Vec<String> {
    let mut nodes: Vec<NodeId> = ring.map.nodes.iter().map(|node| node.id).collect();
    nodes.sort_unstable();
    let cell = nodes.last().map_or(0, |node| node.to_string().len()) + 3;
    let mut shards = vec![];
    shards.extend(ring.map.shards.iter().filter(|shard| shard.id == ShardId(0)));
    shards.extend(arcs(ring.map));
    let first = "SHARD   FROM              ";
    let is_wide = first.len() + nodes.len() * cell <= width;
    let mut lines = vec![match is_wide {
        true => {
            let names = nodes.iter().map(|node| format!("{:<cell$}", format!("n{node}")));
            format!("{first}{}", names.collect::<String>())
        }
        false => "SHARD   HELD BY".to_owned(),
    }];
    for shard in shards {
        let name = if shard.id == ShardId(0) { "0 meta".to_owned() } else { shard.id.to_string() };
        let from = match shard.id {
            ShardId(0) => "-".to_owned(),
            _ => format!("{:016x}", shard.start),
        };
        let mark = |node: NodeId| {
            let replica = shard.replicas.iter().find(|replica| replica.node == node);
            replica.map_or('.', |replica| mark(ring, shard, replica))
        };
        lines.push(match is_wide {
            true => {
                let marks = nodes.iter().map(|node| format!("{:<cell$}", mark(*node)));
                format!("{name:<6}  {from:<16}  {}", marks.collect::<String>())
            }
            false => {
                let held = nodes.iter().filter(|node| mark(**node) != '.');
                let held: Vec<String> =
                    held.map(|node| format!("{}n{node}", mark(*node))).collect();
                format!("{name:<6}  {}", held.join(" "))
            }
        });
    }
    let marks = ["L leads", "v votes", "r reads", "+ comes", "- goes", "! does not answer"];
    lines.push(String::new());
    lines.extend(flow(&marks.map(str::to_owned), width));
    lines
}

fn mark(ring: &Ring<'_>, shard: &Shard, replica: &Replica) -> char {
    match () {
        () if !ring.answering.contains(&replica.node) => '!',
        () if replica.joining || replica.becomes_voter => '+',
        () if goes(shard, replica) => '-',
        () if ring.leaders.get(&shard.id) == Some(&replica.node) => 'L',
        () if replica.voter => 'v',
        () => 'r',
    }
}

/// Whether a replica is to go.
fn goes(shard: &Shard, replica: &Replica) -> bool {
    replica.goes || shard.replicas.iter().any(|other| other.replaces == Some(replica.id))
}

/// What moves, by the map.
fn moves(map: &ClusterMap) -> Vec<String> {
    let mut lines = Vec::new();
    for shard in &map.shards {
        for replica in shard.replicas.iter().filter(|it| it.joining || it.becomes_voter) {
            let from = replica.replaces.and_then(|id| {
                shard.replicas.iter().find(|other| other.id == id).map(|other| other.node)
            });
            let what = match (from, replica.becomes_voter) {
                (Some(from), _) => format!("n{from} -> n{}", replica.node),
                (None, true) => format!("a voter comes to n{}", replica.node),
                (None, false) => format!("a read replica comes to n{}", replica.node),
            };
            let far = if replica.joining { "copying" } else { "about to vote" };
            lines.push(format!("shard {}: {what}, {far}", shard.id));
        }
        for replica in shard.replicas.iter().filter(|replica| replica.goes) {
            lines.push(format!("shard {}: the voter on n{} goes", shard.id, replica.node));
        }
    }
    lines
}

//! Nodes that come to rest and leave: `coracle node drain`, `undrain`, `decommission`, `gone`.

use std::io::{self, IsTerminal};
use std::time::Instant;

use coracle_client::admin::ClusterOperation;
use coracle_client::topology::{NodeState, Replica};
use coracle_client::{Client, ClusterMap, NodeId};
use serde::Serialize;

use crate::args::{Global, Node};
use crate::context::Target;
use crate::failure::{Exit, Failure};
use crate::output::{Output, bytes, duration};

use super::operation::{OperationView, begin_failure, now_ms, plural, view};
use super::rebalance::ask;
use super::wait::{Look, Words};
use super::{Picture, client, health, wait};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LeaveView {
    node: u64,
    state: String,
    /// What was begun; absent when nothing was to move.
    operation: Option<OperationView>,
}

#[derive(Serialize)]
struct WeightView {
    node: u64,
    /// Its share beside others.
    weight: f64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HoldView {
    node: u64,
    state: String,
    leaders: usize,
    voters: usize,
    learners: usize,
    state_bytes: u64,
}

/// Runs it.
pub async fn run(command: Node, global: &Global, output: &Output) -> Result<(), Failure> {
    let (target, client) = client(global).await?;
    match command {
        Node::Ls => Ok(()),
        Node::Weight { node, weight } => {
            let set = client.admin().set_node_weight(node, weight).await;
            let what = format!("give n{node} another weight");
            let set = set.map_err(|error| begin_failure(what, &error))?;
            let view = WeightView { node: node.0, weight: f64::from(set.weight) / 1_000.0 };
            output.item("NodeWeight", &view, || {
                format!("n{node} counts as {} nodes. Next: coracle rebalance plan", view.weight)
            })
        }
        Node::Drain { node, wait } => drain(&client, node, wait, global, output).await,
        Node::Undrain { node } => {
            let set = client.admin().undrain(node).await;
            let set = set.map_err(|error| begin_failure(format!("undrain n{node}"), &error))?;
            output.item("Node", &leave_view(node, set.state, None), || {
                format!("n{node} is {} again. Next: coracle rebalance plan", set.state)
            })
        }
        Node::Decommission { node, dry_run: true, .. } => {
            would_leave(&Picture::take(&client).await?, node, output)
        }
        Node::Decommission { node, wait, .. } => {
            let begun = client.admin().decommission(node).await;
            let what = format!("decommission n{node}");
            let (set, operation) = begun.map_err(|error| begin_failure(what, &error))?;
            leave(&client, (node, set.state, operation), wait, global, output).await
        }
        Node::Gone { node, yes_i_mean, wait } => {
            let said = yes_i_mean.as_deref();
            gone(&target, &client, node, said, wait, global, output).await
        }
    }
}

fn leave_view(node: NodeId, state: NodeState, begun: Option<&ClusterOperation>) -> LeaveView {
    let operation = begun.map(|begun| view(begun, now_ms()));
    LeaveView { node: node.0, state: state.to_string(), operation }
}

async fn drain(
    client: &Client,
    node: NodeId,
    wait: bool,
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let began = Instant::now();
    let before = match wait {
        true => led(&Picture::take(client).await?, node),
        false => 0,
    };
    let set = client.admin().drain(node).await;
    let set = set.map_err(|error| begin_failure(format!("drain n{node}"), &error))?;
    let view = leave_view(node, set.state, None);
    if !wait {
        return output.item("Node", &view, || {
            format!("n{node} gives its leaderships away. Next: coracle node ls, coracle node undrain n{node}")
        });
    }
    let words = Words {
        what: format!("draining n{node}"),
        back: format!(
            "coracle node drain n{node} --wait comes back to it, coracle node undrain n{node} ends it"
        ),
    };
    wait::until(&words, global, output, async || {
        let picture = Picture::take(client).await?;
        Ok(match led(&picture, node) {
            0 => Look::Done(()),
            left => Look::NotYet(plural(left, "leader left", "leaders left")),
        })
    })
    .await?;
    output.item("Node", &view, || {
        let (moved, took) = (plural(before, "leader", "leaders"), duration(began.elapsed()));
        format!("Draining n{node}: {moved} moved, 0 left ({took}). Next: coracle node decommission n{node}, or coracle node undrain n{node}")
    })
}

/// How many shards a node leads, by its own word and the others'.
fn led(picture: &Picture, node: NodeId) -> usize {
    let leads = |shard: &&coracle_client::topology::Shard| {
        health::leader(shard, &picture.nodes) == Some(node)
    };
    picture.map.shards.iter().filter(leads).count()
}

fn would_leave(picture: &Picture, node: NodeId, output: &Output) -> Result<(), Failure> {
    let known = picture.map.node(node).ok_or_else(|| unknown(node))?;
    let replicas = picture.map.shards.iter().flat_map(|shard| &shard.replicas);
    let here = replicas.filter(|replica| replica.node == node).copied();
    let (voters, learners): (Vec<Replica>, Vec<Replica>) = here.partition(|replica| replica.voter);
    let status = picture.nodes.get(&node);
    let groups = status.map(|status| status.groups.as_slice()).unwrap_or_default();
    let view = HoldView {
        node: node.0,
        state: known.state.to_string(),
        leaders: led(picture, node),
        voters: voters.len(),
        learners: learners.len(),
        state_bytes: groups.iter().map(|group| group.state_bytes).sum(),
    };
    output.item("NodeHolds", &view, || {
        let HoldView { leaders, voters, learners, state_bytes, .. } = &view;
        format!(
            "n{node} would give away {voters} voters and {learners} read replicas ({}), and lead {leaders} shards no more",
            bytes(*state_bytes)
        )
    })
}

fn unknown(node: NodeId) -> Failure {
    Failure::failed(format!("there is no node n{node}")).next("coracle node ls")
}

/// Says what was begun, and waits until the node holds nothing where that is wanted.
async fn leave(
    client: &Client,
    (node, state, begun): (NodeId, NodeState, Option<ClusterOperation>),
    wait: bool,
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let view = leave_view(node, state, begun.as_ref());
    if !wait {
        return output.item("Node", &view, || match &begun {
            _ if state == NodeState::Decommissioned => safe(node),
            Some(begun) => format!(
                "n{node} is {state}: operation {} has {}. Next: coracle operation watch {}, and wait for it before you stop n{node}",
                begun.id,
                plural(begun.moves_all, "move", "moves"),
                begun.id
            ),
            None => format!("n{node} is {state}. Next: coracle node ls"),
        });
    }
    if let Some(begun) = &begun {
        wait::operation(client, begun.id, global, output, |_| Ok(())).await?;
    }
    let words = Words {
        what: format!("decommissioning n{node}"),
        back: format!(
            "coracle node decommission n{node} --wait comes back to it, coracle node undrain n{node} takes it back"
        ),
    };
    wait::until(&words, global, output, async || {
        let picture = Picture::take(client).await?;
        let known = picture.map.node(node).ok_or_else(|| unknown(node))?;
        if known.state == NodeState::Active {
            let failure = Failure::new(Exit::Precondition, format!("n{node} is active again"));
            return Err(failure.next("somebody took it back: coracle node ls"));
        }
        Ok(match held(&picture, node) {
            0 if known.state == NodeState::Decommissioned => Look::Done(()),
            0 => Look::NotYet(format!("holds nothing, still {}", known.state)),
            left => Look::NotYet(plural(left, "replica left", "replicas left")),
        })
    })
    .await?;
    let view = leave_view(node, NodeState::Decommissioned, None);
    output.item("Node", &view, || safe(node))
}

fn safe(node: NodeId) -> String {
    format!("n{node} holds no data; safe to stop")
}

/// How many replicas a node holds, by the map and by its own word.
fn held(picture: &Picture, node: NodeId) -> usize {
    let replicas = picture.map.shards.iter().flat_map(|shard| &shard.replicas);
    let mapped = replicas.filter(|replica| replica.node == node).count();
    mapped.max(picture.nodes.get(&node).map_or(0, |status| status.groups.len()))
}

async fn gone(
    target: &Target,
    client: &Client,
    node: NodeId,
    said: Option<&str>,
    wait: bool,
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let picture = Picture::take(client).await?;
    if picture.map.node(node).is_none() {
        return Err(unknown(node));
    }
    if picture.nodes.contains_key(&node) {
        let failure = Failure::new(Exit::Precondition, format!("n{node} answers: it is not lost"));
        return Err(failure.next(format!("to have it leave: coracle node decommission n{node}")));
    }
    let lost = lost_without(&picture.map, &picture, node);
    if !lost.is_empty() {
        output.note(&format!(
            "warning: without n{node} no majority is left of shards {}",
            lost.join(", ")
        ));
    }
    confirm(target, &picture.map.cluster_id, node, said, output).await?;
    let set = client.admin().mark_gone(node).await;
    let what = format!("give n{node} up");
    let (set, operation) = set.map_err(|error| begin_failure(what, &error))?;
    if let Some(begun) = operation.as_ref().filter(|_| wait) {
        let ended = wait::operation(client, begun.id, global, output, |_| Ok(())).await?;
        let view = leave_view(node, set.state, Some(&ended));
        return output.item("Node", &view, || {
            format!("n{node} is gone, and its {} replicas are made elsewhere", ended.moves_done)
        });
    }
    output.item("Node", &leave_view(node, set.state, operation.as_ref()), || match &operation {
        Some(begun) => format!(
            "n{node} is gone: operation {} makes its replicas elsewhere. Next: coracle operation watch {}",
            begun.id, begun.id
        ),
        None => format!("n{node} is gone; it held nothing"),
    })
}

/// Shards that have no majority among the nodes that answer.
fn lost_without(map: &ClusterMap, picture: &Picture, node: NodeId) -> Vec<String> {
    let lost = map.shards.iter().filter(|shard| {
        let voters: Vec<NodeId> = health::voters(shard).collect();
        let live = voters.iter().filter(|voter| picture.nodes.contains_key(voter)).count();
        voters.contains(&node) && live <= voters.len() / 2
    });
    lost.map(|shard| shard.id.to_string()).collect()
}

/// What is lost is named by whoever loses it: the cluster's name, typed or said.
async fn confirm(
    target: &Target,
    cluster_id: &str,
    node: NodeId,
    said: Option<&str>,
    output: &Output,
) -> Result<(), Failure> {
    let name = target.context.as_deref().unwrap_or(cluster_id);
    let is_it = |text: &str| text == name || text == cluster_id;
    let nothing = |what: &str| {
        Failure::usage(format!("nothing was done: {what} is not the cluster's name"))
            .next(format!("this is {name}: {}", target.describe()))
    };
    if let Some(said) = said {
        return if is_it(said) { Ok(()) } else { Err(nothing(said)) };
    }
    let what = format!("this gives n{node} up for good: what only it held is lost");
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::usage(what).next(format!("say --yes-i-mean {name}")));
    }
    let answer = ask(&format!("{what}. Type {name} to go on:"), output).await?;
    if is_it(&answer) { Ok(()) } else { Err(nothing(&answer)) }
}

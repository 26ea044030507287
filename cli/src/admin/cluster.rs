//! `coracle init` and `coracle status`.

use std::time::{Duration, Instant};

use coracle_client::admin::{ClusterOperation, Init};
use coracle_client::{Error, Outcome};
use serde::Serialize;

use crate::args::{self, Global};
use crate::context::{Environment, TIMEOUT_DEFAULT, resolve};
use crate::failure::{Exit, Failure};
use crate::output::{Output, bytes};

use super::health::Health;
use super::operation::{OperationView, now_ms, plural, progress, view as operation_view};
use super::{Picture, STATUS_TIMEOUT, client};

/// Between two attempts to reach a server that is starting.
const STARTING_PAUSE: Duration = Duration::from_millis(200);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct InitView {
    cluster_id: String,
    shards: u32,
    replicas: u32,
    warnings: Vec<String>,
}

/// Makes a cluster.
pub async fn init(init: args::Init, global: &Global, output: &Output) -> Result<(), Failure> {
    let target = resolve(global, &Environment::read())?;
    let client = target.client_lazy(global)?;
    let args::Init { nodes, shards, replicas } = init;
    let until = Instant::now() + global.timeout.unwrap_or(TIMEOUT_DEFAULT);
    let made = loop {
        let made = client.admin().init(Init { shards, replicas, nodes }).await;
        match &made {
            Err(error) if is_starting(error) && Instant::now() < until => {
                tokio::time::sleep(STARTING_PAUSE).await;
            }
            _ => break made,
        }
    };
    let made = made.map_err(|error| {
        let failure = Failure::call("make the cluster", &error);
        match error.reason() {
            Some("ALREADY_INITIALIZED") => failure.next("nothing to do: coracle status"),
            _ => failure,
        }
    })?;
    for warning in &made.warnings {
        output.note(&format!("warning: {warning}"));
    }
    let view = InitView {
        cluster_id: made.cluster_id,
        shards: made.shards,
        replicas: made.replicas,
        warnings: made.warnings,
    };
    output.item("Cluster", &view, || {
        let InitView { cluster_id, shards, replicas, .. } = &view;
        format!("cluster {cluster_id}: {shards} shards × {replicas} replicas. Next: coracle status")
    })
}

/// Nobody listens there yet: whoever starts servers runs `init` right behind.
fn is_starting(error: &Error) -> bool {
    error.reason() == Some("UNREACHABLE") && error.outcome() == Outcome::NotApplied
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatusView {
    cluster_id: String,
    map_epoch: u64,
    nodes: usize,
    nodes_answering: usize,
    shards: usize,
    /// Of all shards.
    read_replicas: usize,
    keyspaces: usize,
    state_bytes: u64,
    log_bytes: u64,
    /// Operations under way; absent where nobody could be asked.
    operations: Option<Vec<OperationView>>,
    #[serde(skip)]
    moving: Vec<String>,
    #[serde(flatten)]
    health: Health,
}

/// How the cluster is. Exit code 4 when some keys are not served.
pub async fn status(global: &Global, output: &Output) -> Result<(), Failure> {
    let (_, client) = client(global).await?;
    let Picture { map, nodes } = Picture::take(&client).await?;
    // Without the meta group nobody knows: that is no reason to say less of the rest.
    let list = tokio::time::timeout(STATUS_TIMEOUT, client.admin().operations()).await;
    let list = list.ok().and_then(Result::ok).map(|list| list.operations);
    let open: Option<Vec<ClusterOperation>> =
        list.map(|list| list.into_iter().filter(|operation| !operation.has_ended()).collect());
    let now = now_ms();
    let health = Health::of(&map, &nodes);
    let groups = nodes.values().flat_map(|status| &status.groups);
    let replicas = map.shards.iter().flat_map(|shard| &shard.replicas);
    let learners = replicas.filter(|replica| !replica.voter).count();
    let view = StatusView {
        nodes: map.nodes.len(),
        nodes_answering: nodes.len(),
        // The meta group is none that holds keys.
        shards: map.shards.len().saturating_sub(1),
        read_replicas: learners,
        keyspaces: map.keyspaces.len(),
        state_bytes: groups.map(|group| group.state_bytes).sum(),
        log_bytes: nodes.values().map(|status| status.log_bytes).sum(),
        moving: open.iter().flatten().map(|open| moving(open, now)).collect(),
        operations: open.map(|open| open.iter().map(|open| operation_view(open, now)).collect()),
        cluster_id: map.cluster_id,
        map_epoch: map.epoch,
        health,
    };
    output.item("ClusterStatus", &view, || text(&view))?;
    match view.health.is_available() {
        true => Ok(()),
        false => Err(Failure::new(Exit::Unhealthy, "some keys are not served").next(
            "coracle node ls and coracle shard ls show which; start the nodes that are down",
        )),
    }
}

fn moving(open: &ClusterOperation, now: u64) -> String {
    let node = open.node.map_or_else(String::new, |node| format!(" of n{node}"));
    format!("operation {} ({}{node}): {}", open.id, open.kind, progress(open, now))
}

fn text(view: &StatusView) -> String {
    let mut lines = vec![
        view.health.sentence(),
        String::new(),
        format!("cluster    {}  (map epoch {})", view.cluster_id, view.map_epoch),
        format!("nodes      {} of {} answer", view.nodes_answering, view.nodes),
        match view.read_replicas {
            0 => format!("shards     {}", view.shards),
            learners => format!("shards     {}, {learners} read replicas", view.shards),
        },
        format!("keyspaces  {}", view.keyspaces),
        format!("data       {}, log {}", bytes(view.state_bytes), bytes(view.log_bytes)),
    ];
    let names = |ids: &[u64]| ids.iter().map(|id| format!("n{id}")).collect::<Vec<_>>().join(", ");
    if !view.health.draining_nodes.is_empty() {
        lines.push(format!("draining   {}", names(&view.health.draining_nodes)));
    }
    if !view.health.decommissioning_nodes.is_empty() {
        let leaving = names(&view.health.decommissioning_nodes);
        lines.push(format!("leaving    {leaving}: do not stop before decommissioned"));
    }
    match view.health.joining_replicas {
        0 => {}
        many => {
            lines.push(format!("moving     {}", plural(many, "replica comes", "replicas come")))
        }
    }
    lines.extend(view.moving.iter().map(|text| format!("moving     {text}")));
    let problems = view.health.problems();
    if !problems.is_empty() {
        lines.push(String::new());
        lines.extend(problems.iter().map(|problem| format!("! {problem}")));
    }
    lines.join("\n")
}

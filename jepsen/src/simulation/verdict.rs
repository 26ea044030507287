//! What must hold when all faults have ended: the cluster serves, everything acknowledged is there,
//! replicas agree. Owns the bounds within which. The history is judged by its checkers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_client::admin::{BalancingChange, ClusterOperation, Control, OperationState};
use coracle_client::topology::NodeState;
use coracle_client::{Client, Error};
use coracle_raft::leadership::Standing;

use super::{Run, until};
use crate::cluster::sim::Cluster;
use crate::history::{Action, Answer, History, Kind};
use crate::invariant::{arcs_tile, replicas_agree};

/// What was asked of read replicas last is made true: a few snapshots, one after the other, and what
/// came late is noticed.
const REPLICAS_WITHIN: Duration = Duration::from_secs(60);

/// Embargo, campaigns, and some bad luck with them.
const LEADERS_WITHIN: Duration = Duration::from_secs(20);

/// Then calls are answered; one may still meet a leader that has just changed.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// And followers that were away have caught up, by a snapshot if need be.
const AGREEMENT_WITHIN: Duration = Duration::from_secs(30);

/// Keys among which one of every shard is looked for: a split may leave it a sliver of the ring.
const PROBES_MAX: u64 = 100_000;

/// The id of the keyspace that the load works on.
const DEFAULT_KEYSPACE: u32 = 1;

/// Looks at a cluster whose faults have ended; takes down in the run what does not hold.
pub(super) async fn check(run: &mut Run) {
    // Of replicas that are about to go, leaders need not be known.
    settle_replicas(run).await;
    if !until(LEADERS_WITHIN, || without_leader(&run.cluster).is_empty()).await {
        let lacking = without_leader(&run.cluster).join("; ");
        run.violations.push(format!("every group has one leader again: {lacking}"));
        return;
    }
    run.watch.borrow_mut().look(&run.cluster);
    run.trace.event(format_args!("every group has a leader"));
    serve(run).await;
    let revision = u64::from(run.history_ms.is_some());
    if !until(AGREEMENT_WITHIN, || without_settings(&run.cluster, revision).is_empty()).await {
        let lacking = without_settings(&run.cluster, revision).join("; ");
        run.violations.push(format!("every replica has its keyspaces' settings: {lacking}"));
    }
    run.violations.extend(replicas_agree::check(&run.cluster, AGREEMENT_WITHIN).await);
    for at in 0..run.cluster.len() {
        if let Some(why) = run.cluster.why_stopped(at) {
            run.violations.push(format!("n{} stopped after all faults ended: {why}", at + 1));
        }
        let status = run.cluster.node(at).map(|node| node.status());
        for damaged in status.into_iter().flat_map(|status| status.recovering) {
            run.violations.push(format!("n{} takes for damage what none was: {damaged}", at + 1));
        }
    }
    run.violations.extend(arcs_tile::check(&run.cluster));
    let history = run.recorder.history();
    run.violations.extend(lost(&history));
}

/// Ends what operators had begun, and begins nothing more: nodes are drained no longer, what was paused
/// goes on, and nothing moves for balance.
async fn settle_operations(client: &Client) -> String {
    let asked = async {
        let admin = client.admin();
        let manual = BalancingChange { automatic: Some(false), ..Default::default() };
        admin.set_balancing(manual).await?;
        for node in admin.map().await?.nodes {
            if node.state != NodeState::Active {
                admin.undrain(node.id).await?;
            }
        }
        let operations = admin.operations().await?.operations;
        for operation in operations.iter().filter(|operation| !operation.has_ended()) {
            if operation.state == OperationState::Paused {
                admin.control(Some(operation.id), Control::Resume).await?;
            }
        }
        let open = |operation: &&ClusterOperation| !operation.has_ended();
        Ok(operations.iter().filter(open).map(|open| format!("{open:?}")).collect())
    };
    let open: Result<Vec<String>, Error> = asked.await;
    open.map_or_else(|error| format!("nobody knows: {error}"), |open| open.join("; "))
}

/// Waits until every replica that the map has is there, and no other: none joins, none is left over.
async fn settle_replicas(run: &mut Run) {
    let client = match run.cluster.client("replicas").connect_lazy() {
        Ok(client) => client,
        Err(error) => return run.violations.push(format!("a client: {error}")),
    };
    let deadline = tokio::time::Instant::now() + REPLICAS_WITHIN;
    loop {
        let open = settle_operations(&client).await;
        if open.is_empty() {
            break;
        }
        if tokio::time::Instant::now() >= deadline {
            run.violations.push(format!("every operation ends: {open}"));
            return client.close().await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let different = loop {
        let different = match client.admin().replicas().await {
            Ok(replicas) => misplaced(&run.cluster, &replicas),
            Err(error) => format!("nobody knows: {error}"),
        };
        if different.is_empty() || tokio::time::Instant::now() >= deadline {
            break different;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    if !different.is_empty() {
        run.violations
            .push(format!("replicas are where the map says, and only there: {different}"));
    }
    client.close().await;
}

fn misplaced(cluster: &Cluster, replicas: &coracle_client::admin::Replicas) -> String {
    let wanted: BTreeSet<(u64, u64, u64)> = replicas
        .places
        .iter()
        .map(|place| (place.shard.0, place.replica.0, place.node.0))
        .collect();
    let mut there = BTreeSet::new();
    for at in 0..cluster.len() {
        let node = cluster.node(at);
        let id = node.as_ref().and_then(|node| node.status().node).map_or(0, |node| node.id);
        for group in node.and_then(|node| node.host()).iter().flat_map(|host| host.groups()) {
            there.insert((group.shard().0, group.replica().0, id));
        }
    }
    let joining = replicas.places.iter().filter(|place| place.joining).count();
    let (missing, over): (Vec<_>, Vec<_>) =
        (wanted.difference(&there).collect(), there.difference(&wanted).collect());
    match (missing.is_empty(), over.is_empty(), joining) {
        (true, true, 0) => String::new(),
        _ => format!("missing {missing:?}, left over {over:?}, {joining} joining"),
    }
}

/// Groups that not every node takes to be led by the same one.
fn without_leader(cluster: &Cluster) -> Vec<String> {
    let mut leaders: BTreeMap<u64, BTreeSet<Option<u64>>> = BTreeMap::new();
    let mut leading: BTreeMap<u64, u64> = BTreeMap::new();
    let mut lacking = Vec::new();
    for at in 0..cluster.len() {
        let Some(host) = cluster.node(at).and_then(|node| node.host()) else {
            lacking.push(format!("n{} does not run", at + 1));
            continue;
        };
        for group in host.groups() {
            let (shard, status) = (group.shard().0, group.status());
            if let Some(why) = &status.failed {
                lacking.push(format!("shard {shard} on n{} has failed: {why}", at + 1));
            }
            leaders.entry(shard).or_default().insert(status.leader.map(|node| node.0));
            *leading.entry(shard).or_default() += u64::from(status.state == Standing::Leader);
        }
    }
    for (shard, known) in leaders {
        if leading[&shard] != 1 || known.len() != 1 || known.contains(&None) {
            let leading = leading[&shard];
            lacking.push(format!("shard {shard}: {leading} lead, known leaders are {known:?}"));
        }
    }
    lacking
}

/// Replicas that do not have the settings of the keyspace: of this revision.
fn without_settings(cluster: &Cluster, revision: u64) -> Vec<String> {
    let mut lacking = Vec::new();
    for at in 0..cluster.len() {
        let host = cluster.node(at).and_then(|node| node.host());
        for group in host.iter().flat_map(|host| host.groups()) {
            let (shard, has) = (group.shard().0, group.settings_revision(DEFAULT_KEYSPACE));
            if shard != 0 && has != revision {
                lacking.push(format!("shard {shard} on n{} has revision {has}", at + 1));
            }
        }
    }
    lacking
}

/// Reads every key, and writes to every shard, as a client that comes new.
async fn serve(run: &mut Run) {
    let mut worker = match run.worker(run.clients + 1) {
        Ok(worker) => worker,
        Err(why) => return run.violations.push(why),
    };
    let served = tokio::time::timeout(ANSWERS_WITHIN, async {
        while !worker.read_all().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let map = worker.client.admin().cached_map();
        let mut missing: BTreeSet<u64> = map.shards.iter().map(|shard| shard.id.0).collect();
        // The meta group holds no keys of clients.
        missing.remove(&0);
        let ring = (0..run.cluster.len()).find_map(|at| run.cluster.node(at)?.map());
        let Some(ring) = ring else { return missing };
        let keyspace = ring.keyspace("default").expect("it is made with the cluster");
        for probe in 0..PROBES_MAX {
            let (key, value) = (format!("probe-{probe}"), format!("probe-{probe}"));
            if !missing.contains(&ring.locate_key(keyspace, key.as_bytes()).id.0) {
                continue;
            }
            if !worker.perform(&key, Action::Put { value }).await {
                return missing;
            }
            let last = worker.recorder.last().and_then(|event| event.answer);
            if let Some(Answer::Written { at, .. }) = last {
                missing.remove(&at.shard);
            }
            if missing.is_empty() {
                break;
            }
        }
        missing
    });
    match served.await {
        Ok(missing) if missing.is_empty() => {}
        Ok(missing) => {
            run.violations.push(format!("every shard serves again, but not {missing:?}"))
        }
        Err(_) => run.violations.push("every key can be read again, but not in time".to_owned()),
    }
    let closed = worker.client.close();
    if tokio::time::timeout(ANSWERS_WITHIN, closed).await.is_err() {
        run.violations.push("a client ends when it is closed".to_owned());
    }
}

/// The acknowledged writes: key and version.
pub(super) fn acknowledged(history: &History) -> impl Iterator<Item = (&str, u64)> {
    history.events.iter().filter_map(|event| match (&event.kind, &event.answer) {
        (Kind::Ok, Some(Answer::Written { version, .. })) => Some((event.key.as_str(), *version)),
        _ => None,
    })
}

/// Keys whose last read is older than an acknowledged write. The checkers find the same; this says it
/// in the words in which it was promised.
fn lost(history: &History) -> Vec<String> {
    let mut newest: BTreeMap<&str, u64> = BTreeMap::new();
    for (key, version) in acknowledged(history) {
        let newest = newest.entry(key).or_default();
        *newest = version.max(*newest);
    }
    let mut read: BTreeMap<&str, Option<u64>> = BTreeMap::new();
    for event in &history.events {
        let past = matches!(event.action, Action::GetAt { .. });
        if let (Kind::Ok, Some(Answer::Read { seen, .. }), false) =
            (event.kind, &event.answer, past)
        {
            read.insert(&event.key, seen.as_ref().map(|seen| seen.version));
        }
    }
    let mut lost = Vec::new();
    for (key, newest) in newest {
        if let Some(Some(version)) = read.get(key).filter(|version| **version < Some(newest)) {
            lost.push(format!(
                "an acknowledged write is kept: {key} was acknowledged at {newest}, and is read at \
                 {version}"
            ));
        }
    }
    lost
}

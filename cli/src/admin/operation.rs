//! `coracle operation`, and operations as every command shows them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coracle_client::Client;
use coracle_client::admin::{
    ClusterOperation, Control, OperationId, OperationMove, OperationState,
};
use serde::Serialize;

use crate::args::{Global, Operation, Which};
use crate::failure::{Exit, Failure};
use crate::output::{Column, Output, bytes, duration};

use super::plan::TransferView;
use super::{client, wait};

/// An operation, for machines.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OperationView {
    id: u64,
    /// rebalance, move, decommission, repair, balance, undo, split, merge.
    kind: String,
    /// pending, running, paused, done, cancelled, failed.
    state: String,
    cancelling: bool,
    moves_done: usize,
    moves_all: usize,
    /// Of the moves that are remembered.
    bytes_done: u64,
    bytes_all: u64,
    began_ms: u64,
    ended_ms: Option<u64>,
    /// How much longer, by what it took so far; absent where that says nothing.
    estimate_ms: Option<u64>,
    node: Option<u64>,
    message: String,
    undoes: Option<u64>,
    /// Of a split.
    split: Option<SplitView>,
    /// Of a merge.
    merge: Option<MergeView>,
    moves: Vec<MoveView>,
    transfers: Vec<TransferView>,
}

#[derive(Serialize)]
struct SplitView {
    shard: u64,
    /// The first position of the new shard, as 16 hex digits.
    at: String,
    /// plan, split, done.
    step: String,
    /// The new shard, once it has an id.
    child: Option<u64>,
    automatic: bool,
}

#[derive(Serialize)]
struct MergeView {
    left: u64,
    right: u64,
    /// gather, prepare, freeze, absorb, flush, end, cancel, done.
    step: String,
    /// How often it was cancelled by itself, to be tried again.
    attempts: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MoveView {
    shard: u64,
    from_node: Option<u64>,
    from_replica: Option<u64>,
    to_node: Option<u64>,
    to_replica: Option<u64>,
    bytes: u64,
    state: String,
    message: String,
    attempts: u32,
}

/// Operations as a table.
pub const COLUMNS: &[Column<OperationView>] = &[
    Column::number("ID", |operation| operation.id.to_string()),
    Column::text("KIND", |operation| match (operation.node, &operation.split, &operation.merge) {
        (Some(node), _, _) => format!("{} n{node}", operation.kind),
        (_, Some(split), _) => format!("{} {}", operation.kind, split.shard),
        (_, _, Some(merge)) => format!("{} {} {}", operation.kind, merge.left, merge.right),
        _ => operation.kind.clone(),
    }),
    Column::text("STATE", |operation| match operation.cancelling {
        true if operation.ended_ms.is_none() => "cancelling".to_owned(),
        _ => operation.state.clone(),
    }),
    Column::number("MOVES", |operation| {
        format!("{}/{}", operation.moves_done, operation.moves_all)
    }),
    Column::number("DATA", |operation| match operation.bytes_all {
        0 => "-".to_owned(),
        all => bytes(all),
    }),
    Column::number("TOOK", |operation| {
        let ended = operation.ended_ms.map(|ended| ended.saturating_sub(operation.began_ms));
        ended.map_or_else(|| "-".to_owned(), |ms| duration(Duration::from_millis(ms)))
    }),
    Column::number("LEFT", |operation| {
        let left = operation.estimate_ms.map(|ms| duration(Duration::from_millis(ms)));
        left.map_or_else(|| "-".to_owned(), |left| format!("about {left}"))
    }),
    Column::text("MESSAGE", |operation| operation.message.clone()),
];

/// Runs it.
pub async fn run(command: Operation, global: &Global, output: &Output) -> Result<(), Failure> {
    let (_, client) = client(global).await?;
    match command {
        Operation::Ls => {
            let list = client.admin().operations().await;
            let list = list.map_err(|error| Failure::call("list the operations", &error))?;
            let now = now_ms();
            let views: Vec<_> = list.operations.iter().map(|it| view(it, now)).collect();
            output.list("OperationList", COLUMNS, &views)
        }
        Operation::Watch(which) => watch(&client, which, global, output).await,
        Operation::Cancel(which) => control(&client, which, Control::Cancel, output).await,
    }
}

/// Pauses, resumes or cancels an operation, and says so.
pub async fn control(
    client: &Client,
    which: Which,
    control: Control,
    output: &Output,
) -> Result<(), Failure> {
    let operation = controlled(client, which, control).await?;
    output.item("Operation", &view(&operation, now_ms()), || {
        let id = operation.id;
        match control {
            Control::Pause => format!(
                "operation {id} is paused: what was begun is finished. Next: coracle rebalance resume {id}"
            ),
            Control::Resume => {
                format!("operation {id} goes on. Next: coracle operation watch {id}")
            }
            Control::Cancel if operation.has_ended() => format!("operation {id} is cancelled"),
            Control::Cancel => format!(
                "operation {id} is given up: what is half done is taken back. Next: coracle operation watch {id}"
            ),
            Control::Undo => begun(&operation),
        }
    })
}

/// Asks for it.
pub async fn controlled(
    client: &Client,
    which: Which,
    control: Control,
) -> Result<ClusterOperation, Failure> {
    let verb = match control {
        Control::Pause => "pause",
        Control::Resume => "resume",
        Control::Cancel => "cancel",
        Control::Undo => "undo",
    };
    let what = match which.operation {
        Some(id) => format!("{verb} operation {id}"),
        None => format!("{verb} an operation"),
    };
    let done = client.admin().control(which.operation, control).await;
    done.map_err(|error| begin_failure(what, &error))
}

async fn watch(
    client: &Client,
    which: Which,
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let id = match which.operation {
        Some(id) => id,
        None => only_one(client).await?,
    };
    let ended = wait::operation(client, id, global, output, |operation| match output.format() {
        crate::args::Format::Jsonl => {
            output.json_line(&view(operation, now_ms())).and_then(|()| output.flush())
        }
        _ => Ok(()),
    });
    let ended = ended.await?;
    match output.format() {
        crate::args::Format::Jsonl => Ok(()),
        _ => output.item("Operation", &view(&ended, now_ms()), || done(&ended)),
    }
}

async fn only_one(client: &Client) -> Result<OperationId, Failure> {
    let list = client.admin().operations().await;
    let list = list.map_err(|error| Failure::call("list the operations", &error))?.operations;
    let mut open = list.iter().filter(|operation| !operation.has_ended());
    match (open.next(), open.next()) {
        (Some(one), None) => Ok(one.id),
        (None, _) => Err(Failure::failed("no operation is under way").next("coracle operation ls")),
        _ => Err(Failure::usage("more than one operation is under way")
            .next("coracle operation ls shows them: name one")),
    }
}

/// Why something was not begun.
pub fn begin_failure(what: String, error: &coracle_client::Error) -> Failure {
    let failure = Failure::call(what, error);
    match (failure.exit, &failure.next) {
        (Exit::Unknown, _) => failure.next("coracle operation ls shows whether it was begun"),
        (Exit::Precondition, None) => {
            failure.next("coracle operation ls, coracle rebalance status")
        }
        _ => failure,
    }
}

/// Says that an operation was begun, and what to do next.
pub fn begun(operation: &ClusterOperation) -> String {
    let id = operation.id;
    let moves = match (&operation.split, &operation.merge) {
        (Some(split), _) => format!("shard {} is split", split.shard),
        (_, Some(merge)) => format!("shard {} takes shard {} in", merge.left, merge.right),
        _ => plural(operation.moves_all, "move", "moves"),
    };
    format!("operation {id} is begun: {moves}. Next: coracle operation watch {id}")
}

/// Says that an operation was done.
pub fn done(operation: &ClusterOperation) -> String {
    let took = operation.ended_ms.map(|ended| ended.saturating_sub(operation.began_ms));
    let took =
        took.map_or_else(String::new, |ms| format!(" in {}", duration(Duration::from_millis(ms))));
    let what = match (&operation.split, &operation.merge) {
        (Some(split), _) => match split.child {
            Some(child) => {
                format!("shard {} ends where shard {child} begins, {:016x}", split.shard, split.at)
            }
            None => format!("shard {} is as it was", split.shard),
        },
        (_, Some(merge)) => format!("shards {} and {}", merge.left, merge.right),
        _ => plural(operation.moves_done, "move", "moves"),
    };
    format!("operation {} is {}: {what}{took}", operation.id, operation.state)
}

/// How far an operation is: `3 of 12 moves, 40 MiB of 1.2 GiB, about 20 s left`.
pub fn progress(operation: &ClusterOperation, now_ms: u64) -> String {
    let mut parts = Vec::new();
    let step = operation.split.as_ref().map(|split| split.step.to_string());
    parts.extend(step.or_else(|| operation.merge.as_ref().map(|merge| merge.step.to_string())));
    if parts.is_empty() || operation.moves_all > 0 {
        parts.push(format!("{} of {} moves", operation.moves_done, operation.moves_all));
    }
    let (done, all) = operation.bytes();
    if all > 0 {
        parts.push(format!("{} of {}", bytes(done), bytes(all)));
    }
    if let Some(left) = estimate(operation, now_ms) {
        parts.push(format!("about {} left", duration(left)));
    }
    match operation.state {
        OperationState::Paused => parts.push("paused".to_owned()),
        _ if operation.cancelling => parts.push("cancelling".to_owned()),
        _ => {}
    }
    let stuck = operation.moves.iter().filter(|step| step.state == OperationState::Running);
    let stuck = stuck.map(|step| step.message.as_str()).find(|message| !message.is_empty());
    let messages = [operation.message.as_str(), stuck.unwrap_or_default()];
    parts.extend(messages.into_iter().filter(|text| !text.is_empty()).map(str::to_owned));
    parts.join(", ")
}

/// How much longer an operation takes, by what it took so far: by bytes, or by moves where they are
/// empty. The clocks are those of two machines, so it is an estimate in any case.
pub fn estimate(operation: &ClusterOperation, now_ms: u64) -> Option<Duration> {
    if operation.state != OperationState::Running || operation.cancelling {
        return None;
    }
    let (bytes_done, bytes_all) = operation.bytes();
    let (done, all) = match bytes_done {
        0 => (operation.moves_done as u64, operation.moves_all as u64),
        _ => (bytes_done, bytes_all),
    };
    let took = now_ms.checked_sub(operation.began_ms)?;
    let left = all.saturating_sub(done) as f64 / (done > 0).then_some(done)? as f64;
    Some(Duration::from_millis((took as f64 * left) as u64))
}

/// The wall clock, as operations are stamped.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}

/// For machines.
pub fn view(operation: &ClusterOperation, now_ms: u64) -> OperationView {
    let (bytes_done, bytes_all) = operation.bytes();
    OperationView {
        id: operation.id.0,
        kind: operation.kind.to_string(),
        state: operation.state.to_string(),
        cancelling: operation.cancelling,
        moves_done: operation.moves_done,
        moves_all: operation.moves_all,
        bytes_done,
        bytes_all,
        began_ms: operation.began_ms,
        ended_ms: operation.ended_ms,
        estimate_ms: estimate(operation, now_ms).map(|left| left.as_millis() as u64),
        node: operation.node.map(|node| node.0),
        message: operation.message.clone(),
        undoes: operation.undoes.map(|id| id.0),
        split: operation.split.as_ref().map(|split| SplitView {
            shard: split.shard.0,
            at: format!("{:016x}", split.at),
            step: split.step.to_string(),
            child: split.child.map(|child| child.0),
            automatic: split.automatic,
        }),
        merge: operation.merge.as_ref().map(|merge| MergeView {
            left: merge.left.0,
            right: merge.right.0,
            step: merge.step.to_string(),
            attempts: merge.attempts,
        }),
        moves: operation.moves.iter().map(move_view).collect(),
        transfers: operation.transfers.iter().map(TransferView::of).collect(),
    }
}

fn move_view(step: &OperationMove) -> MoveView {
    MoveView {
        shard: step.shard.0,
        from_node: step.from.map(|node| node.0),
        from_replica: step.from_replica.map(|replica| replica.0),
        to_node: step.to.map(|node| node.0),
        to_replica: step.to_replica.map(|replica| replica.0),
        bytes: step.bytes,
        state: step.state.to_string(),
        message: step.message.clone(),
        attempts: step.attempts,
    }
}

/// `1 move`, `3 moves`.
pub fn plural(number: usize, one: &str, many: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {many}") }
}

//! `coracle rebalance`: plans, and what becomes of them.

use std::io::{self, BufRead, IsTerminal, Read};
use std::path::Path;

use coracle_client::admin::{
    Balancing, BalancingChange, ClusterOperation, Control, Operations, Plan, PlanOptions,
};
use coracle_client::{Client, Error, ErrorKind};
use serde::Serialize;

use crate::args::{Apply, Format, Global, Rebalance, Setting, Switch, Which};
use crate::failure::{Exit, Failure};
use crate::output::{Output, bytes, duration, render};

use super::operation::{self, OperationView, now_ms};
use super::plan::{self, PlanView};
use super::{client, wait};

/// A plan's file has a line for each replica of a large cluster at most. Beyond: it is none.
const PLAN_BYTES_MAX: u64 = 16 << 20;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BalancingView {
    /// off, ready, starting, in_progress, stalled.
    state: String,
    reasons: Vec<String>,
    automatic: bool,
    moves_at_a_time: u32,
    down_after_ms: u64,
    /// A part: 0.85.
    disk_fill_max: f64,
    /// A part; 0: everything counts.
    threshold: f64,
    split_bytes: u64,
    /// Keys a second.
    split_load: u64,
}

#[derive(Serialize)]
struct StatusView {
    balancer: BalancingView,
    /// Those under way.
    operations: Vec<OperationView>,
}

/// Runs it.
pub async fn run(command: Rebalance, global: &Global, output: &Output) -> Result<(), Failure> {
    if let Rebalance::Apply(apply) = command {
        return self::apply(apply, global, output).await;
    }
    let (_, client) = client(global).await?;
    match command {
        Rebalance::Plan { max_moves, threshold, weight, exit_code } => {
            let options = PlanOptions { moves_max: max_moves, threshold, weights: weight };
            let plan = make(&client, &options).await?;
            show(&plan, output)?;
            match exit_code && !plan.is_empty() {
                true => Err(Failure::new(Exit::Changes, "")),
                false => Ok(()),
            }
        }
        Rebalance::Apply(_) => Ok(()),
        Rebalance::Status => {
            let list = client.admin().operations().await;
            let list = list.map_err(|error| Failure::call("ask for the balancer", &error))?;
            let view = status_view(&list, now_ms());
            output.item("RebalanceStatus", &view, || status_text(&list, now_ms()))
        }
        Rebalance::Pause(which) => operation::control(&client, which, Control::Pause, output).await,
        Rebalance::Resume(which) => {
            operation::control(&client, which, Control::Resume, output).await
        }
        Rebalance::Cancel(which) => {
            operation::control(&client, which, Control::Cancel, output).await
        }
        Rebalance::Undo { which, wait } => undo(&client, which, wait, global, output).await,
        Rebalance::Auto { switch } => {
            let change = Setting { automatic: Some(switch), ..Setting::default() };
            set(&client, change, output).await
        }
        Rebalance::Set(setting) => set(&client, setting, output).await,
    }
}

async fn make(client: &Client, options: &PlanOptions) -> Result<Plan, Failure> {
    let plan = client.admin().plan_rebalance(options).await;
    plan.map_err(|error| Failure::call("make a plan", &error))
}

fn show(plan: &Plan, output: &Output) -> Result<(), Failure> {
    let wide = output.format() == Format::Wide;
    output.item(plan::KIND, &PlanView::of(plan), || plan::text(plan, wide))
}

async fn apply(apply: Apply, global: &Global, output: &Output) -> Result<(), Failure> {
    // A file that is none is found before anybody is asked.
    let given = apply.file.as_deref().map(read).transpose()?;
    let (target, client) = client(global).await?;
    let plan = match given {
        Some(plan) => plan,
        None => make(&client, &PlanOptions::default()).await?,
    };
    let wide = output.format() == Format::Wide;
    if apply.dry_run {
        check(&client, &plan).await?;
        return show(&plan, output);
    }
    if plan.is_empty() {
        output.note(&plan::text(&plan, wide));
        return Ok(());
    }
    if !apply.yes {
        output.note(&plan::text(&plan, wide));
        confirm(&format!("Apply it to {}? [y/N]", target.describe()), &apply, output).await?;
    }
    let begun = client.admin().start_rebalance(&plan).await;
    let begun = begun.map_err(|error| refused(&error))?;
    follow(&client, begun, apply.wait, global, output).await
}

/// Says what was begun, and waits for it where that is wanted.
pub async fn follow(
    client: &Client,
    begun: ClusterOperation,
    wait: bool,
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let now = now_ms();
    if !wait {
        return output.item("Operation", &operation::view(&begun, now), || {
            match begun.has_ended() {
                true => operation::done(&begun),
                false => operation::begun(&begun),
            }
        });
    }
    output.note(&operation::begun(&begun));
    let ended = wait::operation(client, begun.id, global, output, |_| Ok(())).await?;
    output.item("Operation", &operation::view(&ended, now_ms()), || operation::done(&ended))
}

/// Whether a plan still holds. The answer may be another one when it is carried out.
async fn check(client: &Client, plan: &Plan) -> Result<(), Failure> {
    let map = client.admin().map().await;
    let map = map.map_err(|error| Failure::call("read the shard map", &error))?;
    let failure = match () {
        () if map.cluster_id != plan.cluster_id => {
            format!("the plan is of cluster {}, and this is {}", plan.cluster_id, map.cluster_id)
        }
        () if map.epoch != plan.epoch => {
            format!("the plan is of map epoch {}, and the map is of {} now", plan.epoch, map.epoch)
        }
        () => return Ok(()),
    };
    Err(Failure::new(Exit::Precondition, failure).next(ANEW))
}

const ANEW: &str =
    "nothing was moved; coracle rebalance plan makes a new plan: look at it, and apply that";

fn refused(error: &Error) -> Failure {
    let failure = operation::begin_failure("carry out the plan".to_owned(), error);
    match error.kind() {
        ErrorKind::Conflict => failure.next(ANEW),
        _ => failure,
    }
}

/// The plan in a file, or on standard input.
fn read(path: &Path) -> Result<Plan, Failure> {
    let mut text = Vec::new();
    let read = match path.as_os_str() == "-" {
        true => io::stdin().lock().take(PLAN_BYTES_MAX).read_to_end(&mut text),
        false => std::fs::File::open(path)
            .and_then(|file| file.take(PLAN_BYTES_MAX).read_to_end(&mut text)),
    };
    read.map_err(|error| Failure::io("read", path, &error))?;
    PlanView::read(&text).map(PlanView::plan)
}

/// A person says yes; a script says `--yes`.
async fn confirm(question: &str, apply: &Apply, output: &Output) -> Result<(), Failure> {
    let from_stdin = apply.file.as_deref().is_some_and(|file| file.as_os_str() == "-");
    if from_stdin || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        let failure = Failure::usage("this moves data, and nobody can be asked");
        return Err(failure.next("say --yes, or look first: --dry-run"));
    }
    let answer = ask(question, output).await?;
    match ["y", "yes"].contains(&answer.to_lowercase().as_str()) {
        true => Ok(()),
        false => Err(Failure::usage("nothing was moved")),
    }
}

/// What a person types.
pub async fn ask(question: &str, output: &Output) -> Result<String, Failure> {
    output.note(question);
    // Beside, so that Ctrl-C is heard meanwhile.
    let line = || io::stdin().lock().lines().next().transpose();
    let answer = tokio::task::spawn_blocking(line).await;
    let answer = answer.map_err(|error| Failure::failed(format!("cannot ask: {error}")))?;
    let answer = answer.map_err(|error| Failure::io("read", "standard input", &error))?;
    Ok(answer.unwrap_or_default().trim().to_owned())
}

async fn undo(
    client: &Client,
    which: Which,
    wait: bool,
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let begun = operation::controlled(client, which, Control::Undo).await?;
    follow(client, begun, wait, global, output).await
}

async fn set(client: &Client, setting: Setting, output: &Output) -> Result<(), Failure> {
    let change = BalancingChange {
        automatic: setting.automatic.map(|switch| switch == Switch::On),
        moves_at_a_time: setting.moves_at_a_time,
        down_after: setting.down_after,
        disk_fill_max: setting.disk_max,
        threshold: setting.threshold,
        split_bytes: setting.split_size,
        split_load: setting.split_load,
    };
    let set = client.admin().set_balancing(change).await;
    let set = set.map_err(|error| Failure::call("set the balancer", &error))?;
    output.item("Balancing", &balancing_view(&set), || balancing_text(&set))
}

fn balancing_view(balancing: &Balancing) -> BalancingView {
    BalancingView {
        state: balancing.state.to_string(),
        reasons: balancing.reasons.clone(),
        automatic: balancing.automatic,
        moves_at_a_time: balancing.moves_at_a_time,
        down_after_ms: balancing.down_after.as_millis() as u64,
        disk_fill_max: f64::from(balancing.disk_fill_max) / 1_000.0,
        threshold: f64::from(balancing.threshold) / 1_000.0,
        split_bytes: balancing.split_bytes,
        split_load: balancing.split_load,
    }
}

fn status_view(list: &Operations, now_ms: u64) -> StatusView {
    let open = list.operations.iter().filter(|operation| !operation.has_ended());
    StatusView {
        balancer: balancing_view(&list.balancing),
        operations: open.map(|open| operation::view(open, now_ms)).collect(),
    }
}

fn balancing_text(balancing: &Balancing) -> String {
    let automatic = match balancing.automatic {
        true => "moves replicas by itself",
        false => "moves only what it is told to",
    };
    let percent = |part: u32| format!("{} %", f64::from(part) / 10.0);
    let threshold = match balancing.threshold {
        0 => String::new(),
        part => format!(", beyond {}", percent(part)),
    };
    let splits = match balancing.automatic {
        true => format!(
            "; splits shards at {}, or {} keys/s",
            bytes(balancing.split_bytes),
            balancing.split_load
        ),
        false => String::new(),
    };
    format!(
        "balancer {}: {automatic}{threshold}, {} at a time; fills disks up to {}{splits}; replaces nodes that are silent for {}",
        balancing.state,
        balancing.moves_at_a_time,
        percent(balancing.disk_fill_max),
        duration(balancing.down_after)
    )
}

/// The balancer and its operations, for people.
pub fn status_text(list: &Operations, now_ms: u64) -> String {
    let mut lines = vec![balancing_text(&list.balancing)];
    lines.extend(list.balancing.reasons.iter().map(|reason| format!("! {reason}")));
    let open: Vec<&ClusterOperation> =
        list.operations.iter().filter(|operation| !operation.has_ended()).collect();
    if open.is_empty() {
        lines.push("no operation is under way".to_owned());
        return lines.join("\n");
    }
    lines.push(String::new());
    let views: Vec<OperationView> = open.iter().map(|open| operation::view(open, now_ms)).collect();
    lines.push(render(operation::COLUMNS, &views, false, true).trim_end().to_owned());
    for open in open {
        let running = open
            .moves
            .iter()
            .filter(|step| step.state == coracle_client::admin::OperationState::Running);
        lines.extend(running.map(|step| {
            let name = |node: Option<coracle_client::NodeId>| {
                node.map_or_else(|| "none".to_owned(), |node| format!("n{node}"))
            };
            let because = match step.message.as_str() {
                "" => String::new(),
                message => format!(": {message}"),
            };
            let (from, to) = (name(step.from), name(step.to));
            format!("  shard {} {from} → {to}{because}", step.shard)
        }));
    }
    lines.join("\n")
}

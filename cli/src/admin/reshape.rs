//! `coracle shard split` and `coracle shard merge`.

use coracle_client::admin::SplitAt;
use coracle_client::{Client, ShardId};
use serde::Serialize;

use crate::args::{Global, SplitBy};
use crate::context::Target;
use crate::data::keyspace_name;
use crate::failure::Failure;
use crate::output::{Output, bytes};

use super::operation::plural;
use super::{client, operation, rebalance};

/// A split as it is asked for.
pub struct Split {
    /// The shard.
    pub shard: ShardId,
    /// A position.
    pub at: Option<u64>,
    /// A key, and its keyspace.
    pub key: Option<(String, Option<String>)>,
    /// What is halved.
    pub by: Option<SplitBy>,
    /// Nothing is done.
    pub dry_run: bool,
    /// Until it is done.
    pub wait: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SplitView {
    shard: u64,
    /// First position of its arc, as 16 hex digits.
    start: String,
    /// The first position of the new shard.
    at: String,
    /// One past its last; 0 is the ring's end.
    end: String,
    state_bytes: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MergeView {
    left: u64,
    right: u64,
    /// First position of the merged arc, as 16 hex digits.
    start: String,
    /// One past its last; 0 is the ring's end.
    end: String,
    moves: Vec<MoveView>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MoveView {
    shard: u64,
    from_node: Option<u64>,
    to_node: Option<u64>,
    bytes: u64,
}

/// Splits.
pub async fn split(asked: Split, global: &Global, output: &Output) -> Result<(), Failure> {
    let (target, client) = client(global).await?;
    let at = where_to(&client, &target, &asked).await?;
    let shard = asked.shard;
    let begun = client.admin().split_shard(shard, at, asked.dry_run).await;
    let what = format!("split shard {shard}");
    let begun = begun.map_err(|error| operation::begin_failure(what, &error))?;
    let Some(operation) = begun.operation else {
        let view = SplitView {
            shard: shard.0,
            start: format!("{:016x}", begun.start),
            at: format!("{:016x}", begun.at),
            end: format!("{:016x}", begun.end),
            state_bytes: begun.bytes,
        };
        return output.item("ShardSplit", &view, || {
            let SplitView { start, at, end, .. } = &view;
            format!(
                "shard {shard}, {start} up to {end}, {}, would be split at {at}; nothing was done",
                bytes(begun.bytes)
            )
        });
    };
    rebalance::follow(&client, operation, asked.wait, global, output).await
}

async fn where_to(client: &Client, target: &Target, asked: &Split) -> Result<SplitAt, Failure> {
    if let Some((key, keyspace)) = &asked.key {
        let keyspace = keyspace_name(target, keyspace.as_deref());
        let position = client.admin().position(&keyspace, key.as_bytes()).await;
        let position = position.map_err(|error| Failure::call("find the key's place", &error))?;
        let unknown = || {
            Failure::failed(format!("there is no keyspace {keyspace}")).next("coracle keyspace ls")
        };
        return position.map(SplitAt::Position).ok_or_else(unknown);
    }
    Ok(match (asked.at, asked.by) {
        (Some(at), _) => SplitAt::Position(at),
        (None, Some(SplitBy::Load)) => SplitAt::Load,
        (None, _) => SplitAt::Size,
    })
}

/// Merges.
pub async fn merge(
    (left, right): (ShardId, ShardId),
    (dry_run, wait): (bool, bool),
    global: &Global,
    output: &Output,
) -> Result<(), Failure> {
    let (_, client) = client(global).await?;
    let begun = client.admin().merge_shards(left, right, dry_run).await;
    let what = format!("merge shards {left} and {right}");
    let begun = begun.map_err(|error| operation::begin_failure(what, &error))?;
    let Some(operation) = begun.operation else {
        let moves = begun.moves.iter().map(|step| MoveView {
            shard: step.shard.0,
            from_node: step.from.map(|node| node.0),
            to_node: step.to.map(|node| node.0),
            bytes: step.bytes,
        });
        let view = MergeView {
            left: left.0,
            right: right.0,
            start: format!("{:016x}", begun.start),
            end: format!("{:016x}", begun.end),
            moves: moves.collect(),
        };
        return output.item("ShardMerge", &view, || {
            let moves = plural(view.moves.len(), "replica", "replicas");
            let size: u64 = view.moves.iter().map(|step| step.bytes).sum();
            format!(
                "shard {left} would hold {} up to {}; {moves} of shard {right} would move first ({}); nothing was done",
                view.start,
                view.end,
                bytes(size)
            )
        });
    };
    rebalance::follow(&client, operation, wait, global, output).await
}

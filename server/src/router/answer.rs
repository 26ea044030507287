//! Decides nothing: turns what a group found or did into what the wire says. Pure.

use std::time::Duration;

use bytes::Bytes;
use coracle_proto::limits::BATCH_CURRENT_BYTES_MAX;
use coracle_proto::reason::{Fault, Outcome, Reason, metadata};
use coracle_proto::shard_map::{ShardId, ShardMap};
use coracle_proto::token::DeleteToken;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_raft::apply;
use coracle_raft::clock::HybridTime;
use coracle_storage::state::Versioned;

use crate::fault;
use crate::router::plan::WriteAnswer;
use crate::router::range::RangeSpec;

/// An entry as it travels.
pub(crate) fn entry(found: Versioned) -> v1::Entry {
    v1::Entry {
        value: found.value,
        version: found.version,
        expires_at_ms: HybridTime(found.expires_at_version).ms(),
    }
}

/// What became of a write, as its caller is told. `served` lacks only where it was decided.
pub(crate) fn written(
    reply: apply::Reply,
    answer: WriteAnswer,
    served: v1::Served,
    map: &ShardMap,
) -> Result<Answer, Fault> {
    let shard = ShardId(served.shard);
    let served = Some(v1::Served { term: reply.term, index: reply.index, ..served });
    let (applied, version, results) = match reply.outcome {
        apply::Outcome::Applied { version, results } => (true, version, results),
        apply::Outcome::ConditionFailed { results } => (false, 0, results),
        refused => {
            return Err(refusal(refused, map, shard, served.map_or(0, |s| s.server_time_ms)));
        }
    };
    Ok(match answer {
        WriteAnswer::Write => {
            let results = operation_results(results);
            Answer::Write(v1::WriteResponse { applied, version, results, served })
        }
        WriteAnswer::Put => {
            let current = first_current(results);
            Answer::Put(v1::PutResponse { applied, version, current, served })
        }
        WriteAnswer::Delete => {
            let current = first_current(results);
            Answer::Delete(v1::DeleteResponse { applied, version, current, served })
        }
    })
}

/// What became of a delete-range within one entity, or of a step of one.
pub(crate) fn range_deleted(
    reply: apply::Reply,
    spec: &RangeSpec,
    served: v1::Served,
    map: &ShardMap,
) -> Result<Answer, Fault> {
    let shard = ShardId(served.shard);
    let now_ms = served.server_time_ms;
    let served = Some(v1::Served { term: reply.term, index: reply.index, ..served });
    match reply.outcome {
        apply::Outcome::RangeDeleted { version, deleted, next, arc } => {
            let left = spec.left(next, arc);
            let left = left.ok_or_else(|| {
                Fault::new(Reason::Internal, "a step has covered another arc than it was of")
            })?;
            Ok(Answer::DeleteRange(v1::DeleteRangeResponse {
                deleted: deleted.into(),
                done: left.as_ref().is_none_or(DeleteToken::is_done),
                resume_token: left.map_or_else(Bytes::new, |left| left.encode()),
                version,
                served,
                steps: served.into_iter().collect(),
            }))
        }
        apply::Outcome::RangeTooLarge { limit } => {
            let message = format!(
                "more than {limit} keys are in the range (DELETE_RANGE_KEYS_MAX): without atomic it is deleted in steps"
            );
            Err(range_too_large("DELETE_RANGE_KEYS_MAX", limit.into(), message)
                .with(metadata::SHARD, shard))
        }
        apply::Outcome::Applied { .. } | apply::Outcome::ConditionFailed { .. } => {
            Err(another_writes_id())
        }
        refused => Err(refusal(refused, map, shard, now_ms)),
    }
}

/// An atomic delete-range over a range that holds too much. Nothing was changed.
pub(crate) fn range_too_large(limit: &str, max: u64, message: String) -> Fault {
    Fault::new(Reason::TooLarge, message).with(metadata::LIMIT, limit).with(metadata::MAX, max)
}

fn another_writes_id() -> Fault {
    Fault::invalid("request_id", "the request id is that of another write, which was judged before")
}

/// What `apply` would not do. None of it was applied by this entry.
fn refusal(outcome: apply::Outcome, map: &ShardMap, shard: ShardId, now_ms: u64) -> Fault {
    match outcome {
        apply::Outcome::StaleRoute { descriptor } => {
            fault::stale_route(Some(map), shard, descriptor.as_ref())
        }
        apply::Outcome::RetryWindowPassed => {
            let message = "the request id is too old to tell whether it was applied before";
            Fault::new(Reason::RetryWindowPassed, message)
                .with(metadata::SHARD, shard)
                .with(metadata::SERVER_TIME_MS, now_ms)
        }
        apply::Outcome::BirthBeyondClock => {
            let message = "the request id's birth lies ahead of the shard's clock";
            Fault::new(Reason::ClockOutOfBound, message)
                .with(metadata::SHARD, shard)
                .with(metadata::SERVER_TIME_MS, now_ms)
        }
        apply::Outcome::FenceBeyondClock => {
            let message = "the token's version lies ahead of the shard's clock";
            Fault::new(Reason::ClockOutOfBound, message)
                .with(metadata::SHARD, shard)
                .with(metadata::SERVER_TIME_MS, now_ms)
        }
        apply::Outcome::Overloaded { retry_after_ms } => {
            let message = "the shard's memory of request ids is full of young ones";
            Fault::new(Reason::Overloaded, message)
                .with(metadata::SHARD, shard)
                .with_retry_after(Duration::from_millis(retry_after_ms))
        }
        apply::Outcome::Invalid { why } => Fault::new(Reason::InvalidArgument, why),
        apply::Outcome::RangeDeleted { .. } | apply::Outcome::RangeTooLarge { .. } => {
            another_writes_id()
        }
        apply::Outcome::Applied { .. } | apply::Outcome::ConditionFailed { .. } => {
            unreachable!("the caller has taken the answers")
        }
        apply::Outcome::Pinned(_) | apply::Outcome::Reshaped(_) => {
            unreachable!("said of the group's own commands, and never of writes")
        }
    }
}

/// The only operation's current state, where its condition failed. A value that the group has left
/// out is told as empty: the version still tells it apart.
fn first_current(results: Vec<apply::OperationResult>) -> Option<v1::Entry> {
    let current = results.into_iter().next()?.current?;
    let expires_at_ms = HybridTime(current.expires_at).ms();
    let value = current.value.unwrap_or_default();
    Some(v1::Entry { value, version: current.version, expires_at_ms })
}

/// All operations' results, the current values among them up to the limit on their bytes.
fn operation_results(results: Vec<apply::OperationResult>) -> Vec<v1::OperationResult> {
    let mut room = BATCH_CURRENT_BYTES_MAX;
    let told = |result: apply::OperationResult| {
        let mut value_left_out = false;
        let current = result.current.map(|current| {
            let fits = |value: &Bytes| value.len() <= room;
            let value = current.value.filter(fits);
            room -= value.as_ref().map_or(0, Bytes::len);
            value_left_out = value.is_none();
            let value = value.unwrap_or_default();
            let expires_at_ms = HybridTime(current.expires_at).ms();
            v1::Entry { value, version: current.version, expires_at_ms }
        });
        v1::OperationResult {
            condition_failed: result.condition_failed,
            current,
            counter: result.counter.unwrap_or(0),
            value_left_out,
        }
    };
    results.into_iter().map(told).collect()
}

/// As another node carries it: a fault is an answer too.
pub(crate) fn pipelined(id: u64, result: Result<Answer, Fault>) -> v1::PipelineResponse {
    let result = result.unwrap_or_else(|fault| Answer::Error(fault.to_pipeline()));
    v1::PipelineResponse { id, result: Some(result) }
}

/// What another node has answered.
pub(crate) fn unpipelined(response: v1::PipelineResponse) -> Result<Answer, Fault> {
    match response.result {
        Some(Answer::Error(error)) => Err(Fault::from_pipeline(&error)),
        Some(answer) => Ok(answer),
        None => {
            let message = "the other node's answer is of a kind that this version does not know";
            Err(Fault::new(Reason::Internal, message).with_outcome(Outcome::Unknown))
        }
    }
}

/// Bytes that an answer holds: what admission counts while it waits to be sent.
pub(crate) fn bytes(answer: &Answer) -> u64 {
    let entry = |entry: &Option<v1::Entry>| entry.as_ref().map_or(0, |entry| entry.value.len());
    let bytes = match answer {
        Answer::Get(answer) => entry(&answer.entry),
        Answer::Put(answer) => entry(&answer.current),
        Answer::Delete(answer) => entry(&answer.current),
        Answer::BatchGet(answer) => answer.items.iter().map(|item| entry(&item.entry)).sum(),
        Answer::Write(answer) => answer.results.iter().map(|result| entry(&result.current)).sum(),
        Answer::Scan(page) => {
            page.entries.iter().map(|found| found.key.len() + entry(&found.entry)).sum()
        }
        Answer::DeleteRange(answer) => answer.resume_token.len(),
        Answer::FixVersion(_) | Answer::PinVersion(_) | Answer::Error(_) => 0,
    };
    bytes as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(value: Option<usize>) -> apply::OperationResult {
        let value = value.map(|len| Bytes::from(vec![b'v'; len]));
        let current = Some(apply::Current { version: 7, expires_at: 9 << 16, value });
        apply::OperationResult { condition_failed: true, current, counter: None }
    }

    #[test]
    fn current_values_beyond_the_limit_are_left_out_and_said_so() {
        let most = BATCH_CURRENT_BYTES_MAX;
        let results = operation_results(vec![
            failed(Some(most - 1)),
            failed(Some(2)),
            failed(Some(1)),
            failed(None),
            apply::OperationResult::default(),
        ]);
        let lengths: Vec<_> = results
            .iter()
            .map(|result| (result.current.as_ref().map(|c| c.value.len()), result.value_left_out))
            .collect();
        let told = [(Some(most - 1), false), (Some(0), true), (Some(1), false), (Some(0), true)];
        assert_eq!(lengths[..4], told);
        assert_eq!(lengths[4], (None, false));
        let current = results[..4].iter().map(|result| result.current.as_ref().expect("told"));
        let told: Vec<_> = current.map(|told| (told.version, told.expires_at_ms)).collect();
        assert_eq!(told, [(7, 9); 4], "version and expiry are always there");
    }

    #[test]
    fn fault_travels_between_nodes_whole() {
        let fault = fault::no_quorum(None, ShardId(3)).with_outcome(Outcome::Unknown);
        let carried = pipelined(5, Err(fault.clone()));
        assert_eq!(carried.id, 5);
        assert_eq!(unpipelined(carried), Err(fault));
        let unknown = unpipelined(v1::PipelineResponse::default()).unwrap_err();
        assert_eq!(unknown.outcome, Outcome::Unknown);
    }
}

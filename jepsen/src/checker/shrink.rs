//! Makes a history that has no explanation small enough to be looked at. Owns what may be left out: only
//! operations without which an explainable history stays explainable, so that what is left is wrong by
//! itself. Does not judge (see `search`).

use std::collections::BTreeSet;

use super::search::check_key;
use crate::history::{Action, Answer, Operation, Outcome};

/// Trials of leaving something out. Beyond, what is left is taken as it is: still wrong, not small.
const TRIALS_MAX: usize = 20_000;

/// The fewest operations of one key that were found to have no explanation, in the order in which they
/// began; without conditions that are not needed for that. `operations` has none.
pub fn shrink(operations: &[Operation]) -> Vec<Operation> {
    let mut kept = operations.to_vec();
    cut_tail(&mut kept);
    let (mut size, mut trials) = (kept.len() / 2, 0);
    while size > 0 {
        let (mut from, mut smaller) = (0, false);
        while from < kept.len() && trials < TRIALS_MAX {
            trials += 1;
            let out: BTreeSet<usize> = (from..(from + size).min(kept.len())).collect();
            let trial = without(&kept, out);
            if is_wrong(&trial) {
                (kept, smaller) = (trial, true);
            } else {
                from += size;
            }
        }
        // Something that went may have been what another one needed.
        if !smaller || size > 1 {
            size /= 2;
        }
    }
    kept
}

fn is_wrong(operations: &[Operation]) -> bool {
    check_key(String::new(), operations).is_some_and(|found| found.call.is_some())
}

/// Nothing that began after the answer that cannot be explained is needed.
fn cut_tail(operations: &mut Vec<Operation>) {
    let culprit = check_key(String::new(), operations).and_then(|found| found.call);
    let end = operations.iter().find(|one| Some(one.call) == culprit).map(|one| one.end);
    if let Some(end) = end {
        operations.retain(|one| one.begin < end);
        // What is answered later is not answered yet.
        for one in operations.iter_mut().filter(|one| one.end > end) {
            if one.action.value().is_some() || one.action.is_delete() {
                (one.outcome, one.end) = (unless_failed(&one.outcome), usize::MAX);
            }
        }
        operations.retain(|one| one.end <= end || one.outcome == Outcome::Unknown);
    }
}

fn unless_failed(outcome: &Outcome) -> Outcome {
    if *outcome == Outcome::Fail { Outcome::Fail } else { Outcome::Unknown }
}

/// The operations without some, and without what only these explain: with a write goes whoever saw its
/// value, with a delete whoever saw nothing. A write stays, and loses the condition that they explained.
fn without(operations: &[Operation], mut out: BTreeSet<usize>) -> Vec<Operation> {
    let mut values = BTreeSet::new();
    let mut versions = BTreeSet::new();
    let mut deletes = false;
    for one in out.iter().map(|at| &operations[*at]) {
        values.extend(one.action.value());
        deletes |= one.action.is_delete();
        if let Outcome::Ok(Answer::Written { version, .. }) = one.outcome {
            versions.insert(version);
        }
    }
    for (at, one) in operations.iter().enumerate() {
        if let Outcome::Ok(Answer::Read { seen, .. } | Answer::Mismatch { seen, .. }) = &one.outcome
            && seen.as_ref().map_or(deletes, |seen| {
                values.contains(seen.value.as_str()) || versions.contains(&seen.version)
            })
        {
            out.insert(at);
        }
    }
    let kept = operations.iter().enumerate().filter(|(at, _)| !out.contains(at));
    let mut kept: Vec<Operation> = kept.map(|(_, one)| one.clone()).collect();
    for one in &mut kept {
        let is_refused = matches!(one.outcome, Outcome::Ok(Answer::Mismatch { .. }));
        let loses_its_condition = match &one.action {
            Action::PutIfVersion { version, .. } => versions.contains(version),
            Action::PutIfAbsent { .. } => deletes,
            _ => false,
        };
        if loses_its_condition && !is_refused {
            let value = one.action.value().unwrap_or_default().to_owned();
            one.action = Action::Put { value };
        }
    }
    kept
}

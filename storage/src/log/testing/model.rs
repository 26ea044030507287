//! Owns the model that the log is held against: what each replica should hold. Does not know disks.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::super::{Done, Log, LogEntry, Recovery, ReplicaId};
use crate::fs::faulty::Dice;

/// An operation that is answered.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Create(ReplicaId),
    Destroy(ReplicaId),
    Forget(ReplicaId),
    Append(ReplicaId, Vec<LogEntry>),
    Vote(ReplicaId, Bytes),
    Truncate(ReplicaId, Option<u64>),
    Purge(ReplicaId, u64, [u8; 16]),
}

#[derive(Clone, Default, Eq, PartialEq, Debug)]
struct Replica {
    vote: Option<Bytes>,
    committed: Option<Bytes>,
    purged: Option<(u64, [u8; 16])>,
    entries: BTreeMap<u64, ([u8; 16], Bytes)>,
}

#[derive(Clone, Default, Eq, PartialEq, Debug)]
pub(super) struct Model {
    replicas: BTreeMap<ReplicaId, Replica>,
    pub(super) destroyed: BTreeSet<ReplicaId>,
}

/// Replicas alive at a time, so that some are busy and some idle.
const REPLICAS_MAX: u64 = 5;

impl Change {
    pub(super) fn submit(&self, log: &Log, done: Done) {
        match self.clone() {
            Change::Create(id) => log.create(id, done),
            Change::Destroy(id) => log.destroy(id, done),
            Change::Forget(id) => log.forget(id, done),
            Change::Append(id, entries) => log.append(id, entries, done),
            Change::Vote(id, vote) => log.save_vote(id, vote, done),
            Change::Truncate(id, last_kept) => log.truncate_after(id, last_kept, done),
            Change::Purge(id, index, upto) => log.purge(id, index, upto, done),
        }
    }
}

impl Replica {
    fn next_index(&self) -> Option<u64> {
        let last = self.entries.last_key_value().map(|(last, _)| *last);
        last.or(self.purged.map(|(purged, _)| purged)).map(|last| last + 1)
    }
}

impl Model {
    pub(super) fn apply(&mut self, change: &Change, at: usize) {
        let (Change::Create(id)
        | Change::Destroy(id)
        | Change::Forget(id)
        | Change::Append(id, _)
        | Change::Vote(id, _)
        | Change::Truncate(id, _)
        | Change::Purge(id, ..)) = change;
        let replica = match change {
            Change::Create(id) => self.replicas.entry(*id).or_default(),
            Change::Forget(id) => {
                self.destroyed.remove(id);
                return;
            }
            _ => self
                .replicas
                .get_mut(id)
                .unwrap_or_else(|| panic!("operation {at} is for an unknown replica: {change:?}")),
        };
        match change {
            Change::Create(_) | Change::Forget(_) => {}
            Change::Destroy(id) => {
                self.replicas.remove(id);
                self.destroyed.insert(*id);
            }
            Change::Append(_, entries) => {
                let pairs = entries.iter().map(|e| (e.index, (e.id, e.payload.clone())));
                replica.entries.extend(pairs);
            }
            Change::Vote(_, vote) => replica.vote = Some(vote.clone()),
            Change::Truncate(_, last_kept) => {
                replica.entries.split_off(&last_kept.map_or(0, |last| last + 1));
            }
            Change::Purge(_, index, upto) => {
                if replica.purged.is_none_or(|(purged, _)| purged < *index) {
                    replica.purged = Some((*index, *upto));
                    replica.entries = replica.entries.split_off(&(index + 1));
                }
            }
        }
    }

    pub(super) fn set_committed(&mut self, id: ReplicaId, committed: Bytes) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.committed = Some(committed);
        }
    }

    pub(super) fn replica_ids(&self) -> Vec<ReplicaId> {
        self.replicas.keys().copied().collect()
    }

    pub(super) fn next_index(&self, id: ReplicaId) -> Option<u64> {
        self.replicas.get(&id)?.next_index()
    }

    /// One of them; the first more often, so that the others come to be idle.
    pub(super) fn random_replica(&self, dice: &mut Dice) -> Option<ReplicaId> {
        let ids = self.replica_ids();
        let bound = ids.len() as u64;
        (bound > 0).then(|| ids[dice.below(bound).min(dice.below(bound)) as usize])
    }

    /// Something that is allowed now.
    pub(super) fn random_change(&self, dice: &mut Dice, next_replica: &mut u64) -> Option<Change> {
        let alive = self.replicas.len() as u64;
        if alive == 0 || (alive < REPLICAS_MAX && dice.one_in(12)) {
            *next_replica += 1;
            return Some(Change::Create(ReplicaId(*next_replica)));
        }
        if !self.destroyed.is_empty() && dice.one_in(40) {
            return self.destroyed.first().map(|id| Change::Forget(*id));
        }
        let id = self.random_replica(dice)?;
        let replica = &self.replicas[&id];
        let random_id = |dice: &mut Dice| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&dice.roll().to_le_bytes());
            id
        };
        let last = replica.entries.last_key_value().map(|(last, _)| *last);
        let first = replica.entries.first_key_value().map(|(first, _)| *first);
        Some(match dice.below(16) {
            0..=2 => Change::Vote(id, random_bytes(dice, 24)),
            3 | 4 => {
                let last_kept = match (first, last) {
                    (Some(first), Some(last)) if !dice.one_in(4) => {
                        Some(first + dice.below(last - first + 2))
                    }
                    _ => None,
                };
                Change::Truncate(id, last_kept)
            }
            5..=7 => {
                let index = match (first, last) {
                    (Some(first), Some(last)) => first + dice.below(last - first + 3),
                    _ => replica.next_index().unwrap_or(0) + dice.below(4),
                };
                Change::Purge(id, index, random_id(dice))
            }
            8 if dice.one_in(8) => Change::Destroy(id),
            _ => {
                let start = replica.next_index().unwrap_or(dice.below(5));
                let count = 1 + dice.below(4);
                let large = dice.one_in(10);
                let entries = (start..start + count).map(|index| {
                    let len = if large { dice.below(9000) } else { dice.below(600) };
                    LogEntry { index, id: random_id(dice), payload: random_bytes(dice, len) }
                });
                Change::Append(id, entries.collect())
            }
        })
    }

    /// What the log shows after it was opened.
    pub(super) fn observe(
        log: &Log,
        recovery: &Recovery,
        dice: &mut Dice,
    ) -> Result<Model, String> {
        let mut model = Model::observe_replicas(log, recovery.replicas.clone(), dice)?;
        model.destroyed = recovery.destroyed.iter().copied().collect();
        Ok(model)
    }

    pub(super) fn observe_replicas(
        log: &Log,
        ids: Vec<ReplicaId>,
        dice: &mut Dice,
    ) -> Result<Model, String> {
        let mut model = Model::default();
        for id in ids {
            let state = log.state(id).map_err(|error| error.to_string())?;
            let mut replica = Replica {
                vote: state.vote,
                committed: state.committed,
                purged: state.purged,
                entries: BTreeMap::new(),
            };
            let mut next = 0;
            loop {
                let bytes_max = 1 + dice.below(4000) as usize;
                let read = log.read(id, next..u64::MAX, bytes_max);
                let read = read.map_err(|error| format!("reading replica {id}: {error}"))?;
                let Some(last) = read.last() else { break };
                next = last.index + 1;
                for entry in read {
                    let known = log.id_at(id, entry.index).map_err(|error| error.to_string())?;
                    if known != Some(entry.id) {
                        return Err(format!("id_at and read differ at entry {}", entry.index));
                    }
                    replica.entries.insert(entry.index, (entry.id, entry.payload));
                }
            }
            let last = replica.entries.last_key_value().map(|(last, (id, _))| (*last, *id));
            if last.or(replica.purged) != state.last {
                return Err(format!("the last entry of replica {id} is not {:?}", state.last));
            }
            let bytes: u64 = replica.entries.values().map(|(_, bytes)| bytes.len() as u64).sum();
            if bytes != state.bytes {
                return Err(format!("replica {id} has {bytes} bytes, not {}", state.bytes));
            }
            model.replicas.insert(id, replica);
        }
        Ok(model)
    }

    /// Why the other one is not the same, hints aside.
    pub(super) fn difference(&self, other: &Model) -> Option<String> {
        let (mut left, mut right) = (self.clone(), other.clone());
        for replica in left.replicas.values_mut().chain(right.replicas.values_mut()) {
            replica.committed = None;
        }
        left.difference_with_hints(&right)
    }

    pub(super) fn difference_with_hints(&self, other: &Model) -> Option<String> {
        if self.destroyed != other.destroyed {
            return Some(format!("destroyed: {:?}, not {:?}", other.destroyed, self.destroyed));
        }
        let (ours, theirs) = (self.replica_ids(), other.replica_ids());
        if ours != theirs {
            return Some(format!("replicas: {theirs:?}, not {ours:?}"));
        }
        for (id, replica) in &self.replicas {
            let seen = &other.replicas[id];
            if replica == seen {
                continue;
            }
            let indexes = |replica: &Replica| {
                let first = replica.entries.first_key_value().map(|(first, _)| *first);
                (first, replica.entries.last_key_value().map(|(last, _)| *last))
            };
            return Some(format!(
                "replica {id}: vote {:?}, committed {:?}, purged {:?}, entries {:?}, \
                 not {:?}, {:?}, {:?}, {:?}",
                seen.vote,
                seen.committed,
                seen.purged.map(|(purged, _)| purged),
                indexes(seen),
                replica.vote,
                replica.committed,
                replica.purged.map(|(purged, _)| purged),
                indexes(replica),
            ));
        }
        None
    }

    /// Every hint that the log shows (this model) was there before, or was given before the last
    /// operation that is shown.
    pub(super) fn check_hints(
        &self,
        base: &Model,
        hints: &[(usize, ReplicaId, Bytes)],
        kept: usize,
    ) -> Result<(), String> {
        for (id, replica) in &self.replicas {
            let before = base.replicas.get(id).and_then(|replica| replica.committed.as_ref());
            let given = hints.iter().filter(|(at, of, _)| of == id && *at <= kept);
            let known = replica.committed.as_ref() == before
                || given.into_iter().any(|(.., hint)| Some(hint) == replica.committed.as_ref());
            if !known {
                return Err(format!("replica {id} shows a hint that it cannot have"));
            }
        }
        Ok(())
    }
}

fn random_bytes(dice: &mut Dice, len: u64) -> Bytes {
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        bytes.extend_from_slice(&dice.roll().to_le_bytes());
    }
    bytes.truncate(len as usize);
    Bytes::from(bytes)
}

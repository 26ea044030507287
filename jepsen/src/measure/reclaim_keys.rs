//! The keys of `reclaim`: some with a time to live, some that are overwritten many times. Owns what is
//! written, and the judgement of what is found. Does not write or read.

use std::collections::BTreeMap;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const VALUE_BYTES: usize = 1_024;

/// What is written, from a seed.
pub(super) struct Keys {
    expiring: u32,
    kept: u32,
    seed: u64,
}

/// One write.
pub(super) struct Write {
    pub(super) key: Bytes,
    pub(super) expires: bool,
    /// Those of one round may be written in any order.
    pub(super) round: u32,
    number: u32,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Finding {
    pub(super) reads: u64,
    pub(super) wrong: Vec<String>,
}

impl Keys {
    /// How often each of the keys that stay is written.
    pub(super) const ROUNDS: u32 = 20;

    pub(super) fn new(expiring: u32, seed: u64) -> Keys {
        Keys { expiring, kept: Keys::kept_of(expiring), seed }
    }

    /// Their versions together take as much as the keys that expire; one of each stays.
    pub(super) fn kept_of(expiring: u32) -> u32 {
        expiring / Keys::ROUNDS
    }

    pub(super) fn writes(&self) -> Vec<Write> {
        let write = |round, number, expires| {
            let key = if expires { expiring_key(number) } else { kept_key(number) };
            Write { key, expires, round, number }
        };
        let kept = (0..Keys::ROUNDS)
            .flat_map(|round| (0..self.kept).map(move |number| write(round, number, false)));
        // Last, so that nothing expires while it is loaded.
        let expiring = (0..self.expiring).map(|number| write(Keys::ROUNDS, number, true));
        kept.chain(expiring).collect()
    }

    /// Random bytes: what compresses well would be gone from the disk before it is written.
    pub(super) fn value(&self, write: &Write) -> Bytes {
        let kind = u64::from(write.expires) << 63;
        let place = u64::from(write.round) << 32 | u64::from(write.number);
        noise(self.seed.rotate_left(17) ^ kind ^ place, VALUE_BYTES)
    }

    pub(super) fn all(&self) -> Vec<Bytes> {
        let expiring = (0..self.expiring).map(expiring_key);
        expiring.chain((0..self.kept).map(kept_key)).collect()
    }

    /// What stands under each key that never expires.
    fn lasting(&self) -> BTreeMap<Bytes, Bytes> {
        let last = |number| Write {
            key: kept_key(number),
            expires: false,
            round: Keys::ROUNDS - 1,
            number,
        };
        (0..self.kept).map(last).map(|write| (write.key.clone(), self.value(&write))).collect()
    }

    /// Judges reads of keys, all of this set.
    pub(super) fn judge(
        &self,
        how: &str,
        found: impl Iterator<Item = (Bytes, Option<Bytes>)>,
        expired: bool,
        finding: &mut Finding,
    ) {
        let lasting = self.lasting();
        for (key, value) in found {
            finding.reads += 1;
            let shown = String::from_utf8_lossy(&key).into_owned();
            let wrong = match (lasting.get(&key), &value) {
                (Some(wanted), Some(value)) if wanted == value => continue,
                (Some(_), Some(_)) => "holds another value",
                (Some(_), None) => "is gone, and has no time to live",
                (None, Some(_)) if expired => "has expired, and is there",
                (None, None) if !expired => "is gone before its time",
                (None, _) => continue,
            };
            finding.wrong.push(format!("{how}: {shown} {wrong}"));
        }
    }

    /// Judges a scan of everything: as reads of all keys, and nothing besides.
    pub(super) fn judge_scan(
        &self,
        scanned: &BTreeMap<Bytes, Bytes>,
        expired: bool,
        finding: &mut Finding,
    ) {
        let all = self.all();
        let found = all.iter().map(|key| (key.clone(), scanned.get(key).cloned()));
        self.judge("scan", found, expired, finding);
        let known: std::collections::BTreeSet<&Bytes> = all.iter().collect();
        for key in scanned.keys().filter(|key| !known.contains(key)) {
            let key = String::from_utf8_lossy(key).into_owned();
            finding.wrong.push(format!("scan: {key} was never written"));
        }
    }
}

fn expiring_key(number: u32) -> Bytes {
    format!("expiring-{number:07}").into()
}

fn kept_key(number: u32) -> Bytes {
    format!("kept-{number:07}").into()
}

/// Bytes that no compression shortens.
pub(super) fn noise(seed: u64, bytes: usize) -> Bytes {
    let mut noise = vec![0; bytes];
    StdRng::seed_from_u64(seed).fill_bytes(&mut noise);
    noise.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is there after all was written, with or without what expires.
    fn state(keys: &Keys, expired: bool) -> BTreeMap<Bytes, Bytes> {
        let writes = keys.writes();
        let writes = writes.iter().filter(|write| !(write.expires && expired));
        writes.map(|write| (write.key.clone(), keys.value(write))).collect()
    }

    fn wrong(keys: &Keys, state: &BTreeMap<Bytes, Bytes>, expired: bool) -> Vec<String> {
        let mut finding = Finding::default();
        keys.judge_scan(state, expired, &mut finding);
        finding.wrong
    }

    #[test]
    fn what_must_be_there_is_there_and_nothing_else() {
        let keys = Keys::new(100, 7);
        for expired in [false, true] {
            assert!(wrong(&keys, &state(&keys, expired), expired).is_empty());
        }
        assert_eq!(wrong(&keys, &state(&keys, false), true).len(), 100, "all came back");
        assert_eq!(wrong(&keys, &state(&keys, true), false).len(), 100, "all went too early");
    }

    #[test]
    fn one_key_that_is_not_as_it_must_be_is_seen() {
        let keys = Keys::new(100, 7);
        let good = state(&keys, true);
        let with = |key: &Bytes, value: Option<&Bytes>| {
            let mut state = good.clone();
            state.remove(key);
            state.extend(value.map(|value| (key.clone(), value.clone())));
            wrong(&keys, &state, true)
        };
        let old = keys.value(&keys.writes()[0]);
        assert_eq!(with(&kept_key(0), None).len(), 1, "lost");
        assert_eq!(with(&kept_key(0), Some(&old)).len(), 1, "an older version came back");
        assert_eq!(with(&expiring_key(42), Some(&old)).len(), 1, "an expired key came back");
        assert_eq!(with(&Bytes::from("other"), Some(&old)).len(), 1, "never written");
    }
}

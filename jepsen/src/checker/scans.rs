//! Judges scans by a ledger of every write that was sent: a scan at version V shows exactly the keys that
//! are there at V, in order, each once, each with its newest write up to V. Owns the ledger and the
//! verdict. Trusts the versions that writes were acknowledged with, and nothing that a scan says.

use std::collections::BTreeMap;

/// How many violations of one scan are told in words; the rest are counted.
const TOLD_MAX: usize = 20;

/// What a write left behind: a value, by its fingerprint, or nothing.
pub type Left = Option<u64>;

/// A write that was acknowledged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Acknowledged {
    version: u64,
    left: Left,
    /// When, on the clock of the ledger's owner.
    at_us: u64,
}

/// What is known of one key.
#[derive(Clone, Debug, Default)]
struct History {
    /// By version.
    acknowledged: Vec<Acknowledged>,
    /// The key's last write, when nobody knows what became of it. There is none after it.
    unknown: Option<Left>,
    /// The newest version at which a scan did not show it.
    not_until: u64,
}

/// Every write, by key number.
///
/// Invariants:
/// - the writes of one key were sent one after the other, so their versions rise;
/// - nothing is sent for a key whose last write is unknown.
#[derive(Debug, Default)]
pub struct Ledger {
    keys: BTreeMap<u64, History>,
}

/// An entry that a scan showed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shown {
    /// The key's number.
    pub key: u64,
    /// Of the write that made it.
    pub version: u64,
    /// The value's fingerprint.
    pub value: u64,
}

/// What a scan showed, in its order.
#[derive(Clone, Debug, Default)]
pub struct Scanned {
    /// The version that it said it read at.
    pub version: u64,
    /// When it was begun, on the clock of the ledger.
    pub began_us: u64,
    /// Its entries.
    pub entries: Vec<Shown>,
}

/// What is wrong with a scan; nothing when it is right.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Verdict {
    /// Keys that must be there, as the ledger says.
    pub expected: usize,
    /// How often each rule was broken.
    pub broken: BTreeMap<&'static str, usize>,
    /// The first of them.
    pub told: Vec<String>,
}

impl Verdict {
    /// Whether nothing is wrong.
    pub fn holds(&self) -> bool {
        self.broken.is_empty()
    }

    fn add(&mut self, rule: &'static str, key: u64, why: String) {
        *self.broken.entry(rule).or_default() += 1;
        if self.told.len() < TOLD_MAX {
            self.told.push(format!("{rule}: key {key}: {why}"));
        }
    }
}

impl Ledger {
    /// A write was acknowledged.
    pub fn acknowledge(&mut self, key: u64, version: u64, left: Left, at_us: u64) {
        let history = self.keys.entry(key).or_insert_with(|| History {
            acknowledged: Vec::with_capacity(1),
            ..History::default()
        });
        history.acknowledged.push(Acknowledged { version, left, at_us });
    }

    /// A write ended, and nobody knows how.
    pub fn lose(&mut self, key: u64, left: Left) {
        self.keys.entry(key).or_default().unknown = Some(left);
    }

    /// Whether another write may be sent for the key.
    pub fn is_open(&self, key: u64) -> bool {
        self.keys.get(&key).is_none_or(|history| history.unknown.is_none())
    }

    /// Whether the key is there, as far as is known.
    pub fn is_there(&self, key: u64) -> bool {
        let last = self.keys.get(&key).and_then(|history| history.acknowledged.last());
        last.is_some_and(|last| last.left.is_some())
    }

    /// How many keys are there, as far as is known.
    pub fn present(&self) -> usize {
        self.keys.keys().filter(|key| self.is_there(**key)).count()
    }

    /// Writes that were acknowledged, and writes whose outcome is unknown.
    pub fn counts(&self) -> (usize, usize) {
        let unknown = self.keys.values().filter(|history| history.unknown.is_some()).count();
        (self.keys.values().map(|history| history.acknowledged.len()).sum(), unknown)
    }

    /// Judges a scan. All writes that were sent before its end must have come back. A write of unknown
    /// outcome that it shows is from then on one that was applied, at the version shown.
    pub fn judge(&mut self, scan: &Scanned) -> Verdict {
        let mut verdict = Verdict::default();
        for pair in scan.entries.windows(2) {
            let key = pair[1].key;
            match pair[0].key.cmp(&key) {
                std::cmp::Ordering::Less => {}
                std::cmp::Ordering::Equal => verdict.add("shown twice", key, "in a row".to_owned()),
                std::cmp::Ordering::Greater => {
                    verdict.add("out of order", key, format!("behind key {}", pair[0].key));
                }
            }
        }
        let mut shown = BTreeMap::new();
        for entry in &scan.entries {
            if shown.insert(entry.key, *entry).is_some_and(|_| verdict.holds()) {
                verdict.add("shown twice", entry.key, "not in a row".to_owned());
            }
        }
        for (key, history) in &mut self.keys {
            let told = |write: &&Acknowledged| write.at_us < scan.began_us;
            let missed = history.acknowledged.iter().rev().find(told);
            if let Some(missed) = missed.filter(|missed| missed.version > scan.version) {
                let why = format!(
                    "version {} was acknowledged before the scan at version {} began",
                    missed.version, scan.version
                );
                verdict.add("begins too early", *key, why);
            }
            let shown = shown.remove(key);
            if let Some((rule, why)) = history.check(scan.version, shown, &mut verdict.expected) {
                verdict.add(rule, *key, why);
            }
        }
        for (key, entry) in shown {
            verdict.add("never written", key, format!("it shows version {}", entry.version));
        }
        verdict
    }
}

impl History {
    /// What a scan shows of the key, held against what it must show.
    fn check(
        &mut self,
        at: u64,
        shown: Option<Shown>,
        expected: &mut usize,
    ) -> Option<(&'static str, String)> {
        let newest = self.acknowledged.iter().rev().find(|write| write.version <= at).copied();
        let there = newest.and_then(|newest| Some((newest.version, newest.left?)));
        *expected += usize::from(there.is_some());
        let wrong = match (there, shown) {
            (None, None) => None,
            (Some((version, value)), Some(shown)) if shown.version == version => {
                (shown.value != value).then(|| ("wrong value", format!("of version {version}")))
            }
            (_, Some(shown)) if self.resolves(at, newest, shown) => {
                let (version, left) = (shown.version, Some(shown.value));
                // Not before any scan's start: nobody was told of it.
                self.acknowledged.push(Acknowledged { version, left, at_us: u64::MAX });
                self.unknown = None;
                return None;
            }
            (Some(_), None) if self.unknown == Some(None) => None,
            (Some((version, _)), None) => Some(("missing", format!("version {version} of it"))),
            (Some((version, _)), Some(shown)) if shown.version < version => {
                Some(("stale", format!("version {}, newest is {version}", shown.version)))
            }
            (Some((version, _)), Some(shown)) => {
                Some(("unknown version", format!("{}, newest is {version}", shown.version)))
            }
            (None, Some(shown)) => {
                let gone = newest.map_or("never written up to there".to_owned(), |newest| {
                    format!("deleted at version {}", newest.version)
                });
                Some(("not there", format!("version {} is shown; {gone}", shown.version)))
            }
        };
        let shows_delete = self.unknown == Some(None) && shown.is_none();
        if self.unknown.is_some() && !shows_delete {
            self.not_until = at.max(self.not_until);
        }
        wrong
    }

    /// Whether what is shown can be the write of unknown outcome.
    fn resolves(&self, at: u64, newest: Option<Acknowledged>, shown: Shown) -> bool {
        let last = self.acknowledged.last().map_or(0, |last| last.version);
        let is_last = newest.map_or(0, |newest| newest.version) == last;
        let after = last.max(self.not_until);
        let fits = is_last && shown.version > after && shown.version <= at;
        fits && self.unknown == Some(Some(shown.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten keys, written at versions 100 to 109; 3 was overwritten at 120, 4 deleted at 121, 5 deleted
    /// and written again, 6 overwritten behind the scan's version.
    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        (0..10).for_each(|key| ledger.acknowledge(key, 100 + key, Some(key), 1));
        ledger.acknowledge(3, 120, Some(33), 2);
        ledger.acknowledge(4, 121, None, 2);
        ledger.acknowledge(5, 122, None, 2);
        ledger.acknowledge(5, 123, Some(55), 2);
        ledger.acknowledge(6, 300, Some(66), 9);
        ledger
    }

    fn right() -> Scanned {
        let shown = |key: u64| match key {
            3 => Some(Shown { key, version: 120, value: 33 }),
            4 => None,
            5 => Some(Shown { key, version: 123, value: 55 }),
            _ => Some(Shown { key, version: 100 + key, value: key }),
        };
        Scanned { version: 200, began_us: 5, entries: (0..10).filter_map(shown).collect() }
    }

    /// What is found in a scan that was right before `plant` had it.
    fn found(plant: impl FnOnce(&mut Scanned)) -> Vec<&'static str> {
        let mut scan = right();
        plant(&mut scan);
        ledger().judge(&scan).broken.into_keys().collect()
    }

    #[test]
    fn right_scan_holds_and_planted_faults_are_found() {
        let verdict = ledger().judge(&right());
        assert!(verdict.holds(), "{verdict:?}");
        assert_eq!(verdict.expected, 9);
        assert_eq!(found(|scan| scan.entries.retain(|entry| entry.key != 7)), ["missing"]);
        assert_eq!(found(|scan| scan.entries.truncate(4)), ["missing"]);
        assert_eq!(found(|scan| scan.entries.insert(2, scan.entries[2])), ["shown twice"]);
        assert_eq!(found(|scan| scan.entries.swap(2, 3)), ["out of order"]);
        let again = |scan: &mut Scanned| scan.entries.push(scan.entries[1]);
        assert_eq!(found(again), ["out of order"]);
        let stale = Shown { key: 3, version: 103, value: 3 };
        assert_eq!(found(|scan| scan.entries[3] = stale), ["stale"]);
        assert_eq!(found(|scan| scan.entries[3].value = 3), ["wrong value"]);
        let gone = Shown { key: 4, version: 104, value: 4 };
        assert_eq!(found(|scan| scan.entries.insert(4, gone)), ["not there"]);
        let later = Shown { key: 6, version: 300, value: 66 };
        assert_eq!(found(|scan| scan.entries[5] = later), ["unknown version"]);
        let foreign = Shown { key: 77, version: 150, value: 1 };
        assert_eq!(found(|scan| scan.entries.push(foreign)), ["never written"]);
        assert_eq!(found(|scan| scan.began_us = 10), ["begins too early"]);
    }

    #[test]
    fn unknown_write_may_be_there_or_not_but_only_at_one_version() {
        let with = |version, value| {
            let mut scan = right();
            scan.entries[2] = Shown { key: 2, version, value };
            scan
        };
        let mut ledger = ledger();
        ledger.lose(2, Some(22));
        assert!(!ledger.is_open(2) && ledger.judge(&right()).holds(), "not applied so far");
        assert!(!ledger.judge(&with(150, 22)).holds(), "a scan at 200 did not show it");
        let later = |version, value| Scanned { version: 220, ..with(version, value) };
        assert!(!ledger.judge(&later(210, 23)).holds(), "another value");
        let mut ledger = self::tests::ledger();
        ledger.lose(2, Some(22));
        ledger.judge(&right());
        assert!(
            !ledger.judge(&Scanned { version: 205, ..with(210, 22) }).holds(),
            "behind the scan"
        );
        assert!(ledger.judge(&later(210, 22)).holds(), "applied");
        assert!(ledger.judge(&later(210, 22)).holds());
        assert!(!ledger.judge(&later(211, 22)).holds(), "applied at one version only");
        let without = Scanned { version: 230, ..right() };
        assert_eq!(ledger.judge(&without).broken.into_keys().collect::<Vec<_>>(), ["stale"]);
    }

    #[test]
    fn unknown_delete_may_have_deleted() {
        let mut ledger = ledger();
        ledger.lose(2, None);
        let mut without = right();
        without.entries.remove(2);
        assert!(ledger.judge(&right()).holds() && ledger.judge(&without).holds());
        assert_eq!(ledger.counts(), (15, 1));
        assert!(ledger.is_there(3) && !ledger.is_there(4));
    }
}

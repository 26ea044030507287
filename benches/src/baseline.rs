//! Owns baselines: figures of an earlier run that are checked in, and what changed since. Figures of
//! different machines do not compare, so a baseline holds ratios, and times only beside their machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::report;

/// Below this a change is what two runs differ by anyway, on a machine that is not only ours.
const NOISE: f64 = 0.15;

/// Figures by name, and where they are from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Baseline {
    /// The processor.
    pub machine: String,
    /// What is better when it is higher.
    pub ratios: BTreeMap<String, f64>,
    /// Nanoseconds: better when they are lower.
    pub nanos: BTreeMap<String, f64>,
}

impl Baseline {
    /// What was measured here and now.
    pub fn now(ratios: BTreeMap<String, f64>, nanos: BTreeMap<String, f64>) -> Baseline {
        Baseline { machine: report::processor(), ratios, nanos }
    }

    /// Reads one that was written.
    pub fn read(path: &Path) -> Result<Baseline, Failure> {
        let what = format!("read {}", path.display());
        let text = fs::read_to_string(path).map_err(Failure::of(&what))?;
        let value: Value = serde_json::from_str(&text).map_err(Failure::of(&what))?;
        let figures = |name: &str| {
            let figures = value[name].as_object().into_iter().flatten();
            figures.filter_map(|(name, figure)| Some((name.clone(), figure.as_f64()?))).collect()
        };
        let machine = value["machine"].as_str().unwrap_or_default().to_owned();
        Ok(Baseline { machine, ratios: figures("ratios"), nanos: figures("nanos") })
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> Result<(), Failure> {
        let round = |figures: &BTreeMap<String, f64>| -> BTreeMap<String, f64> {
            let round = |figure: f64| format!("{figure:.4}").parse().unwrap_or(figure);
            figures.iter().map(|(name, figure)| (name.clone(), round(*figure))).collect()
        };
        let (ratios, nanos) = (round(&self.ratios), round(&self.nanos));
        let value = json!({ "machine": self.machine, "ratios": ratios, "nanos": nanos });
        report::write_json(path, &value)
    }

    /// What changed since an earlier one, for people; and how many became clearly worse.
    pub fn since(&self, earlier: &Baseline) -> (String, usize) {
        let (mut rows, mut worse) = (Vec::new(), 0);
        let kinds = [(&self.ratios, &earlier.ratios, true), (&self.nanos, &earlier.nanos, false)];
        for (now, before, higher_is_better) in kinds {
            for (name, now) in now {
                let Some(before) = before.get(name) else {
                    rows.push(vec![
                        name.clone(),
                        "–".to_owned(),
                        report::rate(*now),
                        "new".to_owned(),
                    ]);
                    continue;
                };
                let change = now / before - 1.0;
                let gain = if higher_is_better { change } else { before / now - 1.0 };
                let verdict = match gain {
                    gain if gain < -NOISE => {
                        worse += 1;
                        "worse"
                    }
                    gain if gain > NOISE => "better",
                    _ => "",
                };
                rows.push(vec![
                    name.clone(),
                    report::rate(*before),
                    report::rate(*now),
                    format!("{:+.0} %", change * 100.0),
                    verdict.to_owned(),
                ]);
            }
        }
        let mut text = report::table(&["", "baseline", "now", "change", ""], &rows);
        if self.machine != earlier.machine {
            text.push_str(&format!(
                "the baseline is from another machine ({}): only ratios compare\n",
                earlier.machine
            ));
        }
        (text, worse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_became_worse_is_named() {
        let figures = |figures: &[(&str, f64)]| -> BTreeMap<String, f64> {
            figures.iter().map(|(name, figure)| ((*name).to_owned(), *figure)).collect()
        };
        let before = Baseline::now(
            figures(&[("get × etcd", 10.0), ("put × etcd", 4.0)]),
            figures(&[("ring", 100.0), ("scan", 100.0)]),
        );
        let dir = tempfile::tempdir().unwrap();
        before.write(&dir.path().join("b.json")).unwrap();
        assert_eq!(Baseline::read(&dir.path().join("b.json")).unwrap(), before);
        let mut now = Baseline::now(
            figures(&[("get × etcd", 12.0), ("put × etcd", 3.0), ("new", 1.0)]),
            figures(&[("ring", 130.0), ("scan", 105.0)]),
        );
        let (text, worse) = now.since(&before);
        assert_eq!(worse, 2, "{text}");
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line("get × etcd").ends_with("better") && line("put × etcd").ends_with("worse"));
        assert!(line("ring").ends_with("worse") && line("scan").ends_with("+5 %"), "{text}");
        now.machine = "another".to_owned();
        assert!(now.since(&before).0.contains("another machine"));
    }
}

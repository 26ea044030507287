//! Owns what was measured: a row for each cell and round, medians and ratios over the rounds, and the
//! lines of NDJSON in which everything is kept. Judges nothing (see `aims`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::report::Row;
use crate::stages::Seen;

/// Which latency of a row.
#[derive(Clone, Copy, Debug)]
pub enum Quantile {
    /// The middle.
    P50,
    /// All but one of a hundred.
    P99,
}

/// All rows, by cell (`get/etcd`), in the order of the rounds.
#[derive(Default)]
pub struct Results {
    rows: BTreeMap<String, Vec<Row>>,
    seen: BTreeMap<String, Seen>,
    lines: Option<File>,
}

/// The middle of some values; of an even number, the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[half]),
        _ => Some((values[half - 1] + values[half]) / 2.0),
    }
}

impl Results {
    /// Keeps every row in a file, too.
    pub fn to_file(path: &Path) -> Result<Results, Failure> {
        let lines = File::create(path).map_err(Failure::of(format!("write {}", path.display())))?;
        Ok(Results { lines: Some(lines), ..Results::default() })
    }

    /// Adds a row of a cell.
    pub fn note(&mut self, cell: &str, row: Row) {
        let mut line = row.json();
        line["cell"] = json!(cell);
        self.write(line);
        self.rows.entry(cell.to_owned()).or_default().push(row);
    }

    /// Adds a plain figure.
    pub fn note_figure(&mut self, cell: &str, figure: f64) {
        self.note(cell, Row::figure(cell, figure));
    }

    /// Keeps what the nodes counted during a cell; the last round's stays.
    pub fn note_seen(&mut self, cell: &str, seen: Seen) {
        self.seen.insert(cell.to_owned(), seen);
    }

    fn write(&mut self, mut line: Value) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line["at_ms"] = json!(now.as_millis() as u64);
        if let Some(lines) = &mut self.lines {
            // A full disk does not end a run whose figures are still printed.
            let _ = writeln!(lines, "{line}");
        }
    }

    /// The cells, and their rows.
    pub fn rows(&self) -> impl Iterator<Item = (&str, &[Row])> {
        self.rows.iter().map(|(cell, rows)| (cell.as_str(), rows.as_slice()))
    }

    /// What the nodes counted during a cell.
    pub fn seen(&self, cell: &str) -> Option<&Seen> {
        self.seen.get(cell)
    }

    fn of(&self, cell: &str) -> &[Row] {
        self.rows.get(cell).map_or(&[], Vec::as_slice)
    }

    /// The median rate, or figure, of a cell.
    pub fn rate(&self, cell: &str) -> Option<f64> {
        median(self.of(cell).iter().map(|row| row.per_second).collect())
    }

    /// The median of a latency.
    pub fn latency(&self, cell: &str, quantile: Quantile) -> Option<Duration> {
        let of = |row: &Row| row.latencies[quantile as usize].as_secs_f64();
        let median = median(self.of(cell).iter().map(of).collect());
        median.map(Duration::from_secs_f64)
    }

    /// The median over the rounds of one cell's rate by another's.
    pub fn ratio(&self, cell: &str, by: &str) -> Option<f64> {
        let pairs = self.of(cell).iter().zip(self.of(by));
        median(pairs.map(|(row, by)| row.per_second / by.per_second).collect())
    }

    /// The same of a latency.
    pub fn latency_ratio(&self, cell: &str, by: &str, quantile: Quantile) -> Option<f64> {
        let of = |row: &Row| row.latencies[quantile as usize].as_secs_f64();
        let pairs = self.of(cell).iter().zip(self.of(by));
        median(pairs.map(|(row, by)| of(row) / of(by)).collect())
    }

    /// Answers that were found wrong, and where.
    pub fn wrong(&self) -> Vec<String> {
        let rows =
            self.rows.iter().flat_map(|(cell, rows)| rows.iter().map(move |row| (cell, row)));
        let errors = rows.flat_map(|(cell, row)| row.errors.iter().map(move |error| (cell, error)));
        let wrong = errors.filter(|(_, (error, _))| error.starts_with("wrong"));
        wrong.map(|(cell, (error, count))| format!("{cell}: {error} ({count} times)")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_are_of_the_rounds() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, f64::NAN, 2.0]), Some(3.0));
        let mut results = Results::default();
        for (ours, theirs) in [(10.0, 1.0), (100.0, 50.0), (40.0, 10.0)] {
            results.note_figure("get/ours", ours);
            results.note_figure("get/theirs", theirs);
        }
        assert_eq!(results.rate("get/ours"), Some(40.0));
        assert_eq!(results.ratio("get/ours", "get/theirs"), Some(4.0));
        assert_eq!(results.ratio("get/ours", "none"), None);
    }

    #[test]
    fn rows_are_lines_and_wrong_answers_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        let mut results = Results::to_file(&path).unwrap();
        let mut row = Row::figure("x", 1.0);
        row.errors.insert("wrong: a key is gone".to_owned(), 3);
        row.errors.insert("TimedOut".to_owned(), 1);
        results.note("get/ours", row);
        assert_eq!(results.wrong(), ["get/ours: wrong: a key is gone (3 times)"]);
        drop(results);
        let line: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!((&line["cell"], &line["errors"]["TimedOut"]), (&json!("get/ours"), &json!(1)));
    }
}

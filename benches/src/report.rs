//! Owns what is shown: tables for people, JSON for machines, and what to know of the machine that the
//! figures are from. Measures nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::tally::Tally;

/// The figures of one kind of operation, under one load.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was done.
    pub name: String,
    /// Operations that were answered as they should, per second.
    pub per_second: f64,
    /// Latencies that half of the operations, 99 %, 99.9 %, and all of them did not pass.
    pub latencies: [Duration; 4],
    /// Operations that failed, by what went wrong.
    pub errors: BTreeMap<String, u64>,
}

const LATENCY_NAMES: [&str; 4] = ["p50", "p99", "p99.9", "max"];

impl Row {
    /// The figures of a tally that was taken over so long.
    pub fn new(name: impl Into<String>, tally: &Tally, window: Duration) -> Row {
        let at = |quantile| tally.quantile(quantile);
        Row {
            name: name.into(),
            per_second: tally.ok as f64 / window.as_secs_f64(),
            latencies: [at(0.5), at(0.99), at(0.999), tally.max()],
            errors: tally.errors.clone(),
        }
    }

    /// One figure without latencies.
    pub fn figure(name: impl Into<String>, per_second: f64) -> Row {
        Row { per_second, ..Row::new(name, &Tally::default(), Duration::from_secs(1)) }
    }

    /// Headings of [`Row::cells`].
    pub fn heading() -> Vec<&'static str> {
        let mut heading = vec!["", "ops/s"];
        heading.extend(LATENCY_NAMES);
        heading.push("errors");
        heading
    }

    /// As in a table.
    pub fn cells(&self) -> Vec<String> {
        let mut cells = vec![self.name.clone(), rate(self.per_second)];
        cells.extend(self.latencies.map(duration));
        cells.push(self.errors.values().sum::<u64>().to_string());
        cells
    }

    /// For machines: latencies in microseconds.
    pub fn json(&self) -> Value {
        let micros = self.latencies.map(|latency| latency.as_micros() as u64);
        let [p50, p99, p999, max] = micros;
        json!({
            "name": self.name,
            "per_second": self.per_second,
            "latency_us": { "p50": p50, "p99": p99, "p99.9": p999, "max": max },
            "errors": self.errors,
        })
    }
}

/// Rows under one title, with the errors by kind below them.
pub fn text(title: &str, rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
    let mut text = format!("{title}\n{}\n{}", machine(), table(&Row::heading(), &cells));
    for row in rows {
        for (error, count) in &row.errors {
            text.push_str(&format!("{}: {error}: {count}\n", row.name));
        }
    }
    text
}

/// The same for machines.
pub fn json(title: &str, rows: &[Row]) -> Value {
    let rows: Vec<Value> = rows.iter().map(Row::json).collect();
    json!({ "title": title, "machine": machine(), "command": command(), "rows": rows })
}

/// Writes what [`json()`] made.
pub fn write_json(path: &Path, value: &Value) -> Result<(), Failure> {
    fs::write(path, format!("{value:#}\n"))
        .map_err(Failure::of(format!("write {}", path.display())))
}

/// What the figures depend on besides the program. The load average says who else was at work: on a
/// busy machine latencies are the scheduler's.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory = coracle_server::machine_memory_bytes().unwrap_or(0) >> 30;
    // Cargo's release profile is the one without them.
    let profile = if cfg!(debug_assertions) { "not a release build" } else { "release build" };
    let loads = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = loads.split_whitespace().next().unwrap_or("unknown");
    format!("{cores} cores, load average {load}, {memory} GiB, {profile}")
}

/// The processor, as the kernel names it.
pub fn processor() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpus.lines().find_map(|line| line.strip_prefix("model name"));
    name.and_then(|name| name.split_once(": ")).map_or("unknown", |(_, name)| name).to_owned()
}

/// The kernel's version.
pub fn kernel() -> String {
    let version = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    version.trim().to_owned()
}

/// How to get the same figures again.
pub fn command() -> String {
    let args = std::env::args().skip(1);
    std::iter::once("./x bench".to_owned()).chain(args).collect::<Vec<_>>().join(" ")
}

/// Columns: the first to the left, figures to the right.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let cells =
        |row: &[String], column: usize| row.get(column).map_or(0, |cell| cell.chars().count());
    let heading: Vec<String> = heading.iter().map(|cell| (*cell).to_owned()).collect();
    let widths: Vec<usize> = (0..heading.len())
        .map(|column| {
            let all = rows.iter().map(|row| cells(row, column));
            all.max().unwrap_or(0).max(cells(&heading, column))
        })
        .collect();
    let mut text = String::new();
    for row in std::iter::once(&heading).chain(rows) {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            line.push_str(&match column {
                0 => format!("{cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            });
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A rate for people: three digits, or whole ones.
pub fn rate(per_second: f64) -> String {
    match per_second {
        small if small < 10.0 => format!("{small:.2}"),
        small if small < 100.0 => format!("{small:.1}"),
        large => format!("{large:.0}"),
    }
}

/// A latency for people.
pub fn duration(latency: Duration) -> String {
    match latency.as_micros() {
        us @ 0..1_000 => format!("{us} µs"),
        us @ 1_000..1_000_000 => format!("{:.2} ms", us as f64 / 1e3),
        us => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_figures_of_its_tally() {
        let mut tally = Tally::default();
        for ms in 1..=100 {
            tally.note(Duration::from_millis(ms), None);
        }
        tally.note(Duration::from_secs(5), Some("TimedOut".to_owned()));
        let row = Row::new("put", &tally, Duration::from_secs(4));
        // What failed is in the latencies, not in the rate.
        assert_eq!((row.per_second, row.errors["TimedOut"]), (25.0, 1));
        assert_eq!(row.cells()[..2], ["put", "25.0"]);
        assert_eq!(row.cells()[6], "1");
        assert!(row.cells()[5].starts_with("5."), "{row:?}");
        let json = json("t", std::slice::from_ref(&row));
        assert_eq!(json["rows"][0]["errors"]["TimedOut"], 1);
        assert_eq!(json["rows"][0]["per_second"], 25.0);
        let p50 = json["rows"][0]["latency_us"]["p50"].as_u64().unwrap();
        assert!(p50.abs_diff(51_000) <= 51, "{p50}");
        assert!(text("t", &[row]).ends_with("put: TimedOut: 1\n"));
    }

    #[test]
    fn columns_line_up() {
        let row = |name: &str, figure: &str| vec![name.to_owned(), figure.to_owned()];
        let text = table(&["", "µs"], &[row("a", "1"), row("long", "1000")]);
        assert_eq!(text, "        µs\na        1\nlong  1000\n");
        assert_eq!([rate(0.5), rate(12.34), rate(1234.5)], ["0.50", "12.3", "1234"]);
        let shown = [999, 1_000, 1_500_000].map(|us| duration(Duration::from_micros(us)));
        assert_eq!(shown, ["999 µs", "1.00 ms", "1.50 s"]);
    }
}

//! Owns `docs/performance.md` and its pictures: what was measured, for people. Decides nothing.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::aims::{self, Aim};
use crate::chart::{Bars, Lines};
use crate::failure::Failure;
use crate::grow::Axis;
use crate::peer::etcd::Etcd;
use crate::peer::redis::Redis;
use crate::report::{self, Row};
use crate::results::Results;
use crate::stages::{STAGES, Seen};
use crate::workload::Workload;

/// What was done to make it faster, written by hand.
const OPTIMISATIONS: &str = include_str!("../optimisations.md");

/// What bends each curve, written by hand.
const CURVES: &str = include_str!("../curves.md");

/// What a page is about.
pub struct Page<'a> {
    /// The figures.
    pub results: &'a Results,
    /// What was loaded.
    pub workload: &'a Workload,
    /// Rounds of each cell.
    pub rounds: usize,
    /// How long each cell was counted.
    pub window: Duration,
    /// How long all of it took.
    pub took: Duration,
    /// Micro-benchmarks: name, nanoseconds.
    pub micro: &'a [(String, f64)],
}

impl Page<'_> {
    /// Writes the page, and its pictures beside it.
    pub fn write(&self, docs: &Path) -> Result<(), Failure> {
        let pictures = docs.join("performance");
        let failed = || Failure::of(format!("write into {}", docs.display()));
        fs::create_dir_all(&pictures).map_err(failed())?;
        for (name, svg) in self.pictures() {
            fs::write(pictures.join(format!("{name}.svg")), svg).map_err(failed())?;
        }
        fs::write(docs.join("performance.md"), self.text()).map_err(failed())
    }

    /// The page.
    pub fn text(&self) -> String {
        let mut text = String::from(
            "# Performance\n\nWritten by `./x bench report`; do not edit. Everything stands on one \
             machine and shares it: read the ratios, which were measured in turn in one run, not \
             the figures.\n\n",
        );
        self.machine(&mut text);
        text.push_str("## Aims\n\n");
        text.push_str(&aims_table(&aims::all(self.results)));
        text.push_str("\n![get and put, by system](performance/systems.svg)\n");
        text.push_str("\n![YCSB, by system](performance/ycsb.svg)\n");
        text.push_str("\n## Where the time goes\n\n");
        self.stages(&mut text);
        text.push_str("\n## All cells\n\nMedians of the rounds.\n\n");
        self.cells(&mut text);
        if !self.micro.is_empty() {
            text.push_str("\n## Parts, alone\n\n| part | ns |\n|---|---|\n");
            for (name, nanos) in self.micro {
                let _ = writeln!(text, "| {name} | {nanos:.0} |");
            }
        }
        if !self.axes().is_empty() {
            let _ = writeln!(text, "\n## Growth\n\n{}", CURVES.trim());
            for axis in self.axes() {
                let (name, file) = (axis.name(), axis.name().replace(' ', "-"));
                let _ = writeln!(text, "\n![by {name}](performance/{file}.svg)");
                let _ = writeln!(text, "\n![p99 by {name}](performance/{file}-p99.svg)");
            }
        }
        let _ = write!(text, "\n## What was done\n\n{}\n", OPTIMISATIONS.trim());
        text
    }

    fn machine(&self, text: &mut String) {
        let idle = ["coracle", "etcd", "redis"].map(|system| {
            let cores = self.results.rate(&format!("idle neighbour/{system}")).unwrap_or(0.0);
            format!("{system} {:.1} %", cores * 100.0)
        });
        let rows = [
            ("machine", format!("{}, {}", report::processor(), report::machine())),
            ("kernel", format!("Linux {}", report::kernel())),
            ("Coracle", format!("{}, three nodes, 16 shards", env!("CARGO_PKG_VERSION"))),
            ("etcd", format!("{}, three nodes, its defaults, quota 8 GiB", Etcd::version())),
            ("Redis", format!("{}, one node, appendfsync always", Redis::version())),
            (
                "data",
                format!(
                    "{} keys of 16 bytes, values of {} bytes, three replicas, every write synced",
                    self.workload.keys,
                    self.workload.value_bytes()
                ),
            ),
            ("rounds", format!("{} of {:?} for each cell, in turn", self.rounds, self.window)),
            ("beside each other", format!("{} of a core, idle", idle.join(", "))),
            ("command", format!("`{}`", report::command())),
            ("took", format!("{:.0} min", self.took.as_secs_f64() / 60.0)),
        ];
        text.push_str("| | |\n|---|---|\n");
        for (name, value) in rows {
            let _ = writeln!(text, "| {name} | {value} |");
        }
        text.push('\n');
    }

    fn stages(&self, text: &mut String) {
        text.push_str(
            "Means. *Client and wire* is what the caller waited beyond the server's part; the \
             stages overlap: *replicate* holds the leader's and the followers' syncs and *apply*.\n\n",
        );
        let cells = ["get/coracle", "put/coracle", "batch get/coracle", "batch put/coracle"];
        let seen = cells.map(|cell| (cell, self.results.seen(cell)));
        let mut heading = "| | caller, p50 | client and wire | server |".to_owned();
        STAGES.iter().for_each(|stage| {
            let _ = write!(heading, " {} |", stage.replace('_', " "));
        });
        heading.push_str(" syncs/s/node | servers' cores | load's cores |\n|");
        let columns = 4 + STAGES.len() + 3;
        text.push_str(&heading);
        text.push_str(&"---|".repeat(columns));
        text.push('\n');
        for (cell, seen) in seen {
            let Some(seen) = seen else { continue };
            let _ = writeln!(text, "{}", self.stages_row(cell, seen));
        }
    }

    fn stages_row(&self, cell: &str, seen: &Seen) -> String {
        let p50 = self.results.latency(cell, crate::results::Quantile::P50).unwrap_or_default();
        let name = cell.trim_end_matches("/coracle");
        let outside = report::duration(p50.saturating_sub(seen.request));
        let mut row = format!(
            "| {name} | {} | {outside} | {} |",
            report::duration(p50),
            report::duration(seen.request)
        );
        for stage in STAGES {
            let found = seen.stages.iter().find(|(name, _)| *name == stage);
            let found = found.map_or("–".to_owned(), |(_, mean)| report::duration(*mean));
            let _ = write!(row, " {found} |");
        }
        let syncs = seen.syncs_per_second.map_or("–".to_owned(), report::rate);
        let _ = write!(row, " {syncs} | {:.2} | {:.2} |", seen.cores[0], seen.cores[1]);
        row
    }

    fn cells(&self, text: &mut String) {
        text.push_str("| cell | per s | p50 | p99 | p99.9 | failed |\n|---|---|---|---|---|---|\n");
        for (cell, rows) in self.results.rows() {
            if Axis::ALL.iter().any(|axis| cell.starts_with(&format!("{}/", axis.name()))) {
                continue;
            }
            let Some(row) = middle(rows) else { continue };
            let failed: u64 = rows.iter().flat_map(|row| row.errors.values()).sum();
            let latency = |at: usize| match row.latencies[at] {
                Duration::ZERO => "–".to_owned(),
                latency => report::duration(latency),
            };
            let (rate, p50, p99, p999) =
                (report::rate(row.per_second), latency(0), latency(1), latency(2));
            let _ = writeln!(text, "| {cell} | {rate} | {p50} | {p99} | {p999} | {failed} |");
        }
    }

    fn axes(&self) -> Vec<Axis> {
        let measured = |axis: &Axis| !self.points(*axis, "put").is_empty();
        Axis::ALL.into_iter().filter(measured).collect()
    }

    fn points(&self, axis: Axis, kind: &str) -> Vec<(f64, f64)> {
        let steps = axis.steps().iter().copied();
        let point = |step: u64| {
            let rate = self.results.rate(&format!("{}/{kind}/{step}", axis.name()))?;
            Some((step as f64, rate))
        };
        steps.filter_map(point).collect()
    }

    fn slowest(&self, axis: Axis, kind: &str) -> Vec<(f64, f64)> {
        let steps = axis.steps().iter().copied();
        let point = |step: u64| {
            let cell = format!("{}/{kind}/{step}", axis.name());
            let p99 = self.results.latency(&cell, crate::results::Quantile::P99)?;
            Some((step as f64, p99.as_secs_f64() * 1e3))
        };
        steps.filter_map(point).collect()
    }

    /// All pictures, by name.
    pub fn pictures(&self) -> Vec<(String, String)> {
        let rate = |cell: String| self.results.rate(&cell);
        let systems = ["coracle", "etcd", "redis", "rocksdb", "echo"];
        let group = |kind: &str| {
            (kind.to_owned(), systems.map(|system| rate(format!("{kind}/{system}"))).to_vec())
        };
        let bars = Bars {
            title: "Operations a second, 256 callers (logarithmic)".to_owned(),
            up: "operations a second".to_owned(),
            names: systems.map(str::to_owned).to_vec(),
            groups: ["get", "put", "unary get", "unary put"].map(group).to_vec(),
        };
        let mut pictures = vec![("systems".to_owned(), bars.svg())];
        let group = |letter: char| {
            let bars = ["coracle", "etcd"].map(|system| rate(format!("ycsb {letter}/{system}")));
            (letter.to_ascii_uppercase().to_string(), bars.to_vec())
        };
        let bars = Bars {
            title: "YCSB, operations a second, 256 callers (logarithmic)".to_owned(),
            up: "operations a second".to_owned(),
            names: vec!["coracle".to_owned(), "etcd".to_owned()],
            groups: ('a'..='f').map(group).collect(),
        };
        pictures.push(("ycsb".to_owned(), bars.svg()));
        for axis in self.axes() {
            let file = axis.name().replace(' ', "-");
            let lines = |what: &str, up: &str, of: &dyn Fn(&str) -> Vec<(f64, f64)>| Lines {
                title: format!("{what}, by {}", axis.name()),
                across: axis.name().to_owned(),
                up: up.to_owned(),
                is_log: true,
                lines: ["put", "get"].map(|kind| (kind.to_owned(), of(kind))).to_vec(),
            };
            let rates = lines("Throughput", "operations a second", &|kind| self.points(axis, kind));
            let p99 = lines("p99", "milliseconds", &|kind| self.slowest(axis, kind));
            pictures.push((file.clone(), rates.svg()));
            pictures.push((format!("{file}-p99"), p99.svg()));
        }
        pictures
    }
}

/// The row whose rate is the middle one.
fn middle(rows: &[Row]) -> Option<Row> {
    let mut rows = rows.to_vec();
    rows.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
    let at = rows.len().checked_sub(1)? / 2;
    Some(rows.swap_remove(at))
}

/// The table of aims, as Markdown.
pub fn aims_table(aims: &[Aim]) -> String {
    let mut text = String::from("| work | aim | reached | | figures |\n|---|---|---|---|---|\n");
    for aim in aims {
        let sign = if aim.at_least { "≥" } else { "≤" };
        let show = |value: f64| match aim.measure {
            "× etcd" => format!("{value:.2} × etcd"),
            "MiB" => format!("{value:.2} MiB"),
            measure => format!("{:.1} % {}", value * 100.0, measure.replace("share", "")),
        };
        let reached = aim.reached.map_or("not measured".to_owned(), show);
        let verdict = match aim.holds() {
            _ if aim.aim == 0.0 => "",
            Some(true) => "✓",
            Some(false) => "falls short",
            None => "?",
        };
        let wanted =
            if aim.aim == 0.0 { "–".to_owned() } else { format!("{sign} {}", show(aim.aim)) };
        let (work, figures) = (&aim.work, &aim.figures);
        let _ =
            writeln!(text, "| {work} | {wanted} | {} | {verdict} | {figures} |", reached.trim());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Distribution, Mix};

    #[test]
    fn the_page_holds_what_was_measured() {
        let mut results = Results::default();
        for (cell, rate) in [
            ("get/coracle", 300_000.0),
            ("get/etcd", 7_000.0),
            ("ycsb a/coracle", 5.0),
            ("clients/put/1", 500.0),
            ("clients/put/4", 1_500.0),
        ] {
            results.note_figure(cell, rate);
        }
        let workload = Workload::new(Mix::reads(0), Distribution::Uniform, 10, 256, 1).unwrap();
        let page = Page {
            results: &results,
            workload: &workload,
            rounds: 1,
            window: Duration::from_secs(3),
            took: Duration::from_secs(120),
            micro: &[("ring".to_owned(), 12.0)],
        };
        let dir = tempfile::tempdir().unwrap();
        page.write(dir.path()).unwrap();
        let text = fs::read_to_string(dir.path().join("performance.md")).unwrap();
        assert!(text.contains("≥ 40.00 × etcd | 42.86 × etcd | ✓"), "{text}");
        assert!(text.contains("10 keys of 16 bytes") && text.contains("| ring | 12 |"), "{text}");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            assert!(dir.path().join(link).exists(), "{link}");
        }
        assert!(text.contains("clients.svg") && !text.contains("shards.svg"), "{text}");
    }
}

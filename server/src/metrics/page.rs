//! Owns `docs/metrics.md`: the table of metrics as a page. Does not know what is measured.

use std::fmt::Write;

use super::{Kind, LABELS, TABLE};

/// The page, whole.
pub fn page() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         Every node serves them on `GET /metrics` of its HTTP listener (`listen.http`), in OpenMetrics' text form. Base units;\n\
         durations are histograms in seconds. Generated from `server/src/metrics.rs`: `./x fix` writes it anew.\n",
    );
    for (area, specs) in TABLE {
        let _ =
            write!(out, "\n## {area}\n\n| metric | kind | labels | meaning |\n|---|---|---|---|\n");
        for spec in *specs {
            let kind = match spec.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let labels: Vec<String> =
                spec.labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(
                out,
                "| `{}` | {kind} | {} | {} |",
                spec.name,
                labels.join(", "),
                spec.help
            );
        }
    }
    out.push_str("\n## Labels\n\n| label | values |\n|---|---|\n");
    for (label, values) in LABELS {
        let _ = writeln!(out, "| `{label}` | {values} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_follow_the_rules_and_are_told_apart() {
        let mut names = BTreeSet::new();
        for spec in TABLE.iter().flat_map(|(_, specs)| *specs) {
            let name = spec.name;
            assert!(names.insert(name), "{name} stands twice");
            assert!(name.starts_with("coracle_"), "{name}");
            assert_eq!(name.ends_with("_total"), spec.kind == Kind::Counter, "{name}");
            if spec.kind == Kind::Histogram {
                assert!(name.ends_with("_seconds"), "{name}: the buckets are seconds");
            }
            assert!(!spec.help.ends_with('.'), "{name}: the encoder adds the full stop");
        }
    }

    #[test]
    fn every_label_is_explained_and_used() {
        let used: BTreeSet<&str> = TABLE
            .iter()
            .flat_map(|(_, specs)| *specs)
            .flat_map(|spec| spec.labels)
            .copied()
            .collect();
        let explained: BTreeSet<&str> = LABELS.iter().map(|(label, _)| *label).collect();
        assert_eq!(used, explained);
    }
}

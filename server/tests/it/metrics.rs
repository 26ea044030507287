//! The page and the scraped text agree with the table, and handles count what they say.

use std::path::Path;
use std::time::Duration;

use coracle_proto::reason::Reason;
use coracle_server::metrics::{Build, Consistency, Kind, Metrics, Stage, TABLE, page};

use crate::generated::expect_generated;

fn build() -> Build {
    Build {
        version: "0.1.0".to_owned(),
        git: "abc".to_owned(),
        rocksdb: "10.4".to_owned(),
        engine: "memory".to_owned(),
    }
}

#[test]
fn the_generated_page_is_the_one_in_docs() {
    expect_generated(Path::new("docs/metrics.md"), &page());
}

/// Touches every metric that has labels, so that all are shown.
fn touch(metrics: &Metrics) {
    metrics.identify("n1", "a");
    let get = metrics.method("Get");
    get.succeed(Consistency::Linearizable, Duration::from_millis(3));
    metrics.stages().drop_late(Stage::Queue);
    metrics.log_fsync_duration_seconds.observe(0.001);
    metrics.shard_size_bytes.with(["s1"]).set(7);
    metrics.clock_offset_seconds.with(["n2"]).set(-0.25);
    metrics.replica_lag_entries.with(["s1", "n2"]).set(3);
    metrics.replica_lag_seconds.with(["s1", "n2"]).set(0.5);
    metrics.memory_bytes.with(["log_cache"]).set(5);
    metrics.shard_reads_per_second.with(["s1"]).set(4);
    metrics.shard_writes_per_second.with(["s1"]).set(2);
}

#[test]
fn every_metric_of_the_table_is_scraped_as_its_kind() {
    let metrics = Metrics::new(&build());
    touch(&metrics);
    let text = metrics.render();
    assert!(text.ends_with("# EOF\n"));
    let mut told = 0;
    for spec in TABLE.iter().flat_map(|(_, specs)| *specs) {
        let kind = match spec.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let family = spec.name.strip_suffix("_total").unwrap_or(spec.name);
        assert!(text.contains(&format!("# TYPE {family} {kind}\n")), "{}: {text}", spec.name);
        let sample = match spec.kind {
            Kind::Histogram => format!("\n{family}_count"),
            _ => format!("\n{}", spec.name),
        };
        let line = text.split(&sample).nth(1).and_then(|rest| rest.lines().next());
        let line = line.unwrap_or_else(|| panic!("{} has no sample", spec.name));
        for label in spec.labels {
            assert!(line.contains(&format!("{label}=\"")), "{}: {line}", spec.name);
        }
        told += 1;
    }
    assert_eq!(text.matches("# TYPE ").count(), told, "nothing beside the table");
}

#[test]
fn methods_count_answers_by_code_and_reason() {
    let metrics = Metrics::new(&build());
    let put = metrics.method("Put");
    let guard = put.begin();
    assert_eq!(metrics.requests_in_flight.get(), 1);
    put.succeed(Consistency::None, Duration::from_millis(3));
    put.succeed(Consistency::None, Duration::from_millis(3));
    put.fail(Reason::NotLeader, Consistency::None, Duration::from_micros(50));
    put.cancel(Consistency::None, Duration::from_secs(1));
    drop(guard);
    let text = metrics.render();
    for line in [
        "coracle_requests_total{method=\"Put\",code=\"OK\",reason=\"\"} 2\n",
        "coracle_requests_total{method=\"Put\",code=\"UNAVAILABLE\",reason=\"NOT_LEADER\"} 1\n",
        "coracle_requests_total{method=\"Put\",code=\"CANCELLED\",reason=\"\"} 1\n",
        "coracle_request_duration_seconds_count{method=\"Put\",consistency=\"\"} 4\n",
        "coracle_request_duration_seconds_bucket{le=\"0.005\",method=\"Put\",consistency=\"\"} 3\n",
        "coracle_requests_in_flight 0\n",
        "coracle_build_info{version=\"0.1.0\",git=\"abc\",rocksdb=\"10.4\",engine=\"memory\"} 1\n",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    assert!(!text.contains("consistency=\"any\""), "no series before its first use");
}

#[test]
fn stages_are_there_from_the_start_and_counted_one_by_one() {
    let metrics = Metrics::new(&build());
    let stages = metrics.stages();
    stages.observe(Stage::LogSync, Duration::from_millis(2));
    stages.drop_late(Stage::Propose);
    let text = metrics.render();
    for stage in Stage::ALL {
        let count = u64::from(stage == Stage::LogSync);
        let name = stage.as_str();
        let line = format!("coracle_stage_duration_seconds_count{{stage=\"{name}\"}} {count}\n");
        assert!(text.contains(&line), "{line} is not in:\n{text}");
    }
    assert!(text.contains("coracle_deadline_dropped_total{stage=\"propose\"} 1\n"), "{text}");
}

/// What is gone is no longer shown; two nodes in one process count apart.
#[test]
fn series_can_be_removed_and_registries_are_apart() {
    let (one, other) = (Metrics::new(&build()), Metrics::new(&build()));
    one.shard_size_bytes.with(["s7"]).set(1);
    assert!(one.render().contains("shard=\"s7\""));
    assert!(!other.render().contains("shard=\"s7\""));
    one.shard_size_bytes.remove(["s7"]);
    assert!(!one.render().contains("shard=\"s7\""));
}

/// Two scrapes differ only in what was counted: the order of series does not depend on the run.
#[test]
fn the_order_of_series_is_fixed() {
    let text = |order: [&str; 3]| {
        let metrics = Metrics::new(&build());
        for shard in order {
            metrics.shard_size_bytes.with([shard]).set(1);
        }
        let text = metrics.render();
        text.lines().filter(|line| !line.contains("uptime")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(text(["s1", "s2", "s3"]), text(["s3", "s1", "s2"]));
}

//! Owns the aims and how far they are reached. Measures nothing: it reads [`Results`].

use crate::results::{Quantile, Results};

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Aim {
    /// What is done.
    pub work: String,
    /// What is compared.
    pub measure: &'static str,
    /// What shall be reached.
    pub aim: f64,
    /// Whether it is the least, or the most.
    pub at_least: bool,
    /// What was reached; `None` where it was not measured.
    pub reached: Option<f64>,
    /// The figures behind it.
    pub figures: String,
}

impl Aim {
    /// Whether it is reached; `None` where it was not measured.
    pub fn holds(&self) -> Option<bool> {
        let reached = self.reached?;
        Some(if self.at_least { reached >= self.aim } else { reached <= self.aim })
    }
}

/// The aims of the project, with what these results say of them.
pub fn all(results: &Results) -> Vec<Aim> {
    let mut aims = vec![
        at_least(results, "linearizable get, 256 clients, pipeline", 40.0, "get"),
        at_least(results, "put, 256 clients, pipeline, durable on a majority", 10.0, "put"),
        at_least(results, "unary get from a plain gRPC client, 64 connections", 2.0, "unary get"),
        at_least(results, "unary put from a plain gRPC client, 64 connections", 2.0, "unary put"),
        at_most(results, "p50 of one put, one client, idle", 1.0, "one put", Quantile::P50),
        at_most(results, "p99 of get at half of etcd's peak", 0.5, "half get", Quantile::P99),
        at_most(results, "p99 of put at half of etcd's peak", 0.5, "half put", Quantile::P99),
    ];
    for letter in ['a', 'b', 'c', 'd', 'f'] {
        let work = format!("YCSB {}, 256 clients", letter.to_ascii_uppercase());
        aims.push(at_least(results, &work, 10.0, &format!("ycsb {letter}")));
    }
    aims.extend([
        Aim { aim: 0.0, ..at_least(results, "YCSB E (reported, no aim)", 0.0, "ycsb e") },
        part(results, "put, of three RocksDBs with the same puts to a sync", 0.5, "put"),
        part(results, "put, 1,024 clients, of three RocksDBs likewise", 0.5, "batch put"),
        get_limit(results),
        part(results, "scan, MB/s, of RocksDB's own iterator", 0.5, "scan"),
        at_least(results, "put, 1,024 under way: pipeline, etcd's Txn of 128", 3.0, "batch put"),
        at_least(results, "get, 1,024 under way: pipeline, etcd's Txn of 128", 3.0, "batch get"),
        overload(results, "goodput during 3 × overload", 0.9, "overload/during"),
        overload(results, "goodput 10 s after it", 0.95, "overload/after"),
    ]);
    aims.extend(idle(results));
    aims
}

fn rate(results: &Results, cell: &str) -> String {
    let of = |rate: f64| if rate < 100.0 { format!("{rate:.1}") } else { format!("{rate:.0}") };
    results.rate(cell).map_or("not measured".to_owned(), of)
}

fn at_least(results: &Results, work: &str, aim: f64, cell: &str) -> Aim {
    let (ours, theirs) = (format!("{cell}/coracle"), format!("{cell}/etcd"));
    Aim {
        work: work.to_owned(),
        measure: "× etcd",
        aim,
        at_least: true,
        reached: results.ratio(&ours, &theirs),
        figures: format!("{} / {} per s", rate(results, &ours), rate(results, &theirs)),
    }
}

fn at_most(results: &Results, work: &str, aim: f64, cell: &str, quantile: Quantile) -> Aim {
    let (ours, theirs) = (format!("{cell}/coracle"), format!("{cell}/etcd"));
    let latency = |cell: &str| match results.latency(cell, quantile) {
        Some(latency) => crate::report::duration(latency),
        None => "not measured".to_owned(),
    };
    Aim {
        work: work.to_owned(),
        measure: "× etcd",
        aim,
        at_least: false,
        reached: results.latency_ratio(&ours, &theirs, quantile),
        figures: format!("{} / {}", latency(&ours), latency(&theirs)),
    }
}

fn part(results: &Results, work: &str, aim: f64, cell: &str) -> Aim {
    let (ours, limit) = (format!("{cell}/coracle"), format!("{cell}/rocksdb"));
    let batch = results.rate(&format!("{cell}/puts per sync"));
    let batch = batch.map_or(String::new(), |batch| format!(", {batch:.0} puts to a sync"));
    Aim {
        work: work.to_owned(),
        measure: "of the limit",
        aim,
        at_least: true,
        reached: results.ratio(&ours, &limit),
        figures: format!("{} / {} per s{batch}", rate(results, &ours), rate(results, &limit)),
    }
}

/// One after the other: the frames, echoed empty, then the reads from RocksDB.
fn get_limit(results: &Results) -> Aim {
    let [ours, echo, rocksdb] = ["get/coracle", "get/echo", "get/rocksdb"].map(|c| results.rate(c));
    let limit = echo.zip(rocksdb).map(|(echo, rocksdb)| 1.0 / (1.0 / echo + 1.0 / rocksdb));
    Aim {
        work: "get, of 1 / (1 / echo + 1 / RocksDB)".to_owned(),
        measure: "of the limit",
        aim: 0.6,
        at_least: true,
        reached: ours.zip(limit).map(|(ours, limit)| ours / limit),
        figures: format!(
            "{} / {:.0} per s (echo {}, RocksDB {})",
            rate(results, "get/coracle"),
            limit.unwrap_or(0.0),
            rate(results, "get/echo"),
            rate(results, "get/rocksdb")
        ),
    }
}

fn overload(results: &Results, work: &str, aim: f64, cell: &str) -> Aim {
    let [before, after] = ["before", "after"].map(|at| format!("overload/memory {at}"));
    let memory = format!("{} → {} MiB", rate(results, &before), rate(results, &after));
    let (now, peak) = (rate(results, cell), rate(results, "overload/before"));
    Aim {
        work: work.to_owned(),
        measure: "of the peak",
        aim,
        at_least: true,
        reached: results.ratio(cell, "overload/before"),
        figures: format!("{now} / {peak} per s, memory {memory}"),
    }
}

fn idle(results: &Results) -> Vec<Aim> {
    let cores = |shards: u32, aim: f64| Aim {
        work: format!("idle: five nodes, {shards} shards, of a core per node"),
        measure: "share",
        aim,
        at_least: false,
        reached: results.rate(&format!("idle {shards}/cores")),
        figures: format!("{} MiB in all", rate(results, &format!("idle {shards}/memory"))),
    };
    let [few, many] = [16, 64].map(|shards| results.rate(&format!("idle {shards}/memory")));
    // Three replicas of each shard.
    let replica = few.zip(many).map(|(few, many)| (many - few) / (48.0 * 3.0));
    let memory = Aim {
        work: "idle: memory of one more replica, RocksDB's with it".to_owned(),
        measure: "MiB",
        aim: 1.0,
        at_least: false,
        reached: replica,
        figures: "(64 shards − 16 shards) / 144 replicas".to_owned(),
    };
    vec![cores(16, 0.03), cores(64, 0.08), memory]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_aim_says_whether_it_holds() {
        let mut results = Results::default();
        let unmeasured = all(&results);
        assert!(unmeasured.iter().all(|aim| aim.holds().is_none()));
        for (cell, rate) in [
            ("get/coracle", 300_000.0),
            ("get/etcd", 7_000.0),
            ("get/echo", 1_000_000.0),
            ("get/rocksdb", 1_000_000.0),
            ("put/coracle", 7_000.0),
            ("put/etcd", 7_000.0),
            ("idle 16/cores", 0.02),
        ] {
            results.note_figure(cell, rate);
        }
        let aims = all(&results);
        let found = |work: &str| aims.iter().find(|aim| aim.work.starts_with(work)).unwrap();
        assert_eq!(found("linearizable get").holds(), Some(true));
        assert_eq!(found("put, 256").holds(), Some(false));
        let limit = found("get, of 1 /");
        assert!((limit.reached.unwrap() - 0.6).abs() < 1e-9, "{limit:?}");
        assert_eq!(found("idle: five nodes, 16").holds(), Some(true));
        assert_eq!(found("idle: five nodes, 64").holds(), None);
    }
}

//! Many seeds: each in a process of its own, so that nothing leaks from one into the next, one that
//! hangs can be ended, and all cores work. Owns the processes, the summary and the verdict.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::simulation::Report;

/// A run that takes so long in real time is caught in a circle: a usual one takes seconds.
const SEED_DEADLINE: Duration = Duration::from_secs(600);

/// The mark before the report in a child's output.
pub const REPORT_MARK: &str = "report: ";

/// Which seeds, and how.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// The harness itself.
    pub program: PathBuf,
    /// The first seed.
    pub from: u64,
    /// How many.
    pub seeds: u64,
    /// Processes at a time.
    pub jobs: usize,
    /// No seed is begun after one on which something did not hold.
    pub until_failure: bool,
    /// What each is asked for, beside its seed.
    pub args: Vec<String>,
}

/// What came of them.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Reports, by seed.
    pub reports: BTreeMap<u64, Report>,
    /// How long it took.
    pub took: Duration,
}

impl Sweep {
    /// Runs all seeds; `each` hears of every report.
    pub fn run(&self, each: impl Fn(&Report) + Sync) -> Summary {
        let began = Instant::now();
        let (next, ends) = (AtomicU64::new(0), AtomicBool::new(false));
        let reports = Mutex::new(BTreeMap::new());
        thread::scope(|scope| {
            for _ in 0..self.jobs.max(1) {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::SeqCst);
                        if at >= self.seeds || ends.load(Ordering::SeqCst) {
                            return;
                        }
                        let report = self.one(self.from + at);
                        each(&report);
                        let failed = !report.violations.is_empty();
                        ends.fetch_or(self.until_failure && failed, Ordering::SeqCst);
                        let mut reports = reports.lock().expect("nobody panics with the lock");
                        reports.insert(report.seed, report);
                    }
                });
            }
        });
        let reports = reports.into_inner().expect("nobody panicked with the lock");
        Summary { reports, took: began.elapsed() }
    }

    /// The command that runs one of the seeds again.
    pub fn reproduction(&self, seed: u64) -> String {
        format!("coracle-jepsen sim --seed {seed} {} --trace", self.args.join(" "))
    }

    fn one(&self, seed: u64) -> Report {
        let failed = |why: String| Report { seed, violations: vec![why], ..Report::default() };
        match self.child(seed) {
            Ok(output) => {
                let line = output.lines().rev().find_map(|line| line.strip_prefix(REPORT_MARK));
                let report = line.and_then(|line| serde_json::from_str(line).ok());
                report
                    .unwrap_or_else(|| failed(format!("the run ended without a report:\n{output}")))
            }
            Err(error) => failed(error.to_string()),
        }
    }

    fn child(&self, seed: u64) -> io::Result<String> {
        let mut child = Command::new(&self.program)
            .args(["sim", "--seed", &seed.to_string(), "--report"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut out = child.stdout.take().expect("it was asked for");
        let mut err = child.stderr.take().expect("it was asked for");
        let (out, err, ended) = thread::scope(|scope| {
            let out = scope.spawn(move || text(&mut out));
            let err = scope.spawn(move || text(&mut err));
            let ended = wait(&mut child);
            (out.join().unwrap_or_default(), err.join().unwrap_or_default(), ended)
        });
        match ended? {
            true => Ok(format!("{err}{out}")),
            false => {
                Err(io::Error::other(format!("it did not end within {SEED_DEADLINE:?}\n{err}")))
            }
        }
    }
}

fn text(pipe: &mut dyn Read) -> String {
    let mut bytes = Vec::new();
    // What came before the pipe broke is all there is.
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// False when it had to be ended.
fn wait(child: &mut Child) -> io::Result<bool> {
    let deadline = Instant::now() + SEED_DEADLINE;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(true)
}

impl Summary {
    /// The seeds on which something did not hold.
    pub fn failed(&self) -> Vec<u64> {
        let failed = self.reports.values().filter(|report| !report.violations.is_empty());
        failed.map(|report| report.seed).collect()
    }

    /// Faults applied in all runs together, by kind.
    pub fn faults(&self) -> BTreeMap<&str, u64> {
        let mut faults = BTreeMap::new();
        for report in self.reports.values() {
            for (kind, times) in &report.faults {
                *faults.entry(kind.as_str()).or_default() += times;
            }
        }
        faults
    }

    /// As one prints it.
    pub fn text(&self) -> String {
        let sum = |of: fn(&Report) -> u64| self.reports.values().map(of).sum::<u64>();
        let mut acknowledged: Vec<u64> = self.reports.values().map(|r| r.acknowledged).collect();
        acknowledged.sort_unstable();
        let median = acknowledged.get(acknowledged.len() / 2).copied().unwrap_or(0);
        let faults = self.faults().into_iter().map(|(kind, times)| format!("{kind} {times}"));
        format!(
            "{} seeds, {} failed; {} virtual seconds in {:.1} s\n\
             operations: {} ok, {} failed, {} unknown; acknowledged writes {} (median seed {median})\n\
             elections: {}; faults: {}",
            self.reports.len(),
            self.failed().len(),
            sum(|report| report.virtual_ms) / 1_000,
            self.took.as_secs_f64(),
            sum(|report| report.ok),
            sum(|report| report.failed),
            sum(|report| report.unknown),
            sum(|report| report.acknowledged),
            sum(|report| report.elections),
            faults.collect::<Vec<_>>().join(", "),
        )
    }
}

/// One report in a line.
pub fn line(report: &Report) -> String {
    let verdict = if report.violations.is_empty() { "ok" } else { "FAILED" };
    let faults: u64 = report.faults.values().sum();
    format!(
        "seed {:>6} {verdict}: {} ok, {} failed, {} unknown, {} acknowledged, {faults} faults, \
         {} elections, {} messages, {:.1} virtual s, trace {}",
        report.seed,
        report.ok,
        report.failed,
        report.unknown,
        report.acknowledged,
        report.elections,
        report.messages,
        report.virtual_ms as f64 / 1_000.0,
        report.trace_hash,
    )
}

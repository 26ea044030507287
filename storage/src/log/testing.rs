//! Owns the crash property of the log: random histories on a hostile disk, held against a model.
//! Used by this crate's tests and by the fault harness. Does not test damage (bit flips): that has
//! tests of its own.
//!
//! The property: after any crash, the log shows the model after some first part of the submitted
//! operations, over all replicas, that includes all acknowledged ones. Nothing else: no gap, no
//! half, no other bytes.

mod model;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use self::model::{Change, Model};
use super::{Done, Log, LogEntry, ReplicaId};
use crate::error::Error;
use crate::exec::{Exec, Job, Step, Task, Wake};
use crate::fs::faulty::{Dice, FaultyFs, Loss};
use crate::options::{LogOptions, Sabotage};

/// An [`Exec`] on which nothing runs by itself: [`StepExec::run`] gives the workers their turns, on
/// the caller's thread.
#[derive(Default)]
pub struct StepExec {
    workers: Mutex<Vec<Worker>>,
    jobs: Mutex<Vec<Job>>,
}

struct Worker {
    woken: Arc<AtomicBool>,
    step: Arc<Mutex<Step>>,
}

impl StepExec {
    /// An exec without workers.
    pub fn new() -> Arc<StepExec> {
        Arc::new(StepExec::default())
    }

    /// Runs every worker that was woken and every job, until none is left.
    pub fn run(&self) {
        loop {
            let jobs = std::mem::take(&mut *self.jobs.lock());
            let mut ran = !jobs.is_empty();
            jobs.into_iter().for_each(|job| job());
            let due: Vec<Arc<Mutex<Step>>> = {
                let mut workers = self.workers.lock();
                // Ours is the only flag left when every wake was dropped.
                workers.retain(|worker| {
                    Arc::strong_count(&worker.woken) > 1 || worker.woken.load(Ordering::SeqCst)
                });
                let woken =
                    workers.iter().filter(|worker| worker.woken.swap(false, Ordering::SeqCst));
                woken.map(|worker| worker.step.clone()).collect()
            };
            for step in due {
                ran = true;
                if !(step.lock())() {
                    self.workers.lock().retain(|worker| !Arc::ptr_eq(&worker.step, &step));
                }
            }
            if !ran {
                return;
            }
        }
    }
}

impl Exec for StepExec {
    fn worker(&self, _name: &str, step: Step) -> Wake {
        let woken = Arc::new(AtomicBool::new(false));
        let worker = Worker { woken: woken.clone(), step: Arc::new(Mutex::new(step)) };
        self.workers.lock().push(worker);
        Wake::new(move || woken.store(true, Ordering::SeqCst))
    }

    fn blocking(&self, job: Job) {
        self.jobs.lock().push(job);
    }

    fn spawn(&self, _name: &'static str, _task: Task) {
        unreachable!("storage spawns no tasks");
    }
}

/// What a history did: to see that histories reach what they are meant to reach.
#[derive(Copy, Clone, Default, Debug)]
pub struct HistoryReport {
    /// Operations submitted.
    pub submitted: u64,
    /// Of these, acknowledged.
    pub acknowledged: u64,
    /// Crashes of the machine, and kills of the process.
    pub crashes: u64,
    /// Crashes while the log was being opened.
    pub crashes_in_open: u64,
    /// Segments freed.
    pub freed: u64,
    /// Operations that were not acknowledged, and were there after the crash.
    pub kept_unacknowledged: u64,
    /// Bytes of torn tails that were cut.
    pub torn_bytes: u64,
}

/// Runs the history of a seed; Err says what did not hold, with the seed.
pub fn run_history(seed: u64, sabotage: Option<Sabotage>) -> Result<HistoryReport, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| History::new(seed, sabotage).run()));
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    });
    outcome.map_err(|why| format!("seed {seed}: {why}"))
}

const DIR: &str = "log";

struct History {
    dice: Dice,
    fs: FaultyFs,
    options: LogOptions,
    fatal: Arc<AtomicUsize>,
    /// What is certainly durable.
    base: Model,
    /// What was submitted since, in order.
    submitted: Vec<Change>,
    /// Committed positions since, each with the number of operations submitted before it.
    hints: Vec<(usize, ReplicaId, Bytes)>,
    /// `base` with all that was submitted: what readers must see.
    current: Model,
    /// How many of `submitted` were acknowledged, and whether one was out of order.
    acknowledged: Arc<AtomicUsize>,
    out_of_order: Arc<AtomicBool>,
    next_replica: u64,
    report: HistoryReport,
}

impl History {
    fn new(seed: u64, sabotage: Option<Sabotage>) -> History {
        let mut dice = Dice::new(seed);
        let fatal = Arc::new(AtomicUsize::new(0));
        let counted = fatal.clone();
        let options = LogOptions {
            segment_bytes: [16 << 10, 32 << 10, 64 << 10][dice.below(3) as usize],
            log_bytes_target: [48 << 10, 128 << 10][dice.below(2) as usize],
            cache_bytes: [0, 2 << 10, 1 << 20][dice.below(3) as usize],
            batch_bytes: [8 << 10, 64 << 10][dice.below(2) as usize],
            salt: dice.roll(),
            on_fatal: Arc::new(move |_| {
                counted.fetch_add(1, Ordering::SeqCst);
            }),
            sabotage,
            ..LogOptions::test_min()
        };
        let fs = FaultyFs::new(dice.roll());
        History {
            dice,
            fs,
            options,
            fatal,
            base: Model::default(),
            submitted: Vec::new(),
            hints: Vec::new(),
            current: Model::default(),
            acknowledged: Arc::new(AtomicUsize::new(0)),
            out_of_order: Arc::new(AtomicBool::new(false)),
            next_replica: 1,
            report: HistoryReport::default(),
        }
    }

    fn run(mut self) -> Result<HistoryReport, String> {
        let lives = 2 + self.dice.below(5);
        for _ in 0..lives {
            if !self.dice.one_in(4) {
                let ops = 1 + self.dice.below(80);
                self.fs.crash_at(self.fs.ops() + ops);
            }
            let exec = StepExec::new();
            let log = match self.open(exec.clone()) {
                Ok(log) => log,
                Err(_) if self.fs.crashed() => {
                    self.report.crashes_in_open += 1;
                    self.crash();
                    continue;
                }
                Err(error) => return Err(format!("the log does not open: {error}")),
            };
            let steps = self.dice.below(120);
            for _ in 0..steps {
                self.step(&log, &exec)?;
                if self.fs.crashed() {
                    break;
                }
            }
            if !self.fs.crashed() && self.dice.one_in(3) {
                self.close(&log, &exec)?;
            }
            drop(log);
            self.crash();
        }
        let exec = StepExec::new();
        let log = self.open(exec.clone()).map_err(|error| format!("the last open: {error}"))?;
        self.close(&log, &exec)?;
        Ok(self.report)
    }

    fn open(&mut self, exec: Arc<StepExec>) -> Result<Log, String> {
        let fs = Arc::new(self.fs.clone());
        let opened = Log::open(fs, exec, Path::new(DIR), self.options.clone());
        let (log, recovery) = opened.map_err(|error| error.to_string())?;
        self.report.torn_bytes += recovery.torn_bytes;
        if !recovery.recovering.is_empty() {
            return Err(format!("taken for damage: {:?}", recovery.recovering));
        }
        let observed = Model::observe(&log, &recovery, &mut self.dice)?;
        self.settle(observed)?;
        Ok(log)
    }

    /// Finds the first part of what was submitted that explains what the log shows.
    fn settle(&mut self, observed: Model) -> Result<(), String> {
        let acknowledged = self.acknowledged.load(Ordering::SeqCst);
        let mut model = self.base.clone();
        for (at, change) in self.submitted.iter().enumerate().take(acknowledged) {
            model.apply(change, at);
        }
        let mut why = model.difference(&observed);
        let mut kept = why.is_none().then_some(acknowledged);
        for (at, change) in self.submitted.iter().enumerate().skip(acknowledged) {
            model.apply(change, at);
            let difference = model.difference(&observed);
            if difference.is_none() {
                // Some operations change nothing: of all parts that explain what is seen, the
                // longest.
                kept = Some(at + 1);
            }
            why = why.or(difference);
        }
        let Some(kept) = kept else {
            let (why, all) = (why.unwrap_or_default(), self.submitted.len());
            return Err(format!(
                "no part from {acknowledged} to {all} of the submitted operations explains: {why}"
            ));
        };
        observed.check_hints(&self.base, &self.hints, kept)?;
        self.report.kept_unacknowledged += (kept - acknowledged) as u64;
        self.base = observed.clone();
        self.current = observed;
        self.submitted.clear();
        self.hints.clear();
        self.acknowledged = Arc::default();
        Ok(())
    }

    fn step(&mut self, log: &Log, exec: &StepExec) -> Result<(), String> {
        match self.dice.below(20) {
            0..=3 => exec.run(),
            4 => self.check(log)?,
            5 => {
                log.probe(Box::new(|_| {}));
            }
            6 => self.hint(log),
            7 => self.refused(log)?,
            _ => {
                if let Some(change) =
                    self.current.random_change(&mut self.dice, &mut self.next_replica)
                {
                    self.submit(log, change);
                }
            }
        }
        if self.out_of_order.load(Ordering::SeqCst) {
            return Err("operations were answered out of order".to_owned());
        }
        let fatal = self.fatal.load(Ordering::SeqCst);
        if fatal > usize::from(self.fs.crashed()) {
            return Err(format!("on_fatal was called {fatal} times"));
        }
        let stats = log.stats();
        self.report.freed = self.report.freed.max(stats.oldest_segment.saturating_sub(1));
        Ok(())
    }

    fn submit(&mut self, log: &Log, change: Change) {
        let at = self.submitted.len();
        let (acknowledged, out_of_order) = (self.acknowledged.clone(), self.out_of_order.clone());
        let crashed = self.fs.clone();
        let done: Done = Box::new(move |outcome| match outcome {
            Ok(()) => {
                let before = acknowledged.swap(at + 1, Ordering::SeqCst);
                if before != at {
                    out_of_order.store(true, Ordering::SeqCst);
                }
            }
            Err(error) => assert!(crashed.crashed(), "refused without a reason: {error}"),
        });
        self.report.submitted += 1;
        change.submit(log, done);
        self.current.apply(&change, at);
        self.submitted.push(change);
    }

    /// A hint rides along without an answer.
    fn hint(&mut self, log: &Log) {
        if let Some(id) = self.current.random_replica(&mut self.dice) {
            let hint = Bytes::copy_from_slice(&self.dice.roll().to_le_bytes());
            log.save_committed(id, hint.clone());
            self.current.set_committed(id, hint.clone());
            self.hints.push((self.submitted.len(), id, hint));
        }
    }

    /// Calls that break a rule are refused at once and change nothing.
    fn refused(&mut self, log: &Log) -> Result<(), String> {
        let Some(id) = self.current.random_replica(&mut self.dice) else {
            return Ok(());
        };
        let refused = Arc::new(AtomicUsize::new(0));
        let done = || -> Done {
            let refused = refused.clone();
            Box::new(move |outcome| {
                let expected = matches!(
                    outcome.as_ref().map_err(|error| &**error),
                    Err(Error::Invalid { .. } | Error::UnknownReplica(_) | Error::Stopped { .. })
                );
                refused.fetch_add(usize::from(expected), Ordering::SeqCst);
            })
        };
        let next = self.current.next_index(id).unwrap_or(7);
        let entry = |index| LogEntry { index, id: [0; 16], payload: Bytes::new() };
        log.append(id, vec![entry(next), entry(next + 2)], done());
        log.create(id, done());
        log.save_vote(ReplicaId(u64::MAX), Bytes::new(), done());
        match refused.load(Ordering::SeqCst) {
            3 => Ok(()),
            refused => Err(format!("{refused} of 3 wrong calls were refused")),
        }
    }

    /// Readers see everything that was submitted.
    fn check(&mut self, log: &Log) -> Result<(), String> {
        let seen = Model::observe_replicas(log, self.current.replica_ids(), &mut self.dice);
        match seen {
            Ok(mut seen) => {
                seen.destroyed = self.current.destroyed.clone();
                match self.current.difference_with_hints(&seen) {
                    Some(why) => Err(format!("readers see something else: {why}")),
                    None => Ok(()),
                }
            }
            Err(_) if self.fs.crashed() => Ok(()),
            Err(why) => Err(why),
        }
    }

    fn close(&mut self, log: &Log, exec: &StepExec) -> Result<(), String> {
        log.close();
        exec.run();
        let acknowledged = self.acknowledged.load(Ordering::SeqCst);
        if !self.fs.crashed() && acknowledged != self.submitted.len() {
            return Err("closing did not finish what was queued".to_owned());
        }
        Ok(())
    }

    fn crash(&mut self) {
        let loss =
            [Loss::All, Loss::Subset, Loss::Subset, Loss::Nothing][self.dice.below(4) as usize];
        self.report.crashes += 1;
        self.fs = self.fs.crash(loss);
        self.fatal.store(0, Ordering::SeqCst);
        self.report.acknowledged += self.acknowledged.load(Ordering::SeqCst) as u64;
    }
}

//! One seed: a cluster, a load, a mix of faults, and what must hold while they go on and after they
//! end. Owns the run and its report. Everything in it follows from the seed, on one thread and the
//! runtime's paused clock; where another run of the seed goes another way, that is a defect.

mod draw;
mod verdict;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::fs::faulty::Dice;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::checker::{Violation, search, witness};
use crate::cluster::sim::{Cluster, Settings};
use crate::history::{History, Kind, Recorder};
use crate::invariant::Watch;
use crate::nemesis::{Mix, Nemesis};
use crate::trace::{Detail, Trace};
use crate::workload::register::{Load, Worker};

/// Between two looks at the nodes.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Making a cluster on healthy machines takes a second or two.
const FORM_DEADLINE: Duration = Duration::from_secs(40);

/// A client that was told to stop finishes its call first, which has a timeout of its own.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// Calls give up after so long: longer than a failover, short enough that clients get on.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(3);

/// Between two replicas that are flushed and compacted, at most: what the history has passed is gone
/// soon after.
const RECLAIM_PAUSE_MS_MAX: u64 = 1_000;

/// What is asked of a run, beside its seed.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long faults go on, in virtual time.
    pub lasts: Duration,
    /// How many nodes; `None` lets the seed choose 3 or 5.
    pub nodes: Option<usize>,
    /// What is printed.
    pub detail: Detail,
    /// Where the history is written.
    pub history: Option<PathBuf>,
    /// Disks that lie about syncs: the checkers must find it.
    pub lying_disks: bool,
}

/// What came of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What did not hold; empty is well.
    pub violations: Vec<String>,
    /// Of everything that happened.
    pub trace_hash: String,
    /// Messages delivered.
    pub messages: u64,
    /// How long the run was, in its own time.
    pub virtual_ms: u64,
    /// Operations answered.
    pub ok: u64,
    /// Operations that surely did not happen.
    pub failed: u64,
    /// Operations of which nobody knows.
    pub unknown: u64,
    /// Writes that were acknowledged.
    pub acknowledged: u64,
    /// Elections, of all groups.
    pub elections: u64,
    /// Faults applied, by kind.
    pub faults: BTreeMap<String, u64>,
}

/// Runs a seed.
pub fn run(seed: u64, options: &Options) -> Report {
    coracle_raft::runtime::seed_thread(Some(seed));
    let panics: Arc<Mutex<Vec<String>>> = Arc::default();
    let told = panics.clone();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told.lock().push(format!("panic: {panic}"));
        eprintln!("{panic}");
    }));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without sockets needs nothing from the system");
    let mut report = runtime.block_on(async { Run::new(seed, options).go().await });
    drop(runtime);
    std::panic::set_hook(hook);
    coracle_raft::runtime::seed_thread(None);
    report.violations.extend(panics.lock().drain(..));
    report
}

struct Run {
    seed: u64,
    options: Options,
    mix: Mix,
    load: Load,
    clients: u32,
    history_ms: Option<u64>,
    dice: Dice,
    trace: Trace,
    cluster: Cluster,
    watch: RefCell<Watch>,
    recorder: Recorder,
    violations: Vec<String>,
    faults: BTreeMap<String, u64>,
}

impl Run {
    /// Within the runtime: the trace begins with its clock.
    fn new(seed: u64, options: &Options) -> Run {
        let mut dice = Dice::new(seed);
        let trace = Trace::begin(options.detail);
        let settings: Settings = draw::settings(&mut dice, options);
        let (mix, load, clients) =
            (Mix::draw(&mut dice), draw::load(&mut dice), draw::clients(&mut dice));
        let history_ms = draw::history_ms(&mut dice);
        trace.event(format_args!(
            "seed {seed}: {settings:?}, {mix:?}, {clients} clients, {load:?}, history {history_ms:?}"
        ));
        let cluster = Cluster::new(settings, dice.roll(), trace.clone());
        Run {
            seed,
            options: options.clone(),
            mix,
            load,
            clients,
            history_ms,
            dice,
            trace,
            cluster,
            watch: RefCell::default(),
            recorder: Recorder::default(),
            violations: Vec::new(),
            faults: BTreeMap::new(),
        }
    }

    async fn go(mut self) -> Report {
        match tokio::time::timeout(FORM_DEADLINE, self.cluster.form()).await {
            Ok(Ok(())) => {
                self.trace.event(format_args!("the cluster stands"));
                self.set_history().await;
                self.suffer().await;
                verdict::check(&mut self).await;
            }
            Ok(Err(why)) => self.violations.push(format!("the cluster does not form: {why}")),
            Err(_) => self.violations.push("the cluster does not form in time".to_owned()),
        }
        self.report()
    }

    /// Gives the keyspace the history that was drawn.
    async fn set_history(&mut self) {
        let Some(history_ms) = self.history_ms else { return };
        let set = async {
            let client = self.cluster.client("settings").connect_lazy()?;
            let history = Duration::from_millis(history_ms);
            let set = client.admin().set_history("default", history, false).await;
            client.close().await;
            set
        };
        match tokio::time::timeout(FORM_DEADLINE, set).await {
            Ok(Ok(_)) => {}
            Ok(Err(why)) => self.violations.push(format!("a history is not set: {why}")),
            Err(_) => self.violations.push("a history is not set in time".to_owned()),
        }
    }

    /// The load, with the faults beside it.
    async fn suffer(&mut self) {
        let (stop, stopped) = watch::channel(false);
        let mut workers = JoinSet::new();
        for number in 1..=self.clients {
            match self.worker(number) {
                Ok(worker) => {
                    workers.spawn(worker.run(stopped.clone()));
                }
                Err(why) => self.violations.push(why),
            }
        }
        let clients = (1..=self.clients).map(client_name).collect();
        let seed = self.dice.roll();
        let (trace, mix) = (self.trace.clone(), self.mix);
        let nemesis = Nemesis::new(&self.cluster, &self.watch, trace, mix, clients, seed);
        let look = async {
            loop {
                self.watch.borrow_mut().look(&self.cluster);
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        };
        let mut reclaim_dice = Dice::new(self.dice.roll());
        let reclaim = async {
            loop {
                let pause = Duration::from_millis(reclaim_dice.below(RECLAIM_PAUSE_MS_MAX));
                tokio::time::sleep(pause).await;
                let node =
                    self.cluster.node(reclaim_dice.below(self.cluster.len() as u64) as usize);
                let Some(host) = node.and_then(|node| node.host()) else { continue };
                let groups = host.groups();
                let at = reclaim_dice.below(groups.len().max(1) as u64);
                if let Some(group) = groups.get(at as usize) {
                    // It fails where the node crashes meanwhile, or has no quorum.
                    let reclaimed = host.reclaim(group.clone());
                    let _ = tokio::time::timeout(OPERATION_TIMEOUT, reclaimed).await;
                }
            }
        };
        let rage = async {
            nemesis.rage(self.options.lasts).await;
            stop.send_replace(true);
            nemesis.relent().await;
            let finished = async { while workers.join_next().await.is_some() {} };
            tokio::time::timeout(STOP_DEADLINE, finished).await.is_ok()
        };
        let finished = tokio::select! {
            biased;
            finished = rage => finished,
            () = look => unreachable!("it looks for ever"),
            () = reclaim => unreachable!("it goes on for ever"),
        };
        if !finished {
            self.violations.push("every call ends within its timeout: clients hang".to_owned());
        }
        let applied = nemesis.applied();
        self.violations.extend(nemesis.unexplained());
        self.faults = applied.into_iter().map(|(kind, times)| (kind.to_owned(), times)).collect();
    }

    fn worker(&mut self, number: u32) -> Result<Worker, String> {
        let builder =
            self.cluster.client(&client_name(number)).operation_timeout(OPERATION_TIMEOUT);
        let client = builder.connect_lazy().map_err(|error| format!("a client: {error}"))?;
        let (recorder, trace) = (self.recorder.clone(), self.trace.clone());
        let dice = Dice::new(self.dice.roll());
        Ok(Worker::new(number, client, recorder, trace, dice, self.load))
    }

    fn report(mut self) -> Report {
        let history = self.recorder.history();
        let broken = witness::check(&history);
        self.violations.extend(broken.iter().map(ToString::to_string));
        let unexplained = search::check(&history).into_iter().map(Violation::from);
        self.violations.extend(unexplained.map(|violation| violation.to_string()));
        self.violations.extend(self.watch.borrow().broken().iter().cloned());
        if let Some(path) = &self.options.history
            && let Err(error) = write_history(&history, path)
        {
            self.violations.push(format!("{}: {error}", path.display()));
        }
        let of =
            |kind: Kind| history.events.iter().filter(|event| event.kind == kind).count() as u64;
        Report {
            seed: self.seed,
            violations: self.violations,
            trace_hash: format!("{:016x}", self.trace.hash()),
            messages: self.trace.messages(),
            virtual_ms: self.trace.elapsed().as_millis() as u64,
            ok: of(Kind::Ok),
            failed: of(Kind::Fail),
            unknown: of(Kind::Info),
            acknowledged: verdict::acknowledged(&history).count() as u64,
            elections: self.watch.borrow().elections(),
            faults: self.faults,
        }
    }
}

fn client_name(number: u32) -> String {
    format!("c{number}")
}

fn write_history(history: &History, path: &std::path::Path) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    history.write(&mut file)?;
    std::io::Write::flush(&mut file)
}

/// Polls until it holds; false when it does not in time.
async fn until(within: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + within;
    while !holds() {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    true
}

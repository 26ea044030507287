//! Owns where a simulated node's work runs: on the one thread of the run, after the virtual time that
//! the real work would take. Everything belongs to one life of the node and ends with it. Does not
//! model what the disk keeps (that is the faulty file system's), only how long it takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_storage::exec::{Exec, Job, Step, Task, Wake};
use coracle_storage::fs::faulty::Dice;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::Instrument;

/// How long a node's disk takes.
#[derive(Clone, Copy, Debug)]
pub struct DiskSpeed {
    /// A write with its sync, at most.
    pub sync_ms_max: u64,
    /// One in so many takes ten times as long.
    pub slow_one_in: u64,
}

/// A node's disk, as far as time goes. Clones are the same; it outlives the node's restarts.
#[derive(Clone)]
pub struct SimDisk {
    speed: DiskSpeed,
    dice: Arc<Mutex<Dice>>,
    stalled: watch::Sender<bool>,
}

impl SimDisk {
    /// A disk that works.
    pub fn new(speed: DiskSpeed, seed: u64) -> SimDisk {
        SimDisk {
            speed,
            dice: Arc::new(Mutex::new(Dice::new(seed))),
            stalled: watch::Sender::new(false),
        }
    }

    /// From now on nothing ends, or everything does again.
    pub fn stall(&self, stalled: bool) {
        self.stalled.send_replace(stalled);
    }

    async fn wait(&self, draw: impl FnOnce(&mut Dice, &DiskSpeed) -> u64) {
        let ms = draw(&mut self.dice.lock(), &self.speed);
        if ms > 0 {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        // The sender lives in self, so it ends only by what is waited for.
        let _ = self.stalled.subscribe().wait_for(|stalled| !stalled).await;
    }

    async fn wait_for_sync(&self) {
        self.wait(|dice, speed| {
            let ms = dice.below(speed.sync_ms_max + 1);
            if dice.one_in(speed.slow_one_in) { 10 * (ms + 1) } else { ms }
        })
        .await;
    }

    /// Most blocking jobs find what they need in memory.
    async fn wait_for_job(&self) {
        self.wait(|dice, speed| if dice.one_in(8) { dice.below(speed.sync_ms_max + 1) } else { 0 })
            .await;
    }
}

/// One life of a node. Dropping it ends that life too.
pub struct SimExec {
    runtime: Handle,
    node: String,
    disk: SimDisk,
    dead: Arc<AtomicBool>,
    tasks: Mutex<JoinSet<()>>,
}

impl SimExec {
    /// Within the runtime of the run.
    pub fn new(node: &str, disk: SimDisk) -> SimExec {
        SimExec {
            runtime: Handle::current(),
            node: node.to_owned(),
            disk,
            dead: Arc::new(AtomicBool::new(false)),
            tasks: Mutex::new(JoinSet::new()),
        }
    }

    /// Ends this life: every task is aborted, every worker and job stands still for ever, and what
    /// somebody who does not know yet wants to start never begins.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.tasks.lock().abort_all();
    }

    fn keep(&self, task: impl Future<Output = ()> + Send + 'static) {
        if self.dead.load(Ordering::SeqCst) {
            return;
        }
        let span = tracing::info_span!("node", name = %self.node);
        let mut tasks = self.tasks.lock();
        tasks.spawn_on(task.instrument(span), &self.runtime);
        // What has ended is let go of. A panic has been reported by the hook.
        while tasks.try_join_next().is_some() {}
    }
}

impl Exec for SimExec {
    fn worker(&self, _name: &str, mut step: Step) -> Wake {
        // Room for one: a wake that finds it taken is covered by the step to come.
        let (sender, mut woken) = mpsc::channel::<()>(1);
        let (disk, dead) = (self.disk.clone(), self.dead.clone());
        self.keep(async move {
            while woken.recv().await.is_some() {
                disk.wait_for_sync().await;
                if dead.load(Ordering::SeqCst) || !step() {
                    return;
                }
            }
        });
        Wake::new(move || {
            let _ = sender.try_send(());
        })
    }

    fn blocking(&self, job: Job) {
        let (disk, dead) = (self.disk.clone(), self.dead.clone());
        self.keep(async move {
            disk.wait_for_job().await;
            if !dead.load(Ordering::SeqCst) {
                job();
            }
        });
    }

    fn spawn(&self, _name: &'static str, task: Task) {
        self.keep(task);
    }
}

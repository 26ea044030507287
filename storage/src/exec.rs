//! Owns the seam for threads, blocking work and tasks, and its real side. Does not decide what
//! runs.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// A piece of blocking work.
pub type Job = Box<dyn FnOnce() + Send + 'static>;
/// A spawned task.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send + 'static>>;
/// One turn of a worker; false ends it.
pub type Step = Box<dyn FnMut() -> bool + Send + 'static>;

/// Where work runs. The simulation hands in one that runs everything on its own thread, in a seeded
/// order.
pub trait Exec: Send + Sync + 'static {
    /// Starts a worker: `step` runs once after each [`Wake::wake`], one call at a time, off the
    /// async threads. Wakes coalesce: a wake during a step causes one more step. `step` returns
    /// false when the worker shall end; dropping every clone of the `Wake` ends it as well.
    fn worker(&self, name: &str, step: Step) -> Wake;

    /// Runs blocking work off the async threads, in a bounded pool.
    fn blocking(&self, job: Job);

    /// Spawns a task.
    fn spawn(&self, name: &'static str, task: Task);
}

/// Wakes one worker. Cheap to clone, never blocks.
#[derive(Clone)]
pub struct Wake(Arc<dyn Fn() + Send + Sync>);

impl Wake {
    /// A wake that calls `wake`.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Wake {
        Wake(Arc::new(wake))
    }

    /// Asks for one more step of the worker.
    pub fn wake(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Wake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wake")
    }
}

/// The real side: named threads for workers, tokio for tasks and blocking jobs.
///
/// Everything that it starts is kept, so that [`RealExec::shutdown`] can end and join it.
pub struct RealExec {
    runtime: Handle,
    blocking_slots: Arc<Semaphore>,
    tasks: Mutex<JoinSet<()>>,
    workers: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl RealExec {
    /// Runs tasks on `runtime`, and at most `blocking_max` blocking jobs at a time: beyond it, jobs
    /// wait.
    pub fn new(runtime: Handle, blocking_max: usize) -> RealExec {
        assert!(blocking_max > 0, "a pool without a thread would never run a job");
        RealExec {
            runtime,
            blocking_slots: Arc::new(Semaphore::new(blocking_max)),
            tasks: Mutex::new(JoinSet::new()),
            workers: Mutex::new(Vec::new()),
        }
    }

    /// Aborts all tasks, waits until they and the running blocking jobs are gone, then joins the
    /// workers. Workers end when the last `Wake` is dropped, so close what holds one (for instance
    /// the log) before.
    pub async fn shutdown(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        tasks.shutdown().await;
        let workers = std::mem::take(&mut *self.workers.lock());
        #[allow(clippy::disallowed_methods, reason = "this is the seam")]
        let joined = self.runtime.spawn_blocking(move || {
            for worker in workers {
                if worker.join().is_err() {
                    tracing::error!("a worker thread had panicked");
                }
            }
        });
        if joined.await.is_err() {
            tracing::error!("joining the worker threads failed");
        }
    }

    fn keep(&self, name: &'static str, task: Task) {
        let mut tasks = self.tasks.lock();
        tasks.spawn_on(task, &self.runtime);
        // Reap here, so that the set is bounded by what is alive.
        while let Some(ended) = tasks.try_join_next() {
            if let Err(error) = ended
                && error.is_panic()
            {
                tracing::error!(%error, started = name, "a task had panicked");
            }
        }
    }
}

impl Exec for RealExec {
    fn worker(&self, name: &str, mut step: Step) -> Wake {
        // Room for one: a wake that finds it taken is already covered by the step to come.
        let (sender, receiver) = mpsc::sync_channel::<()>(1);
        #[allow(clippy::disallowed_methods, reason = "this is the seam")]
        let worker = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || while receiver.recv().is_ok() && step() {})
            .expect("the system refuses a thread at start: there is nothing to fall back to");
        let mut workers = self.workers.lock();
        workers.retain(|worker| !worker.is_finished());
        workers.push(worker);
        Wake::new(move || {
            // Full means a step is due anyway; disconnected means that the worker has ended.
            let _ = sender.try_send(());
        })
    }

    fn blocking(&self, job: Job) {
        let slots = self.blocking_slots.clone();
        let runtime = self.runtime.clone();
        self.keep(
            "blocking",
            Box::pin(async move {
                let slot = slots.acquire_owned().await.expect("the semaphore is never closed");
                #[allow(clippy::disallowed_methods, reason = "this is the seam")]
                let done = runtime.spawn_blocking(move || {
                    job();
                    drop(slot);
                });
                if done.await.is_err_and(|error| error.is_panic()) {
                    tracing::error!("a blocking job had panicked");
                }
            }),
        );
    }

    fn spawn(&self, name: &'static str, task: Task) {
        self.keep(name, task);
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests of the seam itself")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().expect("a runtime")
    }

    #[test]
    fn a_wake_during_a_step_is_not_lost() {
        let runtime = runtime();
        let exec = RealExec::new(runtime.handle().clone(), 1);
        let (entered, was_entered) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let wake = exec.worker(
            "test",
            Box::new(move || {
                entered.send(()).expect("the test listens");
                released.recv().is_ok()
            }),
        );
        wake.wake();
        was_entered.recv().expect("the first step");
        wake.wake();
        wake.wake();
        release.send(()).expect("the worker listens");
        was_entered.recv().expect("the second step");
        drop(release);
        drop(wake);
        runtime.block_on(exec.shutdown());
        assert!(was_entered.recv().is_err(), "two wakes in one step coalesce");
    }

    #[test]
    fn dropping_the_wake_ends_the_worker_after_its_last_step() {
        let runtime = runtime();
        let exec = RealExec::new(runtime.handle().clone(), 1);
        let steps = Arc::new(AtomicUsize::new(0));
        let counted = steps.clone();
        let wake = exec.worker(
            "test",
            Box::new(move || {
                counted.fetch_add(1, Ordering::SeqCst);
                true
            }),
        );
        wake.wake();
        drop(wake);
        runtime.block_on(exec.shutdown());
        assert_eq!(steps.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn blocking_jobs_keep_to_their_bound_and_all_run() {
        let runtime = runtime();
        let exec = RealExec::new(runtime.handle().clone(), 2);
        let running = Arc::new(AtomicUsize::new(0));
        let (report, reports) = mpsc::channel();
        for _ in 0..32 {
            let running = running.clone();
            let report = report.clone();
            exec.blocking(Box::new(move || {
                let now = running.fetch_add(1, Ordering::SeqCst) + 1;
                std::thread::yield_now();
                running.fetch_sub(1, Ordering::SeqCst);
                report.send(now).expect("the test listens");
            }));
        }
        drop(report);
        let seen: Vec<usize> = reports.iter().collect();
        assert_eq!(seen.len(), 32);
        assert!(seen.iter().all(|&now| now <= 2), "{seen:?}");
        runtime.block_on(exec.shutdown());
    }
}

//! Owns the seam for threads, blocking work and tasks, and its real side. Does not decide what
//! runs.

use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use parking_lot::{Condvar, Mutex};
use tokio::runtime::Handle;
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
    pool: Arc<Pool>,
    tasks: Mutex<JoinSet<()>>,
    workers: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl RealExec {
    /// Runs tasks on `runtime`, and at most `blocking_max` blocking jobs at a time: beyond it, jobs
    /// wait.
    pub fn new(runtime: Handle, blocking_max: usize) -> RealExec {
        assert!(blocking_max > 0, "a pool without a thread would never run a job");
        let pool = Pool { max: blocking_max, state: Mutex::default(), came: Condvar::new() };
        RealExec {
            runtime,
            pool: Arc::new(pool),
            tasks: Mutex::new(JoinSet::new()),
            workers: Mutex::new(Vec::new()),
        }
    }

    /// Aborts all tasks, waits until they and the running blocking jobs are gone, then joins the
    /// workers. Jobs that no thread has taken are dropped. Workers end when the last `Wake` is dropped, so close what holds one (for instance
    /// the log) before.
    pub async fn shutdown(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        tasks.shutdown().await;
        let mut workers = self.pool.close();
        workers.extend(std::mem::take(&mut *self.workers.lock()));
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
        self.pool.push(job, &self.runtime);
    }

    fn spawn(&self, name: &'static str, task: Task) {
        self.keep(name, task);
    }
}

/// Threads for blocking jobs, of our own: a job is often a few reads of some microseconds, and tokio's
/// pool wakes a thread for every one of them, besides a task to wait for it.
///
/// While one thread is on its way, further jobs wake nobody: it takes the first, and wakes the next
/// thread if it leaves any. So a burst of short jobs is done by a thread or two, and a job that takes
/// long holds up no other for longer than a thread needs to wake.
struct Pool {
    max: usize,
    state: Mutex<Jobs>,
    came: Condvar,
}

/// Invariant: while there are jobs, a thread is on its way, or all of them are at work.
#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    threads: Vec<thread::JoinHandle<()>>,
    /// Threads that sleep and that nobody has woken.
    asleep: usize,
    /// A thread was woken or started, and is not there yet.
    coming: bool,
    closed: bool,
}

impl Pool {
    fn push(self: &Arc<Self>, job: Job, runtime: &Handle) {
        let mut state = self.state.lock();
        if state.closed {
            drop(state);
            // What it holds may wait for it: it hears so.
            return drop(job);
        }
        state.waiting.push_back(job);
        self.call(&mut state, runtime);
    }

    /// Has one thread come, unless one is on its way.
    fn call(self: &Arc<Self>, state: &mut Jobs, runtime: &Handle) {
        if state.coming {
            return;
        }
        if state.asleep > 0 {
            (state.asleep, state.coming) = (state.asleep - 1, true);
            self.came.notify_one();
        } else if state.threads.len() < self.max {
            state.coming = true;
            let (pool, runtime) = (self.clone(), runtime.clone());
            #[allow(clippy::disallowed_methods, reason = "this is the seam")]
            let thread = thread::Builder::new()
                .name("blocking".to_owned())
                .spawn(move || pool.work(&runtime))
                .expect("the system refuses one of a few dozen threads: nothing can go on");
            state.threads.push(thread);
        }
    }

    /// A thread's life.
    fn work(self: &Arc<Self>, runtime: &Handle) {
        let _entered = runtime.enter();
        let mut state = self.state.lock();
        state.coming = false;
        loop {
            while let Some(job) = state.waiting.pop_front() {
                if !state.waiting.is_empty() {
                    self.call(&mut state, runtime);
                }
                drop(state);
                // A job of which the process may not live on aborts it itself.
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a blocking job had panicked");
                }
                state = self.state.lock();
            }
            if state.closed {
                return;
            }
            state.asleep += 1;
            self.came.wait(&mut state);
            if state.closed {
                return;
            }
            state.coming = false;
        }
    }

    /// Takes no more jobs, drops those that wait, and hands out the threads, which end.
    fn close(&self) -> Vec<thread::JoinHandle<()>> {
        let (waiting, threads) = {
            let mut state = self.state.lock();
            state.closed = true;
            (std::mem::take(&mut state.waiting), std::mem::take(&mut state.threads))
        };
        self.came.notify_all();
        // Outside the lock: what a job holds may ask for another.
        drop(waiting);
        threads
    }
}

impl Drop for RealExec {
    fn drop(&mut self) {
        // Without a shutdown nobody waits for the threads; they end when their jobs do.
        drop(self.pool.close());
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests of the seam itself")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

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
    fn a_long_job_holds_up_no_other() {
        let runtime = runtime();
        let exec = RealExec::new(runtime.handle().clone(), 3);
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        let (report, reports) = mpsc::channel();
        // Two hang; all others pass them, in bursts and one by one, also after one that panics.
        for _ in 0..2 {
            let released = released.clone();
            exec.blocking(Box::new(move || {
                let _ = released.lock().recv();
            }));
        }
        exec.blocking(Box::new(|| panic!("of the test")));
        for burst in [1, 1, 20, 1] {
            for _ in 0..burst {
                let report = report.clone();
                exec.blocking(Box::new(move || report.send(()).expect("the test listens")));
            }
            for _ in 0..burst {
                reports.recv_timeout(Duration::from_secs(30)).expect("it is not held up");
            }
        }
        drop(release);
        runtime.block_on(exec.shutdown());
        let (late, lost) = mpsc::channel::<()>();
        exec.blocking(Box::new(move || drop(late)));
        assert!(lost.recv().is_err(), "after the end jobs are dropped");
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

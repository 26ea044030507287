//! Looks at the state: closures that wait for a blocking thread, and share its trip.
//!
//! Owns how looks are gathered into jobs. Does not decide when a look is allowed: whoever hands one in
//! has already waited for what it must hold, and every look sees a view taken after it was handed in.

use std::sync::Arc;

use coracle_storage::exec::Exec;
use parking_lot::Mutex;

use crate::error::GroupError;
use crate::state_machine::{ReadState, SharedState};

/// Looks that one job takes: a long queue is cut so that its first answers do not wait for its last,
/// and so that several threads may share it.
const LOOKS_PER_JOB: usize = 64;

/// What a read does with the state, or with the reason why it may not look.
pub(crate) type Look = Box<dyn FnOnce(Result<&ReadState, GroupError>) + Send>;

/// Those that no job has taken yet. As many as there are reads under way, which others bound:
/// `reader` those that ask the leader, the node's admission all of them.
#[derive(Default)]
struct Queue {
    waiting: Vec<Look>,
    /// A job is on its way to a thread and takes what it finds there.
    coming: bool,
}

/// The handle: hands looks to the jobs.
#[derive(Clone)]
pub(crate) struct Looks {
    queue: Arc<Mutex<Queue>>,
    state: SharedState,
    exec: Arc<dyn Exec>,
}

impl Looks {
    pub(crate) fn new(state: SharedState, exec: Arc<dyn Exec>) -> Self {
        Self { queue: Arc::default(), state, exec }
    }

    /// Has them run, in this order, on a blocking thread. What comes before that thread is there goes
    /// along: an idle group answers at once, a busy one pays one trip for many.
    pub(crate) fn push(&self, looks: impl IntoIterator<Item = Look>) {
        let mut queue = self.queue.lock();
        queue.waiting.extend(looks);
        if queue.waiting.is_empty() || std::mem::replace(&mut queue.coming, true) {
            return;
        }
        drop(queue);
        self.send_a_job();
    }

    fn send_a_job(&self) {
        let mut job = Job { looks: self.clone(), began: false };
        self.exec.blocking(Box::new(move || job.run()));
    }
}

/// A trip to a blocking thread.
struct Job {
    looks: Looks,
    began: bool,
}

impl Job {
    fn run(&mut self) {
        self.began = true;
        let (mine, more) = {
            let mut queue = self.looks.queue.lock();
            let count = queue.waiting.len().min(LOOKS_PER_JOB);
            let rest = queue.waiting.split_off(count);
            queue.coming = !rest.is_empty();
            (std::mem::replace(&mut queue.waiting, rest), queue.coming)
        };
        if more {
            self.looks.send_a_job();
        }
        match self.looks.state.read() {
            Ok(view) => mine.into_iter().for_each(|look| look(Ok(&view))),
            Err(error) => mine.into_iter().for_each(|look| look(Err(error.clone()))),
        }
    }
}

impl Drop for Job {
    /// A job that was thrown away, as at the end of a process, takes its looks along: whoever waits
    /// for them hears so.
    fn drop(&mut self) {
        if !self.began {
            let mut queue = self.looks.queue.lock();
            queue.coming = false;
            let dropped = std::mem::take(&mut queue.waiting);
            drop(queue);
            drop(dropped);
        }
    }
}

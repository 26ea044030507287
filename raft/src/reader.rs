//! The way of a read: a point in the log that it must not be behind, a wait, one look at the state.
//!
//! Owns the batching of reads and their read points. One lease check, or one round of heartbeats,
//! serves every read that arrived before it was made, and no other: after a pause a deposed leader
//! must not answer late comers from an old check.

use std::sync::Arc;
use std::time::Duration;

use coracle_storage::exec::Exec;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::LinearizerOption;
use openraft::errors::{LinearizableReadError, RaftError};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Circumstances;
use crate::error::GroupError;
use crate::leadership::Raft;
use crate::state_machine::{ReadState, SharedState};

/// Reads that may wait for one group: each holds a closure of about a kilobyte. Beyond it the
/// answer is `Overloaded`.
const READS_WAITING_MAX: usize = 8_192;
/// Read points asked for at a time: the next batch need not wait for the heartbeats of the last.
const BATCHES_UNDER_WAY_MAX: usize = 4;
/// Reads that one blocking job runs: a long batch is cut so that its first answers do not wait for
/// its last.
const READS_PER_JOB: usize = 64;

/// What a read does with the state, or with the reason why it may not look.
pub(crate) type Look = Box<dyn FnOnce(Result<&ReadState, GroupError>) + Send>;

struct Waiting {
    deadline: Instant,
    look: Look,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    closed: bool,
}

/// The handle: hands reads to the task.
#[derive(Clone)]
pub(crate) struct Reads {
    queue: Arc<Mutex<Queue>>,
    wake: Arc<Notify>,
    state: SharedState,
    exec: Arc<dyn Exec>,
}

impl Reads {
    /// The handle, and the task to spawn.
    pub(crate) fn new(
        raft: Raft,
        state: SharedState,
        environment: Arc<dyn Circumstances>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let exec = environment.exec();
        let handle = Self { queue: Arc::default(), wake: Arc::default(), state, exec };
        (handle.clone(), run(handle, raft, environment, stop))
    }

    /// Reads a state that holds everything acknowledged before this call began.
    pub(crate) async fn linearizable<T: Send + 'static>(
        &self,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        let (answer, receiver) = oneshot::channel();
        let look: Look = Box::new(move |state| {
            let _ = answer.send(state.map(look));
        });
        {
            let mut queue = self.queue.lock();
            if queue.closed {
                return Err(GroupError::Stopped);
            }
            if queue.waiting.len() >= READS_WAITING_MAX {
                return Err(GroupError::Overloaded { retry_after: Duration::from_millis(50) });
            }
            queue.waiting.push(Waiting { deadline, look });
        }
        self.wake.notify_one();
        match tokio::time::timeout_at(deadline, receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(GroupError::Stopped),
            Err(_) => Err(GroupError::Expired),
        }
    }

    /// Reads whatever this replica has, once it has applied `index` (0: at once).
    pub(crate) async fn local<T: Send + 'static>(
        &self,
        index: u64,
        deadline: Instant,
        look: impl FnOnce(&ReadState) -> T + Send + 'static,
    ) -> Result<T, GroupError> {
        let applied = self.state.wait_for_index(index);
        if tokio::time::timeout_at(deadline, applied).await.is_err() {
            return Err(GroupError::TooStale);
        }
        let (answer, receiver) = oneshot::channel();
        let look: Look = Box::new(move |state| {
            let _ = answer.send(state.map(look));
        });
        look_at(&self.state, &*self.exec, vec![look]);
        receiver.await.unwrap_or(Err(GroupError::Stopped))
    }
}

async fn run(
    reads: Reads,
    raft: Raft,
    environment: Arc<dyn Circumstances>,
    stop: CancellationToken,
) {
    let mut under_way = FuturesUnordered::new();
    loop {
        let room = under_way.len() < BATCHES_UNDER_WAY_MAX;
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            () = reads.wake.notified(), if room => {}
        }
        if under_way.len() < BATCHES_UNDER_WAY_MAX {
            let batch = std::mem::take(&mut reads.queue.lock().waiting);
            if !batch.is_empty() {
                under_way.push(serve(batch, &reads, &raft, &*environment));
            }
        }
    }
    let waiting = {
        let mut queue = reads.queue.lock();
        queue.closed = true;
        std::mem::take(&mut queue.waiting)
    };
    for read in waiting {
        (read.look)(Err(GroupError::Stopped));
    }
}

/// One batch: everything in it arrived before its read point is asked for.
async fn serve(batch: Vec<Waiting>, reads: &Reads, raft: &Raft, environment: &dyn Circumstances) {
    if !environment.healthy() {
        // A stale lease would be renewed by heartbeats that a stalled disk must not send.
        let error = GroupError::NotLeader { leader: None };
        batch.into_iter().for_each(|read| (read.look)(Err(error.clone())));
        return;
    }
    let timing = environment.timing();
    let option =
        LinearizerOption::new(Some(timing.read_lease()), true).with_wait_timeout(timing.lease());
    let point = match raft.get_read_linearizer(option).await {
        Ok(linearizer) => linearizer.read_log_id().index(),
        Err(error) => {
            let error = refusal(error);
            batch.into_iter().for_each(|read| (read.look)(Err(error.clone())));
            return;
        }
    };
    let last_deadline = batch.iter().map(|read| read.deadline).max();
    let deadline = last_deadline.expect("a batch holds at least one read");
    let applied = reads.state.wait_for_index(point);
    if tokio::time::timeout_at(deadline, applied).await.is_err() {
        batch.into_iter().for_each(|read| (read.look)(Err(GroupError::TooStale)));
        return;
    }
    let mut looks = batch.into_iter().map(|read| read.look);
    loop {
        let job: Vec<Look> = looks.by_ref().take(READS_PER_JOB).collect();
        if job.is_empty() {
            return;
        }
        look_at(&reads.state, &*reads.exec, job);
    }
}

fn look_at(state: &SharedState, exec: &dyn Exec, looks: Vec<Look>) {
    let state = state.clone();
    exec.blocking(Box::new(move || match state.read() {
        Ok(view) => looks.into_iter().for_each(|look| look(Ok(&view))),
        Err(error) => looks.into_iter().for_each(|look| look(Err(error.clone()))),
    }));
}

fn refusal(
    error: RaftError<crate::types::TypeConfig, LinearizableReadError<crate::types::TypeConfig>>,
) -> GroupError {
    match error {
        RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)) => {
            GroupError::NotLeader { leader: forward.leader_node.map(|place| place.node) }
        }
        RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) => {
            GroupError::NotLeader { leader: None }
        }
        RaftError::Fatal(_) => GroupError::Stopped,
    }
}

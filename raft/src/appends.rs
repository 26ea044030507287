//! The receiving side of appends: each peer's stream of them, fed to openraft in order.
//!
//! Owns the streams and their queues. What an append does is openraft's business.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use coracle_storage::exec::Exec;
use futures_util::StreamExt;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::leadership::Raft;
use crate::message::Answer;
use crate::transport::{Answering, TransportError};
use crate::types::{NodeId, TypeConfig};

/// Appends of one peer that may wait for this group: far more than its sender has in flight. A
/// receiver never waits: beyond it the answer is "unreachable".
const APPENDS_WAITING_MAX: usize = 64;

/// One group's streams of appends, by peer.
pub(crate) struct Appends {
    raft: Raft,
    exec: Arc<dyn Exec>,
    stop: CancellationToken,
    streams: Mutex<BTreeMap<NodeId, Incoming>>,
}

/// One peer's stream.
struct Incoming {
    id: u64,
    appends: mpsc::Sender<(AppendEntriesRequest<TypeConfig>, AppendAnswer)>,
}

type AppendAnswer = oneshot::Sender<StreamAppendResult<TypeConfig>>;

impl Appends {
    pub(crate) fn new(raft: Raft, exec: Arc<dyn Exec>, stop: CancellationToken) -> Self {
        Self { raft, exec, stop, streams: Mutex::default() }
    }

    /// Takes an append of the stream `id` of a peer; its `first` begins the stream anew. The call
    /// itself gives it its place.
    pub(crate) fn take(
        &self,
        from: NodeId,
        id: u64,
        first: bool,
        request: AppendEntriesRequest<TypeConfig>,
    ) -> Answering {
        let mut streams = self.streams.lock();
        if first {
            let (appends, waiting) = mpsc::channel(APPENDS_WAITING_MAX);
            let run = feed(self.raft.clone(), waiting, self.stop.clone());
            self.exec.spawn("appends", Box::pin(run));
            streams.insert(from, Incoming { id, appends });
        }
        let Some(stream) = streams.get(&from).filter(|stream| stream.id == id) else {
            return failed("this stream of appends is over");
        };
        let (answer, receiver) = oneshot::channel();
        if stream.appends.try_send((request, answer)).is_err() {
            return failed("this replica takes no more appends at the moment");
        }
        Box::pin(async move {
            match receiver.await {
                Ok(result) => Ok(Answer::Append(result).encode()),
                Err(_) => Err(TransportError::Unreachable("the stream of appends ended".into())),
            }
        })
    }

    /// Ends all streams.
    pub(crate) fn clear(&self) {
        self.streams.lock().clear();
    }
}

fn failed(why: &str) -> Answering {
    Box::pin(std::future::ready(Err(TransportError::Unreachable(why.to_owned()))))
}

/// Feeds one peer's appends to openraft in order, and hands the results to those who wait.
async fn feed(
    raft: Raft,
    waiting: mpsc::Receiver<(AppendEntriesRequest<TypeConfig>, AppendAnswer)>,
    stop: CancellationToken,
) {
    let answers: Arc<Mutex<VecDeque<AppendAnswer>>> = Arc::default();
    let queue = answers.clone();
    let requests = ReceiverStream::new(waiting).map(move |(request, answer)| {
        queue.lock().push_back(answer);
        request
    });
    let mut results = std::pin::pin!(raft.stream_append(requests));
    loop {
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            result = results.next() => result,
        };
        let Some(Ok(result)) = result else { return };
        let answer = answers.lock().pop_front().expect("one answer waits for every request");
        // The asking connection may have broken meanwhile.
        let _ = answer.send(result);
    }
}

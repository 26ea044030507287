//! Owns the task behind a delete-range that a client reads as a stream: it makes a round of steps when
//! the reader asks for one, gives back what it holds when the reader stops, and ends when it stops for
//! long. A stream that nobody polls runs nothing: hence a task. Does not step (see [`DeleteRange`]).

use std::time::Duration;

use coracle_proto::reason::{Fault, Outcome, Reason};
use coracle_proto::v1;
use coracle_storage::Exec;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::DeleteRange;

/// How long a reader may stop before the request ids of its open steps are given back: longer than the
/// way to any client and back, and far below the age at which results are forgotten.
pub const REST_AFTER: Duration = Duration::from_secs(1);
/// How long a reader may stop before its delete-range is over here. What is left of it then is a task
/// and a token; a minute is far beyond any client that works. The token goes on.
pub const IDLE_MAX: Duration = Duration::from_secs(60);

type Round = Result<Option<v1::DeleteRangeResponse>, Fault>;

/// The reader's end of a delete-range. Dropping it begins no further step.
pub struct Rounds {
    asks: mpsc::Sender<oneshot::Sender<Round>>,
    may_have_deleted: bool,
    over: bool,
}

/// Starts the task of a delete-range.
pub fn open(delete: DeleteRange, exec: &dyn Exec) -> Rounds {
    let (asks, asked) = mpsc::channel(1);
    exec.spawn("delete-range", Box::pin(run(delete, asked)));
    Rounds { asks, may_have_deleted: false, over: false }
}

impl Rounds {
    /// The progress of the next round; `None` behind the last one and after an error.
    pub async fn next(&mut self) -> Round {
        if self.over {
            return Ok(None);
        }
        let (answer, answered) = oneshot::channel();
        let round = match self.asks.send(answer).await {
            Ok(()) => answered.await.unwrap_or_else(|_| {
                let fault = Fault::new(Reason::Draining, "this node is shutting down");
                Err(fault.with_outcome(Outcome::Unknown))
            }),
            // Between rounds: what came of the last one was told.
            Err(_) => {
                let message = "nobody has asked for the next progress for long: its token goes on";
                let fault = Fault::new(Reason::Overloaded, message);
                let known = if self.may_have_deleted { Outcome::Unknown } else { fault.outcome };
                Err(fault.with_outcome(known))
            }
        };
        self.may_have_deleted |= matches!(&round, Ok(Some(round)) if round.version > 0);
        self.over = !matches!(&round, Ok(Some(_)));
        round
    }
}

/// Makes rounds as they are asked for, until the last or until the reader is gone.
async fn run(mut delete: DeleteRange, mut asked: mpsc::Receiver<oneshot::Sender<Round>>) {
    loop {
        let answer = match timeout(REST_AFTER, asked.recv()).await {
            Ok(answer) => answer,
            Err(_) => {
                delete.rest();
                match timeout(IDLE_MAX - REST_AFTER, asked.recv()).await {
                    Ok(answer) => answer,
                    Err(_) => return,
                }
            }
        };
        let Some(mut answer) = answer else { return };
        let round = tokio::select! {
            round = delete.next_round() => round,
            () = answer.closed() => return,
        };
        let is_over = !matches!(round, Ok(Some(_)));
        // A round that nobody is told of is over; its token is with nobody.
        if answer.send(round).is_err() || is_over {
            return;
        }
    }
}

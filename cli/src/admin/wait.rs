//! Owns waiting for the cluster's own work: looking again and again, through elections and restarts, and
//! the words when somebody stops looking. The work itself does not notice.

use std::time::{Duration, Instant};

use coracle_client::Client;
use coracle_client::admin::{ClusterOperation, OperationId, OperationState};

use crate::args::Global;
use crate::failure::{Exit, Failure};
use crate::output::Output;

use super::operation::{now_ms, progress};

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Between two looks while no node answers: they restart, or somebody is elected. Longer would keep
/// people waiting after the cluster is back.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(5);

/// What a look has shown.
pub enum Look<T> {
    /// It is so far: this is what was waited for.
    Done(T),
    /// Not yet; how far it is, for people.
    NotYet(String),
}

/// What is said to those who stop waiting.
pub struct Words {
    /// What is waited for: `operation 7`.
    pub what: String,
    /// How to come back, and how to end it.
    pub back: String,
}

/// Looks until it is so far. Nodes that do not answer meanwhile are asked again.
pub async fn until<T>(
    words: &Words,
    global: &Global,
    output: &Output,
    mut look: impl AsyncFnMut() -> Result<Look<T>, Failure>,
) -> Result<T, Failure> {
    let ends = global.timeout.map(|timeout| Instant::now() + timeout);
    let mut progress = output.progress();
    let mut pause = LOOK_INTERVAL;
    // One for the whole wait: none that comes between two looks is lost.
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    loop {
        let looked = tokio::select! {
            looked = look() => looked,
            _ = &mut interrupt => return Err(detached(words)),
        };
        let text = match looked {
            Ok(Look::Done(found)) => return Ok(found),
            Ok(Look::NotYet(text)) => {
                pause = LOOK_INTERVAL;
                text
            }
            Err(failure) if failure.exit == Exit::Unreachable => {
                pause = (pause * 2).min(LOOK_INTERVAL_MAX);
                failure.what
            }
            Err(failure) => return Err(failure),
        };
        if ends.is_some_and(|ends| Instant::now() >= ends) {
            let what = format!("{} is not done yet: {text}", words.what);
            let next = format!("the cluster goes on by itself; {}", words.back);
            return Err(Failure::new(Exit::Unhealthy, what).next(next));
        }
        progress.update(|| format!("{}: {text}", words.what));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = &mut interrupt => return Err(detached(words)),
        }
    }
}

fn detached(words: &Words) -> Failure {
    let what = format!("detached: {} goes on by itself", words.what);
    Failure::new(Exit::Interrupted, what).next(words.back.clone())
}

/// Waits until an operation has ended; fails when not all of it was done. `seen` is told of every look.
pub async fn operation(
    client: &Client,
    id: OperationId,
    global: &Global,
    output: &Output,
    mut seen: impl FnMut(&ClusterOperation) -> Result<(), Failure>,
) -> Result<ClusterOperation, Failure> {
    let words = Words {
        what: format!("operation {id}"),
        back: format!(
            "coracle operation watch {id} comes back to it, coracle operation cancel {id} ends it"
        ),
    };
    let admin = client.admin();
    let mut last: Option<ClusterOperation> = None;
    let ended = until(&words, global, output, async || {
        let found = admin.operation(id).await;
        let found = found
            .map_err(|error| Failure::call(format!("look at operation {id}"), &error))?
            .ok_or_else(|| {
                Failure::failed(format!("there is no operation {id}"))
                    .next("coracle operation ls shows those that are remembered")
            })?;
        if last.as_ref() != Some(&found) {
            seen(&found)?;
            last = Some(found.clone());
        }
        match found.has_ended() {
            true => Ok(Look::Done(found)),
            false => Ok(Look::NotYet(progress(&found, now_ms()))),
        }
    })
    .await?;
    match ended.state {
        OperationState::Done => Ok(ended),
        state => {
            let because = match ended.message.as_str() {
                "" => String::new(),
                message => format!(": {message}"),
            };
            let failure = Failure::failed(format!("operation {id} is {state}{because}"));
            Err(failure.next("what was done stands: coracle rebalance plan shows what is left"))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use coracle_client::testing::FakeCluster;
    use coracle_client::{NodeId, ShardId};

    use super::*;
    use crate::args::Cli;

    fn global(more: &[&str]) -> (Global, Output) {
        let cli = Cli::try_parse_from([&["coracle", "status"], more].concat()).unwrap();
        let output = Output::new(&cli.global);
        (cli.global, output)
    }

    fn words() -> Words {
        Words { what: "it".to_owned(), back: "come back".to_owned() }
    }

    #[tokio::test]
    async fn nodes_that_do_not_answer_are_asked_again_and_other_failures_are_told() {
        let (global, output) = global(&[]);
        let (mut looks, words) = (0, words());
        let found = until(&words, &global, &output, async || {
            looks += 1;
            match looks {
                1 => Err(Failure::new(Exit::Unreachable, "nobody answers")),
                2 => Ok(Look::NotYet("half".to_owned())),
                _ => Ok(Look::Done(looks)),
            }
        });
        assert_eq!(found.await, Ok(3));
        let denied = async || Err::<Look<()>, _>(Failure::new(Exit::Denied, "no"));
        let failed = until(&words, &global, &output, denied).await.unwrap_err();
        assert_eq!(failed.exit, Exit::Denied);
    }

    #[tokio::test]
    async fn a_wait_that_ends_too_early_says_how_to_come_back() {
        let (global, output) = global(&["--timeout", "1ms"]);
        let look = async || {
            tokio::time::sleep(Duration::from_millis(2)).await;
            Ok(Look::<()>::NotYet("half".to_owned()))
        };
        let late = until(&words(), &global, &output, look).await.unwrap_err();
        assert_eq!(late.exit, Exit::Unhealthy);
        assert!(late.what.contains("half") && late.next.unwrap().contains("come back"));
    }

    #[tokio::test]
    async fn an_operation_is_told_once_and_one_that_was_never_is_a_failure() {
        let (global, output) = global(&[]);
        let cluster = FakeCluster::shape().nodes(4).spares(1).start();
        let client = cluster.client().await;
        let admin = client.admin();
        let moved = admin.move_replica(ShardId(1), NodeId(1), NodeId(4)).await.unwrap();
        let mut seen = Vec::new();
        let ended = operation(&client, moved.id, &global, &output, |it| {
            seen.push(it.state);
            Ok(())
        });
        assert_eq!(ended.await.unwrap(), moved);
        assert_eq!(seen, [OperationState::Done]);
        let none = operation(&client, OperationId(9), &global, &output, |_| Ok(())).await;
        assert!(none.unwrap_err().what.contains("no operation 9"));
    }
}

//! Owns the load: callers that do operations, one at a time each, either as fast as they are answered
//! (closed loop) or at a constant rate (open loop). Does not choose the operations (see `workload`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coracle_client::{Client, Error, Keyspace, Outcome};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::failure::Failure;
use crate::schedule::{counted_from, offset};
use crate::tally::Tally;
use crate::workload::{Choices, Kind, Workload};

/// Writers that fill the keys in before a load that reads.
const FILLERS: usize = 64;

/// A cluster that was just made has its leaders by then.
const FILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What no caller came to in time.
pub const NOT_STARTED: &str = "not started";

/// How the load is put on.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Callers, each with one operation under way.
    pub callers: usize,
    /// Operations per second of all callers together; 0 is a closed loop.
    pub rate: u64,
    /// Runs before anything is counted.
    pub warmup: Duration,
    /// How long is counted.
    pub window: Duration,
}

/// What the operations of a run did.
#[derive(Clone, Debug, Default)]
pub struct Tallies {
    /// Writes.
    pub puts: Tally,
    /// Reads.
    pub gets: Tally,
}

impl Tallies {
    fn of(&mut self, kind: Kind) -> &mut Tally {
        match kind {
            Kind::Put => &mut self.puts,
            Kind::Get => &mut self.gets,
        }
    }
}

/// Does something for a caller; what went wrong is an error's kind, or `None`.
trait Operate: Send + 'static {
    fn operate(&mut self, kind: Kind) -> impl Future<Output = Option<String>> + Send;
    fn next_kind(&mut self) -> Kind;
}

/// A caller of a cluster.
struct Caller {
    keyspace: Keyspace,
    choices: Choices,
}

impl Operate for Caller {
    async fn operate(&mut self, kind: Kind) -> Option<String> {
        let key = self.choices.key();
        match kind {
            Kind::Put => self.keyspace.put(key, self.choices.value()).await.err().map(error_kind),
            Kind::Get => match self.keyspace.get(key).await {
                Ok(Some(_)) => None,
                // All keys were filled in before.
                Ok(None) => Some("absent".to_owned()),
                Err(error) => Some(error_kind(error)),
            },
        }
    }

    fn next_kind(&mut self) -> Kind {
        self.choices.next_kind()
    }
}

/// As it stands in the report: what it was, why, and what is known of a write.
fn error_kind(error: Error) -> String {
    let reason = error.reason().map(|reason| format!(" {reason}")).unwrap_or_default();
    let outcome = if error.outcome() == Outcome::Unknown { ", outcome unknown" } else { "" };
    format!("{:?}{reason}{outcome}", error.kind())
}

/// Runs a load on a cluster; callers are dealt out to the clients in turn.
pub async fn run(
    clients: &[Client],
    keyspace: &str,
    workload: &Workload,
    plan: Plan,
) -> Result<Tallies, Failure> {
    if clients.is_empty() || plan.callers == 0 || plan.window.is_zero() {
        return Err(Failure::new("there must be a client, a connection and a second at least"));
    }
    let caller = |at: usize| Caller {
        keyspace: clients[at % clients.len()].keyspace(keyspace),
        choices: workload.choices(at),
    };
    Ok(operate((0..plan.callers).map(caller).collect(), plan).await)
}

/// Writes every key once.
pub async fn fill(client: &Client, keyspace: &str, workload: &Workload) -> Result<(), Failure> {
    let next = Arc::new(AtomicU64::new(0));
    let mut writers = JoinSet::new();
    for at in 0..FILLERS {
        let (next, workload) = (next.clone(), workload.clone());
        let keyspace = client.keyspace(keyspace);
        writers.spawn(async move {
            let mut choices = workload.choices(at);
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= workload.keys {
                    return Ok(());
                }
                let put = keyspace.put(workload.key(number), choices.value());
                put.timeout(FILL_TIMEOUT).await?;
            }
        });
    }
    while let Some(written) = writers.join_next().await {
        let written: Result<(), Error> = written.map_err(Failure::of("fill the keys in"))?;
        written.map_err(Failure::of("fill the keys in"))?;
    }
    Ok(())
}

/// What all callers of a run share.
struct Run {
    plan: Plan,
    begin: Instant,
    /// The next operation of an open loop that nobody has taken.
    next: AtomicU64,
    tallies: Mutex<Tallies>,
}

async fn operate<O: Operate>(operators: Vec<O>, plan: Plan) -> Tallies {
    let run = Arc::new(Run {
        plan,
        begin: Instant::now(),
        next: AtomicU64::new(0),
        tallies: Mutex::new(Tallies::default()),
    });
    let mut callers = JoinSet::new();
    for operator in operators {
        let run = run.clone();
        callers.spawn(async move {
            match run.plan.rate {
                0 => run.closed_loop(operator).await,
                rate => run.open_loop(operator, rate).await,
            }
        });
    }
    callers.join_all().await;
    let tallies = run.tallies.lock().unwrap_or_else(PoisonError::into_inner);
    tallies.clone()
}

impl Run {
    fn end(&self) -> Instant {
        self.begin + self.plan.warmup + self.plan.window
    }

    async fn closed_loop(&self, mut operator: impl Operate) {
        let end = self.end();
        loop {
            let began = Instant::now();
            if began >= end {
                return;
            }
            let kind = operator.next_kind();
            let error = operator.operate(kind).await;
            self.note(kind, began, Instant::now(), error);
        }
    }

    async fn open_loop(&self, mut operator: impl Operate, rate: u64) {
        let end = self.end();
        loop {
            let due = self.begin + offset(self.next.fetch_add(1, Ordering::Relaxed), rate);
            if due >= end {
                return;
            }
            let slept = due > Instant::now();
            if slept {
                tokio::time::sleep_until(due).await;
            }
            let now = Instant::now();
            let kind = operator.next_kind();
            if now >= end && !slept {
                // It waited at least so long: left out, the worst would be missing.
                self.note(kind, due, end, Some(NOT_STARTED.to_owned()));
                continue;
            }
            let error = operator.operate(kind).await;
            self.note(kind, counted_from(due, now, slept), Instant::now(), error);
        }
    }

    /// Counts what began within the window.
    fn note(&self, kind: Kind, began: Instant, ended: Instant, error: Option<String>) {
        if began >= self.begin + self.plan.warmup {
            let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
            tallies.of(kind).note(ended.duration_since(began), error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A service with one stall: between two moments it answers nothing; else it takes 1 ms.
    struct Stalling {
        begin: Instant,
        stall: std::ops::Range<Duration>,
    }

    impl Operate for Stalling {
        async fn operate(&mut self, _: Kind) -> Option<String> {
            if self.stall.contains(&self.begin.elapsed()) {
                tokio::time::sleep_until(self.begin + self.stall.end).await;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            None
        }

        fn next_kind(&mut self) -> Kind {
            Kind::Put
        }
    }

    async fn with_stall(rate: u64, callers: usize) -> Tally {
        let stall = Duration::from_secs(5)..Duration::from_secs(6);
        let begin = Instant::now();
        let one = |_| Stalling { begin, stall: stall.clone() };
        let plan =
            Plan { callers, rate, warmup: Duration::from_secs(2), window: Duration::from_secs(10) };
        operate((0..callers).map(one).collect(), plan).await.puts
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_loop_sees_the_whole_stall() {
        for callers in [1, 8] {
            let tally = with_stall(100, callers).await;
            assert!((995..=1_001).contains(&tally.operations()), "{}", tally.operations());
            // A tenth of the operations was due within the stall: half of them for over half of it.
            let p95 = tally.quantile(0.95).as_millis();
            assert!((400..=600).contains(&p95), "{callers}: {p95}");
            assert!(tally.quantile(0.99) >= Duration::from_millis(850));
            assert!(tally.quantile(0.8) < Duration::from_millis(5));
            assert!(tally.errors.is_empty(), "{:?}", tally.errors);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_loop_asks_as_fast_as_it_is_answered() {
        let tally = with_stall(0, 1).await;
        // 9 s at 1 to 2 ms each.
        assert!((4_000..=9_001).contains(&tally.ok), "{}", tally.ok);
        assert!(tally.quantile(0.999) < Duration::from_millis(5), "the stall counted once");
        assert!(tally.max() >= Duration::from_millis(950));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_due_and_not_begun_is_counted() {
        // One caller gets at most 1,000 a second done.
        let tally = with_stall(3_000, 1).await;
        let missed = tally.errors[NOT_STARTED];
        assert_eq!(tally.errors.len(), 1);
        // By the end of the run of 12 s, 11,000 at most of 36,000 are done.
        assert!(missed >= 25_000, "{missed}");
        assert!(tally.max() >= Duration::from_secs(7), "{:?}", tally.max());
        assert_eq!(tally.ok + missed, tally.operations());
    }
}

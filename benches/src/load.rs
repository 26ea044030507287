//! Owns the load: callers that do operations, one at a time each, either as fast as they are answered
//! (closed loop) or at a constant rate (open loop). Does not choose the operations (see `workload`) and
//! does not judge answers (see `witness`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::failure::Failure;
use crate::port::{Entry, Port, System};
use crate::schedule::{counted_from, offset};
use crate::tally::Tally;
use crate::witness::{self, Witness, Write};
use crate::workload::{Choices, Kind, Workload, key};

/// Writers that fill the keys in before a load.
const FILLERS: usize = 1_024;

/// Those that write many keys in a call: etcd allows 128.
const FILLERS_IN_BATCHES: usize = 16;
const FILL_BATCH: usize = 128;

/// How often a key is tried: a cluster that was just made has its leaders soon.
const FILL_TRIES_MAX: u32 = 20;

/// What no caller came to in time.
pub const NOT_STARTED: &str = "not started";

/// Tallies that callers share: on a few cores no two of them want one at a time.
const TALLIES: usize = 16;

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
    /// Keys of one call, of gets and puts.
    pub batch: usize,
}

/// What the operations of a run did, by kind.
#[derive(Clone, Debug, Default)]
pub struct Tallies(BTreeMap<Kind, Tally>);

impl Tallies {
    /// Those of a kind.
    pub fn of(&self, kind: Kind) -> Tally {
        self.0.get(&kind).cloned().unwrap_or_default()
    }

    /// Those that did anything.
    pub fn each(&self) -> impl Iterator<Item = (Kind, &Tally)> {
        self.0.iter().map(|(kind, tally)| (*kind, tally))
    }

    /// All together.
    pub fn all(&self) -> Tally {
        let mut all = Tally::default();
        self.0.values().for_each(|tally| all.add(tally));
        all
    }

    fn add(&mut self, other: &Tallies) {
        for (kind, tally) in &other.0 {
            self.0.entry(*kind).or_default().add(tally);
        }
    }
}

/// Does something for a caller; what went wrong is an error's kind, or `None`.
trait Operate: Send + 'static {
    fn operate(&mut self, kind: Kind) -> impl Future<Output = Option<String>> + Send;
    fn next_kind(&mut self) -> Kind;
}

/// A caller of a system.
struct Caller {
    port: Port,
    witness: Arc<Witness>,
    choices: Choices,
    at: usize,
    callers: usize,
    batch: usize,
}

impl Operate for Caller {
    async fn operate(&mut self, kind: Kind) -> Option<String> {
        let done = match kind {
            Kind::Get if self.batch > 1 => self.get_many().await,
            Kind::Put if self.batch > 1 => self.put_many().await,
            Kind::Get => {
                let number = self.choices.number();
                self.get(number).await
            }
            Kind::Put => {
                let write = self.begin();
                self.put(write).await
            }
            Kind::Insert => {
                let number = self.choices.new_number();
                let value = self.choices.value(&witness::loaded(number));
                self.port.put(key(number), value).await
            }
            Kind::Scan => self.scan().await,
            Kind::Modify => {
                let write = self.begin();
                match self.get(write.number).await {
                    Ok(()) => self.put(write).await,
                    Err(error) => {
                        self.witness.end(&write, false);
                        Err(error)
                    }
                }
            }
        };
        done.err()
    }

    fn next_kind(&mut self) -> Kind {
        self.choices.next_kind()
    }
}

impl Caller {
    fn begin(&mut self) -> Write {
        let number = self.choices.number();
        self.witness.begin(number, self.at, self.callers)
    }

    async fn get(&mut self, number: u64) -> Result<(), String> {
        let floor = self.witness.floor(number);
        let found = self.port.get(key(number)).await?;
        Ok(self.witness.judge(number, floor, found.as_deref())?)
    }

    async fn put(&mut self, write: Write) -> Result<(), String> {
        let value = self.choices.value(&write.head());
        let done = self.port.put(key(write.number), value).await;
        self.witness.end(&write, done.is_ok());
        done
    }

    async fn scan(&mut self) -> Result<(), String> {
        let (number, keys) = (self.choices.number(), self.choices.scan_keys());
        let from = key(number);
        let found = self.port.scan(from.clone(), keys).await?;
        let ascend = found.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if !ascend || found.len() as u64 > keys || found.first().is_none_or(|(key, _)| *key < from)
        {
            return Err("wrong: not the range that was asked for".to_owned());
        }
        Ok(())
    }

    async fn get_many(&mut self) -> Result<(), String> {
        let numbers: Vec<u64> = (0..self.batch).map(|_| self.choices.number()).collect();
        let floors: Vec<u64> = numbers.iter().map(|number| self.witness.floor(*number)).collect();
        let found = self.port.get_many(numbers.iter().map(|number| key(*number)).collect()).await?;
        if found.len() != numbers.len() {
            return Err("wrong: answers are missing".to_owned());
        }
        for ((number, floor), found) in numbers.into_iter().zip(floors).zip(found) {
            self.witness.judge(number, floor, found.as_deref())?;
        }
        Ok(())
    }

    async fn put_many(&mut self) -> Result<(), String> {
        // No key twice in one call, which etcd refuses.
        let mut writes: BTreeMap<u64, Write> = BTreeMap::new();
        while writes.len() < self.batch {
            let number = self.choices.number();
            let write = self.witness.begin(number, self.at, self.callers);
            // The one before, of the same key, is never sent.
            writes.insert(write.number, write);
        }
        let writes: Vec<Write> = writes.into_values().collect();
        let entry = |write: &Write| (key(write.number), self.choices.value(&write.head()));
        let entries: Vec<Entry> = writes.iter().map(entry).collect();
        let done = self.port.put_many(entries).await;
        writes.iter().for_each(|write| self.witness.end(write, done.is_ok()));
        done
    }
}

/// Runs a load on a system; its ports are dealt out to the callers in turn.
pub async fn run(system: &System, workload: &Workload, plan: Plan) -> Result<Tallies, Failure> {
    if system.ports.is_empty() || plan.callers == 0 || plan.window.is_zero() || plan.batch == 0 {
        return Err(Failure::new("there must be a client, a connection and a second at least"));
    }
    let workload = workload.adding_to(system.added.clone());
    let caller = |at: usize| Caller {
        port: system.ports[at % system.ports.len()].clone(),
        witness: system.witness.clone(),
        choices: workload.choices(at),
        at,
        callers: plan.callers,
        batch: plan.batch,
    };
    Ok(operate((0..plan.callers).map(caller).collect(), plan).await)
}

/// Writes every key once.
pub async fn fill(system: &System, workload: &Workload) -> Result<(), Failure> {
    let in_batches = matches!(system.ports.first(), Some(Port::Etcd(_) | Port::Redis(_)));
    let (writers, batch) = match in_batches {
        true => (FILLERS_IN_BATCHES, FILL_BATCH),
        false => (FILLERS, 1),
    };
    let next = Arc::new(AtomicU64::new(0));
    let mut filling = JoinSet::new();
    for at in 0..writers {
        let (next, mut choices) = (next.clone(), workload.choices(at));
        let (mut port, keys) = (system.ports[at % system.ports.len()].clone(), workload.keys);
        filling.spawn(async move {
            loop {
                let first = next.fetch_add(batch as u64, Ordering::Relaxed);
                if first >= keys {
                    return Ok(());
                }
                let numbers = first..(first + batch as u64).min(keys);
                let entry = |number| (key(number), choices.value(&witness::loaded(number)));
                put_surely(&mut port, numbers.map(entry).collect()).await?;
            }
        });
    }
    while let Some(written) = filling.join_next().await {
        let written: Result<(), String> = written.map_err(Failure::of("fill the keys in"))?;
        written.map_err(Failure::of("fill the keys in"))?;
    }
    Ok(())
}

async fn put_surely(port: &mut Port, entries: Vec<Entry>) -> Result<(), String> {
    let mut tries = 0;
    loop {
        let done = match &entries[..] {
            [(key, value)] => port.put(key.clone(), value.clone()).await,
            _ => port.put_many(entries.clone()).await,
        };
        match done {
            Err(_) if tries < FILL_TRIES_MAX => tries += 1,
            done => return done,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What all callers of a run share.
struct Run {
    plan: Plan,
    begin: Instant,
    /// The next operation of an open loop that nobody has taken.
    next: AtomicU64,
    tallies: Vec<Mutex<Tallies>>,
}

async fn operate<O: Operate>(operators: Vec<O>, plan: Plan) -> Tallies {
    let run = Arc::new(Run {
        plan,
        begin: Instant::now(),
        next: AtomicU64::new(0),
        tallies: (0..TALLIES).map(|_| Mutex::default()).collect(),
    });
    let mut callers = JoinSet::new();
    for (at, operator) in operators.into_iter().enumerate() {
        let run = run.clone();
        callers.spawn(async move {
            match run.plan.rate {
                0 => run.closed_loop(at, operator).await,
                rate => run.open_loop(at, operator, rate).await,
            }
        });
    }
    callers.join_all().await;
    let mut all = Tallies::default();
    for tallies in &run.tallies {
        all.add(&tallies.lock().unwrap_or_else(PoisonError::into_inner));
    }
    all
}

impl Run {
    fn end(&self) -> Instant {
        self.begin + self.plan.warmup + self.plan.window
    }

    async fn closed_loop(&self, at: usize, mut operator: impl Operate) {
        let end = self.end();
        loop {
            let began = Instant::now();
            if began >= end {
                return;
            }
            let kind = operator.next_kind();
            let error = operator.operate(kind).await;
            self.note(at, kind, began, Instant::now(), error);
        }
    }

    async fn open_loop(&self, at: usize, mut operator: impl Operate, rate: u64) {
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
                self.note(at, kind, due, end, Some(NOT_STARTED.to_owned()));
                continue;
            }
            let error = operator.operate(kind).await;
            self.note(at, kind, counted_from(due, now, slept), Instant::now(), error);
        }
    }

    /// Counts what began within the window.
    fn note(&self, at: usize, kind: Kind, began: Instant, ended: Instant, error: Option<String>) {
        if began >= self.begin + self.plan.warmup {
            let tallies = self.tallies[at % TALLIES].lock();
            let mut tallies = tallies.unwrap_or_else(PoisonError::into_inner);
            let batched = matches!(kind, Kind::Get | Kind::Put);
            let count = if batched { self.plan.batch as u64 } else { 1 };
            let latency = ended.duration_since(began);
            tallies.0.entry(kind).or_default().note_many(latency, count, error);
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
        let plan = Plan {
            callers,
            rate,
            warmup: Duration::from_secs(2),
            window: Duration::from_secs(10),
            batch: 1,
        };
        operate((0..callers).map(one).collect(), plan).await.of(Kind::Put)
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

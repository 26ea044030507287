//! Owns the load: writers that note everything in the ledger, the checks while it runs, figures over a
//! window, and the reading back at the end. Does not judge (see `ledger`) and prints nothing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use coracle_client::{Client, Error, Keyspace, Outcome};
use hdrhistogram::Histogram;
use rand::RngExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::failure::{Exit, Failure};

use super::ledger::{KeyId, Ledger, Verdict};

/// Keys of each writer: few enough that many are overwritten again and again.
const KEYS_PER_WRITER: usize = 16;

/// One of so many operations reads a key back and judges it.
const READ_ONE_OF: u32 = 4;

/// After a refusal: the cluster is not well, and the figures need no flood of failures.
const PAUSE: Duration = Duration::from_millis(50);

/// Keys that are read back in one call.
const VERIFY_CHUNK: usize = 256;

/// How long the reading back may take.
const VERIFY_DEADLINE: Duration = Duration::from_secs(60);

/// The longest latency that the histogram tells apart, in microseconds: beyond every timeout.
const LATENCY_MAX_US: u64 = 120_000_000;

/// Writers at work. Dropping it aborts them.
pub struct Load {
    ledger: Arc<Ledger>,
    window: Arc<Mutex<Window>>,
    stop: watch::Sender<bool>,
    writers: JoinSet<()>,
}

/// What happened since the last look.
#[derive(Clone)]
pub struct Window {
    /// When it began.
    pub since: Instant,
    /// Operations that were answered as they should.
    pub ok: u64,
    /// Operations that failed.
    pub failed: u64,
    /// Reads that found an acknowledged write missing.
    pub lost: u64,
    /// In microseconds, of all operations.
    latencies: Histogram<u64>,
    /// Why the last one failed.
    pub last_failure: Option<String>,
}

impl Window {
    fn new() -> Window {
        let latencies = Histogram::new_with_max(LATENCY_MAX_US, 3);
        Window {
            since: Instant::now(),
            ok: 0,
            failed: 0,
            lost: 0,
            latencies: latencies.expect("the bounds are constants that it takes"),
            last_failure: None,
        }
    }

    /// The latency that this share of the operations did not pass.
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.latencies.value_at_quantile(quantile))
    }

    /// Operations per second.
    pub fn rate(&self) -> f64 {
        (self.ok + self.failed) as f64 / self.since.elapsed().as_secs_f64().max(0.001)
    }

    /// In percent; 100 where nothing happened.
    pub fn success(&self) -> f64 {
        let all = self.ok + self.failed;
        if all == 0 { 100.0 } else { self.ok as f64 * 100.0 / all as f64 }
    }
}

impl Load {
    /// Starts a writer on each of these, which make so many operations per second together; 0 makes
    /// as many as go.
    pub fn start(writers: Vec<Keyspace>, ledger: Arc<Ledger>, rate: u32) -> Load {
        let (stop, stopped) = watch::channel(false);
        let window = Arc::new(Mutex::new(Window::new()));
        let mut tasks = JoinSet::new();
        let interval =
            (rate > 0).then(|| Duration::from_secs_f64(writers.len() as f64 / f64::from(rate)));
        for keyspace in writers {
            let writer = Writer {
                keyspace,
                ledger: ledger.clone(),
                window: window.clone(),
                keys: (0..KEYS_PER_WRITER).map(|_| ledger.new_key()).collect(),
            };
            tasks.spawn(writer.run(interval, stopped.clone()));
        }
        Load { ledger, window, stop, writers: tasks }
    }

    /// What happened since the last call.
    pub fn take_window(&self) -> Window {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut window, Window::new())
    }

    /// The account of it.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Lets every writer finish what it has under way.
    pub async fn finish(mut self) {
        // Without receivers there is nobody left to stop.
        let _ = self.stop.send(true);
        while self.writers.join_next().await.is_some() {}
    }
}

/// One writer, with keys of its own. One operation at a time.
struct Writer {
    keyspace: Keyspace,
    ledger: Arc<Ledger>,
    window: Arc<Mutex<Window>>,
    keys: Vec<KeyId>,
}

impl Writer {
    async fn run(mut self, interval: Option<Duration>, mut stopped: watch::Receiver<bool>) {
        let mut ticks = interval.map(|interval| {
            // Writers begin at different moments: all at once would be a saw, not a load.
            let first = interval.mul_f64(rand::rng().random_range(0.0..1.0));
            let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + first, interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            if let Some(ticks) = &mut ticks {
                tokio::select! {
                    _ = ticks.tick() => {}
                    _ = stopped.changed() => return,
                }
            }
            if *stopped.borrow() {
                return;
            }
            let (place, read) = {
                let mut rng = rand::rng();
                (rng.random_range(0..self.keys.len()), rng.random_ratio(1, READ_ONE_OF))
            };
            let went_well = match read {
                true => self.read(self.keys[place]).await,
                false => self.write(place).await,
            };
            if !went_well {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    async fn write(&mut self, place: usize) -> bool {
        let attempt = self.ledger.begin(self.keys[place]);
        let started = Instant::now();
        let written = self.keyspace.put(attempt.key.clone(), attempt.value.clone()).await;
        match &written {
            Ok(written) => {
                let served = written.served;
                self.ledger.acknowledged(&attempt, served.shard, served.node, Instant::now());
            }
            Err(error) if error.outcome() == Outcome::NotApplied => self.ledger.refused(&attempt),
            Err(_) => {
                self.ledger.unknown(&attempt);
                self.keys[place] = self.ledger.new_key();
            }
        }
        self.note(started, written.as_ref().err(), false)
    }

    /// Nobody else writes the key, so the last acknowledged write must be there, exactly.
    async fn read(&self, id: KeyId) -> bool {
        let started = Instant::now();
        let found = self.keyspace.get(self.ledger.key(id)).await;
        let lost = found.as_ref().is_ok_and(|entry| {
            let value = entry.as_ref().map(|entry| &entry.value[..]);
            self.ledger.judge(id, value) == Verdict::Lost
        });
        self.note(started, found.as_ref().err(), lost)
    }

    fn note(&self, started: Instant, error: Option<&Error>, lost: bool) -> bool {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.latencies.saturating_record(started.elapsed().as_micros() as u64);
        window.lost += u64::from(lost);
        match error {
            None => window.ok += 1,
            Some(error) => {
                window.failed += 1;
                window.last_failure = Some(error.to_string());
            }
        }
        error.is_none()
    }
}

/// What the reading back found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Verified {
    /// Keys that were read.
    pub keys: u64,
    /// Acknowledged writes that their values account for.
    pub acknowledged: u64,
    /// Keys whose acknowledged write is not there.
    pub lost: Vec<String>,
    /// Unknown writes that turned out to have been applied.
    pub unknown_applied: u64,
    /// Unknown writes in all.
    pub unknown: u64,
}

/// Reads every key of the ledger back, linearizably, and judges it. Nobody may be writing.
pub async fn verify(client: &Client, keyspace: &str, ledger: &Ledger) -> Result<Verified, Failure> {
    let keyspace = client.keyspace(keyspace);
    let deadline = Instant::now() + VERIFY_DEADLINE;
    let mut verified = Verified::default();
    for chunk in ledger.all().chunks(VERIFY_CHUNK) {
        let keys: Vec<_> = chunk.iter().map(|(id, _)| ledger.key(*id)).collect();
        let found = loop {
            match keyspace.multi_get(keys.clone()).await {
                Ok(found) => break found,
                Err(error) if error.is_retryable() && Instant::now() < deadline => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => {
                    let failure = Failure::call("read the acknowledged writes back", &error);
                    return Err(Failure { exit: Exit::Unhealthy, ..failure });
                }
            }
        };
        for ((id, expected), entry) in chunk.iter().zip(found) {
            verified.keys += 1;
            verified.acknowledged += expected.acknowledgements;
            verified.unknown += u64::from(expected.unknown.is_some());
            match ledger.judge(*id, entry.as_ref().map(|entry| &entry.value[..])) {
                Verdict::Kept => {}
                Verdict::UnknownApplied => verified.unknown_applied += 1,
                Verdict::Lost => verified.lost.push(loss(ledger, *id, entry.as_ref())),
            }
        }
    }
    Ok(verified)
}

fn loss(ledger: &Ledger, id: KeyId, entry: Option<&coracle_client::Entry>) -> String {
    let key = String::from_utf8_lossy(&ledger.key(id)).into_owned();
    let expected = ledger.expected(id);
    let found = match entry {
        None => "is absent".to_owned(),
        Some(entry) => {
            let text = String::from_utf8_lossy(&entry.value).trim_end_matches('.').to_owned();
            format!("is {text:?} at version {}", entry.version)
        }
    };
    format!("{key}: write {} was acknowledged, the key {found}", expected.acknowledged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_counts() {
        let mut window = Window::new();
        assert_eq!(window.success(), 100.0);
        window.ok = 3;
        window.failed = 1;
        for us in [1_000, 2_000, 3_000, 100_000] {
            window.latencies.record(us).unwrap();
        }
        assert_eq!(window.success(), 75.0);
        assert_eq!(window.quantile(0.5).as_millis(), 2);
        assert!(window.quantile(0.99) >= Duration::from_millis(99));
    }
}

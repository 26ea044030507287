//! The keys of the scan measurement, and writers that overwrite, insert and delete them at a known rate.
//! Owns what is written and the ledger of it. Does not scan, and does not judge.

use std::sync::Arc;
use std::time::Duration;

use coracle_client::{Client, Outcome};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::checker::scans::{Ledger, Left};

/// Writes that fill the cluster at a time.
const FILLERS: u64 = 256;
/// Writers that work while it is scanned; the rate is theirs together.
const WRITERS: u64 = 16;
/// A write is tried for so long: longer than any failover.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a value.
const VALUE_BYTES: usize = 100;

/// A key by its number: 16 bytes, in the numbers' order.
pub fn key(number: u64) -> String {
    format!("k{number:015}")
}

/// The number of a key.
pub fn number(key: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(key).ok()?.strip_prefix('k').filter(|it| it.len() == 15)?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// What is remembered of a value (FNV-1a): two of them are never the same by accident.
pub fn fingerprint(value: &[u8]) -> u64 {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    value.iter().fold(0xcbf2_9ce4_8422_2325, fold)
}

/// A value that no other write has.
fn value(key: u64, turn: u64) -> String {
    format!("{key}-{turn}-").repeat(VALUE_BYTES)[..VALUE_BYTES].to_owned()
}

/// Everything that is written, and by when it was acknowledged.
pub struct Book {
    began: Instant,
    /// Keys that are there at first have the even numbers below twice this; others come between them.
    keys: u64,
    ledger: Mutex<Ledger>,
    failed: Mutex<Vec<String>>,
}

impl Book {
    /// For so many keys.
    pub fn new(keys: u64) -> Arc<Book> {
        let (ledger, failed) = (Mutex::default(), Mutex::default());
        Arc::new(Book { began: Instant::now(), keys, ledger, failed })
    }

    /// The ledger's clock.
    pub fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// The ledger, when nobody writes.
    pub fn ledger(&self) -> parking_lot::MutexGuard<'_, Ledger> {
        self.ledger.lock()
    }

    /// What writers were told instead of an acknowledgement.
    pub fn failed(&self) -> Vec<String> {
        self.failed.lock().clone()
    }

    /// Writes every key once.
    pub async fn fill(self: &Arc<Self>, client: &Client) -> Result<(), String> {
        let mut fillers = JoinSet::new();
        for filler in 0..FILLERS {
            let (book, client) = (self.clone(), client.clone());
            fillers.spawn(async move {
                for at in (filler..book.keys).step_by(FILLERS as usize) {
                    book.write(&client, 2 * at, Some(value(2 * at, 0))).await;
                }
            });
        }
        while let Some(filled) = fillers.join_next().await {
            filled.map_err(|error| error.to_string())?;
        }
        match self.failed().first() {
            None => Ok(()),
            Some(why) => Err(format!("the keys could not be written: {why}")),
        }
    }

    async fn write(&self, client: &Client, number: u64, what: Option<String>) {
        let left: Left = what.as_ref().map(|value| fingerprint(value.as_bytes()));
        let written = match what {
            Some(value) => client.put(key(number), value).timeout(WRITE_TIMEOUT).await,
            None => client.delete(key(number)).timeout(WRITE_TIMEOUT).await,
        };
        let mut ledger = self.ledger.lock();
        match written {
            Ok(written) => ledger.acknowledge(number, written.version.0, left, self.now_us()),
            Err(error) => {
                if error.outcome() != Outcome::NotApplied {
                    ledger.lose(number, left);
                }
                self.failed.lock().push(format!("key {number}: {error}"));
            }
        }
    }
}

/// Writers at work.
pub struct Writers {
    stop: watch::Sender<bool>,
    tasks: JoinSet<u64>,
    began: Instant,
}

impl Writers {
    /// Starts them; together they send so many writes a second. `round` makes their values new.
    pub fn start(book: &Arc<Book>, client: &Client, per_second: u32, round: u64) -> Writers {
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for writer in 0..WRITERS {
            let (book, client, stopped) = (book.clone(), client.clone(), stopped.clone());
            let every = Duration::from_secs(1) * WRITERS as u32 / per_second.max(1);
            tasks.spawn(write(book, client, stopped, every, (round, writer)));
        }
        Writers { stop, tasks, began: Instant::now() }
    }

    /// Ends them, and waits for their last answers. How many writes they sent, and how many a second.
    pub async fn stop(mut self) -> (u64, f64) {
        self.stop.send_replace(true);
        let mut sent = 0;
        while let Some(ended) = self.tasks.join_next().await {
            sent += ended.unwrap_or(0);
        }
        (sent, sent as f64 / self.began.elapsed().as_secs_f64())
    }
}

/// One writer: keys of its own, so that the writes of a key come one after the other. Half of the writes
/// overwrite, a quarter insert between the others or behind a delete, a quarter delete.
async fn write(
    book: Arc<Book>,
    client: Client,
    stopped: watch::Receiver<bool>,
    every: Duration,
    (round, writer): (u64, u64),
) -> u64 {
    let mut random = StdRng::seed_from_u64(round << 16 | writer);
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sent = 0;
    while !*stopped.borrow() {
        ticks.tick().await;
        let number = random.random_range(0..2 * book.keys) / WRITERS * WRITERS + writer;
        let (open, there) = {
            let ledger = book.ledger.lock();
            (ledger.is_open(number), ledger.is_there(number))
        };
        if !open {
            continue;
        }
        sent += 1;
        let deletes = there && random.random_range(0..3) == 0;
        let what = (!deletes).then(|| value(number, round << 32 | sent));
        book.write(&client, number, what).await;
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_sixteen_bytes_and_their_numbers_order() {
        assert_eq!((key(7).len(), number(key(7).as_bytes())), (16, Some(7)));
        assert!(key(999) < key(1_000));
        for foreign in ["k7", "x000000000000007", "k00000000000000x", ""] {
            assert_eq!(number(foreign.as_bytes()), None, "{foreign}");
        }
    }

    #[test]
    fn values_differ_by_key_and_turn() {
        let of = |key, turn| fingerprint(value(key, turn).as_bytes());
        assert_eq!(value(1, 2).len(), VALUE_BYTES);
        assert!(of(1, 2) != of(1, 3) && of(1, 2) != of(2, 2) && of(1, 2) == of(1, 2));
    }
}

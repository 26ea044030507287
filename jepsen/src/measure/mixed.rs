//! A checked load of mixed reads, writes and scans at a fixed rate: requests are due whether those
//! before them have ended or not, each is one call of the client with a short deadline, and each answer
//! is held against a ledger. Owns the load, the ledger, and the figures by phase. Does not know what
//! happens to the cluster meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_client::{Cas, Client, Outcome, Served, Version};
use futures_util::TryStreamExt;
use futures_util::stream::{self, StreamExt};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use super::Quantiles;
use super::attempts::{Attempt, Attempts};

/// Of the requests that are no scans three of ten are writes.
const WRITES_OF_TEN: u32 = 3;
/// Keys that a scan reads.
const SCAN_KEYS: u64 = 40;
/// A key with a write under way gets no other: so often another key is drawn.
const DRAWS: u32 = 16;
/// Writes that fill the cluster at a time, and how long each is tried; as long as what is read back.
const FILLERS: usize = 64;
const FILL_TIMEOUT: Duration = Duration::from_secs(30);
/// How many failures of a phase are told in words, and how many slow requests.
const TOLD_MAX: usize = 20;
const SLOWEST: usize = 12;

/// What the load is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Keys.
    pub keys: u64,
    /// Bytes of a value.
    pub value_bytes: usize,
    /// Requests a second.
    pub rate: u32,
    /// So many of a hundred are scans.
    pub scans: u32,
    /// Each request's deadline.
    pub deadline: Duration,
    /// What is drawn.
    pub seed: u64,
}

/// What is known of a key. Its writes are numbered, and never two under way.
#[derive(Clone, Copy, Debug, Default)]
struct Key {
    /// The last write that was acknowledged, and its version.
    acknowledged: u64,
    version: u64,
    /// The last write that was sent.
    sent: u64,
    /// A write is under way, or its outcome is unknown.
    closed: bool,
}

/// What a read may show: no write older than the first, none newer than the second.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    oldest: Key,
    newest: u64,
}

/// What happened in a phase.
#[derive(Clone, Debug, Default)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// How long each request took, from when it was due.
    pub took: Vec<Duration>,
    /// Requests without an answer: what the client said, and the story of its attempts.
    pub failed: Vec<String>,
    /// Answers that can't be.
    pub wrong: Vec<String>,
    /// By how many attempts: requests.
    pub attempts: BTreeMap<usize, u64>,
    /// By what an attempt met: how often.
    pub met: BTreeMap<String, u64>,
    /// The slowest requests, with the story of their attempts; the slowest last.
    pub slowest: Vec<(Duration, String)>,
    /// By node: answers.
    pub nodes: BTreeMap<u64, u64>,
    /// By shard: answers.
    pub shards: BTreeMap<u64, u64>,
    /// How long it has lasted.
    pub lasted: Duration,
}

struct Book {
    shape: Shape,
    began: Instant,
    client: Client,
    attempts: Attempts,
    keys: Mutex<Vec<Key>>,
    /// Draws the keys of single requests; the whole range where it is empty.
    hot: Mutex<Vec<u64>>,
    phases: Mutex<(Vec<Phase>, Instant)>,
    numbers: AtomicU64,
}

/// The load at work.
pub struct Mixed {
    book: Arc<Book>,
    stop: watch::Sender<bool>,
    requests: tokio::task::JoinHandle<()>,
}

/// What came back, as far as it is the same for all kinds of requests.
type Answered = Result<(Vec<Served>, Vec<String>), String>;

fn key(number: u64) -> String {
    format!("m{number:09}")
}

fn number(key: &[u8]) -> Option<u64> {
    std::str::from_utf8(key).ok()?.strip_prefix('m')?.parse().ok()
}

fn value(shape: &Shape, key: u64, turn: u64) -> String {
    let head = format!("{key}-{turn}-");
    // Noise behind it, or compression would leave nothing on the disk.
    let noise = super::reclaim_keys::noise(shape.seed ^ key << 24 ^ turn, shape.value_bytes);
    let tail = noise.iter().map(|byte| char::from(b'0' + byte % 64));
    let mut value = head;
    value.extend(tail.take(shape.value_bytes.saturating_sub(value.len())));
    value
}

/// Which write of a key a value is of.
fn turn(key: u64, value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    let rest = text.strip_prefix(&format!("{key}-"))?;
    rest.split('-').next()?.parse().ok()
}

impl Bounds {
    /// Why this can't be what a read that was made between them shows; `None` when it can.
    fn judge(&self, key: u64, shown: Option<(&[u8], Version)>) -> Option<String> {
        let Key { acknowledged, version, .. } = self.oldest;
        let Some((value, at)) = shown else {
            return Some(format!("key {key}: nothing, write {acknowledged} was acknowledged"));
        };
        let Some(turn) = turn(key, value) else {
            return Some(format!("key {key}: a value that nobody wrote"));
        };
        if turn < acknowledged || turn > self.newest {
            return Some(format!(
                "key {key}: write {turn}, it must be one of {acknowledged} to {}",
                self.newest
            ));
        }
        let other = turn == acknowledged && at.0 != version;
        other.then(|| format!("key {key}: write {turn} at {}, acknowledged at {version}", at.0))
    }
}

impl Mixed {
    /// Writes every key once, then begins.
    pub async fn start(client: &Client, shape: Shape, attempts: Attempts) -> Result<Mixed, String> {
        let book = Arc::new(Book {
            shape,
            began: Instant::now(),
            client: client.clone(),
            attempts,
            keys: Mutex::new(vec![Key::default(); shape.keys as usize]),
            hot: Mutex::default(),
            phases: Mutex::new((Vec::new(), Instant::now())),
            numbers: AtomicU64::new(0),
        });
        book.fill().await?;
        book.enter("");
        let (stop, stopped) = watch::channel(false);
        let requests = tokio::spawn(book.clone().run(stopped));
        Ok(Mixed { book, stop, requests })
    }

    /// From now on, requests count towards this phase.
    pub fn enter(&self, name: &str) {
        self.book.enter(name);
    }

    /// Eight of ten single requests, from now on, are for these keys.
    pub fn heat(&self, keys: Vec<u64>) {
        *self.book.hot.lock() = keys;
    }

    /// A copy of the phase that was entered last, as it is by now.
    pub fn phase(&self) -> Phase {
        let phases = self.book.phases.lock();
        let mut last = phases.0.last().cloned().unwrap_or_default();
        last.lasted = phases.1.elapsed();
        last
    }

    /// Forgets what was counted of the phase that was entered last, but its failures.
    pub fn recount(&self) {
        let mut phases = self.book.phases.lock();
        if let Some(last) = phases.0.last_mut() {
            (last.nodes, last.shards) = Default::default();
        }
    }

    /// Which keys are on a shard.
    pub async fn keys_of(&self, shard: u64) -> Result<Vec<u64>, String> {
        let of = (0..self.book.shape.keys).map(|number| async move {
            let read = self.book.client.get(key(number)).timeout(FILL_TIMEOUT).read().await;
            let served = read.map_err(|error| error.to_string())?.served;
            Ok::<_, String>((served.shard.0 == shard).then_some(number))
        });
        let found: Vec<_> = stream::iter(of).buffer_unordered(FILLERS).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Ends the load, waits for its last answers, and reads every key back. The phases, and what is
    /// lost.
    pub async fn stop(self) -> Result<(Vec<Phase>, Vec<String>), String> {
        self.stop.send_replace(true);
        self.requests.await.map_err(|error| error.to_string())?;
        self.book.close_phase();
        let lost = self.book.read_back().await?;
        let phases = std::mem::take(&mut self.book.phases.lock().0);
        Ok((phases.into_iter().filter(|phase| !phase.took.is_empty()).collect(), lost))
    }
}

impl Book {
    async fn fill(&self) -> Result<(), String> {
        let writes = (0..self.shape.keys).map(|number| async move {
            let put = self.client.put(key(number), value(&self.shape, number, 1));
            let written = put.timeout(FILL_TIMEOUT).await.map_err(|error| error.to_string())?;
            let version = written.version.0;
            let entry = Key { acknowledged: 1, version, sent: 1, closed: false };
            self.keys.lock()[number as usize] = entry;
            Ok::<(), String>(())
        });
        stream::iter(writes).buffer_unordered(FILLERS).try_collect().await
    }

    async fn read_back(&self) -> Result<Vec<String>, String> {
        let reads = (0..self.shape.keys).map(|number| async move {
            let bounds = self.bounds(number);
            let read = self.client.get(key(number)).timeout(FILL_TIMEOUT).await;
            let entry = read.map_err(|error| format!("read {} back: {error}", key(number)))?;
            let shown = entry.as_ref().map(|entry| (&entry.value[..], entry.version));
            Ok::<_, String>(bounds.judge(number, shown))
        });
        let found: Vec<_> = stream::iter(reads).buffer_unordered(FILLERS).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    fn enter(&self, name: &str) {
        self.close_phase();
        let mut phases = self.phases.lock();
        phases.0.push(Phase { name: name.to_owned(), ..Phase::default() });
        phases.1 = Instant::now();
    }

    fn close_phase(&self) {
        let mut phases = self.phases.lock();
        let lasted = phases.1.elapsed();
        phases.0.last_mut().into_iter().for_each(|phase| phase.lasted = lasted);
    }

    async fn run(self: Arc<Self>, stopped: watch::Receiver<bool>) {
        let mut random = StdRng::seed_from_u64(self.shape.seed);
        let (began, mut made) = (Instant::now(), 0_u32);
        let mut requests = JoinSet::new();
        while !*stopped.borrow() {
            let due = began + Duration::from_secs(1) * made / self.shape.rate;
            tokio::time::sleep_until(due).await;
            made += 1;
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            let phase = self.phases.lock().0.len() - 1;
            let request = self.clone().request(number, random.random(), phase, due);
            requests.spawn(request.instrument(Attempts::span(number)));
            while requests.try_join_next().is_some() {}
        }
        while requests.join_next().await.is_some() {}
    }

    async fn request(self: Arc<Self>, number: u64, seed: u64, phase: usize, due: Instant) {
        let mut random = StdRng::seed_from_u64(seed);
        let of_hundred = random.random_range(0..100);
        let is_write = random.random_range(0..10) < WRITES_OF_TEN;
        let (kind, answered) = match (of_hundred < self.shape.scans, is_write) {
            (true, _) => ("scan", self.scan(&mut random).await),
            (false, true) => ("write", self.write(&mut random).await),
            (false, false) => ("read", self.read(&mut random).await),
        };
        let (took, tried) = (due.elapsed(), self.attempts.take(number));
        let mut phases = self.phases.lock();
        let phase = &mut phases.0[phase];
        phase.took.push(took);
        *phase.attempts.entry(tried.len() + usize::from(answered.is_ok())).or_default() += 1;
        for attempt in &tried {
            *phase.met.entry(met(&attempt.told)).or_default() += 1;
        }
        let slower = phase.slowest.len() < SLOWEST || took > phase.slowest[0].0;
        if answered.is_ok() && slower {
            let served = answered.iter().flat_map(|(served, _)| served);
            let by: Vec<String> =
                served.map(|at| format!(", shard {} by n{}", at.shard, at.node)).collect();
            let at = (due - self.began).as_secs_f64();
            let text = format!("due at {at:.3} s, a {kind}{}{}", by.concat(), story(&tried, due));
            phase.slowest.push((took, text));
            phase.slowest.sort();
            let surplus = phase.slowest.len().saturating_sub(SLOWEST);
            phase.slowest.drain(..surplus);
        }
        match answered {
            Ok((served, wrong)) => {
                for served in served {
                    *phase.nodes.entry(served.node.0).or_default() += 1;
                    *phase.shards.entry(served.shard.0).or_default() += 1;
                }
                phase.wrong.extend(wrong);
            }
            Err(why) => {
                let story = story(&tried, due);
                let took = took.as_secs_f64();
                phase.failed.push(format!("request {number}, a {kind}, {took:.3} s: {why}{story}"));
            }
        }
    }

    fn draw(&self, random: &mut StdRng) -> u64 {
        let hot = self.hot.lock();
        if !hot.is_empty() && random.random_range(0..10) < 8 {
            return hot[random.random_range(0..hot.len())];
        }
        random.random_range(0..self.shape.keys)
    }

    fn bounds(&self, number: u64) -> Bounds {
        let oldest = self.keys.lock()[number as usize];
        Bounds { oldest, newest: oldest.sent }
    }

    /// What was sent meanwhile may be shown as well.
    fn until_now(&self, number: u64, bounds: Bounds) -> Bounds {
        Bounds { newest: self.keys.lock()[number as usize].sent, ..bounds }
    }

    async fn read(&self, random: &mut StdRng) -> Answered {
        let number = self.draw(random);
        let bounds = self.bounds(number);
        let get = self.client.get(key(number)).timeout(self.shape.deadline);
        let get = if random.random_range(0..3) == 0 { get.from_any_replica() } else { get };
        let read = get.read().await.map_err(|error| error.to_string())?;
        let bounds = self.until_now(number, bounds);
        let shown = read.entry.as_ref().map(|entry| (&entry.value[..], entry.version));
        Ok((vec![read.served], bounds.judge(number, shown).into_iter().collect()))
    }

    async fn scan(&self, random: &mut StdRng) -> Answered {
        let first = random.random_range(0..self.shape.keys.saturating_sub(SCAN_KEYS).max(1));
        let last = (first + SCAN_KEYS).min(self.shape.keys);
        let before: Vec<Bounds> = (first..last).map(|number| self.bounds(number)).collect();
        let scan = self.client.scan(key(first)..key(last)).timeout(self.shape.deadline).stream();
        let scanned = tokio::time::timeout(self.shape.deadline, scan.try_collect::<Vec<_>>()).await;
        let scanned = scanned.map_err(|_| "not at its end in time".to_owned())?;
        let scanned = scanned.map_err(|error| error.to_string())?;
        let mut wrong = Vec::new();
        let mut shown = BTreeMap::new();
        for entry in &scanned {
            let at = number(&entry.key).filter(|number| (first..last).contains(number));
            match at {
                Some(at) if shown.insert(at, entry).is_none() => {}
                Some(at) => wrong.push(format!("a scan shows key {at} twice")),
                None => wrong.push(format!("a scan shows {:?}", entry.key)),
            }
        }
        for (number, bounds) in (first..last).zip(before) {
            let bounds = self.until_now(number, bounds);
            let shown = shown.get(&number).map(|entry| (&entry.value[..], entry.version));
            wrong.extend(bounds.judge(number, shown).map(|why| format!("a scan: {why}")));
        }
        Ok((Vec::new(), wrong))
    }

    /// Takes a key that no write is under way for.
    fn open(&self, random: &mut StdRng) -> Option<(u64, Key)> {
        for _ in 0..DRAWS {
            let number = self.draw(random);
            let key = &mut self.keys.lock()[number as usize];
            if !key.closed {
                (key.closed, key.sent) = (true, key.sent + 1);
                return Some((number, *key));
            }
        }
        None
    }

    /// Half of the writes demand that the key is still as the last write left it: one that was applied
    /// twice would find that it is not.
    async fn write(&self, random: &mut StdRng) -> Answered {
        let Some((number, entry)) = self.open(random) else {
            return Err("the harness found no key to write".to_owned());
        };
        let put = self.client.put(key(number), value(&self.shape, number, entry.sent));
        let put = put.timeout(self.shape.deadline);
        let written = match random.random_range(0..2) {
            0 => put.if_version(Version(entry.version)).await,
            _ => put.await.map(Cas::Applied),
        };
        let mut keys = self.keys.lock();
        let entry = &mut keys[number as usize];
        match written {
            Ok(Cas::Applied(written)) => {
                (entry.acknowledged, entry.version) = (entry.sent, written.version.0);
                entry.closed = false;
                Ok((vec![written.served], Vec::new()))
            }
            Ok(Cas::Mismatch { current, served }) => {
                let version = current.map_or(0, |current| current.version.0);
                let wrong = format!(
                    "key {number}: a write upon version {} met version {version}",
                    entry.version
                );
                Ok((vec![served], vec![wrong]))
            }
            Err(error) => {
                // Else it may be there or not, for ever: nothing more is written to it.
                entry.closed = error.outcome() != Outcome::NotApplied;
                Err(error.to_string())
            }
        }
    }
}

/// What an attempt met, without what differs from request to request.
fn met(told: &str) -> String {
    let failure = told.split("failure=").nth(1).unwrap_or(told);
    let words = failure.split(" step=").next().unwrap_or(failure);
    words.chars().map(|letter| if letter.is_ascii_digit() { '#' } else { letter }).collect()
}

fn story(tried: &[Attempt], due: Instant) -> String {
    let line = |attempt: &Attempt| {
        format!("\n      at {:.3} s: {}", (attempt.at - due).as_secs_f64(), attempt.told)
    };
    tried.iter().map(line).collect()
}

impl Phase {
    /// Its durations, summed up.
    pub fn quantiles(&self) -> Quantiles {
        Quantiles::of(&self.took)
    }

    /// One line.
    pub fn line(&self) -> String {
        let attempts = self.attempts.iter().map(|(tries, count)| format!("{tries}: {count}"));
        format!(
            "{:<22} {:>5.0} s {:>8} requests, {:>5.0}/s, {} failed, {} wrong; {}; attempts {}",
            self.name,
            self.lasted.as_secs_f64(),
            self.took.len(),
            self.took.len() as f64 / self.lasted.as_secs_f64().max(1e-3),
            self.failed.len(),
            self.wrong.len(),
            self.quantiles(),
            attempts.collect::<Vec<_>>().join(", ")
        )
    }

    /// The slowest requests, in words.
    pub fn slowest(&self) -> impl Iterator<Item = String> {
        let told =
            |(took, told): &(Duration, String)| format!("{:.3} s: {told}", took.as_secs_f64());
        self.slowest.iter().map(told)
    }

    /// What failed, in words: the first of them.
    pub fn told(&self) -> impl Iterator<Item = &String> {
        self.failed.iter().take(TOLD_MAX).chain(self.wrong.iter().take(TOLD_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        keys: 10,
        value_bytes: 64,
        rate: 1,
        scans: 4,
        deadline: Duration::from_secs(2),
        seed: 1,
    };

    #[test]
    fn a_value_says_which_write_it_is_of() {
        let text = value(&SHAPE, 7, 31);
        assert_eq!((text.len(), turn(7, text.as_bytes())), (64, Some(31)));
        assert_eq!(turn(8, text.as_bytes()), None, "of another key");
        assert_eq!(number(key(12).as_bytes()), Some(12));
    }

    #[test]
    fn a_read_shows_what_was_acknowledged_or_is_under_way_and_nothing_else() {
        let oldest = Key { acknowledged: 3, version: 30, sent: 3, closed: false };
        let bounds = Bounds { oldest, newest: 4 };
        let judge = |turn: u64, version| {
            bounds.judge(7, Some((value(&SHAPE, 7, turn).as_bytes(), Version(version))))
        };
        assert_eq!(judge(3, 30), None);
        assert_eq!(judge(4, 35), None, "it was under way");
        assert!(judge(2, 20).is_some(), "older than what was acknowledged");
        assert!(judge(5, 50).is_some(), "never sent");
        assert!(judge(3, 31).is_some(), "applied twice");
        assert!(bounds.judge(7, None).is_some(), "lost");
        assert!(bounds.judge(7, Some((b"x", Version(30)))).is_some());
    }

    #[test]
    fn what_attempts_met_is_counted_without_numbers() {
        let one = met("shard=3 failure=node 7 no longer leads step=Step { .. }");
        assert_eq!(one, "node # no longer leads");
        assert_eq!(one, met("shard=4 failure=node 9 no longer leads step=Step { .. }"));
    }
}

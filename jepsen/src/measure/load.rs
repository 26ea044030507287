//! Writers that never rest, each on keys of one shard, and a ledger of when and what was acknowledged.
//! Owns both. Does not judge what it finds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_client::{Client, ShardId};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A write is tried for so long: longer than any failover that is still to be measured.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// Keys that are tried to find some of every shard.
const PROBES_MAX: u32 = 20_000;

/// When writes of a shard were acknowledged, and the newest acknowledged version of each key.
#[derive(Default)]
pub struct Ledger {
    acknowledged: Mutex<BTreeMap<u64, Vec<Instant>>>,
    newest: Mutex<BTreeMap<String, u64>>,
    failed: Mutex<Vec<String>>,
}

impl Ledger {
    /// Acknowledgements of a shard since a moment.
    pub fn since(&self, shard: u64, moment: Instant) -> usize {
        let acknowledged = self.acknowledged.lock();
        let all = acknowledged.get(&shard).map_or(&[][..], Vec::as_slice);
        all.len() - all.partition_point(|at| *at < moment)
    }

    /// The longest time without an acknowledgement of a shard that ended after `from`; what is open
    /// at `to` counts until then.
    pub fn longest_gap(&self, shard: u64, from: Instant, to: Instant) -> Duration {
        let acknowledged = self.acknowledged.lock();
        let all = acknowledged.get(&shard).map_or(&[][..], Vec::as_slice);
        let first = all.partition_point(|at| *at < from);
        let before = first.checked_sub(1).map_or(from, |at| all[at]);
        let mut longest = Duration::ZERO;
        let mut last = before;
        for at in all[first..].iter().copied().take_while(|at| *at <= to).chain([to]) {
            longest = longest.max(at - last);
            last = at;
        }
        longest
    }

    /// All acknowledged writes.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.lock().values().map(Vec::len).sum()
    }

    /// Forgets moments: what was measured is measured.
    pub fn forget_before(&self, moment: Instant) {
        for all in self.acknowledged.lock().values_mut() {
            all.retain(|at| *at >= moment);
        }
    }

    /// What writers were told instead of an acknowledgement.
    pub fn failed(&self) -> Vec<String> {
        self.failed.lock().clone()
    }

    /// Keys whose newest acknowledged write is not there any more.
    pub async fn lost(&self, client: &Client) -> Result<Vec<String>, String> {
        let newest = self.newest.lock().clone();
        let mut lost = Vec::new();
        for (key, version) in newest {
            let found = client.get(key.clone()).timeout(WRITE_TIMEOUT).await;
            let found = found.map_err(|error| format!("read {key} back: {error}"))?;
            let found = found.map_or(0, |entry| entry.version.0);
            if found < version {
                lost.push(format!("{key} was acknowledged at {version}, and is at {found}"));
            }
        }
        Ok(lost)
    }
}

/// Writers at work.
pub struct Load {
    /// What they were told.
    pub ledger: Arc<Ledger>,
    stop: watch::Sender<bool>,
    writers: JoinSet<()>,
}

impl Load {
    /// Starts so many writers on each shard; each pauses for so long between its writes.
    pub async fn start(client: &Client, per_shard: usize, pause: Duration) -> Result<Load, String> {
        let (stop, stopped) = watch::channel(false);
        let mut load = Load { ledger: Arc::default(), stop, writers: JoinSet::new() };
        for (shard, keys) in keys_of_shards(client, per_shard).await? {
            for key in keys {
                let (client, ledger) = (client.clone(), load.ledger.clone());
                load.writers.spawn(write(client, ledger, shard, key, pause, stopped.clone()));
            }
        }
        Ok(load)
    }

    /// Ends the writers.
    pub async fn stop(mut self) -> Arc<Ledger> {
        self.stop.send_replace(true);
        while self.writers.join_next().await.is_some() {}
        self.ledger
    }
}

/// Some keys of every shard, found by writing: the answer says which shard it was.
async fn keys_of_shards(
    client: &Client,
    per_shard: usize,
) -> Result<BTreeMap<ShardId, Vec<String>>, String> {
    let map = client.admin().map().await.map_err(|error| error.to_string())?;
    // The meta group has no arc.
    let shards = map.shards.iter().filter(|shard| shard.id.0 != 0);
    let mut keys: BTreeMap<ShardId, Vec<String>> =
        shards.map(|shard| (shard.id, Vec::new())).collect();
    for number in 0..PROBES_MAX {
        if keys.values().all(|keys| keys.len() >= per_shard) {
            return Ok(keys);
        }
        let key = format!("load-{number}");
        let written = client.put(key.clone(), "first").await;
        let written = written.map_err(|error| format!("the first write of {key}: {error}"))?;
        let found = keys.get_mut(&written.served.shard);
        if let Some(keys) = found.filter(|keys| keys.len() < per_shard) {
            keys.push(key);
        }
    }
    Err(format!("{PROBES_MAX} keys do not reach every shard"))
}

async fn write(
    client: Client,
    ledger: Arc<Ledger>,
    shard: ShardId,
    key: String,
    pause: Duration,
    stopped: watch::Receiver<bool>,
) {
    let mut number = 0_u64;
    while !*stopped.borrow() {
        number += 1;
        let value = format!("{number:0100}");
        match client.put(key.clone(), value).timeout(WRITE_TIMEOUT).await {
            Ok(written) => {
                let now = Instant::now();
                ledger.acknowledged.lock().entry(shard.0).or_default().push(now);
                ledger.newest.lock().insert(key.clone(), written.version.0);
            }
            Err(error) => ledger.failed.lock().push(format!("{key}: {error}")),
        }
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_counts_from_the_last_acknowledgement_before_to_the_end() {
        let ledger = Ledger::default();
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        ledger.acknowledged.lock().insert(1, [0, 10, 500, 510, 900].map(at).to_vec());
        assert_eq!(ledger.longest_gap(1, at(100), at(600)).as_millis(), 490);
        assert_eq!(ledger.longest_gap(1, at(505), at(1_000)).as_millis(), 390);
        assert_eq!(ledger.longest_gap(1, at(950), at(2_000)).as_millis(), 1_100);
        assert_eq!(ledger.longest_gap(2, at(0), at(70)).as_millis(), 70);
        assert_eq!(ledger.since(1, at(500)), 3);
    }
}

//! Owns keeping the cached map new: follows one node's `WatchMap` stream, goes to another node when
//! it breaks, and asks for the map when a call finds its route stale. Does not judge maps (see
//! `route`).

use std::sync::Arc;
use std::time::Duration;

use coracle_proto::v1::{GetMapRequest, ShardMap, WatchMapRequest};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::Status;

use crate::pipeline::{Pipeline, Pool};
use crate::route::{Routes, Table};
use crate::session::Session;

/// First and longest wait between rounds over all known nodes when none gives a map. The longest is
/// what a client waits after its cluster has come up.
const ROUND_FIRST: Duration = Duration::from_millis(20);
const ROUND_MAX: Duration = Duration::from_secs(1);

/// What following needs.
pub(crate) struct Follower {
    pub(crate) routes: Routes,
    pub(crate) pool: Pool,
    pub(crate) session: Arc<Session>,
    seeds: Vec<String>,
    attempt_timeout: Duration,
    random: Mutex<StdRng>,
    /// One refresh at a time; who waits here finds the map already new.
    refreshing: tokio::sync::Mutex<()>,
    /// Why the last node gave no map, for the error of a client that finds nobody.
    last_failure: Mutex<Option<String>>,
}

impl Follower {
    pub(crate) fn new(
        pool: Pool,
        session: Arc<Session>,
        seeds: Vec<String>,
        attempt_timeout: Duration,
        seed: u64,
    ) -> Follower {
        Follower {
            routes: Routes::new(),
            pool,
            session,
            seeds,
            attempt_timeout,
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            refreshing: tokio::sync::Mutex::new(()),
            last_failure: Mutex::default(),
        }
    }

    /// Uniform in `[0, 1)`.
    pub(crate) fn random(&self) -> f64 {
        self.random.lock().random::<f64>()
    }

    /// All addresses worth asking, from a random one on, those that just failed last. Seeds that the map
    /// does not have, or has as nodes that have left, come behind all of them.
    pub(crate) fn candidates(&self) -> Vec<String> {
        let table = self.routes.table();
        let known = table.addresses();
        let seeds = self.seeds.iter().filter(|seed| !known.contains(seed)).cloned().collect();
        let from_random = |mut addresses: Vec<String>| {
            let start = (self.random() * addresses.len() as f64) as usize;
            addresses.rotate_left(start);
            addresses
        };
        let mut candidates = from_random(known);
        candidates.extend(from_random(seeds));
        candidates.sort_by_key(|address| !self.is_well(&table, address));
        candidates
    }

    /// Whether a node answers there, as far as is known; of one that the map does not have nothing is, as
    /// long as there is a map.
    pub(crate) fn is_well(&self, table: &Table, address: &str) -> bool {
        (!table.is_ready() || table.has_address(address)) && self.pool.is_usable(address)
    }

    pub(crate) fn seeds(&self) -> &[String] {
        &self.seeds
    }

    /// Why no map has come, as far as is known.
    pub(crate) fn last_failure(&self) -> Option<String> {
        self.last_failure.lock().clone()
    }

    /// Follows the map for ever.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut backoff = ROUND_FIRST;
        loop {
            let mut heard = false;
            for address in self.candidates() {
                if self.watch(&address).await {
                    // The map may have changed since: the candidates are chosen anew, at once.
                    heard = true;
                    break;
                }
            }
            if heard {
                backoff = ROUND_FIRST;
                continue;
            }
            sleep(backoff.mul_f64(0.5 + self.random() / 2.0)).await;
            backoff = (backoff * 2).min(ROUND_MAX);
        }
    }

    /// Follows one node until it breaks. Returns whether it gave a map at all.
    async fn watch(&self, address: &str) -> bool {
        let Some(pipeline) = self.pool.get(address) else {
            return false;
        };
        let mut heard = false;
        let why = tokio::select! {
            biased;
            why = self.watch_stream(&pipeline, &mut heard) => why,
            () = pipeline.connection().went_down() => Status::unavailable("went down"),
        };
        if !heard {
            pipeline.connection().failed();
        }
        tracing::debug!(node = address, %why, heard, "no longer follows the map here");
        *self.last_failure.lock() = Some(format!("{address}: {}", why.message()));
        heard
    }

    async fn watch_stream(&self, pipeline: &Pipeline, heard: &mut bool) -> Status {
        // From 0, so that the map comes at once: it shows that the node answers, and who leads.
        let mut client = pipeline.connection().cluster();
        let opening = client.watch_map(WatchMapRequest { from_epoch: 0 });
        let mut maps = match timeout(self.attempt_timeout, opening).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return status,
            Err(_) => return Status::deadline_exceeded("no answer"),
        };
        loop {
            let next = match *heard {
                // Changes are rare; that the node is alive at all is watched by pings.
                true => maps.message().await,
                false => match timeout(self.attempt_timeout, maps.message()).await {
                    Ok(next) => next,
                    Err(_) => return Status::deadline_exceeded("no map"),
                },
            };
            match next {
                Ok(Some(response)) => {
                    let Some(map) = response.map else { continue };
                    pipeline.connection().heard();
                    if let Err(status) = self.install(map) {
                        return status;
                    }
                    *heard = true;
                }
                Ok(None) => return Status::unavailable("the node ended the watch"),
                Err(status) => return status,
            }
        }
    }

    /// Gets a map again unless one has come since the caller looked, when `seen` had come. Asks
    /// `preferred` first: who said that the route is stale knows better.
    pub(crate) async fn refresh(&self, seen: u64, preferred: Option<&str>, until: Instant) {
        let Ok(_guard) = timeout_at(until, self.refreshing.lock()).await else {
            return;
        };
        if self.routes.table().maps() > seen {
            return;
        }
        let preferred = preferred.map(str::to_owned);
        let others =
            self.candidates().into_iter().filter(|address| Some(address) != preferred.as_ref());
        for address in preferred.clone().into_iter().chain(others) {
            let Some(pipeline) = self.pool.get(&address) else {
                continue;
            };
            let mut client = pipeline.connection().cluster();
            let attempt_until = until.min(Instant::now() + self.attempt_timeout);
            match timeout_at(attempt_until, client.get_map(GetMapRequest {})).await {
                Ok(Ok(response)) => {
                    pipeline.connection().heard();
                    let map = response.into_inner().map.unwrap_or_default();
                    if self.install(map).is_ok() {
                        return;
                    }
                }
                Ok(Err(status)) => tracing::debug!(node = address, %status, "gave no map"),
                Err(_) => {
                    pipeline.connection().failed();
                    if until <= Instant::now() {
                        return;
                    }
                }
            }
        }
    }

    fn install(&self, map: ShardMap) -> Result<(), Status> {
        self.session.saw_server_time(map.server_time_ms);
        self.routes.install(&map)?;
        let table = self.routes.table();
        self.pool.keep(|address| {
            table.has_address(address) || self.seeds.iter().any(|seed| seed == address)
        });
        Ok(())
    }

    /// Waits until there is a map.
    pub(crate) async fn ready(&self, until: Instant) -> bool {
        timeout_at(until, self.routes.wait(|table| table.is_ready().then_some(()))).await.is_ok()
    }
}

//! Owns the handles that callers hold: `Client`, `Keyspace`, and the builder that makes them. Does
//! nothing itself: a handle makes builders of calls (see `request`, `scan`, `admin`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use coracle_proto::limits::PIPELINE_IN_FLIGHT_MAX;
use coracle_proto::shard_map::DEFAULT_KEYSPACE_NAME;

use crate::admin::Admin;
use crate::connection::Dialer;
use crate::driver::{Driver, Settings};
use crate::error::Error;
use crate::follow::Follower;
use crate::net::{AddressMap, MappedNet, Net, RealNet};
use crate::pipeline::{Pool, Tasks, WhenFull};
use crate::range::DeleteRange;
use crate::request::{Batch, Delete, Get, Increment, MultiGet, Operation, Put, Target};
use crate::scan::{KeyRange, Scan};
use crate::session::{Consistency, Session, SessionMark};
use crate::stats::Stats;

/// How long a call may take, retries included: five failovers long.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one node may take to answer: as long as a failover. Then another replica is asked.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a connection may take to stand: several round trips across a continent. A node that
/// takes longer is as good as down, and there are others.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// A Coracle cluster. Make one per process and clone it: all clones share connections, map and
/// retry budget. When the last handle is dropped, the background tasks end.
///
/// The calls here are for the keyspace `default`; for others see [`Client::keyspace`].
#[derive(Clone)]
pub struct Client {
    default: Keyspace,
}

/// A keyspace of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Keyspace {
    target: Target,
}

/// Makes a [`Client`].
#[derive(Clone)]
#[must_use = "it ends with connect or connect_lazy"]
pub struct Builder {
    seeds: Vec<String>,
    name: String,
    settings: Settings,
    connect_timeout: Duration,
    in_flight_max: usize,
    net: Arc<dyn Net>,
    address_map: Option<Arc<dyn AddressMap>>,
    seed: Option<u64>,
}

impl Client {
    /// Connects to a cluster by its seeds, `"n1:7400,n2:7400"`, also with `coracle://` in front.
    pub async fn connect(seeds: &str) -> Result<Client, Error> {
        let seeds = seeds.strip_prefix("coracle://").unwrap_or(seeds).trim_end_matches('/');
        Client::builder().seeds(seeds.split(',').map(str::trim)).connect().await
    }

    /// Settings before connecting.
    pub fn builder() -> Builder {
        Builder {
            seeds: Vec::new(),
            name: concat!("coracle-client/", env!("CARGO_PKG_VERSION")).to_owned(),
            settings: Settings {
                operation_timeout: OPERATION_TIMEOUT,
                attempt_timeout: ATTEMPT_TIMEOUT,
                when_full: WhenFull::Wait,
                fresh_request_ids: false,
                zone: None,
                hedge_reads: true,
            },
            connect_timeout: CONNECT_TIMEOUT,
            in_flight_max: PIPELINE_IN_FLIGHT_MAX,
            net: Arc::new(RealNet),
            address_map: None,
            seed: None,
        }
    }

    /// A handle for a keyspace. Whether it exists shows when it is used.
    pub fn keyspace(&self, name: impl Into<String>) -> Keyspace {
        let keyspace = Arc::from(name.into());
        Keyspace { target: Target { keyspace, ..self.default.target.clone() } }
    }

    /// The same client, whose handles read like this where a call does not say otherwise.
    pub fn with_consistency(&self, consistency: Consistency) -> Client {
        Client { default: self.default.with_consistency(consistency) }
    }

    /// The same client, whose reads go to the nearest replica whatever they ask for. See
    /// [`Get::from_any_replica`].
    pub fn from_any_replica(&self) -> Client {
        Client { default: self.default.from_any_replica() }
    }

    /// What this client has done so far, over all its handles.
    pub fn stats(&self) -> Stats {
        self.default.target.driver.counters.stats()
    }

    /// What this client has seen so far, over all its handles and keyspaces: another client that takes
    /// it in reads, in its session, nothing older.
    pub fn session_mark(&self) -> SessionMark {
        self.default.target.driver.follower.session.mark()
    }

    /// Takes in what another client has seen. `InvalidArgument` when the mark is damaged.
    pub fn take_in(&self, mark: &SessionMark) -> Result<(), Error> {
        let taken = self.default.target.driver.follower.session.take_in(mark);
        taken.map_err(|error| Error::invalid(error.to_string()))
    }

    /// The operators' calls.
    pub fn admin(&self) -> Admin {
        Admin::new(self.default.target.driver.clone())
    }

    /// Ends the background tasks and waits until they have ended. Calls under way, and those of
    /// other handles from now on, fail with [`ErrorKind::Closed`](crate::ErrorKind::Closed).
    pub async fn close(self) {
        self.default.target.driver.close().await;
    }

    /// See [`Keyspace::get`].
    pub fn get(&self, key: impl Into<Bytes>) -> Get {
        self.default.get(key)
    }

    /// See [`Keyspace::multi_get`].
    pub fn multi_get<K: Into<Bytes>>(&self, keys: impl IntoIterator<Item = K>) -> MultiGet {
        self.default.multi_get(keys)
    }

    /// See [`Keyspace::put`].
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Put {
        self.default.put(key, value)
    }

    /// See [`Keyspace::delete`].
    pub fn delete(&self, key: impl Into<Bytes>) -> Delete {
        self.default.delete(key)
    }

    /// See [`Keyspace::increment`].
    pub fn increment(&self, key: impl Into<Bytes>, by: i64) -> Increment {
        self.default.increment(key, by)
    }

    /// See [`Keyspace::batch`].
    pub fn batch(&self, operations: impl IntoIterator<Item = Operation>) -> Batch {
        self.default.batch(operations)
    }

    /// See [`Keyspace::delete_range`].
    pub fn delete_range(&self, range: impl KeyRange) -> DeleteRange {
        self.default.delete_range(range)
    }

    /// See [`Keyspace::scan`].
    pub fn scan(&self, range: impl KeyRange) -> Scan {
        self.default.scan(range)
    }
}

impl Keyspace {
    /// The keyspace's name.
    pub fn name(&self) -> &str {
        &self.target.keyspace
    }

    /// The same keyspace, read like this where a call does not say otherwise.
    pub fn with_consistency(&self, consistency: Consistency) -> Keyspace {
        Keyspace { target: Target { consistency, ..self.target.clone() } }
    }

    /// The same keyspace, read from the nearest replica whatever a read asks for. See
    /// [`Get::from_any_replica`].
    pub fn from_any_replica(&self) -> Keyspace {
        Keyspace { target: Target { any_replica: true, ..self.target.clone() } }
    }

    /// Reads one key, linearizably unless said otherwise. Gives `Option<Entry>`; [`Get::read`] says
    /// more.
    pub fn get(&self, key: impl Into<Bytes>) -> Get {
        Get::new(self.target.clone(), key.into())
    }

    /// Reads many keys, each shard's at once. Gives `Vec<Option<Entry>>` in their order.
    pub fn multi_get<K: Into<Bytes>>(&self, keys: impl IntoIterator<Item = K>) -> MultiGet {
        MultiGet::new(self.target.clone(), keys.into_iter().map(Into::into).collect())
    }

    /// Writes one key. Gives [`Written`](crate::Written), with a condition [`Cas`](crate::Cas).
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Put {
        Put::new(self.target.clone(), key.into(), value.into())
    }

    /// Deletes one key; deleting an absent key succeeds. Gives [`Written`](crate::Written), with a
    /// condition [`Cas`](crate::Cas).
    pub fn delete(&self, key: impl Into<Bytes>) -> Delete {
        Delete::new(self.target.clone(), key.into())
    }

    /// Adds to a decimal counter; an absent key counts as 0. Gives [`Counter`](crate::Counter).
    pub fn increment(&self, key: impl Into<Bytes>, by: i64) -> Increment {
        Increment::new(self.target.clone(), key.into(), by)
    }

    /// Writes keys of one entity, all or none. Gives [`BatchOutcome`](crate::BatchOutcome).
    pub fn batch(&self, operations: impl IntoIterator<Item = Operation>) -> Batch {
        Batch::new(self.target.clone(), operations)
    }

    /// Deletes a range: `delete_range("a".."b")`, `delete_range(..).prefix("user/7/").atomic()`. Gives
    /// [`DeletedRange`](crate::DeletedRange).
    pub fn delete_range(&self, range: impl KeyRange) -> DeleteRange {
        DeleteRange::new(self.target.clone(), range)
    }

    /// Reads a range in key order at one version: `scan("a".."b")`, `scan(..).prefix("user/")`.
    pub fn scan(&self, range: impl KeyRange) -> Scan {
        Scan::new(self.target.clone(), range)
    }
}

impl Builder {
    /// Nodes to begin with, each `host:port`; the others are learned from them. At least one.
    pub fn seeds<S: Into<String>>(mut self, seeds: impl IntoIterator<Item = S>) -> Builder {
        self.seeds = seeds.into_iter().map(Into::into).collect();
        self
    }

    /// The application's name, as the servers show it.
    pub fn name(mut self, name: impl Into<String>) -> Builder {
        self.name = name.into();
        self
    }

    /// How long a call may take, retries included. Default 5 s.
    pub fn operation_timeout(mut self, timeout: Duration) -> Builder {
        self.settings.operation_timeout = timeout;
        self
    }

    /// How long one node may take to answer, before another is asked. Default 1 s.
    pub fn attempt_timeout(mut self, timeout: Duration) -> Builder {
        self.settings.attempt_timeout = timeout;
        self
    }

    /// How long a connection may take to stand. Default 250 ms.
    pub fn connect_timeout(mut self, timeout: Duration) -> Builder {
        self.connect_timeout = timeout;
        self
    }

    /// Operations that may be unanswered at one node: 1 to 1,024, which is also the default.
    pub fn max_in_flight_per_node(mut self, operations: usize) -> Builder {
        self.in_flight_max = operations;
        self
    }

    /// What calls do beyond that. Default: they wait.
    pub fn when_full(mut self, when_full: WhenFull) -> Builder {
        self.settings.when_full = when_full;
        self
    }

    /// The zone that the client runs in, as the nodes name theirs. Reads that any replica may serve go
    /// to one in this zone where there is one, else to the fastest. Default: none; all are alike.
    pub fn zone(mut self, zone: impl Into<String>) -> Builder {
        self.settings.zone = Some(zone.into());
        self
    }

    /// Whether a read that any replica may serve is sent to a second one when the first has not
    /// answered in the time in which 95 of 100 recent reads were, but at least 1 ms. The first answer
    /// counts. At most 2 of 100 reads are sent twice. Default: yes. Linearizable reads are hedged only
    /// where they may go to any replica, writes never.
    pub fn hedge_reads(mut self, hedge: bool) -> Builder {
        self.settings.hedge_reads = hedge;
        self
    }

    /// The network to use. Default: TCP.
    pub fn net(mut self, net: Arc<dyn Net>) -> Builder {
        self.net = net;
        self
    }

    /// Where nodes are reached from here, when that is not at the addresses that they tell others:
    /// behind NAT, port forwarding or a tunnel. A table, or a function, from a node's address to the
    /// one to dial; it is asked for every connection, those to the seeds included. What it does not
    /// know is dialled as it is. Errors and maps go on naming nodes by their own addresses.
    pub fn address_map(mut self, map: impl AddressMap) -> Builder {
        self.address_map = Some(Arc::new(map));
        self
    }

    /// Breaks the client on purpose: every attempt of a write carries a request id of its own, so that
    /// a retry may be applied a second time. Only for harnesses, which show with it that their faults
    /// would be seen.
    #[doc(hidden)]
    pub fn unsafe_fresh_request_ids_for_tests(mut self) -> Builder {
        self.settings.fresh_request_ids = true;
        self
    }

    /// Makes all random choices follow from this, for simulations. The client's id is one of them:
    /// two clients of one cluster must never have the same seed, else the cluster takes the writes
    /// of one for retries of the other's.
    pub fn seed(mut self, seed: u64) -> Builder {
        self.seed = Some(seed);
        self
    }

    /// Makes the client and returns at once. Calls wait, within their timeouts, until a node has
    /// been reached, so services may start in any order. Must be called within a tokio runtime.
    pub fn connect_lazy(self) -> Result<Client, Error> {
        self.check()?;
        let mut random = match self.seed {
            Some(seed) => StdRng::seed_from_u64(seed),
            None => rand::make_rng(),
        };
        // 0 stands for no client on the wire.
        let session = Arc::new(Session::new(random.next_u64().max(1)));
        let tasks = Tasks { tracker: TaskTracker::new(), stop: CancellationToken::new() };
        let net = match self.address_map {
            Some(map) => Arc::new(MappedNet { net: self.net, map }),
            None => self.net,
        };
        let dialer = Dialer::new(net, &self.name, self.connect_timeout);
        let pool = Pool::new(dialer, self.in_flight_max, tasks.clone());
        let attempt_timeout = self.settings.attempt_timeout;
        let follower = Follower::new(pool, session, self.seeds, attempt_timeout, random.next_u64());
        let driver = Arc::new(Driver::new(follower, self.settings, tasks));
        let keyspace = Arc::from(DEFAULT_KEYSPACE_NAME);
        let consistency = Consistency::default();
        let (timeout, any_replica) = (None, false);
        let target = Target { driver, keyspace, timeout, consistency, any_replica };
        Ok(Client { default: Keyspace { target } })
    }

    /// Makes the client and waits, as long as a call may take, until a node has given the map.
    pub async fn connect(self) -> Result<Client, Error> {
        let deadline = Instant::now() + self.settings.operation_timeout;
        let client = self.connect_lazy()?;
        client.default.target.driver.ready(deadline).await?;
        Ok(client)
    }

    fn check(&self) -> Result<(), Error> {
        if self.seeds.is_empty() {
            return Err(Error::invalid("no seeds: name at least one node as host:port"));
        }
        if let Some(seed) = self.seeds.iter().find(|seed| !Dialer::is_address(seed)) {
            return Err(Error::invalid(format!("seed {seed:?} is no host:port")));
        }
        if !(1..=PIPELINE_IN_FLIGHT_MAX).contains(&self.in_flight_max) {
            return Err(Error::invalid(format!(
                "max_in_flight_per_node is {}, allowed are 1 to {PIPELINE_IN_FLIGHT_MAX}",
                self.in_flight_max
            )));
        }
        let settings = &self.settings;
        let timeouts = [
            ("operation_timeout", settings.operation_timeout),
            ("attempt_timeout", settings.attempt_timeout),
            ("connect_timeout", self.connect_timeout),
        ];
        if let Some((name, _)) = timeouts.iter().find(|(_, timeout)| timeout.is_zero()) {
            return Err(Error::invalid(format!("{name} is zero")));
        }
        let is_visible = |byte: u8| (0x20..0x7f).contains(&byte);
        if self.name.is_empty() || !self.name.bytes().all(is_visible) {
            return Err(Error::invalid("name must be visible ASCII"));
        }
        Ok(())
    }
}

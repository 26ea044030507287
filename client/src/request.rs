//! Owns the builders of single calls: what the caller says, turned into one operation and its
//! answer back into plain values. A builder does nothing until it is awaited. Does not route or
//! retry (see `driver`).

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_proto::v1::pipeline_request::Operation as Wire;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_proto::{limits, v1};
use futures_util::future::join_all;

use crate::answer::{BatchOutcome, Cas, Counter, Entry, Read, Served, Version, Written};
use crate::driver::{Call, Driver};
use crate::error::{Error, ErrorKind};
use crate::session::Consistency;

/// What a builder becomes when it is awaited.
pub type Pending<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// The keyspace that a builder is for, and its timeout.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) driver: Arc<Driver>,
    pub(crate) keyspace: Arc<str>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) consistency: Consistency,
    pub(crate) any_replica: bool,
}

impl Target {
    async fn call(self, key: Bytes, operation: Wire) -> Result<Answer, Error> {
        let Target { driver, keyspace, timeout, consistency, any_replica } = self;
        let call = Call { keyspace, key, operation, timeout, consistency, any_replica };
        driver.call(call).await
    }

    fn name(&self) -> String {
        self.keyspace.as_ref().to_owned()
    }

    /// What a read of the state at a version says. `None`: the call says how fresh it must be.
    fn at(&mut self, version: Option<Version>) -> Result<Option<v1::ReadOptions>, Error> {
        let Some(Version(at_version)) = version else { return Ok(None) };
        if at_version == 0 {
            return Err(no_version_0());
        }
        self.consistency = Consistency::Linearizable;
        Ok(Some(v1::ReadOptions { at_version, ..Default::default() }))
    }
}

/// Versions begin at 1; on the wire 0 means that none is named.
pub(crate) fn no_version_0() -> Error {
    Error::invalid("there is no version 0: leave it out to read the newest")
}

/// Reads one key. Awaiting it gives `Option<Entry>`.
#[must_use = "a call is made when it is awaited"]
pub struct Get {
    target: Target,
    key: Bytes,
    at: Option<Version>,
}

impl Get {
    pub(crate) fn new(target: Target, key: Bytes) -> Get {
        Get { target, key, at: None }
    }

    /// How long the call may take, retries included.
    pub fn timeout(mut self, timeout: Duration) -> Get {
        self.target.timeout = Some(timeout);
        self
    }

    /// How fresh the answer must be, instead of what the handle says.
    pub fn consistency(mut self, consistency: Consistency) -> Get {
        self.target.consistency = consistency;
        self
    }

    /// Asks any replica first, also for the newest state: one that does not lead asks the leader how
    /// far it must have come, and reads what it has itself. Spares the leader the reading, and costs
    /// a way between two nodes.
    pub fn from_any_replica(mut self) -> Get {
        self.target.any_replica = true;
        self
    }

    /// The state at a version, instead of the newest: all that was written up to it, and nothing
    /// after. [`ErrorKind::VersionGone`] where the keyspace's history does not reach back to it. It is
    /// the leader that answers, whatever the handle says.
    pub fn at(mut self, version: Version) -> Get {
        self.at = Some(version);
        self
    }

    /// Reads, and says where: also of an absent key.
    pub async fn read(mut self) -> Result<Read, Error> {
        limits::check_key(&self.key)?;
        let request = v1::GetRequest {
            keyspace: self.target.name(),
            key: self.key.clone(),
            read: self.target.at(self.at)?,
            ..Default::default()
        };
        match self.target.call(self.key, Wire::Get(request)).await? {
            Answer::Get(response) => Ok(Read {
                entry: response.entry.map(Entry::from_wire),
                served: Served::from_wire(response.served.as_ref()),
            }),
            _ => Err(Error::wrong_answer(false)),
        }
    }
}

impl IntoFuture for Get {
    type Output = Result<Option<Entry>, Error>;
    type IntoFuture = Pending<Option<Entry>>;

    fn into_future(self) -> Pending<Option<Entry>> {
        Box::pin(async move { Ok(self.read().await?.entry) })
    }
}

/// Marks a write without a condition.
#[derive(Clone, Debug)]
pub struct Always(());

/// Marks a write with a condition on the key's current state.
#[derive(Clone, Debug)]
pub struct When(v1::condition::Kind);

/// Writes one key. Awaiting it gives [`Written`], and with a condition [`Cas`].
#[must_use = "a call is made when it is awaited"]
pub struct Put<C = Always> {
    target: Target,
    key: Bytes,
    value: Bytes,
    ttl: Option<Duration>,
    condition: C,
}

impl Put {
    pub(crate) fn new(target: Target, key: Bytes, value: Bytes) -> Put {
        Put { target, key, value, ttl: None, condition: Always(()) }
    }

    /// Only when the key is absent (or expired).
    pub fn if_absent(self) -> Put<When> {
        self.when(v1::condition::Kind::IfAbsent(true))
    }

    /// Only when the key's current version is this one.
    pub fn if_version(self, version: Version) -> Put<When> {
        self.when(v1::condition::Kind::IfVersion(version.0))
    }

    /// Only when the key's current value is this one.
    pub fn if_value(self, value: impl Into<Bytes>) -> Put<When> {
        self.when(v1::condition::Kind::IfValue(value.into()))
    }

    fn when(self, condition: v1::condition::Kind) -> Put<When> {
        let Put { target, key, value, ttl, .. } = self;
        Put { target, key, value, ttl, condition: When(condition) }
    }
}

impl<C> Put<C> {
    /// Expires after this long, from the write's version on. Rounded up to a millisecond.
    pub fn ttl(mut self, ttl: Duration) -> Put<C> {
        self.ttl = Some(ttl);
        self
    }

    /// How long the call may take, retries included.
    pub fn timeout(mut self, timeout: Duration) -> Put<C> {
        self.target.timeout = Some(timeout);
        self
    }

    async fn send(self, condition: Option<v1::condition::Kind>) -> Result<Cas, Error> {
        let request = v1::PutRequest {
            keyspace: self.target.name(),
            key: self.key.clone(),
            value: self.value,
            ttl_ms: ttl_ms(self.ttl)?,
            condition: condition.map(|kind| v1::Condition { kind: Some(kind) }),
            ..Default::default()
        };
        limits::check_put(&request)?;
        match self.target.call(self.key, Wire::Put(request)).await? {
            Answer::Put(v1::PutResponse { applied, version, current, served }) => {
                Ok(Cas::from_wire(applied, version, current, served))
            }
            _ => Err(Error::wrong_answer(true)),
        }
    }
}

impl IntoFuture for Put {
    type Output = Result<Written, Error>;
    type IntoFuture = Pending<Written>;

    fn into_future(self) -> Pending<Written> {
        Box::pin(async move { unconditional(self.send(None).await?) })
    }
}

impl IntoFuture for Put<When> {
    type Output = Result<Cas, Error>;
    type IntoFuture = Pending<Cas>;

    fn into_future(self) -> Pending<Cas> {
        let condition = self.condition.0.clone();
        Box::pin(self.send(Some(condition)))
    }
}

/// Deletes one key; deleting an absent key succeeds. Awaiting it gives [`Written`], and with a
/// condition [`Cas`].
#[must_use = "a call is made when it is awaited"]
pub struct Delete<C = Always> {
    target: Target,
    key: Bytes,
    condition: C,
}

impl Delete {
    pub(crate) fn new(target: Target, key: Bytes) -> Delete {
        Delete { target, key, condition: Always(()) }
    }

    /// Only when the key's current version is this one.
    pub fn if_version(self, version: Version) -> Delete<When> {
        self.when(v1::condition::Kind::IfVersion(version.0))
    }

    /// Only when the key's current value is this one.
    pub fn if_value(self, value: impl Into<Bytes>) -> Delete<When> {
        self.when(v1::condition::Kind::IfValue(value.into()))
    }

    fn when(self, condition: v1::condition::Kind) -> Delete<When> {
        let Delete { target, key, .. } = self;
        Delete { target, key, condition: When(condition) }
    }
}

impl<C> Delete<C> {
    /// How long the call may take, retries included.
    pub fn timeout(mut self, timeout: Duration) -> Delete<C> {
        self.target.timeout = Some(timeout);
        self
    }

    async fn send(self, condition: Option<v1::condition::Kind>) -> Result<Cas, Error> {
        let request = v1::DeleteRequest {
            keyspace: self.target.name(),
            key: self.key.clone(),
            condition: condition.map(|kind| v1::Condition { kind: Some(kind) }),
            ..Default::default()
        };
        limits::check_delete(&request)?;
        match self.target.call(self.key, Wire::Delete(request)).await? {
            Answer::Delete(v1::DeleteResponse { applied, version, current, served }) => {
                Ok(Cas::from_wire(applied, version, current, served))
            }
            _ => Err(Error::wrong_answer(true)),
        }
    }
}

impl IntoFuture for Delete {
    type Output = Result<Written, Error>;
    type IntoFuture = Pending<Written>;

    fn into_future(self) -> Pending<Written> {
        Box::pin(async move { unconditional(self.send(None).await?) })
    }
}

impl IntoFuture for Delete<When> {
    type Output = Result<Cas, Error>;
    type IntoFuture = Pending<Cas>;

    fn into_future(self) -> Pending<Cas> {
        let condition = self.condition.0.clone();
        Box::pin(self.send(Some(condition)))
    }
}

/// One operation of an atomic batch.
#[derive(Clone, Debug)]
#[must_use = "an operation does nothing by itself"]
pub struct Operation(v1::Operation);

impl Operation {
    /// Writes a value.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Operation {
        let put = v1::PutOperation { value: value.into(), ttl_ms: 0 };
        Operation::of(key, v1::operation::Kind::Put(put))
    }

    /// Deletes a key.
    pub fn delete(key: impl Into<Bytes>) -> Operation {
        Operation::of(key, v1::operation::Kind::Delete(v1::DeleteOperation {}))
    }

    /// Adds to a decimal counter; an absent key counts as 0.
    pub fn increment(key: impl Into<Bytes>, by: i64) -> Operation {
        let increment = v1::IncrementOperation { by };
        Operation::of(key, v1::operation::Kind::Increment(increment))
    }

    /// Changes nothing: for the condition alone.
    pub fn check(key: impl Into<Bytes>) -> Operation {
        Operation::of(key, v1::operation::Kind::Check(v1::CheckOperation {}))
    }

    /// The value expires after this long; of a put.
    pub fn ttl(mut self, ttl: Duration) -> Operation {
        if let Some(v1::operation::Kind::Put(put)) = &mut self.0.kind {
            // A time to live that is too long for the field is far beyond the limit, which is
            // checked when the batch is sent; one of zero would mean for ever there.
            put.ttl_ms = ttl_ms(Some(ttl)).unwrap_or(u64::MAX);
        }
        self
    }

    /// Only when the key is absent (or expired).
    pub fn if_absent(self) -> Operation {
        self.when(v1::condition::Kind::IfAbsent(true))
    }

    /// Only when the key's current version is this one.
    pub fn if_version(self, version: Version) -> Operation {
        self.when(v1::condition::Kind::IfVersion(version.0))
    }

    /// Only when the key's current value is this one.
    pub fn if_value(self, value: impl Into<Bytes>) -> Operation {
        self.when(v1::condition::Kind::IfValue(value.into()))
    }

    fn of(key: impl Into<Bytes>, kind: v1::operation::Kind) -> Operation {
        Operation(v1::Operation { key: key.into(), condition: None, kind: Some(kind) })
    }

    fn when(mut self, condition: v1::condition::Kind) -> Operation {
        self.0.condition = Some(v1::Condition { kind: Some(condition) });
        self
    }
}

/// An atomic batch inside one entity: all operations or none. Awaiting it gives [`BatchOutcome`].
#[must_use = "a call is made when it is awaited"]
pub struct Batch {
    target: Target,
    operations: Vec<v1::Operation>,
}

impl Batch {
    pub(crate) fn new(target: Target, operations: impl IntoIterator<Item = Operation>) -> Batch {
        Batch { target, operations: operations.into_iter().map(|operation| operation.0).collect() }
    }

    /// How long the call may take, retries included.
    pub fn timeout(mut self, timeout: Duration) -> Batch {
        self.target.timeout = Some(timeout);
        self
    }

    async fn send(self) -> Result<BatchOutcome, Error> {
        limits::check_batch(&self.operations)?;
        let key = self.operations[0].key.clone();
        let request = v1::WriteRequest {
            keyspace: self.target.name(),
            operations: self.operations,
            ..Default::default()
        };
        match self.target.call(key, Wire::Write(request)).await? {
            Answer::Write(response) => Ok(BatchOutcome::from_wire(response)),
            _ => Err(Error::wrong_answer(true)),
        }
    }
}

impl IntoFuture for Batch {
    type Output = Result<BatchOutcome, Error>;
    type IntoFuture = Pending<BatchOutcome>;

    fn into_future(self) -> Pending<BatchOutcome> {
        Box::pin(self.send())
    }
}

/// Adds to a decimal counter. Awaiting it gives [`Counter`].
#[must_use = "a call is made when it is awaited"]
pub struct Increment {
    batch: Batch,
}

impl Increment {
    pub(crate) fn new(target: Target, key: Bytes, by: i64) -> Increment {
        Increment { batch: Batch::new(target, [Operation::increment(key, by)]) }
    }

    /// How long the call may take, retries included.
    pub fn timeout(mut self, timeout: Duration) -> Increment {
        self.batch.target.timeout = Some(timeout);
        self
    }
}

impl IntoFuture for Increment {
    type Output = Result<Counter, Error>;
    type IntoFuture = Pending<Counter>;

    fn into_future(self) -> Pending<Counter> {
        Box::pin(async move {
            let outcome = self.batch.send().await?;
            match (outcome.applied, outcome.results.first()) {
                (Some(version), Some(result)) => Ok(Counter {
                    value: result.counter,
                    written: Written { version, served: outcome.served },
                }),
                _ => Err(Error::wrong_answer(true)),
            }
        })
    }
}

/// Reads many keys, each shard's at once. Awaiting it gives `Vec<Option<Entry>>` in the order of
/// the keys; one key that cannot be read fails the whole. The keys of different shards are not read
/// at one moment: for that, scan, or name a version.
#[must_use = "a call is made when it is awaited"]
pub struct MultiGet {
    target: Target,
    keys: Vec<Bytes>,
    at: Option<Version>,
}

impl MultiGet {
    pub(crate) fn new(target: Target, keys: Vec<Bytes>) -> MultiGet {
        MultiGet { target, keys, at: None }
    }

    /// How long the call may take, retries included.
    pub fn timeout(mut self, timeout: Duration) -> MultiGet {
        self.target.timeout = Some(timeout);
        self
    }

    /// How fresh the answers must be, instead of what the handle says.
    pub fn consistency(mut self, consistency: Consistency) -> MultiGet {
        self.target.consistency = consistency;
        self
    }

    /// Asks any replica first, also for the newest state: one that does not lead asks the leader how
    /// far it must have come, and reads what it has itself. Spares the leader the reading, and costs
    /// a way between two nodes.
    pub fn from_any_replica(mut self) -> MultiGet {
        self.target.any_replica = true;
        self
    }

    /// The state at a version; see [`Get::at`].
    pub fn at(mut self, version: Version) -> MultiGet {
        self.at = Some(version);
        self
    }

    /// Reads, and reports each key by itself, in the order of the keys.
    pub async fn each(mut self) -> Vec<Result<Option<Entry>, Error>> {
        let read = match self.target.at(self.at) {
            Ok(read) => read,
            Err(error) => return vec![Err(error); self.keys.len()],
        };
        let mut results: Vec<Option<Result<Option<Entry>, Error>>> = vec![None; self.keys.len()];
        let mut parts: BTreeMap<_, Vec<(usize, Bytes)>> = BTreeMap::new();
        for (place, key) in self.keys.into_iter().enumerate() {
            match limits::check_key(&key) {
                Ok(()) => {
                    let shard = self.target.driver.shard_of(&self.target.keyspace, &key);
                    parts.entry(shard).or_default().push((place, key));
                }
                Err(limit) => results[place] = Some(Err(limit.into())),
            }
        }
        let parts = parts.into_values().flat_map(|keys| {
            let chunks = keys.chunks(limits::BATCH_GET_KEYS_MAX).map(<[_]>::to_vec);
            chunks.collect::<Vec<_>>()
        });
        let parts = parts.map(|keys| read_part(self.target.clone(), keys, read.clone()));
        for (place, result) in join_all(parts).await.into_iter().flatten() {
            results[place] = Some(result);
        }
        let each = results.into_iter();
        each.map(|result| result.expect("every key is of one part or was refused")).collect()
    }
}

impl IntoFuture for MultiGet {
    type Output = Result<Vec<Option<Entry>>, Error>;
    type IntoFuture = Pending<Vec<Option<Entry>>>;

    fn into_future(self) -> Pending<Vec<Option<Entry>>> {
        Box::pin(async move { self.each().await.into_iter().collect() })
    }
}

type Part = Vec<(usize, Result<Option<Entry>, Error>)>;

/// Reads keys of one shard. When their values are too much for one answer, in two halves.
async fn read_part(
    target: Target,
    keys: Vec<(usize, Bytes)>,
    read: Option<v1::ReadOptions>,
) -> Part {
    let error = match batch_get(target.clone(), &keys, read.clone()).await {
        Ok(entries) => {
            let places = keys.into_iter().map(|(place, _)| place);
            return places.zip(entries.into_iter().map(Ok)).collect();
        }
        Err(error) => error,
    };
    if error.kind() == ErrorKind::TooLarge && keys.len() > 1 {
        let (first, second) = keys.split_at(keys.len() / 2);
        let mut part: Part =
            Box::pin(read_part(target.clone(), first.to_vec(), read.clone())).await;
        part.extend(Box::pin(read_part(target, second.to_vec(), read)).await);
        return part;
    }
    keys.into_iter().map(|(place, _)| (place, Err(error.clone()))).collect()
}

async fn batch_get(
    target: Target,
    keys: &[(usize, Bytes)],
    read: Option<v1::ReadOptions>,
) -> Result<Vec<Option<Entry>>, Error> {
    let request = v1::BatchGetRequest {
        keyspace: target.name(),
        keys: keys.iter().map(|(_, key)| key.clone()).collect(),
        read,
    };
    match target.call(keys[0].1.clone(), Wire::BatchGet(request)).await? {
        Answer::BatchGet(response) if response.items.len() == keys.len() => {
            Ok(response.items.into_iter().map(|item| item.entry.map(Entry::from_wire)).collect())
        }
        _ => Err(Error::wrong_answer(false)),
    }
}

fn unconditional(outcome: Cas) -> Result<Written, Error> {
    match outcome {
        Cas::Applied(written) => Ok(written),
        // Without a condition nothing can fail it.
        Cas::Mismatch { .. } => Err(Error::wrong_answer(true)),
    }
}

/// 0 on the wire means for ever, so a time to live of nothing is refused.
fn ttl_ms(ttl: Option<Duration>) -> Result<u64, Error> {
    match ttl {
        None => Ok(0),
        Some(Duration::ZERO) => Err(Error::invalid("ttl is zero: leave it out to keep for ever")),
        Some(ttl) => {
            let ms = ttl.as_nanos().div_ceil(1_000_000);
            Ok(u64::try_from(ms).unwrap_or(u64::MAX))
        }
    }
}

//! Owns the ways to a system under load: the same few operations over each one's own API. Measures
//! nothing and checks nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use coracle_client::{Client, Error, Keyspace, Outcome};
use coracle_proto::v1;
use coracle_proto::v1::kv_service_client::KvServiceClient;
use futures_util::TryStreamExt;
use tonic::Status;
use tonic::transport::Channel;

use crate::failure::Failure;
use crate::peer::etcd::dial;
use crate::peer::etcd_api::{Kv, Op, PutRequest, RangeRequest, RequestOp, TxnRequest};
use crate::peer::redis;
use crate::witness::Witness;

/// A key with its value.
pub type Entry = (Bytes, Bytes);

/// One caller's way to a system.
#[derive(Clone)]
pub enum Port {
    /// Through the smart client: its pipelines.
    Coracle(Keyspace),
    /// A plain gRPC client's unary calls, to whichever node it is connected to.
    Unary(KvServiceClient<Channel>),
    /// etcd's own API.
    Etcd(Kv),
    /// Redis' own.
    Redis(redis::Port),
}

/// A system under load: ways that callers share, and what it was told.
#[derive(Clone)]
pub struct System {
    /// As in tables.
    pub name: &'static str,
    /// Dealt out to the callers in turn.
    pub ports: Vec<Port>,
    /// Judges its answers.
    pub witness: Arc<Witness>,
    /// How many keys were added to it.
    pub added: Arc<AtomicU64>,
}

impl System {
    /// Over these ports, nothing added yet.
    pub fn new(name: &'static str, ports: Vec<Port>, witness: Arc<Witness>) -> System {
        System { name, ports, witness, added: Arc::default() }
    }

    /// The keyspace of some clients.
    pub fn of_clients(clients: &[Client], keyspace: &str, witness: Arc<Witness>) -> System {
        let port = |client: &Client| Port::Coracle(client.keyspace(keyspace));
        System::new("Coracle", clients.iter().map(port).collect(), witness)
    }

    /// So many plain connections to nodes, in turn.
    pub fn of_unary(
        nodes: &[String],
        connections: usize,
        witness: Arc<Witness>,
    ) -> Result<System, Failure> {
        let port = |node: &String| {
            let address: SocketAddr = node.parse().map_err(Failure::of(format!("dial {node}")))?;
            Ok(Port::Unary(KvServiceClient::new(dial(address)?)))
        };
        let ports = nodes.iter().cycle().take(connections).map(port);
        Ok(System::new("Coracle, unary", ports.collect::<Result<_, Failure>>()?, witness))
    }
}

impl Port {
    /// Reads a key, linearizably.
    pub async fn get(&mut self, key: Bytes) -> Result<Option<Bytes>, String> {
        match self {
            Port::Coracle(keyspace) => {
                let found = keyspace.get(key).await.map_err(error_kind)?;
                Ok(found.map(|entry| entry.value))
            }
            Port::Unary(client) => {
                let request = v1::GetRequest { key, ..Default::default() };
                let answer = client.get(request).await.map_err(status_kind)?.into_inner();
                Ok(answer.entry.map(|entry| entry.value))
            }
            Port::Etcd(kv) => {
                let request = RangeRequest { key, range_end: Bytes::new(), limit: 0 };
                let answer = kv.range(request).await.map_err(status_kind)?;
                Ok(answer.kvs.into_iter().next().map(|entry| entry.value))
            }
            Port::Redis(port) => port.get(key).await,
        }
    }

    /// Writes a key.
    pub async fn put(&mut self, key: Bytes, value: Bytes) -> Result<(), String> {
        match self {
            Port::Coracle(keyspace) => {
                keyspace.put(key, value).await.map(|_| ()).map_err(error_kind)
            }
            Port::Unary(client) => {
                let request = v1::PutRequest { key, value, ..Default::default() };
                client.put(request).await.map(|_| ()).map_err(status_kind)
            }
            Port::Etcd(kv) => {
                kv.put(PutRequest { key, value }).await.map(|_| ()).map_err(status_kind)
            }
            Port::Redis(port) => port.put(vec![(key, value)]).await,
        }
    }

    /// Reads up to so many keys from one on, in order.
    pub async fn scan(&mut self, from: Bytes, keys: u64) -> Result<Vec<Entry>, String> {
        match self {
            Port::Coracle(keyspace) => {
                let found = keyspace.scan(from..).limit(keys).stream();
                let found: Vec<_> = found.try_collect().await.map_err(error_kind)?;
                Ok(found.into_iter().map(|found| (found.key, found.value)).collect())
            }
            Port::Etcd(kv) => {
                // From the key to the end of all.
                let (range_end, limit) = (Bytes::from_static(b"\0"), keys as i64);
                let request = RangeRequest { key: from, range_end, limit };
                let answer = kv.range(request).await.map_err(status_kind)?;
                Ok(answer.kvs.into_iter().map(|entry| (entry.key, entry.value)).collect())
            }
            Port::Unary(_) | Port::Redis(_) => Err("no scans".to_owned()),
        }
    }

    /// Reads keys in one call, in their order.
    pub async fn get_many(&mut self, keys: Vec<Bytes>) -> Result<Vec<Option<Bytes>>, String> {
        match self {
            Port::Etcd(kv) => {
                let range = |key| RangeRequest { key, range_end: Bytes::new(), limit: 0 };
                let op = |key| RequestOp { op: Some(Op::Range(range(key))) };
                let request = TxnRequest { success: keys.into_iter().map(op).collect() };
                let answer = kv.txn(request).await.map_err(status_kind)?;
                let found = answer.responses.into_iter().map(|response| {
                    let entry = response.range.and_then(|range| range.kvs.into_iter().next());
                    entry.map(|entry| entry.value)
                });
                Ok(found.collect())
            }
            Port::Coracle(keyspace) => {
                let found = keyspace.multi_get(keys).await.map_err(error_kind)?;
                Ok(found.into_iter().map(|found| found.map(|entry| entry.value)).collect())
            }
            Port::Unary(_) | Port::Redis(_) => Err("no batches of reads".to_owned()),
        }
    }

    /// Writes different keys in one call.
    pub async fn put_many(&mut self, entries: Vec<Entry>) -> Result<(), String> {
        match self {
            Port::Etcd(kv) => {
                let put = |(key, value)| RequestOp { op: Some(Op::Put(PutRequest { key, value })) };
                let request = TxnRequest { success: entries.into_iter().map(put).collect() };
                kv.txn(request).await.map(|_| ()).map_err(status_kind)
            }
            Port::Redis(port) => port.put(entries).await,
            // A batch is of one entity; these keys are of as many.
            Port::Coracle(_) | Port::Unary(_) => Err("no batches over entities".to_owned()),
        }
    }
}

/// As it stands in the report: what it was, why, and what is known of a write.
pub fn error_kind(error: Error) -> String {
    let reason = error.reason().map(|reason| format!(" {reason}")).unwrap_or_default();
    let outcome = if error.outcome() == Outcome::Unknown { ", outcome unknown" } else { "" };
    format!("{:?}{reason}{outcome}", error.kind())
}

fn status_kind(status: Status) -> String {
    format!("{:?}", status.code())
}

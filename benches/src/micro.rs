//! Owns the measurement of single parts, each alone in this process: what one call costs at best. No
//! sockets, no cluster.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use coracle_proto::shard_map::ShardMap;
use coracle_proto::v1;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response;
use coracle_storage::state::{KeyRange, OpenState, ReplicaState, RocksEngines, StateOptions};
use coracle_storage::{Log, LogEntry, LogOptions, RealExec, RealFs, ReplicaId};
use prost::Message;

use crate::failure::Failure;
use crate::workload::{Choices, Distribution, Mix, Workload, key};

/// How long each part is measured at a time, and how often: the fastest time counts, since nothing
/// makes a part faster than it is.
const SLICE: Duration = Duration::from_millis(if cfg!(test) { 2 } else { 100 });
const SLICES: usize = 5;

/// Keys of the store that is read.
const KEYS: u64 = if cfg!(test) { 1_000 } else { 100_000 };

/// Operations of a frame, puts of a batch, entries of an append.
const TOGETHER: usize = 100;

/// Measures all parts: nanoseconds for one operation of each.
pub async fn run(dir: &Path) -> Result<Vec<(String, f64)>, Failure> {
    let workload = Workload::new(Mix::reads(50), Distribution::Uniform, KEYS, 256, 1)?;
    let mut found = routing(&workload)?;
    found.extend(frames(&workload));
    found.extend(tokio::task::block_in_place(|| state(dir, &workload))?);
    found.extend(appends(dir, &workload)?);
    Ok(found.into_iter().map(|(name, nanos)| (name.to_owned(), nanos)).collect())
}

/// The fastest of some slices; `step` says how many operations it did.
fn nanos(mut step: impl FnMut() -> u64) -> f64 {
    let slice = |_| {
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < SLICE {
            done += step();
        }
        began.elapsed().as_nanos() as f64 / done.max(1) as f64
    };
    (0..SLICES).map(slice).fold(f64::MAX, f64::min)
}

fn routing(workload: &Workload) -> Result<Vec<(&'static str, f64)>, Failure> {
    let mut found = Vec::new();
    for (name, shards) in [("key to shard, 16 shards", 16), ("key to shard, 1,024 shards", 1_024)] {
        let map = ShardMap::from_proto(&map(shards)).map_err(Failure::of("make a map"))?;
        let keyspace = map.keyspace("default").ok_or_else(|| Failure::new("no keyspace"))?;
        let mut choices = workload.choices(0);
        let keys: Vec<Bytes> = (0..1_024).map(|_| key(choices.number())).collect();
        let all = || {
            keys.iter().for_each(|key| {
                black_box(map.locate_key(keyspace, key).id);
            });
            keys.len() as u64
        };
        found.push((name, nanos(all)));
    }
    Ok(found)
}

/// A map of so many equal shards on three nodes.
fn map(shards: u64) -> v1::ShardMap {
    let width = u64::MAX / shards + 1;
    let replicas = |shard: u64| {
        let replica = |node: u64| v1::Replica {
            id: shard * 3 + node,
            node,
            role: v1::ReplicaRole::Voter.into(),
            ..Default::default()
        };
        (1..=3).map(replica).collect()
    };
    let arc = |shard: u64| {
        let (start, end) = ((shard - 1).wrapping_mul(width), shard.wrapping_mul(width));
        v1::Shard {
            id: shard,
            start,
            end,
            epoch: 1,
            replicas: replicas(shard),
            ..Default::default()
        }
    };
    let meta = v1::Shard { epoch: 1, replicas: replicas(0), ..Default::default() };
    let rule = coracle_proto::entity::EntityRule::Whole;
    v1::ShardMap {
        cluster_id: "bench".to_owned(),
        epoch: 1,
        shards: std::iter::once(meta).chain((1..=shards).map(arc)).collect(),
        nodes: (1..=3).map(|id| v1::Node { id, ..Default::default() }).collect(),
        keyspaces: vec![v1::Keyspace {
            id: 1,
            name: "default".to_owned(),
            entity_rule: Some(rule.into()),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn put_request(choices: &mut Choices, id: u64) -> v1::PipelineRequest {
    let put = v1::PutRequest {
        keyspace: "default".to_owned(),
        key: key(choices.number()),
        value: choices.value(&[]),
        request_id: Some(v1::RequestId {
            client: u64::MAX,
            sequence: id,
            birth: 1 << 40,
            lowest_unanswered: id,
        }),
        route: Some(v1::Route { shard: 7, shard_epoch: 1 }),
        ..Default::default()
    };
    v1::PipelineRequest { id, timeout_ms: 1_000, operation: Some(Operation::Put(put)) }
}

fn get_response(choices: &mut Choices, id: u64) -> v1::PipelineResponse {
    let entry = v1::Entry { value: choices.value(&[]), version: 1 << 56, expires_at_ms: 0 };
    let served = v1::Served {
        shard: 7,
        term: 3,
        index: 1 << 20,
        node: 2,
        leader: true,
        server_time_ms: 1 << 40,
        ..Default::default()
    };
    let get = v1::GetResponse { entry: Some(entry), served: Some(served) };
    v1::PipelineResponse { id, result: Some(pipeline_response::Result::Get(get)) }
}

fn frames(workload: &Workload) -> Vec<(&'static str, f64)> {
    let mut choices = workload.choices(0);
    let requests = (0..TOGETHER as u64).map(|id| put_request(&mut choices, id)).collect();
    let requests = v1::PipelineRequests { requests };
    let responses = (0..TOGETHER as u64).map(|id| get_response(&mut choices, id)).collect();
    let responses = v1::PipelineResponses { responses };
    let (asked, answered) =
        (Bytes::from(requests.encode_to_vec()), Bytes::from(responses.encode_to_vec()));
    let count = TOGETHER as u64;
    vec![
        (
            "frame of puts, encoded, for each",
            nanos(|| {
                black_box(requests.encode_to_vec());
                count
            }),
        ),
        (
            "frame of puts, decoded, for each",
            nanos(|| {
                black_box(v1::PipelineRequests::decode(asked.clone()).is_ok());
                count
            }),
        ),
        (
            "frame of gets' answers, encoded, for each",
            nanos(|| {
                black_box(responses.encode_to_vec());
                count
            }),
        ),
        (
            "frame of gets' answers, decoded, for each",
            nanos(|| {
                black_box(v1::PipelineResponses::decode(answered.clone()).is_ok());
                count
            }),
        ),
    ]
}

/// A store with a node's options.
fn open_store(dir: &Path) -> Result<ReplicaState, Failure> {
    let on_fatal = |error: &coracle_storage::Error| eprintln!("the store failed: {error}");
    let engines = RocksEngines::on_disk(&StateOptions::default(), Arc::new(on_fatal));
    let engines = engines.map_err(Failure::of("prepare RocksDB"))?;
    let store = ReplicaState::open(&engines, &dir.join("state"), OpenState { create: true });
    store.map_err(Failure::of("open a store"))
}

fn state(dir: &Path, workload: &Workload) -> Result<Vec<(&'static str, f64)>, Failure> {
    let dir = tempfile::Builder::new().prefix("coracle-bench-").tempdir_in(dir);
    let dir = dir.map_err(Failure::of("make a directory"))?;
    let store = open_store(dir.path())?;
    let (mut choices, mut failed) = (workload.choices(0), None);
    let mut version = 0;
    let mut batch_of = |numbers: &[u64], choices: &mut Choices| {
        let mut batch = store.overlay();
        for number in numbers {
            version += 1;
            batch.put(1, &key(*number), version, &choices.value(&[]), 0);
        }
        batch.into_batch()
    };
    let numbers: Vec<u64> = (0..workload.keys).collect();
    for numbers in numbers.chunks(TOGETHER) {
        let batch = batch_of(numbers, &mut choices);
        store.write(batch).map_err(Failure::of("load a store"))?;
    }
    store.flush().map_err(Failure::of("flush"))?;
    let mut note = |result: Result<(), coracle_storage::Error>| {
        if let Err(error) = result {
            failed = Some(error.to_string());
        }
    };
    let points = nanos(|| {
        note(store.get_at(1, &key(choices.number()), u64::MAX).map(|found| {
            black_box(found);
        }));
        1
    });
    let views = nanos(|| {
        note(store.reader().and_then(|reader| {
            for _ in 0..TOGETHER {
                black_box(reader.get_at(1, &key(choices.number()), u64::MAX)?);
            }
            Ok(())
        }));
        TOGETHER as u64
    });
    let scans = nanos(|| {
        let mut count = 0;
        note(store.reader().and_then(|reader| {
            let range = KeyRange { start: key(choices.number()).to_vec(), end: None };
            for found in reader.scan(1, range, false, u64::MAX)?.take(1_000) {
                black_box(found?);
                count += 1;
            }
            Ok(())
        }));
        count.max(1)
    });
    let batches = nanos(|| {
        let numbers: Vec<u64> = (0..TOGETHER).map(|_| choices.number()).collect();
        note(store.write(batch_of(&numbers, &mut choices)));
        TOGETHER as u64
    });
    match failed {
        Some(failed) => Err(Failure::new(format!("measure a store: {failed}"))),
        None => Ok(vec![
            ("point read", points),
            ("point read, a hundred in one view", views),
            ("scan, for each key", scans),
            ("put in the batch that applies a hundred", batches),
        ]),
    }
}

fn appends(dir: &Path, workload: &Workload) -> Result<Vec<(&'static str, f64)>, Failure> {
    let dir = tempfile::Builder::new().prefix("coracle-bench-").tempdir_in(dir);
    let dir = dir.map_err(Failure::of("make a directory"))?;
    let exec = Arc::new(RealExec::new(tokio::runtime::Handle::current(), 1));
    let opened = Log::open(Arc::new(RealFs), exec, &dir.path().join("log"), LogOptions::default());
    let (log, _) = opened.map_err(Failure::of("open a log"))?;
    let replicas: Vec<ReplicaId> = (1..=16).map(ReplicaId).collect();
    let wait = |count: usize, queue: &mut dyn FnMut(usize, coracle_storage::Done)| {
        let (sender, receiver) = mpsc::channel();
        for at in 0..count {
            let sender = sender.clone();
            queue(at, Box::new(move |done| drop(sender.send(done.map_err(|e| e.to_string())))));
        }
        drop(sender);
        let first_error = receiver.iter().find_map(Result::err);
        first_error.map_or(Ok(()), |error| Err(Failure::new(format!("append: {error}"))))
    };
    wait(replicas.len(), &mut |at, done| log.create(replicas[at], done))?;
    let (mut choices, mut failed) = (workload.choices(0), Ok(()));
    let mut last = vec![0; replicas.len()];
    let mut found = Vec::new();
    for (name, groups) in
        [("log append and sync, one group", 1), ("log append, 16 groups in one sync, each", 16)]
    {
        let mut step = || {
            let done = wait(groups, &mut |at, done| {
                last[at] += 1;
                let (index, payload) = (last[at], choices.value(&[]));
                log.append(replicas[at], vec![LogEntry { index, id: [0; 16], payload }], done);
            });
            if done.is_err() {
                failed = done;
            }
            groups as u64
        };
        found.push((name, tokio::task::block_in_place(|| nanos(&mut step))));
    }
    failed.map(|()| found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn every_part_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let found = run(dir.path()).await.unwrap();
        assert!(found.iter().all(|(_, nanos)| *nanos > 0.0 && *nanos < 1e9), "{found:?}");
        assert!(found.len() >= 10);
    }
}

//! The commands against a real cluster: what is printed, with which code they end, and that an import
//! and an export bring everything there and back.

use serde_json::Value;

use super::Bench;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_go_in_and_come_out() {
    let bench = Bench::start(3).await;
    let (said, _) = bench.expect(&["put", "hello", "world"], 0).await;
    assert!(said.starts_with("hello written, version "), "{said}");
    assert_eq!(bench.expect(&["get", "hello"], 0).await.0, "world");
    let (out, err) = bench.expect(&["get", "nothing"], 3).await;
    assert!(out.is_empty() && err.contains("nothing"), "{out} {err}");

    let entry = json(&bench.expect(&["get", "hello", "-o", "json"], 0).await.0);
    assert_eq!((&entry["kind"], &entry["value"]["utf8"]), (&"Entry".into(), &"world".into()));
    let version = entry["version"].as_str().unwrap().to_owned();
    bench.expect(&["put", "hello", "again", "--if-absent"], 8).await;
    bench.expect(&["put", "hello", "again", "--if-version", "1"], 8).await;
    bench.expect(&["put", "hello", "again", "--if-version", &version], 0).await;
    bench.expect(&["delete", "hello", "--if-value", "world"], 8).await;
    bench.expect(&["delete", "hello", "--if-value", "again"], 0).await;
    bench.expect(&["get", "hello"], 3).await;

    // A session goes from command to command, and whoever serves it has seen what it has.
    let session = bench.home.path().join("session").display().to_string();
    for round in 0..6 {
        let value = round.to_string();
        bench.expect(&["put", "seen", &value, "--session-file", &session], 0).await;
        let (found, _) = bench.expect(&["get", "seen", "--session-file", &session], 0).await;
        assert_eq!(found, value);
    }
    bench.expect(&["get", "seen", "--consistency", "any"], 0).await;
    let bounded = ["get", "seen", "--consistency", "bounded"];
    let (_, err) = bench.expect(&bounded, 2).await;
    assert!(err.contains("--max-staleness"), "{err}");
    let (_, err) = bench.expect(&["get", "seen", "--max-staleness", "1s"], 2).await;
    assert!(err.contains("--consistency bounded"), "{err}");
    // The last write is older than the bound by then, or the leader serves it.
    let (found, _) = bench.expect(&[&bounded[..], &["--max-staleness", "1ms"]].concat(), 0).await;
    assert_eq!(found, "5");
    std::fs::write(&session, "{\"utf8\":\"x\"}").unwrap();
    let (_, err) = bench.expect(&["get", "seen", "--session-file", &session], 1).await;
    assert!(err.contains("no session's") && err.contains("begin anew"), "{err}");

    let piped = bench.run_with(&["put", "bin/\\x00", "-", "--encoding", "escape"], b"\xff\n").await;
    assert!(piped.status.success(), "{piped:?}");
    let raw = bench.run_with(&["get", "62696e2f00", "--encoding", "hex"], b"").await;
    assert_eq!(raw.stdout, b"ff0a\n");
    for key in ["user/2", "user/1", "user/3"] {
        bench.expect(&["put", key, "x"], 0).await;
    }
    let scan = ["scan", "--prefix", "user/", "--keys-only"];
    assert_eq!(bench.expect(&scan, 0).await.0, "user/1\nuser/2\nuser/3\n");
    let last = [&scan[..], &["--reverse", "--limit", "1"]].concat();
    assert_eq!(bench.expect(&last, 0).await.0, "user/3\n");
    let (lines, _) = bench.expect(&[&scan[..], &["-o", "jsonl"]].concat(), 0).await;
    assert_eq!(json(lines.lines().next().unwrap())["key"]["utf8"], "user/1");
    let list = json(&bench.expect(&[&scan[..], &["-o", "json"]].concat(), 0).await.0);
    assert_eq!((list["items"].as_array().unwrap().len(), &list["kind"]), (3, &"EntryList".into()));
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_shows_itself() {
    let mut bench = Bench::start(3).await;
    let status = bench.expect(&["status"], 0).await.0;
    assert!(status.starts_with("Fault tolerance: can lose any 1 node, or any 1 zone,"), "{status}");
    let nodes = json(&bench.expect(&["node", "ls", "-o", "json"], 0).await.0);
    let nodes = nodes["items"].as_array().unwrap();
    assert_eq!(nodes.len(), 3);
    assert!(nodes.iter().all(|node| node["state"] == "active"), "{nodes:?}");
    let shards = json(&bench.expect(&["shard", "ls", "-o", "json"], 0).await.0);
    let shards = shards["items"].as_array().unwrap();
    assert_eq!(shards.len(), 17, "16 and the meta group");
    let leader = shards[1]["leader"].as_u64().unwrap();
    let (id, to) = (shards[1]["id"].to_string(), format!("n{}", leader % 3 + 1));
    bench.expect(&["shard", "transfer-leader", &id, "--to", &to], 0).await;
    let again = json(&bench.expect(&["shard", "ls", "-o", "json"], 0).await.0);
    assert_eq!(again["items"][1]["leader"], leader % 3 + 1);
    bench.expect(&["shard", "transfer-leader", "9999"], 1).await;

    bench.expect(&["keyspace", "create", "orders", "--entity", "delimiter:/"], 0).await;
    let list = bench.expect(&["keyspace", "ls"], 0).await.0;
    assert!(
        list.lines().any(|line| line.starts_with("orders") && line.contains("delimiter:/")),
        "{list}"
    );
    bench.expect(&["put", "7/a", "x", "-k", "orders"], 0).await;
    bench.expect(&["get", "7/a"], 3).await;
    bench.expect(&["keyspace", "create", "orders", "--entity", "delimiter:/"], 0).await;
    bench.expect(&["keyspace", "create", "orders"], 8).await;
    // What no map may hold changes nothing, and the next one is made as before.
    bench.expect(&["keyspace", "create", "system"], 2).await;
    bench.expect(&["keyspace", "create", "long", "--history", "1h"], 0).await;
    bench.expect(&["keyspace", "create", "long", "--history", "2h"], 8).await;
    bench.expect(&["keyspace", "set", "long", "--history", "2h"], 0).await;
    bench.expect(&["keyspace", "set", "long", "--history", "2h"], 0).await;
    bench.expect(&["keyspace", "set", "missing", "--history", "2h"], 1).await;
    bench.expect(&["keyspace", "set", "system", "--history", "2h"], 7).await;
    bench.expect(&["keyspace", "set", "long", "--history", "9d"], 2).await;
    let list = bench.expect(&["keyspace", "ls"], 0).await.0;
    assert!(list.lines().any(|line| line.starts_with("long") && line.contains("2h")), "{list}");
    let version = |put: String| json(&put)["version"].as_str().unwrap().to_owned();
    let old = version(bench.expect(&["put", "a", "1", "-k", "long", "-o", "json"], 0).await.0);
    bench.expect(&["put", "a", "2", "-k", "long"], 0).await;
    assert_eq!(bench.expect(&["get", "a", "-k", "long", "--at", &old], 0).await.0, "1");
    let scanned = bench.expect(&["scan", "-k", "long", "--at", &old, "-o", "json"], 0).await.0;
    let scanned = &json(&scanned)["items"];
    assert_eq!((&scanned[0]["version"], scanned.as_array().unwrap().len()), (&old.into(), 1));
    let (_, err) = bench.expect(&["get", "a", "-k", "long", "--at", "1"], 8).await;
    assert!(err.contains("older than the keyspace's history"), "{err}");
    let compacted = json(&bench.expect(&["shard", "compact", &id, "-o", "json"], 0).await.0);
    assert_eq!(compacted["items"].as_array().unwrap().len(), 3, "{compacted}");
    bench.expect(&["keyspace", "create", "later"], 0).await;
    bench.expect(&["init"], 8).await;

    bench.cluster.kill(2);
    bench.cluster.reap(2).await;
    let status = bench.expect(&["status"], 4).await;
    let settled = status.0.contains("none. One more node lost");
    assert!(settled, "{status:?}");
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_go_in_and_come_out_the_same() {
    let bench = Bench::start(3).await;
    let dir = bench.home.path();
    let path = |name: &str| dir.join(name).display().to_string();
    let record = |number: u32| format!("key/{number:05}\tvalue {number}\\n\n");
    let table: String = (0..3_000).map(record).collect();
    std::fs::write(path("in.tsv"), &table).unwrap();
    let (source, state) = (path("in.tsv"), path("in.state"));

    let first = ["import", &source, "--resume", &state, "--limit", "1000"];
    bench.expect(&first, 0).await;
    let saved = json(&std::fs::read_to_string(&state).unwrap());
    assert_eq!((&saved["records"], &saved["done"]), (&1_000.into(), &false.into()));
    bench.expect(&["import", &source, "--resume", &state], 0).await;
    let saved = json(&std::fs::read_to_string(&state).unwrap());
    assert_eq!((&saved["records"], &saved["done"]), (&3_000.into(), &true.into()));

    for name in ["out.tsv", "out.ndjson"] {
        bench.expect(&["export", &path(name), "--prefix", "key/"], 0).await;
    }
    assert_eq!(std::fs::read_to_string(path("out.tsv")).unwrap(), table);
    bench.expect(&["keyspace", "create", "copy"], 0).await;
    bench.expect(&["import", &path("out.ndjson"), "-k", "copy"], 0).await;
    let (piped, _) = bench.expect(&["export", "-k", "copy", "--format", "tsv"], 0).await;
    assert_eq!(piped, table);

    std::fs::write(path("bad.tsv"), "a\t1\nbad\nb\t2\n").unwrap();
    let (_, err) = bench.expect(&["import", &path("bad.tsv"), "-k", "copy"], 1).await;
    assert!(err.contains("bad.tsv:2") && err.contains("--skip-bad"), "{err}");
    assert_eq!(bench.expect(&["get", "a", "-k", "copy"], 0).await.0, "1");
    bench.expect(&["get", "b", "-k", "copy"], 3).await;
    let (_, err) = bench.expect(&["import", &path("bad.tsv"), "-k", "copy", "--skip-bad"], 0).await;
    assert!(err.contains("bad.tsv:2"), "{err}");
    assert_eq!(bench.expect(&["get", "b", "-k", "copy"], 0).await.0, "2");

    // A record that is not written ends what counts as done, whatever behind it was written already.
    let large = "x".repeat(2 << 20);
    std::fs::write(path("large.tsv"), format!("a\t1\nlarge\t{large}\nc\t1\nc\t2\n")).unwrap();
    let (source, state) = (path("large.tsv"), path("large.state"));
    let (_, err) = bench.expect(&["import", &source, "-k", "copy", "--resume", &state], 1).await;
    assert!(err.contains("line 2"), "{err}");
    let saved = json(&std::fs::read_to_string(&state).unwrap());
    assert_eq!((&saved["records"], &saved["done"]), (&1.into(), &false.into()));
    bench.stop().await;
}

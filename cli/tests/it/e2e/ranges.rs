//! Deleting ranges against a real cluster: asking first, one entity at once, steps with a state.

use serde_json::Value;

use super::Bench;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_are_counted_deleted_and_gone_on_with() {
    let bench = Bench::start(3).await;
    bench.expect(&["keyspace", "create", "orders", "--entity", "delimiter:/"], 0).await;
    let table: String = (0..300).map(|n| format!("{}/{n:03}\tx\n", n % 3)).collect();
    let path = bench.home.path().join("in.tsv").display().to_string();
    std::fs::write(&path, table).unwrap();
    bench.expect(&["import", &path, "-k", "orders"], 0).await;
    let delete = ["delete-range", "-k", "orders"];
    let with = |more: &[&'static str]| [&delete[..], more].concat();

    // All of a keyspace only after asking, and nobody is there to be asked.
    let (_, err) = bench.expect(&delete, 2).await;
    assert!(err.contains("every key of keyspace orders") && err.contains("--yes"), "{err}");
    let counted = json(&bench.expect(&with(&["--dry-run", "-o", "json"]), 0).await.0);
    assert_eq!(
        (&counted["kind"], &counted["wouldDelete"]),
        (&"DeleteRangeDryRun".into(), &300.into())
    );

    let (said, _) = bench.expect(&with(&["--prefix", "0/", "--atomic"]), 0).await;
    assert_eq!(said, "100 keys of keyspace orders deleted\n");
    let (_, err) = bench.expect(&with(&["--start", "1/", "--atomic"]), 2).await;
    assert!(err.contains("CROSS_ENTITY"), "{err}");

    let state = bench.home.path().join("state").display().to_string();
    let resumed = ["--start", "1/2", "--end", "2/1", "--resume", &state];
    let resumed = [&delete[..], &resumed].concat();
    let done = json(&bench.expect(&[&resumed[..], &["-o", "json"]].concat(), 0).await.0);
    assert_eq!((&done["kind"], &done["deleted"]), (&"DeletedRange".into(), &66.into()), "{done}");
    let saved = json(&std::fs::read_to_string(&state).unwrap());
    assert_eq!((&saved["deleted"], &saved["done"]), (&66.into(), &true.into()));
    // It is done: what was written since stays.
    bench.expect(&["put", "1/299", "x", "-k", "orders"], 0).await;
    bench.expect(&resumed, 0).await;
    bench.expect(&["get", "1/299", "-k", "orders"], 0).await;
    let other = [&delete[..], &["--prefix", "1/", "--resume", &state]].concat();
    let (_, err) = bench.expect(&other, 2).await;
    assert!(err.contains("another delete-range"), "{err}");

    let (said, _) = bench.expect(&with(&["--yes"]), 0).await;
    assert_eq!(said, "135 keys of keyspace orders deleted\n");
    assert_eq!(bench.expect(&["scan", "-k", "orders"], 0).await.0, "");
    bench.stop().await;
}

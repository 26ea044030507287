//! Reads in a session: any replica serves them, and none is behind what the client has seen, nor behind
//! what another client handed over to it.

use coracle_client::Consistency;

use super::Bench;

const KEYS: u32 = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_serve_a_session_and_it_never_goes_back() {
    let bench = Bench::start(3).await;
    let writer = bench.cluster.client();
    let reads = writer.with_consistency(Consistency::Session);
    let mut by_followers = 0;
    for round in 0..3 {
        for number in 0..KEYS {
            let (key, value) = (format!("k{number}"), format!("{round}"));
            writer.put(key.clone(), value.clone()).await.expect("a healthy cluster");
            let read = reads.get(key).read().await.expect("a healthy cluster");
            let entry = read.entry.expect("its own write is there");
            assert_eq!(entry.value, value, "served by {:?}", read.served);
            by_followers += u32::from(!read.served.leader);
        }
    }
    assert!(by_followers > KEYS, "only {by_followers} of {} by followers", 3 * KEYS);

    let builder = coracle_client::Client::builder().seeds([bench.cluster.nodes()[1].address()]);
    let other = builder.connect().await.expect("a healthy cluster");
    let other = other.with_consistency(Consistency::Session);
    for number in 0..KEYS {
        let key = format!("k{number}");
        writer.put(key.clone(), "handed over").await.expect("a healthy cluster");
        other.take_in(&writer.session_mark()).expect("a mark");
        let entry = other.get(key).await.expect("a healthy cluster").expect("it is there");
        assert_eq!(entry.value, "handed over");
    }
    bench.stop().await;
}

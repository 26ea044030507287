//! Leadership that is handed over. Finds a leader that stops serving for a successor that may not be
//! elected yet.

#![allow(clippy::disallowed_methods, reason = "these hosts run on the real seams")]

use std::sync::atomic::Ordering;

use coracle_raft::types::NodeId;

use crate::cluster::{Cluster, SHARD};
use crate::members::{soon, until};

/// Restarts until one is caught in time: a slow machine may take longer than the embargo lasts.
const RESTARTS: u64 = 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_hands_over_to_a_node_under_the_embargo() {
    let mut cluster = Cluster::new().await;
    cluster.put("k0", "v0").await;
    let mut caught = 0;
    for start in 2..2 + RESTARTS {
        let leader = cluster.leading().await;
        let (led, term) = (cluster.leader().expect("a leader").0, leader.status().term);
        let to = (1..=3).map(NodeId).find(|node| *node != led).expect("another");
        cluster.stop(to).await;
        cluster.restart(to, start).await;
        let target = cluster.nodes[&to].host.group(SHARD).expect("it is there");
        let last = leader.status().last_index;
        until("the restarted replica has the log", || target.status().last_index >= last).await;
        until("its leader has heard it", || {
            let heard = leader.status().members.get(&target.replica().0).and_then(|m| m.heard);
            heard.is_some_and(|heard| heard < std::time::Duration::from_millis(100))
                || !target.is_under_embargo()
        })
        .await;
        caught += u32::from(target.is_under_embargo());
        let handed = leader.hand_over(Some(to), soon()).await;
        assert_eq!(handed, Ok(to), "it waits for the one that was named");
        assert!(!target.is_under_embargo(), "and that may lead by then");
        if leader.status().term == term + 1 && caught >= 3 {
            break;
        }
        cluster.put("k0", "v1").await;
    }
    assert!(caught > 0, "no restart was quick enough to be caught in the embargo");
    let sent = cluster.wires.to_embargoed.load(Ordering::SeqCst);
    assert_eq!(sent, 0, "leaderships went to nodes that could not take them");
}

//! Voters that move, and nodes that are drained, while everything else goes wrong. No fault, but work
//! that faults interrupt. Owns what is asked for, and when.

use std::time::Duration;

use coracle_client::Client;
use coracle_client::admin::Control;
use coracle_client::topology::{ClusterMap, NodeId, ShardId};
use tokio::time::Instant;

use super::Nemesis;

/// A thing is asked for once; without an answer nobody knows whether it was begun.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

impl Nemesis<'_> {
    /// Has voters move now and then, until the end; some moves are paused, cancelled or undone, some
    /// nodes drained.
    pub(super) async fn move_voters(&self, end: Instant) {
        if !self.mix.moves {
            return;
        }
        let client = match self.cluster.client("mover").connect_lazy() {
            Ok(client) => client,
            Err(error) => {
                self.unexplained.borrow_mut().push(format!("the mover's client: {error}"));
                return;
            }
        };
        while self.pause(100, 1_500, end).await {
            let admin = client.admin();
            let Ok(Ok(map)) = tokio::time::timeout(ASK_TIMEOUT, admin.map()).await else {
                continue;
            };
            match self.below(6) {
                0 => self.interfere(&client).await,
                1 => self.drain(&client, &map).await,
                _ => self.move_one(&client, &map).await,
            }
        }
        client.close().await;
    }

    async fn move_one(&self, client: &Client, map: &ClusterMap) {
        let shard = &map.shards[self.below(map.shards.len() as u64) as usize];
        let from = shard.replicas[self.below(shard.replicas.len() as u64) as usize].node;
        let to = map.nodes[self.below(map.nodes.len() as u64) as usize].id;
        if shard.replicas.iter().any(|replica| replica.node == to) {
            return;
        }
        self.asked(client, shard.id, from, to).await;
    }

    async fn asked(&self, client: &Client, shard: ShardId, from: NodeId, to: NodeId) {
        self.trace.event(format_args!("a voter of {shard} moves from n{from} to n{to}"));
        let admin = client.admin();
        let moved = tokio::time::timeout(ASK_TIMEOUT, admin.move_replica(shard, from, to)).await;
        if matches!(moved, Ok(Ok(_))) {
            self.note("voter moved");
        }
    }

    async fn interfere(&self, client: &Client) {
        let control = match self.below(4) {
            0 => Control::Pause,
            1 => Control::Resume,
            2 => Control::Cancel,
            _ => Control::Undo,
        };
        self.trace.event(format_args!("{control:?} an operation"));
        let admin = client.admin();
        if let Ok(Ok(_)) = tokio::time::timeout(ASK_TIMEOUT, admin.control(None, control)).await {
            self.note("operation interfered with");
        }
    }

    async fn drain(&self, client: &Client, map: &ClusterMap) {
        let node = map.nodes[self.below(map.nodes.len() as u64) as usize].id;
        self.trace.event(format_args!("n{node} is drained, and is not"));
        let admin = client.admin();
        if let Ok(Ok(_)) = tokio::time::timeout(ASK_TIMEOUT, admin.drain(node)).await {
            self.note("node drained");
        }
        tokio::time::sleep(Duration::from_millis(200 + self.below(2_000))).await;
        // Asked once more at the end, should this one be lost.
        let _ = tokio::time::timeout(ASK_TIMEOUT, admin.undrain(node)).await;
    }
}
